"""The Perceiver resampler of Flamingo and its relatives."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend
from setattn._blocks import Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._layers import Options, enter, linear, norm, options, residual_feed_forward
from setattn._params import CrossAttention, Resampler, is_absent
from setattn._typing import Array


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
    call = begin("perceiver_resampler", "features", features)
    structure.perceiver_resampler(call, "params", params, features)
    check.mask(call, "mask", mask, features.shape[:-1], "one entry for each feature")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: Resampler) -> Array:
        y, z = _flatten(features, mask, p, o), p.latents
        for layer in p.layers:
            z = _resample(z, y, layer, o)
        return norm(linear(z, p.output, o.xp), p.output_norm, o)

    return evaluate(call, body, params)


# --- the mathematics ------------------------------------------------------------------------------------------------


def _resample(z: Array, y: Context, p: CrossAttention, o: Options) -> Array:
    """Let latents attend to features and to themselves."""
    contexts = [y._replace(norm=p.context_norm), Context(z, norm=p.query_norm)]
    return residual_feed_forward(z + attend(z, contexts, p.attention, o, p.query_norm), p, o)


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
