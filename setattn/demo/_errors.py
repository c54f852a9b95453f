"""What stops the demo without being a fault of the program: said in one line, without a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can put right, in one line that says how."""


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip(" =-") for line in str(error).splitlines()]
    return ": ".join([type(error).__name__, *[line for line in lines if line][:1]])
