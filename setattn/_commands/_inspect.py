"""The command ``inspect``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from setattn._commands._errors import CommandError
from setattn._commands._weights import BESIDE, add_config, add_file, in_words
from setattn._errors import ArgumentError
from setattn.checkpoints._fit import grouped, listed
from setattn.checkpoints._inspect import Miss, Place, Report, examine
from setattn.checkpoints._public import layouts

_MOST = 5  # layouts that are told of where none fits
_LONGEST = 400  # characters of one reason


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of a command line."""
    parser = commands.add_parser(
        "inspect",
        help="say what a file of weights holds and how to load it",
        description="Say which layouts of weights fit a file, and where; what their blocks are made of; and the call "
        "that loads them. No tensor is read.",
        epilog="example: python -m setattn inspect model.safetensors",
    )
    add_file(parser)
    add_config(parser)
    parser.add_argument(
        "--prefix", metavar="TEXT", help="look only at tensors whose names begin with this, as those of one block"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        try:
            report = examine(args.file, config=args.config, prefix=args.prefix)
        except ArgumentError as error:
            names = {"source": "FILE", "config": "--config" if args.config else BESIDE}
            raise CommandError(in_words(error, names)) from error
    except CommandError as error:
        print(f"python -m setattn inspect: {error}", file=sys.stderr)
        return 2
    for line in _lines(args, report):
        print(line)
    return 0


def _lines(args: argparse.Namespace, report: Report) -> Iterator[str]:
    nbytes = sum(share.nbytes for share in report.dtypes.values())
    yield f"file     {args.file}: {_number(report.tensors, 'tensor')}, {_size(nbytes)}"
    dtypes = [f"{name} ({_number(s.tensors, 'tensor')}, {_size(s.nbytes)})" for name, s in report.dtypes.items()]
    yield f"dtypes   {', '.join(dtypes) or 'none'}"
    for place in report.places:
        if place.part_of is None:
            yield ""
            yield from _place(args, place)
            inner = [part for part in report.places if part.part_of in place.prefixes]
            if inner:
                yield "parts of it that can be loaded on their own, by their prefix"
            yield from (f"  {p.function:22} {p.layout:22} {listed(p.prefixes)}" for p in inner)
    if report.places:
        return
    yield ""
    where = "" if args.prefix is None else f" under prefix {args.prefix!r}"
    if not report.misses:
        yield f"No tensor of a known layout is here{where}. The layouts, with the tensors that they are found by:"
        for layout in layouts().values():
            yield f"  {layout.name:24} {', '.join(layout.anchors)}"
        return
    yield f"No layout fits whole{where}. Those that come nearest:"
    for miss in report.misses[:_MOST]:
        yield from _miss(miss)
    if len(report.misses) > _MOST:
        yield f"  and {len(report.misses) - _MOST} that fit less well"


def _place(args: argparse.Namespace, place: Place) -> Iterator[str]:
    yield f"layout   {place.layout} ({place.original})"
    if place.prefixes != ("",):
        times = f"{len(place.prefixes)} times, prefixes" if len(place.prefixes) > 1 else "prefix"
        yield f"where    {times} {listed(place.prefixes)}"
    each = " each" if len(place.prefixes) > 1 else ""
    yield f"block    {place.function}, {place.parameters} parameters{each}"
    parts = dict(_parts(place))
    width = max(map(len, parts))
    yield from (f"  {name:{width}}  {shape}" for name, shape in parts.items())
    if place.settings:
        yield "options"
    for name, value, origin, about in place.settings:
        if origin in ("config", "default", "file"):
            source = {"config": f"config.json: {about}", "default": f"default; {about}", "file": "in the file"}[origin]
            yield f"  {name} = {value}  ({source})"
        else:
            yield f"  {name} is {'needed' if origin == 'needed' else 'not usable'}: {about}"
    if guesses := [s.name for s in place.settings if s.origin in ("needed", "wrong")]:
        yield f"The dots stand for {' and '.join(guesses)}, which no shape says:"
    yield f"  {place.call}"
    if place.layout == "setattn":
        yield f"  python -m setattn run {shlex.quote(str(args.file))} INPUT.npy OUTPUT.npy"
        return
    words = [f"--layout {place.layout}"]
    words += [f"--prefix {shlex.quote(place.prefixes[0])}"] if place.prefixes[0] else []
    words += [f"--config {shlex.quote(str(args.config))}"] if args.config else []
    words += [f"--dtype {place.call.partition('dtype=numpy.')[2][:7]}"] if "dtype=numpy." in place.call else []
    words += [f"--option {name}=..." for name in guesses]
    yield f"  python -m setattn run {shlex.quote(str(args.file))} INPUT.npy OUTPUT.npy {' '.join(words)}"


def _parts(place: Place) -> Iterator[tuple[str, str]]:
    """Go through the parameters, those that differ in one number and not in shape as one."""
    shapes = {path: f"({', '.join(map(str, dims))})" for path, dims in place.parts.items()}
    by_shape: dict[str, list[str]] = {}
    for path, shape in shapes.items():
        by_shape.setdefault(shape, []).append(path)
    groups = [grouped(alike) for alike in by_shape.values()]
    names = {group[0]: name for alike in groups for name, group in alike.items()}
    yield from ((names[path], shape) for path, shape in shapes.items() if path in names)


def _miss(miss: Miss) -> Iterator[str]:
    where = f" under prefix {miss.prefix!r}" if miss.prefix else ""
    yield f"  {miss.layout}{where}: {100 * miss.share:.0f} % of the names are in both"
    for reason in miss.reasons:
        yield f"    {reason if len(reason) <= _LONGEST else reason[:_LONGEST] + ' ...'}"


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _size(nbytes: int) -> str:
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, _ = size / 1000, units.pop(0)
    return f"{nbytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
