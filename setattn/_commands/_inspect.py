"""The command ``inspect``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from setattn._commands._errors import CommandError
from setattn._commands._weights import BESIDE, add_file, add_settings, in_words, options_of
from setattn._errors import ArgumentError
from setattn.checkpoints._fit import grouped, listed
from setattn.checkpoints._inspect import Miss, Place, Report, Setting, examine
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
    add_settings(parser)
    parser.add_argument(
        "--prefix", metavar="TEXT", help="look only at tensors whose names begin with this, as those of one block"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        try:
            report = examine(args.file, config=args.config, prefix=args.prefix, options=options_of(args))
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
                yield "parts of it that can be loaded on their own"
            yield from (f"  {p.function:22} {p.layout:22} {_where(p)}" for p in inner)
    if report.places and report.misses:
        yield ""
        yield "All tensors are there also of these layouts, but not in the shapes that their options ask for:"
    elif not report.places:
        yield ""
        yield from _nothing(args, report)
    for miss in report.misses[:_MOST]:
        yield from _miss(miss)
    if len(report.misses) > _MOST:
        yield f"  and {len(report.misses) - _MOST} that fit less well"


def _nothing(args: argparse.Namespace, report: Report) -> Iterator[str]:
    """Say that no layout fits, and what may be done."""
    if args.prefix is not None:
        everywhere = examine(args.file, config=args.config, options=options_of(args))
        elsewhere = [place for place in everywhere.places if place.part_of is None]
        if elsewhere:
            yield f"No layout fits whole under prefix {args.prefix!r}. What would fit:"
            yield from (f"  {p.function:22} {p.layout:22} {_where(p)}" for p in elsewhere)
            return
    where = "" if args.prefix is None else f" under prefix {args.prefix!r}"
    if report.misses:
        yield f"No layout fits whole{where}. Those that come nearest:"
        return
    yield f"No tensor of a known layout is here{where}. The layouts, with the tensors that they are found by:"
    width = max(map(len, layouts()))
    for layout in layouts().values():
        yield f"  {layout.name:{width}}  {', '.join(layout.anchors)}"


def _place(args: argparse.Namespace, place: Place) -> Iterator[str]:
    yield f"layout   {place.layout} ({place.original})"
    if place.prefixes != ("",):
        yield f"where    {_where(place)}"
    each = " each" if len(place.prefixes) > 1 else ""
    yield f"block    {place.function}, {place.parameters} parameters{each}"
    shapes = dict(_parts(place))
    width = max(map(len, shapes), default=0)
    yield from (f"  {name:{width}}  {shape}" for name, shape in shapes.items())
    if place.settings:
        yield "options"
    yield from (f"  {_setting(setting)}" for setting in place.settings)
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
    words += [f"--option {s.name}={s.value}" for s in place.settings if s.origin in ("given", "shapes")]
    words += [f"--option {name}=..." for name in guesses]
    yield f"  python -m setattn run {shlex.quote(str(args.file))} INPUT.npy OUTPUT.npy {' '.join(words)}"


def _setting(setting: Setting) -> str:
    name, value, origin, about = setting
    if value is None and origin in ("needed", "wrong"):
        return f"{name} is {'needed' if origin == 'needed' else 'not usable'}: {about}"
    sources = {
        "config": f"config.json: {about}",
        "default": f"default; {about}",
        "shapes": f"the only one that the shapes allow; {about}",
        "file": "in the file",
    }
    return f"{name} = {value}  ({sources.get(origin, about)})"


def _where(place: Place) -> str:
    times = f"{len(place.prefixes)} times, prefixes" if len(place.prefixes) > 1 else "prefix"
    return f"{times} {listed(place.prefixes)}" if place.prefixes != ("",) else "no prefix"


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
    share = "all names" if miss.share == 1 else f"{100 * miss.share:.0f} % of the names"
    yield f"  {miss.layout}{where}: {share} are in both"
    for reason in miss.reasons:
        yield f"    {reason if len(reason) <= _LONGEST else reason[:_LONGEST] + ' ...'}"
    if miss.share == 1:
        yield from (f"    option {_setting(setting)}" for setting in miss.settings)


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _size(nbytes: int) -> str:
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, _ = size / 1000, units.pop(0)
    return f"{nbytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
