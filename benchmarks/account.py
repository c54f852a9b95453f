"""What the time of a call goes to: products, exponentials, passes, and what lies between them."""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from setattn import _layers, _state
from setattn._adapters import NumPy

KINDS = ("products", "exponentials", "passes")
CALLS = 5

# What operations of PyTorch are; all others are passes. Its kernel for a whole attention counts as its products.
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_linear_pointwise", "flash_attention")
_EXPONENTIALS = ("exp", "exp_", "gelu", "tanh", "erf", "silu")


def account(run: Callable[[], Any], backend: str, threads: int = 1) -> dict[str, float] | None:
    """Return which part of the time of a call each kind takes, or ``None`` where the library does not tell.

    Of what is done on several threads at once, each counts for its part.
    """
    measure = {"numpy": functools.partial(_of_numpy, threads=threads), "torch": _of_torch}.get(backend)
    if measure is None:
        return None
    run()
    parts = [measure(run) for _ in range(CALLS)]
    shares = {kind: statistics.median(part[kind] for part in parts) for kind in KINDS}
    return shares | {"between": 1.0 - sum(shares.values())}


# --- NumPy ----------------------------------------------------------------------------------------------------------


def _of_numpy(run: Callable[[], Any], threads: int) -> dict[str, float]:
    clock = _Clock()
    with clock.attached():
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return {kind: clock.seconds(kind, threads) / seconds for kind in KINDS}


class _Clock:
    """Adds up the time that each kind of operation takes, on each thread."""

    def __init__(self) -> None:
        self._main, self._thread = threading.get_ident(), threading.local()
        self._seconds: Counter[tuple[str, bool]] = Counter()
        self._lock = threading.Lock()

    def seconds(self, kind: str, threads: int) -> float:
        return self._seconds[kind, True] + self._seconds[kind, False] / threads

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Have the operations of the library on NumPy timed."""
        passes = ["add", "subtract", "multiply", "divide", "where", "sqrt", "isfinite", "max", "sum", "vecdot"]
        of_numpy = {"matmul": "products", "exp": "exponentials"} | dict.fromkeys(passes, "passes")
        places: list[tuple[Any, str, str]] = [(NumPy, name, kind) for name, kind in of_numpy.items()]
        places.append((_state, "row_max", "passes"))
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in places]
        activations = dict(_layers._ACTIVATIONS)
        try:
            for owner, name, kind in places:
                timed = self._timed(getattr(owner, name), kind)
                setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)
            for name, function in activations.items():
                kind = "passes" if name.endswith("relu") else "exponentials"
                _layers._ACTIVATIONS[name] = self._timed(function, kind)
            yield
        finally:
            _layers._ACTIVATIONS.update(activations)
            for owner, name, value in before:
                setattr(owner, name, value)

    def _timed(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(self._thread, "inside", False):  # of an operation that counts as a whole
                return function(*arguments, **options)
            self._thread.inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.perf_counter() - start
                self._thread.inside = False
                vector = kind == "products" and arguments[1].shape[-1] == 1  # a sum
                with self._lock:
                    self._seconds["passes" if vector else kind, threading.get_ident() == self._main] += seconds

        return timed


# --- PyTorch --------------------------------------------------------------------------------------------------------


def _of_torch(run: Callable[[], Any]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    parts = dict.fromkeys(KINDS, 0.0)
    for operation in profiler.key_averages():
        parts[_kind(operation.key.rpartition("::")[2])] += 1e-6 * operation.self_cpu_time_total / seconds
    return parts


def _kind(name: str) -> str:
    if name in _PRODUCTS or any(part in name for part in _PRODUCTS if "_" in part):
        return "products"
    return "exponentials" if name in _EXPONENTIALS else "passes"
