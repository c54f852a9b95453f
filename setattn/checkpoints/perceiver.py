"""Perceiver and Perceiver IO of DeepMind: as transformers has them, and as Haiku's trees of the authors' own code."""

from __future__ import annotations

from typing import Any

import numpy as np

from setattn._convert import convert_params
from setattn._namespace import creation_device, namespace_of, native
from setattn._params import (
    Attention,
    CrossAttention,
    FeedForward,
    InputEmbedding,
    Linear,
    Perceiver,
    PerceiverIO,
    SelfAttention,
    is_absent,
)
from setattn._positions import fourier_features
from setattn._typing import Absent, Array
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import HAIKU, Layout, Option
from setattn.checkpoints._perceiver_names import AUTHORS, TRANSFORMERS, Names
from setattn.checkpoints._weights import Weights

# What the published models of images have in common, and no file says.
_BANDS = 64
_FOURIER = 2 * (2 * _BANDS + 1)  # features of a place in an image
_SIZES = {"pixels": (224, 224), "convolution": (56, 56), "flow": (368, 496)}
_RESCALE = 100.0  # what the flow is divided by


# --- the layers -----------------------------------------------------------------------------------------------------


def _attention(w: Weights, n: Names, dim: str, context: str, heads: int) -> Attention:
    scores: list[int | str] = [heads, w.local("width of queries")]
    values: list[int | str] = [heads, w.local("width of values")]
    return Attention(
        w.linear(n.query, [dim], scores),
        w.linear(n.key, [context], scores),
        w.linear(n.value, [context], values),
        w.linear(n.output, values, [dim]),
    )


def _feed_forward(w: Weights, n: Names, dim: str) -> FeedForward:
    hidden = w.local("hidden")
    return FeedForward(w.linear(n.hidden, [dim], [hidden]), w.linear(n.ff_output, [hidden], [dim]))


def _cross_attention(w: Weights, n: Names, dim: str, context: str, heads: int) -> CrossAttention:
    return CrossAttention(
        attention=_attention(w, n, dim, context, heads),
        ff=_feed_forward(w, n, dim),
        query_norm=w.layer_norm(n.query_norm, dim),
        context_norm=w.layer_norm(n.context_norm, context),
        ff_norm=w.layer_norm(n.cross_ff_norm, dim),
    )


def _self_attentions(w: Weights, n: Names, heads: int) -> tuple[SelfAttention, ...]:
    layers: list[SelfAttention] = []
    first, other = n.layer
    while w.has(name := other.format(len(layers)) if layers else first):
        layer = w.at(name)
        layers.append(
            SelfAttention(
                attention=_attention(layer, n, "dim", "dim", heads),
                ff=_feed_forward(layer, n, "dim"),
                norm=layer.layer_norm(n.query_norm, "dim"),
                ff_norm=layer.layer_norm(n.self_ff_norm, "dim"),
            )
        )
    return tuple(layers)


# --- the inputs -----------------------------------------------------------------------------------------------------


def _kind(w: Weights, n: Names, whole: bool) -> str:
    """Say what the inputs of a model are."""
    names = {"text": n.tokens, "image": n.pixels, "convolution": n.convolution, "flow": n.patches}
    for kind, name in names.items():
        if w.has(name):
            return kind
    classes = w.has(n.decoders[1])
    return "pixels" if whole and classes else "embedded"


def _places(height: int, width: int, like: Array, kind: str) -> Array:
    """Return the Fourier features of all places of an image, row by row, as an array like another one."""
    if is_absent(like):
        return ()
    places = np.array([(y, x) for y in _from_minus_one_to_one(height) for x in _from_minus_one_to_one(width)])
    resolution = (height, width) if kind == "flow" else _SIZES[kind]
    table = fourier_features(places, num_bands=_BANDS, max_resolution=resolution)
    xp: Any = namespace_of(like)
    return convert_params(table, xp, device=creation_device(like, xp), dtype=native(like.dtype))


def _from_minus_one_to_one(size: int) -> list[float]:
    return [2 * i / (size - 1) - 1 for i in range(size)] if size > 1 else [-1.0]


def _pixelwise(w: Weights, n: Names) -> Linear:
    """Return a convolution over single pixels, a linear layer with two axes of size 1."""
    if n is AUTHORS:
        weight = w.array(f"{n.pixels}/w", 1, 1, "channels", "projected")
        return Linear(weight, w.array(f"{n.pixels}/b", "projected"))
    weight = _transposed(w.array(f"{n.pixels}.weight", "projected", "channels", 1, 1))
    return Linear(weight, w.array(f"{n.pixels}.bias", "projected"))


def _transposed(a: Array) -> Array:
    xp: Any = namespace_of(a)
    return a if is_absent(a) else xp.permute_dims(a, (1, 0))


def _input(w: Weights, n: Names, kind: str, size: tuple[int | None, int | None], latents: Array) -> InputEmbedding:
    if kind == "text":
        tokens = w.array(n.tokens, "vocabulary", "inputs")
        return InputEmbedding(tokens, position=w.array(n.token_position, "rows", "inputs"))
    if kind == "image":
        return InputEmbedding(
            project=_pixelwise(w, n),
            features=w.array(n.pixel_position, "rows", "position"),
            features_project=w.linear(n.pixel_position_project, ["position"], ["projected position"]),
        )
    w.ignore(n.convolution)
    height, width = (published if own is None else own for own, published in zip(size, _SIZES[kind], strict=True))
    return InputEmbedding(
        project=w.linear(n.patches, ["patch"], ["projected"]) if kind == "flow" else (),
        features=w.computed((height * width, _FOURIER), lambda: _places(height, width, latents, kind)),
    )


def _check_widths(w: Weights, kind: str) -> None:
    """See to it that what is laid side by side has the width of what the encoder attends to."""
    inputs = w.size("inputs")
    beside = 0 if kind in ("text", "embedded") else w.size("projected position") if kind == "image" else _FOURIER
    left = w.size("projected") or max(inputs - beside, 1)
    if inputs and beside and inputs != left + beside:
        w.refuse(f"inputs of {left} features and {beside} of their place, not {inputs} in all")


# Everything that a model of several modalities may have: what is wrong with it is one thing alone.
_PARTS = (
    *("perceiver", "embeddings", "encoder", "decoder", "input_preprocessor", "output_postprocessor"),
    *("multimodal_preprocessor", "multimodal_decoder", "classification_decoder", "perceiver_encoder"),
    *(f"{name}_postprocessor" for name in ("audio", "projection", "classification")),
)


# --- the models -----------------------------------------------------------------------------------------------------


def _decoder(w: Weights, n: Names, kind: str, heads: int | None) -> tuple[CrossAttention, Linear | Absent, Array, bool]:
    """Return the decoder's parts, and whether it adds its queries."""
    classes = kind != "flow" and w.has(n.decoders[1])
    language = kind != "flow" and not classes
    d = w.at(n.decoders[2] if kind == "flow" else n.decoders[1] if classes else n.decoders[0])
    heads = heads or (8 if language else 1)
    cross = _cross_attention(d.at(n.decoder_cross), n, "inputs" if kind == "flow" else "queries", "dim", heads)
    output: Linear | Absent = ()
    if not language or d.has(n.decoder_output):
        output = d.linear(n.decoder_output, ["inputs" if kind == "flow" else "queries"], ["outputs"])
    if kind == "flow":
        parts = (a if is_absent(a) else a / _RESCALE for a in output)
        return cross, Linear(*parts), (), False
    return cross, output, d.array(n.decoder_queries, "outputs of a set", "queries"), classes


def _model(
    whole: Weights,
    n: Names,
    *,
    num_blocks: int,
    num_self_attention_heads: int,
    num_cross_attention_heads: int,
    num_decoder_attention_heads: int | None,
    query_residual: bool,
    activation: str,
    height: int | None,
    width: int | None,
) -> Block:
    w = whole.at("perceiver") if n is TRANSFORMERS and whole.has("perceiver") else whole
    if any(w.has(name) for name in n.several):
        whole.ignore(*_PARTS)
        whole.refuse("no model of several modalities, whose inputs are no one set")
        return Block("perceiver_io", ())
    kind = _kind(w, n, w is not whole or n is AUTHORS)
    latents = w.array(n.latents, "latents", "dim")
    cross = _cross_attention(w.at(n.cross), n, "dim", "inputs", num_cross_attention_heads)
    encoder = Perceiver(
        latents=latents,
        cross_attentions=(cross, ()) if num_blocks > 1 else (cross,),
        latent_transformers=(_self_attentions(w, n, num_self_attention_heads),),
        input=() if kind == "embedded" else _input(w, n, kind, (height, width), latents),
    )
    _check_widths(w, kind)
    options = {"depth": num_blocks, "query_residual": query_residual, "activation": activation, "eps": 1e-5}
    if not any(w.has(name) for name in n.decoders):
        return Block("perceiver", encoder, options)
    decoder, output, queries, residual = _decoder(w, n, kind, num_decoder_attention_heads)
    if whole.has(n.token_bias):
        tokens = w.array(n.tokens, "vocabulary", "inputs")
        output = Linear(_transposed(tokens), whole.array(n.token_bias, "vocabulary"))
    options["decoder_residual"] = residual
    return Block("perceiver_io", PerceiverIO(encoder, decoder, output, queries), options)


def _transformers(w: Weights, **options: Any) -> Block:
    return _model(w, TRANSFORMERS, **options)


def _haiku(w: Weights, **options: Any) -> Block:
    return _model(w, AUTHORS, **options)


def _options(activation: str) -> tuple[Option, ...]:
    return (
        Option("num_blocks", int, config=("num_blocks",), about="number of passes through the self-attentions"),
        Option(
            "num_self_attention_heads",
            int,
            config=("num_self_attention_heads",),
            about="number of heads of the self-attentions",
        ),
        Option(
            "num_cross_attention_heads",
            int,
            config=("num_cross_attention_heads",),
            about="number of heads of the encoder's cross-attention",
        ),
        Option(
            "num_decoder_attention_heads",
            int,
            None,
            about="number of heads of the decoder; 8 for the language model and 1 for the others, if not given",
        ),
        Option(
            "query_residual", bool, True, config=("use_query_residual",), about="whether the encoder adds its latents"
        ),
        Option("activation", str, activation, config=("hidden_act",), about="activation of the feed-forward networks"),
        Option("height", int, None, about="rows of an image with Fourier features; as published if not given"),
        Option("width", int, None, about="its columns, likewise"),
    )


LAYOUTS = (
    Layout(
        name="perceiver",
        original="transformers PerceiverModel",
        functions=("perceiver", "perceiver_io"),
        anchors=("perceiver.embeddings.latents", "embeddings.latents"),
        build=_transformers,
        options=_options("gelu"),
    ),
    Layout(
        name="perceiver-haiku",
        original="deepmind-research perceiver",
        functions=("perceiver", "perceiver_io"),
        anchors=(AUTHORS.latents, "encoder/~/trainable_position_encoding/pos_embs"),
        build=_haiku,
        options=_options("gelu_tanh"),
        convention=HAIKU,
    ),
)
