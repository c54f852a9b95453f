"""States of several processes, merged by collectives: here the processes take turns, as the function is pure."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
import streams
import tolerances
from strategies import same
from streams import Streamed

import setattn
from setattn import streaming

CUTS = (2, 2)  # three processes, of which one has nothing
ONE_EACH = [n for n in streams.NAMES if n in streams.FUNCTIONS or n.endswith(("-length", "-features", "-idefics2"))]


def all_reduced(states, xp):
    """Reduce the states of all processes; what each gives to a collective is recorded first."""
    largest, sums = [], []

    def record(a, given):
        given.append(a)
        return a

    for state in states:
        streaming.all_reduce(state, max=lambda a: record(a, largest), sum=lambda a: a)
    most = functools.reduce(lambda a, b: xp.where(a > b, a, b), largest)
    for state in states:
        streaming.all_reduce(state, max=lambda a: most, sum=lambda a: record(a, sums))
    whole = functools.reduce(lambda a, b: a + b, sums)
    return [streaming.all_reduce(state, max=lambda a: most, sum=lambda a: whole) for state in states]


def by_processes(streamed, xp):
    """Go through all passes, each process through its own elements."""
    chunks = streamed.chunks(CUTS)
    places = [0, *CUTS]
    states = [streamed.create(first=place) for place in places]

    def seen(states):
        states = [streaming.update(state, x, mask=mask) for state, (x, mask) in zip(states, chunks, strict=True)]
        return all_reduced(states, xp)

    for _ in range(len(states[0]._work.passes.attentions) - 1):
        states = [streaming.advance(state) for state in seen(states)]
    states = seen(states)
    if states[0]._work.passes.rows is None:
        results = [streaming.finish(state) for state in states]
        for other in results[1:]:
            assert bool(xp.all(other == results[0]))
        return results[:1]
    states = map(streaming.advance, states)
    return [streaming.rows(state, x, mask=mask)[1] for state, (x, mask) in zip(states, chunks, strict=True)]


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_function_by_processes(name, backend):
    """Each function in three processes, one of which has no elements, is within the bound of its merges."""
    case = cases.make(name).rounded("float32")
    value, bound = streams.reference(case, "float32", len(CUTS) + 1)
    parts = by_processes(Streamed(case, backend, "float32"), backend.xp)
    tolerances.assert_close(streams.together(parts, backend.numpy), value, bound, "all_reduce")


@pytest.fixture
def state():
    x = np.random.default_rng(1).normal(size=(2, 20, 8)).astype(np.float32)
    state = streaming.create("pma", setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0), batch=(2,))
    return functools.reduce(streaming.update, (x[:, :5], x[:, 5:7], x[:, 7:]), state)


def test_what_travels_does_not_depend_on_the_elements(state):
    """One array of a number, and one of 1 + value_dim, for each head and query of each set; contiguous, of one axis."""
    given = []

    def record(a):
        given.append(a)
        return a

    streaming.all_reduce(state, max=record, sum=record)
    assert [(a.shape, a.dtype, a.flags.c_contiguous) for a in given] == [
        ((2 * 2 * 3,), np.float64, True),
        ((2 * 2 * 3 * (1 + 4),), np.float64, True),
    ]


def test_collectives_may_write_where_they_are_given(state):
    """MPI and PyTorch do; the state stays what it is."""
    before = streaming.finish(state)

    def spoil(a):
        a[:] = np.nan
        return a

    assert np.isnan(streaming.finish(streaming.all_reduce(state, max=spoil, sum=spoil))).all()
    same(streaming.finish(state), before)


def test_one_process_alone(state):
    alone = streaming.all_reduce(state, max=lambda a: a, sum=lambda a: a)
    same(streaming.finish(alone), streaming.finish(state))
    assert (alone.elements, alone.chunks) == (20, 3)


def test_each_process_sees_its_own_elements_again():
    """The counts are those of the process, and a later pass has to reach them."""
    streamed = Streamed(cases.make("set_transformer"))
    chunks = streamed.chunks([4])
    states = [streaming.update(streamed.create(), x, mask=mask) for x, mask in chunks]
    for state, elements in zip(all_reduced(states, np), (4, 3), strict=True):
        with pytest.raises(
            setattn.OptionError, match=f"after 0 elements in pass 2; wanted {elements}, as in the first"
        ):
            streaming.advance(streaming.advance(state))


def test_nothing_anywhere_is_the_empty_set():
    streamed = Streamed(cases.make("pma"))
    empty = streamed.create()
    reduced = all_reduced([empty, empty], np)
    same(streaming.finish(reduced[0]), streaming.finish(empty))


def test_wrong_collectives(state):
    """PyTorch's own function returns nothing, MPI's of Python objects may return something else."""
    wanted = "wanted an array like the one it was given, of float64 and shape"
    with pytest.raises(setattn.OptionError, match=rf"'max' is a function that returned a NoneType; {wanted} \(12,\)"):
        streaming.all_reduce(state, max=lambda a: None, sum=lambda a: a)
    got = r"a function that returned a ndarray of float32 and shape \(60,\)"
    with pytest.raises(setattn.OptionError, match=rf"all_reduce: argument 'sum' is {got}; {wanted} \(60,\)"):
        streaming.all_reduce(state, max=lambda a: a, sum=lambda a: a.astype(np.float32))
    with pytest.raises(setattn.OptionError, match=r"'sum' is a function that returned a ndarray of float64 and shape"):
        streaming.all_reduce(state, max=lambda a: a, sum=lambda a: a[1:])
    with pytest.raises(setattn.ParameterError, match="all_reduce: argument 'state' is a tuple; wanted a setattn"):
        streaming.all_reduce((), max=abs, sum=abs)
    rows = streaming.advance(Streamed(cases.make("isab")).create())
    with pytest.raises(setattn.OptionError, match="'state' is in the pass through the rows; wanted one in a pass with"):
        streaming.all_reduce(rows, max=abs, sum=abs)
