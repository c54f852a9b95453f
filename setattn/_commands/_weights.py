"""What the commands on files of weights share: their arguments, loading, and errors in the words of a command line."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from setattn._commands._errors import CommandError
from setattn._errors import ArgumentError
from setattn.checkpoints._block import Block
from setattn.checkpoints._public import layouts, load

DTYPES = ("float16", "float32", "float64")

BESIDE = "the config.json beside FILE"

_ARGUMENTS = {
    "source": "FILE",
    "layout": "--layout",
    "prefix": "--prefix",
    "config": "--config",
    "dtype": "--dtype",
    "xp": "--backend",
}


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add the file of weights."""
    parser.add_argument("file", type=Path, metavar="FILE", help="weights, .safetensors or .npz")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a file is loaded."""
    parser.add_argument(
        "--layout", metavar="NAME", help=f"layout of the file, recognised if not given: {', '.join(layouts())}, setattn"
    )
    parser.add_argument("--prefix", default="", metavar="TEXT", help="what the names of the block's tensors begin with")
    add_settings(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert weights (and inputs) to this dtype (default: as they are)"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite weights")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what the shapes of tensors do not say."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.json with options (default: the one beside FILE, if any)"
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the layout, such as num_heads=16; may be given several times",
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a command line gives.

    Raises
    ------
    CommandError
        If one is given twice, or no layout has it.
    """
    options: dict[str, Any] = {}
    known = {option.name for layout in layouts().values() for option in layout.options}
    for name, value in args.option:
        if name in options:
            raise CommandError(f"--option {name} is given twice")
        if name not in known:
            raise CommandError(f"--option {name} is no option of any layout")
        options[name] = value
    return options


def load_block(args: argparse.Namespace) -> Block:
    """Load the block that a command line names, on NumPy.

    Raises
    ------
    CommandError
        If that cannot be.
    """
    options = options_of(args)
    names = _ARGUMENTS | {name: f"--option {name}" for name in options}
    if args.config is None:
        names["config"] = BESIDE
    dtype = None if args.dtype is None else getattr(np, args.dtype)
    try:
        return load(
            args.file,
            args.layout,
            prefix=args.prefix,
            config=args.config,
            xp=None if dtype is None else np,
            dtype=dtype,
            allow_nonfinite=args.allow_nonfinite,
            **options,
        )
    except ArgumentError as error:
        raise CommandError(in_words(error, names)) from error
    except MemoryError as error:
        raise CommandError(f"{args.file} does not fit into memory") from error


def in_words(error: ArgumentError, names: Mapping[str, str]) -> str:
    """Say what an error says, with what stands on the command line in the place of arguments."""
    argument = f"{error.function}: argument '{error.argument}'"
    name = names.get(error.argument)
    if name is None and error.function == "load" and error.got == "not given":
        name = f"--option {error.argument}"
    if error.argument.startswith("config: "):
        name = f"config.json: {error.argument.removeprefix('config: ')}"
    text = str(error)
    if name is not None:
        text = f"{name}{text.removeprefix(argument)}"
    return as_arguments(text)


_KEYWORD = re.compile(r"\b(layout|prefix|config)=('[^']*'|\"[^\"]*\")")


def as_arguments(text: str) -> str:
    """Write keyword arguments as those of a command line."""
    text = _KEYWORD.sub(lambda m: f"--{m[1]} {shlex.quote(m[2][1:-1])}", text)
    text = text.replace(" with --prefix", " --prefix").replace("allow_nonfinite=True", "--allow-nonfinite")
    return re.sub(r"\b(layout|dtype)=(?![\w.])", r"--\1", text)


def _option(text: str) -> tuple[str, Any]:
    """Read ``name=value``; the value is a number, true, false, none or a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
