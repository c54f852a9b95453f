"""The distributions, and the parts that every block is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from setattn import _check as check
from setattn._errors import OptionError
from setattn._params import Attention, FeedForward, LayerNorm, Linear, RMSNorm
from setattn._typing import Absent, Array

# A scheme draws a weight and a bias: (rng, sizes in, sizes out, with bias) -> Linear. In
# quotes, as NumPy would import its random module to evaluate it.
Scheme: TypeAlias = "Callable[[np.random.Generator, tuple[int, ...], tuple[int, ...], bool], Linear]"

FORMS = ("post_norm", "pre_norm", "official")
NORMS = ("layer", "rms", "none")


def uniform(rng: np.random.Generator, sizes_in: tuple[int, ...], sizes_out: tuple[int, ...], bias: bool) -> Linear:
    bound = 1.0 / math.sqrt(math.prod(sizes_in))

    def draw(shape: tuple[int, ...]) -> Array:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return Linear(draw((*sizes_in, *sizes_out)), draw(sizes_out) if bias else ())


def lecun(rng: np.random.Generator, sizes_in: tuple[int, ...], sizes_out: tuple[int, ...], bias: bool) -> Linear:
    # A normal cut at 2 deviations has 0.8796 of the deviation it was cut from.
    deviation = 1.0 / math.sqrt(math.prod(sizes_in)) / 0.87962566103423978
    weight = truncated_normal(rng, (*sizes_in, *sizes_out), deviation)
    return Linear(weight, np.zeros(sizes_out, dtype=np.float32) if bias else ())


def xavier(rng: np.random.Generator, sizes_in: tuple[int, ...], sizes_out: tuple[int, ...], bias: bool) -> Linear:
    weight = xavier_array(rng, (*sizes_in, *sizes_out), math.prod(sizes_in), math.prod(sizes_out))
    return Linear(weight, np.zeros(sizes_out, dtype=np.float32) if bias else ())


def xavier_array(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Array:
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Array:
    x = rng.standard_normal(shape)
    while (outside := np.abs(x) > 2.0).any():
        x[outside] = rng.standard_normal(int(outside.sum()))
    return (x * deviation).astype(np.float32)


def draw_norm(dim: int, kind: str, bias: bool = True) -> LayerNorm | RMSNorm | Absent:
    scale = np.ones(dim, dtype=np.float32)
    if kind == "layer":
        return LayerNorm(scale, np.zeros(dim, dtype=np.float32) if bias else ())
    return RMSNorm(scale) if kind == "rms" else ()


def draw_feed_forward(
    rng: np.random.Generator,
    dim: int,
    hidden: int | None,
    *,
    gate: bool = False,
    bias: bool = True,
    scheme: Scheme = uniform,
) -> FeedForward:
    width = dim if hidden is None else hidden
    return FeedForward(
        hidden=scheme(rng, (dim,), (width,), bias),
        output=() if hidden is None else scheme(rng, (width,), (dim,), bias),
        gate=scheme(rng, (dim,), (width,), bias) if gate else (),
    )


def draw_attention(
    rng: np.random.Generator,
    dim: int,
    dim_context: int,
    num_heads: int,
    head_dim: int,
    *,
    bias: bool = True,
    scheme: Scheme = uniform,
) -> Attention:
    return Attention(
        query=scheme(rng, (dim,), (num_heads, head_dim), bias),
        key=scheme(rng, (dim_context,), (num_heads, head_dim), bias),
        value=scheme(rng, (dim_context,), (num_heads, head_dim), bias),
        output=scheme(rng, (num_heads, head_dim), (dim,), bias),
    )


def positive(function: str, **numbers: Any) -> None:
    for argument, value in numbers.items():
        check.integer(function, argument, value)


def make_rng(function: str, rng: Any) -> np.random.Generator:
    """Return the generator that NumPy makes of what was given."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        wanted = "a numpy.random.Generator, an integer of at least 0, or None"
        raise OptionError(function, "rng", repr(rng), wanted) from error


def divide_heads(function: str, dim: int, num_heads: int, head_dim: int | None, argument: str = "num_heads") -> int:
    """Return the width of a head: the one given, or the width divided among the heads."""
    positive(function, **{argument: num_heads})
    if head_dim is not None:
        positive(function, head_dim=head_dim)
        return head_dim
    if dim % num_heads:
        wanted = f"a divisor of the width {dim}, where this one leaves a remainder of {dim % num_heads}"
        raise OptionError(function, argument, num_heads, wanted)
    return dim // num_heads
