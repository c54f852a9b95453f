"""A traced call does what the call does, to other arrays than it was traced with, in fewer steps."""

from __future__ import annotations

import functools
import importlib
import operator
import tracemalloc
import warnings
from dataclasses import replace
from textwrap import dedent
from typing import NamedTuple
from unittest import mock

import array_api_compat
import cases
import numpy as np
import pytest
import strategies
import tolerances
from backends import BACKENDS
from hypothesis import strategies as st
from strategies import BLOCKS, blocks, for_all, made, rejects, same, seeds

import setattn
from setattn import _record

one_thread = strategies.one_thread

# JAX compiles each of them, which is tested of the calls themselves; here one of each will do.
MATRIX = [
    (b.name, dtype, name)
    for b in BACKENDS.values()
    if b.everywhere and b.module != "dask.array"
    for dtype in b.dtypes
    for name in (cases.NAMES if b.module != "jax.numpy" else cases.ONE_EACH if dtype == "float32" else ["mab"])
]
P = setattn.init_pma(8, num_seeds=2, num_heads=2, rng=0)
X, MASK = np.ones((5, 8), np.float32), np.ones(5, bool)
BOTH = pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)


def trace(case, arrays, params, masks, function=None):
    """Trace the call of a case, with arrays of any library."""
    none = (None,) if case.function == "perceiver_io" and len(arrays) == 1 else ()
    positional = () if case.params is None else (params,)
    function = function or getattr(setattn, case.function)
    return setattn.trace(function, *arrays, *none, *positional, **masks, **case.options)


def shuffled(case, seed):
    """A case with other numbers and other masks of the same shapes."""
    rng = np.random.default_rng(seed)
    arrays = tuple(rng.permuted(a, axis=-1) if a.dtype.kind == "f" else a for a in case.arrays)
    return replace(case, arrays=arrays, masks={key: rng.permuted(m, axis=-1) for key, m in case.masks.items()})


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype", "name"), MATRIX, indirect=["backend"])
def test_same_as_the_reference(backend, dtype, name):
    """Traced with other numbers and masks, it is within rounding of the reference, each time, and changes nothing."""
    case, value, bound = cases.expected(name, dtype)
    arrays, params, masks = case.trees(backend, dtype)
    others, _, other_masks = shuffled(case, 5).trees(backend, dtype)
    traced = trace(case, others, params, other_masks)
    before = [backend.numpy(a).tobytes() for a in (*arrays, *masks.values())]
    out, again = traced(*arrays, **masks), traced(*arrays, **masks)
    assert [backend.numpy(a).tobytes() for a in (*arrays, *masks.values())] == before
    same(backend.numpy(again), backend.numpy(out))
    assert array_api_compat.array_namespace(out) is array_api_compat.array_namespace(arrays[0])
    assert array_api_compat.device(out) == array_api_compat.device(arrays[0])
    assert out.dtype == arrays[0].dtype
    tolerances.assert_close(backend.numpy(out), value, bound, f"{case.function} {dtype}")


def check_traced(case, seed, factor=1.0):
    """Traced with numbers as they come, a call of larger ones is the call."""
    other = shuffled(case, seed)
    case = replace(case, arrays=tuple(a * a.dtype.type(factor) if a.dtype.kind == "f" else a for a in case.arrays))
    traced = trace(case, other.arrays, other.params, other.masks)
    with np.errstate(all="ignore"):
        same(traced(*case.arrays, **case.masks), case())


@pytest.mark.parametrize("name", BLOCKS)
def test_same_bits_as_the_call(name):
    """Sets of any size, masked in any way, on NumPy, are rounded as in the call itself."""
    for_all(check_traced, blocks(name), seeds)


def without_looks(function, x, *args):
    """What a look at numbers says, and no record of it."""
    return function(x.value, *args)


@pytest.mark.parametrize("name", ["sab", "pma", "perceiver"])
def test_same_bits_where_numbers_lead_elsewhere(name):
    """Squares that overflow where those of the example did not are noticed, and would not be without a look."""
    domains = blocks(name, least=1, batch=0, dtypes=("float32",)), seeds, st.just(1e25)
    for_all(check_traced, *domains)
    _record.kind_for.cache_clear()
    rejects(mock.patch.object(_record, "_look", without_looks), check_traced, *domains)
    _record.kind_for.cache_clear()


@pytest.mark.parametrize("shape", [(3000, 64), (40, 64, 64)])
@pytest.mark.parametrize("name", ["sab", "isab", "pma"])
def test_same_bits_in_blocks(name, shape):
    """Of sets that are worked through in blocks, too."""
    rng = np.random.default_rng(0)
    params = {
        "sab": lambda: setattn.init_mab(64, num_heads=4, rng=rng),
        "isab": lambda: setattn.init_isab(64, num_inducing=8, num_heads=4, rng=rng),
        "pma": lambda: setattn.init_pma(64, num_seeds=2, num_heads=4, rng=rng),
    }[name]()
    x, example = rng.standard_normal((2, *shape), dtype=np.float32)
    function = functools.partial(getattr(setattn, name), plan=setattn.Plan(block_size=700))
    same(setattn.trace(function, example, params)(x), function(x, params))


# --- what is constant -----------------------------------------------------------------------------------------------


@BOTH
def test_parameters_are_copied(backend):
    """What becomes of them later changes nothing, whichever way the numbers lead."""
    case = made("pma", "float32")
    (x,), params, masks = case.trees(backend, "float32")
    traced = trace(case, (x,), params, masks)
    wanted = [backend.numpy(traced(a, **masks)) for a in (x, x * 1e25)]
    setattn.map_params(lambda a: a.__imul__(3.0), params)
    for a, value in zip((x, x * 1e25), wanted, strict=True):
        same(backend.numpy(traced(a, **masks)), value)


@BOTH
def test_constant_results_are_new_each_time(backend):
    """Writing to a result reaches no later one, even where no number of the arrays is in it."""
    x = backend.asarray(np.ones((3, 2)), "float32")
    traced = setattn.trace(lambda x, p: {"x": x + 1.0, "constant": (p[0] * 2.0, p[0])}, x, (x,))
    for _ in range(2):
        out = traced(x)
        assert [backend.numpy(a).tolist()[0] for a in (out["x"], *out["constant"])] == [[2, 2], [2, 2], [1, 1]]
        for a in (out["x"], *out["constant"]):
            a.__imul__(3.0)


def test_options_and_absent_masks_are_constant():
    case = made("pma", "float64")
    call = functools.partial(setattn.pma, mask=None, activation="gelu", eps=1e-3, plan=setattn.Plan(threads=2))
    traced = setattn.trace(call, case.arrays[0], case.params)
    same(traced(case.arrays[0]), setattn.pma(case.arrays[0], case.params, activation="gelu", eps=1e-3))


def test_a_block():
    """With its options, and where the queries are the learned ones."""
    for name in ("isab", "perceiver_io"):
        case = made(name, "float32")
        block = setattn.Block(case.function, case.params, {"eps": 1e-3, **case.options})
        traced = setattn.trace(block, *case.arrays, **case.masks)
        same(traced(*case.arrays, **case.masks), block(*case.arrays, **case.masks))


# --- what is left to do ---------------------------------------------------------------------------------------------


def steps(traced):
    return [line for line in traced.source.splitlines() if " = " in line or line.strip().startswith("if ")]


SMALL = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)


@pytest.mark.parametrize(("backend", "most"), [("numpy", 59), ("torch", 32)], indirect=["backend"])
def test_one_small_set_takes_few_operations(backend, most):
    """What depends on parameters alone is not among them; views are."""
    params = backend.params(setattn.init_pma(64, num_seeds=1, num_heads=4, rng=0), "float32")
    traced = setattn.trace(setattn.pma, backend.asarray(SMALL, "float32"), params)
    assert len(steps(traced)) == most


def test_what_no_result_depends_on_is_left_out():
    def function(x):
        x.sum()
        return x * 2.0

    assert len(steps(setattn.trace(function, SMALL))) == 1


def test_memory_is_given_back_as_soon_as_may_be():
    """Of a chain of operations two results are held at a time."""

    def chain(x):
        for _ in range(20):
            x = x + 1.0
        return x

    x = np.ones(2**17)
    traced = setattn.trace(chain, x)
    tracemalloc.start()
    try:
        traced(x)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * x.nbytes
    finally:
        tracemalloc.stop()


def test_the_example_is_not_held():
    x = np.ones(2**17)
    tracemalloc.start()
    try:
        traced = setattn.trace(lambda x, p: x * p[0], x, (np.ones(1),))
        assert tracemalloc.get_traced_memory()[0] < x.nbytes / 2
    finally:
        tracemalloc.stop()
    assert traced(x).shape == x.shape


def test_source_can_be_read():
    def scaled(x, def_):
        return x * 2.0 + def_

    assert setattn.trace(scaled, np.ones(2), np.ones(2)).source == dedent(
        """\
        def scaled(x, def_):
            v2 = mul(x, 2.0)
            v3 = add(v2, def_)
            del v2
            return v3
        """
    )


# --- functions of one's own -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: object
    second: object


@pytest.mark.parametrize("backend", ["numpy", "torch", "strict"], indirect=True)
def test_a_function_of_several_blocks(backend):
    """Of the array API and of the operators of arrays, with results in trees."""

    def model(x, params, mask):
        xp = array_api_compat.array_namespace(x)
        h = setattn.isab(x, params[0], mask=mask)
        pooled = setattn.pma(h, params[1], mask=mask)
        weights = 1.0 / (1.0 + xp.exp(-xp.sum(pooled, axis=-1, keepdims=True)))
        return Pair([pooled[..., 0, :], weights], {"n": h.shape[0], "all": xp.concat([pooled, -pooled], axis=-1)})

    params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), P
    params = tuple(backend.params(p, "float32") for p in params)
    x, other = (backend.asarray(np.random.default_rng(seed).normal(size=(4, 5, 8)), "float32") for seed in (0, 1))
    mask = backend.asarray(np.arange(20).reshape(4, 5) % 3 > 0)
    got, wanted = setattn.trace(model, other, params, mask)(x, mask), model(x, params, mask)
    assert isinstance(got, Pair)
    assert got.second["n"] == 4
    for a, b in zip([*got.first, got.second["all"]], [*wanted.first, wanted.second["all"]], strict=True):
        same(backend.numpy(a), backend.numpy(b))


def test_a_branch_on_numbers_is_taken_anew():
    def function(x):
        return x * 2.0 if (x > 0).all() else np.where(x > 0, x, np.abs(x) + np.ones(x.shape))

    traced = setattn.trace(function, SMALL)
    for x in (SMALL, abs(SMALL) + 1):
        same(traced(x), function(x))


NUMBERS = {
    "float": lambda x: x * float(x.sum()),
    "int": lambda x: x[int(x.sum()) :],
    "index": lambda x: [1, 2, 3][x.sum()],
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x * x.sum().item(),
    "array": lambda x: np.asarray(x),
    "bytes": lambda x: x.tobytes(),
    "boolean index": lambda x: x[x > 0].sum() / x[x > 0].shape[0],
    "nonzero": lambda x: x[np.nonzero(x)],
    "unique": lambda x: np.unique(x),
    "where": lambda x: x * np.where(x > 0)[0].shape[0],
    "repeat": lambda x: np.repeat(x, (x[:, 0] > 0) + 1, axis=0),
    "arange": lambda x: space(x).arange(space(x).count_nonzero(x)),
    "tile": lambda x: np.tile(x[0], ((x > 0).sum(), 1)),
    "flat": lambda x: x * x.flat[0],
}
WRITTEN = {
    "item": lambda x: operator.setitem(x, 0, 1.0),
    "augmented": lambda x: operator.iadd(x * 2.0, 1.0),
    "out": lambda x: np.add(x, 1.0, out=x),
    "out of a function": lambda x: np.concatenate([x, x], out=x),
    "out of the namespace": lambda x: space(x).add(x, 1.0, out=x),
    "out of a method": lambda x: x.clip(0, 1, out=x),
    "by position": lambda x: np.clip(x, 0, 1, x),
    "sort": lambda x: x.sort(),
    "copyto": lambda x: np.copyto(np.zeros_like(x), x),
    "method of PyTorch": lambda x: x.add_(1.0),
}
space = array_api_compat.array_namespace


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_cannot_be_taken_out(name):
    with pytest.raises(setattn.ParameterError, match="trace: argument 'function' is one that takes numbers out"):
        setattn.trace(NUMBERS[name], np.ones((2, 2)))


@pytest.mark.parametrize("name", WRITTEN)
def test_arrays_cannot_be_written_to(name):
    with pytest.raises(setattn.ParameterError, match="'function' is one that writes to an array; wanted"):
        setattn.trace(WRITTEN[name], np.ones((2, 2)))


@pytest.mark.parametrize("name", ["relu_", "nn.functional.relu", "add"])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_tensors_cannot_be_written_to(backend, name):
    torch = importlib.import_module("torch")
    write = {
        "relu_": torch.relu_,
        "nn.functional.relu": functools.partial(torch.nn.functional.relu, inplace=True),
        "add": lambda x: torch.add(x, x, out=x),
    }[name]
    with pytest.raises(setattn.ParameterError, match="'function' is one that writes to an array; wanted"):
        setattn.trace(lambda x: write(x * 2.0), backend.asarray(X, "float32"))


def test_arrays_from_outside_are_as_they_were():
    """At each step: they may be written to, and are not frozen."""
    outside = np.ones(2)

    def function(x):
        k, total = np.zeros(8), x * 0.0
        for i in range(3):
            k[i] = 1.0
            total = total + x * k
        return total, space(x).asarray(outside), k

    traced = setattn.trace(function, X)
    assert outside.flags.writeable
    for got, wanted in zip(traced(X), function(X), strict=True):
        same(got, wanted)


def test_results_of_several_arrays_keep_their_kind():
    def function(x):
        largest = np.unravel_index(np.argmax(x), x.shape)
        return x[largest], np.linalg.svd(x).S, space(x).unstack(x)

    got, wanted = setattn.trace(function, SMALL[:5, :8])(X), function(X)
    same(got[0], wanted[0])
    same(got[1], wanted[1])
    assert isinstance(got[2], tuple)
    assert len(got[2]) == 5


class Holder:
    def __init__(self, a):
        self.a = a


@pytest.mark.parametrize("function", [Holder, lambda x: (a for a in x)])
def test_other_results_are_refused(function):
    with pytest.raises(setattn.ParameterError, match=r"'function' is one that returns a \w+; wanted one that returns"):
        setattn.trace(function, X)


def test_a_list_in_a_result_is_new_each_time():
    traced = setattn.trace(lambda x: (x, [1]), X)
    traced(X)[1].append(2)
    assert traced(X)[1] == [1]


def test_parameters_in_lists_and_dictionaries():
    params = {"p": [P, np.ones(8, np.float32)]}
    traced = setattn.trace(lambda x, p: setattn.pma(x, p["p"][0]) * p["p"][1], X, params)
    large = X * np.float32(1e25)
    params["p"][1] *= 3
    params["p"][0] = None
    same(traced(X), setattn.pma(X, P))
    same(traced(large), setattn.pma(large, P))


def test_blocks_among_the_arguments():
    blocks = setattn.Block("isab", setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)), setattn.Block("pma", P)
    traced = setattn.trace(lambda x, blocks: blocks[1](blocks[0](x)), X, blocks)
    same(traced(X + 1), blocks[1](blocks[0](X + 1)))


@pytest.mark.parametrize("name", ["v1", "v2", "c", "mul", "add", "lambda_", "x_"])
def test_words_of_the_source_do_not_meet(name):
    function = eval(f"lambda {name}: ({name} * 2.0 + {name}) * 3.0 + {name}[0]")
    same(setattn.trace(function, X)(X + 1), function(X + 1))


def test_layouts_in_blocks():
    """A result of several blocks lies in memory as it does in a call, whatever the layout of the data."""
    params = setattn.init_perceiver_resampler(12, num_latents=3, num_layers=2, num_heads=2, num_media=4, rng=0)
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((2, 4, 7, 12), dtype=np.float32))
    plan = setattn.Plan(block_size=3)
    traced = setattn.trace(setattn.perceiver_resampler, np.ones(x.shape, np.float32), params, plan=plan)
    same(traced(x), setattn.perceiver_resampler(x, params, plan=plan))


def test_numbers_of_constants_can():
    traced = setattn.trace(lambda x, p: x * float(p[0].sum()) if p[0].sum() > 1 else x, np.ones(2), (np.ones(3),))
    assert traced(np.ones(2)).tolist() == [3, 3]


# --- errors ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "no function": (lambda: setattn.trace(3, X), setattn.ParameterError, "trace: argument 'function' is a int; wanted"),
    "no array": (lambda: setattn.trace(setattn.pma, P), setattn.NamespaceError, "'arguments' is without an array"),
    "as the call": (
        lambda: setattn.trace(setattn.pma, X, P, activation="no"),
        setattn.OptionError,
        "pma: argument 'activation' is 'no'",
    ),
    "parameters from outside": (
        lambda: setattn.trace(lambda x: setattn.pma(x, P), X),
        setattn.NamespaceError,
        "is an array of numpy; wanted an array of numpy that setattn.trace records",
    ),
    "too few": (
        lambda: TRACED(),
        setattn.ParameterError,
        "is 0 by position; wanted 1 by position, 'mask' by name",
    ),
    "by position": (lambda: TRACED(X, MASK), setattn.ParameterError, "'arrays' is 2 by position; wanted 1"),
    "another name": (lambda: TRACED(X, mask=MASK, bias=X), setattn.ParameterError, "'bias' by name; wanted"),
    "shape": (
        lambda: TRACED(X[:4], mask=MASK),
        setattn.ShapeError,
        r"pma: argument 'x' has shape \(4, 8\); wanted \(5, 8\), as in the traced call",
    ),
    "dtype": (lambda: TRACED(X, mask=X[:, 0]), setattn.DTypeError, "'mask' has dtype float32; wanted bool, as in the"),
    "no such array": (
        lambda: TRACED([1], mask=MASK),
        setattn.NamespaceError,
        "'x' is a list; wanted an array",
    ),
}
TRACED = setattn.trace(setattn.pma, X, P, mask=MASK)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_another_byte_order_is_no_other_dtype():
    same(TRACED(X.astype(">f4"), mask=MASK), TRACED(X, mask=MASK))


def test_says_what_it_takes():
    assert repr(TRACED) == "<setattn.Traced pma: x (5, 8) of float32, mask (5,) of bool>"
    assert repr(setattn.trace(lambda *xs: xs[0], X, X)).endswith(">: xs[0] (5, 8) of float32, xs[1] (5, 8) of float32>")


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
def test_lazy_arrays_are_refused(backend):
    with pytest.raises(setattn.NamespaceError, match="'x' is an array of dask; wanted an array in memory"):
        setattn.trace(setattn.pma, backend.asarray(X, "float32"), P)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_parameters_of_another_library_are_refused(backend):
    """As in a call, and nested tensors, of which nothing can be asked."""
    x, params = backend.asarray(X, "float32"), backend.params(P, "float32")
    for arguments in ((X, params), (x, P)):
        with pytest.raises(setattn.NamespaceError, match=r"params.*is an array of .*; wanted an array of"):
            setattn.trace(setattn.pma, *arguments)
    torch = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype
        nested = torch.nested.nested_tensor([x, x])
    traced = setattn.trace(setattn.pma, x, params)
    for call in (lambda: setattn.trace(setattn.pma, nested, params), lambda: traced(nested)):
        with pytest.raises(setattn.NamespaceError, match="'x' is a nested tensor"):
            call()


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_arrays_of_another_library_or_layout_are_refused(backend):
    x = backend.asarray(X, "float32")
    with pytest.raises(setattn.NamespaceError, match="wanted an array of numpy, as the one of the traced call is"):
        TRACED(x, mask=MASK)
    traced = setattn.trace(setattn.pma, x, backend.params(P, "float32"))
    with pytest.raises(setattn.NamespaceError, match="a tensor of layout"):
        traced(x.to_sparse())


# --- gradients and transformations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_torch_gradients_reach_the_arrays_alone(backend, mode):
    """However it was traced; parameters that record gradients get none."""
    torch, case = importlib.import_module("torch"), made("pma", "float64")
    (x,), params, masks = case.trees(backend, "float64")
    setattn.map_params(lambda a: a.requires_grad_(), params)
    with getattr(torch, mode)():
        traced = trace(case, (torch.clone(x),), params, masks)
    gradients = []
    for call in (traced, functools.partial(setattn.pma, params=params, **case.options)):
        leaf = x.clone().requires_grad_()
        call(leaf, **masks).sum().backward()
        gradients.append(leaf.grad)
        if call is traced:
            assert all(a.grad is None for a in leaves(params))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def leaves(tree):
    found = []
    setattn.map_params(found.append, tree)
    return found


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_torch_vmap(backend):
    torch, case = importlib.import_module("torch"), made("sab", "float64")
    (x,), params, _ = case.trees(backend, "float64")
    traced = trace(case, (x[0],), params, {})
    torch.testing.assert_close(torch.func.vmap(traced)(x), torch.stack([traced(one) for one in x]))


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_jax_compiles_it(backend):
    """With the parameters as constants, also within a transformation."""
    jax, case = importlib.import_module("jax"), made("sab", "float32")
    (x,), params, _ = case.trees(backend, "float32")
    traced = trace(case, (x[0],), params, {})
    assert traced.source == ""
    with pytest.raises(setattn.ShapeError, match="as in the traced call"):
        traced(x)
    with pytest.raises(setattn.OptionError, match="sab: argument 'activation' is 'no'"):
        setattn.trace(setattn.sab, x, params, activation="no")
    for function in (lambda x: x * float(x.sum()), lambda x: x if x.sum() > 0 else -x):
        with pytest.raises(setattn.ParameterError, match="trace: argument 'function' is one that takes numbers out"):
            setattn.trace(function, x)
    wanted = np.stack([setattn.sab(one, params, **case.options) for one in x])
    for found in (jax.vmap(traced)(x), np.stack([jax.jit(traced)(one) for one in x])):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
