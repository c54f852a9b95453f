"""Advice on the size of chunks: what tasks cost the scheduler and what a worker has to hold, by counting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from setattn._dask._faults import names_of
from setattn._typing import Array

Chunks: TypeAlias = Sequence[Sequence[int]]
"""The sizes of chunks on each axis; one that is not known is NaN."""

LARGEST = 2**31  # bytes of a chunk, of which a worker holds a few at a time
SMALLEST = 2**20  # bytes of a chunk, on which a task spends as much time as the scheduler on the task
MANY = 10_000  # tasks of a block, at a millisecond each
GOOD = 2**25  # bytes of a chunk


def advise(function: str, q: Array, y: Array) -> None:
    """Warn of chunks that are too large, too small, or too many to meet one another."""
    from dask.array import PerformanceWarning

    lazy = [(name, a) for name, a in zip(names_of(function), (q, y), strict=True) if hasattr(a, "chunks")]
    # Of two lazy arrays, one in one chunk may be what was found in a pass, and no argument.
    sets = [(name, a) for name, a in lazy if len(lazy) == 1 or len(a.chunks[-2]) > 1]
    advice = [text for name, a in dict(sets).items() for text in of_one(name, a.chunks, a.dtype.itemsize)]
    if len(sets) == 2:
        advice = [*advice, *of_two(names_of(function), q.chunks, y.chunks)]
    for text in advice:
        warnings.warn(f"{function}: {text}", PerformanceWarning, stacklevel=2)


def of_one(name: str, chunks: Chunks, itemsize: int) -> Iterator[str]:
    """Say what is wrong with the chunks of one set, and what would be better."""
    if any(size != size for sizes in chunks for size in sizes):
        return
    count, size = math.prod(map(len, chunks)), itemsize * math.prod(max(sizes, default=0) for sizes in chunks)
    total = itemsize * math.prod(map(sum, chunks))
    if len(chunks[-1]) > 1 and total > LARGEST:
        yield (
            f"the features of {name} are in {len(chunks[-1])} chunks, and all its {_bytes(total)} are moved to put "
            f"them together; store {name}.rechunk({{-1: -1}}) and start from there"
        )
    largest = [max(sizes, default=0) for sizes in chunks]
    if size > LARGEST and max(largest[:-1]) > 1:
        axis = _longest(largest[:-2]) if max(largest[:-2], default=1) > 1 else -2  # whole sets, if there are several
        better = max(1, largest[axis] * GOOD // size)
        then = _bytes(size * better / largest[axis])
        yield f"a chunk of {name} has {_bytes(size)}; {name}.rechunk({{{axis}: {better}}}) makes it {then}"
    if count > MANY and 0 < total < SMALLEST * count:
        axis = -2 if len(chunks[-2]) > 1 else _longest([len(sizes) for sizes in chunks[:-2]])
        better = math.ceil(sum(chunks[axis]) * min(1.0, GOOD * count / total / len(chunks[axis])))
        yield (
            f"{name} is in {count} chunks of {_bytes(total / count)} each, which cost the scheduler more time than "
            f"they take; {name}.rechunk({{{axis}: {better}}}) makes fewer"
        )


def _longest(sizes: Sequence[int]) -> int:
    return max(range(len(sizes)), key=lambda i: sizes[i])


def of_two(names: tuple[str, str], q: Chunks, y: Chunks) -> Iterator[str]:
    """Say whether there are too many pairs of chunks of what asks and what is asked."""
    (a, b), (m, n) = names, (len(q[-2]), len(y[-2]))
    tasks = m * n * math.prod(map(len, y[:-2]))
    if min(m, n) == 1 or tasks <= MANY:
        return
    fewer = math.sqrt(MANY / tasks)
    better = [f"{name}.rechunk({{-2: {_rows(chunks[-2], fewer)}}})" for name, chunks in {a: q, b: y}.items()]
    known = all(size == size for chunks in (q, y) for size in chunks[-2])
    advice = " and ".join(better) if known else "compute_chunk_sizes(), and then rechunk(),"
    yield f"{m} chunks of {a} meet {n} of {b} in {tasks} tasks; {advice} makes fewer"


def _rows(sizes: Sequence[int], fewer: float) -> int | float:
    """Return how many rows a chunk has where there are a fraction of as many chunks."""
    count = max(1, int(fewer * len(sizes)))
    return -(-sum(sizes) // count)


def _bytes(size: float) -> str:
    exponent = min(4, int(math.log(max(float(f"{size:.3g}"), 1), 1000) + 1e-9))
    return f"{size / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
