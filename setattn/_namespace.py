"""The library that an array is of, with its dtypes and devices, and the ways from one library to another."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from setattn._adapters import ADAPTERS, JAX, Adapted, CuPy, Dask, NumPy, Recorder, Torch, adapted
from setattn._typing import Array, Namespace

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


def is_array_or_number(x: Any) -> bool:
    """Say whether something is an array, or one number that NumPy has made of one."""
    return isinstance(x, np.generic) or namespace_of(x) is not None


def _adapter_of(namespace: Namespace) -> Namespace:
    """Return the one adapter of a namespace, or the namespace itself where it needs none."""
    if isinstance(namespace, Adapted):
        return namespace
    kind = ADAPTERS.get(name_of(namespace))
    return namespace if kind is None else adapted(kind, namespace)


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


def facts_of(xp: Namespace) -> Callable[[Array], tuple[Any, ...]] | None:
    """Return what tells at once all that checks look at in an array of a given type, where a library has that."""
    if isinstance(xp, Recorder):
        return None
    return _FACTS_OF_NUMPY if isinstance(xp, NumPy) else _FACTS_OF_TORCH if isinstance(xp, Torch) else None


_FACTS_OF_NUMPY = operator.attrgetter("shape", "dtype")
_FACTS_OF_TORCH = operator.attrgetter("shape", "dtype", "device", "layout", "is_nested")


def signature(tree: Any, xp: Namespace) -> list[Any] | None:
    """Return all that the checks of a parameter tree look at, where its arrays tell it at once."""
    facts, kind = facts_of(xp), np.ndarray if isinstance(xp, NumPy) else getattr(xp, "Tensor", None)
    found: list[Any] = []
    return found if facts is not None and isinstance(tree, tuple) and _read(tree, kind, facts, found) else None


def _read(tree: tuple[Any, ...], kind: Any, facts: Any, found: list[Any]) -> bool:
    """Collect the facts of a tree; say whether there is nothing in it but arrays of one library."""
    found.extend((type(tree), len(tree)))
    for part in tree:
        if isinstance(part, kind):
            if kind is not np.ndarray and part.is_nested:
                return False
            found.extend((type(part), facts(part)))
        elif not isinstance(part, tuple) or (part and not _read(part, kind, facts, found)):
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


def snapshot(x: Array, xp: Namespace) -> Array:
    """Copy an array, apart from what is recorded of it."""
    if isinstance(xp, Torch):
        return x.detach().clone()
    return xp.asarray(x, dtype=x.dtype, device=creation_device(x, xp), copy=True)


def frozen(x: Any) -> Any:
    """Return an array that is written to no more; NumPy then refuses to."""
    if isinstance(x, np.ndarray):
        x.flags.writeable = False
    return x


def version(x: Any) -> int:
    """Return how often an array was written to, if its library counts that, as PyTorch does."""
    return getattr(x, "_version", 0)


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
