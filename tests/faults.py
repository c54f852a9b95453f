"""Every way to spoil one part of a valid call, on NumPy.

A mutant is a call of which one array, parameter or option differs from a valid one. Some mutants are still valid: an
optional part is left out, a set is larger. Those marked ``wrong`` are not; of the others :func:`shapes.infer` knows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import array_api_strict
import numpy as np
from cases import Case

import setattn
from setattn import FeedForward, LayerNorm, Linear, RMSNorm

MASKS = ("mask", "query_mask", "pair_mask", "media_locations")
NUMBERS = ("bias", "key_positions")


@dataclass(frozen=True)
class Mutant:
    """A call with one part spoiled."""

    what: str
    function: str
    arrays: tuple[Any, ...]
    params: Any
    keywords: dict[str, Any]
    wrong: bool

    def __repr__(self) -> str:
        return f"{self.function} with {self.what}"

    def names(self) -> dict[str, Any]:
        """Return the arguments by the names that errors call them."""
        parameters = list(inspect.signature(getattr(setattn, self.function)).parameters)
        return dict(zip(parameters, self.arrays, strict=False)) | {"params": self.params} | self.keywords

    def call(self) -> Any:
        """Carry the call out."""
        params = () if self.params is _NO_PARAMS else (self.params,)
        return getattr(setattn, self.function)(*self.arrays, *params, **self.keywords)


_NO_PARAMS = object()


def parts(tree: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Go through the nodes and leaves of a parameter tree, except for the absent ones."""
    if isinstance(tree, tuple):
        if tree:
            yield path, tree
        for i, part in enumerate(tree):
            yield from parts(part, (*path, i))
    else:
        yield path, tree


def replace(tree: Any, path: tuple[int, ...], new: Any) -> Any:
    """Return the tree with another part at a path."""
    if not path:
        return new
    replaced = [replace(part, path[1:], new) if i == path[0] else part for i, part in enumerate(tree)]
    return type(tree)(*replaced) if hasattr(tree, "_fields") else tuple(replaced)


def _filled(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    return np.ones(shape, dtype=bool) if like.dtype == bool else np.full(shape, 0.5, dtype=like.dtype)


def _reshaped(a: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for axis, size in enumerate(a.shape):
        for other in sorted({0, 1, size - 1, size + 1, 2 * size} - {size, -1}):
            yield f"size {other} on axis {axis}", _filled((*a.shape[:axis], other, *a.shape[axis + 1 :]), a)
        yield f"no axis {axis}", _filled((*a.shape[:axis], *a.shape[axis + 1 :]), a)
    yield "an axis in front", a[None]
    yield "an axis at the end", a[..., None]
    if a.ndim > 1:
        yield "the last two axes swapped", np.swapaxes(a, -1, -2)


def no_arrays(a: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Turn an array into things that are none."""
    yield "a list", a.tolist()
    yield "a number", 0.5
    yield "a NumPy scalar", a.dtype.type(0.5)
    yield "a word", "relu"
    yield "a bare object", object()
    yield "a non-empty tuple", (1.0,)
    yield "a masked array", np.ma.masked_array(a, mask=False)
    if a.ndim == 2:
        yield "a matrix", a.view(np.matrix)


def _other_dtypes(a: np.ndarray, alone: bool) -> Iterator[tuple[str, np.ndarray]]:
    if a.dtype == bool:
        others = ["uint8", "int64", "float32", "float64", "complex128", "object"]
    else:
        others = ["bool", "int64", "complex128", "object"] + ([] if alone else ["float32", "float16"])
    for other in others:
        yield f"dtype {other}", a.astype(other)


def _no_plain_array(a: np.ndarray, alone: bool) -> Iterator[tuple[str, Any]]:
    yield from no_arrays(a)
    yield from _other_dtypes(a, alone)
    if not alone:
        yield "an array of another library", array_api_strict.asarray(a)


def _other_nodes(node: Any) -> Iterator[tuple[str, Any, bool]]:
    yield "nothing", (), False
    yield "None", None, True
    yield "a list", list(node), True
    yield "a bare array", np.full((3,), 0.5), True
    if hasattr(node, "_fields"):
        yield "a plain tuple", tuple(node), True
        yield "a dictionary", node._asdict(), True
    else:
        yield "an entry more", (*node, node[0]), False
        yield "an entry of None", (*node, None), True
        yield "an entry less", node[1:], False
    for other in (Linear(np.full((12, 12), 0.5)), LayerNorm(), RMSNorm(), FeedForward(Linear(np.full((12, 12), 0.5)))):
        if type(other) is not type(node):
            yield f"a {type(other).__name__}", other, False


WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation": ("tanh", "RELU", "", None, 1, ["relu"], np.ones(3), math.tanh),
    "eps": (0, 0.0, -1e-5, math.nan, math.inf, True, None, "1e-5", 1j, 10**400, np.ones(2), np.asarray(1e-5)),
    "scale": (-0.5, math.nan, math.inf, True, "0.5", 1j, 10**400, np.asarray(0.5)),
    "depth": (0, -1, 2.0, True, "2", np.asarray(3), math.inf),
    "query_residual": (0, 1, None, "no"),
    "decoder_residual": (0, 1, None, "no"),
    "immediate": (0, 1, None, "no"),
    "ff_without_media": (0, 1, None, "no"),
    "num_bands": (0, -1, 2.0, True, None, "4", np.asarray(4)),
    "max_resolution": (0, -1.0, math.nan, math.inf, True, None, "224", (1.0,), [1.0, 2.0], (1.0, 2.0, 0.0), np.ones(3)),
    "dim": (0, -12, 2.0, True, None, "12", 7, np.asarray(12)),
    "temperature": (0, 0.0, -1.0, math.nan, math.inf, True, None, "100", 1j, 10**400, np.asarray(20.0)),
    "concat_position": (0, 1, None, "no"),
    "order": ("paper", None, 1),
    "plan": ({"block_size": 4}, 4, True, "fast", (None, None, 1), np.ones(2)),
}


def mutants(case: Case) -> Iterator[Mutant]:
    """Spoil one part of a valid call after another."""
    params = _NO_PARAMS if case.params is None else case.params
    keywords = case.masks | case.options
    alone = case.params is None

    def mutant(what: str, wrong: bool, arrays: Any = case.arrays, params: Any = params, **changed: Any) -> Mutant:
        return Mutant(what, case.function, arrays, params, keywords | changed, wrong)

    for i, a in enumerate(case.arrays):
        before, after = case.arrays[:i], case.arrays[i + 1 :]
        for what, b in _reshaped(a):
            yield mutant(f"{what} in array {i}", False, arrays=(*before, b, *after))
        for what, b in (*_no_plain_array(a, alone), ("None", None), ("nothing", ())):
            yield mutant(f"{what} for array {i}", True, arrays=(*before, b, *after))
    for path, part in () if alone else parts(params):
        if isinstance(part, tuple):
            for what, other, wrong in _other_nodes(part):
                yield mutant(f"{what} at {path}", wrong, params=replace(params, path, other))
            continue
        yield mutant(f"nothing at {path}", False, params=replace(params, path, ()))
        yield mutant(f"None at {path}", True, params=replace(params, path, None))
        for what, b in _reshaped(part):
            yield mutant(f"{what} at {path}", False, params=replace(params, path, b))
        for what, b in _no_plain_array(part, alone):
            yield mutant(f"{what} at {path}", True, params=replace(params, path, b))
    for name, m in case.masks.items():
        yield mutant(f"no {name}", False, **{name: None})
        for what, b in _reshaped(m):
            yield mutant(f"{what} in {name}", False, **{name: b})
        for what, b in (*_no_plain_array(m, False), ("nothing", ())):
            yield mutant(f"{what} for {name}", True, **{name: b})
    for name in inspect.signature(getattr(setattn, case.function)).parameters:
        for value in WRONG_OPTIONS.get(name, ()):
            yield mutant(f"{name}={value!r}", True, **{name: value})
