"""Perceiver IO of krasserm's perceiver-io: images, texts, and any other set that is given as it is."""

from __future__ import annotations

from setattn._params import (
    Attention,
    CrossAttention,
    FeedForward,
    InputEmbedding,
    LayerNorm,
    Linear,
    Perceiver,
    PerceiverIO,
    SelfAttention,
)
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._weights import Weights

_EPS = 1e-5  # of every norm; the package has no argument for it


def _attention(w: Weights, dim: str, context: str, heads: int, kind: str) -> Attention:
    scores: list[int | str] = [heads, f"{kind}_qk_head_dim"]
    values: list[int | str] = [heads, f"{kind}_v_head_dim"]
    return Attention(
        w.linear("q_proj", [dim], scores),
        w.linear("k_proj", [context], scores),
        w.linear("v_proj", [context], values),
        w.linear("o_proj", values, [dim]),
    )


def _feed_forward(w: Weights, dim: str, kind: str) -> tuple[FeedForward, LayerNorm]:
    hidden = f"{kind}_hidden"
    ff = FeedForward(w.linear("1", [dim], [hidden]), w.linear("3", [hidden], [dim]))
    return ff, w.layer_norm("0", dim)


def _cross_attention(w: Weights, dim: str, context: str, heads: int, kind: str) -> CrossAttention:
    """Return a cross-attention; one without a residual connection has no module inside."""
    a = w.at("0.module") if kind == "cross" or w.has("0.module") else w.at("0")
    ff, ff_norm = _feed_forward(w.at("1.module"), dim, kind)
    return CrossAttention(
        attention=_attention(a.at("attention"), dim, context, heads, kind),
        ff=ff,
        query_norm=a.layer_norm("q_norm", dim),
        context_norm=a.layer_norm("kv_norm", context),
        ff_norm=ff_norm,
    )


def _self_attentions(w: Weights, heads: int) -> tuple[SelfAttention, ...]:
    layers = []
    for i in range(w.count() or 1):
        a = w.at(f"{i}.0.module")
        ff, ff_norm = _feed_forward(w.at(f"{i}.1.module"), "dim", "self")
        attention = _attention(a.at("attention"), "dim", "dim", heads, "self")
        layers.append(SelfAttention(attention, ff, a.layer_norm("norm", "dim"), ff_norm))
    return tuple(layers)


def _input(w: Weights) -> InputEmbedding | Absent:
    """Return the tokens and positions of a text, or the positions beside the pixels of an image."""
    if w.has("txt_embedding"):
        tokens, position = w.array("txt_embedding.weight", "vocabulary", "inputs"), "pos_embedding.weight"
        position = position if w.has(position) or not w.has("pos_encoding") else "pos_encoding"
        return InputEmbedding(tokens, position=w.array(position, "places", "inputs") if w.has(position) else ())
    for name in ("position_encoding.position_encoding", "position_encoding"):
        if w.has(name):
            return InputEmbedding(features=w.array(name, "places", "features"))
    return ()


def _encoder(
    w: Weights, cross_heads: int, self_heads: int, cross_layers: int, blocks: int
) -> tuple[Perceiver, dict[str, int]]:
    latents = w.array("latent" if w.has("latent") else "latent_provider._query", "latents", "dim")
    cross = _cross_attention(w.at("cross_attn_1"), "dim", "inputs", cross_heads, "cross")
    further = cross
    if w.has("cross_attn_n"):
        further = _cross_attention(w.at("cross_attn_n"), "dim", "inputs", cross_heads, "cross")
        if cross_layers == 1:
            w.refuse("no cross_attn_n, as num_cross_attention_layers=1 says")
    if cross_layers > blocks:
        w.refuse(f"at most num_self_attention_blocks={blocks} cross-attentions, not {cross_layers}")
    latent = [_self_attentions(w.at("self_attn_1"), self_heads)]
    if w.has("self_attn_n"):
        latent.append(_self_attentions(w.at("self_attn_n"), self_heads))
        if blocks == 1:
            w.refuse("no self_attn_n, as num_self_attention_blocks=1 says")
    steps: list[CrossAttention | Absent] = [cross, *[further] * (cross_layers - 1)]
    if blocks > cross_layers:
        steps.append(())
    return Perceiver(latents, tuple(steps), tuple(latent), _input(w.at("input_adapter"))), {"depth": blocks}


def _output(w: Weights) -> Linear | Absent:
    """Return the output layer, whose weight may be the table of the tokens."""
    if w.has("1.output_adapter.bias"):
        tied = w.linear("0.input_adapter.txt_embedding", ["queries"], ["vocabulary"], bias=False)
        return tied._replace(bias=w.array("1.output_adapter.bias", "vocabulary"))
    linear = "1.output_adapter.linear"
    return w.linear(linear, ["queries"], ["outputs"]) if w.has(linear) else ()


def _perceiver_io(
    w: Weights,
    *,
    num_cross_attention_heads: int,
    num_self_attention_heads: int,
    num_decoder_attention_heads: int,
    num_self_attention_blocks: int,
    num_cross_attention_layers: int,
) -> Block:
    if w.has("cross_attention"):
        w.ignore("cross_attention", "self_attention", "input_adapter", "output_adapter", "output_layer", "out_norm")
        w.refuse("no Perceiver AR, whose causal attention and rotary positions no function here has")
        return Block("perceiver_io", ())
    encoder, options = _encoder(
        w.at("0"),
        num_cross_attention_heads,
        num_self_attention_heads,
        num_cross_attention_layers,
        num_self_attention_blocks,
    )
    queries = [name for name in ("1.output_query_provider._query", "1.output_adapter._output_query") if w.has(name)]
    params = PerceiverIO(
        encoder=encoder,
        decoder=_cross_attention(w.at("1.cross_attn"), "queries", "dim", num_decoder_attention_heads, "decoder"),
        output=_output(w),
        queries=w.array(queries[0], "output_queries", "queries") if queries else (),
    )
    residual = w.has("1.cross_attn.0.module")
    return Block("perceiver_io", params, {**options, "decoder_residual": residual, "activation": "gelu", "eps": _EPS})


LAYOUTS = (
    Layout(
        name="perceiver-io-krasserm",
        original="perceiver-io PerceiverIO",
        functions=("perceiver_io",),
        anchors=("0.cross_attn_1.0.module.q_norm.weight",),
        build=_perceiver_io,
        options=(
            Option(
                "num_cross_attention_heads",
                int,
                config=("model_config.encoder.num_cross_attention_heads",),
                about="number of heads of the encoder's cross-attentions",
            ),
            Option(
                "num_self_attention_heads",
                int,
                config=("model_config.encoder.num_self_attention_heads",),
                about="number of heads of the self-attentions",
            ),
            Option(
                "num_decoder_attention_heads",
                int,
                config=("model_config.decoder.num_cross_attention_heads",),
                about="number of heads of the decoder's cross-attention",
            ),
            Option(
                "num_self_attention_blocks",
                int,
                config=("model_config.encoder.num_self_attention_blocks",),
                about="number of passes through the self-attentions",
            ),
            Option(
                "num_cross_attention_layers",
                int,
                1,
                config=("model_config.encoder.num_cross_attention_layers",),
                about="number of passes that begin with a cross-attention",
            ),
        ),
        prefix="backend_model.",
    ),
)
