"""Blocks over the chunks of Dask arrays: what is computed, when, where and by how many tasks."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time

import cases
import numpy as np
import pytest
import tolerances
from backends import BACKENDS

import setattn

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

DASK = BACKENDS["dask"]

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
    """Unknown sizes are taken on trust when the graph is built."""
    x, params = seven()
    keep, other = (da.from_array(np.arange(50) % k > 0, chunks=10) for k in (2, 3))
    lazy, mask = da.from_array(x, chunks=(3, 10, 8)), da.ones((3, 50), chunks=(3, 10), dtype=bool)
    out = lazily(setattn.pma, lazy[:, keep], params["pma"], mask=mask[:, other])
    with pytest.raises(ValueError, match=r"broadcast|shape"):
        compute(out)


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["isab", "set_transformer"])
def test_every_scheduler_gives_the_same_bits(name):
    x, params = seven()
    out = getattr(setattn, name)(da.from_array(x, chunks=(2, 7, 8)), params[name])
    value = compute(out)
    assert np.array_equal(compute(out, scheduler="threads", num_workers=2), value)
    with dask.config.set({"multiprocessing.context": "spawn"}):
        assert np.array_equal(compute(out, scheduler="processes", num_workers=2), value)


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
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "400MB", "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_two_processes_one_of_them_killed(cluster):
    """A cluster of two gives the bits of one process, and gives them although it loses a worker half way."""
    params = setattn.init_pma(32, num_seeds=4, num_heads=4, rng=0)
    value = compute(setattn.pma(source(0.0), params))
    out = setattn.pma(source(0.1), params)
    pids = cluster.run(os.getpid)
    future = cluster.compute(out)
    threading.Timer(0.7, os.kill, (next(iter(pids.values())), signal.SIGKILL)).start()
    assert np.array_equal(future.result(timeout=120), value)
    assert set(cluster.run(os.getpid).values()) != set(pids.values()), "no worker was lost"
