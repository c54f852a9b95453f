"""The tolerances themselves: what they refuse, what they let pass, and how near honest programs come to them."""

import math

import numpy as np
import oracle
import pytest
import tolerances
from test_oracle import ACTIVATIONS, Draw, cases
from tolerances import product

FAST = ("linear", "norm", "feed_forward", "attention", "attention_weights", "mab", "sab", "isab", "latent_transformer")


@pytest.fixture(autouse=True)
def _ratios_stay_out_of_the_report(monkeypatch):
    monkeypatch.setattr(tolerances, "_RATIOS", {})


class Float32:
    """The equations once more as a plain float32 program, to calibrate with; two-pass, and quotients at the end."""

    def __init__(self, activation, eps, dtype=np.float32):
        self.activation, self.eps, self.dtype = activation, dtype(eps), dtype

    def linear(self, x, p):
        weight = p.weight if x.shape[-1] == p.weight.shape[0] else p.weight.reshape(x.shape[-1], -1)
        y = product(x, weight.reshape(x.shape[-1], -1)).reshape(*x.shape[:-1], *weight.shape[1:])
        return y if oracle.absent(p.bias) else y + p.bias

    def norm(self, x, p):
        if oracle.absent(p):
            return x
        layer = type(p).__name__ == "LayerNorm"
        if layer:
            x = x - x[..., :1]
            x = x - x.mean(axis=-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)
        y = y if oracle.absent(p.scale) else y * p.scale
        return y + p.bias if layer and not oracle.absent(p.bias) else y

    def act(self, x):
        one = self.dtype(1)
        if self.activation in ("relu", "squared_relu"):
            return np.maximum(x, 0) ** (2 if self.activation == "squared_relu" else 1)
        if self.activation == "gelu":
            erf = np.vectorize(math.erf, otypes=[self.dtype])(x / self.dtype(math.sqrt(2)))
            return self.dtype(0.5) * x * (one + erf)
        if self.activation == "gelu_tanh":
            z = self.dtype(math.sqrt(2 / math.pi)) * (x + self.dtype(0.044715) * x * x * x)
            return self.dtype(0.5) * x * (one + np.tanh(z))
        return x / (one + np.exp(-x))

    def feed_forward(self, x, p):
        h = self.linear(x, p.hidden)
        h = self.act(h) if oracle.absent(p.gate) else self.act(self.linear(x, p.gate)) * h
        return h if oracle.absent(p.output) else self.linear(h, p.output)

    def scores(self, x, y, p, mask, pair_mask, bias, scale):
        k = self.norm(self.linear(y, p.key), p.key_norm)
        q = x.reshape(*x.shape[:-1], -1, k.shape[-1]) if oracle.absent(p.query) else self.linear(x, p.query)
        q = self.norm(q, p.query_norm) * self.dtype(k.shape[-1] ** -0.5 if scale is None else scale)
        q, k = np.swapaxes(q, -2, -3), np.swapaxes(k, -2, -3)
        k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
        s = product(q, np.swapaxes(k, -1, -2))
        seen = np.ones(s.shape, dtype=bool)
        seen = seen if mask is None else seen & mask[..., None, None, :]
        seen = seen if pair_mask is None else seen & pair_mask[..., None, :, :]
        s = s if bias is None else s + bias[..., None, None, :]
        top = np.where(seen, s, -np.inf).max(axis=-1, keepdims=True)
        w = np.where(seen, np.exp(np.where(seen, s - np.where(np.isfinite(top), top, 0), 0)), 0).astype(self.dtype)
        total = w.sum(axis=-1, keepdims=True) * np.isfinite(top)
        return w * np.isfinite(top), np.where(total == 0, self.dtype(1), total)

    def attention_weights(self, x, y, p, mask=None, pair_mask=None, bias=None, scale=None):
        w, total = self.scores(x, y, p, mask, pair_mask, bias, scale)
        return w / total

    def attention(self, x, y, p, mask=None, pair_mask=None, bias=None, scale=None):
        w, total = self.scores(x, y, p, mask, pair_mask, bias, scale)
        v = np.swapaxes(self.linear(y, p.value), -2, -3)
        o = np.swapaxes(product(w, np.repeat(v, w.shape[-3] // v.shape[-3], axis=-3)) / total, -2, -3)
        o = o.reshape(*o.shape[:-2], -1)
        return o if oracle.absent(p.output) else self.linear(o, p.output)

    def add_feed_forward(self, x, norm, p):
        return x if oracle.absent(p) else x + self.feed_forward(self.norm(x, norm), p)

    def mab(self, x, y, p, mask=None, query_mask=None, pair_mask=None, query_residual=True):
        x = x if oracle.absent(p.project) else self.linear(x, p.project)
        a = self.attention(self.norm(x, p.query_norm), self.norm(y, p.context_norm), p.attention, mask, pair_mask)
        h = self.norm(x + a if query_residual else a, p.attention_norm)
        out = self.norm(self.add_feed_forward(h, p.ff_norm, p.ff), p.output_norm)
        return out if query_mask is None else np.where(query_mask[..., None], out, 0)

    def sab(self, x, p, mask=None):
        return self.mab(x, x, p, mask, mask)

    def isab(self, x, p, mask=None, query_residual=True):
        h = self.mab(p.inducing_points, x, p.mab_inducing, mask, query_residual=query_residual)
        return self.mab(x, h, p.mab_set, query_mask=mask, query_residual=query_residual)

    def latent_transformer(self, z, layers):
        for p in layers:
            n = self.norm(z, p.norm)
            z = self.add_feed_forward(z + self.attention(n, n, p.attention), p.ff_norm, p.ff)
        return z


def in_dtype(dtype, arrays, params, options):
    params = oracle.map_tree(lambda a: a.astype(dtype), params)
    options = {k: v.astype(dtype) if k in oracle.NUMBERS else v for k, v in options.items()}
    return [a.astype(dtype) for a in arrays], params, options


def inputs(rng, x):
    """Ordinary numbers, and those whose roundings are anything but independent."""
    yield x
    yield 10 * x
    yield np.round(x)
    yield x[..., :1, :] + 0 * x
    yield np.full(x.shape, x.reshape(-1)[0])
    yield x + 1000
    yield x * 10.0 ** rng.integers(-3, 3, size=x.shape)


@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_calibration(kind, dtype):
    rng = np.random.default_rng(7)
    every = [case for case in cases(Draw(6, kind)) if case[0] in FAST]
    for i, (name, arrays, params, options) in enumerate(every):
        for j, x in enumerate(inputs(rng, arrays[0])):
            if dtype is np.float64 and (i + j) % 4:
                continue  # fifty digits take their time
            activation = ACTIVATIONS[(i + j) % 5]
            given, p, rest = in_dtype(dtype, [x, *arrays[1:]], params, options)
            value, bound = tolerances.reference(
                name, *given, params=p, dtype=dtype, activation=activation, eps=1e-5, **rest
            )
            with np.errstate(over="ignore"):
                actual = getattr(Float32(activation, 1e-5, dtype), name)(*given, p, **rest)
            assert actual.dtype == dtype
            tolerances.assert_close(actual, value, bound, name)
    for name in FAST:
        if (kind, name) != ("none", "norm"):
            tolerances.tight(name)


@pytest.mark.parametrize("scale", [1, 3, 10])
@pytest.mark.parametrize("hard", [False, True])
def test_attention_bound_holds_and_is_tight(scale, hard):
    rng = np.random.default_rng(8)
    for d in (1, 4, 16, 64):
        for n in (1, 2, 7, 64, 300):
            q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((5, d), (n, d), (n, 6)))
            visible = rng.random((5, n)) < 0.9
            bound = tolerances.attention_bound(
                q, k, v, scale=scale / d**0.5, visible=visible, dtype="float32", hard=hard
            )
            s = np.where(visible, product(q * np.float32(scale / d**0.5), k.T), -np.inf)
            top = np.where(visible.any(axis=1, keepdims=True), s.max(axis=1, keepdims=True), 0)
            w = np.exp(s - top)
            actual = product(w, v) / np.maximum(w.sum(axis=1, keepdims=True), np.float32(1e-30))
            assert actual.dtype == np.float32
            exact = np.where(visible, product(scale / d**0.5 * q.astype(float), k.T.astype(float)), -np.inf)
            w = np.exp(exact - np.where(visible.any(axis=1, keepdims=True), exact.max(axis=1, keepdims=True), 0))
            value = product(w, v.astype(float)) / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)
            tolerances.assert_close(actual, value, bound, "attention_bound")
    tolerances.tight("attention_bound")


def test_the_analysis_agrees_with_the_formula_on_attention():
    # Without projections both describe one thing; they may differ by what their constants do, not by an order.
    rng = np.random.default_rng(9)
    q, k, v = (rng.normal(size=s) for s in ((5, 8), (30, 8), (30, 6)))
    engine = tolerances.ErrorAnalysis(2.0**-24, 2.0**-126)
    out = engine.attend(*map(engine.lift, (q, k, v)), np.ones((5, 30), dtype=bool), None)
    formula = tolerances.attention_bound(q, k, v, dtype="float32")
    ratio = tolerances.SIGMAS * out.sigma * 2.0**-24 / formula
    assert ratio.min() > 0.1
    assert ratio.max() < 3
    ratio = out.h * 2.0**-24 / tolerances.attention_bound(q, k, v, dtype="float32", hard=True)
    assert ratio.min() > 0.3
    assert ratio.max() < 2


def test_the_value_of_the_analysis_is_the_oracles():
    for i, (name, arrays, params, options) in enumerate(cases(Draw(10))):
        options = {"activation": ACTIVATIONS[i % 5], "eps": 1e-5, **options}
        value, sharp, hard = tolerances.bounds(name, *arrays, params=params, dtype="float32", **options)
        np.testing.assert_allclose(
            value, oracle.evaluate(name, *arrays, params=params, **options), rtol=1e-9, atol=1e-12
        )
        assert (sharp >= 0).all()
        assert (sharp <= hard).all()
        assert np.isfinite(sharp).all()
        again = tolerances.bounds(name, *arrays, params=params, dtype="float32", **options)
        np.testing.assert_array_equal(sharp, again[1])


def test_every_tolerance_refuses_eight_times_itself():
    for i, (name, arrays, params, options) in enumerate(cases(Draw(11))):
        options = {"activation": ACTIVATIONS[i % 5], "eps": 1e-5, **options}
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            value, bound = tolerances.reference(name, *arrays, params=params, dtype=dtype, exact=False, **options)
            tolerances.assert_sensitive(value, bound, name)
            # What is refused must be small against the numbers: a few digits of the type at most are given away.
            digits = {"float16": 2.0**-8, "bfloat16": 2.0**-5}.get(dtype, 2.0**13 * tolerances.unit_roundoff(dtype))
            assert np.median(bound) <= digits * np.abs(value).max(), (name, dtype)
    assert tolerances.worst_ratios() == {}


def test_exact_results_have_no_tolerance():
    d = Draw(12)
    x, mask = d.array(2, 5, 6), d.mask(2, 5)
    mask[1] = False
    options = {"mask": mask, "activation": "gelu", "eps": 1e-5, "dtype": "float32"}
    value, bound = tolerances.reference("sab", x, params=d.mab(6, 6, 4), **options)
    np.testing.assert_array_equal(bound[~mask], 0)
    np.testing.assert_array_equal(value[~mask], 0)
    with pytest.raises(AssertionError, match="beyond the bound"):
        tolerances.assert_close(np.where(mask[..., None], value, 1e-45), value, bound, "sab")
    p = d.attention(6, 6)
    weights, bound = tolerances.reference("attention_weights", x, x, params=p, mask=mask, dtype="float32")
    unseen = np.broadcast_to(~mask[:, None, None, :], weights.shape)
    np.testing.assert_array_equal(bound[unseen], 0)


def test_half_precision_is_half_a_unit_in_the_last_place():
    values = np.array([1.0, 1.5, 1 / 3, 1000.0, 6e-8, 1e-5])
    step = np.spacing(values.astype(np.float16)).astype(float) / 2
    np.testing.assert_array_equal(tolerances.half_rounding(values, np.float16), step)
    np.testing.assert_array_equal(tolerances.half_rounding([0.0], np.float16), [0])
    np.testing.assert_array_equal(tolerances.half_rounding([1.0, 3.0, 1e-40], "bfloat16"), [2**-8, 2**-7, 2.0**-134])
    np.testing.assert_array_equal(tolerances.half_rounding([1.0], "float32"), [0])
    d = Draw(13)
    x = d.array(4, 6).astype(np.float16)
    p = oracle.map_tree(lambda a: a.astype(np.float16), d.layer(6))
    options = {"params": (p,), "activation": "gelu", "eps": 1e-5}
    value, bound = tolerances.reference("latent_transformer", x, dtype=x.dtype, **options)
    tolerances.assert_close(value.astype(np.float16), value, bound, "half")
    assert tolerances.worst_ratios()["half"] > 0.8
    wide = oracle.map_tree(lambda a: a.astype(np.float32), p)
    actual = Float32("gelu", 1e-5).latent_transformer(x.astype(np.float32), (wide,)).astype(np.float16)
    tolerances.assert_close(actual, value, bound, "half")


def test_dtypes_of_other_libraries_are_known():
    torch = pytest.importorskip("torch")
    assert tolerances.dtype_name(torch.bfloat16) == "bfloat16"
    assert tolerances.dtype_name(np.float32) == tolerances.dtype_name(np.dtype("f4")) == "float32"
    with pytest.raises(TypeError):
        tolerances.dtype_name(np.int64)
    value = torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True)
    tolerances.assert_close(value, np.array([1.5]), 0.0, "torch")


def test_assert_close_refuses_nan_and_wrong_shapes():
    one, bad = np.ones(2), np.array([1.0, np.nan])
    close = tolerances.assert_close
    for actual, value, bound in ((bad, one, 1.0), (one, bad, 1.0), (bad, bad, 1.0), (one, one, bad)):
        with pytest.raises(AssertionError, match="NaN"):
            close(actual, value, bound, "nan")
    declared = np.array([False, True])
    close(bad, bad, 1.0, "nan", nan=declared)
    for actual, value in ((bad, one), (one, bad), (one, one)):
        with pytest.raises(AssertionError, match="NaN"):
            close(actual, value, 1.0, "nan", nan=declared)
    with pytest.raises(AssertionError, match="shape"):
        close(np.ones((2, 1)), one, 1.0, "shape")
    infinite = np.array([1.0, np.inf])
    close(infinite, infinite, 1.0, "inf")
    for actual, value in ((infinite, one), (one, infinite), (-infinite, infinite)):
        with pytest.raises(AssertionError):
            close(actual, value, 1.0, "inf")
    close(np.ones((0, 3)), np.ones((0, 3)), 1.0, "empty")


def test_ratios_are_recorded():
    tolerances.assert_close([1.5], np.array([1.0]), 1.0, "a")
    tolerances.assert_close([1.25], np.array([1.0]), 1.0, "a")
    tolerances.assert_close([1.001], np.array([1.0]), 1.0, "b")
    assert tolerances.worst_ratios() == {"a": 0.5, "b": pytest.approx(0.001)}
    tolerances.tight("a")
    with pytest.raises(AssertionError, match="only"):
        tolerances.tight("b")
    assert "loose" not in tolerances.report()[0]
    assert "loose" in tolerances.report()[1]
    with pytest.raises(AssertionError, match="beyond"):
        tolerances.assert_close([3.0], np.array([1.0]), 1.0, "a")
    assert tolerances.worst_ratios()["a"] == 2.0


def test_gradient_of_known_functions():
    x = np.array([[0.3, -1.2], [2.0, 40.0]])
    for function, slope in (
        (lambda a: np.sin(a).sum(), np.cos),
        (lambda a: np.exp(-a * a).sum(), lambda a: -2 * a * np.exp(-a * a)),
        (lambda a: (a**3).sum(), lambda a: 3 * a * a),
    ):
        value, tolerance = tolerances.gradient(function, x)
        tolerances.assert_close(value, slope(x), tolerance, "gradient")
        tolerances.assert_sensitive(slope(x), tolerance, "gradient")
        size = max(1.0, abs(function(x)), np.abs(slope(x)).max())
        assert (tolerance <= 1e-7 * size).all()
    # A slope that is off by a factor of 1 + 1e-6 is found.
    value, tolerance = tolerances.gradient(lambda a: np.sin(a).sum(), x)
    with pytest.raises(AssertionError):
        tolerances.assert_close(value, np.cos(x) * (1 + 1e-6), tolerance, "gradient")


def test_gradient_of_a_block():
    d = Draw(14)
    p = d.layer(4)

    def loss(x):
        return oracle.evaluate("latent_transformer", x, params=(p,), activation="gelu", eps=1e-5).sum()

    x = d.array(3, 4)
    value, tolerance = tolerances.gradient(loss, x)
    assert (tolerance <= 1e-6 * np.abs(value).max()).all()
    direction = d.array(3, 4)
    # The derivative along a direction is the same thing calculated another way.
    along, more = tolerances.gradient(lambda t: loss(x + t[0] * direction), np.zeros(1))
    tolerances.assert_close(along, [(value * direction).sum()], more + (tolerance * np.abs(direction)).sum(), "along")
