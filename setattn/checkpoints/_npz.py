"""Reading a ``.npz`` file that may be truncated or hostile, without pickle."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from setattn._errors import CheckpointError
from setattn._namespace import native
from setattn._typing import Array, Shape

_DENSEST = 1032  # bytes that one byte of a deflated member can stand for, at most
_HEADER = 30  # bytes of a member before its name
_IN_EXTRA = 0xFFFFFFFF  # a length that stands behind the name, as numpy.savez writes it


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
            left = path.stat().st_size
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in self._entries:
                    raise self._broken(f"each name once, where {name!r} is there twice")
                self._entries[name] = self._entry(archive, member)
                left -= member.compress_size
                if left < 0:
                    at = f"byte {member.header_offset}"
                    raise self._broken(f"one array behind the other, where {name!r} at {at} overlaps others")
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
        except zipfile.BadZipFile as error:
            raise self._broken(_cut(self._path) or f"a whole .npz file: {_line(error)}") from error
        except (OSError, ValueError, NotImplementedError) as error:
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


def _cut(path: Path) -> str:
    """Say what is missing of an archive whose end, where the list of its arrays is, is not there; nothing if it is."""
    if zipfile.is_zipfile(path):
        return ""
    with path.open("rb") as file:
        size, place = file.seek(0, 2), 0
        while file.seek(place) < size and (head := file.read(_HEADER)).startswith(b"PK\3\4"):
            length, names, extras = struct.unpack("<18xI4xHH", head.ljust(_HEADER, b"\0"))
            name, extra = file.read(names), file.read(extras)
            if length == _IN_EXTRA and len(extra) >= 20:
                length = int.from_bytes(extra[12:20], "little")
            data = place + _HEADER + names + extras
            if data + length > size >= data:
                array = name.decode(errors="replace").removesuffix(".npy")
                return f"array {array!r} up to byte {data + length}, where the file ends at {size}"
            if data > size:
                break
            place = data + length
    return f"the rest of an archive from byte {place} on, where the file ends at {size}" if place else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
