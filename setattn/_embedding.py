"""What is done to the inputs of a Perceiver or a pooling head first: tokens, a projection, positions, features."""

from __future__ import annotations

from setattn._kernels import rows_of
from setattn._layers import Options, enter, linear, select
from setattn._memory import Span, part_of
from setattn._params import InputEmbedding, is_absent
from setattn._typing import Array


def rows_for(p: InputEmbedding, places: slice | Span) -> InputEmbedding:
    """Take the rows of the tables that belong to some of the places in a set."""
    return p._replace(
        position=p.position if is_absent(p.position) else part_of(p.position, 0, places),
        features=p.features if is_absent(p.features) else part_of(p.features, 0, places),
    )


def embed(x: Array, mask: Array | None, p: InputEmbedding, o: Options) -> Array:
    """Embed elements ``(..., n, dim)``, or tokens ``(..., n, 1)``, with tables that have ``n`` rows.

    Those that do not take part are put to zeros before, so that no value of theirs is looked at, and after: a row of a
    table is added to them like to any other.
    """
    xp = o.xp
    x = enter(x, mask, o) if is_absent(p.tokens) else select(rows_of(p.tokens, x[..., 0], xp), mask, xp)
    x = linear(x, p.project, xp)
    if not is_absent(p.position):
        x = x + p.position
    if not is_absent(p.features):
        features = linear(p.features, p.features_project, xp)
        x = xp.concat([x, xp.broadcast_to(features, (*x.shape[:-1], features.shape[-1]))], axis=-1)
    return select(x, mask, xp)
