"""Parameter trees are plain data: mapped, counted, converted, pickled, and pytrees of JAX and PyTorch."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import array_api_compat
import cases
import numpy as np
import pytest
from backends import BACKENDS

import setattn
from setattn import DTypeError, FeedForward, LayerNorm, Linear, NamespaceError, ParameterError, RMSNorm

ALL = {name: cases.make(name).params for name in cases.NAMES if cases.make(name).params is not None}
TREE = ALL["set_transformer"]


def leaves(params: Any) -> list[Any]:
    found: list[Any] = []
    setattn.map_params(found.append, params)
    return found


def float32(params: Any) -> Any:
    return setattn.map_params(np.float32, params)


def same_bits(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def structure(params: Any) -> Any:
    return setattn.map_params(lambda _: 0, params)


# --- map and count --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_map_keeps_the_structure(name):
    params = ALL[name]
    doubled = setattn.map_params(lambda a: 2 * a, params)
    assert structure(doubled) == structure(params)
    for a, b in zip(leaves(params), leaves(doubled), strict=True):
        np.testing.assert_array_equal(2 * a, b)


def test_map_goes_through_the_leaves_in_the_order_of_the_fields():
    tree = FeedForward(Linear(1, 2), (), Linear(3))
    assert leaves(tree) == [1, 2, 3]
    assert setattn.map_params(str, tree) == FeedForward(Linear("1", "2"), (), Linear("3"))
    assert setattn.map_params(str, (tree, ())) == (setattn.map_params(str, tree), ())
    assert setattn.map_params(str, ()) == ()
    assert setattn.map_params(str, 5) == "5"


@pytest.mark.parametrize("name", ALL)
def test_count(backend, name):
    if name in ("mab", "set_transformer", "perceiver"):
        params = ALL[name]
        assert setattn.count_params(backend.params(params, "float32")) == sum(a.size for a in leaves(params))


def test_count_of_little():
    assert setattn.count_params(()) == 0
    assert setattn.count_params(np.ones((3, 4))) == 12
    assert setattn.count_params(np.ones(())) == 1
    assert setattn.count_params((np.ones(3), (Linear(np.ones((2, 2))), ()))) == 7


@pytest.mark.parametrize("wrong", [None, (1, 2), 1.5, [np.ones(3)], {"weight": np.ones(3)}, (np.ones(3), None)])
def test_count_of_what_is_no_tree_of_arrays(wrong):
    with pytest.raises(NamespaceError, match=r"^count_params: .* is holding a \w+; wanted arrays alone$"):
        setattn.count_params(wrong)


@pytest.mark.parametrize("wrong", [3, None, TREE, "relu"])
@pytest.mark.parametrize("params", [TREE, ()])
def test_map_without_a_function(wrong, params):
    message = rf"^map_params: argument 'function' is a {type(wrong).__name__}; wanted a function of one array$"
    with pytest.raises(ParameterError, match=message):
        setattn.map_params(wrong, params)


# --- trees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_pickled_and_copied_bit_for_bit(name):
    for other in (pickle.loads(pickle.dumps(ALL[name])), copy.deepcopy(ALL[name])):
        same_bits(other, ALL[name])
        assert structure(other) == structure(ALL[name])


@pytest.mark.parametrize(
    "kind",
    [
        v
        for v in vars(setattn).values()
        if inspect.isclass(v)
        and issubclass(v, tuple)
        and v not in (setattn.Plan, setattn.Order, setattn.Layout)  # which hold no arrays
    ],
    ids=lambda k: k.__name__,
)
def test_nodes_are_plain_named_tuples(kind):
    assert kind.__mro__ == (kind, tuple, object)
    own = {name for name in vars(kind) if not name.startswith("_")}
    assert own == set(kind._fields)
    assert all(default == () for default in kind._field_defaults.values())
    with pytest.raises(AttributeError):
        kind(*range(len(kind._fields)))[0].x = 1


def test_kinds_of_norm_are_told_apart():
    assert structure(LayerNorm(1)) != structure(RMSNorm(1)) or type(LayerNorm(1)) is not type(RMSNorm(1))
    assert TREE.encoder[0] is not TREE.encoder[1]


def test_trees_of_jax():
    jax = pytest.importorskip("jax")
    for params in ALL.values():
        flat, tree = jax.tree_util.tree_flatten(params)
        assert len(flat) == len(leaves(params))
        assert all(a is b for a, b in zip(flat, leaves(params), strict=True))
        again = jax.tree_util.tree_unflatten(tree, flat)
        assert type(again) is type(params)
        same_bits(again, params)


def test_trees_of_torch():
    pytree = pytest.importorskip("torch.utils._pytree")
    for params in ALL.values():
        flat, tree = pytree.tree_flatten(params)
        assert all(a is b for a, b in zip(flat, leaves(params), strict=True))
        again = pytree.tree_unflatten(flat, tree)
        assert type(again) is type(params)
        same_bits(again, params)


# --- conversion -----------------------------------------------------------------------------------------------------


def test_there_and_back(backend, dtype):
    """To a backend and back to NumPy; a change of dtype is a change of rounding alone."""
    params = float32(TREE)
    device = backend.target
    there = setattn.convert_params(params, backend.xp, device=device, dtype=backend.dtype(dtype))
    assert structure(there) == structure(params)
    for a in leaves(there):
        assert a.dtype == backend.dtype(dtype)
        assert array_api_compat.array_namespace(a) is array_api_compat.array_namespace(
            backend.asarray(np.ones(1), "float32")
        )
        assert device is None or a.device == device
    back = setattn.convert_params(there, np, dtype=np.float32)
    if dtype == "bfloat16":
        # Round to the 8 leading bits, ties to even.
        bits = [a.view(np.uint32).astype(np.uint64) for a in leaves(params)]
        wanted = [((b + 0x7FFF + ((b >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32) for b in bits]
    else:
        wanted = [a.astype(dtype).astype(np.float32) for a in leaves(params)]
    for a, b in zip(leaves(back), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    if dtype in ("float64", "float32"):
        same_bits(back, params)


def test_keeps_the_dtype_unless_told(backend):
    dtype = backend.dtypes[0]
    there = setattn.convert_params(backend.params(TREE, dtype), backend.xp)
    assert {str(a.dtype) for a in leaves(there)} == {str(leaves(backend.params(TREE, dtype))[0].dtype)}


def test_nothing_is_copied_where_nothing_changes(backend):
    params = setattn.convert_params(backend.params(TREE, "float32"), backend.xp)
    for options in ({}, {"dtype": backend.dtype("float32")}):
        for xp in (backend.xp, array_api_compat.array_namespace(leaves(params)[0])):
            for a, b in zip(leaves(params), leaves(setattn.convert_params(params, xp, **options)), strict=True):
                assert a is b


@pytest.mark.parametrize("source", ["torch", "jax", "dask", "strict", "numpy"])
@pytest.mark.parametrize("target", ["torch", "jax", "dask", "strict", "numpy"])
def test_from_any_library_to_any_other(source, target):
    for name in (source, target):
        if reason := BACKENDS[name].missing():
            pytest.skip(reason)
    params = float32(ALL["mab"])
    there = setattn.convert_params(BACKENDS[source].params(params, "float32"), BACKENDS[target].xp)
    assert type(leaves(there)[0]) is type(BACKENDS[target].asarray(np.ones(3)))
    same_bits(setattn.map_params(BACKENDS[target].numpy, there), params)


def test_numbers_out_of_the_ordinary_arrive_bit_for_bit(backend):
    tiny = np.finfo(np.float32).tiny
    a = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, tiny / 4, np.finfo(np.float32).max], np.float32)
    there = setattn.convert_params(Linear(a), backend.xp, device=backend.target)
    same_bits(setattn.convert_params(there, np), Linear(a))


def test_views_of_any_layout(backend):
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    read_only = a.copy()
    read_only.flags.writeable = False
    device = backend.target
    swapped = a.astype(a.dtype.newbyteorder())
    for view in (a.T, a[::-1, ::2], np.asfortranarray(a), np.broadcast_to(a[0], (4, 6)), read_only, swapped):
        there = setattn.convert_params(view, backend.xp, device=device, dtype=backend.dtype("float32"))
        np.testing.assert_array_equal(backend.numpy(there), view)


def test_the_converted_tree_is_what_a_call_takes(backend):
    case = cases.make("mab")
    device = backend.target
    dtype = backend.dtype("float32")
    x, y, params = setattn.convert_params((*case.arrays, case.params), backend.xp, device=device, dtype=dtype)
    out = setattn.mab(x, y, params)
    np.testing.assert_allclose(backend.numpy(out), setattn.mab(*case.arrays, case.params), rtol=1e-4, atol=1e-5)


def test_torch_parameters_that_need_gradients():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones((2, 3)))
    assert isinstance(setattn.convert_params(Linear(weight), np).weight, np.ndarray)
    assert setattn.convert_params(Linear(weight), torch).weight is weight
    wide = setattn.convert_params(Linear(weight), torch, dtype=torch.float64).weight
    assert wide.requires_grad


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xp", [None, "numpy", np.ma, np.ndarray, 5, pytest, np.ones(3)])
def test_no_array_library(xp):
    with pytest.raises(NamespaceError, match=r"^convert_params: argument 'xp' is .*; wanted the module of an array "):
        setattn.convert_params(TREE, xp)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "complex64"])
def test_no_real_floating_dtype(backend, dtype):
    wrong = dtype if dtype == "float32" else getattr(backend.xp, dtype, None) or np.dtype(dtype)
    with pytest.raises(DTypeError, match=r"^convert_params: argument 'dtype' is .*; wanted a real floating dtype of "):
        setattn.convert_params(TREE, backend.xp, dtype=wrong)


def test_dtype_of_another_library():
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match=r"is torch.float32; wanted a real floating dtype of numpy"):
        setattn.convert_params(TREE, np, dtype=torch.float32)


def test_dtype_of_numpy_for_a_library_that_has_its_own():
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match=r"is <class 'numpy.float32'>; wanted a real floating dtype of torch"):
        setattn.convert_params(TREE, torch, dtype=np.float32)


@pytest.mark.parametrize(
    ("source", "target", "dtype"),
    [
        ("numpy", "strict", "float16"),
        ("torch", "strict", "bfloat16"),
        ("torch", "numpy", "bfloat16"),
        ("jax", "numpy", "bfloat16"),
        ("torch", "dask", "bfloat16"),
    ],
)
def test_dtype_that_the_library_lacks(source, target, dtype):
    """Nothing becomes another dtype unasked; where one is given, the values are the same."""
    for name in (source, target):
        if reason := BACKENDS[name].missing():
            pytest.skip(reason)
    source, target = BACKENDS[source], BACKENDS[target]
    there = source.params(Linear(np.ones((2, 3)), np.full(3, 0.75)), dtype)
    with pytest.raises(DTypeError) as caught:
        setattn.convert_params(there, target.xp)
    assert caught.value.argument == "params"
    assert str(caught.value.got).endswith(dtype)
    assert str(caught.value).endswith(f" or another one by dtype=: {target.xp.__name__.split('.')[0]} has no {dtype}")
    wide = setattn.convert_params(there, target.xp, dtype=target.dtype("float32"))
    assert target.numpy(wide.bias).tolist() == [0.75] * 3


def test_bfloat16_from_one_library_that_has_it_to_another():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    a = torch.asarray([1.0, 0.3, -2.0], dtype=torch.bfloat16)
    there = setattn.convert_params(a, jax.numpy)
    assert there.dtype == jax.numpy.bfloat16
    back = setattn.convert_params(there, torch)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, a)


@pytest.mark.parametrize("backend", ["jax-no-x64"], indirect=True)
def test_float64_where_jax_would_make_float32_of_it(backend):
    jnp = backend.xp
    with pytest.raises(DTypeError, match=r"'dtype' is float64; wanted .*: jax has float64 only with jax_enable_x64"):
        setattn.convert_params(float32(TREE), jnp, dtype=jnp.float64)
    with pytest.raises(DTypeError, match=r"'params' is holding an array of dtype float64; .* jax_enable_x64"):
        setattn.convert_params(setattn.map_params(lambda a: a.astype("float64"), TREE), jnp)
    assert leaves(setattn.convert_params(TREE, jnp, dtype=jnp.float32))[0].dtype == jnp.float32


@pytest.mark.parametrize("wrong", [None, 1.0, [1.0, 2.0], np.float32(1), "weight", {}, np.ones((2, 2)).view(np.matrix)])
def test_leaves_that_are_no_arrays(backend, wrong):
    message = f"^convert_params: argument 'params' is holding a {type(wrong).__name__}; wanted arrays alone$"
    with pytest.raises(NamespaceError, match=message):
        setattn.convert_params(Linear(np.ones((2, 2), np.float32), wrong), backend.xp)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "object", "longdouble"])
def test_leaves_of_other_dtypes(backend, dtype):
    a = np.ones((2, 2)).astype(dtype)
    if np.finfo(np.longdouble).bits == 64 and dtype == "longdouble":
        pytest.skip("long double is double here")
    with pytest.raises(DTypeError, match=r"^convert_params: argument 'params' is holding an array of dtype "):
        setattn.convert_params(Linear(a), backend.xp, dtype=backend.dtype("float32"))


def test_unknown_device(backend):
    with pytest.raises(NamespaceError) as caught:
        setattn.convert_params(TREE, backend.xp, device="nowhere")
    assert (caught.value.argument, caught.value.got) == ("device", "'nowhere'")
    assert "\n" not in str(caught.value)


def test_device_that_lacks_the_dtype():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(NamespaceError, match=r"argument 'device' is .*no_float64"):
        setattn.convert_params(TREE, strict, device=strict.Device("no_float64"))


def test_torch_arrays_without_data():
    torch = pytest.importorskip("torch")
    with pytest.raises(NamespaceError, match=r"of dtype torch.float32; wanted arrays that can be copied to numpy"):
        setattn.convert_params(Linear(torch.ones((2, 2), device="meta")), np)
