"""The error function in the operations of the standard, for namespaces that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from setattn._typing import Array, Namespace


class Kernels(NamedTuple):
    """How a library computes, one pass each, what may be written over the first argument."""

    clamp: Callable[[Array, float], Array]  # to -limit ... limit, but for the first argument, which stays as it is
    multiply: Callable[[Array, Any], Array]
    add: Callable[[Array, Any], Array]
    tanh: Callable[[Array], Array]


# Powers of z**2 in the polynomial P of degree 9 for which tanh(z P(z**2)) is nearest to erf(z): it is off by 9e-9. From
# the end on, that is 1 in float32. tests/test_erf.py shows that no other one is nearer.
_END = 4.4
_POWERS = (
    1.128379250607448,
    0.10277134419149059,
    -0.0002041345967662895,
    -0.0005985630613769885,
    7.14435677549269e-05,
    5.654513188937906e-07,
    -1.1339092965404541e-06,
    1.3843697903148936e-07,
    -7.420080936849283e-09,
    1.539030422241526e-10,
)

# Chebyshev coefficients, in s = 2t - 1, of log(erfc(z)) + z**2 - log(t) with t = 2 / (2 + z) and z >= 0. They
# leave a relative error of 1e-16 in erfc. tests/test_erf.py computes them anew with mpmath.
_COEFFICIENTS = (
    -0.65132685989085472,
    0.64196979235649026,
    0.019476473204185836,
    -0.0095615147868086316,
    -0.00094659534448203687,
    0.00036683949785276145,
    4.2523324806907772e-05,
    -2.0278578112534243e-05,
    -1.6242900046470255e-06,
    1.3036558355805232e-06,
    1.5626441722066143e-08,
    -8.5238095914926543e-08,
    6.5290544390988515e-09,
    5.0593434955514689e-09,
    -9.9136415649303309e-10,
    -2.2736512229318359e-10,
    9.6467911020155268e-11,
    2.3940380830391147e-12,
    -6.8860275264975534e-12,
    8.9448792730907257e-13,
    3.1309213993429581e-13,
    -1.1270822361367252e-13,
    3.8109052551892321e-16,
    7.1060976136092370e-15,
    -1.5230282014571043e-15,
    -9.4574945712912340e-17,
)
_LARGEST = 6.0  # erf(6) is 1 in float64; beyond it the square could overflow


def portable_erf(x: Array, xp: Namespace, kernels: Kernels | None = None) -> Array:
    """Compute the error function, to 2 units in the last place of 1 in float32 and to 4 in float64."""
    if xp.finfo(x.dtype).bits == 64:
        return _double(x, xp)
    return _single(x, kernels or _of_the_standard(xp))


def _of_the_standard(xp: Namespace) -> Kernels:
    return Kernels(lambda a, limit: _clamp(a, limit, xp), lambda a, b: a * b, lambda a, b: a + b, xp.tanh)


def _clamp(x: Array, limit: float, xp: Namespace) -> Array:
    return xp.where(x > limit, limit, xp.where(x < -limit, -limit, x))


def _single(x: Array, k: Kernels) -> Array:
    """Compute the hyperbolic tangent of a polynomial, which takes fewer passes than a polynomial alone."""
    z = k.clamp(x, _END)
    square = z * z
    y = k.add(square * _POWERS[-1], _POWERS[-2])
    for power in _POWERS[-3::-1]:
        y = k.add(k.multiply(y, square), power)
    return k.tanh(k.multiply(y, z))


def _double(x: Array, xp: Namespace) -> Array:
    z = xp.where(x < 0, -x, x)
    z = xp.where(z > _LARGEST, _LARGEST, z)
    t = 2.0 / (2.0 + z)
    s = 2.0 * t - 1.0
    # Clenshaw's recurrence
    older, newer = 0.0 * s, 0.0 * s + _COEFFICIENTS[-1]
    for c in _COEFFICIENTS[-2:0:-1]:
        older, newer = newer, 2.0 * s * newer - older + c
    erfc = t * xp.exp(s * newer - older + _COEFFICIENTS[0] - z * z)
    return xp.where(x < 0, erfc - 1.0, 1.0 - erfc)
