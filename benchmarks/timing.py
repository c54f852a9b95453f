"""Timing contestants in one process, in turns."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PAUSE = 0.05  # seconds; the threads of OpenMP, OpenBLAS and XLA spin for a while after their work
SAMPLE = 0.005  # seconds that one sample lasts at least: short calls are repeated


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    seconds: float = 12.0  # for one row, all contestants together
    least_rounds: int = 5
    most_rounds: int = 25
    pause: float = PAUSE


QUICK = Settings(seconds=3.0, least_rounds=3, most_rounds=5)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, median, high = np.quantile(np.asarray(samples), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


def clock(run: Callable[[], Any], repeats: int = 1) -> float:
    """Return the seconds of one call. Each result is dropped before the next call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def fastest(runs: Iterable[Callable[[], Any]], seconds: float) -> float:
    """Return the least time that any of some calls took."""
    return min(_best(run, seconds) for run in runs)


def _best(run: Callable[[], Any], seconds: float) -> float:
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, clock(run))
    return best


def in_turns(
    runs: dict[str, Callable[[], Any]], settings: Settings, progress: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Time calls in rounds; in each round every call has one turn, in an order drawn anew.

    A turn is a pause, in which the threads of whoever was before fall asleep, a call that is not timed, which wakes the
    threads of this one and fills its caches, and the timed calls.
    """
    repeats, cost = {}, 0.0
    for name, run in runs.items():
        seconds = fastest([run], SAMPLE)  # the first calls take a few times as long
        repeats[name] = max(1, min(1000, round(SAMPLE / max(seconds, 1e-7))))
        cost += settings.pause + seconds * (1 + repeats[name])
    rounds = int(min(max(settings.seconds / cost, settings.least_rounds), settings.most_rounds))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, rng = list(runs), np.random.default_rng(0)
    with no_collection():
        for _ in range(rounds):
            for index in rng.permutation(len(names)):
                name = names[index]
                time.sleep(settings.pause)
                runs[name]()
                samples[name].append(clock(runs[name], repeats[name]))
            progress()
    return samples


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Return how many times faster the second is, from the samples of the same rounds."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from running within a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cpu_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
