"""The blocks under ``jax.jit`` with ``jax.nn.dot_product_attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import setattn
from benchmarks.forms import Blocks
from benchmarks.problem import Problem

Array = Any


class JaxOperations:
    """The operations of JAX. Parameters stay as setattn keeps them: within a jit, their reshaping is free."""

    def linear(self, x: Array, p: setattn.Linear) -> Array:
        y = x @ p.weight
        return y + p.bias if len(p.bias) else y

    def norm(self, x: Array, p: Any, eps: float) -> Array:
        if isinstance(p, setattn.LayerNorm):
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * p.scale
        return y + p.bias if isinstance(p, setattn.LayerNorm) and len(p.bias) else y

    def activate(self, x: Array, name: str) -> Array:
        return jax.nn.relu(x) if name == "relu" else jax.nn.gelu(x, approximate=name == "gelu_tanh")

    def add(self, owned: Array, x: Array) -> Array:
        return owned + x

    def multiply(self, owned: Array, x: Array) -> Array:
        return owned * x

    def concat(self, x: Array, y: Array) -> Array:
        return jnp.concatenate([x, y], axis=-2)

    def for_each_set(self, x: Array, sets: int) -> Array:
        return jnp.broadcast_to(x, (sets, *x.shape))

    def attend(self, x: Array, y: Array, p: setattn.Attention, scale: float | None) -> Array:
        heads, head_dim = p.key.weight.shape[1:]
        q = project(x, p.query) if p.query else x.reshape(*x.shape[:-1], heads, head_dim)
        if q.ndim == 3:
            q = jnp.broadcast_to(q, (y.shape[0], *q.shape))
        o = jax.nn.dot_product_attention(q, project(y, p.key), project(y, p.value), scale=scale)
        o = o.reshape(*o.shape[:2], -1)
        if not p.output:
            return o
        return self.linear(o, p.output._replace(weight=p.output.weight.reshape(o.shape[-1], -1)))


def project(x: Array, p: setattn.Linear) -> Array:
    """Map the last axis to heads."""
    dim, heads, head_dim = p.weight.shape
    y = (x @ p.weight.reshape(dim, -1)).reshape(*x.shape[:-1], heads, head_dim)
    return y + p.bias if len(p.bias) else y


def build(problem: Problem, dtype: Any = jnp.float32) -> Callable[[], Array]:
    """Return the jitted call that computes a problem in JAX."""
    params = setattn.convert_params(problem.params, jnp, dtype=dtype)
    inputs = [jnp.asarray(x, dtype=dtype) for x in problem.inputs]
    block = getattr(Blocks(JaxOperations(), **problem.all_options), problem.function.__name__)

    @jax.jit
    def call(inputs: list[Array], params: Any) -> Array:
        if problem.one_set:
            return block(*inputs[:-1], inputs[-1][None], params)[0]
        return block(*inputs, params)

    return lambda: jax.block_until_ready(call(inputs, params))
