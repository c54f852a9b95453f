"""The Perceiver resampler of Flamingo and its relatives."""

from __future__ import annotations

import math

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend
from setattn._blocks import Block, Plan, by_rows
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import of_sets, outright, over_chunks, whole_sets
from setattn._layers import (
    NORMS,
    AnyNorm,
    Options,
    affine,
    enter,
    feed_forward,
    folds,
    linear,
    norm,
    options,
    residual_feed_forward,
    select,
)
from setattn._memory import part_of
from setattn._params import CrossAttention, FeedForward, Linear, MeanLatents, Resampler, is_absent
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

    and the result is :math:`\operatorname{norm}_o(\operatorname{linear}(Z))`. With ``mean_latents`` the first :math:`Z`
    is :math:`[\operatorname{project}(\operatorname{norm}_m(\operatorname{mean}(X))); Z]`.

    Parameters
    ----------
    features : array
        The features, before the input layer or network if there is one. The embeddings in ``params`` say which axes
        they have: without any ``(..., n, dim)``; with a ``frame_embedding`` ``(..., frames, n, dim)``, whose frames are
        resampled together; with a ``media_embedding`` ``(..., media, n, dim)``, each of whose media is resampled on its
        own; with both ``(..., media, frames, n, dim)``. Row ``i`` of a ``position`` table is added to element ``i`` of
        each frame first.
    params : Resampler
        The latents, of shape ``(m, dim)``, the layers, the embeddings and what surrounds them.
    mask : array of bool, shape of ``features`` without its last axis, optional
        True where a feature takes part. The values of the others are never looked at.
    activation : {"squared_relu", "gelu", "gelu_tanh", "relu", "silu"}
        Activation of the feed-forward networks, also of one as ``input``. The paper's is the squared ReLU;
        OpenFlamingo, flamingo-pytorch and IP-Adapter use ``"gelu"``.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., m, dim_out), or (..., media, m, dim_out) with a ``media_embedding``
        ``m`` counts the latents from the mean, which come first, and the learned ones. Does not depend on the order of
        the features of one frame, unless there is a ``position`` table. The mean of nothing is 0.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together; also for more elements, frames or media
        than the tables have rows.

    Notes
    -----
    Cost: :math:`O(n d^2 + n m d)` operations a layer, linear in the number of features. Features that are mapped, or
    have something added to them, are held once more, for all layers.

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
    o = options(call, features, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: Resampler) -> Array:
        before, own = outright(p._replace(layers=(), output=(), output_norm=()), features, o)
        y, z = _flatten(features, mask, before, own, _shared_norm(p, features, o)), p.latents
        if not is_absent(p.mean_latents):
            z = whole_sets(mean_latents(_mean(y, own.xp), before, own), o)
        for layer in p.layers:
            z = _resample(Context(z), y, layer, o)
        return of_sets(norm, of_sets(affine, z, p.output, o), p.output_norm, o)

    return evaluate(call, body, params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


@over_chunks
def _resample(latents: Context, y: Context, p: CrossAttention, o: Options) -> Array:
    """Let latents attend to features and to themselves."""
    z = latents.elements
    h = attend(z, resampler_contexts(z, y, p), p.attention, o, p.query_norm)
    return residual_feed_forward(z + h, p, o)


def resampler_contexts(z: Array, y: Context, p: CrossAttention) -> list[Context]:
    """Return what the latents attend to: the features and themselves."""
    return [y._replace(norm=p.context_norm), Context(z, norm=p.query_norm)]


def _is_embedded(p: Resampler) -> bool:
    """Say whether the features are mapped or have something added to them, and so are held once more."""
    return not all(map(is_absent, (p.position, p.input, p.media_embedding, p.frame_embedding, p.mean_latents)))


def _shared_norm(p: Resampler, x: Array, o: Options) -> AnyNorm:
    """Return the norm without scale and bias that all layers put the features through, to do so once, if it pays.

    Where the features are held for all layers anyway, and scale and bias become a part of the projections. The mean is
    one of the features before it, and in the chunks of a lazy array each layer has its own.
    """
    if o.lazy or not _is_embedded(p) or not is_absent(p.mean_latents):
        return ()
    n = x.shape[-2] if is_absent(p.frame_embedding) else math.prod(x.shape[-3:-1])
    if not all(folds((layer.attention.key, layer.attention.value), n) for layer in p.layers):
        return ()
    norms = [layer.context_norm for layer in p.layers]
    for kind in NORMS:
        if all(isinstance(own, kind) and not is_absent(own.scale) for own in norms):
            return kind()
    return ()


def _flatten(x: Array, mask: Array | None, p: Resampler, o: Options, last: AnyNorm) -> Context:
    """Make the features what all layers attend to, and lay the frames of a medium end to end."""
    if _is_embedded(p):
        x = _embedded(x, mask, p, o, last)
    if not is_absent(p.frame_embedding):
        *batch, count, n, dim = x.shape
        x = o.xp.reshape(x, (*batch, count * n, dim))
        mask = None if mask is None else o.xp.reshape(mask, (*batch, count * n))
    return Context(x, mask, normalised=last)


def _embedded(x: Array, mask: Array | None, p: Resampler, o: Options, last: AnyNorm) -> Array:
    """Add their positions to the features, map them, add the embeddings of their media and frames, and normalise."""
    frames, of_frames = not is_absent(p.frame_embedding), len(x.shape) - 3
    of_media = of_frames - frames
    parts = (p.input.hidden, p.input.gate, p.input.output) if isinstance(p.input, FeedForward) else (p.input,)
    widths = [part.weight.shape[-1] for part in parts if isinstance(part, Linear)]

    def rows(x: Array, block: Block | None) -> Array:
        here = mask if block is None else block.of(mask)
        x = enter(x, here, o)
        if not is_absent(p.position):
            x = x + _rows(p.position, -1, x.shape[-2], block)
        x = resampler_input(x, p, o)
        if not is_absent(p.media_embedding):
            media = _rows(p.media_embedding, of_media, x.shape[of_media], block)
            x = x + (media[:, None, None, :] if frames else media[:, None, :])
        if frames:
            x = x + _rows(p.frame_embedding, of_frames, x.shape[of_frames], block)[:, None, :]
        return norm(x, last, o) if is_absent(p.mean_latents) else select(x, here, o.xp)

    return by_rows(rows, x, 2 * (x.shape[-1] + sum(widths)), o.plan, o.xp)


def resampler_input(x: Array, p: Resampler, o: Options) -> Array:
    """Map the features."""
    return feed_forward(x, p.input, o) if isinstance(p.input, FeedForward) else linear(x, p.input, o.xp)


def _rows(table: Array, axis: int, size: int, block: Block | None) -> Array:
    """Take the rows of a table that belong to an axis of a block: it is a part of that axis, or has all of it."""
    return part_of(table, 0, block.cut if block is not None and block.axis == axis else slice(size))


def mean_latents(mean: Array, p: Resampler, o: Options) -> Array:
    """Lay the latents that are made of the mean of all elements, ``(..., 1, dim)``, before the learned ones."""
    assert isinstance(p.mean_latents, MeanLatents)
    xp, project = o.xp, p.mean_latents.project
    dim, count, _ = project.weight.shape
    flat = Linear(
        xp.reshape(project.weight, (dim, count * dim)),
        () if is_absent(project.bias) else xp.reshape(project.bias, (count * dim,)),
    )
    made = linear(norm(mean, p.mean_latents.norm, o), flat, xp)
    batch = made.shape[:-2]
    made = xp.reshape(made[..., 0, :], (*batch, count, dim))
    return xp.concat([made, xp.broadcast_to(p.latents, (*batch, *p.latents.shape))], axis=-2)


def _mean(y: Context, xp: Namespace) -> Array:
    """Average the elements, which are zeros where they do not take part, to one of ``(..., 1, dim)``; of none, 0."""
    counted = xp.ones_like(y.elements[..., 0]) if y.mask is None else xp.astype(y.mask, y.elements.dtype)
    count = xp.sum(counted, axis=-1, keepdims=True)[..., None]
    return xp.sum(y.elements, axis=-2, keepdims=True) / xp.where(count == 0, 1.0, count)
