"""The blocks in eager PyTorch: three ways to compute the attention, the rest the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import setattn
from benchmarks.forms import Blocks
from benchmarks.problem import Problem, is_absent


class Affine(NamedTuple):
    """A linear layer in PyTorch's layout, ``(out, in)``."""

    weight: Tensor
    bias: Tensor | None


class Heads(NamedTuple):
    """An attention: keys and values are made by one product, and queries too where they come from the same set."""

    query: Affine | tuple[()]
    key_value: Affine
    query_key_value: Affine | tuple[()]
    output: Affine | tuple[()]
    heads: int
    head_dim: int
    module: nn.MultiheadAttention | None = None


class TorchOperations:
    """The operations of PyTorch, with one of the cores ``sdpa``, ``matmul``, ``module``."""

    def __init__(self, core: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.core, self.device, self.dtype = core, device, dtype

    def tensor(self, x: Any) -> Tensor:
        return torch.from_numpy(x).to(self.device, self.dtype)

    def prepare(self, tree: Any) -> Any:
        """Lay out the weights as PyTorch's own modules keep them."""
        if isinstance(tree, setattn.Linear):
            return self.affine(tree, tree.weight.shape[0])
        if isinstance(tree, setattn.Attention):
            return self.heads(tree)
        if isinstance(tree, tuple):
            parts = [self.prepare(part) for part in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return self.tensor(tree)

    def affine(self, p: setattn.Linear, width: int) -> Affine:
        weight = self.tensor(p.weight.reshape(width, -1)).T.contiguous()
        return Affine(weight, None if is_absent(p.bias) else self.tensor(p.bias.reshape(-1)))

    def heads(self, p: setattn.Attention) -> Heads:
        dim, heads, head_dim = p.key.weight.shape
        if p.value.weight.shape[1:] != (heads, head_dim):
            raise NotImplementedError("values of another width, or grouped keys")
        query = () if is_absent(p.query) else self.affine(p.query, p.query.weight.shape[0])
        key, value = self.affine(p.key, dim), self.affine(p.value, dim)
        output = () if is_absent(p.output) else self.affine(p.output, heads * head_dim)
        alike = query and query.weight.shape == key.weight.shape
        module = self.module(query, key, value, output, heads) if self.core == "module" else None
        return Heads(query, fuse(key, value), fuse(query, key, value) if alike else (), output, heads, head_dim, module)

    def module(self, query: Any, key: Affine, value: Affine, output: Any, heads: int) -> nn.MultiheadAttention:
        if not query or not output or len({*query.weight.shape, *output.weight.shape, key.weight.shape[0]}) > 1:
            raise NotImplementedError("nn.MultiheadAttention projects queries and output, all of one width")
        dim, bias = query.weight.shape[0], query.bias is not None
        width = key.weight.shape[1]
        attention = nn.MultiheadAttention(dim, heads, bias=bias, kdim=width, vdim=width, batch_first=True)
        state = {"out_proj.weight": output.weight}
        if width == dim:
            state["in_proj_weight"] = torch.cat([query.weight, key.weight, value.weight])
        else:
            state |= {f"{name}_proj_weight": p.weight for name, p in zip("qkv", (query, key, value), strict=True)}
        if bias:
            state |= {"in_proj_bias": torch.cat([query.bias, key.bias, value.bias]), "out_proj.bias": output.bias}
        attention.load_state_dict(state)
        return attention.eval().to(self.device, self.dtype)

    def linear(self, x: Tensor, p: Affine) -> Tensor:
        return F.linear(x, p.weight, p.bias)

    def norm(self, x: Tensor, p: Any, eps: float) -> Tensor:
        if isinstance(p, setattn.RMSNorm):
            return F.rms_norm(x, p.scale.shape, p.scale, eps)
        return F.layer_norm(x, p.scale.shape, p.scale, p.bias if len(p.bias) else None, eps)

    def activate(self, x: Tensor, name: str) -> Tensor:
        if name == "relu":
            return x.relu_()
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")

    def add(self, owned: Tensor, x: Tensor) -> Tensor:
        return owned.add_(x)

    def multiply(self, owned: Tensor, x: Tensor) -> Tensor:
        return owned.mul_(x)

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], dim=-2)

    def for_each_set(self, x: Tensor, sets: int) -> Tensor:
        return x.expand(sets, *x.shape)

    def attend(self, x: Tensor, y: Tensor, p: Heads, scale: float | None) -> Tensor:
        if p.module is not None:
            if scale is not None:
                raise NotImplementedError("nn.MultiheadAttention has no scale")
            x = x.expand(y.shape[0], -1, -1) if x.ndim < y.ndim else x
            return p.module(x, y, y, need_weights=False)[0]
        if x is y and p.query_key_value:
            q, k, v = self.split(self.linear(x, p.query_key_value), 3, p)
        else:
            k, v = self.split(self.linear(y, p.key_value), 2, p)
            (q,) = self.split(self.linear(x, p.query) if p.query else x, 1, p)
            q = q.expand(y.shape[0], -1, -1, -1)
        if self.core == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            q = q * (p.head_dim**-0.5 if scale is None else scale)
            o = torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v
        o = o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1)
        return self.linear(o, p.output) if p.output else o

    def split(self, x: Tensor, parts: int, p: Heads) -> tuple[Tensor, ...]:
        """Cut projections into ``(sets, heads, elements, head_dim)``, as views."""
        sets = x.shape[0] if x.ndim == 3 else 1
        return x.view(sets, -1, parts, p.heads, p.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def fuse(*parts: Affine) -> Affine:
    bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
    return Affine(torch.cat([p.weight for p in parts]), bias)


def build(problem: Problem, core: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return the call that computes a problem in PyTorch."""
    ops = TorchOperations(core, device, dtype)
    params = ops.prepare(problem.params)
    inputs = [ops.tensor(x) for x in problem.inputs]
    if problem.one_set:
        inputs[-1] = inputs[-1][None]
    block = getattr(Blocks(ops, **problem.all_options), problem.function.__name__)

    def run() -> Tensor:
        out = block(*inputs, params)
        return out[0] if problem.one_set else out

    return run


sdpa = functools.partial(build, core="sdpa")
matmul = functools.partial(build, core="matmul")
module = functools.partial(build, core="module")
