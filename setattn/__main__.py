"""The command line: ``python -m setattn``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from setattn._commands._convert import add_command as add_convert
from setattn._commands._inspect import add_command as add_inspect
from setattn._commands._run import add_command as add_run
from setattn.demo._command import add_command as add_demo


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Stopped(KeyboardInterrupt):
    """A signal to stop, on which what is under way is put away as on an interrupt."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _Parser(prog="python -m setattn", description="Set attention on any array library.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for add_command in (add_demo, add_inspect, add_run, add_convert):
        add_command(commands)
    args = parser.parse_args(argv)
    try:
        with _stopping():
            code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except _Stopped as stopped:
        print("terminated", file=sys.stderr)
        code = 128 + int(stopped.args[0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    return code


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Let the signals that end a process end it as an interrupt does, unless they are ignored."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
