"""What the results depend on: the machine, the versions, the threads."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import cpu_count

PACKAGES = (
    *("setattn", "numpy", "torch", "jax", "jaxlib", "torch_geometric", "perceiver-pytorch", "flamingo-pytorch"),
    *("open-flamingo", "transformers", "diffusers", "cupy-cuda12x", "cupy-cuda13x", "dask", "distributed"),
)


def describe() -> dict[str, Any]:
    """Return everything of the header."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{processor()}, {cpu_count()} CPUs, {memory()}, {platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "versions": versions(),
        "threads": threads(),
        "load": load(),
    }


def lines(about: dict[str, Any]) -> list[str]:
    """Return the header as lines of text."""
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"{about['date']}; {about['machine']}",
        f"Python {about['python']}; {packages}",
        f"threads: {'; '.join(about['threads'])}; load of the machine before: {about['load']}",
    ]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def memory() -> str:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return "memory unknown"


def threads() -> list[str]:
    """Return each BLAS and each pool of threads with its size."""
    found = []
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        found.append("BLAS unknown (pip install threadpoolctl)")
    else:
        for pool in threadpool_info():
            kernels = pool.get("architecture")  # for which processor its products were written
            library = " ".join(filter(None, (pool["internal_api"], pool.get("version"), kernels)))
            found.append(f"{library} ({Path(pool['filepath']).name.partition('.so')[0]}) {pool['num_threads']}")
    if "torch" in sys.modules:
        found.append(f"torch {sys.modules['torch'].get_num_threads()}")
    if "jax" in sys.modules:
        found.append(f"XLA {cpu_count()}")
    return found


def load() -> str:
    """Return how many processes wanted to run in the last minute. Threads that wait for one another need it low."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def limit_threads(count: int) -> None:
    """Give BLAS and PyTorch a number of threads. XLA takes one for each processor that the process may use."""
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(count)
