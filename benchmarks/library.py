"""The least time of a problem in one library: products, exponentials and passes at the rates that they have there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.floor import Product, Rates, Work, fastest, least

# The passes over its numbers that a step takes at least, beside an exponential where it has one: NumPy makes every
# operation a pass of its own, PyTorch has kernels for norms, activations and a whole attention, XLA fuses.
PASSES: dict[str, dict[str, int]] = {
    "numpy": {"score": 2, "norm": 2, "relu": 1, "squared_relu": 2, "gelu": 4, "gelu_tanh": 4, "silu": 3, "sum": 1},
    "torch": {"norm": 1, "relu": 1, "squared_relu": 2, "sum": 1},
    "jax": {},
}
EXPONENTIALS = ("score", "gelu", "gelu_tanh", "silu")  # an error function or a tanh is taken for as cheap as one

_LONGEST = 2048  # of a side of a matrix, about the one of a block
_MOST = 2**25  # multiplications that are timed at once
_NUMBERS = 2**18  # of an array that stays in cache
_SECONDS = 0.02


@dataclass(frozen=True)
class OwnFloor:
    """The least time of a problem in a library, and its parts."""

    products: float
    exponentials: float
    passes: float
    reading: float

    @property
    def seconds(self) -> float:
        return max(self.products + self.exponentials + self.passes, self.reading)

    def as_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds} | vars(self)


class Library:
    """A library, and what it was seen to do."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._functions = FUNCTIONS[backend]()
        self._seconds: dict[Product, float] = {}
        a, b = self._arrays((_NUMBERS,), (_NUMBERS,))
        self._pass = fastest([lambda: self._functions.add(a, b)], 25 * _SECONDS) / _NUMBERS
        self._exponential = fastest([lambda: self._functions.exp(a)], 25 * _SECONDS) / _NUMBERS

    def floor(self, work: Work, rates: Rates, threads: int = 1) -> OwnFloor:
        """Bound the time of some work; ``threads`` share what is elementwise, where the library does not do it."""
        seconds = functools.cache(self._time)
        exponentials = sum(work.numbers[kind] for kind in EXPONENTIALS)
        passes = sum(work.numbers[kind] * passes for kind, passes in PASSES[self.backend].items())
        return OwnFloor(
            products=sum(least(orders, seconds) for orders in work.products),
            exponentials=exponentials * self._exponential / threads,
            passes=passes * self._pass / threads,
            reading=work.bytes / rates.bytes,
        )

    def as_dict(self) -> dict[str, float]:
        return {"exponentials": 1 / self._exponential, "passes": 1 / self._pass}

    def _time(self, product: Product) -> float:
        """Return the time of products: that of some of them, cut to the size of a block, times as many as they are.

        It is the least of all moments at which these were timed, as something may have come between at one of them.
        """
        rows, inner, columns = (min(side, _LONGEST) for side in product[:3])
        part = Product(rows, inner, columns, max(1, min(product.batch, _MOST // (rows * inner * columns))))
        batch = (part.batch,) if part.batch > 1 else ()
        a, b = self._arrays((*batch, rows, inner), (*batch, inner, columns))
        now = fastest([lambda: self._functions.matmul(a, b)], _SECONDS)
        self._seconds[part] = min(now, self._seconds.get(part, math.inf))
        return self._seconds[part] * product.multiplications / part.multiplications

    def _arrays(self, *shapes: tuple[int, ...]) -> list[Any]:
        rng = np.random.default_rng(0)
        return [self._functions.array(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


@dataclass(frozen=True)
class Functions:
    """What is timed of a library; each call returns when its result is there."""

    array: Callable[[np.ndarray], Any]
    matmul: Callable[[Any, Any], Any]
    add: Callable[[Any, Any], Any]
    exp: Callable[[Any], Any]


def _numpy() -> Functions:
    return Functions(np.asarray, np.matmul, lambda a, b: np.add(a, b, out=b), np.exp)


def _torch() -> Functions:
    import torch

    return Functions(torch.from_numpy, torch.matmul, lambda a, b: torch.add(a, b, out=b), torch.exp)


def _jax() -> Functions:
    import jax

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function)
        return lambda *arguments: jax.block_until_ready(jitted(*arguments))

    numpy = jax.numpy
    return Functions(numpy.asarray, compiled(numpy.matmul), compiled(numpy.add), compiled(numpy.exp))


FUNCTIONS = {"numpy": _numpy, "torch": _torch, "jax": _jax}
