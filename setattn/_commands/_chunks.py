"""A block over sets that are large themselves: one set at a time, its elements in chunks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import setattn
from setattn._commands._errors import CommandError
from setattn._commands._stream import PART_BYTES, Given, NDArray, Part, Work, refusal
from setattn._commands._weights import in_words
from setattn._errors import ArgumentError, ShapeError
from setattn._params import is_absent
from setattn._typing import Namespace
from setattn.checkpoints._block import Block
from setattn.streaming import create, fold, transform

_SET_BYTES = 1 << 26  # a larger set goes through in chunks, if its block can


class _Stream(NamedTuple):
    """What goes through in chunks, and what is beside it."""

    elements: Given
    mask: Given | None
    beside: dict[str, Given]
    rows: bool  # whether there is a row of result for each element
    sets: tuple[int, ...]


def in_chunks(block: Block, arrays: list[Given], xp: Namespace, *, lazy: bool) -> Work | None:
    """Return the work on sets whose elements come in chunks; ``None`` where all sets go through whole.

    Raises
    ------
    CommandError
        If a set can neither be cut nor held in memory, or the arrays do not fit each other.
    """
    large = [g for g in arrays if g.argument != "mask" and g.set_bytes > _SET_BYTES]
    if not large or any(0 in g.array.shape for g in arrays):
        return None
    try:
        if lazy:
            raise CommandError("on the backend dask, sets go through whole")
        stream = _stream(block, arrays, large)
        passes = _passes(block, stream, xp)
    except CommandError as error:
        _check_memory(large, error)
        return None
    _check_sets(block, arrays, stream)
    n, count = stream.elements.set_shape[0], math.prod(stream.sets)
    times = "once" if passes == 1 else f"{passes} times"

    def shape(part: tuple[int, ...]) -> tuple[int, ...]:
        return (*stream.sets, n, part[-1]) if stream.rows else (*stream.sets, *part)

    return Work(
        parts=lambda seen: _parts(block, stream, xp, seen),
        shape=shape,
        results=count,
        total=n * passes * count,
        unit=" elements",
        where_memory_ends="not enough memory for what is beside the chunks",
        about=f"chunks   of {PART_BYTES >> 20} MB of {stream.elements.name}, gone through {times}",
    )


def _stream(block: Block, arrays: list[Given], large: list[Given]) -> _Stream:
    """Say which of the arrays is cut, and what the others are to it."""
    *asking, asked = [g for g in arrays if g.argument != "mask"]
    mask = next((g for g in arrays if g.argument == "mask"), None)
    if block.function == "perceiver_io" and asking:
        [asked], asking = asking, [asked]
    [cut] = large if len(large) == 1 else [None]
    if cut is asked:
        rows = not asking and (block.function == "isab" or _asks_itself(block))
        return _Stream(asked, mask, dict(zip(("queries",), asking, strict=False)), rows, asked.sets)
    if cut is not None and block.function in ("attention", "cross_attention", "mab"):
        beside = {"context": asked} if mask is None else {"context": asked, "context_mask": mask}
        return _Stream(cut, None, beside, True, asked.sets)
    raise CommandError(f"{block.function} cannot take {' and '.join(g.name for g in large)} in chunks")


def _asks_itself(block: Block) -> bool:
    return block.function == "perceiver_io" and is_absent(block.params.queries)


def _passes(block: Block, stream: _Stream, xp: Namespace) -> int:
    """Return how often the elements are gone through; the arrays beside them are looked at without their numbers."""
    beside = {name: xp.asarray(np.zeros(g.set_shape, g.dtype)) for name, g in stream.beside.items()}
    try:
        return create(block.function, block.params, length=1, **beside, **block.options).passes
    except ArgumentError as error:
        reason = "" if error.argument == "function" else f": {error.argument} is {error.got}; wanted {error.wanted}"
        raise CommandError(f"{block.function} cannot take its elements in chunks{reason}") from error


def _check_memory(large: list[Given], error: CommandError) -> None:
    """Refuse sets that go through whole and are larger than all memory."""
    memory = _memory()
    for g in large:
        if memory is not None and g.set_bytes > memory:
            sets = f"sets of {g.set_bytes / 1e9:.1f} GB, more than the memory of this machine"
            raise CommandError(f"{g.name} has {sets}, and {error}") from error


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # another system than POSIX
        return None


def _check_sets(block: Block, arrays: list[Given], stream: _Stream) -> None:
    """Check that the arrays have the same sets; what asks may be the same for all of them."""
    asks = [g for name, g in stream.beside.items() if name == "queries"]
    asks += [stream.elements] if "context" in stream.beside else []
    if any(g.sets not in ((), stream.sets) for g in asks):
        raise refusal(block, arrays, None)
    masked = stream.beside.get("context", stream.elements)
    mask = stream.beside.get("context_mask", stream.mask)
    wanted = (*masked.sets, masked.set_shape[0])
    if mask is not None and mask.array.shape != wanted:
        entries = f"one entry for each element of {masked.argument}"
        raise CommandError(f"{mask.name} has shape {mask.array.shape}; wanted {wanted}, {entries}")


# --- the work -------------------------------------------------------------------------------------------------------


class _Elements:
    """The elements of one set in a file: an array with shape, dtype and slices, as arrays on disk are."""

    def __init__(self, given: Given, index: tuple[int, ...], seen: Callable[[int], object]) -> None:
        self._given, self._index, self._seen = given, index, seen
        self.shape, self.dtype = given.set_shape, given.dtype

    def __getitem__(self, key: Any) -> NDArray:
        part = self._given.read(self._index, key)
        self._seen(len(part))
        return part


def _parts(block: Block, stream: _Stream, xp: Namespace, seen: Callable[[int], object]) -> Iterator[Part]:
    """Yield the results of one set after another: each at once, or row by row."""
    for index in np.ndindex(stream.sets):
        odd = False
        for y in _results(block, stream, index, xp, seen):
            part = setattn.convert_params(y, np)
            finite = bool(np.isfinite(part).all())
            yield Part(part, int(not finite and not odd))
            odd = odd or not finite


def _results(
    block: Block, stream: _Stream, index: tuple[int, ...], xp: Namespace, seen: Callable[[int], object]
) -> Iterator[Any]:
    def of(g: Given) -> tuple[int, ...]:
        return index if g.is_batched else ()

    elements = _Elements(stream.elements, of(stream.elements), seen)
    mask = None if stream.mask is None else _Elements(stream.mask, index, lambda _: None)
    options = {name: xp.asarray(g.read(of(g), ...)) for name, g in stream.beside.items()} | block.options
    length = elements.shape[0] if mask is None else _count(mask)
    given: dict[str, Any] = {"mask": mask, "batch": (), "length": length, "chunk_bytes": PART_BYTES, **options}
    call = (block.function, block.params, elements)
    try:
        with np.errstate(all="ignore"):  # what is not finite is counted when it is there
            if stream.rows:
                yield from transform(*call, **given)
            else:
                yield fold(*call, **given)
    except ArgumentError as error:
        raise _in_words(stream, error) from error


def _count(mask: _Elements) -> int:
    [n] = mask.shape
    return sum(int(np.count_nonzero(mask[i : i + PART_BYTES])) for i in range(0, n, PART_BYTES))


def _in_words(stream: _Stream, error: ArgumentError) -> CommandError:
    g = stream.elements
    if isinstance(error, ShapeError) and error.argument.startswith("chunk "):
        wanted = error.wanted.replace("(", "(..., ", 1) if error.wanted.startswith("(") else error.wanted
        return CommandError(f"{g.name} has shape {g.array.shape}; wanted {wanted}")
    return CommandError(in_words(error, {"source": g.name}))
