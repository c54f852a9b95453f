"""Write the generated tables: ``python docs/make_tables.py``, or with ``--check`` see whether they are up to date.

The table of backends comes from the test matrix in ``tests/backends.py``, so that what is advertised is what is tested.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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


def tested(backend: Any, backends: dict[str, Any]) -> str:
    """Say how a backend is tested, from all entries of the matrix for its library."""
    entries = [b for b in backends.values() if b.module == backend.module]
    on_gpu = any(b.devices == "CUDA" for b in entries)
    variants = sum(b.devices != "CUDA" and b.everywhere for b in entries)
    by_hand = "by hand on a GPU machine, none so far: see docs/gpu-record.md"
    if not variants:
        return by_hand
    text = "every run of the tests, on the CPU" + (f", in {variants} variants" if variants > 1 else "")
    if "CUDA" in backend.devices:
        text += f"; CUDA {by_hand}" if on_gpu else "; not on CUDA"
    return text


def table(backends: dict[str, Any]) -> str:
    """Return the table of backends in Markdown."""
    lines = ["| backend | devices | dtypes | what runs | how it is tested |", "| --- | --- | --- | --- | --- |"]
    for name, b in backends.items():
        if b.listed:
            cells = (TITLES.get(name, name), b.devices, ", ".join(b.dtypes), ", ".join(b.features))
            lines.append(f"| {' | '.join(cells)} | {tested(b, backends)} |")
    return "\n".join(lines)


def render(text: str, content: str) -> str:
    """Return a page with the marked region replaced."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{content}\n{END}{after}"


def main(check: bool) -> int:
    """Rewrite the pages, or count those that are out of date."""
    content, stale = table(load_backends()), 0
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
