"""The layouts of perceiver-pytorch, without the package: names, shapes and halves of tensors, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

LATENTS, DIM, INPUTS, QUERIES, CLASSES = 5, 6, 7, 8, 4
CROSS_HEADS, CROSS_DIM, HEADS, HEAD_DIM = 2, 3, 3, 4
OPTIONS = {"cross_heads": CROSS_HEADS, "latent_heads": HEADS}


def attention(at, dim, context, heads, head_dim):
    norms = {"norm": dim} | ({"norm_context": context} if context else {})
    return {f"{at}.{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")} | {
        f"{at}.fn.to_q.weight": (heads * head_dim, dim),
        f"{at}.fn.to_kv.weight": (2 * heads * head_dim, context or dim),
        f"{at}.fn.to_out.weight": (dim, heads * head_dim),
        f"{at}.fn.to_out.bias": (dim,),
    }


def feed_forward(at, dim):
    return {
        f"{at}.norm.weight": (dim,),
        f"{at}.norm.bias": (dim,),
        f"{at}.fn.net.0.weight": (8 * dim, dim),
        f"{at}.fn.net.0.bias": (8 * dim,),
        f"{at}.fn.net.2.weight": (dim, 4 * dim),
        f"{at}.fn.net.2.bias": (dim,),
    }


def block(attention_at, ff_at, *sizes):
    return attention(attention_at, *sizes) | feed_forward(ff_at, sizes[0])


CROSS, SELF = (DIM, INPUTS, CROSS_HEADS, CROSS_DIM), (DIM, None, HEADS, HEAD_DIM)


def perceiver(cross="cross_attn", ff="cross_ff", selves="self_attns", head=True):
    """Give the shapes of a Perceiver of two layers, the first with two self-attentions, as the second has."""
    shapes = {"latents": (LATENTS, DIM)}
    for i in range(2):
        shapes |= block(f"layers.{i}.{cross}", f"layers.{i}.{ff}", *CROSS)
        for j in range(2):
            shapes |= block(f"layers.{i}.{selves}.{j}.0", f"layers.{i}.{selves}.{j}.1", *SELF)
    if head:
        shapes |= {"to_logits.1.weight": (DIM,), "to_logits.1.bias": (DIM,)}
        shapes |= {"to_logits.2.weight": (CLASSES, DIM), "to_logits.2.bias": (CLASSES,)}
    return shapes


def perceiver_io(new=True, ff=True, output=True, layers=2):
    """Give the shapes of a Perceiver IO."""
    first = "cross_attend_block.cross_attn" if new else "cross_attend_blocks.0"
    shapes = {"latents": (LATENTS, DIM)} | block(
        first, first.replace("attn", "ff") if new else first[:-1] + "1", *CROSS
    )
    for i in range(layers):
        at = f"layers.{i}.self_attns.0" if new else f"layers.{i}"
        shapes |= block(f"{at}.0", f"{at}.1", *SELF)
    shapes |= attention("decoder_cross_attn", QUERIES, DIM, CROSS_HEADS, CROSS_DIM)
    if ff:
        shapes |= feed_forward("decoder_ff", QUERIES)
    if output:
        shapes |= {"to_logits.weight": (CLASSES, QUERIES), "to_logits.bias": (CLASSES,)}
    return shapes


OLD = {"cross": "0", "ff": "1", "selves": "2"}


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


# The equations, from the tensors as they are.


def normed(x, w, at):
    centred = x - x.mean(axis=-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x * w[f"{at}.weight"] + w[f"{at}.bias"]


def attend(w, at, heads, x, y=None):
    x = normed(x, w, f"{at}.norm")
    y = x if y is None else normed(y, w, f"{at}.norm_context")
    q, kv = (np.einsum("ni,oi->no", a, w[f"{at}.fn.{name}.weight"]) for a, name in ((x, "to_q"), (y, "to_kv")))
    k, v = kv[:, : kv.shape[1] // 2], kv[:, kv.shape[1] // 2 :]
    q, k, v = (a.reshape(len(a), heads, -1) for a in (q, k, v))
    e = np.exp(np.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1]))
    out = np.einsum("hmn,nhd->mhd", e / e.sum(axis=-1, keepdims=True), v).reshape(len(x), -1)
    return np.einsum("no,io->ni", out, w[f"{at}.fn.to_out.weight"]) + w[f"{at}.fn.to_out.bias"]


def forward(w, at, x):
    hidden = normed(x, w, f"{at}.norm") @ w[f"{at}.fn.net.0.weight"].T + w[f"{at}.fn.net.0.bias"]
    value, gate = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
    gate = gate * np.vectorize(math.erfc)(-gate / math.sqrt(2)) / 2
    return (value * gate) @ w[f"{at}.fn.net.2.weight"].T + w[f"{at}.fn.net.2.bias"]


def step(w, attention_at, ff_at, heads, x, y=None):
    x = x + attend(w, attention_at, heads, x, y)
    return x + forward(w, ff_at, x)


def close(actual, wanted):
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("names", [{}, OLD])
def test_perceiver(names, head):
    w, y = weights(perceiver(**names, head=head)), np.random.default_rng(1).normal(size=(9, INPUTS))
    loaded = setattn.load(w, **OPTIONS)
    assert (loaded.function, loaded.layout) == ("perceiver", "perceiver-lucidrains")
    assert loaded.options == {"activation": "gelu", "eps": 1e-5}
    cross, ff, selves = names.values() if names else ("cross_attn", "cross_ff", "self_attns")
    z = w["latents"]
    for i in range(2):
        z = step(w, f"layers.{i}.{cross}", f"layers.{i}.{ff}", CROSS_HEADS, z, y)
        for j in range(2):
            z = step(w, f"layers.{i}.{selves}.{j}.0", f"layers.{i}.{selves}.{j}.1", HEADS, z)
    if head:
        z = normed(z.mean(axis=0), w, "to_logits.1") @ w["to_logits.2.weight"].T + w["to_logits.2.bias"]
    close(loaded(y), z)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("ff", "output"), [(True, True), (False, False)])
def test_perceiver_io(new, ff, output):
    rng = np.random.default_rng(1)
    w, y, q = weights(perceiver_io(new, ff, output)), rng.normal(size=(9, INPUTS)), rng.normal(size=(3, QUERIES))
    loaded = setattn.load(w, **OPTIONS)
    assert (loaded.function, loaded.layout) == ("perceiver_io", "perceiver-io-lucidrains")
    assert loaded.options == {"depth": 2, "decoder_residual": False, "activation": "gelu", "eps": 1e-5}
    first = ("cross_attend_block.cross_attn", "cross_attend_block.cross_ff")
    z = step(w, *(first if new else ("cross_attend_blocks.0", "cross_attend_blocks.1")), CROSS_HEADS, w["latents"], y)
    for i in range(2):
        at = f"layers.{i}.self_attns.0" if new else f"layers.{i}"
        z = step(w, f"{at}.0", f"{at}.1", HEADS, z)
    out = attend(w, "decoder_cross_attn", CROSS_HEADS, q, z)
    out = out + forward(w, "decoder_ff", out) if ff else out
    close(loaded(y, q), out @ w["to_logits.weight"].T + w["to_logits.bias"] if output else out)


def test_weights_are_views():
    w = weights(perceiver())
    cross = setattn.load(w, **OPTIONS).params.cross_attentions[0]
    a = cross.attention
    assert [m.weight.shape for m in (a.query, a.key, a.value, a.output)] == [
        (DIM, CROSS_HEADS, CROSS_DIM),
        (INPUTS, CROSS_HEADS, CROSS_DIM),
        (INPUTS, CROSS_HEADS, CROSS_DIM),
        (CROSS_HEADS, CROSS_DIM, DIM),
    ]
    assert all(np.shares_memory(m.weight, w["layers.0.cross_attn.fn.to_kv.weight"]) for m in (a.key, a.value))
    assert np.shares_memory(cross.ff.gate.weight, w["layers.0.cross_ff.fn.net.0.weight"])


@pytest.mark.parametrize("shapes", [perceiver_io(layers=1), perceiver_io(new=False, layers=1)])
def test_depth_repeats_the_last_layer(shapes):
    rng = np.random.default_rng(1)
    w, y, q = weights(shapes), rng.normal(size=(9, INPUTS)), rng.normal(size=(3, QUERIES))
    more = {name.replace("layers.0", f"layers.{i}"): a for i in range(3) for name, a in w.items()}
    close(setattn.load(w, **OPTIONS, depth=3)(y, q), setattn.load(more, **OPTIONS)(y, q))
    assert setattn.load(w, **OPTIONS).options["depth"] == 1


def test_depth_repeats_the_last_layer_of_a_perceiver():
    w, y = weights(perceiver()), np.random.default_rng(1).normal(size=(9, INPUTS))
    more = w | {name.replace("layers.1", "layers.2"): a for name, a in w.items()}
    close(setattn.load(w, **OPTIONS, depth=3)(y), setattn.load(more, **OPTIONS)(y))


BROKEN = [
    ({"layers.1.cross_ff.norm.bias": None}, "missing layers.1.cross_ff.norm.bias"),
    ({"positions": (3,)}, "unexpected positions"),
    (
        {"layers.0.cross_attn.fn.to_kv.weight": (10, INPUTS)},
        "layers.0.cross_attn.fn.to_kv.weight of shape (2 * 2 * 3 (cross_head_dim of layers.0.cross_attn.fn.to_q.weight",
    ),
    ({"to_logits.2.weight": (CLASSES, 3)}, "to_logits.2.weight of shape (classes, 6 (dim of latents)), not (4, 3)"),
    ({"attn_residuals.0.to_attn_logits.0.weight": (DIM,)}, "no attention over the outputs of earlier layers"),
    ({"layers.0.3.to_attn_logits.0.weight": (DIM,)}, "no attention over the outputs of earlier layers"),
]


@pytest.mark.parametrize(("changed", "message"), BROKEN)
def test_what_is_wrong_is_named(changed, message):
    shapes = {name: shape for name, shape in (perceiver() | changed).items() if shape}
    with pytest.raises(CheckpointError) as error:
        setattn.load(weights(shapes), "perceiver-lucidrains", **OPTIONS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", OPTIONS)
def test_heads_must_be_given(missing):
    given = {name: value for name, value in OPTIONS.items() if name != missing}
    with pytest.raises(
        OptionError, match=f"argument '{missing}' is not given; wanted an integer for layout 'perceiver-l"
    ):
        setattn.load(weights(perceiver()), "perceiver-lucidrains", **given)


def test_fewer_layers_than_the_file_has():
    with pytest.raises(CheckpointError, match="at most depth=1 layers, not 2"):
        setattn.load(weights(perceiver()), "perceiver-lucidrains", **OPTIONS, depth=1)
