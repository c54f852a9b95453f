"""Where chunks come from: iterables, arrays, files, chunked arrays on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setattn._call import Call
from setattn._errors import DTypeError, MaskError, OptionError, ShapeError
from setattn._namespace import bits_of, convert_array, creation_device, name_of, namespace_of, native
from setattn._typing import Array, Shape
from setattn.streaming._files import NpyFile, SourceError, Watched, files_under, in_memory


class Target(NamedTuple):
    """What the chunks of a stream have to be; those that come from a disk become it, if their dtype is right."""

    caller: str
    call: Call
    like: Array
    tokens: bool = False  # integers, without an axis of features
    chunk_bytes: int = 2**24

    @property
    def axis(self) -> int:
        """The axis of the elements."""
        return -1 if self.tokens else -2


class Piece(NamedTuple):
    """A chunk that is not looked at yet: how many elements it has, and what reads it and its mask, by its number."""

    size: int
    read: Callable[[int], tuple[Array, Array | None]]


class Source(NamedTuple):
    """The chunks of a source: again and again, if it is repeatable."""

    pieces: Callable[[], Iterable[Piece]]
    kind: str
    repeatable: bool = True
    batch: Shape | None = None  # where it is known before the first chunk
    elements: int | None = None
    masked: bool = False


def open_source(source: Any, mask: Any, to: Target) -> Source:
    """Say how chunks are had from what a user has."""
    source, mask = _opened(source, to), _opened(mask, to)
    if _is_one_array(source):
        return _of_array(source, mask, to)
    if mask is not None:
        wanted = "None, as the chunks of an iterable bring theirs with them: (chunk, mask)"
        raise OptionError(to.caller, "mask", "given", wanted)
    kind = f"a {type(source).__qualname__}"
    if callable(source) and not hasattr(source, "__iter__"):
        return Source(lambda: _of_items(source(), to), kind)
    if not hasattr(source, "__iter__"):
        wanted = "an iterable of chunks, an array, the path of a .npy file, or an array on disk with shape and dtype"
        raise SourceError(to.caller, "source", kind, wanted)
    if not isinstance(source, list | tuple) or not all(isinstance(item, str | os.PathLike) for item in source):
        return Source(lambda: _of_items(source, to), kind, repeatable=iter(source) is not source)
    files = [_of_array(_opened(path, to), None, to) for path in source]  # so that a file that is missing is known now
    elements = sum(file.elements or 0 for file in files)
    return Source(lambda: (piece for file in files for piece in file.pieces()), kind, elements=elements)


def _opened(source: Any, to: Target) -> Any:
    return NpyFile(to.caller, Path(source)) if isinstance(source, str | os.PathLike) else source


def _is_one_array(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "dtype") and not isinstance(source, list | tuple)


# --- iterables ------------------------------------------------------------------------------------------------------


def _of_items(items: Iterable[Any], to: Target) -> Iterator[Piece]:
    for item in items:
        if isinstance(item, str | os.PathLike):
            yield from _of_array(_opened(item, to), None, to).pieces()
        else:
            elements, mask = item if type(item) is tuple and len(item) == 2 else (item, None)
            yield _of_chunk(elements, mask, to)


def _of_chunk(elements: Any, mask: Any, to: Target) -> Piece:
    on_disk = namespace_of(elements) is None and _is_one_array(elements)
    shape = tuple(getattr(elements, "shape", ()))

    def read(number: int) -> tuple[Array, Array | None]:
        here = _converted(in_memory(elements[...]), number, to) if on_disk else elements
        there = namespace_of(mask) is None and _is_one_array(mask)
        return here, _mask_converted(in_memory(mask[...]), to) if there else mask

    return Piece(shape[to.axis] if len(shape) >= -to.axis else 0, read)


# --- arrays in memory and on disk -----------------------------------------------------------------------------------


def _of_array(a: Any, mask: Any, to: Target) -> Source:
    """Cut an array into chunks: of so many bytes and, where it lies in chunks on a disk, of whole ones of those."""
    shape, axis = tuple(a.shape), to.axis
    if len(shape) < -axis:
        raise ShapeError(to.caller, "source", shape, "(..., n)" if to.tokens else "(..., n, dim)", "shape")
    sets = shape if to.tokens else shape[:-1]
    if mask is not None and (not _is_one_array(mask) or tuple(mask.shape) != sets):
        got = tuple(mask.shape) if _is_one_array(mask) else f"a {type(mask).__qualname__}"
        wanted = f"an array of shape {sets}, one entry for each element of the source"
        raise MaskError(to.caller, "mask", got, wanted, "shape" if _is_one_array(mask) else "")
    n, width = shape[axis], (bits_of(to.like.dtype, to.call.xp) or 64) // 8
    step = max(1, to.chunk_bytes // max(1, width * math.prod(shape) // max(1, n)))
    grid = getattr(a, "chunks", None)
    if isinstance(grid, tuple) and len(grid) == len(shape) and isinstance(grid[axis], int):
        step = max(grid[axis], step // grid[axis] * grid[axis])

    elements, masks = _reader(a, axis, to, "source"), None if mask is None else _reader(mask, -1, to, "mask")

    def piece(start: int, stop: int) -> Piece:
        def read(number: int) -> tuple[Array, Array | None]:
            x, from_disk = elements(start, stop, number)
            x = _converted(x, number, to) if from_disk else x
            if masks is None:
                return x, None
            m, from_disk = masks(start, stop, number)
            return x, _mask_converted(m, to) if from_disk else m

        return Piece(stop - start, read)

    cuts = [(i, min(i + step, n)) for i in range(0, n, step)] or [(0, 0)]
    kind = f"an array of shape {shape}"
    return Source(lambda: (piece(*c) for c in cuts), kind, True, sets[:-1], n, mask is not None)


def _reader(a: Any, axis: int, to: Target, argument: str) -> Callable[[int, int, int], tuple[Array, bool]]:
    """Return what reads elements of an array, and says whether they come from a disk."""
    if isinstance(a, NpyFile):
        return lambda start, stop, number: (a.read(start, stop, number, axis=axis), True)
    shape, after = tuple(a.shape), (slice(None),) * (-1 - axis)
    files = [Watched(to.caller, path) for path in files_under(a)]
    on_disk = bool(files) or namespace_of(a) is None

    def read(start: int, stop: int, number: int) -> tuple[Array, bool]:
        for file in files:
            file.check(number)
        if tuple(a.shape) != shape:
            wanted = f"an array that stays of shape {shape} until chunk {number}"
            raise SourceError(to.caller, argument, tuple(a.shape), wanted, "shape")
        x = a[(..., slice(start, stop), *after)]
        x = in_memory(x) if on_disk else x
        for file in files:
            file.check(number)
        return x, on_disk

    return read


def _converted(x: Array, number: int, to: Target) -> Array:
    """Bring a chunk from a disk to the library and device of the parameters; its dtype has to be theirs."""
    found, wanted = (str(native(dtype)).rpartition(".")[2] for dtype in (x.dtype, to.call.dtype))
    if not to.tokens and found != wanted:
        raise DTypeError(to.call.function, f"chunk {number}", found, f"{wanted}, as params has", "dtype")
    return _moved(x, to)


def _mask_converted(m: Array, to: Target) -> Array:
    return m if str(m.dtype) != "bool" else _moved(m, to)


def _moved(x: Array, to: Target) -> Array:
    xp = to.call.xp
    return x if namespace_of(x) is xp else convert_array(x, xp, creation_device(to.like, xp), _dtype(x, xp))


def _dtype(x: Array, xp: Any) -> Any:
    name = str(native(x.dtype))
    if not hasattr(xp, name):
        raise DTypeError("fold", "source", name, f"a dtype that {name_of(xp)} has", "dtype")
    return getattr(xp, name)
