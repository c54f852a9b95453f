"""Positions: where a pooling head adds them, and the features that they are made of."""

from __future__ import annotations

from unittest import mock

import cases
import numpy as np
import pytest
import tolerances

import setattn
from setattn import Order, Plan, _context, _state

ORDERS = [Order(s, v) for s in ("project", "carry_queries", "carry_keys") for v in ("project", "carry_weights")]
PLANS = [Plan(order, size) for order in ORDERS for size in (None, 2)] + [Plan(Order("carry_keys", "carry_output"))]
by_plan = pytest.mark.parametrize("plan", PLANS)
HEADS = ("attention_pool-table", "attention_pool-keys", "attention_pool-all-positions")


def pool(x, params, *, mask=None, key_positions=None, plan=None):
    return setattn.attention_pool(x, params, mask=mask, key_positions=key_positions, eps=1e-6, plan=plan)


def normed(x, p):
    """Apply a layer norm."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * p.scale + p.bias


# --- where they are added -------------------------------------------------------------------------------------------


@by_plan
def test_key_positions_are_features_for_the_keys_alone(plan):
    """They are as good as features beside the elements that the key projection has rows for, and the other zeros."""
    case = cases.make("attention_pool-keys")
    p, (x,) = case.params, case.arrays
    y = normed(tolerances.product(x, p.input.weight) + p.input.bias, p.context_norm)
    key, value = p.attention.key, p.attention.value
    attention = p.attention._replace(
        key=key._replace(weight=np.concatenate([key.weight, key.weight])),
        value=value._replace(weight=np.concatenate([value.weight, 0 * value.weight])),
    )
    both = np.concatenate([y, case.masks["key_positions"]], axis=-1)
    wanted = pool(both, p._replace(attention=attention, input=(), context_norm=()), mask=case.masks["mask"])
    np.testing.assert_allclose(pool(x, p, **case.masks, plan=plan), wanted, rtol=1e-9, atol=1e-9)


@by_plan
def test_a_table_is_added_to_the_elements(plan):
    """What a table of positions gives is what its rows, added before the norm by hand, give."""
    case = cases.make("attention_pool-all-positions")
    p, (x,) = case.params, case.arrays
    y = normed(tolerances.product(x, p.input.weight) + p.input.bias + p.position, p.context_norm)
    wanted = pool(y, p._replace(input=(), context_norm=(), position=()), **case.masks)
    np.testing.assert_allclose(pool(x, p, **case.masks, plan=plan), wanted, rtol=1e-9, atol=1e-9)


def test_the_positions_of_probes_are_added_after_their_norm():
    case = cases.make("attention_pool-all-positions")
    p, (x,) = case.params, case.arrays
    probe = normed(p.probe, p.query_norm) + p.probe_position
    wanted = pool(x, p._replace(probe=probe, query_norm=(), probe_position=()), **case.masks)
    np.testing.assert_allclose(pool(x, p, **case.masks), wanted, rtol=1e-12, atol=1e-12)


def test_shared_key_positions_are_those_of_every_set():
    case = cases.make("attention_pool-all-positions")
    shared = case.masks["key_positions"]
    each = np.broadcast_to(shared, (*case.arrays[0].shape[:-1], shared.shape[-1]))
    np.testing.assert_array_equal(cases.replace(case, masks={"key_positions": each}).numpy(), case.numpy())


@by_plan
@pytest.mark.parametrize("name", HEADS)
def test_masked_elements_are_removed_with_their_positions(name, plan):
    """A masked element is not there, and the rows of all tables stay with the others."""
    case = cases.make(name)
    x, p, keys = case.arrays[0][0], case.params, case.masks.get("key_positions")
    keys = keys if keys is None or keys.ndim == 2 else keys[0]
    mask = np.array([True, False, True, True, False, False, True])
    out = pool(x, p, mask=mask, key_positions=keys, plan=plan)
    if not isinstance(p.position, tuple):
        p = p._replace(position=p.position[: mask.size][mask])
    keys = None if keys is None else keys[mask]
    np.testing.assert_allclose(out, pool(x[mask], p, key_positions=keys), rtol=1e-10, atol=1e-10)


@by_plan
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_what_is_masked_has_no_position(dtype, plan):
    """Under a mask, key positions that are no numbers change no bit, whether each set has its own or not."""
    case = cases.make("attention_pool-keys").rounded(dtype)
    mask, keys = case.masks["mask"].copy(), case.masks["key_positions"]
    mask[:, 3] = False

    def result(a):
        return cases.replace(case, masks={"mask": mask, "key_positions": a}).numpy(dtype, plan=plan)

    np.testing.assert_array_equal(result(np.where(mask[..., None], keys, np.nan)), result(keys))
    shared = keys[0].copy()
    shared[3] = np.inf
    np.testing.assert_array_equal(result(shared), result(keys[0]))


@pytest.mark.parametrize("name", HEADS)
def test_sets_of_a_batch_keep_their_positions(name, monkeypatch):
    """The positions of a set come along where a batch is worked through set by set."""
    case, value, bound = cases.expected(name, "float32")
    for module, budget in ((setattn._blocks, 1), (setattn._blocks, 4000)):
        monkeypatch.setattr(module, "block_bytes", lambda x, xp, budget=budget: budget)
        tolerances.assert_close(case.numpy("float32"), value, bound, f"blocks of {case.function}")


DEFECTS = {
    "the values get them, too": lambda c: c._replace(elements=c.key_elements(), key_positions=None),
    "nothing gets them": lambda c: c._replace(key_positions=None),
    "another element's": lambda c: c._replace(key_positions=np.roll(c.key_positions, 1, axis=-2)),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("name", ["attention_pool-keys", "attention_pool-all-positions"])
def test_positions_in_the_wrong_place_are_noticed(name, defect):
    """The bound refuses positions that the values get, that nothing gets, and those of the neighbour."""
    case, value, bound = cases.expected(name, "float32")
    original = _state.make_state

    def wrong(q, context, p, o):
        return original(q, DEFECTS[defect](context), p, o)

    with mock.patch.object(setattn._attend, "make_state", wrong), pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32"), value, bound, "misplaced positions")


def test_blocks_that_all_start_from_the_first_row_are_noticed():
    """The bound refuses a table whose rows are not those of a block's elements."""
    case, value, bound = cases.expected("attention_pool-table", "float32")
    part = _context.Context.part

    def wrong(context, elements):
        again = slice(0, elements.stop - elements.start)
        embedding = part(context, again).embedding
        return part(context, elements)._replace(embedding=embedding)

    with mock.patch.object(_context.Context, "part", wrong), pytest.raises(AssertionError):
        tolerances.assert_close(case.numpy("float32", plan=Plan(block_size=2)), value, bound, "misplaced rows")


# --- what they are made of ------------------------------------------------------------------------------------------


def published_table(dim, height, width):
    """The table of masked autoencoders, MiniCPM-V and Qwen-VL, row by row, by its definition."""
    table = np.zeros((height, width, dim))
    for row, column, k in np.ndindex(height, width, dim // 4):
        for half, place in enumerate((column, row)):
            angle = place / 10000.0 ** (k / (dim / 4))
            table[row, column, half * dim // 2 + k] = np.sin(angle)
            table[row, column, half * dim // 2 + dim // 4 + k] = np.cos(angle)
    return table


def test_sincos_features_are_the_published_table():
    """Columns come first, rows second, and in each half all sines before all cosines."""
    row, column = np.meshgrid(np.arange(3.0), np.arange(5.0), indexing="ij")
    features = setattn.sincos_features(np.stack([column, row], axis=-1), dim=16)
    np.testing.assert_allclose(features, published_table(16, 3, 5), rtol=0, atol=1e-14)


def test_temperatures_of_numpy_do_not_widen_the_result():
    places = np.ones((5, 2), np.float32)
    for number in (np.float64, np.int64):
        assert setattn.sincos_features(places, dim=np.int64(8), temperature=number(100)).dtype == np.float32
