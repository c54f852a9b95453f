"""What does not take part has no effect, bit for bit; and masking, padding and removing are the same."""

from __future__ import annotations

from dataclasses import replace

import cases
import defects
import hypothesis
import numpy as np
import pytest
import strategies
from backends import BACKENDS
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, rejects, same, seeds
from test_properties_symmetry import FOLLOWS, MOST, take, take_elements

from setattn._params import is_absent

one_thread = strategies.one_thread

SETS = ("sab", "isab")  # blocks that keep the elements, and whose masked rows are 0
POOLING = tuple(name for name in strategies.MASKED if name not in FOLLOWS)


# --- garbage --------------------------------------------------------------------------------------------------------


def garbage(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make numbers of every bad kind."""
    info = np.finfo(dtype)
    kinds = np.array([np.nan, np.inf, -np.inf, info.max, info.min, info.smallest_subnormal, -0.0, 1.0], dtype)
    return rng.choice(kinds, size=shape)


def visible(case: Drawn) -> np.ndarray:
    """Say which elements of the set at least one query sees."""
    return case.takes_part()


def filled(case: Drawn, seed: int) -> Drawn:
    """Put garbage in the place of everything that a mask says is not looked at."""
    rng, x = np.random.default_rng(seed), case.arrays[case.elements]
    case = case.with_elements(np.where(visible(case)[..., None], x, garbage(rng, x.shape, x.dtype)))
    if "query_mask" in case.masks:
        q = case.arrays[0]
        case = case.with_array(0, np.where(case.masks["query_mask"][..., None], q, garbage(rng, q.shape, q.dtype)))
    return case


def garbage_under_a_mask(case: Drawn, seed: int) -> None:
    with np.errstate(all="raise"):
        result = case()
        same(filled(case, seed)(), result)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("name", strategies.MASKED)
def test_the_values_of_masked_elements_change_nothing(name):
    """NaN, infinities, the largest, the smallest and ordinary numbers under a mask all give the same, bit for bit."""
    for_all(garbage_under_a_mask, blocks(name, some=True, dtypes=("float32", "float64", "float16")), seeds)


@pytest.mark.parametrize("defect", [defects.leaking_select, defects.forgotten_select])
@pytest.mark.parametrize("name", ["attention", "isab", "set_transformer", "perceiver_resampler"])
def test_looking_at_masked_elements_is_noticed(name, defect):
    """Garbage finds that masked elements are multiplied by 0, or left to the softmax."""
    rejects(defect(), garbage_under_a_mask, blocks(name, some=True, least=2), seeds)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b.name, dtype) for b in BACKENDS.values() for dtype in ("float32", "float16") if dtype in b.dtypes],
    indirect=["backend"],
)
@pytest.mark.parametrize(
    "name",
    [
        "attention-pairs-and-bias",
        "mab",
        "isab",
        "perceiver",
        "perceiver_resampler-media-frames",
        "gated_cross_attention",
    ],
)
def test_the_values_of_masked_elements_change_nothing_on_any_backend(backend, name, dtype):
    """On every backend, garbage under a mask changes nothing, bit for bit."""
    case = cases.make(name, 2)
    drawn = Drawn(case.function, case.arrays, case.params, case.masks, case.options, case.elements)
    other = filled(drawn, 0)
    assert any(np.isnan(a).any() for a in other.arrays)
    with np.errstate(over="ignore"):  # the largest number of float64, cast by the backends' table
        same(backend.numpy(other.on(backend, dtype)), backend.numpy(case.on(backend, dtype)))


# --- removing and padding -------------------------------------------------------------------------------------------


def one_mask(case: Drawn) -> Drawn:
    """Give all frames or media of a call without a batch the same mask."""
    mask = case.mask
    return case.with_masks(mask=np.broadcast_to(mask.reshape(-1, mask.shape[-1])[0], mask.shape).copy())


def masking_is_removing(case: Drawn) -> None:
    case = one_mask(case)
    kept = np.flatnonzero(case.mask.reshape(-1, case.size)[0])
    removed, axis = take_elements(case, kept), FOLLOWS.get(case.function)
    bound = take(case.bound(), kept, axis) + removed.bound()
    agree(take(case(), kept, axis), removed(), bound, f"masked and removed: {case.function}")


def masked(name: str, **kwargs) -> st.SearchStrategy:
    kwargs = {"least": 1, "most": MOST.get(name, 17), "batch": 0, "some": True} | kwargs
    return blocks(name, **kwargs).filter(lambda case: case.mask is not None)


@pytest.mark.parametrize("name", strategies.MASKED)
def test_masking_is_removing(name):
    """A masked element might as well not be there."""
    for_all(masking_is_removing, masked(name), share=0.25)


@pytest.mark.parametrize("defect", [defects.finite_fill, defects.mask_ignored, defects.mask_of_the_neighbour])
@pytest.mark.parametrize("name", ["attention", "attention_weights", "sab", "pma", "gated_cross_attention"])
def test_a_wrong_mask_is_noticed(name, defect):
    """Removing finds masks that are ignored, shifted, or leave a small weight."""
    rejects(defect(), masking_is_removing, masked(name, scales=(None,)))


def padding(case: Drawn, count: int, seed: int, where: str) -> None:
    """Pad a set, and all its frames or media alike, with garbage, on the left, on the right or scattered."""
    rng, x, n = np.random.default_rng(seed), case.arrays[case.elements], case.size
    places = {"left": np.arange(count, count + n), "right": np.arange(n)}.get(where)
    if places is None:
        places = np.sort(rng.permutation(n + count)[:n])
    larger = garbage(rng, (*x.shape[:-2], n + count, x.shape[-1]), x.dtype)
    larger[..., places, :] = x
    mask = np.zeros(larger.shape[:-1], bool)
    mask[..., places] = True if case.mask is None else case.mask
    follow = {}
    if "pair_mask" in case.masks and not case.masks_media:
        pairs = case.masks["pair_mask"]
        follow["pair_mask"] = rng.random((*pairs.shape[:-1], n + count)) < 0.5
        follow["pair_mask"][..., places] = pairs
    padded, axis = case.with_elements(larger).with_masks(mask=mask, **follow), FOLLOWS.get(case.function)
    # The bound of rows that are not looked at is that of their removal; so is that of the padding's bound itself.
    cleaned = padded.with_elements(np.where(mask[..., None], larger, 0))
    bound = case.bound() + take(cleaned.bound(), places, axis)
    agree(take(padded(), places, axis), case(), bound, f"padded: {case.function}")


positions = st.sampled_from(("left", "right", "scattered"))


@pytest.mark.parametrize("name", strategies.MASKED)
def test_padding_changes_nothing(name):
    """Any number of masked elements may be added on the left, on the right or anywhere."""
    domain = blocks(name, most=MOST.get(name, 13))
    for_all(padding, domain, st.integers(1, 7), seeds, positions, share=0.25)


@pytest.mark.parametrize("name", ["attention", "isab", "perceiver_resampler"])
def test_padding_that_is_looked_at_is_noticed(name):
    """Padding finds masks that belong to the neighbour."""
    domain = blocks(name, most=7, scales=(None,))
    rejects(defects.mask_of_the_neighbour(), padding, domain, st.integers(1, 3), seeds, positions)


# --- full and empty masks -------------------------------------------------------------------------------------------


def full_masks(case: Drawn) -> None:
    x = case.arrays[case.elements]
    kinds = {"mask": x.shape[:-1]}
    if case.function in ("attention", "attention_weights", "mab"):
        kinds["pair_mask"] = (*x.shape[:-2], case.arrays[0].shape[-2], case.size)
    if case.masks_media:
        kinds["pair_mask"] = (*case.batch, case.arrays[0].shape[-2], x.shape[-3])
    if case.function == "mab":
        kinds["query_mask"] = case.arrays[0].shape[:-1]
    for key, shape in kinds.items():
        same(case.with_masks(**{key: np.ones(shape, bool)})(), case.with_masks(**{key: None})())


@pytest.mark.parametrize("name", strategies.MASKED)
def test_a_full_mask_is_no_mask(name):
    """A mask that lets everything through gives the same as none, bit for bit; so does one of pairs or of queries."""
    for_all(full_masks, blocks(name), share=0.5)


def empty_mask(case: Drawn) -> None:
    x = case.arrays[case.elements]
    nothing = take_elements(case, np.arange(0))
    result = case.with_masks(mask=np.zeros(x.shape[:-1], bool))()
    same(result, nothing())
    assert np.isfinite(result).all()
    if case.function == "attention":
        output = case.params.output
        assert (result == (0 if is_absent(output) or is_absent(output.bias) else output.bias)).all()


@pytest.mark.parametrize("name", POOLING)
def test_an_empty_mask_is_an_empty_set(name):
    """A mask that lets nothing through gives what the empty set gives, bit for bit: the result of an attention of 0."""
    if name == "attention_weights":
        pytest.skip("the weights of an empty set have no elements")
    for_all(empty_mask, blocks(name), share=0.5)


@pytest.mark.parametrize("name", ["attention", "pma"])
def test_an_empty_mask_that_is_the_mean_is_noticed(name):
    """Empty masks find that low scores in place of none give the mean of what is masked.

    Not in gated cross-attention, which leaves out the attention of what sees nothing, whatever it is.
    """
    rejects(defects.finite_fill(), empty_mask, blocks(name, least=1))


def empty_pairs(case: Drawn, seed: int) -> None:
    """Rows that see nothing are as if the set were empty; the others are as they were."""
    x, m = case.arrays[case.elements], case.arrays[0].shape[-2]
    blind = np.random.default_rng(seed).random((*case.batch, m)) < 0.5
    shape = (*x.shape[:-2], m, case.size)
    pairs = case.masks.get("pair_mask", np.ones(shape, bool)) & ~blind[..., None]
    result = case.with_masks(pair_mask=pairs, query_mask=None)()
    nothing = take_elements(case.with_masks(query_mask=None), np.arange(0))()
    same(result[blind], nothing[blind])


@pytest.mark.parametrize("name", ["attention", "mab"])
def test_a_query_that_sees_nothing(name):
    """A query that sees no element gets what it would get of an empty set, bit for bit."""
    for_all(empty_pairs, blocks(name), seeds, share=0.5)


@pytest.mark.parametrize("name", ["attention", "mab"])
def test_pairs_that_are_ignored_are_noticed(name):
    """Blind queries find that masks of pairs are ignored."""
    rejects(defects.pair_mask_ignored(), empty_pairs, blocks(name, least=1), seeds)


# --- several masks --------------------------------------------------------------------------------------------------


def mask_as_pairs(case: Drawn) -> None:
    x = case.arrays[case.elements]
    shape = (*x.shape[:-2], case.arrays[0].shape[-2], case.size)
    pairs = np.broadcast_to(case.mask[..., None, :], shape).copy()
    if "pair_mask" in case.masks:
        pairs &= case.masks["pair_mask"]
    same(case.with_masks(mask=None, pair_mask=pairs)(), case())


@pytest.mark.parametrize("name", ["attention", "attention_weights", "mab"])
def test_a_mask_is_the_same_for_all_queries(name):
    """A mask of elements gives the same as this mask for each query, alone or with one of pairs, bit for bit."""
    for_all(mask_as_pairs, masked(name, batch=None, most=33))


@pytest.mark.parametrize("name", ["attention", "attention_weights", "mab"])
def test_a_mask_that_is_not_the_same_is_noticed(name):
    """Masks of pairs find a shifted mask of elements."""
    rejects(defects.mask_of_the_neighbour(), mask_as_pairs, masked(name, least=2))


def two_masks(case: Drawn, seed: int) -> None:
    shape = case.arrays[case.elements].shape[:-1]
    first, second = np.random.default_rng(seed).random((2, *shape)) < 0.7
    pairs = np.broadcast_to(second[..., None, :], (*shape[:-1], case.arrays[0].shape[-2], shape[-1])).copy()
    both = case.with_masks(mask=first & second, pair_mask=None)()
    same(case.with_masks(mask=first, pair_mask=pairs)(), both)
    x = np.where(first[..., None], case.arrays[case.elements], np.nan)
    same(case.with_elements(x).with_masks(mask=first & second, pair_mask=None)(), both)


@pytest.mark.parametrize("name", ["attention", "attention_weights", "mab"])
def test_masks_combine_by_and(name):
    """Masking twice is masking by both masks at once, bit for bit."""
    for_all(two_masks, blocks(name, only=("query_mask",)), seeds, share=0.5)


def locations_as_pairs(case: Drawn) -> None:
    pairs = case.seen_media()
    hypothesis.assume(pairs is not None)
    same(case.with_masks(media_locations=None, pair_mask=pairs)(), case())


def test_media_that_are_seen_from_places_or_by_pairs():
    """Places of media give the same as the pairs of text and medium that they stand for, bit for bit."""
    for_all(locations_as_pairs, blocks("gated_cross_attention"))
    rejects(defects.pair_mask_ignored(), masking_pairs, blocks("gated_cross_attention", least=1), seeds)


def masking_pairs(case: Drawn, seed: int) -> None:
    """Media that no text sees might as well be masked."""
    seen = np.random.default_rng(seed).random(case.arrays[1].shape[-3]) < 0.5
    pairs = np.broadcast_to(seen, (*case.batch, case.arrays[0].shape[-2], seen.size)).copy()
    mask = np.broadcast_to(seen[:, None], case.arrays[1].shape[:-1]).copy()
    same(case.with_masks(pair_mask=pairs, mask=None)(), case.with_masks(pair_mask=None, mask=mask)())


def test_media_that_no_text_sees_are_masked():
    """A pair mask that is the same for all text is a mask of whole media, bit for bit."""
    for_all(masking_pairs, blocks("gated_cross_attention"), seeds)


# --- what is exactly 0 ----------------------------------------------------------------------------------------------


def masked_weights(case: Drawn) -> None:
    result = case()
    value, bound = case.reference(exact=False)
    x = case.arrays[1]
    pairs = np.ones((*x.shape[:-2], case.arrays[0].shape[-2], case.size), bool)
    pairs &= True if case.mask is None else case.mask[..., None, :]
    pairs &= case.masks.get("pair_mask", True)
    pairs = np.broadcast_to(pairs[..., None, :, :], result.shape)
    assert (strategies.bits(result)[~pairs] == 0).all()
    assert (result >= 0).all()
    assert (result[pairs & (value > bound)] > 0).all()


def test_masked_weights_are_zero():
    """Weights of masked elements are exactly +0, the others positive, unless they underflow."""
    for_all(masked_weights, blocks("attention_weights"))


@pytest.mark.parametrize("defect", [defects.finite_fill, defects.mask_of_the_neighbour, defects.pair_mask_ignored])
def test_weights_of_masked_elements_are_noticed(defect):
    """Exact zeros find defects of both masks."""
    rejects(defect(), masked_weights, blocks("attention_weights", least=1))


def masked_rows(case: Drawn) -> None:
    key = "query_mask" if case.function == "mab" else "mask"
    hypothesis.assume(key in case.masks)
    result = case()
    rows = np.broadcast_to(case.masks[key], result.shape[:-1])
    assert (strategies.bits(result[~rows]) == 0).all()


@pytest.mark.parametrize("name", ["sab", "isab", "mab"])
def test_rows_of_masked_elements_are_zero(name):
    """The rows of masked elements, and of masked queries, are exactly +0."""
    for_all(masked_rows, blocks(name, some=True))
    rejects(defects.forgotten_select(), masked_rows, blocks(name, some=True, least=1))


def masking_one_item(case: Drawn, seed: int) -> None:
    rng, x = np.random.default_rng(seed), case.arrays[case.elements]
    item = rng.integers(case.batch[0])
    mask = np.ones(x.shape[:-1], bool) if case.mask is None else case.mask.copy()
    before = case.with_masks(mask=mask)()
    mask = mask.copy()
    mask[item] = rng.random(mask[item].shape) < 0.3
    after = case.with_masks(mask=mask)()
    others = np.arange(case.batch[0]) != item
    same(after[others], before[others])


@pytest.mark.parametrize("name", strategies.MASKED)
def test_masking_an_item_leaves_the_others_as_they_are(name):
    """Another mask for one item of a batch changes no other item, bit for bit."""
    for_all(masking_one_item, blocks(name, batch=1), seeds, share=0.3)


def test_masking_another_item_is_noticed():
    """Masking one item finds that items leak into their neighbours."""
    rejects(defects.batch_mixed(), masking_one_item, blocks("isab", batch=1, least=2), seeds)


@pytest.mark.parametrize("name", ["attention", "isab", "pma", "perceiver_io", "perceiver_resampler-frames"])
def test_full_and_empty_masks_on_every_backend(backend, name):
    """On every backend, a full mask is no mask and an empty one an empty set, bit for bit."""
    dtype = backend.dtypes[-1] if backend.dtypes[-1] != "bfloat16" else "float16"
    case = cases.make(name, 3)
    x = case.arrays[case.elements]
    full, empty = np.ones(x.shape[:-1], bool), np.zeros(x.shape[:-1], bool)
    unmasked = replace(case, masks={})
    same(backend.numpy(unmasked.on(backend, dtype, mask=full)), backend.numpy(unmasked.on(backend, dtype)))
    if case.function in SETS:
        return
    arrays = [a[..., :0, :] if i == case.elements else a for i, a in enumerate(case.arrays)]
    nothing = replace(unmasked, arrays=tuple(arrays))
    same(backend.numpy(unmasked.on(backend, dtype, mask=empty)), backend.numpy(nothing.on(backend, dtype)))
