"""``python -m benchmarks cluster``: time and memory on Dask against the size of chunks and the number of workers."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.plots import COLORS, LINE, STYLE
from benchmarks.stream import DIM, RESULTS, on_workers

CHUNKS = tuple(2**power for power in (12, 14, 16, 18))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cluster", description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=2 * 10**6, help="2e6 if not given")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="elements of a chunk")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2), help="processes of one thread")
    parser.add_argument("--memory", default="400MB", help="limit of a worker (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    results = machine.describe() | {"elements": args.elements, "limit": args.memory, "runs": []}
    for workers in args.workers:
        for recompute in (False, True):
            for chunk in args.chunks:
                run = on_workers(args.elements, chunk, workers, args.memory, recompute)
                run = {"workers": workers, "recompute": recompute, "chunk": chunk} | run
                results["runs"].append(run)
                how = "made anew" if recompute else "held"
                print(
                    f"{workers} workers, chunks of {chunk} {how}: {run['seconds']:.1f} s, {run['tasks']} tasks, "
                    f"{max(run['memory']):.0f} MB, {run['spilled']:.0f} MB written to disk"
                )
    path = args.out / f"cluster-{dt.datetime.now(dt.UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"recorded in {path}, drawn in {draw(results, args.out)}")
    return 0


def draw(results: dict[str, Any], folder: Path) -> Path:
    """Draw time and memory, a line for each number of workers and way to keep chunks."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = folder / "cluster.svg"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for workers, color in zip(sorted({run["workers"] for run in results["runs"]}), COLORS.values(), strict=False):
            for recompute, style in ((False, "--"), (True, "-")):
                runs = [run for run in results["runs"] if (run["workers"], run["recompute"]) == (workers, recompute)]
                label = f"{workers} worker{'s' if workers > 1 else ''}, chunks {'made anew' if recompute else 'held'}"
                look = {"color": color, "ls": style, "marker": "o", "ms": 3, "lw": 1.2, "label": label}
                sizes = [run["chunk"] * DIM * 4 / 1e6 for run in runs]
                time.plot(sizes, [run["seconds"] for run in runs], **look)
                memory.plot(sizes, [max(run["memory"]) for run in runs], **look)
        limit = float(results["limit"].removesuffix("MB"))
        memory.axhline(limit, color=LINE, lw=0.8)
        memory.annotate("limit", (0.01, limit), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
        for ax, label in ((time, "time, s"), (memory, "peak memory of a worker, MB")):
            ax.set(xscale="log", xlabel="size of a chunk, MB", ylabel=label)
            ax.set_ylim(0, None if ax is time else 1.1 * limit)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.spines[["top", "right"]].set_visible(False)
        time.legend(fontsize=6.5, frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
