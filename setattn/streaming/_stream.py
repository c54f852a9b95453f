"""The public state of a stream, and what it is in each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from setattn import _check as check
from setattn._adapters import to_compute_in
from setattn._attend import part_of_attention
from setattn._blocks import Levels, total
from setattn._context import Context
from setattn._errors import OptionError, ParameterError, ShapeError
from setattn._state import State as Part
from setattn._state import finish, merge_states, output
from setattn._typing import Array
from setattn.streaming._passes import Pass
from setattn.streaming._same import check_alike, check_same, check_same_options
from setattn.streaming._work import Beside, Work, all_options, check_length, function_name, work_of


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
    context, context_mask : array or None
        What the elements attend to, in a stream of rows alone.
    batch : tuple of int
        The batch of sets.
    first : int
        The place of the first element in its set, for parameters with a row for each place.
    length : int, array or None
        How many elements of each set take part in all, for parameters with a ``length_scale``.
    elements, chunks : int
        How many elements of each set, and how many chunks, this pass has seen; those that are masked count, too.
    found : tuple of array
        What the passes before this one have found.
    levels : tuple
        The parts of this one: powers of two of chunks that were merged, and their states.
    expected : int or None
        How many elements the first pass has seen.
    """

    function: str
    params: Any
    options: dict[str, Any]
    queries: Array | None
    context: Array | None
    context_mask: Array | None
    batch: tuple[int, ...]
    first: int
    length: int | Array | None
    elements: int
    chunks: int
    found: tuple[Array, ...]
    levels: Levels[Part]
    expected: int | None
    _work: Work
    _pass: Pass | None  # none in the one through the rows

    @property
    def current_pass(self) -> int:
        """Which pass over the elements this is, from 0."""
        return len(self.found)

    @property
    def passes(self) -> int:
        """How many passes there are."""
        return len(self._work.passes.attentions) + (self._work.passes.rows is not None)

    def __repr__(self) -> str:
        seen = f"{self.elements} elements in {self.chunks} chunks"
        of = f"pass {self.current_pass + 1} of {self.passes}: " if self.passes > 1 else ""
        return f"<setattn.streaming.State {self.function}, batch {self.batch}, {of}{seen}>"


def create_for(
    caller: str,
    function: str | Callable[..., Array],
    params: Any,
    beside: Beside,
    batch: Any,
    first: int,
    length: Any,
    options: dict[str, Any],
) -> State:
    """Create a state as :func:`create` does, for a public function of another name."""
    name = function_name(caller, function)
    if not isinstance(batch, Sequence) or not all(check.is_integer(n) and n >= 0 for n in batch):
        raise OptionError(caller, "batch", repr(batch), "a sequence of integers of at least 0")
    check.integer(caller, "first", first, least=0)
    sets, given = tuple(map(int, batch)), all_options(caller, name, options)
    work = work_of(caller, name, params, beside, sets, given)
    check_length(caller, work, length, sets)
    length = int(length) if check.is_integer(length) else length
    state = State(name, params, given, *beside, sets, int(first), length, 0, 0, (), (), None, work, None)
    return in_pass(state, ())


# --- the mathematics ------------------------------------------------------------------------------------------------


def as_of_now(state: State) -> State:
    """Return a state that computes as is wanted now: PyTorch may record at one time what it did not at another."""
    work = state._work
    if work.o.xp is to_compute_in(work.call.xp, 1):
        return state
    beside = Beside(state.queries, state.context, state.context_mask)
    work = work_of("create", state.function, state.params, beside, state.batch, state.options)
    return in_pass(replace(state, _work=work), state.found)


def in_pass(state: State, found: tuple[Array, ...]) -> State:
    """Return a state in the pass that comes after what has been found."""
    passes = state._work.passes
    now = passes.make(found) if len(found) < len(passes.attentions) else None
    return replace(state, found=found, _pass=now)


def part_of(state: State, now: Pass, chunk: Array, mask: Array | None) -> Part:
    """Make the state of the attention to a chunk, as it is kept."""
    return _part(state, now, now.context(chunk, mask, state.first + state.elements))


def empty_part(state: State, now: Pass) -> Part:
    """Make the state of the attention to nothing."""
    return part_of(replace(state, first=0, elements=0), now, state._work.empty, None)


def _part(state: State, now: Pass, context: Context) -> Part:
    length, work = state.length, state._work
    if length is not None:
        length = length + sum(own.elements.shape[-2] for own in now.beside)
    context = context._replace(length=length)
    part = part_of_attention(now.queries, [context], now.attention, work.o, now.query_norm)
    return Part(*(work.call.xp.astype(a, work.merged, copy=False) for a in part))


def merging(state: State) -> Callable[[Part, Part], Part]:
    """Return the function that merges two parts."""
    return lambda a, b: merge_states(a, b, state._work.call.xp)


def result_of(state: State) -> Array:
    """Compute what a pass finds."""
    now, merge, work = state._pass, merging(state), state._work
    assert now is not None
    part = total(merge, state.levels) if state.levels else empty_part(state, now)
    for own in now.beside:
        part = merge(part, _part(state, now, own))
    mean = work.call.xp.astype(finish(part, work.call.xp), work.computed, copy=False)
    return now.after(output(mean, now.queries, now.attention, work.call.xp))


# --- checks ---------------------------------------------------------------------------------------------------------


def is_state(function: str, argument: str, state: Any) -> None:
    if not isinstance(state, State):
        raise ParameterError(function, argument, f"a {type(state).__qualname__}", "a setattn.streaming.State")


def has_seen_all(function: str, state: State) -> None:
    if state.expected not in (None, state.elements):
        wanted = f"{state.expected}, as in the first pass"
        raise OptionError(
            function, "state", f"after {state.elements} elements in pass {state.current_pass + 1}", wanted
        )


def check_same_stream(function: str, a: State, b: State, path: str = "b", *, same_pass: bool = True) -> None:
    """Check that two states are of the same stream and, where that is to be, in the same pass."""
    if a.function != b.function:
        raise ParameterError(function, path, f"a state of {b.function}", f"one of {a.function}, as a is")
    check_same_options(function, path, a.options, b.options)
    if a.batch != b.batch:
        raise ShapeError(function, path, b.batch, f"{a.batch}, as a has", "batch")
    check_alike(function, f"{path}, its chunks", a._work.empty, b._work.empty)
    check_same(function, f"{path}.params", a.params, b.params)
    for name in Beside._fields:
        check_same(function, f"{path}.{name}", getattr(a, name), getattr(b, name))
    if type(a.length) is int or type(b.length) is int:
        if a.length is not b.length and (type(a.length) is not type(b.length) or a.length != b.length):
            raise OptionError(function, f"{path}.length", repr(b.length), f"{a.length!r}, as that of a")
    else:
        check_same(function, f"{path}.length", a.length, b.length)
    if not same_pass:
        return
    if a.current_pass != b.current_pass:
        raise OptionError(function, path, f"in pass {b.current_pass + 1}", f"one in pass {a.current_pass + 1}, as a is")
    check_same(function, f"{path}.found", a.found, b.found)
