"""States of streams: the results of the functions in memory, in bounded memory, without drift."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import cases
import numpy as np
import pytest
import strategies
import streams
import tolerances
from strategies import same
from streams import Streamed

import setattn
from setattn import streaming
from setattn._attend import part_of_attention
from setattn._blocks import Levels, combine, fold
from setattn._context import Context
from setattn._layers import Options
from setattn._namespace import namespace_of
from setattn._state import State as Part
from setattn._state import finish, merge_states

one_thread = strategies.one_thread

CUTS = (2, 2, 3, 5)


@pytest.mark.parametrize("name", streams.NAMES)
def test_every_case_in_chunks(name, backend, dtype):
    """Each case in chunks, one of which is empty, is within the bound of its merges."""
    case = cases.make(name).rounded(dtype)
    value, bound = streams.reference(case, dtype, len(CUTS) + 1)
    streamed = Streamed(case, backend, dtype)
    parts = streamed.result(CUTS)
    tolerances.assert_close(streams.together(parts, backend.numpy), value, bound, f"stream {dtype}")
    assert all(part.dtype == backend.dtype(dtype) for part in parts)


@pytest.mark.parametrize("name", streams.ASKING)
def test_rows_that_attend_to_a_context(name, backend, dtype):
    """The elements that ask, in chunks: each row is that of the whole call."""
    case = cases.make(name).rounded(dtype)
    value, bound = streams.reference(case, dtype, 1)
    parts = streams.Asking(case, backend, dtype).result(CUTS)
    tolerances.assert_close(streams.together(parts, backend.numpy), value, bound, f"rows {dtype}")
    assert all(part.dtype == backend.dtype(dtype) for part in parts)


@pytest.mark.parametrize("name", [name for name in streams.NAMES if cases.make(name).arrays[0].dtype.kind != "i"])
def test_nothing_is_the_empty_set(name):
    """A state that has seen nothing, or only chunks without elements, gives what the function gives for no elements."""
    case = cases.make(name)
    streamed = Streamed(case.resized(elements=0))
    state = streamed.create()
    for _ in range(len(state._work.passes.attentions) - 1):
        state = streaming.advance(state)
    y = streaming.finish(state)
    empty, mask = streamed.chunk(0, 0)
    seen = streaming.update(state, empty, mask=mask)
    same(streaming.finish(seen), y)
    assert (seen.chunks, seen.elements) == (1, 0)
    if state._work.passes.rows is None:
        want = streamed.case.call(streamed.case.arrays, streamed.case.params, streamed.case.masks)
        tolerances.assert_close(y, want, 1e-13 * np.abs(want), "nothing")


# --- drift and memory -----------------------------------------------------------------------------------------------


def test_long_folds_do_not_drift():
    """65 536 chunks in float32 stay within 1 u sum p |v| of the exact value; one after another, they do not."""
    chunks, size, d = 65536, 16, 4
    rng = np.random.default_rng(0)
    params = setattn.init_attention(d, num_heads=1, rng=rng)._replace(query=(), output=())
    eye = setattn.Linear(np.eye(d, dtype=np.float32).reshape(d, 1, d))
    params = params._replace(key=eye, value=eye)
    x = rng.normal(size=(chunks, size, d)).astype(np.float32)
    x[..., 0] += 1  # no cancelling in the first feature
    q = rng.normal(size=(2, d)).astype(np.float32)
    xp = namespace_of(x)
    all_at_once = part_of_attention(q, [Context(x)], params, Options(xp))
    parts = [Part(*(field[i] for field in all_at_once)) for i in range(chunks)]

    def merge(a: Part, b: Part) -> Part:
        return merge_states(a, b, xp)

    state = streaming.create("attention", params, queries=q)
    wide = [Part(*(field.astype(state._work.merged) for field in part)) for part in parts]
    levels: Levels = ()
    for part in wide:
        levels = combine(merge, levels, ((1, part),))
    assert [size for size, _ in levels] == [chunks]
    streamed = streaming.finish(replace(state, levels=levels))
    sequential = parts[0]
    for part in parts[1:]:
        sequential = merge(sequential, part)

    v = x.reshape(-1, d).astype(np.float64)
    s = q.astype(np.float64) @ v.T / np.sqrt(d)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    unit = 2.0**-24 * (p @ np.abs(v))

    def error(y):
        return float(np.max(np.abs(y - p @ v) / unit))

    assert error(streamed) <= 1.0
    assert error(finish(sequential, xp)[0]) > 2.0

    # What was merged here is what update() merges.
    for chunk in x[:100]:
        state = streaming.update(state, chunk)
    assert [size for size, _ in state.levels] == [64, 32, 4]
    alone = [part_of_attention(q, [Context(chunk)], params, Options(xp)) for chunk in x[:100]]
    few = fold(merge, [Part(*(field.astype(np.float64) for field in part)) for part in alone])
    same(streaming.finish(state), finish(few, xp)[0].astype(np.float32))


def peak(function):
    """Measure the most memory that a function has taken at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_elements():
    """Sixteen times as many elements take a few states more, and nothing else."""
    rng = np.random.default_rng(0)
    params = setattn.init_set_transformer(8, 16, 4, num_heads=4, num_inducing=5, num_encoders=2, rng=rng)
    chunk = rng.normal(size=(512, 8)).astype(np.float32)

    def run(chunks):
        return streaming.fold("set_transformer", params, lambda: (chunk for _ in range(chunks)))

    run(128)  # what Python itself keeps of code that has run a while
    peaks = [peak(lambda c=c: run(c)) for c in (8, 128)]
    state = 4 * 5 * (4 + 2) * 8 + 2000  # the numbers of a state of one layer, and the objects that hold them
    assert peaks[1] <= peaks[0] + 5 * state
    assert peaks[1] < 40 * chunk.nbytes


# --- states are values ----------------------------------------------------------------------------------------------


@pytest.fixture
def pma():
    params = setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0)
    x = np.random.default_rng(1).normal(size=(2, 20, 8)).astype(np.float32)
    return params, x, streaming.create("pma", params, batch=(2,))


def test_states_stay_what_they_are(pma):
    _, x, empty = pma
    one = streaming.update(empty, x[:, :5])
    before = streaming.finish(one)
    two = streaming.update(one, x[:, 5:])
    streaming.merge(one, two)
    same(streaming.finish(one), before)
    assert (empty.elements, one.elements, two.elements) == (0, 5, 20)
    assert repr(two) == "<setattn.streaming.State pma, batch (2,), 20 elements in 2 chunks>"
    with pytest.raises(AttributeError):
        one.elements = 3


def test_a_function_is_as_good_as_its_name(pma):
    params, x, _ = pma
    state = streaming.update(streaming.create(setattn.pma, params, batch=[2]), x)
    tolerances.assert_close(streaming.finish(state), setattn.pma(x, params), 0, "one chunk")


def test_lengths_are_asked_for():
    case = cases.make("isab-length")
    with pytest.raises(setattn.OptionError, match="length' is not given; wanted how many elements"):
        Streamed(case).create(length=None)
    with pytest.raises(setattn.DTypeError, match="'length' has dtype float64; wanted an integer dtype"):
        Streamed(case).create(length=np.ones(2))
    with pytest.raises(setattn.ShapeError, match=r"'length' has shape \(3,\); wanted \(2,\), the batch"):
        Streamed(case).create(length=np.ones(3, int))


def test_places_are_counted():
    """Elements take the row of their place in the whole set; parts of it that are merged must be neighbours."""
    case = cases.make("perceiver-features")
    streamed = Streamed(case)
    first = streamed.create()
    (x, m), (y, k) = streamed.chunks([3])
    whole = streaming.update(streaming.update(first, x, mask=m), y, mask=k)
    a, b = streaming.update(first, x, mask=m), streaming.update(streamed.create(first=3), y, mask=k)
    if len(whole._work.passes.attentions) == 1:
        same(streaming.finish(streaming.merge(a, b)), streaming.finish(whole))
    assert streaming.merge(b, a).first == 0
    with pytest.raises(setattn.OptionError, match=r"is a state from place 5; wanted one from place 3"):
        streaming.merge(a, streaming.update(streamed.create(first=5), *streamed.chunk(5, 6)[:1], mask=None))
    rows = first._work.passes.places
    with pytest.raises(
        setattn.ShapeError, match=f"chunk 0' is elements {rows - 1} to {rows + 1}; wanted at most {rows}"
    ):
        streaming.update(streamed.create(first=rows - 1), *streamed.chunk(0, 2)[:1])
