"""Benchmarks of setattn beside other code for the same blocks: ``python -m benchmarks --help``."""
