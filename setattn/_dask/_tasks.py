"""What the tasks of a graph compute of the chunks that they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from setattn._attend import state_of
from setattn._blocks import fold
from setattn._context import Context
from setattn._dask._faults import Given, check
from setattn._kernels import ignore_underflow
from setattn._layers import Options
from setattn._namespace import namespace_of
from setattn._params import Attention
from setattn._state import State, head_counts, merge_states, output, ungroup
from setattn._state import finish as mean_of
from setattn._typing import Array


class Job(NamedTuple):
    """What tasks compute: a function and its arguments, with the places of arrays in those of a task."""

    function: Callable[..., Array]
    o: Options
    options: tuple[Any, ...]
    q: Any = None
    y: Any = None
    p: Any = None
    length: int | None = None
    state: int | None = None
    at: tuple[str, ...] = ()  # the axes that the place of a task is on
    given: tuple[Given, ...] = ()


# --- the tasks: of their place, arrays and parameters -----------------------------------------------------------------


def call(place: tuple[int, ...], *arrays: Array, job: Job, leaves: Sequence[Array]) -> Array:
    """Compute the whole function."""
    job = _at_hand(job, place, arrays, leaves)
    with ignore_underflow(job.o.xp):
        return job.function(job.q, job.y, job.p, job.o, *job.options)


def call_on_array(place: tuple[int, ...], *arrays: Array, job: Job, leaves: Sequence[Array]) -> Array:
    """Compute a function of an array in place of contexts."""
    job = _at_hand(job, place, arrays, leaves)
    with ignore_underflow(job.o.xp):
        return job.function(job.q.elements, job.p, job.o)


class _Attended(Exception):  # noqa: N818, nothing went wrong
    """Raised in place of a result where the state is all that is wanted."""

    def __init__(self, state: Array) -> None:
        super().__init__()
        self.state = state


def state(place: tuple[int, ...], *arrays: Array, job: Job, leaves: Sequence[Array]) -> Array:
    """Compute the state of a chunk, laid side by side on the last axis: ``(..., 1, heads, m, value_dim + 2)``."""
    job = _at_hand(job, place, arrays, leaves)
    with ignore_underflow(job.o.xp):
        try:
            job.function(job.q, job.y._replace(length=job.length), job.p, job.o._replace(attend=_stop), *job.options)
        except _Attended as attended:
            return attended.state[..., None, :, :, :]
    raise AssertionError("the function did not attend")


def _stop(query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array:
    raise _Attended(_laid_out(_own_state(query, contexts, 0, p, o), o.xp))


def same(states: Array, *, axis: Any, keepdims: bool) -> Array:
    return states


def merge(states: Array, *, axis: tuple[int, ...], keepdims: bool) -> Array:
    """Merge states along an axis."""
    xp, (at,) = namespace_of(states), axis
    before = (slice(None),) * at
    parts = [_taken_apart(states[(*before, slice(i, i + 1))]) for i in range(states.shape[at])]
    with ignore_underflow(xp):
        return _laid_out(fold(lambda a, b: merge_states(a, b, xp), parts), xp)


def finish(place: tuple[int, ...], *arrays: Array, job: Job, leaves: Sequence[Array]) -> Array:
    """Compute the function from the merged state of all chunks."""
    job = _at_hand(job, place, arrays, leaves)
    merged = _taken_apart(job.state[..., 0, :, :, :])  # type: ignore[index]  # in its place
    o = job.o._replace(attend=functools.partial(_from_state, merged))
    nothing = Context(job.q.elements[..., :0, :], length=job.length)
    with ignore_underflow(o.xp):
        return job.function(job.q, nothing, job.p, o, *job.options)


def _from_state(merged: State, query: Array, contexts: Sequence[Context], p: Attention, o: Options) -> Array:
    states = [merged, *(_own_state(query, contexts, i, p, o) for i in range(1, len(contexts)))]
    return output(mean_of(fold(lambda a, b: merge_states(a, b, o.xp), states), o.xp), query, p, o.xp)


def _own_state(query: Array, contexts: Sequence[Context], i: int, p: Attention, o: Options) -> State:
    """Make the state of one context, with the heads apart that share keys; all others, of no mask, count in lengths."""
    own = contexts[i]
    if contexts[0].length is not None:
        own = own._replace(length=contexts[0].length + sum(c.elements.shape[-2] for c in contexts[1:]))
    heads, m = head_counts(query, p)[0], query.shape[-2]
    return State(*(ungroup(field, heads, m, o.xp) for field in state_of(query, [own], p, o)))


def _laid_out(state: State, xp: Any) -> Array:
    return xp.concat([state.weighted, state.total, state.largest], axis=-1)


def _taken_apart(states: Array) -> State:
    return State(states[..., -1:], states[..., -2:-1], states[..., :-2])


def alone(a: Any) -> Any:
    """Return a chunk, which is in a list for each axis that the result lacks: none of these has two chunks."""
    while isinstance(a, list) and len(a) == 1:
        (a,) = a
    return a


def _at_hand(job: Job, place: tuple[int, ...], arrays: Sequence[Array], leaves: Sequence[Array]) -> Job:
    """Put the arrays in their places."""
    arrays = [alone(a) for a in arrays]
    check(job.o.function, job.given, arrays, dict(zip(job.at, place, strict=True)))

    def put(tree: Any) -> Any:
        if isinstance(tree, tuple):
            parts = [put(part) for part in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return (arrays[tree] if tree >= 0 else leaves[-1 - tree]) if isinstance(tree, int) else tree

    q, y, p, length, state = put((job.q, job.y, job.p, job.length, job.state))
    return job._replace(q=q, y=y, p=p, length=length, state=state, o=job.o._replace(xp=namespace_of(arrays[0])))
