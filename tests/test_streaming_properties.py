"""What must hold of streams for any set, any chunks and any tree of merges."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import cases
import hypothesis
import numpy as np
import pytest
import strategies
import streams
import tolerances
from backends import BACKENDS
from hypothesis import stateful
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, same
from streams import Streamed

import setattn
from setattn import streaming

one_thread = strategies.one_thread

SINGLE = ("pma", "attention_pool", "cross_attention", "isab", "mab", "attention")
cuts = st.lists(st.integers(0, 33), max_size=6)


def calls(name: str, **given: Any) -> st.SearchStrategy[Drawn]:
    """Draw calls that can be streamed."""
    return blocks(name, only=("mask",), **given).filter(streams.streams)


def parts_of(drawn: Drawn, cuts: list[int]) -> tuple[Streamed, list[streaming.State]]:
    """Return a state for each chunk."""
    streamed = Streamed(drawn)
    empty = streamed.create()
    return streamed, [streaming.update(empty, x, mask=mask) for x, mask in streamed.chunks(cuts)]


def within(result: np.ndarray, drawn: Drawn, chunks: int) -> None:
    value, bound = streams.reference(drawn, str(drawn.dtype), chunks)
    nan = np.isnan(value)
    tolerances.assert_close(result, value, np.where(nan, 0.0, bound), f"stream of {drawn.function}", nan=nan)


# --- chunks and trees --------------------


def any_chunks(drawn: Drawn, cuts: list[int]) -> None:
    result = streams.together(Streamed(drawn).result(cuts))
    within(result, drawn, len(cuts) + 1)
    same(streams.together(Streamed(drawn).result(cuts)), result)  # and the same bits again


@pytest.mark.parametrize("name", streams.FUNCTIONS)
def test_any_chunks_give_the_result(name):
    """Any composition of the elements into chunks, empty ones among them, is within the bounds of the function."""
    for_all(any_chunks, calls(name), cuts, share=0.2)


def any_tree(drawn: Drawn, cuts: list[int], rng: Any) -> None:
    streamed, states = parts_of(drawn, cuts)
    count = len(states)
    while len(states) > 1:
        a, b = (states.pop(rng.randrange(len(states))) for _ in range(2))
        states.append(streaming.merge(a, b))
    assert (states[0].chunks, states[0].elements) == (count, streamed.n)
    sizes = [size for size, _ in states[0].levels]
    assert sizes == sorted(set(sizes), reverse=True)
    if states[0].passes == 1:
        within(streaming.finish(states[0]), drawn, count)


@pytest.mark.parametrize("name", SINGLE)
def test_any_tree_of_merges_gives_the_result(name):
    """States of all chunks may be merged in any order and grouping."""
    for_all(any_tree, calls(name), cuts, st.randoms(use_true_random=False), share=0.2)


def permuted(drawn: Drawn, cuts: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(drawn.size)
    moved = drawn.with_elements(drawn.arrays[drawn.elements][..., order, :])
    moved = moved if drawn.mask is None else moved.with_masks(mask=drawn.mask[..., order])
    a, b = (streams.together(Streamed(each).result(cuts)) for each in (drawn, moved))
    _, bound = streams.reference(drawn, str(drawn.dtype), len(cuts) + 1)
    agree(a, b, 2 * bound, "permuted stream")


@pytest.mark.parametrize("name", ["pma", "perceiver_resampler", "set_transformer"])
def test_the_order_of_a_stream_does_not_matter(name):
    """A stream whose elements come in another order gives the same, up to rounding."""
    for_all(permuted, calls(name, ladders=("normal",)), cuts, strategies.seeds, share=0.2)


def test_a_set_attention_block_of_chunks_is_another():
    """Chunk by chunk, each element would see its own chunk alone: that is no stream of the block."""
    case = cases.make("sab")
    x, params = case.arrays[0][0], case.params
    chunks = [setattn.sab(part, params) for part in (x[:3], x[3:])]
    assert np.abs(np.concatenate(chunks) - setattn.sab(x, params)).max() > 0.01
    with pytest.raises(setattn.OptionError, match="create: argument 'function' is 'sab'; wanted one of"):
        streaming.create("sab", params)


# --- the monoid (50, 51, 52), finishing (56), files --------------------


def monoid(drawn: Drawn, cuts: list[int]) -> None:
    _, states = parts_of(drawn, cuts)
    a, b, c = states[0], states[len(states) // 2], states[-1]
    empty = Streamed(drawn).create()
    same_result(streaming.merge(a, b), streaming.merge(b, a))
    for state in (streaming.merge(a, empty), streaming.merge(empty, a)):
        assert state.levels == a.levels
        same_result(state, a)
    same_result(streaming.merge(empty, empty), empty)
    left = streaming.merge(streaming.merge(a, b), c)
    right = streaming.merge(a, streaming.merge(b, c))
    if drawn.function != "isab":
        x, y = streaming.finish(left), streaming.finish(right)
        if np.isfinite(x).all():
            agree(
                x, y, np.full(x.shape, 64 * np.finfo(x.dtype).eps * max(1.0, np.abs(x).max(initial=0))), "associative"
            )
    again = streaming.finish(left)
    same(streaming.finish(left), again)
    streaming.update(left, *Streamed(drawn).chunk(0, 1)[:1])
    same(streaming.finish(left), again)


def same_result(a: streaming.State, b: streaming.State) -> None:
    x, y = streaming.finish(a), streaming.finish(b)
    same(np.where(np.isnan(x), np.nan, x), np.where(np.isnan(y), np.nan, y))


@pytest.mark.parametrize("name", SINGLE)
def test_states_are_a_commutative_monoid(name):
    """Merging commutes and has the empty state as its identity, bit for bit, and is associative up to rounding."""
    for_all(monoid, calls(name, ladders=("normal",)), cuts, share=0.2)


def saved(drawn: Drawn, cuts: list[int], stop: int) -> None:
    """Go on from a file at any chunk, and compare the bits with those of a stream that was not interrupted."""
    streamed = Streamed(drawn)
    chunks = streamed.chunks(cuts)
    stop = min(stop, len(chunks))

    def seen(state: streaming.State, interrupted: bool) -> streaming.State:
        for i, (x, mask) in enumerate(chunks):
            if interrupted and i == stop:
                state = reloaded(state)
            state = streaming.update(state, x, mask=mask)
        return state

    whole, parts = (
        streams.together(streamed.all_passes(lambda state, i=i: seen(state, i), cuts)) for i in (False, True)
    )
    same(parts, whole)


def reloaded(state: streaming.State) -> streaming.State:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.safetensors")
        streaming.save(path, state)
        return streaming.load(path)


@pytest.mark.parametrize("name", streams.FUNCTIONS)
def test_a_reloaded_state_goes_on_bit_for_bit(name):
    for_all(saved, calls(name), cuts, st.integers(0, 7), share=0.2)


# --- a machine --------------------


@functools.cache
def _drawn(name: str) -> Any:
    return cases.make(name).rounded("float32")


class Machine(stateful.RuleBasedStateMachine):
    """States of one stream, pushed to, merged, saved and finished in any order, beside the elements they have seen."""

    backend: Any = BACKENDS["numpy"]
    name = "pma"
    states = stateful.Bundle("states")

    def __init__(self) -> None:
        super().__init__()
        self.case = _drawn(self.name)
        self.streamed = Streamed(self.case, self.backend, "float32")
        self.rng = np.random.default_rng(0)

    @stateful.initialize(target=states)
    def create(self) -> Any:
        nothing = self.streamed.x[..., :0, :]
        return self.streamed.create(), nothing, np.zeros(nothing.shape[:-1], bool), 0

    @stateful.rule(target=states, state=states, n=st.integers(0, 5), masked=st.booleans())
    def push(self, state: Any, n: int, masked: bool) -> Any:
        state, x, mask, chunks = state
        new = self.rng.normal(size=(*x.shape[:-2], n, x.shape[-1])).astype(np.float32).astype(float)
        keep = self.rng.random(new.shape[:-1]) < (0.6 if masked else 2.0)
        given = np.where(keep[..., None], new, np.nan)
        state = streaming.update(
            state,
            self.streamed.convert(given),
            mask=self.streamed.convert(keep) if masked else None,
        )
        return state, np.concatenate([x, new], axis=-2), np.concatenate([mask, keep], axis=-1), chunks + 1

    @stateful.rule(target=states, a=states, b=states)
    def merge(self, a: Any, b: Any) -> Any:
        hypothesis.assume(a[1].shape[-2] + b[1].shape[-2] < 40)
        x, mask = (np.concatenate([a[i], b[i]], axis=i - 3) for i in (1, 2))
        return streaming.merge(a[0], b[0]), x, mask, a[3] + b[3]

    @stateful.rule(target=states, state=states)
    def save(self, state: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.safetensors")
            streaming.save(path, state[0])
            return streaming.load(path, xp=self.backend.xp, device=self.backend.target), *state[1:]

    @stateful.rule(state=states)
    def finish(self, state: Any) -> None:
        state, x, mask, chunks = state
        assert (state.elements, state.chunks) == (x.shape[-2], chunks)
        case = cases.Case(self.case.function, (x,), self.case.params, {"mask": mask}, self.case.options)
        value, bound = streams.reference(case, "float32", chunks)
        y = self.backend.numpy(streaming.finish(state))
        tolerances.assert_close(y, value, bound, "machine")
        same(self.backend.numpy(streaming.finish(state)), y)


@pytest.mark.parametrize("name", ["pma", "attention_pool"])
def test_any_history_of_states(backend, name):
    """Whatever was pushed, merged and saved in any order: the result is that of all elements pushed."""
    machine = type("Machine", (Machine,), {"backend": backend, "name": name})
    few = backend.name not in ("numpy", "torch")
    settings = hypothesis.settings(max_examples=4 if few else 12, stateful_step_count=10 if few else 20, deadline=None)
    stateful.run_state_machine_as_test(machine, settings=settings)
