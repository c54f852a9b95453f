"""Namespaces, dtypes, devices and ``erf``: the only file that knows a backend by name."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from setattn._erf import Kernels, portable_erf
from setattn._typing import Absent, Array, Namespace, Shape

_namespaces: dict[type, Namespace] = {}


def namespace_of(x: Any) -> Namespace | None:
    """Return the array-API namespace of an array, or ``None`` for anything that is no plain array."""
    kind = type(x)
    # A look-up by type costs a tenth of array_namespace. And torch.compile warns of the caches of array_api_compat's
    # functions that tell arrays, namespaces and devices apart: none of them may be reached from a call on its tensors.
    if kind not in _namespaces:
        if isinstance(x, np.matrix | np.ma.MaskedArray | np.generic):  # here, as NumPy imports its masked arrays for it
            return None
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(x, torch.Tensor):
            import array_api_compat.torch as namespace

            _namespaces[kind] = namespace
            return namespace
        try:
            namespace = array_api_compat.array_namespace(x)
        except TypeError:
            return None
        _namespaces[kind] = _dask(namespace) if name_of(namespace) == "dask" else namespace
    return _namespaces[kind]


class _Dask:
    """Dask's namespace, but for two functions that fail where an array, or one chunk of it, has no elements."""

    def __init__(self, module: Namespace) -> None:
        self._module = module
        self.__name__ = module.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def reshape(self, x: Array, shape: Shape) -> Array:
        if 0 not in shape:
            return self._module.reshape(x, shape)
        # Chunked as the elements would be: rounding, which depends on chunks, is then that of a set all masked.
        chunks = [own if old == new else -1 for own, old, new in zip(x.chunks, x.shape, shape, strict=False)]
        return self._module.zeros(shape, dtype=x.dtype, chunks=(*chunks, *[-1] * (len(shape) - len(chunks))))

    def max(self, x: Array, *, axis: int, keepdims: bool) -> Array:
        largest = functools.partial(np.max, initial=-math.inf)
        reduction = sys.modules["dask.array"].reduction
        return reduction(x, chunk=largest, aggregate=largest, axis=axis, keepdims=keepdims, dtype=x.dtype)


_dask = functools.cache(_Dask)


def name_of(xp: Namespace) -> str:
    """Return the name a user knows a namespace by, such as ``numpy`` or ``torch``."""
    name: str = xp.__name__
    return _NAMES.get(name, name)


_NAMES = {
    "array_api_compat.numpy": "numpy",
    "array_api_compat.cupy": "cupy",
    "array_api_compat.torch": "torch",
    "array_api_compat.dask.array": "dask",
    "dask.array": "dask",
    "jax.numpy": "jax",
}


def normalize_namespace(xp: Namespace) -> Namespace | None:
    """Return the array-API namespace behind a module such as ``torch``, or ``None`` for another object."""
    try:
        return namespace_of(xp.zeros(1))
    except (AttributeError, TypeError):
        return None


def bits_of(dtype: Any, xp: Namespace) -> int:
    """Return the width of a real floating dtype, or 0 for any other."""
    try:
        if not xp.isdtype(dtype, "real floating"):
            return 0
        bits: int = xp.finfo(dtype).bits
    except (AttributeError, TypeError, ValueError):
        return 0
    return bits


def why_not(dtype: str, xp: Namespace) -> str:
    """Say why a library cannot hold a dtype of this name; nothing if it can."""
    if not hasattr(xp, dtype):
        return f"{name_of(xp)} has no {dtype}"
    if name_of(xp) == "jax" and dtype == "float64" and not sys.modules["jax"].config.jax_enable_x64:
        return "jax has float64 only with jax_enable_x64"
    return ""


def widest_float(x: Array, xp: Namespace) -> Any:
    """Return float64 where the device of ``x`` has it, and else the dtype of ``x``."""
    if x.dtype == xp.float64 or why_not("float64", xp):
        return x.dtype
    try:
        xp.zeros((1,), dtype=xp.float64, device=creation_device(x, xp))
    except (TypeError, ValueError, RuntimeError):
        return x.dtype
    return xp.float64


def native(dtype: Any) -> Any:
    """Return a dtype in the byte order of the machine: another one is a matter of storage, not a type of its own."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def is_boolean(dtype: Any, xp: Namespace) -> bool:
    """Say whether a dtype is the boolean one."""
    return bool(dtype == xp.bool)


def is_integral(dtype: Any, xp: Namespace) -> bool:
    """Say whether a dtype is one of integers, with a sign or without."""
    try:
        return bool(xp.isdtype(dtype, "integral"))
    except (AttributeError, TypeError, ValueError):
        return False


def device_of(x: Array, xp: Namespace) -> Any:
    """Return what two arrays must agree on to meet without a transfer, or ``None`` where it cannot be known.

    JAX itself moves an array that was not put anywhere, and has no devices inside a trace. A Dask array has no device
    of its own.
    """
    if name_of(xp) == "jax":
        try:
            return ", ".join(sorted(map(str, x.devices()))) if x.committed else None
        except (AttributeError, TypeError, sys.modules["jax"].errors.ConcretizationTypeError):
            return None
    if name_of(xp) == "dask":
        return None
    return None if name_of(xp) == "numpy" else x.device


def unlike_others(x: Array, xp: Namespace) -> tuple[str, str] | None:
    """Say what an array is and what it should be, where it is of a kind that the rest of its library does not take."""
    name = name_of(xp)
    if name == "torch":
        if x.is_nested:
            return "a nested tensor", "a tensor padded by to_padded_tensor(), with a mask"
        if x.layout != xp.strided:
            return f"a tensor of layout {x.layout}", "a dense tensor, as to_dense() makes it"
    if name == "dask":
        kind = type(x._meta)
        if namespace_of_chunks(x, xp) is None:
            got = f"an array of dask with chunks of {kind.__qualname__}"
            return got, "one whose chunks are plain arrays of numpy or cupy"
    return None


def namespace_of_chunks(x: Array, xp: Namespace) -> Namespace | None:
    """Return the namespace of the chunks of a Dask array, if they are plain arrays; ``None`` for every other array."""
    if name_of(xp) != "dask":
        return None
    held = namespace_of(x._meta)
    return held if held is not None and name_of(held) in ("numpy", "cupy") else None


def in_one_chunk(x: Array, xp: Namespace) -> Array:
    """Return a Dask array of one chunk, of such an array or of one in memory."""
    return x.rechunk(-1) if namespace_of(x) is xp else xp.from_array(x, chunks=-1, asarray=False)


def creation_device(x: Array, xp: Namespace) -> Any:
    """Return the device to create an array on that will meet ``x``; JAX and Dask place it themselves."""
    if name_of(xp) in ("jax", "dask"):
        return None
    return x.device


def ignore_underflow(xp: Namespace) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a vanishing exponential is silent, whatever error state the caller has set."""
    return np.errstate(under="ignore") if name_of(xp) == "numpy" else contextlib.nullcontext()


def all_finite(x: Array, xp: Namespace) -> bool:
    """Say whether all numbers are finite; a sum of them, one pass without a copy, says so almost always."""
    with np.errstate(all="ignore"):
        # The sum of squares, a product of BLAS, is the fastest pass there is over NumPy's arrays.
        fast = name_of(xp) == "numpy" and x.dtype in (np.float32, np.float64) and x.flags.c_contiguous
        total = np.vdot(x, x) if fast else xp.sum(x)
        return bool(xp.isfinite(total)) or bool(xp.all(xp.isfinite(x)))


def matmul(a: Array, b: Array, xp: Namespace) -> Array:
    """Multiply matrices, without asking NumPy for the floating-point flags.

    OpenBLAS raises some of them for lanes that it pads a small matrix with and then discards: they depend on what the
    memory held before, and say nothing of the product.
    """
    if name_of(xp) != "numpy":
        return xp.matmul(a, b)
    with np.errstate(all="ignore"):
        return xp.matmul(a, b)


_CACHE, _CACHES, _GPU_MEMORY = 4 * 2**20, 12 * 2**20, 256 * 2**20


def block_bytes(x: Array, xp: Namespace) -> int | None:
    """Return how much memory a block of ``x`` may take, or ``None`` where blocks do not suit.

    On a CPU, what a core's share of the caches holds, or, where each operation is spread over the cores, their shares
    together; on a GPU, enough for a kernel to be busy with. A loop that is traced becomes as many copies of its body,
    and Dask has blocks of its own.
    """
    name = name_of(xp)
    if name == "dask":
        return None
    if name == "jax":
        jax = sys.modules["jax"]
        return None if isinstance(x, jax.core.Tracer) else _GPU_MEMORY if jax.default_backend() != "cpu" else _CACHE
    if name == "torch":
        return None if xp.compiler.is_compiling() else _CACHES if x.device.type == "cpu" else _GPU_MEMORY
    return _GPU_MEMORY if name == "cupy" else _CACHE


class Span(NamedTuple):
    """A part of an axis that begins where a loop has got to."""

    start: Array
    size: int


def part_of(a: Array, axis: int, cut: slice | Span) -> Array:
    """Take a part of an axis."""
    if isinstance(cut, Span):
        return sys.modules["jax"].lax.dynamic_slice_in_dim(a, cut.start, cut.size, axis)
    return a[(slice(None),) * axis + (cut, ...) if axis >= 0 else (..., cut) + (slice(None),) * (-1 - axis)]


def loop_bytes(x: Array, xp: Namespace) -> int | None:
    """Return how much memory a block of ``x`` may take in a loop that is traced once, or ``None`` where there is none.

    Inside ``jax.jit`` on a CPU. Elsewhere what has been traced would be compiled anew in every call.
    """
    if name_of(xp) != "jax":
        return None
    jax = sys.modules["jax"]
    compiled = isinstance(x, jax.interpreters.partial_eval.DynamicJaxprTracer) and jax.default_backend() == "cpu"
    return _CACHE if compiled else None


def repeat(function: Callable[[Array], Array], starts: range, xp: Namespace) -> Array:
    """Lay ``function(start)`` for all starts along a new first axis, by a loop that is traced once."""
    places = xp.arange(starts.start, starts.stop, starts.step, dtype=xp.int32, device=None)
    return sys.modules["jax"].lax.map(function, places)


def has_own_threads(xp: Namespace) -> bool:
    """Say whether a library spreads each operation over threads by itself."""
    return name_of(xp) != "numpy"


def room(part: Array, axis: int, length: int, xp: Namespace) -> Array | None:
    """Return an array to write parts like this one into, or ``None`` where arrays are not written to.

    PyTorch records every write where it records gradients.
    """
    name = name_of(xp)
    if name == "torch" and xp.is_grad_enabled():
        return None
    shape = list(part.shape)
    shape[axis] = length
    if name == "torch":
        return part.new_empty(shape)
    return xp.empty(tuple(shape), dtype=part.dtype, device=part.device) if name in ("numpy", "cupy") else None


def put(out: Array, axis: int, cut: slice, part: Array) -> None:
    """Write a part into an array that :func:`room` made."""
    out[(slice(None),) * axis + (cut, ...) if axis >= 0 else (..., cut) + (slice(None),) * (-1 - axis)] = part


def like_rows(t: Array, x: Array, xp: Namespace) -> Array:
    """Give ``t`` the chunks of the rows of ``x``, where there are chunks.

    The products before went by another order of products, which leaves other chunks behind, and with them another
    rounding of what follows.
    """
    return t.rechunk({len(t.shape) - 2: x.chunks[-2]}) if name_of(xp) == "dask" else t


def surely_within(x: Array, limit: float, xp: Namespace) -> bool:
    """Say whether no number is beyond a limit, where a look at the numbers costs little: eagerly, on a CPU."""
    name = name_of(xp)
    if name == "numpy" and x.flags.c_contiguous:
        with np.errstate(all="ignore"):  # the sum of squares, a product of BLAS, is faster than both ends
            return x.size > 0 and bool(np.vdot(x, x) <= limit * limit)
    if name == "numpy":
        return x.size > 0 and bool(x.max() <= limit and x.min() >= -limit)
    if name != "torch" or xp.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return False
    try:
        least, largest = (float(end) for end in x.detach().aminmax())
    except RuntimeError:  # torch.func.vmap and tensors without numbers have none to look at
        return False
    return largest <= limit and least >= -limit


_IN_PLACE_OF: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.iadd,
    "subtract": operator.isub,
    "multiply": operator.imul,
    "divide": operator.itruediv,
}


def into(name: str, a: Array, b: Array, xp: Namespace) -> Array:
    """Compute an operation of two arrays in the memory of the first, an intermediate result that is needed no more.

    Only where nothing is recorded or traced. Memory that a large array takes anew costs more than the operation.
    """
    function = getattr(xp, name)
    if name_of(xp) in ("numpy", "cupy"):
        return function(a, b, out=a)
    if _writes(xp):
        with contextlib.suppress(RuntimeError):  # of torch.func.vmap, where b has an axis that a has not
            return _IN_PLACE_OF[name](a, b)
    return function(a, b)


def exp_into(a: Array, xp: Namespace) -> Array:
    """Compute the exponential function in the same way."""
    if name_of(xp) in ("numpy", "cupy"):
        return xp.exp(a, out=a)
    return a.exp_() if _writes(xp) else xp.exp(a)


def _writes(xp: Namespace) -> bool:
    """Say whether PyTorch, if it is the library, neither records nor traces what is done."""
    return name_of(xp) == "torch" and not xp.compiler.is_compiling() and not xp.is_grad_enabled()


def row_mean(x: Array, xp: Namespace) -> Array:
    """Average the last axis, and keep it: NumPy's dot product of rows is faster than its mean."""
    if name_of(xp) != "numpy":
        return xp.mean(x, axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        return xp.vecdot(x, xp.ones(x.shape[-1], dtype=x.dtype, device=x.device))[..., None] / x.shape[-1]


def row_mean_square(x: Array, xp: Namespace) -> Array:
    """Average the squares on the last axis, and keep it."""
    if name_of(xp) != "numpy":
        return xp.mean(x * x, axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        return xp.vecdot(x, x)[..., None] / x.shape[-1]


_LONG = 4096  # numbers that NumPy adds up in pairs


def row_sum(x: Array, xp: Namespace) -> Array:
    """Sum the last axis, and keep it: NumPy's products with ones are faster than its sum, and as exact if not long."""
    n = x.shape[-1]
    if name_of(xp) != "numpy" or not 0 < n <= _LONG:
        return xp.sum(x, axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        if x.strides[-1] == x.itemsize:
            return np.vecdot(x, xp.ones(n, dtype=x.dtype, device=x.device))[..., None]
        ones = xp.ones((1, n), dtype=x.dtype, device=x.device)
        return np.matrix_transpose(np.matmul(ones, np.matrix_transpose(x)))


def layer_norm(y: Array, scale: Array | Absent, bias: Array | Absent, eps: float, xp: Namespace) -> Array | None:
    """Normalise rows by a kernel of the library, if it has one: PyTorch's on a CPU, run eagerly.

    PyTorch's takes the mean off numbers that it has already divided by the deviation, which costs digits where they are
    far from 0: it is for rows from which something like their mean has been subtracted before.
    """
    if name_of(xp) != "torch" or xp.compiler.is_compiling() or y.device.type != "cpu":
        return None
    if eps < xp.finfo(y.dtype).smallest_normal:  # which would be rounded to 0
        return None
    weight, shift = (None if isinstance(a, tuple) else a for a in (scale, bias))
    return sys.modules["torch"].nn.functional.layer_norm(y, y.shape[-1:], weight, shift, eps)


def relu(x: Array, xp: Namespace) -> Array:
    """Compute ``max(x, 0)``, of NaN a NaN, of a result that is needed no more; ``where`` takes several times longer."""
    if name_of(xp) == "torch":
        return x.relu_() if _writes(xp) else x.relu()
    return np.maximum(x, x.dtype.type(0), out=x) if name_of(xp) == "numpy" else xp.where(x <= 0, 0.0, x)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    """Copy an array of any namespace and device to NumPy; dtypes NumPy lacks become float32."""
    xp: Namespace = namespace_of(x)
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu().resolve_conj()
        return np.asarray(x.float() if x.dtype == xp.bfloat16 else x)
    if array_api_compat.is_cupy_array(x):
        return np.asarray(x.get())
    if array_api_compat.is_jax_array(x) and x.dtype == xp.bfloat16:
        x = x.astype(xp.float32)
    if array_api_compat.is_numpy_array(x) or array_api_compat.is_jax_array(x) or array_api_compat.is_dask_array(x):
        return np.asarray(x)
    return np.from_dlpack(x)


def same_bits(a: Array, b: Array) -> bool:
    """Say whether two arrays of one shape and dtype hold the same numbers, bit by bit."""
    return to_numpy(a).tobytes() == to_numpy(b).tobytes()


def store(out: Any, axis: int, cut: slice, part: Array) -> None:
    """Write a part into an array of any kind that slices can be assigned to, such as one on disk."""
    put(out, axis, cut, part if namespace_of(out) is namespace_of(part) else to_numpy(part))


def memory_order(x: Array) -> tuple[int, ...]:
    """Return the axes of an array from the longest steps in memory to the shortest, where it is then contiguous."""
    host = to_numpy(x)
    order = tuple(sorted(range(host.ndim), key=lambda axis: -host.strides[axis]))
    return order if host.transpose(order).flags.c_contiguous else tuple(range(host.ndim))


def convert_array(x: Array, xp: Namespace, device: Any, dtype: Any) -> Array:
    """Return an array in another namespace, on another device, in another dtype, as far as they are given."""
    source: Namespace = namespace_of(x)
    if source is xp:
        x = x if device is None else array_api_compat.to_device(x, device)
        return x if dtype is None or x.dtype == dtype else xp.astype(x, dtype)
    host = to_numpy(x)
    if name_of(xp) == "torch":  # which would share the memory, and takes neither all strides nor all byte orders
        host = np.array(host, dtype=native(host.dtype), order="C")
    if dtype is None:
        dtype = getattr(xp, native(host.dtype).name)
    return xp.asarray(host, dtype=dtype, device=device)


def rows_of(table: Array, numbers: Array, xp: Namespace) -> Array:
    """Look rows up by number, ``(..., n)`` to ``(..., n, dim)``; a number outside the table has a row of NaN."""
    at = _index(numbers, xp)
    inside = xp.logical_and(at >= 0, at < table.shape[0])
    at = xp.reshape(xp.where(inside, at, 0), (math.prod(numbers.shape),))
    rows = table.index_select(0, at) if name_of(xp) == "torch" else xp.take(table, at, axis=0)
    rows = xp.where(inside[..., None], xp.reshape(rows, (*numbers.shape, table.shape[1])), math.nan)
    # On Dask, in the chunks of the numbers: what follows is then rounded as it is for elements that came as they are.
    return rows.rechunk((*numbers.chunks, -1)) if name_of(xp) == "dask" else rows


def _index(numbers: Array, xp: Namespace) -> Array:
    """Convert to integers with a sign that libraries take for an index: one too large for them becomes negative."""
    if numbers.dtype in (xp.int32, xp.int64):
        return numbers
    small = xp.iinfo(numbers.dtype).bits < 32
    narrow = small or (name_of(xp) == "jax" and bool(why_not("float64", xp)))
    return xp.astype(numbers, xp.int32 if narrow else xp.int64)


def count(mask: Array, xp: Namespace) -> Array:
    """Count the True entries on the last axis, as integers, without a copy of the mask where that can be had."""
    name = name_of(xp)
    if name == "torch":
        return mask.sum(-1)
    if name == "numpy":
        return np.count_nonzero(mask, axis=-1)
    return xp.sum(xp.astype(mask, xp.int32), axis=-1, dtype=xp.int32)


def cumulative_count(mask: Array, xp: Namespace) -> Array:
    """Count the True entries on the last axis up to and with each one, in int32."""
    counts = xp.astype(mask, xp.int32)
    # The compatible cumulative_sum asks for the namespace, of which torch.compile warns: see namespace_of.
    if name_of(xp) == "torch":
        return counts.cumsum(-1, dtype=xp.int32)
    if name_of(xp) == "dask":
        counts = counts.rechunk({-1: -1})  # Dask cannot carry a count over a chunk without elements
    return xp.cumulative_sum(counts, axis=-1, dtype=xp.int32)


def erf(x: Array, xp: Namespace) -> Array:
    """Compute the error function: the backend's own, or one of ours where it has none."""
    if name_of(xp) == "torch":
        return x.erf()
    if name_of(xp) == "jax":
        return sys.modules["jax"].scipy.special.erf(x)
    if name_of(xp) == "cupy":
        from cupyx.scipy.special import erf as cupy_erf

        return cupy_erf(x)
    if name_of(xp) == "numpy":
        return portable_erf(x, xp, _IN_PLACE)
    return portable_erf(x, xp)


def gelu(x: Array, xp: Namespace) -> Array:
    """Compute ``x (1 + erf(x / sqrt(2))) / 2``."""
    if name_of(xp) == "torch":
        return sys.modules["torch"].nn.functional.gelu(x)
    return into("multiply", into("add", erf(math.sqrt(0.5) * x, xp), 1.0, xp), 0.5 * x, xp)


def _clamped(x: Array, limit: float) -> Array:
    out = np.minimum(x, x.dtype.type(limit))
    return np.maximum(out, x.dtype.type(-limit), out=out)


_IN_PLACE = Kernels(_clamped, lambda a, b: np.multiply(a, b, out=a), lambda a, b: np.add(a, b, out=a))
