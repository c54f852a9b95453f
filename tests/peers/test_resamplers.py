"""Resamplers: IP-Adapter's, Flamingo's, and those of Evolla, Idefics and Idefics2 in transformers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import originals
import pytest
import torch
from harness import draw, redraw, some
from torch.overrides import TorchFunctionMode

import setattn

LEAK = "what a mask hides reaches the result where it is not finite"
FLOAT32 = "calculates {} in float32, whatever the dtype; in float64 for this comparison"


class InFloat64(TorchFunctionMode):
    """Calculates in float64 what code asks for in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(a):
            return torch.float64 if a is torch.float32 else a

        kwargs = {key: widened(a) for key, a in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*map(widened, args), **kwargs)


# --- IP-Adapter -----------------------------------------------------------------------------------------------------

SHAPES = [(2, 9), (1, 1), (3, 2)]


def ip_adapter(**changed):
    sizes = {"dim": 12, "depth": 2, "dim_head": 4, "heads": 3, "num_queries": 5, "embedding_dim": 7, "output_dim": 10}
    return originals.ip_adapter()(**(sizes | {"ff_mult": 2, "max_seq_len": 9} | changed))


def in_float64(m, x):
    with InFloat64():
        return m(x)


@pytest.mark.parametrize("mean", [0, 1, 3])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ip_adapter(peer, rng, shape, positions, mean):
    module = ip_adapter(apply_pos_emb=positions, num_latents_mean_pooled=mean)
    peer(
        "ip-adapter",
        module,
        in_float64,
        draw(rng, *shape, 7),
        options={"head_dim": 4},
        differences=(FLOAT32.format("softmax"), "takes no mask"),
        package="ip-adapter",
        title="Resampler",
    )


def test_ip_adapter_in_its_file(peer, rng):
    """As published: heads 64 wide, under the name of the part of the file."""
    module = ip_adapter(dim_head=64, heads=2, depth=1)
    peer("ip-adapter", module, in_float64, draw(rng, 2, 4, 7), prefix="image_proj.", package="ip-adapter")


@pytest.mark.parametrize("shape", SHAPES)
def test_ip_adapter_of_diffusers(peer, rng, shape):
    sizes = {"embed_dims": 7, "output_dims": 10, "hidden_dims": 12, "depth": 2, "dim_head": 4, "heads": 3}
    module = originals.diffusers()(**sizes, num_queries=5, ffn_ratio=2)
    peer(
        "ip-adapter-diffusers",
        module,
        lambda m, x: m(x),
        draw(rng, *shape, 7),
        options={"head_dim": 4},
        differences=("takes no mask",),
    )


def test_face_id_adapters_are_refused():
    """Their latents are made of the embedding of a face: the message says so, rather than list what is missing."""
    module = originals.diffusers("IPAdapterFaceIDPlusImageProjection")(
        embed_dims=8, output_dims=8, hidden_dims=12, id_embeddings_dim=4, depth=1, dim_head=4, heads=2, num_tokens=2
    )
    for layout in ("ip-adapter-diffusers", None):
        with pytest.raises(setattn.CheckpointError, match="learned latents, as those of a FaceID Plus adapter"):
            setattn.load(module.state_dict(), layout, head_dim=4)


# --- Flamingo -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 4, 1), (2, 1, 5)])
def test_flamingo(peer, rng, shape):
    resampler = originals.flamingo_lucidrains("PerceiverResampler")
    module = resampler(dim=12, depth=2, dim_head=4, heads=3, num_latents=5, num_media_embeds=4, ff_mult=2)
    peer(
        "flamingo",
        module,
        lambda m, x: m(x),
        draw(rng, *shape, 12),
        options={"head_dim": 4},
        differences=("takes no mask",),
    )


@pytest.mark.parametrize("prefix", ["", "perceiver."])
@pytest.mark.parametrize("media", [None, 4])
@pytest.mark.parametrize("frames", [None, 6])
def test_open_flamingo(peer, rng, frames, media, prefix):
    """The original always has axes of media and frames; without an embedding, the first is an axis of the batch here.

    The elements of all frames are one axis where there are no embeddings of frames.
    """
    resampler = originals.open_flamingo("PerceiverResampler")
    sizes = {"dim": 12, "depth": 2, "dim_head": 4, "heads": 3, "num_latents": 5, "ff_mult": 2}
    module = resampler(**sizes, max_num_media=media, max_num_frames=frames)
    for b, t, f, v in ((2, 3, 2, 4), (1, 1, 5, 1)):
        x = draw(rng, b, t, f, v, 12)
        peer(
            "open-flamingo",
            module,
            lambda m, x, whole=x.shape: m(x.reshape(whole)),
            x if frames else x.reshape(b, t, f * v, 12),
            options={"head_dim": 4},
            prefix=prefix,
            differences=("takes no mask",),
        )


# --- transformers ---------------------------------------------------------------------------------------------------


def evolla():
    sizes = {"resampler_depth": 2, "resampler_dim_head": 4, "resampler_heads": 3, "resampler_num_latents": 5}
    config = SimpleNamespace(
        protein_encoder_config=SimpleNamespace(hidden_size=12), hidden_size=10, resampler_ff_mult=2, **sizes
    )
    return originals.transformers("evolla.modeling_evolla", "EvollaSequenceCompressorResampler")(config)


@pytest.mark.parametrize("prefix", ["", "model.protein_encoder.sequence_compressor_resampler."])
@pytest.mark.parametrize("masked", ["all", "some", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_evolla(peer, rng, shape, masked, prefix):
    mask = {"all": np.ones(shape, bool), "some": some(rng, *shape), "none": np.zeros(shape, bool)}[masked]
    peer(
        "evolla",
        evolla(),
        lambda m, x, mask: m(x, mask.double()),
        draw(rng, *shape, 12),
        masks={"mask": mask},
        config={"resampler_dim_head": 4},
        prefix=prefix,
        differences=(LEAK,),
    )


@pytest.mark.parametrize("prefix", ["", "model.perceiver_resampler."])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_idefics(peer, rng, shape, head_norms, prefix):
    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=head_norms),
        vision_config=SimpleNamespace(embed_dim=12),
    )
    resampler = originals.transformers("idefics.perceiver", "IdeficsPerceiverResampler")
    peer(
        "idefics",
        resampler(config, embed_dim=12, depth=2, n_heads=3, head_dim=4, n_latents=5),
        lambda m, x: m(x),
        draw(rng, *shape, 12),
        config={"perceiver_config": {"resampler_head_dim": 4}},
        prefix=prefix,
        differences=("takes no mask",),
    )


def idefics2_config(**changed):
    perceiver = {"hidden_size": 12, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 4, "num_key_value_heads": 2, **changed}
    config = originals.transformers("idefics2.configuration_idefics2", "Idefics2Config")(
        perceiver_config=perceiver,
        text_config={"model_type": "mistral", "hidden_size": 12, "intermediate_size": 9},
        vision_config={"hidden_size": 7},
    )
    config.perceiver_config._attn_implementation = "eager"
    return config


def resampled(m, x, mask=None):
    mask = torch.ones(x.shape[:-1], dtype=torch.long) if mask is None else mask.long()
    with InFloat64():
        return m(x, mask)


IDEFICS2 = (FLOAT32.format("norms and softmax"), LEAK)


@pytest.mark.parametrize("prefix", ["", "model.connector.perceiver_resampler."])
@pytest.mark.parametrize("masked", ["", "all", "some", "none"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_idefics2(peer, rng, key_heads, masked, prefix):
    config = idefics2_config(num_key_value_heads=key_heads, rms_norm_eps=1e-4)
    module = originals.transformers("idefics2.modeling_idefics2", "Idefics2PerceiverResampler")(config.perceiver_config)
    masks = {"all": np.ones((4, 9), bool), "some": some(rng, 4, 9), "none": np.zeros((4, 9), bool)}
    peer(
        "idefics2",
        module,
        resampled,
        draw(rng, 4, 9, 12),
        masks={"mask": masks[masked]} if masked else {},
        config={"perceiver_config": config.perceiver_config.to_dict()},
        prefix=prefix,
        differences=IDEFICS2,
    )


@pytest.mark.parametrize("prefix", ["", "model.connector."])
@pytest.mark.parametrize("masked", [False, True])
def test_idefics2_with_its_projection(peer, rng, masked, prefix):
    config = idefics2_config()
    module = originals.transformers("idefics2.modeling_idefics2", "Idefics2Connector")(config)
    peer(
        "idefics2",
        module,
        resampled,
        draw(rng, 4, 9, 7),
        masks={"mask": some(rng, 4, 9)} if masked else {},
        config=config.to_dict(),
        prefix=prefix,
        differences=IDEFICS2,
    )


@pytest.mark.parametrize("name", ["evolla", "idefics2"])
def test_hidden_elements_that_are_not_finite(rng, name):
    """What the table says of a mask: the originals multiply what it hides by 0."""
    if name == "evolla":
        module = evolla()
    else:
        resampler = originals.transformers("idefics2.modeling_idefics2", "Idefics2PerceiverResampler")
        module = resampler(idefics2_config().perceiver_config)
    redraw(module)
    x, mask = draw(rng, 2, 9, 12), some(rng, 2, 9)
    x[~mask] = np.nan
    block = setattn.load(dict(module.state_dict()), name, xp=np, head_dim=4)
    assert np.isfinite(block(x, mask=mask)).all()
    with torch.no_grad():
        theirs = module(torch.from_numpy(x), torch.from_numpy(mask).double())
    assert not torch.isfinite(theirs).any()


def test_float32_inside_is_float32(rng):
    """What the table says of Idefics2: without help, its float64 is no better than float32."""
    config = idefics2_config()
    module = originals.transformers("idefics2.modeling_idefics2", "Idefics2PerceiverResampler")(config.perceiver_config)
    redraw(module)
    x = torch.from_numpy(draw(rng, 2, 9, 12))
    with torch.no_grad():
        error = (module(x, torch.ones(2, 9, dtype=torch.long)) - resampled(module, x)).abs().max()
    assert 1e-9 < error < 1e-4
