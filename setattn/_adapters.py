"""The libraries as the rest calls them: their functions, but for some that are adapted."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from setattn._typing import Array, Namespace, Shape


class Adapted:
    """A namespace, but for some of its functions."""

    composed: tuple[str, ...] = ()  # which of these call others of them

    def __init__(self, module: Namespace) -> None:
        self._module = module
        self.__name__ = module.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Written(Adapted):
    """A namespace whose functions write into arrays that they are given as ``out``."""


class NumPy(Adapted):
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

    def matmul_heads(self, a: Array, b: Array) -> Array:
        """Multiply matrices for each head; the heads of a row lie side by side in memory after it."""
        *batch, heads, m, _ = a.shape
        rows = self._module.empty((*batch, m, heads, b.shape[-1]), dtype=a.dtype, device=None)
        return self.matmul(a, b, out=rows.swapaxes(-3, -2))

    @staticmethod
    def matrix_transpose(x: Array) -> Array:
        return x.mT

    @staticmethod
    def max(x: Array, *, axis: int, keepdims: Any) -> Array:
        return np.maximum.reduce(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def sum(x: Array, *, axis: Any = None, keepdims: Any = False, dtype: Any = None) -> Array:
        return np.add.reduce(x, axis=axis, keepdims=keepdims, dtype=dtype)


class WrittenNumPy(NumPy, Written):
    """NumPy's for its own arrays."""


class ThreadedNumPy(WrittenNumPy):
    """NumPy's for a call on several threads, with products of BLAS on one each."""

    def __init__(self, module: Namespace, threads: int) -> None:
        super().__init__(module)
        self.threads = threads


@functools.lru_cache(maxsize=8)
def _for_threads(xp: WrittenNumPy, threads: int) -> Namespace:
    return ThreadedNumPy(xp._module, threads)


class CuPy(Adapted):
    """CuPy's, with an error function."""

    @staticmethod
    def erf(x: Array) -> Array:
        from cupyx.scipy.special import erf

        return erf(x)


class WrittenCuPy(CuPy, Written):
    """CuPy's for its own arrays."""


class Torch(Adapted):
    """PyTorch's, past the promotion of dtypes: the arrays of a call have one."""

    composed = ("matmul",)

    def __init__(self, module: Namespace) -> None:
        super().__init__(module)
        torch = sys.modules["torch"]
        self.exp, self.sqrt, self.isfinite = torch.exp, torch.sqrt, torch.isfinite
        self.mm, self.bmm, self.batched_matmul = torch.mm, torch.bmm, torch.matmul
        self.add, self.subtract, self.multiply, self.divide = torch.add, torch.sub, torch.mul, torch.div
        self.where, self.reshape, self.permute_dims = torch.where, torch.reshape, torch.permute
        self.widths = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
        self.linear, self.layer_norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
        self.gelu, self.broadcast_shapes = torch.nn.functional.gelu, torch.broadcast_shapes
        self.finfo, self.strided, self.Tensor = torch.finfo, torch.strided, torch.Tensor
        self.is_compiling = torch.compiler.is_compiling
        self.inference_mode, self.no_grad = torch.inference_mode, torch.no_grad

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply matrices; one, or a batch of them on both sides, without looking for what else there could be."""
        axes = a.ndim, b.ndim
        if axes == (2, 2):
            return self.mm(a, b)
        return self.bmm(a, b) if axes == (3, 3) and a.shape[0] == b.shape[0] else self.batched_matmul(a, b)

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
    if isinstance(xp, WrittenNumPy):
        return xp if threads == 1 else _for_threads(xp, threads)
    if type(xp) is not Torch or xp.is_compiling():
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
    return adapted(UnrecordedTorch, xp._module)


class Dask(Adapted):
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


class JAX(Adapted):
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


def is_about_numbers(error: Exception) -> bool:
    """Say whether an error is that of JAX where a function that is traced goes by the numbers of its arrays."""
    return "ConcretizationTypeError" in [kind.__name__ for kind in type(error).__mro__]


def is_about_explicit_axes(error: Exception) -> bool:
    """Say whether an error is that of JAX where arrays are sharded over explicit axes in ways that do not fit."""
    return type(error).__name__ in ("ShardingTypeError", "DuplicateSpecError")


# --- what is recorded -----------------------------------------------------------------------------------------------


class Recorder(Adapted):
    """A library's functions for arrays that stand for those of later calls, as :mod:`setattn._record` makes them."""

    def __init__(
        self, xp: Namespace, recorded: Callable[[Any], Any], in_place: Callable[..., Any], look: Callable[..., bool]
    ) -> None:
        super().__init__(xp._module if isinstance(xp, Adapted) else xp)
        self._xp, self._recorded, self._in_place, self._look = xp, recorded, in_place, look
        for name in dir(xp):
            if not name.startswith("_") and name not in self.composed:
                setattr(self, name, self._of(getattr(xp, name)))

    def __getattr__(self, name: str) -> Any:
        return self._of(getattr(self._xp, name))

    def _of(self, value: Any) -> Any:
        return self._recorded(value) if callable(value) and not isinstance(value, type) else value

    def in_place(self, name: str, a: Array, *others: Array) -> Array:
        """Call a function by name, whose result may take the place of the first argument."""
        if isinstance(self._xp, Written):
            return self._in_place(getattr(self._xp, name), a, *others)
        return getattr(self, name)(a, *others)

    def look(self, function: Callable[..., bool], x: Array, *args: Any) -> bool:
        """Call ``function(x, *args)``, which looks at numbers, and note which way it leads."""
        return self._look(function, x, *args)


class RecordedNumPy(Recorder, NumPy):
    """NumPy's."""


class RecordedCuPy(Recorder, CuPy):
    """CuPy's."""


class RecordedTorch(Recorder, Torch):
    """PyTorch's."""


def recorder_of(xp: Namespace, *hooks: Callable[..., Any]) -> Recorder:
    """Return a namespace for recorded arrays of a library: what its functions do goes through the hooks."""
    own: dict[type[Adapted], type[Recorder]] = {NumPy: RecordedNumPy, CuPy: RecordedCuPy, Torch: RecordedTorch}
    kind = next((own[adapter] for adapter in own if isinstance(xp, adapter)), Recorder)
    return kind(xp, *hooks)


# --- one for each library -------------------------------------------------------------------------------------------

ADAPTERS: dict[str, type[Adapted]] = {
    "numpy": WrittenNumPy,
    "cupy": WrittenCuPy,
    "torch": Torch,
    "jax": JAX,
    "dask": Dask,
}
_made: dict[type[Adapted], Namespace] = {}


def adapted(kind: type[Adapted], module: Namespace) -> Namespace:
    """Return the one adapter of a kind."""
    if kind not in _made:
        _made[kind] = kind(module)
    return _made[kind]
