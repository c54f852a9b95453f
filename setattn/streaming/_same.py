"""Whether two trees of arrays are the same, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from setattn._errors import DTypeError, NamespaceError, OptionError, ParameterError, ShapeError
from setattn._namespace import device_of, name_of, namespace_of, same_bits
from setattn._params import is_absent
from setattn._typing import Array


def check_same(function: str, path: str, a: Any, b: Any, other: str = "a") -> None:
    """Check that a tree is the same as another one; numbers are looked at only where the arrays are two objects."""
    if a is b:
        return
    if type(a) is not type(b) and (isinstance(a, tuple) or isinstance(b, tuple) or a is None or b is None):
        raise ParameterError(function, path, _kind(b), f"{_kind(a)}, as {other} has")
    if isinstance(a, tuple):
        if len(a) != len(b):
            raise ParameterError(function, path, f"{len(b)} long", f"{len(a)} long, as that of {other}")
        names = getattr(a, "_fields", None)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            check_same(function, f"{path}.{names[i]}" if names else f"{path}[{i}]", x, y, other)
        return
    check_alike(function, path, a, b, other)
    if not same_bits(a, b):
        raise ParameterError(function, path, "of other numbers", f"those of {other}, bit by bit")


def check_alike(function: str, path: str, a: Array, b: Array, other: str = "a") -> None:
    """Check that an array is of the same library, device, dtype and shape as another one."""
    xp = namespace_of(a)
    if namespace_of(b) is not xp:
        got, wanted = name_of(namespace_of(b)), name_of(xp)
        raise NamespaceError(function, path, f"an array of {got}", f"one of {wanted}, as that of {other}")
    properties: tuple[tuple[Callable[[Array], Any], type[Any], str], ...] = (
        (lambda x: device_of(x, xp), NamespaceError, "device"),
        (lambda x: x.dtype, DTypeError, "dtype"),
        (lambda x: tuple(x.shape), ShapeError, "shape"),
    )
    for read, error, noun in properties:
        if read(a) != read(b):
            raise error(function, path, read(b), f"{read(a)}, as that of {other}", noun)


def check_same_options(function: str, path: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Check that the options of two states are the same."""
    for name, value in a.items():
        if value != b.get(name):
            raise OptionError(function, f"{path}.options[{name!r}]", repr(b.get(name)), f"{value!r}, as that of a")


def _kind(p: Any) -> str:
    return "absent" if is_absent(p) else "None" if p is None else f"a {type(p).__name__}"
