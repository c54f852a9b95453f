"""The order of products: the count is right, the choice is the smallest, and every order gives the same numbers."""

from __future__ import annotations

import itertools

import array_api_compat.numpy
import cases
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st

import setattn
import setattn._attention as core
from setattn._layers import Options
from setattn._order import Order, Sizes, cheapest, multiplications

ORDERS = [Order(*flags) for flags in itertools.product((False, True), repeat=2)]
ATTENTIVE = [name for name in cases.NAMES if not name.startswith(("fourier_features", "attention_weights"))]


def force(monkeypatch, order):
    """Have every state made in one order, but for keys with a norm, which have to be made."""
    monkeypatch.setattr(
        core, "_order", lambda q, context, p: order if p.key_norm == () else order._replace(carry_queries=False)
    )


class Counter:
    """NumPy, counting the multiplications of its matrix products."""

    def __init__(self):
        self.count = 0

    def __getattr__(self, name):
        return getattr(array_api_compat.numpy, name)

    def matmul(self, a, b):
        out = np.matmul(a, b)
        self.count += out.size * a.shape[-1]
        return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_count_is_that_of_the_products(monkeypatch, order, kv_heads):
    """A state takes exactly the multiplications that are counted for it."""
    rng = np.random.default_rng(0)
    params = setattn.init_attention(12, 10, num_heads=4, num_kv_heads=kv_heads, value_dim=5, bias=False, rng=rng)
    query, context = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=(7, 10)).astype(np.float32)
    counter = Counter()
    q = core._queries(query, params, Options(counter))
    counter.count = 0
    force(monkeypatch, order)
    core.make_state(q, core.Context(context), params, Options(counter))
    sizes = Sizes(4 * 3, 7, 10, kv_heads, 3, 5)
    assert counter.count == multiplications(sizes, order)


@given(st.tuples(*[st.integers(0, 300)] * 2), st.tuples(*[st.integers(1, 300)] * 3), st.integers(1, 8))
def test_the_choice_is_the_smallest(counts, widths, kv_heads):
    """No order takes fewer multiplications than the one that is chosen."""
    queries, elements = counts
    dim, head_dim, value_dim = widths
    sizes = Sizes(queries * kv_heads, elements, dim, kv_heads, head_dim, value_dim)
    least = multiplications(sizes, cheapest(sizes))
    assert all(least <= multiplications(sizes, order) for order in ORDERS)


@pytest.mark.parametrize(
    ("what", "sizes", "both"),
    [
        ("one probe of 16 heads, 729 patches", Sizes(16, 729, 1152, 16, 72, 72), True),
        ("one seed of 8 heads, a large set", Sizes(8, 100_000, 256, 8, 32, 32), True),
        ("four seeds of 8 heads, a large set", Sizes(32, 100_000, 256, 8, 32, 32), True),
        ("16 inducing points of 4 heads", Sizes(64, 100_000, 128, 4, 32, 32), True),
        ("128 inducing points of 8 heads", Sizes(1024, 100_000, 128, 8, 16, 16), False),
        ("a set of 1000 that attends to itself", Sizes(4000, 1000, 64, 4, 16, 16), False),
        ("a tiny set of 8 that attends to itself", Sizes(32, 8, 64, 4, 16, 16), False),
    ],
)
def test_known_workloads(what, sizes, both):
    """The shapes in use get the order that a count by hand gives."""
    assert cheapest(sizes) == Order(both, both), what


def test_the_probe_of_siglip_saves_most_of_the_work():
    """One probe of 16 heads for 729 patches of width 1152: more than 60 times fewer multiplications."""
    sizes = Sizes(16, 729, 1152, 16, 72, 72)
    assert multiplications(sizes, Order(False, False)) > 60 * multiplications(sizes, cheapest(sizes))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_every_order_is_within_the_bound(monkeypatch, name, dtype, order):
    """Whatever order is forced upon a block, its result stays within the rounding bound of the reference."""
    case, value, bound = cases.expected(name, dtype)
    force(monkeypatch, order)
    tolerances.assert_close(case.numpy(dtype), value, bound, f"order of {case.function}")


def test_an_order_that_forgets_a_bias_is_noticed(monkeypatch):
    """The bound refuses a carried sum of values without its bias."""
    case, value, bound = cases.expected("attention", "float32")
    force(monkeypatch, Order(False, True))
    forgotten = core._carried_values
    monkeypatch.setattr(
        core,
        "_carried_values",
        lambda e, total, context, p, xp: forgotten(e, total, context, p._replace(value=p.value._replace(bias=())), xp),
    )
    with pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32"), value, bound, "a forgotten bias")
