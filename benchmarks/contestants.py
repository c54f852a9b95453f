"""Everything that computes a problem: setattn on each backend, and the peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import setattn
from benchmarks import attention_pool, flamingo, perceiver, set_transformer
from benchmarks.problem import Array, Peer, Problem, Row
from benchmarks.timing import cpu_count

ROWS: list[Row] = [*attention_pool.ROWS, *set_transformer.ROWS, *perceiver.ROWS, *flamingo.ROWS]
BACKENDS = ("numpy", "torch", "jax")
TOLERANCE = 3e-5  # largest difference to the float64 result, as a part of its largest entry

# Further ways to call setattn, each a line of its own in the table: for each backend, a name and the keyword
# arguments that are added to the call.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {backend: {"": {}} for backend in BACKENDS}
if cpu_count() > 1:
    VARIANTS["numpy"][f"{cpu_count()} threads"] = {"plan": setattn.Plan(threads=cpu_count())}


@dataclass(frozen=True)
class Contestant:
    """A call without arguments, which returns when its result is there."""

    name: str
    run: Callable[[], Array]
    backend: str = ""  # setattn's; a peer has none
    variant: str = ""


def setattn_contestants(problem: Problem, backends: tuple[str, ...]) -> Iterator[Contestant]:
    """Yield setattn on each backend, and there in each variant."""
    for backend in backends:
        for variant, extra in VARIANTS[backend].items():
            if problem.traced and variant:  # a traced call takes one thread
                continue
            name = f"setattn, {backend}" + (f", {variant}" if variant else "")
            yield Contestant(name, CALLS[backend](problem, problem.options | extra), backend, variant)


def on_numpy(problem: Problem, options: dict[str, Any]) -> Callable[[], Array]:
    return _call(problem, problem.inputs, problem.params, options)


def _call(problem: Problem, inputs: Sequence[Array], params: Any, options: dict[str, Any]) -> Callable[[], Array]:
    if problem.traced:
        return functools.partial(setattn.trace(problem.function, *inputs, params, **options), *inputs)
    return functools.partial(problem.function, *inputs, params, **options)


def on_torch(problem: Problem, options: dict[str, Any]) -> Callable[[], Array]:
    import torch

    inputs = [torch.from_numpy(x) for x in problem.inputs]
    return _call(problem, inputs, setattn.convert_params(problem.params, torch), options)


def on_jax(problem: Problem, options: dict[str, Any]) -> Callable[[], Array]:
    import jax

    inputs, params = [jax.numpy.asarray(x) for x in problem.inputs], setattn.convert_params(problem.params, jax.numpy)
    if problem.traced:
        call = _call(problem, inputs, params, options)
    else:
        call = functools.partial(jax.jit(functools.partial(problem.function, **options)), *inputs, params)
    return lambda: jax.block_until_ready(call())


CALLS = {"numpy": on_numpy, "torch": on_torch, "jax": on_jax}


def torch_form(problem: Problem, core: str) -> Callable[[], Array]:
    from benchmarks import torch_forms

    return torch_forms.build(problem, core)


def jax_form(problem: Problem) -> Callable[[], Array]:
    from benchmarks import jax_forms

    return jax_forms.build(problem)


FRAMEWORKS = (
    Peer("torch scaled_dot_product_attention", "torch", functools.partial(torch_form, core="sdpa")),
    Peer("torch matmul and softmax", "torch", functools.partial(torch_form, core="matmul")),
    Peer("torch.nn.MultiheadAttention", "torch", functools.partial(torch_form, core="module")),
    Peer("jax.nn.dot_product_attention", "jax", jax_form),
)


def peer_contestants(row: Row, problem: Problem, missing: dict[str, str]) -> Iterator[Contestant]:
    """Yield the peers that can compute a problem; note in ``missing`` those that are not installed."""
    for peer in (*FRAMEWORKS, *row.libraries):
        try:
            yield Contestant(peer.name, peer.build(problem))
        except ImportError as error:
            missing[peer.name] = f"pip install {peer.package} ({error})"
        except NotImplementedError:
            continue


def error_of(result: Array, reference: np.ndarray) -> float:
    """Return the largest difference of a result to the reference, as a part of the largest entry of that."""
    if tuple(result.shape) != reference.shape:
        raise ValueError(f"the shape is {tuple(result.shape)}, not {reference.shape}")
    difference = np.max(np.abs(np.asarray(result, dtype=np.float64) - reference))
    return float(difference / np.max(np.abs(reference)))
