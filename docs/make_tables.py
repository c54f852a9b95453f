"""Write the generated tables: ``python docs/make_tables.py``, or with ``--check`` see whether they are up to date.

The table of backends comes from the test matrix in ``tests/backends.py``, so that what is advertised is what is tested,
and from the record of runs on GPUs.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "gpu-record.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "backends.md")
START, END = "<!-- backends:start -->", "<!-- backends:end -->"
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


def render(text: str, content: str) -> str:
    """Return a page with the marked region replaced."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{content}\n{END}{after}"


def main(check: bool) -> int:
    """Rewrite the pages, or count those that are out of date."""
    content, stale = table(load_backends(), RECORD.read_text(encoding="utf-8")), 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = render(text, content)
        if new != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
