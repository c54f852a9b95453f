"""Gated cross-attentions of language models that look at pictures."""

from __future__ import annotations

from setattn._params import Attention, CrossAttention, FeedForward, GatedCrossAttention
from setattn._typing import Array
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._weights import Weights


def _gate(w: Weights, key: str) -> Array:
    """Return a gate of one number, or of one for each feature with two axes in front."""
    if w.axes(key) == 3:
        return w.array(key, 1, 1, "dim")
    gate = w.array(key, w.local(key))
    if w.size(w.local(key)) > 1:
        w.refuse(f"{w.local(key)} of one number")
    return gate


def _gated_mlp(w: Weights) -> FeedForward:
    """Return the gated network of Llama's form."""
    return FeedForward(
        hidden=w.linear("up_proj", ["dim"], ["hidden"], bias=False),
        output=w.linear("down_proj", ["hidden"], ["dim"], bias=False),
        gate=w.linear("gate_proj", ["dim"], ["hidden"], bias=False),
    )


def _flamingo(w: Weights, *, head_dim: int, eps: float, activation: str, immediate: bool) -> Block:
    head: list[int | str] = ["heads", head_dim]
    attn, ff = w.at("attn"), w.at("ff")
    key, value = attn.fused("to_kv", 2, ["dim_media"], head, bias=False)
    cross = CrossAttention(
        attention=Attention(
            query=attn.linear("to_q", ["dim"], head, bias=False),
            key=key,
            value=value,
            output=attn.linear("to_out", head, ["dim"], bias=False),
        ),
        ff=FeedForward(
            hidden=ff.linear("1", ["dim"], ["hidden"], bias=False),
            output=ff.linear("3", ["hidden"], ["dim"], bias=False),
        ),
        query_norm=attn.layer_norm("norm", "dim"),
        ff_norm=ff.layer_norm("0", "dim"),
    )
    params = GatedCrossAttention(cross, _gate(w, "attn_gate"), _gate(w, "ff_gate"))
    options = {"immediate": immediate, "activation": activation, "eps": eps}
    return Block("gated_cross_attention", params, options)


def _mllama(w: Weights, *, eps: float, activation: str) -> Block:
    attn = w.at("cross_attn")
    query_norm, key_norm = attn.rms_norm("q_norm", "head_dim"), attn.rms_norm("k_norm", "head_dim")
    cross = CrossAttention(
        attention=Attention(
            query=attn.linear("q_proj", ["dim"], ["heads", "head_dim"], bias=False),
            key=attn.linear("k_proj", ["dim_media"], ["kv_heads", "head_dim"], bias=False),
            value=attn.linear("v_proj", ["dim_media"], ["kv_heads", "head_dim"], bias=False),
            output=attn.linear("o_proj", ["heads", "head_dim"], ["dim"], bias=False),
            query_norm=query_norm,
            key_norm=key_norm,
        ),
        ff=_gated_mlp(w.at("mlp")),
        query_norm=w.rms_norm("input_layernorm", "dim"),
        ff_norm=w.rms_norm("post_attention_layernorm", "dim"),
    )
    params = GatedCrossAttention(cross, _gate(w, "cross_attn_attn_gate"), _gate(w, "cross_attn_mlp_gate"))
    options = {"ff_without_media": False, "activation": activation, "eps": eps}
    return Block("gated_cross_attention", params, options)


def _idefics(w: Weights, *, num_heads: int, eps: float, activation: str) -> Block:
    head: list[int | str] = [num_heads, "head_dim"]
    attn = w.at("cross_attn")
    cross = CrossAttention(
        attention=Attention(
            query=attn.linear("q_proj", ["dim"], head, bias=False),
            key=attn.linear("k_proj", ["dim_media"], head, bias=False),
            value=attn.linear("v_proj", ["dim_media"], head, bias=False),
            output=attn.linear("o_proj", head, ["dim"], bias=False),
            query_norm=attn.rms_norm("q_layer_norm", "head_dim") if attn.has("q_layer_norm") else (),
            key_norm=attn.rms_norm("k_layer_norm", "head_dim") if attn.has("k_layer_norm") else (),
        ),
        ff=_gated_mlp(w.at("mlp")),
        query_norm=w.rms_norm("input_layernorm", "dim"),
        ff_norm=w.rms_norm("post_attention_layernorm", "dim"),
    )
    attn.ignore("rotary_emb.inv_freq")  # a cross-attention turns nothing
    params = GatedCrossAttention(cross, _gate(w, "alpha_cross_attn"), _gate(w, "alpha_dense"))
    return Block("gated_cross_attention", params, {"activation": activation, "eps": eps})


_ABOUT = {
    "eps": "added to the variance in the norms",
    "activation": "activation of the feed-forward network",
}

LAYOUTS = (
    Layout(
        name="flamingo-gated",
        original="GatedCrossAttentionBlock of flamingo-pytorch and OpenFlamingo",
        functions=("gated_cross_attention",),
        anchors=("attn_gate",),
        build=_flamingo,
        options=(
            Option("head_dim", int, 64, about="width of a head of the attention"),
            Option("eps", float, 1e-5, about=_ABOUT["eps"]),
            Option("activation", str, "gelu", about=_ABOUT["activation"]),
            Option(
                "immediate",
                bool,
                True,
                config=("only_attend_immediate_media",),
                about="whether text sees only the last medium before it",
            ),
        ),
        prefix="lang_encoder.transformer.blocks.0.gated_cross_attn_layer.",
    ),
    Layout(
        name="mllama-gated",
        original="transformers MllamaCrossAttentionDecoderLayer",
        functions=("gated_cross_attention",),
        anchors=("cross_attn_attn_gate",),
        build=_mllama,
        options=(
            Option("eps", float, 1e-5, config=("text_config.rms_norm_eps", "rms_norm_eps"), about=_ABOUT["eps"]),
            Option(
                "activation",
                str,
                "silu",
                config=("text_config.hidden_act", "hidden_act"),
                about=_ABOUT["activation"],
            ),
        ),
        prefix="language_model.model.layers.3.",
    ),
    Layout(
        name="idefics-gated",
        original="transformers IdeficsGatedCrossAttentionLayer",
        functions=("gated_cross_attention",),
        anchors=("alpha_cross_attn",),
        build=_idefics,
        options=(
            Option("num_heads", int, config=("num_attention_heads",), about="number of heads of the attention"),
            Option("eps", float, 1e-6, config=("rms_norm_eps",), about=_ABOUT["eps"]),
            Option("activation", str, "silu", config=("hidden_act",), about=_ABOUT["activation"]),
        ),
        prefix="model.gated_cross_attn_layers.0.",
    ),
)
