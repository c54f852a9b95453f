"""Flamingo blocks from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from setattn import _check as check
from setattn._init._draw import divide_heads, draw_attention, draw_feed_forward, draw_norm, make_rng, positive
from setattn._params import CrossAttention, GatedCrossAttention, Resampler
from setattn._typing import Absent, Array


def init_perceiver_resampler(
    dim: int,
    /,
    *,
    num_heads: int = 8,
    num_latents: int = 64,
    num_layers: int = 6,
    head_dim: int | None = None,
    hidden: int | None = None,
    num_frames: int | None = None,
    num_media: int | None = None,
    rng: Any = None,
) -> Resampler:
    """Draw a Perceiver resampler: latents and embeddings standard normal, weights as :func:`init_linear` draws them.

    These are the distributions of OpenFlamingo and flamingo-pytorch; the paper gives none.

    Parameters
    ----------
    dim : int
        Width of the features and of the latents.
    num_heads : int, default 8
        Number of heads.
    num_latents : int, default 64
        Number of latents.
    num_layers : int, default 6
        Number of layers.
    head_dim : int, optional
        Width of a head; ``dim / num_heads`` if not given.
    hidden : int, optional
        Width of the hidden layers of the feed-forward networks; ``4 * dim`` if not given.
    num_frames, num_media : int, optional
        Rows of the frame and of the media embedding; without a number there is no such embedding, and the features
        have no such axis.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    Resampler
        Arrays of float32. No biases but the norms'.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_perceiver_resampler(16, num_frames=4, rng=0).frame_embedding.shape
    (4, 16)
    """
    function = "init_perceiver_resampler"
    generator = make_rng(function, rng)
    positive(function, dim=dim, num_latents=num_latents)
    hidden = 4 * dim if hidden is None else hidden
    positive(function, hidden=hidden)
    check.integer(function, "num_layers", num_layers)
    head_dim = divide_heads(function, dim, num_heads, head_dim)

    def normal(argument: str, rows: int | None) -> Array | Absent:
        if rows is None:
            return ()
        positive(function, **{argument: rows})
        return generator.standard_normal((rows, dim), dtype=np.float32)

    return Resampler(
        latents=normal("num_latents", num_latents),
        layers=tuple(
            _flamingo_cross_attention(generator, dim, dim, num_heads, head_dim, hidden)._replace(
                context_norm=draw_norm(dim, "layer")
            )
            for _ in range(num_layers)
        ),
        frame_embedding=normal("num_frames", num_frames),
        media_embedding=normal("num_media", num_media),
        output_norm=draw_norm(dim, "layer"),
    )


def init_gated_cross_attention(
    dim: int,
    dim_media: int | None = None,
    /,
    *,
    num_heads: int = 8,
    head_dim: int | None = None,
    hidden: int | None = None,
    vector_gates: bool = False,
    rng: Any = None,
) -> GatedCrossAttention:
    """Draw a gated cross-attention, which starts as the identity: its gates are 0.

    Weights are drawn as :func:`init_linear` draws them.

    Parameters
    ----------
    dim : int
        Width of the text.
    dim_media : int, optional
        Width of the media; ``dim`` if not given.
    num_heads : int, default 8
        Number of heads.
    head_dim : int, optional
        Width of a head; ``dim / num_heads`` if not given.
    hidden : int, optional
        Width of the hidden layer of the feed-forward network; ``4 * dim`` if not given.
    vector_gates : bool, default False
        Whether each feature has its own gate.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    GatedCrossAttention
        Arrays of float32. No biases but the norms'.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_gated_cross_attention(16, rng=0).attention_gate
    array([0.], dtype=float32)
    """
    function = "init_gated_cross_attention"
    generator = make_rng(function, rng)
    dim_media = dim if dim_media is None else dim_media
    positive(function, dim=dim, dim_media=dim_media)
    hidden = 4 * dim if hidden is None else hidden
    positive(function, hidden=hidden)
    check.switch(function, "vector_gates", vector_gates)
    head_dim = divide_heads(function, dim, num_heads, head_dim)
    gate = np.zeros(dim if vector_gates else 1, dtype=np.float32)
    return GatedCrossAttention(
        cross_attention=_flamingo_cross_attention(generator, dim, dim_media, num_heads, head_dim, hidden),
        attention_gate=gate,
        ff_gate=gate.copy(),
    )


def _flamingo_cross_attention(
    rng: np.random.Generator, dim: int, dim_context: int, num_heads: int, head_dim: int, hidden: int
) -> CrossAttention:
    return CrossAttention(
        attention=draw_attention(rng, dim, dim_context, num_heads, head_dim, bias=False),
        ff=draw_feed_forward(rng, dim, hidden, bias=False),
        query_norm=draw_norm(dim, "layer"),
        ff_norm=draw_norm(dim, "layer"),
    )
