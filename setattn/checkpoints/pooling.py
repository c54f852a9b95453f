"""Attention-pooling heads."""

from __future__ import annotations

from setattn._params import AttentionPool, FeedForward
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._torch import torch_attention
from setattn.checkpoints._weights import Weights


def _siglip(w: Weights, *, num_heads: int, eps: float, activation: str) -> Block:
    params = AttentionPool(
        probe=w.array("probe", 1, "probes", "dim"),
        attention=torch_attention(w, "attention", "dim", "dim", num_heads),
        ff=FeedForward(w.linear("mlp.fc1", ["dim"], ["hidden"]), w.linear("mlp.fc2", ["hidden"], ["dim"])),
        ff_norm=w.layer_norm("layernorm", "dim"),
    )
    return Block("attention_pool", params, {"activation": activation, "eps": eps})


LAYOUTS = (
    Layout(
        name="siglip",
        original="transformers SiglipMultiheadAttentionPoolingHead",
        functions=("attention_pool",),
        anchors=("probe",),
        build=_siglip,
        options=(
            Option(
                "num_heads",
                int,
                config=("vision_config.num_attention_heads", "num_attention_heads"),
                about="number of heads of the attention",
            ),
            Option(
                "eps",
                float,
                1e-6,
                config=("vision_config.layer_norm_eps", "layer_norm_eps"),
                about="added to the variance in the norms",
            ),
            Option(
                "activation",
                str,
                "gelu_tanh",
                config=("vision_config.hidden_act", "hidden_act"),
                about="activation of the feed-forward network",
            ),
        ),
        prefix="vision_model.head.",
    ),
)
