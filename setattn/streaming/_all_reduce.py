"""The states of several processes or devices, merged by the collectives that these have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from setattn._blocks import total
from setattn._errors import OptionError
from setattn._kernels import ignore_underflow
from setattn._namespace import namespace_of
from setattn._state import State as Part
from setattn._state import relative_to
from setattn._typing import Array, Namespace
from setattn.streaming._stream import State, empty_part, is_state, merging


def all_reduce(state: State, /, *, max: Callable[[Array], Array], sum: Callable[[Array], Array]) -> State:
    r"""Merge the states of all processes, or devices, that have seen different elements of the same sets.

    With the largest score :math:`m`, the sum of exponentials :math:`l` and the weighted sum of values :math:`a` of each
    process,

    .. math:: M = \max m, \qquad L = \sum e^{m - M} l, \qquad A = \sum e^{m - M} a

    Parameters
    ----------
    state : State
        The state of this process. All have to be of the same function, parameters, queries, options and batch, and in
        the same pass; that is not checked.
    max, sum : function
        Given an array, returns the largest number, or the sum, of the arrays of all processes, in each place. The array
        has one axis, the same size in every process, and may be written to.

    Returns
    -------
    State
        The state after what all processes have seen, the same in each: to :func:`finish`, or to :func:`advance`. It
        still counts the elements of this process alone, which are those that it has to see in the next pass. It is not
        to be reduced again, nor merged with that of another process: both have seen all.

    Raises
    ------
    ParameterError, OptionError
        If ``state`` is none, or in the pass through the rows; if a function returns anything else.

    See Also
    --------
    merge : Of two states.

    Notes
    -----
    ``max`` is called once, with a number for each head and query of each set, then ``sum``, with ``1 + value_dim``
    for each of these; in float64 where the device has it. How many elements there are does not matter.

    A gradient of the result goes through ``sum`` alone: where ``max`` has none, cut it off from its argument, with
    ``jax.lax.stop_gradient`` or ``detach``.

    Examples
    --------
    One process alone has nothing to add. :doc:`The page on devices </devices>` has this in JAX, PyTorch and MPI.

    >>> import numpy as np, setattn, setattn.streaming as streaming
    >>> state = streaming.create("pma", setattn.init_pma(8, num_heads=2, rng=0))
    >>> state = streaming.update(state, np.ones((5, 8), np.float32))
    >>> streaming.all_reduce(state, max=lambda a: a, sum=lambda a: a)
    <setattn.streaming.State pma, batch (), 5 elements in 1 chunks>
    """
    is_state("all_reduce", "state", state)
    if state._pass is None:
        raise OptionError("all_reduce", "state", "in the pass through the rows", "one in a pass with a state to merge")
    xp = state._work.call.xp
    with ignore_underflow(xp):
        own = total(merging(state), state.levels) if state.levels else empty_part(state, state._pass)
        [largest] = _over_all("max", max, [own.largest], xp)
        part = relative_to(largest, own, xp)
        part = Part(largest, *_over_all("sum", sum, [part.total, part.weighted], xp))
    return replace(state, levels=((1, part),))


def _over_all(argument: str, reduce: Callable[[Array], Array], arrays: Sequence[Array], xp: Namespace) -> list[Array]:
    """Reduce arrays over all processes as one, laid end to end in memory of its own."""
    sizes = [math.prod(a.shape) for a in arrays]
    flat = xp.concat([xp.reshape(a, (size,)) for a, size in zip(arrays, sizes, strict=True)])
    reduced: Any = reduce(flat)
    if not _is_like(reduced, flat, xp):
        kind = f"a {type(reduced).__qualname__}"
        got = f"{kind} of {reduced.dtype} and shape {tuple(reduced.shape)}" if namespace_of(reduced) else kind
        wanted = f"an array like the one it was given, of {flat.dtype} and shape {tuple(flat.shape)}"
        raise OptionError("all_reduce", argument, f"a function that returned {got}", wanted)
    ends = list(itertools.accumulate(sizes))
    return [xp.reshape(reduced[end - size : end], a.shape) for a, size, end in zip(arrays, sizes, ends, strict=True)]


def _is_like(a: Any, b: Array, xp: Namespace) -> bool:
    return namespace_of(a) is xp and bool(a.dtype == b.dtype and a.shape == b.shape)
