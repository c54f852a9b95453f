"""Folds over sets that are not in memory at once: the exact result of a block, chunk by chunk."""

from __future__ import annotations

from setattn.streaming._all_reduce import all_reduce
from setattn.streaming._files import SourceError
from setattn.streaming._fold import fold, transform
from setattn.streaming._functions import advance, create, finish, merge, rows, update
from setattn.streaming._save import load, save
from setattn.streaming._stream import State

__all__ = [
    "SourceError",
    "State",
    "advance",
    "all_reduce",
    "create",
    "finish",
    "fold",
    "load",
    "merge",
    "rows",
    "save",
    "transform",
    "update",
]
