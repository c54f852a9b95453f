"""Perceiver's cross-attention in the shape of its ImageNet model: as transformers and perceiver-pytorch have it."""

from __future__ import annotations

from collections.abc import Callable

import setattn
from benchmarks.problem import Array, Peer, Problem, Row, generator, normal, trained
from benchmarks.set_transformer import load

LATENTS, DIM, N, DIM_INPUTS = 512, 1024, 50_176, 261


def cross_attention() -> Problem:
    """Return the block of DeepMind's code and of transformers: queries and keys as wide as the inputs."""
    rng = generator()
    params = setattn.init_cross_attention(DIM, DIM_INPUTS, num_heads=1, head_dim=DIM_INPUTS, hidden=DIM, rng=rng)
    inputs = (normal(rng, LATENTS, DIM), normal(rng, N, DIM_INPUTS))
    return Problem(setattn.cross_attention, inputs, trained(params, rng))


def lucidrains() -> Problem:
    """Return the block of perceiver-pytorch: a head of 64, no biases but the output's, a gated network."""
    rng = generator()
    params = setattn.init_cross_attention(DIM, DIM_INPUTS, num_heads=1, head_dim=64, rng=rng)
    a = params.attention
    without = {name: getattr(a, name)._replace(bias=()) for name in ("query", "key", "value")}
    params = params._replace(
        attention=a._replace(**without), ff=setattn.init_feed_forward(DIM, hidden=4 * DIM, gate=True, rng=rng)
    )
    inputs = (normal(rng, LATENTS, DIM), normal(rng, N, DIM_INPUTS))
    return Problem(setattn.cross_attention, inputs, trained(params, rng))


def transformers(problem: Problem) -> Callable[[], Array]:
    import torch
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverLayer

    p, a = problem.params, problem.params.attention
    module = PerceiverLayer(
        PerceiverConfig(hidden_act="gelu", attention_probs_dropout_prob=0.0),
        is_cross_attention=True,
        qk_channels=DIM_INPUTS,
        v_channels=DIM_INPUTS,
        num_heads=1,
        q_dim=DIM,
        kv_dim=DIM_INPUTS,
        widening_factor=1,
    )
    state = {}
    for name, norm in (
        ("attention.self.layernorm1", p.query_norm),
        ("attention.self.layernorm2", p.context_norm),
        ("layernorm", p.ff_norm),
    ):
        state |= {f"{name}.weight": norm.scale, f"{name}.bias": norm.bias}
    for name, q in (("query", a.query), ("key", a.key), ("value", a.value)):
        state |= {f"attention.self.{name}.weight": q.weight[:, 0].T, f"attention.self.{name}.bias": q.bias[0]}
    for name, weight, bias in (
        ("attention.output.dense", a.output.weight[0], a.output.bias),
        ("mlp.dense1", *p.ff.hidden),
        ("mlp.dense2", *p.ff.output),
    ):
        state |= {f"{name}.weight": weight.T, f"{name}.bias": bias}
    load(module, state)
    latents, inputs = (torch.from_numpy(x)[None] for x in problem.inputs)
    return lambda: module(latents, inputs=inputs)[0][0]


def perceiver_pytorch(problem: Problem) -> Callable[[], Array]:
    import torch
    from perceiver_pytorch.perceiver_pytorch import Attention, FeedForward, PreNorm

    p, a = problem.params, problem.params.attention
    attention = PreNorm(DIM, Attention(DIM, DIM_INPUTS, heads=1, dim_head=64), context_dim=DIM_INPUTS)
    state = {
        "norm.weight": p.query_norm.scale,
        "norm.bias": p.query_norm.bias,
        "norm_context.weight": p.context_norm.scale,
        "norm_context.bias": p.context_norm.bias,
        "fn.to_q.weight": a.query.weight[:, 0].T,
        "fn.to_kv.weight": torch.cat([torch.tensor(q.weight[:, 0].T) for q in (a.key, a.value)]),
        "fn.to_out.weight": a.output.weight[0].T,
        "fn.to_out.bias": a.output.bias,
    }
    load(attention, state)
    ff = PreNorm(DIM, FeedForward(DIM))
    state = {
        "norm.weight": p.ff_norm.scale,
        "norm.bias": p.ff_norm.bias,
        "fn.net.0.weight": torch.cat([torch.tensor(q.weight.T) for q in (p.ff.hidden, p.ff.gate)]),
        "fn.net.0.bias": torch.cat([torch.tensor(q.bias) for q in (p.ff.hidden, p.ff.gate)]),
        "fn.net.2.weight": p.ff.output.weight.T,
        "fn.net.2.bias": p.ff.output.bias,
    }
    load(ff, state)
    latents, inputs = (torch.from_numpy(x)[None] for x in problem.inputs)

    def run() -> Array:
        out = attention(latents, context=inputs)
        h = latents + (out[0] if isinstance(out, tuple) else out)
        return (h + ff(h))[0]

    return run


SIZE = "512 x 1024 to 50 176 x 261, 1 head"
TARGETS = {"numpy": 1.3, "torch": 1.3, "jax": 1.0}
ROWS = [
    Row(
        "Perceiver cross-attention, ImageNet",
        SIZE + " of 261",
        cross_attention,
        (Peer("transformers", "transformers", transformers),),
        TARGETS,
    ),
    Row(
        "Perceiver cross-attention, lucidrains' form",
        SIZE + " of 64",
        lucidrains,
        (Peer("perceiver-pytorch", "perceiver-pytorch", perceiver_pytorch),),
        TARGETS,
    ),
]
