"""The Perceiver resamplers of Flamingo and of IP-Adapter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import setattn
from benchmarks.problem import Array, Peer, Problem, Row, generator, normal, trained
from benchmarks.set_transformer import load

FLAMINGO = {"dim": 1024, "depth": 6, "dim_head": 64, "heads": 8, "num_latents": 64}


def resampler(frames: int = 8, n: int = 256) -> Problem:
    """Return the resampler of Flamingo, with an embedding for each frame, in the size of OpenFlamingo's."""
    rng, dim = generator(), FLAMINGO["dim"]
    params = setattn.init_perceiver_resampler(
        dim, num_heads=8, head_dim=64, num_latents=64, num_layers=6, num_frames=frames, rng=rng
    )
    return Problem(
        setattn.perceiver_resampler, (normal(rng, frames, n, dim),), trained(params, rng), {"activation": "gelu"}
    )


def ip_adapter(n: int = 257, dim: int = 1280, dim_out: int = 2048) -> Problem:
    """Return the resampler of IP-Adapter Plus for SDXL."""
    rng = generator()
    params = setattn.init_perceiver_resampler(dim, num_heads=20, head_dim=64, num_latents=16, num_layers=4, rng=rng)
    params = params._replace(
        input=setattn.init_linear(dim, dim, rng=rng),
        output=setattn.init_linear(dim, dim_out, rng=rng),
        output_norm=setattn.init_norm(dim_out),
    )
    return Problem(setattn.perceiver_resampler, (normal(rng, n, dim),), trained(params, rng), {"activation": "gelu"})


# --- flamingo-pytorch and OpenFlamingo: one layout of weights -------------------------------------------------------


def flamingo_pytorch(problem: Problem) -> Callable[[], Array]:
    """It has no frames: their embedding is added before it, and its own, for each medium, is 0."""
    import torch
    from flamingo_pytorch import PerceiverResampler

    state = flamingo_state(problem.params) | {"media_pos_emb": np.zeros((1, 1, FLAMINGO["dim"]), np.float32)}
    module = load(PerceiverResampler(**FLAMINGO, num_media_embeds=1), state)
    x, frames = torch.from_numpy(problem.inputs[0]), torch.from_numpy(problem.params.frame_embedding)
    return lambda: module((x + frames[:, None]).reshape(1, 1, -1, x.shape[-1]))[0, 0]


def open_flamingo(problem: Problem) -> Callable[[], Array]:
    import torch

    helpers = open_flamingo_helpers()
    state = flamingo_state(problem.params) | {"frame_embs": problem.params.frame_embedding}
    module = load(helpers.PerceiverResampler(**FLAMINGO, max_num_frames=len(problem.params.frame_embedding)), state)
    x = torch.from_numpy(problem.inputs[0])[None, None]
    return lambda: module(x)[0, 0]


def open_flamingo_helpers() -> Any:
    """Load the one file that is needed: the package itself imports open_clip."""
    name = "_open_flamingo_helpers"
    if name not in sys.modules:
        package = importlib.util.find_spec("open_flamingo")
        if package is None:
            raise ImportError("open_flamingo")
        path = Path(package.submodule_search_locations[0]) / "src" / "helpers.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def flamingo_state(p: setattn.Resampler) -> dict[str, Array]:
    state = {"latents": p.latents, "norm.weight": p.output_norm.scale, "norm.bias": p.output_norm.bias}
    for i, layer in enumerate(p.layers):
        a, dim = layer.attention, layer.attention.key.weight.shape[0]
        state |= {
            f"layers.{i}.0.norm_media.weight": layer.context_norm.scale,
            f"layers.{i}.0.norm_media.bias": layer.context_norm.bias,
            f"layers.{i}.0.norm_latents.weight": layer.query_norm.scale,
            f"layers.{i}.0.norm_latents.bias": layer.query_norm.bias,
            f"layers.{i}.0.to_q.weight": a.query.weight.reshape(dim, -1).T,
            f"layers.{i}.0.to_kv.weight": np.concatenate([q.weight.reshape(dim, -1).T for q in (a.key, a.value)]),
            f"layers.{i}.0.to_out.weight": a.output.weight.reshape(-1, dim).T,
            f"layers.{i}.1.0.weight": layer.ff_norm.scale,
            f"layers.{i}.1.0.bias": layer.ff_norm.bias,
            f"layers.{i}.1.1.weight": layer.ff.hidden.weight.T,
            f"layers.{i}.1.3.weight": layer.ff.output.weight.T,
        }
    return state


# --- diffusers ------------------------------------------------------------------------------------------------------


def diffusers(problem: Problem) -> Callable[[], Array]:
    import torch
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    p, x = problem.params, problem.inputs[0]
    dim, heads, head_dim = p.layers[0].attention.key.weight.shape
    module = IPAdapterPlusImageProjection(
        embed_dims=x.shape[-1],
        output_dims=p.output.weight.shape[1],
        hidden_dims=dim,
        depth=len(p.layers),
        dim_head=head_dim,
        heads=heads,
        num_queries=len(p.latents),
    )
    state = {
        "latents": p.latents[None],
        "proj_in.weight": p.input.weight.T,
        "proj_in.bias": p.input.bias,
        "proj_out.weight": p.output.weight.T,
        "proj_out.bias": p.output.bias,
        "norm_out.weight": p.output_norm.scale,
        "norm_out.bias": p.output_norm.bias,
    }
    for i, layer in enumerate(p.layers):
        a = layer.attention
        for name, norm in (("ln0", layer.context_norm), ("ln1", layer.query_norm), ("ff.0", layer.ff_norm)):
            state |= {f"layers.{i}.{name}.weight": norm.scale, f"layers.{i}.{name}.bias": norm.bias}
        for name, q in (("to_q", a.query), ("to_k", a.key), ("to_v", a.value)):
            state[f"layers.{i}.attn.{name}.weight"] = q.weight.reshape(dim, -1).T
        state[f"layers.{i}.attn.to_out.0.weight"] = a.output.weight.reshape(-1, dim).T
        state[f"layers.{i}.ff.1.net.0.proj.weight"] = layer.ff.hidden.weight.T
        state[f"layers.{i}.ff.1.net.2.weight"] = layer.ff.output.weight.T
    load(module, state)
    data = torch.from_numpy(x)[None]
    return lambda: module(data)[0]


TARGETS = {"numpy": 1.0, "torch": 1.1, "jax": 1.0}
ROWS = [
    Row(
        "Flamingo resampler, 6 layers",
        "8 frames x 256 x 1024 to 64, 8 heads of 64",
        resampler,
        (
            Peer("flamingo-pytorch", "flamingo-pytorch", flamingo_pytorch),
            Peer("OpenFlamingo", "open-flamingo", open_flamingo),
        ),
        TARGETS,
    ),
    Row(
        "IP-Adapter resampler, 4 layers",
        "257 x 1280 to 16, 20 heads of 64",
        ip_adapter,
        (Peer("diffusers", "diffusers", diffusers),),
        TARGETS,
    ),
]
