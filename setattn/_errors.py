"""The errors of the library: one family, each naming the function, the argument, what it got and what it wanted."""

from __future__ import annotations

from typing import Any

_LONGEST = 100


class ArgumentError(Exception):
    """A call that cannot be carried out as it was written.

    Attributes
    ----------
    function : str
        Public function that was called.
    argument : str
        Argument at fault; a part of the parameters is written as a path, such as ``params.attention.key.weight``.
    got : object
        What was found there: a shape, a dtype, a type, a value.
    wanted : str
        What would have been accepted.
    """

    def __init__(self, function: str, argument: str, got: Any, wanted: str, noun: str = "") -> None:
        # The fields alone: what BaseException does in __init__ it has done in __new__, and torch.compile, which can
        # trace this but not a call of super(), shows the arguments of an exception and never calls __str__.
        self.function = function
        self.argument = argument
        self.got = got
        self.wanted = wanted
        self._noun = noun

    def __str__(self) -> str:
        found = " ".join(str(self.got).split())  # one line, and not a whole array that was given as an option
        found = found if len(found) <= _LONGEST else found[:_LONGEST] + "..."
        has = f"has {self._noun} {found}" if self._noun else f"is {found}"
        return f"{self.function}: argument '{self.argument}' {has}; wanted {self.wanted}"


class ShapeError(ArgumentError, ValueError):
    """An array of the wrong shape."""


class MaskError(ArgumentError, ValueError):
    """A mask of the wrong shape."""


class DTypeError(ArgumentError, TypeError):
    """An array of the wrong dtype."""


class NamespaceError(ArgumentError, TypeError):
    """Something that is no array, or an array of another library or on another device than the rest."""


class ParameterError(ArgumentError, TypeError):
    """A parameter tree of another structure than the function takes."""


class OptionError(ArgumentError, ValueError):
    """A keyword argument outside its range."""


class CheckpointError(ArgumentError, ValueError):
    """A file or mapping of weights that is broken, or not of the layout it is read as."""


for _error in (
    ArgumentError,
    ShapeError,
    MaskError,
    DTypeError,
    NamespaceError,
    ParameterError,
    OptionError,
    CheckpointError,
):
    _error.__module__ = "setattn"  # the name a user can catch, which tracebacks then show
