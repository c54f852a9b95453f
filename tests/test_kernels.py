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
from setattn._adapters import to_compute_in
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
    assert len(fused) == 1
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
    assert not fused


@on_torch
@pytest.mark.parametrize("part", ["query", "context"])
def test_the_kernel_takes_any_layout(backend, part):
    """It goes by the steps between rows alone, and reads what lies beside a row whose own numbers do not."""
    torch = backend.xp
    params = setattn.init_attention(8, num_heads=2, rng=0)
    params = backend.params(params._replace(query=()) if part == "query" else params, "float64")
    arrays = {"query": torch.randn(5, 8, dtype=torch.float64), "context": torch.randn(7, 8, dtype=torch.float64)}
    turned = arrays | {part: arrays[part].mT.contiguous().mT}
    with torch.no_grad():
        found, wanted = (setattn.attention(*a.values(), params) for a in (turned, arrays))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@on_torch
def test_the_kernel_over_nothing_looks_at_no_query(backend):
    """A query that is NaN finds the same nothing as any other, in a set that is all masked."""
    torch = backend.xp
    params = backend.params(setattn.init_attention(8, num_heads=2, rng=0), "float32")
    query, context, mask = torch.full((2, 8, 8), math.nan), torch.randn(2, 7, 8), torch.zeros(2, 7, dtype=torch.bool)
    with torch.no_grad():
        found = setattn.attention(query, context, params, mask=mask)
    assert torch.equal(found, params.output.bias.expand(2, 8, 8))


# --- few rows with many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy"], indirect=True)
@pytest.mark.parametrize("name", cases.NAMES)
def test_the_long_rows_first_have_the_values_of_the_reference(backend, monkeypatch, name):
    """Every case, whatever its masks, is within its bound, however few the rows are taken to be."""
    monkeypatch.setattr(_kernels, "_FEW", 0)
    monkeypatch.setattr(_kernels, "_LONG_ROWS", 0)
    case, value, bound = cases.expected(name, "float64")
    tolerances.assert_close(case.on(backend, "float64"), value, bound, f"{case.function} float64")
    if case.params is not None and case.function != "attention_weights":
        out = case.on(backend, "float64", plan=Plan(setattn.Order()))
        tolerances.assert_close(out, value, bound, f"{case.function} float64")


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("sets", [(), (3,)])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_meet_rows_in_each_library(name, sets, shared):
    """Whole numbers are multiplied without rounding, so that each way has to give the same."""
    library = pytest.importorskip({"jax": "jax.numpy"}.get(name, name))
    rng = np.random.default_rng(0)
    few, many = (rng.integers(-4, 5, size=(*batch, *rows)) for batch, rows in ((sets, (4, 64)), (sets, (2048, 64))))
    few = few[0] if shared and sets else few
    arrays = [library.asarray(a.astype(np.float32)) for a in (few, many)]
    xp = to_compute_in(namespace_of(arrays[0]), 1)
    out = _kernels.matmul_rows(*arrays, xp)
    assert np.array_equal(np.asarray(out), few @ many.swapaxes(-1, -2))


@on_torch
@pytest.mark.parametrize("order", [("carry_queries", "carry_weights"), ("carry_keys", "carry_output")])
def test_weights_are_not_copied_for_each_set(backend, order):
    """No operation of PyTorch makes as many numbers as there are sets times weights of a map."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sets, n, dim, made = 20, 8, 64, []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() for t in (out,) if isinstance(t, backend.xp.Tensor))
            return out

    rng = np.random.default_rng(0)
    params = backend.params(setattn.init_attention(dim, num_heads=4, rng=rng), "float32")
    query, context = (backend.asarray(rng.normal(size=(sets, rows, dim)), "float32") for rows in (2, n))
    with Made():
        setattn.attention(query, context, params, plan=Plan(setattn.Order(*order)))
    assert made
    assert max(made) < 4 * sets * dim * dim


def test_a_set_alone_and_in_a_batch_meets_the_same_rows():
    """On NumPy, which way is taken depends on no other set: the scores are the same, bit by bit."""
    rng = np.random.default_rng(0)
    few, many = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 96), (5, 1024, 96)))
    together = _kernels.matmul_rows(few, many, XP)
    assert together.flags.c_contiguous
    for alone, one in zip(many, together, strict=True):
        assert np.array_equal(_kernels.matmul_rows(few, alone, XP), one)
    short = many[:, :3]  # of which there are too few to be turned round
    assert np.allclose(_kernels.matmul_rows(few, short, XP), together[..., :3], atol=1e-4)


# --- linear maps by oneDNN -------------------------------------------------------------------------------------------


@pytest.fixture
def by_onednn(monkeypatch):
    """Take oneDNN for products of any size, and collect the shapes of what it multiplies."""
    torch = pytest.importorskip("torch")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    shapes, product = [], torch.ops.mkldnn._linear_pointwise

    def spy(a, weight, *rest):
        shapes.append((tuple(a.shape), tuple(weight.shape)))
        return product(a, weight, *rest)

    with torch.no_grad():  # where alone there is this namespace
        monkeypatch.setattr(to_compute_in(namespace_of(torch.zeros(1)), 1), "linear_on_cpu", spy)
    monkeypatch.setattr(_kernels, "_LARGE", 1)
    return shapes


@on_torch
@pytest.mark.parametrize("name", cases.NAMES)
def test_onednn_has_the_values_of_the_reference(backend, by_onednn, name):
    """Every case, whatever its masks, is within its bound."""
    case, value, bound = cases.expected(name, "float32")
    with backend.xp.no_grad():
        tolerances.assert_close(case.on(backend, "float32"), value, bound, f"{case.function} by oneDNN")
    assert bool(by_onednn) == (case.params is not None)


@on_torch
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of PyTorch's own jvp
def test_onednn_is_taken_where_nothing_but_numbers_is_wanted(backend, by_onednn, monkeypatch):
    """For float32, and neither where something is recorded, traced or transformed, nor where oneDNN is switched off."""
    from torch.utils.flop_counter import FlopCounterMode

    torch = backend.xp
    params = setattn.convert_params(setattn.init_mab(8, num_heads=2, rng=0), torch)
    x = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8)

    def used(function):
        by_onednn.clear()
        function()
        return bool(by_onednn)

    def sab(x, params=params):
        return setattn.sab(x, params)

    assert not used(lambda: sab(x))
    with torch.no_grad():
        assert used(lambda: sab(x))
        assert used(lambda: sab(x[:1]))
        assert used(lambda: sab(x[0]))
        wide = setattn.convert_params(params, torch, dtype=torch.float64)
        assert not used(lambda: sab(x.double(), wide))
        assert used(lambda: sab(x.bfloat16(), setattn.convert_params(params, torch, dtype=torch.bfloat16)))
        assert not used(lambda: torch.func.vmap(sab)(x))
        assert not used(lambda: torch.func.jvp(sab, (x,), (x,)))
        with torch.autograd.forward_ad.dual_level():
            assert not used(lambda: sab(torch.autograd.forward_ad.make_dual(x, x)))
        with FlopCounterMode(display=False) as counter:
            assert not used(lambda: sab(x))
        assert counter.get_total_flops() > 0
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not used(lambda: sab(x))
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    with torch.inference_mode():
        assert used(lambda: sab(x))


@on_torch
def test_onednn_keeps_what_is_no_number_in_its_row(backend, by_onednn):
    """A NaN or an infinity of one row leaves no trace in another one, and is none where it should be seen."""
    torch = backend.xp
    x = torch.linspace(-1, 1, 33 * 40).reshape(33, 40)
    broken = x.clone()
    broken[3, 5], broken[17, 0] = math.nan, math.inf
    p = setattn.convert_params(setattn.init_linear(40, 24, rng=0), torch)
    with torch.no_grad():
        xp = to_compute_in(namespace_of(x), 1)
        whole, out = (_layers.linear(a, p, xp) for a in (x, broken))
    rest = [i for i in range(33) if i not in (3, 17)]
    assert by_onednn
    assert torch.equal(out[rest], whole[rest])
    assert out[3].isnan().all()
    assert torch.equal(out[17], broken[17] @ p.weight + p.bias)


@on_torch
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of PyTorch's own jvp
@pytest.mark.parametrize("name", ["isab", "perceiver_resampler", "attention"])
def test_forward_derivatives_where_no_gradient_is_recorded(backend, by_onednn, name):
    """They are those that are had with gradients: no kernel leaves a tangent behind."""
    torch = backend.xp
    case, _, _ = cases.expected(name, "float32")
    arrays, params, masks = case.trees(backend, "float32")

    def call(*arrays):
        return case.call(arrays, params, masks)

    tangents = tuple(3 * a.cos() for a in arrays)
    wanted = torch.func.jvp(call, tuple(arrays), tangents)[1]
    forward = torch.autograd.forward_ad
    with torch.no_grad():
        found = torch.func.jvp(call, tuple(arrays), tangents)[1]
        with forward.dual_level():
            duals = [forward.make_dual(a, t) for a, t in zip(arrays, tangents, strict=True)]
            dual = forward.unpack_dual(call(*duals)).tangent
    assert wanted.abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(dual, wanted, atol=1e-5)


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
