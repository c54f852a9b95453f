"""In which order to multiply: counted from sizes alone.

With queries ``q`` and elements ``x``, a score is ``(q Wq) (x Wk)'`` and a result ``(a (x Wv)) Wo``: two chains of
products, each of which may be computed in any order. Projecting the elements is one; where few queries meet many
elements it is far cheaper to carry the queries to the elements, ``((q Wq) Wk') x'``, and to project weighted sums of
elements, ``((a x) Wv) Wo``; where many queries meet few elements, to carry the keys to the queries, ``q (Wq (x Wk)')``,
and the output projection to the values, ``a ((x Wv) Wo)``. All counts are for one set of a batch: what a set gives must
not depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

SCORES = ("project", "carry_queries", "carry_keys")
VALUES = ("project", "carry_weights", "carry_output")


class Sizes(NamedTuple):
    """What the count of multiplications depends on."""

    queries: int  # of one head
    elements: int
    dim: int  # of an element
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dim_query: int | None = None  # None: the queries are used as they come
    dim_out: int | None = None  # None: the heads are laid side by side


class Order(NamedTuple):
    """The order of the products of an attention.

    ``scores`` is ``"project"``, ``"carry_queries"`` to the elements or ``"carry_keys"`` to the queries; ``values`` is
    ``"project"``, ``"carry_weights"`` to the elements or ``"carry_output"``, the output projection, to the values.
    """

    scores: str = "project"
    values: str = "project"


def multiplications(s: Sizes, order: Order) -> int:
    """Count the multiplications of an attention, all of its projections included."""
    return _of_scores(s, order.scores) + _of_values(s, order.values)


def choose(
    s: Sizes, wanted: Order | None = None, *, whole: bool = True, head_norms: Sequence[bool] = (False, False)
) -> Order:
    """Return the order with the fewest multiplications, of equal ones the one that projects; or the wanted one.

    ``whole`` says whether the weights of all elements are known at once, without which the output projection, which
    takes all heads together, can't be carried; ``head_norms`` whether queries and keys are normalised on each head:
    those have to be made. Where a wanted order can't be had for such a reason, its part projects.
    """
    query_norm, key_norm = head_norms
    own_keys = s.heads == s.kv_heads
    can = {
        "project": True,
        "carry_queries": not key_norm,
        "carry_keys": own_keys and not query_norm and s.dim_query is not None,
        "carry_weights": True,
        "carry_output": own_keys and whole and s.dim_out is not None,
    }
    scores, values = [name for name in SCORES if can[name]], [name for name in VALUES if can[name]]
    if wanted is not None:
        return Order(*(w if w in names else "project" for w, names in zip(wanted, (scores, values), strict=True)))
    return Order(_least(s, scores, _of_scores), _least(s, values, _of_values))


def _least(s: Sizes, names: list[str], count: Callable[[Sizes, str], int]) -> str:
    best = names[0]
    for name in names[1:]:  # by single comparisons, which torch.compile can trace where a size is a symbol
        best = name if count(s, name) < count(s, best) else best
    return best


def _of_scores(s: Sizes, scores: str) -> int:
    rows = s.heads * s.queries
    project_queries = 0 if s.dim_query is None else rows * s.dim_query * s.head_dim
    project_elements = s.elements * s.dim * s.kv_heads * s.head_dim
    if scores == "project":
        return project_queries + project_elements + rows * s.elements * s.head_dim
    if scores == "carry_queries":
        return project_queries + rows * s.head_dim * s.dim + rows * s.elements * s.dim
    width = s.dim_query or 0
    return project_elements + s.heads * s.elements * s.head_dim * width + rows * s.elements * width


def _of_values(s: Sizes, values: str) -> int:
    rows = s.heads * s.queries
    project_elements = s.elements * s.dim * s.kv_heads * s.value_dim
    project_output = 0 if s.dim_out is None else rows * s.value_dim * s.dim_out
    if values == "project":
        return project_elements + rows * s.elements * s.value_dim + project_output
    if values == "carry_weights":
        return rows * s.elements * s.dim + rows * s.dim * s.value_dim + project_output
    width = s.dim_out or 0
    return project_elements + s.heads * s.elements * s.value_dim * width + rows * s.elements * width
