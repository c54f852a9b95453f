"""Gated cross-attentions: flamingo-pytorch, OpenFlamingo, Llama 3.2 Vision and Idefics in transformers."""

from __future__ import annotations

import types

import numpy as np
import originals
import pytest
import torch
from harness import draw, redraw

import setattn

FLOAT32_INSIDE = "RMS norms, and the softmax of eager attention, in float32 whatever the dtype: compared in float64"
CAUSAL = "causal under sdpa without a mask: compared with a mask"
LEAKING = "text that sees nothing attends to everything; here it stays as it is"
UNIFORM = "text that sees nothing gets the mean of all media, or 0 before the first if it sees one at most; here 0"


def seen(media: np.ndarray, pairs: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Say which elements each row of text sees, ``(batch, n, media * m)``."""
    mask = np.ones(media.shape[:-1], bool) if mask is None else mask
    sees = pairs[..., None] & mask[:, None]
    return sees.reshape(*pairs.shape[:2], -1)


# --- flamingo-pytorch, OpenFlamingo ---------------------------------------------------------------------------------

FLAMINGOS = ("lucidrains", "open_flamingo")


def flamingo(name: str, immediate: bool, dim: int = 12, dim_media: int = 10, **sizes: int) -> torch.nn.Module:
    options = {"dim": dim, "dim_head": 4, "heads": 3, "only_attend_immediate_media": immediate} | sizes
    if name == "lucidrains":
        return originals.flamingo_lucidrains("GatedCrossAttentionBlock")(**options)
    return originals.open_flamingo("GatedCrossAttentionBlock")(dim_visual=dim_media, **options)


def media_for(rng, name: str, batch: int, count: int, m: int) -> np.ndarray:
    return draw(rng, batch, count, m, 12 if name == "lucidrains" else 10)


PLACES = {
    "one each": [[1, 0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0]],
    "text before": [[0, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0, 1]],
}


def attend(m, x, media, media_locations=None):
    everything = {"use_cached_media": True} if media_locations is None and "open_flamingo" in type(m).__module__ else {}
    return m(x, media, media_locations=media_locations, **everything)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("name", FLAMINGOS)
def test_flamingo(peer, rng, name, immediate):
    """Text sees the media that it follows, or all; places for every medium and fewer."""
    module = flamingo(name, immediate)
    options = {"head_dim": 4, "immediate": immediate}
    told = {"options": options, "differences": [UNIFORM]}
    for places, table in PLACES.items():
        if places == "text before" and not immediate:
            continue  # where the original takes the mean: below
        masks = {"media_locations": np.array(table, bool)}
        x, media = draw(rng, 2, 7, 12), media_for(rng, name, 2, 3, 5)
        peer("flamingo-gated", module, attend, x, media, masks=masks, **told)
    peer("flamingo-gated", module, attend, draw(rng, 3, 4, 12), media_for(rng, name, 3, 1, 2), **told)


def test_flamingo_where_published_files_have_it(peer, rng):
    module = flamingo("open_flamingo", True, dim=8, dim_media=6, dim_head=64, heads=2)
    prefix = setattn.layouts()["flamingo-gated"].prefix
    masks = {"media_locations": np.array([[0, 1, 0, 1]] * 2, bool)}
    peer("flamingo-gated", module, attend, draw(rng, 2, 4, 8), draw(rng, 2, 2, 3, 6), masks=masks, prefix=prefix)


@pytest.mark.parametrize("case", ["before the first, all so far", "more places than media"])
@pytest.mark.parametrize("name", FLAMINGOS)
def test_flamingo_gives_the_mean_to_text_that_sees_nothing(rng, name, case):
    """The original's attention of such text is the mean of all media; the block's is 0, and all else agrees."""
    immediate = case == "more places than media"
    module = flamingo(name, immediate)
    redraw(module)
    places = np.array([[1, 0, 1, 0, 1, 0]] if immediate else [[0, 0, 1, 0, 1, 0]], bool)
    blind = np.array([0, 0, 0, 0, 1, 1] if immediate else [1, 1, 0, 0, 0, 0], bool)
    x, media = draw(rng, 1, 6, 12), media_for(rng, name, 1, 2, 5)
    block = setattn.load(module.state_dict(), "flamingo-gated", head_dim=4, immediate=immediate)
    with torch.no_grad():
        t = [torch.from_numpy(a) for a in (x, media, places)]
        original, ours = module(*t).numpy(), block(t[0], t[1], media_locations=t[2]).numpy()
        kv = module.attn.to_kv(t[1].reshape(1, 10, -1))
        mean = module.attn.to_out(kv[..., kv.shape[-1] // 2 :].mean(dim=1))[:, None] * module.attn_gate.tanh()
        uniform, nothing = t[0] + mean, t[0]
        uniform, nothing = (h + module.ff(h) * module.ff_gate.tanh() for h in (uniform, nothing))
    np.testing.assert_allclose(original[:, ~blind], ours[:, ~blind], rtol=0, atol=1e-12)
    np.testing.assert_allclose(original[:, blind], uniform.numpy()[:, blind], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[:, blind], nothing.numpy()[:, blind], rtol=0, atol=1e-12)
    assert np.abs(original[:, blind] - ours[:, blind]).max() > 0.01


# --- transformers ---------------------------------------------------------------------------------------------------


SIZES = [(2, 7, 3, 5), (3, 4, 1, 2)]  # batch, rows of text, media, elements of each


def in_float64(module: torch.nn.Module) -> torch.nn.Module:
    """Let RMS norms calculate in the dtype of what they are given."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = types.MethodType(forward, part)
    return module


def additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write a mask as the large negative numbers that the originals add."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def mllama(attention: str = "sdpa", heads: int = 4, kv_heads: int = 2) -> torch.nn.Module:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(
        hidden_size=16,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        cross_attention_layers=[0],
        intermediate_size=20,
        vocab_size=8,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    return originals.transformers("mllama.modeling_mllama", "MllamaCrossAttentionDecoderLayer")(config, 0)


def of_mllama(m, x, media, pair_mask=None, mask=None):
    """Call the layer as its model does, which prepares the masks by a function of its own."""
    prepare = originals.transformers("mllama.modeling_mllama", "_prepare_cross_attention_mask")
    shape = (*x.shape[:-1], media.shape[1])
    pairs = torch.ones(shape, dtype=torch.bool) if pair_mask is None else pair_mask
    bias, rows = prepare(pairs[:, :, :, None].long(), media.shape[2], x.dtype)
    if mask is not None:  # of single elements, which the model has no place for
        sees = torch.from_numpy(seen(media, pairs.numpy(), mask.numpy()))
        bias, rows = additive(sees, x.dtype), sees.any(dim=-1)[:, None, :, None].to(x.dtype)
    return m(x, media.flatten(1, 2), bias, None, rows)


def pairs_of(rng, *shape: int) -> np.ndarray:
    """Draw pairs in which every row of text sees a medium."""
    pairs = rng.random(shape) < 0.5
    pairs[..., 0] |= ~pairs.any(axis=-1)
    return pairs


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1)])
def test_mllama(peer, rng, heads, kv_heads):
    """All text sees all media, some of them, some of their elements."""
    module = in_float64(mllama(heads=heads, kv_heads=kv_heads))
    told = {"differences": [FLOAT32_INSIDE, CAUSAL, LEAKING]}
    for batch, n, count, m in SIZES:
        x, media = draw(rng, batch, n, 16), draw(rng, batch, count, m, 16)
        pairs, mask = pairs_of(rng, batch, n, count), rng.random((batch, count, m)) < 0.7
        mask[..., 0] = True
        for masks in {}, {"pair_mask": pairs}, {"pair_mask": pairs, "mask": mask}:
            peer("mllama-gated", module, of_mllama, x, media, masks=masks, **told)
    config = {"text_config": {"rms_norm_eps": 1e-5, "hidden_act": "silu"}}
    prefix = setattn.layouts()["mllama-gated"].prefix
    peer("mllama-gated", module, of_mllama, x, media, config=config, prefix=prefix)


def loaded(module: torch.nn.Module, layout: str, **options) -> setattn.Block:
    redraw(module)
    return setattn.load(module.state_dict(), layout, **options)


def test_mllama_eager(rng):
    """The default way of the original, float32 inside, agrees as far as float32 goes."""
    module = mllama("eager")
    block = loaded(module, "mllama-gated")
    x, media = torch.from_numpy(draw(rng, 2, 7, 16)), torch.from_numpy(draw(rng, 2, 3, 5, 16))
    pairs = torch.from_numpy(pairs_of(rng, 2, 7, 3))
    with torch.no_grad():
        original = of_mllama(module, x, media, pairs)
        torch.testing.assert_close(block(x, media, pair_mask=pairs), original, rtol=0, atol=1e-5)


def test_mllama_leaks_into_text_that_sees_nothing(rng):
    """In the original such text attends to every medium; in the block it stays as it is, and all else agrees."""
    module = in_float64(mllama())
    block = loaded(module, "mllama-gated")
    x, media = torch.from_numpy(draw(rng, 2, 7, 16)), torch.from_numpy(draw(rng, 2, 3, 5, 16))
    pairs = torch.from_numpy(pairs_of(rng, 2, 7, 3))
    pairs[0, :3] = False
    blind = ~pairs.any(dim=-1)
    with torch.no_grad():
        original, ours = of_mllama(module, x, media, pairs), block(x, media, pair_mask=pairs)
        attended = (
            x
            + module.cross_attn_attn_gate.tanh()
            * module.cross_attn(
                module.input_layernorm(x), media.flatten(1, 2), attention_mask=torch.zeros(2, 1, 7, 15, dtype=x.dtype)
            )[0]
        )
    torch.testing.assert_close(original[~blind], ours[~blind], rtol=0, atol=1e-12)
    torch.testing.assert_close(original[blind], attended[blind], rtol=0, atol=1e-12)
    assert torch.equal(ours[blind], x[blind])
    assert (original[blind] - ours[blind]).abs().amax() > 0.01


def test_mllama_is_causal_without_a_mask(rng):
    """Under sdpa, a layer that is given no mask lets row i see the first i elements alone; the block sees all."""
    module = in_float64(mllama())
    block = loaded(module, "mllama-gated")
    x, media = torch.from_numpy(draw(rng, 1, 4, 16)), torch.from_numpy(draw(rng, 1, 1, 4, 16))
    with torch.no_grad():
        original = module(x, media.flatten(1, 2), None, None, None)
        causal = torch.tril(torch.ones(4, 4, dtype=torch.bool))[None]
        each = block(x, media.reshape(1, 4, 1, 16), pair_mask=causal)
        torch.testing.assert_close(original, each, rtol=0, atol=1e-12)
        assert (block(x, media) - original).abs().amax() > 0.01


def idefics(attention: str = "sdpa", **changed) -> torch.nn.Module:
    from transformers.models.idefics.configuration_idefics import IdeficsConfig

    config = IdeficsConfig(
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=20,
        vocab_size=8,
        vision_config={"embed_dim": 12},
        **changed,
    )
    config._attn_implementation = attention
    return originals.transformers("idefics.modeling_idefics", "IdeficsGatedCrossAttentionLayer")(config, 0)


def of_idefics(m, x, media, pair_mask=None, mask=None):
    pairs = np.ones((*x.shape[:-1], media.shape[1]), bool) if pair_mask is None else pair_mask.numpy()
    sees = torch.from_numpy(seen(media, pairs, None if mask is None else mask.numpy()))
    return m(
        x,
        image_hidden_states=media.flatten(1, 2),
        image_attention_mask=additive(sees, x.dtype),
        cross_attention_gate=sees.any(dim=-1).to(x.dtype),
    )


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("alpha", ["float", "vector"])
def test_idefics(peer, rng, alpha, norms):
    """Gates of one number and of one for each feature, norms of queries and keys; text that sees nothing among it."""
    module = in_float64(idefics(alpha_type=alpha, qk_layer_norms=norms))
    told = {"options": {"num_heads": 4}, "differences": [FLOAT32_INSIDE]}
    for batch, n, count, m in SIZES:
        x, media = draw(rng, batch, n, 16), draw(rng, batch, count, m, 12)
        mask, pairs = rng.random((batch, count, m)) < 0.7, rng.random((batch, n, count)) < 0.5
        pairs[0, 2:4] = False
        for masks in {}, {"pair_mask": pairs}, {"pair_mask": pairs, "mask": mask}:
            peer("idefics-gated", module, of_idefics, x, media, masks=masks, **told)
    config, prefix = {"num_attention_heads": 4, "rms_norm_eps": 1e-6}, setattn.layouts()["idefics-gated"].prefix
    peer("idefics-gated", module, of_idefics, x, media, config=config, prefix=prefix)


def test_idefics_eager(rng):
    """The default way of the original, float32 inside, agrees as far as float32 goes."""
    module = idefics("eager", alpha_type="vector", qk_layer_norms=True)
    block = loaded(module, "idefics-gated", num_heads=4)
    x, media = torch.from_numpy(draw(rng, 2, 7, 16)), torch.from_numpy(draw(rng, 2, 3, 5, 12))
    pairs = torch.from_numpy(rng.random((2, 7, 3)) < 0.5)
    with torch.no_grad():
        original = of_idefics(module, x, media, pairs)
        torch.testing.assert_close(block(x, media, pair_mask=pairs), original, rtol=0, atol=1e-5)
