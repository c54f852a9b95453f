"""Multi-head attention as a merge of partial states.

``softmax(s) @ v`` over a set is determined by three numbers for each query that two halves of the set can be merged in:
the largest score, the sum of the exponentials and the weighted sum of the values. A *state* holds them. Attention is
:func:`make_state`, :func:`merge_states`, :func:`finish`, whether the set is in one piece or in many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from setattn import _check as check
from setattn import _structure as structure
from setattn._call import Call, begin, evaluate
from setattn._layers import Options, linear, norm, options, select
from setattn._namespace import matmul
from setattn._order import Order, Sizes, cheapest
from setattn._params import Attention, Linear, is_absent
from setattn._typing import Array, Namespace


def attention(
    query: Array,
    context: Array,
    /,
    params: Attention,
    *,
    mask: Array | None = None,
    pair_mask: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    scale: float | None = None,
) -> Array:
    r"""Attend from queries to the elements of a set, with several heads.

    For each head :math:`j`, with :math:`q_j = Q W^Q_j + b^Q_j`, :math:`k_j = Y W^K_j + b^K_j`,
    :math:`v_j = Y W^V_j + b^V_j`,

    .. math::

        \operatorname{attention}(Q, Y) =
            \sum_j \operatorname{softmax}(s\, q_j k_j^\top + \beta)\, v_j\, W^O_j + b^O

    Parameters
    ----------
    query : array, shape (..., m, dim_query)
        The queries. Queries of shape ``(m, dim_query)`` are put to every set of the batch.
    context : array, shape (..., n, dim_context)
        The elements that keys and values come from.
    params : Attention
        The projections; their shapes say how many heads there are and how wide they are.
    mask : array of bool, shape (..., n), optional
        True where an element of the context takes part. The values of the others are never looked at.
    pair_mask : array of bool, shape (..., m, n), optional
        True where a query sees an element. What a query does not see changes nothing in its row.
    bias : array, shape (..., n), optional
        Added to the scores of every query and head; the logarithm of a multiplicity makes an element count that often.
        An element of bias ``-inf`` has weight 0, but unlike a masked one it is looked at: its values have to be finite.
    eps : float, default 1e-5
        Added to the variance in the norms of queries and keys, where ``params`` has them.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.

    Returns
    -------
    array, shape (..., m, dim_out)
        Namespace, device and dtype of the input. Over nothing (no elements, or none that take part) the weighted sum is
        0, and the result is the bias of the output projection.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    See Also
    --------
    attention_weights : The softmax weights themselves.

    Notes
    -----
    Cost: :math:`O((m + n)\, d^2 + m n d)` operations. Sums run in float32 at least.

    A. Vaswani et al., *Attention Is All You Need*, 2017, section 3.2; grouped keys and values: J. Ainslie et al., *GQA:
    Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*, 2023.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> rng = np.random.default_rng(0)
    >>> params = setattn.init_attention(8, num_heads=2, rng=rng)
    >>> query, context = rng.normal(size=(3, 8)), rng.normal(size=(4, 5, 8))
    >>> params = setattn.convert_params(params, np, dtype=np.float64)
    >>> setattn.attention(query, context, params).shape
    (4, 3, 8)
    """
    call = _check_attention("attention", query, context, params, mask, pair_mask, bias)
    o = options(call, eps=eps, scale=scale)

    def body(query: Array, context: Array, params: Attention, bias: Array | None) -> Array:
        return attend(query, [select_context(context, mask, pair_mask, o.xp, bias)], params, o)

    return evaluate(call, body, query, context, params, bias)


def attention_weights(
    query: Array,
    context: Array,
    /,
    params: Attention,
    *,
    mask: Array | None = None,
    pair_mask: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    scale: float | None = None,
) -> Array:
    r"""Compute the softmax weights of :func:`attention`, for looking at.

    .. math:: \operatorname{softmax}(s\, q_j k_j^\top + \beta)

    Parameters
    ----------
    query, context, params, mask, pair_mask, bias, eps, scale
        As for :func:`attention`.

    Returns
    -------
    array, shape (..., heads, m, n)
        Not negative; every row sums to 1. Elements that do not take part have weight exactly 0, and so has every
        element of a row that sees nothing.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((m + n)\, d^2 + m n d)` operations, and memory for all ``heads * m * n`` weights.

    A. Vaswani et al., *Attention Is All You Need*, 2017, equation 1.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_attention(4, num_heads=2, rng=0)
    >>> x = np.ones((5, 4), dtype=np.float32)
    >>> setattn.attention_weights(x[:1], x, params)[0].round(3).tolist() == [[np.float32(0.2)] * 5]
    True
    """
    call = _check_attention("attention_weights", query, context, params, mask, pair_mask, bias)
    o = options(call, eps=eps, scale=scale)

    def body(query: Array, context: Array, params: Attention, bias: Array | None) -> Array:
        return softmax_weights(query, select_context(context, mask, pair_mask, o.xp, bias), params, o)

    return evaluate(call, body, query, context, params, bias)


def _check_attention(
    function: str,
    query: Array,
    context: Array,
    params: Attention,
    mask: Array | None,
    pair_mask: Array | None,
    bias: Array | None,
) -> Call:
    call = begin(function, "query", query)
    q, y = check.data(call, "query", query, "m, dim"), check.data(call, "context", context)
    structure.attention(call, "params", params, q, y)
    check.same_batch(call, "query", query, context)
    check.context_mask(call, mask, context, "context")
    check.pair_mask(call, pair_mask, query, context, "query and context")
    check.score_bias(call, bias, context)
    return call


# --- the mathematics ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """The mergeable result of attending to part of a set; all that an empty part holds is ``-inf, 0, 0``."""

    largest: Array  # (..., kv_heads, queries, 1), the largest score
    total: Array  # (..., kv_heads, queries, 1), the sum of exp(score - largest)
    weighted: Array  # (..., kv_heads, queries, value_dim), the same sum over exp(score - largest) * value


class Context(NamedTuple):
    """Elements to attend to, selected by their masks, and which of them take part."""

    elements: Array  # (..., n, dim)
    mask: Array | None = None  # (..., n)
    pair_mask: Array | None = None  # (..., m, n)
    bias: Array | None = None  # (..., n), added to the scores
    poisoned: Array | None = None  # (..., m), the queries that see an element that is not finite


def select_context(
    elements: Array, mask: Array | None, pair_mask: Array | None, xp: Namespace, bias: Array | None = None
) -> Context:
    """Put zeros in the place of the elements that no query attends to, whatever their values are.

    An element that is not finite would reach, as 0 * NaN, the queries of its set that do not see it. Under a
    ``pair_mask`` it is taken out as well, and only the queries that see it are marked.
    """
    elements = select(elements, mask, xp)
    if pair_mask is None:
        return Context(elements, mask, pair_mask, bias)
    finite = xp.all(xp.isfinite(elements), axis=-1)
    poisoned = xp.any(xp.logical_and(pair_mask, xp.logical_not(finite)[..., None, :]), axis=-1)
    elements = select(elements, xp.logical_and(finite, xp.any(pair_mask, axis=-2)), xp)
    return Context(elements, mask, pair_mask, bias, poisoned)


def attend(query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array:
    """Attend from queries ``(..., m, dim)`` to the elements of all contexts together."""
    q = _queries(query, p, o)
    state, *others = [make_state(q, context, p, o) for context in contexts]
    for other in others:
        state = merge_states(state, other, o.xp)
    return _poison(_output(finish(state, o.xp), query, p, o.xp), contexts, o.xp)


def softmax_weights(query: Array, context: Context, p: Attention, o: Options) -> Array:
    """Compute the softmax weights ``(..., heads, m, n)``."""
    xp, (heads, _) = o.xp, _head_counts(query, p)
    s = _masked(_scores(_queries(query, p, o), context, p, o), context, xp)
    e = xp.exp(s - _finite(_largest(s, xp), xp))
    w = e / _nonzero(xp.sum(e, axis=-1, keepdims=True), xp)
    w = _ungroup(w, heads, query.shape[-2], xp)
    return w if context.poisoned is None else xp.where(context.poisoned[..., None, :, None], math.nan, w)


def _poison(out: Array, contexts: Sequence[Context], xp: Namespace) -> Array:
    for context in contexts:
        if context.poisoned is not None:
            out = xp.where(context.poisoned[..., None], math.nan, out)
    return out


# --- the three functions of a state ---------------------------------------------------------------------------------


def make_state(q: Array, context: Context, p: Attention, o: Options) -> State:
    """Attend from prepared queries ``(..., kv_heads, queries, head_dim)`` to one part of a set."""
    xp, order = o.xp, _order(q, context, p)
    s = _masked(_carried_scores(q, context, p, xp) if order.carry_queries else _scores(q, context, p, o), context, xp)
    largest = _largest(s, xp)
    e = xp.exp(s - _finite(largest, xp))
    total = xp.sum(e, axis=-1, keepdims=True)
    if order.carry_weights:
        weighted = _carried_values(e, total, context, p, xp)
    else:
        weighted = matmul(e, _heads_first(_project(context.elements, p.value, xp), xp), xp)
    return State(largest, total, weighted)


def merge_states(a: State, b: State, xp: Namespace) -> State:
    """Merge the states of two parts of a set, in either order."""
    largest = xp.where(a.largest > b.largest, a.largest, b.largest)
    shift = _finite(largest, xp)
    wa, wb = xp.exp(a.largest - shift), xp.exp(b.largest - shift)
    return State(largest, a.total * wa + b.total * wb, a.weighted * wa + b.weighted * wb)


def finish(state: State, xp: Namespace) -> Array:
    """Return the weighted mean of the values; over nothing it is 0."""
    return state.weighted / _nonzero(state.total, xp)


# --- scores ---------------------------------------------------------------------------------------------------------


def _scores(q: Array, context: Context, p: Attention, o: Options) -> Array:
    """Compute the scores of prepared queries with projected elements."""
    k = norm(_project(context.elements, p.key, o.xp), p.key_norm, o)
    return matmul(q, o.xp.matrix_transpose(_heads_first(k, o.xp)), o.xp)


def _carried_scores(q: Array, context: Context, p: Attention, xp: Namespace) -> Array:
    """Compute the same scores with the queries of all heads carried to the elements, by one product."""
    *batch, kv_heads, rows, _ = q.shape
    carried = matmul(q, xp.permute_dims(p.key.weight, (1, 2, 0)), xp)  # (..., kv_heads, rows, dim)
    carried = xp.reshape(carried, (*batch, kv_heads * rows, carried.shape[-1]))
    s = _split_heads(matmul(carried, xp.matrix_transpose(context.elements), xp), kv_heads, xp)
    return s if is_absent(p.key.bias) else s + matmul(q, p.key.bias[..., None], xp)


def _carried_values(e: Array, total: Array, context: Context, p: Attention, xp: Namespace) -> Array:
    """Sum the elements by their exponentials and project the sums, by one product for all heads."""
    *batch, kv_heads, rows, n = e.shape
    sums = matmul(xp.reshape(e, (*batch, kv_heads * rows, n)), context.elements, xp)
    weighted = matmul(_split_heads(sums, kv_heads, xp), xp.permute_dims(p.value.weight, (1, 0, 2)), xp)
    return weighted if is_absent(p.value.bias) else weighted + total * p.value.bias[:, None, :]


def _masked(s: Array, context: Context, xp: Namespace) -> Array:
    """Add the bias to scores, and put ``-inf`` where an element does not take part."""
    if context.bias is not None:
        s = s + context.bias[..., None, None, :]
    if context.mask is not None:
        s = xp.where(context.mask[..., None, None, :], s, -math.inf)
    if context.pair_mask is not None:
        m = context.pair_mask.shape[-2]
        groups = s.shape[-2] // m if m else 1
        pairs = xp.concat([context.pair_mask] * groups, axis=-2)
        s = xp.where(pairs[..., None, :, :], s, -math.inf)
    return s


def _largest(s: Array, xp: Namespace) -> Array:
    """Return the largest score of each query; of no scores it is ``-inf``."""
    if s.shape[-1] == 0:
        return xp.sum(s, axis=-1, keepdims=True) - math.inf
    return xp.max(s, axis=-1, keepdims=True)


def _finite(largest: Array, xp: Namespace) -> Array:
    return xp.where(xp.isfinite(largest), largest, 0.0)  # -inf - -inf would be NaN


def _nonzero(total: Array, xp: Namespace) -> Array:
    return xp.where(total == 0, 1.0, total)


# --- heads ----------------------------------------------------------------------------------------------------------


def _head_counts(query: Array, p: Attention) -> tuple[int, int]:
    """Return the number of query heads and of key/value heads."""
    _, kv_heads, head_dim = p.key.weight.shape
    return (p.query.weight.shape[1] if isinstance(p.query, Linear) else query.shape[-1] // head_dim), kv_heads


def _queries(query: Array, p: Attention, o: Options) -> Array:
    """Project, normalise and scale the queries, and lay each group of heads that shares keys along the query axis."""
    xp, (heads, kv_heads) = o.xp, _head_counts(query, p)
    m, head_dim = query.shape[-2], p.key.weight.shape[-1]
    if isinstance(p.query, Linear):
        q = _project(query, p.query, xp)
    else:
        q = xp.reshape(query, (*query.shape[:-1], heads, head_dim))
    q = norm(q, p.query_norm, o) * (1.0 / math.sqrt(head_dim) if o.scale is None else o.scale)
    q = _heads_first(q, xp)  # (..., heads, m, head_dim)
    if heads == kv_heads:
        return q
    batch, groups = q.shape[:-3], heads // kv_heads
    # In two steps: Dask splits an axis, and merges two, but not both at once.
    q = xp.reshape(q, (*batch, kv_heads, groups, m, head_dim))
    return xp.reshape(q, (*batch, kv_heads, groups * m, head_dim))


def _project(x: Array, p: Linear, xp: Namespace) -> Array:
    """Map the last axis to heads: ``(..., n, dim)`` to ``(..., n, heads, head_dim)``."""
    dim, heads, head_dim = p.weight.shape
    y = matmul(x, xp.reshape(p.weight, (dim, heads * head_dim)), xp)
    y = xp.reshape(y, (*x.shape[:-1], heads, head_dim))
    return y if is_absent(p.bias) else y + p.bias


def _heads_first(t: Array, xp: Namespace) -> Array:
    """Swap the axes of ``(..., a, b, d)`` before the last."""
    batch = len(t.shape) - 3
    return xp.permute_dims(t, (*range(batch), batch + 1, batch, batch + 2))


def _split_heads(t: Array, heads: int, xp: Namespace) -> Array:
    """Turn ``(..., heads * rows, d)`` into ``(..., heads, rows, d)``."""
    *batch, rows, d = t.shape
    return xp.reshape(t, (*batch, heads, rows // heads, d))


def _order(q: Array, context: Context, p: Attention) -> Order:
    """Choose the cheapest order of products for the sizes at hand."""
    n, dim = context.elements.shape[-2:]
    _, kv_heads, value_dim = p.value.weight.shape
    sizes = Sizes(
        queries=kv_heads * q.shape[-2],
        elements=n,
        dim=dim,
        kv_heads=kv_heads,
        head_dim=q.shape[-1],
        value_dim=value_dim,
    )
    order = cheapest(sizes)
    # A norm on the keys needs the keys.
    return order if is_absent(p.key_norm) else order._replace(carry_queries=False)


def _ungroup(t: Array, heads: int, m: int, xp: Namespace) -> Array:
    """Turn ``(..., kv_heads, groups * m, d)`` into ``(..., heads, m, d)``."""
    *batch, kv_heads, _, d = t.shape
    if heads == kv_heads:
        return t
    return xp.reshape(xp.reshape(t, (*batch, kv_heads, heads // kv_heads, m, d)), (*batch, heads, m, d))


def _output(t: Array, query: Array, p: Attention, xp: Namespace) -> Array:
    """Lay the heads ``(..., kv_heads, groups * m, value_dim)`` side by side again and project them."""
    m, (heads, _) = query.shape[-2], _head_counts(query, p)
    batch, value_dim = t.shape[:-3], t.shape[-1]
    t = xp.reshape(_heads_first(_ungroup(t, heads, m, xp), xp), (*batch, m, heads * value_dim))
    if not isinstance(p.output, Linear):
        return t
    weight = xp.reshape(p.output.weight, (heads * value_dim, p.output.weight.shape[-1]))
    return linear(t, Linear(weight, p.output.bias), xp)
