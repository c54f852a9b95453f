"""Weights from files: the layouts in which known implementations keep them, and the library's own."""
