"""A stand-in for CuPy where there is no GPU, for ``python -m pytest -p fake_cupy --backends cupy``.

Arrays are NumPy's behind a wall: they convert to NumPy by ``get()`` alone, meet no array of NumPy, and are no condition
of an ``if``, which on a GPU would wait for it. So it is seen whether the library and its tests keep to what CuPy has;
whether CuPy's own kernels are right is not.
"""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest


class Device:
    """The one GPU."""

    id = 0

    def __init__(self, device=None):
        assert device is None or device == 0 or isinstance(device, Device)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def __eq__(self, other):
        return isinstance(other, Device)

    def __hash__(self):
        return 0


class ndarray:  # noqa: N801, the name CuPy has for it
    """An array on the GPU."""

    __module__ = "cupy"

    def __init__(self, host):
        self._host = host

    def __getattr__(self, name):
        found = getattr(self._host, name)
        return wrapped(found) if callable(found) else leave(found)

    def get(self):
        return self._host.copy()

    @property
    def device(self):
        return Device()

    def __array_function__(self, function, types, args, options):
        """Do what CuPy does for NumPy's functions, by which Dask works on chunks."""
        return getattr(sys.modules["cupy"], function.__name__)(*args, **options)

    def __array_ufunc__(self, ufunc, method, *args, **options):
        return (
            getattr(sys.modules["cupy"], ufunc.__name__)(*args, **options) if method == "__call__" else NotImplemented
        )

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __bool__(self):
        raise AssertionError("the value of an array was waited for")

    __float__ = __int__ = __index__ = __bool__

    def __getitem__(self, key):
        return leave(self._host[enter(key)])

    def __setitem__(self, key, value):
        raise AssertionError("an array was written to")


def _operator(name):
    def operate(self, *others):
        return leave(getattr(self._host, name)(*map(enter, others)))

    return operate


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or", "xor"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(ndarray, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def enter(x):
    """Unwrap arguments; arrays of NumPy are refused."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, list | tuple):
        return type(x)(map(enter, x))
    return x


def leave(x):
    """Wrap results; what NumPy gives as a number is an array of no axes."""
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    if isinstance(x, list | tuple) and any(isinstance(part, np.ndarray) for part in x):
        return type(x)(map(leave, x))
    return x


def wrapped(function):
    def call(*args, **options):
        return leave(function(*map(enter, args), **{key: enter(value) for key, value in options.items()}))

    return call


def asarray(a, dtype=None, copy=None, **options):
    """Bring an array of NumPy to the GPU."""
    host = np.array(a if isinstance(a, np.ndarray) else enter(a), dtype=dtype)
    return a if isinstance(a, ndarray) and not copy and host.dtype == a.dtype else ndarray(host)


def _module(name, source=None, **parts):
    module = types.ModuleType(name)
    module.__path__ = []
    for key in [] if source is None else dir(source):
        part = getattr(source, key)
        if not key.startswith("_") and not isinstance(part, types.ModuleType):
            setattr(module, key, part if isinstance(part, type) or not callable(part) else wrapped(part))
    for key, part in parts.items():
        setattr(module, key, part)
    sys.modules[name] = module
    return module


def install():
    """Put the stand-in where CuPy would be."""
    erf = np.vectorize(math.erf)
    special = _module("cupyx.scipy.special", erf=wrapped(lambda x: erf(x).astype(x.dtype) if x.size else x.copy()))
    _module("cupyx", scipy=_module("cupyx.scipy", special=special))
    parts = {name: _module(f"cupy.{name}", getattr(np, name)) for name in ("linalg", "fft")}
    parts["cuda"] = _module("cupy.cuda", Device=Device, device=_module("cupy.cuda.device", Device=Device))
    _module("cupy", np, **parts, ndarray=ndarray, asarray=asarray, array=asarray, is_available=lambda: True)


@pytest.hookimpl(tryfirst=True)
def pytest_configure():
    """Install it before anything looks for CuPy."""
    install()
