"""The gated cross-attention of Flamingo and its relatives."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._kernels import cumulative_count
from setattn._layers import Options, enter, normed_feed_forward, options, select
from setattn._namespace import creation_device
from setattn._params import FeedForward, GatedCrossAttention
from setattn._parts import once
from setattn._typing import Array, Namespace


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
    once(structure.gated_cross_attention, call, params, width, media_width)
    check.same_batch(call, "x", x, media, context_axes=3)
    check.mask(call, "mask", mask, media.shape[:-1], "one entry for each element of media")
    locations_shape = (*media.shape[:-3], x.shape[-2])
    check.mask(call, "media_locations", media_locations, locations_shape, "one entry for each element of x")
    pairs = (*locations_shape, media.shape[-3])
    check.mask(call, "pair_mask", pair_mask, pairs, "one entry for each pair from x and media")
    check.switch(call.function, "immediate", immediate)
    check.switch(call.function, "ff_without_media", ff_without_media)
    o = options(call, x, media, activation=activation, eps=eps, scale=scale, plan=plan)

    y = _visible(media, mask, _seen_media(media, media_locations, pair_mask, immediate, o.xp), o.xp)
    return evaluate(call, lambda p: _gated(x, y, p, ff_without_media, o), params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


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
