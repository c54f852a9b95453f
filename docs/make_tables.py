"""Write the generated tables: ``python docs/make_tables.py``, or with ``--check`` see whether they are up to date.

The table of backends comes from the test matrix in ``tests/backends.py``, so that what is advertised is what is tested,
and from the record of runs on GPUs; the tables of speed and the headline from the last results of the benchmarks; the
table of layouts from the library and from the record of the comparisons with the originals.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import setattn

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "gpu-record.md"
RESULTS = ROOT / "benchmarks" / "results"
README, BACKENDS, SPEED = ROOT / "README.md", ROOT / "docs" / "backends.md", ROOT / "docs" / "speed.md"
GPU = ROOT / "docs" / "gpu.md"
LAYOUTS, COMPARED = ROOT / "docs" / "layouts.md", ROOT / "docs" / "layouts.json"
HEADLINE = ("SigLIP head", "PMA, 1 seed, official form", "PMA, 1 seed, with row-wise ff")
COMPUTED = {"numpy": "NumPy", "torch": "PyTorch arrays", "jax": "jax.jit"}
GPU_COLUMNS = {"cupy": "CuPy", "torch": "PyTorch", "torch, CUDA graph": "PyTorch, CUDA graph", "jax": "jax.jit"}
TITLES = {
    "numpy": "NumPy",
    "cupy": "CuPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "dask": "Dask",
    "strict": "array-api-strict",
}


def load_backends() -> dict[str, Any]:
    """Import the test matrix from its file."""
    spec = importlib.util.spec_from_file_location("_setattn_test_backends", ROOT / "tests" / "backends.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module.BACKENDS


def runs(record: str) -> dict[str, str]:
    """Return the date of the last recorded run of every backend of a GPU that ``docs/gpu-record.md`` has a row for."""
    dates: dict[str, str] = {}
    for row in re.findall(r"^\| (\d{4}-\d{2}-\d{2}) (\|.*)$", record, re.M):
        for chosen in re.findall(r"--backends[= ]([\w,-]+)", row[1]):
            for name in chosen.split(","):
                dates[name] = max(row[0], dates.get(name, ""))
    return dates


def devices(backend: Any, backends: dict[str, Any]) -> list[str]:
    """Return the devices that a library is tested on."""
    of_library = [b.hardware for b in backends.values() if b.module == backend.module]
    return [device for device in dict.fromkeys(of_library) if device != "fake"]


def tested(backend: Any, backends: dict[str, Any], dates: dict[str, str]) -> str:
    """Say how a backend is tested, from all entries of the matrix for its library."""
    entries = [b for b in backends.values() if b.module == backend.module]
    on_gpu = [b.name for b in entries if b.hardware == "CUDA"]
    variants = sum(b.hardware != "CUDA" and b.everywhere for b in entries)
    last = max((dates[name] for name in on_gpu if name in dates), default=None)
    by_hand = f"by hand on a GPU machine, {f'last on {last}' if last else 'none so far'}: see docs/gpu-record.md"
    if not variants:
        return by_hand
    text = "every run of the tests, on the CPU" + (f", in {variants} variants" if variants > 1 else "")
    return f"{text}; CUDA {by_hand}" if on_gpu else text


def table(backends: dict[str, Any], record: str) -> str:
    """Return the table of backends in Markdown."""
    lines = ["| backend | devices | dtypes | what runs | how it is tested |", "| --- | --- | --- | --- | --- |"]
    for name, b in backends.items():
        if b.listed:
            lists = (devices(b, backends), b.dtypes, b.features)
            cells = (TITLES.get(name, name), *map(", ".join, lists), tested(b, backends, runs(record)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured() -> tuple[str, dict[str, Any]]:
    """Return the date and the results of the last run of the benchmarks."""
    last = max(RESULTS.glob("[0-9]*.json"))  # others are named after their command
    return last.stem, json.loads(last.read_text(encoding="utf-8"))


def cell(row: dict[str, Any], backend: str, variant: str) -> str:
    """Return the ratio to the best peer, and the target where it was missed, with what its floor allows if less."""
    for c in row["contestants"].values():
        if (c["backend"], c["variant"]) == (backend, variant):
            ratio, target = c["ratio"]["median"], row["targets"].get(backend)
            if target is None or ratio >= target:
                return f"{ratio:.2f}"
            reachable = c["own_floor"]["reachable"]
            return f"{ratio:.2f} (of {target:g}" + (f"; at most {reachable:.2f})" if reachable < target else ")")
    return "-"


def speed(date: str, results: dict[str, Any]) -> str:
    """Return the table of the ratios in Markdown."""
    variants = {c["variant"] for row in results["rows"] for c in row["contestants"].values() if c["backend"] == "numpy"}
    columns = [("numpy", v, f"NumPy, {v}" if v else "NumPy") for v in sorted(variants)]
    columns += [("torch", "", "PyTorch arrays"), ("jax", "", "jax.jit")]
    rates, versions = results["rates"], ", ".join(f"{n} {results['versions'][n]}" for n in ("numpy", "torch", "jax"))
    lines = [
        f"Measured on {date}, in float32: {results['machine']}; {versions}. Products ran at "
        f"{2e-9 * rates['multiplications']:.0f} Gflop/s, reading at {1e-9 * rates['bytes']:.1f} GB/s.",
        "",
        f"| workload | best peer | ms | {' | '.join(t for *_, t in columns)} | floor, ms | of the own floor |",
        "| --- " * (5 + len(columns)) + "|",
    ]
    for row in results["rows"]:
        peer, floor = row["contestants"][row["best_peer"]], row["floor"]
        ours = [c for c in row["contestants"].values() if c["backend"]]
        own = [max(c["own_floor"]["of_floor"] for c in ours if c["backend"] == b) for b in ("numpy", "torch", "jax")]
        cells = [f"{row['name']}: {row['size']}", row["best_peer"], milliseconds(peer["seconds"]["median"])]
        cells += [cell(row, backend, variant) for backend, variant, _ in columns]
        cells += [milliseconds(floor["seconds"]), " / ".join(f"{of_floor:.2f}" for of_floor in own)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def misses(results: dict[str, Any]) -> str:
    """Return the table of what the time of each missed target goes to, beside what the library's own floor allows."""
    kinds = ("products", "exponentials", "passes")
    lines = [
        f"| workload, library | ratio | wanted | at most | ms | {' | '.join(kinds)} | between | products of target |",
        "| --- " * 10 + "|",
    ]
    for row in results["rows"]:
        for c in row["contestants"].values():
            wanted = row["targets"].get(c["backend"])
            if wanted is None or (ratio := c["ratio"]["median"]) >= wanted:
                continue
            own, spent = c["own_floor"], c["account"] or {}
            name = f"{row['name']}, {COMPUTED[c['backend']]}" + (f", {c['variant']}" if c["variant"] else "")
            cells = [
                name,
                f"{ratio:.2f}",
                f"{wanted:g}",
                f"{own['reachable']:.2f}",
                milliseconds(c["seconds"]["median"]),
            ]
            cells += [f"{milliseconds(spent.get(kind))} ({milliseconds(own[kind])})" for kind in kinds]
            left = row["contestants"][row["best_peer"]]["seconds"]["median"] / wanted
            cells += [milliseconds(spent.get("between")), f"{spent['products'] / left:.0%}" if spent else "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    """Write a time, if it is known."""
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def headline(date: str, results: dict[str, Any]) -> str:
    """Return the sentence of the README."""
    rows = {row["name"]: row for row in results["rows"]}
    ratios = ((name, rows[name]["contestants"]["setattn, numpy"]["ratio"]["median"]) for name in HEADLINE)
    found = [f"{ratio:.1f} ({name})" for name, ratio in ratios]
    return (
        "In plain NumPy on a CPU, setattn beat the best of PyTorch's and JAX's forms of a block by a factor of\n"
        f"{', '.join(found[:-1])} and {found[-1]}:\n"
        f"on {date}, {', '.join(results['machine'].split(', ')[:2])}, by\n"
        "`python -m benchmarks`. [All workloads](docs/speed.md), those where it is behind included."
    )


def on_gpu() -> str:
    """Return the table of the last run on a GPU in Markdown."""
    last = max(RESULTS.glob("gpu-*.json"))
    results = json.loads(last.read_text(encoding="utf-8"))
    versions = ", ".join(f"{n} {v}" for n, v in results["versions"].items() if n.startswith(("cupy", "torch", "jax")))
    rates = "; ".join(
        f"{name} {2e-12 * r['multiplications']:.0f} Tflop/s, {1e-12 * r['bytes']:.1f} TB/s"
        for name, r in results["rates"].items()
    )
    ours = {f"setattn, {name}": title for name, title in GPU_COLUMNS.items()}
    lines = [
        f"Measured on {last.stem.removeprefix('gpu-')}: {results['card']}; {versions}. Products and copies: {rates}.",
        "",
        f"| workload | precision | best peer | ms | {' | '.join(ours.values())} | wanted |",
        "| --- " * (5 + len(ours)) + "|",
    ]
    for row in results["rows"]:
        peer = milliseconds(row["contestants"][row["best_peer"]]["seconds"]["median"])
        cells = [row["name"], row["precision"], row["best_peer"], peer]
        for name in ours:
            c = row["contestants"].get(name)
            cells.append("-" if c is None else f"{c['ratio']['median']:.2f} ({c['launches']})")
        lines.append(f"| {' | '.join(cells)} | {row['target']:g} |")
    return "\n".join(lines)


def compared() -> dict[str, Any]:
    """Return the record of the last comparison with the originals."""
    return json.loads(COMPARED.read_text(encoding="utf-8"))


def layouts(known: dict[str, Any], records: dict[str, Any]) -> str:
    """Return the table of layouts in Markdown."""
    from setattn.checkpoints._layout import REQUIRED

    def told(option: Any) -> str:
        return f"`{option.name}`" if option.default is REQUIRED else f"`{option.name}={option.default!r}`"

    head = (
        "layout",
        "of",
        "makes",
        "options",
        "compared with",
        "shapes",
        "float64",
        "float32",
        "what the original does otherwise",
    )
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, layout in sorted(known.items()):
        record = records.get(
            name, {"originals": ["not compared"], "shapes": [], "float64": "", "float32": "", "differences": []}
        )
        functions = ", ".join(f"[{function}](blocks/{function}.md)" for function in layout.functions)
        options = ", ".join(map(told, layout.options))
        cells = [f"`{name}`", layout.original, functions, options, ", ".join(record["originals"])]
        cells += [", ".join(record["shapes"])]
        cells += [str(record["float64"]), str(record["float32"]), "; ".join(record["differences"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(text: str, mark: str, content: str) -> str:
    """Return a page with the marked region replaced."""
    start, end = f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def main(check: bool) -> int:
    """Rewrite the pages, or count those that are out of date."""
    backends, last, stale = table(load_backends(), RECORD.read_text(encoding="utf-8")), measured(), 0
    parts = {README: {"backends": backends, "speed": headline(*last)}}
    parts |= {BACKENDS: {"backends": backends}, SPEED: {"benchmarks": speed(*last), "misses": misses(last[1])}}
    parts |= {GPU: {"benchmarks": on_gpu()}}
    parts |= {LAYOUTS: {"layouts": layouts(setattn.layouts(), compared())}}
    for page, contents in parts.items():
        text = new = page.read_text(encoding="utf-8")
        for mark, content in contents.items():
            new = render(new, mark, content)
        if new != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
