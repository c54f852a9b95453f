"""Perceiver blocks from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from setattn import _check as check
from setattn._init._draw import (
    divide_heads,
    draw_attention,
    draw_feed_forward,
    draw_norm,
    lecun,
    make_rng,
    positive,
    truncated_normal,
)
from setattn._params import CrossAttention, Perceiver, PerceiverIO, SelfAttention


def init_cross_attention(
    dim: int,
    dim_inputs: int | None = None,
    /,
    *,
    num_heads: int = 1,
    head_dim: int | None = None,
    hidden: int | None = None,
    rng: Any = None,
) -> CrossAttention:
    """Draw Perceiver's cross-attention.

    As in the authors' code, weights are truncated normal with variance ``1 / dim_in`` and biases are 0.

    Parameters
    ----------
    dim : int
        Width of the latents.
    dim_inputs : int, optional
        Width of the inputs; ``dim`` if not given.
    num_heads : int, default 1
        Number of heads.
    head_dim : int, optional
        Width of a head; the smaller width divided by ``num_heads`` if not given, as in the paper.
    hidden : int, optional
        Width of the hidden layer of the feed-forward network; ``dim`` if not given.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    CrossAttention
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_cross_attention(8, 6, num_heads=2, rng=0).attention.key.weight.shape
    (6, 2, 3)
    """
    function, dim_inputs = "init_cross_attention", dim if dim_inputs is None else dim_inputs
    positive(function, dim=dim, dim_inputs=dim_inputs, **({} if hidden is None else {"hidden": hidden}))
    return _cross_attention(function, make_rng(function, rng), dim, dim_inputs, num_heads, head_dim, hidden)


def init_latent_transformer(
    dim: int, /, *, num_layers: int, num_heads: int, hidden: int | None = None, rng: Any = None
) -> tuple[SelfAttention, ...]:
    """Draw a stack of Perceiver's self-attention layers, with weights as :func:`init_cross_attention` draws them.

    Parameters
    ----------
    dim : int
        Width of the latents.
    num_layers : int
        Number of layers.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    hidden : int, optional
        Width of the hidden layers of the feed-forward networks; ``dim`` if not given.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    tuple of SelfAttention
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> len(setattn.init_latent_transformer(8, num_layers=3, num_heads=2, rng=0))
    3
    """
    function = "init_latent_transformer"
    return _latent_transformer(function, make_rng(function, rng), dim, num_layers, num_heads, hidden)


def init_perceiver(
    dim_inputs: int,
    dim: int,
    /,
    *,
    num_latents: int,
    num_layers: int,
    num_heads: int,
    num_cross_heads: int = 1,
    num_cross_attentions: int = 1,
    num_latent_transformers: int = 1,
    hidden: int | None = None,
    rng: Any = None,
) -> Perceiver:
    """Draw a Perceiver: latents truncated normal of deviation 0.02, weights as :func:`init_cross_attention` draws them.

    Parameters
    ----------
    dim_inputs, dim : int
        Widths of the inputs and of the latents.
    num_latents : int
        Number of latents.
    num_layers : int
        Number of layers in a latent transformer.
    num_heads, num_cross_heads : int
        Numbers of heads in the latent transformers and in the cross-attentions.
    num_cross_attentions, num_latent_transformers : int, default 1
        Number of each with weights of its own; how often they run is the ``depth`` of :func:`perceiver`.
    hidden : int, optional
        Width of the hidden layers of the feed-forward networks; ``dim`` if not given.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    Perceiver
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_perceiver(6, 8, num_latents=3, num_layers=2, num_heads=2, rng=0).latents.shape
    (3, 8)
    """
    function = "init_perceiver"
    generator = make_rng(function, rng)
    numbers = (num_latents, num_layers, num_heads, num_cross_heads, num_cross_attentions, num_latent_transformers)
    return _perceiver(function, generator, dim_inputs, dim, *numbers, hidden)


def init_perceiver_io(
    dim_inputs: int,
    dim: int,
    dim_queries: int,
    dim_out: int,
    /,
    *,
    num_latents: int,
    num_layers: int,
    num_heads: int,
    num_cross_heads: int = 1,
    num_decoder_heads: int = 1,
    hidden: int | None = None,
    rng: Any = None,
) -> PerceiverIO:
    """Draw a Perceiver IO, with everything drawn as :func:`init_perceiver` draws it.

    Parameters
    ----------
    dim_inputs, dim, dim_queries, dim_out : int
        Widths of the inputs, the latents, the output queries and the output.
    num_latents, num_layers, num_heads, num_cross_heads, hidden, rng
        As for :func:`init_perceiver`. The encoder has one cross-attention, used once however often the layers run.
    num_decoder_heads : int, default 1
        Number of heads in the decoder.

    Returns
    -------
    PerceiverIO
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> params = setattn.init_perceiver_io(6, 8, 7, 2, num_latents=3, num_layers=2, num_heads=2, rng=0)
    >>> params.output.weight.shape
    (7, 2)
    """
    function = "init_perceiver_io"
    generator = make_rng(function, rng)
    positive(function, dim_queries=dim_queries, dim_out=dim_out)
    numbers = (num_latents, num_layers, num_heads, num_cross_heads, 1, 1)
    encoder = _perceiver(function, generator, dim_inputs, dim, *numbers, hidden)
    return PerceiverIO(
        encoder=encoder._replace(cross_attentions=(*encoder.cross_attentions, ())),
        decoder=_cross_attention(
            function, generator, dim_queries, dim, num_decoder_heads, None, None, "num_decoder_heads"
        ),
        output=lecun(generator, (dim_queries,), (dim_out,), True),
    )


def _cross_attention(
    function: str,
    rng: np.random.Generator,
    dim: int,
    dim_inputs: int,
    num_heads: int,
    head_dim: int | None,
    hidden: int | None,
    heads_argument: str = "num_heads",
) -> CrossAttention:
    head_dim = divide_heads(function, min(dim, dim_inputs), num_heads, head_dim, heads_argument)
    return CrossAttention(
        attention=draw_attention(rng, dim, dim_inputs, num_heads, head_dim, scheme=lecun),
        ff=draw_feed_forward(rng, dim, dim if hidden is None else hidden, scheme=lecun),
        query_norm=draw_norm(dim, "layer"),
        context_norm=draw_norm(dim_inputs, "layer"),
        ff_norm=draw_norm(dim, "layer"),
    )


def _latent_transformer(
    function: str, rng: np.random.Generator, dim: int, num_layers: int, num_heads: int, hidden: int | None
) -> tuple[SelfAttention, ...]:
    hidden = dim if hidden is None else hidden
    positive(function, dim=dim, hidden=hidden)
    check.integer(function, "num_layers", num_layers, least=0)
    head_dim = divide_heads(function, dim, num_heads, None)
    return tuple(
        SelfAttention(
            attention=draw_attention(rng, dim, dim, num_heads, head_dim, scheme=lecun),
            ff=draw_feed_forward(rng, dim, hidden, scheme=lecun),
            norm=draw_norm(dim, "layer"),
            ff_norm=draw_norm(dim, "layer"),
        )
        for _ in range(num_layers)
    )


def _perceiver(
    function: str,
    rng: np.random.Generator,
    dim_inputs: int,
    dim: int,
    num_latents: int,
    num_layers: int,
    num_heads: int,
    num_cross_heads: int,
    num_cross_attentions: int,
    num_latent_transformers: int,
    hidden: int | None,
) -> Perceiver:
    positive(function, dim_inputs=dim_inputs, dim=dim, num_latents=num_latents)
    positive(function, num_cross_attentions=num_cross_attentions, num_latent_transformers=num_latent_transformers)
    positive(function, **({} if hidden is None else {"hidden": hidden}))
    return Perceiver(
        latents=truncated_normal(rng, (num_latents, dim), 0.02),
        cross_attentions=tuple(
            _cross_attention(function, rng, dim, dim_inputs, num_cross_heads, None, hidden, "num_cross_heads")
            for _ in range(num_cross_attentions)
        ),
        latent_transformers=tuple(
            _latent_transformer(function, rng, dim, num_layers, num_heads, hidden)
            for _ in range(num_latent_transformers)
        ),
    )
