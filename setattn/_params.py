"""The parameter trees: plain named tuples of arrays, whose shapes and node types are the configuration.

Every part written ``= ()`` may be absent. A head count, a width or a number of seeds is read off the shape of an
array, the kind of a norm or of an encoder block off the type of its node; nothing in a tree is an integer, a string or
``None``, so that JAX and PyTorch take every tree as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from setattn._errors import NamespaceError, ParameterError
from setattn._typing import Absent, Array

T = TypeVar("T")


class Linear(NamedTuple):
    """An affine map, ``x @ weight + bias``.

    Either side of ``weight`` may be split into heads: a projection of queries, keys or values has a weight of shape
    ``(dim_in, heads, head_dim)`` and a bias of shape ``(heads, head_dim)``; the output projection of an attention has
    a weight of shape ``(heads, head_dim, dim_out)`` and a bias of shape ``(dim_out,)``; that of :class:`MeanLatents`
    has ``(dim, p, dim)`` and ``(p, dim)``; every other one is ``(dim_in, dim_out)`` and ``(dim_out,)``.
    """

    weight: Array
    bias: Array = ()


class LayerNorm(NamedTuple):
    """Layer normalisation, ``(x - mean) / sqrt(variance + eps) * scale + bias``, over the last axis."""

    scale: Array = ()
    bias: Array = ()


class RMSNorm(NamedTuple):
    """Root-mean-square normalisation, ``x / sqrt(mean(x**2) + eps) * scale``, over the last axis."""

    scale: Array = ()


class FeedForward(NamedTuple):
    """A row-wise feed-forward network.

    ``output(activation(hidden(x)))``; with a ``gate``, ``output(activation(gate(x)) * hidden(x))`` (GEGLU with GELU,
    SwiGLU with SiLU); without ``output``, one layer, ``activation(hidden(x))``.
    """

    hidden: Linear
    output: Linear | Absent = ()
    gate: Linear | Absent = ()


class LengthScale(NamedTuple):
    """A factor on the queries that depends on how many elements take part.

    With ``n`` of them, a projected query ``q`` of a head becomes ``q * base(log(n))`` or, with ``query``,
    ``q * base(log(n)) * (1 + tanh(query(q)))``. ``base`` maps one number to a factor for each head, ``(1, heads)``, or
    for each of their features, ``(1, heads * head_dim)``; ``query`` maps ``head_dim`` to 1 or to ``head_dim``, the same
    for all heads. The activation is that of the call.
    """

    base: Linear | FeedForward
    query: FeedForward | Absent = ()


class Attention(NamedTuple):
    """Multi-head attention with its projections.

    ``query`` is ``(dim_query, heads, head_dim)``, ``key`` is ``(dim_context, kv_heads, head_dim)``, ``value`` is
    ``(dim_context, kv_heads, value_dim)`` and ``output`` is ``(heads, value_dim, dim_out)``. ``heads`` is a multiple of
    ``kv_heads``: each key/value head serves a group of consecutive query heads. Without ``query`` the queries are used
    as they come, cut into heads of ``head_dim``; without ``output`` the heads are laid side by side. ``query_norm`` and
    ``key_norm`` act on each head; ``length_scale`` comes after them.
    """

    query: Linear | Absent
    key: Linear
    value: Linear
    output: Linear | Absent = ()
    query_norm: LayerNorm | RMSNorm | Absent = ()
    key_norm: LayerNorm | RMSNorm | Absent = ()
    length_scale: LengthScale | Absent = ()


class MAB(NamedTuple):
    """A multihead attention block; the norms that are present say whether it is post-norm (the paper) or pre-norm.

    With ``x' = project(x)``: ``h = attention_norm(x' + attention(query_norm(x'), context_norm(y)))`` and the result is
    ``output_norm(h + ff(ff_norm(h)))``. Every part but ``attention`` may be absent.
    """

    attention: Attention
    ff: FeedForward | Absent = ()
    project: Linear | Absent = ()
    query_norm: LayerNorm | RMSNorm | Absent = ()
    context_norm: LayerNorm | RMSNorm | Absent = ()
    attention_norm: LayerNorm | RMSNorm | Absent = ()
    ff_norm: LayerNorm | RMSNorm | Absent = ()
    output_norm: LayerNorm | RMSNorm | Absent = ()


class ISAB(NamedTuple):
    """An induced set attention block: ``h = mab_inducing(inducing_points, x)``, then ``mab_set(x, h)``."""

    inducing_points: Array
    mab_inducing: MAB
    mab_set: MAB


class PMA(NamedTuple):
    """Pooling by multihead attention: ``mab(seeds, ff(x))``."""

    seeds: Array
    mab: MAB
    ff: FeedForward | Absent = ()


class SetTransformer(NamedTuple):
    """Encoder blocks (``ISAB``, or ``MAB`` for a set attention block), pooling, decoder blocks, output layer."""

    encoder: tuple[ISAB | MAB, ...]
    pma: PMA
    decoder: tuple[MAB, ...] = ()
    output: Linear | Absent = ()


class AttentionPool(NamedTuple):
    """An attention-pooling head.

    With ``y = context_norm(input(x) + position)``: ``h = attention(query_norm(probe) + probe_position, y)``, then
    ``output(output_norm(h + ff(ff_norm(h))))``. Element ``i`` gets row ``i`` of ``position``, which may have more rows
    than there are elements. Every part but ``probe`` and ``attention`` may be absent.
    """

    probe: Array
    attention: Attention
    ff: FeedForward | Absent = ()
    query_norm: LayerNorm | RMSNorm | Absent = ()
    context_norm: LayerNorm | RMSNorm | Absent = ()
    ff_norm: LayerNorm | RMSNorm | Absent = ()
    output_norm: LayerNorm | RMSNorm | Absent = ()
    output: Linear | Absent = ()
    input: Linear | Absent = ()
    position: Array = ()
    probe_position: Array = ()


class CrossAttention(NamedTuple):
    """A pre-norm cross-attention.

    ``h = q + attention(query_norm(q), context_norm(y))``, then ``h + ff(ff_norm(h))``.
    """

    attention: Attention
    ff: FeedForward | Absent = ()
    query_norm: LayerNorm | RMSNorm | Absent = ()
    context_norm: LayerNorm | RMSNorm | Absent = ()
    ff_norm: LayerNorm | RMSNorm | Absent = ()


class SelfAttention(NamedTuple):
    """A pre-norm self-attention layer: ``h = z + attention(norm(z), norm(z))``, then ``h + ff(ff_norm(h))``."""

    attention: Attention
    ff: FeedForward | Absent = ()
    norm: LayerNorm | RMSNorm | Absent = ()
    ff_norm: LayerNorm | RMSNorm | Absent = ()


class InputEmbedding(NamedTuple):
    """What is done to the inputs first: each element, at its place in the set, becomes a row of features.

    ``[project(x) + position; features_project(features)]``, side by side, where ``x`` is an input or, with ``tokens``
    of shape ``(vocabulary, dim)``, the row of that table that an integer names. ``position`` and ``features`` have a
    row for each place: at least as many as there are elements, of which the first are used. Every part may be absent.
    """

    tokens: Array = ()
    project: Linear | Absent = ()
    position: Array = ()
    features: Array = ()
    features_project: Linear | Absent = ()


class MeanHead(NamedTuple):
    """A head for the mean of the latents: ``output(norm(mean))``."""

    output: Linear
    norm: LayerNorm | RMSNorm | Absent = ()


class Perceiver(NamedTuple):
    """Latents, cross-attentions and latent transformers; what is done to the inputs before and to the latents after.

    Iteration ``i`` of ``depth`` uses entry ``min(i, len - 1)`` of either tuple: the last entry of the shorter one is
    repeated, which is how weights are shared. An absent cross-attention ``()`` leaves that step out. The last latents
    go through ``output_norm`` and ``head``.
    """

    latents: Array
    cross_attentions: tuple[CrossAttention | Absent, ...]
    latent_transformers: tuple[tuple[SelfAttention, ...], ...]
    input: InputEmbedding | Absent = ()
    output_norm: LayerNorm | RMSNorm | Absent = ()
    head: MeanHead | Absent = ()


class PerceiverIO(NamedTuple):
    """A Perceiver encoder, a decoder cross-attention from the output queries to the latents, an output layer.

    ``queries``, of shape ``(o, dim_queries)``, are learned output queries, for calls that bring none.
    """

    encoder: Perceiver
    decoder: CrossAttention
    output: Linear | Absent = ()
    queries: Array = ()


class MeanLatents(NamedTuple):
    """Latents made of the mean of the elements: ``project(norm(mean))``, ``project`` of shape ``(dim, p, dim)``."""

    project: Linear
    norm: LayerNorm | RMSNorm | Absent = ()


class Resampler(NamedTuple):
    """The Perceiver resampler of Flamingo and its relatives.

    The embeddings that are present say which axes the features have: none ``(..., n, dim)``; ``frame_embedding``
    ``(..., frames, n, dim)``, all frames resampled together; ``media_embedding`` ``(..., media, n, dim)``, each medium
    resampled on its own; both ``(..., media, frames, n, dim)``. Row ``i`` of ``position``, of shape ``(rows, dim_in)``,
    is added to element ``i`` of each frame before the ``input`` layer. The latents that ``mean_latents`` makes stand
    before the learned ones.
    """

    latents: Array
    layers: tuple[CrossAttention, ...]
    frame_embedding: Array = ()
    media_embedding: Array = ()
    input: Linear | FeedForward | Absent = ()
    output: Linear | Absent = ()
    output_norm: LayerNorm | RMSNorm | Absent = ()
    position: Array = ()
    mean_latents: MeanLatents | Absent = ()


class GatedCrossAttention(NamedTuple):
    """A cross-attention whose two branches are scaled by ``tanh`` of a gate, of shape ``(1,)`` or ``(dim,)``."""

    cross_attention: CrossAttention
    attention_gate: Array
    ff_gate: Array


def is_absent(part: Any) -> bool:
    """Say whether an optional part is absent."""
    return isinstance(part, tuple) and len(part) == 0


def map_params(function: Callable[[Array], Any], params: T, /) -> T:
    """Apply a function to every array of a parameter tree.

    Parameters
    ----------
    function : callable
        Takes one array and returns what stands in its place.
    params : tree
        Any of the parameter trees, or a tuple of them.

    Returns
    -------
    tree
        A tree of the same structure. Absent parts stay absent.

    Raises
    ------
    ParameterError
        If ``function`` is none.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.Linear(np.ones((2, 3)), np.ones(3))
    >>> setattn.map_params(lambda a: a.shape, params)
    Linear(weight=(2, 3), bias=(3,))
    """
    if not callable(function):
        raise ParameterError("map_params", "function", f"a {type(function).__qualname__}", "a function of one array")
    return cast("T", _map(function, params))


def _map(function: Callable[[Array], Any], tree: Any) -> Any:
    if not isinstance(tree, tuple):
        return function(tree)
    parts = [_map(function, part) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def count_params(params: Any, /) -> int:
    """Count the numbers in a parameter tree.

    Parameters
    ----------
    params : tree
        Any of the parameter trees, or a tuple of them.

    Returns
    -------
    int
        Sum of the sizes of its arrays.

    Raises
    ------
    NamespaceError
        If a leaf is no array.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> setattn.count_params(setattn.Linear(np.ones((2, 3)), np.ones(3)))
    9
    """
    if isinstance(params, tuple):
        return sum(count_params(part) for part in params)
    shape = getattr(params, "shape", None)
    if not isinstance(shape, tuple):
        raise NamespaceError("count_params", "params", f"holding a {type(params).__qualname__}", "arrays alone")
    return math.prod(shape)
