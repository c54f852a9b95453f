"""What a benchmark row is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import setattn

Array = Any
SEED = 20240613


@dataclass(frozen=True)
class Problem:
    """One call, ``function(*inputs, params, **options)``: a public function of setattn and float32 NumPy arrays."""

    function: Callable[..., Array]
    inputs: tuple[np.ndarray, ...]
    params: Any
    options: dict[str, Any] = field(default_factory=dict)
    traced: bool = False  # whether setattn's calls are recorded before, by setattn.trace

    def reference(self) -> np.ndarray:
        """Compute the result in float64, which every contestant is compared with."""
        inputs = [x.astype(np.float64) for x in self.inputs]
        return self.function(*inputs, setattn.convert_params(self.params, np, dtype=np.float64), **self.options)

    @property
    def all_options(self) -> dict[str, Any]:
        """The options with the defaults of the function filled in, as far as other code needs to know them."""
        defaults = self.function.__kwdefaults__
        names = ("activation", "eps", "scale", "query_residual")
        return {name: self.options.get(name, defaults[name]) for name in names if name in defaults}

    @property
    def one_set(self) -> bool:
        """Whether the last input is a single set, without a batch axis."""
        frames = getattr(self.params, "frame_embedding", ())
        return self.inputs[-1].ndim == (2 if is_absent(frames) else 3)


@dataclass(frozen=True)
class Peer:
    """Other code for the same function.

    ``build`` turns a problem into a call without arguments. It raises ``ImportError`` where the package is not
    installed and ``NotImplementedError`` where the code cannot express the problem.
    """

    name: str
    package: str  # as pip knows it
    build: Callable[[Problem], Callable[[], Array]]


@dataclass(frozen=True)
class Row:
    """A line of the table: a problem, the libraries that offer it, and the least ratio wanted of each backend."""

    name: str
    size: str
    problem: Callable[[], Problem]
    libraries: tuple[Peer, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)


def generator() -> np.random.Generator:
    return np.random.default_rng(SEED)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def trained(params: Any, rng: np.random.Generator, sharpness: float = 4.0) -> Any:
    """Make fresh parameters look trained: no bias is 0, no scale of a norm is 1, no softmax is nearly uniform.

    A peer with a bias left out, two norms exchanged or another scale would otherwise give nearly the same numbers.
    """
    if isinstance(params, setattn.Attention):
        parts = {name: trained(part, rng) for name, part in params._asdict().items()}
        return setattn.Attention(**parts)._replace(key=setattn.map_params(lambda a: a * sharpness, parts["key"]))
    if isinstance(params, tuple):
        parts = [trained(part, rng) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    return params + (0.1 * np.abs(params).max() if params.ndim > 1 else 0.1) * normal(rng, *params.shape)


def is_absent(part: Any) -> bool:
    return isinstance(part, tuple) and not part
