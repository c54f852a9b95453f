"""The models Perceiver and Perceiver IO."""

from __future__ import annotations

from typing import Any

from setattn import _check as check
from setattn import _structure as structure
from setattn._blocks import Plan
from setattn._call import Call, begin, evaluate
from setattn._context import Context
from setattn._dask import of_sets
from setattn._embedding import rows_for
from setattn._layers import Options, linear, norm, options
from setattn._params import CrossAttention, InputEmbedding, MeanHead, Perceiver, PerceiverIO, is_absent
from setattn._perceiver_layers import cross_attend, transform
from setattn._typing import Absent, Array


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

    and then :math:`\operatorname{norm}_o(Z)`. With a head, the result is
    :math:`\operatorname{linear}(\operatorname{norm}_h(\operatorname{mean}(\operatorname{norm}_o(Z))))`, the mean being
    that of the latents. With an input embedding, element :math:`i` of :math:`Y` is

    .. math:: [\operatorname{linear}_p(x_i) + P_i;\ \operatorname{linear}_f(F_i)]

    of an input :math:`x_i` or of the row of a table that a token names, with the rows :math:`P_i` and :math:`F_i` that
    belong to its place. Every part of it may be absent.

    Parameters
    ----------
    inputs : array, shape (..., n, dim_inputs)
        The set :math:`Y`. With ``params.input.tokens``, integers of shape ``(..., n)``; one that is outside the table
        and takes part stands for a row of NaN.
    params : Perceiver
        The latents, the cross-attentions and the latent transformers. Iteration ``i`` uses entry ``i`` of either tuple,
        or its last one; an absent cross-attention leaves that step out. Two cross-attentions and one latent transformer
        with ``depth=8`` are thus the paper's ImageNet model (weights shared, but for the first cross-attention);
        ``(block, ())`` and one latent transformer are the encoder of Perceiver IO (one cross-attention, then the same
        layers over and over). Further, if they are there: ``input``, the norm ``output_norm``, the ``head``.
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
    array, shape (..., m, dim), or (..., dim_out) with a head
        Does not depend on the order of the inputs, unless there are tables with a row for each place. Namespace, device
        and dtype of the input, or of the table of the tokens.

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
    >>> params = params._replace(head=setattn.MeanHead(setattn.init_linear(8, 2, rng=0)))
    >>> setattn.perceiver(np.ones((4, 5, 6), np.float32), params, depth=3).shape
    (4, 2)
    """
    call = _begin("perceiver", inputs, params)
    check.switch(call.function, "query_residual", query_residual)
    structure.perceiver(call, "params", params, inputs, depth, query_residual=query_residual)
    check.mask(call, "mask", mask, _set_shape(inputs, params), "one entry for each element of inputs")
    o = options(call, inputs, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: Perceiver) -> Array:
        z = _perceiver(embedded(inputs, mask, p.input), p, o, depth, query_residual)
        return head(z, p.head, o)

    return evaluate(call, body, params, o.plan.threads)


def perceiver_io(
    inputs: Array,
    queries: Array | None,
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
        The set :math:`Y`, or integers ``(..., n)`` if the encoder has a table of tokens, as for :func:`perceiver`.
    queries : array, shape (..., o, dim_queries), or None
        One query :math:`Q` for each row of output. Queries of shape ``(o, dim_queries)`` are put to every set of the
        batch. ``None`` stands for the learned queries, ``params.queries``; where there are none, for the inputs
        themselves, with all that the encoder's ``input`` does to them.
    params : PerceiverIO
        The encoder, which has no head, the decoder, the output layer and the learned queries.
    mask : array of bool, shape (..., n), optional
        True where an input takes part. The values of the others are never looked at; where the inputs are the queries,
        their rows of the result are 0.
    depth : int, optional
        Number of iterations of the encoder, as for :func:`perceiver`.
    query_residual, decoder_residual : bool
        Whether the cross-attentions of the encoder (default True) and of the decoder (default False) add their queries.
    activation, eps, scale, plan
        As for :func:`cross_attention`.

    Returns
    -------
    array, shape (..., o, dim_out)
        Does not depend on the order of the inputs, unless there are tables with a row for each place; permuting the
        queries permutes it. Namespace, device and dtype of the input, or of the table of the tokens.

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
    call = _begin("perceiver_io", inputs, params)
    check.switch(call.function, "query_residual", query_residual)
    check.switch(call.function, "decoder_residual", decoder_residual)
    structure.perceiver_io(
        call,
        "params",
        params,
        inputs,
        queries,
        depth,
        query_residual=query_residual,
        decoder_residual=decoder_residual,
    )
    sets = _set_shape(inputs, params)
    if queries is not None:
        check.same_batch(call, "queries", queries, inputs, 1 + len(inputs.shape) - len(sets))
    check.mask(call, "mask", mask, sets, "one entry for each element of inputs")
    o = options(call, inputs, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: PerceiverIO) -> Array:
        y = embedded(inputs, mask, p.encoder.input)
        z = _perceiver(y, p.encoder, o, depth, query_residual)
        learned = y if is_absent(p.queries) else Context(p.queries)
        q = learned if queries is None else Context(queries)
        return cross_attend(q, Context(z), (p.decoder, p.output), o, decoder_residual)

    return evaluate(call, body, params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


def _begin(function: str, inputs: Array, p: Any) -> Call:
    """Start a call from the inputs; or, as these are then no numbers, from the table of the tokens."""
    table = structure.token_table(p)
    if is_absent(table):
        return begin(function, "inputs", inputs, by_chunks=True)
    at = "params.encoder.input.tokens" if isinstance(p, PerceiverIO) else "params.input.tokens"
    return begin(function, at, table, at, by_chunks=True, rows=inputs)


def _set_shape(inputs: Array, p: Any) -> tuple[int, ...]:
    """Return the shape of a batch of sets, ``(..., n)``."""
    return tuple(inputs.shape[:-1] if is_absent(structure.token_table(p)) else inputs.shape)


def embedded(inputs: Array, mask: Array | None, p: InputEmbedding | Absent, first: int = 0) -> Context:
    """Make a context of inputs that are embedded block by block; ``first`` is the place of the first of them."""
    if not isinstance(p, InputEmbedding):
        return Context(inputs, mask)
    x = inputs if is_absent(p.tokens) else inputs[..., None]
    return Context(x, mask, embedding=rows_for(p, slice(first, first + x.shape[-2])))


def _perceiver(y: Context, p: Perceiver, o: Options, depth: int | None, query_residual: bool) -> Array:
    z, cross, latent = p.latents, p.cross_attentions, p.latent_transformers
    for i in range(max(len(cross), len(latent)) if depth is None else depth):
        block = cross[min(i, len(cross) - 1)]
        if isinstance(block, CrossAttention):
            z = cross_attend(Context(z), y, (block, ()), o, query_residual)
        if latent:
            z = of_sets(transform, z, latent[min(i, len(latent) - 1)], o)
    return of_sets(norm, z, p.output_norm, o)


def head(z: Array, p: MeanHead | Absent, o: Options) -> Array:
    """Compute ``output(norm(mean))`` of the latents, or return them where there is no head."""
    return of_sets(_mean_head, z, p, o, rows=1)[..., 0, :] if isinstance(p, MeanHead) else z


def _mean_head(z: Array, p: MeanHead, o: Options) -> Array:
    """Compute the one row of a head."""
    mean = o.xp.mean(z, axis=-2, keepdims=True)
    return linear(norm(mean, p.norm, o), p.output, o.xp)
