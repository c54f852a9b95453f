"""Reading a ``.npz`` file that may be truncated or hostile, without pickle."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from setattn._errors import CheckpointError
from setattn._namespace import native
from setattn._typing import Array, Shape

_DENSEST = 1032  # bytes that one byte of a deflated member can stand for, at most


class _Entry(NamedTuple):
    member: str
    dtype: np.dtype[Any]
    shape: Shape


class NpzFile:
    """The arrays of a ``.npz`` file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = repr(path.name)
        self.folder: Path | None = path.parent
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        with self._open() as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in self._entries:
                    raise self._broken(f"each name once, where {name!r} is there twice")
                self._entries[name] = self._entry(archive, member)
        self.shapes: dict[str, Shape] = {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self, name: str) -> str:
        """Name the dtype in which an array is stored."""
        return str(native(self._entries[name].dtype))

    def read(self, name: str) -> Array:
        """Read one array."""
        with self._open() as archive, archive.open(self._entries[name].member) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise self._broken_array(name, error) from error

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise self._broken(f"a whole .npz file: {_line(error)}") from error

    def _entry(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Entry:
        name = member.filename.removesuffix(".npy")
        try:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
                start = file.tell()
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise self._broken_array(name, error) from error
        if dtype.hasobject:
            raise self._broken(f"arrays of numbers, where {name!r} holds pickled objects, in which a program can hide")
        size = start + math.prod(shape) * dtype.itemsize
        if size != member.file_size or member.file_size > _DENSEST * max(member.compress_size, 1):
            at = f"byte {member.header_offset}, which holds {member.file_size} in {member.compress_size}"
            raise self._broken(f"{size} bytes of array {name!r} of {dtype} {tuple(shape)} at {at}")
        return _Entry(member.filename, dtype, tuple(shape))

    def _broken(self, wanted: str) -> CheckpointError:
        return CheckpointError("load", "source", self.name, wanted)

    def _broken_array(self, name: str, error: Exception) -> CheckpointError:
        return self._broken(f"a whole array {name!r}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
