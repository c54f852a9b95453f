"""Real floating dtypes of 16, 32 and 64 bits come out as they went in; half precision is calculated in float32.

That half results are within half a unit in the last place of what float32 would give is in test_backends.py, as the
bounds of the half dtypes; here is what the dtypes are on the way, which of them are refused, and what extreme but valid
values do.
"""

from __future__ import annotations

import contextlib
import importlib

import cases
import numpy as np
import oracle
import pytest
import tolerances

import setattn

every_block = pytest.mark.parametrize("name", cases.ONE_EACH)
every_case = pytest.mark.parametrize("name", cases.NAMES)

# --- dtypes on the way ----------------------------------------------------------------------------------------------

NO_NUMBERS = {"bool", "int32", "int64"}
ON_THE_WAY = {
    "float64": {"float64"},
    "float32": {"float32"},
    "float16": {"float16", "float32"},
    "bfloat16": {"bfloat16", "float32"},
}


def jax_equations(jaxpr):
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from jax_equations(inner)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("jax", "float64"), ("jax", "float32"), ("jax", "bfloat16"), ("jax-no-x64", "float32")],
    indirect=["backend"],
)
@every_case
def test_jax_widens_nothing(backend, dtype, name):
    """Even with x64 on, no number becomes float64 by the way; half precision is calculated in float32."""
    jax, case = importlib.import_module("jax"), cases.make(name)
    trees = case.trees(backend, dtype)
    program = jax.make_jaxpr(case.call)(*trees)
    assert [str(a.dtype) for a in program.out_avals] == [dtype]
    for equation in jax_equations(program.jaxpr):
        seen = {str(v.aval.dtype) for v in equation.outvars}
        if equation.primitive.name == "dot_general":
            assert seen == {"float64" if dtype == "float64" else "float32"}
        assert seen <= ON_THE_WAY[dtype] | NO_NUMBERS, equation


@pytest.mark.parametrize("backend", ["torch", "torch-default-float64"], indirect=True)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@every_case
def test_torch_widens_nothing(backend, name, dtype):
    """Whatever the default dtype, no number becomes float64 by the way; half precision is calculated in float32."""
    torch, case, seen, products = backend.xp, cases.make(name), set(), set()

    class Record(importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for a in out if isinstance(out, tuple | list) else (out,):
                if isinstance(a, torch.Tensor):
                    name = str(a.dtype).removeprefix("torch.")
                    (products if "mm" in str(function) else seen).add(name)
            return out

    trees = case.trees(backend, dtype)
    with Record():
        case.call(*trees)
    assert seen <= ON_THE_WAY[dtype] | NO_NUMBERS
    assert products <= {"float64" if dtype == "float64" else "float32"}
    assert products or case.params is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@every_block
def test_half_is_float32_rounded_once(name, dtype):
    """In half precision the result is that of float32 on the same numbers, rounded at the end."""
    case = cases.make(name).rounded("float16")
    wide = case.numpy("float32")
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(case.numpy(dtype), wide.astype(dtype))


# --- refused dtypes -------------------------------------------------------------------------------------------------

REFUSED = ("complex64", "complex128", "int8", "int32", "int64", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")


def wrong_dtypes(backend):
    """The dtypes of a backend that no block takes: all but real floating ones of 16, 32 and 64 bits."""
    found = [backend.dtype(d) if d == "bool" else getattr(backend.xp, d, None) for d in REFUSED]
    if backend.module in ("numpy", "dask.array"):
        found += [np.dtype(d) for d in REFUSED[:6]] + [np.dtype(object), np.dtype("datetime64[s]")]
        found += [np.dtype(np.longdouble)] if np.finfo(np.longdouble).bits > 64 else []
        # NumPy takes these names once ml_dtypes is there, but calculates with them in ways of its own.
        with contextlib.suppress(ImportError):
            extra = importlib.import_module("ml_dtypes")
            found += [np.dtype(getattr(extra, d)) for d in ("bfloat16", "float8_e4m3fn", "float4_e2m1fn")]
    return [d for d in found if d is not None]


def cast(backend, a, dtype):
    """Convert an array, from a namespace that calls what it can convert to by its own names."""
    if backend.module == "torch":
        return a.to(dtype)
    if backend.module == "array_api_strict":
        return backend.xp.astype(a, dtype) if "complex" not in str(dtype) else backend.xp.asarray(a, dtype=dtype)
    return a.astype(dtype)


@every_block
def test_other_dtypes_are_refused(backend, name):
    """Complex, integer and boolean numbers are refused, and so are floating ones too long or too short."""
    case = cases.make(name)
    arrays, params, masks = case.trees(backend, "float32")
    masks = {key: m for key, m in masks.items() if key not in ("bias", "key_positions")}
    for dtype in wrong_dtypes(backend):
        try:
            wrong = tuple(cast(backend, a, dtype) for a in arrays)
        except (TypeError, ValueError):
            if backend.device in ("no_float64", "no_x64"):
                continue  # the device lacks the dtype
            raise
        with backend.lazily(), pytest.raises(setattn.DTypeError, match="real floating") as caught:
            case.call(wrong, params, masks)
        assert caught.value.got == dtype


# --- extreme values -------------------------------------------------------------------------------------------------

# Blocks that normalise everything they attend to, so that scores stay small whatever comes in.
NORMED = (
    "mab-pre-norm",
    "isab-pre-norm",
    "attention_pool-norms",
    "cross_attention",
    "latent_transformer",
    "perceiver",
    "perceiver_io",
    "perceiver_resampler",
    "perceiver_resampler-idefics2",
    "gated_cross_attention-all",
)
RESIDUAL = ("isab-pre-norm", "latent_transformer")  # whose elements are also added to the result
LARGE = {"float64": 1e40, "float32": 1e30}
TINY = {"float64": 1e-310, "float32": 1e-42}


def scaled(case, factor):
    """Multiply the arrays, but not the parameters."""
    return cases.replace(case, arrays=tuple(a * factor for a in case.arrays))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@every_case
def test_no_floating_point_error(name, dtype):
    """Nothing overflows, divides by zero, is invalid or underflows as far as a caller who asks can see."""
    case = cases.make(name).rounded(dtype)
    with np.errstate(all="raise"):
        case.numpy(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("what", ["large scores", "subnormal", "zero", "constant rows", "equal rows"])
@every_case
def test_no_floating_point_error_in_extreme_values(name, what, dtype):
    """Neither do scores that leave one element all the weight, numbers near 0, and rows without any variance."""
    case = cases.make(name).rounded(dtype)
    change = {
        "large scores": lambda a: a * 1e3,
        "subnormal": lambda a: a * TINY[dtype],
        "zero": np.zeros_like,
        "constant rows": lambda a: np.broadcast_to(a[..., :1], a.shape),
        "equal rows": lambda a: np.broadcast_to(a[..., :1, :], a.shape),
    }[what]
    case = cases.replace(case, arrays=tuple(cases.round_to(change(a), dtype) for a in case.arrays))
    with np.errstate(all="raise"):
        out = case.numpy(dtype)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NORMED)
def test_large_rows_through_norms(name, dtype):
    """Rows whose squares overflow are normalised like any others, without a warning."""
    case = scaled(cases.make(name).rounded(dtype), LARGE[dtype]).rounded(dtype)
    value, bound = cases.reference(case, dtype)
    with np.errstate(all="raise"):
        out = case.numpy(dtype)
    tolerances.assert_close(out, value, bound, f"{case.function} {dtype} large")


@pytest.mark.parametrize(("dtype", "low", "high"), [("float64", 2.0**130, 2.0**1000), ("float32", 2.0**40, 2.0**100)])
@pytest.mark.parametrize("name", sorted(set(NORMED) - set(RESIDUAL)))
def test_norms_keep_powers_of_two(name, dtype, low, high):
    """Once ``eps`` is lost in the variance, no power of two on the elements changes a bit."""
    case = cases.make(name).rounded(dtype)

    def times(factor):
        arrays = tuple(a * factor if i == case.elements else a for i, a in enumerate(case.arrays))
        with np.errstate(all="raise"):
            return cases.replace(case, arrays=arrays).numpy(dtype)

    np.testing.assert_array_equal(times(low), times(high))


@pytest.mark.parametrize("name", ["mab-pre-norm"])
def test_large_rows_on_every_backend(backend, name):
    """Nor does any other backend make an infinity of them."""
    case = scaled(cases.make(name).rounded("float32"), LARGE["float32"]).rounded("float32")
    value, bound = cases.reference(case, "float32")
    tolerances.assert_close(backend.numpy(case.on(backend, "float32")), value, bound, f"{case.function} large")


def test_half_precision_scores_beyond_its_range():
    """Scores that float16 could not hold are no infinities: 300 * 300 * 8 is calculated in float32."""
    ones = oracle.map_tree(lambda a: np.full(a.shape, 1.0), setattn.init_attention(8, num_heads=1, rng=0))
    params = ones._replace(query=(), output=(), key=ones.key._replace(weight=np.eye(8)[:, None, :], bias=()))
    params = params._replace(value=params.key)
    x = np.full((3, 8), 300.0)
    x[1] = -300.0
    out = cases.Case("attention", (x, x), params).numpy("float16")
    np.testing.assert_array_equal(out, x)
