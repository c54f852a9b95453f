"""What is checked of the parameter trees of blocks before any arithmetic."""

from __future__ import annotations

from typing import Any

from setattn._call import Call
from setattn._check import Width, data, is_integer, known, tokens
from setattn._errors import OptionError, ParameterError, ShapeError
from setattn._params import (
    ISAB,
    MAB,
    PMA,
    AttentionPool,
    CrossAttention,
    FeedForward,
    GatedCrossAttention,
    InputEmbedding,
    Linear,
    MeanHead,
    MeanLatents,
    Perceiver,
    PerceiverIO,
    Resampler,
    SelfAttention,
    SetTransformer,
    is_absent,
)
from setattn._parts import (
    array,
    attention,
    feed_forward,
    found,
    learned,
    linear,
    meet,
    node,
    nodes,
    norm,
    optional_linear,
    residual_feed_forward,
    rows,
    same_width,
)
from setattn._typing import Array


def mab(call: Call, path: str, p: Any, x: Width, y: Width, *, query_residual: bool) -> Width:
    """Check a multihead attention block, and return the width of its output."""
    node(call, path, p, MAB)
    x = optional_linear(call, f"{path}.project", p.project, x)
    norm(call, f"{path}.query_norm", p.query_norm, x)
    norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, x, y)
    if query_residual:
        same_width(call, f"{path}.attention", h, x)
        h = x
    norm(call, f"{path}.attention_norm", p.attention_norm, h)
    residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    norm(call, f"{path}.output_norm", p.output_norm, h)
    return Width(h.size, f"the output of {path}")


def isab(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> Width:
    """Check an induced set attention block, and return the width of its output."""
    node(call, path, p, ISAB)
    inducing = learned(call, f"{path}.inducing_points", p.inducing_points, "m")
    h = mab(call, f"{path}.mab_inducing", p.mab_inducing, inducing, x, query_residual=query_residual)
    return mab(call, f"{path}.mab_set", p.mab_set, x, h, query_residual=query_residual)


def pma(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> Width:
    """Check a pooling by multihead attention, and return the width of its output."""
    node(call, path, p, PMA)
    if not is_absent(p.ff):
        x = feed_forward(call, f"{path}.ff", p.ff, x)
    seeds = learned(call, f"{path}.seeds", p.seeds, "k")
    return mab(call, f"{path}.mab", p.mab, seeds, x, query_residual=query_residual)


def set_transformer(call: Call, path: str, p: Any, x: Width, *, query_residual: bool) -> None:
    """Check a Set Transformer."""
    node(call, path, p, SetTransformer)
    nodes(call, f"{path}.encoder", p.encoder, "setattn.ISAB or setattn.MAB", at_least=0)
    for i, block in enumerate(p.encoder):
        at = f"{path}.encoder[{i}]"
        node(call, at, block, ISAB, MAB)
        if isinstance(block, ISAB):
            x = isab(call, at, block, x, query_residual=query_residual)
        else:
            x = mab(call, at, block, x, x, query_residual=query_residual)
    x = pma(call, f"{path}.pma", p.pma, x, query_residual=query_residual)
    nodes(call, f"{path}.decoder", p.decoder, "setattn.MAB", at_least=0)
    for i, block in enumerate(p.decoder):
        x = mab(call, f"{path}.decoder[{i}]", block, x, x, query_residual=query_residual)
    optional_linear(call, f"{path}.output", p.output, x)


def attention_pool(call: Call, path: str, p: Any, x: Array) -> Width:
    """Check an attention-pooling head and its set, and return the width of what is attended to."""
    node(call, path, p, AttentionPool)
    y = optional_linear(call, f"{path}.input", p.input, data(call, "x", x))
    if not is_absent(p.position):
        array(call, f"{path}.position", p.position, "rows", "dim")
        meet(call, y, f"{path}.position", p.position, "rows", y.size, axis=1)
        rows(call, f"{path}.position", p.position, "x", x, x.shape[-2])
    probe = learned(call, f"{path}.probe", p.probe, "k")
    if not is_absent(p.probe_position):
        array(call, f"{path}.probe_position", p.probe_position, *p.probe.shape, to_match=f"{path}.probe")
    norm(call, f"{path}.query_norm", p.query_norm, probe)
    norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, probe, y)
    residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    norm(call, f"{path}.output_norm", p.output_norm, h)
    optional_linear(call, f"{path}.output", p.output, h)
    return y


def cross_attention(call: Call, path: str, p: Any, q: Width, y: Width, *, query_residual: bool = True) -> Width:
    """Check a pre-norm cross-attention, and return the width of its output."""
    node(call, path, p, CrossAttention)
    norm(call, f"{path}.query_norm", p.query_norm, q)
    norm(call, f"{path}.context_norm", p.context_norm, y)
    h = attention(call, f"{path}.attention", p.attention, q, y)
    if query_residual:
        same_width(call, f"{path}.attention", h, q)
    residual_feed_forward(call, path, p.ff, p.ff_norm, h)
    return Width(h.size, f"the output of {path}")


def latent_transformer(call: Call, path: str, p: Any, z: Width) -> Width:
    """Check a stack of pre-norm self-attention layers, and return the width of its output."""
    nodes(call, path, p, "setattn.SelfAttention", at_least=0)
    for i, layer in enumerate(p):
        at = f"{path}[{i}]"
        node(call, at, layer, SelfAttention)
        norm(call, f"{at}.norm", layer.norm, z)
        same_width(call, f"{at}.attention", attention(call, f"{at}.attention", layer.attention, z, z), z)
        residual_feed_forward(call, at, layer.ff, layer.ff_norm, z)
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
    node(call, path, p, InputEmbedding)
    if is_absent(p.tokens):
        y, n = data(call, "inputs", x), x.shape[-2]
    else:
        array(call, f"{path}.tokens", p.tokens, "vocabulary", "dim")
        tokens(call, "inputs", x)
        y, n = Width(p.tokens.shape[1], f"{path}.tokens"), x.shape[-1]
    y = optional_linear(call, f"{path}.project", p.project, y)
    for name, table in (("position", p.position), ("features", p.features)):
        at = f"{path}.{name}"
        if is_absent(table):
            continue
        array(call, at, table, "rows", "dim")
        if name == "position":
            meet(call, y, at, table, "rows", y.size, axis=1)
        rows(call, at, table, "inputs", x, n)
    if not is_absent(p.features):
        features = Width(p.features.shape[1], f"{path}.features")
        features = optional_linear(call, f"{path}.features_project", p.features_project, features)
        y = Width(y.size + features.size, y.source, y.shape, features.size)
    elif not is_absent(p.features_project):
        at = f"{path}.features_project"
        raise ParameterError(call.function, at, found(p.features_project), f"(), as {path}.features is absent")
    return y


def perceiver(call: Call, path: str, p: Any, inputs: Any, depth: Any, *, query_residual: bool) -> Width:
    """Check inputs, a Perceiver and its depth, and return the width of the embedded inputs."""
    node(call, path, p, Perceiver)
    y = _inputs(call, f"{path}.input", p.input, inputs)
    z = learned(call, f"{path}.latents", p.latents, "m")
    nodes(call, f"{path}.cross_attentions", p.cross_attentions, "setattn.CrossAttention", at_least=1)
    nodes(call, f"{path}.latent_transformers", p.latent_transformers, "tuples of setattn.SelfAttention", at_least=0)
    if all(is_absent(block) for block in p.cross_attentions):
        wanted = "at least one setattn.CrossAttention, or the latents would not meet the inputs"
        raise ParameterError(call.function, f"{path}.cross_attentions", "absent in every entry", wanted)
    for i, block in enumerate(p.cross_attentions):
        if not is_absent(block):
            at = f"{path}.cross_attentions[{i}]"
            same_width(call, at, cross_attention(call, at, block, z, y, query_residual=query_residual), z)
    for i, layers in enumerate(p.latent_transformers):
        latent_transformer(call, f"{path}.latent_transformers[{i}]", layers, z)
    least = max(len(p.cross_attentions), len(p.latent_transformers))
    if depth is not None and (not is_integer(depth) or depth < least):
        raise OptionError(call.function, "depth", repr(depth), f"an integer of at least {least}, to use every part")
    norm(call, f"{path}.output_norm", p.output_norm, z)
    if not is_absent(p.head):
        node(call, f"{path}.head", p.head, MeanHead)
        norm(call, f"{path}.head.norm", p.head.norm, z)
        linear(call, f"{path}.head.output", p.head.output, z, "dim_out")
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
    node(call, path, p, PerceiverIO)
    q = perceiver(call, f"{path}.encoder", p.encoder, inputs, depth, query_residual=query_residual)
    if not is_absent(p.encoder.head):
        at = f"{path}.encoder.head"
        raise ParameterError(call.function, at, found(p.encoder.head), "(), as the decoder attends to the latents")
    if not is_absent(p.queries):
        q = learned(call, f"{path}.queries", p.queries, "o")
    elif queries is None:
        q = Width(q.size, "the inputs, which are the queries where there are none")
    if queries is not None:
        q = data(call, "queries", queries, "o, dim")
    z = Width(p.encoder.latents.shape[-1], f"{path}.encoder.latents")
    out = cross_attention(call, f"{path}.decoder", p.decoder, q, z, query_residual=decoder_residual)
    optional_linear(call, f"{path}.output", p.output, out)


def perceiver_resampler(call: Call, path: str, p: Any, features: Any) -> None:
    """Check a resampler against its features, whose axes its embeddings decide."""
    node(call, path, p, Resampler)
    names = [n for n, e in (("media", p.media_embedding), ("frames", p.frame_embedding)) if not is_absent(e)]
    x = data(call, "features", features, ", ".join([*names, "n", "dim"]), len(names) + 2)
    _table(call, f"{path}.position", p.position, x, features, "n", -2)
    x = _resampler_input(call, f"{path}.input", p.input, x)
    _table(call, f"{path}.media_embedding", p.media_embedding, x, features, "media", -2 - len(names))
    _table(call, f"{path}.frame_embedding", p.frame_embedding, x, features, "frame", -3)
    z = learned(call, f"{path}.latents", p.latents, "m")
    meet(call, x, f"{path}.latents", p.latents, "m", x.size, axis=1)
    if not is_absent(p.mean_latents):
        at = f"{path}.mean_latents"
        node(call, at, p.mean_latents, MeanLatents)
        norm(call, f"{at}.norm", p.mean_latents.norm, x)
        linear(call, f"{at}.project", p.mean_latents.project, x, "p", z.size, to_match=f"{path}.latents")
    nodes(call, f"{path}.layers", p.layers, "setattn.CrossAttention", at_least=1)
    for i, layer in enumerate(p.layers):
        cross_attention(call, f"{path}.layers[{i}]", layer, z, x)
    norm(call, f"{path}.output_norm", p.output_norm, optional_linear(call, f"{path}.output", p.output, z))


def _resampler_input(call: Call, path: str, p: Any, x: Width) -> Width:
    if not is_absent(p):
        node(call, path, p, Linear, FeedForward)
    return feed_forward(call, path, p, x) if isinstance(p, FeedForward) else optional_linear(call, path, p, x)


def _table(call: Call, path: str, p: Any, x: Width, features: Any, name: str, axis: int) -> None:
    """Check a table with a row for each place on an axis of the features."""
    if is_absent(p):
        return
    array(call, path, p, "rows", "dim")
    meet(call, x, path, p, "rows", x.size, axis=1)
    known(call, "features", features, *features.shape)
    size, rows = features.shape[axis], p.shape[0]
    if size > rows:
        wanted = f"at most {rows} in place of {size} on its {name} axis, the rows of {path}"
        raise ShapeError(call.function, "features", tuple(features.shape), wanted, "shape")


def gated_cross_attention(call: Call, path: str, p: Any, x: Width, media: Width) -> None:
    """Check a gated cross-attention."""
    node(call, path, p, GatedCrossAttention)
    cross_attention(call, f"{path}.cross_attention", p.cross_attention, x, media)
    for name, gate in (("attention_gate", p.attention_gate), ("ff_gate", p.ff_gate)):
        array(call, f"{path}.{name}", gate, "dim")
        if gate.shape[0] not in (1, x.size):
            wanted = f"(1,) or ({x.size},) to match {x.source}"
            raise ShapeError(call.function, f"{path}.{name}", tuple(gate.shape), wanted, "shape")
