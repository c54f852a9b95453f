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


class Long:
    """A set in 65 536 chunks in float32, each of whose states is known; the chunks of one size are computed at once."""

    chunks, dim = 65536, 4

    def __init__(self, sizes):
        rng = np.random.default_rng(0)
        params = setattn.init_attention(self.dim, num_heads=1, rng=rng)._replace(query=(), output=())
        eye = setattn.Linear(np.eye(self.dim, dtype=np.float32).reshape(self.dim, 1, self.dim))
        self.params = params._replace(key=eye, value=eye)
        self.x = rng.normal(size=(sizes.sum(), self.dim)).astype(np.float32)
        self.x[:, 0] += 1  # no cancelling in the first feature
        self.q = rng.normal(size=(2, self.dim)).astype(np.float32)
        self.xp = namespace_of(self.x)
        self.ends = np.cumsum(sizes)
        self.parts = [None] * self.chunks
        for size in np.unique(sizes):
            at = np.flatnonzero(sizes == size)
            elements = self.x[(self.ends[at] - size)[:, None] + np.arange(size)]
            states = part_of_attention(self.q, [Context(elements)], self.params, Options(self.xp))
            for i, number in enumerate(at):
                self.parts[number] = Part(*(field[i] for field in states))

        v = self.x.astype(np.float64)
        s = self.q.astype(np.float64) @ v.T / np.sqrt(self.dim)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        self.exact, self.unit = p @ v, 2.0**-24 * (p @ np.abs(v))

    def error(self, y):
        """Return the largest error in units of u sum p |v|."""
        return float(np.max(np.abs(y - self.exact) / self.unit))

    def merge(self, a, b):
        return merge_states(a, b, self.xp)

    def as_kept(self, part, state):
        """Return a part in the dtype that a stream merges in."""
        return Part(*(field.astype(state._work.merged) for field in part))


@pytest.mark.parametrize("sizes", ["equal", "mixed"])
def test_long_folds_do_not_drift(sizes):
    """65 536 chunks in float32 stay within 1 u sum p |v| of the exact value, however they are cut and merged."""
    rng = np.random.default_rng(1)
    mixed = rng.choice([0, 1, 3, 16, 40], size=Long.chunks, p=[0.1, 0.2, 0.3, 0.3, 0.1])
    long = Long(mixed if sizes == "mixed" else np.full(Long.chunks, 16))
    empty = streaming.create("attention", long.params, queries=long.q)
    states, start = [], 0
    for stop in [*np.sort(rng.integers(0, Long.chunks, 63)), Long.chunks]:  # each of a process of its own
        levels: Levels = ()
        for part in long.parts[start:stop]:
            levels = combine(long.merge, levels, ((1, long.as_kept(part, empty)),))
        states.append(replace(empty, levels=levels, chunks=int(stop - start)))
        start = stop
    while len(states) > 1:
        a, b = (states.pop(rng.integers(len(states))) for _ in range(2))
        states.append(streaming.merge(a, b))
    assert [size for size, _ in states[0].levels] == [Long.chunks]
    assert long.error(streaming.finish(states[0])) <= 1.0

    # What was merged here is what update() merges.
    state, levels = empty, ()
    for stop, start in zip(long.ends[:100], [0, *long.ends], strict=False):
        state = streaming.update(state, long.x[start:stop])
    for part, size in zip(long.parts[:100], np.diff([0, *long.ends]), strict=False):
        if size:  # a chunk without elements is no part
            levels = combine(long.merge, levels, ((1, long.as_kept(part, empty)),))
    assert [size for size, _ in state.levels] == [size for size, _ in levels]
    same(streaming.finish(state), streaming.finish(replace(empty, levels=levels)))


def test_other_folds_drift():
    """What the bound would be without a tree, and with the tree alone: it tells them apart."""
    long = Long(np.full(Long.chunks, 16))
    tree = finish(fold(long.merge, long.parts), long.xp)
    sequential = long.parts[0]
    for part in long.parts[1:]:
        sequential = long.merge(sequential, part)
    assert long.error(finish(sequential, long.xp)) > 4.0
    assert long.error(tree) > 1.0


def peak(function):
    """Measure the most memory that a function has taken at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_elements():
    """Eight times as many elements take a few states more; what else the process does comes and goes."""
    rng = np.random.default_rng(0)
    params = setattn.init_set_transformer(8, 16, 4, num_heads=4, num_inducing=5, num_encoders=2, rng=rng)
    chunk = rng.normal(size=(512, 8)).astype(np.float32)

    def run(chunks):
        return streaming.fold("set_transformer", params, lambda: (chunk for _ in range(chunks)))

    peaks = [min(peak(lambda c=c: run(c)) for _ in range(4)) for c in (8, 64)]
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


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("recorded", [(False, True), (True, False), (False, False), (True, True)])
def test_whether_gradients_are_recorded_is_asked_at_each_step(backend, recorded):
    """A stream of PyTorch that was begun where none are recorded has them where they are, and the other way round."""
    torch, (at_first, later) = backend.xp, recorded
    params = setattn.convert_params(setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), torch)
    x = torch.linspace(-1, 1, 2 * 40 * 8).reshape(2, 40, 8)

    def folded(x, mode):
        state = begun
        with torch.set_grad_enabled(mode):
            for chunk in (x[:, :11], x[:, 11:]):
                state = streaming.update(state, chunk)
            return streaming.rows(streaming.advance(state), x)[1]

    with torch.set_grad_enabled(at_first):
        begun = streaming.create("isab", params, batch=(2,))
    mine, whole = (x.clone().requires_grad_() for _ in range(2))
    out, wanted = folded(mine, later), setattn.isab(whole, params)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert out.requires_grad == later
    if later:
        out.square().sum().backward()
        wanted.square().sum().backward()
        assert torch.allclose(mine.grad, whole.grad, atol=1e-4)


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
