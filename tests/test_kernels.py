"""What a library computes by a way of its own has the values of the usual way, wherever it is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import cases
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st

import setattn
from setattn import Plan, _kernels, _layers
from setattn._namespace import namespace_of

XP = namespace_of(np.zeros(1))

# --- one kernel for an attention ------------------------------------------------------------------------------------

on_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)


@pytest.fixture
def fused(monkeypatch):
    """Take the kernel for sets of any size, record no gradients, and collect what it returns."""
    torch = pytest.importorskip("torch")
    results, kernel = [], _kernels.fused_attention

    def spy(*arguments):
        results.append(kernel(*arguments))
        return results[-1]

    monkeypatch.setattr(_kernels, "_FUSED", 1)
    monkeypatch.setattr("setattn._state.fused_attention", spy)
    with torch.no_grad():
        yield results


@on_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", cases.NAMES)
def test_what_is_written_over_was_needed_no_more(backend, name, dtype):
    """Where nothing is recorded, results are written over others; every case still has the values of the reference."""
    case, value, bound = cases.expected(name, dtype)
    with backend.xp.no_grad():
        tolerances.assert_close(case.on(backend, dtype), value, bound, f"{case.function} {dtype}")


@on_torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", cases.NAMES)
def test_the_kernel_has_the_values_of_the_reference(backend, fused, name, dtype):
    """Every case, whatever its masks, is within its bound, for a context in one block and in several."""
    case, value, bound = cases.expected(name, dtype)
    tolerances.assert_close(case.on(backend, dtype), value, bound, f"{case.function} {dtype}")
    if case.params is not None and case.function != "attention_weights":
        out = case.on(backend, dtype, plan=Plan(setattn.Order(), block_size=2))
        tolerances.assert_close(out, value, bound, f"{case.function} {dtype}")


@on_torch
def test_the_kernel_is_taken(backend, fused):
    """Where the order of products projects both and nothing is recorded, and only there."""
    x, params = backend.xp.randn(3, 5, 8), setattn.init_mab(8, num_heads=2, rng=0)
    params = setattn.convert_params(params, backend.xp)
    setattn.sab(x, params, plan=Plan(setattn.Order()))
    assert [result is None for result in fused] == [False]
    setattn.sab(x, params, plan=Plan(setattn.Order("carry_queries", "carry_weights")))
    with backend.xp.enable_grad():
        setattn.sab(x, params, plan=Plan(setattn.Order()))
    assert len(fused) == 1


@on_torch
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("n", [1, 7, 40, 600])
def test_the_kernel_hides_no_number_that_is_not_finite(backend, fused, monkeypatch, n, wrong):
    """A number that is not finite or overflows, in an element or a query, reaches the rows that it reaches without."""
    torch, rng = backend.xp, np.random.default_rng(n)
    params = setattn.convert_params(setattn.init_attention(8, num_heads=2, rng=rng), torch)
    for where in (0, 1):
        arrays = [torch.asarray(rng.normal(size=(2, size, 8)).astype(np.float32)) for size in (5, n)]
        arrays[where][0, 0, 3] = wrong
        out = setattn.attention(*arrays, params, plan=Plan(setattn.Order()))
        assert fused
        with monkeypatch.context() as patch:
            patch.setattr(_kernels, "_FUSED", math.inf)
            usual = setattn.attention(*arrays, params, plan=Plan(setattn.Order()))
        assert torch.equal(out.isnan(), usual.isnan())
        assert torch.allclose(out, usual, rtol=1e-4, atol=1e-4, equal_nan=True)


@on_torch
def test_where_the_kernel_does_not_tell(backend, fused):
    """The logarithm of a sum of 1 is that of none, too: then the steps tell, but of other rows nothing changes."""
    torch = backend.xp
    params = setattn.convert_params(setattn.init_attention(8, num_heads=2, rng=0), torch)
    x = torch.ones(1, 8)
    params = params._replace(query=setattn.map_params(torch.zeros_like, params.query))
    out = setattn.attention(x, x, params, plan=Plan(setattn.Order()))
    assert [unsure.all().item() for _, _, unsure in fused] == [True]
    with torch.enable_grad():
        assert torch.allclose(out, setattn.attention(x, x, params), atol=1e-6)
    x = torch.randn(2, 6, 8)
    broken = x.clone()
    broken[1, 2] = math.nan
    out, other = (setattn.attention(y, x, params, plan=Plan(setattn.Order())) for y in (x, broken))
    assert torch.equal(out[0], other[0])
    assert other[1, 2].isnan().all()


@on_torch
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_the_kernel_inside_a_trace(backend, fused, mode):
    """A trace has the values of what was traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = backend.xp.randn(3, 5, 8)
    params = setattn.convert_params(setattn.init_mab(8, num_heads=2, rng=0), backend.xp)

    def call(x):
        return setattn.sab(x, params, plan=Plan(setattn.Order()))

    traced = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert backend.xp.allclose(traced(x), call(x), atol=1e-6)


@on_torch
@pytest.mark.parametrize("name", ["mab", "isab", "attention"])
def test_the_kernel_inside_vmap(backend, fused, name):
    """Where no number can be looked at, the steps are taken."""
    case, value, bound = cases.expected(name, "float32")
    case = replace(case, options=case.options | {"plan": Plan(setattn.Order())})
    arrays, params, masks = case.trees(backend, "float32")
    axes = tuple(0 if a.ndim > 2 else None for a in arrays), None, dict.fromkeys(masks, 0)
    out = backend.xp.func.vmap(case.call, in_dims=axes)(arrays, params, masks)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")
    assert set(fused) <= {None}


@on_torch
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of looks at numbers
def test_results_in_blocks_are_tensors_of_the_values(backend, monkeypatch):
    """Where no gradient is recorded, blocks are written into one tensor; under vmap and in a trace, too."""
    monkeypatch.setattr("setattn._memory._LARGE", 0)
    torch = backend.xp
    params = setattn.convert_params(setattn.init_mab(8, num_heads=2, rng=0), torch)
    plan, sets = Plan(block_size=2), torch.linspace(-1, 1, 3 * 7 * 8).reshape(3, 7, 8)
    with torch.no_grad():
        whole = setattn.sab(sets, params)
        for dtype in (torch.float32, torch.bfloat16):
            own = setattn.map_params(lambda a, dtype=dtype: a.to(dtype), params)
            out = setattn.sab(sets.to(dtype), own, plan=plan)
            assert (type(out), out.dtype, out.device) == (torch.Tensor, dtype, sets.device)
            assert out.is_contiguous()
            assert torch.allclose(out.float(), whole, atol=1e-5 if dtype is torch.float32 else 0.1)
        mapped = torch.func.vmap(lambda x: setattn.sab(x, params, plan=plan))(sets)
        traced = torch.jit.trace(lambda x: setattn.sab(x, params, plan=plan), (sets,), check_trace=False)
        first, second = traced(sets), traced(-sets)
    assert torch.allclose(mapped, whole, atol=1e-5)
    assert torch.allclose(first, whole, atol=1e-5)
    assert not torch.allclose(first, second, atol=0.1)


# --- NumPy ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 2), st.booleans(), st.integers(0, 9))
def test_largest_numbers(n, rows, batch, upright, seed):
    """Halves that are compared until one row is left give the largest numbers, in memory of their own; of NaN, NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*[2] * batch, n, rows)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
    x = np.ascontiguousarray(x.mT) if upright else x.mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernels, "_MANY", 1)
        found = _kernels.row_max(x, XP)
    assert found.shape == (*x.shape[:-1], 1)
    assert not np.shares_memory(found, x)
    np.testing.assert_array_equal(found, x.max(axis=-1, keepdims=True))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 8), (0, 4)])
def test_pieces_change_no_bit(monkeypatch, activation, shape):
    """An activation a piece at a time is the one of the whole array, of any shape and layout."""
    x = 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    function = _layers._ACTIVATIONS[activation]
    whole = function(x.copy(), XP)
    monkeypatch.setattr(_kernels, "_PIECE", 6)
    for given_x in (x.copy(), np.asfortranarray(x)):
        np.testing.assert_array_equal(function(given_x, XP), whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_of_numpy(dtype):
    """Of every kind of number, in its dtype."""
    x = np.array([-math.inf, -1, -0.0, 0.0, 1e-45, 2, math.inf, math.nan], dtype)
    out = _kernels.relu(x.copy(), XP)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, [0, 0, 0, 0, x[4], 2, math.inf, math.nan])
