"""Weights of induced blocks of models of tables, from tensors made here by the published names, against formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

D, F, H, W, M, S = 12, 14, 4, 3, 5, 6  # width; of the network; heads, their width; inducing points; of the scaling


def affine(key: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (outputs, inputs), **({f"{key}.bias": (outputs,)} if bias else {})}


def network(key: str, inputs: int, outputs: int) -> Shapes:
    return affine(f"{key}.0", S, inputs) | affine(f"{key}.2", outputs, S)


SCALINGS = {
    "none": {},
    "ssmax": {"scales": (H,)},
    "ssmax-mlp": network("mlp", 1, H),
    "ssmax-mlp-elementwise": network("mlp", 1, D),
    "qassmax-mlp": network("base_mlp", 1, H) | network("query_mlp", W, 1),
    "qassmax-mlp-elementwise": network("base_mlp", 1, D) | network("query_mlp", W, W),
}


def tabicl(scaling: str, bias: bool = True) -> Shapes:
    shapes: Shapes = {"ind_vectors": (M, D)}
    for j in 1, 2:
        block = {"attn.in_proj_weight": (3 * D, D), "attn.in_proj_bias": (3 * D,)}
        block |= affine("attn.out_proj", D, D) | affine("linear1", F, D) | affine("linear2", D, F)
        block |= {f"norm{i}.{n}": (D,) for i in (1, 2) for n in ("weight", *(["bias"] if bias else []))}
        block |= {f"attn.ssmax_layer.{n}": shape for n, shape in SCALINGS[scaling].items() if j == 1}
        shapes |= {f"multihead_attn{j}.{n}": shape for n, shape in block.items()}
    return shapes


def tabpfn(scaling: bool = True, affine_norms: bool = True, head_norms: bool = False) -> Shapes:
    shapes: Shapes = {"inducing_vectors": (M, D)}
    for j in 1, 2:
        block: Shapes = {f"attn.{n}_projection.weight": (D, D) for n in ("q", "k", "v", "out")}
        block |= {"mlp.0.weight": (F, D), "mlp.2.weight": (D, F)}
        block |= {f"layernorm{n}.weight": (D,) for n in ("_q", "_kv", "2") if affine_norms}
        block |= {f"attn.{n}_norm.weight": (W,) for n in "qk" if head_norms}
        scale = SCALINGS["qassmax-mlp-elementwise"] if scaling and j == 1 else {}
        block |= {f"attn.softmax_scaling_layer.{n}": shape for n, shape in scale.items()}
        shapes |= {f"cross_attn_block{j}.{n}": shape for n, shape in block.items()}
    return shapes


TABICL = [tabicl(scaling, bias) for scaling in SCALINGS for bias in (True, False)]
TABPFN = [tabpfn(), tabpfn(False), tabpfn(affine_norms=False), tabpfn(head_norms=True)]
FILES = [("tabicl-isab", shapes) for shapes in TABICL] + [("tabpfn-isab", shapes) for shapes in TABPFN]
every_file = pytest.mark.parametrize(("layout", "shapes"), FILES)


def drawn(shapes: Shapes) -> Tensors:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s) / (math.sqrt(s[-1]) if len(s) > 1 else 1) for n, s in shapes.items()}


# --- formulas -------------------------------------------------------------------------------------------------------


def apply(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("...i,oi->...o", x, w[f"{key}.weight"]) + w.get(f"{key}.bias", 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)


def mlp(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    return apply(w, f"{key}.2", gelu(apply(w, f"{key}.0", x)))


def norm(w: Tensors, key: str, x: np.ndarray, eps: float, centred: bool) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True) if centred else x
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return y * w.get(f"{key}.weight", 1.0) + w.get(f"{key}.bias", 0.0)


def scaled(w: Tensors, key: str, q: np.ndarray, n: int) -> np.ndarray:
    """Scale queries (m, heads, width) by the logarithm of a number of elements."""
    log_n = np.array([math.log(n)])
    if f"{key}.scales" in w:
        return q * (w[f"{key}.scales"] * log_n)[:, None]
    if f"{key}.mlp.0.weight" in w:
        return q * mlp(w, f"{key}.mlp", log_n).reshape(H, -1)
    if f"{key}.base_mlp.0.weight" in w:
        return q * mlp(w, f"{key}.base_mlp", log_n).reshape(H, -1) * (1 + np.tanh(mlp(w, f"{key}.query_mlp", q)))
    return q


def attend(w: Tensors, key: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, scaling: str) -> np.ndarray:
    q, k, v = (t.reshape(-1, H, W) for t in (q, k, v))
    if f"{key}.q_norm.weight" in w:
        q, k = (norm(w, f"{key}.{n}_norm", t, EPS, False) for n, t in (("q", q), ("k", k)))
    scores = np.einsum("nhw,mhw->hnm", scaled(w, f"{key}.{scaling}", q, k.shape[0]), k) / math.sqrt(W)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hnm,mhw->nhw", e / e.sum(axis=-1, keepdims=True), v).reshape(-1, D)


EPS = 2.0**-23


def tabicl_block(w: Tensors, key: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x_, y_ = (norm(w, f"{key}.norm1", t, 1e-5, True) for t in (x, y))
    weights, biases = np.split(w[f"{key}.attn.in_proj_weight"], 3), np.split(w[f"{key}.attn.in_proj_bias"], 3)
    q, k, v = (np.einsum("ni,oi->no", t, a) + b for t, a, b in zip((x_, y_, y_), weights, biases, strict=True))
    x = x + apply(w, f"{key}.attn.out_proj", attend(w, f"{key}.attn", q, k, v, "ssmax_layer"))
    hidden = gelu(apply(w, f"{key}.linear1", norm(w, f"{key}.norm2", x, 1e-5, True)))
    return x + apply(w, f"{key}.linear2", hidden)


def tabpfn_block(w: Tensors, key: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x_, y_ = norm(w, f"{key}.layernorm_q", x, EPS, False), norm(w, f"{key}.layernorm_kv", y, EPS, False)
    q, k, v = (apply(w, f"{key}.attn.{n}_projection", t) for n, t in (("q", x_), ("k", y_), ("v", y_)))
    a = attend(w, f"{key}.attn", q, k, v, "softmax_scaling_layer")
    x = x + apply(w, f"{key}.attn.out_projection", a)
    return x + mlp(w, f"{key}.mlp", norm(w, f"{key}.layernorm2", x, EPS, False))


def by_hand(layout: str, w: Tensors, x: np.ndarray) -> np.ndarray:
    block, points, name = {
        "tabicl-isab": (tabicl_block, "ind_vectors", "multihead_attn{}"),
        "tabpfn-isab": (tabpfn_block, "inducing_vectors", "cross_attn_block{}"),
    }[layout]
    return block(w, name.format(2), x, block(w, name.format(1), w[points], x))


# --- what is read ---------------------------------------------------------------------------------------------------


@every_file
def test_blocks_compute_what_the_weights_say(layout, shapes):
    """The formula of each original, for a set of 7 and, by a mask, one of 4 of its elements."""
    rng, w = np.random.default_rng(1), drawn(shapes)
    prefix = setattn.layouts()[layout].prefix
    tensors = {prefix + name: a for name, a in w.items()} | {"decoder.weight": np.ones((2, 3))}
    block = setattn.load(tensors, layout, prefix=prefix, num_heads=H)
    assert (block.function, block.layout) == ("isab", layout)
    x, mask = rng.normal(size=(7, D)), np.array([1, 0, 1, 1, 0, 0, 1], bool)
    for kept, masks in (np.ones(7, bool), {}), (mask, {"mask": mask}):
        want = by_hand(layout, w, x[kept])
        got = block(x, **masks)
        np.testing.assert_allclose(got[kept], want, rtol=0, atol=1e-12 * np.abs(want).max())
        assert not got[~kept].any()


@every_file
def test_layouts_are_recognised_and_weights_are_views(layout, shapes):
    w = drawn(shapes)
    block = setattn.load(w, num_heads=H)
    assert block.layout == layout
    leaves: list[np.ndarray] = []
    setattn.map_params(leaves.append, block.params)
    assert all(any(np.shares_memory(a, b) for b in w.values()) for a in leaves)


def test_norms_after_the_branches():
    """``norm_first=False`` puts the two norms of TabICL's blocks after the branches."""
    w = drawn(tabicl("none"))
    block = setattn.load(w, num_heads=H, config={"norm_first": False}).params.mab_set
    np.testing.assert_array_equal(block.attention_norm.scale, w["multihead_attn2.norm1.weight"])
    np.testing.assert_array_equal(block.output_norm.bias, w["multihead_attn2.norm2.bias"])
    assert (block.query_norm, block.context_norm, block.ff_norm) == ((), (), ())


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "shapes"), [FILES[-1], FILES[-4], *FILES[2:12:4]])
def test_tensors_that_are_missing_too_many_or_misshapen(layout, shapes):
    w = drawn(shapes)
    optional = ("norm1.bias", "norm2.bias", "layernorm", "scales")
    for name, a in w.items():
        axis = -1 if name.endswith("_vectors") else 0  # there may be more inducing points
        if not any(part in name for part in optional):
            with pytest.raises(CheckpointError, match=f"missing .*{name}") as caught:
                setattn.load({k: b for k, b in w.items() if k != name}, layout, num_heads=H)
            assert "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match=name):
            setattn.load(w | {name: np.append(a, a.take([0], axis), axis)}, layout, num_heads=H)
    with pytest.raises(CheckpointError, match="unexpected something"):
        setattn.load(w | {"something": np.ones(3)}, layout, num_heads=H)


def test_the_number_of_heads():
    """It must be given, or stand in a configuration, and fit what scales the queries."""
    with pytest.raises(OptionError, match="col_nhead"):
        setattn.load(drawn(tabicl("ssmax")), "tabicl-isab")
    block = setattn.load(drawn(tabicl("ssmax")), config={"col_nhead": H})
    assert block.params.mab_set.attention.query.weight.shape == (D, H, W)
    with pytest.raises(CheckpointError, match=r"scales with 6 or 12 factors for 6 heads of width 2, not 4"):
        setattn.load(drawn(tabicl("ssmax")), "tabicl-isab", num_heads=6)
    with pytest.raises(CheckpointError, match="query_mlp"):
        setattn.load(drawn(tabpfn()), "tabpfn-isab", num_heads=6)
    with pytest.raises(OptionError, match="dist_embed_num_heads"):
        setattn.load(drawn(tabpfn()), "tabpfn-isab")


def test_factors_for_a_query():
    """They are one, or one for each feature of a head."""
    shapes = tabicl("qassmax-mlp") | {
        f"multihead_attn1.attn.ssmax_layer.{n}": s for n, s in affine("query_mlp.2", 2, S).items()
    }
    with pytest.raises(CheckpointError, match=r"query_mlp\.2 with 1 or 3 factors for 4 heads of width 3, not 2"):
        setattn.load(drawn(shapes), "tabicl-isab", num_heads=H)
