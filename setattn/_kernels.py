"""What a library computes by a way of its own, as it is faster there, more exact or possible at all."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from setattn._adapters import (
    JAX,
    CuPy,
    Dask,
    NumPy,
    Recorder,
    ThreadedNumPy,
    Torch,
    UnrecordedTorch,
    Written,
    WrittenNumPy,
)
from setattn._erf import Kernels, portable_erf
from setattn._namespace import why_not
from setattn._threads import on_a_thread, run
from setattn._typing import Absent, Array, Namespace

# --- products -------------------------------------------------------------------------------------------------------


def matmul(a: Array, b: Array, xp: Namespace) -> Array:
    """Multiply matrices."""
    if isinstance(xp, UnrecordedTorch) and _suits_onednn(a, b, xp):
        return _linear_on_cpu(a, b, None, xp)
    return _on_threads(a, b, xp) if isinstance(xp, ThreadedNumPy) else xp.matmul(a, b)


def matmul_heads(a: Array, b: Array, xp: Namespace) -> Array:
    """Multiply matrices for each head, ``(..., heads, m, n)`` and ``(..., heads, n, d)`` to ``(..., heads, m, d)``.

    On NumPy the heads of a row lie side by side in memory after it, and need not be copied together.
    """
    if not isinstance(xp, NumPy) or a.shape[-2] == 1 or a.shape[:-2] != b.shape[:-2]:
        return xp.matmul(a, b)
    return xp.matmul_heads(a, b)


def matmul_weights(x: Array, weights: Array, xp: Namespace) -> Array:
    """Multiply the rows of each head by its weights, ``(..., heads, m, d)`` and ``(heads, d, e)``.

    PyTorch copies the weights for each set: there one product for each head takes the rows of all sets.
    """
    *batch, heads, m, d = x.shape
    if not isinstance(xp, Torch):
        return xp.matmul(x, weights)
    if not batch or heads == 1:
        return matmul(x, weights, xp)
    out = xp.matmul(x.movedim(-3, 0).reshape(heads, -1, d), weights)
    return out.reshape(heads, *batch, m, weights.shape[-1]).movedim(0, -3)


def matmul_rows(few: Array, many: Array, xp: Namespace) -> Array:
    """Multiply rows with rows, ``(..., m, d)`` and ``(..., n, d)`` to ``(..., m, n)``.

    OpenBLAS lays the second matrix out anew, and XLA one with a batch that the first has not: it takes less time to
    have the long rows first, and to turn the small result round. So oneDNN can take all sets of a batch at once.
    """
    shared = len(many.shape) > len(few.shape)
    if isinstance(xp, UnrecordedTorch) and shared and _suits_onednn(many, few.mT, xp):
        return _linear_on_cpu(many, few.mT, None, xp).mT.contiguous()
    if isinstance(xp, NumPy | JAX) and _FEW * few.shape[-2] <= few.shape[-1]:
        if isinstance(xp, JAX) and shared:
            return xp.matrix_transpose(xp.matmul(many, xp.matrix_transpose(few)))
        if isinstance(xp, NumPy) and many.shape[-2] * many.shape[-1] >= _LONG_ROWS:
            return xp.ascontiguousarray(xp.matmul(many, few.mT).mT)
    if isinstance(xp, Torch) and not isinstance(xp, UnrecordedTorch) and len(many.shape) == 2:
        return xp.linear(few, many)  # a view less; the other namespace asks first whether oneDNN takes it
    return matmul(few, xp.matrix_transpose(many), xp)


_FEW = 8  # features for each row, from which on rows are few
_LONG_ROWS = 2**16  # numbers, from which on they take longer than one more operation


def transposed_heads(weight: Array, xp: Namespace) -> Array:
    """Turn the weights ``(dim, heads, head_dim)`` of a projection to ``(heads, head_dim, dim)``, to go back through it.

    XLA copies the heads apart. It takes a seventh of the time where it does not turn each of them as well, which its
    products can do without.
    """
    if not isinstance(xp, JAX) or not isinstance(weight, xp.jax.core.Tracer):
        return xp.permute_dims(weight, (1, 2, 0))
    apart = xp.jax.lax.optimization_barrier(xp.permute_dims(weight, (1, 0, 2)))
    return xp.matrix_transpose(apart)


def matmul_add(a: Array, b: Array, c: Array, xp: Namespace) -> Array:
    """Multiply arrays ``(..., n, k)`` by one matrix, and add a row: one operation where a library has one."""
    if isinstance(xp, UnrecordedTorch) and _suits_onednn(a, b, xp):
        return _linear_on_cpu(a, b, c, xp)
    if isinstance(xp, Torch):
        return xp.linear(a, b.mT, c)
    product = _on_threads(a, b, xp) if isinstance(xp, ThreadedNumPy) else xp.matmul(a, b)
    return into("add", product, c, xp)


def _on_threads(a: Array, b: Array, xp: Namespace) -> Array:
    """Multiply by one large matrix on several threads, a part of its columns on each, unless this is one of them.

    How many parts there are does not depend on how many threads.
    """
    columns = b.shape[-1]
    if b.ndim != 2 or a.size * columns < _SPREAD or columns < _COLUMNS or on_a_thread():
        return xp.matmul(a, b)
    out = xp.empty((*a.shape[:-1], columns), dtype=a.dtype, device=None)
    parts = [slice(columns * i // _PARTS, columns * (i + 1) // _PARTS) for i in range(_PARTS)]
    for _ in run(lambda c: xp.matmul(a, b[:, c], out=out[..., c]), parts, xp.threads):
        pass
    return out


_PARTS, _COLUMNS = 4, 256
_SPREAD = 2**24  # multiplications, from which on they take longer than to wake the threads


_LARGE = 2**23  # multiplications, from which on a kernel is worth the time to generate it, once for each shape


def _suits_onednn(a: Array, b: Array, xp: Namespace) -> bool:
    """Say whether oneDNN takes the product of two arrays and pays: where the second is one matrix."""
    n, k = b.shape[-2:]
    if a.numel() * k < _LARGE or xp.linear_on_cpu is None or b.numel() != n * k or not xp.mkldnn.enabled:
        return False
    return a.dim() >= b.dim() and a.dtype == xp.float32 and a.device.type == "cpu" and type(a) is xp.Tensor


def _linear_on_cpu(a: Array, b: Array, c: Array | None, xp: Namespace) -> Array:
    return xp.linear_on_cpu(a, b.reshape(b.shape[-2:]).mT, c, "none", [], "")


# --- in place -------------------------------------------------------------------------------------------------------


_IN_PLACE_OF: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.iadd,
    "subtract": operator.isub,
    "multiply": operator.imul,
    "divide": operator.itruediv,
}


def into(name: str, a: Array, b: Array, xp: Namespace) -> Array:
    """Compute an operation of two arrays in the memory of the first, an intermediate result that is needed no more.

    Only where no library records or traces it. Memory that a large array takes anew costs more than the operation.
    """
    function = getattr(xp, name)
    if isinstance(xp, Written):
        return function(a, b, out=a)
    if isinstance(xp, UnrecordedTorch):
        return _IN_PLACE_OF[name](a, b)
    return xp.in_place(name, a, b) if isinstance(xp, Recorder) else function(a, b)


def exp_into(a: Array, xp: Namespace) -> Array:
    """Compute the exponential function in the same way."""
    if isinstance(xp, Written):
        return xp.exp(a, out=a)
    if isinstance(xp, UnrecordedTorch):
        return a.exp_()
    return xp.in_place("exp", a) if isinstance(xp, Recorder) else xp.exp(a)


def add_product(a: Array, b: Array, c: Array, xp: Namespace) -> Array:
    """Compute ``a + b c`` in the same way: by one operation where a library has one."""
    if isinstance(xp, Torch):
        return a.addcmul_(b, c) if isinstance(xp, UnrecordedTorch) else a.addcmul(b, c)
    return into("add", a, b * c, xp)


# --- rows -----------------------------------------------------------------------------------------------------------


_LONG = 4096  # numbers, beyond which NumPy's sum, in pairs, is more exact than a product


def row_sum(x: Array, xp: Namespace) -> Array:
    """Sum the last axis, and keep it: NumPy's products with ones are faster than its sum, and as exact if not long."""
    n = x.shape[-1]
    if not isinstance(xp, NumPy) or not 0 < n <= _LONG:
        return xp.sum(x, axis=-1, keepdims=True)
    return xp.matmul(x, _ones(n, x.dtype)[:, None])


def row_max(x: Array, xp: Namespace) -> Array:
    """Find the largest number on the last axis, of NaN a NaN, and keep the axis, which must not be empty.

    Where it is not the last one in memory, and that is short, NumPy goes through it row by short row: it takes a third
    of the time to compare one half of the rows with the other, until one is left.
    """
    rows, n = x.shape[-2:]
    # Of one number it would be x itself, which is written over next.
    if n == 1 or rows >= _SHORT or not isinstance(xp, WrittenNumPy) or x.size < _MANY or x.strides[-2] != x.itemsize:
        return xp.max(x, axis=-1, keepdims=True)
    while (n := x.shape[-1]) > 1:
        half, odd = n // 2, n % 2
        rest, x = x[..., n - odd :], np.maximum(x[..., :half], x[..., half : n - odd])
        if odd:
            np.maximum(x[..., :1], rest, out=x[..., :1])
    return x


_SHORT, _MANY = 256, 8192  # numbers in a row, and in all


def row_mean(x: Array, xp: Namespace) -> Array:
    """Average the last axis, and keep it: NumPy's dot product of rows is faster than its mean."""
    if not isinstance(xp, NumPy):
        return xp.mean(x, axis=-1, keepdims=True)
    return xp.vecdot(x, _ones(x.shape[-1], x.dtype))[..., None] / x.shape[-1]


def row_mean_square(x: Array, xp: Namespace) -> Array:
    """Average the squares on the last axis, and keep it."""
    if not isinstance(xp, NumPy):
        return xp.mean(x * x, axis=-1, keepdims=True)
    return xp.vecdot(x, x)[..., None] / x.shape[-1]


@functools.lru_cache(maxsize=64)
def _ones(size: int, dtype: np.dtype[Any]) -> Array:
    ones = np.repeat(dtype.type(1), size)
    ones.flags.writeable = False
    return ones


# --- elements -------------------------------------------------------------------------------------------------------


def at_least(x: Array, limit: float, xp: Namespace) -> Array:
    """Compute ``max(x, limit)``, of NaN a NaN."""
    if isinstance(xp, NumPy):
        return np.maximum(x, x.dtype.type(limit))
    if isinstance(xp, JAX):  # XLA computes a sum twice that is compared and then selected
        return xp.jax.numpy.maximum(x, limit)
    return x.clamp(limit) if isinstance(xp, Torch) else xp.where(x < limit, limit, x)


def layer_norm(y: Array, scale: Array | Absent, bias: Array | Absent, eps: float, xp: Namespace) -> Array | None:
    """Normalise rows by a kernel of the library, if it has one: PyTorch's on a CPU, run eagerly.

    PyTorch's takes the mean off numbers that it has already divided by the deviation, which costs digits where they are
    far from 0: it is for rows from which something like their mean has been subtracted before.
    """
    if not isinstance(xp, Torch) or xp.is_compiling() or y.device.type != "cpu":
        return None
    if eps < xp.finfo(y.dtype).smallest_normal:  # which would be rounded to 0
        return None
    weight, shift = None if isinstance(scale, tuple) else scale, None if isinstance(bias, tuple) else bias
    return xp.layer_norm(y, y.shape[-1:], weight, shift, eps)


def relu(x: Array, xp: Namespace) -> Array:
    """Compute ``max(x, 0)``, of NaN a NaN, of a result that is needed no more.

    NumPy clips in a third of the time that it takes for a maximum with one number, and ``where`` takes longer still.
    """
    if isinstance(xp, Torch):
        return x.relu_() if isinstance(xp, UnrecordedTorch) else x.relu()
    if isinstance(xp, NumPy):
        return x.clip(0, math.inf, x if isinstance(xp, Written) else None)
    return xp.where(x <= 0, 0.0, x)


def erf(x: Array, xp: Namespace) -> Array:
    """Compute the error function: the backend's own, or one of ours where it has none."""
    if isinstance(xp, Torch):
        return x.erf()
    if isinstance(xp, JAX):
        return xp.jax.scipy.special.erf(x)
    if isinstance(xp, CuPy):
        return xp.erf(x)
    return portable_erf(x, xp, _IN_PLACE if isinstance(xp, WrittenNumPy) else None)


def _clamped(x: Array, limit: float) -> Array:
    return x.clip(-limit, limit)  # in a third of the time of a minimum and a maximum with one number


_IN_PLACE = Kernels(
    _clamped,
    lambda a, b: np.multiply(a, b, out=a),
    lambda a, b: np.add(a, b, out=a),
    lambda a: np.tanh(a, out=a),
)


def by_pieces(function: Callable[[Array, Namespace], Array]) -> Callable[[Array, Namespace], Array]:
    """Compute an activation of many passes a piece of a large array at a time, where NumPy makes each pass apart."""

    @functools.wraps(function)
    def pieces(x: Array, xp: Namespace) -> Array:
        if not isinstance(xp, WrittenNumPy) or x.size <= _PIECE or not x.flags.c_contiguous:
            return function(x, xp)
        out = np.empty_like(x)
        numbers, results = x.reshape(-1), out.reshape(-1)
        for start in range(0, x.size, _PIECE):
            part = slice(start, start + _PIECE)
            results[part] = function(numbers[part], xp)
        return out

    return pieces


_PIECE = 2**15  # numbers, of which a handful of arrays stay in the second cache of a core


@by_pieces
def gelu(x: Array, xp: Namespace) -> Array:
    """Compute ``x (1 + erf(x / sqrt(2))) / 2``."""
    if isinstance(xp, Torch):
        return xp.gelu(x)
    return into("multiply", into("add", erf(math.sqrt(0.5) * x, xp), 1.0, xp), 0.5 * x, xp)


# --- attention ------------------------------------------------------------------------------------------------------


_FUSED = 1  # scores of a head in a set from which one kernel for all of it is faster than its steps


def fuses(q: Array, n: int, value_dim: int, xp: Namespace) -> bool:
    """Say whether :func:`fused_attention` takes queries ``(..., heads, rows, width)`` and ``n`` elements, and pays."""
    if not isinstance(xp, UnrecordedTorch) or q.device.type != "cpu" or xp.attention_on_cpu is None:
        return False
    *_, rows, width = q.shape
    return bool(width == value_dim and rows * n >= _FUSED)


def fused_attention(
    q: Array, k: Array, v: Array, mask: Array | None, xp: Namespace
) -> tuple[Array, Array, Array | None]:
    """Return ``softmax(q k^T) v`` and the logarithms of the sums of the exponentials, by PyTorch's kernel.

    They are 0 and ``-inf`` of elements that are all masked by ``mask``, of shape ``(..., n)``. The third result says of
    which rows the kernel does not tell, if there are any: the logarithms that it gives of no scores, of NaN alone and
    of a sum of 1 are all 0.
    """
    rows, (n, width) = q.shape[-2], k.shape[-2:]
    batch = xp.broadcast_shapes(q.shape[:-2], k.shape[:-2])

    def in_four_axes(t: Array, *axes: int) -> Array:
        t = t if t.stride(-1) == 1 else t.contiguous()  # the kernel goes by no other steps in a row
        return t.expand(*batch, *axes).reshape(-1, batch[-1], *axes)

    added = seen = None
    if mask is not None:
        seen = mask.any(-1)[..., None, None, None]
        added = in_four_axes(xp.where(mask, q.new_zeros(()), -math.inf)[..., None, None, :], rows, n)
    q, k, v = in_four_axes(q, rows, width), in_four_axes(k, n, width), in_four_axes(v, n, width)
    out, logs = xp.attention_on_cpu(q, k, v, attn_mask=added, scale=1.0)
    out, logs = out.reshape(*batch, rows, width), logs.reshape(*batch, rows, 1)
    if seen is not None:
        out, logs = xp.where(seen, out, 0.0), xp.where(seen, logs, -math.inf)
    unsure = logs == 0
    return out, logs, unsure if bool(unsure.any()) else None


# --- look-ups and counts --------------------------------------------------------------------------------------------


def rows_of(table: Array, numbers: Array, xp: Namespace) -> Array:
    """Look rows up by number, ``(..., n)`` to ``(..., n, dim)``; a number outside the table has a row of NaN."""
    at = _index(numbers, xp)
    inside = xp.logical_and(at >= 0, at < table.shape[0])
    at = xp.where(inside, at, 0)
    if isinstance(xp, JAX):  # which need not bring together the numbers of all devices to lay them in one row
        rows = xp.take(table, at, axis=0)
    else:
        at = xp.reshape(at, (math.prod(numbers.shape),))
        rows = table.index_select(0, at) if isinstance(xp, Torch) else xp.take(table, at, axis=0)
        rows = xp.reshape(rows, (*numbers.shape, table.shape[1]))
    rows = xp.where(inside[..., None], rows, math.nan)
    # On Dask, in the chunks of the numbers: what follows is then rounded as it is for elements that came as they are.
    return rows.rechunk((*numbers.chunks, -1)) if isinstance(xp, Dask) else rows


def _index(numbers: Array, xp: Namespace) -> Array:
    """Convert to integers with a sign that libraries take for an index: one too large for them becomes negative."""
    if numbers.dtype in (xp.int32, xp.int64):
        return numbers
    small = xp.iinfo(numbers.dtype).bits < 32
    narrow = small or (isinstance(xp, JAX) and bool(why_not("float64", xp)))
    return xp.astype(numbers, xp.int32 if narrow else xp.int64)


def count(mask: Array, xp: Namespace) -> Array:
    """Count the True entries on the last axis, as integers, without a copy of the mask where that can be had."""
    if isinstance(xp, Torch):
        return mask.sum(-1)
    if isinstance(xp, NumPy):
        return xp.count_nonzero(mask, axis=-1)
    return xp.sum(xp.astype(mask, xp.int32), axis=-1, dtype=xp.int32)


def cumulative_count(mask: Array, xp: Namespace) -> Array:
    """Count the True entries on the last axis up to and with each one, in int32."""
    counts = xp.astype(mask, xp.int32)
    # The compatible cumulative_sum asks for the namespace, of which torch.compile warns: see namespace_of.
    if isinstance(xp, Torch):
        return counts.cumsum(-1, dtype=xp.int32)
    if isinstance(xp, Dask):
        counts = counts.rechunk({-1: -1})  # Dask cannot carry a count over a chunk without elements
    return xp.cumulative_sum(counts, axis=-1, dtype=xp.int32)


# --- looks at numbers -----------------------------------------------------------------------------------------------


def surely_within(x: Array, limit: float, xp: Namespace) -> bool:
    """Say whether no number is beyond a limit, where a look at the numbers costs little: eagerly, on a CPU."""
    if isinstance(xp, NumPy):
        look = _squares_within
    elif isinstance(xp, Torch) and not xp.is_compiling() and x.device.type == "cpu":
        look = _ends_within
    else:
        return False
    return xp.look(look, x, limit) if isinstance(xp, Recorder) else look(x, limit)


def _squares_within(x: Array, limit: float) -> bool:
    if x.flags.c_contiguous:  # the sum of squares, a product of BLAS, is faster than both ends
        return bool(np.vdot(x, x) <= limit * limit)
    least, largest = np.minimum.reduce(x, axis=None, initial=0), np.maximum.reduce(x, axis=None, initial=0)
    return bool(largest <= limit and least >= -limit)


def _ends_within(x: Array, limit: float) -> bool:
    try:
        least, largest = (x.detach() if x.requires_grad else x).aminmax()
        return float(largest) <= limit and float(least) >= -limit
    except RuntimeError:  # no numbers, as of an empty set, or none to look at, in torch.func.vmap
        return False


def all_finite(x: Array, xp: Namespace) -> bool:
    """Say whether all numbers are finite; a sum of them, one pass without a copy, says so almost always."""
    with np.errstate(all="ignore"):
        # The sum of squares, a product of BLAS, is the fastest pass there is over NumPy's arrays.
        fast = isinstance(xp, NumPy) and x.dtype in (np.float32, np.float64) and x.flags.c_contiguous
        total = np.vdot(x, x) if fast else xp.sum(x)
        return bool(xp.isfinite(total)) or bool(xp.all(xp.isfinite(x)))


# --- calls ----------------------------------------------------------------------------------------------------------


def ignore_underflow(xp: Namespace) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a vanishing exponential is silent, whatever error state the caller has set."""
    return np.errstate(under="ignore") if isinstance(xp, NumPy) else contextlib.nullcontext()


def without_gradients(xp: Namespace) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch records nothing, and makes arrays that may be used wherever it does."""
    stack = contextlib.ExitStack()
    if isinstance(xp, Torch):
        stack.enter_context(xp.inference_mode(False))
        stack.enter_context(xp.no_grad())
    return stack


def compiled(function: Callable[..., Any], arrays: Sequence[Array], xp: Namespace) -> Callable[..., Any] | None:
    """Return a function of arrays as the compiler of a library makes it, if it has one that takes it as it is.

    A function that is not to be compiled, as it goes by the numbers of its arrays, is a ``TypeError``.
    """
    if not isinstance(xp, JAX):
        return None
    xp.jax.eval_shape(function, *arrays)
    jitted: Callable[..., Any] = xp.jax.jit(function)
    return jitted


def ignoring_underflow(function: Callable[..., Any], xp: Namespace) -> Callable[..., Any]:
    """Return a function that runs in such a context."""
    decorated: Callable[..., Any] = np.errstate(under="ignore")(function) if isinstance(xp, NumPy) else function
    return decorated


def only_checks(call: Callable[[], Array], xp: Namespace) -> None:
    """Make a call for the errors that it raises: JAX computes nothing then, and no operation is left in a trace."""
    if isinstance(xp, JAX):
        xp.jax.eval_shape(call)
    else:
        call()
