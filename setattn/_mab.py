"""The multihead attention block, of two sets and of one."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import over_chunks
from setattn._kernels import into
from setattn._layers import Options, enter, linear, norm, options, residual_feed_forward, select
from setattn._params import MAB
from setattn._parts import once
from setattn._typing import Array


def mab(
    x: Array,
    y: Array,
    /,
    params: MAB,
    *,
    mask: Array | None = None,
    query_mask: Array | None = None,
    pair_mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply a multihead attention block: the elements of one set attend to those of another.

    .. math::

        X' &= \operatorname{project}(X) \\
        H &= \operatorname{norm}_1(X' +
             \operatorname{attention}(\operatorname{norm}_q(X'), \operatorname{norm}_c(Y))) \\
        \operatorname{mab}(X, Y) &= \operatorname{norm}_2(H + \operatorname{ff}(\operatorname{norm}_f(H)))

    where every part but the attention may be absent. The paper's block has the norms 1 and 2; a pre-norm block has the
    norms q, c and f instead. Without ``query_residual``, :math:`H` is the norm 1 of the attention alone, and as wide as
    the attention's output.

    Parameters
    ----------
    x : array, shape (..., m, dim_x)
        The elements that ask. A set of shape ``(m, dim_x)`` is put to every set of the batch.
    y : array, shape (..., n, dim_y)
        The elements that are asked.
    params : MAB
        The attention, the feed-forward network and the norms.
    mask : array of bool, shape (..., n), optional
        True where an element of ``y`` takes part. The values of the others are never looked at.
    query_mask : array of bool, shape (..., m), optional
        True where an element of ``x`` takes part. The values of the others are never looked at; their rows of the
        result are 0.
    pair_mask : array of bool, shape (..., m, n), optional
        True where an element of ``x`` sees an element of ``y``.
    query_residual : bool, default True
        Whether :math:`X'` is added to the attention.
    activation : {"relu", "squared_relu", "gelu", "gelu_tanh", "silu"}
        Activation of the feed-forward network.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., m, dim)
        Namespace, device and dtype of the input.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((m + n)\, d^2 + m n d)` operations.

    The authors' code differs from their paper: it adds the *projected* query (``project``, with an attention whose
    ``query`` is absent), has no output projection, one layer in its feed-forward network and no norm unless asked. All
    of that is a matter of parameters: see :func:`init_mab`. Its scale, ``1 / sqrt(dim)``, is the one the paper prints;
    the default here is the usual ``1 / sqrt(head_dim)``.

    J. Lee et al., *Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks*, 2019,
    equations 6 and 7.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_mab(8, num_heads=2, rng=0)
    >>> x, y = np.ones((4, 3, 8), np.float32), np.ones((4, 5, 8), np.float32)
    >>> setattn.mab(x, y, params).shape
    (4, 3, 8)
    """
    call = begin("mab", "x", x, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    of_x, of_y = check.data(call, "x", x, "m, dim"), check.data(call, "y", y)
    once(structure.mab, call, params, of_x, of_y, query_residual=query_residual)
    check.same_batch(call, "x", x, y)
    check.context_mask(call, mask, y, "y")
    check.mask(call, "query_mask", query_mask, x.shape[:-1], "one entry for each element of x")
    check.pair_mask(call, pair_mask, x, y, "x and y")
    o = options(call, x, y, activation=activation, eps=eps, scale=scale, plan=plan)

    context = Context(y, mask, pair_mask)
    return evaluate(
        call,
        lambda p: apply_mab(Context(x, query_mask), context, p, o, query_residual),
        params,
        o.plan.threads,
    )


def sab(
    x: Array,
    /,
    params: MAB,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply a set attention block: the elements of a set attend to one another.

    .. math:: \operatorname{sab}(X) = \operatorname{mab}(X, X)

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : MAB
        The block, as for :func:`mab`; both its sets are ``x``.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at; their rows of the result are 0.
    query_residual, activation, eps, scale, plan
        As for :func:`mab`.

    Returns
    -------
    array, shape (..., n, dim)
        Permuting the elements of ``x`` permutes the result in the same way.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(n d^2 + n^2 d)` operations; :func:`isab` is linear in ``n``.

    J. Lee et al., *Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks*, 2019,
    equation 8.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_mab(8, num_heads=2, rng=0)
    >>> setattn.sab(np.ones((4, 5, 8), np.float32), params).shape
    (4, 5, 8)
    """
    call = begin("sab", "x", x, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    width = check.data(call, "x", x)
    once(structure.mab, call, params, width, width, query_residual=query_residual)
    check.context_mask(call, mask, x, "x")
    o = options(call, x, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: apply_sab(x, p, o, query_residual, mask), params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


@over_chunks
def apply_mab(q: Context, y: Context, p: MAB, o: Options, query_residual: bool) -> Array:
    """Compute a multihead attention block; the rows of elements that take no part are 0."""

    def rows(x: Array, y: Context, block: Block | None) -> Array:
        part = block.of(q.mask) if block is not None else q.mask
        x = mab_queries(x, p, o, part)
        return after_mab(attend(x, [y], p.attention, o, p.query_norm), x, p, o, query_residual, part)

    return by_queries(rows, q.elements, y._replace(norm=p.context_norm), p.attention, o)


def mab_queries(x: Array, p: MAB, o: Options, mask: Array | None = None) -> Array:
    """Take in what asks, up to the norm before the attention."""
    return linear(enter(x, mask, o), p.project, o.xp)


def after_mab(h: Array, x: Array, p: MAB, o: Options, query_residual: bool, mask: Array | None = None) -> Array:
    """Compute what follows the attention ``h`` of queries ``x``."""
    h = norm(into("add", h, x, o.xp) if query_residual else h, p.attention_norm, o)
    return select(norm(residual_feed_forward(h, p, o), p.output_norm, o), mask, o.xp)


def apply_sab(x: Array, p: MAB, o: Options, query_residual: bool, mask: Array | None = None) -> Array:
    """Compute a set attention block."""
    return apply_mab(Context(x, mask), Context(x, mask), p, o, query_residual)
