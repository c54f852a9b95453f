"""Blocks of the Set Transformer: in the form of its authors' code, of PyTorch Geometric and of TabICL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import setattn
from benchmarks.problem import Array, Peer, Problem, Row, generator, normal, trained


def pma(form: str, seeds: int, n: int = 100_000, dim: int = 256, heads: int = 8, traced: bool = False) -> Problem:
    rng = generator()
    kind = "official" if form == "official" else "post_norm"
    params = setattn.init_pma(dim, num_seeds=seeds, num_heads=heads, form=kind, norm="layer", rng=rng)
    params = trained(params, rng)._replace(seeds=normal(rng, seeds, dim))
    return Problem(setattn.pma, (normal(rng, n, dim),), params, scale(form, dim), traced)


def isab(form: str, inducing: int, n: int = 100_000, dim: int = 128, heads: int = 4) -> Problem:
    rng = generator()
    if form == "tabicl":
        params = setattn.init_isab(
            dim, num_inducing=inducing, num_heads=heads, hidden=2 * dim, form="pre_norm", norm="layer", rng=rng
        )
    else:
        kind = "official" if form == "official" else "post_norm"
        params = setattn.init_isab(dim, num_inducing=inducing, num_heads=heads, form=kind, norm="layer", rng=rng)
    params = trained(params, rng)._replace(inducing_points=normal(rng, inducing, dim))
    if form == "tabicl":  # which has one norm for the queries and the context of a block
        blocks = {name: getattr(params, name) for name in ("mab_inducing", "mab_set")}
        params = params._replace(**{name: p._replace(context_norm=p.query_norm) for name, p in blocks.items()})
    activation = {"activation": "gelu"} if form == "tabicl" else {}
    return Problem(setattn.isab, (normal(rng, n, dim),), params, scale(form, dim) | activation)


def scale(form: str, dim: int) -> dict[str, float]:
    """Return the scale of the authors' code, or nothing where it is the usual one."""
    return {"scale": dim**-0.5} if form == "official" else {}


def small_sets(sets: int = 1024, n: int = 32, dim: int = 64, heads: int = 4) -> Problem:
    rng = generator()
    params = setattn.init_set_transformer(dim, dim, dim, num_heads=heads, num_decoders=0, rng=rng)
    params = trained(params._replace(output=()), rng)
    params = params._replace(pma=params.pma._replace(seeds=normal(rng, 1, dim)))
    return Problem(setattn.set_transformer, (normal(rng, sets, n, dim),), params)


# --- PyTorch Geometric ----------------------------------------------------------------------------------------------


def geometric(problem: Problem) -> Callable[[], Array]:
    import torch
    from torch_geometric.nn.aggr import utils

    params, (x,) = problem.params, problem.inputs
    heads, dim = attentions(params)[0].key.weight.shape[1], x.shape[-1]

    def induced(p: setattn.ISAB) -> Any:
        module = utils.InducedSetAttentionBlock(dim, len(p.inducing_points), heads)
        state = {"ind": p.inducing_points[None]} | block(p.mab_inducing, "mab1.") | block(p.mab_set, "mab2.")
        return load(module, state)

    def pooling(p: setattn.PMA) -> Any:
        module = utils.PoolingByMultiheadAttention(dim, len(p.seeds), heads)
        state = {"seed": p.seeds[None], "lin.weight": p.ff.hidden.weight.T, "lin.bias": p.ff.hidden.bias}
        return load(module, state | block(p.mab, "mab."))

    def encoder(p: setattn.MAB) -> Any:
        return load(utils.SetAttentionBlock(dim, heads), block(p, "mab."))

    if isinstance(params, setattn.SetTransformer):
        module = torch.nn.Sequential(*(encoder(p) for p in params.encoder), pooling(params.pma))
    else:
        module = induced(params) if isinstance(params, setattn.ISAB) else pooling(params)
    data = torch.from_numpy(x if x.ndim == 3 else x[None])
    return lambda: module(data).reshape(*x.shape[:-2], -1, dim)


def block(p: setattn.MAB, prefix: str) -> dict[str, Array]:
    """Name the arrays of a block as PyTorch Geometric's ``MultiheadAttentionBlock`` does."""
    a, dim = p.attention, p.attention.key.weight.shape[0]
    inputs = (a.query, a.key, a.value)
    state = {
        "attn.in_proj_weight": np.concatenate([q.weight.reshape(dim, -1).T for q in inputs]),
        "attn.in_proj_bias": np.concatenate([q.bias.reshape(-1) for q in inputs]),
        "attn.out_proj.weight": a.output.weight.reshape(-1, dim).T,
        "attn.out_proj.bias": a.output.bias,
        "lin.weight": p.ff.hidden.weight.T,
        "lin.bias": p.ff.hidden.bias,
    }
    for number, norm in ((1, p.attention_norm), (2, p.output_norm)):
        state |= {f"layer_norm{number}.weight": norm.scale, f"layer_norm{number}.bias": norm.bias}
    return {prefix + name: array for name, array in state.items()}


def load(module: Any, state: dict[str, Array]) -> Any:
    """Fill a PyTorch module with NumPy arrays, every one of its own."""
    import torch

    module.load_state_dict({name: torch.as_tensor(array).clone() for name, array in state.items()}, strict=True)
    return module.eval()


def attentions(tree: Any) -> list[setattn.Attention]:
    if isinstance(tree, setattn.Attention):
        return [tree]
    return [a for part in tree for a in attentions(part)] if isinstance(tree, tuple) else []


PYG = (Peer("PyTorch Geometric", "torch_geometric", geometric),)


def row(name: str, size: str, problem: Any, libraries: Any, numpy: float, torch: float, jax: float, **kw: Any) -> Row:
    targets = {"numpy": numpy, "torch": torch, "jax": jax}
    return Row(name, size, functools.partial(problem, **kw), libraries, targets)


LARGE, WIDE = "100 000 x 256, 8 heads", "100 000 x 128, 4 heads"
ROWS = [
    row("PMA, 1 seed, official form", LARGE, pma, (), 6, 6, 3, form="official", seeds=1),
    row("PMA, 4 seeds, official form", LARGE, pma, (), 4, 4, 3, form="official", seeds=4),
    row("PMA, 1 seed, with row-wise ff", LARGE, pma, PYG, 1.6, 1.6, 1.3, form="paper", seeds=1),
    row("PMA, 4 seeds, with row-wise ff", LARGE, pma, PYG, 1.4, 1.4, 1.3, form="paper", seeds=4),
    row("ISAB, m = 16, official form", WIDE, isab, (), 1.6, 1.5, 1.2, form="official", inducing=16),
    row("ISAB, m = 32, official form", WIDE, isab, (), 1.4, 1.5, 1.2, form="official", inducing=32),
    row("ISAB, m = 16, PyG's form", WIDE, isab, PYG, 1.6, 1.5, 1.2, form="paper", inducing=16),
    row("ISAB, m = 32, PyG's form", WIDE, isab, PYG, 1.4, 1.5, 1.2, form="paper", inducing=32),
    *(
        row(
            f"ISAB, m = 32, dim 256, {label}",
            "20 000 x 256, 8 heads",
            isab,
            libraries,
            *(1.0, 1.2, 1.0),
            form=form,
            inducing=32,
            n=20_000,
            dim=256,
            heads=8,
        )
        for form, label, libraries in (("official", "official form", ()), ("paper", "PyG's form", PYG))
    ),
    row(
        "ISAB, m = 128, TabICL's form",
        "100 000 x 128, 8 heads",
        isab,
        (),
        *(1.0, 1.2, 1.0),
        form="tabicl",
        inducing=128,
        heads=8,
    ),
    row("small sets: SAB, SAB, PMA", "1 024 x 32 x 64, 4 heads", small_sets, PYG, 1.0, 1.0, 1.0),
    *(
        row(
            name,
            "64 x 64, 4 heads",
            pma,
            PYG,
            *(1.0, 0.8, 1.0),
            form="paper",
            seeds=1,
            n=64,
            dim=64,
            heads=4,
            traced=traced,
        )
        for name, traced in (("one small set: PMA (latency)", False), ("one small set: PMA, traced", True))
    ),
]
