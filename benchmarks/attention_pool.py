"""The attention-pooling head of SigLIP, whole and without its feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import setattn
from benchmarks.problem import Array, Peer, Problem, Row, generator, normal, trained
from benchmarks.set_transformer import load


def head(sets: int = 16, n: int = 729, dim: int = 1152, heads: int = 16, hidden: int = 4304) -> Problem:
    """Return the head of SigLIP so400m at a resolution of 384 pixels."""
    rng = generator()
    params = trained(setattn.init_attention_pool(dim, num_heads=heads, hidden=hidden, rng=rng), rng, sharpness=2.0)
    params = params._replace(probe=normal(rng, 1, dim))
    return Problem(setattn.attention_pool, (normal(rng, sets, n, dim),), params)


def head_attention() -> Problem:
    problem = head()
    params = problem.params._replace(ff=(), ff_norm=())
    return Problem(problem.function, problem.inputs, params)


def transformers(problem: Problem) -> Callable[[], Array]:
    import torch
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    p, a = problem.params, problem.params.attention
    dim, hidden = p.ff.hidden.weight.shape
    config = SiglipVisionConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_attention_heads=a.key.weight.shape[1],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    inputs = [setattn.map_params(torch.tensor, q) for q in (a.query, a.key, a.value)]
    state = {
        "probe": p.probe[None],
        "attention.in_proj_weight": torch.cat([q.weight.reshape(dim, -1).T for q in inputs]),
        "attention.in_proj_bias": torch.cat([q.bias.reshape(-1) for q in inputs]),
        "attention.out_proj.weight": a.output.weight.reshape(-1, dim).T,
        "attention.out_proj.bias": a.output.bias,
        "layernorm.weight": p.ff_norm.scale,
        "layernorm.bias": p.ff_norm.bias,
        "mlp.fc1.weight": p.ff.hidden.weight.T,
        "mlp.fc1.bias": p.ff.hidden.bias,
        "mlp.fc2.weight": p.ff.output.weight.T,
        "mlp.fc2.bias": p.ff.output.bias,
    }
    module = load(SiglipMultiheadAttentionPoolingHead(config), state)
    x = torch.from_numpy(problem.inputs[0])
    return lambda: module(x)[:, None]


SIZE = "16 x 729 x 1152, 16 heads"
TARGETS = {"numpy": 10.0, "torch": 6.0, "jax": 3.0}
ROWS = [
    Row("SigLIP head", SIZE, head, (Peer("transformers", "transformers", transformers),), TARGETS),
    Row("SigLIP head, attention alone", SIZE, head_attention, (), TARGETS),
]
