"""The whole run: every row, the growth, and what is written of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import floor, growth, machine, plots
from benchmarks.contestants import BACKENDS, ROWS
from benchmarks.library import Library
from benchmarks.report import TITLES, add_own_floors, measure_row, table
from benchmarks.timing import PAUSE, QUICK, Settings

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time setattn beside other code for the same blocks, all of it in this process, in turns.",
        epilog="Further commands, each with its own --help: 'python -m benchmarks compare REV_A REV_B' compares two "
        "revisions of setattn, 'python -m benchmarks gpu' measures on a CUDA GPU.",
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name has this regular expression")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="setattn's backends (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and sets up to 100 000 elements")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of BLAS and PyTorch (default: as many as they take themselves)")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds before each turn (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    options = parser.parse_args(arguments)
    options.backends = tuple(dict.fromkeys(options.backends.split(",")))
    unknown = [name for name in options.backends if name not in BACKENDS]
    if unknown:
        parser.error(f"--backends: {', '.join(unknown)} is not among {', '.join(BACKENDS)}")
    try:
        options.only = re.compile(options.only, re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only: {error}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    rows = [row for row in ROWS if options.only.search(row.name)]
    families = [name for name in growth.FAMILIES if options.only.search(name)]
    if options.list or not rows + families:
        print("\n".join([*(row.name for row in ROWS), *growth.FAMILIES]))
        return 0 if options.list else 2
    load = machine.load()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler writes to the terminal
    backends = available(options.backends)
    if options.threads is not None:
        machine.limit_threads(options.threads)
    settings = dataclasses.replace(QUICK if options.quick else Settings(), pause=options.pause)
    with inference(), progress_bar() as bar:
        results = measure(rows, families, backends, settings, options.quick, bar)
    write(results | {"load": load}, options.out)
    return 1 if any(row["wrong"] for row in results["rows"]) else 0


def measure(
    rows: list[Any], families: list[str], backends: tuple[str, ...], settings: Settings, quick: bool, bar: Any
) -> dict[str, Any]:
    """Measure the rows and the growth."""
    bar.note("rates of the machine")
    rates = floor.measure_rates()
    libraries = {backend: Library(backend) for backend in backends}
    seen = {backend: library.as_dict() for backend, library in libraries.items()}
    results: dict[str, Any] = {"rates": vars(rates), "libraries": seen, "backends": backends, "rows": [], "growth": []}
    sizes = growth.SIZES[:5] if quick else growth.SIZES
    bar.total(len(rows) + len(families) * len(sizes))
    works = []
    for row in rows:
        bar.note(row.name)
        measured, work = measure_row(row, backends, rates, libraries, settings, lambda: None)
        results["rows"].append(measured)
        works.append(work)
        bar.step()
    short = dataclasses.replace(settings, seconds=settings.seconds / 4, least_rounds=3)
    for family in families:
        bar.note(family)
        results["growth"].append(growth.measure_family(family, sizes, backends, short, bar.step))
    bar.note("floors")
    for measured, work in zip(results["rows"], works, strict=True):
        add_own_floors(measured, work, libraries, rates)
    return machine.describe() | results


def available(backends: tuple[str, ...]) -> tuple[str, ...]:
    """Return the backends that are installed, and name the others."""
    found = []
    for name in backends:
        try:
            __import__(name)
        except ImportError:
            print(f"setattn on {name} is left out: python -m pip install {name}", file=sys.stderr)
        else:
            found.append(name)
    return tuple(found)


def inference() -> contextlib.AbstractContextManager[Any]:
    """Return PyTorch's inference mode, for its own code and for setattn on its arrays."""
    try:
        import torch
    except ImportError:
        return contextlib.nullcontext()
    return torch.inference_mode()


# --- output ---------------------------------------------------------------------------------------------------------


def write(results: dict[str, Any], folder: Path) -> None:
    """Print the table and write it, the numbers and the pictures."""
    text = "\n".join(summary(results))
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
    files = [folder / f"{stamp}.json", folder / f"{stamp}.md"]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(text + "\n")
    try:
        files += plots.draw(results, folder)
    except ImportError:
        print("no pictures: python -m pip install matplotlib", file=sys.stderr)
    print(f"\nwritten: {', '.join(map(str, files))}")


def summary(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is printed: header, table, growth, and who is missing."""
    yield from (f"{line}  " for line in machine.lines(results))
    rates = results["rates"]
    seen = [
        f"{TITLES[name]} {1e9 / own['exponentials']:.2f} and {1e9 / own['passes']:.2f}"
        for name, own in results["libraries"].items()
    ]
    yield (
        f"rates: {2e-9 * rates['multiplications']:.0f} Gflop/s in products, {1e-9 * rates['bytes']:.1f} GB/s reading; "
        f"ns an exponential and a number of a pass: {', '.join(seen)}"
    )
    if results["rows"]:
        yield ""
        yield "Medians, with quartiles in brackets; a ratio above 1 means that setattn is faster than the best peer."
        yield ""
        yield table(results["rows"], results["backends"])
    for family in results["growth"]:
        yield ""
        yield f"{family['name']}: n = {family['curves'][next(iter(family['curves']))]['n']}"
        for name, curve in family["curves"].items():
            memory = ", ".join(f"{m / 2**20:.1f}" for m in curve["memory"])
            yield f"- {name}: time grows as n^{curve['slope']:.2f}; peak memory {memory} MiB"
    missing = {name: why for row in results["rows"] for name, why in row["missing"].items()}
    wrong = [f"- {row['name']}: {name} {why}" for row in results["rows"] for name, why in row["wrong"].items()]
    for title, found in (("Not installed:", [f"- {n}: {why}" for n, why in missing.items()]), ("Wrong:", wrong)):
        if found:
            yield ""
            yield title
            yield from found


class Silent:
    """The progress where tqdm is not installed: none."""

    def total(self, count: int) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self) -> None: ...


class Bar(Silent):
    """The progress on a terminal."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def total(self, count: int) -> None:
        self.bar.reset(total=count)

    def note(self, text: str) -> None:
        self.bar.set_description(text)

    def step(self) -> None:
        self.bar.update()


@contextlib.contextmanager
def progress_bar() -> Iterator[Silent]:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: python -m pip install tqdm", file=sys.stderr)
        yield Silent()
        return
    with tqdm(total=1, leave=False, file=sys.stderr) as bar:
        yield Bar(bar)
