"""Arrays that stand for those of later calls, and the list of what is done to them."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from setattn._adapters import Recorder, recorder_of
from setattn._errors import ParameterError
from setattn._namespace import frozen, is_array_or_number, name_of, namespace_of, snapshot, version
from setattn._typing import Array, Namespace

# --- the list -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A function and its arguments, with numbers for the results of other steps, and the number of its own."""

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    result: int
    led_to: bool | None = None  # of a look at numbers, what it said; of an operation nothing


class Result(NamedTuple):
    """The number of a step, in the arguments of another."""

    number: int


LED_ELSEWHERE = object()  # what a program returns where a look at numbers says something else than in the example


class Tape:
    """What is done to the arrays of a call, in its order.

    Nothing else is written to than what is given as ``out``, which is needed no more: the result of that step is.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._numbers = itertools.count()

    def number(self) -> int:
        """Return the number of the next result: the first ones are the arrays that the call is given."""
        return next(self._numbers)

    def append(self, function: Callable[..., Any], args: Any, kwargs: Any, led_to: bool | None = None) -> int:
        """Record a step, and return its number."""
        number = self.number()
        self.steps.append(Step(function, each(args, _named), each(kwargs, _named), number, led_to))
        return number


# --- the arrays -----------------------------------------------------------------------------------------------------


class Recorded:
    """An array of a call that is recorded: its value in the example, and which result it is; a constant is none."""

    __slots__ = ("number", "tape", "value")
    _recorder: Recorder

    def __init__(self, value: Array, tape: Tape | None = None, number: int = -1) -> None:
        self.value = value
        self.tape = tape
        self.number = number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            _refuse_to_write()
        value = getattr(self.value, name)
        if is_array_or_number(value):
            return _apply(operator.attrgetter(name), (self,), {}, type(self))
        if callable(value) and not isinstance(value, type):
            return functools.partial(_method, getattr(type(self.value), name), self)
        if name not in _ATTRIBUTES:
            refuse()
        return value

    def __array_namespace__(self, *, api_version: str | None = None) -> Namespace:
        return self._recorder

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return _apply(getattr(function, method), args, kwargs, type(self))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _apply(function, args, kwargs, type(self))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(function, args, kwargs or {}, cls)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse()

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        _refuse_to_write()

    def __bool__(self) -> bool:
        return _look(bool, self)

    def __len__(self) -> int:
        return len(self.value)

    __hash__ = object.__hash__


def refuse() -> NoReturn:
    got, wanted = "one that takes numbers out of its arrays", "one that does the same to all, but for an if on them"
    raise ParameterError("trace", "function", got, wanted)


def _refuse_to_write() -> NoReturn:
    raise ParameterError("trace", "function", "one that writes to an array", "one that makes new ones")


def _operator(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Recorded, *others: Any) -> Any:
        return _apply(function, (*others, self) if swapped else (self, *others), {}, type(self))

    return method


def _number(kind: Callable[[Any], Any]) -> Callable[[Recorded], Any]:
    def method(self: Recorded) -> Any:
        if self.tape is not None:
            refuse()
        return kind(self.value)

    return method


def _augmented(self: Recorded, other: Any) -> NoReturn:
    _refuse_to_write()


_BITS = ("and_", "or_", "xor", "lshift", "rshift")
_BOTH_WAYS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", *_BITS)
_ONE_WAY = ("lt", "le", "eq", "ne", "gt", "ge", "neg", "pos", "abs", "invert", "getitem")
for _name in (*_BOTH_WAYS, *_ONE_WAY):
    setattr(Recorded, f"__{_name.rstrip('_')}__", _operator(getattr(operator, _name)))
for _name in _BOTH_WAYS:
    setattr(Recorded, f"__r{_name.rstrip('_')}__", _operator(getattr(operator, _name), swapped=True))
    setattr(Recorded, f"__i{_name.rstrip('_')}__", _augmented)
_NUMBERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "complex": complex, "index": operator.index}
for _name, _kind in _NUMBERS.items():
    setattr(Recorded, f"__{_name}__", _number(_kind))


@functools.lru_cache(maxsize=16)
def kind_for(xp: Namespace) -> type[Recorded]:
    """Return the kind of recorded arrays that stand for arrays of a library."""
    kind: type[Recorded] = type("Recorded", (Recorded,), {"__slots__": ()})

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _apply(function, args, kwargs, kind)

        return wrapper

    kind._recorder = recorder_of(xp, recorded, _in_place, _look)
    kind._recorder.__name__ = f"{name_of(xp)} that setattn.trace records"
    return kind


# --- recording ------------------------------------------------------------------------------------------------------


_OF_SHAPE = {"ones_like", "zeros_like"}  # whose results are constant, whatever the numbers are
_FACTS = {  # which tell no numbers either
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndim",
    "numel",
    "size",
    "stride",
}
_ATTRIBUTES = _FACTS | {
    "device",
    "dtype",
    "flags",
    "is_nested",
    "itemsize",
    "layout",
    "nbytes",
    "requires_grad",
    "shape",
    "strides",
}


def _apply(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], kind: type[Recorded]) -> Any:
    """Call a function with the values of the example, and record it where any is no constant."""
    name, recorded = getattr(function, "__name__", ""), [*_recorded_in((args, kwargs))]
    tape = None if name in _OF_SHAPE else _tape_of(recorded)
    if kwargs.get("out") is not None:
        _refuse_to_write()
    if tape is not None and _decides_on_a_shape(function, name, args, kwargs):
        refuse()
    before = [version(a.value) for a in recorded]
    try:
        result = function(*each(args, _value), **each(kwargs, _value))
    except ValueError as error:
        if "read-only" in str(error):  # as all values are
            _refuse_to_write()
        raise
    if recorded and (result is None or before != [version(a.value) for a in recorded]):
        _refuse_to_write()
    several = isinstance(result, tuple | list) and any(map(is_array_or_number, result))
    if not several and not is_array_or_number(result):
        if tape is not None and name not in _FACTS and isinstance(result, int | float | complex | list | bytes):
            refuse()
        return result
    if tape is None:
        own = result if recorded else each(result, kept)  # which an array from outside is not
        return each(own, lambda a: kind(frozen(a)) if is_array_or_number(a) else a)
    each(result, frozen)
    whole = kind(result, tape, tape.append(function, args, kwargs))
    if not several:
        return whole
    parts = [_apply(operator.getitem, (whole, i), {}, kind) for i in range(len(result))]
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)


_SHAPED_BY_NUMBERS = {
    "argwhere",
    "compress",
    "delete",
    "extract",
    "flatnonzero",
    "masked_select",
    "nonzero",
    "unique",
    "unique_all",
    "unique_consecutive",
    "unique_counts",
    "unique_inverse",
    "unique_values",
}
_SHAPED_BY_ARGUMENTS = {"arange", "empty", "eye", "linspace", "ones", "zeros"}
_SHAPED_BY_LATER_ARGUMENTS = {"broadcast_to", "repeat", "repeat_interleave", "reshape", "tile"}


def _decides_on_a_shape(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> bool:
    """Say whether numbers do: what follows, which goes by shapes, would be done for that of the example."""
    if name in _SHAPED_BY_NUMBERS or (name == "where" and len(args) == 1):
        return True
    if function is operator.getitem:
        return any(a.tape is not None and a.value.dtype == a._recorder.bool for a in _recorded_in(args[1:]))
    if name in _SHAPED_BY_LATER_ARGUMENTS:
        return any(a.tape is not None for a in _recorded_in((args[1:], kwargs)))
    return name in _SHAPED_BY_ARGUMENTS and any(a.tape is not None for a in _recorded_in((args, kwargs)))


def _in_place(function: Callable[..., Any], a: Any, *others: Any) -> Any:
    """Record a function whose result takes the place of its first argument, or of a copy of it if that is constant."""
    recorded = [*_recorded_in((a, others))]
    kind, tape = type(recorded[0]), _tape_of(recorded)
    constant = _value(a), namespace_of(_value(a))
    room = snapshot(*constant)  # of the same layout
    value = frozen(function(*each((a, *others), _value), out=room))
    if tape is None:
        return kind(value)
    if not isinstance(a, Recorded) or a.tape is None:
        a = kind(constant[0], tape, tape.append(snapshot, constant, {}))
    return kind(value, tape, tape.append(function, (a, *others), {"out": a}))


def _method(function: Callable[..., Any], x: Recorded, *args: Any, **kwargs: Any) -> Any:
    return _apply(function, (x, *args), kwargs, type(x))


def _look(function: Callable[..., Any], x: Recorded, *args: Any) -> bool:
    """Look at the numbers of the example, and record where this led."""
    said = bool(function(x.value, *args))
    if x.tape is not None:
        x.tape.append(function, (x, *args), {}, said)
    return said


def each(part: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to what is no tuple, list or dictionary, wherever it is in these."""
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*[each(p, function) for p in part])
    if isinstance(part, tuple | list):
        return type(part)([each(p, function) for p in part])
    if isinstance(part, dict):
        return {key: each(p, function) for key, p in part.items()}
    return function(part)


def _value(a: Any) -> Any:
    return a.value if isinstance(a, Recorded) else a


def _named(a: Any) -> Any:
    if isinstance(a, Recorded):
        return Result(a.number) if a.tape else a.value
    return kept(a)  # as an array from outside may be written to


def kept(a: Any) -> Any:
    """Copy an array; anything else is as it is."""
    xp = namespace_of(a)
    return a if xp is None else snapshot(a, xp)


def _tape_of(recorded: Sequence[Recorded]) -> Tape | None:
    """Return the list that an operation belongs to; one of constants to none."""
    return next((a.tape for a in recorded if a.tape), None)


def _recorded_in(part: Any) -> Iterator[Recorded]:
    if isinstance(part, Recorded):
        yield part
    elif isinstance(part, tuple | list | dict):
        for p in part.values() if isinstance(part, dict) else part:
            yield from _recorded_in(p)
