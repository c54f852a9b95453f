"""Advice on the size of chunks: what tasks cost and workers hold, by counting."""

from setattn._typing import Array


def advise(function: str, q: Array, y: Array) -> None:
    return
