"""Weights of the Set Transformer's implementations, from tensors made here by the published names.

The formulas are written anew from the equations of each implementation, for NumPy in float64, and read the tensors by
their names: those of the authors' code, of which there is no package, are its original here.
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

DIM, HEADS, N = 12, 4, 7


def under(prefix: str, shapes: dict[str, Any]) -> dict[str, Any]:
    """Put a prefix before every name."""
    return {prefix + name: value for name, value in shapes.items()}


def affine(key: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    """Names and shapes of a ``torch.nn.Linear``."""
    return {f"{key}.weight": (outputs, inputs), **({f"{key}.bias": (outputs,)} if bias else {})}


def norms(*keys: str) -> Shapes:
    """Names and shapes of layer norms."""
    return {f"{key}.{name}": (DIM,) for key in keys for name in ("weight", "bias")}


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
    """Normalise, where there are such tensors."""
    if f"{key}.weight" not in w:
        return x
    centred = x - x.mean(axis=-1, keepdims=True)
    power = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(power + 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]


def heads_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, scale: float, mask: Any = None) -> np.ndarray:
    """Attend with each slice of the width by itself, and lay the results side by side."""
    parts = []
    for cut in np.split(np.arange(q.shape[-1]), heads):
        scores = scale * np.einsum("...id,...jd->...ij", q[..., cut], k[..., cut])
        if mask is not None:
            scores = np.where(mask[..., None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        parts.append(np.einsum("...ij,...jd->...id", weights, v[..., cut]))
    return np.concatenate(parts, axis=-1)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.0)


def official(w: Tensors, key: str, x: np.ndarray, y: np.ndarray, heads: int, mask: Any = None) -> np.ndarray:
    """The authors' block: the projected queries are added, there is no output projection, the scale is the width's."""
    q, k, v = apply(w, f"{key}fc_q", x), apply(w, f"{key}fc_k", y), apply(w, f"{key}fc_v", y)
    h = q + heads_of(q, k, v, heads, 1 / math.sqrt(q.shape[-1]), mask)
    h = normed(w, f"{key}ln0", h)
    return normed(w, f"{key}ln1", h + relu(apply(w, f"{key}fc_o", h)))


def pyg(w: Tensors, key: str, x: np.ndarray, y: np.ndarray, heads: int, mask: Any = None) -> np.ndarray:
    """The block of PyTorch Geometric: PyTorch's attention, the queries as they are, a network of one layer."""
    weights, biases = np.split(w[f"{key}attn.in_proj_weight"], 3), np.split(w[f"{key}attn.in_proj_bias"], 3)
    q, k, v = (np.einsum("...i,oi->...o", z, a) + b for z, a, b in zip((x, y, y), weights, biases, strict=True))
    a = heads_of(q, k, v, heads, 1 / math.sqrt(q.shape[-1] // heads), mask)
    h = normed(w, f"{key}layer_norm1", x + apply(w, f"{key}attn.out_proj", a))
    return normed(w, f"{key}layer_norm2", h + relu(apply(w, f"{key}lin", h)))


def dgl_ffn(w: Tensors, key: str, x: np.ndarray) -> np.ndarray:
    return apply(w, f"{key}ffn.3", relu(apply(w, f"{key}ffn.0", x)))


def dgl(w: Tensors, key: str, x: np.ndarray, y: np.ndarray, heads: int, mask: Any = None) -> np.ndarray:
    """The block of DGL: no biases in the attention, whose inner width is its own, and a network of two layers."""
    q, k, v = apply(w, f"{key}proj_q", x), apply(w, f"{key}proj_k", y), apply(w, f"{key}proj_v", y)
    a = heads_of(q, k, v, heads, 1 / math.sqrt(q.shape[-1] // heads), mask)
    h = normed(w, f"{key}norm_in", x + apply(w, f"{key}proj_o", a))
    return normed(w, f"{key}norm_inter", h + dgl_ffn(w, key, h))


def lucidrains(w: Tensors, key: str, x: np.ndarray, y: np.ndarray, mask: Any = None) -> np.ndarray:
    """The attention of isab-pytorch, whose heads are 64 wide."""
    q, (k, v) = apply(w, f"{key}to_q", x), np.split(apply(w, f"{key}to_kv", y), 2, axis=-1)
    return apply(w, f"{key}to_out", heads_of(q, k, v, q.shape[-1] // 64, 1 / 8, mask))


# --- kinds of blocks ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of block: its tensors, the function it is, and what it is of ``x`` and a mask."""

    layout: str
    function: str
    shapes: Shapes
    formula: Callable[[Tensors, np.ndarray, Any], np.ndarray]
    dim_x: int = DIM


def _official_shapes(dim_q: int, dim_k: int, ln: bool) -> Shapes:
    maps = {"fc_q": dim_q, "fc_k": dim_k, "fc_v": dim_k, "fc_o": DIM}
    shapes = {name: shape for key, width in maps.items() for name, shape in affine(key, DIM, width).items()}
    return shapes | (norms("ln0", "ln1") if ln else {})


def _official_isab(dim_x: int, ln: bool) -> Shapes:
    first, second = _official_shapes(DIM, dim_x, ln), _official_shapes(dim_x, DIM, ln)
    return {"I": (1, 3, DIM), **under("mab0.", first), **under("mab1.", second)}


def _official_pma(seeds: int, ln: bool) -> Shapes:
    return {"S": (1, seeds, DIM), **under("mab.", _official_shapes(DIM, DIM, ln))}


def _is_official_isab(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    return official(w, f"{key}mab1.", x, official(w, f"{key}mab0.", w[f"{key}I"], x, HEADS, mask), HEADS)


def _is_official_pma(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    return official(w, f"{key}mab.", w[f"{key}S"], x, HEADS, mask)


def _official_model(ln: bool) -> Kind:
    shapes = under("enc.0.", _official_isab(2, ln)) | under("enc.1.", _official_isab(DIM, ln))
    shapes |= under("dec.0.", _official_pma(5, ln)) | affine("dec.3", 6, DIM)
    for i in (1, 2):
        shapes |= under(f"dec.{i}.mab.", _official_shapes(DIM, DIM, ln))

    def formula(w: Tensors, x: np.ndarray, mask: Any) -> np.ndarray:
        h = _is_official_isab(w, "enc.1.", _is_official_isab(w, "enc.0.", x, mask), mask)
        h = _is_official_pma(w, "dec.0.", h, mask)
        for key in ("dec.1.mab.", "dec.2.mab."):
            h = official(w, key, h, h, HEADS)
        return apply(w, "dec.3", h)

    return Kind("set-transformer", "set_transformer", shapes, formula, 2)


def _official_points() -> Kind:
    """The model for point clouds, whose decoder has dropouts at 0 and 2."""
    shapes = under("enc.0.", _official_isab(3, False)) | under("enc.1.", _official_isab(DIM, False))
    shapes |= under("dec.1.", _official_pma(1, False)) | affine("dec.3", 6, DIM)

    def formula(w: Tensors, x: np.ndarray, mask: Any) -> np.ndarray:
        h = _is_official_isab(w, "enc.1.", _is_official_isab(w, "enc.0.", x, mask), mask)
        return apply(w, "dec.3", _is_official_pma(w, "dec.1.", h, mask))

    return Kind("set-transformer", "set_transformer", shapes, formula, 3)


def _official_maximum() -> Kind:
    """The model that finds a maximum: set attention blocks, pooling, a linear map."""
    shapes = under("enc.0.mab.", _official_shapes(1, 1, False)) | under("enc.1.mab.", _official_shapes(DIM, DIM, False))
    shapes |= under("dec.0.", _official_pma(1, False)) | affine("dec.1", 1, DIM)

    def formula(w: Tensors, x: np.ndarray, mask: Any) -> np.ndarray:
        for key in ("enc.0.mab.", "enc.1.mab."):
            x = official(w, key, x, x, HEADS, mask)
        return apply(w, "dec.1", _is_official_pma(w, "dec.0.", x, mask))

    return Kind("set-transformer", "set_transformer", shapes, formula, 1)


def _pyg_shapes(ln: bool) -> Shapes:
    shapes: Shapes = {"attn.in_proj_weight": (3 * DIM, DIM), "attn.in_proj_bias": (3 * DIM,)}
    shapes |= affine("attn.out_proj", DIM, DIM) | affine("lin", DIM, DIM)
    return shapes | (norms("layer_norm1", "layer_norm2") if ln else {})


def _pyg_pma(ln: bool) -> Shapes:
    return {"seed": (1, 5, DIM), **affine("lin", DIM, DIM), **under("mab.", _pyg_shapes(ln))}


def _is_pyg_pma(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    return pyg(w, f"{key}mab.", w[f"{key}seed"], relu(apply(w, f"{key}lin", x)), HEADS, mask)


def _pyg_model(ln: bool) -> Kind:
    shapes = under("pma.", _pyg_pma(ln)) | under("decoders.0.mab.", _pyg_shapes(ln))
    for i in (0, 1):
        shapes |= under(f"encoders.{i}.mab.", _pyg_shapes(ln))

    def formula(w: Tensors, x: np.ndarray, mask: Any) -> np.ndarray:
        for i in (0, 1):
            x = pyg(w, f"encoders.{i}.mab.", x, x, HEADS, mask)
        x = _is_pyg_pma(w, "pma.", x, mask)
        return pyg(w, "decoders.0.mab.", x, x, HEADS)

    return Kind("set-transformer-pyg", "set_transformer", shapes, formula)


def _dgl_shapes(head_dim: int = 5, hidden: int = 9) -> Shapes:
    shapes = {f"proj_{name}.weight": (HEADS * head_dim, DIM) for name in "qkv"}
    shapes |= {"proj_o.weight": (DIM, HEADS * head_dim)} | _dgl_ffn(hidden) | norms("norm_in", "norm_inter")
    return shapes


def _dgl_ffn(hidden: int) -> Shapes:
    return affine("ffn.0", hidden, DIM) | affine("ffn.3", DIM, hidden)


def _dgl_isab() -> Shapes:
    return {"inducing_points": (3, DIM), **under("mha.0.", _dgl_shapes()), **under("mha.1.", _dgl_shapes())}


def _dgl_pma(head_dim: int = 5, hidden: int = 9) -> Shapes:
    return {"seed_vectors": (5, DIM), **_dgl_ffn(hidden), **under("mha.", _dgl_shapes(head_dim, hidden))}


def _is_dgl_isab(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    return dgl(w, f"{key}mha.1.", x, dgl(w, f"{key}mha.0.", w[f"{key}inducing_points"], x, HEADS, mask), HEADS)


def _is_dgl_pma(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    return dgl(w, f"{key}mha.", w[f"{key}seed_vectors"], dgl_ffn(w, key, x), HEADS, mask)


def _dgl_decoder(prefix: str = "") -> Shapes:
    """A decoder of other widths than the encoder's."""
    return under(f"{prefix}pma.", _dgl_pma(2, 8)) | under(f"{prefix}layers.0.mha.", _dgl_shapes(2, 8))


def _is_dgl_decoder(w: Tensors, key: str, x: np.ndarray, mask: Any) -> np.ndarray:
    x = _is_dgl_pma(w, f"{key}pma.", x, mask)
    return dgl(w, f"{key}layers.0.mha.", x, x, HEADS)


def _dgl_model() -> Kind:
    shapes = under("encoder.layers.0.mha.", _dgl_shapes()) | under("encoder.layers.1.", _dgl_isab())

    def formula(w: Tensors, x: np.ndarray, mask: Any) -> np.ndarray:
        x = dgl(w, "encoder.layers.0.mha.", x, x, HEADS, mask)
        return _is_dgl_decoder(w, "decoder.", _is_dgl_isab(w, "encoder.layers.1.", x, mask), mask)

    return Kind("set-transformer-dgl", "set_transformer", shapes | _dgl_decoder("decoder."), formula)


def _lucidrains_shapes() -> Shapes:
    shapes: Shapes = {"latents": (3, DIM)}
    for name, heads in (("attn1", 2), ("attn2", 2)):
        shapes |= affine(f"{name}.to_q", heads * 64, DIM, False) | affine(f"{name}.to_kv", 2 * heads * 64, DIM, False)
        shapes |= affine(f"{name}.to_out", DIM, heads * 64, False)
    return shapes


def _one(formula: Callable[..., np.ndarray], key: str = "", queries: str = "") -> Callable[..., np.ndarray]:
    """The formula of a block of one set."""
    return lambda w, x, mask: formula(w, key, w[queries] if queries else x, x, HEADS, mask)


KINDS = {
    "official": _official_model(False),
    "official-ln": _official_model(True),
    "official-points": _official_points(),
    "official-maximum": _official_maximum(),
    "official-isab": Kind(
        "set-transformer", "isab", _official_isab(3, True), lambda w, x, mask: _is_official_isab(w, "", x, mask), 3
    ),
    "official-sab": Kind(
        "set-transformer", "sab", under("mab.", _official_shapes(3, 3, False)), _one(official, "mab."), 3
    ),
    "official-pma": Kind("set-transformer", "pma", _official_pma(5, True), _one(official, "mab.", "S")),
    "pyg": _pyg_model(False),
    "pyg-norms": _pyg_model(True),
    "pyg-isab": Kind(
        "set-transformer-pyg",
        "isab",
        {"ind": (1, 3, DIM), **under("mab1.", _pyg_shapes(True)), **under("mab2.", _pyg_shapes(True))},
        lambda w, x, mask: pyg(w, "mab2.", x, pyg(w, "mab1.", w["ind"], x, HEADS, mask), HEADS),
    ),
    "pyg-sab": Kind("set-transformer-pyg", "sab", under("mab.", _pyg_shapes(True)), _one(pyg, "mab.")),
    "pyg-pma": Kind("set-transformer-pyg", "pma", _pyg_pma(False), lambda w, x, mask: _is_pyg_pma(w, "", x, mask)),
    "dgl": _dgl_model(),
    "dgl-decoder": Kind(
        "set-transformer-dgl",
        "set_transformer",
        _dgl_decoder(),
        lambda w, x, mask: _is_dgl_decoder(w, "", x, mask),
    ),
    "dgl-encoder-sab": Kind(
        "set-transformer-dgl", "sab", under("layers.0.mha.", _dgl_shapes()), _one(dgl, "layers.0.mha.")
    ),
    "dgl-encoder-isab": Kind(
        "set-transformer-dgl",
        "isab",
        under("layers.0.", _dgl_isab()),
        lambda w, x, mask: _is_dgl_isab(w, "layers.0.", x, mask),
    ),
    "dgl-isab": Kind("set-transformer-dgl", "isab", _dgl_isab(), lambda w, x, mask: _is_dgl_isab(w, "", x, mask)),
    "dgl-sab": Kind("set-transformer-dgl", "sab", under("mha.", _dgl_shapes()), _one(dgl, "mha.")),
    "dgl-pma": Kind("set-transformer-dgl", "pma", _dgl_pma(), lambda w, x, mask: _is_dgl_pma(w, "", x, mask)),
    "lucidrains": Kind(
        "isab-lucidrains",
        "isab",
        _lucidrains_shapes(),
        lambda w, x, mask: lucidrains(w, "attn2.", x, lucidrains(w, "attn1.", w["latents"], x, mask)),
    ),
}

MABS = {
    "official": ("set-transformer", official, _official_shapes(9, 10, True), 9, 10),
    "pyg": ("set-transformer-pyg", pyg, _pyg_shapes(True), DIM, DIM),
    "dgl": ("set-transformer-dgl", dgl, _dgl_shapes(), DIM, DIM),
}


def options(layout: str) -> dict[str, int]:
    return {} if layout == "isab-lucidrains" else {"num_heads": HEADS}


def assert_same(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12 * max(1.0, float(abs(wanted).max())))


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    """Each kind of block is recognised, is the function it should be, and has the values of its formula."""
    kind, rng = KINDS[name], np.random.default_rng(1)
    w = drawn(kind.shapes)
    block = setattn.load(w, **options(kind.layout))
    assert (block.layout, block.function) == (kind.layout, kind.function)
    assert setattn.count_params(block.params) == sum(math.prod(shape) for shape in kind.shapes.values())
    x = rng.normal(size=(2, N, kind.dim_x))
    assert_same(block(x), kind.formula(w, x, None))
    mask = np.array([[True] * N, [True] * 4 + [False] * (N - 4)])
    rows = mask if kind.function in ("sab", "isab") else np.ones((2, 1), dtype=bool)
    assert_same(block(x, mask=mask), np.where(rows[..., None], kind.formula(w, x, mask), 0.0))


@pytest.mark.parametrize("name", ["official", "official-pma", "pyg", "dgl-decoder", "lucidrains"])
def test_saving(name, tmp_path):
    """What was loaded is saved and loaded again, parts that are absent and an encoder without blocks included."""
    kind = KINDS[name]
    block = setattn.load(drawn(kind.shapes), **options(kind.layout))
    setattn.save(tmp_path / "block.safetensors", block)
    again = setattn.load(tmp_path / "block.safetensors")
    assert (again.function, again.options, again.layout) == (block.function, block.options, block.layout)
    x = np.random.default_rng(1).normal(size=(2, N, kind.dim_x))
    np.testing.assert_array_equal(again(x), block(x))


@pytest.mark.parametrize("name", MABS)
def test_mabs(name):
    """A block of two sets is recognised, too, with two widths where it may have them."""
    layout, formula, shapes, dim_x, dim_y = MABS[name]
    w, rng = drawn(shapes), np.random.default_rng(1)
    block = setattn.load(w, num_heads=HEADS)
    assert (block.layout, block.function) == (layout, "mab")
    x, y = rng.normal(size=(2, 3, dim_x)), rng.normal(size=(2, N, dim_y))
    assert_same(block(x, y), formula(w, "", x, y, HEADS))


# --- the authors' code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "state_dict.module.", "state_dict/"])
def test_prefixes(prefix):
    """What was saved from within a wrapper, or under a name, is found under its prefix, and the error names it."""
    kind = KINDS["official"]
    w = drawn(kind.shapes)
    wrapped = under(prefix, w)
    x = np.ones((N, 2))
    loaded = setattn.load(wrapped, prefix=prefix, num_heads=HEADS)
    np.testing.assert_array_equal(loaded(x), setattn.load(w, num_heads=HEADS)(x))
    with pytest.raises(CheckpointError, match="layout='set-transformer' with prefix='" + prefix):
        setattn.load(wrapped, num_heads=HEADS)


def test_a_nested_mapping():
    """A state dict under a key, as the authors' code saves it, is read as it is."""
    kind = KINDS["official"]
    w = drawn(kind.shapes)
    block = setattn.load({"state_dict": w}, prefix="state_dict/", num_heads=HEADS)
    assert block.function == "set_transformer"


@pytest.mark.parametrize(
    ("width", "heads", "told"),
    [
        (10, 4, "not 4, of which the original silently makes 5: num_heads=5"),
        (8, 3, "not 3, of which the original silently makes 4: num_heads=4"),
        (6, 4, "not 4, of which the original silently makes 6: num_heads=6"),
        (11, 4, "not 4, with which the original fails"),
        (3, 4, "not 4, with which the original fails"),
    ],
)
def test_heads_that_do_not_divide_the_width(width, heads, told):
    """A number of heads that the original would silently replace is refused, with the number that it used."""
    shapes: Shapes = {
        name: shape for key in ("fc_q", "fc_k", "fc_v", "fc_o") for name, shape in affine(key, width, width).items()
    }
    for prefix in ("", "mab."):
        w = under(prefix, drawn(shapes))
        with pytest.raises(CheckpointError) as caught:
            setattn.load(w, num_heads=heads)
        wanted = f"the tensors of layout 'set-transformer': a num_heads that divides the width {width}, {told}"
        assert caught.value.wanted == wanted
        if "num_heads=" in told:
            assert setattn.load(w, num_heads=int(told.rpartition("=")[2])).layout == "set-transformer"


def test_a_decoder_of_another_form():
    """A linear layer that is not the last one is none of the model's: it is left over, not left out."""
    w = drawn(KINDS["official-points"].shapes)
    with pytest.raises(CheckpointError, match=r"unexpected dec\.3\.weight, dec\.3\.bias"):
        setattn.load({**w, **drawn(affine("dec.5", 6, 6))}, "set-transformer", num_heads=HEADS)


def test_the_scale_is_the_widths():
    """The scale of the authors' code is an option of the block, which a call may change."""
    block = setattn.load(drawn(KINDS["official-sab"].shapes), num_heads=HEADS)
    assert block.options == {"activation": "relu", "eps": 1e-5, "scale": 1 / math.sqrt(DIM)}
    x = np.ones((N, 3)) * np.arange(N)[:, None]
    assert not np.allclose(block(x), block(x, scale=1.0))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("set-transformer", "argument num_heads"),
        ("set-transformer-pyg", "argument heads"),
        ("set-transformer-dgl", "arguments n_heads and num_heads"),
    ],
)
def test_heads_must_be_told(layout, arguments):
    kind = next(kind for kind in KINDS.values() if kind.layout == layout)
    with pytest.raises(OptionError) as caught:
        setattn.load(drawn(kind.shapes))
    assert caught.value.argument == "num_heads"
    where = f"the {arguments} of the original"
    assert caught.value.wanted == f"an integer for layout {layout!r}: number of heads of every attention, {where}"


@pytest.mark.parametrize("name", KINDS)
def test_missing_left_over_and_misshapen_tensors(name):
    """Every tensor is needed, none may be left over, and the shape of each matters; the error names it."""
    kind = KINDS[name]
    w = drawn(kind.shapes)
    given = {"layout": kind.layout} | options(kind.layout)
    for missing in w:
        rest = {key: a for key, a in w.items() if key != missing}
        if kind.function == "pma" and missing == "S":
            assert setattn.load(rest, **given).function == "sab"  # nothing else tells the two apart
            continue
        with pytest.raises(CheckpointError) as caught:
            setattn.load(rest, **given)
        assert "missing " in caught.value.wanted or "unexpected " in caught.value.wanted
    with pytest.raises(CheckpointError, match=r"unexpected other\.weight"):
        setattn.load({**w, "other.weight": np.ones(3)}, **given)
    for wrong, a in w.items():
        with pytest.raises(CheckpointError, match="of shape"):
            setattn.load({**w, wrong: np.ones((*a.shape, 2))}, **given)


def test_what_an_error_says():
    """One line tells all that is wrong."""
    w = drawn(KINDS["pyg-pma"].shapes)
    del w["mab.attn.out_proj.bias"]
    w["mab.lin.weight"] = np.ones((DIM, DIM + 1))
    w["more"] = np.ones(2)
    with pytest.raises(CheckpointError) as caught:
        setattn.load(w, "set-transformer-pyg", num_heads=HEADS)
    assert caught.value.wanted.startswith(
        "the tensors of layout 'set-transformer-pyg': missing mab.attn.out_proj.bias; unexpected more; "
        "mab.lin.weight of shape (12 (dim of seed), 12 (dim of seed)), not (12, 13)"
    )


def test_a_head_count_that_does_not_divide():
    """The others fail themselves where heads do not divide the width; here the error names the tensor."""
    for name in ("pyg-sab", "dgl-sab"):
        with pytest.raises(CheckpointError, match=r"(in_proj_weight|proj_q\.weight) of shape \(.*7 \* .*head_dim"):
            setattn.load(drawn(KINDS[name].shapes), num_heads=7)


def test_an_encoder_of_several_layers_alone():
    """Several layers without a pooling are no block of the library: each is loaded by itself."""
    w = drawn(under("layers.0.", _dgl_isab()) | under("layers.1.mha.", _dgl_shapes()))
    with pytest.raises(CheckpointError, match="one layer, as several without a decoder are no block"):
        setattn.load(w, num_heads=HEADS)
    functions = [setattn.load(w, prefix=f"layers.{i}.", num_heads=HEADS).function for i in (0, 1)]
    assert functions == ["isab", "sab"]


@pytest.mark.parametrize("option", ["latent_self_attend", "inverted_attention"])
def test_other_forms_of_lucidrains_block(option):
    """What no shape shows has to be told, and is refused."""
    w = drawn(_lucidrains_shapes())
    with pytest.raises(CheckpointError, match=f"{option}=False, the one form of the block that setattn.isab computes"):
        setattn.load(w, **{option: True})
    assert setattn.load(w).options == {"query_residual": False}


def test_latents_from_outside():
    """A block that takes its latents from outside has none in its weights: they are put there."""
    w = drawn(_lucidrains_shapes())
    latents = w.pop("latents")
    with pytest.raises(CheckpointError, match="missing latents"):
        setattn.load(w, "isab-lucidrains")
    assert setattn.load({**w, "latents": latents}).function == "isab"


def test_what_was_loaded_is_not_copied():
    """The parameters are views of the tensors."""
    w = drawn(KINDS["dgl-isab"].shapes)
    block = setattn.load(w, num_heads=HEADS)
    assert np.shares_memory(block.params.mab_set.attention.query.weight, w["mha.1.proj_q.weight"])
