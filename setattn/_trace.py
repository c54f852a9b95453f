"""A call that is recorded once, to be made again for other arrays in the least time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from setattn._adapters import is_about_numbers
from setattn._call import Call
from setattn._check import belongs
from setattn._errors import DTypeError, NamespaceError, ParameterError, ShapeError
from setattn._kernels import compiled, ignoring_underflow, without_gradients
from setattn._namespace import (
    device_of,
    facts_of,
    frozen,
    name_of,
    namespace_of,
    namespace_of_chunks,
    native,
    snapshot,
    unlike_others,
)
from setattn._record import LED_ELSEWHERE, Tape, each, kind_for, refuse
from setattn._typing import Array, Namespace, Shape
from setattn.checkpoints._block import Block


class Traced:
    """A call that :func:`setattn.trace` has recorded, as a function of its arrays alone.

    Attributes
    ----------
    source : str
        What it does, as a function in Python; nothing on JAX, which has its own form of it.
    """

    __slots__ = ("__weakref__", "_arrays", "_plain", "_run", "source")

    def __init__(self, arrays: _Arrays, plain: Callable[..., Any], run: Callable[..., Any], source: str = "") -> None:
        self._arrays = arrays
        self._plain = plain
        self._run = run
        self.source = source

    def __call__(self, *arrays: Array, **by_name: Array) -> Any:
        """Make the call with other arrays."""
        arrays = self._arrays.fitting(arrays, by_name)
        result = self._run(*arrays)
        return self._plain(*arrays) if result is LED_ELSEWHERE else result

    def __repr__(self) -> str:
        return f"<setattn.Traced {self._arrays.function}: {self._arrays}>"


class _Arrays:
    """The arrays of a call: where they stand in it, and what they are like."""

    def __init__(self, function: str, arguments: Sequence[Any], keywords: Mapping[str, Any], names: list[str]) -> None:
        self.function = function
        self.places = [i for i, a in enumerate(arguments) if namespace_of(a) is not None]
        self.by_name = [key for key, a in keywords.items() if namespace_of(a) is not None]
        self.names = [*(names[i] for i in self.places), *self.by_name]
        examples = self.of(arguments, keywords)
        if not examples:
            raise NamespaceError("trace", "arguments", "without an array", "at least one array, beside the parameters")
        self.xp: Namespace = namespace_of(examples[0])
        for name, a in zip(self.names, examples, strict=True):
            xp: Namespace = namespace_of(a)
            if namespace_of_chunks(a, xp) is not None:
                wanted = "an array in memory: a call on lazy arrays is recorded as it is"
                raise NamespaceError("trace", name, f"an array of {name_of(xp)}", wanted)
            if kind := unlike_others(a, xp):
                raise NamespaceError(function, name, *kind)
        self._like: list[tuple[Shape, Any]] = [(tuple(a.shape), a.dtype) for a in examples]
        self._kinds, self._facts_of = [*map(type, examples)], facts_of(self.xp)
        self._facts = None if self._facts_of is None else [*map(self._facts_of, examples)]
        device = device_of(examples[0], self.xp)
        decided_by = "the one of the traced call"
        self._call = Call(function, self.xp, None, device, False, None, False, True, decided_by)

    def of(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Array, ...]:
        """Take the arrays out of the arguments."""
        return (*(arguments[i] for i in self.places), *(keywords[key] for key in self.by_name))

    def put(self, arrays: Sequence[Array], arguments: Any, keywords: Any) -> tuple[list[Any], dict[str, Any]]:
        """Put arrays in their places between the other arguments."""
        place = dict(zip([*self.places, *self.by_name], arrays, strict=True))
        return [place.get(i, a) for i, a in enumerate(arguments)], {k: place.get(k, a) for k, a in keywords.items()}

    def fitting(self, arrays: tuple[Array, ...], by_name: dict[str, Array]) -> tuple[Array, ...]:
        """Return the arrays of a call, those by position first, if they are like the traced ones."""
        if len(arrays) != len(self.places) or by_name.keys() ^ self.by_name:
            got, wanted = _counted(len(arrays), by_name), _counted(len(self.places), self.by_name)
            raise ParameterError(self.function, "arrays", got, f"{wanted}, as in the traced call")
        if by_name:
            arrays = (*arrays, *(by_name[key] for key in self.by_name))
        try:
            alike = self._facts_of is not None and [*map(self._facts_of, arrays)] == self._facts
        except (AttributeError, RuntimeError):  # of what is no array, or a nested tensor
            alike = False
        if not alike or [*map(type, arrays)] != self._kinds:
            self._check(arrays)
        return arrays

    def _check(self, arrays: tuple[Array, ...]) -> None:
        for name, a, (shape, dtype) in zip(self.names, arrays, self._like, strict=True):
            belongs(self._call, name, a)
            if native(a.dtype) != native(dtype):
                raise DTypeError(self.function, name, a.dtype, f"{dtype}, as in the traced call", "dtype")
            if tuple(a.shape) != shape:
                raise ShapeError(self.function, name, tuple(a.shape), f"{shape}, as in the traced call", "shape")

    def __str__(self) -> str:
        return ", ".join(f"{n} {shape} of {dtype}" for n, (shape, dtype) in zip(self.names, self._like, strict=True))


def _counted(positional: int, by_name: Any) -> str:
    return f"{positional} by position" + "".join(f", {name!r} by name" for name in by_name)


def trace(function: Callable[..., Any] | Block, /, *arguments: Any, **keywords: Any) -> Traced:
    r"""Record a call, to make it again for other arrays without what does not depend on them.

    A call of a function of this library first checks its arguments, chooses the order of products, folds norms into
    weights and carries learned queries to them. None of that depends on the numbers of the data; where a set is small,
    it takes longer than all else. What is left of the call is recorded: a list of operations of the library of the
    arrays.

    Parameters
    ----------
    function : callable
        A function of the library, a :class:`Block`, or a function that calls some of them and of the array API.
    *arguments, **keywords
        What it is called with: arrays, parameters, options. An array stands for those of later calls, which are to have
        its shape, dtype and device; its own numbers are an example. All else is constant: parameters, in tuples, lists
        or dictionaries, are copied, and what becomes of them later changes nothing.

    Returns
    -------
    Traced
        A function of the arrays alone, given by position or by name as they were here. It returns what ``function``
        does: on NumPy, with one thread and contiguous parameters, the same bits, elsewhere the same to rounding. Where
        it looks at numbers to choose between two ways, as a norm does for those whose squares would overflow, and finds
        another one than in the example, it calls ``function`` itself.

    Raises
    ------
    NamespaceError
        If no argument is an array, or one is of Dask, which records calls itself.
    ParameterError
        If ``function`` is none, takes numbers out of the arrays, as ``float`` and a boolean index do, writes to
        them, or returns something else than arrays, in tuples, lists or dictionaries if need be.
    ArgumentError
        As the call itself raises it. A traced call raises :class:`ShapeError`, :class:`DTypeError`,
        :class:`NamespaceError` and :class:`ParameterError` for other arrays than those it was traced with.

    See Also
    --------
    Block : A function with its parameters and options.

    Notes
    -----
    Cost: that of a call with the example. The result holds a copy of the parameters, and what was computed of them.

    It is for sets so small that they take microseconds: of a large one each block is recorded, and NumPy takes one
    thread for them. On PyTorch, gradients reach the arrays, and not the parameters. On JAX, this is ``jax.jit`` with
    constant parameters.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_pma(8, num_seeds=2, num_heads=2, rng=0)
    >>> pool = setattn.trace(setattn.pma, np.ones((5, 8), np.float32), params)
    >>> pool
    <setattn.Traced pma: x (5, 8) of float32>
    >>> pool(np.zeros((5, 8), np.float32)).shape
    (2, 8)
    """
    if isinstance(function, Block):
        function, arguments, keywords = function.written_out(arguments, keywords)
    if not callable(function):
        raise ParameterError("trace", "function", f"a {type(function).__qualname__}", "a function or a setattn.Block")
    name = getattr(function, "__name__", type(function).__name__)
    arrays = _Arrays(name, arguments, keywords, _names(function, arguments, keywords))
    xp, body = arrays.xp, function
    with without_gradients(xp):
        given = {*arrays.places, *arrays.by_name}  # whose places are left open
        fixed = _arrays_by(_copy, tuple(None if i in given else a for i, a in enumerate(arguments)))
        named = _arrays_by(_copy, {key: None if key in given else a for key, a in keywords.items()})

        def plain(*data: Array) -> Any:
            args, others = arrays.put(data, fixed, named)
            return body(*args, **others)

        examples = arrays.of(arguments, keywords)
        try:
            run = compiled(plain, examples, xp)
        except TypeError as error:
            if is_about_numbers(error):
                refuse()
            raise
        if run is not None:
            return Traced(arrays, plain, run)
        tape = Tape()
        recorded = [kind_for(namespace_of(a))(_copy(a), tape, tape.number()) for a in examples]
        args, others = arrays.put(recorded, _arrays_by(_recorded, fixed), _arrays_by(_recorded, named))
        from setattn._program import program  # not before a call is traced: few programs do that

        run, source = program(name, arrays.names, tape, body(*args, **others))
    return Traced(arrays, plain, ignoring_underflow(run, xp), source)


def _arrays_by(function: Callable[[Array], Any], part: Any) -> Any:
    """Apply a function to the arrays of a part of the arguments, and to those of the parameters of blocks in it."""

    def apply(a: Any) -> Any:
        if isinstance(a, Block):
            return Block(a.function, each(a.params, apply), a.options, a.layout)
        return a if namespace_of(a) is None else function(a)

    return each(part, apply)


def _copy(a: Array) -> Array:
    return frozen(snapshot(a, namespace_of(a)))


def _recorded(a: Array) -> Any:
    return kind_for(namespace_of(a))(a)


def _names(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[str]:
    """Return what the arguments by position are called."""
    try:
        bound = inspect.signature(function).bind(*arguments, **keywords)
    except (TypeError, ValueError):  # the call itself will say so; what is built in has no signature
        return [f"arguments[{i}]" for i in range(len(arguments))]
    names: list[str] = []
    for name, value in bound.arguments.items():
        several = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names.extend([f"{name}[{i}]" for i in range(len(value))] if several else [name])
    return names
