"""Nothing at all: sets, queries and batches of size 0, and masks that leave nothing.

Attention over nothing is 0, on every backend. What that makes of a whole block is the block on its queries with an
attention of 0, a documented constant where the queries are learned.
"""

from __future__ import annotations

import functools
import importlib

import cases
import numpy as np
import pytest
import tolerances
from backends import BACKENDS, EVERYWHERE

import setattn
from setattn._order import SCORES, VALUES

MASKABLE = [name for name in cases.NAMES if "mask" in cases.make(name).masks or "pair_mask" in cases.make(name).masks]
QUERYING = [name for name in cases.NAMES if cases.make(name).queries is not None]
OWN_ROWS = ("sab", "isab")  # whose rows of the result are those of the set
SLOW = ("jax.numpy", "dask.array")


def pairs(names):
    """Backends and cases, one of each function where compiling or building a graph takes long."""
    one_each = {cases.make(name).function: name for name in reversed(names)}.values()
    return [
        (backend, name)
        for backend in EVERYWHERE
        for name in (sorted(one_each) if BACKENDS[backend].module in SLOW else names)
    ]


def everywhere(names):
    return pytest.mark.parametrize(("backend", "name"), pairs(names), indirect=["backend"])


def compiled(case, backend):
    """The function itself, or compiled by JAX, which is the faster way there."""
    if backend.module != "jax.numpy":
        return case.call
    return importlib.import_module("jax").jit(case.call, compiler_options={"xla_backend_optimization_level": 0})


def run(case, backend, dtype="float32", call=None):
    """Call a function and return a NumPy array."""
    trees, call = case.trees(backend, dtype), call or compiled(case, backend)
    with backend.lazily():
        out = call(*trees)
    return backend.numpy(out)


@functools.cache
def sized(name, dtype="float32", **sizes):
    """A case of other sizes, its value and its bound."""
    case = cases.make(name).rounded(dtype).resized(**sizes)
    return (case, *cases.reference(case, dtype))


def assert_reference(backend, name, dtype="float32", **sizes):
    """Check a case of other sizes, and return its result."""
    case, value, bound = sized(name, dtype, **sizes)
    out = run(case, backend, dtype)
    tolerances.assert_close(out, value, bound, f"{case.function} {dtype}")
    assert np.isfinite(out).all()
    return out


def masked(case, value=False, at=()):
    """Put another value in the masks over elements: all of them, or those of one entry of the batch."""

    def change(m):
        m = m.copy()
        m[at] = value
        return m

    return cases.replace(case, masks=case.masks | {k: change(m) for k, m in case.masks.items() if k == "mask"})


def with_mask(name):
    """A case rounded to float32 whose one mask, beside a bias and masks of queries, is over its elements."""
    case = cases.make(name).rounded("float32")
    masks = {key: m for key, m in case.masks.items() if key != "pair_mask"}
    if "mask" not in masks:
        masks["mask"] = np.ones(case.arrays[case.elements].shape[:-1], dtype=bool)
    return cases.replace(case, masks=masks)


# --- sizes of 0 -----------------------------------------------------------------------------------------------------


@everywhere(cases.NAMES)
def test_no_elements(backend, name):
    """A set without elements is a set."""
    assert_reference(backend, name, elements=0)


@everywhere(QUERYING)
def test_no_queries(backend, name):
    """Nobody asks: the result has no rows."""
    assert assert_reference(backend, name, queries=0).size == 0


@everywhere(cases.NAMES)
def test_no_batch(backend, name):
    """A batch of no sets has a result, of no sets."""
    assert assert_reference(backend, name, batch=0).size == 0


@pytest.mark.parametrize("backend", [b for b in EVERYWHERE if BACKENDS[b].module not in SLOW], indirect=True)
@pytest.mark.parametrize("name", cases.ONE_EACH)
def test_nothing_of_anything(backend, name):
    """No sets of no elements that nobody asks."""
    assert_reference(backend, name, batch=0, elements=0, queries=0)


@pytest.mark.parametrize("backend", [b for b in EVERYWHERE if BACKENDS[b].module not in SLOW], indirect=True)
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("perceiver_resampler-frames", 1),
        ("perceiver_resampler-media", 1),
        ("perceiver_resampler-media-frames", 1),
        ("perceiver_resampler-media-frames", 2),
        ("gated_cross_attention", 1),
        ("gated_cross_attention-previous", 1),
    ],
)
def test_no_frames_or_media(backend, name, before):
    """Neither frames nor media need be there."""
    assert_reference(backend, name, elements=0, before=before)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("numpy", "float64"), ("numpy", "float16"), ("torch", "bfloat16")], indirect=["backend"]
)
@pytest.mark.parametrize("name", ["attention-grouped", "mab-pre-norm", "pma", "perceiver_resampler"])
def test_no_elements_in_other_dtypes(backend, dtype, name):
    """Nor does a dtype change that."""
    assert_reference(backend, name, dtype, elements=0)


# --- masks that leave nothing ---------------------------------------------------------------------------------------


@everywhere([name for name in MASKABLE if cases.make(name).function not in OWN_ROWS])
def test_all_masked_is_the_empty_set(backend, name):
    """A set whose elements are all masked is the empty set, bit for bit."""
    case = with_mask(name)
    out, nothing = run(masked(case), backend), run(case.resized(elements=0), backend)
    if cases.make(name).function == "attention_weights":
        assert out.shape == (*nothing.shape[:-1], case.arrays[1].shape[-2])
        assert not out.any()
    else:
        assert out.tobytes() == nothing.tobytes()


@everywhere([name for name in MASKABLE if cases.make(name).function in OWN_ROWS])
def test_all_masked_is_0_where_the_rows_are_the_elements(backend, name):
    """Where each element has a row of the result, the rows of masked elements are 0."""
    assert not run(masked(with_mask(name)), backend).any()


@everywhere([name for name in MASKABLE if cases.make(name).function in (*OWN_ROWS, "mab")])
def test_rows_of_masked_elements_are_0(backend, name):
    """A masked element or query has a row of zeros, exactly."""
    case = cases.make(name)
    rows = case.masks.get("query_mask", np.ones(1, dtype=bool) if case.function == "mab" else case.masks["mask"])
    out = run(case, backend)
    assert not out[np.broadcast_to(~rows, out.shape[:-1])].any()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("backend", ["numpy", "torch", "strict"], indirect=True)
@pytest.mark.parametrize("name", MASKABLE)
def test_a_masked_set_leaves_the_others_alone(backend, name):
    """Masking one set of a batch wholly changes no bit of the others, nor does what it holds."""
    case = with_mask(name)
    one = run(masked(case, at=1), backend)
    all_there = run(masked(case, value=True, at=1), backend)
    assert one[0].tobytes() == all_there[0].tobytes()
    assert np.isfinite(one).all()
    garbage = run(masked(case, at=1).with_garbage((np.nan, np.inf)), backend)
    assert garbage.tobytes() == one.tobytes()


@everywhere(MASKABLE)
def test_garbage_under_masks(backend, name):
    """NaN, infinities and huge numbers in what is masked change no bit."""
    case = cases.make(name).rounded("float32")
    garbage, call = case.with_garbage((np.nan, np.inf, -np.inf, 3e38, -1e-42)), compiled(case, backend)
    assert run(garbage, backend, call=call).tobytes() == run(case, backend, call=call).tobytes()


@pytest.mark.parametrize("name", cases.NAMES)
def test_nothing_without_a_floating_point_error(name):
    """Nothing at all is no reason for a warning."""
    case = cases.make(name).rounded("float32")
    with np.errstate(all="raise"):
        for nothing in (case.resized(elements=0), case.resized(queries=0), case.resized(batch=0), masked(case)):
            assert np.isfinite(nothing.numpy("float32")).all()


# --- what the documentation says of nothing ---------------------------------------------------------------------------


def float32(name):
    case = cases.make(name).rounded("float32")
    (*arrays,), params, _ = case.trees(BACKENDS["numpy"], "float32")
    return arrays, params


def test_attention_over_nothing_is_the_bias_of_the_output():
    """The weighted sum is 0, and what is left is the bias of the output projection."""
    (query, context), params = float32("attention")
    out = setattn.attention(query, context[:, :0, :], params)
    np.testing.assert_array_equal(out, np.broadcast_to(params.output.bias, out.shape))
    assert not setattn.attention(query, context[:, :0, :], params._replace(output=())).any()


def test_pma_of_nothing_is_the_block_on_its_seeds():
    """PMA of an empty set is the block applied to the seeds with an attention of 0."""
    (x,), params = float32("pma")
    nothing = params.mab._replace(attention=zeroed(params.mab.attention))
    expected = setattn.mab(params.seeds, x[:, :1, :], nothing)
    np.testing.assert_array_equal(setattn.pma(x[:, :0, :], params), expected)


def zeroed(attention):
    """An attention whose weighted sum is 0, whatever it attends to."""
    value = setattn.map_params(lambda a: 0 * a, attention.value)
    return attention._replace(value=value)


def test_text_that_sees_nothing_gets_no_attention():
    """Before the first medium, the gated block is its feed-forward network alone, without the bias of the output."""
    (x, media), params = float32("gated_cross_attention")
    nowhere = np.zeros(x.shape[:-1], dtype=bool)
    attention = setattn.map_params(lambda a: 0 * a, params.cross_attention.attention)
    without = params._replace(cross_attention=params.cross_attention._replace(attention=attention))
    expected = setattn.gated_cross_attention(x, media, without)
    np.testing.assert_array_equal(setattn.gated_cross_attention(x, media, params, media_locations=nowhere), expected)


def test_text_that_sees_nothing_may_be_left_as_it_is():
    """Without a feed-forward network for it, text that sees nothing keeps its bits; the rest is as it was."""
    (x, media), params = float32("gated_cross_attention")
    x[0, 1, 0] = -0.0
    sees = np.ones((*x.shape[:-1], media.shape[-3]), dtype=bool)
    sees[0, 1:3] = sees[1, :2] = False
    mask = np.ones(media.shape[:-1], dtype=bool)
    mask[1, 2] = False
    masks = {"pair_mask": sees, "mask": mask}
    blind = ~(sees & mask.any(axis=-1)[:, None, :]).any(axis=-1)
    out = setattn.gated_cross_attention(x, media, params, **masks, ff_without_media=False)
    assert out[blind].tobytes() == x[blind].tobytes()
    with_ff = setattn.gated_cross_attention(x, media, params, **masks)
    np.testing.assert_array_equal(out[~blind], with_ff[~blind])
    assert (with_ff[blind] != x[blind]).any(axis=-1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("function", ["attention", "attention_weights"])
def test_a_bad_number_reaches_only_the_queries_that_see_it(function, bad):
    """Under a pair mask, an element that is not finite changes no bit in the rows of queries that do not see it."""
    rng = np.random.default_rng(0)
    params = setattn.init_attention(12, 10, num_heads=4, num_kv_heads=2, rng=rng)
    query, context = rng.normal(size=(2, 3, 12)).astype(np.float32), rng.normal(size=(2, 7, 10)).astype(np.float32)
    sees = np.ones((2, 3, 7), dtype=bool)
    sees[0, 1:, 4] = False
    call = getattr(setattn, function)
    clean = call(query, context, params, pair_mask=sees)
    context[0, 4, 2] = bad
    spoilt = call(query, context, params, pair_mask=sees)
    rows = np.zeros(spoilt.shape[:-1], dtype=bool)
    rows[0, ..., 0] = True
    assert np.isnan(spoilt[rows]).all()
    np.testing.assert_array_equal(spoilt[~rows], clean[~rows])


@pytest.mark.parametrize("order", [setattn.Order(s, v) for s in SCORES for v in VALUES])
@pytest.mark.parametrize("block_size", [None, 2])
def test_a_number_that_overflows_reaches_only_the_queries_that_see_it(order, block_size):
    """Nor does one that is finite, but whose score, value or value after the output projection is not."""
    rng = np.random.default_rng(0)
    params = setattn.init_attention(12, 10, num_heads=4, rng=rng)
    params = setattn.map_params(lambda a: 16 * a, params)
    query, context = rng.normal(size=(2, 3, 12)).astype(np.float32), rng.normal(size=(2, 7, 10)).astype(np.float32)
    sees = np.ones((2, 3, 7), dtype=bool)
    sees[0, 1:, 4] = False
    plan = setattn.Plan(order=order, block_size=block_size)
    clean = setattn.attention(query, context, params, pair_mask=sees, plan=plan)
    context[0, 4] = rng.choice([-3e38, 3e38], 10)
    with np.errstate(all="ignore"):
        spoilt = setattn.attention(query, context, params, pair_mask=sees, plan=plan)
    assert not np.isfinite(spoilt[0, 0]).all()
    np.testing.assert_array_equal(spoilt[0, 1:], clean[0, 1:])
    np.testing.assert_array_equal(spoilt[1], clean[1])


@pytest.mark.parametrize("immediate", [True, False])
def test_media_that_overflow_reach_no_text_before_them(immediate):
    """Text before a medium does not see it, whatever its projections come to."""
    rng = np.random.default_rng(0)
    params = setattn.init_gated_cross_attention(12, 10, num_heads=4, rng=rng)
    params = setattn.map_params(lambda a: 16 * a + 0.5, params)._replace(attention_gate=np.ones(1, np.float32))
    text, media = rng.normal(size=(6, 12)).astype(np.float32), rng.normal(size=(2, 3, 10)).astype(np.float32)
    places = np.array([True, False, False, True, False, False])
    params = params._replace(cross_attention=params.cross_attention._replace(context_norm=()))
    options = {"media_locations": places, "immediate": immediate}
    clean = setattn.gated_cross_attention(text, media, params, **options)
    media[1, 1] = rng.choice([-3e38, 3e38], 10)
    with np.errstate(all="ignore"):
        spoilt = setattn.gated_cross_attention(text, media, params, **options)
    np.testing.assert_array_equal(spoilt[:3], clean[:3])
    assert not np.isfinite(spoilt[3:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_reaches_the_same_queries_in_blocks(bad):
    """A short context is made ready once for all blocks of queries, and each block has its own queries marked."""
    rng = np.random.default_rng(0)
    params = setattn.init_attention(12, 10, num_heads=4, rng=rng)
    query, context = rng.normal(size=(2, 11, 12)).astype(np.float32), rng.normal(size=(2, 3, 10)).astype(np.float32)
    sees = rng.random((2, 11, 3)) < 0.6
    context[0, 1, 4] = bad
    for size in (3, 4, 11):
        out = setattn.attention(query, context, params, pair_mask=sees, plan=setattn.Plan(block_size=size))
        np.testing.assert_array_equal(np.isnan(out).all(axis=-1)[0], sees[0, :, 1])
        assert np.isfinite(out[1]).all()
