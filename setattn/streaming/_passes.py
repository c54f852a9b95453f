"""What a block does each time that it goes through the elements of a set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from setattn._attention_pool import after_pool, pool_context, pool_queries
from setattn._context import Context
from setattn._embedding import rows_for
from setattn._errors import ParameterError
from setattn._layers import AnyNorm, Options, enter, linear, norm, residual_feed_forward
from setattn._mab import after_mab, apply_mab, mab_queries
from setattn._params import (
    ISAB,
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    InputEmbedding,
    Perceiver,
    PerceiverIO,
    Resampler,
    SetTransformer,
    is_absent,
)
from setattn._perceiver import embedded, head
from setattn._perceiver_layers import after_cross_attention, cross_attend, transform
from setattn._resampler import resampler_contexts, resampler_input
from setattn._set_transformer import decode, pma_context
from setattn._typing import Array


class Pass(NamedTuple):
    """One pass over the elements: who asks, who is asked, and what is made of the attention."""

    queries: Array
    attention: Attention
    context: Callable[[Array, Array | None, int], Context]  # of a chunk, its mask, the place of its first element
    after: Callable[[Array], Array]
    query_norm: AnyNorm = ()
    beside: tuple[Context, ...] = ()  # attended to together with the elements


class Passes(NamedTuple):
    """The passes of a block, each of which may need what those before it have found."""

    attentions: tuple[Attention, ...]  # one for each pass
    make: Callable[[tuple[Array, ...]], Pass]
    rows: Callable[[tuple[Array, ...], Array, Array | None, int], Array] | None = None  # a last pass, row by row
    places: int | None = None  # how many places there are, if an element's place matters


class Given(NamedTuple):
    """What the passes of a block are made of."""

    params: Any
    o: Options
    queries: Array | None
    options: dict[str, Any]

    @property
    def residual(self) -> bool:
        """Whether the queries are added to the attention."""
        return bool(self.options["query_residual"])


def passes_of(function: str, given: Given) -> Passes:
    """Return the passes of a block whose parameters and options have been checked."""
    return _PASSES[function](given)


def refuse(params: Any) -> None:
    """Refuse embeddings of axes that chunks do not have, and queries that are made of the elements."""
    if isinstance(params, Resampler):
        if not is_absent(params.mean_latents):
            wanted = "(), as the mean of all elements is not known before the last of them"
            raise ParameterError("perceiver_resampler", "params.mean_latents", "there", wanted)
        for name, axis in (("frame_embedding", "frames"), ("media_embedding", "media")):
            if not is_absent(getattr(params, name)):
                wanted = f"(), as chunks have no axis of {axis}; add the embedding to the elements of each chunk"
                raise ParameterError("perceiver_resampler", f"params.{name}", "there", wanted)


def _once(asking: Pass) -> Passes:
    return Passes((asking.attention,), lambda _: asking)


# --- blocks that attend to a set once -------------------------------------------------------------------------------


def _attention(g: Given) -> Passes:
    q = enter(g.queries, None, g.o)
    return _once(Pass(q, g.params, lambda y, mask, _: Context(y, mask), lambda h: h))


def _mab(g: Given) -> Passes:
    return _once(_asking(g.queries, g.params, g))


def _asking(x: Array, p: MAB, g: Given, before: Callable[[Context], Context] = lambda y: y) -> Pass:
    """Let queries ask in a multihead attention block."""
    x = mab_queries(x, p, g.o)
    return Pass(
        x,
        p.attention,
        lambda y, mask, _: before(Context(y, mask, norm=p.context_norm)),
        lambda h: after_mab(h, x, p, g.o, g.residual),
        p.query_norm,
    )


def _pma(g: Given) -> Passes:
    p: PMA = g.params
    return _once(_asking(p.seeds, p.mab, g, lambda y: pma_context(y, p, g.o)))


def _isab(g: Given) -> Passes:
    p: ISAB = g.params

    def rows(found: tuple[Array, ...], x: Array, mask: Array | None, _: int) -> Array:
        return apply_mab(Context(x, mask), Context(found[0]), p.mab_set, g.o, g.residual)

    return _once(_asking(p.inducing_points, p.mab_inducing, g))._replace(rows=rows)


def _attention_pool(g: Given) -> Passes:
    p: AttentionPool = g.params
    probe, query_norm = pool_queries(p, g.o)
    asking = Pass(
        probe,
        p.attention,
        lambda y, mask, first: pool_context(y, mask, p, first),
        lambda h: after_pool(h, p, g.o),
        query_norm,
    )
    return _once(asking)._replace(places=_rows(p.position))


def _rows(*tables: Array) -> int | None:
    """Return how many places there are in tables, if there is any."""
    return min((table.shape[0] for table in tables if not is_absent(table)), default=None)


def _cross_attention(g: Given) -> Passes:
    return _once(_crossing(enter(g.queries, None, g.o), g.params, g, lambda y, mask, _: Context(y, mask)))


def _crossing(z: Array, p: CrossAttention, g: Given, context: Callable[[Array, Array | None, int], Context]) -> Pass:
    """Let latents ask in a cross-attention."""
    return Pass(
        z,
        p.attention,
        lambda y, mask, first: context(y, mask, first)._replace(norm=p.context_norm),
        lambda h: after_cross_attention(h, z, p, g.o, g.residual),
        p.query_norm,
    )


# --- blocks that attend to it several times -------------------------------------------------------------------------


def _set_transformer(g: Given) -> Passes:
    p, o = g.params, g.o
    assert isinstance(p, SetTransformer)
    encoder: list[ISAB] = []
    for i, block in enumerate(p.encoder):
        if not isinstance(block, ISAB):
            wanted = "a setattn.ISAB: in a set attention block, each element attends to all the others"
            raise ParameterError("set_transformer", f"params.encoder[{i}]", f"a {type(block).__name__}", wanted)
        encoder.append(block)

    def make(found: tuple[Array, ...]) -> Pass:
        def encoded(x: Array) -> Array:
            for block, h in zip(encoder, found, strict=False):
                x = apply_mab(Context(x), Context(h), block.mab_set, o, g.residual)
            return x

        def before(y: Context) -> Context:
            return y._replace(prepare=encoded) if found else y

        if len(found) < len(encoder):
            block = encoder[len(found)]
            return _asking(block.inducing_points, block.mab_inducing, g, before)
        last = _asking(p.pma.seeds, p.pma.mab, g, lambda y: pma_context(before(y), p.pma, o))
        return last._replace(after=lambda h: decode(last.after(h), p, o, g.residual))

    return Passes((*(block.mab_inducing.attention for block in encoder), p.pma.mab.attention), make)


def _perceiver(g: Given) -> Passes:
    p: Perceiver = g.params
    return _encoder(p, g, lambda z: head(z, p.head, g.o))


def _perceiver_io(g: Given) -> Passes:
    p: PerceiverIO = g.params

    def decoded(q: Context, z: Array) -> Array:
        return cross_attend(q, Context(z), (p.decoder, p.output), g.o, bool(g.options["decoder_residual"]))

    q = p.queries if g.queries is None else g.queries
    if not is_absent(q):
        return _encoder(p.encoder, g, lambda z: decoded(Context(q), z))

    def rows(found: tuple[Array, ...], x: Array, mask: Array | None, first: int) -> Array:
        return decoded(embedded(x, mask, p.encoder.input, first), found[-1])

    return _encoder(p.encoder, g, lambda z: z)._replace(rows=rows)


def _encoder(p: Perceiver, g: Given, end: Callable[[Array], Array]) -> Passes:
    cross, latent, o = p.cross_attentions, p.latent_transformers, g.o
    depth = g.options["depth"] or max(len(cross), len(latent))
    blocks = [cross[min(i, len(cross) - 1)] for i in range(depth)]
    meetings = [i for i, block in enumerate(blocks) if isinstance(block, CrossAttention)]

    def transformed(z: Array, iterations: range) -> Array:
        for i in iterations if latent else ():
            z = transform(z, latent[min(i, len(latent) - 1)], o)
        return z

    def make(found: tuple[Array, ...]) -> Pass:
        i, *later = meetings[len(found) :]
        z = found[-1] if found else transformed(p.latents, range(i))
        block: Any = blocks[i]
        asking = _crossing(z, block, g, lambda y, mask, first: embedded(y, mask, p.input, first))

        def after(h: Array) -> Array:
            z = transformed(asking.after(h), range(i, later[0] if later else depth))
            return z if later else end(norm(z, p.output_norm, o))

        return asking._replace(after=after)

    attentions = tuple(block.attention for block in blocks if isinstance(block, CrossAttention))
    tables = (p.input.position, p.input.features) if isinstance(p.input, InputEmbedding) else ()
    return Passes(attentions, make, places=_rows(*tables))


def _perceiver_resampler(g: Given) -> Passes:
    p, o = g.params, g.o
    assert isinstance(p, Resampler)

    def make(found: tuple[Array, ...]) -> Pass:
        z, layer = found[-1] if found else p.latents, p.layers[len(found)]
        features, own = resampler_contexts(z, Context(z), layer)

        def context(y: Array, mask: Array | None, first: int) -> Context:
            part = features._replace(elements=y, mask=mask)
            if not is_absent(p.position):
                places = rows_for(InputEmbedding(position=p.position), slice(first, first + y.shape[-2]))
                part = part._replace(embedding=places)
            return part if is_absent(p.input) else part._replace(prepare=lambda x: resampler_input(x, p, o))

        def after(h: Array) -> Array:
            h = residual_feed_forward(z + h, layer, o)
            done = len(found) + 1 == len(p.layers)
            return norm(linear(h, p.output, o.xp), p.output_norm, o) if done else h

        return Pass(z, layer.attention, context, after, layer.query_norm, (own,))

    return Passes(tuple(layer.attention for layer in p.layers), make, places=_rows(p.position))


_PASSES: dict[str, Callable[[Given], Passes]] = {
    "attention": _attention,
    "attention_pool": _attention_pool,
    "cross_attention": _cross_attention,
    "isab": _isab,
    "mab": _mab,
    "perceiver": _perceiver,
    "perceiver_io": _perceiver_io,
    "perceiver_resampler": _perceiver_resampler,
    "pma": _pma,
    "set_transformer": _set_transformer,
}
