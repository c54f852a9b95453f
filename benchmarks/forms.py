"""The blocks as one writes them in a framework: every projection first, then its fused attention.

They are written once over a few operations, which ``torch_forms`` and ``jax_forms`` supply. Sets have one batch axis;
learned queries have none.
"""

from __future__ import annotations

from typing import Any, Protocol

from setattn import ISAB, FeedForward

Array = Any


class Operations(Protocol):
    """What a framework supplies. Parameters are in the form that it keeps them in."""

    def linear(self, x: Array, p: Any) -> Array: ...
    def norm(self, x: Array, p: Any, eps: float) -> Array: ...
    def activate(self, x: Array, name: str) -> Array: ...
    def attend(self, x: Array, y: Array, p: Any, scale: float | None) -> Array: ...
    def add(self, owned: Array, x: Array) -> Array: ...
    def multiply(self, owned: Array, x: Array) -> Array: ...
    def concat(self, x: Array, y: Array) -> Array: ...
    def for_each_set(self, x: Array, sets: int) -> Array: ...


class Blocks:
    """The blocks over the operations of one framework, with the options of one call."""

    def __init__(
        self,
        ops: Operations,
        activation: str = "relu",
        eps: float = 1e-5,
        scale: float | None = None,
        query_residual: bool = True,
    ):
        self.ops, self.activation, self.eps, self.scale = ops, activation, eps, scale
        self.query_residual = query_residual

    def norm(self, x: Array, p: Any) -> Array:
        return self.ops.norm(x, p, self.eps) if p else x

    def linear(self, x: Array, p: Any) -> Array:
        return self.ops.linear(x, p) if p else x

    def feed_forward(self, x: Array, p: FeedForward) -> Array:
        ops = self.ops
        hidden = ops.linear(x, p.hidden)
        if p.gate:
            hidden = ops.multiply(ops.activate(ops.linear(x, p.gate), self.activation), hidden)
        else:
            hidden = ops.activate(hidden, self.activation)
        return self.linear(hidden, p.output)

    def residual(self, h: Array, p: Any) -> Array:
        return self.ops.add(self.feed_forward(self.norm(h, p.ff_norm), p.ff), h) if p.ff else h

    def attend(self, x: Array, y: Array, p: Any) -> Array:
        return self.ops.attend(x, y, p, self.scale)

    def mab(self, x: Array, y: Array, p: Any) -> Array:
        projected = self.linear(x, p.project)
        normed = self.norm(projected, p.query_norm)
        context = normed if x is y and not p.project and not p.query_norm else self.norm(y, p.context_norm)
        h = self.norm(self.ops.add(self.attend(normed, context, p.attention), projected), p.attention_norm)
        return self.norm(self.residual(h, p), p.output_norm)

    def isab(self, x: Array, p: Any) -> Array:
        return self.mab(x, self.mab(p.inducing_points, x, p.mab_inducing), p.mab_set)

    def pma(self, x: Array, p: Any) -> Array:
        return self.mab(p.seeds, self.feed_forward(x, p.ff) if p.ff else x, p.mab)

    def set_transformer(self, x: Array, p: Any) -> Array:
        for block in p.encoder:
            x = self.isab(x, block) if isinstance(block, ISAB) else self.mab(x, x, block)
        x = self.pma(x, p.pma)
        for block in p.decoder:
            x = self.mab(x, x, block)
        return self.linear(x, p.output)

    def attention_pool(self, x: Array, p: Any) -> Array:
        h = self.attend(self.norm(p.probe, p.query_norm), self.norm(x, p.context_norm), p.attention)
        return self.linear(self.norm(self.residual(h, p), p.output_norm), p.output)

    def cross_attention(self, z: Array, y: Array, p: Any) -> Array:
        h = self.attend(self.norm(z, p.query_norm), self.norm(y, p.context_norm), p.attention)
        return self.residual(self.ops.add(h, z) if self.query_residual else h, p)

    def perceiver_resampler(self, x: Array, p: Any) -> Array:
        x = self.linear(x, p.input)
        if len(p.frame_embedding):
            x = x + p.frame_embedding[:, None, :]
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        z = self.ops.for_each_set(p.latents, x.shape[0])
        for layer in p.layers:
            normed = self.norm(z, layer.query_norm)
            context = self.ops.concat(self.norm(x, layer.context_norm), normed)
            z = self.residual(self.ops.add(self.attend(normed, context, layer.attention), z), layer)
        return self.norm(self.linear(z, p.output), p.output_norm)
