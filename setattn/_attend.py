"""Attention as the merge of the states of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from setattn._blocks import Block, by_rows, cut, elements_in_a_loop, fold, rows_in_a_block, sets_in_a_block
from setattn._context import Context, log_length, ready
from setattn._layers import NORMS, AnyNorm, Options, folded, norm
from setattn._memory import Span, repeat
from setattn._order import Order
from setattn._params import Attention, LengthScale, Linear
from setattn._state import (
    Queries,
    State,
    as_they_come,
    attend_at_once,
    finish_blocks,
    make_state,
    merge_blocks,
    merge_stacked,
    merge_states,
    of_values,
    order_of,
    output,
    projected_queries,
    queries,
    sizes_of,
)
from setattn._threads import run
from setattn._typing import Array


def attend(query: Array, contexts: Sequence[Context], p: Attention, o: Options, query_norm: AnyNorm = ()) -> Array:
    """Attend from queries ``(..., m, dim)``, normalised first, to the elements of all contexts together."""
    query, p = _asked(query, p, o, query_norm)
    if o.attend is not None:
        return o.attend(query, contexts, p, o)
    ways = [_way(query, context, p, o, alone=len(contexts) == 1) for context in contexts]
    if ways[0].order.values == "carry_output":
        log_n = log_length_of(query, contexts, p, o)
        context, p = _folded(contexts[0], p, o)
        order = ways[0].order
        q = query if as_they_come(order) else projected_queries(query, p, o, log_n)
        return attend_at_once(queries(q, context, p, order, o), ready(context, o), p, o)
    return output(finish_blocks(_state_of(query, contexts, ways, p, o), o.xp), query, p, o.xp)


def part_of_attention(
    query: Array, contexts: Sequence[Context], p: Attention, o: Options, query_norm: AnyNorm = ()
) -> State:
    """Make the state of queries and of some of the elements that they attend to."""
    query, p = _asked(query, p, o, query_norm)
    return state_of(query, contexts, p, o)


def _asked(query: Array, p: Attention, o: Options, query_norm: AnyNorm) -> tuple[Array, Attention]:
    """Normalise the queries, or leave some of it to their projection."""
    if not isinstance(query_norm, NORMS):
        return query, p
    query_norm, (to_queries,) = folded(query_norm, (p.query,), query.shape[-2], o.xp)
    return norm(query, query_norm, o), p._replace(query=to_queries)


class Way(NamedTuple):
    """How queries attend to a context, whatever the batch."""

    order: Order
    cuts: list[slice] | None  # of its elements into blocks, if it is more than one
    loop: range | None  # where blocks of one size begin that a loop goes through, if there is one
    numbers: int  # about how many are at work for one set


def _way(query: Array, context: Context, p: Attention, o: Options, *, alone: bool) -> Way:
    """Choose how to attend to a context, which is ``alone`` where these are all the elements there are."""
    s = sizes_of(query, context, p)
    order = order_of(s, context, p, o, whole=alone)
    numbers = 2 * s.dim + 3 * s.heads * s.queries  # for one element
    numbers = numbers + (0 if order.scores == "carry_queries" else s.kv_heads * s.head_dim)
    numbers = numbers + (0 if order.values == "carry_weights" else s.kv_heads * s.value_dim)
    size = rows_in_a_block(o.plan, context.elements, numbers, o.xp)
    cuts = None if size is None or s.elements <= size else cut(s.elements, size)
    written = s.heads * s.queries + (0 if context.prepare is None else 2 * s.dim)  # by a compiler, to memory
    loop = elements_in_a_loop(context.elements, written, o.xp) if size is None else None
    if order.values == "carry_output" and (cuts is not None or loop is not None):
        order = order_of(s, context, p, o, whole=False)
    return Way(order, cuts, loop, numbers * s.elements)


def state_of(query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> State:
    """Make the state of queries and all contexts, block by block."""
    return _state_of(query, contexts, [_way(query, context, p, o, alone=False) for context in contexts], p, o)


class _Attended(NamedTuple):
    """A context whose norm is folded into its projections, and how queries attend to it."""

    context: Context
    p: Attention
    way: Way
    queries: Queries | None  # if they are the same for every set


def _state_of(query: Array, contexts: Sequence[Context], ways: Sequence[Way], p: Attention, o: Options) -> State:
    """Make the state in ways that were chosen."""
    attended = [_Attended(*_folded(c, p, o), way, None) for c, way in zip(contexts, ways, strict=True)]
    if len(query.shape) == 2 and not isinstance(p.length_scale, LengthScale):
        attended = _asked_by(query, attended, p, o, None)
    return _state_of_sets(query, attended, p, o)


def _asked_by(
    query: Array, attended: Sequence[_Attended], p: Attention, o: Options, log_n: Array | None
) -> list[_Attended]:
    """Make the queries to each context, of one projection for all."""
    projected, made = None, []
    for context, own, way, _ in attended:
        if as_they_come(way.order):
            asking = query
        else:
            asking = projected = projected_queries(query, p, o, log_n) if projected is None else projected
        made.append(_Attended(context, own, way, queries(asking, context, own, way.order, o)))
    return made


def _state_of_sets(query: Array, attended: Sequence[_Attended], p: Attention, o: Options) -> State:
    """Make the state with whole sets in a block where several fit in one."""
    elements, numbers = attended[0].context.elements, sum([a.way.numbers for a in attended])
    axis, most = sets_in_a_block(elements.shape[:-2], numbers, elements, o.xp)
    if axis is not None:

        def sets(c: slice) -> State:
            b = Block(axis, c)
            own = query if len(query.shape) == 2 else b.of(query)
            return _state_of_sets(own, [a._replace(context=a.context.seen_by(b)) for a in attended], p, o)

        parts = run(sets, cut(elements.shape[axis], most), o.plan.threads)
        return State(*(o.xp.concat(list(field), axis=axis) for field in zip(*parts, strict=True)))

    if attended[0].queries is None:
        attended = _asked_by(query, attended, p, o, log_length_of(query, [a.context for a in attended], p, o))
    states = [_state_of_one(a, o) for a in attended]
    return states[0] if len(states) == 1 else fold(lambda a, b: merge_states(a, b, o.xp), states)


def log_length_of(query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array | None:
    """Return the logarithm of how many elements take part, before any of them are cut into blocks, if it is needed."""
    return log_length(query, contexts, o.xp) if isinstance(p.length_scale, LengthScale) else None


def _state_of_one(attended: _Attended, o: Options) -> State:
    context, p, way, q = attended
    assert q is not None

    def part(elements: slice | Span) -> State:
        return make_state(q, ready(context.part(elements), o), p, o)

    if (loop := way.loop) is not None:
        state = merge_stacked(repeat(lambda start: part(Span(start, loop.step)), loop, o.xp), o.xp)
        if loop.stop < context.elements.shape[-2]:
            state = merge_states(state, part(slice(loop.stop, None)), o.xp)
    elif way.cuts is None:
        state = make_state(q, ready(context, o), p, o)
    else:
        state = fold(lambda a, b: merge_blocks(a, b, o.xp), run(part, way.cuts, o.plan.threads))
    return of_values(state, way.order, p, o.xp)


def _folded(context: Context, p: Attention, o: Options) -> tuple[Context, Attention]:
    """Move the scale and bias of a context's norm into its projections, if nothing comes between them."""
    if not isinstance(context.norm, NORMS) or context.key_positions is not None:
        return context, p
    bare, (key, value) = folded(context.norm, (p.key, p.value), context.elements.shape[-2], o.xp)
    left = () if isinstance(context.normalised, NORMS) else bare
    return context._replace(norm=left), p._replace(key=key, value=value)


# --- blocks ---------------------------------------------------------------------------------------------------------


_SHORT = 256  # elements that the queries of a block meet at a time, if there are more


def by_queries(
    function: Callable[[Array, Context, Block | None], Array], x: Array, y: Context, p: Attention, o: Options
) -> Array:
    """Compute ``function(rows of x, what they attend to, which block)`` block by block; see :func:`by_rows`.

    A context of one block is made ready once, for all blocks of rows. Of a longer one, each block of rows meets a block
    at a time, and more of them at once, as each of them makes every block of the context ready anew.
    """
    if o.attend is not None:
        return function(x, y, None)
    # Before its embedding and its projection to heads, which may come in ``function``, x says nothing of either.
    kv_heads, head_dim = p.key.weight.shape[1:]
    dim, heads = p.query.weight.shape[:2] if isinstance(p.query, Linear) else (x.shape[-1], kv_heads)
    m, width, n = x.shape[-2], max(x.shape[-1], dim, heads * head_dim), y.elements.shape[-2]
    numbers = 4 * width + 3 * heads * n if n <= _SHORT else width + 3 * heads * _SHORT
    if o.eager and n < m and n <= _SHORT:  # sizes may be symbols, of which nothing should be asked, where it is not
        size = rows_in_a_block(o.plan, x, numbers, o.xp)
        if size is not None and n <= size < m:
            y = ready(y, o)
    return by_rows(lambda rows, block: function(rows, y.seen_by(block), block), x, numbers, o.plan, o.xp)
