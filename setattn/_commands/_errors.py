"""What stops a command without being a fault of the program: said in one line, without a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable


class CommandError(Exception):
    """Something the user can put right, in one line that says how."""


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip(" =-") for line in str(error).splitlines()]
    return ": ".join([type(error).__name__, *[line for line in lines if line][:1]])


def to_install(*extras: str) -> str:
    """Return how to install one of several extras, from the package index or from a clone."""
    name, clone = (" or ".join(f'"{root}[{extra}]"' for extra in extras) for root in ("setattn", "."))
    return f"python -m pip install {name} (in a clone: {clone})"


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number of a command line, and says of another one which are allowed."""
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {allowed}")
        return value

    return read
