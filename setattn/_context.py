"""What is attended to: elements, which of them take part, and what is done to each of them first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from setattn._blocks import Block
from setattn._call import widen
from setattn._embedding import embed, rows_for
from setattn._kernels import count
from setattn._layers import AnyNorm, Options, enter, norm, select
from setattn._memory import Span, part_of
from setattn._namespace import creation_device
from setattn._params import InputEmbedding, is_absent
from setattn._typing import Absent, Array, Namespace


class Context(NamedTuple):
    """Elements to attend to and which of them take part; what is done to each of them first: see :func:`ready`."""

    elements: Array  # (..., n, dim), or tokens (..., n, 1)
    mask: Array | None = None  # (..., n)
    pair_mask: Array | None = None  # (..., m, n)
    bias: Array | None = None  # (..., n), added to the scores
    prepare: Callable[[Array], Array] | None = None
    norm: AnyNorm = ()
    normalised: AnyNorm = ()  # what elements have gone through of it already, so that scale and bias are left to fold
    poisoned: Array | None = None  # (..., m), the queries that see an element that is not finite
    embedding: InputEmbedding | Absent = ()  # whose tables have n rows
    length: Array | int | None = None  # (...), how many elements take part of which these are some
    key_positions: Array | None = None  # (n, dim) or (..., n, dim), added last, to what keys come from alone

    def part(self, elements: slice | Span) -> Context:
        """Take some of the elements."""
        return self._replace(
            elements=part_of(self.elements, -2, elements),
            mask=None if self.mask is None else part_of(self.mask, -1, elements),
            pair_mask=None if self.pair_mask is None else part_of(self.pair_mask, -1, elements),
            bias=None if self.bias is None else part_of(self.bias, -1, elements),
            embedding=rows_for(self.embedding, elements) if isinstance(self.embedding, InputEmbedding) else (),
            key_positions=None if self.key_positions is None else part_of(self.key_positions, -2, elements),
        )

    def block(self, b: Block | None) -> Context:
        """Take a block of the elements, or of whole sets."""
        return self.part(b.cut) if b is not None and b.axis < 0 else self.seen_by(b)

    def seen_by(self, queries: Block | None) -> Context:
        """Take what a block of the queries may attend to: rows of queries, all elements; sets, their own."""
        if queries is None:
            return self
        if queries.axis < 0:
            return self._replace(pair_mask=queries.of(self.pair_mask, 1), poisoned=queries.of(self.poisoned))
        if len(self.elements.shape) == 2:
            return self
        keys = self.key_positions
        return self._replace(
            elements=queries.of(self.elements),
            mask=queries.of(self.mask),
            pair_mask=queries.of(self.pair_mask),
            bias=queries.of(self.bias),
            poisoned=queries.of(self.poisoned),
            length=self.length if isinstance(self.length, int) else queries.of(self.length),
            key_positions=keys if keys is None or len(keys.shape) == 2 else queries.of(keys),
        )

    def key_elements(self) -> Array:
        """Return what keys come from."""
        return self.elements if self.key_positions is None else self.elements + self.key_positions


def log_length(query: Array, contexts: Sequence[Context], xp: Namespace) -> Array:
    """Return the logarithm of how many elements of all contexts take part, ``(..., 1 or m, 1, 1)``; of none it is 0.

    There is one for each query only where a ``pair_mask`` tells queries apart. A bias does not count.
    """
    n: Array = sum(
        c.elements.shape[-2] for c in contexts if c.mask is None and c.pair_mask is None and c.length is None
    )
    for c in contexts:
        if c.length is not None:
            n = n + (c.length if isinstance(c.length, int) else c.length[..., None])
        elif c.pair_mask is not None:
            n = n + count(c.pair_mask if c.mask is None else xp.logical_and(c.pair_mask, c.mask[..., None, :]), xp)
        elif c.mask is not None:
            n = n + count(c.mask, xp)[..., None]
    if isinstance(n, int):
        n = xp.full((1,), n, dtype=query.dtype, device=creation_device(query, xp))
    n = xp.astype(n, query.dtype)
    return xp.log(xp.where(n < 1, 1.0, n))[..., None, None]


def ready(context: Context, o: Options) -> Context:
    """Take elements in: select what takes part, widen it, do to it what is to be done first: embedding, network, norm.

    An element that no query attends to is put to zeros, whatever its values are. One that is not finite would reach,
    as 0 * NaN, the queries of its set that do not see it: under a ``pair_mask`` it is taken out as well, and the
    queries that see it are marked.
    """
    if isinstance(context.embedding, InputEmbedding):
        elements = embed(context.elements, context.mask, context.embedding, o)
    else:
        elements = enter(context.elements, context.mask, o)
    bias = context.bias if context.bias is None or not o.half else widen(context.bias, o.xp)
    keys = None if context.key_positions is None else enter(context.key_positions, context.mask, o)
    seen_by_all = context.pair_mask is None
    taken = Context(
        _prepared(elements, context, o) if seen_by_all else elements,
        context.mask,
        context.pair_mask,
        bias,
        poisoned=context.poisoned,
        length=context.length,
        key_positions=keys,
    )
    if not seen_by_all:
        taken = _hide(taken, o.xp)
        if context.prepare is not None or not is_absent(context.norm):
            taken = _hide(taken._replace(elements=_prepared(taken.elements, context, o)), o.xp)
    return taken


def _prepared(elements: Array, context: Context, o: Options) -> Array:
    """Do to elements what a context says is to be done first."""
    return norm(elements if context.prepare is None else context.prepare(elements), context.norm, o)


def _hide(context: Context, xp: Namespace) -> Context:
    """Take out the elements that are seen by no query or not finite, and mark the queries that see one of these."""
    finite = xp.all(xp.isfinite(context.elements), axis=-1)
    seen = xp.logical_and(finite, xp.any(context.pair_mask, axis=-2))
    return mark(context._replace(elements=select(context.elements, seen, xp)), finite, xp)


def mark(context: Context, finite: Array, xp: Namespace) -> Context:
    """Mark the queries that see an element that is not finite."""
    poisoned = xp.any(xp.logical_and(context.pair_mask, xp.logical_not(finite)[..., None, :]), axis=-1)
    if context.poisoned is not None:
        poisoned = xp.logical_or(poisoned, context.poisoned)
    return context._replace(poisoned=poisoned)
