"""Perceiver and Perceiver IO of lucidrains' perceiver-pytorch, whose names of tensors changed with version 0.11."""

from __future__ import annotations

from setattn._params import (
    Attention,
    CrossAttention,
    FeedForward,
    LayerNorm,
    MeanHead,
    Perceiver,
    PerceiverIO,
    SelfAttention,
)
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._weights import Weights

_EPS = 1e-5  # of every norm; the package has no argument for it


def _attention(w: Weights, dim: str, context: str, heads: int, head_dim: str) -> Attention:
    query = w.linear("to_q", [dim], [heads, head_dim], bias=False)
    key, value = w.fused("to_kv", 2, [context], [heads, head_dim], bias=False)
    return Attention(query, key, value, w.linear("to_out", [heads, head_dim], [dim]))


def _feed_forward(w: Weights, dim: str, hidden: str) -> tuple[FeedForward, LayerNorm]:
    """Return a GEGLU network, whose gate is the second half of the first layer, and the norm before it."""
    inner, gate = w.fused("fn.net.0", 2, [dim], [hidden])
    return FeedForward(inner, w.linear("fn.net.2", [hidden], [dim]), gate), w.layer_norm("norm", dim)


def _cross_attention(w: Weights, names: tuple[str, str], dim: str, context: str, heads: int) -> CrossAttention:
    a = w.at(names[0])
    ff: FeedForward | Absent = ()
    ff_norm: LayerNorm | Absent = ()
    if names[1] != "decoder_ff" or w.has(names[1]):
        ff, ff_norm = _feed_forward(w.at(names[1]), dim, f"{dim}_hidden")
    return CrossAttention(
        attention=_attention(a.at("fn"), dim, context, heads, "cross_head_dim"),
        ff=ff,
        query_norm=a.layer_norm("norm", dim),
        context_norm=a.layer_norm("norm_context", context),
        ff_norm=ff_norm,
    )


def _self_attention(w: Weights, heads: int) -> SelfAttention:
    a = w.at("0")
    attention = _attention(a.at("fn"), "dim", "dim", heads, "latent_head_dim")
    ff, ff_norm = _feed_forward(w.at("1"), "dim", "dim_hidden")
    return SelfAttention(attention, ff, a.layer_norm("norm", "dim"), ff_norm)


def _layers(w: Weights, depth: int | None) -> list[Weights]:
    """Return the layers that are there; of tied ones a file may hold the first alone."""
    count = w.count("layers")
    if depth is not None and depth < count:
        w.refuse(f"at most depth={depth} layers, not {count}")
    residuals = ["attn_residuals", *[f"layers.{i}.{j}.to_attn_logits" for i in range(count) for j in (2, 3)]]
    if any(map(w.has, residuals)):
        w.ignore(*residuals)
        w.refuse("no attention over the outputs of earlier layers (attn_residual=True), which no function here has")
    return [w.at(f"layers.{i}") for i in range(count)]


def _perceiver(w: Weights, *, cross_heads: int, latent_heads: int, depth: int | None) -> Block:
    cross, latent = [], []
    latents = w.array("latents", "latents", "dim")
    for layer in _layers(w, depth) or [w.at("layers.0")]:
        a, ff, selves = ("cross_attn", "cross_ff", "self_attns") if layer.has("cross_attn") else ("0", "1", "2")
        cross.append(_cross_attention(layer, (a, ff), "dim", "inputs", cross_heads))
        each = [layer.at(f"{selves}.{j}") for j in range(layer.count(selves))]
        latent.append(tuple(_self_attention(part, latent_heads) for part in each))
    head: MeanHead | Absent = ()
    if w.has("to_logits"):
        head = MeanHead(w.linear("to_logits.2", ["dim"], ["classes"]), w.layer_norm("to_logits.1", "dim"))
    params = Perceiver(latents, tuple(cross), tuple(latent), head=head)
    options = {"activation": "gelu", "eps": _EPS}
    return Block("perceiver", params, options if depth is None else {**options, "depth": depth})


def _perceiver_io(w: Weights, *, cross_heads: int, latent_heads: int, depth: int | None) -> Block:
    latents = w.array("latents", "latents", "dim")
    first, names = (w, ("cross_attend_blocks.0", "cross_attend_blocks.1"))
    if w.has("cross_attend_block"):
        first, names = w.at("cross_attend_block"), ("cross_attn", "cross_ff")
    cross = _cross_attention(first, names, "dim", "inputs", cross_heads)
    layers = [layer.at("self_attns.0") if layer.has("self_attns") else layer for layer in _layers(w, depth)]
    latent = tuple((_self_attention(layer, latent_heads),) for layer in layers)
    decoder = _cross_attention(w, ("decoder_cross_attn", "decoder_ff"), "queries", "dim", cross_heads)
    output = w.linear("to_logits", ["queries"], ["logits"]) if w.has("to_logits") else ()
    steps = depth or max(len(latent), 1)
    encoder = Perceiver(latents, (cross, ()) if steps > 1 else (cross,), latent)
    params = PerceiverIO(encoder, decoder, output)
    options = {"depth": steps, "decoder_residual": False, "activation": "gelu", "eps": _EPS}
    return Block("perceiver_io", params, options)


_OPTIONS = (
    Option(
        "cross_heads",
        int,
        about="number of heads of the cross-attentions, the argument cross_heads of the original, 1 by default",
    ),
    Option(
        "latent_heads",
        int,
        about="number of heads of the self-attentions, the argument latent_heads of the original, 8 by default",
    ),
    Option("depth", int, None, about="number of layers, where tied ones are in the file but once"),
)

LAYOUTS = (
    Layout(
        name="perceiver-lucidrains",
        original="perceiver-pytorch Perceiver",
        functions=("perceiver",),
        anchors=("latents",),
        build=_perceiver,
        options=_OPTIONS,
    ),
    Layout(
        name="perceiver-io-lucidrains",
        original="perceiver-pytorch PerceiverIO",
        functions=("perceiver_io",),
        anchors=("latents",),
        build=_perceiver_io,
        options=_OPTIONS,
    ),
)
