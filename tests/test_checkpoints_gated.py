"""Weights of gated cross-attentions, from tensors made here by the published names, against formulas written anew."""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

Tensors = dict[str, np.ndarray]

D, V, F, H, W = 12, 10, 14, 4, 3  # widths of text, media and network; heads and their width

FLAMINGO = {
    "attn_gate": (1,),
    "ff_gate": (1,),
    "attn.norm.weight": (D,),
    "attn.norm.bias": (D,),
    "attn.to_q.weight": (H * W, D),
    "attn.to_kv.weight": (2 * H * W, V),
    "attn.to_out.weight": (D, H * W),
    "ff.0.weight": (D,),
    "ff.0.bias": (D,),
    "ff.1.weight": (F, D),
    "ff.3.weight": (D, F),
}
LLAMA = {
    "input_layernorm.weight": (D,),
    "cross_attn.q_proj.weight": (H * W, D),
    "cross_attn.o_proj.weight": (D, H * W),
    "post_attention_layernorm.weight": (D,),
    "mlp.gate_proj.weight": (F, D),
    "mlp.up_proj.weight": (F, D),
    "mlp.down_proj.weight": (D, F),
}
MLLAMA = LLAMA | {
    "cross_attn.k_proj.weight": (2 * W, V),
    "cross_attn.v_proj.weight": (2 * W, V),
    "cross_attn.q_norm.weight": (W,),
    "cross_attn.k_norm.weight": (W,),
    "cross_attn_attn_gate": (1,),
    "cross_attn_mlp_gate": (1,),
}
IDEFICS = LLAMA | {
    "cross_attn.k_proj.weight": (H * W, V),
    "cross_attn.v_proj.weight": (H * W, V),
    "alpha_cross_attn": (1,),
    "alpha_dense": (1,),
}
VECTORS = IDEFICS | {
    "cross_attn.q_layer_norm.weight": (W,),
    "cross_attn.k_layer_norm.weight": (W,),
    "alpha_cross_attn": (1, 1, D),
    "alpha_dense": (1, 1, D),
}
OPTIONS = {"flamingo-gated": {"head_dim": W}, "mllama-gated": {}, "idefics-gated": {"num_heads": H}}
FILES = [
    ("flamingo-gated", FLAMINGO),
    ("mllama-gated", MLLAMA),
    ("idefics-gated", IDEFICS),
    ("idefics-gated", VECTORS),
]
every_file = pytest.mark.parametrize(("layout", "shapes"), FILES, ids=["flamingo", "mllama", "idefics", "vectors"])


def drawn(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


# --- formulas -------------------------------------------------------------------------------------------------------


def layer_norm(x: np.ndarray, w: Tensors, key: str) -> np.ndarray:
    y = x - x.mean(axis=-1, keepdims=True)
    return y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]


def rms_norm(x: np.ndarray, w: Tensors, key: str, eps: float) -> np.ndarray:
    if f"{key}.weight" not in w:
        return x
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w[f"{key}.weight"]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, sees: np.ndarray) -> np.ndarray:
    """Attend with heads (n, h, w) to (m, g, w), each g for h / g of them; a row that sees nothing gets 0."""
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    e = np.exp(np.einsum("nhw,mhw->hnm", q, k) / math.sqrt(q.shape[-1])) * sees
    total = e.sum(axis=-1, keepdims=True)
    return np.einsum("hnm,mhw->nhw", e / np.where(total == 0, 1, total), v).reshape(q.shape[0], -1)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)


def flamingo(w: Tensors, x: np.ndarray, media: np.ndarray, sees: np.ndarray) -> np.ndarray:
    q = np.einsum("ni,oi->no", layer_norm(x, w, "attn.norm"), w["attn.to_q.weight"])
    k, v = np.split(np.einsum("mi,oi->mo", media, w["attn.to_kv.weight"]), 2, axis=-1)
    a = attend(*(t.reshape(-1, H, W) for t in (q, k, v)), sees)
    x = x + np.tanh(w["attn_gate"]) * np.einsum("no,io->ni", a, w["attn.to_out.weight"])
    hidden = gelu(np.einsum("ni,oi->no", layer_norm(x, w, "ff.0"), w["ff.1.weight"]))
    return x + np.tanh(w["ff_gate"]) * np.einsum("no,io->ni", hidden, w["ff.3.weight"])


def llama(w: Tensors, x: np.ndarray, media: np.ndarray, sees: np.ndarray, eps: float, names: dict) -> np.ndarray:
    q, k, v = (
        np.einsum("ni,oi->no", t, w[f"cross_attn.{n}_proj.weight"]).reshape(t.shape[0], -1, W)
        for n, t in (("q", rms_norm(x, w, "input_layernorm", eps)), ("k", media), ("v", media))
    )
    q, k = (rms_norm(t, w, f"cross_attn.{names[n]}", eps) for n, t in (("q", q), ("k", k)))
    a = np.einsum("no,io->ni", attend(q, k, v, sees), w["cross_attn.o_proj.weight"])
    x = x + np.tanh(w[names["attention"]]).reshape(-1) * a
    z = rms_norm(x, w, "post_attention_layernorm", eps)
    gate, up = (np.einsum("ni,oi->no", z, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    out = np.einsum("no,io->ni", gate / (1 + np.exp(-gate)) * up, w["mlp.down_proj.weight"])
    return x + np.tanh(w[names["ff"]]).reshape(-1) * out


def by_hand(layout: str, w: Tensors, x: np.ndarray, media: np.ndarray, sees: np.ndarray) -> np.ndarray:
    if layout == "flamingo-gated":
        return flamingo(w, x, media, sees)
    if layout == "mllama-gated":
        names = {"q": "q_norm", "k": "k_norm", "attention": "cross_attn_attn_gate", "ff": "cross_attn_mlp_gate"}
        return np.where(sees.any(axis=-1)[:, None], llama(w, x, media, sees, 1e-5, names), x)
    names = {"q": "q_layer_norm", "k": "k_layer_norm", "attention": "alpha_cross_attn", "ff": "alpha_dense"}
    return llama(w, x, media, sees, 1e-6, names)


# --- what is read ---------------------------------------------------------------------------------------------------


@every_file
@pytest.mark.parametrize("prefix", ["", "published"])
def test_blocks_compute_what_the_weights_say(layout, shapes, prefix):
    """The formula of each original, with text that sees some media, all and none."""
    rng, w = np.random.default_rng(1), drawn(shapes)
    prefix = setattn.layouts()[layout].prefix if prefix else ""
    tensors = {prefix + name: a for name, a in w.items()} | ({"lm_head.weight": np.ones((2, 3))} if prefix else {})
    block = setattn.load(tensors, layout, prefix=prefix, **OPTIONS[layout])
    assert (block.function, block.layout) == ("gated_cross_attention", layout)
    x, media, pairs = rng.normal(size=(7, D)), rng.normal(size=(3, 5, V)), rng.random((7, 3)) < 0.5
    pairs[2], pairs[3] = False, True
    want = by_hand(layout, w, x, media.reshape(15, V), np.repeat(pairs, 5, axis=-1))
    got = block(x, media, pair_mask=pairs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
    assert np.array_equal(got[2], x[2]) == (layout == "mllama-gated")


@every_file
def test_layouts_are_recognised_and_weights_are_views(layout, shapes):
    w = drawn(shapes)
    block = setattn.load(w, **OPTIONS[layout])
    assert block.layout == layout
    leaves: list[np.ndarray] = []
    setattn.map_params(leaves.append, block.params)
    assert sum(a.size for a in leaves) == sum(a.size for a in w.values())
    assert all(any(np.shares_memory(a, b) for b in w.values()) for a in leaves)
    gates = [block.params.attention_gate.shape, block.params.ff_gate.shape]
    assert gates == [(D,) if shapes is VECTORS else (1,)] * 2


def test_flamingos_media():
    """Whether text sees the last medium alone is an option, or stands in a configuration."""
    w = drawn(FLAMINGO)
    assert setattn.load(w, head_dim=W).options["immediate"] is True
    assert setattn.load(w, head_dim=W, immediate=False).options["immediate"] is False
    config = {"only_attend_immediate_media": False}
    assert setattn.load(w, head_dim=W, config=config).options["immediate"] is False


def test_options_from_a_configuration():
    config = {"text_config": {"rms_norm_eps": 1e-4, "hidden_act": "gelu"}}
    options = setattn.load(drawn(MLLAMA), config=config).options
    assert options == {"ff_without_media": False, "activation": "gelu", "eps": 1e-4}
    config = {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    block = setattn.load(drawn(IDEFICS), config=config)
    assert block.params.cross_attention.attention.query.weight.shape == (D, 2, 6)
    assert block.options == {"activation": "silu", "eps": 1e-5}


def test_a_buffer_of_rotations_is_left_alone():
    """Some files of Idefics hold it for every attention; a cross-attention turns nothing."""
    w = drawn(IDEFICS | {"cross_attn.rotary_emb.inv_freq": (2,)})
    assert setattn.load(w, num_heads=H).layout == "idefics-gated"


# --- what is refused ------------------------------------------------------------------------------------------------


@every_file
def test_tensors_that_are_missing_or_too_many(layout, shapes):
    w = drawn(shapes)
    for name in w:
        if "layer_norm" in name:  # together they may be absent
            continue
        with pytest.raises(CheckpointError, match=f"missing {name}") as caught:
            setattn.load({k: a for k, a in w.items() if k != name}, layout, **OPTIONS[layout])
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="unexpected something"):
        setattn.load(w | {"something": np.ones(3)}, layout, **OPTIONS[layout])


@every_file
def test_tensors_of_other_shapes(layout, shapes):
    w = drawn(shapes)
    for name, a in w.items():
        with pytest.raises(CheckpointError, match=name):
            setattn.load(w | {name: np.concatenate([a, a[:1]])}, layout, **OPTIONS[layout])


def test_gates_of_several_numbers():
    """A gate is one number; where it is one for each feature, it has two axes in front."""
    with pytest.raises(CheckpointError, match="attn_gate of one number"):
        setattn.load(drawn(FLAMINGO | {"attn_gate": (D,)}), "flamingo-gated", head_dim=W)


def test_heads_that_do_not_divide():
    with pytest.raises(CheckpointError, match="to_q"):
        setattn.load(drawn(FLAMINGO), "flamingo-gated")  # heads of width 64
    with pytest.raises(CheckpointError, match="q_proj"):
        setattn.load(drawn(IDEFICS), "idefics-gated", num_heads=5)
    with pytest.raises(CheckpointError, match=r"q_layer_norm"):
        setattn.load(drawn(VECTORS), "idefics-gated", num_heads=2)
    with pytest.raises(OptionError, match="num_attention_heads"):
        setattn.load(drawn(IDEFICS), "idefics-gated")
