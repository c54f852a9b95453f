"""Which calls fit together and what shape their result has, worked out anew from the documented shapes.

Nothing here comes from the library but the types of the parameter trees. Leaves are arrays of any library.
"""

from __future__ import annotations

from typing import Any

from setattn import (
    ISAB,
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    FeedForward,
    GatedCrossAttention,
    InputEmbedding,
    LayerNorm,
    LengthScale,
    Linear,
    MeanHead,
    MeanLatents,
    Perceiver,
    PerceiverIO,
    Resampler,
    RMSNorm,
    SelfAttention,
    SetTransformer,
)


class UnfitError(Exception):
    """The call does not fit together."""


def need(condition: bool) -> None:
    if not condition:
        raise UnfitError


def absent(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 0


def shape(a: Any, ndim: int) -> tuple[int, ...]:
    """Return the shape of a parameter array, none of whose sizes may be 0."""
    need(not isinstance(a, tuple) and len(a.shape) == ndim and 0 not in a.shape)
    return tuple(a.shape)


def exact(a: Any, *wanted: int) -> None:
    need(absent(a) or shape(a, len(wanted)) == wanted)


def affine(p: Any, width: int) -> int:
    if absent(p):
        return width
    need(type(p) is Linear)
    size_in, size_out = shape(p.weight, 2)
    need(size_in == width)
    exact(p.bias, size_out)
    return size_out


def heads_of(p: Any, width: int) -> tuple[int, int]:
    need(type(p) is Linear)
    size_in, heads, head_dim = shape(p.weight, 3)
    need(size_in == width)
    exact(p.bias, heads, head_dim)
    return heads, head_dim


def norm(p: Any, width: int) -> None:
    if not absent(p):
        need(type(p) in (LayerNorm, RMSNorm))
        for leaf in p:
            exact(leaf, width)


def feed_forward(p: Any, width: int) -> int:
    need(type(p) is FeedForward and not absent(p.hidden))
    hidden = affine(p.hidden, width)
    need(absent(p.gate) or affine(p.gate, width) == hidden)
    return affine(p.output, hidden)


def residual(p: Any, width: int) -> None:
    norm(p.ff_norm, width)
    need(absent(p.ff) or feed_forward(p.ff, width) == width)


def attention_heads(p: Any, query: int) -> int:
    return query // p.key.weight.shape[2] if absent(p.query) else p.query.weight.shape[1]


def length_scale(p: Any, heads: int, head_dim: int) -> None:
    if absent(p):
        return
    need(type(p) is LengthScale and type(p.base) in (Linear, FeedForward))
    base = affine(p.base, 1) if type(p.base) is Linear else feed_forward(p.base, 1)
    need(base in (heads, heads * head_dim))
    need(absent(p.query) or feed_forward(p.query, head_dim) in (1, head_dim))


def attend(p: Any, query: int, context: int) -> int:
    need(type(p) is Attention)
    kv_heads, head_dim = heads_of(p.key, context)
    value_heads, value_dim = heads_of(p.value, context)
    need(value_heads == kv_heads)
    if absent(p.query):
        need(query % head_dim == 0)
    else:
        need(heads_of(p.query, query)[1] == head_dim)
    heads = attention_heads(p, query)
    need(heads % kv_heads == 0)
    norm(p.query_norm, head_dim)
    norm(p.key_norm, head_dim)
    length_scale(p.length_scale, heads, head_dim)
    if absent(p.output):
        return heads * value_dim
    need(type(p.output) is Linear)
    *sizes, out = shape(p.output.weight, 3)
    need(sizes == [heads, value_dim])
    exact(p.output.bias, out)
    return out


def mab(p: Any, x: int, y: int, query_residual: bool = True) -> int:
    need(type(p) is MAB)
    width = affine(p.project, x)
    norm(p.query_norm, width)
    norm(p.context_norm, y)
    out = attend(p.attention, width, y)
    need(out == width or not query_residual)
    norm(p.attention_norm, out)
    norm(p.output_norm, out)
    residual(p, out)
    return out


def isab(p: Any, x: int, query_residual: bool = True) -> int:
    need(type(p) is ISAB)
    inducing = mab(p.mab_inducing, shape(p.inducing_points, 2)[1], x, query_residual)
    return mab(p.mab_set, x, inducing, query_residual)


def pma(p: Any, x: int, query_residual: bool = True) -> tuple[int, int]:
    need(type(p) is PMA)
    k, width = shape(p.seeds, 2)
    return k, mab(p.mab, width, x if absent(p.ff) else feed_forward(p.ff, x), query_residual)


def cross_attention(p: Any, q: int, y: int, query_residual: bool = True) -> int:
    need(type(p) is CrossAttention)
    norm(p.query_norm, q)
    norm(p.context_norm, y)
    out = attend(p.attention, q, y)
    need(out == q or not query_residual)
    residual(p, out)
    return out


def latent_transformer(p: Any, z: int) -> None:
    need(type(p) is tuple)
    for layer in p:
        need(type(layer) is SelfAttention)
        norm(layer.norm, z)
        need(attend(layer.attention, z, z) == z)
        residual(layer, z)


def embedded(p: Any, n: int, x: int) -> int:
    if absent(p):
        return x
    need(type(p) is InputEmbedding)
    x = affine(p.project, x if absent(p.tokens) else shape(p.tokens, 2)[1])
    if not absent(p.position):
        rows, dim = shape(p.position, 2)
        need(rows >= n and dim == x)
    if absent(p.features):
        need(absent(p.features_project))
        return x
    rows, dim = shape(p.features, 2)
    need(rows >= n)
    return x + affine(p.features_project, dim)


def perceiver(p: Any, y: int, query_residual: bool) -> tuple[int, int]:
    m, width = shape(p.latents, 2)
    need(type(p.cross_attentions) is tuple and any(not absent(block) for block in p.cross_attentions))
    for block in p.cross_attentions:
        need(absent(block) or cross_attention(block, width, y, query_residual) == width)
    need(type(p.latent_transformers) is tuple)
    for layers in p.latent_transformers:
        latent_transformer(layers, width)
    norm(p.output_norm, width)
    return m, width


def resampler(p: Any, features: tuple[int, ...]) -> tuple[int, ...]:
    need(type(p) is Resampler)
    embeddings = [e for e in (p.media_embedding, p.frame_embedding) if not absent(e)]
    need(len(features) >= 2 + len(embeddings) and features[-1] > 0)
    width = (feed_forward if type(p.input) is FeedForward else affine)(p.input, features[-1])
    tables = [(p.position, -2, features[-1])] if not absent(p.position) else []
    tables += [(e, i - 2 - len(embeddings), width) for i, e in enumerate(embeddings)]
    for table, axis, dim in tables:
        rows, columns = shape(table, 2)
        need(rows >= features[axis] and columns == dim)
    m, dim = shape(p.latents, 2)
    if not absent(p.mean_latents):
        need(type(p.mean_latents) is MeanLatents)
        norm(p.mean_latents.norm, width)
        made, columns = heads_of(p.mean_latents.project, width)
        need(columns == dim)
        m += made
    need(dim == width and type(p.layers) is tuple and len(p.layers) > 0)
    for layer in p.layers:
        need(cross_attention(layer, width, width) == width)
    out = affine(p.output, width)
    norm(p.output_norm, out)
    return (*features[: -2 if absent(p.frame_embedding) else -3], m, out)


def set_of(a: Any, ndim: int = 2) -> tuple[tuple[int, ...], int, int]:
    """Split the shape of an input into batch, number of elements and width."""
    need(len(a.shape) >= ndim and a.shape[-1] > 0)
    return tuple(a.shape[:-2]), a.shape[-2], a.shape[-1]


def shared(query: tuple[int, ...], context: tuple[int, ...]) -> None:
    need(query in ((), context))


def infer(function: str, arrays: Any, params: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of the result of a call, or raise :class:`UnfitError`."""
    return _INFER[function](arrays, params, keywords)


def _masks(keywords: dict[str, Any], **shapes: tuple[int, ...]) -> None:
    for name, wanted in shapes.items():
        given = keywords.get(name)
        need(given is None or tuple(given.shape) == wanted)


def _attention(arrays: Any, p: Any, keywords: dict[str, Any], weights: bool = False) -> tuple[int, ...]:
    (q_batch, m, q), (batch, n, y) = map(set_of, arrays)
    out = attend(p, q, y)
    shared(q_batch, batch)
    _masks(keywords, mask=(*batch, n), bias=(*batch, n), pair_mask=(*batch, m, n))
    return (*batch, attention_heads(p, q), m, n) if weights else (*batch, m, out)


def _mab(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    (x_batch, m, x), (batch, n, y) = map(set_of, arrays)
    shared(x_batch, batch)
    _masks(keywords, mask=(*batch, n), query_mask=(*x_batch, m), pair_mask=(*batch, m, n))
    return (*batch, m, mab(p, x, y, keywords.get("query_residual", True)))


def _one_set(arrays: Any, keywords: dict[str, Any]) -> tuple[tuple[int, ...], int, int]:
    batch, n, x = set_of(arrays[0])
    _masks(keywords, mask=(*batch, n))
    return batch, n, x


def _sab(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, n, x = _one_set(arrays, keywords)
    return (*batch, n, mab(p, x, x, keywords.get("query_residual", True)))


def _isab(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, n, x = _one_set(arrays, keywords)
    return (*batch, n, isab(p, x, keywords.get("query_residual", True)))


def _pma(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, _, x = _one_set(arrays, keywords)
    return (*batch, *pma(p, x, keywords.get("query_residual", True)))


def _set_transformer(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, _, x = _one_set(arrays, keywords)
    added = keywords.get("query_residual", True)
    need(type(p) is SetTransformer and type(p.encoder) is tuple and type(p.decoder) is tuple)
    for block in p.encoder:
        x = isab(block, x, added) if type(block) is ISAB else mab(block, x, x, added)
    k, x = pma(p.pma, x, added)
    for block in p.decoder:
        x = mab(block, x, x, added)
    return (*batch, k, affine(p.output, x))


def _attention_pool(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, _, x = _one_set(arrays, keywords)
    need(type(p) is AttentionPool)
    k, probe = shape(p.probe, 2)
    exact(p.probe_position, k, probe)
    x = affine(p.input, x)
    if not absent(p.position):
        rows, width = shape(p.position, 2)
        need(rows >= arrays[0].shape[-2] and width == x)
    given, own = keywords.get("key_positions"), (arrays[0].shape[-2], x)
    need(given is None or tuple(given.shape) in (own, (*batch, *own)))
    norm(p.query_norm, probe)
    norm(p.context_norm, x)
    out = attend(p.attention, probe, x)
    residual(p, out)
    norm(p.output_norm, out)
    return (*batch, k, affine(p.output, out))


def _cross_attention(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    (z_batch, m, z), (batch, n, y) = map(set_of, arrays)
    shared(z_batch, batch)
    _masks(keywords, mask=(*batch, n))
    return (*batch, m, cross_attention(p, z, y, keywords.get("query_residual", True)))


def _latent_transformer(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, m, z = _one_set(arrays, keywords)
    latent_transformer(p, z)
    return (*batch, m, z)


def _depth(p: Perceiver, depth: int | None) -> None:
    need(depth is None or depth >= max(len(p.cross_attentions), len(p.latent_transformers)))


def _encoder(x: Any, p: Any, keywords: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]:
    """Return the batch, the shape of the embedded inputs and that of the latents."""
    need(type(p) is Perceiver)
    if type(p.input) is InputEmbedding and not absent(p.input.tokens):
        need(len(x.shape) >= 1)
        batch, n, y = tuple(x.shape[:-1]), x.shape[-1], 1
    else:
        batch, n, y = set_of(x)
    _masks(keywords, mask=(*batch, n))
    y = embedded(p.input, n, y)
    z = perceiver(p, y, keywords.get("query_residual", True))
    _depth(p, keywords.get("depth"))
    return batch, (n, y), z


def _perceiver(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    batch, _, (m, z) = _encoder(arrays[0], p, keywords)
    if absent(p.head):
        return (*batch, m, z)
    need(type(p.head) is MeanHead and type(p.head.output) is Linear)
    norm(p.head.norm, z)
    return (*batch, affine(p.head.output, z))


def _perceiver_io(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    need(type(p) is PerceiverIO)
    batch, y, (_, z) = _encoder(arrays[0], p.encoder, keywords)
    need(absent(p.encoder.head))
    o, q = y if absent(p.queries) else shape(p.queries, 2)
    if len(arrays) > 1:
        q_batch, o, q = set_of(arrays[1])
        shared(q_batch, batch)
    out = cross_attention(p.decoder, q, z, keywords.get("decoder_residual", False))
    return (*batch, o, affine(p.output, out))


def _perceiver_resampler(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    features = tuple(arrays[0].shape)
    out = resampler(p, features)
    _masks(keywords, mask=features[:-1])
    return out


def _gated_cross_attention(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    (x_batch, n, x), (media_batch, m, y) = set_of(arrays[0]), set_of(arrays[1], 3)
    *batch, media = media_batch
    shared(x_batch, tuple(batch))
    _masks(keywords, mask=(*batch, media, m), media_locations=(*batch, n), pair_mask=(*batch, n, media))
    need(type(p) is GatedCrossAttention and cross_attention(p.cross_attention, x, y) == x)
    for gate in (p.attention_gate, p.ff_gate):
        need(shape(gate, 1) in ((1,), (x,)))
    return (*batch, n, x)


def _fourier_features(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    need(len(arrays[0].shape) >= 1 and arrays[0].shape[-1] > 0)
    *batch, axes = arrays[0].shape
    resolution = keywords["max_resolution"]
    need(not isinstance(resolution, tuple) or len(resolution) == axes)
    return (*batch, axes * (2 * keywords["num_bands"] + keywords.get("concat_position", True)))


def _sincos_features(arrays: Any, p: Any, keywords: dict[str, Any]) -> tuple[int, ...]:
    need(len(arrays[0].shape) >= 1 and arrays[0].shape[-1] > 0)
    need(keywords["dim"] % (2 * arrays[0].shape[-1]) == 0)
    return (*arrays[0].shape[:-1], keywords["dim"])


_INFER = {
    "attention": _attention,
    "attention_weights": lambda *call: _attention(*call, weights=True),
    "mab": _mab,
    "sab": _sab,
    "isab": _isab,
    "pma": _pma,
    "set_transformer": _set_transformer,
    "attention_pool": _attention_pool,
    "cross_attention": _cross_attention,
    "latent_transformer": _latent_transformer,
    "perceiver": _perceiver,
    "perceiver_io": _perceiver_io,
    "perceiver_resampler": _perceiver_resampler,
    "gated_cross_attention": _gated_cross_attention,
    "fourier_features": _fourier_features,
    "sincos_features": _sincos_features,
}
