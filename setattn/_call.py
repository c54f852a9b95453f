"""The boundary of a public call: what its arrays have in common, and the precision it computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from setattn._adapters import is_about_explicit_axes
from setattn._errors import DTypeError, NamespaceError
from setattn._kernels import ignore_underflow
from setattn._memory import block_bytes, in_one_chunk
from setattn._namespace import (
    bits_of,
    device_of,
    is_plain,
    namespace_of,
    namespace_of_chunks,
    native,
)
from setattn._params import map_params
from setattn._threads import products_on_one_thread
from setattn._typing import Array, Namespace


class Call(NamedTuple):
    """What all arrays of one public call have in common."""

    function: str
    xp: Namespace
    dtype: Any
    device: Any
    half: bool  # whether it is a dtype of half precision, which is computed in float32
    kind: Any  # of array that the first one is
    plain: bool  # whether arrays of one type and dtype always meet
    eager: bool
    decided_by: str = "the first argument"  # which array the others must agree with
    held: Namespace | None = None  # of the chunks of a lazy array; parameters may be of it, too
    chunks: Namespace | None = None  # the same, where the function is computed chunk by chunk
    argument: str = ""  # the name of the first one


def begin(
    function: str,
    argument: str,
    x: Any,
    decided_by: str = "the first argument",
    *,
    by_chunks: bool = False,
    rows: Any = None,
) -> Call:
    """Start a call from its first array, which decides the namespace, dtype and device of all the others.

    ``by_chunks`` says that the function is computed chunk by chunk of lazy arrays, by :mod:`setattn._dask`. Where
    the array is a table that ``rows`` are taken of, these may be a lazy array whose chunks are what the table is.
    """
    xp = namespace_of(x)
    if xp is None:
        raise NamespaceError(function, argument, f"a {type(x).__qualname__}", "an array of a supported library")
    bits = bits_of(x.dtype, xp)
    if bits not in (16, 32, 64):
        raise DTypeError(function, argument, x.dtype, "a real floating dtype of 16, 32 or 64 bits", "dtype")
    lazy = None if rows is None else namespace_of(rows)
    if lazy is not None and namespace_of_chunks(rows, lazy) is xp:
        xp = lazy
    held = namespace_of_chunks(rows if lazy is xp else x, xp)
    chunks = held if by_chunks else None
    eager = chunks is not None or block_bytes(x, xp) is not None
    plain = is_plain(xp)
    device = None if plain or held else device_of(x, xp)
    dtype, kind = native(x.dtype), type(x)
    return Call(function, xp, dtype, device, bits == 16, kind, plain, eager, decided_by, held, chunks, argument)


def evaluate(call: Call, body: Callable[..., Array], params: Any, threads: int = 1) -> Array:
    """Compute ``body(params)``, in float32 where the arrays are of half precision, rounded once at the end.

    The parameters are widened here; the data, which may be large, where a block of it is taken. ``threads`` says on how
    many it is computed.
    """
    if call.held is not None:
        lazy = call.chunks is None
        params = map_params(lambda a: in_one_chunk(a, call.xp) if lazy or namespace_of(a) is call.xp else a, params)
    products = products_on_one_thread if threads > 1 else contextlib.nullcontext()
    try:
        with ignore_underflow(call.xp), products:
            if not call.half:
                return body(params)
            wide = map_params(lambda a: widen(a, namespace_of(a)), params)
            return call.xp.astype(body(wide), call.dtype)
    except Exception as error:
        if not is_about_explicit_axes(error):
            raise
        got = "one of arrays that are sharded over explicit axes in ways that do not fit"
        wanted = "axes of AxisType.Auto: see jax.sharding.auto_axes"
        raise NamespaceError(call.function, call.argument, got, wanted) from error


def widen(a: Array, xp: Namespace) -> Array:
    """Convert to the dtype that half precision is computed in."""
    return xp.astype(a, xp.float32, copy=False)
