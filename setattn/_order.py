"""In which order to multiply: counted from sizes alone.

With ``q`` a projected query and ``x`` an element, a score is ``q @ (x @ key).T = (q @ key.T) @ x.T``, and a weighted
sum of values is ``a @ (x @ value) = (a @ x) @ value``. Either form gives the same number; the second one never projects
the elements, which is far cheaper where few queries meet many of them. All counts are for one set of a batch: what a
set gives, to the last bit, must not depend on how many others there are.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """What the count of multiplications depends on."""

    queries: int  # of all heads together
    elements: int
    dim: int
    kv_heads: int
    head_dim: int
    value_dim: int


class Order(NamedTuple):
    """Whether the queries are carried to the elements, and whether the weights are, instead of projecting those."""

    carry_queries: bool
    carry_weights: bool


def multiplications(s: Sizes, order: Order) -> int:
    """Count the multiplications from projected queries to weighted sums of values."""
    pairs = s.queries * s.elements
    if order.carry_queries:
        scores = s.queries * s.head_dim * s.dim + pairs * s.dim
    else:
        scores = s.elements * s.dim * s.kv_heads * s.head_dim + pairs * s.head_dim
    if order.carry_weights:
        values = pairs * s.dim + s.queries * s.dim * s.value_dim
    else:
        values = s.elements * s.dim * s.kv_heads * s.value_dim + pairs * s.value_dim
    return scores + values


def cheapest(s: Sizes) -> Order:
    """Return the order with the fewest multiplications; of equal ones, the one that projects the elements."""
    # One comparison for each product, which torch.compile can trace with a size that is a symbol.
    projected = multiplications(s, Order(False, False))
    return Order(
        carry_queries=multiplications(s, Order(True, False)) < projected,
        carry_weights=multiplications(s, Order(False, True)) < projected,
    )
