"""The row-wise layers against mpmath, with rounding bounds, and at the ends of the range of their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import mpmath
import numpy as np
import pytest
from hypothesis import given

from setattn import FeedForward, LayerNorm, Linear, RMSNorm, convert_params
from setattn import _layers as layers
from setattn._namespace import namespace_of
from setattn._params import is_absent

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
NP = namespace_of(np.ones(1))


def norm(x: np.ndarray, p: Any, eps: float = 1e-5) -> np.ndarray:
    with np.errstate(all="raise", under="ignore"):
        return layers.norm(x, p, layers.Options(NP, eps=eps))


def rows(dtype: str, largest: float, least_size: int = 1) -> st.SearchStrategy[np.ndarray]:
    width = 32 if dtype == "float32" else 64
    largest = float(np.array(largest, dtype))
    elements = st.floats(-largest, largest, width=width, allow_subnormal=False)
    return hnp.arrays(
        dtype, hnp.array_shapes(min_dims=2, max_dims=2, min_side=least_size, max_side=9), elements=elements
    )


# --- norms ----------------------------------------------------------------------------------------------------------


def check_layer_norm(x: np.ndarray, p: LayerNorm, eps: float, norm: Callable[..., np.ndarray] = norm) -> float:
    """Return the largest error in units of its bound, which does not grow with what all features have in common.

    With ``r`` the largest distance of a feature from the first one, each centred feature has an error of
    ``(2 + 2 log2(d + 1)) u r``; the deviation ``s`` inherits as much, relative to ``s``, and the two halves of the
    rounding of its sum; four operations follow.
    """
    u, d = UNIT[str(x.dtype)], x.shape[-1]
    y, worst = norm(x, p, eps), 0.0
    with mpmath.workdps(60):
        for given_row, got in zip(x, y, strict=True):
            row = [mpmath.mpf(float(a)) for a in given_row]
            mean = mpmath.fsum(row) / d
            s = mpmath.sqrt(mpmath.fsum((a - mean) ** 2 for a in row) / d + mpmath.mpf(eps))
            spread = (2 + 2 * math.log2(d + 1)) * max(abs(a - row[0]) for a in row) / s if s else 0
            for i, a in enumerate(row):
                z = (a - mean) / s if s else mpmath.mpf(0)
                scale = mpmath.mpf(1 if is_absent(p.scale) else float(p.scale[i]))
                bias = mpmath.mpf(0 if is_absent(p.bias) else float(p.bias[i]))
                bound = u * (abs(scale) * (spread + abs(z) * (spread + math.log2(d + 1) + 4)) + abs(scale * z + bias))
                error = abs(scale * z + bias - mpmath.mpf(float(got[i])))
                bound += float(np.finfo(x.dtype).tiny)
                worst = max(worst, float(error / bound))
    return worst


def affine(d: int, dtype: str) -> LayerNorm:
    rng = np.random.default_rng(d)
    return LayerNorm(rng.normal(size=d).astype(dtype), rng.normal(size=d).astype(dtype))


@DTYPES
@pytest.mark.parametrize("largest", [4.0, 1e-3, 1e30])
@given(data=st.data())
def test_layer_norm(dtype, largest, data):
    x = data.draw(rows(dtype, largest))
    eps = data.draw(st.sampled_from([1e-5, 1e-6, 1e-3]))
    for p in (LayerNorm(), affine(x.shape[-1], dtype)):
        assert check_layer_norm(x, p, eps) <= 1


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6, -1e6])
def test_layer_norm_loses_nothing_to_a_common_offset(dtype, offset):
    """The reference is of the rows as rounded, so that what is lost is lost in the norm."""
    x = (np.random.default_rng(0).normal(size=(8, 33)) + offset).astype(dtype)
    worst = check_layer_norm(x, affine(33, dtype), 1e-5)
    assert worst <= 1
    assert worst > 0.005


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6, 1e30])
def test_the_kernel_of_torch_loses_no_more(dtype, offset):
    """Where PyTorch's own kernel is used, it meets the same bound, and constant rows are exactly the bias."""
    torch = pytest.importorskip("torch")
    x = (np.random.default_rng(0).normal(size=(8, 33)) + offset).astype(dtype)
    x[1], x[2, 0] = offset, offset + 100.0
    p = affine(33, dtype)
    o = layers.Options(namespace_of(torch.from_numpy(x)), eps=1e-5)

    def theirs(a, p, eps):
        return layers.norm(torch.from_numpy(a), convert_params(p, torch), o._replace(eps=eps)).numpy()

    assert check_layer_norm(x, p, 1e-5, theirs) <= 1
    for eps in (1e-5, 1e-60):
        np.testing.assert_array_equal(theirs(x, p, eps)[1], p.bias)
    # Whatever a row beside them holds, rows have the same bits.
    beside = [theirs(np.concatenate([x, np.full((1, 33), value, dtype)]), p, 1e-5)[:-1] for value in (0, np.nan, 3e38)]
    for other in beside:
        np.testing.assert_array_equal(other, theirs(x, p, 1e-5))


@DTYPES
@given(data=st.data())
def test_layer_norm_has_mean_0_and_the_variance_left_by_eps(dtype, data):
    x = data.draw(rows(dtype, 100.0, least_size=2))
    eps = data.draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    y, u, d = norm(x, LayerNorm(), eps).astype(np.float64), UNIT[dtype], x.shape[-1]
    wide = x.astype(np.float64) - x[:, :1].astype(np.float64)
    variance = wide.var(axis=-1)
    spread = np.abs(wide).max(axis=-1) / np.sqrt(variance + eps)
    tolerance = u * (4 + 4 * math.log2(d + 1)) * (1 + spread)
    assert (np.abs(y.mean(axis=-1)) <= tolerance).all()
    assert (np.abs((y**2).mean(axis=-1) - variance / (variance + eps)) <= 2 * tolerance + u).all()


@DTYPES
@given(data=st.data(), k=st.integers(-20, 100))
def test_norms_ignore_a_power_of_two_bit_for_bit(dtype, data, k):
    """Without eps; above 2**50, it comes off a row before the squares."""
    width = 32 if dtype == "float32" else 64
    elements = st.floats(2.0**-8, 4.0, width=width).flatmap(lambda a: st.sampled_from([a, -a]))
    x = data.draw(hnp.arrays(dtype, (3, 5), elements=elements))
    x[:, 0], x[:, 1] = 3.5, -2.25  # no constant rows: 0 / 0 without eps
    scaled = np.ldexp(x, k)
    for p in (LayerNorm(), RMSNorm(), affine(5, dtype)):
        np.testing.assert_array_equal(norm(scaled, p, 0.0), norm(x, p, 0.0))


CONSTANTS = [0.0, -0.0, 1.0, 0.1, -1e-30, 1e30, 3.0e38, 1.2e-38, 1e-45]


@DTYPES
@pytest.mark.parametrize("d", [1, 2, 7, 64, 100])
def test_layer_norm_of_constant_rows_is_exactly_the_bias(dtype, d):
    p = affine(d, dtype)
    x = np.broadcast_to(np.array(CONSTANTS, dtype)[:, None], (len(CONSTANTS), d))
    np.testing.assert_array_equal(norm(x, p), np.broadcast_to(p.bias, x.shape))
    assert not norm(x, LayerNorm()).any()


@DTYPES
def test_layer_norm_of_one_feature_is_exactly_the_bias(dtype):
    p = affine(1, dtype)
    x = np.random.default_rng(0).normal(size=(50, 1)).astype(dtype) * 1e10
    np.testing.assert_array_equal(norm(x, p), np.broadcast_to(p.bias, x.shape))


LARGE = [("float32", e) for e in (10, 30, 60, 100, 127)] + [("float64", e) for e in (10, 127, 500, 1020)]


@pytest.mark.parametrize(("dtype", "exponent"), LARGE)
def test_norms_of_rows_whose_squares_overflow(dtype, exponent):
    x = np.random.default_rng(exponent).uniform(-1, 1, size=(6, 12)).astype(dtype)
    x = np.ldexp(x, exponent)
    assert check_layer_norm(x, affine(12, dtype), 1e-5) <= 1
    assert check_rms_norm(x, RMSNorm(affine(12, dtype).scale), 1e-5) <= 1


def check_rms_norm(x: np.ndarray, p: RMSNorm, eps: float) -> float:
    """Return the largest error in units of its bound: that of a sum of squares, halved by the root, and 4 roundings."""
    u, d = UNIT[str(x.dtype)], x.shape[-1]
    y, worst = norm(x, p, eps), 0.0
    with mpmath.workdps(60):
        for given_row, got in zip(x, y, strict=True):
            row = [mpmath.mpf(float(a)) for a in given_row]
            s = mpmath.sqrt(mpmath.fsum(a**2 for a in row) / d + mpmath.mpf(eps))
            for i, a in enumerate(row):
                exact = a / s * (1 if is_absent(p.scale) else mpmath.mpf(float(p.scale[i])))
                bound = u * abs(exact) * (math.log2(d + 1) + 4) + float(np.finfo(x.dtype).tiny)
                worst = max(worst, float(abs(exact - mpmath.mpf(float(got[i]))) / bound))
    return worst


@DTYPES
@pytest.mark.parametrize("largest", [4.0, 1e-3, 1e30])
@given(data=st.data())
def test_rms_norm(dtype, largest, data):
    x = data.draw(rows(dtype, largest))
    for p in (RMSNorm(), RMSNorm(affine(x.shape[-1], dtype).scale)):
        assert check_rms_norm(x, p, data.draw(st.sampled_from([1e-5, 1e-6, 1e-3]))) <= 1


def test_norms_of_rows_of_zeros_and_of_nothing():
    assert not norm(np.zeros((2, 5)), RMSNorm()).any()
    assert norm(np.ones((0, 5)), LayerNorm()).shape == (0, 5)
    x = np.ones((2, 5))
    assert norm(x, ()) is x


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norms_keep_what_is_not_finite_to_its_row(bad):
    x = np.random.default_rng(0).normal(size=(3, 5))
    spoilt = x.copy()
    spoilt[1, 2] = bad
    for p in (LayerNorm(), RMSNorm()):
        with np.errstate(invalid="ignore"):
            y = layers.norm(spoilt, p, layers.Options(NP))
        np.testing.assert_array_equal(y[[0, 2]], norm(x, p)[[0, 2]])
        assert np.isnan(y[1, 2])


# --- activations ----------------------------------------------------------------------------------------------------


def exact_activation(name: str, x: mpmath.mpf) -> mpmath.mpf:
    if name == "relu":
        return max(x, mpmath.mpf(0))
    if name == "squared_relu":
        return max(x, mpmath.mpf(0)) ** 2
    if name == "gelu":
        return x / 2 * mpmath.erfc(-x / mpmath.sqrt(2)) if abs(x) < 1e3 else max(x, mpmath.mpf(0))
    if name == "gelu_tanh":
        return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
    return x / (1 + mpmath.exp(-x)) if x > -1e5 else mpmath.mpf(0)


# In units of rounding: of the result where nothing cancels, and of x where 1 + erf or 1 + tanh do. For the latter, half
# the error of erf (8) or tanh (2), that of its argument (at most 1, or 2) and 2 roundings.
BOUNDS = {"relu": (0, 0), "squared_relu": (1, 0), "silu": (6, 0), "gelu": (0, 7), "gelu_tanh": (0, 5)}


def points(dtype: str, name: str) -> np.ndarray:
    info = np.finfo(dtype)
    half = np.concatenate(
        [np.linspace(0, 12, 241), np.geomspace(float(info.tiny), 100, 120), [88, 103, 104, 710, 745, 746, 1e4, 1e10]]
    )
    half = np.append(half, [1e15] if name == "squared_relu" else [1e30, float(info.max)]).astype(dtype)
    return np.concatenate([half, -half])


@DTYPES
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations(dtype, name):
    x, u = points(dtype, name), UNIT[dtype]
    with np.errstate(all="raise", under="ignore"):
        y = layers._ACTIVATIONS[name](x, NP)
    assert y.dtype == x.dtype
    relative, of_x = BOUNDS[name]
    with mpmath.workdps(60):
        for a, b in zip(x, y, strict=True):
            exact = exact_activation(name, mpmath.mpf(float(a)))
            bound = u * (relative * abs(exact) + of_x * abs(float(a))) + float(np.finfo(dtype).tiny) * (name != "relu")
            assert abs(exact - mpmath.mpf(float(b))) <= bound, a


@DTYPES
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_at_the_ends(dtype, name):
    x = np.array([0.0, -0.0, -1e30, np.nan], dtype)
    y = layers._ACTIVATIONS[name](x, NP)
    assert (y[:3] == 0).all()
    if name not in ("relu", "squared_relu"):  # a ReLU is a selection of what is positive, and NaN is not
        assert np.isnan(y[3])


def test_activations_are_five_and_differ():
    assert layers.ACTIVATIONS == ("relu", "squared_relu", "gelu", "gelu_tanh", "silu")
    values = [layers._ACTIVATIONS[name](np.array([1.3]), NP)[0] for name in layers.ACTIVATIONS]
    assert len({round(float(v), 5) for v in values}) == 5
    assert 1e-5 < abs(values[2] - values[3]) < 1e-3


# --- affine map and feed-forward network ----------------------------------------------------------------------------


def exact_linear(x: list[Any], p: Linear) -> tuple[list[Any], list[float]]:
    """Return ``x @ weight + bias``, and the sums of the absolute values of its terms."""
    values, sums = [], []
    for j in range(p.weight.shape[1]):
        terms = [a * mpmath.mpf(float(w)) for a, w in zip(x, p.weight[:, j], strict=True)]
        terms.append(mpmath.mpf(0 if is_absent(p.bias) else float(p.bias[j])))
        values.append(mpmath.fsum(terms))
        sums.append(float(mpmath.fsum(map(abs, terms))))
    return values, sums


def drawn(rng: np.random.Generator, size_in: int, size_out: int, dtype: str) -> Linear:
    return Linear(rng.normal(size=(size_in, size_out)).astype(dtype), rng.normal(size=size_out).astype(dtype))


# The largest slope of each activation; that of the squared ReLU is 2 x.
SLOPES = {"relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}


@DTYPES
@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("gated", [False, True])
@given(seed=st.integers(0, 2**32))
def test_feed_forward(dtype, name, gated, seed):
    rng, u = np.random.default_rng(seed), UNIT[dtype]
    x = rng.normal(size=(2, 5)).astype(dtype)
    p = FeedForward(drawn(rng, 5, 7, dtype), drawn(rng, 7, 3, dtype), drawn(rng, 5, 7, dtype) if gated else ())
    y = layers.feed_forward(x, p, layers.Options(NP, activation=name))
    with mpmath.workdps(40):
        for given_row, got in zip(x, y, strict=True):
            row = [mpmath.mpf(float(a)) for a in given_row]
            hidden, hidden_sums = exact_linear(row, p.hidden)
            gate, gate_sums = exact_linear(row, p.gate) if gated else (hidden, hidden_sums)
            active = [exact_activation(name, a) for a in gate]
            # Errors: of a product of 5 terms and a bias, carried by the slope; of the activation itself.
            errors = [u * (SLOPES[name] * 6 * s + 6 * abs(float(a))) for s, a in zip(gate_sums, gate, strict=True)]
            if gated:
                terms = zip(errors, hidden, active, hidden_sums, strict=True)
                errors = [e * abs(float(h)) + abs(float(a)) * u * 7 * s for e, h, a, s in terms]
                active = [a * h for a, h in zip(active, hidden, strict=True)]
            exact, sums = exact_linear(active, p.output)
            for j in range(3):
                carried = sum(e * abs(float(w)) for e, w in zip(errors, p.output.weight[:, j], strict=True))
                assert abs(exact[j] - mpmath.mpf(float(got[j]))) <= carried + 8 * u * sums[j]


def test_feed_forward_of_one_layer():
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(2, 5)), FeedForward(drawn(rng, 5, 5, "float64"))
    np.testing.assert_array_equal(
        layers.feed_forward(x, p, layers.Options(NP)), np.maximum(layers.linear(x, p.hidden, NP), 0)
    )


def test_parts_that_are_absent():
    x = np.ones((2, 5))
    assert layers.linear(x, (), NP) is x
    np.testing.assert_array_equal(layers.linear(x, Linear(np.ones((5, 3))), NP), np.full((2, 3), 5.0))
    block = type("Block", (), {"ff": (), "ff_norm": ()})
    assert layers.residual_feed_forward(x, block, layers.Options(NP)) is x


def test_select_takes_away_whatever_is_masked():
    x = np.array([[1.0, 2.0], [np.nan, np.inf], [-np.inf, 5e-324]])
    mask = np.array([True, False, False])
    np.testing.assert_array_equal(layers.select(x, mask, NP), [[1, 2], [0, 0], [0, 0]])
    assert layers.select(x, None, NP) is x
    assert layers.select(np.float32(x), mask, NP).dtype == np.float32
