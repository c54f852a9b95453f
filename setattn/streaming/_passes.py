"""What a block does each time that it goes through the elements of a set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from setattn._attention import attend_from
from setattn._attention_pool import after_pool, pool_context, pool_queries
from setattn._context import Context
from setattn._embedding import rows_for
from setattn._errors import ParameterError
from setattn._layers import AnyNorm, Options, enter, linear, norm, residual_feed_forward
from setattn._mab import after_mab, apply_mab, mab_queries
from setattn._namespace import creation_device
from setattn._params import (
    ISAB,
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    InputEmbedding,
    Linear,
    Perceiver,
    PerceiverIO,
    Resampler,
    SetTransformer,
    is_absent,
)
from setattn._perceiver import embedded, head
from setattn._perceiver_layers import after_cross_attention, cross_attend, transform
from setattn._resampler import mean_latents, resampler_contexts, resampler_input
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


Rows: TypeAlias = Callable[[tuple[Array, ...], Array, Array | None, int], Array]
"""The rows of some elements: of what was found, the elements, their mask, the place of the first of them."""


class Passes(NamedTuple):
    """The passes of a block, each of which may need what those before it have found."""

    attentions: tuple[Attention, ...]  # one for each pass
    make: Callable[[tuple[Array, ...]], Pass]
    rows: Rows | None = None  # a last pass, row by row
    places: int | None = None  # how many places there are, if an element's place matters


class Given(NamedTuple):
    """What the passes of a block are made of."""

    params: Any
    o: Options
    queries: Array | None
    context: Context | None  # what the elements attend to, where the stream is of rows alone
    options: dict[str, Any]

    @property
    def residual(self) -> bool:
        """Whether the queries are added to the attention."""
        return bool(self.options["query_residual"])


def passes_of(function: str, given: Given) -> Passes:
    """Return the passes of a block whose parameters and options have been checked."""
    return _PASSES[function](given) if given.context is None else _rows_alone(_ROWS[function], given.context, given)


def refuse(params: Any) -> None:
    """Refuse embeddings of axes that chunks do not have."""
    if isinstance(params, Resampler):
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

    def context(y: Array, mask: Array | None, first: int) -> Context:
        part = Context(y, mask)
        if not is_absent(p.position):
            places = rows_for(InputEmbedding(position=p.position), slice(first, first + y.shape[-2]))
            part = part._replace(embedding=places)
        return part if is_absent(p.input) else part._replace(prepare=lambda x: resampler_input(x, p, o))

    first = 0 if is_absent(p.mean_latents) else 1  # pass of the layers
    query, averaging = _averaging(p.latents, o)

    def make(found: tuple[Array, ...]) -> Pass:
        number = len(found) - first
        if number < 0:
            return Pass(query, averaging, context, lambda h: mean_latents(h, p, o))
        z, layer = found[-1] if found else p.latents, p.layers[number]
        _, own = resampler_contexts(z, Context(z), layer)

        def after(h: Array) -> Array:
            h = residual_feed_forward(z + h, layer, o)
            done = number + 1 == len(p.layers)
            return norm(linear(h, p.output, o.xp), p.output_norm, o) if done else h

        def features(y: Array, mask: Array | None, first: int) -> Context:
            return context(y, mask, first)._replace(norm=layer.context_norm)

        return Pass(z, layer.attention, features, after, layer.query_norm, (own,))

    attentions = (*(averaging,) * first, *(layer.attention for layer in p.layers))
    return Passes(attentions, make, places=_rows(p.position))


def _averaging(like: Array, o: Options) -> tuple[Array, Attention]:
    """Return a query and an attention that make a mean: all scores are 0, and values are the elements."""
    xp, dim, device = o.xp, like.shape[-1], creation_device(like, o.xp)
    query = xp.zeros((1, 1), dtype=like.dtype, device=device)
    key = Linear(xp.zeros((dim, 1, 1), dtype=like.dtype, device=device))
    value = Linear(xp.reshape(xp.eye(dim, dtype=like.dtype, device=device), (dim, 1, dim)))
    return query, Attention(query=(), key=key, value=value)


# --- rows that attend to a context in memory ------------------------------------------------------------------------


def _rows_alone(function: Callable[[Context, Context, Given], Array], context: Context, g: Given) -> Passes:
    """Return the only pass of elements that see nothing of one another."""

    def make(_: tuple[Array, ...]) -> Pass:
        raise AssertionError

    return Passes((), make, lambda _, x, mask, __: function(Context(x, mask), context, g))


_ROWS: dict[str, Callable[[Context, Context, Given], Array]] = {
    "attention": lambda q, y, g: attend_from(q, y, g.params, g.o),
    "cross_attention": lambda q, y, g: cross_attend(q, y, (g.params, ()), g.o, g.residual),
    "mab": lambda q, y, g: apply_mab(q, y, g.params, g.o, g.residual),
}


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
