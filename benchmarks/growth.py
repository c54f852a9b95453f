"""Time and memory against the size of the set."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import setattn
from benchmarks.contestants import TOLERANCE, Contestant, error_of, setattn_contestants, torch_form
from benchmarks.problem import Problem
from benchmarks.set_transformer import isab, pma
from benchmarks.timing import Settings, Spread, in_turns

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
FAMILIES: dict[str, Callable[[int], Problem]] = {
    "growth of PMA, 1 seed, dim 64, 4 heads": lambda n: pma("official", 1, n, 64, 4),
    "growth of ISAB, m = 16, dim 64, 4 heads": lambda n: isab("official", 16, n, 64, 4),
}


def measure_family(
    family: str,
    sizes: tuple[int, ...],
    backends: tuple[str, ...],
    settings: Settings,
    progress: Callable[[], Any],
) -> dict[str, Any]:
    """Return, for each contestant, the times, the slope of their logarithms and the memory it takes."""
    curves: dict[str, dict[str, Any]] = {}
    for n in sizes:
        problem = FAMILIES[family](n)
        contestants = list(everyone(problem, backends))
        reference = contestants[0].run()
        for c in contestants[1:]:
            if not error_of(c.run(), np.asarray(reference)) <= TOLERANCE:
                raise ValueError(f"{family}: {c.name} differs from {contestants[0].name} at n = {n}")
        size = int(np.prod(reference.shape))
        del reference
        samples = in_turns({c.name: c.run for c in contestants}, settings)
        for c in contestants:
            curve = curves.setdefault(c.name, {"backend": c.backend, "n": [], "seconds": [], "memory": []})
            curve["n"].append(n)
            curve["seconds"].append(vars(Spread.of(samples[c.name])))
            curve["memory"].append(memory(c, problem, 4 * size))
        progress()
    for curve in curves.values():
        curve["slope"] = slope(curve["n"], [s["median"] for s in curve["seconds"]])
    return {"name": family, "curves": curves}


def everyone(problem: Problem, backends: tuple[str, ...]) -> Iterator[Contestant]:
    """Yield setattn and, to compare with, PyTorch's fused attention."""
    yield from setattn_contestants(problem, backends)
    try:
        yield Contestant("torch scaled_dot_product_attention", torch_form(problem, "sdpa"))
    except ImportError:
        return


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Return the exponent of the power of n that fits the times best."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(sizes) > 1 else float("nan")


def memory(contestant: Contestant, problem: Problem, result_bytes: int) -> int:
    """Return the most bytes that a call holds at once beyond its inputs and its result."""
    if contestant.backend == "jax":
        return jax_peak(problem)
    peak = numpy_peak if contestant.backend == "numpy" else torch_peak
    return max(0, peak(contestant.run) - result_bytes)


def numpy_peak(run: Callable[[], Any]) -> int:
    """Return the most bytes allocated at once during a call; NumPy reports its own to ``tracemalloc``."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = run()
        peak = tracemalloc.get_traced_memory()[1] - before
        del result
        return peak
    finally:
        tracemalloc.stop()


def torch_peak(run: Callable[[], Any]) -> int:
    """Return the same of PyTorch on the CPU, from the events that its profiler has of its allocator.

    What NumPy holds is added: a large result of setattn lies in its memory.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + numpy_peak(run)


def jax_peak(problem: Problem) -> int:
    """Return what XLA sets aside for a call beside its arguments and its result."""
    import jax

    arguments = (*problem.inputs, setattn.convert_params(problem.params, jax.numpy))
    compiled = jax.jit(functools.partial(problem.function, **problem.options)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes
