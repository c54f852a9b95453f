"""Every function against the oracle, within the derived bound of its rounding errors, element by element.

The reference of float64 has 50 digits; that of float32 and float16, which are computed in float32, is float64 with sums
that are rounded once. The largest error / bound of every function and dtype is recorded under its name.
"""

from __future__ import annotations

import math

import cases
import defects
import numpy as np
import pytest
import strategies
import tolerances
from hypothesis import strategies as st
from strategies import Drawn, blocks, for_all, rejects, seeds

import setattn
from setattn._params import is_absent

one_thread = strategies.one_thread

DTYPES = ("float64", "float32", "float16")


def is_the_oracles(case: Drawn) -> None:
    """Compare a call with the oracle."""
    with np.errstate(all="raise"):
        result = case()
    value, bound = case.reference()
    assert result.dtype == case.dtype
    tolerances.assert_close(result, value, bound, f"{case.function} in {case.dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.NAMES)
def test_cases(name, dtype):
    """Every common case has the oracle's values; an error of eight times the bound would be seen."""
    case = strategies.made(name, dtype)
    is_the_oracles(case)
    if dtype != "float64":
        value, bound = case.reference()
        tolerances.assert_sensitive(value, bound, name)


# A reference of 50 digits takes its time.
_SMALL = {"set_transformer": 3, "perceiver_resampler": 3, "latent_transformer": 3, "perceiver_io": 3, "isab": 3}


def drawn(name: str, dtype: str, **kwargs) -> st.SearchStrategy:
    most = _SMALL.get(name, 5) if dtype == "float64" else 11
    batch = 0 if dtype == "float64" else None
    return blocks(name, **({"dtypes": (dtype,), "most": most, "batch": batch} | kwargs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_variations(name, dtype):
    """Drawn variations of every block, in size, parts, masks, values and options, have the oracle's values."""
    for_all(is_the_oracles, drawn(name, dtype), share=0.12 if dtype == "float64" else 0.2)


@pytest.mark.parametrize("name", ["attention", "pma", "isab"])
def test_larger_sets(name):
    """Sets of up to 33 elements, in batches, have the oracle's values."""
    for_all(is_the_oracles, drawn(name, "float32", most=33, least=17), share=0.15)


@st.composite
def positions(draw: st.DrawFn) -> Drawn:
    """Draw positions to encode."""
    shape = (*draw(st.sampled_from(((), (3,), (2, 5), (0,)))), draw(st.integers(1, 3)))
    rng, dtype = np.random.default_rng(draw(seeds)), draw(st.sampled_from(DTYPES))
    one = draw(st.booleans())
    options = {
        "num_bands": draw(st.integers(1, 6)),
        "max_resolution": 10.0 if one else tuple(rng.uniform(2, 64, size=shape[-1]).tolist()),
        "concat_position": draw(st.booleans()),
        "order": draw(st.sampled_from(("grouped", "per_axis"))),
    }
    return Drawn("fourier_features", (rng.uniform(-1, 1, size=shape).astype(dtype),), None, {}, options)


def test_fourier_features():
    """Position encodings have the oracle's values."""
    for_all(is_the_oracles, positions())


@st.composite
def places(draw: st.DrawFn) -> Drawn:
    """Draw places to encode."""
    shape = (*draw(st.sampled_from(((), (3,), (2, 5), (0,)))), draw(st.integers(1, 3)))
    rng, dtype = np.random.default_rng(draw(seeds)), draw(st.sampled_from(DTYPES))
    options = {"dim": 2 * shape[-1] * draw(st.integers(1, 9)), "temperature": draw(st.sampled_from((1e4, 100.0, 0.5)))}
    return Drawn("sincos_features", (rng.uniform(-9, 70, size=shape).astype(dtype),), None, {}, options)


def test_sincos_features():
    """Encodings of places have the oracle's values."""
    for_all(is_the_oracles, places())


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_scores_that_are_off_are_noticed(name):
    """In every function, the oracle finds scores that are a thousandth too large."""
    if name == "attention_weights":
        domain = drawn(name, "float32", least=2)
    else:
        domain = drawn(name, "float32", least=2, ladders=("normal",), scales=(None, 3.0))
    rejects(defects.rescaled(), is_the_oracles, domain)


@pytest.mark.parametrize(
    "defect",
    [
        lambda: defects.rescaled(1 + 1e-5),
        lambda: defects.shrunk(1e-5),
        lambda: defects.positional(1e-5),
        lambda: defects.finite_fill(-12.0),
        defects.dropped,
        defects.mask_ignored,
        defects.mask_of_the_neighbour,
        defects.pair_mask_ignored,
        defects.over_the_queries,
        defects.quadratic,
    ],
    ids=["scale", "sum", "place", "fill", "last", "mask", "shift", "pairs", "axis", "square"],
)
def test_defects_of_attention_are_noticed(defect):
    """The oracle finds each of these defects, the small ones of one part in 10^5 among them, in float32."""
    rejects(defect(), is_the_oracles, drawn("attention", "float32", least=2))


def with_length(name: str, **kwargs) -> st.SearchStrategy:
    """Calls whose factor on the queries is large enough to matter."""
    domain = drawn(name, "float32", **({"least": 2, "ladders": ("normal",), "scales": (3.0,)} | kwargs))
    return domain.filter(lambda case: not all(is_absent(part) for part in length_scales(case.params)))


def length_scales(tree) -> list:
    """Every ``length_scale`` of a parameter tree, absent or not."""
    if isinstance(tree, setattn.Attention):
        return [tree.length_scale]
    return [found for part in tree for found in length_scales(part)] if isinstance(tree, tuple) else []


@pytest.mark.parametrize("name", ["attention", "attention_weights", "isab", "perceiver_resampler"])
def test_a_wrong_number_of_elements_is_noticed(name):
    """The oracle finds logarithms of lengths that are off, that count what is masked, or a part of what is seen."""
    for_all(is_the_oracles, with_length(name), share=0.2)
    rejects(defects.length_off(1e-4), is_the_oracles, with_length(name))
    rejects(defects.length_of_all(), is_the_oracles, with_length(name, some=True))
    if name == "perceiver_resampler":
        rejects(defects.length_of_the_first(), is_the_oracles, with_length(name))


@pytest.mark.parametrize("name", ["cross_attention", "mab", "latent_transformer"])
def test_a_norm_in_one_pass_is_noticed(name):
    """The oracle finds norms that lose digits of nearly constant rows."""

    def far_away(case: Drawn) -> None:
        is_the_oracles(case.with_elements(case.arrays[case.elements] + case.dtype.type(100)))

    domain = drawn(name, "float32", least=1, ladders=("normal",))
    for_all(far_away, domain, share=0.2)
    rejects(defects.one_pass_norm(), far_away, domain)


def mixed_up(changed: dict, case: Drawn) -> None:
    """Compare a call that has other options than the oracle is told."""
    with np.errstate(all="ignore"):
        result = case(**changed)
    value, bound = case.reference()
    tolerances.assert_close(result, value, bound, "mixed up")


@pytest.mark.parametrize(
    ("name", "told", "done"),
    [
        ("cross_attention", {"activation": "gelu"}, {"activation": "gelu_tanh"}),
        ("pma", {"activation": "relu"}, {"activation": "squared_relu"}),
        ("latent_transformer", {"eps": 1e-5}, {"eps": 1e-6}),
        ("attention", {"scale": 1 / math.sqrt(3)}, {"scale": 1 / math.sqrt(3) * (1 + 1e-5)}),
        ("cross_attention", {"query_residual": True}, {"query_residual": False}),
        ("mab", {"query_residual": True}, {"query_residual": False}),
        ("gated_cross_attention", {"immediate": True}, {"immediate": False}),
        ("gated_cross_attention", {"ff_without_media": True}, {"ff_without_media": False}),
    ],
)
def test_options_that_are_mixed_up_are_noticed(name, told, done):
    """The oracle tells the two GELUs, two eps, two scales and two residuals apart."""
    domain = drawn(name, "float32", least=2, ladders=("normal",))
    # Queries that are not added may have another width than what they would be added to.
    domain = domain.filter(lambda c: c.options.get("query_residual", True)).map(
        lambda c: Drawn(c.function, c.arrays, c.params, c.masks, c.options | told, c.elements, c.note)
    )

    def check(case: Drawn) -> None:
        mixed_up(done, case)

    rejects(defects.planted(), check, domain)
