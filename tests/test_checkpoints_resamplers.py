"""Weights of resamplers, from tensors made here by the published names.

The formulas are written anew from the equations, for NumPy in float64, and read the tensors by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

DIM, HEADS, HEAD_DIM, HIDDEN, LATENTS, DEPTH, EMBEDDING, OUTPUT, N = 12, 3, 5, 9, 4, 2, 7, 10, 6
INNER = HEADS * HEAD_DIM


def under(prefix: str, shapes: dict[str, Any]) -> dict[str, Any]:
    """Put a prefix before every name."""
    return {prefix + name: value for name, value in shapes.items()}


def norms(width: int, *keys: str) -> Shapes:
    """Names and shapes of layer norms."""
    return {f"{key}.{name}": (width,) for key in keys for name in ("weight", "bias")}


def drawn(shapes: Shapes, seed: int = 0) -> Tensors:
    """Draw tensors, with no scale near 1 and no bias near 0."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape) / (math.sqrt(shape[-1]) if len(shape) > 1 else 1) for name, shape in shapes.items()
    }


# --- formulas -------------------------------------------------------------------------------------------------------


def apply(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    """Apply a layer of ``torch.nn.Linear``'s names."""
    return np.einsum("...i,oi->...o", x, w[f"{key}.weight"]) + w.get(f"{key}.bias", 0.0)


def normed(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    """Normalise, as a layer norm where there is a bias."""
    centred = x - (x.mean(axis=-1, keepdims=True) if f"{key}.bias" in w else 0.0)
    eps = 1e-5 if f"{key}.bias" in w else 1e-6
    root = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return centred / root * w[f"{key}.weight"] + w.get(f"{key}.bias", 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gated(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    """Apply Llama's network."""
    return apply(w, f"{key}.down_proj", silu(apply(w, f"{key}.gate_proj", x)) * apply(w, f"{key}.up_proj", x))


class Layer(NamedTuple):
    """How the parts of a layer are called behind its number."""

    media: str
    latents: str
    query: str
    keys: tuple[str, ...]  # one name for both halves, or two
    output: str
    head_norms: tuple[str, ...]
    ff_norm: str
    ff: Callable[[Tensors, str, np.ndarray], np.ndarray]


def two(hidden: str, output: str, activation: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A network of two layers."""
    return lambda w, key, x: apply(w, f"{key}.{output}", activation(apply(w, f"{key}.{hidden}", x)))


def cut(x: np.ndarray, normalise: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> list[np.ndarray]:
    return [normalise(x[..., i : i + HEAD_DIM]) for i in range(0, x.shape[-1], HEAD_DIM)]


def resample(w: Tensors, key: str, names: Layer, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One layer, of one set."""
    queries, both = normed(w, f"{key}.{names.latents}", z), normed(w, f"{key}.{names.media}", x)
    both = np.concatenate([both, queries])
    if len(names.keys) == 1:
        k, v = np.split(apply(w, f"{key}.{names.keys[0]}", both), 2, axis=-1)
    else:
        k, v = (apply(w, f"{key}.{name}", both) for name in names.keys)
    normalise = [lambda x, n=n: normed(w, f"{key}.{n}", x) for n in names.head_norms] or [lambda x: x] * 2
    q, k = cut(apply(w, f"{key}.{names.query}", queries), normalise[0]), cut(k, normalise[1])
    parts = []
    for h, query in enumerate(q):
        g = h * len(k) // len(q)
        e = np.exp(np.einsum("id,jd->ij", query, k[g]) / math.sqrt(HEAD_DIM))
        parts.append(e / e.sum(axis=-1, keepdims=True) @ cut(v)[g])
    z = z + apply(w, f"{key}.{names.output}", np.concatenate(parts, axis=-1))
    return z + names.ff(w, key, normed(w, f"{key}.{names.ff_norm}", z))


FLAMINGO = Layer(
    "0.norm_media", "0.norm_latents", "0.to_q", ("0.to_kv",), "0.to_out", (), "1.0", two("1.1", "1.3", gelu)
)
EVOLLA = FLAMINGO._replace(ff_norm="1.norm", ff=two("1.fc1", "1.fc2", gelu))
IP_ADAPTER = FLAMINGO._replace(media="0.norm1", latents="0.norm2")
DIFFUSERS = Layer(
    "ln0",
    "ln1",
    "attn.to_q",
    ("attn.to_k", "attn.to_v"),
    "attn.to_out.0",
    (),
    "ff.0",
    two("ff.1.net.0.proj", "ff.1.net.2", gelu),
)
IDEFICS = Layer(
    "0.context_layer_norm",
    "0.latents_layer_norm",
    "0.q_proj",
    ("0.k_proj", "0.v_proj"),
    "0.output_proj",
    (),
    "1.ln",
    two("1.fc", "1.c_proj", relu),
)
IDEFICS_NORMS = IDEFICS._replace(head_norms=("0.q_layer_norm", "0.k_layer_norm"))
IDEFICS2 = Layer(
    "input_context_norm",
    "input_latents_norm",
    "self_attn.q_proj",
    ("self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    (),
    "post_attention_layernorm",
    lambda w, key, x: gated(w, f"{key}.mlp", x),
)


def stack(
    w: Tensors, names: Layer, x: np.ndarray, key: str = "layers", more: list[np.ndarray] | None = None
) -> np.ndarray:
    z = np.concatenate([*(more or []), w["latents"].reshape(LATENTS, DIM)])
    for i in range(DEPTH):
        z = resample(w, f"{key}.{i}", names, z, x)
    return z


def flamingo(w: Tensors, x: np.ndarray) -> np.ndarray:
    """Features (media, n, dim)."""
    pairs = zip(x, w["media_pos_emb"][:, 0], strict=False)
    return np.stack([normed(w, "norm", stack(w, FLAMINGO, medium + row)) for medium, row in pairs])


def open_flamingo(w: Tensors, x: np.ndarray) -> np.ndarray:
    return normed(w, "norm", stack(w, FLAMINGO, x))


def open_flamingo_of_videos(w: Tensors, x: np.ndarray) -> np.ndarray:
    """Features (media, frames, n, dim)."""
    x = x + w["frame_embs"][: x.shape[1], None] + w["media_time_embs"][: x.shape[0], :, None]
    return np.stack([open_flamingo(w, medium.reshape(-1, DIM)) for medium in x])


def evolla(w: Tensors, x: np.ndarray) -> np.ndarray:
    return normed(w, "norm", apply(w, "protein_projector", stack(w, EVOLLA, x)))


def ip_adapter(w: Tensors, x: np.ndarray, names: Layer = IP_ADAPTER) -> np.ndarray:
    if "pos_emb.weight" in w:
        x = x + w["pos_emb.weight"][: len(x)]
    x, more = apply(w, "proj_in", x), []
    if "to_latents_from_mean_pooled_seq.0.weight" in w:
        made = apply(w, "to_latents_from_mean_pooled_seq.1", normed(w, "to_latents_from_mean_pooled_seq.0", x.mean(0)))
        more = [made.reshape(-1, DIM)]
    return normed(w, "norm_out", apply(w, "proj_out", stack(w, names, x, more=more)))


def idefics2(w: Tensors, x: np.ndarray) -> np.ndarray:
    inner = w
    if "modality_projection.up_proj.weight" in w:
        x = gated(w, "modality_projection", x)
        start = "perceiver_resampler."
        inner = {name.removeprefix(start): a for name, a in w.items() if name.startswith(start)}
    return normed(inner, "norm", stack(inner, IDEFICS2, x))


# --- tensors --------------------------------------------------------------------------------------------------------


def layers(shapes: Shapes, key: str = "layers") -> Shapes:
    return {f"{key}.{i}.{name}": shape for i in range(DEPTH) for name, shape in shapes.items()}


FUSED: Shapes = {"0.to_q.weight": (INNER, DIM), "0.to_kv.weight": (2 * INNER, DIM), "0.to_out.weight": (DIM, INNER)}
FLAMINGO_SHAPES: Shapes = {
    "latents": (LATENTS, DIM),
    **layers(
        {
            **norms(DIM, "0.norm_media", "0.norm_latents", "1.0"),
            **FUSED,
            "1.1.weight": (HIDDEN, DIM),
            "1.3.weight": (DIM, HIDDEN),
        }
    ),
    **norms(DIM, "norm"),
}
EVOLLA_SHAPES: Shapes = {
    "latents": (LATENTS, DIM),
    **layers(
        {
            **norms(DIM, "0.norm_media", "0.norm_latents", "1.norm"),
            **FUSED,
            "1.fc1.weight": (HIDDEN, DIM),
            "1.fc2.weight": (DIM, HIDDEN),
        }
    ),
    **norms(OUTPUT, "norm"),
    "protein_projector.weight": (OUTPUT, DIM),
    "protein_projector.bias": (OUTPUT,),
}
PROJECTIONS: Shapes = {
    "latents": (1, LATENTS, DIM),
    "proj_in.weight": (DIM, EMBEDDING),
    "proj_in.bias": (DIM,),
    "proj_out.weight": (OUTPUT, DIM),
    "proj_out.bias": (OUTPUT,),
    **norms(OUTPUT, "norm_out"),
}
IP_ADAPTER_SHAPES: Shapes = {
    **PROJECTIONS,
    **layers(
        {
            **norms(DIM, "0.norm1", "0.norm2", "1.0"),
            **FUSED,
            "1.1.weight": (HIDDEN, DIM),
            "1.3.weight": (DIM, HIDDEN),
        }
    ),
}
MEAN_SHAPES: Shapes = {
    **norms(DIM, "to_latents_from_mean_pooled_seq.0"),
    "to_latents_from_mean_pooled_seq.1.weight": (2 * DIM, DIM),
    "to_latents_from_mean_pooled_seq.1.bias": (2 * DIM,),
}
DIFFUSERS_SHAPES: Shapes = {
    **PROJECTIONS,
    **layers(
        {
            **norms(DIM, "ln0", "ln1", "ff.0"),
            **{f"attn.to_{name}.weight": (INNER, DIM) for name in "qkv"},
            "attn.to_out.0.weight": (DIM, INNER),
            "ff.1.net.0.proj.weight": (HIDDEN, DIM),
            "ff.1.net.2.weight": (DIM, HIDDEN),
        }
    ),
}
IDEFICS_SHAPES: Shapes = {
    "latents": (LATENTS, DIM),
    **layers(
        {
            **norms(DIM, "0.context_layer_norm", "0.latents_layer_norm", "1.ln"),
            **{f"0.{name}_proj.weight": (INNER, DIM) for name in "qkv"},
            "0.output_proj.weight": (DIM, INNER),
            "1.fc.weight": (HIDDEN, DIM),
            "1.c_proj.weight": (DIM, HIDDEN),
        },
        "blocks",
    ),
    **norms(DIM, "layer_norm"),
}
IDEFICS2_SHAPES: Shapes = {
    "latents": (LATENTS, DIM),
    **layers(
        {
            "input_latents_norm.weight": (DIM,),
            "input_context_norm.weight": (DIM,),
            "self_attn.q_proj.weight": (INNER, DIM),
            "self_attn.k_proj.weight": (HEAD_DIM, DIM),
            "self_attn.v_proj.weight": (HEAD_DIM, DIM),
            "self_attn.o_proj.weight": (DIM, INNER),
            "post_attention_layernorm.weight": (DIM,),
            "mlp.gate_proj.weight": (HIDDEN, DIM),
            "mlp.up_proj.weight": (HIDDEN, DIM),
            "mlp.down_proj.weight": (DIM, HIDDEN),
        }
    ),
    "norm.weight": (DIM,),
}
CONNECTOR_SHAPES: Shapes = {
    "modality_projection.gate_proj.weight": (HIDDEN, EMBEDDING),
    "modality_projection.up_proj.weight": (HIDDEN, EMBEDDING),
    "modality_projection.down_proj.weight": (DIM, HIDDEN),
    **under("perceiver_resampler.", IDEFICS2_SHAPES),
}


class Kind(NamedTuple):
    """A layout with an example of its tensors, of the features it takes, and its formula."""

    layout: str
    shapes: Shapes
    features: tuple[int, ...]
    formula: Callable[[Tensors, np.ndarray], np.ndarray]


KINDS = {
    "flamingo": Kind("flamingo", {"media_pos_emb": (4, 1, DIM), **FLAMINGO_SHAPES}, (3, N, DIM), flamingo),
    "open-flamingo": Kind("open-flamingo", FLAMINGO_SHAPES, (N, DIM), open_flamingo),
    "open-flamingo of videos": Kind(
        "open-flamingo",
        {"frame_embs": (5, DIM), "media_time_embs": (4, 1, DIM), **FLAMINGO_SHAPES},
        (3, 2, N, DIM),
        open_flamingo_of_videos,
    ),
    "evolla": Kind("evolla", EVOLLA_SHAPES, (N, DIM), evolla),
    "ip-adapter": Kind("ip-adapter", IP_ADAPTER_SHAPES, (N, EMBEDDING), ip_adapter),
    "ip-adapter with positions": Kind(
        "ip-adapter", {"pos_emb.weight": (8, EMBEDDING), **IP_ADAPTER_SHAPES}, (N, EMBEDDING), ip_adapter
    ),
    "ip-adapter with a mean": Kind("ip-adapter", {**IP_ADAPTER_SHAPES, **MEAN_SHAPES}, (N, EMBEDDING), ip_adapter),
    "ip-adapter-diffusers": Kind(
        "ip-adapter-diffusers", DIFFUSERS_SHAPES, (N, EMBEDDING), lambda w, x: ip_adapter(w, x, DIFFUSERS)
    ),
    "idefics": Kind(
        "idefics", IDEFICS_SHAPES, (N, DIM), lambda w, x: normed(w, "layer_norm", stack(w, IDEFICS, x, "blocks"))
    ),
    "idefics with norms of heads": Kind(
        "idefics",
        {**IDEFICS_SHAPES, **layers(norms(HEAD_DIM, "0.q_layer_norm", "0.k_layer_norm"), "blocks")},
        (N, DIM),
        lambda w, x: normed(w, "layer_norm", stack(w, IDEFICS_NORMS, x, "blocks")),
    ),
    "idefics2": Kind("idefics2", IDEFICS2_SHAPES, (N, DIM), idefics2),
    "idefics2 with its projection": Kind("idefics2", CONNECTOR_SHAPES, (N, EMBEDDING), idefics2),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def load(kind: Kind, tensors: Tensors, **options: Any) -> setattn.Block:
    return setattn.load(tensors, **({"layout": kind.layout, "head_dim": HEAD_DIM} | options))


# --- what is loaded -------------------------------------------------------------------------------------------------


@every_kind
def test_a_block_computes_what_its_weights_say(kind):
    w = drawn(kind.shapes)
    block, x = load(kind, w), np.random.default_rng(1).normal(size=kind.features)
    wanted = kind.formula(w, x)
    assert block.function == "perceiver_resampler"
    np.testing.assert_allclose(block(x), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    np.testing.assert_allclose(block(np.stack([x, x]))[1], wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    np.testing.assert_allclose(block(x, scale=HEAD_DIM**-0.5), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    assert setattn.count_params(block.params) == sum(map(math.prod, kind.shapes.values()))


@every_kind
def test_the_layout_is_recognised(kind):
    w = drawn(kind.shapes)
    block = load(kind, w, layout=None)
    assert block.layout == kind.layout
    x = np.random.default_rng(1).normal(size=kind.features)
    assert block(x).tobytes() == load(kind, w)(x).tobytes()
    there = {"something.else": np.ones(3), **under("far.away.", w)}
    assert load(kind, there, layout=None, prefix="far.away.")(x).tobytes() == block(x).tobytes()
    with pytest.raises(CheckpointError, match=rf"layout='{kind.layout}' with prefix='far\.away\."):
        load(kind, there, layout=None)


@every_kind
def test_every_tensor_is_needed_in_its_shape(kind):
    optional = ("frame_embs", "media_time_embs", "pos_emb.weight")
    free = () if "pos_emb.weight" in kind.shapes else ("proj_in.weight",)  # no other tensor knows the width
    for name, shape in kind.shapes.items():
        w = drawn(kind.shapes)
        del w[name]
        if name not in optional:
            with pytest.raises(CheckpointError, match=f"missing .*{name.rpartition('.')[-1]}"):
                load(kind, w)
        w = drawn(kind.shapes)
        w[name] = np.ones((*shape[:-1], shape[-1] + 1))
        if name not in free:
            with pytest.raises(CheckpointError, match="of shape"):
                load(kind, w)
    with pytest.raises(CheckpointError, match=r"unexpected layers\.7\.odd"):
        load(kind, {**drawn(kind.shapes), "layers.7.odd": np.ones(3)})


@every_kind
def test_a_block_is_saved_and_loaded(kind, tmp_path):
    block = load(kind, drawn(kind.shapes))
    setattn.save(tmp_path / "block.safetensors", block)
    again = setattn.load(tmp_path / "block.safetensors")
    assert setattn.map_params(lambda a: (a.shape, a.tobytes()), again.params) == setattn.map_params(
        lambda a: (a.shape, a.tobytes()), block.params
    )
    assert (again.layout, again.options) == (block.layout, block.options)


# --- options --------------------------------------------------------------------------------------------------------


@every_kind
def test_the_width_of_a_head_is_that_of_the_published_weights(kind):
    """Without an option or a configuration, 64, or 96 in Idefics: these tensors have no such heads."""
    default = 96 if kind.layout.startswith("idefics") else 64
    with pytest.raises(CheckpointError, match=rf"heads \* {default}"):
        setattn.load(drawn(kind.shapes), kind.layout)
    with pytest.raises(OptionError, match="head_dim"):
        load(kind, drawn(kind.shapes), head_dim=0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("evolla", {"resampler_dim_head": HEAD_DIM}),
        ("idefics", {"perceiver_config": {"resampler_head_dim": HEAD_DIM}}),
        ("idefics", {"resampler_head_dim": HEAD_DIM}),
        (
            "idefics2",
            {"perceiver_config": {"resampler_head_dim": HEAD_DIM, "hidden_act": "gelu", "rms_norm_eps": 1e-3}},
        ),
    ],
)
def test_options_from_a_configuration(name, config):
    kind = KINDS[name]
    block = setattn.load(drawn(kind.shapes), kind.layout, config=config)
    assert block.params.layers[0].attention.query.weight.shape == (DIM, HEADS, HEAD_DIM)
    if name == "idefics2":
        assert block.options == {"activation": "gelu", "eps": 1e-3}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_face_id_adapters_are_refused_in_one_line():
    inner = {name: shape for name, shape in IP_ADAPTER_SHAPES.items() if name != "latents"}
    outer = {"proj.0.weight": (8, 3), "proj.0.bias": (8,), "proj.2.weight": (24, 8), "proj.2.bias": (24,)}
    w = drawn({**outer, **norms(DIM, "norm"), **under("perceiver_resampler.", inner)})
    for layout in ("ip-adapter", None):
        with pytest.raises(CheckpointError, match="learned latents, as those of a FaceID Plus adapter come from") as e:
            setattn.load(under("image_proj.", w), layout, prefix="image_proj.")
        assert "missing" not in str(e.value)
    with pytest.raises(CheckpointError, match=r"layout='ip-adapter' with prefix='image_proj\.'"):
        setattn.load(under("image_proj.", w))
