"""Every public function gives the reference's values on every backend, in namespace, device and dtype of its input."""

from __future__ import annotations

import importlib
import inspect

import array_api_compat
import cases
import numpy as np
import pytest
import tolerances
from backends import BACKENDS, EVERYWHERE

import setattn

# Where compiling or building a graph takes most of a second, every case runs in float32, and one case of each function
# in the other dtypes. JAX compiles what it runs, and all the faster for a run without optimising; uncompiled calls
# differ from compiled ones in where they find an array's device and in what they create, which is the same few lines
# everywhere. Without x64, what is compiled is the same program, by a test of test_dtypes.
SLOW = ("jax.numpy", "dask.array")
UNCOMPILED = ("mab", "gated_cross_attention", "fourier_features")
UNOPTIMISED = {"xla_backend_optimization_level": 0}
HELPERS = {"convert_params", "count_params", "layouts", "load", "map_params", "save", "trace"}


def names(backend, dtype):
    """The cases that are run on a backend in a dtype."""
    if backend.name == "jax-no-x64":
        return UNCOMPILED
    return cases.ONE_EACH if backend.module in SLOW and dtype != "float32" else cases.NAMES


MATRIX = [(b.name, dtype, name) for b in BACKENDS.values() for dtype in b.dtypes for name in names(b, dtype)]


def public_functions():
    """The public functions that take arrays: all but those that make, convert or count parameters."""
    functions = {name for name in setattn.__all__ if inspect.isfunction(getattr(setattn, name))}
    return {name for name in functions if not name.startswith("init_")} - HELPERS


def compiled(name, case, backend, dtype):
    """The function as it is used on a backend."""
    if backend.name != "jax":
        return case.call
    options = {} if dtype == "float32" and name in cases.ONE_EACH else UNOPTIMISED
    return importlib.import_module("jax").jit(case.call, compiler_options=options)


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_public_function_has_a_case():
    """A new function is not tested anywhere before it has a case."""
    assert public_functions() == {cases.make(name).function for name in cases.NAMES}


@pytest.mark.parametrize("name", [b.name for b in BACKENDS.values() if b.listed])
def test_every_advertised_backend_runs_every_function_in_every_dtype(name):
    """What the README lists is in the matrix."""
    for dtype in BACKENDS[name].dtypes:
        tested = {cases.make(case).function for backend, d, case in MATRIX if (backend, d) == (name, dtype)}
        assert tested == public_functions()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_case_runs_on_every_backend(name):
    """Each variant's values are compared at least once."""
    assert {case for backend, dtype, case in MATRIX if (backend, dtype) == (name, "float32")} == set(cases.NAMES)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", cases.NAMES)
def test_bounds_can_fail(name, dtype):
    """An error of eight times the bound would be seen, for every case and dtype."""
    _, value, bound = cases.expected(name, dtype)
    tolerances.assert_sensitive(value, bound, name)


# --- values, namespace, dtype, device --------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype", "name"), MATRIX, indirect=["backend"])
def test_same_as_the_reference(backend, dtype, name):
    """Every backend is within rounding of the reference, computes nothing early and repeats itself bit for bit."""
    case, value, bound = cases.expected(name, dtype)
    trees, call = case.trees(backend, dtype), compiled(name, case, backend, dtype)
    with backend.lazily():
        out = call(*trees)
    first = trees[0][0]
    assert out.dtype == first.dtype
    assert out.shape == value.shape
    assert array_api_compat.array_namespace(out) is array_api_compat.array_namespace(first)
    assert array_api_compat.device(out) == array_api_compat.device(first)
    result = backend.numpy(out)
    tolerances.assert_close(result, value, bound, f"{case.function} {dtype}")
    if backend.module != "dask.array" or case.function == "mab":
        np.testing.assert_array_equal(backend.numpy(call(*trees)), result)


# --- memory ---------------------------------------------------------------------------------------------------------


def leaves(trees):
    """All arrays of nested tuples and dicts."""
    if isinstance(trees, dict | tuple):
        parts = trees.values() if isinstance(trees, dict) else trees
        return [leaf for part in parts for leaf in leaves(part)]
    return [trees]


@pytest.mark.parametrize("backend", [b for b in EVERYWHERE if BACKENDS[b].module not in SLOW], indirect=True)
@pytest.mark.parametrize("name", cases.NAMES)
def test_nothing_is_changed(backend, name):
    """Arrays, masks and parameters are the same bytes after a call as before, where they could be changed at all."""
    case = cases.make(name)
    trees = case.trees(backend, "float32")
    before = [backend.numpy(leaf).tobytes() for leaf in leaves(trees)]
    case.call(*trees)
    assert [backend.numpy(leaf).tobytes() for leaf in leaves(trees)] == before


def storage(a):
    """Where the memory of an array of NumPy or PyTorch begins."""
    while isinstance(getattr(a, "base", None), np.ndarray):
        a = a.base
    return a.ctypes.data if isinstance(a, np.ndarray) else a.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("name", cases.NAMES)
def test_results_share_no_memory(backend, name):
    """Writing to a result reaches no input."""
    case = cases.make(name)
    trees = case.trees(backend, "float32")
    assert storage(case.call(*trees)) not in {storage(leaf) for leaf in leaves(trees)}


@pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)
def test_no_layers_still_make_a_copy(backend):
    """With nothing to do, the result is not the input itself."""
    x = backend.asarray(np.ones((3, 4)), "float32")
    out = setattn.latent_transformer(x, ())
    np.testing.assert_array_equal(backend.numpy(out), np.ones((3, 4)))
    assert storage(out) != storage(x)


# --- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 0)), 0, -1),
    "every-other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "negative-stride": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "all-negative": lambda a: np.flip(np.flip(a).copy()),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), dtype=a.dtype, offset=1).reshape(a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.ONE_EACH)
def test_layouts_of_numpy(name, layout):
    """How arrays, masks and parameters lie in memory does not matter."""
    case, value, bound = cases.expected(name, "float32")
    arrays, params, masks = case.trees(BACKENDS["numpy"], "float32")
    arrays, masks = tuple(map(LAYOUTS[layout], arrays)), {key: LAYOUTS[layout](m) for key, m in masks.items()}
    out = case.call(arrays, setattn.map_params(LAYOUTS[layout], params), masks)
    assert out.dtype == np.float32
    tolerances.assert_close(out, value, bound, f"{case.function} float32")


@pytest.mark.parametrize("part", ["arrays", "params"])
def test_byte_orders_mix(part):
    """Big-endian data meet native parameters, and the other way round: a byte order is no dtype of its own."""
    case, value, bound = cases.expected("isab", "float32")
    arrays, params, masks = case.trees(BACKENDS["numpy"], "float32")
    if part == "arrays":
        arrays = tuple(map(LAYOUTS["big-endian"], arrays))
    else:
        params = setattn.map_params(LAYOUTS["big-endian"], params)
    tolerances.assert_close(case.call(arrays, params, masks), value, bound, "isab float32")


@pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("name", [n for n in cases.ONE_EACH if not n.endswith("_features")])
def test_stride_0(backend, name):
    """A batch, a set and a mask that are one entry broadcast give what their copies give."""
    case = cases.make(name).rounded("float32")
    arrays = tuple(a[:1, ..., :1, :] if a.ndim > 2 else a[:1, :] for a in case.arrays)
    masks = {key: m[:1] for key, m in case.masks.items()}
    small = case.trees(backend, "float32")

    def spread(like, a):
        converted = backend.asarray(a, "float32")
        return backend.xp.broadcast_to(converted, tuple(like.shape))

    trees = tuple(map(spread, case.arrays, arrays)), small[1], {k: spread(case.masks[k], m) for k, m in masks.items()}
    full = cases.replace(
        case,
        arrays=tuple(np.broadcast_to(a, like.shape) for a, like in zip(arrays, case.arrays, strict=True)),
        masks={key: np.broadcast_to(m, case.masks[key].shape) for key, m in masks.items()},
    )
    value, bound = cases.reference(full, "float32")
    tolerances.assert_close(backend.numpy(case.call(*trees)), value, bound, f"{case.function} float32")


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("name", cases.ONE_EACH)
def test_layouts_of_torch(backend, name):
    """Strides do not matter to PyTorch's kernels either."""
    case, value, bound = cases.expected(name, "float32")
    arrays, params, masks = case.trees(backend, "float32")

    def transposed(a):
        return a.movedim(-1, 0).contiguous().movedim(0, -1)

    out = case.call(tuple(map(transposed, arrays)), setattn.map_params(transposed, params), masks)
    tolerances.assert_close(backend.numpy(out), value, bound, f"{case.function} float32")


# --- lazy arrays ----------------------------------------------------------------------------------------------------

CHUNKINGS = {
    "one": lambda shape: shape,
    "set-uneven": lambda shape: (*shape[:-2], (1, shape[-2] - 1), shape[-1]),
    "rows": lambda shape: (*(1,) * (len(shape) - 1), shape[-1]),
    "set-empty": lambda shape: (*shape[:-2], (1, 0, shape[-2] - 1, 0), shape[-1]),
    "batch-empty": lambda shape: ((0, 1, 0, shape[0] - 1), *shape[1:]),
    "features": lambda shape: (*shape[:-1], max(1, shape[-1] // 2)),
}


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
@pytest.mark.parametrize(
    ("name", "chunking"),
    [
        *[("isab", chunking) for chunking in CHUNKINGS],
        ("attention-grouped", "rows"),
        ("attention-pairs-and-bias", "set-empty"),
        ("perceiver_resampler-frames", "set-uneven"),
        ("perceiver_resampler-frames", "set-empty"),
        ("gated_cross_attention", "set-uneven"),
        ("gated_cross_attention", "set-empty"),
    ],
)
def test_chunks_do_not_matter(backend, name, chunking):
    """Whatever axis is cut, and though some chunks be empty, nothing is computed early and the value is the same."""
    case, value, bound = cases.expected(name, "float32")
    da, cut = backend.xp, CHUNKINGS[chunking]
    arrays = tuple(da.from_array(a.astype("float32"), chunks=cut(a.shape)) for a in case.arrays)
    masks = {
        key: da.from_array(m if m.dtype == bool else m.astype("float32"), chunks=cut((*m.shape, 1))[:-1])
        for key, m in case.masks.items()
    }
    params = setattn.map_params(lambda a: backend.asarray(a, "float32"), case.params)  # cut as well
    with backend.lazily():
        out = case.call(arrays, params, masks)
    tolerances.assert_close(backend.numpy(out), value, bound, f"{case.function} float32")


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
def test_computing_early_would_be_noticed(backend):
    """The scheduler of these tests refuses to compute."""
    with backend.lazily(), pytest.raises(AssertionError, match="computed"):
        bool(backend.asarray(np.ones(3), "float32").sum() > 0)


BY_CHUNKS = {
    *("mab", "sab", "isab", "pma", "set_transformer", "attention_pool", "cross_attention", "latent_transformer"),
    *("perceiver", "perceiver_io", "perceiver_resampler"),
}


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
@pytest.mark.parametrize("name", cases.ONE_EACH)
def test_unknown_chunk_sizes_are_refused(backend, name):
    """Arrays and masks whose sizes Dask does not know are refused with the way out, where they have to be known."""
    case = cases.make(name)
    arrays, params, masks = case.trees(backend, "float32")

    def unknown(a, axis):
        keep = backend.asarray(np.ones(a.shape[axis], dtype=bool))
        return backend.xp.compress(keep, a, axis=axis)

    def refused(argument, arrays, masks):
        with backend.lazily(), pytest.raises(setattn.ShapeError, match=r"compute_chunk_sizes\(\)") as caught:
            case.call(arrays, params, masks)
        assert caught.value.argument == argument

    signature = list(inspect.signature(getattr(setattn, case.function)).parameters)
    by_chunks = case.function in BY_CHUNKS
    for i, a in enumerate(arrays):
        for axis in range(a.ndim):
            if by_chunks and axis < a.ndim - 1:
                continue
            refused(signature[i], (*arrays[:i], unknown(a, axis), *arrays[i + 1 :]), masks)
    for key, m in masks.items() if not by_chunks else ():
        refused(key, arrays, masks | {key: unknown(m, m.ndim - 1)})


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
def test_the_way_out_of_unknown_chunk_sizes(backend):
    """Elements picked from a Dask array are a set once their number is known, though some chunks be left with none."""
    case = cases.make("isab").rounded("float32")
    keep = np.array([True, False, False, True, True, False, True])
    case = cases.replace(case, arrays=(case.arrays[0][0],), masks={})
    params = backend.params(case.params, "float32")
    x = backend.xp.from_array(case.arrays[0].astype("float32"), chunks=((1, 2, 2, 1, 1), -1))
    picked = x[backend.xp.from_array(keep, chunks=x.chunks[0])].compute_chunk_sizes()
    assert picked.chunks[0] == (1, 0, 2, 0, 1)
    with backend.lazily():
        out = setattn.isab(picked, params)
    value, bound = cases.reference(cases.replace(case, arrays=(case.arrays[0][keep],)), "float32")
    tolerances.assert_close(backend.numpy(out), value, bound, "isab float32")
