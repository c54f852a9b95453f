"""The blocks of the Set Transformer that have learned queries, and the whole of it."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._blocks import Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import of_sets, over_chunks
from setattn._layers import Options, affine, feed_forward, options
from setattn._mab import apply_mab, apply_sab
from setattn._params import ISAB, PMA, FeedForward, SetTransformer
from setattn._parts import once
from setattn._typing import Array


def isab(
    x: Array,
    /,
    params: ISAB,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply an induced set attention block: the elements attend to one another through a few inducing points.

    .. math:: \operatorname{isab}(X) = \operatorname{mab}(X, H), \qquad H = \operatorname{mab}(I, X)

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : ISAB
        The inducing points :math:`I`, of shape ``(m, dim)``, and the two blocks.
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
    Cost: :math:`O(n d^2 + n m d)` operations, linear in the size of the set.

    J. Lee et al., *Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks*, 2019,
    equations 9 and 10.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
    >>> setattn.isab(np.ones((4, 5, 8), np.float32), params).shape
    (4, 5, 8)
    """
    call = begin("isab", "x", x, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    once(structure.isab, call, params, check.data(call, "x", x), query_residual=query_residual)
    check.context_mask(call, mask, x, "x")
    o = options(call, x, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _isab(x, p, o, query_residual, mask), params, o.plan.threads)


def pma(
    x: Array,
    /,
    params: PMA,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Pool a set by multihead attention: a few learned seeds attend to its elements.

    .. math:: \operatorname{pma}(X) = \operatorname{mab}(S, \operatorname{ff}(X))

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : PMA
        The seeds :math:`S`, of shape ``(k, dim)``, the block, and the row-wise network, which may be absent.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at.
    query_residual, activation, eps, scale, plan
        As for :func:`mab`.

    Returns
    -------
    array, shape (..., k, dim)
        Does not depend on the order of the elements. Of an empty set it is a constant, the block applied to the seeds
        with an attention of 0.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(n d^2 + n k d)` operations. The authors' code leaves the row-wise network out.

    J. Lee et al., *Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks*, 2019,
    equation 11.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_pma(8, num_seeds=2, num_heads=2, rng=0)
    >>> setattn.pma(np.ones((4, 5, 8), np.float32), params).shape
    (4, 2, 8)
    """
    call = begin("pma", "x", x, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    once(structure.pma, call, params, check.data(call, "x", x), query_residual=query_residual)
    check.context_mask(call, mask, x, "x")
    o = options(call, x, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _pma(x, p, o, query_residual, mask), params, o.plan.threads)


def set_transformer(
    x: Array,
    /,
    params: SetTransformer,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply a Set Transformer: encode a set, pool it, decode what was pooled.

    .. math:: \operatorname{linear}(\operatorname{sab}(\dots \operatorname{pma}(\operatorname{encoder}(X))))

    where the encoder is a chain of :func:`isab` or :func:`sab`, by the type of each of its parameters.

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : SetTransformer
        Encoder blocks, pooling, decoder blocks, output layer.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at.
    query_residual, activation, eps, scale, plan
        As for :func:`mab`, the same in every block.

    Returns
    -------
    array, shape (..., k, dim_out)
        One row for each seed. Does not depend on the order of the elements.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: the sum of its blocks', linear in ``n`` with an encoder of :func:`isab`.

    J. Lee et al., *Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks*, 2019,
    section 3.4.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_set_transformer(2, 16, 4, num_heads=4, num_inducing=3, num_seeds=1, rng=0)
    >>> setattn.set_transformer(np.ones((4, 5, 2), np.float32), params).shape
    (4, 1, 4)
    """
    call = begin("set_transformer", "x", x, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    once(structure.set_transformer, call, params, check.data(call, "x", x), query_residual=query_residual)
    check.context_mask(call, mask, x, "x")
    o = options(call, x, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(params: SetTransformer) -> Array:
        h = x
        for block in params.encoder:
            if isinstance(block, ISAB):
                h = _isab(h, block, o, query_residual, mask)
            else:
                h = apply_sab(h, block, o, query_residual, mask)
        return decode(_pma(h, params.pma, o, query_residual, mask), params, o, query_residual)

    return evaluate(call, body, params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


def _isab(x: Array, p: ISAB, o: Options, query_residual: bool, mask: Array | None) -> Array:
    h = apply_mab(Context(p.inducing_points), Context(x, mask), p.mab_inducing, o, query_residual)
    return apply_mab(Context(x, mask), Context(h), p.mab_set, o, query_residual)


def _pma(x: Array, p: PMA, o: Options, query_residual: bool, mask: Array | None) -> Array:
    return _pool(Context(p.seeds), Context(x, mask), PMA((), p.mab, p.ff), o, query_residual)


@over_chunks
def _pool(seeds: Context, y: Context, p: PMA, o: Options, query_residual: bool) -> Array:
    return apply_mab(seeds, pma_context(y, p, o), p.mab, o, query_residual)


def pma_context(y: Context, p: PMA, o: Options) -> Context:
    """Put the row-wise network, if there is one, before all else that is done to the elements, or behind its own."""
    if not isinstance(ff := p.ff, FeedForward):
        return y
    first = y.prepare
    return y._replace(prepare=lambda x: feed_forward(x if first is None else first(x), ff, o))


def decode(h: Array, p: SetTransformer, o: Options, query_residual: bool) -> Array:
    """Compute what follows the pooling."""
    for block in p.decoder:
        h = apply_sab(h, block, o, query_residual)
    return of_sets(affine, h, p.output, o)
