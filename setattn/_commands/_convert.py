"""The command ``convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from setattn._commands._errors import CommandError
from setattn._commands._files import check_another, check_writable
from setattn._commands._weights import add_file, add_options, in_words, load_block
from setattn._errors import ArgumentError
from setattn._params import count_params
from setattn.checkpoints._public import save


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of a command line."""
    parser = commands.add_parser(
        "convert",
        help="save weights of a known layout in the library's own",
        description="Load a block and save it in the library's own layout, with its function and its options: "
        "setattn.load then needs nothing but the file.",
        epilog="example: python -m setattn convert model.safetensors head.safetensors --layout siglip "
        "--prefix vision_model.head. --option num_heads=16",
    )
    add_file(parser)
    parser.add_argument("out", type=_safetensors, metavar="OUT", help="file to write, .safetensors")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        check_another(args.out, "OUT", FILE=args.file)
        out = check_writable(args.out)
        block = load_block(args)
        try:
            save(out, block)
        except ArgumentError as error:
            if isinstance(error.__cause__, OSError):
                raise CommandError(f"cannot write {args.out}: {error.__cause__.strerror}") from error
            raise CommandError(in_words(error, {"block": f"FILE {args.file}"})) from error
    except CommandError as error:
        print(f"python -m setattn convert: {error}", file=sys.stderr)
        return 2
    print(f"wrote    {args.out}")
    print(f"block    {block.function}, {count_params(block.params)} parameters")
    return 0


def _safetensors(text: str) -> Path:
    if Path(text).suffix.lower() != ".safetensors":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .safetensors")
    return Path(text)
