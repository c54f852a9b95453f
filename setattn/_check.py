"""What is checked of arrays, masks and options before any arithmetic: types, dtypes and integers, never a value."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

from setattn._call import Call
from setattn._errors import DTypeError, MaskError, NamespaceError, OptionError, ShapeError
from setattn._namespace import device_of, is_boolean, name_of, namespace_of, native, unlike_others
from setattn._typing import Array, Shape


class Width(NamedTuple):
    """The number of features of something, and where it came from: an argument with its shape, or a part's name."""

    size: int
    source: str
    shape: Shape | None = None


# --- arrays ---------------------------------------------------------------------------------------------------------


def _belongs(call: Call, argument: str, a: Any) -> None:
    xp = namespace_of(a)
    if xp is None:
        raise NamespaceError(call.function, argument, f"a {type(a).__qualname__}", f"an array of {name_of(call.xp)}")
    if xp is not call.xp:
        wanted = f"an array of {name_of(call.xp)}, as the first argument is"
        raise NamespaceError(call.function, argument, f"an array of {name_of(xp)}", wanted)
    if kind := unlike_others(a, xp):
        raise NamespaceError(call.function, argument, *kind)
    if call.device is not None:
        device = device_of(a, xp)
        if device is not None and device != call.device:
            raise NamespaceError(
                call.function, argument, f"on device {device}", f"device {call.device}, as the first argument is"
            )
    if any(size != size for size in a.shape):
        wanted = "known sizes: call compute_chunk_sizes() on the array first"
        raise ShapeError(call.function, argument, tuple(a.shape), wanted, "shape")


def floating(call: Call, argument: str, a: Any) -> None:
    _belongs(call, argument, a)
    if a.dtype != call.dtype and native(a.dtype) != call.dtype:
        raise DTypeError(call.function, argument, a.dtype, f"{call.dtype}, as the first argument has", "dtype")


def data(call: Call, argument: str, x: Any, axes: str = "n, dim", ndim: int = 2) -> Width:
    """Check one input array, whose last axes are named, and return its width."""
    floating(call, argument, x)
    if len(x.shape) < ndim:
        raise ShapeError(call.function, argument, tuple(x.shape), f"(..., {axes})", "shape")
    if x.shape[-1] < 1:
        raise ShapeError(call.function, argument, tuple(x.shape), f"(..., {axes}) with at least one feature", "shape")
    return Width(x.shape[-1], argument, tuple(x.shape))


def same_batch(call: Call, argument: str, query: Array, context: Array, context_axes: int = 2) -> None:
    """Check that queries have the batch of their context, or none at all, which shares them among the batch."""
    batch = tuple(context.shape[:-context_axes])
    if len(query.shape) > 2 and tuple(query.shape[:-2]) != batch:
        sizes = ", ".join(map(str, (*batch, *query.shape[-2:])))
        wanted = f"({sizes}), as the other array has shape {tuple(context.shape)}"
        if batch:
            wanted += f", or {tuple(query.shape[-2:])} for all of the batch"
        raise ShapeError(call.function, argument, tuple(query.shape), wanted, "shape")


def mask(call: Call, argument: str, m: Any, shape: Shape, meaning: str) -> None:
    """Check a boolean mask against its one allowed shape."""
    if m is None:
        return
    _belongs(call, argument, m)
    if not is_boolean(m.dtype, call.xp):
        raise DTypeError(call.function, argument, m.dtype, "bool, True where an element takes part", "dtype")
    if tuple(m.shape) != tuple(shape):
        raise MaskError(call.function, argument, tuple(m.shape), f"{tuple(shape)}, {meaning}", "shape")


def context_mask(call: Call, m: Any, context: Array, name: str) -> None:
    """Check a mask over the elements of a context or set."""
    mask(call, "mask", m, context.shape[:-1], f"one entry for each element of {name}")


def pair_mask(call: Call, m: Any, query: Array, context: Array, names: str) -> None:
    """Check a mask over pairs of a query and a context element."""
    shape = (*context.shape[:-2], query.shape[-2], context.shape[-2])
    mask(call, "pair_mask", m, shape, f"one entry for each pair from {names}")


def score_bias(call: Call, bias: Any, context: Array) -> None:
    """Check the additive scores of the context elements."""
    if bias is None:
        return
    floating(call, "bias", bias)
    shape = tuple(context.shape[:-1])
    if tuple(bias.shape) != shape:
        raise ShapeError(call.function, "bias", tuple(bias.shape), f"{shape}, one score for each element", "shape")


# --- options --------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(function: str, argument: str, value: Any, *, positive: bool) -> float:
    """Check a finite number, positive or at least not negative, and return it as Python's, which widens no array."""
    try:
        x = float(value) if not isinstance(value, bool) and isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        x = math.inf
    # By comparisons alone, which torch.compile can trace where it takes an option for a symbol.
    if not 0 <= x < math.inf or (positive and x == 0):
        wanted = f"a finite number {'greater than' if positive else 'of at least'} 0"
        raise OptionError(function, argument, repr(value), wanted)
    return x


def integer(function: str, argument: str, value: Any, *, least: int = 1) -> None:
    """Check an integer; NumPy's are accepted, booleans are not."""
    if not is_integer(value) or value < least:
        raise OptionError(function, argument, repr(value), f"an integer of at least {least}")


def choice(function: str, argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check one of several words."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(function, argument, repr(value), "one of " + ", ".join(map(repr, allowed)))


def switch(function: str, argument: str, value: Any) -> None:
    """Check a boolean option."""
    if not isinstance(value, bool):
        raise OptionError(function, argument, repr(value), "True or False")
