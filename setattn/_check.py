"""What is checked of arrays, masks and options before any arithmetic: types, dtypes and integers, never a value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from setattn._blocks import Plan
from setattn._call import Call
from setattn._errors import DTypeError, MaskError, NamespaceError, OptionError, ShapeError
from setattn._memory import has_own_threads
from setattn._namespace import (
    bits_of,
    device_of,
    is_boolean,
    is_integral,
    largest_number,
    name_of,
    namespace_of,
    native,
    surely_meets,
    unlike_others,
)
from setattn._order import SCORES, VALUES, Order
from setattn._threads import has_threads
from setattn._typing import Array, Shape


class Width(NamedTuple):
    """The number of features of something, and where it came from: an argument with its shape, or a part's name."""

    size: int
    source: str
    shape: Shape | None = None
    beside: int = 0  # how many of the features are laid beside those of the argument


# --- arrays ---------------------------------------------------------------------------------------------------------


def belongs(call: Call, argument: str, a: Any) -> None:
    """Check that something is an array of the library and device of the first one."""
    xp = namespace_of(a)
    if xp is None:
        raise NamespaceError(call.function, argument, f"a {type(a).__qualname__}", f"an array of {name_of(call.xp)}")
    if xp is not call.xp and not (xp is call.held and argument.startswith("params")):
        wanted = f"an array of {name_of(call.xp)}, as {call.decided_by} is"
        raise NamespaceError(call.function, argument, f"an array of {name_of(xp)}", wanted)
    if kind := unlike_others(a, xp):
        raise NamespaceError(call.function, argument, *kind)
    if call.device is not None:
        device = device_of(a, xp)
        if device is not None and device != call.device:
            raise NamespaceError(
                call.function, argument, f"on device {device}", f"device {call.device}, as {call.decided_by} is"
            )
    if call.held is not None and (call.chunks is None or argument.startswith("params")):
        known(call, argument, a, *a.shape)


def known(call: Call, argument: str, a: Array, *sizes: float) -> None:
    """Check that sizes are known: one that a lazy array does not know is NaN."""
    for size in sizes:
        if size != size:
            wanted = "known sizes: call compute_chunk_sizes() on the array first"
            raise ShapeError(call.function, argument, tuple(a.shape), wanted, "shape")


def alike(a: Sequence[float], b: Sequence[float]) -> bool:
    """Say whether two shapes are the same, as far as they are known."""
    return len(a) == len(b) and all(m == n or (m != m and n != n) for m, n in zip(a, b, strict=True))


def floating(call: Call, argument: str, a: Any) -> None:
    """Check that an array is of the library, device and dtype of the first one."""
    if type(a) is call.kind and a.dtype == call.dtype and (call.plain or surely_meets(a, call.device, call.xp)):
        return
    belongs(call, argument, a)
    if a.dtype != call.dtype and native(a.dtype) != call.dtype:
        raise DTypeError(call.function, argument, a.dtype, f"{call.dtype}, as {call.decided_by} has", "dtype")


def data(call: Call, argument: str, x: Any, axes: str = "n, dim", ndim: int = 2) -> Width:
    """Check one input array, whose last axes are named, and return its width."""
    floating(call, argument, x)
    if len(x.shape) < ndim:
        raise ShapeError(call.function, argument, tuple(x.shape), f"(..., {axes})", "shape")
    known(call, argument, x, x.shape[-1])
    if x.shape[-1] < 1:
        raise ShapeError(call.function, argument, tuple(x.shape), f"(..., {axes}) with at least one feature", "shape")
    return Width(x.shape[-1], argument, tuple(x.shape))


def tokens(call: Call, argument: str, x: Any) -> None:
    """Check integers that are to be looked up in a table."""
    integers(call, argument, x, f", as {call.decided_by} is a table to look them up in")
    if len(x.shape) < 1:
        raise ShapeError(call.function, argument, tuple(x.shape), "(..., n)", "shape")


def integers(call: Call, argument: str, x: Any, reason: str = "") -> None:
    """Check the dtype of an array of integers."""
    belongs(call, argument, x)
    if not is_integral(x.dtype, call.xp):
        raise DTypeError(call.function, argument, x.dtype, f"an integer dtype{reason}", "dtype")


def same_batch(call: Call, argument: str, query: Array, context: Array, context_axes: int = 2) -> None:
    """Check that queries have the batch of their context, or none at all, which shares them among the batch."""
    batch = tuple(context.shape[:-context_axes])
    if len(query.shape) > 2 and not alike(query.shape[:-2], batch):
        sizes = ", ".join(map(str, (*batch, *query.shape[-2:])))
        wanted = f"({sizes}), as the other array has shape {tuple(context.shape)}"
        if batch:
            wanted += f", or {tuple(query.shape[-2:])} for all of the batch"
        raise ShapeError(call.function, argument, tuple(query.shape), wanted, "shape")


WITH_BIAS = ("attention", "attention_weights")


def mask(call: Call, argument: str, m: Any, shape: Shape, meaning: str) -> None:
    """Check a boolean mask against its one allowed shape."""
    if m is None:
        return
    belongs(call, argument, m)
    if not is_boolean(m.dtype, call.xp):
        wanted = "bool, True where an element takes part"
        if argument == "mask" and call.function in WITH_BIAS and bits_of(m.dtype, call.xp):
            wanted += "; scores to add go to bias"
        raise DTypeError(call.function, argument, m.dtype, wanted, "dtype")
    if not alike(m.shape, shape):
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
    if not alike(bias.shape, shape):
        raise ShapeError(call.function, "bias", tuple(bias.shape), f"{shape}, one score for each element", "shape")


def key_positions(call: Call, positions: Any, context: Array, width: Width) -> None:
    """Check what is added to the context elements for their keys alone."""
    if positions is None:
        return
    floating(call, "key_positions", positions)
    shared = (context.shape[-2], width.size)
    own = (*context.shape[:-2], *shared)
    if not any(alike(positions.shape, shape) for shape in (shared, own)):
        wanted = f"{shared}, one row for each element" + (f", or {own}" if own != shared else "")
        raise ShapeError(call.function, "key_positions", tuple(positions.shape), wanted, "shape")


# --- options --------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(call: Call, argument: str, value: Any, *, positive: bool) -> float:
    """Check a finite number, positive or at least not negative, and return it as Python's, which widens no array."""
    x = _number(value)
    # By comparisons alone, which torch.compile can trace where it takes an option for a symbol.
    if not 0 <= x < math.inf or (positive and x == 0):
        raise OptionError(call.function, argument, repr(value), _finite(positive))
    most = largest_number(call.dtype, call.xp)
    if x > most:
        wanted = f"a number of at most {most:.8g}, the largest of float32, which is computed in"
        raise OptionError(call.function, argument, repr(value), wanted)
    return x


def numbers_for_axes(call: Call, argument: str, value: Any, axes: int) -> tuple[float, ...]:
    """Check a positive number for all axes, or a sequence with one for each, and return one for each."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(value) if several else (value,) * axes
    if len(values) != axes or not all(0 < _number(x) < math.inf for x in values):
        wanted = f"{_finite(True)}, or a sequence of {axes}, one for each axis"
        raise OptionError(call.function, argument, repr(value), wanted)
    return tuple(number(call, argument, x, positive=True) for x in values)


def _number(value: Any) -> float:
    """Return a real number as Python's, and NaN for anything else."""
    if isinstance(value, float):
        return float(value)
    try:
        return float(value) if not isinstance(value, bool) and isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def _finite(positive: bool) -> str:
    return f"a finite number {'greater than' if positive else 'of at least'} 0"


def integer(function: str, argument: str, value: Any, *, least: int = 1, multiple: int = 1) -> None:
    """Check an integer, perhaps a multiple of another; NumPy's are accepted, booleans are not."""
    if not is_integer(value) or value < least or value % multiple:
        what = f"a positive multiple of {multiple}" if multiple > 1 else f"an integer of at least {least}"
        raise OptionError(function, argument, repr(value), what)


def plan(call: Call, value: Any) -> Plan:
    """Check how a result is to be computed, and return it as it holds for the library at hand."""
    if value is None:
        return _USUAL
    if not isinstance(value, Plan):
        raise OptionError(call.function, "plan", repr(value), "a setattn.Plan")
    order, size, threads, recompute = value
    if order is not None:
        if not isinstance(order, Order):
            raise OptionError(call.function, "plan.order", repr(order), "a setattn.Order")
        choice(call.function, "plan.order.scores", order.scores, SCORES)
        choice(call.function, "plan.order.values", order.values, VALUES)
    if size is not None:
        integer(call.function, "plan.block_size", size)
    integer(call.function, "plan.threads", threads)
    switch(call.function, "plan.recompute", recompute)
    if has_own_threads(call.xp):
        return value._replace(threads=1)
    if threads > 1 and not has_threads():
        wanted = "1, as the package threadpoolctl is not installed"
        raise OptionError(call.function, "plan.threads", repr(threads), wanted)
    return value


_USUAL = Plan()


def choice(function: str, argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check one of several words."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(function, argument, repr(value), "one of " + ", ".join(map(repr, allowed)))


def switch(function: str, argument: str, value: Any) -> None:
    """Check a boolean option."""
    if not isinstance(value, bool):
        raise OptionError(function, argument, repr(value), "True or False")
