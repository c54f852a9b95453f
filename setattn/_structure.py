"""What is checked of parameter trees before any arithmetic: node types and shapes.

A width is checked against the parameters it meets, with a note of where it came from (:class:`Width`), so that the
error names the argument the user wrote rather than the product that would have failed.
"""

from __future__ import annotations

from typing import Any

from setattn._call import Call
from setattn._check import Width, data, floating, is_integer, known, tokens
from setattn._errors import NamespaceError, OptionError, ParameterError, ShapeError
from setattn._namespace import name_of
from setattn._params import (
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
    is_absent,
)
from setattn._typing import Array

_OR_ABSENT = ", or () where the part may be absent"
_OPTIONAL = (Linear, LayerNorm, FeedForward, InputEmbedding, MeanHead)


def _node(call: Call, path: str, p: Any, *kinds: type) -> None:
    if not isinstance(p, kinds):
        wanted = "a " + " or ".join(f"setattn.{k.__name__}" for k in kinds)
        maybe = _OR_ABSENT if p is None and kinds[0] in _OPTIONAL else ""
        raise ParameterError(call.function, path, _found(p), wanted + maybe)


def _found(p: Any) -> str:
    return "None" if p is None else "absent" if is_absent(p) else f"a {type(p).__qualname__}"


def _nodes(call: Call, path: str, p: Any, wanted: str, *, at_least: int) -> None:
    if type(p) is not tuple or len(p) < at_least:
        raise ParameterError(
            call.function, path, _found(p), f"a tuple of {'at least one ' if at_least else ''}{wanted}"
        )


def _weight(call: Call, path: str, a: Any, *wanted: int | str, to_match: str = "") -> None:
    """Check one parameter array; a word in the wanted shape stands for any size from 1."""
    if is_absent(a):
        raise ParameterError(call.function, path, "absent", f"an array of {name_of(call.xp)}")
    if a is None:
        raise NamespaceError(call.function, path, "None", f"an array of {name_of(call.xp)}{_OR_ABSENT}")
    floating(call, path, a)
    shape = a.shape
    fits = len(shape) == len(wanted)
    for size, want in zip(shape, wanted, strict=False):
        fits = fits and (size >= 1 if isinstance(want, str) else size == want)
    if not fits:
        least = " with sizes of at least 1" if 0 in shape else ""
        match = f" to match {to_match}" if to_match else ""
        raise ShapeError(call.function, path, tuple(shape), f"{_words(wanted)}{least}{match}", "shape")


def _words(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _meet(call: Call, x: Width, path: str, a: Any, *wanted: int | str, axis: int = 0) -> None:
    """Check one axis of a parameter against the width it meets; where an argument has that width, it is named."""
    if a.shape[axis] == x.size:
        return
    if x.shape is None or a.shape[axis] <= x.beside:
        raise ShapeError(call.function, path, tuple(a.shape), f"{_words(wanted)} to match {x.source}", "shape")
    beside = f" with {x.beside} features beside it" if x.beside else ""
    to_match = f"(..., {a.shape[axis] - x.beside}) to match {path} of shape {tuple(a.shape)}{beside}"
    raise ShapeError(call.function, x.source, x.shape, to_match, "shape")


def _linear(call: Call, path: str, p: Any, x: Width, *out: int | str, to_match: str = "") -> tuple[int, ...]:
    """Check an affine map of the last axis of something, and return the sizes it maps to."""
    _node(call, path, p, Linear)
    weight = f"{path}.weight"
    _weight(call, weight, p.weight, "dim_in", *out, to_match=to_match)
    _meet(call, x, weight, p.weight, x.size, *out)
    sizes = tuple(p.weight.shape[1:])
    if not is_absent(p.bias):
        _weight(call, f"{path}.bias", p.bias, *sizes, to_match=weight)
    return sizes


def _optional_linear(call: Call, path: str, p: Any, x: Width) -> Width:
    if is_absent(p):
        return x
    (size,) = _linear(call, path, p, x, "dim_out")
    return Width(size, path)


def _norm(call: Call, path: str, p: Any, x: Width) -> None:
    if is_absent(p):
        return
    _node(call, path, p, LayerNorm, RMSNorm)
    for name, a in zip(p._fields, p, strict=True):
        if is_absent(a):
            continue
        at = f"{path}.{name}"
        _weight(call, at, a, "dim")
        _meet(call, x, at, a, x.size)


def _feed_forward(call: Call, path: str, p: Any, x: Width) -> Width:
    _node(call, path, p, FeedForward)
    (hidden,) = _linear(call, f"{path}.hidden", p.hidden, x, "dim_hidden")
    if not is_absent(p.gate):
        _linear(call, f"{path}.gate", p.gate, x, hidden, to_match=f"{path}.hidden")
    return _optional_linear(call, f"{path}.output", p.output, Width(hidden, f"{path}.hidden"))


def _residual_feed_forward(call: Call, path: str, p: Any, norm: Any, x: Width) -> None:
    """Check ``x + ff(norm(x))``, where ``ff`` may be absent."""
    _norm(call, f"{path}.ff_norm", norm, x)
    if not is_absent(p):
        _same_width(call, f"{path}.ff", _feed_forward(call, f"{path}.ff", p, x), x)


def _same_width(call: Call, path: str, branch: Width, x: Width) -> None:
    """Check that a branch can be added to what it branched from."""
    if branch.size != x.size:
        raise ShapeError(call.function, path, branch.size, f"{x.size}, to be added to {x.source}", "output width")


def attention(call: Call, path: str, p: Any, query: Width, context: Width) -> Width:
    """Check an attention, and return the width of its output."""
    _node(call, path, p, Attention)
    kv_heads, head_dim = _linear(call, f"{path}.key", p.key, context, "kv_heads", "head_dim")
    _, value_dim = _linear(call, f"{path}.value", p.value, context, kv_heads, "value_dim", to_match=f"{path}.key")
    if is_absent(p.query):
        heads, remainder = divmod(query.size, head_dim)
        if remainder:
            argument, noun = (query.source, "width") if query.shape is not None else (f"{path}.key", "queries of width")
            wanted = f"a multiple of head_dim={head_dim}, as {path}.query is absent"
            raise ShapeError(call.function, argument, query.size, wanted, noun)
    else:
        heads, _ = _linear(call, f"{path}.query", p.query, query, "heads", head_dim, to_match=f"{path}.key")
    if heads % kv_heads:
        wanted = f"a multiple of {kv_heads}, the heads of {path}.key"
        raise ShapeError(call.function, f"{path}.query", heads, wanted, "a number of heads of")
    head = Width(head_dim, f"the head_dim of {path}.key")
    _norm(call, f"{path}.query_norm", p.query_norm, head)
    _norm(call, f"{path}.key_norm", p.key_norm, head)
    if not is_absent(p.length_scale):
        _length_scale(call, f"{path}.length_scale", p.length_scale, heads, head)
    if is_absent(p.output):
        return Width(heads * value_dim, f"{path}.value")
    _node(call, f"{path}.output", p.output, Linear)
    weight, heads_of = f"{path}.output.weight", f"the heads of {path}.query and {path}.value"
    _weight(call, weight, p.output.weight, heads, value_dim, "dim_out", to_match=heads_of)
    width = p.output.weight.shape[-1]
    if not is_absent(p.output.bias):
        _weight(call, f"{path}.output.bias", p.output.bias, width, to_match=weight)
    return Width(width, f"{path}.output")


def _length_scale(call: Call, path: str, p: Any, heads: int, head: Width) -> None:
    """Check the factor on the queries of each head."""
    _node(call, path, p, LengthScale)
    base, log_n = f"{path}.base", Width(1, "the logarithm of the number of elements")
    _node(call, base, p.base, Linear, FeedForward)
    if isinstance(p.base, Linear):
        (width,) = _linear(call, base, p.base, log_n, "dim_out")
    else:
        width = _feed_forward(call, base, p.base, log_n).size
    if width not in (heads, heads * head.size):
        wanted = f"{heads}, for each head, or {heads * head.size}, for each of their features"
        raise ShapeError(call.function, base, width, wanted, "output width")
    if not is_absent(p.query):
        width = _feed_forward(call, f"{path}.query", p.query, head).size
        if width not in (1, head.size):
            wanted = f"1 or {head.size}, to match {head.source}"
            raise ShapeError(call.function, f"{path}.query", width, wanted, "output width")


def _learned(call: Call, path: str, a: Any, axes: str) -> Width:
    """Check learned queries: inducing points, seeds, a probe, latents."""
    _weight(call, path, a, axes, "dim")
    return Width(a.shape[-1], path)


def _rows(call: Call, path: str, table: Array, argument: str, x: Array, n: int) -> None:
    """Check that a table has a row for each of the elements of an argument."""
    known(call, argument, x, n)  # or it were not known which rows belong to a chunk
    if n > table.shape[0]:
        wanted = f"at most {table.shape[0]} elements in place of {n}, the rows of {path}"
        raise ShapeError(call.function, argument, tuple(x.shape), wanted, "shape")


# --- blocks ---------------------------------------------------------------------------------------------------------


def mab(call: Call, path: str, p: Any, x: Width, y: Width, *, query_residual: bool) -> Width:
    """Check a multihead attention block, and return the width of its output."""
    _node(call, path, p, MAB)
    x = _optional_linear(call, f"{path}.project", p.project, x)
    _norm(call, f"{path}.query_norm", p.query_norm, x)
    _norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, x, y)
    if query_residual:
        _same_width(call, f"{path}.attention", h, x)
        h = x
    _norm(call, f"{path}.attention_norm", p.attention_norm, h)
    _residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    _norm(call, f"{path}.output_norm", p.output_norm, h)
    return Width(h.size, f"the output of {path}")


def isab(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> Width:
    """Check an induced set attention block, and return the width of its output."""
    _node(call, path, p, ISAB)
    inducing = _learned(call, f"{path}.inducing_points", p.inducing_points, "m")
    h = mab(call, f"{path}.mab_inducing", p.mab_inducing, inducing, x, query_residual=query_residual)
    return mab(call, f"{path}.mab_set", p.mab_set, x, h, query_residual=query_residual)


def pma(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> Width:
    """Check a pooling by multihead attention, and return the width of its output."""
    _node(call, path, p, PMA)
    if not is_absent(p.ff):
        x = _feed_forward(call, f"{path}.ff", p.ff, x)
    seeds = _learned(call, f"{path}.seeds", p.seeds, "k")
    return mab(call, f"{path}.mab", p.mab, seeds, x, query_residual=query_residual)


def set_transformer(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> None:
    """Check a Set Transformer."""
    _node(call, path, p, SetTransformer)
    _nodes(call, f"{path}.encoder", p.encoder, "setattn.ISAB or setattn.MAB", at_least=0)
    for i, block in enumerate(p.encoder):
        at = f"{path}.encoder[{i}]"
        _node(call, at, block, ISAB, MAB)
        if isinstance(block, ISAB):
            x = isab(call, at, block, x, query_residual=query_residual)
        else:
            x = mab(call, at, block, x, x, query_residual=query_residual)
    x = pma(call, f"{path}.pma", p.pma, x, query_residual=query_residual)
    _nodes(call, f"{path}.decoder", p.decoder, "setattn.MAB", at_least=0)
    for i, block in enumerate(p.decoder):
        x = mab(call, f"{path}.decoder[{i}]", block, x, x, query_residual=query_residual)
    _optional_linear(call, f"{path}.output", p.output, x)


def attention_pool(call: Call, path: str, p: Any, x: Array) -> Width:
    """Check an attention-pooling head and its set, and return the width of what is attended to."""
    _node(call, path, p, AttentionPool)
    y = _optional_linear(call, f"{path}.input", p.input, data(call, "x", x))
    if not is_absent(p.position):
        _weight(call, f"{path}.position", p.position, "rows", "dim")
        _meet(call, y, f"{path}.position", p.position, "rows", y.size, axis=1)
        _rows(call, f"{path}.position", p.position, "x", x, x.shape[-2])
    probe = _learned(call, f"{path}.probe", p.probe, "k")
    if not is_absent(p.probe_position):
        _weight(call, f"{path}.probe_position", p.probe_position, *p.probe.shape, to_match=f"{path}.probe")
    _norm(call, f"{path}.query_norm", p.query_norm, probe)
    _norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, probe, y)
    _residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    _norm(call, f"{path}.output_norm", p.output_norm, h)
    _optional_linear(call, f"{path}.output", p.output, h)
    return y


def cross_attention(call: Call, path: str, p: Any, q: Width, y: Width, *, query_residual: bool = True) -> Width:
    """Check a pre-norm cross-attention, and return the width of its output."""
    _node(call, path, p, CrossAttention)
    _norm(call, f"{path}.query_norm", p.query_norm, q)
    _norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, q, y)
    if query_residual:
        _same_width(call, f"{path}.attention", h, q)
    _residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    return Width(h.size, f"the output of {path}")


def latent_transformer(call: Call, path: str, p: Any, z: Width) -> Width:
    """Check a stack of pre-norm self-attention layers, and return the width of its output."""
    _nodes(call, path, p, "setattn.SelfAttention", at_least=0)
    for i, layer in enumerate(p):
        at = f"{path}[{i}]"
        _node(call, at, layer, SelfAttention)
        _norm(call, f"{at}.norm", layer.norm, z)
        _same_width(call, f"{at}.attention", attention(call, f"{at}.attention", layer.attention, z, z), z)
        _residual_feed_forward(call, at, layer.ff, layer.ff_norm, z)
    return z


def token_table(p: Any) -> Any:
    """Return the table of the tokens of a model, of which nothing is checked yet; ``()`` if it has none."""
    p = p.encoder if isinstance(p, PerceiverIO) else p
    has_one = isinstance(p, Perceiver) and isinstance(p.input, InputEmbedding)
    return p.input.tokens if has_one else ()


def _inputs(call: Call, path: str, p: Any, x: Any) -> Width:
    """Check inputs and what embeds them, and return the width of the embedded ones."""
    if is_absent(p):
        return data(call, "inputs", x)
    _node(call, path, p, InputEmbedding)
    if is_absent(p.tokens):
        y, n = data(call, "inputs", x), x.shape[-2]
    else:
        _weight(call, f"{path}.tokens", p.tokens, "vocabulary", "dim")
        tokens(call, "inputs", x)
        y, n = Width(p.tokens.shape[1], f"{path}.tokens"), x.shape[-1]
    y = _optional_linear(call, f"{path}.project", p.project, y)
    for name, table in (("position", p.position), ("features", p.features)):
        at = f"{path}.{name}"
        if is_absent(table):
            continue
        _weight(call, at, table, "rows", "dim")
        if name == "position":
            _meet(call, y, at, table, "rows", y.size, axis=1)
        _rows(call, at, table, "inputs", x, n)
    if not is_absent(p.features):
        features = Width(p.features.shape[1], f"{path}.features")
        features = _optional_linear(call, f"{path}.features_project", p.features_project, features)
        y = Width(y.size + features.size, y.source, y.shape, features.size)
    elif not is_absent(p.features_project):
        at = f"{path}.features_project"
        raise ParameterError(call.function, at, _found(p.features_project), f"(), as {path}.features is absent")
    return y


def perceiver(call: Call, path: str, p: Any, inputs: Any, depth: Any, *, query_residual: bool) -> Width:
    """Check inputs, a Perceiver and its depth, and return the width of the embedded inputs."""
    _node(call, path, p, Perceiver)
    y = _inputs(call, f"{path}.input", p.input, inputs)
    z = _learned(call, f"{path}.latents", p.latents, "m")
    _nodes(call, f"{path}.cross_attentions", p.cross_attentions, "setattn.CrossAttention", at_least=1)
    _nodes(call, f"{path}.latent_transformers", p.latent_transformers, "tuples of setattn.SelfAttention", at_least=0)
    if all(is_absent(block) for block in p.cross_attentions):
        wanted = "at least one setattn.CrossAttention, or the latents would not meet the inputs"
        raise ParameterError(call.function, f"{path}.cross_attentions", "absent in every entry", wanted)
    for i, block in enumerate(p.cross_attentions):
        if not is_absent(block):
            at = f"{path}.cross_attentions[{i}]"
            _same_width(call, at, cross_attention(call, at, block, z, y, query_residual=query_residual), z)
    for i, layers in enumerate(p.latent_transformers):
        latent_transformer(call, f"{path}.latent_transformers[{i}]", layers, z)
    least = max(len(p.cross_attentions), len(p.latent_transformers))
    if depth is not None and (not is_integer(depth) or depth < least):
        raise OptionError(call.function, "depth", repr(depth), f"an integer of at least {least}, to use every part")
    _norm(call, f"{path}.output_norm", p.output_norm, z)
    if not is_absent(p.head):
        _node(call, f"{path}.head", p.head, MeanHead)
        _norm(call, f"{path}.head.norm", p.head.norm, z)
        _linear(call, f"{path}.head.output", p.head.output, z, "dim_out")
    return y


def perceiver_io(
    call: Call,
    path: str,
    p: Any,
    inputs: Any,
    queries: Any,
    depth: Any,
    *,
    query_residual: bool,
    decoder_residual: bool,
) -> None:
    """Check inputs, queries and a Perceiver IO."""
    _node(call, path, p, PerceiverIO)
    q = perceiver(call, f"{path}.encoder", p.encoder, inputs, depth, query_residual=query_residual)
    if not is_absent(p.encoder.head):
        at = f"{path}.encoder.head"
        raise ParameterError(call.function, at, _found(p.encoder.head), "(), as the decoder attends to the latents")
    if not is_absent(p.queries):
        q = _learned(call, f"{path}.queries", p.queries, "o")
    elif queries is None:
        q = Width(q.size, "the inputs, which are the queries where there are none")
    if queries is not None:
        q = data(call, "queries", queries, "o, dim")
    z = Width(p.encoder.latents.shape[-1], f"{path}.encoder.latents")
    out = cross_attention(call, f"{path}.decoder", p.decoder, q, z, query_residual=decoder_residual)
    _optional_linear(call, f"{path}.output", p.output, out)


def perceiver_resampler(call: Call, path: str, p: Any, features: Any) -> None:
    """Check a resampler against its features, whose axes its embeddings decide."""
    _node(call, path, p, Resampler)
    names = [n for n, e in (("media", p.media_embedding), ("frames", p.frame_embedding)) if not is_absent(e)]
    x = data(call, "features", features, ", ".join([*names, "n", "dim"]), len(names) + 2)
    _table(call, f"{path}.position", p.position, x, features, "n", -2)
    x = _resampler_input(call, f"{path}.input", p.input, x)
    _table(call, f"{path}.media_embedding", p.media_embedding, x, features, "media", -2 - len(names))
    _table(call, f"{path}.frame_embedding", p.frame_embedding, x, features, "frame", -3)
    z = _learned(call, f"{path}.latents", p.latents, "m")
    _meet(call, x, f"{path}.latents", p.latents, "m", x.size, axis=1)
    if not is_absent(p.mean_latents):
        at = f"{path}.mean_latents"
        _node(call, at, p.mean_latents, MeanLatents)
        _norm(call, f"{at}.norm", p.mean_latents.norm, x)
        _linear(call, f"{at}.project", p.mean_latents.project, x, "p", z.size, to_match=f"{path}.latents")
    _nodes(call, f"{path}.layers", p.layers, "setattn.CrossAttention", at_least=1)
    for i, layer in enumerate(p.layers):
        cross_attention(call, f"{path}.layers[{i}]", layer, z, x)
    _norm(call, f"{path}.output_norm", p.output_norm, _optional_linear(call, f"{path}.output", p.output, z))


def _resampler_input(call: Call, path: str, p: Any, x: Width) -> Width:
    if not is_absent(p):
        _node(call, path, p, Linear, FeedForward)
    return _feed_forward(call, path, p, x) if isinstance(p, FeedForward) else _optional_linear(call, path, p, x)


def _table(call: Call, path: str, p: Any, x: Width, features: Any, name: str, axis: int) -> None:
    """Check a table with a row for each place on an axis of the features."""
    if is_absent(p):
        return
    _weight(call, path, p, "rows", "dim")
    _meet(call, x, path, p, "rows", x.size, axis=1)
    known(call, "features", features, *features.shape)
    size, rows = features.shape[axis], p.shape[0]
    if size > rows:
        wanted = f"at most {rows} in place of {size} on its {name} axis, the rows of {path}"
        raise ShapeError(call.function, "features", tuple(features.shape), wanted, "shape")


def gated_cross_attention(call: Call, path: str, p: Any, x: Width, media: Width) -> None:
    """Check a gated cross-attention."""
    _node(call, path, p, GatedCrossAttention)
    cross_attention(call, f"{path}.cross_attention", p.cross_attention, x, media)
    for name, gate in (("attention_gate", p.attention_gate), ("ff_gate", p.ff_gate)):
        _weight(call, f"{path}.{name}", gate, "dim")
        if gate.shape[0] not in (1, x.size):
            wanted = f"(1,) or ({x.size},) to match {x.source}"
            raise ShapeError(call.function, f"{path}.{name}", tuple(gate.shape), wanted, "shape")
