"""Calls of the blocks as streams: the same case, cut into chunks."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cases
import numpy as np
import tolerances
from cases import Case

import setattn
from setattn import ISAB, streaming
from setattn._params import is_absent

FUNCTIONS = (
    "attention",
    "attention_pool",
    "cross_attention",
    "isab",
    "mab",
    "perceiver",
    "perceiver_io",
    "perceiver_resampler",
    "pma",
    "set_transformer",
)


def streams(case: Case) -> bool:
    """Say whether a case can be streamed."""
    p = case.params
    if case.function not in FUNCTIONS or set(case.masks) - {"mask"} or "key_positions" in case.options:
        return False
    if case.function == "set_transformer":
        return all(isinstance(block, ISAB) for block in p.encoder)
    if case.function == "perceiver_resampler":
        return all(map(is_absent, (p.frame_embedding, p.media_embedding)))
    return True


NAMES = tuple(name for name in (*cases.NAMES, *cases.OWN_TESTS) if streams(cases.make(name)))


def asks(case: Case) -> bool:
    """Say whether the elements that ask can be streamed, to a context in memory."""
    if case.function not in ("attention", "cross_attention", "mab") or set(case.masks) - {"mask", "query_mask"}:
        return False
    p = case.params if case.function == "attention" else case.params.attention
    heads = case.arrays[0].shape[-1] // p.key.weight.shape[-1]  # without a map of the queries, or of their heads
    return not is_absent(p.query) or not is_absent(p.output) or heads == p.key.weight.shape[-2]


ASKING = tuple(name for name in (*cases.NAMES, *cases.OWN_TESTS) if asks(cases.make(name)))


class Streamed:
    """A case as a stream of arrays of a backend."""

    def __init__(self, case: Case, backend: Any = None, dtype: str = "float64") -> None:
        def convert(a: np.ndarray) -> Any:
            return a if backend is None else backend.asarray(a, dtype)

        self.case, self.convert = case, convert
        self.x, self.mask = case.arrays[case.elements], case.masks.get("mask")
        self.tokens = self.x.dtype.kind == "i"
        self.sets = self.x.shape if self.tokens else self.x.shape[:-1]
        self.n, self.batch = self.sets[-1], self.sets[:-1]
        queries = case.arrays[1 - case.elements] if len(case.arrays) == 2 else None
        self.params = case.params
        if backend is not None:  # a stream is computed in the library of its parameters
            self.params = backend.params(case.params, dtype)
            if backend.module == "dask.array":
                self.params = setattn.map_params(lambda a: backend.xp.from_array(a, chunks=-1), self.params)
        self.beside = {} if queries is None else {"queries": convert(queries)}
        self.lengths = np.full(self.batch, self.n) if self.mask is None else self.mask.sum(axis=-1)

    def create(self, **changed: Any) -> streaming.State:
        """Create the state that has seen nothing."""
        length = self.convert(np.asarray(self.lengths, dtype=np.int32)) if self.batch else int(self.lengths)
        given = {"batch": self.batch, "length": length} | self.beside | self.case.options
        return streaming.create(self.case.function, self.params, **(given | changed))

    def chunk(self, start: int, stop: int) -> tuple[Any, Any]:
        """Cut some of the elements out."""
        x = self.x[..., start:stop] if self.tokens else self.x[..., start:stop, :]
        return self.convert(x), None if self.mask is None else self.convert(self.mask[..., start:stop])

    def chunks(self, cuts: Sequence[int]) -> list[tuple[Any, Any]]:
        """Cut all elements at some places."""
        places = [0, *sorted(min(cut, self.n) for cut in cuts), self.n]
        return [self.chunk(*ends) for ends in itertools.pairwise(places)]

    def seen(self, state: streaming.State, cuts: Sequence[int], order: Sequence[int] | None = None) -> streaming.State:
        """Let a state see all elements."""
        chunks = self.chunks(cuts)
        for i in range(len(chunks)) if order is None else order:
            state = streaming.update(state, chunks[i][0], mask=chunks[i][1])
        return state

    def all_passes(self, see: Callable[[streaming.State], streaming.State], cuts: Sequence[int]) -> list[Any]:
        """Go through all passes, and return the result, in parts."""
        state, parts = self.create(), []
        for _ in range(state.passes - 1):
            state = streaming.advance(see(state))
        if state._work.passes.rows is None:
            return [streaming.finish(see(state))]
        for x, mask in self.chunks(cuts):
            state, part = streaming.rows(state, x, mask=mask)
            parts.append(part)
        return parts

    def result(self, cuts: Sequence[int]) -> list[Any]:
        """Fold a stream that is cut at some places."""
        return self.all_passes(lambda state: self.seen(state, cuts), cuts)


class Asking(Streamed):
    """A case whose elements that ask are the stream, and attend to a context in memory."""

    def __init__(self, case: Case, backend: Any = None, dtype: str = "float64") -> None:
        context, mask, keep = case.arrays[1], case.masks.get("mask"), case.masks.get("query_mask")
        asking = Case(case.function, case.arrays[:1], case.params, {} if keep is None else {"mask": keep}, case.options)
        super().__init__(asking, backend, dtype)
        given = {"context": context} if mask is None else {"context": context, "context_mask": mask}
        self.beside = {key: self.convert(a) for key, a in given.items()}


def merges(chunks: int) -> int:
    """How many merges an element of so many chunks passes through: as it is folded, and at the end."""
    return math.ceil(math.log2(chunks)) if chunks > 1 else 0


def reference(case: Case, dtype: str, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the oracle's value, and the bound for so many chunks."""
    keywords = {"activation": None, "eps": None}
    parameters = inspect.signature(getattr(setattn, case.function)).parameters
    keywords = {key: parameters[key].default for key in keywords if key in parameters}
    options = keywords | case.masks | case.options
    return tolerances.reference(
        case.function, *case.arrays, params=case.params, dtype=dtype, merges=merges(chunks), **options
    )


def together(parts: list[Any], numpy: Callable[[Any], np.ndarray] = np.asarray) -> np.ndarray:
    """Put the parts of a result together."""
    arrays = [numpy(part) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2)
