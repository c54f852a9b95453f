"""A block over arrays that are larger than memory: maps of their files, taken a part of the batch at a time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import setattn
from setattn._commands._errors import CommandError, first_line
from setattn._commands._weights import in_words
from setattn._errors import ArgumentError
from setattn._params import is_absent, map_params
from setattn._structure import token_table
from setattn._typing import Namespace, Shape
from setattn.checkpoints._block import Block
from setattn.streaming._files import SourceError, Watched

PART_BYTES = 1 << 24  # of the inputs of a part, where nothing else is asked for
_LARGEST_TOKEN = 2**31 - 1

NDArray = np.ndarray[Any, Any]


class Given(NamedTuple):
    """An array of a command line."""

    argument: str  # of the function
    name: str  # what a message calls it
    array: NDArray
    axes: int  # it has for one set
    dtype: np.dtype[Any]  # it is computed in
    watched: Watched | None = None

    @property
    def is_batched(self) -> bool:
        """Say whether it has an axis to be cut."""
        return self.array.ndim > self.axes

    @property
    def sets(self) -> tuple[int, ...]:
        """The shape of its batch."""
        shape: Shape = self.array.shape
        return shape[: len(shape) - self.axes]

    @property
    def set_shape(self) -> tuple[int, ...]:
        """The shape of one set."""
        shape: Shape = self.array.shape
        return shape[len(shape) - self.axes :]

    @property
    def set_bytes(self) -> int:
        """How much of memory one set takes."""
        return math.prod(self.set_shape) * self.dtype.itemsize

    def part(self, cut: slice) -> NDArray:
        """Copy a part of it, or all if there is nothing to be cut."""
        return self.read(cut if self.is_batched else ...)

    def read(self, *keys: Any) -> NDArray:
        """Copy what is left of it after some indices; the file is mapped anew, so that no pages of it pile up.

        Raises
        ------
        CommandError
            If the file has changed since it was opened, or cannot be read.
        """
        a = self.array
        if self.watched is not None:
            try:
                self.watched.check(0)
                a = np.lib.format.open_memmap(self.watched.path, mode="r")
            except SourceError as error:
                raise CommandError(f"{self.name} has changed while it was read") from error
            except OSError as error:
                raise CommandError(f"{self.name} cannot be read: {error.strerror}") from error
        for key in keys:
            a = a[key]
        if self.dtype.kind == "i":  # a token that is too large for some libraries is in no table
            a = np.where((a < 0) | (a > _LARGEST_TOKEN), -1, a)
        with np.errstate(all="ignore"):
            return np.array(a, dtype=self.dtype, order="C")


def open_array(path: Path, name: str) -> NDArray:
    """Map a ``.npy`` file into memory.

    Raises
    ------
    CommandError
        If it cannot be read, is broken or holds no numbers.
    """
    try:
        array: NDArray = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise CommandError(f"{name} {path} cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) and "magic" not in str(error) else "it begins otherwise"
        raise CommandError(f"{name} {path} is no whole .npy file of numbers: {reason}") from error
    if array.dtype.kind not in "biuf":
        raise CommandError(f"{name} {path} has dtype {array.dtype}; wanted real numbers or booleans")
    return array


# --- what a block takes ---------------------------------------------------------------------------------------------


def arguments_of(block: Block) -> tuple[list[str], bool]:
    """Return the names of the arrays that a block takes, and whether it takes a mask."""
    parameters = inspect.signature(getattr(setattn, block.function)).parameters
    arrays = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    return arrays, "mask" in parameters


def check_options(block: Block) -> None:
    """Check that a block's function takes its options, which come from a file.

    Raises
    ------
    CommandError
        If it does not.
    """
    known = inspect.signature(getattr(setattn, block.function)).parameters
    for name in block.options:
        if name not in known:
            raise CommandError(f"FILE has the option {name!r}; wanted one that {block.function} takes")


def dtype_of(block: Block, other: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a block's parameters, or another one if it has none."""
    found: list[np.dtype[Any]] = []
    map_params(lambda a: found.append(a.dtype), block.params)
    return (found or [other])[0].newbyteorder("=")


def takes_tokens(block: Block) -> bool:
    """Say whether the inputs of a block are integers, which name rows of a table."""
    return not is_absent(token_table(block.params))


def axes_of(block: Block, position: int) -> int:
    """Return how many axes one set has, as the first or the second array of a block."""
    if block.function == "perceiver_resampler":
        return 2 + sum(not is_absent(e) for e in (block.params.frame_embedding, block.params.media_embedding))
    if block.function == "gated_cross_attention":
        return 2 + position  # a set has several media
    return 1 if position == 0 and takes_tokens(block) else 2


def give(block: Block, position: int, path: Path, name: str, *, convert: bool) -> Given:
    """Open an input of a block, and check its dtype against the weights'.

    Raises
    ------
    CommandError
        If it cannot be read, or has another dtype and is not to be converted.
    """
    array, argument = open_array(path, name), arguments_of(block)[0][position]
    watched = Watched("run", path)
    axes, kind, wanted = axes_of(block, position), array.dtype.kind, dtype_of(block, array.dtype)
    if axes == 1:
        if kind not in "iu":
            raise CommandError(f"{name} {path} has dtype {array.dtype}; wanted integers, the rows of a table of tokens")
        return Given(argument, f"{name} {path}", array, axes, np.dtype(np.int32), watched)
    if kind == "b" or wanted.kind != "f":
        real = f"{wanted}, as the weights have" if wanted.kind == "f" else "floating numbers"
        raise CommandError(f"{name} {path} has dtype {array.dtype}; wanted {real}")
    if array.dtype.newbyteorder("=") != wanted and not convert:
        hint = f"{wanted}, as the weights have, or --dtype {wanted} to convert it"
        raise CommandError(f"{name} {path} has dtype {array.dtype}; wanted {hint}")
    return Given(argument, f"{name} {path}", array, axes, wanted, watched)


def give_mask(block: Block, inputs: list[Given], path: Path) -> Given:
    """Open a mask over the elements that are attended to.

    Raises
    ------
    CommandError
        If it cannot be read, is not boolean, or the block takes none.
    """
    if not arguments_of(block)[1]:
        raise CommandError(f"--mask is not for {block.function}, which takes none")
    array = open_array(path, "--mask")
    if array.dtype.kind != "b":
        wanted = "bool, True where an element takes part"
        raise CommandError(f"--mask {path} has dtype {array.dtype}; wanted {wanted}")
    of = inputs[0] if block.function == "perceiver_io" else inputs[-1]
    axes = of.axes if of.dtype.kind == "i" else of.axes - 1
    return Given("mask", f"--mask {path}", array, axes, np.dtype(bool), Watched("run", path))


# --- calling it -----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of the result, as an array of NumPy."""

    array: NDArray
    odd: int  # results that are seen here, for the first time, to hold numbers that are not finite


class Work(NamedTuple):
    """All that is to be computed."""

    parts: Callable[[Callable[[int], object]], Iterator[Part]]  # tells what it has seen to a function
    shape: Callable[[Shape], Shape]  # of the result, by that of its first part
    results: int
    total: int  # that will be seen
    unit: str
    where_memory_ends: str  # what is said there
    about: str = ""  # a line for the user


def in_parts(block: Block, arrays: list[Given], batch: int, xp: Namespace) -> Work:
    """Return the work on whole sets, some of the batch at a time."""
    sets = number_of_sets(arrays)

    def parts(seen: Callable[[int], object]) -> Iterator[Part]:
        for result in results(block, arrays, batch, xp):
            rows = result if sets is not None else result[None]
            yield Part(result, int(np.count_nonzero(~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim))))))
            seen(len(rows))

    count = 1 if sets is None else sets
    smaller = "; wanted a smaller --batch" if min(batch, count) > 1 else " for one set"
    return Work(
        parts,
        lambda part: part if sets is None else (sets, *part[1:]),
        max(count, 1),
        count,
        "set",
        f"not enough memory{smaller}",
    )


def number_of_sets(arrays: list[Given]) -> int | None:
    """Return the size of the axis that is cut; ``None`` if there is none."""
    return next((g.array.shape[0] for g in arrays if g.is_batched), None)


def default_batch(arrays: list[Given]) -> int:
    """Return how many sets make a part that is not large."""
    one = sum(int(g.array[:1].size) * g.dtype.itemsize for g in arrays if g.is_batched)
    return max(1, PART_BYTES // max(one, 1))


def results(block: Block, arrays: list[Given], batch: int, xp: Namespace) -> Iterator[NDArray]:
    """Yield the results of one part of the batch after another, as arrays of NumPy.

    Raises
    ------
    CommandError
        If the arrays do not fit the block or each other.
    """
    sets = number_of_sets(arrays)
    if any(g.is_batched and g.array.shape[0] != sets for g in arrays):
        raise refusal(block, arrays, None)
    for start in range(0, max(sets or 0, 1), batch):
        parts = [g.part(slice(start, start + batch)) for g in arrays]
        try:
            with np.errstate(all="ignore"):  # what is not finite is counted when it is there
                yield setattn.convert_params(_call(block, arrays, [xp.asarray(a) for a in parts]), np)
        except ArgumentError as error:
            raise refusal(block, arrays, error) from error


def _call(block: Block, arrays: list[Given], parts: list[Any]) -> Any:
    """Call a block with parts of what was given."""
    given = {g.argument: a for g, a in zip(arrays, parts, strict=True)}
    mask = given.pop("mask", None)
    return block(*given.values()) if mask is None else block(*given.values(), mask=mask)


def refusal(block: Block, arrays: list[Given], error: ArgumentError | None) -> CommandError:
    """Make the error of the whole arrays, whose shapes a user knows: shapes are checked before any number is looked at.

    What stands for them has their shapes and takes no memory.
    """
    if error is None or any(g.is_batched for g in arrays):
        stand = [np.broadcast_to(np.zeros((), g.dtype), g.array.shape) for g in arrays]
        whole = Block(block.function, map_params(lambda a: setattn.convert_params(a, np), block.params), block.options)
        try:
            _call(whole, arrays, stand)
        except ArgumentError as other:
            error = other
    if error is None:
        return CommandError("the inputs have batches of several sizes")
    return CommandError(in_words(error, {g.argument: g.name for g in arrays}))
