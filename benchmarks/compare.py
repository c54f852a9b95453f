"""``python -m benchmarks compare REV_A REV_B``: is setattn on NumPy faster or slower in another revision?

Each revision is unpacked in a temporary folder by ``git archive``, which leaves the repository alone, and has a process
of its own. The two take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Spread, clock, ratio

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 0.05  # seconds of one turn at least: processes, unlike the calls of one, are moved about by the system


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("rev_a", help="a revision, or '.' for the working tree")
    parser.add_argument("rev_b", help="the revision to compare it with")
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name has this regular expression")
    parser.add_argument("--rounds", type=int, default=5, help="turns of a pair of processes (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes for a row (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="setattn-compare-") as temporary:
        folder = Path(temporary)
        (folder / "here").mkdir()
        (folder / "here" / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        packages = [unpack(options.rev_a, folder / "a"), unpack(options.rev_b, folder / "b")]
        with worker(packages[0], folder / "here") as a:
            names = [name for name in a.ask("rows") if re.search(options.only, name, re.IGNORECASE)]
        print(f"A is {options.rev_a}, B is {options.rev_b}; a ratio above 1 means that B is faster\n")
        print("| workload | A, ms | B, ms | ratio | quartiles | B is | largest difference |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in names:
            print(compare(name, packages, folder / "here", options.rounds, options.pairs), flush=True)
    return 0


def compare(name: str, packages: list[Path], here: Path, rounds: int, pairs: int) -> str:
    """Time one row in both revisions, in turns, and return a line of the table.

    Two processes that run the same code differ by some per cent, each for as long as it lives: hence several pairs.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    difference = 0.0
    for _ in range(pairs):
        with worker(packages[0], here) as a, worker(packages[1], here) as b:
            results = [np.asarray(w.ask("prepare", name)) for w in (a, b)]
            difference = max(difference, float(np.max(np.abs(results[0] - results[1]))))
            for turn in range(rounds):
                for index in (0, 1) if turn % 2 else (1, 0):
                    samples[index].append((a, b)[index].ask("time"))
    r = ratio(*samples)
    medians = " | ".join(f"{1e3 * Spread.of(s).median:.3g}" for s in samples)
    quartiles, found = f"{r.low:.2f}, {r.high:.2f}", verdict(samples, pairs)
    return f"| {name} | {medians} | {r.median:.2f} | {quartiles} | {found} | {difference:.1e} |"


def verdict(samples: tuple[list[float], list[float]], pairs: int) -> str:
    """Say whether B is faster: by more than 2 %, in every pair, and in too many turns for chance (1 in 100)."""
    n, wins = len(samples[0]), sum(a > b for a, b in zip(*samples, strict=True))
    chance = 2 * sum(math.comb(n, k) for k in range(max(wins, n - wins), n + 1)) / 2**n
    medians = [
        ratio(samples[0][i : i + n // pairs], samples[1][i : i + n // pairs]).median for i in range(0, n, n // pairs)
    ]
    if chance > 0.01 or not (min(medians) > 1.02 or max(medians) < 0.98):
        return "the same"
    return "faster" if medians[0] > 1 else "slower"


def unpack(revision: str, folder: Path) -> Path:
    """Return a folder that holds the package as it is in a revision."""
    if revision == ".":
        return ROOT
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "setattn"]
    folder.mkdir()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError:
            process.stdout.read()
    if process.returncode:
        raise SystemExit(f"there is no setattn in revision {revision!r}")
    return folder


class Worker:
    """A process with one revision, which answers one question at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, *question: str) -> Any:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a revision cannot run this: see the message above")
        return json.loads(answer)


@contextmanager
def worker(package: Path, here: Path) -> Iterator[Worker]:
    """Start a process that imports this folder's benchmarks, and setattn from ``package``."""
    path = os.pathsep.join([str(here), str(package)])
    command = [sys.executable, "-c", "from benchmarks import compare; compare.serve()", str(package)]
    environment = os.environ | {"PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=here, env=environment, **pipes)
    try:
        yield Worker(process)
    finally:
        process.stdin.close()
        process.wait()


def serve() -> None:
    """Answer questions of the parent: the names of the rows, a few numbers of a result, the time of a call."""
    import setattn
    from benchmarks.contestants import ROWS, on_numpy

    if not Path(setattn.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()):
        raise SystemExit(f"setattn was imported from {setattn.__file__}, not from {sys.argv[1]}")
    rows, run, repeats = {row.name: row for row in ROWS}, None, 1
    for line in sys.stdin:
        kind, *rest = json.loads(line)
        if kind == "rows":
            answer: Any = list(rows)
        elif kind == "prepare":
            problem = rows[rest[0]].problem()
            run = on_numpy(problem, problem.options)
            result = run().ravel()
            answer = [float(x) for x in result[:: max(1, result.size // 1000)]]
            repeats = max(1, min(1000, round(SAMPLE / clock(run))))
        else:
            run()
            answer = clock(run, repeats)
        print(json.dumps(answer), flush=True)
