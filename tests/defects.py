"""Defects to plant in the library, one at a time: a property that none of them can break would be worth nothing.

They take hold where a state is made, merged and finished, where weights are computed and where elements are selected,
in every module that has the function by its name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from setattn import _context, _layers, _state
from setattn._context import Context
from setattn._state import State

_PATCHED = ("make_state", "merge_states", "finish", "finish_blocks", "softmax_weights")
_ORIGINAL = {name: getattr(_state, name) for name in _PATCHED}
_ORIGINAL |= {name: getattr(_layers, name) for name in ("select", "norm")}
_ORIGINAL |= {"log_length": _context.log_length}


@contextlib.contextmanager
def planted(**wraps: Callable[..., Any]) -> Iterator[None]:
    """Put `wrap(original, *arguments)` in the place of functions of the library."""
    with contextlib.ExitStack() as stack:
        for name, wrap in wraps.items():
            original = _ORIGINAL[name]

            def defective(*arguments: Any, original: Any = original, wrap: Any = wrap) -> Any:
                return wrap(original, *arguments)

            for key, module in list(sys.modules.items()):
                if key.startswith("setattn") and getattr(module, name, None) is original:
                    stack.enter_context(mock.patch.object(module, name, defective))
        yield


def _contexts(change: Callable[[Context, Any], Context]) -> contextlib.AbstractContextManager[None]:
    def wrap(original: Any, q: Any, context: Context, p: Any, o: Any) -> Any:
        return original(q, change(context, o.xp), p, o)

    return planted(make_state=wrap, softmax_weights=wrap)


def positional(amount: float = 1e-3) -> contextlib.AbstractContextManager[None]:
    """The score of an element depends a little on its place."""

    def change(c: Context, xp: Any) -> Context:
        place = amount * xp.cumulative_sum(xp.ones_like(c.elements[..., 0]), axis=-1)
        return c._replace(bias=place if c.bias is None else c.bias + place)

    return _contexts(change)


def dropped() -> contextlib.AbstractContextManager[None]:
    """The last element is forgotten."""

    def change(c: Context, xp: Any) -> Context:
        n, one = c.elements.shape[-2], c.elements[..., 0]
        kept = xp.concat(
            [xp.ones_like(one[..., : n - 1], dtype=xp.bool), xp.zeros_like(one[..., n - 1 :], dtype=xp.bool)], axis=-1
        )
        return c if n == 0 else c._replace(mask=kept if c.mask is None else kept & c.mask)

    return _contexts(change)


def finite_fill(score: float = -20.0) -> contextlib.AbstractContextManager[None]:
    """Masked elements get a low score in place of none."""

    def change(c: Context, xp: Any) -> Context:
        if c.mask is None:
            return c
        zero = 0.0 * c.elements[..., 0]
        low = xp.where(c.mask, zero, zero + score)
        return c._replace(mask=None, bias=low if c.bias is None else c.bias + low)

    return _contexts(change)


def mask_of_the_neighbour() -> contextlib.AbstractContextManager[None]:
    """Every element has the mask of the one before it."""

    def change(c: Context, xp: Any) -> Context:
        return c if c.mask is None else c._replace(mask=xp.roll(c.mask, 1, axis=-1))

    return _contexts(change)


def mask_ignored() -> contextlib.AbstractContextManager[None]:
    """Masked elements are zeros that take part."""
    return _contexts(lambda c, xp: c._replace(mask=None))


def pair_mask_ignored() -> contextlib.AbstractContextManager[None]:
    """Every query sees every element."""
    return _contexts(lambda c, xp: c._replace(pair_mask=None))


def bias_ignored() -> contextlib.AbstractContextManager[None]:
    """Scores are without their bias."""
    return _contexts(lambda c, xp: c._replace(bias=None))


def batch_mixed(amount: float = 1e-3) -> contextlib.AbstractContextManager[None]:
    """The items of a batch leak into one another."""

    def change(c: Context, xp: Any) -> Context:
        if len(c.elements.shape) < 3:
            return c
        return c._replace(elements=c.elements + amount * xp.roll(c.elements, 1, axis=0))

    return _contexts(change)


def deduplicated() -> contextlib.AbstractContextManager[None]:
    """An element that comes again right after itself is not counted again."""

    def change(c: Context, xp: Any) -> Context:
        again = xp.all(c.elements[..., 1:, :] == c.elements[..., :-1, :], axis=-1)
        first = xp.ones_like(c.elements[..., :1, 0], dtype=xp.bool)
        new = xp.concat([first, ~again], axis=-1)
        return c._replace(mask=new if c.mask is None else new & c.mask)

    return _contexts(change)


def rescaled(factor: float = 1 + 1e-3) -> contextlib.AbstractContextManager[None]:
    """Scores are off by a factor."""

    def wrap(original: Any, q: Any, *rest: Any) -> Any:
        shift = None if q.shift is None else q.shift * factor
        return original(q._replace(array=q.array * factor, shift=shift), *rest)

    return planted(make_state=wrap, softmax_weights=wrap)


def over_the_queries() -> contextlib.AbstractContextManager[None]:
    """The softmax runs over the wrong axis."""

    def state(original: Any, q: Any, context: Context, p: Any, o: Any) -> Any:
        s, xp = original(q, context, p, o), o.xp
        return s._replace(total=xp.sum(s.total, axis=-2, keepdims=True) + 0.0 * s.total)

    def weights(original: Any, q: Any, context: Context, p: Any, o: Any) -> Any:
        w, xp = original(q, context, p, o), o.xp
        total = xp.sum(w, axis=-2, keepdims=True)
        return w / xp.where(total == 0, 1.0, total)

    return planted(make_state=state, softmax_weights=weights)


def quadratic() -> contextlib.AbstractContextManager[None]:
    """Results depend on the square of the values a little."""

    def wrap(original: Any, *arguments: Any) -> Any:
        o = original(*arguments)
        return o + 1e-3 * o * o

    return planted(finish=wrap, finish_blocks=wrap)


def shrunk(amount: float = 1e-3) -> contextlib.AbstractContextManager[None]:
    """The weights do not sum to 1."""

    def finish(original: Any, s: State, xp: Any) -> Any:
        return original(s._replace(total=s.total + amount), xp)

    def weights(original: Any, *arguments: Any) -> Any:
        return original(*arguments) / (1 + amount)

    return planted(finish=finish, finish_blocks=finish, softmax_weights=weights)


def unshifted() -> contextlib.AbstractContextManager[None]:
    """The exponentials are those of the scores themselves, which may be too large or too small."""

    def wrap(original: Any, q: Any, context: Context, p: Any, o: Any) -> State:
        s = original(q, context, p, o)
        size = o.xp.exp(s.largest)
        return State(s.largest, s.total * size, s.weighted * size)

    return planted(make_state=wrap)


def offset(amount: float = 1e-30) -> contextlib.AbstractContextManager[None]:
    """Something tiny is added to what is attended to; 0 is no longer 0."""

    def wrap(original: Any, *arguments: Any) -> Any:
        return original(*arguments) + amount

    return planted(finish=wrap, finish_blocks=wrap)


def leaking_select() -> contextlib.AbstractContextManager[None]:
    """Masked elements are multiplied by 0 in place of being selected away."""

    def wrap(original: Any, x: Any, mask: Any, xp: Any) -> Any:
        return x if mask is None else x * xp.astype(mask, x.dtype)[..., None]

    return planted(select=wrap)


def forgotten_select() -> contextlib.AbstractContextManager[None]:
    """Nothing is selected away; the softmax alone has to see to it."""
    return planted(select=lambda original, x, mask, xp: x)


def unscaled_merge() -> contextlib.AbstractContextManager[None]:
    """States are added without bringing them to the same largest score."""

    def wrap(original: Any, a: State, b: State, xp: Any) -> State:
        return State(original(a, b, xp).largest, a.total + b.total, a.weighted + b.weighted)

    return planted(merge_states=wrap)


def unguarded_merge() -> contextlib.AbstractContextManager[None]:
    """The merge of two empty states computes -inf - -inf."""

    def wrap(original: Any, a: State, b: State, xp: Any) -> State:
        largest = original(a, b, xp).largest
        wa, wb = xp.exp(a.largest - largest), xp.exp(b.largest - largest)
        return State(largest, a.total * wa + b.total * wb, a.weighted * wa + b.weighted * wb)

    return planted(merge_states=wrap)


def lopsided_merge() -> contextlib.AbstractContextManager[None]:
    """The second state counts a little less than the first."""

    def wrap(original: Any, a: State, b: State, xp: Any) -> State:
        return original(a, b._replace(total=b.total * (1 - 1e-6)), xp)

    return planted(merge_states=wrap)


def length_off(amount: float = 1e-5) -> contextlib.AbstractContextManager[None]:
    """The logarithm of the number of elements is off by a little."""
    return planted(log_length=lambda original, *a: original(*a) + amount)


def length_of_all() -> contextlib.AbstractContextManager[None]:
    """Masked elements are counted."""

    def wrap(original: Any, query: Any, contexts: Any, xp: Any) -> Any:
        return original(query, [c._replace(mask=None, pair_mask=None) for c in contexts], xp)

    return planted(log_length=wrap)


def length_of_the_first() -> contextlib.AbstractContextManager[None]:
    """Of several contexts that are attended to together, the first alone is counted."""
    return planted(log_length=lambda original, query, contexts, xp: original(query, contexts[:1], xp))


def one_pass_norm() -> contextlib.AbstractContextManager[None]:
    """A layer norm takes its variance from the difference of two large numbers."""

    def wrap(original: Any, x: Any, p: Any, o: Any) -> Any:
        xp = o.xp
        if type(p).__name__ != "LayerNorm":
            return original(x, p, o)
        mean = xp.mean(x, axis=-1, keepdims=True)
        y = (x - mean) / xp.sqrt(xp.abs(xp.mean(x * x, axis=-1, keepdims=True) - mean * mean) + o.eps)
        y = y if isinstance(p.scale, tuple) else y * p.scale
        return y if isinstance(p.bias, tuple) else y + p.bias

    return planted(norm=wrap)
