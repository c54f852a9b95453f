"""The library that an array is of, with its dtypes and devices, and the ways from one library to another."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any

import array_api_compat
import numpy as np

from setattn._typing import Array, Namespace, Shape

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


# --- adapters -------------------------------------------------------------------------------------------------------


class _Adapted:
    """A namespace, but for some of its functions."""

    def __init__(self, module: Namespace) -> None:
        self._module = module
        self.__name__ = module.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Written(_Adapted):
    """A namespace whose functions write into arrays that they are given as ``out``."""


class NumPy(Written):
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


class ThreadedNumPy(NumPy):
    """NumPy's for a call on several threads, with products of BLAS on one each."""

    def __init__(self, module: Namespace, threads: int) -> None:
        super().__init__(module)
        self.threads = threads


@functools.lru_cache(maxsize=8)
def _for_threads(xp: NumPy, threads: int) -> Namespace:
    return ThreadedNumPy(xp._module, threads)


class CuPy(Written):
    """CuPy's, as it is."""


class Torch(_Adapted):
    """PyTorch's, past the promotion of dtypes: the arrays of a call have one."""

    def __init__(self, module: Namespace) -> None:
        super().__init__(module)
        torch = sys.modules["torch"]
        self.exp, self.sqrt, self.isfinite, self.matmul = torch.exp, torch.sqrt, torch.isfinite, torch.matmul
        self.add, self.subtract, self.multiply, self.divide = torch.add, torch.sub, torch.mul, torch.div
        self.where, self.reshape, self.permute_dims = torch.where, torch.reshape, torch.permute
        self.widths = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
        self.linear, self.layer_norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
        self.gelu, self.broadcast_shapes = torch.nn.functional.gelu, torch.broadcast_shapes
        self.finfo, self.strided, self.Tensor = torch.finfo, torch.strided, torch.Tensor
        self.is_compiling = torch.compiler.is_compiling

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


class UnrecordedTorch(Torch):
    """PyTorch's where it neither records nor traces nor transforms what is done: with kernels that tell of nothing."""

    def __init__(self, module: Namespace) -> None:
        super().__init__(module)
        torch = sys.modules["torch"]
        # What scaled_dot_product_attention calls on a CPU: it gives the sums of exponentials, too.
        self.attention_on_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
        self.linear_on_cpu = _linear_by_onednn(torch)
        self.mkldnn = torch.backends.mkldnn


def _linear_by_onednn(torch: Namespace) -> Any:
    """Return PyTorch's operation for a linear map by oneDNN, as its compiler calls it, where that is of use.

    It takes the kernels of the processor that it runs on. MKL, which PyTorch calls otherwise, takes those for AVX-512
    on Intel's processors alone.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def to_compute_in(xp: Namespace, threads: int) -> Namespace:
    """Return the namespace to compute in: NumPy's for threads, and PyTorch's other one, where it only computes."""
    if isinstance(xp, NumPy):
        return xp if threads == 1 else _for_threads(xp, threads)
    if not isinstance(xp, Torch) or xp.is_compiling():
        return xp
    torch = sys.modules["torch"]
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return xp
    try:
        forward, transformed = torch.autograd.forward_ad._current_level, torch._C._are_functorch_transforms_active()
        if forward >= 0 or transformed or torch._C._len_torch_dispatch_stack():
            return xp
    except AttributeError:  # of a version that does not tell
        return xp
    if "unrecorded" not in _adapted:
        _adapted["unrecorded"] = UnrecordedTorch(xp._module)
    return _adapted["unrecorded"]


class Dask(_Adapted):
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


class JAX(_Adapted):
    """JAX's, with products that say how they are sharded where explicit axes of a mesh ask for that."""

    def __init__(self, module: Namespace) -> None:
        super().__init__(module)
        self.jax = sys.modules["jax"]

    def matmul(self, a: Array, b: Array) -> Array:
        sharding = self._sharding_of_product(a, b)
        return self._module.matmul(a, b) if sharding is None else self._module.matmul(a, b, out_sharding=sharding)

    def _sharding_of_product(self, a: Array, b: Array) -> Any:
        """Say how a product is sharded that sums over an explicit axis, if it does."""
        rows, columns = tuple(a.aval.sharding.spec), tuple(b.aval.sharding.spec)
        if rows[-1] is None or columns[-2] is None:
            return None
        batch = itertools.zip_longest(rows[-3::-1], columns[-3::-1])  # from the last axis on
        axes = [of_a if of_b is None else of_b for of_a, of_b in batch][::-1]
        spec = self.jax.sharding.PartitionSpec(*axes, rows[-2], columns[-1])
        return self.jax.sharding.NamedSharding(b.aval.sharding.mesh, spec)


def is_about_explicit_axes(error: Exception) -> bool:
    """Say whether an error is that of JAX where arrays are sharded over explicit axes in ways that do not fit."""
    return type(error).__name__ in ("ShardingTypeError", "DuplicateSpecError")


_ADAPTERS: dict[str, type[_Adapted]] = {
    "numpy": NumPy,
    "cupy": CuPy,
    "torch": Torch,
    "jax": JAX,
    "dask": Dask,
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


# --- dtypes ---------------------------------------------------------------------------------------------------------


def bits_of(dtype: Any, xp: Namespace) -> int:
    """Return the width of a real floating dtype, or 0 for any other."""
    if isinstance(xp, Torch) and dtype in xp.widths:
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
    return sys.float_info.max if bits_of(dtype, xp) == 64 else _LARGEST_FLOAT32


_LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def why_not(dtype: str, xp: Namespace) -> str:
    """Say why a library cannot hold a dtype of this name; nothing if it can."""
    if not hasattr(xp, dtype):
        return f"{name_of(xp)} has no {dtype}"
    if isinstance(xp, JAX) and dtype == "float64" and not xp.jax.config.jax_enable_x64:
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


# --- devices and kinds of arrays ------------------------------------------------------------------------------------


def device_of(x: Array, xp: Namespace) -> Any:
    """Return what two arrays must agree on to meet without a transfer, or ``None`` where it cannot be known.

    JAX itself moves an array that was not put anywhere, and has no devices inside a trace. A Dask array has no device
    of its own.
    """
    if isinstance(xp, NumPy):
        return None
    if isinstance(xp, JAX):
        try:
            return ", ".join(sorted(map(str, x.devices()))) if x.committed else None
        except (AttributeError, TypeError, xp.jax.errors.ConcretizationTypeError):
            return None
    return None if isinstance(xp, Dask) else x.device


def is_plain(xp: Namespace) -> bool:
    """Say whether two arrays of one type and dtype meet wherever they are and whatever their layout."""
    return isinstance(xp, NumPy)


def surely_meets(a: Array, device: Any, xp: Namespace) -> bool:
    """Say whether an array meets others on a device, where a few comparisons tell."""
    return isinstance(xp, Torch) and a.device == device and a.layout is xp.strided and not a.is_nested


def signature(tree: Any, xp: Namespace) -> list[Any] | None:
    """Return all that the checks of a parameter tree look at, where its arrays tell it at once."""
    kind = np.ndarray if isinstance(xp, NumPy) else xp.Tensor if isinstance(xp, Torch) else None
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
    if isinstance(xp, Torch):
        if x.is_nested:
            return "a nested tensor", "a tensor padded by to_padded_tensor(), with a mask"
        if x.layout != xp.strided:
            return f"a tensor of layout {x.layout}", "a dense tensor, as to_dense() makes it"
    if isinstance(xp, Dask) and namespace_of_chunks(x, xp) is None:
        got = f"an array of dask with chunks of {type(x._meta).__qualname__}"
        return got, "one whose chunks are plain arrays of numpy or cupy"
    return None


def namespace_of_chunks(x: Array, xp: Namespace) -> Namespace | None:
    """Return the namespace of the chunks of a Dask array, if they are plain arrays; ``None`` for every other array."""
    if not isinstance(xp, Dask):
        return None
    held = namespace_of(x._meta)
    return held if isinstance(held, NumPy | CuPy) else None


def creation_device(x: Array, xp: Namespace) -> Any:
    """Return the device to create an array on that will meet ``x``; JAX and Dask place it themselves."""
    return None if isinstance(xp, JAX | Dask) else x.device


# --- conversions ----------------------------------------------------------------------------------------------------


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


def convert_array(x: Array, xp: Namespace, device: Any, dtype: Any) -> Array:
    """Return an array in another namespace, on another device, in another dtype, as far as they are given."""
    source: Namespace = namespace_of(x)
    if source is xp:
        x = x if device is None else array_api_compat.to_device(x, device)
        return x if dtype is None or x.dtype == dtype else xp.astype(x, dtype)
    host = to_numpy(x)
    if isinstance(xp, Torch):  # which would share the memory, and takes neither all strides nor all byte orders
        host = np.array(host, dtype=native(host.dtype), order="C")
    if dtype is None:
        dtype = getattr(xp, native(host.dtype).name)
    return xp.asarray(host, dtype=dtype, device=device)
