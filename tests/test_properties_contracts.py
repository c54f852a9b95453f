"""What every function promises whatever it computes: shapes, purity, determinism, layouts, finiteness, locality."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cases
import defects
import hypothesis
import numpy as np
import pytest
import strategies
import threadpoolctl
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, rejects, same, seeds
from test_properties_symmetry import MOST

import setattn
from setattn._params import is_absent

one_thread = strategies.one_thread


def leaves(tree) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    setattn.map_params(found.append, tree)
    return found


# --- shapes ---------------------------------------------------------------------------------------------------------


def rows_and_width(case: Drawn) -> tuple[tuple[int, ...], int]:
    """The last axes of the result, from the parameters and the queries alone."""
    p, rows = case.params, case.arrays[0].shape[-2]

    def of_attention(a: setattn.Attention, width: int) -> int:
        heads = width // a.key.weight.shape[-1] if is_absent(a.query) else a.query.weight.shape[1]
        return heads * a.value.weight.shape[-1] if is_absent(a.output) else a.output.weight.shape[-1]

    def of_output(output, width: int) -> int:
        return width if is_absent(output) else output.weight.shape[-1]

    def of_mab(b: setattn.MAB, width: int) -> int:
        queries = of_output(b.project, width)
        return queries if case.options["query_residual"] else of_attention(b.attention, queries)

    width = case.arrays[0].shape[-1]
    match case.function:
        case "attention":
            return (rows,), of_attention(p, width)
        case "attention_weights":
            heads = width // p.key.weight.shape[-1] if is_absent(p.query) else p.query.weight.shape[1]
            return (heads, rows), case.size
        case "mab" | "sab":
            return (rows,), of_mab(p, width)
        case "isab":
            return (rows,), of_mab(p.mab_set, width)
        case "pma":
            return p.seeds.shape[:1], of_mab(p.mab, p.seeds.shape[1])
        case "set_transformer":
            return p.pma.seeds.shape[:1], of_output(p.output, p.pma.seeds.shape[1])
        case "attention_pool":
            return p.probe.shape[:1], of_output(p.output, of_attention(p.attention, p.probe.shape[1]))
        case "perceiver":
            return p.latents.shape[:1], p.latents.shape[1]
        case "perceiver_io":
            queries = case.arrays[1]
            return queries.shape[-2:-1], of_output(p.output, of_attention(p.decoder.attention, queries.shape[-1]))
        case "perceiver_resampler":
            media = () if is_absent(p.media_embedding) else case.arrays[0].shape[len(case.batch) : len(case.batch) + 1]
            made = 0 if is_absent(p.mean_latents) else p.mean_latents.project.weight.shape[1]
            return (*media, made + p.latents.shape[0]), of_output(p.output, p.latents.shape[1])
    return (rows,), width  # cross_attention, latent_transformer, gated_cross_attention


def shape_is_as_documented(case: Drawn) -> None:
    rows, width = rows_and_width(case)
    result = case()
    assert result.shape == (*case.batch, *rows, width)
    assert result.dtype == case.dtype
    assert type(result) is np.ndarray


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_the_shape_does_not_depend_on_the_set(name):
    """Shape and dtype of the result follow from batch, queries and parameters, not from the size of the set."""
    domain = blocks(name, dtypes=("float16", "float32", "float64"))
    for_all(shape_is_as_documented, domain, share=0.5)


# --- purity and determinism -----------------------------------------------------------------------------------------


def is_pure(case: Drawn) -> None:
    given = [*case.arrays, *case.masks.values(), *leaves(case.params)]
    before = [a.tobytes() for a in given]
    for a in given:
        a.flags.writeable = False
    result = case()
    assert [a.tobytes() for a in given] == before
    assert not any(np.may_share_memory(result, a) for a in given)
    assert result.flags.writeable
    same(case(), result)


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_functions_are_pure(name):
    """No argument is changed, the result shares no memory with any, and a second call gives the same, bit for bit."""
    for_all(is_pure, blocks(name, dtypes=("float16", "float32", "float64")), share=0.4)


def test_a_function_that_gives_its_input_back_is_noticed():
    """Purity finds a result that is a view of what was given."""
    defect = mock.patch.object(setattn, "sab", lambda x, params, **options: x[..., :1])
    rejects(defect, is_pure, blocks("sab", least=1))


def test_no_layers_share_no_memory():
    """Even where there is nothing to compute, the result is a new array."""
    z = np.ones((4, 3, 8), np.float32)
    result = setattn.latent_transformer(z, ())
    same(result, z)
    assert not np.may_share_memory(result, z)


_DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import cases, strategies
for name in cases.NAMES:
    for dtype in ("float64", "float32", "float16"):
        print(hashlib.sha256(strategies.made(name, dtype)().tobytes()).hexdigest())
"""


def test_a_fresh_process_gives_the_same():
    """Every case gives the same in a fresh process, bit for bit, and in reverse order in this one."""
    command = [sys.executable, "-c", _DIGEST, str(Path(__file__).parent)]
    # More threads may be in the other process: the cases are too small for them.
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [(name, dtype) for name in cases.NAMES for dtype in ("float64", "float32", "float16")]
    here = [hashlib.sha256(strategies.made(*n)().tobytes()).hexdigest() for n in reversed(names)]
    assert lines == here[::-1]


def large(rng: np.random.Generator) -> Drawn:
    """A call that is large enough for BLAS to use several threads."""
    params = setattn.init_pma(96, num_heads=3, num_seeds=5, rng=rng)
    x = rng.normal(size=(2, 700, 96)).astype(np.float32)
    return Drawn("pma", (x,), params, {}, {"activation": "gelu"})


def test_the_number_of_threads_only_changes_rounding():
    """Several threads give what one gives, within the bounds of both."""
    case = large(np.random.default_rng(0))
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        one = case()
    with threadpoolctl.threadpool_limits(4, user_api="blas"):
        several = case()
        same(case(), several)
    agree(several, one, 2 * case.bound(), "threads")


# --- memory layout --------------------------------------------------------------------------------------------------


def layouts(a: np.ndarray, kind: str) -> np.ndarray:
    """Lay an array out in another way, with the same values."""
    if kind == "fortran":
        return np.asfortranarray(a)
    if kind == "strided":
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan if a.dtype.kind == "f" else False, a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    if kind == "negative":
        return a[..., ::-1].copy()[..., ::-1]
    if kind == "swapped":
        return np.swapaxes(np.swapaxes(a, -1, -2).copy(), -1, -2) if a.ndim > 1 else a
    return a.astype(a.dtype.newbyteorder()) if kind == "big-endian" else a


LAYOUTS = ("fortran", "strided", "negative", "swapped")


def layout_only_changes_rounding(case: Drawn, kind: str) -> None:
    other = Drawn(
        case.function,
        tuple(layouts(a, kind) for a in case.arrays),
        setattn.map_params(lambda a: layouts(a, kind), case.params),
        {key: layouts(m, kind) for key, m in case.masks.items()},
        case.options,
        case.elements,
    )
    agree(other(), case(), 2 * case.bound(), f"layout: {case.function}")


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_the_layout_of_memory_only_changes_rounding(name):
    """Fortran order, strides, negative strides and swapped axes give the same, up to the order of summation."""
    domain = blocks(name, most=MOST.get(name, 13))
    for_all(layout_only_changes_rounding, domain, st.sampled_from(LAYOUTS), share=0.2)


@pytest.mark.parametrize("name", ["attention", "isab", "pma"])
def test_repeated_memory_only_changes_rounding(name):
    """A set that is one row seen many times, with a stride of 0, gives what its copy gives."""

    def check(case: Drawn) -> None:
        x = case.arrays[case.elements]
        seen = np.broadcast_to(x[..., :1, :], x.shape)
        agree(
            case.with_elements(seen)(),
            case.with_elements(seen.copy())(),
            2 * case.bound() + 2 * case.with_elements(seen.copy()).bound(),
            "stride 0",
        )

    for_all(check, blocks(name, least=1, most=7), share=0.3)


# --- finiteness -----------------------------------------------------------------------------------------------------


def finite(case: Drawn, power: int) -> None:
    factor = case.dtype.type(2.0**power)
    case = case.with_elements(case.arrays[case.elements] * factor)
    with np.errstate(all="raise"):
        result = case()
    assert np.isfinite(result).all()


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_finite_numbers_give_finite_numbers(name):
    """Sets from 2^-60 to 2^12 times the usual size give finite results, without a warning of any kind."""
    domain = blocks(name, dtypes=("float32", "float64"))
    for_all(finite, domain, st.integers(-60, 12), share=0.6)


def test_exponentials_that_overflow_are_noticed():
    """Large scores find exponentials without the largest score taken off."""
    rejects(defects.unshifted(), finite, blocks("attention", least=1, scales=(10.0,)), st.integers(6, 12))


def test_float16_reaches_its_largest_numbers():
    """Scores that overflow float16 are no matter to it, as they are computed in float32."""

    def check(case: Drawn) -> None:
        assume_small = np.abs(case.arrays[case.elements]).max(initial=0.0) < 100
        hypothesis.assume(assume_small)
        case = case.with_elements(case.arrays[case.elements] * np.float16(300))
        with np.errstate(all="raise"):
            result = case()
        assert np.isfinite(result).all()

    for_all(check, blocks("attention_weights", dtypes=("float16",)))
    for_all(check, blocks("attention_pool", dtypes=("float16",)).filter(lambda c: not is_absent(c.params.context_norm)))


# --- locality -------------------------------------------------------------------------------------------------------

BAD = (np.nan, np.inf, -np.inf)


def bad_element_stays_in_its_item(case: Drawn, seed: int, bad: float) -> None:
    """One bad number in one set of a batch leaves all other sets as they were."""
    hypothesis.assume(case.arrays[case.elements].size > 0)
    rng, before = np.random.default_rng(seed), case()
    x = case.arrays[case.elements].copy()
    place = tuple(int(rng.integers(size)) for size in x.shape)
    x[place] = bad
    with np.errstate(all="ignore"):
        after = case.with_elements(x)()
    others = np.arange(case.batch[0]) != place[0]
    same(after[others], before[others])


def batched(name: str, **kwargs) -> st.SearchStrategy:
    return blocks(name, **({"batch": 1, "least": 1} | kwargs))


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_a_bad_number_stays_in_its_set(name):
    """A NaN or an infinity in one set of a batch changes no other set, bit for bit."""
    for_all(bad_element_stays_in_its_item, batched(name), seeds, st.sampled_from(BAD), share=0.4)


def test_a_bad_number_that_spreads_is_noticed():
    """A bad number finds that items leak into their neighbours."""
    rejects(defects.batch_mixed(), bad_element_stays_in_its_item, batched("pma"), seeds, st.sampled_from(BAD))


def bad_query_stays_in_its_row(case: Drawn, seed: int) -> None:
    rng, before = np.random.default_rng(seed), case()
    position = 1 if case.function == "perceiver_io" else 0
    q = case.arrays[position].copy()
    hypothesis.assume(q.size > 0)
    place = tuple(int(rng.integers(size)) for size in q.shape)
    q[place] = np.nan
    with np.errstate(all="ignore"):
        after = case.with_array(position, q)()
    touched = np.zeros(before.shape, bool)
    batch = place[:-2] if len(case.arrays[position].shape) > 2 else ()
    touched[(*batch, ..., place[-2], slice(None))] = True
    same(after[~touched], before[~touched])
    if case.size and not case.masks:
        assert np.isnan(after[touched]).any()


@pytest.mark.parametrize(
    "name", ["attention", "attention_weights", "mab", "cross_attention", "perceiver_io", "gated_cross_attention"]
)
def test_a_bad_query_stays_in_its_row(name):
    """A NaN in one query makes NaN of its own row alone, and leaves the others as they were, bit for bit."""
    for_all(bad_query_stays_in_its_row, blocks(name), seeds, share=0.4)


def nan_shows(case: Drawn, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = case.arrays[case.elements].copy()
    hypothesis.assume(x.size > 0 and case().size > 0)
    x[tuple(int(rng.integers(size)) for size in x.shape)] = np.nan
    with np.errstate(all="ignore"):
        assert np.isnan(case.with_elements(x)()).any()


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_a_bad_number_that_takes_part_shows(name):
    """A NaN that is not masked is not hidden."""
    for_all(nan_shows, blocks(name, only=(), least=1, batch=0), seeds, share=0.4)
