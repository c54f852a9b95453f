"""Folds over sets that are not in memory at once: the exact result of a block, chunk by chunk."""

from __future__ import annotations

from setattn.streaming._functions import advance, create, finish, merge, rows, update
from setattn.streaming._stream import State

__all__ = ["State", "advance", "create", "finish", "merge", "rows", "update"]
