"""The least time a problem can take on a machine: counted operations and bytes over measured rates.

The count takes, for each product of an attention, the cheapest of all orders; what is elementwise (norms, activations,
exponentials, residuals) counts as free. The bytes are those of the inputs, the parameters and the result, each once;
the set of an ISAB is read twice, since no element can be finished before all of them have been seen. The floor is the
longer of both times. It is a bound to measure distance by, not a promise that anything reaches it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

import setattn
from benchmarks.problem import Problem, is_absent


@dataclass(frozen=True)
class Work:
    """What has to be done at least."""

    multiplications: int = 0
    exponentials: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, at best."""

    multiplications: float
    bytes: float
    exponentials: float  # NumPy's, on one thread: not in the floor, but it explains some distances to it


@dataclass(frozen=True)
class Floor:
    """The least time, and what sets it."""

    seconds: float
    bound: str
    work: Work

    @classmethod
    def of(cls, problem: Problem, result_size: int, rates: Rates, itemsize: int = 4) -> Floor:
        work = count(problem, result_size, itemsize)
        products, reading = work.multiplications / rates.multiplications, work.bytes / rates.bytes
        return cls(max(products, reading), "products" if products >= reading else "bytes", work)

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "bound": self.bound} | asdict(self.work)


def count(problem: Problem, result_size: int, itemsize: int = 4) -> Work:
    """Count the work of a problem from the shapes of its arrays."""
    *batch, n, _ = problem.inputs[-1].shape
    p, name = problem.params, problem.function.__name__
    if name == "perceiver_resampler" and not is_absent(p.frame_embedding):
        n *= batch.pop()
    if name == "set_transformer":
        parts = [_block(block, n) for block in (*p.encoder, p.pma)]
    elif name in ("isab", "pma"):
        parts = [_block(p, n)]
    elif name == "attention_pool":
        m = len(p.probe)
        parts = [_attention(m, n, p.attention, learned=True), Count(each=m * _matrices(p.ff))]
    elif name == "cross_attention":
        m = problem.inputs[0].shape[-2]
        parts = [_attention(m, n, p.attention), Count(each=m * _matrices(p.ff))]
    elif name == "perceiver_resampler":
        m = len(p.latents)
        parts = [_attention(m, n + m, layer.attention) for layer in p.layers]
        parts.append(Count(each=n * _matrices(p.input) + m * _matrices((*(x.ff for x in p.layers), p.output))))
    else:
        raise NotImplementedError(name)
    once, each, exponentials = map(sum, zip(*parts, strict=True))
    sets = math.prod(batch)
    numbers = sum(x.size for x in problem.inputs) + setattn.count_params(p) + result_size
    numbers += problem.inputs[-1].size if name == "isab" else 0
    return Work(once + sets * each, sets * exponentials, numbers * itemsize)


class Count(NamedTuple):
    """Multiplications that are done once for all sets and for each set, and exponentials for each set."""

    once: int = 0
    each: int = 0
    exponentials: int = 0


def _block(p: Any, n: int) -> Count:
    if isinstance(p, setattn.ISAB):
        m = len(p.inducing_points)
        first, second = _mab(m, n, p.mab_inducing, learned=True), _mab(n, m, p.mab_set)
        return Count(*map(sum, zip(first, second, strict=True)))
    if isinstance(p, setattn.PMA):
        once, each, exponentials = _mab(len(p.seeds), n, p.mab, learned=True)
        return Count(once, each + n * _matrices(p.ff), exponentials)
    return _mab(n, n, p)


def _mab(m: int, n: int, p: setattn.MAB, learned: bool = False) -> Count:
    once, each, exponentials = _attention(m, n, p.attention, learned)
    project = m * _matrices(p.project)
    once, each = (once + project, each) if learned else (once, each + project)
    return Count(once, each + m * _matrices(p.ff), exponentials)


def _attention(m: int, n: int, p: setattn.Attention, learned: bool = False) -> Count:
    """Count an attention; what concerns learned queries alone is done once for all sets."""
    dim, kv_heads, head_dim = p.key.weight.shape
    value_dim = p.value.weight.shape[-1]
    heads, pairs = p.output.weight.shape[0] if p.output else kv_heads, m * n
    query = m * _matrices(p.query)
    carried = m * heads * head_dim * dim  # of the projected queries to the elements
    orders = [  # of the scores: what is done once, if the queries are learned, and what for each set
        (query, n * dim * kv_heads * head_dim + pairs * heads * head_dim),
        (query + carried, pairs * heads * dim),
    ]
    if p.query:  # the projected keys are carried to the queries
        dim_query = p.query.weight.shape[0]
        orders.append((0, n * kv_heads * head_dim * (dim + heads // kv_heads * dim_query) + pairs * heads * dim_query))
    once, each = min(orders, key=sum)
    output = m * _matrices(p.output)
    sums = [
        n * dim * kv_heads * value_dim + pairs * heads * value_dim + output,
        pairs * heads * dim + m * heads * dim * value_dim + output,
    ]
    if p.output:  # the values are carried through the output projection
        dim_out = p.output.weight.shape[-1]
        sums.append(n * dim * kv_heads * value_dim + n * heads * value_dim * dim_out + pairs * heads * dim_out)
    each += min(sums)
    return Count(once, each, pairs * heads) if learned else Count(0, once + each, pairs * heads)


def _matrices(tree: Any) -> int:
    """Count the multiplications for one row through linear layers: the sizes of their weights."""
    if isinstance(tree, setattn.Linear):
        return math.prod(tree.weight.shape)
    return sum(_matrices(part) for part in tree) if isinstance(tree, tuple) else 0


# --- rates ----------------------------------------------------------------------------------------------------------


def measure_rates(seconds: float = 0.5) -> Rates:
    """Measure what the machine does at best, with NumPy and, if it is there, PyTorch; the faster one counts."""
    rng = np.random.default_rng(0)
    size, rows = 2048, 200_000
    a = rng.standard_normal((size, size), dtype=np.float32)
    x = rng.standard_normal((rows, 256), dtype=np.float32)  # 205 MB, more than caches hold
    vector = x[0].copy()
    s = rng.standard_normal(1 << 18, dtype=np.float32)
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
        multiplications=size**3 / min(_best(run, seconds) for run in products),
        bytes=x.nbytes / min(_best(run, seconds) for run in readings),
        exponentials=s.size / _best(lambda: np.exp(s), seconds),
    )


def _best(run: Callable[[], Any], seconds: float) -> float:
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
