"""The blocks of Flamingo: the Perceiver resampler and the gated cross-attention."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import of_sets, outright, over_chunks
from setattn._layers import (
    Options,
    affine,
    enter,
    linear,
    norm,
    normed_feed_forward,
    options,
    residual_feed_forward,
    select,
)
from setattn._namespace import creation_device, cumulative_count
from setattn._params import CrossAttention, FeedForward, GatedCrossAttention, Resampler, is_absent
from setattn._typing import Array, Namespace


def perceiver_resampler(
    features: Array,
    /,
    params: Resampler,
    *,
    mask: Array | None = None,
    activation: str = "squared_relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Resample any number of visual features to a fixed number of latents.

    The features, with their embeddings added and their frames laid end to end, are attended to together with the
    latents. Each layer is

    .. math::

        H &= Z + \operatorname{attention}(\operatorname{norm}_q(Z),
             [\operatorname{norm}_c(X); \operatorname{norm}_q(Z)]) \\
        Z &\leftarrow H + \operatorname{ff}(\operatorname{norm}_f(H))

    and the result is :math:`\operatorname{norm}_o(\operatorname{linear}(Z))`.

    Parameters
    ----------
    features : array
        The features, before the input layer if there is one. The embeddings in ``params`` say which axes they have:
        without any ``(..., n, dim)``; with a ``frame_embedding`` ``(..., frames, n, dim)``, whose frames are resampled
        together; with a ``media_embedding`` ``(..., media, n, dim)``, each of whose media is resampled on its own; with
        both ``(..., media, frames, n, dim)``.
    params : Resampler
        The latents, of shape ``(m, dim)``, the layers, the embeddings and what surrounds them.
    mask : array of bool, shape of ``features`` without its last axis, optional
        True where a feature takes part. The values of the others are never looked at.
    activation : {"squared_relu", "gelu", "gelu_tanh", "relu", "silu"}
        Activation of the feed-forward networks. The paper's is the squared ReLU; OpenFlamingo, flamingo-pytorch and
        IP-Adapter use ``"gelu"``.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., m, dim_out), or (..., media, m, dim_out) with a ``media_embedding``
        Does not depend on the order of the features of one frame.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together; also for more frames or media than the embeddings
        have rows.

    Notes
    -----
    Cost: :math:`O(n d^2 + n m d)` operations a layer, linear in the number of features.

    J.-B. Alayrac et al., *Flamingo: a Visual Language Model for Few-Shot Learning*, 2022, section 2.1 and appendix
    A.1.1. The final norm is in all public code, not in the paper's listing.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_perceiver_resampler(8, num_latents=3, num_layers=2, num_heads=2, num_frames=4, rng=0)
    >>> setattn.perceiver_resampler(np.ones((2, 4, 5, 8), np.float32), params).shape
    (2, 3, 8)
    """
    call = begin("perceiver_resampler", "features", features, by_chunks=True)
    structure.perceiver_resampler(call, "params", params, features)
    check.mask(call, "mask", mask, features.shape[:-1], "one entry for each feature")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: Resampler) -> Array:
        y, z = _flatten(features, mask, *outright(p._replace(layers=()), features, o)), p.latents
        for layer in p.layers:
            z = _resample(Context(z), y, layer, o)
        return of_sets(norm, of_sets(affine, z, p.output, o), p.output_norm, o)

    return evaluate(call, body, params)


def gated_cross_attention(
    x: Array,
    media: Array,
    /,
    params: GatedCrossAttention,
    *,
    mask: Array | None = None,
    media_locations: Array | None = None,
    pair_mask: Array | None = None,
    immediate: bool = True,
    ff_without_media: bool = True,
    activation: str = "squared_relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Let text attend to media through gates that open from 0.

    .. math::

        H &= X + \tanh(\alpha)\, \operatorname{attention}(\operatorname{norm}_q(X), \operatorname{norm}_c(Y)) \\
        \operatorname{gated\_cross\_attention}(X, Y) &= H + \tanh(\beta)\, \operatorname{ff}(\operatorname{norm}_f(H))

    Parameters
    ----------
    x : array, shape (..., n, dim)
        The text.
    media : array, shape (..., media, m, dim_media)
        The media in the order of their places in the text, each of ``m`` elements, such as a resampler's latents.
    params : GatedCrossAttention
        The cross-attention and the gates :math:`\alpha` and :math:`\beta`, of shape ``(1,)`` or ``(dim,)``.
    mask : array of bool, shape (..., media, m), optional
        True where an element of the media takes part. The values of the others are never looked at.
    media_locations : array of bool, shape (..., n), optional
        True where a medium stands in the text. Text sees the medium it follows. If not given, all text sees all media.
    pair_mask : array of bool, shape (..., n, media), optional
        True where text sees a medium. With ``media_locations``, text sees what both let it see.
    immediate : bool, default True
        Whether text sees only the last medium before it (or at it), or all of them. With more places than media, text
        behind a place without a medium sees nothing, or all media.
    ff_without_media : bool, default True
        Whether the feed-forward network acts on text that sees nothing. If not, such text is left as it is.
    activation : {"squared_relu", "gelu", "gelu_tanh", "relu", "silu"}
        Activation of the feed-forward network. The paper's is the squared ReLU; OpenFlamingo uses ``"gelu"``, and
        Idefics and Llama 3.2 Vision a gate with ``"silu"``.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., n, dim)
        Text that sees nothing, because it stands before the first medium, follows one that was not given, or because
        all it could see is masked, gets an attention of exactly 0.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((n + M)\, d^2 + n M d)` operations with :math:`M` media elements in all.

    Known code differs where text sees nothing: OpenFlamingo's gives it the mean of all media in two of three cases.
    Llama 3.2 Vision leaves it as it is in Meta's code (``ff_without_media=False``); in Hugging Face's, it attends to
    every medium. In Flamingo and Idefics, the network acts on it.

    J.-B. Alayrac et al., *Flamingo: a Visual Language Model for Few-Shot Learning*, 2022, section 2.2 and appendix
    A.1.2.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_gated_cross_attention(8, 6, num_heads=2, rng=0)
    >>> text, media = np.ones((5, 8), np.float32), np.ones((2, 3, 6), np.float32)
    >>> places = np.array([False, True, False, True, False])
    >>> setattn.gated_cross_attention(text, media, params, media_locations=places).shape
    (5, 8)
    """
    call = begin("gated_cross_attention", "x", x)
    width, media_width = check.data(call, "x", x), check.data(call, "media", media, "media, m, dim", 3)
    structure.gated_cross_attention(call, "params", params, width, media_width)
    check.same_batch(call, "x", x, media, context_axes=3)
    check.mask(call, "mask", mask, media.shape[:-1], "one entry for each element of media")
    locations_shape = (*media.shape[:-3], x.shape[-2])
    check.mask(call, "media_locations", media_locations, locations_shape, "one entry for each element of x")
    pairs = (*locations_shape, media.shape[-3])
    check.mask(call, "pair_mask", pair_mask, pairs, "one entry for each pair from x and media")
    check.switch(call.function, "immediate", immediate)
    check.switch(call.function, "ff_without_media", ff_without_media)
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    y = _visible(media, mask, _seen_media(media, media_locations, pair_mask, immediate, o.xp), o.xp)
    return evaluate(call, lambda p: _gated(x, y, p, ff_without_media, o), params)


# --- the mathematics ------------------------------------------------------------------------------------------------


@over_chunks
def _resample(latents: Context, y: Context, p: CrossAttention, o: Options) -> Array:
    """Let latents attend to features and to themselves."""
    z = latents.elements
    contexts = [y._replace(norm=p.context_norm), Context(z, norm=p.query_norm)]
    return residual_feed_forward(z + attend(z, contexts, p.attention, o, p.query_norm), p, o)


def _gated(x: Array, y: Context, params: GatedCrossAttention, ff_without_media: bool, o: Options) -> Array:
    xp, p = o.xp, params.cross_attention

    def rows(x: Array, part: Context, _: Block | None) -> Array:
        x, sees = enter(x, None, o), _sees_anything(part, xp)
        a = attend(x, [part], p.attention, o, p.query_norm)
        h = x + xp.tanh(params.attention_gate) * select(a, sees, xp)
        if isinstance(p.ff, FeedForward):
            h = h + xp.tanh(params.ff_gate) * normed_feed_forward(h, p.ff_norm, p.ff, o)
        return h if ff_without_media else xp.where(sees[..., None], h, x)

    return by_queries(rows, x, y._replace(norm=p.context_norm), p.attention, o)


def _flatten(x: Array, mask: Array | None, p: Resampler, o: Options) -> Context:
    """Map the features, add their embeddings and lay the frames of a medium end to end."""
    xp = o.xp
    if is_absent(p.input) and is_absent(p.media_embedding) and is_absent(p.frame_embedding):
        return Context(x, mask)
    x = linear(enter(x, mask, o), p.input, xp)
    frames = not is_absent(p.frame_embedding)
    if not is_absent(p.media_embedding):
        media = p.media_embedding[: x.shape[-4 if frames else -3], :]
        x = x + (media[:, None, None, :] if frames else media[:, None, :])
    if frames:
        *batch, count, n, dim = x.shape
        x = xp.reshape(x + p.frame_embedding[:count, :][:, None, :], (*batch, count * n, dim))
        mask = None if mask is None else xp.reshape(mask, (*batch, count * n))
    return Context(x, mask)


def _seen_media(
    media: Array, locations: Array | None, pair_mask: Array | None, immediate: bool, xp: Namespace
) -> Array | None:
    """Say which media ``(..., n, media)`` each row of text sees."""
    if locations is None:
        return pair_mask
    place = cumulative_count(locations, xp)[..., None]
    number = xp.arange(1, media.shape[-3] + 1, dtype=xp.int32, device=creation_device(media, xp))
    sees = place == number if immediate else place >= number
    return sees if pair_mask is None else xp.logical_and(sees, pair_mask)


def _visible(media: Array, mask: Array | None, sees: Array | None, xp: Namespace) -> Context:
    """Lay the media end to end, and say which of their elements each row of text sees."""
    *batch, count, m, dim = media.shape
    mask = None if mask is None else xp.reshape(mask, (*batch, count * m))
    if sees is not None:
        n = sees.shape[-2]
        sees = xp.reshape(xp.broadcast_to(sees[..., None], (*batch, n, count, m)), (*batch, n, count * m))
    return Context(xp.reshape(media, (*batch, count * m, dim)), mask, sees)


def _sees_anything(y: Context, xp: Namespace) -> Array:
    """Say which rows of text see at least one element; one entry for all rows where they see the same."""
    if y.pair_mask is not None:
        sees = y.pair_mask if y.mask is None else xp.logical_and(y.pair_mask, y.mask[..., None, :])
        return xp.any(sees, axis=-1)
    mask = xp.ones_like(y.elements[..., 0], dtype=xp.bool) if y.mask is None else y.mask
    return xp.any(mask, axis=-1, keepdims=True)
