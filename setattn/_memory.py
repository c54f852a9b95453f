"""How arrays are cut to be worked through, and where results are written."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from setattn._adapters import JAX, CuPy, Dask, NumPy, Torch, UnrecordedTorch, Written, WrittenNumPy
from setattn._namespace import namespace_of, to_numpy
from setattn._typing import Array, Namespace

# --- sizes of blocks ------------------------------------------------------------------------------------------------


_CACHE, _CACHES, _GPU_MEMORY = 16 * 2**20, 32 * 2**20, 256 * 2**20
_LOOP = 16 * 2**20  # of what a compiler writes in a step: most calls then need less than the 32 MiB a heap keeps


def block_bytes(x: Array, xp: Namespace) -> int | None:
    """Return how much memory a block of ``x`` may take, or ``None`` where blocks do not suit.

    On a CPU, about what the last cache holds for a core, or, where each operation is spread over the cores, for them
    together; on a GPU, enough for a kernel to be busy with. A loop that is traced becomes as many copies of its body, a
    block of an array over several devices would have to be sent around, and Dask has blocks of its own.
    """
    if isinstance(xp, NumPy):
        return _CACHE
    if isinstance(xp, Torch):
        return None if xp.is_compiling() else _CACHES if x.device.type == "cpu" else _GPU_MEMORY
    if isinstance(xp, JAX):
        if isinstance(x, xp.jax.core.Tracer) or len(x.sharding.device_set) > 1:
            return None
        return _CACHE if xp.jax.default_backend() == "cpu" else _GPU_MEMORY
    if isinstance(xp, Dask):
        return None
    return _GPU_MEMORY if isinstance(xp, CuPy) else _CACHE


def loop_bytes(x: Array, xp: Namespace) -> int | None:
    """Return how much memory a block of ``x`` may take in a loop that is traced once, or ``None`` where there is none.

    Inside ``jax.jit`` on one CPU device. With several, rows may be spread over them, which a trace does not tell, and
    the loop would send them around; outside, what has been traced would be compiled anew in every call.
    """
    if not isinstance(xp, JAX):
        return None
    compiled = isinstance(x, xp.jax.interpreters.partial_eval.DynamicJaxprTracer)
    return _LOOP if compiled and is_one_cpu(xp) else None


def is_one_cpu(xp: Namespace) -> bool:
    """Say whether JAX has one device, a CPU."""
    return bool(xp.jax.default_backend() == "cpu" and xp.jax.device_count() == 1)


def has_own_threads(xp: Namespace) -> bool:
    """Say whether a library spreads each operation over threads by itself, or has them recorded one after the other."""
    return not isinstance(xp, WrittenNumPy)


def _keep_heap() -> None:
    """Make the C library of Linux keep the memory of a block for the next one.

    It gives the end of its heap back to the system where more than a threshold is free, and gets it again page by page,
    which took a third of the time of an induced block. The threshold is twice the largest array that was given back so
    far, of those up to 32 MiB: here is one that is never written to, and so never takes any memory. A program that sets
    the threshold itself, by ``MALLOC_TRIM_THRESHOLD_``, has it as it is set.
    """
    if sys.platform == "linux":
        np.empty(31 * 2**18, dtype=np.float32)


_keep_heap()


# --- parts ----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A part of an axis that begins where a loop has got to."""

    start: Array
    size: int


def part_of(a: Array, axis: int, cut: slice | Span) -> Array:
    """Take a part of an axis."""
    if isinstance(cut, Span):
        from jax import lax

        return lax.dynamic_slice_in_dim(a, cut.start, cut.size, axis)
    return a[_of_axis(axis, cut)]


def _of_axis(axis: int, cut: slice) -> tuple[Any, ...]:
    """Return the index of a part of an axis, counted from the first or from the last."""
    return (slice(None),) * axis + (cut, ...) if axis >= 0 else (..., cut) + (slice(None),) * (-1 - axis)


def repeat(function: Callable[[Array], Any], starts: range, xp: Namespace) -> Any:
    """Lay ``function(start)`` for all starts along a new first axis, by a loop that is traced once: arrays or trees."""
    places = xp.arange(starts.start, starts.stop, starts.step, dtype=xp.int32, device=None)
    return xp.jax.lax.map(function, places)


# --- results --------------------------------------------------------------------------------------------------------


def is_written(xp: Namespace) -> bool:
    """Say whether arrays of a library are written to; PyTorch records every write where it records gradients."""
    return isinstance(xp, Written | UnrecordedTorch)


def in_rows(x: Array, xp: Namespace) -> Array:
    """Lay an array out as one that is written to, where NumPy would keep to the layout of its parts."""
    return xp.ascontiguousarray(x) if isinstance(xp, NumPy) else x


class Parts:
    """An array whose parts are written as they come, from any thread; the first one says what it is like."""

    def __init__(self, axis: int, length: int, xp: Namespace) -> None:
        self.array: Array = None
        self._axis, self._length, self._xp = axis, length, xp
        self._lock = threading.Lock()

    def put(self, cut: slice, part: Array) -> None:
        """Write a part of the axis."""
        with self._lock:
            if self.array is None:
                self.array = self._room(part)
        put(self.array, self._axis, cut, part)

    def _room(self, part: Array) -> Array:
        shape = list(part.shape)
        shape[self._axis] = self._length
        if isinstance(self._xp, UnrecordedTorch):
            return _room_in_torch(part, shape, self._xp)
        return self._xp.empty(tuple(shape), dtype=part.dtype, device=part.device)


def _room_in_torch(part: Array, shape: list[int], xp: Namespace) -> Array:
    """Return an array of PyTorch, a large one on a CPU in memory of NumPy's: its large pages are there in less time."""
    if math.prod(shape) * part.itemsize >= _LARGE and type(part) is xp.Tensor:
        try:
            return xp.from_numpy(np.empty_like(part.new_empty(0).numpy(), shape=shape))
        except TypeError:  # of a GPU, of a dtype that NumPy has not
            pass
    return part.new_empty(shape)


_LARGE = 4 * 2**20  # bytes, from which on NumPy asks for large pages


def put(out: Array, axis: int, cut: slice, part: Array) -> None:
    """Write a part of an axis into an array."""
    out[_of_axis(axis, cut)] = part


def store(out: Any, axis: int, cut: slice, part: Array) -> None:
    """Write a part into an array of any kind that slices can be assigned to, such as one on disk."""
    put(out, axis, cut, part if namespace_of(out) is namespace_of(part) else to_numpy(part))


# --- layout ---------------------------------------------------------------------------------------------------------


def memory_order(x: Array) -> tuple[int, ...]:
    """Return the axes of an array from the longest steps in memory to the shortest, where it is then contiguous."""
    host = to_numpy(x)
    order = tuple(sorted(range(host.ndim), key=lambda axis: -host.strides[axis]))
    return order if host.transpose(order).flags.c_contiguous else tuple(range(host.ndim))


def copies_heads(xp: Namespace) -> bool:
    """Say whether a library copies what it multiplies head by head to lay the heads first in memory, as XLA does."""
    return isinstance(xp, JAX)


def like_rows(t: Array, x: Array, xp: Namespace) -> Array:
    """Give ``t`` the chunks of the rows of ``x``, where there are chunks.

    The products before went by another order of products, which leaves other chunks behind, and with them another
    rounding of what follows.
    """
    return t.rechunk({len(t.shape) - 2: x.chunks[-2]}) if isinstance(xp, Dask) else t


def in_one_chunk(x: Array, xp: Namespace) -> Array:
    """Return a Dask array of one chunk, of such an array or of one in memory."""
    return x.rechunk(-1) if namespace_of(x) is xp else xp.from_array(x, chunks=-1, asarray=False)
