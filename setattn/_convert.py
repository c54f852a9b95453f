"""Explicit conversion of parameter trees; a call never moves or casts what it is given."""

from __future__ import annotations

from typing import Any, TypeVar

from setattn._errors import DTypeError, NamespaceError
from setattn._namespace import (
    bits_of,
    convert_array,
    name_of,
    namespace_of,
    native,
    normalize_namespace,
    unlike_others,
    why_not,
)
from setattn._params import map_params
from setattn._typing import Array, Namespace

T = TypeVar("T")


def convert_params(params: T, /, xp: Namespace, *, device: Any = None, dtype: Any = None) -> T:
    """Convert every array of a parameter tree to a namespace, a device and a dtype.

    Parameters
    ----------
    params : tree
        Any of the parameter trees, a tuple of them, or a single array.
    xp : module
        The array library: ``numpy``, ``cupy``, ``torch``, ``jax.numpy``, ``dask.array``, ``array_api_strict``, or the
        namespace of an array as ``array_api_compat.array_namespace`` returns it.
    device : object, optional
        Where the arrays go, in that library's own terms; its default device if not given.
    dtype : dtype, optional
        A real floating dtype of that library; the present one if not given. Nothing becomes another dtype unasked:
        bfloat16 goes to NumPy, which lacks it, with ``dtype=numpy.float32``.

    Returns
    -------
    tree
        A tree of the same structure. An array that already is what was asked for is not copied.

    Raises
    ------
    NamespaceError, DTypeError
        If ``xp`` is no array library, a leaf no array of real floating dtype, ``dtype`` not real floating, or if the
        library cannot hold the array on the device or at all.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.Linear(np.ones((2, 3)), np.ones(3))
    >>> setattn.convert_params(params, np, dtype=np.float32).bias.dtype
    dtype('float32')
    """
    function = "convert_params"
    namespace = normalize_namespace(xp)
    if namespace is None:
        got = getattr(xp, "__name__", None) or repr(xp)
        raise NamespaceError(function, "xp", got, "the module of an array library, such as numpy or torch")
    bits = 0 if dtype is None or isinstance(dtype, str) else bits_of(dtype, namespace)
    if dtype is not None and bits not in (16, 32, 64):
        wanted = f"a real floating dtype of {name_of(namespace)}, of 16, 32 or 64 bits"
        raise DTypeError(function, "dtype", repr(dtype), wanted)
    if bits == 64 and (reason := why_not("float64", namespace)):
        raise DTypeError(function, "dtype", "float64", f"one that can be had: {reason}")

    def convert(a: Array) -> Array:
        source = namespace_of(a)
        if source is None:
            raise NamespaceError(function, "params", f"holding a {type(a).__qualname__}", "arrays alone")
        if kind := unlike_others(a, source):
            raise NamespaceError(function, "params", f"holding {kind[0]}", kind[1])
        if bits_of(a.dtype, source) not in (16, 32, 64):
            wanted = "real floating arrays of 16, 32 or 64 bits alone"
            raise DTypeError(function, "params", f"holding an array of dtype {a.dtype}", wanted)
        target = dtype
        if dtype is None and source is not namespace:
            name = str(native(a.dtype)).rpartition(".")[2]
            if reason := why_not(name, namespace):
                wanted = f"a dtype that can be had, or another one by dtype=: {reason}"
                raise DTypeError(function, "params", f"holding an array of dtype {a.dtype}", wanted)
            target = getattr(namespace, name)
        try:
            return convert_array(a, namespace, device, target)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = f"to {name_of(namespace)} ({' '.join(str(error).split())})"
            if device is not None:
                raise NamespaceError(function, "device", repr(device), f"a device known {reason}") from error
            got = f"holding an array of {name_of(source)} of dtype {a.dtype}"
            raise NamespaceError(function, "params", got, f"arrays that can be copied {reason}") from error

    return map_params(convert, params)
