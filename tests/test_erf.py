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


def test_powers_are_the_best():
    """The error alternates between its ends as often as a polynomial has coefficients, and once more.

    By de la Vallee Poussin, no polynomial of that degree has an error below the least of those ends.
    """
    degree, end = len(_erf._POWERS) - 1, _erf._END
    with mpmath.workdps(40):
        places = [mpmath.mpf(end) * i / 4000 for i in range(1, 4001)]
        slope = [1 - mpmath.erf(z) ** 2 for z in places]  # of the hyperbolic tangent, by which an error inside counts
        ours = [z * mpmath.fsum(c * z ** (2 * k) for k, c in enumerate(_erf._POWERS)) for z in places]
        inside = [o - mpmath.atanh(mpmath.erf(z)) for o, z in zip(ours, places, strict=True)]
        errors = np.array([float(e * s) for e, s in zip(inside, slope, strict=True)])
    runs = np.split(errors, np.flatnonzero(np.diff(np.sign(errors))) + 1)
    ends = sorted([np.max(np.abs(run)) for run in runs], reverse=True)
    assert ends[0] < 9e-9 < UNIT["float32"] / 10
    assert ends[degree + 1] > 0.95 * ends[0]


def test_beyond_the_end_of_float32_it_is_1():
    """From where the error function rounds to 1 up to the end of the powers it stays there, and so it does beyond."""
    x = np.arange(np.float32(4).view(np.uint32), np.float32(_erf._END).view(np.uint32) + 9, 5, dtype=np.uint32)
    x = np.append(x.view(np.float32), np.float32([5, 1e30, math.inf]))
    y = portable_erf(x, namespace_of(x))
    assert (y <= 1).all()
    assert (y >= 1 - UNIT["float32"]).all()
    assert (y[x >= np.float32(_erf._END)] == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_within_few_units_in_the_last_place_of_1(dtype):
    limit = {"float32": 2, "float64": 4}[dtype] * UNIT[dtype]
    x = grid(dtype)
    y = portable_erf(x, namespace_of(x))
    assert y.dtype == x.dtype
    with mpmath.workdps(40):
        errors = [abs(mpmath.erf(mpmath.mpf(float(a))) - mpmath.mpf(float(b))) for a, b in zip(x, y, strict=True)]
    assert max(errors) <= limit
    # Many more points, against a function that is itself good to one unit in its last place.
    x = np.exp(np.random.default_rng(0).uniform(-20, 1.8, 100_000)).astype(dtype)
    errors = np.abs(portable_erf(x, namespace_of(x)) - np.array([math.erf(a) for a in x]))
    assert limit / 4 < errors.max() <= limit


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
