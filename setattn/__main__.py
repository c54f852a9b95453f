"""The command line: ``python -m setattn``."""

from __future__ import annotations

import argparse
import os
import sys

from setattn.demo._command import add_command as add_demo


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m setattn", description="Set attention on any array library.")
    add_demo(parser.add_subparsers(title="commands", dest="command", required=True))
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    return code


if __name__ == "__main__":
    raise SystemExit(main())
