"""What must hold of streams for any set, any chunks and any tree of merges.

Properties of streams and of their distribution, by their numbers in the catalogue, and where they are tested:

| | property | test |
| --- | --- | --- |
| 49 | the state of a union is the merge of states | any chunks, any tree: both within the bound of the exact value |
| 50, 51, 52 | merging commutes, has an identity, is associative | a commutative monoid |
| 53 | any chunks, of 0 and 1 elements among them | any chunks; every case in chunks (test_streaming.py) |
| 54 | any tree of merges | any tree; long folds (test_streaming.py) |
| 55 | any chunks of Dask arrays, and nothing computed | test_dask.py; nothing is computed (of a stream) |
| 56 | finishing twice, and going on | a commutative monoid; states stay what they are (test_streaming.py) |
| 57 | saved and loaded | a reloaded state; a process that is killed (test_streaming_sources.py) |
| 58 | queries apart | queries may be streamed for apart; any chunks of rows |
| 59 | pooling of every block | any chunks, of every function |
| 60 | chunks of a set attention block are not one | a set attention block of chunks |
| 61 | a machine | any history of states |
| 62 | memory | memory does not grow (test_streaming.py), memory is flat (test_commands_run_chunks.py) |
| 83 | a permuted stream | the order of a stream |
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import defects
import hypothesis
import numpy as np
import pytest
import strategies
import streams
import tolerances
from backends import BACKENDS, Backend
from hypothesis import stateful
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, same
from streams import Streamed

import setattn
from setattn import streaming

one_thread = strategies.one_thread

SINGLE = ("pma", "attention_pool", "cross_attention", "isab", "mab", "attention")
ASKING = ("attention", "cross_attention", "mab")
OTHERS = ("torch", "jax", "strict", "cupy")
cuts = st.lists(st.integers(0, 33), max_size=6)


def on_eager(*names: str) -> pytest.MarkDecorator:
    """Run a property of each function on NumPy, and one of any of them on every other eager backend."""
    on_numpy = [pytest.param("numpy", name, id=f"numpy-{name}") for name in names]
    elsewhere = [pytest.param(other, names, id=other) for other in OTHERS]
    return pytest.mark.parametrize(("backend", "names"), [*on_numpy, *elsewhere], indirect=["backend"])


def calls(
    backend: Backend, names: str | tuple[str, ...], *, of: Callable[[Any], bool] = streams.streams, **given: Any
) -> st.SearchStrategy[Drawn]:
    """Draw calls of one of some functions; on JAX, which compiles every shape anew, they are the common cases."""
    names = (names,) if isinstance(names, str) else names
    if backend.name == "jax":
        common = {case.function: name for name in reversed(cases.NAMES) if of(case := cases.make(name))}
        return st.sampled_from([strategies.made(common[name], "float32") for name in names])
    only = ("mask",) if of is streams.streams else ("mask", "query_mask")
    return st.sampled_from(names).flatmap(lambda name: blocks(name, only=only, **given)).filter(of)


def on(backend: Backend, check: Callable[..., None]) -> Callable[..., None]:
    return functools.wraps(check)(functools.partial(check, backend))


def holds(backend: Backend, check: Callable[..., None], *domains: st.SearchStrategy) -> None:
    """Run a property on a backend."""
    for_all(on(backend, check), *domains, share=0.12 if backend.name == "jax" else 0.2)


def stream(backend: Backend, drawn: Drawn) -> Streamed:
    return Streamed(drawn, backend, str(drawn.dtype))


def result(backend: Backend, drawn: Drawn, cuts: list[int]) -> np.ndarray:
    return streams.together(stream(backend, drawn).result(cuts), backend.numpy)


def parts_of(backend: Backend, drawn: Drawn, cuts: list[int]) -> tuple[Streamed, list[streaming.State]]:
    """Return a state for each chunk."""
    streamed = stream(backend, drawn)
    empty = streamed.create()
    return streamed, [streaming.update(empty, x, mask=mask) for x, mask in streamed.chunks(cuts)]


def within(result: np.ndarray, drawn: Drawn, chunks: int) -> None:
    value, bound = streams.reference(drawn, str(drawn.dtype), chunks)
    nan = np.isnan(value)
    tolerances.assert_close(result, value, np.where(nan, 0.0, bound), f"stream of {drawn.function}", nan=nan)


# --- chunks and trees (49, 53, 54, 58, 59, 83) --------------------


def any_chunks(backend: Backend, drawn: Drawn, cuts: list[int]) -> None:
    y = result(backend, drawn, cuts)
    within(y, drawn, len(cuts) + 1)
    same(result(backend, drawn, cuts), y)  # and the same bits again


@on_eager(*streams.FUNCTIONS)
def test_any_chunks_give_the_result(backend, names):
    """Any composition of the elements into chunks, empty ones among them, is within the bounds of the function."""
    holds(backend, any_chunks, calls(backend, names), cuts)


def any_tree(backend: Backend, drawn: Drawn, cuts: list[int], rng: Any) -> None:
    streamed, states = parts_of(backend, drawn, cuts)
    count = len(states)
    while len(states) > 1:
        a, b = (states.pop(rng.randrange(len(states))) for _ in range(2))
        states.append(streaming.merge(a, b))
    assert (states[0].chunks, states[0].elements) == (count, streamed.n)
    sizes = [size for size, _ in states[0].levels]
    assert sizes == sorted(set(sizes), reverse=True)
    if states[0].passes == 1:
        within(backend.numpy(streaming.finish(states[0])), drawn, count)


@on_eager(*SINGLE)
def test_any_tree_of_merges_gives_the_result(backend, names):
    """States of all chunks may be merged in any order and grouping."""
    holds(backend, any_tree, calls(backend, names), cuts, st.randoms(use_true_random=False))


def permuted(backend: Backend, drawn: Drawn, cuts: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(drawn.size)
    moved = drawn.with_elements(drawn.arrays[drawn.elements][..., order, :])
    moved = moved if drawn.mask is None else moved.with_masks(mask=drawn.mask[..., order])
    a, b = (result(backend, each, cuts) for each in (drawn, moved))
    _, bound = streams.reference(drawn, str(drawn.dtype), len(cuts) + 1)
    agree(a, b, 2 * bound, "permuted stream")


@on_eager("pma", "perceiver_resampler", "set_transformer")
def test_the_order_of_a_stream_does_not_matter(backend, names):
    """A stream whose elements come in another order gives the same, up to rounding."""
    holds(backend, permuted, calls(backend, names, ladders=("normal",)), cuts, strategies.seeds)


def of_some_queries(backend: Backend, drawn: Drawn, cuts: list[int], at: int) -> None:
    asking = drawn.arrays[0]
    at = min(at, asking.shape[-2])
    parts = [drawn.with_array(0, part) for part in (asking[..., :at, :], asking[..., at:, :])]
    apart = np.concatenate([result(backend, part, cuts) for part in parts], axis=-2)
    _, bound = streams.reference(drawn, str(drawn.dtype), len(cuts) + 1)
    agree(result(backend, drawn, cuts), apart, 2 * bound, "queries apart")


@on_eager(*ASKING)
def test_queries_may_be_streamed_for_apart(backend, names):
    """Some of the queries get the rows that they get together with the others."""
    holds(backend, of_some_queries, calls(backend, names, ladders=("normal",)), cuts, st.integers(0, 11))


def rows_of_a_context(backend: Backend, drawn: Drawn, cuts: list[int]) -> None:
    streamed = streams.Asking(drawn, backend, str(drawn.dtype))
    within(streams.together(streamed.result(cuts), backend.numpy), drawn, 1)


@on_eager(*ASKING)
def test_any_chunks_of_rows_give_the_rows(backend, names):
    """The elements that ask a context in memory may come in any chunks."""
    holds(backend, rows_of_a_context, calls(backend, names, of=streams.asks), cuts)


def test_a_set_attention_block_of_chunks_is_another():
    """Chunk by chunk, each element would see its own chunk alone: that is no stream of the block (60)."""
    case = cases.make("sab")
    x, params = case.arrays[0][0], case.params
    chunks = [setattn.sab(part, params) for part in (x[:3], x[3:])]
    assert np.abs(np.concatenate(chunks) - setattn.sab(x, params)).max() > 0.01
    with pytest.raises(setattn.OptionError, match="create: argument 'function' is 'sab'; wanted one of"):
        streaming.create("sab", params)


# --- the monoid (50, 51, 52), finishing (56), files (57) --------------------


def monoid(backend: Backend, drawn: Drawn, cuts: list[int]) -> None:
    def same_result(a: streaming.State, b: streaming.State) -> None:
        x, y = (backend.numpy(streaming.finish(state)) for state in (a, b))
        same(np.where(np.isnan(x), np.nan, x), np.where(np.isnan(y), np.nan, y))

    streamed, states = parts_of(backend, drawn, cuts)
    a, b, c = states[0], states[len(states) // 2], states[-1]
    empty = streamed.create()
    same_result(streaming.merge(a, b), streaming.merge(b, a))
    for state in (streaming.merge(a, empty), streaming.merge(empty, a)):
        assert state.levels == a.levels
        same_result(state, a)
    same_result(streaming.merge(empty, empty), empty)
    assert np.isfinite(backend.numpy(streaming.finish(empty))).all()
    left = streaming.merge(streaming.merge(a, b), c)
    right = streaming.merge(a, streaming.merge(b, c))
    if drawn.function != "isab":
        x, y = (backend.numpy(streaming.finish(state)) for state in (left, right))
        if np.isfinite(x).all():
            scale = max(1.0, np.abs(x).max(initial=0))
            agree(x, y, np.full(x.shape, 64 * np.finfo(x.dtype).eps * scale), "associative")
    again = backend.numpy(streaming.finish(left))
    same(backend.numpy(streaming.finish(left)), again)
    streaming.update(left, *streamed.chunk(0, 1)[:1])
    same(backend.numpy(streaming.finish(left)), again)


@on_eager(*SINGLE)
def test_states_are_a_commutative_monoid(backend, names):
    """Merging commutes and has the empty state as its identity, bit for bit, and is associative up to rounding."""
    holds(backend, monoid, calls(backend, names, ladders=("normal",)), cuts)


def saved(backend: Backend, drawn: Drawn, cuts: list[int], stop: int) -> None:
    """Go on from a file at any chunk, and compare the bits with those of a stream that was not interrupted."""
    streamed = stream(backend, drawn)
    chunks = streamed.chunks(cuts)
    stop = min(stop, len(chunks))

    def seen(state: streaming.State, interrupted: bool) -> streaming.State:
        for i, (x, mask) in enumerate(chunks):
            if interrupted and i == stop:
                state = reloaded(backend, state)
            state = streaming.update(state, x, mask=mask)
        return state

    whole, parts = (
        streams.together(streamed.all_passes(lambda state, i=i: seen(state, i), cuts), backend.numpy)
        for i in (False, True)
    )
    same(parts, whole)


def reloaded(backend: Backend, state: streaming.State) -> streaming.State:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.safetensors")
        streaming.save(path, state)
        return streaming.load(path, xp=backend.xp, device=backend.target)


@on_eager(*streams.FUNCTIONS)
def test_a_reloaded_state_goes_on_bit_for_bit(backend, names):
    holds(backend, saved, calls(backend, names), cuts, st.integers(0, 7))


def test_nothing_is_computed_while_a_stream_of_lazy_arrays_is_built():
    """Updates, merges and finishing of Dask arrays add to a graph (55)."""
    pytest.importorskip("dask")
    backend, case = BACKENDS["dask"], cases.make("pma").rounded("float32")
    streamed = Streamed(case, backend, "float32")
    with backend.lazily():
        empty = streamed.create()
        a, b = (streaming.update(empty, x, mask=mask) for x, mask in streamed.chunks([3]))
        y = streaming.finish(streaming.merge(a, b))
    value, bound = streams.reference(case, "float32", 2)
    tolerances.assert_close(backend.numpy(y), value, bound, "lazy stream")


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        (defects.unscaled_merge, any_chunks),
        (defects.dropped, any_chunks),
        (defects.positional, permuted),
        (defects.lopsided_merge, monoid),
        (defects.unguarded_merge, any_chunks),
        (defects.unscaled_merge, any_tree),
        (defects.finite_fill, any_tree),
    ],
)
def test_planted_defects_are_noticed(defect, check):
    own = {permuted: [strategies.seeds], any_tree: [st.randoms(use_true_random=False)]}.get(check, [])
    strategies.rejects(defect(), on(BACKENDS["numpy"], check), calls(BACKENDS["numpy"], "pma"), cuts, *own)


# --- a machine (61) --------------------


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
        return reloaded(self.backend, state[0]), *state[1:]

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
