"""How a long axis is worked through: in blocks that stay in cache, on one thread or on several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from setattn._memory import Parts, Span, block_bytes, in_rows, is_written, loop_bytes, part_of, repeat
from setattn._order import Order
from setattn._threads import run
from setattn._typing import Array, Namespace

T = TypeVar("T")

Levels: TypeAlias = tuple[tuple[int, T], ...]
"""Parts merged so far, each of how many: powers of two that fall, like the digits of a binary number."""

LEAST = 512  # rows of a block, below which merging its state takes longer than a tenth of its products


class Plan(NamedTuple):
    """How a result is computed; what it is changes by no more than rounding.

    Parameters
    ----------
    order : Order, optional
        The order of the products of every attention, as far as it can be had; by default the one with the fewest
        multiplications.
    block_size : int, optional
        How many elements of a set are worked through at a time; by default as many as keep the block in cache (on a
        GPU, in a small part of its memory). Inside ``jax.jit`` and ``torch.compile``, and on Dask, a set is one block
        unless a size is given here, but for ``jax.jit`` on one CPU device, where blocks are a loop.
    threads : int, default 1
        How many blocks are worked through at the same time, where the library is NumPy and the data are more than a
        few MiB or a block, with all products of the call on one thread each; large products outside of blocks are
        spread over them, too. Needs the package threadpoolctl. The result is the same for any number above 1. Other
        libraries have threads of their own and ignore it.
    recompute : bool, default False
        Whether the chunks of Dask arrays are read or generated anew each time that a block goes through a set, rather
        than held from one pass to the next. Where a set is larger than the memory of all workers, that is what keeps
        them from writing chunks to disk. The chunks have to come out the same every time. Other libraries ignore it.
    """

    order: Order | None = None
    block_size: int | None = None
    threads: int = 1
    recompute: bool = False


class Block(NamedTuple):
    """A part of one axis of arrays that have this axis in common."""

    axis: int  # of the batch, counted from the first; or -1, that of the rows
    cut: slice | Span

    def of(self, a: Array | None, after: int = 0) -> Array | None:
        """Take the part of an array that has ``after`` axes after the one of the rows."""
        return None if a is None else part_of(a, self.axis if self.axis >= 0 else -1 - after, self.cut)


def cut(size: int, most: int) -> list[slice]:
    """Cut an axis into parts of nearly equal size, of at most ``most`` each.

    Their number is even, so that two threads have the same to do, and does not depend on how many there are.
    """
    parts = max(1, -(-size // most))
    parts = min(size, parts + parts % 2) if parts > 1 else 1
    return [slice(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def rows_in_a_block(plan: Plan, x: Array, numbers: int, xp: Namespace) -> int | None:
    """Return how many rows make a block, with so many numbers at work for each; ``None``: all of them."""
    if plan.block_size is not None:
        return plan.block_size
    budget = block_bytes(x, xp)
    return None if budget is None else max(LEAST, budget // (4 * numbers))


def sets_in_a_block(batch: Sequence[int], numbers: int, x: Array, xp: Namespace) -> tuple[int | None, int]:
    """Return the axis of the batch to cut, if any, and how much of it makes a block, with so many numbers for a set."""
    if not batch or (budget := block_bytes(x, xp)) is None or 0 in batch:
        return None, 0
    axis = max(range(len(batch)), key=lambda i: batch[i])
    most = max(1, budget // max(1, 4 * numbers * (math.prod(batch) // batch[axis])))
    return (axis, most) if batch[axis] > most else (None, 0)


def spreads(plan: Plan, xp: Namespace, *data: Array) -> bool:
    """Say whether the data of a call are worth several threads: whether any are more than a block."""
    return any(_exceeds_a_block(x, plan, xp) for x in data)


def _exceeds_a_block(x: Array, plan: Plan, xp: Namespace) -> bool:
    budget = block_bytes(x, xp)
    assert budget is not None
    # A few times as many numbers as the data themselves are at work. Tokens have no axis after that of the elements, so
    # it is looked for by its length.
    return 4 * math.prod(x.shape) > budget // 4 or (plan.block_size is not None and max(x.shape) > plan.block_size)


def by_rows(
    function: Callable[[Array, Block | None], Array], x: Array, numbers: int, plan: Plan, xp: Namespace
) -> Array:
    """Compute ``function(block of x, which block)`` for rows ``(..., m, dim)``, and put the results together.

    Where a set fits in a block, the blocks are of whole sets. ``numbers`` are at work for each row.
    """
    *batch, m, _ = x.shape
    size = rows_in_a_block(plan, x, numbers, xp)
    if size is None:
        return _in_a_loop(function, x, numbers, xp)
    axis, most = (-1, size) if m > size else sets_in_a_block(batch, m * numbers, x, xp)
    if axis is None:
        return function(x, None)
    cuts = cut(m if axis < 0 else batch[axis], most)
    return _assemble(lambda c: function(Block(axis, c).of(x, 1), Block(axis, c)), cuts, axis, xp, plan.threads)


def elements_in_a_loop(x: Array, numbers: int, xp: Namespace) -> range | None:
    """Return where the blocks of one size begin that a loop goes through the elements in, if it pays.

    ``numbers`` are made for each element: a compiler writes them to memory, where they are more than caches hold.
    """
    *batch, n, dim = x.shape
    budget = loop_bytes(x, xp)
    if budget is None or not all(isinstance(size, int) for size in x.shape):
        return None
    sets = math.prod(batch)
    if 4 * sets * n * numbers <= budget:
        return None
    # A step holds its elements, their scores and the exponentials of these.
    most = budget // (4 * sets * (dim + 2 * numbers))
    most = max(LEAST, most, min(_LEAST_LOOPED // sets, _MOST_LOOPED * most))
    size = _without_rest(n, most, _LEAST_LOOPED // sets)
    return range(0, n - n % size, size) if n > size else None


_LEAST_LOOPED = 4096  # rows, from which on XLA spreads the sum of each, as in a norm, over threads
_MOST_LOOPED = 3  # budgets that these may take


def _without_rest(length: int, most: int, least: int) -> int:
    """Return a size of parts, of more than half the most, that leaves no rest to be compiled apart, if there is one."""
    return next((size for size in range(most, max(most // 2, least - 1), -1) if length % size == 0), most)


def _in_a_loop(function: Callable[[Array, Block | None], Array], x: Array, numbers: int, xp: Namespace) -> Array:
    """Compute the same by a loop that is traced once, where there is one, and else for all rows at once."""
    m, budget = x.shape[-2], loop_bytes(x, xp)
    if budget is None or not isinstance(m, int) or m <= (most := max(LEAST, budget // (4 * numbers))):
        return function(x, None)

    def block(cut: slice | Span) -> Array:
        return function(part_of(x, -2, cut), Block(-1, cut))

    size = _without_rest(m, most, 1)
    whole = m - m % size
    out = repeat(lambda start: block(Span(start, size)), range(0, whole, size), xp)
    _, *batch, _, dim = out.shape  # what is attended to may have more of a batch than x
    rows = len(batch) + 1
    out = xp.reshape(xp.permute_dims(out, (*range(1, rows), 0, rows, rows + 1)), (*batch, whole, dim))
    return out if whole == m else xp.concat([out, block(slice(whole, m))], axis=-2)


def _assemble(make: Callable[[slice], Array], cuts: list[slice], axis: int, xp: Namespace, threads: int) -> Array:
    """Put ``make(cut)`` for all cuts of an axis together, without holding them twice where an array can be written."""
    at = axis if axis >= 0 else -2
    if not is_written(xp):
        return in_rows(xp.concat([*map(make, cuts)], axis=at), xp)
    parts = Parts(at, cuts[-1].stop, xp)
    for _ in run(lambda c: parts.put(c, make(c)), cuts, threads):
        pass
    return parts.array


def fold(merge: Callable[[T, T], T], parts: Iterable[T]) -> T:
    """Merge parts as a balanced tree, in their order: no rounding error is carried through all of them."""
    parts = iter(parts)
    levels: Levels[T] = ((1, next(parts)),)
    for part in parts:
        levels = combine(merge, levels, ((1, part),))
    return total(merge, levels)


def combine(merge: Callable[[T, T], T], a: Levels[T], b: Levels[T]) -> Levels[T]:
    """Put the parts of two balanced trees together, as the digits of two binary numbers are added."""
    digits: dict[int, list[T]] = {}
    for size, part in (*a, *b):
        digits.setdefault(size, []).append(part)
    levels: list[tuple[int, T]] = []
    while digits:
        size = min(digits)
        first, *more = digits.pop(size)
        if more:  # the two that were there first; a third one, carried from below, stays
            digits.setdefault(2 * size, []).append(merge(first, more[0]))
        levels.extend((size, part) for part in (more[1:] if more else [first]))
    return tuple(reversed(levels))


def total(merge: Callable[[T, T], T], levels: Levels[T]) -> T:
    """Merge the parts of a balanced tree, from the smallest on; there has to be one."""
    *larger, (_, result) = levels
    for _, part in reversed(larger):
        result = merge(part, result)
    return result
