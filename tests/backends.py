"""The backends that every public function is tested on: how to load them, and how arrays get in and out.

This table is also where the README takes its table of backends from, so that what is advertised is what is tested.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import setattn


@dataclass(frozen=True)
class Backend:
    """One backend of the matrix.

    ``hardware`` is what its arrays are on, ``fake`` if that is pretended; ``strict`` holds flags of array-api-strict;
    ``features`` says what is tested; ``listed`` entries are advertised. An entry that is not ``everywhere`` is only in
    the tests that ask for it by name, and one that is not ``expected`` is left out without a word where it is missing.
    """

    name: str
    module: str
    dtypes: tuple[str, ...]
    hardware: str
    device: str | None = None
    strict: dict[str, Any] = field(default_factory=dict)
    readonly: bool = False
    features: tuple[str, ...] = ()
    listed: bool = True
    everywhere: bool = True
    expected: bool = True

    def missing(self) -> str | None:
        """Return why the backend cannot run here, or ``None``."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without CUDA, CuPy says so when it is imported
                module = importlib.import_module(self.module)
        except ImportError:
            return f"{self.module.split('.')[0]} is not installed"
        if self.module == "cupy" and not module.is_available():
            return "cupy has no GPU here"
        if self.module == "torch" and self.device is not None and not module.cuda.is_available():
            return "torch has no GPU here"
        return None

    @property
    def xp(self) -> Any:
        """The module a user would import."""
        return importlib.import_module(self.module)

    @contextlib.contextmanager
    def active(self) -> Iterator[Backend]:
        """Set what the backend needs to be set."""
        if self.module == "array_api_strict":
            context = self.xp.ArrayAPIStrictFlags(**self.strict)
        elif self.name == "torch-default-float64":
            context = _default_dtype(self.xp, self.xp.float64)
        elif self.name == "jax-no-x64":
            context = _jax_x64(False)
        else:
            context = contextlib.nullcontext()
        with context, warnings.catch_warnings():
            if self.module in ("dask.array", "array_api_strict", "cupy"):  # the last where it is a stand-in
                # They leave products to NumPy, whose flags say nothing: see tolerances.product.
                warnings.filterwarnings("ignore", "invalid value encountered in matmul", RuntimeWarning)
            yield self

    def lazily(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which computing a lazy array is an error."""
        if self.module != "dask.array":
            return contextlib.nullcontext()
        return importlib.import_module("dask").config.set(scheduler=_refuse_to_compute)

    @property
    def target(self) -> Any:
        """The device as the library takes it; ``None`` for its default."""
        if self.device is None:
            return None
        return (self.xp.device if self.module == "torch" else self.xp.Device)(self.device)

    def dtype(self, name: str) -> Any:
        """Return the dtype of a name, as this backend spells it."""
        if self.module == "dask.array":
            return np.dtype(name)
        if name == "bool":
            return getattr(self.xp, "bool", None) or self.xp.bool_
        return getattr(self.xp, name)

    def asarray(self, a: np.ndarray, dtype: str | None = None) -> Any:
        """Copy a NumPy array into the backend; floating arrays become ``dtype``, others stay as they are."""
        a = np.asarray(a)
        floating = a.dtype.kind == "f" and dtype is not None
        if floating and dtype != "bfloat16":
            a = a.astype(dtype)
        if self.module == "numpy":
            a = a.copy()
            a.flags.writeable = not self.readonly
            return a
        if self.module == "dask.array":
            # Two chunks on every axis but features; the last axis of a mask, and of tokens, is the set.
            split = a.shape[:-1] if a.dtype.kind == "f" else a.shape
            return self.xp.from_array(a, chunks=(*(max(1, (n + 1) // 2) for n in split), *a.shape[len(split) :]))
        if self.module == "array_api_strict":
            narrow = self.device == "no_x64" and a.dtype == np.int64  # tokens
            return self.xp.asarray(a.astype(np.int32) if narrow else a, device=self.target)
        a = self.xp.asarray(a.astype("float32") if dtype == "bfloat16" and floating else a.copy())
        if self.module == "torch" and self.device is not None:
            a = a.to(self.device)
        if not (floating and dtype == "bfloat16"):
            return a
        return a.to(self.xp.bfloat16) if self.module == "torch" else a.astype(self.xp.bfloat16)

    def params(self, params: Any, dtype: str) -> Any:
        """Convert a parameter tree to the backend."""
        if self.module == "dask.array":
            return setattn.map_params(lambda a: a.astype(dtype), params)  # in memory, as is meant to be
        return setattn.map_params(lambda a: self.asarray(a, dtype), params)

    def numpy(self, a: Any) -> np.ndarray:
        """Copy an array of the backend to NumPy; bfloat16 becomes float32."""
        if self.module == "torch":
            a = a.detach().cpu()
            return (a.float() if a.dtype == self.xp.bfloat16 else a).numpy()
        if self.module == "cupy":
            return a.get()
        if self.module == "dask.array":
            return np.asarray(a.compute(scheduler="synchronous"))
        if self.module == "array_api_strict":
            return np.array(a.to_device(self.xp.Device("CPU_DEVICE")))
        return np.asarray(a.astype("float32") if str(a.dtype) == "bfloat16" else a)


def _refuse_to_compute(*args: Any, **options: Any) -> Any:
    raise AssertionError("a lazy array was computed while a graph was being built")


@contextlib.contextmanager
def _default_dtype(torch: Any, dtype: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _jax_x64(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    jax = importlib.import_module("jax")
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    experimental = importlib.import_module("jax.experimental")
    return experimental.enable_x64() if enabled else experimental.disable_x64()


_HALF = ("float64", "float32", "float16")
_ALL = (*_HALF, "bfloat16")
_STRICT = ("float64", "float32")
_NO_OPTIONS = {"boolean_indexing": False, "data_dependent_shapes": False, "enabled_extensions": ()}
_TORCH = ("eager", "autograd", "torch.func", "torch.compile")
_JAX = ("eager", "jit", "grad", "vmap")

BACKENDS = {
    b.name: b
    for b in (
        Backend("numpy", "numpy", _HALF, "CPU", features=("eager",)),
        Backend("numpy-readonly", "numpy", _HALF, "CPU", readonly=True, listed=False),
        Backend("cupy", "cupy", _HALF, "CUDA", features=("eager",)),
        Backend("torch", "torch", _ALL, "CPU", features=_TORCH),
        Backend("torch-cuda", "torch", _ALL, "CUDA", device="cuda:0", listed=False, expected=False),
        Backend("torch-default-float64", "torch", _ALL, "CPU", listed=False, everywhere=False),
        Backend("jax", "jax.numpy", _ALL, "CPU", features=_JAX),
        Backend("jax-no-x64", "jax.numpy", ("float32",), "CPU", listed=False, everywhere=False),
        Backend("dask", "dask.array", _HALF, "CPU", features=("lazy",)),
        Backend("strict", "array_api_strict", _STRICT, "CPU", features=("eager",)),
        Backend("strict-2024.12", "array_api_strict", _STRICT, "CPU", strict={"api_version": "2024.12"}, listed=False),
        Backend("strict-no-options", "array_api_strict", _STRICT, "CPU", strict=_NO_OPTIONS, listed=False),
        Backend("strict-device1", "array_api_strict", _STRICT, "fake", device="device1", listed=False),
        Backend("strict-no_float64", "array_api_strict", ("float32",), "fake", device="no_float64", listed=False),
        Backend("strict-no_x64", "array_api_strict", ("float32",), "fake", device="no_x64", listed=False),
    )
}

EVERYWHERE = tuple(name for name, b in BACKENDS.items() if b.everywhere)
