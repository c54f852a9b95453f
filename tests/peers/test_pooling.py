"""Pooling heads beside their originals.

big_vision is not on an index of packages: its head is written down here over the layers of Flax that it is made of.
MiniCPM-V and Qwen-VL come with their weights: what their resamplers compute is written down here as well.
"""

from __future__ import annotations

import functools

import numpy as np
import originals
import pytest
import torch
from harness import draw, some
from torch.nn import functional

import setattn

DIM, N = 12, 7
SHAPES = [(2, N), (1, 1), (3, 2)]


# --- SigLIP ---------------------------------------------------------------------------------------------------------


def siglip(version, **changes):
    name = "siglip" if version == 1 else "siglip2"
    config = originals.transformers(
        f"{name}.configuration_{name}", f"Siglip{version if version > 1 else ''}VisionConfig"
    )(hidden_size=DIM, intermediate_size=20, num_attention_heads=3, num_hidden_layers=1, **changes)
    config._attn_implementation = "eager"
    return config, originals.transformers(
        f"{name}.modeling_{name}", f"Siglip{version if version > 1 else ''}MultiheadAttentionPoolingHead"
    )(config)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_siglip(peer, rng, activation):
    config, head = siglip(1, hidden_act=activation)
    for shape in SHAPES:
        peer(
            "siglip",
            head,
            lambda m, x: m(x)[:, None],
            draw(rng, *shape, DIM),
            prefix="vision_model.head.",
            config={"vision_config": config.to_dict()},
        )


def test_siglip_2_with_a_mask(peer, rng):
    peer(
        "siglip",
        siglip(2)[1],
        lambda m, x, mask: m(x, attention_mask=mask)[:, None],
        draw(rng, 3, N, DIM),
        masks={"mask": some(rng, 3, N)},
        options={"num_heads": 3},
        differences=["SigLIP 2 over nothing: the mean of the padding; here 0"],
    )


TIMM = {
    "plain": {},
    "norm": {"norm_layer": torch.nn.LayerNorm},
    "probes": {"latent_len": 3},
    "latents as queries": {"latent_len": 3, "q_proj": False, "norm_layer": torch.nn.LayerNorm},
    "head norms": {"qk_norm": True, "latent_len": 2},
    "positions": {"pos_embed": "abs", "feat_size": N, "norm_layer": torch.nn.LayerNorm},
    "no biases": {"qkv_bias": False, "latent_dim": 8},
    "another output": {"out_features": 10, "mlp_ratio": 2.0, "act_layer": torch.nn.SiLU},
    "before the output": {"out_features": 0, "latent_len": 2, "qk_norm": True},
}


@pytest.mark.parametrize("variant", TIMM)
@pytest.mark.parametrize("masked", [False, True])
def test_timm(peer, rng, variant, masked):
    head = originals.timm()(DIM, num_heads=3, pool_type="", **TIMM[variant])

    def call(m, x, mask=None):
        return m(x, attn_mask=None if mask is None else mask[:, None, None, :])

    for shape in SHAPES:
        if (masked and shape[1] == 1) or ("pos_embed" in TIMM[variant] and shape[1] != N):
            continue  # a mask that hides all; a table of places for as many elements as it has
        peer(
            "siglip-timm",
            head,
            call,
            draw(rng, *shape, DIM),
            masks={"mask": some(rng, *shape)} if masked else {},
            options={"num_heads": 3, "eps": 1e-5} | ({"activation": "silu"} if "act_layer" in TIMM[variant] else {}),
            prefix="attn_pool.",
            differences=["the first probe alone, or the mean of all, by pool_type; here all probes"],
        )


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_what_timm_makes_of_several_probes(peer, rng, pool):
    head, x = originals.timm()(DIM, num_heads=3, pool_type="", latent_len=3), draw(rng, 2, N, DIM)
    block = peer("siglip-timm", head, lambda m, x: m(x), x, options={"num_heads": 3})
    head.pool = pool
    with torch.no_grad():
        wanted = head(torch.from_numpy(x)).numpy()
    pooled = block(x)[:, 0] if pool == "token" else block(x).mean(axis=1)
    np.testing.assert_allclose(pooled, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_big_vision(peer, rng):
    flax, jax = pytest.importorskip("flax.linen"), pytest.importorskip("jax")

    class MlpBlock(flax.Module):
        @flax.compact
        def __call__(self, x):
            hidden = flax.gelu(flax.Dense(20)(x))
            return flax.Dense(x.shape[-1])(hidden)

    class MAPHead(flax.Module):
        @flax.compact
        def __call__(self, x):
            probe = self.param("probe", flax.initializers.xavier_uniform(), (1, 1, x.shape[-1]), x.dtype)
            probe = jax.numpy.tile(probe, [x.shape[0], 1, 1])
            x = flax.MultiHeadDotProductAttention(num_heads=3)(probe, x)
            return x + MlpBlock()(flax.LayerNorm()(x))

    with jax.enable_x64(True):
        head = MAPHead()
        shapes = jax.tree.map(
            np.shape,
            head.init(jax.random.key(0), draw(rng, 2, N, DIM))["params"],
            is_leaf=lambda a: hasattr(a, "shape"),
        )
        names = {
            "/".join(p.key for p in path): shape
            for path, shape in jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda a: type(a) is tuple)[0]
        }
        state = {name: 0.4 * draw(rng, *shape) + (name.endswith("scale")) for name, shape in names.items()}
        state = {name: a.astype(np.float32).astype(np.float64) for name, a in state.items()}

        def call(m, x):
            tree = {}
            for name, a in state.items():
                *path, last = name.split("/")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = a
            with jax.enable_x64(True):
                return np.asarray(m.apply({"params": tree}, x))

        for shape in SHAPES:
            peer(
                "siglip-big-vision",
                head,
                call,
                draw(rng, *shape, DIM),
                state=state,
                prefix="params/img/MAPHead_0/",
                package="flax",
                title="MAPHead, written down over the layers",
            )


# --- CoCa -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "context"), [(DIM, 10), (DIM, DIM), (16, DIM)])
def test_open_clip(peer, rng, dim, context):
    heads = 4
    pooler = originals.open_clip()(dim, context, n_head=heads, n_queries=5)
    config = {"model_cfg": {"vision_cfg": {"attn_pooler_heads": heads}}}
    for shape in SHAPES:
        x = draw(rng, *shape, context)
        peer("open-clip-pooler", pooler, lambda m, x: m(x), x, prefix="visual.attn_pool.", config=config)


# --- MiniCPM-V and Qwen-VL ------------------------------------------------------------------------------------------


class Resampler(torch.nn.Module):
    """One attention of learned queries to normalised features, whose keys have places."""

    def __init__(self, probes, dim, context, heads, *, table, post):
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(probes, dim))
        self.kv_proj = torch.nn.Identity() if context == dim else torch.nn.Linear(context, dim, bias=False)
        self.attn = torch.nn.MultiheadAttention(dim, heads)
        self.ln_q, self.ln_kv = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        if table:
            self.pos_embed = torch.nn.Parameter(torch.zeros(probes, dim), requires_grad=False)
        if post:
            self.ln_post, self.proj = torch.nn.LayerNorm(dim, eps=1e-6), torch.nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x, key_positions, mask=None):
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        places = key_positions.permute(1, 0, 2) if key_positions.ndim == 3 else key_positions[:, None]
        q = self.ln_q(self.query)
        q = (q + self.pos_embed if hasattr(self, "pos_embed") else q)[:, None].expand(-1, x.shape[1], -1)
        out = self.attn(q, x + places, x, key_padding_mask=None if mask is None else ~mask)[0].permute(1, 0, 2)
        return self.ln_post(out) @ self.proj if hasattr(self, "proj") else out


def places(height, width, dim):
    """The table of the places of a picture's patches, one after another, as float32 holds it."""
    row, column = np.divmod(np.arange(height * width, dtype=np.float64), width)
    table = setattn.sincos_features(np.stack([column, row], axis=-1), dim=dim)
    return table.astype(np.float32).astype(np.float64)


MINICPM = "Resampler of MiniCPM-V {}, written down over nn.MultiheadAttention"


@pytest.mark.parametrize("context", [10, DIM])
def test_minicpm_v(peer, rng, context):
    """Pictures of different sizes in a batch, each with its own places, and padding."""
    resampler = Resampler(5, DIM, context, 3, table=False, post=True)
    mask, keys = np.ones((2, N), bool), draw(rng, 2, N, DIM)
    mask[1, 4:] = False
    keys[0, :6], keys[1, :4] = places(2, 3, DIM), places(2, 2, DIM)
    peer(
        "minicpm-v",
        resampler,
        lambda m, x, key_positions, mask: m(x, key_positions, mask),
        draw(rng, 2, N, context),
        masks={"mask": mask, "key_positions": keys},
        options={"num_heads": 3},
        prefix="resampler.",
        package="torch",
        title=MINICPM.format("2.5, 2.6"),
        differences=["finds the places from the sizes of the pictures; here they are key_positions"],
    )


def test_minicpm_v_2(peer, rng):
    """The first version adds places to the probes, too; heads are 128 wide unless it is said otherwise."""
    resampler = Resampler(4, 256, 10, 2, table=True, post=True)
    block = peer(
        "minicpm-v",
        resampler,
        lambda m, x, key_positions: m(x, key_positions),
        draw(rng, 2, 6, 10),
        masks={"key_positions": places(2, 3, 256)},
        package="torch",
        title=MINICPM.format("2.0"),
    )
    assert block.params.attention.key.weight.shape == (256, 2, 128)


@pytest.mark.parametrize(("context", "size"), [(10, 3), (DIM, 3), (10, 4)])
def test_qwen_vl(peer, rng, context, size):
    """The places of the keys are those of the probes, resized where there are more patches than probes."""
    resampler = Resampler(9, DIM, context, 3, table=True, post=False)
    table = torch.from_numpy(places(3, 3, DIM))
    grid = table.reshape(1, 3, 3, DIM).permute(0, 3, 1, 2)
    keys = functional.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
    keys = keys.permute(0, 2, 3, 1).reshape(size * size, DIM).numpy().astype(np.float32).astype(np.float64)
    peer(
        "qwen-vl",
        resampler,
        lambda m, x, key_positions: m(x, key_positions),
        draw(rng, 2, size * size, context),
        masks={"key_positions": keys},
        options={"num_heads": 3},
        prefix="transformer.visual.attn_pool.",
        package="torch",
        title="Resampler of Qwen-VL, written down over nn.MultiheadAttention",
        differences=["resizes its table for the keys, where there are more patches; here they are key_positions"],
    )


# --- x-transformers -------------------------------------------------------------------------------------------------

POOLS = {
    "one": {"num_pooled_tokens": 1},
    "several": {"num_pooled_tokens": 3, "dim_context": 10},
    "shared keys": {"num_pooled_tokens": 3, "attn_kwargs": {"kv_heads": 1}},
    "residual": {"num_pooled_tokens": 3, "add_residual": True},
    "one block": {"num_pooled_tokens": 3, "use_transformer_blocks": True},
    "blocks": {"num_pooled_tokens": 3, "dim_context": 10, "depth": 3},
}


@pytest.mark.parametrize("variant", POOLS)
@pytest.mark.parametrize("masked", [False, True])
def test_x_transformers(peer, rng, variant, masked):
    changes = POOLS[variant]
    pool = originals.x_transformers("AttentionPool")(DIM, heads=2, dim_head=5, **changes)
    for module in pool.modules():
        if hasattr(module, "attn_fn"):  # whose softmax is one of float32, whatever it is given
            module.attn_fn = functools.partial(functional.softmax, dim=-1)
    block = peer(
        "attention-pool-x-transformers",
        pool,
        lambda m, x, mask=None: m(x, mask=mask),
        draw(rng, 2, N, changes.get("dim_context", DIM)),
        masks={"mask": some(rng, 2, N)} if masked else {},
        options={"head_dim": 5, "add_residual": changes.get("add_residual", False)},
        differences=["squeeze_output drops the axis of one probe; here it stays"],
    )
    blocks = "blocks" in variant or "block" in variant
    assert block.function == ("pma" if "add_residual" in changes else "perceiver" if blocks else "attention_pool")
