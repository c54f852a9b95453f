"""Graphs: arrays of tasks that are made for the chunks of other arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from setattn._context import Context
from setattn._dask._faults import Given
from setattn._dask._tasks import Job, merge, same
from setattn._namespace import name_of, namespace_of
from setattn._params import InputEmbedding, is_absent, map_params
from setattn._typing import Array, Namespace

AT_A_TIME = 8  # states merged by one task


class Inputs:
    """The lazy arrays that tasks are made for, with a name for each axis, and the arrays of the parameters."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.given: list[Given] = []
        self.leaves: list[Array] = []
        self.batch: tuple[str, ...] = ()

    @property
    def held(self) -> Namespace:
        return namespace_of(self.arrays[0]._meta)

    def add(self, array: Array, *axes: str, part: str = "") -> int:
        """Take an array in, and return its place."""
        self.arrays.append(array)
        self.given.append(Given(axes, array.dtype, name_of(self.held), array.shape[-1], part))
        return len(self.arrays) - 1

    def context(self, c: Context, rows: str) -> Context:
        """Take the arrays of a context in, and return their places; ``rows`` names the axis of its elements."""
        x = lazy(c.elements)
        x = x.rechunk({-1: -1})  # features that are split are put together once, for all uses
        batch = tuple(f"batch {i}" for i in range(len(x.shape) - 2))
        self.batch = max(self.batch, batch, key=len)
        places: dict[str, Any] = {"elements": self.add(x, *batch, rows, f"{rows} features", part="elements")}
        whole = len(x.chunks[-2]) == 1  # then all that belongs to the elements is in one chunk with them
        for name, axes in (("mask", (rows,)), ("pair_mask", ("m", rows)), ("bias", (rows,))):
            if (array := getattr(c, name)) is not None:
                array = array.rechunk({-1: -1}) if whole else array
                places |= {name: self.add(array, *batch, *axes, part=name)}
        if (keys := c.key_positions) is not None:
            own = batch[: len(keys.shape) - 2]
            keys = keys.rechunk({-1: -1} | ({-2: -1} if whole else {}))
            places |= {"key_positions": self.add(keys, *own, rows, f"{rows} keys", part="key_positions")}
        if isinstance(c.embedding, InputEmbedding):
            places |= {"embedding": self.embedding(c.embedding, rows, x.chunks[-2])}
        return c._replace(**places)

    def embedding(self, p: InputEmbedding, rows: str, chunks: tuple[int, ...]) -> InputEmbedding:
        """Take the tables with a row for each element in, in the chunks of these, and all else as parameters."""
        tables: dict[str, Any] = {}
        for name in ("position", "features"):
            if not is_absent(table := getattr(p, name)):
                table = lazy(table).rechunk({0: chunks, 1: -1})
                tables |= {name: self.add(table, rows, f"{rows} of {name}")}
        others: InputEmbedding = self.params(p._replace(position=(), features=()))
        return others._replace(**tables)

    def params(self, p: Any) -> Any:
        """Take the arrays of parameters in, and return their places, counted from -1 down."""

        def place(a: Array) -> int:
            self.leaves.append(a)
            return -len(self.leaves)

        return map_params(place, p)

    def sample(self, task: Callable[..., Array], job: Job) -> Array:
        """Compute a task on zeros, one row of each array, to see what comes out."""
        xp = self.held
        arrays = [xp.zeros(self._one_row(i), dtype=a.dtype, device=None) for i, a in enumerate(self.arrays)]
        leaves = [xp.zeros(a.shape, dtype=a.dtype, device=None) for a in self.leaves]
        return task((), *arrays, job=job, leaves=leaves)

    def _one_row(self, i: int) -> tuple[int, ...]:
        """Return the shape of an array with one row, and no batch."""
        named = zip(self.given[i].axes, self.arrays[i].shape, strict=True)
        return tuple(1 if axis in ("m", "n") else size for axis, size in named if not axis.startswith("batch"))

    def blockwise(
        self,
        task: Callable[..., Array],
        job: Job,
        axes: tuple[str, ...],
        sizes: dict[str, int],
        dtype: Any,
        adjusted: dict[str, int] | None = None,
        name: str = "",
    ) -> Array:
        """Make an array of tasks, one for each chunk of the axes that its arrays have in common."""
        import dask
        import dask.array as da
        from dask.array.core import unify_chunks
        from dask.array.utils import meta_from_array
        from dask.layers import ArrayBlockIdDep

        pairs = [part for array, own in zip(self.arrays, self.given, strict=True) for part in (array, own.axes)]
        chunks, arrays = unify_chunks(*pairs, warn=False)
        pairs = [part for array, own in zip(arrays, self.given, strict=True) for part in (array, own.axes)]
        at = tuple(axis for axis in axes if axis in chunks)
        block = getattr(job.function, "__name__", "block").strip("_")
        return da.blockwise(
            task,
            axes,
            ArrayBlockIdDep(tuple(chunks[axis] for axis in at)),
            at,
            *pairs,
            token=f"{block}-{name or task.__name__}",
            new_axes=sizes,
            adjust_chunks=adjusted,
            align_arrays=False,
            concatenate=None,  # which copies a chunk; see _tasks.alone
            dtype=dtype,
            meta=meta_from_array(self.arrays[0]._meta, ndim=len(axes), dtype=dtype),
            job=job._replace(at=at, given=tuple(self.given)),
            leaves=dask.delayed(self.leaves, pure=True),
        )


def is_lazy(x: Array) -> bool:
    import dask.array as da

    return isinstance(x, da.Array)


def lazy(x: Array) -> Array:
    """Return a lazy array, of one chunk where it is made of one in memory."""
    import dask.array as da

    return x if is_lazy(x) else da.from_array(x, chunks=-1, asarray=False)


def merged(states: Array, axis: int) -> Array:
    """Merge the states along an axis, as a tree."""
    import dask.array as da

    return da.reduction(
        states,
        chunk=same,
        combine=merge,
        aggregate=merge,
        axis=axis,
        keepdims=True,
        concatenate=True,
        split_every=AT_A_TIME,
        name=states.name.rpartition("-")[0],
        dtype=states.dtype,
        meta=states._meta,
    )


def lengths(y: Context) -> Array:
    """Count the elements that take part, for all chunks together."""
    import dask.array as da

    if y.mask is not None:
        return da.sum(y.mask, axis=-1, dtype="int64")
    return da.sum(da.ones_like(y.elements[..., 0], dtype="int64"), axis=-1)
