"""In which order to multiply: counted from sizes alone.

With queries ``q`` and elements ``x``, a score is ``(q Wq) (x Wk)'`` and a result ``(a (x Wv)) Wo``: two chains of
products, each of which may be computed in any order. Projecting the elements is one; where few queries meet many
elements it is far cheaper to carry the queries to the elements, ``((q Wq) Wk') x'``, and to project weighted sums of
elements, ``((a x) Wv) Wo``; where many queries meet few elements, to carry the keys to the queries, ``q (Wq (x Wk)')``,
and the output projection to the values, ``a ((x Wv) Wo)``. All counts are for one set of a batch: what a set gives must
not depend on how many others there are. Only a library that copies weights does that once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
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


PROJECT = Order()


def multiplications(s: Sizes, order: Order) -> int:
    """Count the multiplications of an attention, all of its projections included."""
    return _of_scores(s)[order.scores] + _of_values(s)[order.values]


def choose(
    s: Sizes,
    wanted: Order | None = None,
    *,
    whole: bool = True,
    head_norms: Sequence[bool] = (False, False),
    copied: int = 0,
    cached: bool = False,
) -> Order:
    """Return the order with the fewest multiplications, of equal ones the one that projects; or the wanted one.

    ``whole`` says whether the weights of all elements are known at once, without which the output projection, which
    takes all heads together, can't be carried; ``head_norms`` whether queries and keys are normalised on each head:
    those have to be made. Where a wanted order can't be had for such a reason, its part projects. ``copied`` is for a
    library that copies what it multiplies head by head, if it does not lie in memory so: keys, values, what is carried
    from the elements, or, once for so many sets, the weights; ``cached`` says that a cache holds few of these.
    """
    query_norm, key_norm = head_norms
    own_keys = s.heads == s.kv_heads
    scores, values = _of_scores(s), _of_values(s)
    if copied and s.kv_heads > 1:
        copies_of_scores, copies_of_values = _copies(s, copied, cached)
        scores, values = _added(scores, copies_of_scores), _added(values, copies_of_values)
    if key_norm:
        del scores["carry_queries"]
    if not own_keys or query_norm or s.dim_query is None:
        del scores["carry_keys"]
    if not own_keys or not whole or s.dim_out is None:
        del values["carry_output"]
    if wanted is not None:
        return Order(*(w if w in can else "project" for w, can in zip(wanted, (scores, values), strict=True)))
    return Order(_least(scores), _least(values))


# Multiplications that take as long as to copy one number to another place in memory.
_COPY = 96  # of an element
_COPY_OF_WEIGHTS, _COPY_IN_CACHE = 220, 30  # of weights that come from memory, or are few enough for a cache
_IN_CACHE = 2**18  # numbers


def _least(counts: dict[str, int]) -> str:
    best = "project"
    for name, count in counts.items():  # by single comparisons, which torch.compile can trace where sizes are symbols
        best = name if count < counts[best] else best
    return best


def _of_scores(s: Sizes) -> dict[str, int]:
    rows, width = s.heads * s.queries, s.dim_query or 0
    queries = rows * width * s.head_dim
    keys = s.elements * s.dim * s.kv_heads * s.head_dim
    return {
        "project": queries + keys + rows * s.elements * s.head_dim,
        "carry_queries": queries + rows * s.head_dim * s.dim + rows * s.elements * s.dim,
        "carry_keys": keys + s.heads * s.elements * s.head_dim * width + rows * s.elements * width,
    }


def _of_values(s: Sizes) -> dict[str, int]:
    rows, width = s.heads * s.queries, s.dim_out or 0
    values = s.elements * s.dim * s.kv_heads * s.value_dim
    output = rows * s.value_dim * width
    return {
        "project": values + rows * s.elements * s.value_dim + output,
        "carry_weights": rows * s.elements * s.dim + rows * s.dim * s.value_dim + output,
        "carry_output": values + s.heads * s.elements * s.value_dim * width + rows * s.elements * width,
    }


def _copies(s: Sizes, sets: int, cached: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Count what it costs each of some sets to copy what is multiplied head by head, and does not lie in memory so."""
    key, value = s.kv_heads * s.head_dim, s.kv_heads * s.value_dim
    carried_key, carried_value = s.heads * (s.dim_query or 0), s.heads * (s.dim_out or 0)
    scores = {
        "project": s.elements * key * _COPY,
        "carry_queries": _of_weights(s.dim * key, sets, cached),
        "carry_keys": s.elements * (key + carried_key) * _COPY + _of_weights(s.head_dim * carried_key, sets, cached),
    }
    values = {
        "project": s.elements * value * _COPY,
        "carry_weights": _of_weights(s.dim * value, sets, cached),
        "carry_output": s.elements * (value + carried_value) * _COPY,
    }
    return scores, values


def _added(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: count + more[name] for name, count in counts.items()}


def _of_weights(numbers: int, sets: int, cached: bool) -> int:
    return numbers * -(-(_COPY_IN_CACHE if cached and numbers <= _IN_CACHE else _COPY_OF_WEIGHTS) // sets)
