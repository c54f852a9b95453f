"""Chunks that are not what was said of them when the graph was built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from setattn._errors import ArgumentError, DTypeError, MaskError, NamespaceError, ShapeError
from setattn._namespace import name_of, namespace_of, native
from setattn._typing import Array


class Given(NamedTuple):
    """What is known of a lazy array when the graph is built."""

    axes: tuple[str, ...]
    dtype: Any
    library: str  # of its chunks
    last: int  # the size of the last axis, which chunks do not split where it is one of features
    part: str  # of a context; none where it is the library that makes the chunks


def check(function: str, given: Sequence[Given], chunks: Sequence[Array], place: Mapping[str, int]) -> None:
    """Check the chunks of one task, at a place on some of their axes: each of them, and that they fit one another."""
    known: dict[str, tuple[int, str]] = {}  # the size of an axis, and whose it is
    for chunk, own in zip(chunks, given, strict=False):
        if own.part:
            argument = _argument(function, own)
            fault = _fault_alone(chunk, own) or _fault_beside(chunk, own, known)
            if fault is not None:
                error, *found = fault
                number = tuple(place.get(axis, 0) for axis in own.axes)
                raise error(function, f"chunk {number} of {argument}", *found)
            known = {axis: (size, argument) for axis, size in zip(own.axes, chunk.shape, strict=True)} | known


Fault: TypeAlias = tuple[type[ArgumentError], Any, str, str]


def _fault_alone(chunk: Array, given: Given) -> Fault | None:
    """Say in what a chunk differs from what was said of all of them."""
    kind, said = namespace_of(chunk), "as was said of it when the graph was built"
    if kind is None or name_of(kind) != given.library:
        got = f"a {type(chunk).__qualname__}" if kind is None else f"an array of {name_of(kind)}"
        return NamespaceError, got, f"an array of {given.library}, {said}", ""
    if native(chunk.dtype) != native(given.dtype):
        return DTypeError, chunk.dtype, f"{given.dtype}, {said}", "dtype"
    shape = tuple(chunk.shape)
    if len(shape) != len(given.axes):
        return ShapeError, shape, f"{len(given.axes)} axes, {said}", "shape"
    if given.axes[-1].endswith(_FEATURES) and shape[-1] != given.last:
        return ShapeError, shape, f"{(*shape[:-1], given.last)}, {said}", "shape"
    return None


def _fault_beside(chunk: Array, given: Given, known: Mapping[str, tuple[int, str]]) -> Fault | None:
    """Say in what a chunk does not fit those before it."""
    shape = tuple(chunk.shape)
    wanted = tuple(known.get(axis, (size, ""))[0] for axis, size in zip(given.axes, shape, strict=True))
    if wanted == shape:
        return None
    other = next(known[axis][1] for axis, a, b in zip(given.axes, shape, wanted, strict=True) if a != b)
    error = MaskError if "mask" in given.part else ShapeError
    return error, shape, f"{wanted}, as {other} is there", "shape"


_FEATURES = ("features", "keys")

_DATA = {  # what asks and what is asked, where functions do not call both of them x
    "mab": ("x", "y"),
    "cross_attention": ("latents", "inputs"),
    "latent_transformer": ("latents", "latents"),
    "perceiver": ("inputs", "inputs"),
    "perceiver_io": ("queries", "inputs"),
    "perceiver_resampler": ("features", "features"),
}


def names_of(function: str) -> tuple[str, str]:
    """Return what a function calls what asks and what is asked."""
    return _DATA.get(function, ("x", "x"))


def _argument(function: str, given: Given) -> str:
    """Return the name of the argument that an array is."""
    asks = "m" in given.axes and given.part != "pair_mask"
    if given.part == "elements":
        return names_of(function)[0 if asks else 1]
    return f"query_{given.part}" if asks and function == "mab" else given.part
