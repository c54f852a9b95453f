"""Reading ``.safetensors`` files, which may be truncated or hostile, and writing them.

The format is eight bytes of length, a header in JSON and the tensors one after another. It is read and written here
rather than by the package ``safetensors``, which keeps the last one of two tensors of the same name, does not say where
a file is broken, and knows no bfloat16 where NumPy lacks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from setattn._errors import CheckpointError
from setattn._files import whole_file
from setattn._namespace import native, to_numpy
from setattn._typing import Array, Shape

_LENGTH = 8
_LONGEST = 100_000_000  # of a header, as the format has it
_PART = 1 << 20  # numbers that are widened at a time

# What is stored as each type, and its name.
_DTYPES = {
    "F64": ("<f8", "float64"),
    "F32": ("<f4", "float32"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
    "I64": ("<i8", "int64"),
    "I32": ("<i4", "int32"),
    "I16": ("<i2", "int16"),
    "I8": ("<i1", "int8"),
    "U64": ("<u8", "uint64"),
    "U32": ("<u4", "uint32"),
    "U16": ("<u2", "uint16"),
    "U8": ("<u1", "uint8"),
    "BOOL": ("<?", "bool"),
}
_OTHER = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # sizes of types that are not read


def _width(kind: str) -> int:
    return np.dtype(_DTYPES[kind][0]).itemsize if kind in _DTYPES else _OTHER[kind]


def itemsize(dtype: str) -> int:
    """Return the bytes of one number of a dtype, by the name that a source gives it."""
    kind = next((kind for kind, (_, name) in _DTYPES.items() if name == dtype), dtype)
    return _width(kind) if kind in _DTYPES or kind in _OTHER else np.dtype(dtype).itemsize


class _Entry(NamedTuple):
    kind: str
    shape: Shape
    begin: int  # byte of the file
    end: int


class SafetensorsFile:
    """The tensors of a ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = repr(path.name)
        self.folder: Path | None = path.parent
        self._entries, self.metadata = _read_header(path)
        self.shapes: dict[str, Shape] = {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self, name: str) -> str:
        """Name the dtype in which a tensor is stored."""
        kind = self._entries[name].kind
        return _DTYPES[kind][1] if kind in _DTYPES else kind

    def read(self, name: str) -> Array:
        """Read one tensor."""
        kind, shape, begin, end = self._entries[name]
        if kind not in _DTYPES:
            raise _broken(self._path, f"tensor {name!r} of a type other than {kind}, which NumPy lacks")
        try:
            with self._path.open("rb") as file:
                file.seek(begin)
                a = _numbers(file, kind, math.prod(shape))
        except OSError as error:
            raise _broken(self._path, f"a file that can be read: {error.strerror}") from error
        last = begin + a.size * _width(kind)
        if last != end:
            raise _broken(self._path, f"tensor {name!r} up to byte {end}, where the file ends at {last}")
        return a.reshape(shape)


def _numbers(file: BinaryIO, kind: str, count: int) -> np.ndarray[Any, Any]:
    """Read numbers, as many as there are; bfloat16 in parts, so that what is widened is never there as a whole."""
    stored = np.dtype(_DTYPES[kind][0])
    if kind != "BF16":
        return np.fromfile(file, stored, count)
    wide, there = np.empty(count, np.float32), 0
    bits = wide.view(np.uint32)
    while there < count:
        part = np.fromfile(file, stored, min(_PART, count - there))
        if not part.size:
            break
        bits[there : there + part.size] = part
        there += part.size
    bits <<= 16
    return wide[:there]


def _broken(path: Path, wanted: str) -> CheckpointError:
    return CheckpointError("load", "source", repr(path.name), wanted)


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH), "little")
        start = _LENGTH + length
        if size < _LENGTH or start > size or length > _LONGEST:
            got = f"{length} bytes from byte {_LENGTH}" if size >= _LENGTH else "its length in the first 8 bytes"
            raise _broken(path, f"a safetensors file: it has {size} bytes, and its header would be {got}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _without_twins(path, pairs))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise _broken(path, f"a safetensors file with JSON in bytes {_LENGTH} to {start}: {reason}") from error
    if not isinstance(header, dict):
        raise _broken(path, f"a safetensors file with an object of JSON in bytes {_LENGTH} to {start}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "metadata of text alone")
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_places(path, entries, start, size)
    return entries, metadata


def _without_twins(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _broken(path, f"each name once, where {key!r} is there twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, value: Any, start: int) -> _Entry:
    """Check one tensor's entry against itself."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _broken(path, f"a dtype, a shape and data_offsets of tensor {name!r}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    places = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
    if not isinstance(kind, str) or not sizes or not places:
        raise _broken(path, f"a name as dtype, and sizes and two offsets not below 0, of tensor {name!r}")
    if kind not in _DTYPES and kind not in _OTHER:
        raise _broken(path, f"a known dtype of tensor {name!r}, not {kind[:20]!r}")
    width = _width(kind)
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        wanted = (
            f"{math.prod(shape) * width} bytes of tensor {name!r} of {kind} {tuple(shape)}, not bytes {start + begin}"
        )
        raise _broken(path, f"{wanted} to {start + end}")
    return _Entry(kind, tuple(shape), start + begin, start + end)


def _check_places(path: Path, entries: dict[str, _Entry], start: int, size: int) -> None:
    """Check that the tensors lie one after another, up to the end of the file."""
    place = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != place:
            raise _broken(
                path, f"tensor {name!r} to begin at byte {place}, behind the one before, not at {entry.begin}"
            )
        if entry.end > size:
            raise _broken(path, f"tensor {name!r} up to byte {entry.end}, where the file ends at {size}")
        place = entry.end
    if place != size:
        raise _broken(path, f"no bytes behind the last tensor, which ends at {place}, the file at {size}")


# --- writing --------------------------------------------------------------------------------------------------------

_ALIGNMENT = 8  # of the first tensor, as the format has it
_KINDS = {name: (kind, np.dtype(stored)) for kind, (stored, name) in _DTYPES.items()}


def write_safetensors(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays of any library, one after another, for a public function ``save(path, ...)``."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, a in arrays.items():
        kind, stored = _KINDS[_name(a)]
        end = place + math.prod(a.shape) * stored.itemsize
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    try:
        with whole_file(path) as part, part.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH, "little") + text)
            for a in arrays.values():
                file.write(_stored(a).data)
    except OSError as error:
        wanted = f"a file that can be written: {error.strerror}"
        raise CheckpointError("save", "path", repr(str(path)), wanted) from error


def _stored(a: Array) -> np.ndarray[Any, Any]:
    """Return an array as it stands in a file."""
    host = np.ascontiguousarray(to_numpy(a))
    if _name(a) == "bfloat16":
        return (host.astype(np.float32, copy=False).view(np.uint32) >> 16).astype(np.uint16)
    return host.astype(_KINDS[_name(a)][1], copy=False)


def is_writable(a: Array) -> bool:
    """Say whether the format has the dtype of an array."""
    return _name(a) in _KINDS


def _name(a: Array) -> str:
    return str(native(a.dtype)).rpartition(".")[2]
