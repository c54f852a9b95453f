"""The functions of a state: create, update, merge, advance, finish, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from setattn._blocks import combine
from setattn._errors import OptionError
from setattn._kernels import ignore_underflow
from setattn._typing import Array
from setattn.streaming._stream import (
    State,
    as_of_now,
    check_same_stream,
    create_for,
    has_seen_all,
    in_pass,
    is_state,
    merging,
    part_of,
    result_of,
)
from setattn.streaming._work import Beside, check_chunk


def create(
    function: str | Callable[..., Array],
    params: Any,
    /,
    *,
    queries: Array | None = None,
    context: Array | None = None,
    context_mask: Array | None = None,
    batch: Sequence[int] = (),
    first: int = 0,
    length: int | Array | None = None,
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
    context : array, shape (..., n, dim), optional
        In place of ``queries``, what the elements themselves attend to: the second array of ``attention``,
        ``cross_attention`` and ``mab``. The stream then has one pass, through its :func:`rows`.
    context_mask : array of bool, shape (..., n), optional
        True where an element of the context takes part.
    batch : sequence of int, default ()
        The batch of sets that each chunk has a part of.
    first : int, default 0
        The place of the first element that this state will see, where the parameters have a row for each place.
    length : int, or array of int of shape batch, optional
        How many elements of each set will take part in all, which has to be known where the parameters have a
        ``length_scale``.
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
    beside = Beside(queries, context, context_mask)
    return create_for("create", function, params, beside, batch, first, length, options)


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
    is_state("update", "state", state)
    state = as_of_now(state)
    if state._pass is None:
        raise OptionError("update", "state", "in the pass through the rows", "rows() in place of update()")
    n = check_chunk(state._work, chunk, mask, state.chunks, state.first + state.elements)
    seen = replace(state, elements=state.elements + n, chunks=state.chunks + 1)
    if n == 0:
        return seen
    with ignore_underflow(state._work.call.xp):
        part = part_of(state, state._pass, chunk, mask)
        return replace(seen, levels=combine(merging(state), state.levels, ((1, part),)))


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
    is_state("merge", "a", a)
    is_state("merge", "b", b)
    check_same_stream("merge", a, b)
    if a._work.passes.places is not None:
        early, late = (a, b) if (a.first, a.elements) <= (b.first, b.elements) else (b, a)
        if early.elements and late.elements and early.first + early.elements != late.first:
            wanted = f"one from place {early.first + early.elements}, where the other one ends: each place has its row"
            raise OptionError("merge", "b" if late is b else "a", f"a state from place {late.first}", wanted)
    first = min([state.first for state in (a, b) if state.elements] or [a.first])
    with ignore_underflow(a._work.call.xp):
        levels = combine(merging(a), a.levels, b.levels)
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
    is_state("advance", "state", state)
    state = as_of_now(state)
    if state.current_pass + 1 >= state.passes:
        raise OptionError(
            "advance", "state", f"in pass {state.passes} of {state.passes}", "one in a pass before the last"
        )
    has_seen_all("advance", state)
    with ignore_underflow(state._work.call.xp):
        found = (*state.found, result_of(state))
        expected = state.elements if state.expected is None else state.expected
        return in_pass(replace(state, elements=0, chunks=0, levels=(), expected=expected), found)


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
    is_state("finish", "state", state)
    state = as_of_now(state)
    now, last = state.current_pass + 1, len(state._work.passes.attentions)
    if last == 0:
        raise OptionError("finish", "state", "one of rows that attend to a context", "the rows themselves: see rows()")
    if now != last:
        raise OptionError("finish", "state", f"in pass {now} of {state.passes}", f"one in pass {last}: see advance()")
    has_seen_all("finish", state)
    call = state._work.call
    with ignore_underflow(call.xp):
        result = result_of(state)
        return call.xp.astype(result, call.dtype) if call.half else result


def rows(state: State, chunk: Array, /, *, mask: Array | None = None) -> tuple[State, Array]:
    """Compute the rows of the result that belong to some of the elements.

    Parameters
    ----------
    state : State
        A state in the last pass of a function with a row of result for each element: ``isab``, ``perceiver_io`` with
        its inputs as queries, or what was created with a ``context``.
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
    is_state("rows", "state", state)
    state = as_of_now(state)
    function = state._work.passes.rows
    if state._pass is not None or function is None:
        now = f"in pass {state.current_pass + 1} of {state.passes} of {state.function}"
        raise OptionError("rows", "state", now, "one in the last pass of a function with a row for each element")
    place, call = state.first + state.elements, state._work.call
    n = check_chunk(state._work, chunk, mask, state.chunks, place)
    with ignore_underflow(call.xp):
        y = function(state.found, chunk, mask, place)
        y = call.xp.astype(y, call.dtype) if call.half else y
    return replace(state, elements=state.elements + n, chunks=state.chunks + 1), y
