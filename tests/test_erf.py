"""The error function of our own: where its coefficients come from, and how exact it is."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from backends import BACKENDS

from setattn import _erf
from setattn._erf import portable_erf
from setattn._namespace import namespace_of

UNIT = {"float32": 2.0**-23, "float64": 2.0**-52}  # in the last place of 1
EDGES = [
    0.0,
    -0.0,
    1e-300,
    5e-324,
    1e-38,
    1e-45,
    0.5,
    1.0,
    2.0,
    5.9,
    6.0,
    6.1,
    27.0,
    1e4,
    1e30,
    3.4e38,
    1e300,
    math.inf,
]


def grid(dtype: str) -> np.ndarray:
    edges = [x for x in EDGES if x == math.inf or x <= float(np.finfo(dtype).max)]
    half = np.concatenate([np.linspace(0, 6.5, 1301), np.geomspace(1e-30, 6, 400), edges]).astype(dtype)
    return np.concatenate([half, -half])


def transformed(s: mpmath.mpf) -> mpmath.mpf:
    """Compute ``log(erfc(z)) + z**2 - log(t)`` at ``s = 2 t - 1``, ``t = 2 / (2 + z)``."""
    t = (s + 1) / 2
    z = 2 / t - 2
    return mpmath.log(mpmath.erfc(z)) + z**2 - mpmath.log(t)


def test_coefficients():
    """They are those of the Chebyshev interpolant at 64 nodes, rounded to float64."""
    with mpmath.workdps(50):
        n = 64
        angles = [mpmath.pi * (j + mpmath.mpf(1) / 2) / n for j in range(n)]
        values = [transformed(mpmath.cos(angle)) for angle in angles]
        for k, ours in enumerate(_erf._COEFFICIENTS):
            terms = [value * mpmath.cos(k * angle) for value, angle in zip(values, angles, strict=True)]
            exact = (2 if k else 1) * mpmath.fsum(terms) / n
            assert abs(exact - ours) <= 1e-17 + abs(exact) * 2.0**-52, k


def over_z(w: mpmath.mpf) -> mpmath.mpf:
    """Compute ``erf(z) / z`` at ``w = 2 (z / end)**2 - 1``."""
    z = mpmath.mpf(_erf._END) * mpmath.sqrt((w + 1) / 2)
    return mpmath.erf(z) / z


def test_powers():
    """They are those of the Chebyshev interpolant at 64 nodes, cut off where what is left is below the rounding."""
    with mpmath.workdps(50):
        n, degree = 64, len(_erf._POWERS) - 1
        angles = [mpmath.pi * (j + mpmath.mpf(1) / 2) / n for j in range(n)]
        values = [over_z(mpmath.cos(angle)) for angle in angles]
        chebyshev = [
            (2 if k else 1) * mpmath.fsum(v * mpmath.cos(k * a) for v, a in zip(values, angles, strict=True)) / n
            for k in range(n)
        ]
        powers = [mpmath.mpf(0)] * (degree + 1)
        for k in range(degree + 1):
            # The coefficients of the polynomial cos(k arccos(w)).
            for i in range(k // 2 + 1):
                sign = (-1) ** i * mpmath.binomial(k - i, i) * mpmath.mpf(2) ** (k - 2 * i)
                powers[k - 2 * i] += chebyshev[k] * (sign * k / (2 * (k - i)) if k else 1)
        for exact, ours in zip(powers, _erf._POWERS, strict=True):
            assert abs(exact - ours) <= abs(exact) * 2.0**-52
        assert _erf._END * sum(map(abs, chebyshev[degree + 1 :])) < UNIT["float32"] / 5


def test_the_end_of_float32_is_the_first_1():
    """Where the powers first give 1, no number below has more, and from there on the result is 1 without a look."""
    end = np.float32(_erf._ONE_IN_FLOAT32)
    assert float(end) == _erf._ONE_IN_FLOAT32
    below = np.arange(np.float32(3).view(np.uint32), end.view(np.uint32), dtype=np.uint32).view(np.float32)
    assert portable_erf(below, namespace_of(below)).max() < 1
    at = np.array([end, np.nextafter(end, np.float32(4))])
    np.testing.assert_array_equal(portable_erf(at, namespace_of(at)), np.float32([1, 1]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_within_4_units_in_the_last_place_of_1(dtype):
    x = grid(dtype)
    y = portable_erf(x, namespace_of(x))
    assert y.dtype == x.dtype
    with mpmath.workdps(40):
        errors = [abs(mpmath.erf(mpmath.mpf(float(a))) - mpmath.mpf(float(b))) for a, b in zip(x, y, strict=True)]
    assert max(errors) <= 4 * UNIT[dtype]
    # Many more points, against a function that is itself good to one unit in its last place.
    x = np.exp(np.random.default_rng(0).uniform(-20, 1.8, 100_000)).astype(dtype)
    errors = np.abs(portable_erf(x, namespace_of(x)) - np.array([math.erf(a) for a in x]))
    assert errors.max() <= 4 * UNIT[dtype]
    assert errors.max() > UNIT[dtype]


def test_on_every_backend(backend):
    dtype = "float64" if "float64" in backend.dtypes else "float32"
    x = grid(dtype)[::7]
    there = backend.asarray(x, dtype)
    out = portable_erf(there, namespace_of(there))
    assert out.dtype == there.dtype
    exact = np.array([math.erf(a) for a in x])
    assert np.max(np.abs(backend.numpy(out).astype(np.float64) - exact)) <= 5 * UNIT[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_limits_symmetry_and_range(dtype):
    x = grid(dtype)
    xp = namespace_of(x)
    with np.errstate(all="raise", under="ignore"):
        y = portable_erf(x, xp)
    assert (np.abs(y) <= 1).all()
    assert (y[np.abs(x) > 6] == np.sign(x[np.abs(x) > 6])).all()
    nonzero = x != 0
    np.testing.assert_array_equal(portable_erf(-x[nonzero], xp), -y[nonzero])
    assert (np.abs(y[~nonzero]) <= (2 * UNIT[dtype] if dtype == "float64" else 0)).all()
    assert np.isnan(portable_erf(np.array([np.nan], dtype), xp)).all()


def test_gradient_of_torch():
    torch = pytest.importorskip("torch")
    x = torch.tensor(
        [0.0, -0.0, 0.5, -0.5, 3.0, -7.0, 1e30, math.inf, -math.inf], dtype=torch.float64, requires_grad=True
    )
    portable_erf(x, namespace_of(x)).sum().backward()
    exact = 2 / math.sqrt(math.pi) * np.exp(-(np.minimum(np.abs(x.detach().numpy()), 1e9) ** 2))
    exact[np.abs(x.detach().numpy()) > 6] = 0
    np.testing.assert_allclose(x.grad.numpy(), exact, rtol=1e-13, atol=1e-15)


def test_own_functions_of_the_backends_agree():
    from setattn._kernels import erf

    for name in ("torch", "jax", "cupy"):
        if BACKENDS[name].missing() is None:
            x = BACKENDS[name].asarray(grid("float64"), "float64")
            theirs, ours = erf(x, namespace_of(x)), portable_erf(x, namespace_of(x))
            difference = np.abs(BACKENDS[name].numpy(theirs) - BACKENDS[name].numpy(ours))
            assert difference.max() <= 8 * UNIT["float64"]
