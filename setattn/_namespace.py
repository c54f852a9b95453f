"""Namespaces, dtypes, devices and ``erf``: the only file that knows a backend by name."""

from __future__ import annotations

import contextlib
import functools
import itertools
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
        else:
            try:
                namespace = array_api_compat.array_namespace(x)
            except TypeError:
                return None
        _namespaces[kind] = _adapter_of(namespace)
    return _namespaces[kind]


class _Adapted:
    """A namespace, but for some of its functions."""

    def __init__(self, module: Namespace) -> None:
        self._module = module
        self.__name__ = module.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Written(_Adapted):
    """A namespace whose functions write into arrays that they are given as ``out``."""


class _NumPy(_Written):
    """NumPy's, by the shortest ways: the usual ones take longer to look for other kinds of arrays than to compute."""

    exp, sqrt, isfinite = np.exp, np.sqrt, np.isfinite
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    where = staticmethod(np.where)
    reshape = staticmethod(np.ndarray.reshape)
    permute_dims = staticmethod(np.ndarray.transpose)
    # OpenBLAS raises flags of floating-point errors for lanes that it pads a small matrix with and then discards: they
    # depend on what the memory held before, and say nothing of the product.
    matmul = staticmethod(np.errstate(all="ignore")(np.matmul))
    vecdot = staticmethod(np.errstate(all="ignore")(np.vecdot))

    @staticmethod
    def matrix_transpose(x: Array) -> Array:
        return x.mT

    @staticmethod
    def max(x: Array, *, axis: int, keepdims: Any) -> Array:
        return np.maximum.reduce(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def sum(x: Array, *, axis: Any = None, keepdims: Any = False, dtype: Any = None) -> Array:
        return np.add.reduce(x, axis=axis, keepdims=keepdims, dtype=dtype)


class _Torch(_Adapted):
    """PyTorch's, past the promotion of dtypes: the arrays of a call have one."""

    def __init__(self, module: Namespace) -> None:
        super().__init__(module)
        torch = sys.modules["torch"]
        self.exp, self.sqrt, self.isfinite, self.matmul = torch.exp, torch.sqrt, torch.isfinite, torch.matmul
        self.add, self.subtract, self.multiply, self.divide = torch.add, torch.sub, torch.mul, torch.div
        self.where, self.reshape, self.permute_dims = torch.where, torch.reshape, torch.permute
        self.widths = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
        self.linear, self.layer_norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
        self.finfo, self.strided, self.Tensor = torch.finfo, torch.strided, torch.Tensor
        self.is_compiling, self.is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

    @staticmethod
    def matrix_transpose(x: Array) -> Array:
        return x.mT

    @staticmethod
    def max(x: Array, *, axis: int, keepdims: bool) -> Array:
        return x.amax(axis, keepdims)

    @staticmethod
    def sum(x: Array, *, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Array:
        return x.sum(axis, keepdims, dtype=dtype)

    @staticmethod
    def mean(x: Array, *, axis: int, keepdims: bool) -> Array:
        return x.mean(axis, keepdims)


class _Dask(_Adapted):
    """Dask's, but for two functions that fail where an array, or one chunk of it, has no elements."""

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


class _JAX(_Adapted):
    """JAX's, with products that say how they are sharded where explicit axes of a mesh ask for that."""

    def matmul(self, a: Array, b: Array) -> Array:
        sharding = _sharding_of_product(a, b)
        return self._module.matmul(a, b) if sharding is None else self._module.matmul(a, b, out_sharding=sharding)


_ADAPTERS: dict[str, type[_Adapted]] = {
    "numpy": _NumPy,
    "cupy": _Written,
    "torch": _Torch,
    "jax": _JAX,
    "dask": _Dask,
}
_adapted: dict[str, Namespace] = {}


def _adapter_of(namespace: Namespace) -> Namespace:
    """Return the one adapter of a namespace, or the namespace itself where it needs none."""
    name = name_of(namespace)
    if name not in _ADAPTERS:
        return namespace
    if name not in _adapted:
        _adapted[name] = _ADAPTERS[name](namespace)
    return _adapted[name]


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
    if isinstance(xp, _Torch) and dtype in xp.widths:
        return xp.widths[dtype]
    if isinstance(dtype, np.dtype) and dtype.kind in "biufc":
        return 8 * dtype.itemsize if dtype.kind == "f" else 0
    try:
        if not xp.isdtype(dtype, "real floating"):
            return 0
        bits: int = xp.finfo(dtype).bits
    except (AttributeError, TypeError, ValueError):
        return 0
    return bits


def largest_number(dtype: Any, xp: Namespace) -> float:
    """Return the largest finite number of float64, or for any narrower dtype that of float32."""
    return sys.float_info.max if bits_of(dtype, xp) == 64 else LARGEST_FLOAT32


LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


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
    if isinstance(xp, _NumPy):
        return None
    if name_of(xp) == "jax":
        try:
            return ", ".join(sorted(map(str, x.devices()))) if x.committed else None
        except (AttributeError, TypeError, sys.modules["jax"].errors.ConcretizationTypeError):
            return None
    return None if name_of(xp) == "dask" else x.device


def is_plain(xp: Namespace) -> bool:
    """Say whether two arrays of one type and dtype meet wherever they are and whatever their layout."""
    return isinstance(xp, _NumPy)


def surely_meets(a: Array, device: Any, xp: Namespace) -> bool:
    """Say whether an array meets others on a device, where a few comparisons tell."""
    return isinstance(xp, _Torch) and a.device == device and a.layout is xp.strided and not a.is_nested


def signature(tree: Any, xp: Namespace) -> list[Any] | None:
    """Return all that the checks of a parameter tree look at, where its arrays tell it at once."""
    kind = np.ndarray if isinstance(xp, _NumPy) else xp.Tensor if isinstance(xp, _Torch) else None
    found: list[Any] = []
    return found if kind is not None and isinstance(tree, tuple) and _read(tree, kind, found) else None


def _read(tree: tuple[Any, ...], kind: Any, found: list[Any]) -> bool:
    """Collect the facts of a tree; say whether there is nothing in it but arrays of one library."""
    found.extend((type(tree), len(tree)))
    for part in tree:
        if isinstance(part, kind):
            if kind is not np.ndarray:
                if part.is_nested:
                    return False
                found.extend((part.device, part.layout))
            found.extend((type(part), part.dtype, part.shape))
        elif not isinstance(part, tuple) or (part and not _read(part, kind, found)):
            return False
        elif not part:
            found.append(part)
    return True


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
    if not isinstance(xp, _Dask):
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
    return np.errstate(under="ignore") if isinstance(xp, _NumPy) else contextlib.nullcontext()


def only_checks(call: Callable[[], Array], xp: Namespace) -> None:
    """Make a call for the errors that it raises: JAX computes nothing then, and no operation is left in a trace."""
    if name_of(xp) == "jax":
        sys.modules["jax"].eval_shape(call)
    else:
        call()


def all_finite(x: Array, xp: Namespace) -> bool:
    """Say whether all numbers are finite; a sum of them, one pass without a copy, says so almost always."""
    with np.errstate(all="ignore"):
        # The sum of squares, a product of BLAS, is the fastest pass there is over NumPy's arrays.
        fast = name_of(xp) == "numpy" and x.dtype in (np.float32, np.float64) and x.flags.c_contiguous
        total = np.vdot(x, x) if fast else xp.sum(x)
        return bool(xp.isfinite(total)) or bool(xp.all(xp.isfinite(x)))


def matmul(a: Array, b: Array, xp: Namespace) -> Array:
    """Multiply matrices."""
    return xp.matmul(a, b)


def matmul_add(a: Array, b: Array, c: Array, xp: Namespace) -> Array:
    """Multiply arrays ``(..., n, k)`` by one matrix, and add a row: one operation where a library has one."""
    if isinstance(xp, _Torch):
        return xp.linear(a, b.mT, c)
    return into("add", xp.matmul(a, b), c, xp)


def _sharding_of_product(a: Array, b: Array) -> Any:
    """Say how a product is sharded that sums over an explicit axis of a mesh of JAX, which asks for that."""
    rows, columns = tuple(a.aval.sharding.spec), tuple(b.aval.sharding.spec)
    if rows[-1] is None or columns[-2] is None:
        return None
    jax = sys.modules["jax"]
    batch = itertools.zip_longest(rows[-3::-1], columns[-3::-1])  # from the last axis on
    axes = [of_a if of_b is None else of_b for of_a, of_b in batch][::-1]
    spec = jax.sharding.PartitionSpec(*axes, rows[-2], columns[-1])
    return jax.sharding.NamedSharding(b.aval.sharding.mesh, spec)


def is_about_explicit_axes(error: Exception) -> bool:
    """Say whether an error is that of JAX where arrays are sharded over explicit axes in ways that do not fit."""
    return type(error).__name__ in ("ShardingTypeError", "DuplicateSpecError")


_CACHE, _CACHES, _GPU_MEMORY = 4 * 2**20, 12 * 2**20, 256 * 2**20


def block_bytes(x: Array, xp: Namespace) -> int | None:
    """Return how much memory a block of ``x`` may take, or ``None`` where blocks do not suit.

    On a CPU, what a core's share of the caches holds, or, where each operation is spread over the cores, their shares
    together; on a GPU, enough for a kernel to be busy with. A loop that is traced becomes as many copies of its body, a
    block of an array over several devices would have to be sent around, and Dask has blocks of its own.
    """
    if isinstance(xp, _NumPy):
        return _CACHE
    name = name_of(xp)
    if name == "dask":
        return None
    if name == "jax":
        jax = sys.modules["jax"]
        if isinstance(x, jax.core.Tracer) or len(x.sharding.device_set) > 1:
            return None
        return _GPU_MEMORY if jax.default_backend() != "cpu" else _CACHE
    if name == "torch":
        return None if xp.is_compiling() else _CACHES if x.device.type == "cpu" else _GPU_MEMORY
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

    Inside ``jax.jit`` on one CPU device. With several, rows may be spread over them, which a trace does not tell, and
    the loop would send them around; outside, what has been traced would be compiled anew in every call.
    """
    if name_of(xp) != "jax":
        return None
    jax = sys.modules["jax"]
    compiled = isinstance(x, jax.interpreters.partial_eval.DynamicJaxprTracer)
    return _CACHE if compiled and jax.default_backend() == "cpu" and jax.device_count() == 1 else None


def repeat(function: Callable[[Array], Array], starts: range, xp: Namespace) -> Array:
    """Lay ``function(start)`` for all starts along a new first axis, by a loop that is traced once."""
    places = xp.arange(starts.start, starts.stop, starts.step, dtype=xp.int32, device=None)
    return sys.modules["jax"].lax.map(function, places)


def has_own_threads(xp: Namespace) -> bool:
    """Say whether a library spreads each operation over threads by itself."""
    return not isinstance(xp, _NumPy)


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
    return t.rechunk({len(t.shape) - 2: x.chunks[-2]}) if isinstance(xp, _Dask) else t


def surely_within(x: Array, limit: float, xp: Namespace) -> bool:
    """Say whether no number is beyond a limit, where a look at the numbers costs little: eagerly, on a CPU."""
    if isinstance(xp, _NumPy):
        if x.flags.c_contiguous:  # the sum of squares, a product of BLAS, is faster than both ends
            return bool(np.vdot(x, x) <= limit * limit)
        least, largest = np.minimum.reduce(x, axis=None, initial=0), np.maximum.reduce(x, axis=None, initial=0)
        return bool(largest <= limit and least >= -limit)
    if not isinstance(xp, _Torch) or xp.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return False
    try:
        least, largest = x.detach().aminmax()
        return float(largest) <= limit and float(least) >= -limit
    except RuntimeError:  # torch.func.vmap and tensors without numbers have none to look at
        return False


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
    if isinstance(xp, _Written):
        return function(a, b, out=a)
    if not _writes(xp):
        return function(a, b)
    try:
        return _IN_PLACE_OF[name](a, b)
    except RuntimeError:  # of torch.func.vmap, where b has an axis that a has not
        return function(a, b)


def exp_into(a: Array, xp: Namespace) -> Array:
    """Compute the exponential function in the same way."""
    if isinstance(xp, _Written):
        return xp.exp(a, out=a)
    return a.exp_() if _writes(xp) else xp.exp(a)


def _writes(xp: Namespace) -> bool:
    """Say whether PyTorch, if it is the library, neither records nor traces what is done."""
    return isinstance(xp, _Torch) and not xp.is_grad_enabled() and not xp.is_compiling()


_LONG = 4096  # numbers that NumPy adds up in pairs


def row_sum(x: Array, xp: Namespace) -> Array:
    """Sum the last axis, and keep it: NumPy's products with ones are faster than its sum, and as exact if not long."""
    n = x.shape[-1]
    if not isinstance(xp, _NumPy) or not 0 < n <= _LONG:
        return xp.sum(x, axis=-1, keepdims=True)
    return xp.matmul(x, _ones(n, x.dtype)[:, None])


def row_mean(x: Array, xp: Namespace) -> Array:
    """Average the last axis, and keep it: NumPy's dot product of rows is faster than its mean."""
    if not isinstance(xp, _NumPy):
        return xp.mean(x, axis=-1, keepdims=True)
    return xp.vecdot(x, _ones(x.shape[-1], x.dtype))[..., None] / x.shape[-1]


@functools.lru_cache(maxsize=64)
def _ones(size: int, dtype: np.dtype[Any]) -> Array:
    ones = np.repeat(dtype.type(1), size)
    ones.flags.writeable = False
    return ones


def row_mean_square(x: Array, xp: Namespace) -> Array:
    """Average the squares on the last axis, and keep it."""
    if not isinstance(xp, _NumPy):
        return xp.mean(x * x, axis=-1, keepdims=True)
    return xp.vecdot(x, x)[..., None] / x.shape[-1]


def at_least(x: Array, limit: float, xp: Namespace) -> Array:
    """Compute ``max(x, limit)``, of NaN a NaN."""
    if isinstance(xp, _NumPy):
        return np.maximum(x, x.dtype.type(limit))
    if name_of(xp) == "jax":  # XLA computes a sum twice that is compared and then selected
        return sys.modules["jax"].numpy.maximum(x, limit)
    return x.clamp(limit) if isinstance(xp, _Torch) else xp.where(x < limit, limit, x)


def layer_norm(y: Array, scale: Array | Absent, bias: Array | Absent, eps: float, xp: Namespace) -> Array | None:
    """Normalise rows by a kernel of the library, if it has one: PyTorch's on a CPU, run eagerly.

    PyTorch's takes the mean off numbers that it has already divided by the deviation, which costs digits where they are
    far from 0: it is for rows from which something like their mean has been subtracted before.
    """
    if not isinstance(xp, _Torch) or xp.is_compiling() or y.device.type != "cpu":
        return None
    if eps < xp.finfo(y.dtype).smallest_normal:  # which would be rounded to 0
        return None
    weight, shift = None if isinstance(scale, tuple) else scale, None if isinstance(bias, tuple) else bias
    return xp.layer_norm(y, y.shape[-1:], weight, shift, eps)


def relu(x: Array, xp: Namespace) -> Array:
    """Compute ``max(x, 0)``, of NaN a NaN, of a result that is needed no more; ``where`` takes several times longer."""
    if isinstance(xp, _Torch):
        return x.relu_() if _writes(xp) else x.relu()
    return np.maximum(x, x.dtype.type(0), out=x) if isinstance(xp, _NumPy) else xp.where(x <= 0, 0.0, x)


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
    at = xp.where(inside, at, 0)
    if name_of(xp) == "jax":  # which need not bring together the numbers of all devices to lay them in one row
        rows = xp.take(table, at, axis=0)
    else:
        at = xp.reshape(at, (math.prod(numbers.shape),))
        rows = table.index_select(0, at) if name_of(xp) == "torch" else xp.take(table, at, axis=0)
        rows = xp.reshape(rows, (*numbers.shape, table.shape[1]))
    rows = xp.where(inside[..., None], rows, math.nan)
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
