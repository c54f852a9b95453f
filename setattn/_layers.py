"""The row-wise layers: affine map, norms, activations, feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from setattn import _check as check
from setattn._adapters import to_compute_in
from setattn._blocks import Plan, spreads
from setattn._call import Call, widen
from setattn._kernels import (
    by_pieces,
    gelu,
    into,
    layer_norm,
    matmul,
    matmul_add,
    relu,
    row_mean,
    row_mean_square,
    surely_within,
)
from setattn._namespace import bits_of
from setattn._params import FeedForward, LayerNorm, LengthScale, Linear, RMSNorm, is_absent
from setattn._typing import Absent, Array, Namespace

AnyNorm: TypeAlias = LayerNorm | RMSNorm | Absent
NORMS = (LayerNorm, RMSNorm)


class Options(NamedTuple):
    """What shapes cannot say, and the namespace to compute in."""

    xp: Namespace
    activation: str = "relu"
    eps: float = 1e-5
    scale: float | None = None
    plan: Plan = Plan()
    half: bool = False
    eager: bool = True  # whether how an array lies in memory is ours to choose, not a compiler's
    lazy: bool = False  # whether the data are lazy arrays, to be computed chunk by chunk in the namespace of these
    attend: Callable[..., Array] | None = None  # stands in for attention, of whose context only a part is at hand
    function: str = ""  # the public one, for errors that are found in a task


def options(
    call: Call,
    *data: Array,
    activation: str = "relu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Options:
    """Check the options that most functions take; where the data of a call are small, it takes one thread."""
    check.choice(call.function, "activation", activation, ACTIVATIONS)
    eps = check.number(call, "eps", eps, positive=True)
    scale = None if scale is None else check.number(call, "scale", scale, positive=False)
    lazy = call.chunks is not None
    xp = call.chunks if lazy else call.xp
    given = check.plan(call, plan)
    if given.threads > 1 and data and not spreads(given, xp, *data):
        given = given._replace(threads=1)
    xp = to_compute_in(xp, given.threads if data else 1)
    return Options(xp, activation, eps, scale, given, call.half, call.eager, lazy, function=call.function)


def select(x: Array, mask: Array | None, xp: Namespace) -> Array:
    """Put zeros in the place of the elements that do not take part, whatever their values are."""
    return x if mask is None else xp.where(mask[..., None], x, 0.0)


def enter(x: Array, mask: Array | None, o: Options) -> Array:
    """Take data in: select what takes part, and widen half precision."""
    x = x if mask is None else select(x, mask, o.xp)
    return widen(x, o.xp) if o.half else x


def linear(x: Array, p: Linear | Absent, xp: Namespace) -> Array:
    """Compute ``x @ weight + bias``, or ``x`` itself where the map is absent."""
    if not isinstance(p, Linear):
        return x
    return matmul(x, p.weight, xp) if isinstance(p.bias, tuple) else matmul_add(x, p.weight, p.bias, xp)


def affine(x: Array, p: Linear | Absent, o: Options) -> Array:
    """Compute the same in the namespace of the options."""
    return linear(x, p, o.xp)


def norm(x: Array, p: AnyNorm, o: Options) -> Array:
    """Normalise the last axis with the kind of norm that ``p`` is."""
    if not isinstance(p, NORMS):
        return x
    xp, threshold, factor = o.xp, *((2.0**400, 2.0**-700) if bits_of(x.dtype, o.xp) == 64 else (2.0**50, 2.0**-80))
    done = overflows = None
    if surely_within(x, threshold, xp):
        y, eps, shrink = x, o.eps, 1.0
    else:
        # A power of two for each row keeps its squares from overflowing.
        overflows = xp.max(xp.abs(x), axis=-1, keepdims=True) > threshold
        shrink = xp.where(overflows, factor, xp.ones_like(x[..., :1]))
        y, eps = x * shrink, o.eps * shrink * shrink
    if isinstance(p, LayerNorm):
        # Taken from the first feature, a constant row is exactly 0 and a common offset costs no digits.
        y = y - y[..., :1]
        done = layer_norm(y, p.scale, p.bias, o.eps, xp)
        if done is not None and overflows is None:
            return done
        y = into("subtract", y, row_mean(y, xp), xp)
    power = row_mean_square(y, xp) + eps
    if overflows is not None or o.eps < _SMALLEST:  # eps may vanish beside its scale, and a constant row is 0
        power = xp.where(power == 0, 1.0, power)
    root = xp.sqrt(power)
    # Without a mean to subtract, a small feature beside a large one keeps its digits if it was never scaled.
    y = into("divide", y, root, xp) if isinstance(p, LayerNorm) else x / (root / shrink)
    if not is_absent(p.scale):
        y = into("multiply", y, p.scale, xp)
    if isinstance(p, LayerNorm) and not is_absent(p.bias):
        y = into("add", y, p.bias, xp)
    return y if done is None else xp.where(overflows, y, done)  # no row depends on which others there are


_SMALLEST = 2.0**-126  # of the normal numbers of float32


def _squared_relu(x: Array, xp: Namespace) -> Array:
    x = relu(x, xp)
    return x * x


@by_pieces
def _gelu_tanh(x: Array, xp: Namespace) -> Array:
    z = xp.where(x > 10.0, 10.0, xp.where(x < -10.0, -10.0, x))  # beyond, tanh is 1 and the cube could overflow
    return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


@by_pieces
def _silu(x: Array, xp: Namespace) -> Array:
    e = xp.exp(xp.where(x < 0, x, -x))
    return x * xp.where(x < 0, e, 1.0) / (1.0 + e)


_ACTIVATIONS: dict[str, Callable[[Array, Namespace], Array]] = {
    "relu": relu,
    "squared_relu": _squared_relu,
    "gelu": gelu,
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


def scale_by_length(q: Array, log_n: Array, p: LengthScale, o: Options) -> Array:
    """Scale queries ``(..., heads, m, head_dim)``, where ``(..., 1 or m, 1, 1)`` is the logarithm of a length."""
    xp, heads = o.xp, q.shape[-3]
    # Each logarithm has a product of its own, so that its factors do not depend on how many others there are.
    base = linear(log_n, p.base, xp) if isinstance(p.base, Linear) else feed_forward(log_n, p.base, o)
    *batch, rows, _, width = base.shape
    base = xp.reshape(base[..., 0, :], (*batch, rows, heads, width // heads))
    last = len(batch)
    scaled = q * xp.permute_dims(base, (*range(last), last + 1, last, last + 2))
    return scaled * (1.0 + xp.tanh(feed_forward(q, p.query, o))) if isinstance(p.query, FeedForward) else scaled


def residual_feed_forward(x: Array, p: Any, o: Options) -> Array:
    """Compute ``x + ff(ff_norm(x))`` with the two parts of a block, or ``x`` where it has no ``ff``."""
    if not isinstance(p.ff, FeedForward):
        return x
    return into("add", normed_feed_forward(x, p.ff_norm, p.ff, o), x, o.xp)


def normed_feed_forward(x: Array, p: AnyNorm, ff: FeedForward, o: Options) -> Array:
    """Compute ``ff(norm(x))``."""
    if not isinstance(p, NORMS):
        return feed_forward(x, ff, o)
    p, (hidden, gate) = folded(p, (ff.hidden, ff.gate), x.shape[-2], o.xp)
    return feed_forward(norm(x, p, o), ff._replace(hidden=hidden, gate=gate), o)


def folded(p: AnyNorm, maps: tuple[Linear | Absent, ...], rows: int, xp: Namespace) -> tuple[AnyNorm, tuple[Any, ...]]:
    """Move the scale and bias of a norm into the maps that follow it, where the rows of a set are more than columns.

    ``(y * scale + bias) @ weight`` is ``y @ (scale * weight) + bias @ weight``.
    """
    if not isinstance(p, NORMS) or is_absent(p.scale) or not folds(maps, rows):
        return p, maps
    bias = p.bias if isinstance(p, LayerNorm) else ()
    return type(p)(), tuple(_absorb(m, p.scale, bias, xp) if isinstance(m, Linear) else m for m in maps)


def folds(maps: tuple[Linear | Absent, ...], rows: int) -> bool:
    """Say whether there are maps to move a norm into, and that pays."""
    columns = [math.prod(m.weight.shape[1:]) for m in maps if isinstance(m, Linear)]
    return bool(columns) and _pays(rows, sum(columns))


def _pays(rows: int, columns: int) -> bool:
    """Say whether two operations for each row are more than a few for each column."""
    return rows >= columns


def _absorb(p: Linear, scale: Array, bias: Array, xp: Namespace) -> Linear:
    dim, *out = p.weight.shape
    weight = p.weight * xp.reshape(scale, (dim, *[1] * len(out)))
    if is_absent(bias):
        return Linear(weight, p.bias)
    shift = matmul(xp.reshape(bias, (1, dim)), xp.reshape(p.weight, (dim, math.prod(out))), xp)
    shift = xp.reshape(shift, tuple(out))
    return Linear(weight, shift if is_absent(p.bias) else shift + p.bias)
