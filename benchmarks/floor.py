"""The least time a problem can take: counted operations and bytes over rates measured in the same run.

The count takes every order in which the products of an attention can be computed. Two bounds come of it. That of the
*machine* has the fewest multiplications at the rate of one large product, or the bytes of the inputs, the parameters
and the result, each once, at the rate of reading; the set of an ISAB is read twice, since no element can be finished
before all of them have been seen. What is elementwise counts as free. That of a *library* (:mod:`benchmarks.library`)
has the products at the rates that products of their shapes have in it, and the exponentials and passes that it cannot
do without. Nothing promises that anything reaches either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import setattn
from benchmarks.problem import Problem, is_absent
from benchmarks.timing import fastest


class Product(NamedTuple):
    """Products of matrices of one shape, ``rows x inner`` with ``inner x columns``: ``batch`` of them for each set.

    Where the second matrices are ``weights``, all sets have the same ones.
    """

    rows: int
    inner: int
    columns: int
    batch: int = 1
    sets: int = 1
    weights: bool = False

    @property
    def multiplications(self) -> int:
        return math.prod(self[:5])


Orders = tuple[tuple[Product, ...], ...]
"""The orders of products that lead to one result, of which one has to be computed."""


@dataclass(frozen=True)
class Work:
    """What has to be done at least."""

    products: tuple[Orders, ...]
    numbers: Counter[str]  # that go through each kind of elementwise step
    bytes: int

    @property
    def multiplications(self) -> int:
        return sum(least(orders, lambda p: p.multiplications) for orders in self.products)


def least(orders: Orders, cost: Callable[[Product], Any]) -> Any:
    """Return what the cheapest order costs."""
    return min(sum(map(cost, products)) for products in orders)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, at best."""

    multiplications: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least time of any library on a machine, and what sets it."""

    seconds: float
    bound: str
    work: Work

    @classmethod
    def of(cls, problem: Problem, result_size: int, rates: Rates, itemsize: int = 4) -> Floor:
        work = count(problem, result_size, itemsize)
        products, reading = work.multiplications / rates.multiplications, work.bytes / rates.bytes
        return cls(max(products, reading), "products" if products >= reading else "bytes", work)

    def as_dict(self) -> dict[str, Any]:
        counts = {"multiplications": self.work.multiplications, "bytes": self.work.bytes}
        return {"seconds": self.seconds, "bound": self.bound} | counts | dict(self.work.numbers)


def count(problem: Problem, result_size: int, itemsize: int = 4) -> Work:
    """Count the work of a problem from the shapes of its arrays."""
    *batch, n, _ = problem.inputs[-1].shape
    p, name = problem.params, problem.function.__name__
    if name == "perceiver_resampler" and not is_absent(p.frame_embedding):
        n *= batch.pop()
    counting = _Counting(math.prod(batch), problem.all_options.get("activation", "relu"))
    if name == "set_transformer":
        for block in (*p.encoder, p.pma):
            counting.block(block, n)
    elif name in ("isab", "pma"):
        counting.block(p, n)
    elif name == "attention_pool":
        counting.attending(len(p.probe), n, p, learned=True)
    elif name == "cross_attention":
        counting.attending(problem.inputs[0].shape[-2], n, p)
    elif name == "perceiver_resampler":
        m = len(p.latents)
        counting.maps(n, p.input)
        for layer in p.layers:
            counting.attending(m, n + m, layer)
        counting.maps(m, p.output)
    else:
        raise NotImplementedError(name)
    numbers = sum(x.size for x in problem.inputs) + setattn.count_params(p) + result_size
    numbers += problem.inputs[-1].size if name == "isab" else 0
    return Work(tuple(counting.products), counting.numbers, numbers * itemsize)


class _Counting:
    """The products and numbers of blocks, added up for a number of sets."""

    def __init__(self, sets: int, activation: str) -> None:
        self.sets, self.activation = sets, activation
        self.products: list[Orders] = []
        self.numbers: Counter[str] = Counter()

    def block(self, p: Any, n: int) -> None:
        if isinstance(p, setattn.ISAB):
            m = len(p.inducing_points)
            self.attending(m, n, p.mab_inducing, learned=True)
            self.attending(n, m, p.mab_set)
        elif isinstance(p, setattn.PMA):
            self.maps(n, p.ff)
            self.attending(len(p.seeds), n, p.mab, learned=True)
        else:
            self.attending(n, n, p)

    def attending(self, m: int, n: int, p: Any, learned: bool = False) -> None:
        """Count a block in which ``m`` queries attend to ``n`` elements; what concerns learned ones is done once."""
        asking = 1 if learned else self.sets
        self.maps(m, getattr(p, "project", ()), asking)
        self._attention(m, n, p.attention, asking)
        self.maps(m, p.ff)
        width = self._width(p.attention)
        self.numbers["sum"] += self.sets * m * width * (2 - is_absent(p.ff))
        for name, rows, size in (("context_norm", n, len(p.attention.key.weight)), ("query_norm", m, width)):
            self.numbers["norm"] += 0 if is_absent(getattr(p, name)) else self.sets * rows * size
        for name in ("attention_norm", "ff_norm", "output_norm"):
            if not is_absent(own := getattr(p, name, ())):
                self.numbers["norm"] += self.sets * m * width
                # What a norm of a result is multiplied with can become a part of no projection.
                self.numbers["affine"] += 0 if name == "ff_norm" or is_absent(own.scale) else self.sets * m * width

    def maps(self, rows: int, tree: Any, sets: int | None = None) -> None:
        """Count linear layers that every row goes through, and the activation between them."""
        if isinstance(tree, setattn.Linear):
            product = self._map(rows, tree.weight.shape[0], tree.weight.size, sets)
            self.products.append(((product,),))
            self.numbers["bias"] += 0 if is_absent(tree.bias) else product.sets * rows * product.columns
        elif not is_absent(tree):
            for part in tree:
                self.maps(rows, part, sets)
            self.numbers[self.activation] += self.sets * rows * tree.hidden.weight.shape[-1]

    def _map(self, rows: int, inner: int, size: int, sets: int | None = None) -> Product:
        """Return the product of the rows of all sets with one matrix of weights."""
        return Product(rows, inner, size // inner, sets=self.sets if sets is None else sets, weights=True)

    @staticmethod
    def _width(p: setattn.Attention) -> int:
        return p.output.weight.shape[-1] if p.output else math.prod(p.value.weight.shape[1:])

    def _attention(self, m: int, n: int, p: setattn.Attention, asking: int) -> None:
        dim, kv_heads, head_dim = p.key.weight.shape
        value_dim = p.value.weight.shape[-1]
        heads, sets = p.output.weight.shape[0] if p.output else kv_heads, self.sets
        grouped = m * heads // kv_heads
        self.maps(m, p.query, asking)
        keys = self._map(n, dim, p.key.weight.size)
        scores = [
            (keys, Product(grouped, head_dim, n, kv_heads, sets)),
            (Product(grouped, head_dim, dim, kv_heads, asking, weights=True), Product(heads * m, dim, n, sets=sets)),
        ]
        if p.query and heads == kv_heads:  # the projected keys are carried to the queries, which are not projected
            dim_query = p.query.weight.shape[0]
            carried = (
                Product(n, head_dim, dim_query, heads, sets, weights=True),
                Product(heads * n, dim_query, m, sets=sets),
            )
            made = self.products.pop()[0]
            scores = [*((*made, *order) for order in scores), (keys, *carried)]
        self.products.append(tuple(scores))
        values = self._map(n, dim, p.value.weight.size)
        last = (self._map(m, heads * value_dim, p.output.weight.size),) if p.output else ()
        if p.output and not is_absent(p.output.bias):
            self.numbers["bias"] += sets * m * p.output.weight.shape[-1]
        sums = [
            (values, Product(grouped, n, value_dim, kv_heads, sets), *last),
            (Product(heads * m, n, dim, sets=sets), Product(m, dim, value_dim, heads, sets, weights=True), *last),
        ]
        if p.output and heads == kv_heads:  # the values are carried through the output projection
            dim_out = p.output.weight.shape[-1]
            carried = Product(n, value_dim, dim_out, heads, sets, weights=True)
            sums.append((values, carried, Product(m, heads * n, dim_out, sets=sets)))
        self.products.append(tuple(sums))
        self.numbers["score"] += sets * heads * m * n


# --- rates ----------------------------------------------------------------------------------------------------------


def measure_rates(seconds: float = 0.5) -> Rates:
    """Measure what the machine does at best, with NumPy and, if it is there, PyTorch; the faster one counts."""
    rng = np.random.default_rng(0)
    size, rows = 2048, 200_000
    a = rng.standard_normal((size, size), dtype=np.float32)
    x = rng.standard_normal((rows, 256), dtype=np.float32)  # 205 MB, more than caches hold
    vector = x[0].copy()
    products: list[Callable[[], Any]] = [lambda: a @ a]
    readings: list[Callable[[], Any]] = [lambda: x @ vector, x.sum]
    try:
        import torch
    except ImportError:
        pass
    else:
        ta, tx = torch.from_numpy(a), torch.from_numpy(x)
        products.append(lambda: ta @ ta)
        readings += [tx.sum, lambda: tx @ tx[0]]
    return Rates(
        multiplications=size**3 / fastest(products, seconds),
        bytes=x.nbytes / fastest(readings, seconds),
    )
