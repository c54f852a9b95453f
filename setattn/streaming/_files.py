"""Arrays in ``.npy`` files, read piece by piece; a file must not change while it is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from setattn._errors import ArgumentError
from setattn._typing import Array, Shape


class SourceError(ArgumentError, ValueError):
    """A source of chunks that is broken, changed while it was read, or is not the same in every pass."""


SourceError.__module__ = "setattn.streaming"


class Watched:
    """A file whose size and time of change must stay what they are."""

    def __init__(self, caller: str, path: Path) -> None:
        self._caller, self.path = caller, path
        self._is = self._look("a file that can be read")

    def check(self, number: int) -> None:
        """Check the file before a chunk, or after one."""
        found = self._look(f"a file that is still there at chunk {number}")
        if found != self._is:
            how = "another time of change" if found[0] == self._is[0] else f"{found[0]} bytes, not {self._is[0]}"
            wanted = f"a file that stays as it is; it had changed by chunk {number}"
            raise SourceError(self._caller, "source", f"{self.path.name!r} with {how}", wanted)

    def _look(self, wanted: str) -> tuple[int, int]:
        try:
            about = self.path.stat()
        except OSError as error:
            raise SourceError(self._caller, "source", repr(str(self.path)), f"{wanted}: {error.strerror}") from error
        return about.st_size, about.st_mtime_ns


class NpyFile:
    """An array in a ``.npy`` file: its pieces along the last axis but one, without a map of the file in memory."""

    def __init__(self, caller: str, path: Path) -> None:
        self._caller, self._path = caller, path
        self.watched = Watched(caller, path)
        try:
            with path.open("rb") as file:
                if file.read(6) != b"\x93NUMPY":
                    raise ValueError("it does not begin as one")
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._broken(f"a whole .npy file, as numpy.save writes it: {_line(error)}") from error
        self.shape: Shape = mapped.shape
        self.dtype = mapped.dtype
        self._begin = int(mapped.offset)
        # In the order of Fortran, the file is that of the transposed array.
        self._fortran = bool(mapped.flags.f_contiguous and not mapped.flags.c_contiguous)

    def _broken(self, wanted: str) -> SourceError:
        return SourceError(self._caller, "source", repr(str(self._path)), wanted)

    def read(self, start: int, stop: int, number: int, *, axis: int = -2) -> Array:
        """Read the elements from ``start`` to ``stop`` of an axis, into memory of their own."""
        shape = self.shape[::-1] if self._fortran else self.shape
        at = len(shape) + axis if not self._fortran else -1 - axis
        outer, inner = math.prod(shape[:at]), math.prod(shape[at + 1 :])
        width, rows = inner * self.dtype.itemsize, stop - start
        self.watched.check(number)
        pieces = []
        with self._path.open("rb") as file:
            for i in range(outer):
                file.seek(self._begin + (i * shape[at] + start) * width)
                piece = np.fromfile(file, self.dtype, rows * inner)
                if piece.size < rows * inner:
                    raise self._broken(f"a file that is not cut short before chunk {number}")
                pieces.append(piece)
        self.watched.check(number)
        whole = pieces[0] if outer == 1 else np.concatenate(pieces) if pieces else np.frombuffer(b"", self.dtype)
        whole = whole.reshape(*shape[:at], rows, *shape[at + 1 :])
        whole = whole.T if self._fortran else whole
        return whole.astype(self.dtype.newbyteorder("="), copy=False)


def files_under(array: Any) -> Iterator[Path]:
    """Go through the files that an array in memory is a map of."""
    while array is not None:
        name = getattr(array, "filename", None)
        if isinstance(array, np.memmap) and isinstance(name, str | os.PathLike):
            yield Path(name)
            return
        array = getattr(array, "base", None)


def in_memory(piece: Any) -> Array:
    """Copy a piece of an array that is not in memory to memory."""
    a = np.array(piece)
    return a.astype(a.dtype.newbyteorder("="), copy=False)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
