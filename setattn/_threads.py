"""Blocks on several threads, with the products of each on one."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
U = TypeVar("U")

_here = threading.local()


@functools.cache
def has_threads() -> bool:
    """Say whether the package is there that keeps each product on its own thread."""
    import importlib.util

    return importlib.util.find_spec("threadpoolctl") is not None


def on_a_thread() -> bool:
    """Say whether this is one of the threads that blocks are spread over."""
    return getattr(_here, "working", False)


def run(function: Callable[[T], U], items: Sequence[T], threads: int) -> Iterator[U]:
    """Yield ``function(item)`` for all items in their order; a block does not spread its own blocks over threads."""
    if threads == 1 or len(items) < 2 or on_a_thread():
        yield from map(function, items)
        return

    from concurrent.futures import wait

    with products_on_one_thread:
        pool = _workers(threads)
        # NumPy keeps its error state in the context.
        futures = deque(pool.submit(contextvars.copy_context().run, function, item) for item in items)
        try:
            while futures:
                yield futures.popleft().result()  # which is held no longer than it is wanted
        finally:  # after an error, too, nothing goes on in the background
            for future in futures:
                future.cancel()
            wait(futures)


@functools.lru_cache(maxsize=8)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Return threads that wait for blocks, the same ones for every call.

    New ones begin on the processor of the thread that starts them: it takes the system milliseconds to move them.
    """
    from concurrent.futures import ThreadPoolExecutor  # which takes its time to be imported

    return ThreadPoolExecutor(threads, "setattn", initializer=lambda: setattr(_here, "working", True))


if hasattr(os, "register_at_fork"):  # a process that was forked has the pool, but not its threads
    os.register_at_fork(after_in_child=_workers.cache_clear)


class _ProductsOnOneThread(contextlib.AbstractContextManager[None]):
    """Holds the threads of BLAS at one while any call needs it; that is a setting of the whole process.

    Two calls that overlap must not restore what the other one had set, so only the last one out restores. A call whose
    blocks go to several threads holds it from its beginning: the threads of BLAS that have taken part in a product wait
    for the next one in a loop, for some 20 ms, and take a processor each.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._controller: Any = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                if self._controller is None:
                    from threadpoolctl import ThreadpoolController

                    self._controller = ThreadpoolController()
                self._limit = self._controller.limit(limits=1, user_api="blas")
            self._users = self._users + 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users = self._users - 1
            if self._users == 0:
                self._limit.restore_original_limits()


products_on_one_thread = _ProductsOnOneThread()
