"""The order of products is the one with the fewest multiplications, and all orders give the same."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import array_api_compat.numpy
import cases
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st

import setattn
from setattn import Order, Plan, _attend, _state
from setattn._context import Context
from setattn._layers import Options
from setattn._memory import copies_heads
from setattn._namespace import namespace_of
from setattn._order import SCORES, VALUES, Sizes, choose, multiplications

ORDERS = [Order(*names) for names in itertools.product(SCORES, VALUES)]
UNPLANNED = ("fourier_features", "sincos_features", "attention_weights")
PLANNED = [name for name in cases.NAMES if not name.startswith(UNPLANNED)]


class Counter:
    """NumPy, counting the multiplications of its matrix products."""

    def __init__(self):
        self.count = 0

    def __getattr__(self, name):
        return getattr(array_api_compat.numpy, name)

    def matmul(self, a, b):
        out = tolerances.product(a, b)
        self.count += out.size * a.shape[-1]
        return out


def count(params, query, context, plan):
    """Count the multiplications of an attention."""
    counter = Counter()
    _attend.attend(query, [Context(context)], params, Options(counter, plan=plan))
    return counter.count


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lacking", [(), ("query",), ("output",)])
def test_the_count_is_that_of_the_products(order, kv_heads, lacking):
    """An attention takes exactly the multiplications that are counted for it."""
    rng = np.random.default_rng(0)
    params = setattn.init_attention(12, 10, num_heads=4, num_kv_heads=kv_heads, value_dim=5, bias=False, rng=rng)
    params = params._replace(**dict.fromkeys(lacking, ()))
    query, context = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=(7, 10)).astype(np.float32)
    widths = {"dim_query": None if "query" in lacking else 12, "dim_out": None if "output" in lacking else 12}
    sizes = Sizes(3, 7, 10, 4, kv_heads, 3, 5, **widths)
    assert count(params, query, context, Plan(order)) == multiplications(sizes, choose(sizes, order))


@pytest.mark.parametrize("sizes", [(1, 50), (3, 7), (50, 2), (40, 40)])
def test_no_order_takes_fewer_than_the_chosen_one(sizes):
    """The order that is chosen takes as many multiplications as the best of all that can be forced."""
    rng, (m, n) = np.random.default_rng(0), sizes
    params = setattn.init_attention(12, 10, num_heads=2, bias=False, rng=rng)
    query, context = rng.normal(size=(m, 12)).astype(np.float32), rng.normal(size=(n, 10)).astype(np.float32)
    assert count(params, query, context, Plan()) == min(count(params, query, context, Plan(o)) for o in ORDERS)


@given(st.tuples(*[st.integers(0, 300)] * 2), st.tuples(*[st.integers(1, 300)] * 5), st.integers(1, 8), st.booleans())
def test_the_choice_is_the_smallest(counts, widths, kv_heads, grouped):
    """No order that can be had takes fewer multiplications than the one that is chosen."""
    dim, head_dim, value_dim, dim_query, dim_out = widths
    sizes = Sizes(*counts, dim, kv_heads * (1 + grouped), kv_heads, head_dim, value_dim, dim_query, dim_out)
    least = multiplications(sizes, choose(sizes))
    assert all(least <= multiplications(sizes, choose(sizes, order)) for order in ORDERS)


P, Q, K, W, O = "project", "carry_queries", "carry_keys", "carry_weights", "carry_output"  # noqa: E741, for tables


@pytest.mark.parametrize(
    ("what", "sizes", "order"),
    [
        ("one probe of 16 heads, 729 patches", Sizes(1, 729, 1152, 16, 16, 72, 72, 1152, 1152), Order(Q, W)),
        ("one seed of 8 heads, a large set", Sizes(1, 100_000, 256, 8, 8, 32, 32, 256, 256), Order(Q, W)),
        ("four seeds of 8 heads, a large set", Sizes(4, 100_000, 256, 8, 8, 32, 32, 256, 256), Order(Q, W)),
        ("16 inducing points of 4 heads", Sizes(16, 100_000, 128, 4, 4, 32, 32, 128, 128), Order(Q, W)),
        ("128 inducing points of 8 heads", Sizes(128, 100_000, 128, 8, 8, 16, 16, 128, 128), Order(P, P)),
        ("a large set and 16 points of it", Sizes(100_000, 16, 128, 4, 4, 32, 32, 128, 128), Order(K, O)),
        ("the same in the authors' form", Sizes(100_000, 16, 128, 4, 4, 32, 32, None, None), Order(P, P)),
        ("a large set and 128 points of 8 heads", Sizes(100_000, 128, 128, 8, 8, 16, 16, 128, 128), Order(P, P)),
        ("512 latents, a picture, one head", Sizes(512, 50_176, 261, 1, 1, 261, 261, 1024, 1024), Order(Q, W)),
        ("a set of 1000 that attends to itself", Sizes(1000, 1000, 64, 4, 4, 16, 16, 64, 64), Order(P, P)),
        ("a tiny set of 8 that attends to itself", Sizes(8, 8, 64, 4, 4, 16, 16, 64, 64), Order(P, P)),
    ],
)
def test_known_workloads(what, sizes, order):
    """The shapes in use get the order that a count by hand gives."""
    assert choose(sizes) == order, what


def test_the_probe_of_siglip_saves_most_of_the_work():
    """One probe of 16 heads for 729 patches of width 1152: more than 60 times fewer multiplications."""
    sizes = Sizes(1, 729, 1152, 16, 16, 72, 72)
    assert multiplications(sizes, Order()) > 60 * multiplications(sizes, choose(sizes))


def test_copies_count_where_a_library_makes_them(backend):
    """XLA copies what is multiplied head by head: a wide weight for few elements, once for all sets, or their keys."""
    few = Sizes(16, 273, 1280, 20, 20, 64, 64, 1280, 1280)  # a layer of the IP-Adapter's resampler
    many = Sizes(64, 2112, 1024, 8, 8, 64, 64, 1024, 1024)  # one of Flamingo's
    assert choose(few) == choose(many) == choose(many, copied=1) == Order(Q, W)
    assert choose(few, copied=1) == Order(P, P)
    assert choose(few, copied=2) == Order(Q, W)
    small = Sizes(32, 32, 64, 4, 4, 16, 16, 64, 64)  # whose results by heads would be copied for each set
    assert choose(small) == choose(small, copied=1) == choose(small, copied=1024) == Order(P, P)
    half = Sizes(100, 16, 64, 4, 4, 16, 16, 64, 64)
    assert choose(half) == Order(K, O)
    assert choose(half, copied=256) == Order(P, P)
    alone = few._replace(heads=1, kv_heads=1)  # a single head lies in memory as it is
    assert choose(alone, copied=1) == choose(alone)
    assert choose(few, Order(Q, W), copied=1) == Order(Q, W)
    narrow = Sizes(1, 64, 128, 4, 4, 32, 32, 128, 128)  # whose weights a cache holds
    assert choose(narrow, copied=1) == Order(P, P)
    assert choose(narrow, copied=1, cached=True) == Order(Q, W)
    wide = Sizes(1, 64, 1024, 16, 16, 64, 64, 1024, 1024)
    assert choose(wide, copied=1, cached=True) == Order(P, P)
    assert copies_heads(namespace_of(backend.asarray(np.zeros(1), "float32"))) == (backend.name == "jax")


def test_what_has_to_be_made_is_made():
    """Norms on heads, shared keys and parts of a set keep from being carried what needs them."""
    few, many = Sizes(1, 500, 64, 4, 4, 16, 16, 64, 64), Sizes(500, 2, 64, 4, 4, 16, 16, 64, 64)
    assert choose(few) == Order(Q, W)
    assert choose(few, head_norms=(True, False)) == Order(Q, W)
    assert choose(few, head_norms=(False, True)) == Order(P, W)
    assert choose(many) == Order(K, O)
    assert choose(many, head_norms=(False, True)) == Order(K, O)
    assert choose(many, head_norms=(True, False)) == Order(P, O)
    assert choose(many, whole=False) == Order(K, P)
    assert choose(many._replace(kv_heads=2)) == Order(P, P)
    assert choose(many, Order(K, O), whole=False, head_norms=(True, False)) == Order(P, P)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", PLANNED)
def test_every_order_is_within_the_bound(name, dtype, order):
    """Whatever order is wanted of a block, its result stays within the rounding bound of the reference."""
    case, value, bound = cases.expected(name, dtype)
    tolerances.assert_close(case.numpy(dtype, plan=Plan(order)), value, bound, f"order of {case.function}")


FORGET = {
    "of_values": lambda state, order, p, xp: (state, order, p._replace(value=p.value._replace(bias=())), xp),
    "attend_at_once": lambda q, context, p, o: (q, context, p._replace(value=p.value._replace(bias=())), o),
    "_scores": lambda q, context, p, o: (q, context, p._replace(query=p.query._replace(bias=())), o),
}


@pytest.mark.parametrize(
    ("where", "order"), [("of_values", Order(P, W)), ("attend_at_once", Order(P, O)), ("_scores", Order(K, P))]
)
def test_an_order_that_forgets_a_bias_is_noticed(monkeypatch, where, order):
    """The bound refuses a form that leaves out a bias which it has to carry as well."""
    case, value, bound = cases.expected("attention", "float32")
    original, module = getattr(_state, where), _attend if hasattr(_attend, where) else _state
    monkeypatch.setattr(module, where, lambda *arguments: original(*FORGET[where](*arguments)))
    with pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32", plan=Plan(order)), value, bound, "a forgotten bias")


# --- what a small call takes beside its products --------------------------------------------------------------------

LIBRARY = str(Path(setattn.__file__).parent)


class Counted(np.ndarray):
    """An array that counts the operations on it and on what comes out of them."""

    operations = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        Counted.operations += 1
        plain = [a.view(np.ndarray) if isinstance(a, Counted) else a for a in inputs]
        if out is not None:
            options["out"] = tuple(a.view(np.ndarray) for a in out)
        return getattr(ufunc, method)(*plain, **options).view(Counted)


def one_small_set():
    """The call of the benchmark for latency: one set of 64, 1 seed, 4 heads, with a row-wise network and norms."""
    rng = np.random.default_rng(0)
    params = setattn.init_pma(64, num_seeds=1, num_heads=4, norm="layer", rng=rng)
    return rng.normal(size=(64, 64)).astype(np.float32), params


def test_a_small_call_goes_through_few_functions():
    """The functions of the library that one small set goes through are counted: there were 538 before they were."""
    x, params = one_small_set()
    setattn.pma(x, params)  # its parameters are known from now on
    called = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            called.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        setattn.pma(x, params)
    finally:
        sys.setprofile(before)
    assert 50 < len(called) <= 189


def test_a_small_call_takes_few_operations():
    """The operations on arrays are those of the equations, with a look at the numbers before each of the two norms."""
    x, params = one_small_set()
    Counted.operations = 0
    out = setattn.pma(x.view(Counted), setattn.map_params(lambda a: a.view(Counted), params))
    operations = Counted.operations
    np.testing.assert_array_equal(out.view(np.ndarray), setattn.pma(x, params))
    products, biases, scale, activations, residuals = 9, 7, 1, 2, 2
    softmax, norm = 7, 13  # with the sum, a product; with the smallest and largest number
    assert 40 < operations <= products + biases + scale + activations + residuals + softmax + 2 * norm
