"""Every block can be compiled, differentiated and vectorised by JAX and PyTorch, parameters and all.

Compiled calls of JAX are in test_backends.py; here is the rest. Gradients are judged by central differences of the
library itself on NumPy, in one direction through all arrays and parameters at once: an error in any component is seen
with certainty, as no component of a random direction is 0.
"""

from __future__ import annotations

import functools
import importlib
import math
import shutil
import subprocess
import sys
import warnings

import cases
import numpy as np
import pytest
import tolerances

import setattn

UNOPTIMISED = {"xla_backend_optimization_level": 0}

on_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)
on_jax = pytest.mark.parametrize("backend", ["jax"], indirect=True)
every_block = pytest.mark.parametrize("name", cases.ONE_EACH)
every_case = pytest.mark.parametrize("name", cases.NAMES)
MASKED = [name for name in cases.NAMES if not cases.make(name).takes_part().all()]


def numbers(case):
    """The floating arrays of a case as one flat list: arrays, parameters, biases."""
    found = []
    case.map(lambda a: found.append(a) or a)
    return found


def with_numbers(case, values):
    """Put other floating arrays in the places of a case's own."""
    values = iter(values)
    return case.map(lambda a: next(values))


@functools.cache
def slope(name):
    return slope_of(*cases.expected(name, "float64"))


def slope_of(case, value, bound):
    """The weights of a sum over the result, a direction, and the slope of the sum in it with its tolerance.

    The noise of the sum is the rounding bound of every element, weighted; that of a gradient by differentiation, a few
    units of rounding, is far below what dividing the noise by the step makes of it.
    """
    rng = np.random.default_rng(7)
    weights, start = rng.normal(size=value.shape), numbers(case)
    direction = [rng.normal(size=a.shape) for a in start]

    def moved(t):
        there = [a + t[0] * d for a, d in zip(start, direction, strict=True)]
        return float(np.sum(weights * with_numbers(case, there).numpy()))

    (derivative,), (tolerance,) = tolerances.gradient(moved, np.zeros(1), noise=float(np.sum(np.abs(weights) * bound)))
    return weights, direction, derivative, tolerance


def assert_slope(name, gradients):
    assert_slope_of(cases.make(name).function, slope(name), gradients)


def assert_slope_of(function, slope, gradients):
    """Check gradients, in the order of :func:`numbers`, and that the error of leaving one of them out would be seen."""
    _, direction, derivative, tolerance = slope
    parts = np.array([np.sum(g * d) for g, d in zip(gradients, direction, strict=True)])
    assert np.isfinite(parts).all()
    tolerances.assert_close(np.sum(parts), derivative, tolerance, f"gradient of {function}")
    # A bias of keys cancels in the softmax, and so does what comes before it; what is left is rounding.
    assert np.max(np.abs(parts)) > 8 * tolerance
    assert all(abs(part) > 8 * tolerance or abs(part) < tolerance / 8 for part in parts)


def leaf_numbers(arrays, params, masks, leaf):
    """Flatten gradients, or whatever has the structure of a call's trees, in the order of :func:`numbers`."""
    found = [leaf(a) for a in arrays]
    setattn.map_params(lambda a: found.append(leaf(a)) or a, params)
    return found + [leaf(a) for key, a in masks.items() if key in NUMBERS]


# --- gradients ------------------------------------------------------------------------------------------------------


def torch_gradients(torch, case, trees, weights, call=None):
    """Differentiate the weighted sum of a call; return the result and the gradients in NumPy's float64."""
    leaves = []

    def track(a):
        if a.dtype.is_floating_point:
            a = a.clone().requires_grad_()
            leaves.append(a)
        return a

    arrays, params, masks = trees
    tracked = tuple(map(track, arrays)), setattn.map_params(track, params), {k: track(m) for k, m in masks.items()}
    out = (call or case.call)(*tracked)
    total = (torch.asarray(weights, dtype=out.dtype) * out).sum()
    return [a.detach().double().numpy() for a in (out, *torch.autograd.grad(total, leaves, materialize_grads=True))]


@on_torch
@every_case
def test_autograd(backend, name):
    """PyTorch's gradient of every block is the slope."""
    case = cases.expected(name, "float64")[0]
    _, *gradients = torch_gradients(backend.xp, case, case.trees(backend, "float64"), slope(name)[0])
    assert_slope(name, gradients)


@on_torch
@every_case
def test_gradcheck(backend, name):
    """PyTorch's own check of first derivatives passes."""
    torch, case = backend.xp, cases.make(name)
    leaves = [torch.asarray(a).requires_grad_() for a in numbers(case)]
    masks = {key: torch.asarray(m) for key, m in case.masks.items() if m.dtype == np.bool_}

    def call(*values):
        values = iter(values)
        arrays = tuple(next(values) for _ in case.arrays)
        params = () if case.params is None else setattn.map_params(lambda a: next(values), case.params)
        return case.call(arrays, params, masks | {key: next(values) for key in case.masks if key not in masks})

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@on_jax
@every_block
def test_jax_grad(backend, name):
    """JAX's gradient of every block, compiled, is the slope; what is masked has no gradient, whatever it holds."""
    jax, weights = importlib.import_module("jax"), slope(name)[0]
    case = cases.expected(name, "float64")[0]
    (arrays, params, masks), boolean = case.trees(backend, "float64"), {}
    if not masks.keys() & set(NUMBERS):
        masks, boolean = {}, masks

    def total(arrays, params, masks, boolean):
        return (weights * case.call(arrays, params, masks | boolean)).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)), compiler_options=UNOPTIMISED)
    found = leaf_numbers(*gradient(arrays, params, masks, boolean), np.asarray)
    assert_slope(name, found)
    if name in MASKED:
        for garbage in GARBAGE:
            trees = case.with_garbage(garbage).trees(backend, "float64")
            other = leaf_numbers(*gradient(*trees[:2], masks, boolean), np.asarray)
            assert_no_gradient_where_masked(case, other)
            assert_same_bits(other, found)


# --- masks ----------------------------------------------------------------------------------------------------------

NUMBERS = ("bias", "key_positions")
GARBAGE = ((np.nan,), (np.inf, -np.inf, np.nan, 1e30, -1e-40, 0.0))


def assert_same_bits(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.tobytes() == b.tobytes()


def assert_no_gradient_where_masked(case, gradients):
    """Check the gradients of elements, masked queries and biases: exactly 0 where they take part in nothing."""
    part = case.takes_part()
    assert not gradients[case.elements][~part].any()
    if "query_mask" in case.masks and case.arrays[0].ndim > 2:
        assert not gradients[0][~case.masks["query_mask"]].any()
    if any(key in case.masks and case.masks[key].ndim >= part.ndim for key in NUMBERS):
        assert not gradients[-1][~part].any()


@on_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_values_change_neither_result_nor_gradient(backend, name, dtype):
    """NaN and infinities under a mask change no bit of the result or of any gradient, and have none of their own."""
    case = cases.make(name)
    weights = cases.expected(name, "float64")[1]

    def run(case):
        return torch_gradients(backend.xp, case, case.trees(backend, dtype), weights)

    found = run(case)
    for garbage in GARBAGE:
        with np.errstate(over="ignore"):  # 1e30 is inf in float16
            other = run(case.with_garbage(garbage))
        assert_same_bits(other, found)
        assert_no_gradient_where_masked(case, other[1:])


@on_torch
@pytest.mark.parametrize("name", MASKED)
def test_gradients_of_nothing(backend, name):
    """Where nothing takes part, the gradients are finite, and those of the elements 0."""
    case = cases.make(name)
    masks = {key: m if key in NUMBERS else np.zeros_like(m) for key, m in case.masks.items()}
    case = cases.replace(case, masks=masks)
    weights = np.ones(cases.expected(name, "float64")[1].shape)
    _, *gradients = torch_gradients(backend.xp, case, case.trees(backend, "float64"), weights)
    assert all(np.isfinite(g).all() for g in gradients)
    assert_no_gradient_where_masked(case, gradients)


# --- vectorisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "jax"], indirect=True)
def test_gradients_beside_an_element_that_takes_all(backend):
    """The exponentials add up to 1 then, to the last digit, and those that vanish in the sum still have a slope."""
    rng = np.random.default_rng(0)
    query, context, bias = rng.normal(size=(1, 4)), rng.normal(size=(3, 4)), np.asarray([0.0, -40.0, -41.0])
    params = setattn.map_params(lambda a: a.astype(np.float64), setattn.init_attention(4, num_heads=1, rng=0))
    alone = np.asarray([setattn.attention(query, context[j : j + 1], params).sum() for j in range(3)])
    arrays = [backend.asarray(a, "float64") for a in (query, context)]
    params = backend.params(params, "float64")

    def total(bias):
        return setattn.attention(*arrays, params, bias=bias, scale=0.0).sum()

    if backend.name == "jax":
        import jax

        gradient = jax.grad(total)(backend.asarray(bias, "float64"))
    else:
        given = backend.asarray(bias, "float64").requires_grad_()
        total(given).backward()
        gradient = given.grad
    np.testing.assert_allclose(backend.numpy(gradient)[1:], np.exp(bias[1:]) * (alone[1:] - alone[0]), rtol=1e-12)


def batch_axes(trees, case):
    """The batch axis of every array of a call, or ``None`` for those that all of the batch share."""
    arrays = tuple(0 if a.ndim > 2 else None for a in case.arrays)
    shared = {key for key, m in case.masks.items() if key == "key_positions" and m.ndim == 2}
    return arrays, None, {key: None if key in shared else 0 for key in trees[2]}


@on_jax
@every_block
def test_jax_vmap(backend, name):
    """Mapping over the sets of a batch gives the batch."""
    jax = importlib.import_module("jax")
    case, value, bound = cases.expected(name, "float32")
    trees = case.trees(backend, "float32")
    call = jax.jit(jax.vmap(case.call, in_axes=batch_axes(trees, case)), compiler_options=UNOPTIMISED)
    tolerances.assert_close(np.asarray(call(*trees)), value, bound, f"{case.function} float32")


@on_torch
@every_case
def test_torch_vmap(backend, name):
    """Mapping over the sets of a batch gives the batch."""
    case, value, bound = cases.expected(name, "float32")
    trees = case.trees(backend, "float32")
    out = backend.xp.func.vmap(case.call, in_dims=batch_axes(trees, case))(*trees)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")


@on_torch
@every_case
def test_torch_vmap_without_gradients(backend, name):
    """The same where nothing is recorded, so that intermediate results are written over."""
    case, value, bound = cases.expected(name, "float32")
    trees = case.trees(backend, "float32")
    with backend.xp.no_grad():
        out = backend.xp.func.vmap(case.call, in_dims=batch_axes(trees, case))(*trees)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")


@on_torch
@every_block
def test_torch_func_grad(backend, name):
    """``torch.func.grad`` gives the slope, and mapped over the batch the gradient of each set, which add up to it."""
    torch, weights = backend.xp, torch_weights(backend, name)
    case = cases.expected(name, "float64")[0]
    trees = case.trees(backend, "float64")

    def total(arrays, params, masks, weights):
        return (weights * case.call(arrays, params, masks)).sum()

    masks = trees[2]
    gradients = torch.func.grad(total, argnums=(0, 1))(*trees, weights)
    assert_slope(name, leaf_numbers(*gradients, masks, lambda g: g.numpy()))
    each = torch.func.vmap(torch.func.grad(total, argnums=1), in_dims=(*batch_axes(trees, case), 0))(*trees, weights)
    assert_slope(name, leaf_numbers(gradients[0], setattn.map_params(lambda g: g.sum(0), each), masks, np.asarray))


def torch_weights(backend, name):
    return backend.xp.asarray(slope(name)[0])


# --- compilation ----------------------------------------------------------------------------------------------------


@on_torch
@every_block
def test_torch_compile(backend, name):
    """Every block compiles as one graph, without a warning, and so does its gradient."""
    torch = backend.xp
    torch.compiler.reset()
    case, value, bound = cases.expected(name, "float64")
    # Tracing the gradient, too, takes seconds; it is made of the same few operations everywhere.
    how = "aot_eager" if name in ("attention", "isab", "gated_cross_attention") else "eager"
    compiled = torch.compile(case.call, fullgraph=True, backend=how)
    out, *gradients = torch_gradients(torch, case, case.trees(backend, "float64"), slope(name)[0], compiled)
    tolerances.assert_close(out, value, bound, f"{case.function} float64")
    assert_slope(name, gradients)


@on_torch
@pytest.mark.parametrize(
    "name",
    [
        "attention-grouped",
        "attention-bare",
        "attention-pairs-and-bias",
        "attention-length-pairs",
        "mab-pre-norm",
        "mab-official",
        "cross_attention-geglu",
        "perceiver_resampler-media-frames",
        "gated_cross_attention-previous",
        "fourier_features-per-axis",
        "attention_pool-table",
        "attention_pool-all-positions",
        "sincos_features-temperature",
    ],
)
def test_torch_compile_variants(backend, name):
    """Variants that take another way through the source are traced in one graph, too."""
    torch = backend.xp
    torch.compiler.reset()
    case, value, bound = cases.expected(name, "float32")
    out = torch.compile(case.call, fullgraph=True, backend="eager")(*case.trees(backend, "float32"))
    tolerances.assert_close(out, value, bound, f"{case.function} float32")


@on_torch
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_torch_traces_by_operations(backend, mode):
    """Sizes are symbols in one mode: what is known of parameters that fitted has to do without a hash of them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    case = cases.make("mab")
    arrays, params = case.trees(backend, "float64")[:2]
    leaves = []
    setattn.map_params(leaves.append, params)

    def call(*given):
        parts = iter(given[len(arrays) :])
        return case.call(given[: len(arrays)], setattn.map_params(lambda _: next(parts), params), {})

    traced = make_fx(call, tracing_mode=mode)(*arrays, *leaves)
    found, direct = (backend.numpy(f(*arrays, *leaves)) for f in (traced, call))
    assert_same_bits([found], [direct])


@on_torch
def test_torch_compile_any_size(backend):
    """One graph with symbolic sizes serves sets of every size."""
    torch, graphs = backend.xp, []
    torch.compiler.reset()
    cases.make("isab").on(backend, "float32")  # what the first call of a process leaves behind is looked at by a guard

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(cases.make("isab").call, fullgraph=True, backend=count, dynamic=True)
    for n in (7, 5, 3):
        case = cases.make("isab").rounded("float32").resized(elements=n)
        value, bound = cases.reference(case, "float32")
        tolerances.assert_close(compiled(*case.trees(backend, "float32")), value, bound, "isab float32")
    assert len(graphs) == 1


@on_torch
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_torch_inductor(backend):
    """The default compiler of PyTorch gives the same."""
    torch = backend.xp
    torch.compiler.reset()
    case, value, bound = cases.expected("attention", "float32")
    with warnings.catch_warnings():
        # Inductor imports parts of PyTorch that PyTorch deprecates.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        out = torch.compile(case.call, fullgraph=True)(*case.trees(backend, "float32"))
    tolerances.assert_close(out, value, bound, "attention float32")


COLD = """
import torch, setattn
part = lambda *shape: setattn.Linear(torch.ones(shape), torch.ones(shape[1:]))
params = setattn.AttentionPool(torch.ones(1, 8), setattn.Attention((), part(8, 2, 4), part(8, 2, 4)))
compiled = torch.compile(lambda x, m: setattn.attention_pool(x, params, mask=m), fullgraph=True, backend="eager")
print(tuple(compiled(torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)).shape))
"""


@on_torch
def test_torch_compile_before_any_other_call(backend):
    """The first call of a process may be a compiled one: nothing depends on what an earlier call left behind."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", COLD], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(2, 1, 8)\n", "")


# --- parameters as trees --------------------------------------------------------------------------------------------


def assert_same_structure(params, back, leaves):
    """Check that a tree came back as it was, of the same nodes, from leaves that are all arrays."""
    assert setattn.count_params(params) == sum(math.prod(leaf.shape) for leaf in leaves)
    assert repr(setattn.map_params(lambda a: 0, back)) == repr(setattn.map_params(lambda a: 0, params))


@on_jax
@every_case
def test_jax_trees(backend, name):
    """JAX takes every parameter tree apart and puts it together again, and knows its leaves by their names."""
    tree_util = importlib.import_module("jax").tree_util
    params = cases.make(name).trees(backend, "float32")[1]
    leaves, structure = tree_util.tree_flatten(params)
    assert_same_structure(params, tree_util.tree_unflatten(structure, leaves), leaves)
    doubled = tree_util.tree_map(lambda a: a + a, params)
    assert type(doubled) is type(params)


@on_torch
@every_case
def test_torch_trees(backend, name):
    """So does PyTorch."""
    pytree = importlib.import_module("torch.utils._pytree")
    params = cases.make(name).trees(backend, "float32")[1]
    leaves, structure = pytree.tree_flatten(params)
    assert_same_structure(params, pytree.tree_unflatten(leaves, structure), leaves)


@on_torch
@every_block
def test_torch_parameters(backend, name):
    """A module may hold the leaves as its parameters: they are used as they are and get their gradients."""
    torch = backend.xp
    case, value, bound = cases.expected(name, "float32")
    arrays, params, masks = case.trees(backend, "float32")
    module = torch.nn.Module()
    module.leaves = torch.nn.ParameterList()

    def register(a):
        module.leaves.append(a)
        return module.leaves[-1]

    out = case.call(arrays, setattn.map_params(register, params), masks)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")
    if list(module.parameters()):
        out.sum().backward()
        unused = [p for p in module.parameters() if p.grad is None]
        assert not unused or case.function == "attention_weights"  # which looks at neither values nor output


@on_torch
def test_torch_functional_call(backend):
    """A module whose parameters are a tree's leaves can be called with other ones in their place."""
    torch, pytree = backend.xp, importlib.import_module("torch.utils._pytree")
    case, value, bound = cases.expected("pma", "float32")
    arrays, params, masks = case.trees(backend, "float32")
    leaves, structure = pytree.tree_flatten(params)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.leaves = torch.nn.ParameterList(torch.zeros_like(leaf) for leaf in leaves)

        def forward(self, *arrays):
            return case.call(arrays, pytree.tree_unflatten(list(self.leaves), structure), masks)

    state = {f"leaves.{i}": leaf for i, leaf in enumerate(leaves)}
    out = torch.func.functional_call(Block(), state, arrays)
    tolerances.assert_close(out, value, bound, "pma float32")
