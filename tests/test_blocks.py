"""Work in blocks: whatever their size, the same results; memory that does not grow with the set; threads that agree."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from unittest import mock

import cases
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st

import setattn
from setattn import Plan, _attend, _blocks, _kernels, _layers, _state, _threads

UNPLANNED = ("fourier_features", "sincos_features", "attention_weights")
PLANNED = [name for name in cases.NAMES if not name.startswith(UNPLANNED)]
every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])


# --- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
@every_dtype
@pytest.mark.parametrize("name", PLANNED)
def test_every_block_size_is_within_the_bound(name, dtype, size):
    """Blocks of any number of elements, on two threads for one of them, give the reference to rounding."""
    case, value, bound = cases.expected(name, dtype)
    out = case.numpy(dtype, plan=Plan(block_size=size, threads=1 + (size == 2)))
    tolerances.assert_close(out, value, bound, f"blocks of {case.function}")


@pytest.fixture
def tiny_caches(monkeypatch):
    """Caches so small that the sets of a batch are blocks of their own, and their elements as well."""

    def shrink(budget):
        monkeypatch.setattr(_blocks, "block_bytes", lambda x, xp: budget)
        monkeypatch.setattr(_blocks, "LEAST", 1)

    return shrink


@pytest.mark.parametrize("budget", [1, 2_000, 6_000])
@pytest.mark.parametrize("name", PLANNED)
def test_every_cache_is_within_the_bound(tiny_caches, name, budget):
    """Whatever a block may take, of rows, of elements or of whole sets, the result is the reference to rounding."""
    case, value, bound = cases.expected(name, "float32")
    tiny_caches(budget)
    tolerances.assert_close(case.numpy("float32"), value, bound, f"blocks of {case.function}")


@pytest.mark.parametrize("backend", ["torch", "jax", "strict"], indirect=True)
@pytest.mark.parametrize("name", ["attention-pairs-and-bias", "mab", "isab", "pma", "perceiver_resampler"])
def test_blocks_on_every_backend(backend, name):
    """The same holds where arrays are not written into, and where a loop runs outside of NumPy."""
    case, value, bound = cases.expected(name, "float32")
    out = case.on(backend, "float32", plan=Plan(block_size=2))
    tolerances.assert_close(backend.numpy(out), value, bound, f"blocks of {case.function}")


LOOPED = [
    *("attention-pairs-and-bias", "mab", "isab", "isab-length", "cross_attention", "perceiver_io-embedded"),
    *("perceiver_resampler-media-frames", "gated_cross_attention-pairs", "gated_cross_attention-previous-pairs"),
]


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("name", LOOPED)
def test_a_loop_inside_jit_is_within_the_bound(monkeypatch, backend, name, least):
    """Rows that JAX goes through in a loop it traces once, with a rest or without, give the reference to rounding."""
    import jax

    case, value, bound = cases.expected(name, "float32")
    monkeypatch.setattr(_blocks, "loop_bytes", lambda x, xp: 1)
    monkeypatch.setattr(_blocks, "LEAST", least)
    call = jax.jit(case.call, compiler_options={"xla_backend_optimization_level": 0})
    out = call(*case.trees(backend, "float32"))
    tolerances.assert_close(backend.numpy(out), value, bound, f"a loop of {case.function}")


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_a_loop_inside_jit_is_traced_once(backend):
    """A long set is gone through in a loop inside ``jit``, the same for any number of blocks."""
    import jax

    params = setattn.convert_params(setattn.init_isab(8, num_inducing=2, num_heads=2, rng=0), jax.numpy)

    def graph(n):
        return str(jax.make_jaxpr(lambda x: setattn.isab(x, params))(jax.numpy.ones((n, 8), jax.numpy.float32)))

    sizes = [64 * _blocks.LEAST * 8, 128 * _blocks.LEAST * 8]
    assert "scan[" not in graph(50)
    assert [graph(n).count("scan[") for n in sizes] == [1, 1]
    assert abs(len(graph(sizes[1])) - len(graph(sizes[0]))) < 200


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_memory_inside_jit_is_bounded(backend):
    """The scores of a long set are never there as a whole: what a compiled pooling takes does not grow with the set."""
    import jax

    params = setattn.init_pma(8, num_seeds=16, num_heads=4, form="official", rng=0)
    params = setattn.convert_params(params, jax.numpy)

    def compiled(n):
        x = jax.ShapeDtypeStruct((n, 8), jax.numpy.float32)
        return jax.jit(lambda x: setattn.pma(x, params)).lower(x).compile().memory_analysis().temp_size_in_bytes

    short, long = compiled(200_001), compiled(800_001)
    assert long < 32 * MEBIBYTE
    assert long - short < 0.05 * (4 * 600_000 * 64)  # the scores of the rest


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_memory_inside_jit_is_bounded_for_many_queries(backend):
    """Nor do steps grow with the queries, however many scores an element has."""
    import jax

    params = setattn.init_pma(16, num_seeds=1024, num_heads=4, form="official", rng=0)
    params = setattn.convert_params(params, jax.numpy)
    x = jax.ShapeDtypeStruct((20_000, 16), jax.numpy.float32)
    compiled = jax.jit(lambda x: setattn.pma(x, params)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_a_lost_block_is_noticed():
    """The bound refuses a result whose last block was not merged."""
    case, value, bound = cases.expected("pma", "float32")
    cut = _attend.cut
    with mock.patch.object(_attend, "cut", lambda size, most: cut(size, most)[:-1]), pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32", plan=Plan(block_size=2)), value, bound, "a lost block")


@given(st.integers(0, 500), st.integers(1, 60))
def test_an_axis_is_cut_into_nearly_equal_parts(size, most):
    """The parts follow one another, are not too large, differ by one at most, and are shared by two threads."""
    parts = _blocks.cut(size, most)
    assert [i for part in parts for i in range(size)[part]] == list(range(size))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(parts) == 1 or len(parts) % 2 == 0 or len(parts) == size


@given(st.integers(1, 300))
def test_states_are_merged_as_a_balanced_tree(count):
    """Parts are merged in their order, and none goes through more merges than the logarithm of their number."""
    merged = _blocks.fold(lambda a, b: (a[0] + b[0], 1 + max(a[1], b[1])), (([i], 0) for i in range(count)))
    assert merged[0] == list(range(count))
    assert merged[1] <= math.ceil(math.log2(count))


# --- norms that are moved into projections --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", PLANNED)
def test_norms_in_the_projections_are_within_the_bound(monkeypatch, name, dtype):
    """The scale and bias of every norm that a projection follows may be a part of that projection."""
    case, value, bound = cases.expected(name, dtype)
    monkeypatch.setattr(_layers, "_pays", lambda rows, columns: True)
    tolerances.assert_close(case.numpy(dtype), value, bound, f"moved norms of {case.function}")


@pytest.mark.parametrize("name", ["isab-pre-norm", "cross_attention", "perceiver_resampler", "attention_pool-norms"])
def test_a_norm_whose_bias_is_lost_is_noticed(monkeypatch, name):
    """The bound refuses a projection that has taken in the scale alone."""
    case, value, bound = cases.expected(name, "float32")
    absorb = _layers._absorb
    monkeypatch.setattr(_layers, "_pays", lambda rows, columns: True)
    monkeypatch.setattr(_layers, "_absorb", lambda p, scale, bias, xp: absorb(p, scale, (), xp))
    with pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32"), value, bound, "a lost bias")


# --- memory ---------------------------------------------------------------------------------------------------------

MEBIBYTE = 2**20


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(dtype)


def extra_memory(function, *arguments, **options):
    """Measure what a call takes at its peak beside its arguments and its result."""
    tracemalloc.start()
    try:
        out = function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1] - out.nbytes
    finally:
        tracemalloc.stop()


def pma(seeds, *, ff):
    params = setattn.init_pma(256, num_seeds=seeds, num_heads=8, rng=0)
    return setattn.pma, params._replace(ff=setattn.FeedForward(setattn.init_linear(256, 256, rng=0)) if ff else ())


def isab(inducing, dim=128, heads=4, form="post_norm", **sizes):
    params = setattn.init_isab(dim, num_inducing=inducing, num_heads=heads, form=form, norm="layer", rng=0, **sizes)
    return setattn.isab, params


def imagenet(inputs, params, **options):
    return setattn.cross_attention(normal(512, 1024), inputs, params, **options)


WORKLOADS = {
    "pooling head": ((16, 729, 1152), (setattn.attention_pool, setattn.init_attention_pool(1152, num_heads=16, rng=0))),
    "pma": ((100_000, 256), pma(4, ff=False)),
    "pma with row-wise ff": ((100_000, 256), pma(4, ff=True)),
    "isab": ((100_000, 128), isab(32)),
    "isab, authors' form": ((100_000, 128), isab(16, form="official")),
    "isab of points, authors' form": ((100_000, 2), isab(16, form="official", dim_x=2)),
    "isab, wide": ((20_000, 256), isab(32, 256, 8)),
    "isab, TabICL's": ((100_000, 128), isab(128, heads=8, form="pre_norm")),
    "perceiver": ((50_176, 261), (imagenet, setattn.init_cross_attention(1024, 261, num_heads=1, rng=0))),
    "resampler": (
        (8, 256, 1024),
        (
            setattn.perceiver_resampler,
            setattn.init_perceiver_resampler(1024, num_layers=6, num_heads=8, num_frames=8, rng=0),
        ),
    ),
    "small sets": ((1024, 32, 64), (setattn.sab, setattn.init_mab(64, num_heads=4, rng=0))),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_memory_is_bounded(name, threads):
    """No workload takes more than 64 MiB beside its input and its result."""
    shape, (function, params) = WORKLOADS[name]
    assert extra_memory(function, normal(*shape), params, plan=Plan(threads=threads)) < 64 * MEBIBYTE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["pma", "pma with row-wise ff", "isab, TabICL's", "perceiver"])
def test_memory_does_not_grow_with_the_set(name, dtype):
    """A set four times as large takes no more memory, within the sixth by which blocks of equal size may differ.

    Beside that, the tree of merges holds a state more for twice as many blocks: 8 heads of 4 seeds, 258 numbers each.
    """
    shape, (function, params) = WORKLOADS[name]
    if function is imagenet:
        dtype = "float32"
    params = setattn.convert_params(params, np, dtype=np.dtype(dtype))
    small, large = (extra_memory(function, normal(n, shape[-1], dtype=dtype), params) for n in (40_000, 160_000))
    # A result in half precision is rounded once, at the end, from one in float32.
    rounding = 160_000 * shape[-1] * 4 if dtype == "float16" and function is setattn.isab else 0
    assert large - rounding < small * 7 / 6 + 2 * 8 * 4 * 258 * 4


def test_a_block_is_as_long_as_what_is_made_for_its_elements_allows():
    """Where queries and weights are carried to the elements, these have no keys and values, and more fit in a block."""
    params = setattn.init_pma(64, num_seeds=1, num_heads=4, form="official", rng=0)
    lengths, x = {}, normal(100_000, 64)
    for order in (setattn.Order(), setattn.Order("carry_queries", "carry_weights")):
        with mock.patch.object(_attend, "cut", wraps=_attend.cut) as cut:
            setattn.pma(x, params, plan=Plan(order))
        (lengths[order],) = {most for (size, most), _ in cut.call_args_list if size == len(x)}
    projected, carried = lengths.values()
    always = 2 * 64 + 3 * 4  # the element, twice, and its scores
    assert carried / projected == pytest.approx((always + 2 * 64) / always, rel=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_a_resampler_holds_its_features_once(masked):
    """Positions, a network first and a mean leave the mapped features behind, and nothing else that grows with them."""
    network = setattn.FeedForward(*(setattn.init_linear(*sizes, rng=0) for sizes in ((64, 512), (512, 96), (64, 512))))
    made = setattn.MeanLatents(setattn.Linear(normal(96, 2, 96)), setattn.init_norm(96))
    params = setattn.init_perceiver_resampler(96, num_heads=4, num_latents=8, num_layers=1, rng=0)
    params = params._replace(input=network, position=normal(80_000, 64), mean_latents=made)

    def extra(n):
        mask = np.arange(n) < n - 3 if masked else None
        return extra_memory(setattn.perceiver_resampler, normal(n, 64), params, mask=mask) - 4 * n * 96

    extra(1000)  # what a first call leaves behind
    assert extra(80_000) < extra(20_000) + MEBIBYTE


def test_a_set_attends_to_itself_in_bounded_memory():
    """The scores of 6000 elements, 576 MB of them, are never there at once."""
    params = setattn.init_mab(32, num_heads=4, rng=0)
    assert extra_memory(setattn.sab, normal(6000, 32), params) < 64 * MEBIBYTE


# --- the count of operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "per_element"),
    [
        ("pma", 2 * 4 * 8 * 256),
        ("pma with row-wise ff", 256 * 256 + 2 * 4 * 8 * 256),
        ("isab", 2 * 32 * 4 * 128 + 2 * 32 * 4 * 128 + 128 * 128),
        ("isab, authors' form", 2 * 16 * 4 * 128 + 128 * 128 + 2 * 16 * 128 + 128 * 128),
        ("isab, TabICL's", 2 * (128 * 128 + 128 * 128) + 2 * (128 * 128 + 128 * 128) + 128 * 128),
        ("perceiver", 2 * 512 * 261),
    ],
)
def test_the_products_are_those_that_are_needed(monkeypatch, name, per_element):
    """For each element more, a workload takes the multiplications that a count by hand gives, to a few in a hundred.

    The few are what blocks repeat: projections of what a block of elements attends to.
    """
    (*_, width), (function, params) = WORKLOADS[name]
    counts = []

    def counted(product):
        def count(a, *others):
            out = product(a, *others)
            counts.append(out.size * a.shape[-1])
            return out

        return count

    products = (
        (_state, "matmul"),
        (_state, "matmul_heads"),
        (_state, "matmul_rows"),
        (_layers, "matmul"),
        (_layers, "matmul_add"),
    )
    for module, product in products:
        monkeypatch.setattr(module, product, counted(getattr(module, product)))

    def multiplications(n):
        counts.clear()
        function(normal(n, width), params)
        return sum(counts)

    more = (multiplications(24_000) - multiplications(8_000)) / 16_000
    assert per_element <= more < 1.13 * per_element


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps the memory of blocks its own way"
)
def test_blocks_take_their_memory_once():
    """The C library keeps the memory of a block for the next one: calls after the first get no pages from the system.

    A page that was given back and is asked for anew is a fault. Left alone, the C library makes thousands of them here.
    """
    code = """if True:
        import resource
        import numpy as np
        import setattn

        x = np.random.default_rng(0).normal(size=(100_000, 128)).astype(np.float32)
        params = setattn.init_isab(128, num_inducing=128, num_heads=8, form="pre_norm", norm="layer", rng=0)
        faults = []
        for _ in range(4):
            setattn.mab(params.inducing_points, x, params.mab_inducing)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[-2])
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 1000


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pma", "isab", "small sets"])
def test_threads_change_no_bit(name):
    """Blocks on several threads are the same blocks: with products on one thread each, so are the bits."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    shape, (function, params) = WORKLOADS[name]
    x = normal(*(min(size, 8000) for size in shape[:-1]), shape[-1])
    with threadpoolctl.threadpool_limits(1, "blas"):
        one = function(x, params)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(function(x, params, plan=Plan(threads=threads)), one)


def test_threads_of_the_products_come_back():
    """After the last of several overlapping calls, BLAS has the threads that it had, also after an error."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    before, inside, barrier = threads(), [], threading.Barrier(2)

    def work(item):
        inside.append(threads())
        barrier.wait(timeout=60)
        if item == "error":
            raise ArithmeticError
        return item

    assert list(_threads.run(work, ["a", "b"], 2)) == ["a", "b"]
    with pytest.raises(ArithmeticError):
        list(_threads.run(work, ["a", "error"], 2))
    assert {count for counts in inside for count in counts} == {1}
    assert threads() == before

    barrier = threading.Barrier(4)
    # Calls on as many threads have the same ones.
    callers = [threading.Thread(target=lambda n=n: list(_threads.run(work, ["a", "b"], n))) for n in (2, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threads() == before


def test_threads_are_kept():
    """Every call on two threads has the same two."""
    pytest.importorskip("threadpoolctl")
    found = {ident for _ in range(5) for ident in _threads.run(lambda _: threading.get_ident(), range(8), 2)}
    assert len(found) <= 2
    assert threading.get_ident() not in found


def test_results_are_held_until_they_are_wanted_and_no_longer():
    """What a block gave is let go once it has been merged, and not at the end of all."""
    pytest.importorskip("threadpoolctl")
    results = _threads.run(lambda _: normal(3), range(10), 2)
    first = weakref.ref(next(results))
    next(results)
    for _ in range(100):  # a thread may not have got around to forgetting what it made
        if first() is None:
            break
        time.sleep(0.01)
    assert first() is None
    assert len(list(results)) == 8


def test_nothing_goes_on_after_an_error():
    """Blocks that have begun are waited for, and no other one begins."""
    pytest.importorskip("threadpoolctl")
    begun, ended = [], []

    def work(item):
        begun.append(item)
        if item == 0:
            raise ArithmeticError
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ArithmeticError):
        list(_threads.run(work, range(20), 2))
    assert len(ended) == len(begun) - 1
    here = len(begun)
    time.sleep(0.1)
    assert here == len(begun) < 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_process_that_was_forked_has_threads_of_its_own():
    """Those that the first process keeps are not there."""
    pytest.importorskip("threadpoolctl")
    assert list(_threads.run(abs, [-1, -2], 2)) == [1, 2]
    child = multiprocessing.get_context("fork").Process(target=lambda: list(_threads.run(abs, [-1, -2], 2)))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0


def test_a_large_product_goes_to_threads():
    """Outside of blocks, its columns are spread: by parts that do not depend on how many threads there are."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    params = setattn.init_cross_attention(256, 16, num_heads=4, head_dim=16, hidden=1024, rng=0)
    z, y = normal(128, 256), normal(80_000, 16)  # of 2**25 multiplications for each layer of the network
    spread, product = set(), _kernels._on_threads

    def spy(a, b, xp):
        out = product(a, b, xp)
        spread.add((b.shape, bool(np.allclose(out, a @ b, atol=1e-4))))
        return out

    with threadpoolctl.threadpool_limits(1, "blas"), mock.patch.object(_kernels, "_on_threads", spy):
        one = setattn.cross_attention(z, y, params)
        assert not spread
        two, three = (setattn.cross_attention(z, y, params, plan=Plan(threads=n)) for n in (2, 3))
    assert {((256, 1024), True), ((1024, 256), True)} <= spread
    np.testing.assert_array_equal(two, three)
    np.testing.assert_allclose(two, one, atol=1e-5)


def test_products_stay_on_one_thread_for_the_whole_call(monkeypatch):
    """Where data are more than a block; where nothing goes to threads, a product may have all of them."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    counts, product = [], _kernels.matmul_add

    def spy(*arguments):
        pools = threadpoolctl.threadpool_info()
        counts.append({pool["num_threads"] for pool in pools if pool["user_api"] == "blas"})
        return product(*arguments)

    monkeypatch.setattr(_layers, "matmul_add", spy)
    params = setattn.init_isab(8, num_inducing=4, num_heads=2, norm="layer", rng=0)
    with threadpoolctl.threadpool_limits(2, "blas"):
        for n, size, most in ((64, 16, 1), (64, None, 2), (200_000, None, 1)):
            counts.clear()
            setattn.isab(normal(n, 8), params, plan=Plan(block_size=size, threads=2))
            assert set(map(frozenset, counts)) == {frozenset({most})}, (n, size)


def test_a_block_on_a_thread_spreads_no_blocks():
    """Inside a thread, blocks are worked through one after the other."""
    pytest.importorskip("threadpoolctl")

    def outer(item):
        return {threading.get_ident() for _ in _threads.run(lambda _: 0, [1, 2], 2)} | set(
            _threads.run(lambda _: threading.get_ident(), [1, 2], 2)
        )

    assert all(len(idents) == 1 for idents in _threads.run(outer, [1, 2], 2))


def test_the_error_state_reaches_the_threads():
    """What the caller has set NumPy to do about floating-point errors holds on the threads, too."""
    pytest.importorskip("threadpoolctl")

    def divide(x):
        return np.ones(1) / x

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        list(_threads.run(divide, [np.zeros(1), np.zeros(1)], 2))
    with np.errstate(divide="ignore"):
        assert [x[0] for x in _threads.run(divide, [np.zeros(1), np.zeros(1)], 2)] == [np.inf, np.inf]


def test_threads_need_a_package(monkeypatch):
    """Without the package that keeps products on their threads, threads are refused; other libraries have their own."""
    monkeypatch.setattr(setattn._check, "has_threads", lambda: False)
    x, params = normal(5, 8), setattn.init_mab(8, num_heads=2, rng=0)
    with pytest.raises(setattn.OptionError, match=r"sab: argument 'plan\.threads'.* threadpoolctl"):
        setattn.sab(x, params, plan=Plan(threads=2))
    setattn.sab(x, params, plan=Plan(threads=1))


@pytest.mark.parametrize(
    ("plan", "argument"),
    [
        ({"block_size": 5}, "plan"),
        (Plan(order=("project", "project")), r"plan\.order"),
        (Plan(order=setattn.Order("carry", "project")), r"plan\.order\.scores"),
        (Plan(order=setattn.Order("project", "carry_keys")), r"plan\.order\.values"),
        (Plan(block_size=0), r"plan\.block_size"),
        (Plan(block_size=2.0), r"plan\.block_size"),
        (Plan(threads=0), r"plan\.threads"),
        (Plan(threads=True), r"plan\.threads"),
        (Plan(recompute=1), r"plan\.recompute"),
    ],
)
def test_plans_that_are_none(plan, argument):
    """What is no plan is refused, by the name of the part that is wrong."""
    x, params = normal(5, 8), setattn.init_mab(8, num_heads=2, rng=0)
    with pytest.raises(setattn.OptionError, match=f"sab: argument '{argument}'"):
        setattn.sab(x, params, plan=plan)
