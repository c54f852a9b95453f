"""The blocks of the Set Transformer."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._layers import Options, enter, feed_forward, linear, norm, options, residual_feed_forward, select
from setattn._namespace import into
from setattn._params import ISAB, MAB, PMA, FeedForward, SetTransformer
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
    norms q, c and f instead.

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
    call = begin("mab", "x", x)
    structure.mab(call, "params", params, check.data(call, "x", x, "m, dim"), check.data(call, "y", y))
    check.same_batch(call, "x", x, y)
    check.context_mask(call, mask, y, "y")
    check.mask(call, "query_mask", query_mask, x.shape[:-1], "one entry for each element of x")
    check.pair_mask(call, pair_mask, x, y, "x and y")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _mab(x, Context(y, mask, pair_mask), p, o, query_mask), params)


def sab(
    x: Array,
    /,
    params: MAB,
    *,
    mask: Array | None = None,
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
    activation, eps, scale, plan
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
    call = begin("sab", "x", x)
    width = check.data(call, "x", x)
    structure.mab(call, "params", params, width, width)
    check.context_mask(call, mask, x, "x")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _sab(x, p, o, mask), params)


def isab(
    x: Array,
    /,
    params: ISAB,
    *,
    mask: Array | None = None,
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
    activation, eps, scale, plan
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
    call = begin("isab", "x", x)
    structure.isab(call, "params", params, check.data(call, "x", x))
    check.context_mask(call, mask, x, "x")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _isab(x, p, o, mask), params)


def pma(
    x: Array,
    /,
    params: PMA,
    *,
    mask: Array | None = None,
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
    activation, eps, scale, plan
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
    call = begin("pma", "x", x)
    structure.pma(call, "params", params, check.data(call, "x", x))
    check.context_mask(call, mask, x, "x")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _pma(x, p, o, mask), params)


def set_transformer(
    x: Array,
    /,
    params: SetTransformer,
    *,
    mask: Array | None = None,
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
    activation, eps, scale, plan
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
    call = begin("set_transformer", "x", x)
    structure.set_transformer(call, "params", params, check.data(call, "x", x))
    check.context_mask(call, mask, x, "x")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(params: SetTransformer) -> Array:
        h = x
        for block in params.encoder:
            h = _isab(h, block, o, mask) if isinstance(block, ISAB) else _sab(h, block, o, mask)
        h = _pma(h, params.pma, o, mask)
        for block in params.decoder:
            h = _sab(h, block, o)
        return linear(h, params.output, o.xp)

    return evaluate(call, body, params)


# --- the mathematics ------------------------------------------------------------------------------------------------


def _mab(x: Array, y: Context, p: MAB, o: Options, mask: Array | None = None) -> Array:
    def rows(x: Array, y: Context, block: Block | None) -> Array:
        part = block.of(mask) if block is not None else mask
        x = linear(enter(x, part, o), p.project, o.xp)
        h = into("add", attend(x, [y], p.attention, o, p.query_norm), x, o.xp)
        h = norm(h, p.attention_norm, o)
        return select(norm(residual_feed_forward(h, p, o), p.output_norm, o), part, o.xp)

    return by_queries(rows, x, y._replace(norm=p.context_norm), p.attention, o)


def _sab(x: Array, p: MAB, o: Options, mask: Array | None = None) -> Array:
    return _mab(x, Context(x, mask), p, o, mask)


def _isab(x: Array, p: ISAB, o: Options, mask: Array | None = None) -> Array:
    h = _mab(p.inducing_points, Context(x, mask), p.mab_inducing, o)
    return _mab(x, Context(h), p.mab_set, o, mask)


def _pma(x: Array, p: PMA, o: Options, mask: Array | None = None) -> Array:
    y = Context(x, mask)
    if isinstance(ff := p.ff, FeedForward):
        y = y._replace(prepare=lambda elements: feed_forward(elements, ff, o))
    return _mab(p.seeds, y, p.mab, o)
