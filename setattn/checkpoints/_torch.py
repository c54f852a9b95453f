"""Modules of PyTorch that several implementations are made of."""

from __future__ import annotations

from setattn._params import Attention
from setattn.checkpoints._weights import Weights


def torch_attention(w: Weights, key: str, query_dim: int | str, context_dim: int | str, heads: int) -> Attention:
    """Return a ``torch.nn.MultiheadAttention``, which packs its three weights in one where its widths are the same."""
    w = w.at(key)
    head: list[int | str] = [heads, w.local("head_dim")]
    if w.has("in_proj_weight") or not w.has("q_proj_weight"):
        query, _, _ = w.fused("in_proj", 3, [query_dim], head, join="_")
        _, k, v = w.fused("in_proj", 3, [context_dim], head, join="_")
    else:
        dims = {"q": query_dim, "k": context_dim, "v": context_dim}
        query, k, v = (w.fused(f"{n}_proj", 1, [dim], head, bias=False, join="_")[0] for n, dim in dims.items())
        biases = w.biases("in_proj_bias", 3, head)
        query, k, v = (m._replace(bias=b) for m, b in zip((query, k, v), biases, strict=True))
    return Attention(query, k, v, w.linear("out_proj", head, [query_dim]))
