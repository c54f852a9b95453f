"""Perceiver and Perceiver IO of transformers, whole: language, images, optical flow, and the encoder alone."""

from __future__ import annotations

import numpy as np
import originals
import pytest
import torch
from harness import draw, redraw, some

import setattn

LAYOUT = "perceiver"
DIFFERENCES = (
    "a set without elements that take part: the mean of the masked ones, where the library adds nothing",
    "Fourier features are calculated in float32",
    "classes are one row of output instead of a set of one",
)
SIZES = {
    "num_latents": 5,
    "d_latents": 16,
    "d_model": 12,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "num_labels": 6,
    "_attn_implementation": "eager",
}


def get(name):
    return originals.transformers("perceiver.modeling_perceiver", name)


def config(**changed):
    return originals.transformers("perceiver.configuration_perceiver", "PerceiverConfig")(**(SIZES | changed))


def file(c):
    """A configuration as it is published beside the weights."""
    return c.to_dict()


def in_float64(call):
    """Have the original calculate its Fourier features as it calculates all else."""

    def double(*arrays, **masks):
        torch.set_default_dtype(torch.float64)
        try:
            return call(*arrays, **masks)
        finally:
            torch.set_default_dtype(torch.float32)

    return double


@pytest.mark.parametrize(
    "changed", [{}, {"num_blocks": 3}, {"qk_channels": 8, "v_channels": 16}, {"hidden_act": "relu"}]
)
def test_encoder(peer, rng, changed):
    c = config(**changed)
    module = get("PerceiverModel")(c)
    x, masks = draw(rng, 3, 7, 12), {"mask": some(rng, 3, 7)}
    call = lambda m, x, mask=None: m(x, attention_mask=mask).last_hidden_state  # noqa: E731, in one line
    peer(LAYOUT, module, call, x, config=file(c), differences=DIFFERENCES)
    peer(LAYOUT, module, call, x, masks=masks, config=file(c))


def test_widening_and_no_residual(peer, rng):
    c = config(cross_attention_widening_factor=2, self_attention_widening_factor=3, use_query_residual=False)
    module = get("PerceiverModel")(c)
    peer(LAYOUT, module, lambda m, x: m(x).last_hidden_state, draw(rng, 2, 4, 12), config=file(c))


def texts(**changed):
    # The decoder's heads are 8 in the original, whatever the configuration says.
    c = config(d_model=16, vocab_size=9, max_position_embeddings=7, **changed)
    return get("PerceiverForMaskedLM")(c), file(c)


@pytest.mark.parametrize("n", [7, 4, 1])
def test_language(peer, rng, n):
    module, c = texts()
    x, masks = rng.integers(0, 9, (3, n)), {"mask": some(rng, 3, n)} if n > 1 else {}
    peer(LAYOUT, module, lambda m, x, mask=None: m(x, attention_mask=mask).logits, x, masks=masks, config=c)


def test_language_published_sizes(peer, rng):
    """Eight blocks are one in the published model; here are two, and other widths of keys and values."""
    module, c = texts(num_blocks=2, qk_channels=8, v_channels=16)
    peer(LAYOUT, module, lambda m, x: m(x).logits, rng.integers(0, 9, (2, 5)), config=c)


def test_text_classes(peer, rng):
    c = config(vocab_size=9, max_position_embeddings=7)
    module = get("PerceiverForSequenceClassification")(c)
    x, masks = rng.integers(0, 9, (3, 7)), {"mask": some(rng, 3, 7)}
    call = lambda m, x, mask: m(x, attention_mask=mask).logits[:, None]  # noqa: E731, in one line
    peer(LAYOUT, module, call, x, masks=masks, config=file(c))


def image(x, height, width):
    """Bring pixels in a row into the form of an image."""
    return x.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)


def test_learned_positions(peer, rng):
    c = config(image_size=4, num_blocks=2)
    module = get("PerceiverForImageClassificationLearned")(c)
    call = lambda m, x, mask=None: m(image(x, 4, 4), attention_mask=mask).logits[:, None]  # noqa: E731, in one line
    x, masks = draw(rng, 2, 16, 3), {"mask": some(rng, 2, 16)}
    peer(LAYOUT, module, call, x, config=file(c))
    peer(LAYOUT, module, call, x, masks=masks, config=file(c))


@pytest.mark.parametrize(("height", "width"), [(5, 9), (1, 3)])
def test_fourier_positions(peer, rng, height, width):
    """Places that float32 holds, as which the original keeps them whatever it calculates in."""
    c = config(num_blocks=2, num_cross_attention_heads=1)
    module = get("PerceiverForImageClassificationFourier")(c)
    call = in_float64(lambda m, x, mask=None: m(image(x, height, width), attention_mask=mask).logits[:, None])
    x, masks = draw(rng, 2, height * width, 3), {"mask": some(rng, 2, height * width)}
    options = {"height": height, "width": width}
    peer(LAYOUT, module, call, x, config=file(c), options=options, differences=DIFFERENCES)
    peer(LAYOUT, module, call, x, masks=masks, config=file(c), options=options)


def convolved(m, x, mask=None):
    """Call the model behind its convolution, whose output is given."""
    prepare = m.perceiver.input_preprocessor
    prepare.convnet.forward = lambda _: image(x, 3, 5)
    try:
        return m(torch.zeros(2, 3, 1, 1), attention_mask=mask).logits[:, None]
    finally:
        del prepare.convnet.forward


def test_convolution(peer, rng):
    """The block begins after the convolution, whose output it is given."""
    c = config(num_cross_attention_heads=1)
    module = get("PerceiverForImageClassificationConvProcessing")(c)
    x, options = draw(rng, 2, 15, 64), {"height": 3, "width": 5}
    difference = ("the convolution: the block is given its output",)
    peer(
        LAYOUT,
        module,
        in_float64(convolved),
        x,
        config=file(c),
        options=options,
        differences=difference,
    )


def test_flow(peer, rng):
    """Patches of two frames in a row; the features of the inputs are the queries, and the flow is divided by 100."""
    c = config(train_size=[3, 5], num_cross_attention_heads=1)
    module = get("PerceiverForOpticalFlow")(c)

    def call(m, x, mask=None):
        frames = x.reshape(-1, 3, 5, 2, 27).permute(0, 3, 4, 1, 2)
        return m(frames, attention_mask=mask).logits.reshape(-1, 15, 2)

    peer(
        LAYOUT,
        module,
        in_float64(call),
        draw(rng, 2, 15, 54),
        config=file(c),
        options={"height": 3, "width": 5},
        differences=("queries that are masked inputs have an output; here it is 0",),
    )


def test_places_in_float32(rng):
    """The difference that the table names: of other places, the original has the features of rounded ones."""
    c = config(num_cross_attention_heads=1)
    module = get("PerceiverForImageClassificationFourier")(c)
    redraw(module)
    block = setattn.load(dict(module.state_dict()), LAYOUT, xp=np, config=file(c), height=4, width=6)
    x = draw(rng, 2, 24, 3)
    with torch.no_grad():
        theirs = module(image(torch.from_numpy(x), 4, 6)).logits[:, None].numpy()
    error = np.abs(block(x) - theirs).max() / np.abs(theirs).max()
    assert 1e-9 < error < 1e-4


def test_a_set_without_elements(rng):
    """The difference that the table names: the original takes the mean of what the mask hides."""
    module, c = texts()
    redraw(module)
    block = setattn.load(dict(module.state_dict()), LAYOUT, xp=np, config=c)
    x, y, mask = rng.integers(0, 9, (2, 7)), rng.integers(0, 9, (2, 7)), np.zeros((2, 7), bool)
    with torch.no_grad():
        theirs = [module(torch.from_numpy(a), attention_mask=torch.from_numpy(mask)).logits.numpy() for a in (x, y)]
    ours = [block(a, mask=mask) for a in (x, y)]
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3
    assert (ours[0] == ours[1]).all()


def test_masked_queries_of_the_flow(rng):
    """The difference that the table names: masked inputs are queries, too, where their output here is 0."""
    c = config(train_size=[2, 3], num_cross_attention_heads=1)
    module = get("PerceiverForOpticalFlow")(c)
    redraw(module)
    block = setattn.load(dict(module.state_dict()), LAYOUT, xp=np, config=file(c), height=2, width=3)
    x, mask = draw(rng, 2, 6, 54), np.array([[True, False, True, True, True, False]] * 2)

    def call(x, mask):
        return module(x.reshape(-1, 2, 3, 2, 27).permute(0, 3, 4, 1, 2), attention_mask=mask).logits.reshape(-1, 6, 2)

    with torch.no_grad():
        theirs = in_float64(call)(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
    ours = block(x, mask=mask)
    assert np.abs(ours - theirs)[mask].max() <= 1e-12 * np.abs(theirs).max()
    assert not ours[~mask].any()
    assert theirs[~mask].all()


def test_several_modalities_are_refused():
    c = config(num_frames=2, image_size=8, audio_samples_per_frame=32, num_cross_attention_heads=1)
    module = get("PerceiverForMultimodalAutoencoding")(c)
    with pytest.raises(setattn.CheckpointError) as error:
        setattn.load(dict(module.state_dict()), LAYOUT, config=file(c))
    wanted = "no model of several modalities, whose inputs are no one set"
    assert str(error.value).endswith(f"the tensors of layout {LAYOUT!r}: {wanted}")
