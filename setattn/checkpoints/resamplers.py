"""Perceiver resamplers: Flamingo's, IP-Adapter's, and those of Idefics, Idefics2 and Evolla."""

from __future__ import annotations

from collections.abc import Callable

from setattn._params import Attention, CrossAttention, FeedForward, MeanLatents, Resampler
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._weights import Weights

_GELU = {"activation": "gelu", "eps": 1e-5}  # of code that has no argument for them


def _layers(w: Weights, key: str, layer: Callable[[Weights], CrossAttention]) -> tuple[CrossAttention, ...]:
    return tuple(layer(w.at(f"{key}.{i}")) for i in range(max(w.count(key), 1)))


def _fused_attention(w: Weights, head_dim: int) -> Attention:
    """Return an attention without biases whose keys and values are of one layer."""
    head: list[int | str] = ["heads", head_dim]
    query = w.linear("to_q", ["dim"], head, bias=False)
    key, value = w.fused("to_kv", 2, ["dim"], head, bias=False)
    return Attention(query, key, value, w.linear("to_out", head, ["dim"], bias=False))


def _attention(w: Weights, layers: tuple[str, str, str, str], head_dim: int, kv_heads: str = "heads") -> Attention:
    """Return an attention of four layers without biases."""
    query, key, value, output = layers
    head: list[int | str] = ["heads", head_dim]
    return Attention(
        query=w.linear(query, ["dim"], head, bias=False),
        key=w.linear(key, ["dim"], [kv_heads, head_dim], bias=False),
        value=w.linear(value, ["dim"], [kv_heads, head_dim], bias=False),
        output=w.linear(output, head, ["dim"], bias=False),
    )


def _network(w: Weights, hidden: str, output: str) -> FeedForward:
    """Return a network of two layers without biases."""
    width = w.local("hidden")
    return FeedForward(w.linear(hidden, ["dim"], [width], bias=False), w.linear(output, [width], ["dim"], bias=False))


def _gated_network(w: Weights, dim: str) -> FeedForward:
    """Return a gated network as Llama has it."""
    width = w.local("hidden")
    return FeedForward(
        hidden=w.linear("up_proj", [dim], [width], bias=False),
        output=w.linear("down_proj", [width], ["dim"], bias=False),
        gate=w.linear("gate_proj", [dim], [width], bias=False),
    )


# --- Flamingo, Evolla -----------------------------------------------------------------------------------------------


def _flamingo_layer(w: Weights, head_dim: int, network: tuple[str, str, str] = ("1.0", "1.1", "1.3")) -> CrossAttention:
    return CrossAttention(
        attention=_fused_attention(w.at("0"), head_dim),
        ff=_network(w, *network[1:]),
        query_norm=w.layer_norm("0.norm_latents", "dim"),
        context_norm=w.layer_norm("0.norm_media", "dim"),
        ff_norm=w.layer_norm(network[0], "dim"),
    )


def _flamingo(w: Weights, *, head_dim: int) -> Block:
    params = Resampler(
        latents=w.array("latents", "latents", "dim"),
        layers=_layers(w, "layers", lambda layer: _flamingo_layer(layer, head_dim)),
        media_embedding=w.array("media_pos_emb", "media", 1, "dim"),
        output_norm=w.layer_norm("norm", "dim"),
    )
    return Block("perceiver_resampler", params, _GELU)


def _open_flamingo(w: Weights, *, head_dim: int) -> Block:
    params = Resampler(
        latents=w.array("latents", "latents", "dim"),
        layers=_layers(w, "layers", lambda layer: _flamingo_layer(layer, head_dim)),
        frame_embedding=w.array("frame_embs", "frames", "dim") if w.has("frame_embs") else (),
        media_embedding=w.array("media_time_embs", "media", 1, "dim") if w.has("media_time_embs") else (),
        output_norm=w.layer_norm("norm", "dim"),
    )
    return Block("perceiver_resampler", params, _GELU)


def _evolla(w: Weights, *, head_dim: int) -> Block:
    network = ("1.norm", "1.fc1", "1.fc2")
    params = Resampler(
        latents=w.array("latents", "latents", "dim"),
        layers=_layers(w, "layers", lambda layer: _flamingo_layer(layer, head_dim, network)),
        output=w.linear("protein_projector", ["dim"], ["output"]),
        output_norm=w.layer_norm("norm", "output"),
    )
    return Block("perceiver_resampler", params, _GELU)


# --- IP-Adapter -----------------------------------------------------------------------------------------------------

_FACE_ID = (
    "learned latents, as those of a FaceID Plus adapter come from the embedding of a face, by a network of its own"
)


def _ip_adapter_layer(w: Weights, head_dim: int) -> CrossAttention:
    return CrossAttention(
        attention=_fused_attention(w.at("0"), head_dim),
        ff=_network(w, "1.1", "1.3"),
        query_norm=w.layer_norm("0.norm2", "dim"),
        context_norm=w.layer_norm("0.norm1", "dim"),
        ff_norm=w.layer_norm("1.0", "dim"),
    )


def _ip_adapter_diffusers_layer(w: Weights, head_dim: int) -> CrossAttention:
    return CrossAttention(
        attention=_attention(w.at("attn"), ("to_q", "to_k", "to_v", "to_out.0"), head_dim),
        ff=_network(w, "ff.1.net.0.proj", "ff.1.net.2"),
        query_norm=w.layer_norm("ln1", "dim"),
        context_norm=w.layer_norm("ln0", "dim"),
        ff_norm=w.layer_norm("ff.0", "dim"),
    )


def _ip_adapter_plus(w: Weights, layer: Callable[[Weights], CrossAttention]) -> Resampler:
    return Resampler(
        latents=w.array("latents", 1, "latents", "dim"),
        layers=_layers(w, "layers", layer),
        input=w.linear("proj_in", ["embedding"], ["dim"]),
        output=w.linear("proj_out", ["dim"], ["output"]),
        output_norm=w.layer_norm("norm_out", "output"),
    )


def _ip_adapter(w: Weights, *, head_dim: int) -> Block:
    if w.has("perceiver_resampler.proj_in"):
        w.ignore("perceiver_resampler", "proj", "norm")
        w.refuse(_FACE_ID)
        return Block("perceiver_resampler", ())
    params = _ip_adapter_plus(w, lambda layer: _ip_adapter_layer(layer, head_dim))
    if w.has("pos_emb"):
        params = params._replace(position=w.array("pos_emb.weight", "positions", "embedding"))
    if w.has("to_latents_from_mean_pooled_seq"):
        pooled = w.at("to_latents_from_mean_pooled_seq")
        norm = pooled.layer_norm("0", "dim")
        made = MeanLatents(pooled.linear("1", ["dim"], ["mean latents", "dim"]), norm)
        params = params._replace(mean_latents=made)
    return Block("perceiver_resampler", params, _GELU)


def _ip_adapter_diffusers(w: Weights, *, head_dim: int) -> Block:
    if w.has("proj.net") and w.has("layers.0.attn.to_k") and not w.has("latents"):
        w.ignore("proj", "norm", "proj_in", "proj_out", "norm_out", "layers")
        w.refuse(_FACE_ID)
        return Block("perceiver_resampler", ())
    params = _ip_adapter_plus(w, lambda layer: _ip_adapter_diffusers_layer(layer, head_dim))
    return Block("perceiver_resampler", params, _GELU)


# --- Idefics --------------------------------------------------------------------------------------------------------


def _idefics_layer(w: Weights, head_dim: int) -> CrossAttention:
    a = w.at("0")
    attention = _attention(a, ("q_proj", "k_proj", "v_proj", "output_proj"), head_dim)
    if a.has("q_layer_norm") or a.has("k_layer_norm"):
        query_norm, key_norm = (a.layer_norm(f"{name}_layer_norm", head_dim) for name in "qk")
        attention = attention._replace(query_norm=query_norm, key_norm=key_norm)
    return CrossAttention(
        attention=attention,
        ff=_network(w, "1.fc", "1.c_proj"),
        query_norm=a.layer_norm("latents_layer_norm", "dim"),
        context_norm=a.layer_norm("context_layer_norm", "dim"),
        ff_norm=w.layer_norm("1.ln", "dim"),
    )


def _idefics(w: Weights, *, head_dim: int) -> Block:
    params = Resampler(
        latents=w.array("latents", "latents", "dim"),
        layers=_layers(w, "blocks", lambda layer: _idefics_layer(layer, head_dim)),
        output_norm=w.layer_norm("layer_norm", "dim"),
    )
    return Block("perceiver_resampler", params, {"activation": "relu", "eps": 1e-5})


def _idefics2_layer(w: Weights, head_dim: int) -> CrossAttention:
    return CrossAttention(
        attention=_attention(w.at("self_attn"), ("q_proj", "k_proj", "v_proj", "o_proj"), head_dim, "key heads"),
        ff=_gated_network(w.at("mlp"), "dim"),
        query_norm=w.rms_norm("input_latents_norm", "dim"),
        context_norm=w.rms_norm("input_context_norm", "dim"),
        ff_norm=w.rms_norm("post_attention_layernorm", "dim"),
    )


def _idefics2(w: Weights, *, head_dim: int, eps: float, activation: str) -> Block:
    network: FeedForward | Absent = ()
    if w.has("modality_projection") or w.has("perceiver_resampler"):
        network = _gated_network(w.at("modality_projection"), "vision dim")
        w = w.at("perceiver_resampler")
    params = Resampler(
        latents=w.array("latents", "latents", "dim"),
        layers=_layers(w, "layers", lambda layer: _idefics2_layer(layer, head_dim)),
        input=network,
        output_norm=w.rms_norm("norm", "dim"),
    )
    return Block("perceiver_resampler", params, {"activation": activation, "eps": eps})


def _head_dim(default: int, *config: str) -> Option:
    return Option("head_dim", int, default, config=config, about="width of a head of the attention")


LAYOUTS = (
    Layout(
        name="flamingo",
        original="flamingo-pytorch PerceiverResampler",
        functions=("perceiver_resampler",),
        anchors=("latents",),
        build=_flamingo,
        options=(_head_dim(64),),
    ),
    Layout(
        name="open-flamingo",
        original="open_flamingo PerceiverResampler",
        functions=("perceiver_resampler",),
        anchors=("latents",),
        build=_open_flamingo,
        options=(_head_dim(64),),
        prefix="perceiver.",
    ),
    Layout(
        name="evolla",
        original="transformers EvollaSequenceCompressorResampler",
        functions=("perceiver_resampler",),
        anchors=("latents",),
        build=_evolla,
        options=(_head_dim(64, "resampler_dim_head"),),
        prefix="model.protein_encoder.sequence_compressor_resampler.",
    ),
    Layout(
        name="ip-adapter",
        original="ip_adapter Resampler (IP-Adapter Plus)",
        functions=("perceiver_resampler",),
        anchors=("latents", "perceiver_resampler.proj_in.weight"),
        build=_ip_adapter,
        options=(_head_dim(64),),
        prefix="image_proj.",
    ),
    Layout(
        name="ip-adapter-diffusers",
        original="diffusers IPAdapterPlusImageProjection",
        functions=("perceiver_resampler",),
        anchors=("latents",),
        build=_ip_adapter_diffusers,
        options=(_head_dim(64),),
    ),
    Layout(
        name="idefics",
        original="transformers IdeficsPerceiverResampler",
        functions=("perceiver_resampler",),
        anchors=("latents",),
        build=_idefics,
        options=(_head_dim(96, "perceiver_config.resampler_head_dim", "resampler_head_dim"),),
        prefix="model.perceiver_resampler.",
    ),
    Layout(
        name="idefics2",
        original="transformers Idefics2Connector, or its Idefics2PerceiverResampler alone",
        functions=("perceiver_resampler",),
        anchors=("latents", "perceiver_resampler.latents"),
        build=_idefics2,
        options=(
            _head_dim(96, "perceiver_config.resampler_head_dim", "resampler_head_dim"),
            Option(
                "eps",
                float,
                1e-6,
                config=("perceiver_config.rms_norm_eps", "rms_norm_eps"),
                about="added to the mean square in the norms",
            ),
            Option(
                "activation",
                str,
                "silu",
                config=("perceiver_config.hidden_act", "hidden_act"),
                about="activation of all networks",
            ),
        ),
        prefix="model.connector.",
    ),
)
