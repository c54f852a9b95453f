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
from setattn.checkpoints._weights import Findings, Weights


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
    for replaced in [counts, []] if counts else [[]]:
        named = _named(layout, shapes, prefix, values, replaced, unknown, plain)
        if named is not None:
            return block, named
    return block, plain


def _named(
    layout: Layout,
    shapes: Mapping[str, Shape],
    prefix: str,
    values: Mapping[str, Any],
    replaced: list[str],
    unknown: set[str],
    plain: dict[str, tuple[Dim, ...]],
) -> dict[str, tuple[Dim, ...]] | None:
    """Name dimensions with primes also for some options; ``None`` where the layout takes other tensors then."""
    primes = _primes()
    options = {name: next(primes) for name in replaced}
    given = {**values, **options}
    try:
        _, findings = _built(layout, shapes, prefix, given)
        every = math.prod(options.values())  # so that a width can be divided by any of them
        symbols: dict[str, int] = {}
        made = dict(shapes)
        for name, axes in findings.axes.items():
            sizes = []
            for axis in axes:
                parts = [axis] if isinstance(axis, int | str) else axis
                for part in parts:
                    if isinstance(part, str) and part not in symbols:
                        symbols[part] = next(primes) * every
                sizes.append(math.prod(part if isinstance(part, int) else symbols[part] for part in parts))
            if name in shapes:
                made[name] = tuple(sizes)
        other, _ = _built(layout, made, prefix, given)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    shaped = {path: a.shape for path, a in arrays_of(other.params)}
    if {path: len(shape) for path, shape in shaped.items()} != {path: len(dims) for path, dims in plain.items()}:
        return None
    # A size that lies beside an option that is not known, in one axis of the file, is not known either.
    open_options = {options[name] for name in unknown if name in options}
    hidden = {
        part
        for axes in findings.axes.values()
        for axis in axes
        if not isinstance(axis, int | str) and open_options & {part for part in axis if isinstance(part, int)}
        for part in axis
        if isinstance(part, str)
    }
    words = {size: (symbol.rpartition(".")[2].rpartition("/")[2], symbol in hidden) for symbol, size in symbols.items()}
    words |= {
        size // prime: (f"{symbol.rpartition('.')[2]} / {name}", name in unknown)
        for symbol, size in symbols.items()
        for name, prime in options.items()
    }
    words |= {prime: (name, name in unknown) for name, prime in options.items()}

    def dim(size: int, prime: int) -> Dim:
        name, is_hidden = words.get(prime, ("", False))
        return Dim(None if is_hidden else size, name)

    def known(dims: tuple[Dim, ...], shape: Shape) -> tuple[Dim, ...]:
        return tuple(dim(d.size or 0, p) for d, p in zip(dims, shape, strict=True))

    return {path: known(dims, shaped[path]) for path, dims in plain.items()}


def _built(
    layout: Layout, shapes: Mapping[str, Shape], prefix: str, values: Mapping[str, Any]
) -> tuple[Block, Findings]:
    mine = dict(shapes)
    findings = Findings(mine, lambda name: Stand(mine[name]), layout.convention)
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
