"""Taking the tensors of a block by their names, with every shape checked against every other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from setattn._namespace import namespace_of
from setattn._params import LayerNorm, Linear, RMSNorm
from setattn._typing import Array, Shape
from setattn.checkpoints._layout import Convention

Axis: TypeAlias = int | str | Sequence[int | str]
"""One axis of a tensor: a size, the name of a size, or several of them that are laid side by side in the file."""


class Size(NamedTuple):
    """A size that has got a name, and the tensor that gave it."""

    size: int
    tensor: str


class Findings:
    """What was found on the way: shared by all the parts of a block."""

    def __init__(
        self,
        shapes: dict[str, Shape],
        read: Callable[[str], Array] | None,
        convention: Convention,
        stand_in: Callable[[Shape], Array] | None = None,
    ) -> None:
        self.shapes = shapes
        self.read = read  # without it, shapes alone are looked at
        self.stand_in = stand_in  # makes what is read something of that shape alone
        self.convention = convention
        self.used: dict[str, Array] = {}
        self.missing: list[str] = []
        self.problems: list[str] = []
        self.sizes: dict[str, Size] = {}
        self.axes: dict[str, tuple[Axis, ...]] = {}  # of the tensors, as they were asked for


class Weights:
    """The tensors under a prefix.

    A tensor that is missing or of another shape than the ones before it allow is noted, and an absent part takes its
    place, so that all that is wrong with a file can be told at once.
    """

    def __init__(self, findings: Findings, prefix: str) -> None:
        self._f = findings
        self._prefix = prefix

    # --- what there is ---

    def has(self, key: str) -> bool:
        """Say whether there is a tensor, or a group of tensors, of this name."""
        name = self._prefix + key
        return name in self._f.shapes or any(other.startswith(name + self._separator) for other in self._f.shapes)

    def count(self, key: str = "") -> int:
        """Count the groups ``key.0``, ``key.1``, ..."""
        number = 0
        while self.has(f"{key}{self._separator}{number}" if key else str(number)):
            number += 1
        return number

    def at(self, key: str) -> Weights:
        """Return the tensors of a group."""
        return Weights(self._f, f"{self._prefix}{key}{self._separator}")

    def axes(self, key: str) -> int:
        """Return how many axes a tensor has; 0 where it is missing."""
        return len(self._f.shapes.get(self._prefix + key, ()))

    def size(self, name: str) -> int:
        """Return a size by its name; 0 where no tensor gave it."""
        return self._f.sizes[name].size if name in self._f.sizes else 0

    def local(self, name: str) -> str:
        """Name a size that belongs to this group of tensors alone."""
        return f"{self._prefix}{name}"

    def ignore(self, *keys: str) -> None:
        """Take note of tensors, or groups, that carry nothing."""
        for key in keys:
            name = self._prefix + key
            for other in self._f.shapes:
                if other == name or other.startswith(name + self._separator):
                    self._f.used.setdefault(other, ())

    def refuse(self, reason: str) -> None:
        """Take note that this is a variant which is not supported."""
        self._note(reason)

    # --- arrays and the parts of a tree ---

    def array(self, key: str, *axes: Axis) -> Array:
        """Return a tensor of these axes; those that are always 1 are dropped."""
        a, kept = self._take(key, axes), [axis for axis in axes if axis != 1]
        return a if _is_hole(a) or len(kept) == len(axes) else self._reshaped(a, kept)

    def row(self, key: str, axis: int | str) -> Array:
        """Return a tensor of one axis with an axis of 1 in front."""
        a = self._take(key, (axis,))
        return a if _is_hole(a) else self._reshaped(a, (1, axis))

    def computed(self, shape: Shape, make: Callable[[], Array]) -> Array:
        """Return an array that is in no tensor, and is made only where the others are read."""
        if self._f.read is None:
            return ()
        return make() if self._f.stand_in is None else self._f.stand_in(shape)

    def linear(
        self, key: str, inputs: Sequence[int | str], outputs: Sequence[int | str], bias: bool | None = True
    ) -> Linear:
        """Return an affine map, whose weight is a view of the tensor; a bias of ``None`` is optional."""
        (part,) = self.fused(key, 1, inputs, outputs, bias)
        return part

    def fused(
        self,
        key: str,
        parts: int,
        inputs: Sequence[int | str],
        outputs: Sequence[int | str],
        bias: bool | None = True,
        join: str = "",
    ) -> tuple[Linear, ...]:
        """Return several affine maps of the same inputs and outputs that lie one behind the other in one tensor."""
        c, join = self._f.convention, join or self._separator
        weight, shift = f"{key}{join}{c.weight}", f"{key}{join}{c.bias}"
        if c.flat:
            sides: tuple[Axis, ...] = ([parts, *outputs], inputs) if c.outputs_first else (inputs, [parts, *outputs])
            w = self._take(weight, sides)
        else:
            w = self._take(weight, (*inputs, *outputs))
        b: Array = ()
        if bias or (bias is None and self.has(shift)):
            b = self._take(shift, ([parts, *outputs],) if c.flat else tuple(outputs))
        return tuple(Linear(self._weight(w, i, inputs, outputs), self._bias(b, i, outputs)) for i in range(parts))

    def biases(self, key: str, parts: int, outputs: Sequence[int | str]) -> list[Array]:
        """Return several biases that lie one behind the other in one tensor."""
        b = self._take(key, ([parts, *outputs],))
        return [self._bias(b, i, outputs) for i in range(parts)]

    def layer_norm(self, key: str, dim: int | str, bias: bool | None = True) -> LayerNorm:
        """Return a layer normalisation; a bias of ``None`` is optional."""
        c = self._f.convention
        shift = f"{key}{self._separator}{c.shift}"
        scale = self.array(f"{key}{self._separator}{c.scale}", dim)
        return LayerNorm(scale, self.array(shift, dim) if bias or (bias is None and self.has(shift)) else ())

    def rms_norm(self, key: str, dim: int | str) -> RMSNorm:
        """Return a root-mean-square normalisation."""
        return RMSNorm(self.array(f"{key}{self._separator}{self._f.convention.scale}", dim))

    # --- inside ---

    @property
    def _separator(self) -> str:
        return self._f.convention.separator

    def _take(self, key: str, axes: Sequence[Axis]) -> Array:
        """Return a tensor as it is, or a hole in its place."""
        name = self._prefix + key
        self._f.axes.setdefault(name, tuple(axes))
        if name not in self._f.shapes:
            if name not in self._f.missing:
                self._f.missing.append(name)
            return ()
        if not self._fits(name, axes) or self._f.read is None:
            self._f.used.setdefault(name, ())
            return ()
        if _is_hole(self._f.used.get(name, ())):
            self._f.used[name] = self._f.read(name)
        return self._f.used[name]

    def _fits(self, name: str, axes: Sequence[Axis]) -> bool:
        """Check the shape of a tensor, and give the sizes that it is the first to have their names."""
        shape = self._f.shapes[name]
        before, sizes = dict(self._f.sizes), self._f.sizes
        if len(shape) == len(axes) and all(_bind(sizes, a, n, name) for a, n in zip(axes, shape, strict=True)):
            return True
        wanted = ", ".join(_describe(axis, before) for axis in axes)
        self._note(f"{name} of shape ({wanted}{',' if len(axes) == 1 else ''}), not {shape}")
        self._f.sizes.clear()
        self._f.sizes.update(before)
        return False

    def _note(self, problem: str) -> None:
        if problem not in self._f.problems:
            self._f.problems.append(problem)

    def _sizes(self, axes: Sequence[Axis]) -> list[int]:
        parts = [part for axis in axes for part in ([axis] if isinstance(axis, int | str) else axis)]
        return [part if isinstance(part, int) else self._f.sizes[part].size for part in parts]

    def _reshaped(self, a: Array, axes: Sequence[Axis]) -> Array:
        xp: Any = namespace_of(a)
        return xp.reshape(a, tuple(self._sizes(axes)))

    def _weight(self, w: Array, part: int, inputs: Sequence[int | str], outputs: Sequence[int | str]) -> Array:
        """Cut one map's weight out of a tensor and turn it to ``(*inputs, *outputs)``, without a copy."""
        if _is_hole(w):
            return ()
        xp: Any = namespace_of(w)
        c, width = self._f.convention, math.prod(self._sizes(outputs))
        if not c.flat:
            return w
        if c.outputs_first:
            w = self._reshaped(w[part * width : (part + 1) * width, :], (*outputs, *inputs))
            first = len(outputs)
            return xp.permute_dims(w, (*range(first, first + len(inputs)), *range(first)))
        return self._reshaped(w[:, part * width : (part + 1) * width], (*inputs, *outputs))

    def _bias(self, b: Array, part: int, outputs: Sequence[int | str]) -> Array:
        if _is_hole(b) or not self._f.convention.flat:
            return b
        width = math.prod(self._sizes(outputs))
        return self._reshaped(b[part * width : (part + 1) * width], outputs)


def _is_hole(a: Array) -> bool:
    return isinstance(a, tuple)


def _bind(sizes: dict[str, Size], axis: Axis, size: int, tensor: str) -> bool:
    """Check a size against an axis, and name it where the axis has one name that has no size yet."""
    known, unknown = 1, []
    for part in [axis] if isinstance(axis, int | str) else axis:
        if isinstance(part, int):
            known *= part
        elif part in sizes:
            known *= sizes[part].size
        else:
            unknown.append(part)
    if not unknown:
        return size == known
    if len(unknown) > 1 or known == 0 or size % known or size == 0:
        return False
    sizes[unknown[0]] = Size(size // known, tensor)
    return True


def _describe(axis: Axis, sizes: dict[str, Size]) -> str:
    """Write an axis down, such as ``24 (dim of probe)`` or ``3 * 4 * head_dim``."""

    def one(part: int | str) -> str:
        if isinstance(part, int) or part not in sizes:
            return str(part)
        return f"{sizes[part].size} ({part} of {sizes[part].tensor})"

    return one(axis) if isinstance(axis, int | str) else " * ".join(one(part) for part in axis if part != 1)
