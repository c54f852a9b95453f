"""The command ``run``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import setattn
from setattn._commands._backends import BACKENDS, load_backend
from setattn._commands._chunks import in_chunks
from setattn._commands._errors import CommandError, first_line, whole_number
from setattn._commands._files import check_another, check_writable
from setattn._commands._stream import (
    Given,
    Part,
    Work,
    arguments_of,
    check_options,
    default_batch,
    give,
    give_mask,
    in_parts,
)
from setattn._commands._weights import add_file, add_options, in_words, load_block
from setattn._errors import ArgumentError
from setattn._files import whole_file
from setattn._typing import Shape
from setattn.checkpoints._block import Block


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of a command line."""
    parser = commands.add_parser(
        "run",
        help="run a block from a file of weights on arrays",
        description="Load a block and call it with the array in INPUT. The batch, INPUT's first axis, is worked "
        "through in parts, and so are the elements of a set of more than 64 MB, if the block allows it: neither INPUT "
        "nor OUTPUT is ever in memory as a whole. OUTPUT is written beside its place and moved there when it is whole: "
        "a run that fails or is stopped leaves nothing. (Only one that is killed by SIGKILL leaves an unfinished file, "
        "hidden, as .OUTPUT.*.part.)",
        epilog="example: python -m setattn run model.safetensors patches.npy pooled.npy --layout siglip "
        "--prefix vision_model.head. --option num_heads=16",
    )
    add_file(parser)
    parser.add_argument("input", type=Path, metavar="INPUT", help="the sets, .npy of shape (batch, n, dim) or (n, dim)")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the results, .npy")
    add_options(parser)
    parser.add_argument(
        "--second",
        type=Path,
        metavar="FILE",
        help="second array of a block of two, .npy: y of mab, media of gated_cross_attention, queries of perceiver_io",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="booleans, .npy, True where an element takes part, (batch, n) or (n,)"
    )
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="numpy", help="array library (default: numpy)")
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        metavar="N",
        help="sets at a time (default: those in 16 MB of input); on NumPy no bit of the result depends on it",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        read = {"FILE": args.file, "INPUT": args.input, "--second": args.second, "--mask": args.mask}
        check_another(args.output, "OUTPUT", **read)
        out = check_writable(args.output)
        block = load_block(args)
        check_options(block)
        arrays = _arrays(args, block)
        xp, version = load_backend(args.backend)
        try:
            params = setattn.convert_params(block.params, xp)
        except ArgumentError as error:
            raise CommandError(in_words(error, {"params": f"FILE {args.file}"})) from error
        _print_what(args, block, arrays, f"{args.backend} {version}")
        there = Block(block.function, params, block.options)
        work = in_chunks(there, arrays, xp, lazy=args.backend == "dask")
        work = work or in_parts(there, arrays, args.batch or default_batch(arrays), xp)
        if work.about:
            print(work.about, flush=True)
        shape, dtype, odd = _write(out, args.output, work, args.backend)
    except CommandError as error:
        print(f"python -m setattn run: {error}", file=sys.stderr)
        return 2
    print(f"output   {args.output}: {shape} {dtype}")
    if odd:
        print(f"note     {odd} of {work.results} results hold numbers that are not finite")
    return 0


def _arrays(args: argparse.Namespace, block: Block) -> list[Given]:
    """Open what the block is called with."""
    names, _ = arguments_of(block)
    wanted = {"perceiver_io": 1}.get(block.function, len(names))
    if args.second is None and wanted == 2:
        first, second = names
        raise CommandError(f"--second is not given; wanted the {second} of {block.function}, beside its {first}, INPUT")
    if args.second is not None and len(names) == 1:
        raise CommandError(f"--second is not for {block.function}, which takes one array, {names[0]}")
    convert = args.dtype is not None
    arrays = [give(block, 0, args.input, "INPUT", convert=convert)]
    if args.second is not None:
        arrays.append(give(block, 1, args.second, "--second", convert=convert))
    return [*arrays, give_mask(block, arrays, args.mask)] if args.mask is not None else arrays


def _print_what(args: argparse.Namespace, block: Block, arrays: list[Given], backend: str) -> None:
    origin = f" of layout {block.layout}" if block.layout else ""
    print(f"block    {block.function}{origin}, {setattn.count_params(block.params)} parameters")
    print(f"backend  {backend}")
    for g in arrays:
        print(f"input    {g.name.partition(' ')[2]}: {g.array.shape} {g.array.dtype}", flush=True)


def _guarded(parts: Iterator[Part], work: Work, backend: str) -> Iterator[Part]:
    """Say in one line what a library fails at while it computes."""
    while True:
        try:
            part = next(parts, None)
        except MemoryError as error:
            raise CommandError(work.where_memory_ends) from error
        except RuntimeError as error:  # of a GPU, out of memory
            if backend == "numpy":
                raise
            raise CommandError(f"{backend} failed: {first_line(error)}") from error
        if part is None:
            return
        yield part


def _write(out: Path, name: Path, work: Work, backend: str) -> tuple[Shape, str, int]:
    """Write the parts of an array, one after another, and count the results with numbers that are not finite."""
    odd = 0
    with _bar(work) as bar:
        parts = _guarded(work.parts(bar.update), work, backend)
        first = next(parts)  # what does not fit is refused here, before there is a file
        shape, dtype = work.shape(first.array.shape), first.array.dtype
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        try:
            with whole_file(out) as part, part.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, about)
                for result in itertools.chain([first], parts):
                    odd += result.odd
                    file.write(np.ascontiguousarray(result.array).data)
        except OSError as error:
            raise CommandError(f"cannot write {name}: {error.strerror}") from error
    return shape, str(dtype), odd


class _NoBar(contextlib.AbstractContextManager["_NoBar"]):
    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, n: int) -> None:
        """Show nothing."""


def _bar(work: Work) -> Any:
    """Return a progress bar, which shows itself on a terminal alone, where the package for it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=work.total, unit=work.unit, unit_scale=work.unit != "set", leave=False, disable=None)
