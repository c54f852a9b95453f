"""Attention-pooling heads: SigLIP, CoCa, MiniCPM-V, Qwen-VL, x-transformers."""

from __future__ import annotations

from typing import Any

from setattn._params import (
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    FeedForward,
    LayerNorm,
    Linear,
    Perceiver,
)
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import FLAX, REQUIRED, Layout, Option
from setattn.checkpoints._torch import torch_attention
from setattn.checkpoints._weights import Weights

# --- SigLIP ---------------------------------------------------------------------------------------------------------


def _siglip(w: Weights, *, num_heads: int, eps: float, activation: str) -> Block:
    params = AttentionPool(
        probe=w.array("probe", 1, "probes", "dim"),
        attention=torch_attention(w, "attention", "dim", "dim", num_heads),
        ff=FeedForward(w.linear("mlp.fc1", ["dim"], ["hidden"]), w.linear("mlp.fc2", ["hidden"], ["dim"])),
        ff_norm=w.layer_norm("layernorm", "dim"),
    )
    return Block("attention_pool", params, {"activation": activation, "eps": eps})


def _timm(w: Weights, *, num_heads: int, eps: float, activation: str) -> Block:
    """Make the head of timm, of which all but the keys and values may be absent."""
    head: list[int | str] = [num_heads, "head_dim"]
    projected, whole, biased = w.has("q"), w.has("proj") or w.has("mlp"), w.has("q.bias") or w.has("kv.bias")
    key, value = w.fused("kv", 2, ["dim"], head, biased)
    probe = w.array("latent", 1, "probes", "query_dim" if projected else "dim")
    attention = Attention(
        query=w.linear("q", ["query_dim"], head, biased) if projected else (),
        key=key,
        value=value,
        output=w.linear("proj", head, ["dim_out"]) if whole else (),
        query_norm=_norm(w, "q_norm", "head_dim"),
        key_norm=_norm(w, "k_norm", "head_dim"),
    )
    params = AttentionPool(
        probe=probe,
        attention=attention,
        ff=_feed_forward(w.at("mlp"), "fc1", "fc2", "dim_out") if whole else (),
        ff_norm=_norm(w, "norm", "dim_out"),
        position=w.array("pos_embed", "places", "dim") if w.has("pos_embed") else (),
    )
    return Block("attention_pool", params, {"activation": activation, "eps": eps})


def _big_vision(w: Weights, *, eps: float) -> Block:
    a, heads = w.at("MultiHeadDotProductAttention_0"), ["heads", "head_dim"]
    probe = w.array("probe", 1, "probes", "dim")
    query, key, value = (a.linear(name, ["dim"], heads) for name in ("query", "key", "value"))
    params = AttentionPool(
        probe=probe,
        attention=Attention(query, key, value, a.linear("out", heads, ["dim"])),
        ff=_feed_forward(w.at("MlpBlock_0"), "Dense_0", "Dense_1", "dim"),
        ff_norm=w.layer_norm("LayerNorm_0", "dim"),
    )
    return Block("attention_pool", params, {"activation": "gelu_tanh", "eps": eps})


# --- CoCa, MiniCPM-V, Qwen-VL ---------------------------------------------------------------------------------------


def _open_clip(w: Weights, *, num_heads: int, eps: float) -> Block:
    params = AttentionPool(
        probe=w.array("query", "probes", "dim"),
        query_norm=w.layer_norm("ln_q", "dim"),
        context_norm=w.layer_norm("ln_k", "context_dim"),
        attention=torch_attention(w, "attn", "dim", "context_dim", num_heads),
    )
    return Block("attention_pool", params, {"eps": eps})


def _resampler(w: Weights, num_heads: int | None) -> AttentionPool:
    """Make what MiniCPM-V and Qwen-VL have in common; their heads are 128 wide."""
    probe = w.array("query", "probes", "dim")
    width = w.size("dim")
    if num_heads is None and width % 128:
        w.refuse(f"num_heads= to be given, as the width of query, {width}, is no multiple of 128")
    return AttentionPool(
        probe=probe,
        attention=torch_attention(w, "attn", "dim", "dim", num_heads or max(width // 128, 1)),
        query_norm=w.layer_norm("ln_q", "dim"),
        context_norm=w.layer_norm("ln_kv", "dim"),
        input=w.linear("kv_proj", ["context_dim"], ["dim"], bias=False) if w.has("kv_proj") else (),
    )


def _minicpm_v(w: Weights, *, num_heads: int | None, eps: float) -> Block:
    params = _resampler(w, num_heads)._replace(
        output_norm=w.layer_norm("ln_post", "dim"),
        output=Linear(w.array("proj", "dim", "dim")),
        # Version 2.0 adds the table of its probes' places; later ones have none, or one that is not stored.
        probe_position=w.array("pos_embed", "probes", "dim") if w.has("pos_embed") else (),
    )
    return Block("attention_pool", params, {"eps": eps})


def _qwen_vl(w: Weights, *, num_heads: int | None, eps: float) -> Block:
    params = _resampler(w, num_heads)._replace(probe_position=w.array("pos_embed", "probes", "dim"))
    return Block("attention_pool", params, {"eps": eps})


# --- x-transformers -------------------------------------------------------------------------------------------------


def _x_transformers(w: Weights, *, head_dim: int, add_residual: bool) -> Block:
    """Make one attention, or with transformer blocks a Perceiver without latent transformers."""
    probe, pooler = w.array("queries", "probes", "dim"), w.at("pooler")
    if not w.has("pooler.layers"):
        attention = _bare_attention(pooler, head_dim)
        if add_residual:
            return Block("pma", PMA(probe, MAB(attention)))
        return Block("attention_pool", AttentionPool(probe, attention))
    if add_residual:
        w.refuse("add_residual=False, as transformer blocks have residuals of their own")
    blocks = []
    for i in range(0, pooler.count("layers"), 2):
        cross, ff = pooler.at(f"layers.{i}"), pooler.at(f"layers.{i + 1}")
        block = CrossAttention(
            query_norm=_offset_norm(cross, "0.0.gamma"),
            attention=_bare_attention(cross.at("1"), head_dim),
            ff_norm=_offset_norm(ff, "0.0.gamma"),
            ff=_feed_forward(ff.at("1.ff"), "0.0", "2", "dim"),
        )
        blocks.append(block)
    params = Perceiver(probe, tuple(blocks), (), output_norm=_offset_norm(pooler, "final_norm.gamma"))
    return Block("perceiver", params, {"activation": "gelu", "eps": 1e-5})


def _offset_norm(w: Weights, key: str) -> LayerNorm:
    """Make a norm whose scale is stored less 1."""
    scale = w.array(key, "dim")
    return LayerNorm(scale if isinstance(scale, tuple) else scale + 1.0)


def _bare_attention(w: Weights, head_dim: int) -> Attention:
    """Make an attention without biases, whose heads may share keys and values."""
    return Attention(
        query=w.linear("to_q", ["dim"], ["heads", head_dim], bias=False),
        key=w.linear("to_k", ["context_dim"], ["kv_heads", head_dim], bias=False),
        value=w.linear("to_v", ["context_dim"], ["kv_heads", "value_dim"], bias=False),
        output=w.linear("to_out", ["heads", "value_dim"], ["dim"], bias=False),
    )


# --- parts ----------------------------------------------------------------------------------------------------------


def _feed_forward(w: Weights, hidden: str, output: str, dim: str) -> FeedForward:
    return FeedForward(w.linear(hidden, [dim], ["hidden"]), w.linear(output, ["hidden"], [dim]))


def _norm(w: Weights, key: str, dim: str) -> LayerNorm | Absent:
    return w.layer_norm(key, dim) if w.has(key) else ()


def _heads(*config: str, default: Any = REQUIRED, about: str = "number of heads of the attention") -> Option:
    return Option("num_heads", int, default, config, about)


def _eps(default: float, *config: str) -> Option:
    return Option("eps", float, default, config, "added to the variance in the norms")


def _activation(default: str, *config: str) -> Option:
    return Option("activation", str, default, config, "activation of the feed-forward network")


_TIMM_HEADS = "number of heads of the attention, the argument num_heads of the original"
_WIDE_HEADS = "number of heads of the attention, the width divided by 128 if not given"

LAYOUTS = (
    Layout(
        name="siglip",
        original="transformers SiglipMultiheadAttentionPoolingHead",
        functions=("attention_pool",),
        anchors=("probe",),
        build=_siglip,
        options=(
            _heads("vision_config.num_attention_heads", "num_attention_heads"),
            _eps(1e-6, "vision_config.layer_norm_eps", "layer_norm_eps"),
            _activation("gelu_tanh", "vision_config.hidden_act", "hidden_act"),
        ),
        prefix="vision_model.head.",
    ),
    Layout(
        name="siglip-timm",
        original="timm AttentionPoolLatent",
        functions=("attention_pool",),
        anchors=("latent",),
        build=_timm,
        options=(_heads(about=_TIMM_HEADS), _eps(1e-6), _activation("gelu")),
        prefix="attn_pool.",
    ),
    Layout(
        name="siglip-big-vision",
        original="big_vision MAPHead",
        functions=("attention_pool",),
        anchors=("probe",),
        build=_big_vision,
        options=(_eps(1e-6),),
        prefix="params/img/MAPHead_0/",
        convention=FLAX,
    ),
    Layout(
        name="open-clip-pooler",
        original="open_clip AttentionalPooler",
        functions=("attention_pool",),
        anchors=("query",),
        build=_open_clip,
        options=(
            _heads("model_cfg.vision_cfg.attn_pooler_heads", "vision_cfg.attn_pooler_heads", default=8),
            _eps(1e-5),
        ),
        prefix="visual.attn_pool.",
    ),
    Layout(
        name="minicpm-v",
        original="MiniCPM-V Resampler",
        functions=("attention_pool",),
        anchors=("query",),
        build=_minicpm_v,
        options=(_heads(default=None, about=_WIDE_HEADS), _eps(1e-6)),
        prefix="resampler.",
    ),
    Layout(
        name="qwen-vl",
        original="Qwen-VL Resampler",
        functions=("attention_pool",),
        anchors=("query",),
        build=_qwen_vl,
        options=(_heads(default=None, about=_WIDE_HEADS), _eps(1e-6)),
        prefix="transformer.visual.attn_pool.",
    ),
    Layout(
        name="attention-pool-x-transformers",
        original="x_transformers AttentionPool",
        functions=("attention_pool", "pma", "perceiver"),
        anchors=("queries",),
        build=_x_transformers,
        options=(
            Option("head_dim", int, 64, about="width of a head of the attention"),
            Option("add_residual", bool, False, about="whether the probes are added to what they pool"),
        ),
    ),
)
