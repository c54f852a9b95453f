"""Blocks over the chunks of Dask arrays: what is computed, when, where and by how many tasks."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import os
import pickle
import re
import signal
import threading
import time
from concurrent.futures import CancelledError

import cases
import numpy as np
import pytest
import tolerances
from backends import BACKENDS
from hypothesis import assume, given
from hypothesis import strategies as st

import setattn
from setattn._dask import _sizes

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
from dask.diagnostics import Profiler, ProgressBar  # noqa: E402, after it is known to be there

DASK = BACKENDS["dask"]
ANEW = setattn.Plan(recompute=True)

BLOCKS = {"isab": 2, "pma": 1, "attention_pool": 1, "cross_attention": 1, "perceiver_resampler": 2}

NAMES = [
    *("mab", "sab", "isab", "isab-length", "pma", "set_transformer", "cross_attention", "perceiver", "perceiver_io"),
    *("attention_pool", "attention_pool-all-positions", "perceiver-whole", "perceiver-features"),
    *("perceiver_io-embedded", "perceiver_resampler", "perceiver_resampler-length"),
    *("perceiver_resampler-media-frames-mean", "perceiver_resampler-idefics2"),
]

CHUNKINGS = {
    "one": lambda shape: shape,
    "set": lambda shape: (*shape[:-2], (1, shape[-2] - 1), shape[-1]),
    "elements": lambda shape: (*shape[:-2], 1, shape[-1]),
    "all": lambda shape: (1,) * len(shape),
    "empty": lambda shape: (*shape[:-2], (0, shape[-2] - 1, 0, 1), shape[-1]),
}


def cut(a, chunking):
    """Cut a data array, or a mask, which lacks the axis of features."""
    a = a if a.dtype.kind != "f" else a.astype("float32")
    chunks = chunking(a.shape) if a.dtype.kind == "f" else chunking((*a.shape, 1))[:-1]
    return da.from_array(a, chunks=chunks)


def seven(seed=0, shape=(3, 50, 8)):
    """Functions with parameters, for a set of width 8."""
    x = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return x, {
        "isab": setattn.init_isab(8, num_inducing=3, num_heads=2, rng=1),
        "pma": setattn.init_pma(8, num_seeds=2, num_heads=2, rng=2),
        "set_transformer": setattn.init_set_transformer(8, 8, 4, num_inducing=3, num_heads=2, rng=3),
        "attention_pool": setattn.init_attention_pool(8, num_heads=2, rng=4),
        "perceiver": setattn.init_perceiver(8, 8, num_latents=3, num_layers=1, num_heads=2, rng=5),
        "perceiver_resampler": setattn.init_perceiver_resampler(8, num_latents=3, num_layers=2, num_heads=2, rng=6),
    }


def lazily(function, *arguments, **keywords):
    """Call a function where computing anything is an error."""
    with DASK.lazily():
        return function(*arguments, **keywords)


def compute(out, **options):
    return out.compute(**({"scheduler": "synchronous"} | options))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", NAMES)
def test_any_chunks(name, chunking):
    """With parameters in memory, whatever the chunks are, the value is right and nothing is computed early."""
    case, value, bound = cases.expected(name, "float32")
    arrays = tuple(cut(a, CHUNKINGS[chunking]) for a in case.arrays)
    masks = {key: cut(m, CHUNKINGS[chunking]) for key, m in case.masks.items()}
    out = lazily(case.call, arrays, DASK.params(case.params, "float32"), masks)
    result = compute(out)
    assert (out.dtype, out.shape) == (result.dtype, result.shape)
    tolerances.assert_close(result, value, bound, f"{case.function} float32")
    case = dataclasses.replace(case, options=case.options | {"plan": ANEW})
    anew = lazily(case.call, arrays, DASK.params(case.params, "float32"), masks)
    assert np.array_equal(compute(anew), result)


@st.composite
def anyhow(draw, n):
    """Cut an axis anyhow, also into nothing at all here and there."""
    points = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return tuple(b - a for a, b in itertools.pairwise([0, *points, n]))


@pytest.mark.filterwarnings("ignore:Increasing number of chunks")  # Dask's own word on chunks as small as these
@given(st.data(), st.sampled_from(NAMES))
def test_chunks_at_all(data, name):
    """Of sets, batches, features and masks, each for itself."""
    case, value, bound = cases.expected(name, "float32")

    def cut_anyhow(a):
        chunks = tuple(data.draw(anyhow(n)) for n in a.shape)
        return da.from_array(a.astype("float32") if a.dtype.kind == "f" else a, chunks=chunks)

    arrays, masks = tuple(map(cut_anyhow, case.arrays)), {key: cut_anyhow(m) for key, m in case.masks.items()}
    case = dataclasses.replace(case, options=case.options | {"plan": data.draw(st.sampled_from([None, ANEW]))})
    out = lazily(case.call, arrays, DASK.params(case.params, "float32"), masks)
    result = compute(out)
    assert (out.dtype, out.shape) == (result.dtype, result.shape)
    tolerances.assert_close(result, value, bound, f"{case.function} float32")


@pytest.mark.parametrize("plan", [None, ANEW], ids=["kept", "made anew"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_may_be_cut_where_its_set_is_not(name, plan):
    case, value, bound = cases.expected(name, "float32")
    arrays = tuple(cut(a, CHUNKINGS["one"]) for a in case.arrays)
    masks = {key: cut(m, CHUNKINGS["all"]) for key, m in case.masks.items()}
    case = dataclasses.replace(case, options=case.options | {"plan": plan})
    result = compute(lazily(case.call, arrays, DASK.params(case.params, "float32"), masks))
    tolerances.assert_close(result, value, bound, f"{case.function} float32")


@pytest.mark.parametrize("name", list(seven()[1]))
def test_one_chunk_has_the_bits_of_an_array_in_memory(name):
    x, params = seven()
    function = getattr(setattn, name)
    out = lazily(function, da.from_array(x, chunks=-1), params[name])
    assert np.array_equal(compute(out), function(x, params[name]))


def test_a_mask_may_have_other_chunks():
    x, params = seven()
    mask = np.random.default_rng(1).random(x.shape[:-1]) > 0.3
    lazy = da.from_array(x, chunks=(1, 7, 8))
    out = [
        compute(lazily(setattn.isab, lazy, params["isab"], mask=da.from_array(mask, chunks=c))) for c in (-1, (1, 7))
    ]
    assert np.allclose(out[0], out[1], atol=1e-6)
    assert np.allclose(out[0], setattn.isab(x, params["isab"], mask=mask), atol=1e-6)


def test_values_under_a_mask_are_never_looked_at():
    """Not even in a chunk that is masked as a whole."""
    x, params = seven()
    mask = np.arange(50) % 3 > 0
    mask = np.broadcast_to(mask & (np.arange(50) > 9), x.shape[:-1])
    spoiled = np.where(mask[..., None], x, np.nan).astype("float32")
    for name, p in params.items():
        function, chunks = getattr(setattn, name), (2, 10, 8)
        out = [
            compute(function(da.from_array(a, chunks=chunks), p, mask=da.from_array(mask, chunks=chunks[:2])))
            for a in (x, spoiled)
        ]
        assert np.array_equal(*out)
        assert np.isfinite(out[0]).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(seven()[1]))
def test_sizes_may_be_unknown(name, masked):
    """After boolean filtering of a set, or of the batch."""
    x, params = seven()
    function, p = getattr(setattn, name), params[name]
    mask = np.random.default_rng(1).random(x.shape[:-1]) > 0.3
    keep, sets = np.random.default_rng(2).random(50) > 0.5, np.array([True, False, True])
    lazy, lazy_mask = da.from_array(x, chunks=(2, 10, 8)), da.from_array(mask, chunks=(2, 10))
    of_elements, of_sets = da.from_array(keep, chunks=10), da.from_array(sets, chunks=2)
    for index, chosen in (((slice(None), keep), (slice(None), of_elements)), ((sets,), (of_sets,))):
        some = {"mask": lazy_mask[chosen]} if masked else {}
        out = lazily(function, lazy[chosen], p, **some)
        value = function(x[index], p, **({"mask": mask[index]} if masked else {}))
        assert np.allclose(compute(out), value, atol=1e-5)


def test_what_is_known_and_what_is_not_do_not_meet():
    x, params = seven()
    keep = da.from_array(np.ones(50, dtype=bool), chunks=10)
    lazy, mask = da.from_array(x, chunks=(3, 10, 8)), da.ones((3, 50), chunks=(3, 10), dtype=bool)
    with pytest.raises(setattn.MaskError):
        lazily(setattn.isab, lazy[:, keep], params["isab"], mask=mask)
    features = da.from_array(np.ones(8, dtype=bool), chunks=8)
    with pytest.raises(setattn.ShapeError, match=r"compute_chunk_sizes\(\)"):
        lazily(setattn.isab, lazy[..., features], params["isab"])


# --- graphs ---------------------------------------------------------------------------------------------------------


def tasks(a):
    return len(dict(a.__dask_graph__()))


@pytest.mark.parametrize("name", ["isab", "pma", "attention_pool", "perceiver_resampler"])
def test_graphs_are_small(name):
    """At most four tasks for each chunk and block, before Dask fuses any, and what does not grow with the chunks."""
    x, params = seven(shape=(640, 8))
    added = []
    for chunks in (64, 128):
        lazy = da.from_array(x, chunks=(640 // chunks, 8))
        added.append(tasks(lazily(getattr(setattn, name), lazy, params[name])) - tasks(lazy))
    assert added[1] - added[0] <= 4 * BLOCKS[name] * 64
    assert added[0] <= 4 * BLOCKS[name] * 64 + 20


def test_features_that_are_split_are_put_together_once():
    x, params = seven()
    lazy = da.from_array(x, chunks=(3, 10, 4))
    out = lazily(setattn.isab, lazy, params["isab"])
    layers = [name for name in out.dask.layers if name.startswith("rechunk-merge")]
    assert len(layers) == 1
    assert np.allclose(compute(out), setattn.isab(x, params["isab"]), atol=1e-6)


def test_names_are_the_same_for_the_same_call():
    """So Dask computes a thing once that is asked for twice, and the dashboard says what is computed."""
    x, params = seven()
    lazy = da.from_array(x, chunks=(3, 10, 8))
    first, second = (lazily(setattn.isab, lazy, params["isab"]) for _ in range(2))
    assert first.name == second.name
    assert {"apply_mab-state", "apply_mab-call"} <= {name.rpartition("-")[0] for name in first.dask.layers}


def test_kinds_and_dtypes_are_known_before():
    x, params = seven()
    for dtype in ("float16", "float32", "float64"):
        for name, p in params.items():
            p = setattn.map_params(lambda a: a.astype(dtype), p)  # noqa: B023, called at once
            out = lazily(getattr(setattn, name), da.from_array(x.astype(dtype), chunks=(2, 20, 8)), p)
            assert type(out._meta) is np.ndarray
            assert out._meta.dtype == out.dtype == compute(out).dtype == dtype


def test_parameters_may_be_lazy():
    x, params = seven()
    lazy = da.from_array(x, chunks=(2, 20, 8))
    for name, p in params.items():
        function = getattr(setattn, name)
        out = [lazily(function, lazy, q) for q in (p, setattn.convert_params(p, da))]
        assert np.array_equal(*map(compute, out))


def test_a_chunk_of_another_length_is_found_when_it_is_computed():
    """Unknown sizes are taken on trust when the graph is built; a mask of one entry would fit them all."""
    x, params = seven()
    keep = da.from_array(np.arange(50) % 2 > 0, chunks=10)
    lazy, mask = da.from_array(x, chunks=(3, 10, 8)), da.ones((3, 50), chunks=(3, 10), dtype=bool)
    for other, got in ((np.arange(50) % 3 > 0, 7), (np.arange(50) % 10 == 0, 1)):
        chosen = mask[:, da.from_array(other, chunks=10)]
        for name, p in params.items():
            out = lazily(getattr(setattn, name), lazy[:, keep], p, mask=chosen)
            data = {"perceiver": "inputs", "perceiver_resampler": "features"}.get(name, "x")
            with pytest.raises(setattn.MaskError) as error:
                compute(out)
            wanted = (
                rf"{name}: argument 'chunk \(0, \d\) of mask' has shape \(3, ([67]|1)\); wanted \(3, 5\), as {data} is"
            )
            assert re.match(wanted, str(error.value)), (got, str(error.value))


BAD = {
    "features": (lambda a: a[..., :-1], setattn.ShapeError, "has shape (3, 10, 7); wanted (3, 10, 8), as was said of"),
    "axes": (lambda a: a[0], setattn.ShapeError, "has shape (10, 8); wanted 3 axes, as was said of it"),
    "dtype": (
        lambda a: a.astype("float64"),
        setattn.DTypeError,
        "has dtype float64; wanted float32, as was said of it",
    ),
    "kind": (lambda a: a.tolist(), setattn.NamespaceError, "is a list; wanted an array of numpy, as was said of it"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("name", list(seven()[1]))
def test_a_bad_chunk_is_named(name, fault):
    """Also on another process, where errors are sent as bytes."""
    x, params = seven()
    spoil, kind, message = BAD[fault]
    lazy = da.from_array(x, chunks=(3, 10, 8))

    def spoiled(a, block_id):
        return spoil(a) if block_id == (0, 3, 0) else a

    lazy = da.map_blocks(spoiled, lazy, dtype=lazy.dtype, meta=lazy._meta)
    out = lazily(getattr(setattn, name), lazy, params[name])
    with pytest.raises(kind) as error:
        compute(out)
    data = {"perceiver": "inputs", "perceiver_resampler": "features"}.get(name, "x")
    assert str(error.value).startswith(f"{name}: argument 'chunk (0, 3, 0) of {data}' {message}")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_errors_call_chunks_by_the_arguments_they_are_of():
    """Of two sets, of a mask for pairs, of what is added to keys."""
    x = np.zeros((2, 20, 8), "float32")
    whole, lazy = da.from_array(x), da.from_array(x, chunks=(2, 5, 8))
    size = da.from_array(np.ones(20, dtype=bool), chunks=5)
    short = da.from_array(np.arange(20) % 5 > 0, chunks=5)
    mab, cross = setattn.init_mab(8, num_heads=2, rng=0), setattn.init_cross_attention(8, 8, num_heads=2, rng=0)
    pool = setattn.init_attention_pool(8, num_heads=2, rng=0)
    mask = da.ones((2, 20), chunks=(2, 5), dtype=bool)
    pairs = da.ones((2, 20, 20), chunks=(2, 5, 5), dtype=bool)
    wide = lazy.map_blocks(lambda a: a[..., 1:], dtype=lazy.dtype, meta=lazy._meta)
    calls = {
        "mab: mask": lambda: setattn.mab(whole, lazy[:, size], mab, mask=mask[:, short]),
        "mab: query_mask": lambda: setattn.mab(lazy[:, size], lazy, mab, query_mask=mask[:, short]),
        "mab: pair_mask": lambda: setattn.mab(lazy[:, size], lazy[:, size], mab, pair_mask=pairs[:, size][..., short]),
        "mab: x": lambda: setattn.mab(wide, lazy, mab),
        "mab: y": lambda: setattn.mab(lazy, wide, mab),
        "cross_attention: latents": lambda: setattn.cross_attention(wide, lazy, cross),
        "cross_attention: inputs": lambda: setattn.cross_attention(lazy, wide, cross),
        "attention_pool: key_positions": lambda: setattn.attention_pool(lazy, pool, key_positions=wide),
    }
    for start, call in calls.items():
        with pytest.raises(setattn.ArgumentError) as error:
            compute(lazily(call))
        function, argument = start.split(": ")
        assert error.value.function == function
        assert re.fullmatch(rf"chunk \([\d, ]+\) of {argument}", error.value.argument), (start, error.value.argument)


# --- chunks on a GPU ------------------------------------------------------------------------------------------------

CUPY = BACKENDS["cupy"]


@pytest.mark.skipif(CUPY.missing() is not None, reason=f"cupy: {CUPY.missing()}")
@pytest.mark.parametrize("plan", [None, ANEW], ids=["kept", "made anew"])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_cupy_stay_there(name, plan):
    """As do states and results; the kind of a result is known before."""
    case, value, bound = cases.expected(name, "float32")

    def on_gpu(a):
        host = cut(a, CHUNKINGS["set"])
        array = CUPY.asarray(np.asarray(a), "float32")
        return da.from_array(array, chunks=host.chunks, asarray=False)

    arrays = tuple(map(on_gpu, case.arrays))
    masks = {key: on_gpu(m) for key, m in case.masks.items()}
    case = dataclasses.replace(case, options=case.options | {"plan": plan})
    out = lazily(case.call, arrays, CUPY.params(case.params, "float32"), masks)
    assert type(out._meta) is CUPY.xp.ndarray
    result = compute(out)
    assert type(result) is CUPY.xp.ndarray
    assert (out.dtype, out.shape) == (result.dtype, result.shape)
    tolerances.assert_close(CUPY.numpy(result), value, bound, f"{case.function} float32")


@pytest.mark.skipif(CUPY.missing() is not None, reason=f"cupy: {CUPY.missing()}")
@pytest.mark.parametrize("name", list(seven()[1]))
def test_chunks_are_brought_to_cupy_by_tasks(name):
    """A set is read on the host, and only its chunks that are at work are on the GPU."""
    x, params = seven()
    p = CUPY.params(params[name], "float32")
    lazy = da.from_array(x, chunks=(2, 10, 8)).map_blocks(CUPY.xp.asarray, dtype=x.dtype, meta=CUPY.asarray(x[:0]))
    for plan in (None, ANEW):
        result = compute(lazily(getattr(setattn, name), lazy, p, plan=plan))
        assert np.allclose(CUPY.numpy(result), getattr(setattn, name)(x, params[name]), atol=1e-5)


# --- the size of chunks ---------------------------------------------------------------------------------------------


def cuts(n, size):
    return (size,) * (n // size) + ((n % size,) if n % size else ())


GIB = 2**30
SOUND = {
    "usual": ((2, 2), cuts(1_000_000, 100_000), (32,)),
    "few and small": (cuts(100, 1), cuts(100, 1), (8,)),
    "many and empty": ((0,) * 20_000, (1,), (8,)),
    "many sets of some size": (cuts(20_000, 1), (10_000,), (32,)),
    "not known": ((math.nan,) * 20_000, (math.nan,), (8,)),
    "empty": ((0,), (0,), (8,)),
    "one large element": ((1,), (1, 1), (2 * GIB,)),
    "features of a small set": ((3,), (10,), (4, 4)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_chunks_are_left_alone(name):
    assert not list(_sizes.of_one("x", SOUND[name], 4))


@given(st.integers(1, 3), st.integers(1, 10**10), st.integers(1, 10**9), st.sampled_from([1, 32, 1024]))
def test_what_is_advised_of_a_set_is_sound(sets, n, size, dim):
    """Whoever does as he is told is told no more."""
    count = -(-n // size)
    assume(count <= 10**6)
    chunks = ((1,) * sets, cuts(n, size), (dim,))
    for text in _sizes.of_one("x", chunks, 4):
        ((axis, rows),) = re.findall(r"x\.rechunk\(\{(-\d): (\d+)\}\)", text)
        better = (chunks[0], cuts(n, int(rows)), chunks[2])
        assert axis == "-2"
        assert not list(_sizes.of_one("x", better, 4))


def test_what_is_advised_of_many_small_sets():
    (text,) = _sizes.of_one("x", (cuts(50_000, 1), (100,), (8,)), 4)
    assert text.startswith("x is in 50000 chunks of 3.2 kB each, which cost")
    (rows,) = re.findall(r"x\.rechunk\(\{0: (\d+)\}\)", text)
    assert not list(_sizes.of_one("x", (cuts(50_000, int(rows)), (100,), (8,)), 4))


@given(st.integers(1, 3), st.integers(2, 10**6), st.integers(2, 10**6), st.integers(1, 2000), st.integers(1, 2000))
def test_what_is_advised_of_two_sets_is_sound(sets, m, n, a, b):
    q, y = ((1,) * sets, cuts(m, a), (8,)), ((1,) * sets, cuts(n, b), (8,))
    tasks = len(q[1]) * len(y[1]) * sets
    advice = list(_sizes.of_two(("x", "y"), q, y))
    assert bool(advice) == (tasks > 10_000 and len(q[1]) > 1 and len(y[1]) > 1)
    for text in advice:
        (of_x,), (of_y,) = (re.findall(rf"{name}\.rechunk\(\{{-2: (\d+)\}}\)", text) for name in "xy")
        better = [(s[0], cuts(size, int(rows)), s[2]) for s, size, rows in ((q, m, of_x), (y, n, of_y))]
        assert not list(_sizes.of_two(("x", "y"), *better))


def test_what_is_advised_of_a_large_chunk_of_several_sets():
    """First of all, fewer of them."""
    sets = ((4, 4), (10_000,), (1000,), (64,))
    (text,) = _sizes.of_one("x", sets, 4)
    assert text == "a chunk of x has 10.2 GB; x.rechunk({1: 32}) makes it 32.8 MB"


def test_what_is_advised_of_sizes_that_are_not_known():
    unknown = ((3,), (math.nan,) * 200, (8,))
    (text,) = _sizes.of_two(("x", "y"), unknown, unknown)
    assert (
        text == "200 chunks of x meet 200 of y in 40000 tasks; compute_chunk_sizes(), and then rechunk(), makes fewer"
    )


def test_users_are_warned_of_chunks():
    """With a class of Dask's own; of what is in order nothing is said, as every other test shows."""
    warning = da.PerformanceWarning
    params = seven()[1]
    large = da.zeros((10**8, 8), chunks=(10**8, 8), dtype="float32")
    with pytest.warns(warning, match=r"isab: a chunk of x has 3.2 GB; x\.rechunk\(\{-2: \d+\}\) makes it 33.6 MB"):
        setattn.isab(large, params["isab"])
    small = da.zeros((2, 10_001, 8), chunks=(2, 1, 8), dtype="float32")
    with pytest.warns(warning, match=r"attention_pool: x is in 10001 chunks of 64 B each"):
        setattn.attention_pool(small, params["attention_pool"])
    split = da.zeros((10**9, 8), chunks=(10**7, 4), dtype="float32")
    with pytest.warns(
        warning, match=r"perceiver_resampler: the features of features are in 2 chunks, and all its 32 GB"
    ):
        setattn.perceiver_resampler(split, params["perceiver_resampler"])
    short = da.zeros((303, 8), chunks=(3, 8), dtype="float32")
    mab = setattn.init_mab(8, num_heads=2, rng=0)
    for call in (lambda: setattn.mab(short, short, mab), lambda: setattn.sab(short, mab)):
        with pytest.warns(warning, match=r"101 chunks of x meet 101 of [xy] in 10201 tasks; x\.rechunk\(\{-2: 4\}\)"):
            call()


# --- chunks that are made anew --------------------------------------------------------------------------------------

PASSES = {"isab": 2, "pma": 1, "set_transformer": 3, "attention_pool": 1, "perceiver": 1, "perceiver_resampler": 2}


def counted(x, chunks):
    """Return a lazy array and a list of the chunks that were made for it."""
    made = []

    def make(block_info=None):
        at = block_info[None]["array-location"]
        made.append(tuple(map(tuple, at)))
        return x[tuple(slice(*place) for place in at)]

    sizes = tuple(da.core.normalize_chunks(chunks, x.shape))
    return da.map_blocks(make, chunks=sizes, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype)), made


@pytest.mark.parametrize("name", PASSES)
def test_a_chunk_is_made_once_for_each_pass(name):
    """Or, if nothing is said, once for all; the bits are the same."""
    x, params = seven(shape=(3, 70, 8))
    function, p, values = getattr(setattn, name), params[name], []
    for plan, times in ((None, 1), (ANEW, PASSES[name])):
        lazy, made = counted(x, (2, 7, 8))
        out = lazily(function, lazy, p, plan=plan)
        made.clear()
        values.append(compute(out))
        assert len(made) == 20 * times
        assert len(set(made)) == 20
    assert np.array_equal(*values)


@pytest.mark.parametrize("name", ["isab", "set_transformer", "perceiver_resampler"])
def test_of_chunks_that_are_made_anew_few_are_held(name):
    """However many there are; else all are held from one pass to the next."""
    x, params = seven(shape=(2000, 8))
    most = {}
    for plan in (None, ANEW):
        out = getattr(setattn, name)(counted(x, (50, 8))[0], params[name], plan=plan)
        out = out.sum(axis=0)  # rows of a result are no chunks to hold
        held = []

        def look(key, result, graph, state, worker, held=held):
            held.append(sum(a.nbytes for a in state["cache"].values() if getattr(a, "shape", ()) == (50, 8)))

        with dask.callbacks.Callback(posttask=look):
            compute(out)
        most[plan] = max(held) / (50 * 8 * 4)
    assert most[None] >= 40
    assert most[ANEW] <= 3


def sources(x):
    """Lazy arrays of the same elements in chunks of about seven, by all kinds of tasks, and their masks."""
    mask = np.arange(len(x)) % 3 > 0
    lazy = counted(x, (7, 8))[0]
    yield "in memory", da.from_array(x, chunks=(7, 8)), da.from_array(mask, chunks=7)
    yield "generated", lazy, da.from_array(mask, chunks=10)
    yield "one by one", (lazy + 1.0) - 1.0, None
    yield "cut anew", counted(x, (10, 8))[0].rechunk((7, 8)), None
    yield "cut of features", counted(x, (7, 4))[0], None
    yield "persisted", lazy.persist(scheduler="synchronous"), None
    yield "optimized", dask.optimize(lazy + 0.0)[0], None
    yield "by its own values", lazy, lazy[:, 0] > 0
    yield "of a size not known", lazy[lazy[:, 1] > 0], None
    parts = [da.from_delayed(dask.delayed(x[i : i + 7]), (len(x[i : i + 7]), 8), x.dtype) for i in range(0, len(x), 7)]
    yield "delayed", da.concatenate(parts), None
    yield "half in memory", da.concatenate([da.from_array(x[:35], chunks=(7, 8)), lazy[35:]]), None
    yield "less their mean", lazy - lazy.mean(axis=0), None
    yield "random", da.random.default_rng(0).normal(size=x.shape, chunks=(7, 8)).astype("float32"), None


@pytest.mark.parametrize("kind", [kind for kind, *_ in sources(np.zeros((70, 8), "float32"))])
def test_chunks_of_any_origin_can_be_made_anew(kind):
    x, params = seven(shape=(70, 8))
    lazy, mask = next(source[1:] for source in sources(x) if source[0] == kind)
    p = params["set_transformer"]
    kept, made = (lazily(setattn.set_transformer, lazy, p, mask=mask, plan=plan) for plan in (None, ANEW))
    assert made.name == lazily(setattn.set_transformer, lazy, p, mask=mask, plan=ANEW).name != kept.name
    value = compute(kept)
    assert np.array_equal(compute(made), value)
    assert np.array_equal(compute(made, scheduler="threads", num_workers=2), value)
    assert all(np.array_equal(out, value) for out in dask.compute(kept, made, scheduler="synchronous"))


def test_what_is_in_memory_is_not_made_anew():
    x, params = seven(shape=(70, 8))
    lazy, made = counted(x, (7, 8))
    lazy = lazy.persist(scheduler="synchronous")
    made.clear()
    out = setattn.isab(lazy, params["isab"], plan=ANEW)
    assert not made
    assert tasks(out) == tasks(setattn.isab(lazy, params["isab"]))


@pytest.mark.parametrize("name", ["isab", "set_transformer", "perceiver_resampler"])
def test_graphs_are_small_if_chunks_are_made_anew(name):
    """At most four tasks for each chunk and pass, with those that make the chunks, as a scheduler sees it."""
    x, params = seven(shape=(640, 8))
    added = []
    for chunks in (64, 128):
        out = lazily(getattr(setattn, name), counted(x, (640 // chunks, 8))[0], params[name], plan=ANEW)
        added.append(tasks(dask.optimize(out)[0]))
    assert added[1] - added[0] <= 4 * PASSES[name] * 64
    assert added[0] <= 4 * PASSES[name] * 64 + 40


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["isab", "set_transformer"])
def test_every_scheduler_gives_the_same_bits(name):
    x, params = seven()
    out = getattr(setattn, name)(da.from_array(x, chunks=(2, 7, 8)), params[name])
    value = compute(out)
    assert np.array_equal(compute(out, scheduler="threads", num_workers=2), value)
    with dask.config.set({"multiprocessing.context": "spawn"}):
        assert np.array_equal(compute(out, scheduler="processes", num_workers=2), value)


def test_dasks_bar_counts_the_tasks():
    x, params = seven()
    written = io.StringIO()
    with ProgressBar(out=written, dt=0.01), Profiler() as profiler:
        compute(setattn.isab(da.from_array(x, chunks=(2, 7, 8)), params["isab"], plan=ANEW))
    assert "100% Completed" in written.getvalue()
    names = {
        str(task.key[0] if isinstance(task.key, tuple) else task.key).rpartition("-")[0] for task in profiler.results
    }
    assert {"apply_mab-state", "apply_mab-state-aggregate", "apply_mab-found", "apply_mab-call"} <= names


ROWS, CHUNK = 400_000, 20_000


def generated(block_info=None, pause=0.0):
    """Make a chunk of a set from its place, a good while later."""
    start, stop = block_info[None]["array-location"][0]
    time.sleep(pause)
    return np.random.default_rng(start).standard_normal((stop - start, 32), dtype=np.float32)


def source(pause):
    chunks = ((CHUNK,) * (ROWS // CHUNK), (32,))
    meta = np.empty((0, 0), np.float32)
    return da.map_blocks(functools.partial(generated, pause=pause), chunks=chunks, dtype=np.float32, meta=meta)


@pytest.fixture
def cluster():
    """Two processes under 400 MB each."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "400MB", "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:Sending large graph")
@pytest.mark.filterwarnings("ignore:Running on a single-machine scheduler")
def test_two_processes_one_of_them_killed(cluster):
    """A cluster of two gives the bits of one process, and gives them although it loses a worker half way.

    Workers have their products on one thread each; on more, some of these are rounded otherwise.
    """
    threadpoolctl = pytest.importorskip("threadpoolctl")
    params = setattn.init_pma(32, num_seeds=4, num_heads=4, rng=0)
    with threadpoolctl.threadpool_limits(1):
        value = compute(setattn.pma(source(0.0), params))
    out = setattn.pma(source(0.1), params)
    pids = cluster.run(os.getpid)
    future = cluster.compute(out)
    threading.Timer(0.7, os.kill, (next(iter(pids.values())), signal.SIGKILL)).start()
    assert np.array_equal(future.result(timeout=120), value)
    assert set(cluster.run(os.getpid).values()) != set(pids.values()), "no worker was lost"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_processes_make_chunks_anew(cluster, capsys):
    """And show it in the terminal; what is persisted stays where it is. A bad chunk comes back as the error it is."""
    distributed = pytest.importorskip("distributed")
    params = setattn.init_isab(32, num_inducing=4, num_heads=4, rng=0)
    x = source(0.0)[: 6 * CHUNK]
    held, anew = (setattn.isab(x, params, plan=plan)[::1000] for plan in (None, ANEW))
    value = cluster.compute(held).result(timeout=120)
    future = cluster.compute(anew)
    distributed.progress(future, notebook=False)
    assert np.array_equal(future.result(timeout=120), value)
    assert "100% Completed" in capsys.readouterr().out
    stored = x.persist()
    again = setattn.isab(stored, params, plan=ANEW)[::1000]
    assert np.array_equal(cluster.compute(again).result(timeout=120), value)
    bad = x.map_blocks(lambda a, block_id: a[:, 1:] if block_id == (2, 0) else a, dtype=x.dtype, meta=x._meta)
    with pytest.raises(setattn.ShapeError, match=r"isab: argument 'chunk \(2, 0\) of x' has shape \(20000, 31\)"):
        cluster.compute(setattn.isab(bad, params)).result(timeout=120)


@pytest.mark.filterwarnings("ignore")  # of what an event loop has left undone
def test_a_scheduler_that_is_lost_is_named():
    distributed = pytest.importorskip("distributed")
    x, params = seven(shape=(200, 8))
    slow = da.map_blocks(lambda a: time.sleep(0.1) or a, da.from_array(x, chunks=(5, 8)), dtype=x.dtype, meta=x[:0])
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        cluster = distributed.LocalCluster(**options)
        client = distributed.Client(cluster)
        future = client.compute(setattn.pma(slow, params["pma"]))
        threading.Timer(0.5, cluster.loop.add_callback, (cluster.scheduler.close,)).start()
        with pytest.raises(CancelledError, match="Client lost the connection to the scheduler"):
            future.result(timeout=60)
        client.close(timeout=1)
        cluster.close(timeout=5)
