"""What is known of a stream before its first chunk, and what is checked of every chunk."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from setattn import _check as check
from setattn._attention import attention
from setattn._attention_pool import attention_pool
from setattn._call import Call, begin, widen
from setattn._context import Context
from setattn._errors import OptionError, ShapeError
from setattn._kernels import ignore_underflow, only_checks
from setattn._layers import Options
from setattn._layers import options as checked_options
from setattn._mab import mab
from setattn._namespace import creation_device, native, widest_float
from setattn._params import ISAB, FeedForward, Linear, is_absent, map_params
from setattn._perceiver import perceiver, perceiver_io
from setattn._perceiver_layers import cross_attention
from setattn._resampler import perceiver_resampler
from setattn._set_transformer import isab, pma, set_transformer
from setattn._structure import token_table
from setattn._typing import Array
from setattn.streaming._passes import Given, Passes, passes_of, refuse


class _Function(NamedTuple):
    call: Callable[..., Array]
    queries: bool | None = None  # whether they have to be given; None where they cannot be
    width: Callable[[Any], Any] = lambda p: _of_map(p.attention.key)  # of an element, by well-formed parameters
    asking: Callable[[Any], Any] = lambda p: _of_queries(p.attention, p.query_norm)  # of one that attends to a context


def _of_map(p: Any) -> Any:
    return p.weight.shape[0]


def _of_queries(p: Any, norm: Any = ()) -> Any:
    """Return the width of queries; where nothing tells it, there are as many heads as those of the keys."""
    if not is_absent(p.query):
        return _of_map(p.query)
    scale: Any = getattr(norm, "scale", ())
    if not is_absent(scale):
        return scale.shape[0]
    heads, head_dim = p.key.weight.shape[1:]
    return head_dim * (heads if is_absent(p.output) else p.output.weight.shape[0])


def _of_asking_mab(p: Any) -> Any:
    return _of_queries(p.attention, p.query_norm) if is_absent(p.project) else _of_map(p.project)


def _of_embedded(p: Any) -> Any:
    """Return the width of an element before what is done to it first."""
    width = next(_of_map(block.attention.key) for block in p.cross_attentions if not is_absent(block))
    if is_absent(p.input):
        return width
    if isinstance(p.input.project, Linear):
        return _of_map(p.input.project)
    if is_absent(p.input.features):
        return width
    beside = p.input.features_project
    return width - (beside.weight if isinstance(beside, Linear) else p.input.features).shape[1]


def _of_pma(p: Any) -> Any:
    return _of_map(p.ff.hidden if isinstance(p.ff, FeedForward) else p.mab.attention.key)


def _of_set_transformer(p: Any) -> Any:
    if is_absent(p.encoder):
        return _of_pma(p.pma)
    first = p.encoder[0]
    return _of_map((first.mab_inducing if isinstance(first, ISAB) else first).attention.key)


def _of_pool(p: Any) -> Any:
    return _of_map(p.input if isinstance(p.input, Linear) else p.attention.key)


def _of_resampler(p: Any) -> Any:
    if is_absent(p.input):
        return p.latents.shape[1]
    return _of_map(p.input.hidden if isinstance(p.input, FeedForward) else p.input)


FUNCTIONS = {
    "attention": _Function(attention, True, lambda p: _of_map(p.key), _of_queries),
    "attention_pool": _Function(attention_pool, width=_of_pool),
    "cross_attention": _Function(cross_attention, True),
    "isab": _Function(isab, width=lambda p: _of_map(p.mab_inducing.attention.key)),
    "mab": _Function(mab, True, asking=_of_asking_mab),
    "perceiver": _Function(perceiver, width=_of_embedded),
    "perceiver_io": _Function(perceiver_io, False, lambda p: _of_embedded(p.encoder)),
    "perceiver_resampler": _Function(perceiver_resampler, width=_of_resampler),
    "pma": _Function(pma, width=_of_pma),
    "set_transformer": _Function(set_transformer, width=_of_set_transformer),
}
_WITH_CHUNKS = ("mask", "query_mask", "pair_mask", "bias", "key_positions")


class Beside(NamedTuple):
    """The arrays that a stream has beside its elements: what attends to them, or what they attend to."""

    queries: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None


class Work(NamedTuple):
    """What follows from a function, its parameters and its options, and is the same for all states of a stream."""

    call: Call
    o: Options
    passes: Passes
    empty: Array  # a chunk without elements
    computed: Any  # the dtype that is computed in, and the one that states are merged in: where that has more digits,
    merged: Any  # the merges of a long stream round next to nothing


def function_name(caller: str, function: Any) -> str:
    """Return the name of a function that a stream can be folded by."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    known = FUNCTIONS.get(name)
    if known is None or not (isinstance(function, str) or function is known.call):
        got = repr(name) if name else f"a {type(function).__qualname__}"
        raise OptionError(caller, "function", got, "one of " + ", ".join(map(repr, FUNCTIONS)))
    return str(name)


def all_options(caller: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a function, as they are given or by default."""
    parameters = inspect.signature(FUNCTIONS[name].call).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _WITH_CHUNKS}
    for option in given:
        if option not in known:
            wanted = f"one of {name} in a stream: {', '.join(known)}"
            if option in _WITH_CHUNKS:
                wanted = "it with each chunk" if option == "mask" else "none, as a chunk brings a mask, and no more"
            raise OptionError(caller, option, "given", wanted)
    plain = {option: value.item() if hasattr(value, "item") else value for option, value in given.items()}
    return known | plain


def work_of(
    caller: str, name: str, params: Any, beside: Beside, batch: tuple[int, ...], options: dict[str, Any]
) -> Work:
    """Check all that is known before the first chunk, as a call with a set without elements does."""
    _check_beside(caller, name, beside)
    queries, context, context_mask = beside
    leaf = _first_leaf(params)
    if leaf is None:
        begin(name, "params", params)
    call = begin(name, "params", leaf, "params")
    refuse(params)
    table = token_table(params)
    width = FUNCTIONS[name].width if context is None else FUNCTIONS[name].asking
    empty = _empty(call, leaf, width, params, batch, tokens=not is_absent(table))
    if context is not None:
        given = functools.partial(FUNCTIONS[name].call, empty, context, params, mask=context_mask, **options)
    else:
        arrays = {True: (queries, empty), False: (empty, queries), None: (empty,)}[FUNCTIONS[name].queries]
        given = functools.partial(FUNCTIONS[name].call, *arrays, params, **options)
    only_checks(given, call.xp)

    known = {key: value for key, value in options.items() if key in ("activation", "eps", "scale", "plan")}
    o = checked_options(call, **known)
    with ignore_underflow(call.xp):
        if call.half:
            params, queries = map_params(lambda a: widen(a, call.xp), (params, () if queries is None else queries))
            queries = None if is_absent(queries) else queries
        asked = None if context is None else Context(context, context_mask)
        passes = passes_of(name, Given(params, o, queries, asked, options))
        like = widen(leaf, call.xp) if call.half else leaf
        return Work(call, o, passes, empty, native(like.dtype), native(widest_float(like, call.xp)))


def _check_beside(caller: str, name: str, beside: Beside) -> None:
    wants, (queries, context, context_mask) = FUNCTIONS[name].queries, beside
    if context is not None and not wants:
        raise OptionError(caller, "context", "given", f"None, as nothing but the stream is attended to in {name}")
    if context is not None and queries is not None:
        raise OptionError(caller, "context", "given", "None beside queries, which attend to the stream")
    if context_mask is not None and context is None:
        raise OptionError(caller, "context_mask", "given", "None without a context")
    if queries is None and context is None and wants:
        wanted = f"an array, the first one of {name}: what attends to the stream (or a context, for its rows alone)"
        raise OptionError(caller, "queries", "None", wanted)
    if queries is not None and wants is None:
        raise OptionError(caller, "queries", "given", f"None, as {name} has its queries in its parameters")


def _first_leaf(params: Any) -> Any:
    if not isinstance(params, tuple):
        return params
    return next((leaf for part in params if (leaf := _first_leaf(part)) is not None), None)


def _empty(
    call: Call, leaf: Array, width_of: Callable[[Any], Any], params: Any, batch: tuple[int, ...], *, tokens: bool
) -> Array:
    try:
        width = width_of(params)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError):
        width = 1  # the parameters are malformed, and the call will say how
    shape, dtype = ((*batch, 0), call.xp.int32) if tokens else ((*batch, 0, width), leaf.dtype)
    return call.xp.zeros(shape, dtype=dtype, device=creation_device(leaf, call.xp))


def check_length(caller: str, work: Work, length: Any, batch: tuple[int, ...]) -> None:
    """Check the number of elements, which parameters may need before the first of them is seen."""
    if length is None:
        if not all(is_absent(p.length_scale) for p in work.passes.attentions):
            wanted = "how many elements of each set take part: the parameters have a length_scale, which depends on it"
            raise OptionError(caller, "length", "not given", wanted)
    elif not check.is_integer(length):
        check.integers(work.call, "length", length)
        if tuple(length.shape) != batch:
            raise ShapeError(work.call.function, "length", tuple(length.shape), f"{batch}, the batch", "shape")
    else:
        check.integer(caller, "length", length, least=0)


def check_chunk(work: Work, chunk: Any, mask: Any, number: int, place: int) -> int:
    """Check a chunk and its mask, and return how many elements of each set it has."""
    call, like, argument = work.call, work.empty, f"chunk {number}"
    batch = tuple(like.shape[:-2])
    if call.xp.isdtype(like.dtype, "integral"):
        batch = tuple(like.shape[:-1])
        check.tokens(call, argument, chunk)
        n, wanted = chunk.shape[-1], (*batch, "n")
    else:
        check.data(call, argument, chunk)
        n, wanted = chunk.shape[-2], (*batch, "n", like.shape[-1])
    if len(chunk.shape) != len(wanted) or any(b not in ("n", a) for a, b in zip(chunk.shape, wanted, strict=True)):
        words = ", ".join(map(str, wanted))
        raise ShapeError(
            call.function, argument, tuple(chunk.shape), f"({words}{',' if len(wanted) == 1 else ''})", "shape"
        )
    check.mask(call, f"mask of chunk {number}", mask, (*batch, n), "one entry for each element of the chunk")
    if work.passes.places is not None and place + n > work.passes.places:
        rows = f"at most {work.passes.places} elements in all, the rows of the table for their places"
        raise ShapeError(call.function, argument, f"elements {place} to {place + n}", f"{rows}")
    return int(n)
