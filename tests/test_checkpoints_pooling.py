"""The layouts of pooling heads: what their tensors become, and what is said where they do not fit.

Names and shapes are written down from the published implementations, and what they compute from tensors as they are in
the file, with NumPy alone.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

D, C, F, K, N, HEADS = 12, 10, 20, 5, 7, 3


# --- formulas over the tensors of a file ------------------------------------------------------------------------------


def gelu_tanh(z):
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gelu(z):
    return 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def layer_norm(x, scale, bias=0.0, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def attend(q, k, v, heads):
    """Attend with heads that lie side by side in the last axis; those of keys and values may be fewer."""
    width, out = q.shape[-1] // heads, []
    groups = heads // (k.shape[-1] // width)
    for h in range(heads):
        mine, theirs = slice(h * width, (h + 1) * width), slice(h // groups * width, (h // groups + 1) * width)
        e = np.exp(np.einsum("md,nd->mn", q[:, mine], k[:, theirs]) / math.sqrt(width))
        out.append(np.einsum("mn,nd->md", e / e.sum(axis=-1, keepdims=True), v[:, theirs]))
    return np.concatenate(out, axis=-1)


def multihead(w, q, k, v, heads, at="attn"):
    """``torch.nn.MultiheadAttention``."""
    names = [f"{at}.{n}_proj_weight" for n in "qkv"]
    packed = f"{at}.in_proj_weight"
    weights = np.split(w[packed], 3) if packed in w else [w[name] for name in names]
    biases = np.split(w[f"{at}.in_proj_bias"], 3)
    q, k, v = (x @ m.T + b for x, m, b in zip((q, k, v), weights, biases, strict=True))
    return attend(q, k, v, heads) @ w[f"{at}.out_proj.weight"].T + w[f"{at}.out_proj.bias"]


def timm(w, x, act=gelu):
    k, v = np.split(x @ w["kv.weight"].T + w.get("kv.bias", 0.0), 2, axis=-1)
    q = w["latent"][0]
    if "pos_embed" in w:
        k, v = np.split((x + w["pos_embed"][: len(x)]) @ w["kv.weight"].T + w.get("kv.bias", 0.0), 2, axis=-1)
    if "q.weight" in w:
        q = q @ w["q.weight"].T + w.get("q.bias", 0.0)
    if "q_norm.weight" in w:
        q, k = (
            layer_norm(t.reshape(len(t), HEADS, -1), w[f"{n}_norm.weight"], w[f"{n}_norm.bias"]).reshape(len(t), -1)
            for n, t in (("q", q), ("k", k))
        )
    h = attend(q, k, v, HEADS)
    if "proj.weight" not in w:
        return h
    h = h @ w["proj.weight"].T + w["proj.bias"]
    z = layer_norm(h, w["norm.weight"], w["norm.bias"]) if "norm.weight" in w else h
    return h + act(z @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def big_vision(w, x):
    def project(t, name):
        part = f"MultiHeadDotProductAttention_0/{name}"
        return (np.einsum("nd,dhk->nhk", t, w[f"{part}/kernel"]) + w[f"{part}/bias"]).reshape(len(t), -1)

    h = attend(project(w["probe"][0], "query"), project(x, "key"), project(x, "value"), HEADS)
    out = "MultiHeadDotProductAttention_0/out"
    h = h @ w[f"{out}/kernel"].reshape(D, D) + w[f"{out}/bias"]
    z = layer_norm(h, w["LayerNorm_0/scale"], w["LayerNorm_0/bias"])
    for i, act in enumerate((gelu_tanh, lambda t: t)):
        z = act(z @ w[f"MlpBlock_0/Dense_{i}/kernel"] + w[f"MlpBlock_0/Dense_{i}/bias"])
    return h + z


def open_clip(w, x):
    q = layer_norm(w["query"], w["ln_q.weight"], w["ln_q.bias"], 1e-5)
    y = layer_norm(x, w["ln_k.weight"], w["ln_k.bias"], 1e-5)
    return multihead(w, q, y, y, HEADS)


def resampler(w, x, key_positions):
    y = x @ w["kv_proj.weight"].T if "kv_proj.weight" in w else x
    y = layer_norm(y, w["ln_kv.weight"], w["ln_kv.bias"])
    q = layer_norm(w["query"], w["ln_q.weight"], w["ln_q.bias"]) + w.get("pos_embed", 0.0)
    out = multihead(w, q, y + key_positions, y, HEADS)
    return layer_norm(out, w["ln_post.weight"], w["ln_post.bias"]) @ w["proj"] if "proj" in w else out


def x_transformers(w, x, residual=False):
    def attention(at, z):
        q, k, v = (t @ w[f"{at}to_{n}.weight"].T for n, t in (("q", z), ("k", x), ("v", x)))
        return attend(q, k, v, HEADS) @ w[f"{at}to_out.weight"].T

    z = w["queries"]
    if "pooler.final_norm.gamma" not in w:
        return attention("pooler.", z) + residual * z
    for i in (0, 2):
        cross, ff = f"pooler.layers.{i}.", f"pooler.layers.{i + 1}."
        z = z + attention(f"{cross}1.", layer_norm(z, 1 + w[f"{cross}0.0.gamma"], eps=1e-5))
        h = layer_norm(z, 1 + w[f"{ff}0.0.gamma"], eps=1e-5) @ w[f"{ff}1.ff.0.0.weight"].T + w[f"{ff}1.ff.0.0.bias"]
        z = z + gelu(h) @ w[f"{ff}1.ff.2.weight"].T + w[f"{ff}1.ff.2.bias"]
    return layer_norm(z, 1 + w["pooler.final_norm.gamma"], eps=1e-5)


# --- small examples ---------------------------------------------------------------------------------------------------


def linear(name, dim_in, dim_out, bias=True):
    return {f"{name}.weight": (dim_out, dim_in)} | ({f"{name}.bias": (dim_out,)} if bias else {})


def norm(name, dim=D):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


PACKED = {"attn.in_proj_weight": (3 * D, D), "attn.in_proj_bias": (3 * D,), **linear("attn.out_proj", D, D)}
SPLIT = {
    "attn.q_proj_weight": (D, D),
    "attn.k_proj_weight": (D, C),
    "attn.v_proj_weight": (D, C),
    "attn.in_proj_bias": (3 * D,),
    **linear("attn.out_proj", D, D),
}
TIMM = {
    "latent": (1, 1, D),
    **linear("q", D, D),
    **linear("kv", D, 2 * D),
    **linear("proj", D, D),
    **norm("norm"),
    **linear("mlp.fc1", D, F),
    **linear("mlp.fc2", F, D),
}
TIMM_BARE = {"latent": (1, K, D), **linear("kv", D, 2 * D, bias=False), "pos_embed": (N + 2, D)}
TIMM_NORMS = {
    **TIMM,
    "latent": (1, K, 8),
    **linear("q", 8, D),
    **norm("q_norm", D // HEADS),
    **norm("k_norm", D // HEADS),
}
FLAX = {
    "probe": (1, 1, D),
    **{
        f"MultiHeadDotProductAttention_0/{part}/{name}": shape
        for part in ("query", "key", "value")
        for name, shape in (("kernel", (D, HEADS, D // HEADS)), ("bias", (HEADS, D // HEADS)))
    },
    "MultiHeadDotProductAttention_0/out/kernel": (HEADS, D // HEADS, D),
    "MultiHeadDotProductAttention_0/out/bias": (D,),
    "LayerNorm_0/scale": (D,),
    "LayerNorm_0/bias": (D,),
    "MlpBlock_0/Dense_0/kernel": (D, F),
    "MlpBlock_0/Dense_0/bias": (F,),
    "MlpBlock_0/Dense_1/kernel": (F, D),
    "MlpBlock_0/Dense_1/bias": (D,),
}
QWEN = {
    "query": (K, D),
    "pos_embed": (K, D),
    "kv_proj.weight": (D, C),
    **PACKED,
    **norm("ln_q"),
    **norm("ln_kv"),
}
MINICPM = {**QWEN, **norm("ln_post"), "proj": (D, D)}
BARE = {f"pooler.to_{n}.weight": shape for n, shape in (("q", (D, D)), ("k", (4, C)), ("v", (4, C)), ("out", (D, D)))}
BLOCKS = {"queries": (K, D), "pooler.final_norm.gamma": (D,)}
for _i in (0, 2):
    BLOCKS |= {f"pooler.layers.{_i}.0.0.gamma": (D,), f"pooler.layers.{_i + 1}.0.0.gamma": (D,)}
    BLOCKS |= {name.replace("pooler.", f"pooler.layers.{_i}.1."): shape for name, shape in BARE.items()}
    BLOCKS |= linear(f"pooler.layers.{_i + 1}.1.ff.0.0", D, F) | linear(f"pooler.layers.{_i + 1}.1.ff.2", F, D)

POOL, HEAD = "attention-pool-x-transformers", {"head_dim": 4}
EXAMPLES = {
    "siglip-timm": ("siglip-timm", TIMM, {"num_heads": HEADS}, timm, D),
    "siglip-timm-bare": ("siglip-timm", TIMM_BARE, {"num_heads": HEADS}, timm, D),
    "siglip-timm-norms": ("siglip-timm", TIMM_NORMS, {"num_heads": HEADS}, timm, D),
    "siglip-big-vision": ("siglip-big-vision", FLAX, {}, big_vision, D),
    "open-clip-packed": (
        "open-clip-pooler",
        {"query": (K, D), **PACKED, **norm("ln_q"), **norm("ln_k")},
        {"num_heads": HEADS},
        open_clip,
        D,
    ),
    "open-clip-split": (
        "open-clip-pooler",
        {"query": (K, D), **SPLIT, **norm("ln_q"), **norm("ln_k", C)},
        {"num_heads": HEADS},
        open_clip,
        C,
    ),
    "qwen-vl": ("qwen-vl", QWEN, {"num_heads": HEADS}, resampler, C),
    "minicpm-v-2.0": ("minicpm-v", MINICPM, {"num_heads": HEADS}, resampler, C),
    "minicpm-v": (
        "minicpm-v",
        {name: s for name, s in MINICPM.items() if name not in ("pos_embed", "kv_proj.weight")},
        {"num_heads": HEADS},
        resampler,
        D,
    ),
    "x-transformers": (POOL, {"queries": (K, D), **BARE}, HEAD, x_transformers, C),
    "x-transformers-residual": (
        POOL,
        {"queries": (K, D), **BARE},
        HEAD | {"add_residual": True},
        lambda w, x: x_transformers(w, x, residual=True),
        C,
    ),
    "x-transformers-blocks": (POOL, BLOCKS, HEAD, x_transformers, C),
}
every_example = pytest.mark.parametrize("name", EXAMPLES)


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def refused(w, layout, **options):
    with pytest.raises(CheckpointError) as caught:
        setattn.load(w, layout, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what they become -------------------------------------------------------------------------------------------------


@every_example
def test_a_block_computes_what_its_tensors_say(name):
    layout, shapes, options, formula, width = EXAMPLES[name]
    w, rng = weights(shapes), np.random.default_rng(1)
    block, x = setattn.load(w, layout, **options), rng.normal(size=(N, width))
    places = (rng.normal(size=(N, D)),) if formula is resampler else ()
    want, keys = formula(w, x, *places), {"key_positions": places[0]} if places else {}
    np.testing.assert_allclose(block(x, **keys), want, rtol=0, atol=1e-12 * np.abs(want).max())
    assert block.function in setattn.layouts()[layout].functions


@every_example
def test_the_layout_is_recognised_alone_and_where_it_is_published(name):
    layout, shapes, options, *_ = EXAMPLES[name]
    assert setattn.load(weights(shapes), **options).layout == layout
    prefix = setattn.layouts()[layout].prefix
    w = {prefix + name: a for name, a in weights(shapes).items()} | {"other/tensor": np.ones(3)}
    if prefix:
        assert setattn.load(w, prefix=prefix, **options).layout == layout
        with pytest.raises(CheckpointError) as caught:
            setattn.load(w, **options)
        assert f"layout={layout!r} with prefix={prefix!r}" in str(caught.value)


@every_example
def test_weights_are_views(name):
    layout, shapes, options, *_ = EXAMPLES[name]
    w = weights(shapes)
    scales = [n for n in shapes if n.endswith("gamma")]  # stored less 1

    def is_view(a):
        return any(np.shares_memory(a, b) for b in w.values())

    found = []
    setattn.map_params(lambda a: found.append(is_view(a)), setattn.load(w, layout, **options).params)
    assert found.count(False) == len(scales)


def test_trees_by_hand():
    """Where each tensor of the most used heads goes, as it is oriented there."""
    w = weights(TIMM_NORMS)
    p = setattn.load(w, "siglip-timm", num_heads=HEADS).params
    np.testing.assert_array_equal(p.probe, w["latent"][0])
    np.testing.assert_array_equal(p.attention.value.weight[1, 2], w["kv.weight"][D + 8 : D + 12, 1])
    np.testing.assert_array_equal(p.attention.key.bias[2], w["kv.bias"][8:12])
    np.testing.assert_array_equal(p.attention.output.weight[1, :, 3], w["proj.weight"][3, 4:8])
    np.testing.assert_array_equal(p.attention.key_norm.scale, w["k_norm.weight"])
    np.testing.assert_array_equal(p.ff.output.weight, w["mlp.fc2.weight"].T)
    assert (p.input, p.position, p.output) == ((), (), ())
    w = weights(MINICPM)
    p = setattn.load(w, "minicpm-v", num_heads=HEADS).params
    np.testing.assert_array_equal(p.input.weight, w["kv_proj.weight"].T)
    np.testing.assert_array_equal(p.output.weight, w["proj"])
    np.testing.assert_array_equal(p.probe_position, w["pos_embed"])
    np.testing.assert_array_equal(p.attention.key.weight[1, 2], w["attn.in_proj_weight"][D + 8 : D + 12, 1])
    assert (p.input.bias, p.output.bias, p.ff) == ((), (), ())


def test_heads_of_resamplers_are_128_wide_unless_it_is_said_otherwise():
    shapes = {name: tuple({D: 256, 3 * D: 768}.get(n, n) for n in shape) for name, shape in QWEN.items()}
    block = setattn.load(weights(shapes), "qwen-vl")
    assert block.params.attention.query.weight.shape == (256, 2, 128)
    says = refused(weights(QWEN), "qwen-vl")
    assert f"num_heads= to be given, as the width of query, {D}, is no multiple of 128" in says


# --- what is refused --------------------------------------------------------------------------------------------------

# Without these, a file is one of another variant of the same layout; and where a part may have another width.
OPTIONAL = {
    "siglip-timm": ("pos_embed",),
    "minicpm-v": ("pos_embed", "kv_proj.weight"),
    "qwen-vl": ("kv_proj.weight",),
}
FREE = {"siglip-timm": "kv.weight", "qwen-vl": "kv_proj.weight", "minicpm-v": "kv_proj.weight"}


@every_example
def test_every_tensor_that_is_missing_is_named(name):
    layout, shapes, options, *_ = EXAMPLES[name]
    for tensor in shapes:
        # An attention of PyTorch may have no biases; without the first of three weights it is taken for a packed one.
        if tensor not in OPTIONAL.get(layout, ()) and tensor not in ("attn.in_proj_bias", "attn.out_proj.bias"):
            w = weights(shapes)
            del w[tensor]
            assert tensor.replace("q_proj_weight", "in_proj_weight") in refused(w, layout, **options)


@every_example
def test_every_shape_is_checked(name):
    layout, shapes, options, *_ = EXAMPLES[name]
    for tensor, shape in shapes.items():
        wrong = {(*shape, 1), shape[:-1], shape[::-1], (*shape[:-1], 0)} - {shape}
        if tensor != FREE.get(layout):
            wrong.add((*shape[:-1], shape[-1] + 1))
        for other in wrong:
            assert tensor in refused(weights(shapes) | {tensor: np.ones(other)}, layout, **options)


@every_example
def test_tensors_that_belong_to_nothing_are_named(name):
    layout, shapes, options, *_ = EXAMPLES[name]
    says = refused(weights(shapes) | {"rotary.inv_freq": np.ones(3)}, layout, **options)
    assert "unexpected rotary.inv_freq" in says


@pytest.mark.parametrize("layout", ["siglip", "siglip-timm"])
def test_heads_must_be_given_where_nothing_tells(layout):
    with pytest.raises(OptionError, match=f"an integer for layout '{layout}': number of heads of the attention"):
        setattn.load(weights(TIMM), layout)


def test_options_are_read_from_a_configuration():
    _, shapes, *_ = EXAMPLES["open-clip-packed"]
    config = {"model_cfg": {"vision_cfg": {"attn_pooler_heads": 4}}}
    block = setattn.load(weights(shapes), config=config)
    assert block.params.attention.query.weight.shape == (D, 4, D // 4)
    assert block.options == {"eps": 1e-5}


def test_a_residual_beside_transformer_blocks_is_refused():
    says = refused(weights(BLOCKS), POOL, head_dim=4, add_residual=True)
    assert "add_residual=False, as transformer blocks have residuals of their own" in says


def test_a_table_of_places_that_is_none_of_the_probes_is_refused():
    """Later versions of MiniCPM-V keep a table of all places, which is not stored; if it is, it is not the probes'."""
    says = refused(weights(MINICPM) | {"pos_embed": np.ones((70, 70, D))}, "minicpm-v", num_heads=HEADS)
    assert "pos_embed of shape (5 (probes of query), 12 (dim of query)), not (70, 70, 12)" in says
