"""Multi-head attention, and its weights for looking at."""

from __future__ import annotations

import math

from setattn import _check as check
from setattn import _parts as parts
from setattn._attend import attend, by_queries, log_length_of
from setattn._blocks import Block, Plan
from setattn._call import Call, begin, evaluate
from setattn._context import Context, ready
from setattn._layers import Options, enter, options, select
from setattn._params import Attention
from setattn._state import (
    as_they_come,
    head_counts,
    order_of,
    projected_queries,
    queries,
    sizes_of,
    softmax_weights,
    ungroup,
)
from setattn._typing import Array


def attention(
    query: Array,
    context: Array,
    /,
    params: Attention,
    *,
    mask: Array | None = None,
    pair_mask: Array | None = None,
    bias: Array | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Attend from queries to the elements of a set, with several heads.

    For each head :math:`j`, with :math:`q_j = Q W^Q_j + b^Q_j`, :math:`k_j = Y W^K_j + b^K_j`,
    :math:`v_j = Y W^V_j + b^V_j`,

    .. math::

        \operatorname{attention}(Q, Y) =
            \sum_j \operatorname{softmax}(s\, q_j k_j^\top + \beta)\, v_j\, W^O_j + b^O

    With a ``length_scale``, every :math:`q_j` is first multiplied by a factor that depends on how many elements take
    part, :math:`n`,

    .. math::

        q_j \leftarrow q_j \odot \operatorname{base}_j(\log n) \odot (1 + \tanh(\operatorname{net}(q_j)))

    where the last factor may be absent. Masked elements do not count; under a ``pair_mask``, each query counts those
    that it sees. A ``bias`` changes no count. The logarithm of no elements is taken as 0.

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
    activation : {"gelu", "gelu_tanh", "relu", "squared_relu", "silu"}
        Activation of the networks of a ``length_scale``; nothing else has one.
    eps : float, default 1e-5
        Added to the variance in the norms of queries and keys, where ``params`` has them.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

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
    Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*, 2023; factors of :math:`\log n`:
    K. M. Nakanishi, *Scalable-Softmax Is Superior for Attention*, 2025.

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
    o = options(call, query, context, activation=activation, eps=eps, scale=scale, plan=plan)

    q, y = Context(query), Context(context, mask, pair_mask, bias)
    return evaluate(call, lambda p: attend_from(q, y, p, o), params, o.plan.threads)


def attention_weights(
    query: Array,
    context: Array,
    /,
    params: Attention,
    *,
    mask: Array | None = None,
    pair_mask: Array | None = None,
    bias: Array | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
) -> Array:
    r"""Compute the softmax weights of :func:`attention`, for looking at.

    .. math:: \operatorname{softmax}(s\, q_j k_j^\top + \beta)

    Parameters
    ----------
    query, context, params, mask, pair_mask, bias, activation, eps, scale
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
    o = options(call, activation=activation, eps=eps, scale=scale)

    def body(params: Attention) -> Array:
        q, y = enter(query, None, o), ready(Context(context, mask, pair_mask, bias), o)
        order = order_of(sizes_of(q, y, params), y, params, o)
        asking = q if as_they_come(order) else projected_queries(q, params, o, log_length_of(q, [y], params, o))
        of_queries = queries(asking, y, params, order, o)
        w = ungroup(softmax_weights(of_queries, y, params, o), head_counts(q, params)[0], q.shape[-2], o.xp)
        return w if y.poisoned is None else o.xp.where(y.poisoned[..., None, :, None], math.nan, w)

    return evaluate(call, body, params)


# --- the mathematics ------------------------------------------------------------------------------------------------


def attend_from(q: Context, y: Context, p: Attention, o: Options) -> Array:
    """Attend from the elements of one context to those of another; the rows of masked ones are 0."""

    def rows(x: Array, y: Context, block: Block | None) -> Array:
        part = q.mask if block is None else block.of(q.mask)
        return select(attend(enter(x, part, o), [y], p, o), part, o.xp)

    return by_queries(rows, q.elements, y, p, o)


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
    parts.once(parts.attention, call, params, q, y)
    check.same_batch(call, "query", query, context)
    check.context_mask(call, mask, context, "context")
    check.pair_mask(call, pair_mask, query, context, "query and context")
    check.score_bias(call, bias, context)
    return call
