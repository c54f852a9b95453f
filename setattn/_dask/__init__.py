"""The blocks over the chunks of Dask arrays: the state of each chunk, merged as a tree, finished once.

What is computed of a chunk is computed by the functions of the library themselves, on the arrays that the chunks are.
Parameters are one task of the graph, so that they travel once to each worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from setattn._context import Context
from setattn._dask import _tasks as task
from setattn._dask._again import FOUND, made_again
from setattn._dask._graph import Inputs, is_lazy, lazy, lengths, merged
from setattn._dask._sizes import advise
from setattn._dask._tasks import Job
from setattn._layers import Options
from setattn._memory import in_one_chunk
from setattn._namespace import namespace_of
from setattn._params import Attention, LengthScale, is_absent, map_params
from setattn._typing import Array, Namespace

F = TypeVar("F", bound=Callable[..., Array])


def over_chunks(function: F) -> F:
    """Let a block ``function(q, y, p, o, *options)`` of two contexts and parameters take lazy arrays, too.

    Its queries attend once. The result has a row for each query.
    """

    @functools.wraps(function)
    def block(q: Context, y: Context, p: Any, o: Options, *options: Any) -> Array:
        if not o.lazy:
            return function(q, y, p, o, *options)
        return _attended(Job(block, o._replace(xp=None, lazy=False), options), q, y, p)

    return cast("F", block)


def of_sets(function: Callable[[Array, Any, Options], Array], x: Array, p: Any, o: Options, rows: int = 0) -> Array:
    """Compute ``function(x, p, o)`` of sets that need no more than their own chunk; it has ``rows``, if not all."""
    if not o.lazy:
        return function(x, p, o)
    if is_absent(p):
        return x
    x = whole_sets(x, o)
    inputs = Inputs()
    job = Job(function, o._replace(xp=None, lazy=False), (), inputs.context(Context(x), "m"))
    job = job._replace(p=inputs.params(p))
    sample = inputs.sample(task.call_on_array, job)
    sizes = {"e": sample.shape[-1]} | ({"r": rows} if rows else {})
    axes = (*inputs.batch, "r" if rows else "m", "e")
    return inputs.blockwise(task.call_on_array, job, axes, sizes, sample.dtype)


def whole_sets(x: Array, o: Options) -> Array:
    """Put the rows of each set of a lazy array in one chunk; return any other array as it is."""
    return lazy(x).rechunk({-2: -1}) if o.lazy else x


def outright(p: Any, x: Array, o: Options) -> tuple[Any, Options]:
    """Return parameters and options for operations on a lazy array itself; those given for any other."""
    if not o.lazy:
        return p, o
    xp: Namespace = namespace_of(x)
    return map_params(lambda a: in_one_chunk(a, xp), p), o._replace(xp=xp, lazy=False, eager=False)


def _attended(job: Job, q: Context, y: Context, p: Any) -> Array:
    """Let queries attend: to a context of one chunk at once, to any other by the states of its chunks."""
    advise(job.o.function, q.elements, y.elements)
    if job.o.plan.recompute:
        q, y = _anew(q, y)
    inputs = Inputs()
    job = job._replace(q=inputs.context(q, "m"), y=inputs.context(y, "n"), p=inputs.params(p))
    sample = inputs.sample(task.call, job)
    axes, sizes, dtype = (*inputs.batch, "m", "e"), {"e": sample.shape[-1]}, sample.dtype
    if not _is_cut(y):
        return inputs.blockwise(task.call, job, axes, sizes, dtype)

    if _has_length_scale(p):
        job = job._replace(length=inputs.add(lengths(y), *inputs.batch))
    shape = inputs.sample(task.state, job).shape
    of_states = (*inputs.batch, "n", "h", "m", "s")
    states = inputs.blockwise(task.state, job, of_states, {"h": shape[-3], "s": shape[-1]}, dtype, {"n": 1})

    last = Inputs()
    job = job._replace(q=last.context(q, "m"), y=None, p=last.params(p))
    if job.length is not None:
        job = job._replace(length=last.add(inputs.arrays[job.length], *inputs.batch))
    job = job._replace(state=last.add(merged(states, len(inputs.batch)), *of_states))
    return last.blockwise(task.finish, job, axes, sizes, dtype, name=FOUND.strip("-"))


def _anew(q: Context, y: Context) -> tuple[Context, Context]:
    """Make the chunks of a set anew, once what was found in the passes before it, and now meets it, is there."""
    if _is_cut(y) and is_lazy(q.elements):
        return q, made_again(y, q.elements)
    if _is_cut(q) and is_lazy(y.elements) and not _is_cut(y):
        return made_again(q, y.elements), y
    return q, y


def _is_cut(c: Context) -> bool:
    return is_lazy(c.elements) and len(c.elements.chunks[-2]) > 1


def _has_length_scale(p: Any) -> bool:
    if isinstance(p, Attention):
        return isinstance(p.length_scale, LengthScale)
    return isinstance(p, tuple) and any(map(_has_length_scale, p))
