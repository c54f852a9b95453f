"""A traced call does what the call does, to other arrays than it was traced with, in fewer steps."""

from __future__ import annotations

import functools
import importlib
import tracemalloc
from dataclasses import replace

import array_api_compat
import cases
import numpy as np
import pytest
import strategies
import tolerances
from backends import BACKENDS
from hypothesis import strategies as st
from strategies import blocks, for_all, rejects, same

import setattn
from setattn import _kernels, _record

one_thread = strategies.one_thread

# JAX compiles each case, by the same means as in test_backends, where all of them are: one of each is enough here.
MATRIX = [
    (b.name, dtype, name)
    for b in BACKENDS.values()
    if b.everywhere and b.module != "dask.array"
    for dtype in b.dtypes
    for name in (cases.NAMES if b.module != "jax.numpy" else cases.ONE_EACH if dtype == "float32" else ["mab"])
]


def trace(case, trees):
    """Trace the call of a case."""
    arrays, params, masks = trees
    none = (None,) if case.function == "perceiver_io" and len(arrays) == 1 else ()
    positional = () if case.params is None else (params,)
    return setattn.trace(getattr(setattn, case.function), *arrays, *none, *positional, **masks, **case.options)


def small():
    """A call of a few elements."""
    return cases.made("pma", "float32") if hasattr(cases, "made") else strategies.made("pma", "float32")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype", "name"), MATRIX, indirect=["backend"])
def test_same_as_the_reference(backend, dtype, name):
    """Traced with other numbers and other masks, it is within rounding of the reference."""
    case, value, bound = cases.expected(name, dtype)
    rng = np.random.default_rng(5)
    others = replace(case, masks={key: rng.permuted(m, axis=-1) for key, m in case.masks.items()})
    others = replace(others, arrays=tuple(rng.normal(size=a.shape) if a.dtype.kind == "f" else a for a in case.arrays))
    arrays, params, masks = case.trees(backend, dtype)
    traced = trace(case, (others.trees(backend, dtype)[0], params, others.trees(backend, dtype)[2]))
    out = traced(*arrays, **masks)
    assert array_api_compat.array_namespace(out) is array_api_compat.array_namespace(arrays[0])
    assert array_api_compat.device(out) == array_api_compat.device(arrays[0])
    assert out.dtype == arrays[0].dtype
    tolerances.assert_close(backend.numpy(out), value, bound, f"{case.function} {dtype}")


def check_traced(case, seed):
    """A traced call gives what the call gives, for numbers, masks and queries that it has not seen."""
    rng = np.random.default_rng(seed)
    other = replace(
        case,
        arrays=tuple(rng.permuted(a, axis=-2) if a.dtype.kind == "f" else a for a in case.arrays),
        masks={key: rng.permuted(m, axis=-1) for key, m in case.masks.items()},
    )
    traced = trace(other, (other.arrays, other.params, other.masks))
    strategies.agree(traced(*case.arrays, **case.masks), case(), 2 * case.bound(), f"traced {case.function}")


@pytest.mark.usefixtures("one_thread")
def test_same_as_the_call():
    for_all(check_traced, blocks(), st.integers(0, 99))
