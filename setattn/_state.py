"""The state of a softmax-weighted sum, and the products that it is made of.

``softmax(s) @ v`` over a set is determined by three numbers for each query that two parts of the set can be merged in:
the largest score, the sum of the exponentials and the weighted sum of the values. A *state* holds them. Attention is
:func:`make_state`, :func:`merge_states`, :func:`finish`, whether the set is in one piece or in many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from setattn._context import Context, mark
from setattn._kernels import (
    add_product,
    at_least,
    exp_into,
    fused_attention,
    fuses,
    into,
    matmul,
    matmul_heads,
    matmul_rows,
    matmul_weights,
    row_max,
    row_sum,
    transposed_heads,
)
from setattn._layers import NORMS, Options, linear, norm, scale_by_length, select
from setattn._memory import copies_heads, is_one_cpu, like_rows
from setattn._namespace import largest_number
from setattn._order import PROJECT, Order, Sizes, choose
from setattn._params import Attention, LengthScale, Linear, is_absent
from setattn._typing import Array, Namespace


class Queries(NamedTuple):
    """Queries as an order of products wants them."""

    array: Array  # (..., kv_heads, rows, width), or (..., m, dim) where the keys are carried to them
    order: Order
    shift: Array | None = None  # (..., kv_heads, rows, 1), what the bias of the keys adds to carried queries' scores
    scale: float = 1.0  # left to be multiplied with the keys, which are fewer


class State(NamedTuple):
    """The mergeable result of attending to part of a set; all that an empty part holds is ``-inf, 0, 0``."""

    largest: Array  # (..., kv_heads, rows, 1), the largest score; or what else the exponentials are relative to
    total: Array  # (..., kv_heads, rows, 1), the sum of exp(score - largest)
    weighted: Array  # (..., kv_heads, rows, width), the sum of exp(score - largest) * value; or element: of_values


class Mean(State):
    """A state relative to the logarithms of its sums, of which the totals are 1, or 0 of nothing, as a kernel makes it.

    What is weighted is the mean.
    """

    __slots__ = ()


# --- the three functions of a state ---------------------------------------------------------------------------------


def make_state(q: Queries, context: Context, p: Attention, o: Options) -> State:
    """Attend from queries to a part of a set that is ready."""
    fused = _by_a_kernel(q, context, p, o)
    if fused is None:
        return _by_steps(q, context, p, o)
    state, unsure = fused
    if unsure is None:
        return state
    steps = _by_steps(q, context, p, o)
    return State(*(o.xp.where(unsure, *both) for both in zip(steps, state, strict=True)))


def _by_steps(q: Queries, context: Context, p: Attention, o: Options) -> State:
    xp = o.xp
    s = _scores(q, context, p, o)
    largest = _largest(s, xp)
    e = exp_into(into("subtract", s, _finite(largest, xp), xp), xp)
    total = row_sum(e, xp)
    if q.order.values == "carry_weights":
        weighted = _weighted_elements(e, context, xp)
    else:
        values, context = _values(context, p, xp)
        weighted = matmul_heads(e, values, xp)
    return State(largest, total, _poisoned(weighted, context, xp))


def _by_a_kernel(q: Queries, context: Context, p: Attention, o: Options) -> tuple[State, Array | None] | None:
    """Make a state by one kernel, if there is one, relative to the logarithms of its sums; say where it is not sure."""
    xp, n = o.xp, context.elements.shape[-2]
    if q.order != PROJECT or context.bias is not None or context.pair_mask is not None:
        return None
    if not fuses(q.array, n, p.value.weight.shape[-1], xp):
        return None
    values, context = _values(context, p, xp)
    weighted, logs, unsure = fused_attention(q.array, _keys(q, context, p, o), values, context.mask, xp)
    return Mean(logs, xp.astype(logs != -math.inf, logs.dtype), weighted), unsure


def of_values(state: State, order: Order, p: Attention, xp: Namespace) -> State:
    """Project the sums of elements, where the weights were carried to these, to sums of values."""
    if order.values != "carry_weights":
        return state
    weighted = matmul_weights(state.weighted, xp.permute_dims(p.value.weight, (1, 0, 2)), xp)
    if not is_absent(p.value.bias):
        weighted = add_product(weighted, state.total, p.value.bias[:, None, :], xp)
    return State(state.largest, state.total, weighted)


def merge_states(a: State, b: State, xp: Namespace) -> State:
    """Merge the states of two parts of a set, in either order."""
    largest, wa, wb = _common(a, b, xp)
    return State(largest, a.total * wa + b.total * wb, into("add", a.weighted * wa, b.weighted * wb, xp))


def merge_blocks(a: State, b: State, xp: Namespace) -> State:
    """Merge the states of two blocks of the same set, that are needed no more, in the memory of the first."""
    largest, wa, wb = _common(a, b, xp)
    weighted = into("add", into("multiply", a.weighted, wa, xp), into("multiply", b.weighted, wb, xp), xp)
    return State(largest, a.total * wa + b.total * wb, weighted)


def merge_stacked(states: State, xp: Namespace) -> State:
    """Merge states that lie along a first axis, as a balanced tree."""
    while (count := states.total.shape[0]) > 1:
        half = count // 2
        first, second = (State(*(field[i * half : (i + 1) * half, ...] for field in states)) for i in (0, 1))
        merged = merge_states(first, second, xp)
        rest = (field[2 * half :, ...] for field in states)
        states = State(*(xp.concat(both, axis=0) for both in zip(merged, rest, strict=True))) if count % 2 else merged
    return State(*(field[0, ...] for field in states))


def _common(a: State, b: State, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return the largest score of both parts, and what the sums of each are multiplied with to be relative to it."""
    largest = xp.where(a.largest > b.largest, a.largest, b.largest)
    return largest, _weight(a, largest, xp), _weight(b, largest, xp)


def relative_to(largest: Array, state: State, xp: Namespace) -> State:
    """Express a state by the largest score of more than its own part of a set: such states are added up."""
    w = _weight(state, largest, xp)
    return State(largest, state.total * w, state.weighted * w)


def _weight(state: State, largest: Array, xp: Namespace) -> Array:
    return xp.exp(state.largest - _finite(largest, xp))


def finish(state: State, xp: Namespace) -> Array:
    """Return the weighted mean of the values; over nothing it is 0."""
    return state.weighted / _nonzero(state.total, xp)


def finish_blocks(state: State, xp: Namespace) -> Array:
    """Return the same, of a state that is needed no more, in its memory: where heads lie side by side, they stay so."""
    return state.weighted if isinstance(state, Mean) else into("divide", state.weighted, _nonzero(state.total, xp), xp)


# --- all elements at once -------------------------------------------------------------------------------------------


def softmax_weights(q: Queries, context: Context, p: Attention, o: Options) -> Array:
    """Compute the softmax weights ``(..., kv_heads, rows, n)`` of a context that is ready."""
    xp = o.xp
    s = _scores(q, context, p, o)
    e = exp_into(into("subtract", s, _finite(_largest(s, xp), xp), xp), xp)
    return into("divide", e, _nonzero(row_sum(e, xp), xp), xp)


def attend_at_once(q: Queries, context: Context, p: Attention, o: Options) -> Array:
    """Attend to a context that is ready with the output projection carried to the values, by one product for all heads.

    The heads are added up in that product, so their weights have to be finished before it.
    """
    xp, output = o.xp, p.output
    assert isinstance(output, Linear)
    w = softmax_weights(q, context, p, o)
    values, context = _values(context, p, xp)
    *batch, heads, m, n = w.shape
    carried, context = _visible(matmul_weights(values, output.weight, xp), -3, context, xp)
    carried = xp.reshape(carried, (*carried.shape[:-3], heads * n, carried.shape[-1]))
    # (..., heads, n, m) is how the weights lie in memory where the queries are many.
    w = xp.matrix_transpose(xp.reshape(xp.matrix_transpose(w), (*batch, heads * n, m)))
    out = matmul(w, carried, xp)
    if context.poisoned is not None:
        out = xp.where(context.poisoned[..., None], math.nan, out)
    return out if is_absent(output.bias) else into("add", out, output.bias, xp)


# --- scores ---------------------------------------------------------------------------------------------------------


def sizes_of(query: Array, context: Context, p: Attention) -> Sizes:
    """Read the sizes off that an order of products is chosen for."""
    *_, m, width = query.shape
    dim, kv_heads, head_dim = p.key.weight.shape
    return Sizes(
        queries=m,
        elements=context.elements.shape[-2],
        dim=dim,
        heads=p.query.weight.shape[1] if isinstance(p.query, Linear) else width // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=p.value.weight.shape[2],
        dim_query=width if isinstance(p.query, Linear) else None,
        dim_out=p.output.weight.shape[2] if isinstance(p.output, Linear) else None,
    )


def order_of(sizes: Sizes, context: Context, p: Attention, o: Options, *, whole: bool = False) -> Order:
    """Choose the order of products for the sizes at hand."""
    queries_made = isinstance(p.query_norm, NORMS) or isinstance(p.length_scale, LengthScale)
    made = queries_made, isinstance(p.key_norm, NORMS)
    if not copies_heads(o.xp):
        return choose(sizes, o.plan.order, whole=whole, head_norms=made)
    copied, cached = math.prod(context.elements.shape[:-2]), is_one_cpu(o.xp)
    return choose(sizes, o.plan.order, whole=whole, head_norms=made, copied=copied, cached=cached)


def as_they_come(order: Order) -> bool:
    """Say whether queries are wanted without being projected: the keys are carried to them."""
    return order.scores == "carry_keys"


def queries(q: Array, context: Context, p: Attention, order: Order, o: Options) -> Queries:
    """Bring queries, projected to ``(..., kv_heads, rows, width)`` or as they come, into the form of an order."""
    scale = 1.0 / math.sqrt(p.key.weight.shape[-1]) if o.scale is None else o.scale
    if order.scores == "carry_keys":
        return Queries(q, order, scale=scale)
    if order.scores == "project" and o.eager and q.shape[-2] > context.elements.shape[-2]:
        return Queries(q, order, scale=scale)
    q = q * scale
    if order.scores == "project":
        return Queries(q, order)
    carried = matmul_weights(q, transposed_heads(p.key.weight, o.xp), o.xp)
    shift = None if is_absent(p.key.bias) else matmul(q, p.key.bias[..., None], o.xp)
    return Queries(carried, order, shift)


def _scores(q: Queries, context: Context, p: Attention, o: Options) -> Array:
    """Compute the scores ``(..., kv_heads, rows, n)``, ``-inf`` where an element does not take part.

    In memory, the last axis is that of the queries where it is long enough: NumPy finds the largest numbers of many
    short rows several times as fast for all rows at once. What is masked is masked in that order, so that the sums that
    follow add up in the same one, with a mask of any kind and without.
    """
    s, upright = _products(q, context, p, o)
    s = _masked(s, context, upright, o.xp)
    return s if upright else o.xp.matrix_transpose(s)


def _products(q: Queries, context: Context, p: Attention, o: Options) -> tuple[Array, bool]:
    """Multiply queries and elements: to ``(..., kv_heads, rows, n)`` or, not upright, ``(..., kv_heads, n, rows)``."""
    xp = o.xp
    if q.order.scores == "carry_queries":  # the queries of all heads by one product
        *batch, kv_heads, rows, dim = q.array.shape
        carried = xp.reshape(q.array, (*batch, kv_heads * rows, dim))
        s = _split_heads(matmul_rows(carried, context.key_elements(), xp), kv_heads, xp)
        return (s if q.shift is None else into("add", s, q.shift, xp)), True
    k = _keys(q, context, p, o)
    if q.order.scores == "project":
        if o.eager and 4 * q.array.shape[-2] > k.shape[-2]:
            return matmul(k, xp.matrix_transpose(q.array), xp), False
        return matmul_rows(q.array, k, xp), True
    assert isinstance(p.query, Linear)
    *batch, heads, n, _ = k.shape
    carried = matmul_weights(k, transposed_heads(p.query.weight, xp), xp)  # (..., heads, n, dim)
    carried = xp.reshape(carried, (*batch, heads * n, carried.shape[-1]))
    s = _split_heads(matmul_rows(carried, q.array, xp), heads, xp)
    return (s if is_absent(p.query.bias) else into("add", s, matmul(k, p.query.bias[..., None], xp), xp)), False


def _keys(q: Queries, context: Context, p: Attention, o: Options) -> Array:
    """Project the elements to keys ``(..., kv_heads, n, head_dim)``, scaled where the queries are not."""
    k = _heads_first(norm(_project(context.key_elements(), p.key, o.xp), p.key_norm, o), o.xp)
    return k if q.scale == 1.0 else k * q.scale


def _masked(s: Array, context: Context, upright: bool, xp: Namespace) -> Array:
    """Add the bias to scores, and put ``-inf`` where an element does not take part."""

    def along_elements(a: Array) -> Array:
        return a[..., None, None, :] if upright else a[..., None, :, None]

    if context.bias is not None:
        s = into("add", s, along_elements(context.bias), xp)
    if context.mask is not None:
        s = xp.where(along_elements(context.mask), s, -math.inf)
    if context.pair_mask is not None:
        m = context.pair_mask.shape[-2]
        groups = s.shape[-2 if upright else -1] // m if m else 1
        pairs = xp.concat([context.pair_mask] * groups, axis=-2)
        s = xp.where((pairs if upright else xp.matrix_transpose(pairs))[..., None, :, :], s, -math.inf)
    return s


def _largest(s: Array, xp: Namespace) -> Array:
    """Return the largest score of each query; of no scores it is ``-inf``."""
    if s.shape[-1] == 0:
        return xp.sum(s, axis=-1, keepdims=True) - math.inf
    return row_max(s, xp)


def _finite(largest: Array, xp: Namespace) -> Array:
    """Return what to subtract from the scores: of no scores, the least number, as ``-inf - -inf`` would be NaN."""
    return at_least(largest, -largest_number(largest.dtype, xp), xp)


def _nonzero(total: Array, xp: Namespace) -> Array:
    # It counts the largest score as 1, if there is any; below that, so that the gradient of a total of just 1 is whole.
    return at_least(total, 0.5, xp)


# --- values ---------------------------------------------------------------------------------------------------------


def _values(context: Context, p: Attention, xp: Namespace) -> tuple[Array, Context]:
    """Project the elements to values ``(..., kv_heads, n, value_dim)``."""
    values, context = _visible(_project(context.elements, p.value, xp), -2, context, xp)
    return _heads_first(values, xp), context


def _visible(values: Array, heads: int, context: Context, xp: Namespace) -> tuple[Array, Context]:
    """Take out, under a ``pair_mask``, what overflowed: it would reach the queries that do not see it.

    ``heads`` is the axis of the heads, on either side of the one of the elements.
    """
    if context.pair_mask is None:
        return values, context
    finite = xp.all(xp.isfinite(values), axis=(heads, -1))
    mask = finite[..., None] if heads == -2 else finite[..., None, :]
    return select(values, mask, xp), mark(context, finite, xp)


def _weighted_elements(e: Array, context: Context, xp: Namespace) -> Array:
    """Sum the elements by their exponentials, by one product for all heads."""
    *batch, kv_heads, rows, n = e.shape
    return _split_heads(matmul(xp.reshape(e, (*batch, kv_heads * rows, n)), context.elements, xp), kv_heads, xp)


def _poisoned(weighted: Array, context: Context, xp: Namespace) -> Array:
    """Make the rows NaN of the queries that see an element that is not finite."""
    if context.poisoned is None:
        return weighted
    m = context.poisoned.shape[-1]
    rows = xp.concat([context.poisoned] * (weighted.shape[-2] // m if m else 1), axis=-1)
    return xp.where(rows[..., None, :, None], math.nan, weighted)


# --- heads ----------------------------------------------------------------------------------------------------------


def head_counts(query: Array, p: Attention) -> tuple[int, int]:
    """Return the number of query heads and of key/value heads."""
    _, kv_heads, head_dim = p.key.weight.shape
    return (p.query.weight.shape[1] if isinstance(p.query, Linear) else query.shape[-1] // head_dim), kv_heads


def projected_queries(query: Array, p: Attention, o: Options, log_n: Array | None) -> Array:
    """Project, normalise and scale queries, and lay each group of heads that shares keys along the query axis.

    ``log_n`` is the :func:`~setattn._context.log_length` of all that they attend to, needed for a ``length_scale``.
    """
    xp, (heads, kv_heads) = o.xp, head_counts(query, p)
    m, head_dim = query.shape[-2], p.key.weight.shape[-1]
    if isinstance(p.query, Linear):
        q = _project(query, p.query, xp)
    else:
        q = xp.reshape(query, (*query.shape[:-1], heads, head_dim))
    q = _heads_first(norm(q, p.query_norm, o), xp)  # (..., heads, m, head_dim)
    if isinstance(p.length_scale, LengthScale):
        assert log_n is not None
        q = scale_by_length(q, log_n, p.length_scale, o)
    if heads == kv_heads:
        return q
    batch, groups = q.shape[:-3], heads // kv_heads
    # In two steps: Dask splits an axis, and merges two, but not both at once.
    q = xp.reshape(q, (*batch, kv_heads, groups, m, head_dim))
    return xp.reshape(q, (*batch, kv_heads, groups * m, head_dim))


def _project(x: Array, p: Linear, xp: Namespace) -> Array:
    """Map the last axis to heads: ``(..., n, dim)`` to ``(..., n, heads, head_dim)``."""
    dim, heads, head_dim = p.weight.shape
    weight = xp.reshape(p.weight, (dim, heads * head_dim))
    bias = p.bias if is_absent(p.bias) else xp.reshape(p.bias, (heads * head_dim,))
    return xp.reshape(linear(x, Linear(weight, bias), xp), (*x.shape[:-1], heads, head_dim))


def _heads_first(t: Array, xp: Namespace) -> Array:
    """Swap the axes of ``(..., a, b, d)`` before the last."""
    batch = len(t.shape) - 3
    return xp.permute_dims(t, (*range(batch), batch + 1, batch, batch + 2))


def _split_heads(t: Array, heads: int, xp: Namespace) -> Array:
    """Turn ``(..., heads * rows, d)`` into ``(..., heads, rows, d)``."""
    *batch, rows, d = t.shape
    return xp.reshape(t, (*batch, heads, rows // heads, d))


def ungroup(t: Array, heads: int, m: int, xp: Namespace) -> Array:
    """Turn ``(..., kv_heads, groups * m, d)`` into ``(..., heads, m, d)``."""
    *batch, kv_heads, _, d = t.shape
    if heads == kv_heads:
        return t
    return xp.reshape(xp.reshape(t, (*batch, kv_heads, heads // kv_heads, m, d)), (*batch, heads, m, d))


def output(t: Array, query: Array, p: Attention, xp: Namespace) -> Array:
    """Lay the heads ``(..., kv_heads, groups * m, value_dim)`` side by side again and project them."""
    m, (heads, _) = query.shape[-2], head_counts(query, p)
    batch, value_dim = t.shape[:-3], t.shape[-1]
    t = xp.reshape(_heads_first(ungroup(t, heads, m, xp), xp), (*batch, m, heads * value_dim))
    t = like_rows(t, query, xp)
    if not isinstance(p.output, Linear):
        return t
    weight = xp.reshape(p.output.weight, (heads * value_dim, p.output.weight.shape[-1]))
    return linear(t, Linear(weight, p.output.bias), xp)
