"""Sets have no order: what permuting, repeating and weighting elements, queries, heads, latents and batches does."""

from __future__ import annotations

import math
from dataclasses import replace

import defects
import hypothesis
import numpy as np
import pytest
import strategies
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, rejects, same, seeds
from tolerances import product

import setattn
from setattn._params import is_absent

one_thread = strategies.one_thread

# The axis of the result along which it follows the elements, where it does.
FOLLOWS = {"attention_weights": -1, "sab": -2, "isab": -2, "latent_transformer": -2}
INVARIANT = tuple(name for name in strategies.BLOCKS if name not in FOLLOWS)
# Functions whose queries are an argument, and which one.
QUERIES = {
    "attention": 0,
    "attention_weights": 0,
    "mab": 0,
    "cross_attention": 0,
    "perceiver_io": 1,
    "gated_cross_attention": 0,
}
# How many elements the slower bounds are computed for.
MOST = {"sab": 11, "isab": 11, "latent_transformer": 7, "set_transformer": 11, "perceiver_resampler": 13}


def take_elements(case: Drawn, order: np.ndarray, masks: bool = True) -> Drawn:
    """Take elements of the set by their places, and their masks with them."""
    kinds = ("mask", "bias") if case.masks_media else ("mask", "pair_mask", "bias")
    follow = {k: m[..., order] for k, m in case.masks.items() if k in kinds and masks}
    if "key_positions" in case.masks:
        follow["key_positions"] = case.masks["key_positions"][..., order, :]
    return case.with_elements(case.arrays[case.elements][..., order, :]).with_masks(**follow)


def take_queries(case: Drawn, order: np.ndarray) -> Drawn:
    """Take queries by their places, and their masks with them."""
    position, follow = QUERIES[case.function], {}
    for key, mask in case.masks.items():
        if key in ("query_mask", "pair_mask"):
            follow[key] = mask[..., order, :] if key == "pair_mask" else mask[..., order]
    return case.with_array(position, case.arrays[position][..., order, :]).with_masks(**follow)


def take(a: np.ndarray, order: np.ndarray, axis: int | None) -> np.ndarray:
    return a if axis is None else np.take(a, order, axis=axis)


# --- permutations ---------------------------------------------------------------------------------------------------


def permuting_the_set(case: Drawn, seed: int, masks: bool = True) -> None:
    order, axis = np.random.default_rng(seed).permutation(case.size), FOLLOWS.get(case.function)
    result, bound = take(case(), order, axis), take(case.bound(), order, axis)
    agree(take_elements(case, order, masks)(), result, 2 * bound, f"permuted set: {case.function}")


def domain(name: str, **kwargs) -> st.SearchStrategy:
    return blocks(name, **({"least": 1, "most": MOST.get(name, 17)} | kwargs))


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_the_order_of_the_elements_does_not_matter(name):
    """Permuting the elements, with their masks, permutes the result's elements if it has them, or changes nothing.

    Stacks of up to three blocks are among what is drawn (encoders of a Set Transformer, layers of latents): their
    bounds grow with each block, and the results keep within them.
    """
    for_all(permuting_the_set, domain(name), seeds, share=0.25)


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_a_score_that_depends_on_the_place_is_noticed(name):
    """Permuting the set finds scores that depend on places."""
    rejects(defects.positional(), permuting_the_set, domain(name, scales=(None,)), seeds)


@pytest.mark.parametrize("name", ["attention", "isab", "pma", "perceiver"])
def test_a_forgotten_element_is_noticed(name):
    """Permuting the set finds that the last element has no effect."""
    rejects(defects.dropped(), permuting_the_set, domain(name, scales=(None,)), seeds)


@pytest.mark.parametrize("name", strategies.MASKED)
def test_permuting_without_the_mask_is_noticed(name):
    """The mask belongs to the elements: permuting these alone is not the same."""

    def without_the_mask(case: Drawn, seed: int) -> None:
        permuting_the_set(case, seed, masks=False)

    rejects(defects.planted(), without_the_mask, domain(name, some=True, scales=(None,)), seeds)


def permuting_the_queries(case: Drawn, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(case.arrays[QUERIES[case.function]].shape[-2])
    result, bound = take(case(), order, -2), take(case.bound(), order, -2)
    agree(take_queries(case, order)(), result, 2 * bound, f"permuted queries: {case.function}")


def without_locations(name: str) -> st.SearchStrategy:
    return domain(name, only=("mask", "query_mask", "pair_mask"))


@pytest.mark.parametrize("name", QUERIES)
def test_permuting_the_queries_permutes_the_result(name):
    """Permuting the queries, with their masks, permutes the rows of the result in the same way."""
    for_all(permuting_the_queries, without_locations(name), seeds, share=0.25)


def test_a_softmax_over_the_queries_keeps_their_symmetry():
    """Permuting queries cannot find a softmax over the wrong axis: the properties of weights and values have to."""
    with defects.over_the_queries():
        # Of ordinary scores: a column of weights that all but vanish is divided by its sum, and so are its errors.
        ordinary = domain("attention_weights", only=(), scales=(None,), ladders=("normal",))
        for_all(permuting_the_queries, ordinary, seeds, share=0.1)


def permuting_a_batch(case: Drawn, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(case.batch[0])
    same(case.batch_index(order)(), case()[order])


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_permuting_a_batch_permutes_the_result_bit_for_bit(name):
    """The items of a batch do not know of one another, nor of their place."""
    for_all(permuting_a_batch, blocks(name, batch=1), seeds, share=0.5)


def test_a_leak_between_items_is_noticed():
    """Permuting a batch finds that items leak into their neighbours."""
    rejects(defects.batch_mixed(), permuting_a_batch, blocks("pma", batch=1), seeds)


# --- learned queries and heads --------------------------------------------------------------------------------------


def _permute_learned(name: str, params, order: np.ndarray):
    """Permute seeds, probes, latents or inducing points."""
    if name == "perceiver_io":
        return params._replace(encoder=_permute_learned("perceiver", params.encoder, order))
    field = {"isab": "inducing_points", "pma": "seeds", "attention_pool": "probe"}.get(name, "latents")
    params = params._replace(**{field: getattr(params, field)[order]})
    if name == "attention_pool" and not is_absent(params.probe_position):
        params = params._replace(probe_position=params.probe_position[order])
    return params


def permuting_what_is_learned(case: Drawn, seed: int) -> None:
    learned = case.params.encoder.latents if case.function == "perceiver_io" else None
    learned = next(a for a in (learned, *case.params) if isinstance(a, np.ndarray)) if learned is None else learned
    order = np.random.default_rng(seed).permutation(learned.shape[0])
    axis = None if case.function in ("isab", "perceiver_io") else -2
    other = case.with_params(_permute_learned(case.function, case.params, order))
    made = 0
    if case.function == "perceiver_resampler" and not is_absent(case.params.mean_latents):
        made = case.params.mean_latents.project.weight.shape[1]  # latents of the mean, which stay in front
    order = np.concatenate([np.arange(made), made + order])
    result, bound = take(case(), order, axis), take(case.bound(), order, axis)
    agree(other(), result, 2 * bound, f"permuted learned queries: {case.function}")


@pytest.mark.parametrize("name", ["isab", "pma", "attention_pool", "perceiver", "perceiver_io", "perceiver_resampler"])
def test_the_order_of_what_is_learned(name):
    """Permuting seeds, probes or latents permutes the result; that of inducing points or inner latents is nothing."""
    for_all(permuting_what_is_learned, domain(name, most=7), seeds, share=0.2)


def permute_heads(p: setattn.Attention, seed: int) -> tuple[setattn.Attention, np.ndarray]:
    """Permute the key heads, and the query heads within each group, in all projections; give the query heads' order."""
    rng, kv_heads = np.random.default_rng(seed), p.key.weight.shape[1]
    groups = p.query.weight.shape[1] // kv_heads
    keys = rng.permutation(kv_heads)
    queries = np.concatenate([g * groups + rng.permutation(groups) for g in keys])

    def cut(linear: setattn.Linear, order: np.ndarray) -> setattn.Linear:
        bias = linear.bias if is_absent(linear.bias) else linear.bias[order]
        return setattn.Linear(linear.weight[:, order], bias)

    output = p.output if is_absent(p.output) else p.output._replace(weight=p.output.weight[queries])
    return p._replace(
        query=cut(p.query, queries),
        key=cut(p.key, keys),
        value=cut(p.value, keys),
        output=output,
        length_scale=lengths_of_heads(p.length_scale, p.query.weight.shape[1], queries),
    ), queries


def lengths_of_heads(p: setattn.LengthScale, heads: int, order: np.ndarray) -> setattn.LengthScale:
    """Take the factors of some heads."""
    if is_absent(p):
        return p

    def cut(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:-1], heads, -1)[..., order, :].reshape(*a.shape[:-1], -1)

    if isinstance(p.base, setattn.FeedForward):
        return p._replace(base=p.base._replace(output=setattn.map_params(cut, p.base.output)))
    return p._replace(base=setattn.map_params(cut, p.base))


def permuting_heads(case: Drawn, seed: int) -> None:
    hypothesis.assume(not is_absent(case.params.query))
    params, order = permute_heads(case.params, seed)
    result, bound = case(), case.bound()
    if case.function == "attention_weights":
        result, bound = result[..., order, :, :], bound[..., order, :, :]
    elif is_absent(params.output):
        split = (*result.shape[:-1], len(order), result.shape[-1] // len(order))
        result, bound = (a.reshape(split)[..., order, :].reshape(result.shape) for a in (result, bound))
    agree(case.with_params(params)(), result, 2 * bound, f"permuted heads: {case.function}")


@pytest.mark.parametrize("name", ["attention", "attention_weights"])
def test_the_order_of_heads_cancels(name):
    """Heads that are permuted in all projections, each group of query heads with its key head, change nothing."""
    for_all(permuting_heads, domain(name, most=11), seeds, share=0.4)


# --- the resampler's axes -------------------------------------------------------------------------------------------


def frames(least: int = 1, **kwargs) -> st.SearchStrategy:
    drawn = blocks("perceiver_resampler", axes="frames", **({"least": 1, "most": 7} | kwargs))
    return drawn.filter(lambda case: case.arrays[0].shape[-3] >= least)


def permute_frames(case: Drawn, order: np.ndarray) -> Drawn:
    mask = None if case.mask is None else case.mask[..., order, :]
    return case.with_array(0, case.arrays[0][..., order, :, :]).with_masks(mask=mask)


def frames_with_their_embeddings(case: Drawn, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(case.arrays[0].shape[-3])
    embedding = case.params.frame_embedding.copy()
    embedding[: len(order)] = embedding[order]
    other = permute_frames(case, order).with_params(case.params._replace(frame_embedding=embedding))
    agree(other(), case(), 2 * case.bound(), "permuted frames with their embeddings")


def test_frames_move_with_their_embeddings():
    """Permuting frames and their embeddings together changes nothing."""
    for_all(frames_with_their_embeddings, frames(), seeds, share=0.25)


def remembers_its_elements(params: setattn.Resampler) -> bool:
    """Say whether no norm is of fewer than 3 features, which would forget what they were."""
    normed = [layer.attention.key.weight for layer in params.layers if not is_absent(layer.attention.key_norm)]
    normed += [] if is_absent(params.output) else [params.output.weight]
    return all(a.shape[-1] >= 3 for a in (params.latents, *normed))


def swapping_frames_differs(case: Drawn) -> None:
    hypothesis.assume(remembers_its_elements(case.params))
    order = np.arange(case.arrays[0].shape[-3])
    order[:2] = 1, 0
    result, other = case(), permute_frames(case, order)()
    assert (np.abs(result - other) > 2 * case.bound()).any()


def without_a_network(case: Drawn) -> bool:
    return not isinstance(case.params.input, setattn.FeedForward)  # which may map all elements to one


def unmasked_frames() -> st.SearchStrategy:
    drawn = frames(2, dtypes=("float64",), ladders=("normal",), scales=(None,), only=(), batch=0)
    return drawn.filter(without_a_network)


def test_swapping_frames_makes_a_difference():
    """Frames that are not alike, with embeddings that are not alike, cannot be swapped."""
    for_all(swapping_frames_differs, unmasked_frames(), share=0.4)


def test_equal_embeddings_do_not_tell_frames_apart():
    """Where all frames have the same embedding, any permutation of the elements of all frames changes nothing."""

    def check(case: Drawn, seed: int) -> None:
        p, x = case.params, case.arrays[0]
        case = case.with_params(p._replace(frame_embedding=np.tile(p.frame_embedding[:1], (len(p.frame_embedding), 1))))
        order = np.random.default_rng(seed).permutation(x.shape[-3] * x.shape[-2])

        def shuffle(a: np.ndarray, axes: int) -> np.ndarray:
            flat = a.reshape(*case.batch, len(order), *a.shape[a.ndim - axes :])
            return np.take(flat, order, axis=len(case.batch)).reshape(a.shape)

        mask = None if case.mask is None else shuffle(case.mask, 0)
        other = case.with_array(0, shuffle(x, 1)).with_masks(mask=mask)
        agree(other(), case(), 2 * case.bound(), "shuffled frames with equal embeddings")

    for_all(check, frames(), seeds, share=0.25)
    # What holds for equal embeddings makes no difference either, and this the property of unequal ones must find.
    equal = unmasked_frames().map(
        lambda c: c.with_params(c.params._replace(frame_embedding=np.zeros_like(c.params.frame_embedding)))
    )
    rejects(defects.planted(), swapping_frames_differs, equal)


def elements_with_their_positions(case: Drawn, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(case.size)
    position = case.params.position.copy()
    position[: case.size] = position[order]
    other = take_elements(case, order).with_params(case.params._replace(position=position))
    agree(other(), case(), 2 * case.bound(), "permuted elements with their positions")


def positioned(**kwargs) -> st.SearchStrategy:
    return blocks("perceiver_resampler", positions=True, **({"least": 1, "most": 7} | kwargs))


def test_elements_move_with_their_positions():
    """Permuting the elements of all frames and the rows of their positions together changes nothing."""
    for_all(elements_with_their_positions, positioned(), seeds, share=0.25)


def swapping_elements_differs(case: Drawn) -> None:
    hypothesis.assume(remembers_its_elements(case.params))
    order = np.arange(case.size)
    order[:2] = 1, 0
    assert (np.abs(case() - take_elements(case, order)()) > 2 * case.bound()).any()


def test_swapping_elements_that_have_positions_makes_a_difference():
    """Elements that are not alike, at positions that are not alike, cannot be swapped; without positions they can."""
    alike = {"least": 3, "dtypes": ("float64",), "ladders": ("normal",), "scales": (None,), "only": (), "batch": 0}
    for_all(swapping_elements_differs, positioned(**alike).filter(without_a_network), share=0.4)
    rejects(defects.planted(), swapping_elements_differs, blocks("perceiver_resampler", most=7, **alike))


# --- multisets ------------------------------------------------------------------------------------------------------


def repeating_every_element(case: Drawn, times: int) -> None:
    order = np.repeat(np.arange(case.size), times)
    other = take_elements(case, order)
    axis, result, bound = FOLLOWS.get(case.function), case(), case.bound()
    result, bound = take(result, order, axis), take(bound, order, axis)
    again = other(), other.bound()
    if case.function == "attention_weights":  # the copies share their weight
        agree(times * again[0], result, bound + times * again[1], "repeated elements: attention_weights")
        return
    agree(again[0], result, bound + again[1], f"repeated elements: {case.function}")


REPEATED = tuple(name for name in strategies.BLOCKS if name != "perceiver_resampler")


@pytest.mark.parametrize("name", REPEATED)
def test_repeating_every_element_changes_nothing(name):
    """A set in which every element stands k times gives the same, and every copy of an element the same row.

    Not so in a resampler, whose latents attend to one another, too, and are not repeated.
    """
    least = {"most": 7} if name in FOLLOWS or name == "set_transformer" else {"most": 11}
    least |= {"lengths": False}  # the number of elements is another
    for_all(repeating_every_element, domain(name, **least), st.integers(1, 4), share=0.2)


def test_counting_an_element_once_is_noticed():
    """Weights and multiplicities find that copies are not counted."""
    rejects(defects.deduplicated(), copies_are_weights, attention_on(only=(), most=7), seeds)


def weighted(case: Drawn, weights: np.ndarray) -> Drawn:
    with np.errstate(divide="ignore"):
        return replace(case, masks=case.masks | {"bias": np.log(weights).astype(case.dtype)})


def bias_error(case: Drawn, *biases: np.ndarray) -> float:
    """What the rounding of the logarithms in biases does to the result.

    They are off by at most e = u max |bias| (and the logarithm by another u), which changes every softmax weight by a
    factor within exp(+-2 e), and a head's result by at most exp(2 e) - 1 times the range of its values.
    """
    p, u = case.params, strategies.tolerances.unit_roundoff(case.dtype)
    largest = max(np.abs(b[np.isfinite(b)]).max(initial=0.0) for b in biases)
    dim, heads, width = p.value.weight.shape
    values = product(case.arrays[1].astype(float), p.value.weight.astype(float).reshape(dim, heads * width))
    spread = np.ptp(values, axis=-2).max(initial=0.0)
    out = 1.0 if is_absent(p.output) else np.abs(p.output.weight.astype(float)).sum(axis=(0, 1)).max()
    return math.expm1(2 * 2 * u * largest) * spread * out


def copies_are_weights(case: Drawn, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, size=case.size)
    bias = weighted(case, np.broadcast_to(counts, case.arrays[1].shape[:-1]))
    copies = take_elements(case, np.repeat(np.arange(case.size), counts))
    slack = bias_error(case, bias.masks["bias"])
    agree(bias(), copies(), bias.bound() + copies.bound() + slack, "weights and copies")


def attention_on(most: int = 11, **kwargs) -> st.SearchStrategy:
    return domain("attention", most=most, lengths=False, **kwargs)


def test_the_logarithm_of_a_count_counts():
    """A bias of log k is worth k copies of the element."""
    for_all(copies_are_weights, attention_on(), seeds, share=0.6)


def test_an_ignored_bias_is_noticed():
    """Counting by a bias finds that the bias is ignored."""
    rejects(defects.bias_ignored(), copies_are_weights, attention_on(only=()), seeds)


def weight_zero(case: Drawn, seed: int) -> None:
    kept = np.random.default_rng(seed).random(case.size) < 0.6
    nothing = weighted(case, np.broadcast_to(np.where(kept, 1.0, 0.0), case.arrays[1].shape[:-1]))
    masked = case.with_masks(mask=kept if case.mask is None else case.mask & kept)
    masked = masked.with_masks(mask=np.broadcast_to(masked.mask, case.arrays[1].shape[:-1]).copy())
    # The bias of 0 is added in both, as -0 + 0 is no longer -0.
    masked = weighted(masked, np.ones(case.arrays[1].shape[:-1]))
    same(nothing(), masked())
    removed = take_elements(case, np.flatnonzero(kept))
    agree(nothing(), removed(), masked.bound() + removed.bound(), "weight 0 and removed")


def test_a_weight_of_zero_removes():
    """A bias of -inf is bit for bit a mask, and both are as good as removing the element."""
    for_all(weight_zero, attention_on(), seeds, share=0.6)


@pytest.mark.parametrize("defect", [defects.finite_fill, defects.mask_ignored, defects.bias_ignored])
def test_a_wrong_removal_is_noticed(defect):
    """Removing by a bias finds defects of the mask and of the bias."""
    rejects(defect(), weight_zero, attention_on(scales=(None,)), seeds)


def splitting_a_weight(case: Drawn, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.integers(1, 9, size=(2, *case.arrays[1].shape[:-1])) / 4
    whole = weighted(case, parts[0] + parts[1])
    twice = take_elements(case, np.tile(np.arange(case.size), 2))
    split = weighted(twice, np.concatenate(parts, axis=-1))
    slack = bias_error(case, whole.masks["bias"]) + bias_error(case, split.masks["bias"])
    agree(whole(), split(), whole.bound() + split.bound() + slack, "split weights")


def test_a_weight_may_be_split():
    """An element of weight a + b is worth one of weight a and one of weight b."""
    for_all(splitting_a_weight, attention_on(), seeds, share=0.6)


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["attention-pairs-and-bias", "isab", "pma", "attention_pool-keys", "perceiver_resampler-frames"]
)
def test_symmetry_on_every_backend(backend, name):
    """On every backend, permuting the elements changes nothing, and permuting a batch permutes it.

    The bound covers any order of summation, and thus whatever the backend does with another shape.
    """
    dtype = backend.dtypes[0]
    drawn = strategies.made(name, dtype, 1)
    order, axis = np.random.default_rng(0).permutation(drawn.size), FOLLOWS.get(drawn.function)
    bound, result = drawn.bound(), backend.numpy(drawn.on(backend, dtype))
    other = backend.numpy(take_elements(drawn, order).on(backend, dtype))
    agree(other, take(result, order, axis), 2 * take(bound, order, axis), "permuted set on backends")
    swapped = backend.numpy(drawn.batch_index(np.array([1, 0])).on(backend, dtype))
    agree(swapped, result[[1, 0]], 2 * bound[[1, 0]], "permuted batch on backends")
