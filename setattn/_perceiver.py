"""The blocks of Perceiver and Perceiver IO."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._layers import Options, enter, linear, options, residual_feed_forward
from setattn._namespace import into
from setattn._params import CrossAttention, Perceiver, PerceiverIO, SelfAttention
from setattn._typing import Array


def cross_attention(
    latents: Array,
    inputs: Array,
    /,
    params: CrossAttention,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply Perceiver's pre-norm cross-attention: latents attend to inputs.

    .. math::

        H &= Z + \operatorname{attention}(\operatorname{norm}_q(Z), \operatorname{norm}_c(Y)) \\
        \operatorname{cross\_attention}(Z, Y) &= H + \operatorname{ff}(\operatorname{norm}_f(H))

    Parameters
    ----------
    latents : array, shape (..., m, dim)
        The queries :math:`Z`. Latents of shape ``(m, dim)`` are put to every set of the batch.
    inputs : array, shape (..., n, dim_inputs)
        The set :math:`Y` to attend to.
    params : CrossAttention
        The attention, the feed-forward network and the norms.
    mask : array of bool, shape (..., n), optional
        True where an input takes part. The values of the others are never looked at.
    query_residual : bool, default True
        Whether :math:`Z` is added to the attention; decoders often leave it out.
    activation : {"gelu", "gelu_tanh", "relu", "squared_relu", "silu"}
        Activation of the feed-forward network. The paper says GELU; the authors' code computes its tanh form,
        ``"gelu_tanh"``.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., m, dim)
        Does not depend on the order of the inputs. Namespace, device and dtype of the input.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((m + n)\, d^2 + m n d)` operations.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.1 and appendix C.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_cross_attention(8, 6, num_heads=2, rng=0)
    >>> setattn.cross_attention(np.ones((3, 8), np.float32), np.ones((4, 5, 6), np.float32), params).shape
    (4, 3, 8)
    """
    call = begin("cross_attention", "latents", latents)
    check.switch(call.function, "query_residual", query_residual)
    z, y = check.data(call, "latents", latents, "m, dim"), check.data(call, "inputs", inputs)
    structure.cross_attention(call, "params", params, z, y, query_residual=query_residual)
    check.same_batch(call, "latents", latents, inputs)
    check.context_mask(call, mask, inputs, "inputs")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _cross_attention(latents, Context(inputs, mask), p, o, query_residual), params)


def latent_transformer(
    latents: Array,
    /,
    params: tuple[SelfAttention, ...],
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply pre-norm self-attention layers to latents.

    Each layer is

    .. math::

        H &= Z + \operatorname{attention}(\operatorname{norm}(Z), \operatorname{norm}(Z)) \\
        Z &\leftarrow H + \operatorname{ff}(\operatorname{norm}_f(H))

    Parameters
    ----------
    latents : array, shape (..., m, dim)
        The latents :math:`Z`.
    params : tuple of SelfAttention
        The layers, in order.
    activation, eps, scale, plan
        As for :func:`cross_attention`.

    Returns
    -------
    array, shape (..., m, dim)
        Permuting the latents permutes the result in the same way.

    Raises
    ------
    ShapeError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(m d^2 + m^2 d)` operations a layer.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.1.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_latent_transformer(8, num_layers=2, num_heads=2, rng=0)
    >>> setattn.latent_transformer(np.ones((4, 3, 8), np.float32), params).shape
    (4, 3, 8)
    """
    call = begin("latent_transformer", "latents", latents)
    structure.latent_transformer(call, "params", params, check.data(call, "latents", latents, "m, dim"))
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(params: tuple[SelfAttention, ...]) -> Array:
        # A result never shares memory with an argument, even where there is nothing to do.
        return _latent_transformer(latents, params, o) if params else o.xp.astype(latents, latents.dtype, copy=True)

    return evaluate(call, body, params)


def perceiver(
    inputs: Array,
    /,
    params: Perceiver,
    *,
    mask: Array | None = None,
    depth: int | None = None,
    query_residual: bool = True,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Encode a set of any size into a fixed number of latents.

    For :math:`i = 0, \dots, \text{depth} - 1`, starting from the learned latents,

    .. math:: Z \leftarrow \operatorname{latent\_transformer}_i(\operatorname{cross\_attention}_i(Z, Y))

    Parameters
    ----------
    inputs : array, shape (..., n, dim_inputs)
        The set :math:`Y`.
    params : Perceiver
        The latents, the cross-attentions and the latent transformers. Iteration ``i`` uses entry ``i`` of either tuple,
        or its last one; an absent cross-attention leaves that step out. Two cross-attentions and one latent transformer
        with ``depth=8`` are thus the paper's ImageNet model (weights shared, but for the first cross-attention);
        ``(block, ())`` and one latent transformer are the encoder of Perceiver IO (one cross-attention, then the same
        layers over and over).
    mask : array of bool, shape (..., n), optional
        True where an input takes part. The values of the others are never looked at.
    depth : int, optional
        Number of iterations; as many as the longer tuple has entries if not given.
    query_residual : bool, default True
        Whether the cross-attentions add their queries.
    activation, eps, scale, plan
        As for :func:`cross_attention`.

    Returns
    -------
    array, shape (..., m, dim)
        The latents. They do not depend on the order of the inputs.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(n d^2 + n m d)` operations for each cross-attention, linear in the number of inputs.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.1.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_perceiver(6, 8, num_latents=3, num_layers=2, num_heads=2, rng=0)
    >>> setattn.perceiver(np.ones((4, 5, 6), np.float32), params, depth=3).shape
    (4, 3, 8)
    """
    call = begin("perceiver", "inputs", inputs)
    check.switch(call.function, "query_residual", query_residual)
    y = check.data(call, "inputs", inputs)
    structure.perceiver(call, "params", params, y, depth, query_residual=query_residual)
    check.context_mask(call, mask, inputs, "inputs")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    return evaluate(call, lambda p: _perceiver(Context(inputs, mask), p, o, depth, query_residual), params)


def perceiver_io(
    inputs: Array,
    queries: Array,
    /,
    params: PerceiverIO,
    *,
    mask: Array | None = None,
    depth: int | None = None,
    query_residual: bool = True,
    decoder_residual: bool = False,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Encode a set into latents and decode the latents at output queries.

    .. math:: \operatorname{linear}(\operatorname{cross\_attention}(Q, \operatorname{perceiver}(Y)))

    Parameters
    ----------
    inputs : array, shape (..., n, dim_inputs)
        The set :math:`Y`.
    queries : array, shape (..., o, dim_queries)
        One query :math:`Q` for each row of output. Queries of shape ``(o, dim_queries)`` are put to every set of the
        batch.
    params : PerceiverIO
        The encoder, the decoder and the output layer.
    mask : array of bool, shape (..., n), optional
        True where an input takes part. The values of the others are never looked at.
    depth : int, optional
        Number of iterations of the encoder, as for :func:`perceiver`.
    query_residual, decoder_residual : bool
        Whether the cross-attentions of the encoder (default True) and of the decoder (default False) add their queries.
    activation, eps, scale, plan
        As for :func:`cross_attention`.

    Returns
    -------
    array, shape (..., o, dim_out)
        Does not depend on the order of the inputs; permuting the queries permutes it.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((n + o)\, d^2 + (n + o)\, m d)` operations beside the latent transformers, linear in
    inputs and outputs.

    A. Jaegle et al., *Perceiver IO: A General Architecture for Structured Inputs & Outputs*, 2021, section 3.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_perceiver_io(6, 8, 7, 2, num_latents=3, num_layers=2, num_heads=2, rng=0)
    >>> inputs, queries = np.ones((4, 5, 6), np.float32), np.ones((9, 7), np.float32)
    >>> setattn.perceiver_io(inputs, queries, params).shape
    (4, 9, 2)
    """
    call = begin("perceiver_io", "inputs", inputs)
    check.switch(call.function, "query_residual", query_residual)
    check.switch(call.function, "decoder_residual", decoder_residual)
    y, q = check.data(call, "inputs", inputs), check.data(call, "queries", queries, "o, dim")
    structure.perceiver_io(
        call, "params", params, y, q, depth, query_residual=query_residual, decoder_residual=decoder_residual
    )
    check.same_batch(call, "queries", queries, inputs)
    check.context_mask(call, mask, inputs, "inputs")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(params: PerceiverIO) -> Array:
        z = _perceiver(Context(inputs, mask), params.encoder, o, depth, query_residual)
        out = _cross_attention(queries, Context(z), params.decoder, o, decoder_residual)
        return linear(out, params.output, o.xp)

    return evaluate(call, body, params)


def _cross_attention(z: Array, y: Context, p: CrossAttention, o: Options, query_residual: bool) -> Array:
    def rows(z: Array, y: Context, _: Block | None) -> Array:
        z = enter(z, None, o)
        h = attend(z, [y], p.attention, o, p.query_norm)
        return residual_feed_forward(into("add", h, z, o.xp) if query_residual else h, p, o)

    return by_queries(rows, z, y._replace(norm=p.context_norm), p.attention, o)


def _latent_transformer(z: Array, layers: tuple[SelfAttention, ...], o: Options) -> Array:
    for layer in layers:
        z = _self_attention(z, layer, o)
    return z


def _self_attention(z: Array, p: SelfAttention, o: Options) -> Array:
    def rows(x: Array, y: Context, _: Block | None) -> Array:
        x = enter(x, None, o)
        h = into("add", attend(x, [y], p.attention, o, p.norm), x, o.xp)
        return residual_feed_forward(h, p, o)

    return by_queries(rows, z, Context(z, norm=p.norm), p.attention, o)


def _perceiver(y: Context, p: Perceiver, o: Options, depth: int | None, query_residual: bool) -> Array:
    z, cross, latent = p.latents, p.cross_attentions, p.latent_transformers
    for i in range(max(len(cross), len(latent)) if depth is None else depth):
        block = cross[min(i, len(cross) - 1)]
        if isinstance(block, CrossAttention):
            z = _cross_attention(z, y, block, o, query_residual)
        if latent:
            z = _latent_transformer(z, latent[min(i, len(latent) - 1)], o)
    return z
