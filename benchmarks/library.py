"""The least time of a problem in one library: products, exponentials and passes at the rates that they have there."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.floor import Product, Rates, Work, least
from benchmarks.timing import fastest

# The passes over its numbers that a step takes at least, beside an exponential where it has one. NumPy makes every
# operation a pass of its own: of a score the largest, the difference and the sum; of a norm two sums, the difference
# and the quotient; an error function, which it has not, is a polynomial. PyTorch has kernels for norms, activations and
# a whole attention, and adds biases in its products; XLA fuses.
PASSES: dict[str, dict[str, int]] = {
    "numpy": {
        "score": 3,
        "norm": 4,
        "affine": 2,
        "bias": 1,
        "relu": 1,
        "squared_relu": 2,
        "gelu": 25,
        "gelu_tanh": 8,
        "silu": 3,
        "sum": 1,
    },
    "torch": {"norm": 1, "relu": 1, "squared_relu": 2, "sum": 1},
    "jax": {},
}
EXPONENTIALS = ("score", "gelu", "gelu_tanh", "silu")  # an error function or a tanh is taken for as cheap as one

_LONGEST = 2048  # of a side of a matrix, about the one of a block
_MOST = 2**25  # multiplications that are timed at once
_NUMBERS = 2**18  # of an array that stays in cache
_HELD = 2**27  # numbers of weights that are held at once
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
        self._seconds: dict[tuple[Product, int, int], float] = {}
        a, b = self._arrays((1,), (1,))
        self._call = fastest([lambda: self._functions.add(a, b)], 5 * _SECONDS)
        a, b = self._arrays((_NUMBERS,), (_NUMBERS,))
        self._pass = fastest([lambda: self._functions.add(a, b)], 25 * _SECONDS) / _NUMBERS
        self._exponential = fastest([lambda: self._functions.exp(a)], 25 * _SECONDS) / _NUMBERS

    def floor(self, work: Work, rates: Rates, threads: int = 1) -> OwnFloor:
        """Bound the time of some work; ``threads`` share what the library does on one."""
        uses = Counter(product for orders in work.products for product in set(itertools.chain(*orders)))
        seconds = functools.cache(lambda product: self._time(product, uses[product], threads))
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

    def _time(self, product: Product, uses: int, threads: int) -> float:
        """Return the time of products: that of some of them, cut to the size of a block, times as many as they are.

        Weights are cut to nothing, and there are as many matrices of them as the problem has, which caches may not
        hold. The time is the least of all moments at which it was taken, as something may have come between at one.
        """
        rows, inner, columns = (min(side, _LONGEST) for side in product[:3])
        if product.weights:
            inner, columns = product.inner, product.columns
        batch = product.batch if product.weights else max(1, min(product.batch, _MOST // (rows * inner * columns)))
        sets = max(1, min(product.sets, _MOST // (rows * inner * columns * batch)))
        part = Product(rows, inner, columns, batch, sets, product.weights)
        key = part, uses, threads
        now = self._measure(part, uses, threads)
        self._seconds[key] = min(now, self._seconds.get(key, math.inf))
        return self._seconds[key] * product.multiplications / part.multiplications

    def _measure(self, p: Product, uses: int, threads: int) -> float:
        of_sets, of_heads = (p.sets,) if p.sets > 1 else (), (p.batch,) if p.batch > 1 else ()
        second = (*of_heads, p.inner, p.columns) if p.weights else (*of_sets, *of_heads, p.inner, p.columns)
        count = max(1, min(uses, _HELD // math.prod(second))) if p.weights else 1
        a, *matrices = self._arrays((*of_sets, *of_heads, p.rows, p.inner), *[second] * count)
        run = functools.partial(self._functions.products, a, matrices)
        if threads == 1:
            return max(0.0, fastest([run], _SECONDS) - self._call) / count
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # each thread has blocks, and their products, of its own
            return fastest([run], _SECONDS) / count / threads

    def _arrays(self, *shapes: tuple[int, ...]) -> list[Any]:
        rng = np.random.default_rng(0)
        return [self._functions.array(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


@dataclass(frozen=True)
class Functions:
    """What is timed of a library; each call returns when its result is there."""

    array: Callable[[np.ndarray], Any]
    products: Callable[[Any, list[Any]], Any]  # of one array with each of several
    add: Callable[[Any, Any], Any]
    exp: Callable[[Any], Any]


def _numpy() -> Functions:
    return Functions(np.asarray, lambda a, several: [a @ b for b in several], lambda a, b: np.add(a, b, out=b), np.exp)


def _torch() -> Functions:
    import torch

    by_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    multiply: dict[tuple[torch.Size, torch.Size], Callable[[Any, Any], Any]] = {}  # the faster way for each shape

    def products(a: Any, several: list[Any]) -> Any:
        shapes = a.shape, several[0].shape
        if shapes not in multiply:
            ways = [torch.matmul]
            if by_onednn is not None and several[0].ndim == 2:
                ways.append(lambda a, b: by_onednn(a, b.mT, None, "none", [], ""))
            multiply[shapes] = min(ways, key=lambda way: fastest([lambda: way(a, several[0])], _SECONDS))
        return [multiply[shapes](a, b) for b in several]

    return Functions(torch.from_numpy, products, lambda a, b: torch.add(a, b, out=b), torch.exp)


def _jax() -> Functions:
    import jax

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function)
        return lambda *arguments: jax.block_until_ready(jitted(*arguments))

    numpy = jax.numpy
    products = compiled(lambda a, several: [a @ b for b in several])
    return Functions(numpy.asarray, products, compiled(numpy.add), compiled(numpy.exp))


FUNCTIONS = {"numpy": _numpy, "torch": _torch, "jax": _jax}
