"""``python -m benchmarks imports``: what ``import setattn`` takes, NumPy included, over what ``import numpy`` takes."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

from benchmarks.timing import Spread, ratio

LIMIT = 1.3
CODE = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"


def seconds(package: str, bytecode: str) -> float:
    """Return the processor time of an import in a new process."""
    command = [sys.executable, "-X", f"pycache_prefix={bytecode}", "-c", CODE.format(package)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args(arguments).rounds
    samples: dict[str, list[float]] = {"numpy": [], "setattn": []}
    with tempfile.TemporaryDirectory() as bytecode:
        for package in samples:
            seconds(package, bytecode)
        for _ in range(rounds):
            for package, times in samples.items():
                times.append(seconds(package, bytecode))
    for package, times in samples.items():
        print(f"{package}: {1e3 * Spread.of(times).median:.1f} ms")
    spread = ratio(samples["setattn"], samples["numpy"])
    print(f"ratio {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f}); wanted: {LIMIT} at most")
    return 0
