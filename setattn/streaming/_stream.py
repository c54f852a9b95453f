"""The public state of a stream: create, update, merge, advance, finish."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import setattn
from setattn import _check as check
from setattn._attend import end_of_attention, part_of_attention
from setattn._blocks import Levels, combine, total
from setattn._call import Call, begin, is_half, widen
from setattn._errors import DTypeError, NamespaceError, OptionError, ParameterError, ShapeError
from setattn._layers import options as checked_options
from setattn._namespace import creation_device, ignore_underflow, namespace_of
from setattn._params import map_params
from setattn._state import State as Part
from setattn._state import merge_states
from setattn._structure import token_table
from setattn._typing import Array, Namespace
from setattn.streaming._passes import Given, Pass, Passes, passes_of
from setattn.streaming._same import first_difference

# The functions, with the name of what they take queries by, and whether it has to be given.
FUNCTIONS: dict[str, bool | None] = {
    "attention": True,
    "attention_pool": None,
    "cross_attention": True,
    "isab": None,
    "mab": True,
    "perceiver": None,
    "perceiver_io": False,
    "perceiver_resampler": None,
    "pma": None,
    "set_transformer": None,
}
_WITH_CHUNKS = ("mask", "query_mask", "pair_mask", "bias", "key_positions")


@dataclass(frozen=True, slots=True)
class _Work:
    """What follows from a block, and is the same for all states of its stream."""

    call: Call
    passes: Passes
    like: Array  # a chunk without elements
    now: Pass | None  # none in the pass that goes through the rows


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a stream has found so far: an immutable value, of a size that does not depend on how much was seen.

    Made by :func:`create` and :func:`load`, and by the functions that return the state that comes next.

    Attributes
    ----------
    function : str
        Name of the function of the library.
    params : tree
        Its parameters.
    options : dict
        All its options, as given or by default.
    queries : array or None
        What asks, where that is no part of the parameters.
    batch : tuple of int
        The batch of sets.
    first : int
        The place of the first element in its set, for parameters with a row for each place.
    current_pass, passes : int
        Which pass over the elements this is, from 0, and how many there are.
    elements, chunks : int
        How many elements of each set, and how many chunks, this pass has seen; those that are masked count, too.
    """

    function: str
    params: Any
    options: dict[str, Any]
    queries: Array | None
    batch: tuple[int, ...]
    first: int
    elements: int
    chunks: int
    found: tuple[Array, ...]
    levels: Levels[Part]
    expected: int | None
    work: _Work

    @property
    def current_pass(self) -> int:
        """Which pass over the elements this is, from 0."""
        return len(self.found)

    @property
    def passes(self) -> int:
        """How many passes there are."""
        return self.work.passes.count + (self.work.passes.rows is not None)

    def __repr__(self) -> str:
        seen = f"{self.elements} elements in {self.chunks} chunks"
        of = f"pass {self.current_pass + 1} of {self.passes}: " if self.passes > 1 else ""
        return f"<setattn.streaming.State {self.function}, batch {self.batch}, {of}{seen}>"


# --- the functions of a state ---------------------------------------------------------------------------------------


def create(
    function: str | Callable[..., Array],
    params: Any,
    /,
    *,
    queries: Array | None = None,
    batch: Sequence[int] = (),
    first: int = 0,
    **options: Any,
) -> State:
    """Create the state of a stream that has seen nothing.

    Parameters
    ----------
    function : str or function
        Function of the library, or its name: ``"pma"``, ``"attention_pool"``, ``"cross_attention"``, ``"isab"``,
        ``"perceiver"``, ``"perceiver_io"``, ``"perceiver_resampler"``, ``"set_transformer"`` with encoders of
        :func:`setattn.isab`, ``"attention"``, ``"mab"``.
    params : tree
        Its parameters. The chunks have to be of their library, device and dtype.
    queries : array, shape (..., m, dim), optional
        What asks, where that is no part of the parameters: the first array of ``attention``, ``cross_attention`` and
        ``mab``, the queries of ``perceiver_io``.
    batch : sequence of int, default ()
        The batch of sets that each chunk has a part of.
    first : int, default 0
        The place of the first element that this state will see, where the parameters have a row for each place.
    **options
        Options of the function, such as ``eps``.

    Returns
    -------
    State
        The identity of :func:`merge`.

    Raises
    ------
    ShapeError, DTypeError, NamespaceError, ParameterError, OptionError
        If parameters, queries and options do not fit together, or the function is none that a stream can be folded by.

    See Also
    --------
    fold : All at once, from an iterable, a file or a chunked array.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params = setattn.init_pma(8, num_seeds=2, num_heads=2, rng=0)
    >>> state = setattn.streaming.create("pma", params, batch=(4,))
    >>> for n in (3, 0, 5):
    ...     state = setattn.streaming.update(state, np.ones((4, n, 8), np.float32))
    >>> state
    <setattn.streaming.State pma, batch (4,), 8 elements in 3 chunks>
    >>> setattn.streaming.finish(state).shape
    (4, 2, 8)
    """
    name = _name(function)
    if not isinstance(batch, Sequence) or not all(check.is_integer(n) and n >= 0 for n in batch):
        raise OptionError("create", "batch", repr(batch), "a sequence of integers of at least 0")
    check.integer("create", "first", first, least=0)
    for option in _WITH_CHUNKS:
        if option in options:
            raise OptionError("create", option, "given", "it with each chunk, as far as it can be streamed")
    given = _defaults(name) | options
    wants = FUNCTIONS[name]
    if (queries is None and wants) or (queries is not None and wants is None):
        wanted = "an array, what attends to the stream" if wants else f"None, as {name} has its queries in its parameters"
        raise OptionError("create", "queries", "None" if queries is None else "an array", wanted)
    work = _work(name, params, given, queries, tuple(map(int, batch)))
    state = State(name, params, given, queries, tuple(map(int, batch)), int(first), 0, 0, (), (), None, work)
    return _in_next_pass(state, ())


def update(state: State, chunk: Array, /, *, mask: Array | None = None) -> State:
    """Let a state see some more elements of its sets.

    Parameters
    ----------
    state : State
        The state; it stays what it is.
    chunk : array, shape (..., n, dim)
        Any number of elements, which may be none, of each set of the batch; of a ``perceiver`` with a table of tokens,
        integers ``(..., n)``.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at.

    Returns
    -------
    State
        The state after the chunk.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError
        If the chunk does not fit; the message has its number, counted from 0.
    OptionError
        If the state is in the pass through the rows.

    Notes
    -----
    Cost: that of the function for ``n`` elements, and at most ``log2(state.chunks)`` merges.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> state = setattn.streaming.create("pma", setattn.init_pma(8, num_heads=2, rng=0))
    >>> setattn.streaming.update(state, np.ones((5, 8), np.float32)).elements
    5
    """
    _is_state("update", "state", state)
    n, last = check_chunk(state, chunk, mask), state.first + state.elements
    now = state.work.now
    if now is None:
        raise OptionError("update", "state", "in the pass through the rows", "rows() in place of update()")
    seen = replace(state, elements=state.elements + n, chunks=state.chunks + 1)
    if n == 0:
        return seen
    with ignore_underflow(state.work.call.xp):
        part = _part(state, now, chunk, mask, last)
        return replace(seen, levels=combine(_merging(state), state.levels, ((1, part),)))


def merge(a: State, b: State, /) -> State:
    """Merge two states of a stream that have seen different elements, in either order.

    Parameters
    ----------
    a, b : State
        States of the same function, parameters, queries, options and batch, in the same pass. They may come from
        several processes: see :func:`save`.

    Returns
    -------
    State
        The state after all elements that either has seen.

    Raises
    ------
    ParameterError, OptionError, ShapeError, DTypeError, NamespaceError
        If the two are not of the same stream.

    Notes
    -----
    The parts that the states are made of are merged as the digits of two binary numbers are added, so that no result
    passes through more than about ``log2(chunks)`` roundings, whatever is merged with what.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> empty = setattn.streaming.create("pma", setattn.init_pma(8, num_heads=2, rng=0))
    >>> states = [setattn.streaming.update(empty, np.full((n, 8), n, np.float32)) for n in (3, 4)]
    >>> setattn.streaming.merge(*states)
    <setattn.streaming.State pma, batch (), 7 elements in 2 chunks>
    """
    _is_state("merge", "a", a)
    _is_state("merge", "b", b)
    _same_stream(a, b)
    first = min(a.first, b.first)
    if a.work.passes.places is not None:
        early, late = (a, b) if (a.first, a.elements) <= (b.first, b.elements) else (b, a)
        if late.elements and early.first + early.elements != late.first:
            got = f"of the places from {late.first}"
            wanted = f"one from {early.first + early.elements}, where the other state ends, as each place has its row"
            raise OptionError("merge", "b" if late is b else "a", got, wanted)
    with ignore_underflow(a.work.call.xp):
        levels = combine(_merging(a), a.levels, b.levels)
    return replace(a, first=first, elements=a.elements + b.elements, chunks=a.chunks + b.chunks, levels=levels)


def advance(state: State, /) -> State:
    """End a pass over the elements, and go to the next one, in which all of them have to be seen again.

    Parameters
    ----------
    state : State
        A state that has seen all elements, and is not in its last pass.

    Returns
    -------
    State
        The state at the start of the next pass, with what the passes before it have found.

    Raises
    ------
    OptionError
        If there is no next pass, or if this one has seen more or fewer elements than the first.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params = setattn.init_set_transformer(2, 16, 4, num_heads=4, num_inducing=3, num_encoders=2, rng=0)
    >>> state, x = setattn.streaming.create("set_transformer", params), np.ones((5, 2), np.float32)
    >>> for _ in range(state.passes - 1):
    ...     state = setattn.streaming.advance(setattn.streaming.update(state, x))
    >>> state
    <setattn.streaming.State set_transformer, batch (), pass 3 of 3: 0 elements in 0 chunks>
    """
    _is_state("advance", "state", state)
    if state.current_pass + 1 >= state.passes:
        raise OptionError("advance", "state", f"in pass {state.passes} of {state.passes}", "one in a pass before the last")
    _has_seen_all("advance", state)
    with ignore_underflow(state.work.call.xp):
        return _in_next_pass(state, (*state.found, _result(state)))


def finish(state: State, /) -> Array:
    """Compute the result of all that a state has seen.

    Parameters
    ----------
    state : State
        A state in its last pass; it stays what it is, and may see more afterwards. One of a function with a row of
        result for each element, such as ``isab``, gives what the rows will attend to: see :func:`advance` and
        :func:`rows` for them.

    Returns
    -------
    array
        What the function returns for the whole set, but for rounding; after nothing, that of the empty set.

    Raises
    ------
    OptionError
        If the state is not in its last pass, or if that has seen more or fewer elements than the first.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params, x = setattn.init_pma(8, num_heads=2, rng=0), np.ones((5, 8), np.float32)
    >>> state = setattn.streaming.update(setattn.streaming.create("pma", params), x)
    >>> bool(np.allclose(setattn.streaming.finish(state), setattn.pma(x, params), atol=1e-6))
    True
    """
    _is_state("finish", "state", state)
    if state.current_pass + 1 != state.work.passes.count:
        now, last = state.current_pass + 1, state.work.passes.count
        raise OptionError("finish", "state", f"in pass {now} of {state.passes}", f"one in pass {last}: see advance()")
    _has_seen_all("finish", state)
    call = state.work.call
    with ignore_underflow(call.xp):
        result = _result(state)
        return call.xp.astype(result, call.dtype) if is_half(call) else result


def rows(state: State, chunk: Array, /, *, mask: Array | None = None) -> tuple[State, Array]:
    """Compute the rows of the result that belong to some of the elements.

    Parameters
    ----------
    state : State
        A state in the last pass of a function with a row of result for each element: ``isab``, or ``perceiver_io`` with
        its inputs as queries.
    chunk, mask
        As for :func:`update`.

    Returns
    -------
    State
        The state after the chunk.
    array, shape (..., n, dim)
        Its rows; those of elements that do not take part are 0.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError
        If the chunk does not fit; the message has its number, counted from 0.
    OptionError
        If the state is in another pass.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params, x = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), np.ones((5, 8), np.float32)
    >>> state = setattn.streaming.update(setattn.streaming.create("isab", params), x)
    >>> state, y = setattn.streaming.rows(setattn.streaming.advance(state), x)
    >>> bool(np.allclose(y, setattn.isab(x, params), atol=1e-6))
    True
    """
    _is_state("rows", "state", state)
    work = state.work
    if work.now is not None or work.passes.rows is None:
        now = f"in pass {state.current_pass + 1} of {state.passes} of {state.function}"
        raise OptionError("rows", "state", now, "one in the last pass of a function with a row for each element")
    n = check_chunk(state, chunk, mask)
    with ignore_underflow(work.call.xp):
        y = work.passes.rows(state.found, chunk, mask, state.first + state.elements)
    y = work.call.xp.astype(y, work.call.dtype) if is_half(work.call) else y
    return replace(state, elements=state.elements + n, chunks=state.chunks + 1), y
