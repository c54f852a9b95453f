"""What was recorded, as a function in Python."""

from __future__ import annotations

import itertools
import keyword
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from setattn._errors import ParameterError
from setattn._namespace import is_array_or_number
from setattn._record import LED_ELSEWHERE, Recorded, Result, Step, Tape, each, kept


def program(name: str, inputs: Sequence[str], tape: Tape, result: Any) -> tuple[Callable[..., Any], str]:
    """Turn what was recorded into a function of arrays, and its source: without what no result depends on.

    A part of the result that is constant is copied each time.
    """
    out = each(result, lambda a: _of_result(a, tape))
    steps = _needed(tape.steps, out)
    last = {number: step for step in steps for number in _numbers_in((step.args, step.kwargs))}
    held = {*range(len(inputs)), *_numbers_in(out)}
    words = _Words(name, inputs)
    lines = [f"def {words.name}({', '.join(words.inputs)}):"]
    for step in steps:
        call = words.call(step)
        if step.led_to is None:
            lines.append(f"    {words.of(Result(step.result))} = {call}")
        else:
            lines.append(f"    if {call} is not {step.led_to}:")
            lines.append(f"        return {words.of(LED_ELSEWHERE)}")
        over = [words.of(Result(number)) for number in last if last[number] is step and number not in held]
        if over:  # its memory is for what comes next
            lines.append(f"    del {', '.join(over)}")
    source = "\n".join([*lines, f"    return {words.of(out)}", ""])
    exec(compile(source, f"<{name}, traced>", "exec"), words.known)
    function: Callable[..., Any] = words.known[words.name]
    return function, source


def _of_result(a: Any, tape: Tape) -> Any:
    if isinstance(a, Recorded) and a.tape:
        return Result(a.number)
    constant = a.value if isinstance(a, Recorded) else a
    if is_array_or_number(constant):
        return Result(tape.append(kept, (constant,), {}))
    if not isinstance(a, bool | int | float | complex | str | None):
        wanted = "one that returns arrays, in tuples, lists and dictionaries if need be"
        raise ParameterError("trace", "function", f"one that returns a {type(a).__qualname__}", wanted)
    return a


def _needed(steps: list[Step], out: Any) -> list[Step]:
    """Leave the looks at numbers, and the steps that these or the result depend on."""
    needed, found = set(_numbers_in(out)), []
    for step in reversed(steps):
        if step.result in needed or step.led_to is not None:
            needed.update(_numbers_in((step.args, step.kwargs)))
            found.append(step)
    return found[::-1]


def _numbers_in(part: Any) -> Iterator[int]:
    if isinstance(part, Result):
        yield part.number
    elif isinstance(part, tuple | list | dict):
        for p in part.values() if isinstance(part, dict) else part:
            yield from _numbers_in(p)


class _Words:
    """The words of a program, and what they stand for."""

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        self.known: dict[str, Any] = {}
        self._of: dict[int, str] = {}  # by identity, of what is known
        self.inputs = [self._new(word) for word in inputs]
        self._results = dict(enumerate(self.inputs))
        self.name = self._new(name)

    def call(self, step: Step) -> str:
        """Write a call."""
        named = [f"{key}={self.of(value)}" for key, value in step.kwargs.items()]
        function = self._constant(step.function, getattr(step.function, "__name__", "function"))
        return f"{function}({', '.join([*map(self.of, step.args), *named])})"

    def of(self, part: Any) -> str:
        """Write an argument."""
        if isinstance(part, Result):
            return self._results.get(part.number) or self._results.setdefault(part.number, self._new(f"v{part.number}"))
        if part is ...:
            return "..."
        if part is None or type(part) in (bool, int, str) or (type(part) is float and math.isfinite(part)):
            return repr(part)
        if type(part) is tuple and all(type(p) is int for p in part):
            return repr(part)
        made = isinstance(part, list | dict) or any(True for _ in _numbers_in(part))
        return self._made_of(part) if made else self._constant(part, "c")

    def _made_of(self, part: Any) -> str:
        """Write what is made anew in each call: a list, a dictionary, a tuple with results in it."""
        if isinstance(part, dict):
            return "{" + ", ".join(f"{self._constant(key, 'key')}: {self.of(p)}" for key, p in part.items()) + "}"
        inside = "".join(f"{self.of(p)}, " for p in part).rstrip(" ")
        if type(part) in (tuple, list):
            return f"({inside})" if type(part) is tuple else f"[{inside}]"
        kind = self._constant(type(part), type(part).__name__)
        return f"{kind}({inside})" if hasattr(part, "_fields") else f"{kind}(({inside}))"

    def _constant(self, value: Any, word: str) -> str:
        return self._of.get(id(value)) or self._of.setdefault(id(value), self._new(word, value))

    def _new(self, word: str, value: Any = None) -> str:
        """Return a word that stood for nothing yet."""
        word = "".join(letter if letter.isalnum() else "_" for letter in word).strip("_") or "function"
        word = f"{word}_" if keyword.iskeyword(word) or word[0].isdigit() else word
        words = itertools.chain([word], map(f"{word}_{{}}".format, itertools.count(2)))
        new = next(w for w in words if w not in self.known)
        self.known.setdefault(new, value)
        return new
