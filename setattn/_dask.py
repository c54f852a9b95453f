"""The blocks over the chunks of Dask arrays: the state of each chunk, merged as a tree, finished once.

What is computed of a chunk is computed by the functions of the library themselves, on the arrays that the chunks are.
Parameters are one task of the graph, so that they travel once to each worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from setattn._attend import state_of
from setattn._blocks import fold
from setattn._context import Context
from setattn._layers import Options
from setattn._namespace import ignore_underflow, in_one_chunk, namespace_of
from setattn._params import Attention, InputEmbedding, LengthScale, is_absent, map_params
from setattn._state import State, finish, head_counts, merge_states, output, ungroup
from setattn._typing import Array, Namespace

F = TypeVar("F", bound=Callable[..., Array])

AT_A_TIME = 8  # states merged by one task


def over_chunks(function: F) -> F:
    """Let a block ``function(q, y, p, o, *options)`` of two contexts and parameters take lazy arrays, too.

    Its queries attend once. The result has a row for each query.
    """

    @functools.wraps(function)
    def block(q: Context, y: Context, p: Any, o: Options, *options: Any) -> Array:
        if not o.lazy:
            return function(q, y, p, o, *options)
        return _attended(_Job(block, o._replace(xp=None, lazy=False), options), q, y, p)

    return cast("F", block)


def of_sets(function: Callable[[Array, Any, Options], Array], x: Array, p: Any, o: Options, rows: int = 0) -> Array:
    """Compute ``function(x, p, o)`` of sets that need no more than their own chunk; it has ``rows``, if not all."""
    if not o.lazy:
        return function(x, p, o)
    if is_absent(p):
        return x
    x = whole_sets(x, o)
    inputs = _Inputs()
    job = _Job(function, o._replace(xp=None, lazy=False), (), inputs.context(Context(x), "m"))
    job = job._replace(p=inputs.params(p))
    sample = job.sample(inputs, _call_on_array)
    sizes = {"e": sample.shape[-1]} | ({"r": rows} if rows else {})
    axes = (*inputs.batch, "r" if rows else "m", "e")
    return inputs.blockwise(_call_on_array, job, axes, sizes, sample.dtype)


def whole_sets(x: Array, o: Options) -> Array:
    """Put the rows of each set of a lazy array in one chunk; return any other array as it is."""
    return _lazy(x).rechunk({-2: -1}) if o.lazy else x


def outright(p: Any, x: Array, o: Options) -> tuple[Any, Options]:
    """Return parameters and options for operations on a lazy array itself; those given for any other."""
    if not o.lazy:
        return p, o
    xp: Namespace = namespace_of(x)
    return map_params(lambda a: in_one_chunk(a, xp), p), o._replace(xp=xp, lazy=False, eager=False)


# --- the graph ------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """What tasks compute: a function and its arguments, with the places of arrays in those of a task."""

    function: Callable[..., Array]
    o: Options
    options: tuple[Any, ...]
    q: Any = None
    y: Any = None
    p: Any = None
    length: int | None = None
    state: int | None = None

    def sample(self, inputs: _Inputs, task: Callable[..., Array]) -> Array:
        """Compute a task on zeros, one row of each array, to see what comes out."""
        xp = inputs.held
        arrays = [xp.zeros(inputs.one_row(i), dtype=a.dtype, device=None) for i, a in enumerate(inputs.arrays)]
        leaves = [xp.zeros(a.shape, dtype=a.dtype, device=None) for a in inputs.leaves]
        return task(*arrays, job=self, leaves=leaves)


class _Inputs:
    """The lazy arrays that tasks are made for, with a name for each axis, and the arrays of the parameters."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.axes: list[tuple[str, ...]] = []
        self.leaves: list[Array] = []
        self.batch: tuple[str, ...] = ()

    @property
    def held(self) -> Namespace:
        return namespace_of(self.arrays[0]._meta)

    def add(self, array: Array, *axes: str) -> int:
        """Take an array in, and return its place."""
        self.arrays.append(array)
        self.axes.append(axes)
        return len(self.arrays) - 1

    def context(self, c: Context, rows: str) -> Context:
        """Take the arrays of a context in, and return their places; ``rows`` names the axis of its elements."""
        x = _lazy(c.elements)
        x = x.rechunk({-1: -1})  # features that are split are put together once, for all uses
        batch = tuple(f"batch {i}" for i in range(len(x.shape) - 2))
        self.batch = max(self.batch, batch, key=len)
        places: dict[str, Any] = {"elements": self.add(x, *batch, rows, f"{rows} features")}
        for name, axes in (("mask", (rows,)), ("pair_mask", ("m", rows)), ("bias", (rows,))):
            if (array := getattr(c, name)) is not None:
                places |= {name: self.add(array, *batch, *axes)}
        if (keys := c.key_positions) is not None:
            own = batch[: len(keys.shape) - 2]
            places |= {"key_positions": self.add(keys.rechunk({-1: -1}), *own, rows, f"{rows} keys")}
        if isinstance(c.embedding, InputEmbedding):
            places |= {"embedding": self.embedding(c.embedding, rows, x.chunks[-2])}
        return c._replace(**places)

    def embedding(self, p: InputEmbedding, rows: str, chunks: tuple[int, ...]) -> InputEmbedding:
        """Take the tables with a row for each element in, in the chunks of these, and all else as parameters."""
        tables: dict[str, Any] = {}
        for name in ("position", "features"):
            if not is_absent(table := getattr(p, name)):
                table = _lazy(table).rechunk({0: chunks, 1: -1})
                tables |= {name: self.add(table, rows, f"{rows} of {name}")}
        others: InputEmbedding = self.params(p._replace(position=(), features=()))
        return others._replace(**tables)

    def params(self, p: Any) -> Any:
        """Take the arrays of parameters in, and return their places, counted from -1 down."""

        def place(a: Array) -> int:
            self.leaves.append(a)
            return -len(self.leaves)

        return map_params(place, p)

    def one_row(self, i: int) -> tuple[int, ...]:
        """Return the shape of an array with one row, and no batch."""
        named = zip(self.axes[i], self.arrays[i].shape, strict=True)
        return tuple(1 if axis in ("m", "n") else size for axis, size in named if not axis.startswith("batch"))

    def blockwise(
        self,
        task: Callable[..., Array],
        job: _Job,
        axes: tuple[str, ...],
        sizes: dict[str, int],
        dtype: Any,
        adjusted: dict[str, int] | None = None,
    ) -> Array:
        """Make an array of tasks, one for each chunk of the axes that its arrays have in common."""
        import dask
        import dask.array as da
        from dask.array.utils import meta_from_array

        pairs = [part for array, names in zip(self.arrays, self.axes, strict=True) for part in (array, names)]
        first = self.arrays[0]
        name = getattr(job.function, "__name__", "block").strip("_")
        return da.blockwise(
            task,
            axes,
            *pairs,
            token=f"{name}-{task.__name__.strip('_')}",
            new_axes=sizes,
            adjust_chunks=adjusted,
            concatenate=True,
            dtype=dtype,
            meta=meta_from_array(first._meta, ndim=len(axes), dtype=dtype),
            job=job,
            leaves=dask.delayed(self.leaves, pure=True),
        )


def _lazy(x: Array) -> Array:
    import dask.array as da

    return x if isinstance(x, da.Array) else da.from_array(x, chunks=-1, asarray=False)


def _attended(job: _Job, q: Context, y: Context, p: Any) -> Array:
    """Let queries attend: to a context of one chunk at once, to any other by the states of its chunks."""
    inputs = _Inputs()
    job = job._replace(q=inputs.context(q, "m"), y=inputs.context(y, "n"), p=inputs.params(p))
    sample = job.sample(inputs, _call)
    axes, sizes, dtype = (*inputs.batch, "m", "e"), {"e": sample.shape[-1]}, sample.dtype
    if len(inputs.arrays[job.y.elements].chunks[-2]) == 1:
        return inputs.blockwise(_call, job, axes, sizes, dtype)

    if _has_length_scale(p):
        job = job._replace(length=inputs.add(_lengths(y), *inputs.batch))
    shape = job.sample(inputs, _state).shape
    of_states = (*inputs.batch, "n", "h", "m", "s")
    states = inputs.blockwise(_state, job, of_states, {"h": shape[-3], "s": shape[-1]}, dtype, {"n": 1})
    merged = _merged(states, len(inputs.batch))

    last = _Inputs()
    job = job._replace(q=last.context(q, "m"), y=None, p=last.params(p))
    if job.length is not None:
        job = job._replace(length=last.add(inputs.arrays[job.length], *inputs.batch))
    job = job._replace(state=last.add(merged, *of_states))
    return last.blockwise(_finish, job, axes, sizes, dtype)


def _merged(states: Array, axis: int) -> Array:
    import dask.array as da

    return da.reduction(
        states,
        chunk=_same,
        combine=_merge,
        aggregate=_merge,
        axis=axis,
        keepdims=True,
        concatenate=True,
        split_every=AT_A_TIME,
        dtype=states.dtype,
        meta=states._meta,
    )


def _lengths(y: Context) -> Array:
    """Count the elements that take part, for all chunks together."""
    import dask.array as da

    if y.mask is not None:
        return da.sum(y.mask, axis=-1, dtype="int64")
    return da.sum(da.ones_like(y.elements[..., 0], dtype="int64"), axis=-1)


def _has_length_scale(p: Any) -> bool:
    if isinstance(p, Attention):
        return isinstance(p.length_scale, LengthScale)
    return isinstance(p, tuple) and any(map(_has_length_scale, p))


# --- the tasks ------------------------------------------------------------------------------------------------------


def _call(*arrays: Array, job: _Job, leaves: Sequence[Array]) -> Array:
    """Compute the whole function."""
    job = _at_hand(job, arrays, leaves)
    with ignore_underflow(job.o.xp):
        return job.function(job.q, job.y, job.p, job.o, *job.options)


def _call_on_array(*arrays: Array, job: _Job, leaves: Sequence[Array]) -> Array:
    """Compute a function of an array in place of contexts."""
    job = _at_hand(job, arrays, leaves)
    with ignore_underflow(job.o.xp):
        return job.function(job.q.elements, job.p, job.o)


class _Attended(Exception):  # noqa: N818, nothing went wrong
    """Raised in place of a result where the state is all that is wanted."""

    def __init__(self, state: Array) -> None:
        super().__init__()
        self.state = state


def _state(*arrays: Array, job: _Job, leaves: Sequence[Array]) -> Array:
    """Compute the state of a chunk, laid side by side on the last axis: ``(..., 1, heads, m, value_dim + 2)``."""
    job = _at_hand(job, arrays, leaves)
    with ignore_underflow(job.o.xp):
        try:
            job.function(job.q, job.y._replace(length=job.length), job.p, job.o._replace(attend=_stop), *job.options)
        except _Attended as attended:
            return attended.state[..., None, :, :, :]
    raise AssertionError("the function did not attend")


def _stop(query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array:
    raise _Attended(_laid_out(_own_state(query, contexts, 0, p, o), o.xp))


def _same(states: Array, *, axis: Any, keepdims: bool) -> Array:
    return states


def _merge(states: Array, *, axis: tuple[int, ...], keepdims: bool) -> Array:
    """Merge states along an axis."""
    xp, (at,) = namespace_of(states), axis
    before = (slice(None),) * at
    parts = [_taken_apart(states[(*before, slice(i, i + 1))]) for i in range(states.shape[at])]
    with ignore_underflow(xp):
        return _laid_out(fold(lambda a, b: merge_states(a, b, xp), parts), xp)


def _finish(*arrays: Array, job: _Job, leaves: Sequence[Array]) -> Array:
    """Compute the function from the merged state of all chunks."""
    job = _at_hand(job, arrays, leaves)
    merged = _taken_apart(job.state[..., 0, :, :, :])  # type: ignore[index]  # in its place
    o = job.o._replace(attend=functools.partial(_from_state, merged))
    nothing = Context(job.q.elements[..., :0, :], length=job.length)
    with ignore_underflow(o.xp):
        return job.function(job.q, nothing, job.p, o, *job.options)


def _from_state(merged: State, query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array:
    states = [merged, *(_own_state(query, contexts, i, p, o) for i in range(1, len(contexts)))]
    return output(finish(fold(lambda a, b: merge_states(a, b, o.xp), states), o.xp), query, p, o.xp)


def _own_state(query: Array, contexts: Sequence[Context], i: int, p: Attention, o: Options) -> State:
    """Make the state of one context, with the heads apart that share keys; all others, of no mask, count in lengths."""
    own = contexts[i]
    if contexts[0].length is not None:
        own = own._replace(length=contexts[0].length + sum(c.elements.shape[-2] for c in contexts[1:]))
    heads, m = head_counts(query, p)[0], query.shape[-2]
    return State(*(ungroup(field, heads, m, o.xp) for field in state_of(query, [own], p, o)))


def _laid_out(state: State, xp: Namespace) -> Array:
    return xp.concat([state.weighted, state.total, state.largest], axis=-1)


def _taken_apart(states: Array) -> State:
    return State(states[..., -1:], states[..., -2:-1], states[..., :-2])


def _at_hand(job: _Job, arrays: Sequence[Array], leaves: Sequence[Array]) -> _Job:
    """Put the arrays in their places."""

    def put(tree: Any) -> Any:
        if isinstance(tree, tuple):
            parts = [put(part) for part in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return (arrays[tree] if tree >= 0 else leaves[-1 - tree]) if isinstance(tree, int) else tree

    q, y, p, length, state = put((job.q, job.y, job.p, job.length, job.state))
    return job._replace(q=q, y=y, p=p, length=length, state=state, o=job.o._replace(xp=namespace_of(arrays[0])))
