"""The names that a layout has for the dimensions of a block, found by building it of shapes alone.

A build function names the sizes of the tensors it takes. It is run once to learn these names, and once more with a
prime number in the place of each: a dimension of the tree is then known by the primes it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from setattn._params import is_absent
from setattn._typing import Shape
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout
from setattn.checkpoints._weights import Axis, Findings, Weights


class Dim(NamedTuple):
    """One dimension: its size, ``None`` where an option that is not known decides, and its name, if it has one."""

    size: int | None
    name: str

    def __str__(self) -> str:
        size = [] if self.size is None else [str(self.size)]
        return " ".join([self.name, *size] if self.name else size) or "?"


class Stand:
    """A stand-in for an array: a shape, and what layouts do with arrays."""

    def __init__(self, shape: Shape) -> None:
        self.shape = tuple(shape)

    def __array_namespace__(self, *, api_version: str | None = None) -> type[_Operations]:
        return _Operations

    def __getitem__(self, key: Any) -> Stand:
        keys = key if isinstance(key, tuple) else (key,)
        kept = [
            len(range(*k.indices(n))) if isinstance(k, slice) else None for k, n in zip(keys, self.shape, strict=False)
        ]
        return Stand((*[n for n in kept if n is not None], *self.shape[len(keys) :]))

    def _alike(self, _: float) -> Stand:
        return Stand(self.shape)

    __add__ = __sub__ = __mul__ = __truediv__ = _alike  # with a number


class _Operations:
    @staticmethod
    def reshape(x: Stand, shape: Shape) -> Stand:
        if math.prod(x.shape) != math.prod(shape):
            raise ValueError(f"{x.shape} is no {shape}")
        return Stand(shape)

    @staticmethod
    def permute_dims(x: Stand, axes: tuple[int, ...]) -> Stand:
        return Stand(tuple(x.shape[i] for i in axes))


def name_dims(
    layout: Layout, shapes: Mapping[str, Shape], prefix: str, values: Mapping[str, Any], unknown: set[str]
) -> tuple[Block, dict[str, tuple[Dim, ...]]]:
    """Build a block of shapes alone, and name the dimensions of its arrays, by their paths.

    ``values`` are those of the options, of which those in ``unknown`` are guesses.
    """
    block, _ = _built(layout, shapes, prefix, values)
    plain = {path: tuple(Dim(n, "") for n in a.shape) for path, a in arrays_of(block.params)}
    counts = [o.name for o in layout.options if o.kind is int and values[o.name] is not None]
    counts = [
        name for name in counts if _like(layout, shapes, prefix, values, [name], plain)
    ]  # none of how many layers
    like = _like(layout, shapes, prefix, values, counts, plain) or _like(layout, shapes, prefix, values, [], plain)
    if like is None:
        return block, plain
    primes, words = like[0], _words(*like[1:], unknown)

    def dim(size: int | None, prime: int) -> Dim:
        name, is_hidden = words.get(prime, ("", False))
        return Dim(None if is_hidden else size, name)

    named = {
        path: tuple(dim(d.size, p) for d, p in zip(dims, primes[path], strict=True)) for path, dims in plain.items()
    }
    return block, named


class _Like(NamedTuple):
    """A block with primes in the place of sizes: its shapes, what the primes stand for, and the axes of its tensors."""

    shapes: dict[str, Shape]
    options: dict[str, int]
    symbols: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]


def _like(
    layout: Layout,
    shapes: Mapping[str, Shape],
    prefix: str,
    values: Mapping[str, Any],
    replaced: list[str],
    plain: dict[str, tuple[Dim, ...]],
) -> _Like | None:
    """Build a block with primes, also for some of the options; ``None`` where it comes out with other arrays then."""
    primes = _primes()
    options = {name: next(primes) for name in replaced}
    every = math.prod(options.values())  # so that a width can be divided by any of them
    symbols: dict[str, int] = {}
    made = dict(shapes)
    try:
        for _ in range(3):  # how an axis is divided may depend on what divides the width
            block, findings = _built(layout, made, prefix, {**values, **options})
            for name, axes in findings.axes.items():
                if name in made:
                    made[name] = tuple(_size(axis, symbols, every, primes) for axis in axes)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    found = {path: a.shape for path, a in arrays_of(block.params)}
    if {path: len(shape) for path, shape in found.items()} != {path: len(dims) for path, dims in plain.items()}:
        return None
    return _Like(found, options, symbols, findings.axes)


def _size(axis: Axis, symbols: dict[str, int], every: int, primes: Iterator[int]) -> int:
    """Return the size of an axis, with a prime for each of its names."""
    parts = [axis] if isinstance(axis, int | str) else axis
    for part in parts:
        if isinstance(part, str) and part not in symbols:
            symbols[part] = next(primes) * every
    return math.prod(part if isinstance(part, int) else symbols[part] for part in parts)


def _words(
    options: dict[str, int], symbols: dict[str, int], axes: dict[str, tuple[Axis, ...]], unknown: set[str]
) -> dict[int, tuple[str, bool]]:
    """Return what numbers stand for, and whether that is a size that is not known.

    What lies beside an option that is not known, in one axis of a tensor, is not known either.
    """
    guesses = {options[name] for name in unknown if name in options}
    divided = [axis for its in axes.values() for axis in its if not isinstance(axis, int | str) and guesses & {*axis}]
    hidden = {part for axis in divided for part in axis}
    words: dict[int, tuple[str, bool]] = {}
    for symbol, size in symbols.items():
        name = symbol.rpartition(".")[2].rpartition("/")[2]
        words |= {size // prime: (f"{name} / {option}", option in unknown) for option, prime in options.items()}
        words[size] = (name, symbol in hidden)
    return words | {prime: (option, option in unknown) for option, prime in options.items()}


def _built(
    layout: Layout, shapes: Mapping[str, Shape], prefix: str, values: Mapping[str, Any]
) -> tuple[Block, Findings]:
    mine = dict(shapes)
    findings = Findings(mine, lambda name: Stand(mine[name]), layout.convention, stand_in=Stand)
    return layout.build(Weights(findings, prefix), **values), findings


def arrays_of(tree: Any, path: str = "") -> Iterator[tuple[str, Stand]]:
    """Go through the arrays of a tree with their paths."""
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", range(len(tree)))
        for name, part in zip(names, tree, strict=True):
            yield from arrays_of(part, f"{path}.{name}" if path else str(name))
    elif not is_absent(tree):
        yield path, tree


def _primes() -> Iterator[int]:
    """Yield primes that are larger than what layouts have as constants."""
    found: list[int] = [2]
    for n in range(3, 1_000_000, 2):
        if all(n % p for p in found if p * p <= n):
            found.append(n)
            if n > 1000:
                yield n
