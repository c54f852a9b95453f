"""Streams from one end to the other: a source folded into a result, or turned into rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from setattn import _check as check
from setattn._errors import OptionError, ShapeError
from setattn._memory import store
from setattn._namespace import creation_device
from setattn._typing import Array
from setattn.streaming._files import SourceError
from setattn.streaming._functions import advance, finish, rows, update
from setattn.streaming._save import load, save
from setattn.streaming._sources import Source, Target, open_source
from setattn.streaming._stream import State, check_same_stream, create_for
from setattn.streaming._work import Beside


def fold(
    function: str | Callable[..., Array],
    params: Any,
    source: Any,
    /,
    *,
    mask: Any = None,
    queries: Array | None = None,
    batch: Sequence[int] | None = None,
    length: int | Array | None = None,
    chunk_bytes: int = 2**24,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 64,
    progress: bool = False,
    **options: Any,
) -> Array:
    """Compute a function of a set that is not in memory at once.

    Parameters
    ----------
    function, params, queries, **options
        As for :func:`create`.
    source : iterable, callable, array or path
        Chunks ``(..., n, dim)`` or pairs ``(chunk, mask)`` in an iterable, or in an iterator that a function without
        arguments returns; an array of any size; the path of a ``.npy`` file, or an iterable of such paths; an array on
        disk with ``shape``, ``dtype`` and slices, such as those of zarr and h5py. What comes from a disk is moved to
        the library of the parameters.
    mask : array or path, optional
        True where an element takes part, of the shape ``(..., n)``, where the source is one array.
    batch : sequence of int, optional
        The batch of sets; that of the first chunk if not given, and ``()`` where there is none.
    length : int, or array of int of shape batch, optional
        How many elements take part in all, where the parameters have a ``length_scale``; known from an array or a file
        without a mask.
    chunk_bytes : int, default 16 MiB
        How much of an array or a file makes a chunk.
    checkpoint : path, optional
        A ``.safetensors`` file to save the state to. If it is there, the fold goes on from it.
    checkpoint_every : int, default 64
        After how many chunks, and after each pass, the state is saved.
    progress : bool, default False
        Whether to show a bar, with elements per second; needs the package tqdm.

    Returns
    -------
    array
        What the function returns for the whole set, but for rounding; of ``isab``, what its rows attend to.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        If something does not fit; of a chunk, the message has its number, counted from 0.
    streaming.SourceError
        If the source cannot be read, changes, or is not the same in every pass, or can only be gone through once where
        there are several. That is known before anything is read.

    Notes
    -----
    Cost: that of the function. Memory: a chunk, its blocks, and at most ``log2`` of the number of chunks states.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params = setattn.init_set_transformer(2, 16, 4, num_heads=4, num_inducing=3, rng=0)
    >>> x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    >>> y = setattn.streaming.fold("set_transformer", params, lambda: (x[i : i + 100] for i in range(0, 1000, 100)))
    >>> bool(np.allclose(y, setattn.set_transformer(x, params), atol=1e-5))
    True
    """
    run = _Run("fold", function, params, source, mask, Beside(queries), batch, length, chunk_bytes, options)
    check.switch("fold", "progress", progress)
    check.integer("fold", "checkpoint_every", checkpoint_every)
    last = run.state._work.passes.attentions
    run.check_repeatable(len(last))
    state = run.state if checkpoint is None else run.resumed(Path(checkpoint))
    with _bar(run, len(last), progress) as seen:

        def saved(state: State) -> None:
            if checkpoint is not None:
                save(checkpoint, state)

        def after(state: State) -> None:
            if state.chunks % checkpoint_every == 0:
                saved(state)

        state = run.to_pass(len(last) - 1, state, seen, after, saved)
        saved(state)
    return finish(state)


def transform(
    function: str | Callable[..., Array],
    params: Any,
    source: Any,
    /,
    *,
    mask: Any = None,
    context: Array | None = None,
    context_mask: Array | None = None,
    batch: Sequence[int] | None = None,
    length: int | Array | None = None,
    out: Any = None,
    chunk_bytes: int = 2**24,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Compute a function with a row for each element of a set that is not in memory at once.

    Parameters
    ----------
    function : str or function
        ``"isab"``, ``"perceiver_io"`` with its inputs as queries, or ``"attention"``, ``"cross_attention"`` or
        ``"mab"`` from each element to a context in memory.
    params, mask, batch, length, chunk_bytes, progress, **options
        As for :func:`fold`.
    source
        As for :func:`fold`; it is gone through at least twice, but once with a ``context``.
    context, context_mask
        As for :func:`create`: what the elements attend to.
    out : array, optional
        What the rows are written to, ``(..., n, dim)``: an array of NumPy, a memory map, or one on disk that slices can
        be assigned to.

    Returns
    -------
    iterator of array, or out
        The rows, a chunk ``(..., n, dim)`` for each chunk of the source; or ``out``, when all is written.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError, streaming.SourceError
        As for :func:`fold`.

    Notes
    -----
    Cost: that of the function. Memory: a chunk, its blocks and its rows.

    Examples
    --------
    >>> import numpy as np, setattn, setattn.streaming
    >>> params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
    >>> x = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    >>> y = setattn.streaming.transform("isab", params, x, out=np.empty_like(x), chunk_bytes=4000)
    >>> bool(np.allclose(y, setattn.isab(x, params), atol=1e-5))
    True
    """
    beside = Beside(context=context, context_mask=context_mask)
    run = _Run("transform", function, params, source, mask, beside, batch, length, chunk_bytes, options)
    check.switch("transform", "progress", progress)
    passes = run.state._work.passes
    if passes.rows is None:
        wanted = "one with a row for each element: 'isab', 'perceiver_io' with its inputs as queries; else fold()"
        raise OptionError("transform", "function", repr(run.state.function), wanted)
    run.check_repeatable(len(passes.attentions) + 1)
    parts = run.rows(progress)
    if out is None:
        return parts
    place, shape = 0, tuple(getattr(out, "shape", ()))
    for part in parts:
        *sets, n, dim = part.shape
        room = run.source.elements or (shape[-2] if len(shape) > 1 else 0)
        if shape != (*sets, room, dim) or place + n > room:
            wanted = f"{(*sets, run.source.elements or f'{place + n} or more', dim)}, a row for each element"
            raise ShapeError("transform", "out", shape, wanted, "shape")
        store(out, -2, slice(place, place + n), part)
        place = place + n
    if place and place != shape[-2]:
        raise ShapeError("transform", "out", shape, f"{place} rows, one for each element", "shape")
    return out


class _Run:
    """A source, and the state that it begins with."""

    def __init__(
        self,
        caller: str,
        function: Any,
        params: Any,
        source: Any,
        mask: Any,
        beside: Beside,
        batch: Sequence[int] | None,
        length: int | Array | None,
        chunk_bytes: int,
        options: dict[str, Any],
    ) -> None:
        check.integer(caller, "chunk_bytes", chunk_bytes)
        self.caller = caller

        def create(batch: Sequence[int], length: Any) -> State:
            return create_for(caller, function, params, beside, batch, 0, length, options)

        # The lengths may belong to a batch that is not known yet: this state only says what the parameters are.
        work = create(() if batch is None else batch, 0)._work
        tokens = bool(work.call.xp.isdtype(work.empty.dtype, "integral"))
        self.source: Source = open_source(source, mask, Target(caller, work.call, work.empty, tokens, chunk_bytes))
        if length is None and self.source.elements is not None and not self.source.masked:
            length = self.source.elements
        sets = self.source.batch if batch is None else tuple(batch)
        self._create, self._length, self._tokens = create, length, tokens
        self._batch_is_open = sets is None
        known = length if sets is not None or check.is_integer(length) or length is None else 0
        self.state = create(() if sets is None else sets, known)

    def check_repeatable(self, passes: int) -> None:
        """Check, before anything is read, that a source can be gone through as often as it has to be."""
        if passes > 1 and not self.source.repeatable:
            wanted = f"one to go through {passes} times: a list, an array, a path, a function that returns an iterator"
            raise SourceError(self.caller, "source", self.source.kind, wanted)

    def resumed(self, path: Path) -> State:
        """Return the state in a file, if there is one, that this run is to go on from."""
        if not path.exists():
            return self.state
        call, like = self.state._work.call, self.state._work.empty
        saved = load(path, xp=call.xp, device=creation_device(like, call.xp))
        if self._batch_is_open:
            self._open_batch(saved.batch)
        begun = self.state
        check_same_stream(self.caller, begun, saved, "checkpoint", same_pass=False)
        return saved

    def _open_batch(self, batch: Sequence[int]) -> None:
        self.state = self._create(tuple(batch), self._length)
        self._batch_is_open = False

    def to_pass(
        self,
        last: int,
        state: State,
        seen: Callable[[int], None],
        after: Callable[[State], None] = lambda _: None,
        ended: Callable[[State], None] = lambda _: None,
    ) -> State:
        """Let a state see all that is left of each pass up to the last, and be told of."""
        while True:
            for elements, mask in self._unseen(state, seen):
                state = update(self._with_batch(state, elements), elements, mask=mask)
                after(state)
            self._check_end(state)
            if state.current_pass == last:
                return state
            state = advance(state)
            ended(state)

    def rows(self, progress: bool) -> Iterator[Array]:
        """Go through the rows of the last pass."""
        passes = len(self.state._work.passes.attentions)
        with _bar(self, passes + 1, progress) as seen:
            state = advance(self.to_pass(passes - 1, self.state, seen)) if passes else self.state
            for elements, mask in self._unseen(state, seen):
                state, part = rows(self._with_batch(state, elements), elements, mask=mask)
                yield part
            self._check_end(state)

    def _with_batch(self, state: State, elements: Any) -> State:
        """Return a state with the batch of the first chunk, where nobody has said what it is."""
        if self._batch_is_open:
            self._open_batch(tuple(getattr(elements, "shape", ()))[: -1 if self._tokens else -2])
            return self.state
        return state

    def _unseen(self, state: State, seen: Callable[[int], None]) -> Iterator[tuple[Array, Array | None]]:
        """Go through the chunks that a state has not seen."""
        pieces = iter(self.source.pieces())
        skipped = sum(piece.size for piece in islice(pieces, state.chunks))
        if skipped != state.elements:
            got = f"one whose first {state.chunks} chunks have {skipped} elements"
            wanted = f"the chunks that the state has seen, of {state.elements} elements"
            raise SourceError(self.caller, "source", got, wanted)
        seen(skipped)
        for number, piece in enumerate(pieces, state.chunks):
            yield piece.read(number)
            seen(piece.size)

    def _check_end(self, state: State) -> None:
        if state.expected not in (None, state.elements):
            got = f"one of {state.elements} elements in pass {state.current_pass + 1}"
            wanted = f"the same in every pass: the first had {state.expected} elements"
            raise SourceError(self.caller, "source", got, wanted)


@contextlib.contextmanager
def _bar(run: _Run, passes: int, progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda _: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise OptionError(run.caller, "progress", "True", "False, or the package tqdm: pip install tqdm") from error
    total = None if run.source.elements is None else run.source.elements * passes
    with tqdm(total=total, unit=" elements", unit_scale=True, desc=run.state.function) as bar:
        yield lambda n: bar.update(n) and None
