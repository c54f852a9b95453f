"""The row-wise layers: affine map, norms, activations, feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from setattn import _check as check
from setattn._call import Call
from setattn._namespace import erf, matmul
from setattn._params import FeedForward, LayerNorm, Linear, RMSNorm, is_absent
from setattn._typing import Absent, Array, Namespace


class Options(NamedTuple):
    """What shapes cannot say, and the namespace to compute in."""

    xp: Namespace
    activation: str = "relu"
    eps: float = 1e-5
    scale: float | None = None


def options(call: Call, *, activation: str = "relu", eps: float = 1e-5, scale: float | None = None) -> Options:
    """Check the options that most functions take."""
    check.choice(call.function, "activation", activation, ACTIVATIONS)
    eps = check.number(call, "eps", eps, positive=True)
    scale = None if scale is None else check.number(call, "scale", scale, positive=False)
    return Options(call.xp, activation, eps, scale)


def select(x: Array, mask: Array | None, xp: Namespace) -> Array:
    """Put zeros in the place of the elements that do not take part, whatever their values are."""
    return x if mask is None else xp.where(mask[..., None], x, 0.0)


def linear(x: Array, p: Linear | Absent, xp: Namespace) -> Array:
    """Compute ``x @ weight + bias``, or ``x`` itself where the map is absent."""
    if not isinstance(p, Linear):
        return x
    y = matmul(x, p.weight, xp)
    return y if is_absent(p.bias) else y + p.bias


def norm(x: Array, p: LayerNorm | RMSNorm | Absent, o: Options) -> Array:
    """Normalise the last axis with the kind of norm that ``p`` is."""
    if not isinstance(p, LayerNorm | RMSNorm):
        return x
    xp = o.xp
    factor = _prescale(x, xp)
    y = x * factor
    if isinstance(p, LayerNorm):
        # Taken from the first feature, a constant row is exactly 0 and a common offset costs no digits.
        y = y - y[..., :1]
        y = y - xp.mean(y, axis=-1, keepdims=True)
    power = xp.mean(y * y, axis=-1, keepdims=True) + o.eps * factor * factor
    root = xp.sqrt(xp.where(power == 0, 1.0, power))  # the scaled eps may vanish, and a constant row is 0
    # Without a mean to subtract, a small feature beside a large one keeps its digits if it was never scaled.
    y = y / root if isinstance(p, LayerNorm) else x / (root / factor)
    if not is_absent(p.scale):
        y = y * p.scale
    if isinstance(p, LayerNorm) and not is_absent(p.bias):
        y = y + p.bias
    return y


def _prescale(x: Array, xp: Namespace) -> Array:
    """Return a power of two for each row that keeps its squares from overflowing; 1 for nearly all rows."""
    threshold, factor = (2.0**400, 2.0**-700) if xp.finfo(x.dtype).bits == 64 else (2.0**50, 2.0**-80)
    overflows = xp.any(xp.abs(x) > threshold, axis=-1, keepdims=True)
    return xp.where(overflows, factor, xp.ones_like(x[..., :1]))


def _relu(x: Array, xp: Namespace) -> Array:
    return xp.where(x <= 0, 0.0, x)  # a NaN stays one


def _squared_relu(x: Array, xp: Namespace) -> Array:
    x = _relu(x, xp)
    return x * x


def _gelu(x: Array, xp: Namespace) -> Array:
    return 0.5 * x * (1.0 + erf(math.sqrt(0.5) * x, xp))


def _gelu_tanh(x: Array, xp: Namespace) -> Array:
    z = xp.where(x > 10.0, 10.0, xp.where(x < -10.0, -10.0, x))  # beyond, tanh is 1 and the cube could overflow
    return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


def _silu(x: Array, xp: Namespace) -> Array:
    e = xp.exp(xp.where(x < 0, x, -x))
    return x * xp.where(x < 0, e, 1.0) / (1.0 + e)


_ACTIVATIONS: dict[str, Callable[[Array, Namespace], Array]] = {
    "relu": _relu,
    "squared_relu": _squared_relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}

ACTIVATIONS = tuple(_ACTIVATIONS)


def feed_forward(x: Array, p: FeedForward, o: Options) -> Array:
    """Compute ``output(activation(hidden(x)))``, gated where ``p`` has a gate."""
    xp, activation = o.xp, _ACTIVATIONS[o.activation]
    hidden = linear(x, p.hidden, xp)
    gated = isinstance(p.gate, Linear)
    hidden = activation(linear(x, p.gate, xp), xp) * hidden if gated else activation(hidden, xp)
    return linear(hidden, p.output, xp)


def residual_feed_forward(x: Array, p: Any, o: Options) -> Array:
    """Compute ``x + ff(ff_norm(x))`` with the two parts of a block, or ``x`` where it has no ``ff``."""
    return x if is_absent(p.ff) else x + feed_forward(norm(x, p.ff_norm, o), p.ff, o)
