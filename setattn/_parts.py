"""What is checked of the parts of parameter trees before any arithmetic: node types and shapes.

A width is checked against the parameters it meets, with a note of where it came from (:class:`Width`), so that the
error names the argument the user wrote rather than the product that would have failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from setattn._call import Call
from setattn._check import Width, floating, known
from setattn._errors import NamespaceError, ParameterError, ShapeError
from setattn._namespace import name_of, signature
from setattn._params import (
    Attention,
    FeedForward,
    InputEmbedding,
    LayerNorm,
    LengthScale,
    Linear,
    MeanHead,
    RMSNorm,
    is_absent,
)
from setattn._typing import Array

_OR_ABSENT = ", or () where the part may be absent"
_OPTIONAL = (Linear, LayerNorm, FeedForward, InputEmbedding, MeanHead)


_fitting: set[tuple[Any, ...]] = set()  # what is known of parameters that fitted: nothing of their numbers
_MOST = 256


def once(check: Callable[..., Any], call: Call, p: Any, *widths: Width, **options: bool) -> None:
    """Check parameters by ``check(call, "params", p, *widths, **options)``, if none like them have passed before.

    What is checked of a tree are types, dtypes, shapes and devices. To look at each of them takes as long as a small
    set; to see that they are all the same as in another call takes a fifth of that. A tree that failed is not known.
    """
    known, key = signature(p, call.xp) if call.eager else None, None
    if known is not None:  # a trace of PyTorch would look at all that has passed
        key = (check, call.dtype, call.device, *options.items(), *[width.size for width in widths], *known)
        try:
            if key in _fitting:
                return
        except TypeError:  # sizes that are symbols have no hash
            key = None
    check(call, "params", p, *widths, **options)
    if key is not None:
        if len(_fitting) >= _MOST:
            _fitting.clear()
        _fitting.add(key)


def node(call: Call, path: str, p: Any, *kinds: type) -> None:
    if not isinstance(p, kinds):
        wanted = "a " + " or ".join(f"setattn.{k.__name__}" for k in kinds)
        maybe = _OR_ABSENT if p is None and kinds[0] in _OPTIONAL else ""
        raise ParameterError(call.function, path, found(p), wanted + maybe)


def found(p: Any) -> str:
    return "None" if p is None else "absent" if is_absent(p) else f"a {type(p).__qualname__}"


def nodes(call: Call, path: str, p: Any, wanted: str, *, at_least: int) -> None:
    if type(p) is not tuple or len(p) < at_least:
        raise ParameterError(call.function, path, found(p), f"a tuple of {'at least one ' if at_least else ''}{wanted}")


def array(call: Call, path: str, a: Any, *wanted: int | str, to_match: str = "") -> None:
    """Check one parameter array; a word in the wanted shape stands for any size from 1."""
    if a is None:
        raise NamespaceError(call.function, path, "None", f"an array of {name_of(call.xp)}{_OR_ABSENT}")
    if isinstance(a, tuple) and is_absent(a):
        raise ParameterError(call.function, path, "absent", f"an array of {name_of(call.xp)}")
    floating(call, path, a)
    shape = a.shape
    fits = len(shape) == len(wanted)
    if fits and shape != wanted:
        for size, want in zip(shape, wanted, strict=True):
            fits = fits and (size == want or (isinstance(want, str) and size >= 1))
    if not fits:
        least = " with sizes of at least 1" if 0 in shape else ""
        match = f" to match {to_match}" if to_match else ""
        raise ShapeError(call.function, path, tuple(shape), f"{_words(wanted)}{least}{match}", "shape")


def _words(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def meet(call: Call, x: Width, path: str, a: Any, *wanted: int | str, axis: int) -> None:
    """Check one axis of a parameter against the width it meets."""
    if a.shape[axis] != x.size:
        unmet(call, x, path, a, *wanted, axis=axis)


def unmet(call: Call, x: Width, path: str, a: Any, *wanted: int | str, axis: int = 0) -> NoReturn:
    """Say that a parameter does not meet a width; where an argument has that width, it is named."""
    if x.shape is None or a.shape[axis] <= x.beside:
        raise ShapeError(call.function, path, tuple(a.shape), f"{_words(wanted)} to match {x.source}", "shape")
    beside = f" with {x.beside} features beside it" if x.beside else ""
    to_match = f"(..., {a.shape[axis] - x.beside}) to match {path} of shape {tuple(a.shape)}{beside}"
    raise ShapeError(call.function, x.source, x.shape, to_match, "shape")


def linear(call: Call, path: str, p: Any, x: Width, *out: int | str, to_match: str = "") -> list[int]:
    """Check an affine map of the last axis of something, and return the sizes it maps to."""
    node(call, path, p, Linear)
    weight = f"{path}.weight"
    array(call, weight, p.weight, "dim_in", *out, to_match=to_match)
    sizes: list[int]
    width, *sizes = p.weight.shape
    if width != x.size:
        unmet(call, x, weight, p.weight, x.size, *out)
    if not is_absent(p.bias):
        array(call, f"{path}.bias", p.bias, *sizes, to_match=weight)
    return sizes


def optional_linear(call: Call, path: str, p: Any, x: Width) -> Width:
    if is_absent(p):
        return x
    (size,) = linear(call, path, p, x, "dim_out")
    return Width(size, path)


def norm(call: Call, path: str, p: Any, x: Width) -> None:
    if is_absent(p):
        return
    node(call, path, p, LayerNorm, RMSNorm)
    for name, a in zip(p._fields, p, strict=True):
        if is_absent(a):
            continue
        at = f"{path}.{name}"
        array(call, at, a, "dim")
        if a.shape[0] != x.size:
            unmet(call, x, at, a, x.size)


def feed_forward(call: Call, path: str, p: Any, x: Width) -> Width:
    node(call, path, p, FeedForward)
    (hidden,) = linear(call, f"{path}.hidden", p.hidden, x, "dim_hidden")
    if not is_absent(p.gate):
        linear(call, f"{path}.gate", p.gate, x, hidden, to_match=f"{path}.hidden")
    return optional_linear(call, f"{path}.output", p.output, Width(hidden, f"{path}.hidden"))


def residual_feed_forward(call: Call, path: str, p: Any, ff_norm: Any, x: Width) -> None:
    """Check ``x + ff(norm(x))``, where ``ff`` may be absent."""
    norm(call, f"{path}.ff_norm", ff_norm, x)
    if not is_absent(p):
        same_width(call, f"{path}.ff", feed_forward(call, f"{path}.ff", p, x), x)


def same_width(call: Call, path: str, branch: Width, x: Width) -> None:
    """Check that a branch can be added to what it branched from."""
    if branch.size != x.size:
        raise ShapeError(call.function, path, branch.size, f"{x.size}, to be added to {x.source}", "output width")


def attention(call: Call, path: str, p: Any, query: Width, context: Width) -> Width:
    """Check an attention, and return the width of its output."""
    node(call, path, p, Attention)
    kv_heads, head_dim = linear(call, f"{path}.key", p.key, context, "kv_heads", "head_dim")
    _, value_dim = linear(call, f"{path}.value", p.value, context, kv_heads, "value_dim", to_match=f"{path}.key")
    if is_absent(p.query):
        heads, remainder = divmod(query.size, head_dim)
        if remainder:
            argument, noun = (query.source, "width") if query.shape is not None else (f"{path}.key", "queries of width")
            wanted = f"a multiple of head_dim={head_dim}, as {path}.query is absent"
            raise ShapeError(call.function, argument, query.size, wanted, noun)
    else:
        heads, _ = linear(call, f"{path}.query", p.query, query, "heads", head_dim, to_match=f"{path}.key")
    if heads % kv_heads:
        wanted = f"a multiple of {kv_heads}, the heads of {path}.key"
        raise ShapeError(call.function, f"{path}.query", heads, wanted, "a number of heads of")
    head = Width(head_dim, f"the head_dim of {path}.key")
    norm(call, f"{path}.query_norm", p.query_norm, head)
    norm(call, f"{path}.key_norm", p.key_norm, head)
    if not is_absent(p.length_scale):
        _length_scale(call, f"{path}.length_scale", p.length_scale, heads, head)
    if is_absent(p.output):
        return Width(heads * value_dim, f"{path}.value")
    node(call, f"{path}.output", p.output, Linear)
    weight, heads_of = f"{path}.output.weight", f"the heads of {path}.query and {path}.value"
    array(call, weight, p.output.weight, heads, value_dim, "dim_out", to_match=heads_of)
    width = p.output.weight.shape[-1]
    if not is_absent(p.output.bias):
        array(call, f"{path}.output.bias", p.output.bias, width, to_match=weight)
    return Width(width, f"{path}.output")


def _length_scale(call: Call, path: str, p: Any, heads: int, head: Width) -> None:
    """Check the factor on the queries of each head."""
    node(call, path, p, LengthScale)
    base, log_n = f"{path}.base", Width(1, "the logarithm of the number of elements")
    node(call, base, p.base, Linear, FeedForward)
    if isinstance(p.base, Linear):
        (width,) = linear(call, base, p.base, log_n, "dim_out")
    else:
        width = feed_forward(call, base, p.base, log_n).size
    if width not in (heads, heads * head.size):
        wanted = f"{heads}, for each head, or {heads * head.size}, for each of their features"
        raise ShapeError(call.function, base, width, wanted, "output width")
    if not is_absent(p.query):
        width = feed_forward(call, f"{path}.query", p.query, head).size
        if width not in (1, head.size):
            wanted = f"1 or {head.size}, to match {head.source}"
            raise ShapeError(call.function, f"{path}.query", width, wanted, "output width")


def learned(call: Call, path: str, a: Any, axes: str) -> Width:
    """Check learned queries: inducing points, seeds, a probe, latents."""
    array(call, path, a, axes, "dim")
    return Width(a.shape[-1], path)


def rows(call: Call, path: str, table: Array, argument: str, x: Array, n: int) -> None:
    """Check that a table has a row for each of the elements of an argument."""
    known(call, argument, x, n)  # or it were not known which rows belong to a chunk
    if n > table.shape[0]:
        wanted = f"at most {table.shape[0]} elements in place of {n}, the rows of {path}"
        raise ShapeError(call.function, argument, tuple(x.shape), wanted, "shape")
