"""``python -m benchmarks``: everything on the CPU; the other commands stand in ``benchmarks/README.md``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("cluster", "compare", "gpu", "imports", "stream")


def main(arguments: list[str]) -> int:
    # Each is imported when it is called for: compare must run where the working tree does not.
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    return importlib.import_module(f"benchmarks.{command}").main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
