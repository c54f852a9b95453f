"""What softmax attention, its mergeable states, norms and residuals must satisfy as functions of their numbers.

Many of these are asked of `Raw` attention: keys and values lie side by side in the context, and projections of zeros
and ones, which are exact, cut them out again. Its bound is the written-out one of a single head.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import defects
import hypothesis
import numpy as np
import oracle
import pytest
import strategies
import tolerances
from hypothesis import strategies as st
from strategies import Drawn, agree, blocks, for_all, rejects, same, seeds, values
from test_properties_symmetry import lengths_of_heads
from tolerances import product

import setattn
from setattn import LayerNorm, Linear, RMSNorm, _state
from setattn._context import Context, log_length, ready
from setattn._layers import Options, norm
from setattn._namespace import namespace_of
from setattn._params import is_absent

one_thread = strategies.one_thread


# --- raw attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """Queries (..., heads, m, d), keys (..., kv_heads, n, d), values (..., kv_heads, n, c)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    mask: np.ndarray | None
    note: str = ""

    def __repr__(self) -> str:
        mask = None if self.mask is None else self.mask.astype(int).tolist()
        shapes = [a.shape for a in (self.q, self.k, self.v)]
        return f"<raw attention of {shapes}, {self.q.dtype}, scale {self.scale}, mask {mask}, {self.note}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __call__(self, bias: np.ndarray | None = None) -> np.ndarray:
        """Attend: (..., heads, m, c)."""
        *batch, heads, m, d = self.q.shape
        _, n, c = self.v.shape[-3:]
        kv_heads, dtype = self.k.shape[-3], self.q.dtype
        query = np.swapaxes(self.q, -3, -2).reshape(*batch, m, heads * d)
        parts = [np.swapaxes(a, -3, -2).reshape(*batch, n, kv_heads * w) for a, w in ((self.k, d), (self.v, c))]
        cut = np.eye(kv_heads * (d + c), dtype=dtype)
        params = setattn.Attention(
            query=(),
            key=Linear(cut[:, : kv_heads * d].reshape(-1, kv_heads, d)),
            value=Linear(cut[:, kv_heads * d :].reshape(-1, kv_heads, c)),
        )
        out = setattn.attention(
            query, np.concatenate(parts, axis=-1), params, mask=self.mask, bias=bias, scale=self.scale
        )
        return np.swapaxes(out.reshape(*batch, m, heads, c), -3, -2)

    def _for_query_heads(self, a: np.ndarray) -> np.ndarray:
        return np.repeat(a, self.q.shape[-3] // a.shape[-3], axis=-3)

    @property
    def seen(self) -> np.ndarray:
        """Which elements take part, (..., 1, 1, n)."""
        mask = np.ones((*self.k.shape[:-3], self.k.shape[-2]), bool) if self.mask is None else self.mask
        return mask[..., None, None, :]

    def bound(self, hard: bool = False, bias: np.ndarray | None = None) -> np.ndarray:
        k, v = self._for_query_heads(self.k), self._for_query_heads(self.v)
        bias = None if bias is None else bias[..., None, None, :]
        return tolerances.attention_bound(
            self.q, k, v, scale=self.scale, visible=self.seen, dtype=self.q.dtype, hard=hard, bias=bias
        )

    def seen_values(self) -> np.ndarray:
        """Values for the query heads, (..., heads, 1, n, c), NaN where masked."""
        return np.where(self.seen[..., None], self._for_query_heads(self.v)[..., None, :, :], np.nan)


@st.composite
def raws(
    draw: st.DrawFn,
    ladders: tuple[str, ...] = strategies.LADDERS,
    factors: tuple[float, ...] = (1.0, 3.0, 10.0),
    least: int = 1,
    dims: tuple[int, ...] = (1, 2, 3, 5),
    masked: bool = True,
    width: int | None = None,
) -> Raw:
    s = draw(strategies.sizes(least=least, most=33))
    dtype, seed = draw(st.sampled_from(strategies.DTYPES)), draw(seeds)
    rng, d = np.random.default_rng(seed), draw(st.sampled_from(dims))
    ladder, c = draw(st.sampled_from(ladders)), draw(st.sampled_from((1, 2, 4))) if width is None else width
    q = values(rng, (*s.batch, s.heads, s.m, d), "grid" if ladder == "grid" else "normal").astype(dtype)
    k = values(rng, (*s.batch, s.kv_heads, s.n, d), ladder).astype(dtype)
    v = values(rng, (*s.batch, s.kv_heads, s.n, c), ladder).astype(dtype)
    mask = draw(strategies.masks((*s.batch, s.n), rng)) if masked else None
    return Raw(q, k, v, draw(st.sampled_from(factors)) / math.sqrt(d), mask, f"values {ladder!r} from seed {seed}")


def gamma(count: float, dtype: np.dtype) -> float:
    """The largest relative error of `count` roundings: n u / (1 - n u)."""
    nu = count * tolerances.unit_roundoff(dtype)
    return nu / (1 - nu)


# --- weights --------------------------------------------------------------------------------------------------------


def weights_sum_to_one(case: Drawn) -> None:
    result, n = case(), case.size
    assert (result >= 0).all()
    total = np.apply_along_axis(math.fsum, -1, result.astype(float)) if result.size else np.zeros(result.shape[:-1])
    # All weights share their denominator, a sum of n terms, and are rounded once more in the quotient.
    bound = gamma(n, case.dtype) + n * np.finfo(case.dtype).smallest_normal
    pairs = np.ones((*case.batch, case.arrays[0].shape[-2], n), bool)
    pairs &= True if case.mask is None else case.mask[..., None, :]
    pairs &= case.masks.get("pair_mask", True)
    ones = np.broadcast_to(pairs.any(axis=-1)[..., None, :], total.shape).astype(float)
    tolerances.assert_close(total, ones, bound, "sum of weights")


def test_weights_sum_to_one():
    """Weights are not negative and sum to 1, or to exactly 0 where nothing is seen."""
    for_all(weights_sum_to_one, blocks("attention_weights"))


@pytest.mark.parametrize("defect", [defects.over_the_queries, lambda: defects.shrunk(1e-5)])
def test_weights_that_do_not_sum_to_one_are_noticed(defect):
    """The sum of the weights finds a softmax over the wrong axis and one that is off by 1e-5."""
    rejects(defect(), weights_sum_to_one, blocks("attention_weights", least=1))


def within_the_hull(case: Raw) -> None:
    result, v = case(), case.seen_values()
    hypothesis.assume(v.size > 0)
    nothing = ~case.seen[..., 0, :].any(axis=-1)[..., None, None]
    # Whatever the weights are, they are not negative: what is left is two sums of n, n products and a quotient.
    slack = gamma(2 * v.shape[-2] + 1, result.dtype) * np.nanmax(np.abs(v), axis=-2, initial=0.0)
    slack += v.shape[-2] * np.finfo(result.dtype).smallest_normal
    low = np.where(nothing, 0, np.nanmin(v, axis=-2, initial=np.inf))
    high = np.where(nothing, 0, np.nanmax(v, axis=-2, initial=-np.inf))
    assert (result >= low - slack).all()
    assert (result <= high + slack).all()


def test_results_lie_in_the_hull_of_the_values():
    """Every result is between the smallest and the largest value that is seen."""
    for_all(within_the_hull, raws())


@pytest.mark.parametrize("defect", [lambda: defects.shrunk(1e-4), defects.mask_ignored, defects.over_the_queries])
def test_results_outside_of_the_hull_are_noticed(defect):
    """The hull finds weights that do not sum to 1, ignored masks, and the softmax over the wrong axis."""
    rejects(defect(), within_the_hull, raws(ladders=("equal", "dominant", "normal")))


def equal_values(case: Raw) -> None:
    v = np.broadcast_to(case.v[..., :1, :], case.v.shape).copy()
    case = replace(case, v=v)
    expected = np.broadcast_to(case._for_query_heads(v)[..., :1, :], case.q.shape[:-1] + v.shape[-1:])
    expected = np.where(case.seen.any(axis=-1, keepdims=True), expected, 0)
    tolerances.assert_close(case(), expected, case.bound(), "equal values")


def test_equal_values_come_out():
    """Where all values are equal, that is the result, whatever the scores are."""
    for_all(equal_values, raws())
    rejects(defects.shrunk(1e-4), equal_values, raws())


def single_element(case: Raw, seed: int) -> None:
    rng, n = np.random.default_rng(seed), case.k.shape[-2]
    only = rng.integers(n, size=case.k.shape[:-3])
    mask = np.arange(n) == only[..., None]
    expected = np.take_along_axis(case._for_query_heads(case.v), only[..., None, None, None], axis=-2)
    expected = np.broadcast_to(expected, case.q.shape[:-1] + case.v.shape[-1:])
    same(replace(case, mask=mask)(), expected + 0)


def test_a_single_element_comes_out_bit_for_bit():
    """Where one element takes part, its value is the result, bit for bit."""
    for_all(single_element, raws(), seeds)
    rejects(defects.shrunk(1e-4), single_element, raws(), seeds)


# --- values ---------------------------------------------------------------------------------------------------------


def doubled_values(case: Raw, power: int) -> None:
    factor = case.v.dtype.type(2.0**power)
    same(replace(case, v=case.v * factor)(), case() * factor)


def scaling_attention(case: Drawn, power: int) -> None:
    factor, p = case.dtype.type(2.0**power), case.params

    def scaled(linear: Linear) -> Linear:
        return Linear(*[a if is_absent(a) else a * factor for a in linear])

    output = p.output
    if not is_absent(output) and not is_absent(output.bias):
        output = output._replace(bias=output.bias * factor)
    same(case.with_params(p._replace(value=scaled(p.value), output=output))(), case() * factor)


powers = st.integers(-20, 20)


def test_powers_of_two_pass_through_the_values():
    """Values that are multiplied by a power of two multiply the result by it, bit for bit."""
    for_all(doubled_values, raws(), powers)
    for_all(scaling_attention, blocks("attention"), powers)
    rejects(defects.offset(1e-9), doubled_values, raws(), powers)


def linear_in_values(case: Raw, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-8, 9, size=2).tolist()
    other = replace(case, v=values(rng, case.v.shape, "grid").astype(case.v.dtype))
    both = replace(case, v=a * case.v + b * other.v)
    assert both.v.dtype == case.v.dtype
    expected = a * case().astype(float) + b * other().astype(float)
    bound = both.bound() + abs(a) * case.bound() + abs(b) * other.bound()
    tolerances.assert_close(both(), expected, bound, "linear in the values")


def test_attention_is_linear_in_the_values():
    """Sums and multiples of values give sums and multiples of results."""
    for_all(linear_in_values, raws(ladders=("grid",)), seeds)
    rejects(defects.quadratic(), linear_in_values, raws(ladders=("grid",)), seeds)


def shifted_values(case: Raw, shift: int) -> None:
    shifted = replace(case, v=case.v + case.v.dtype.type(shift))
    expected = case().astype(float) + np.where(case.seen.any(axis=-1, keepdims=True), shift, 0)
    tolerances.assert_close(shifted(), expected, case.bound() + shifted.bound(), "shifted values")


def test_a_shift_of_the_values_comes_out():
    """A constant that is added to all values is added to the result."""
    for_all(shifted_values, raws(ladders=("grid",)), st.integers(-100, 100))
    rejects(defects.shrunk(1e-4), shifted_values, raws(ladders=("grid",)), st.integers(50, 100))


def not_expansive(case: Raw, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    other = replace(case, v=case.v + (size * rng.uniform(-1, 1, case.v.shape)).astype(case.v.dtype))
    apart = np.abs(case.seen_values() - other.seen_values())
    largest = np.nanmax(apart, axis=-2, initial=0.0)
    assert (np.abs(case().astype(float) - other()) <= largest + case.bound() + other.bound()).all()


def test_attention_does_not_expand():
    """Results of two sets of values are no further apart than the values."""
    sizes = st.sampled_from((1e-6, 1e-3, 1.0, 100.0))
    for_all(not_expansive, raws(), seeds, sizes)
    rejects(defects.shrunk(-1e-3), not_expansive, raws(), seeds, sizes)


# --- scores ---------------------------------------------------------------------------------------------------------


def common_bias(case: Raw, shift: float) -> None:
    bias = np.full(case.k.shape[:-3] + case.k.shape[-2:-1], shift, case.q.dtype)
    agree(case(bias), case(), case.bound() + case.bound(bias=bias), "common bias")


def shift_of_each_query(case: Raw, seed: int) -> None:
    rng, dtype = np.random.default_rng(seed), case.q.dtype
    shift = (rng.integers(-64, 65, size=(*case.q.shape[:-1], 1)) * rng.choice([0.25, 8])).astype(dtype)
    ones = np.ones((*case.k.shape[:-1], 1), dtype)
    shifted = replace(case, q=np.concatenate([case.q, shift], axis=-1), k=np.concatenate([case.k, ones], axis=-1))
    agree(shifted(), case(), case.bound() + shifted.bound(), "shifted scores")


def test_a_shift_of_all_scores_cancels():
    """A constant that is added to all scores of a query, by a bias or by a feature, changes nothing."""
    for_all(common_bias, raws(), st.sampled_from((1.0, -3.5, 100.0, -1000.0)))
    for_all(shift_of_each_query, raws(), seeds)
    rejects(defects.unshifted(), common_bias, raws(), st.just(-1000.0))
    rejects(defects.unshifted(), shift_of_each_query, raws(), seeds)


def key_bias(case: Raw, seed: int, positional: bool = False) -> None:
    rng, n = np.random.default_rng(seed), case.k.shape[-2]
    shape = (*case.k.shape[:-2], n if positional else 1, case.k.shape[-1])
    moved = replace(case, k=case.k + values(rng, shape, "grid").astype(case.k.dtype) * 4)
    agree(moved(), case(), case.bound() + moved.bound(), "key bias")


def test_a_bias_of_the_keys_cancels():
    """A vector that is added to all keys of a head changes nothing."""
    for_all(key_bias, raws(ladders=("grid",)), seeds)
    rejects(defects.planted(), functools.partial(key_bias_of_each, True), raws(ladders=("grid",)), seeds)


def key_bias_of_each(positional: bool, case: Raw, seed: int) -> None:
    key_bias(case, seed, positional)


key_bias_of_each.__name__ = "key_bias"


def test_the_gradient_of_a_bias_of_the_keys_is_zero():
    """No gradient reaches the bias of the keys but rounding: of each term of the sum that cancels.

    The gradient of a score is scale p_j (g . v_j - g . o). Its sum over j times the query is 0; each term is computed
    with no more than some 3 c + 3 d + 3 n + 30 roundings, and the sums over the set and the queries have m n terms.
    """
    torch = pytest.importorskip("torch")

    def check(case: Drawn, seed: int) -> None:
        p = case.params
        hypothesis.assume(not is_absent(p.key.bias) and is_absent(p.key_norm) and is_absent(p.output))
        hypothesis.assume(min(*case.arrays[0].shape, *case.arrays[1].shape) > 0)
        params = setattn.map_params(lambda a: torch.tensor(a), p)
        params.key.bias.requires_grad_()
        masks = {key: torch.tensor(np.ascontiguousarray(m)) for key, m in case.masks.items()}
        q, y = (torch.tensor(a) for a in case.arrays)
        out = setattn.attention(q, y, params, **masks, **case.options)
        g = torch.tensor(np.random.default_rng(seed).normal(size=tuple(out.shape)))
        (out * g).sum().backward()
        largest = abs(case.options.get("scale", 1.0)) * _largest_query(case) * float(g.abs().max())
        v = product(case.arrays[1], p.value.weight.reshape(p.value.weight.shape[0], -1))
        largest *= np.abs(v).max() + (0 if is_absent(p.value.bias) else np.abs(p.value.bias).max())
        c, d, n = p.value.weight.shape[-1], p.key.weight.shape[-1], y.shape[-2]
        rows = math.prod(out.shape[:-1]) * out.shape[-1] // c
        roundings = 3 * c + 3 * d + 3 * n + 30 + rows * n
        # Sum over rows of sum_j p_j |g . v_j - g . o| |q| <= rows 2 c |g| |v| |q|
        bound = gamma(roundings, case.dtype) * rows * 2 * c * largest
        grad = params.key.bias.grad
        grad = np.zeros(p.key.bias.shape) if grad is None else grad.numpy()
        assert (np.abs(grad) <= bound).all()

    domain = blocks("attention", bare=True, dtypes=("float64",), ladders=("normal",), least=1, most=7, lengths=False)
    for_all(check, domain, seeds, share=0.5)


def _largest_query(case: Drawn) -> float:
    """A bound of the prepared queries: of their norm where they have one, of the projection otherwise."""
    p, q = case.params, case.arrays[0]
    if not is_absent(p.query_norm):
        scale = p.query_norm.scale
        bias = getattr(p.query_norm, "bias", ())
        return math.sqrt(p.key.weight.shape[-1]) * (1 if is_absent(scale) else np.abs(scale).max()) + (
            0 if is_absent(bias) else np.abs(bias).max()
        )
    if is_absent(p.query):
        return float(np.abs(q).max())
    projected = product(np.abs(q), np.abs(p.query.weight.reshape(p.query.weight.shape[0], -1)))
    return float(projected.max() + (0 if is_absent(p.query.bias) else np.abs(p.query.bias).max()))


def powers_of_queries_and_keys(case: Raw, power: int) -> None:
    factor = case.q.dtype.type(2.0**power)
    same(replace(case, q=case.q * factor, k=case.k / factor)(), case())


def test_powers_of_two_cancel_in_the_scores():
    """Queries times a power of two and keys divided by it give the same, bit for bit; queries alone do not."""
    for_all(powers_of_queries_and_keys, raws(), powers)
    hidden = raws(ladders=("normal",), masked=False, least=2)
    rejects(defects.planted(), lambda case: same(replace(case, q=case.q * 2)(), case()), hidden)


HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def rotated(case: Raw, queries_too: bool = True) -> None:
    turn = HADAMARD.astype(case.q.dtype)
    turned = replace(case, q=product(case.q, turn) if queries_too else case.q, k=product(case.k, turn))
    agree(turned(), case(), case.bound() + turned.bound(), "rotated")


def test_rotations_cancel_in_the_scores():
    """Queries and keys that are turned together give the same."""
    domain = raws(ladders=("grid",), dims=(4,))
    for_all(rotated, domain)
    rejects(defects.planted(), lambda case: rotated(case, queries_too=False), domain)


def limits_of_the_scale(case: Raw) -> None:
    mean = replace(case, scale=0.0)
    v = case.seen_values()
    count = case.seen.sum(axis=-1, keepdims=True)
    expected = np.where(np.isnan(v), 0, v).astype(float).sum(axis=-2) / np.maximum(count, 1)
    expected = np.broadcast_to(expected, case.q.shape[:-1] + v.shape[-1:])
    tolerances.assert_close(mean(), expected, mean.bound(), "scale 0")

    scores = product(case.q.astype(float), np.swapaxes(case._for_query_heads(case.k), -1, -2).astype(float))
    scores = np.where(case.seen, scores, -np.inf)
    ordered = np.sort(scores, axis=-1)
    hypothesis.assume(scores.shape[-1] >= 2 and scores.size > 0)
    with np.errstate(invalid="ignore"):
        clear = ordered[..., -1] - ordered[..., -2] > 1e-3
    # exp(-1e-3 * 2^20) is 0 in float64, too.
    sharp = replace(case, scale=2.0**20)()
    best = np.argmax(scores, axis=-1)[..., None]
    winner = np.take_along_axis(case._for_query_heads(case.v), best, axis=-2)
    same(sharp[clear], (winner + 0)[clear])


def test_the_scale_goes_from_the_mean_to_the_largest():
    """A scale of 0 gives the mean of the values; a huge one the value of the element with the largest score."""
    domain = raws(ladders=("normal", "ties", "dominant", "grid"))
    for_all(limits_of_the_scale, domain)
    rejects(defects.mask_of_the_neighbour(), limits_of_the_scale, domain)


def raising_a_score(case: Raw, seed: int) -> None:
    rng, n = np.random.default_rng(seed), case.k.shape[-2]
    j, batch = int(rng.integers(n)), case.k.shape[:-3]
    mask = np.ones((*batch, n), bool) if case.mask is None else case.mask.copy()
    mask[..., j] = True
    case = replace(case, mask=mask)
    target = case._for_query_heads(case.v)[..., j : j + 1, :].astype(float)
    last = None
    for step in (-4.0, 0.0, 0.5, 3.0, 20.0):
        bias = np.zeros((*batch, n), case.q.dtype)
        bias[..., j] = step
        away, bound = np.abs(case(bias).astype(float) - target), case.bound(bias=bias)
        if last is not None:
            assert (away <= last[0] + last[1] + bound).all()
        last = away, bound


def test_raising_a_score_draws_the_result_nearer():
    """The larger the score of an element, the nearer the result is to its value."""
    for_all(raising_a_score, raws(width=1), seeds, share=0.5)
    rejects(defects.positional(-30.0), lambda case, seed: raising_a_score_last(case), raws(width=1, least=2), seeds)


def raising_a_score_last(case: Raw) -> None:
    """Without the planted defect, the element with a bias of 25 has next to all the weight."""
    hypothesis.assume(case.q.size > 0)
    bias = np.zeros(case.k.shape[:-3] + case.k.shape[-2:-1], case.q.dtype)
    bias[..., -1] = 25.0
    plain = replace(case, mask=None, scale=0.0)
    away = np.abs(plain(bias) - plain._for_query_heads(plain.v)[..., -1:, :])
    assert (away <= np.abs(plain.v).max() * (2 * 33 * math.exp(-25.0) + gamma(70, plain.v.dtype))).all()


# --- heads and batches ----------------------------------------------------------------------------------------------


def heads_are_separate(case: Drawn, shift: int = 0) -> None:
    p = case.params
    hypothesis.assume(not is_absent(p.query))
    heads, kv_heads = p.query.weight.shape[1], p.key.weight.shape[1]

    def head(linear: Linear, h: int) -> Linear:
        return Linear(*[a if is_absent(a) else a[..., h : h + 1, :] for a in linear])

    parts = []
    for h in range(heads):
        g = (h // (heads // kv_heads) + shift) % kv_heads
        length_scale = lengths_of_heads(p.length_scale, heads, np.array([h]))
        one = p._replace(query=head(p.query, h), key=head(p.key, g), value=head(p.value, g), length_scale=length_scale)
        parts.append(case.with_params(one)())
    agree(np.concatenate(parts, axis=-1), case(), 2 * case.bound(), "separate heads")


def test_heads_are_separate_attentions():
    """Several heads give what separate calls with one head each give, side by side; groups share their key head.

    Not bit for bit: the products of several heads have another shape, and BLAS another order of summation for it.
    """
    domain = blocks("attention", bare=True, most=13)
    domain = domain.filter(lambda case: is_absent(case.params.output))
    for_all(heads_are_separate, domain, share=0.6)
    rejects(defects.planted(), lambda case: heads_are_separate(case, 1), domain)


def batches_are_loops(case: Drawn) -> None:
    result = case()
    if not case.batch:
        same(case.batch_index(None)(), result[None])
        return
    for i in range(case.batch[0]):
        same(case.batch_index(i)(), result[i])


@pytest.mark.parametrize("name", strategies.BLOCKS)
def test_batch_axes_are_loops_bit_for_bit(name):
    """Any batch axes give what a loop over them gives, and an axis of 1 what none gives, bit for bit."""
    for_all(batches_are_loops, blocks(name), share=0.4)


def test_batches_that_are_no_loops_are_noticed():
    """Loops over the batch find that items leak into their neighbours."""
    rejects(defects.batch_mixed(), batches_are_loops, blocks("attention", batch=1, least=1))


# --- blocks ---------------------------------------------------------------------------------------------------------


def value_free(case: Drawn, seed: int) -> None:
    p = case.params
    zero = setattn.map_params(np.zeros_like, p.attention.value)
    case = case.with_params(p._replace(attention=p.attention._replace(value=zero)))
    y = case.arrays[1]
    other = case.with_array(1, values(np.random.default_rng(seed), y.shape, "normal").astype(y.dtype))
    same(other(), case())


def test_without_values_the_context_has_no_effect():
    """Where the projection of the values is 0, a block does not depend on what it attends to, bit for bit."""
    for_all(value_free, blocks("mab"), seeds)
    rejects(defects.planted(), lambda case, seed: value_free_but_for_bias(case, seed), blocks("mab", least=1), seeds)


def value_free_but_for_bias(case: Drawn, seed: int) -> None:
    y = case.arrays[1]
    same(case.with_array(1, values(np.random.default_rng(seed), y.shape, "normal").astype(y.dtype))(), case())


def inducing(case: Drawn) -> None:
    p, options = case.params, case.options
    x = case.arrays[0]
    clean = x if case.mask is None else np.where(case.mask[..., None], x, 0).astype(x.dtype)
    h = setattn.mab(p.inducing_points, clean, p.mab_inducing, mask=case.mask, **options)
    same(case(), setattn.mab(clean, h, p.mab_set, query_mask=case.mask, **options))


def test_an_isab_sees_its_set_through_the_inducing_points():
    """An induced block is, bit for bit, its two blocks one after the other."""
    for_all(inducing, blocks("isab"))


def by_hand(x: np.ndarray, p: Any) -> np.ndarray:
    """Apply a linear map that may be absent."""
    return x if is_absent(p) else product(x, p.weight) + (0 if is_absent(p.bias) else p.bias)


def compositions(case: Drawn) -> None:
    x, p, options = case.arrays[0], case.params, case.options
    for block in p.encoder:
        x = (setattn.isab if isinstance(block, setattn.ISAB) else setattn.sab)(x, block, mask=case.mask, **options)
    x = setattn.pma(x, p.pma, mask=case.mask, **options)
    for block in p.decoder:
        x = setattn.sab(x, block, **options)
    same(case(), by_hand(x, p.output))


def test_a_set_transformer_is_its_blocks_in_a_row():
    """A Set Transformer is, bit for bit, its encoder blocks, its pooling, its decoder blocks and its output layer."""
    for_all(compositions, blocks("set_transformer"), share=0.5)


def residual(case: Drawn, silent: bool = True) -> None:
    p, options = case.params, case.options
    hypothesis.assume(not is_absent(p.attention.output))
    attention = p.attention
    if silent:
        attention = attention._replace(output=setattn.map_params(np.zeros_like, attention.output))
    case = case.with_masks(query_mask=None).with_params(p._replace(attention=attention))
    only, x = case.with_params(case.params._replace(ff=()))(), case.arrays[0]
    o = Options(namespace_of(x), eps=options["eps"])
    h = np.broadcast_to(by_hand(x, p.project), only.shape) + 0 if options["query_residual"] else np.zeros_like(only)
    same(only, norm(norm(h, p.attention_norm, o), p.output_norm, o) + 0)
    # A feed-forward network whose last layer is 0 is none.
    if not is_absent(p.ff) and not is_absent(p.ff.output):
        ff = p.ff._replace(output=setattn.map_params(np.zeros_like, p.ff.output))
        same(case.with_params(case.params._replace(ff=ff))() + 0, only + 0)


def test_branches_of_zero_leave_the_residual():
    """A block whose branches give 0 gives its norms of its projected queries, bit for bit; with others it does not.

    Where the queries are not added, it gives its norms of 0.
    """
    for_all(residual, blocks("mab"))
    rejects(defects.planted(), lambda case: residual(case, silent=False), blocks("mab", least=1))


def closed_gates(case: Drawn) -> None:
    p = case.params
    closed = p._replace(attention_gate=np.zeros_like(p.attention_gate), ff_gate=np.zeros_like(p.ff_gate))
    x = case.arrays[0]
    same(case.with_params(closed)() + 0, np.broadcast_to(x, (*case.batch, *x.shape[-2:])) + 0)


def test_closed_gates_are_the_identity():
    """With gates of 0 a gated cross-attention gives its text, bit for bit; with others it does not."""
    for_all(closed_gates, blocks("gated_cross_attention"))
    domain = blocks("gated_cross_attention", least=1, only=())
    rejects(defects.planted(), lambda case: same(case(), np.broadcast_to(case.arrays[0], case().shape)), domain)


# --- states ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A call of attention whose set is cut in parts."""

    case: Drawn
    cuts: tuple[int, ...]
    whole: Drawn | None = None  # what decides on the order of products, if not the case itself

    def __post_init__(self):
        object.__setattr__(
            self,
            "o",
            Options(
                namespace_of(self.case.arrays[0]),
                activation=self.case.options.get("activation", "gelu"),
                eps=self.case.options["eps"],
                scale=self.case.options.get("scale"),
            ),
        )

    @property
    def order(self) -> setattn.Order:
        """The order of products that the whole set gets, but for the one that makes no states."""
        query, y = (self.whole or self.case).arrays
        params = self.case.params
        context = Context(y)
        return _state.order_of(_state.sizes_of(query, context, params), context, params, self.o)

    def states(self) -> list[_state.State]:
        """The states of all parts."""
        query, y = self.case.arrays
        edges = [0, *self.cuts, self.case.size]
        whole = Context(y, *map(self.case.masks.get, ("mask", "pair_mask")))
        log_n = None if is_absent(self.case.params.length_scale) else log_length(query, [whole], self.o.xp)
        if not _state.as_they_come(self.order):
            query = _state.projected_queries(query, self.case.params, self.o, log_n)
        q = _state.queries(query, Context(y), self.case.params, self.order, self.o)
        made = []
        for start, stop in itertools.pairwise(edges):
            masks = [None if m is None else m[..., start:stop] for m in map(self.case.masks.get, ("mask", "pair_mask"))]
            context = ready(Context(y[..., start:stop, :], *masks), self.o)
            made.append(_state.make_state(q, context, self.case.params, self.o))
        return made

    def merge(self, a: _state.State, b: _state.State) -> _state.State:
        return _state.merge_states(a, b, self.o.xp)

    def empty(self) -> _state.State:
        return replace(
            self,
            case=self.case.with_elements(self.case.arrays[1][..., :0, :]).with_masks(
                **{k: m[..., :0] for k, m in self.case.masks.items()}
            ),
            cuts=(),
            whole=self.whole or self.case,
        ).states()[0]

    def result(self, state: _state.State) -> np.ndarray:
        state = _state.of_values(state, self.order, self.case.params, self.o.xp)
        out = _state.finish(state, self.o.xp)
        return _state.output(out, self.case.arrays[0], self.case.params, self.o.xp)

    def bound(self, merges: int) -> np.ndarray:
        case = self.case
        return tolerances.bounds(
            "attention", *case.arrays, params=case.params, dtype=case.dtype, merges=merges, **case.keywords()
        )[1]


@st.composite
def parts(draw: st.DrawFn, cuts: int = 2, **kwargs: Any) -> Parts:
    case = draw(blocks("attention", **({"most": 17} | kwargs)))
    places = draw(st.lists(st.integers(0, case.size), min_size=cuts, max_size=cuts))
    return Parts(case, tuple(sorted(places)))


def same_state(a: _state.State, b: _state.State) -> None:
    for x, y in zip(a, b, strict=True):
        same(x, y)


def split_anywhere(drawn: Parts) -> None:
    first, *others = drawn.states()
    state = functools.reduce(drawn.merge, others, first)
    assert not any(np.isnan(a).any() for a in state)
    bound = drawn.bound(0) + drawn.bound(len(others))
    agree(drawn.result(state), drawn.case(), bound, "merged states")


def test_a_set_may_be_split_anywhere():
    """The merged states of any parts, empty or masked ones among them, give the attention to the whole set."""
    for_all(split_anywhere, parts(cuts=3))


@pytest.mark.parametrize("defect", [defects.unscaled_merge, defects.dropped, defects.lopsided_merge])
def test_a_wrong_merge_is_noticed(defect):
    """Splitting finds states that are not brought to one scale, that lose an element or count the second part less."""
    rejects(defect(), split_anywhere, parts(cuts=3, scales=(None,), ladders=("normal", "dominant")))


def merge_commutes(drawn: Parts) -> None:
    a, b = drawn.states()
    same_state(drawn.merge(a, b), drawn.merge(b, a))


def test_merging_is_commutative_bit_for_bit():
    """Two states give the same in either order, bit for bit."""
    for_all(merge_commutes, parts(cuts=1))
    rejects(defects.lopsided_merge(), merge_commutes, parts(cuts=1))


def empty_is_neutral(drawn: Parts) -> None:
    (state,), empty = drawn.states(), drawn.empty()
    largest, total, weighted = empty
    assert (largest == -np.inf).all()
    same(total, np.zeros_like(total))
    same(weighted, np.zeros_like(weighted))
    with np.errstate(all="raise", under="ignore"):
        same_state(drawn.merge(state, empty), state)
        same_state(drawn.merge(empty, state), state)
        same_state(drawn.merge(empty, empty), empty)
    result = drawn.result(empty)
    assert np.isfinite(result).all()


def test_the_state_of_nothing_is_neutral_bit_for_bit():
    """The state of no elements is -inf, 0 and 0; merging it changes nothing, no NaN and no warning comes of it."""
    for_all(empty_is_neutral, parts(cuts=0))
    rejects(defects.unguarded_merge(), empty_is_neutral, parts(cuts=0))


def masked_is_empty(drawn: Parts) -> None:
    case = drawn.case
    nothing = case.with_masks(mask=np.zeros(case.arrays[1].shape[:-1], bool))
    (masked,) = replace(drawn, case=nothing).states()
    same_state(masked, drawn.empty())


def test_the_state_of_masked_elements_is_that_of_nothing():
    """Elements that are all masked have the state of no elements, bit for bit."""
    for_all(masked_is_empty, parts(cuts=0))
    rejects(defects.finite_fill(), masked_is_empty, parts(cuts=0, least=1))


def merge_is_associative(drawn: Parts) -> None:
    a, b, c = drawn.states()
    left = drawn.result(drawn.merge(drawn.merge(a, b), c))
    right = drawn.result(drawn.merge(a, drawn.merge(b, c)))
    agree(left, right, 2 * drawn.bound(2), "associative merge")


def test_merging_is_associative():
    """Three states give the same in either grouping, up to rounding."""
    for_all(merge_is_associative, parts(cuts=2))
    wild = parts(cuts=2, scales=(None,), ladders=("normal", "dominant"))
    rejects(defects.lopsided_merge(), lambda drawn: merge_commutes_twice(drawn), wild)


def merge_commutes_twice(drawn: Parts) -> None:
    a, b, c = drawn.states()
    same_state(drawn.merge(drawn.merge(a, b), c), drawn.merge(c, drawn.merge(b, a)))


def finishing_again(drawn: Parts) -> None:
    (state,) = drawn.states()
    copies = [a.copy() for a in state]
    first = drawn.result(state)
    same(drawn.result(state), first)
    for a, b in zip(state, copies, strict=True):
        same(a, b)
    same(first, drawn.case(plan=setattn.Plan(order=drawn.order)))


def test_finishing_does_not_touch_the_state():
    """A state may be finished twice, gives the same, is not changed, and is that of the public function."""
    for_all(finishing_again, parts(cuts=0), share=0.5)


# --- norms ----------------------------------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn, ladders: tuple[str, ...] = strategies.LADDERS) -> tuple[np.ndarray, Any, float]:
    """Draw rows, a norm with or without parameters, and its eps."""
    shape = (draw(st.integers(0, 5)), draw(st.sampled_from((1, 2, 3, 5, 8, 16, 17, 33))))
    seed, dtype = draw(seeds), draw(st.sampled_from(strategies.DTYPES))
    rng = np.random.default_rng(seed)
    x = values(rng, shape, draw(st.sampled_from(ladders))).astype(dtype)
    scale, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    kinds = (LayerNorm(scale, bias), LayerNorm(), RMSNorm(scale), RMSNorm(), LayerNorm(scale))
    return x, draw(st.sampled_from(kinds)), draw(st.sampled_from((1e-5, 1e-6, 1e-3)))


def normed(x: np.ndarray, p: Any, eps: float) -> np.ndarray:
    return norm(x, p, Options(namespace_of(x), eps=eps))


def norm_of_powers(drawn: tuple, power: int) -> None:
    x, p, eps = drawn
    factor = x.dtype.type(2.0**power)
    same(normed(x * factor, p, eps * 2.0 ** (2 * power)), normed(x, p, eps))


def test_powers_of_two_cancel_in_a_norm():
    """Rows times a power of two, with eps times its square, give the same, bit for bit."""
    # eps is given as a Python number, and must be one that both precisions have.
    domain = rows().map(lambda drawn: (*drawn[:2], 2.0 ** round(math.log2(drawn[2]))))
    for_all(norm_of_powers, domain, powers)
    rejects(defects.planted(), lambda drawn: same(normed(2 * drawn[0], *drawn[1:]), normed(*drawn)), rows())


def norm_of_shifted(drawn: tuple, shift: int) -> None:
    x, p, eps = drawn
    p = LayerNorm(p.scale, p.bias) if isinstance(p, LayerNorm) else LayerNorm(p.scale)
    same(normed(x + x.dtype.type(shift), p, eps), normed(x, p, eps))


def test_a_common_offset_costs_a_layer_norm_nothing():
    """A constant that is added to a row without rounding changes nothing, bit for bit, however large it is."""
    shifts = st.sampled_from((1, -5, 100, 4096, -(2**14)))
    for_all(norm_of_shifted, rows(ladders=("grid", "ties", "zeros", "equal")).filter(_fits), shifts)
    rejects(defects.one_pass_norm(), norm_of_shifted_by_one_pass, rows(ladders=("grid",)), shifts)


def _fits(drawn: tuple) -> bool:
    """Say whether a shift by 2^14 is exact in float32."""
    x = drawn[0]
    return bool((x * 64 == np.round(x * 64)).all() and (np.abs(x) < 2**10).all())


def norm_of_shifted_by_one_pass(drawn: tuple, shift: int) -> None:
    x, p, eps = drawn
    hypothesis.assume(isinstance(p, LayerNorm))
    import setattn._layers as layers  # the defect is in the module, not in the name that was imported here

    o = Options(namespace_of(x), eps=eps)
    same(layers.norm(x + x.dtype.type(shift), p, o), layers.norm(x, p, o))


def moments(drawn: tuple, factor: float = 1.0) -> None:
    x, p, eps = drawn
    bare = LayerNorm() if isinstance(p, LayerNorm) else RMSNorm()
    y = factor * normed(x, bare, eps).astype(float)
    bound = tolerances.bounds("norm", x, params=bare, dtype=x.dtype, eps=eps)[1]
    wide = x.astype(float)
    power = wide.var(axis=-1) if isinstance(p, LayerNorm) else (wide**2).mean(axis=-1)
    expected = power / (power + eps)
    # |mean y| <= mean b, and |y^2 - (y + e)^2| <= 2 |y| b + b^2 for errors up to b.
    tolerances.assert_close(
        (y**2).mean(axis=-1),
        expected,
        (2 * np.abs(y) * bound + bound**2).mean(axis=-1) + 1e-14,
        "second moment of a norm",
    )
    if isinstance(p, LayerNorm):
        tolerances.assert_close(y.mean(axis=-1), np.zeros(len(y)), bound.mean(axis=-1) + 1e-14, "mean of a norm")


def test_moments_of_a_norm():
    """A layer norm has mean 0, and either norm the mean square s / (s + eps), with s that of what it is given."""
    for_all(moments, rows())
    rejects(defects.planted(), lambda drawn: moments(drawn, 1 + 1e-4), rows())


def constant_rows(value: float, drawn: tuple) -> None:
    x, p, eps = drawn
    p = p if isinstance(p, LayerNorm) else LayerNorm(p.scale)
    with np.errstate(all="raise", under="ignore"):
        result = normed(np.full_like(x, min(value, float(np.finfo(x.dtype).max) / 2)), p, eps)
    expected = np.zeros_like(x) if is_absent(p.bias) else np.broadcast_to(p.bias, x.shape)
    assert (result == expected).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 2.0**60, 1.7e38, 1e-40, 1e300])
def test_a_constant_row_gives_the_bias(value):
    """A layer norm of a constant row is exactly its bias, without a warning, for the largest numbers, too."""
    for_all(functools.partial(constant_rows, value), rows(), share=0.5)


def test_a_single_feature_gives_the_bias():
    """A layer norm of one feature is its bias, whatever the feature is."""

    def check(drawn: tuple, shift: float) -> None:
        x, _, eps = drawn
        bias = np.ones(1, x.dtype)
        assert (normed(x[:, :1] * x.dtype.type(shift), LayerNorm((), bias), eps) == 1).all()

    for_all(check, rows(), st.sampled_from((1.0, 1e10, 1e30)), share=0.5)


def huge_rows(drawn: tuple, power: int) -> None:
    x, p, eps = drawn
    hypothesis.assume(x.size > 0)
    top = np.finfo(x.dtype).maxexp
    x = (x / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1)) * x.dtype.type(2.0 ** (top - 1 - power))
    with np.errstate(all="raise", under="ignore"):
        result = normed(x, p, eps)
    assert np.isfinite(result).all()
    value = oracle.evaluate("norm", x, params=p, eps=eps, exact=True)
    # The bound is that of the row scaled down, whose eps is next to nothing.
    bound = tolerances.bounds("norm", np.ldexp(x, power + 1 - top), params=p, dtype=x.dtype, eps=1e-300)[1]
    tolerances.assert_close(result, value, bound, "norm of huge rows")


def test_norms_of_the_largest_numbers():
    """Rows up to half of the largest number have norms as exact as those of other rows, and no warning."""
    for_all(huge_rows, rows(ladders=("normal", "dominant")), st.integers(1, 20))
