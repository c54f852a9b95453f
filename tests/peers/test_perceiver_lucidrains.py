"""Perceiver and Perceiver IO of perceiver-pytorch against the package, with the names of tensors of all versions."""

from __future__ import annotations

import re

import numpy as np
import originals
import pytest
import torch
from harness import FLOAT64, draw, redraw, some

import setattn

DIFFERENCES = (
    "a set without elements that take part: the mean of the hidden ones, where the library adds nothing",
    "`inverted_cross_attn=True`, which no tensor tells of, is not computed",
)
SIZES = {
    "num_latents": 5,
    "latent_dim": 12,
    "cross_dim_head": 3,
    "latent_dim_head": 4,
    "cross_heads": 2,
    "latent_heads": 3,
}
HEADS = {"cross_heads": 2, "latent_heads": 3}


def before_0_11(state):
    """Rename to what the tensors were called until version 0.10."""
    return {_renamed(name): a for name, a in state.items()}


def _renamed(name):
    name = name.replace("cross_attend_block.cross_attn", "cross_attend_blocks.0")
    name = name.replace("cross_attend_block.cross_ff", "cross_attend_blocks.1")
    name = re.sub(r"^(layers\.\d+)\.cross_attn", r"\1.0", name)
    name = re.sub(r"^(layers\.\d+)\.cross_ff", r"\1.1", name)
    return re.sub(r"^(layers\.\d+)\.self_attns", r"\1.2", name)


def before_0_11_io(state):
    """Rename those of Perceiver IO, whose layers have one self-attention each."""
    return {re.sub(r"^(layers\.\d+)\.2\.0\.", r"\1.", name): a for name, a in before_0_11(state).items()}


def same(state):
    return state


def title(module, keys):
    """Name the original in the table, and which names of tensors it was compared under."""
    name = type(module).__name__
    return name if keys is same else f"{name}, under its names before 0.11,"


def perceiver(**changed):
    sizes = {"depth": 2, "num_freq_bands": 2, "max_freq": 10.0, "input_channels": 7, "input_axis": 1, "num_classes": 6}
    return originals.perceiver_lucidrains("Perceiver")(**SIZES, **(sizes | {"fourier_encode_data": False} | changed))


def perceiver_io(**changed):
    return originals.perceiver_lucidrains("PerceiverIO")(
        **SIZES, **({"dim": 7, "queries_dim": 8, "depth": 2, "logits_dim": 6} | changed)
    )


@pytest.mark.parametrize("keys", [same, before_0_11])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("depth", "selves", "head"), [(3, 1, True), (1, 2, True), (2, 3, False)])
def test_perceiver(peer, rng, depth, selves, head, tie, keys):
    module = perceiver(depth=depth, self_per_cross_attn=selves, weight_tie_layers=tie, final_classifier_head=head)
    for shape in (3, 9), (2, 1):
        x = draw(rng, *shape, 7)
        told = {"title": title(module, keys), "differences": DIFFERENCES}
        peer("perceiver-lucidrains", module, lambda m, x: m(x), x, keys=keys, options=HEADS, **told)


def test_perceiver_with_a_mask(peer, rng):
    x, mask = draw(rng, 4, 9, 7), some(rng, 4, 9)
    peer(
        "perceiver-lucidrains", perceiver(), lambda m, x, mask: m(x, mask=mask), x, masks={"mask": mask}, options=HEADS
    )


def with_positions(images, num_bands, max_resolution):
    """Lay the features of the places of pixels beside their channels, and the pixels in a row."""
    _, height, width, _ = images.shape
    axes = [np.linspace(-1.0, 1.0, size) for size in (height, width)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    features = setattn.fourier_features(places, num_bands=num_bands, max_resolution=max_resolution, order="per_axis")
    features = np.broadcast_to(features, (*images.shape[:-1], features.shape[-1]))
    return np.concatenate([images, features], axis=-1).reshape(len(images), height * width, -1)


def test_images(rng):
    """The features of places are those that `fourier_features` calls per_axis, behind the channels."""
    module = perceiver(input_channels=3, input_axis=2, fourier_encode_data=True)
    redraw(module)
    images = draw(rng, 2, 4, 5, 3)
    block = setattn.load(dict(module.state_dict()), "perceiver-lucidrains", xp=np, **HEADS)
    wanted = module(torch.from_numpy(images)).detach().numpy()
    actual = block(with_positions(images, 2, 10.0))
    assert np.abs(actual - wanted).max() <= FLOAT64 * np.abs(wanted).max()


@pytest.mark.parametrize("keys", [same, before_0_11_io])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("depth", "logits", "ff"), [(3, 6, False), (1, None, True), (2, 4, True)])
def test_perceiver_io(peer, rng, depth, logits, ff, tie, keys):
    module = perceiver_io(depth=depth, logits_dim=logits, decoder_ff=ff, weight_tie_layers=tie)
    for shape, queries in ((3, 9), (4,)), ((2, 1), (2, 3)):
        x, q = draw(rng, *shape, 7), draw(rng, *queries, 8)
        peer(
            "perceiver-io-lucidrains",
            module,
            lambda m, x, q: m(x, queries=q),
            x,
            q,
            keys=keys,
            options=HEADS,
            title=title(module, keys),
            differences=DIFFERENCES,
        )


def test_perceiver_io_with_a_mask(peer, rng):
    x, q, mask = draw(rng, 4, 9, 7), draw(rng, 4, 8), some(rng, 4, 9)
    peer(
        "perceiver-io-lucidrains",
        perceiver_io(),
        lambda m, x, q, mask: m(x, queries=q, mask=mask),
        x,
        q,
        masks={"mask": mask},
        options=HEADS,
    )


@pytest.mark.parametrize("kept", [1, 2])
def test_tied_layers_that_are_in_the_file_once(peer, rng, kept):
    """With `depth`, the last layer of the file stands for those that are tied to it."""

    def first(state):
        return {name: a for name, a in state.items() if not re.match(rf"layers\.[{kept}-9]", name)}

    options = {**HEADS, "depth": 4}
    x, q = draw(rng, 2, 6, 7), draw(rng, 3, 8)
    io = perceiver_io(depth=4, weight_tie_layers=True)
    peer("perceiver-io-lucidrains", io, lambda m, x, q: m(x, queries=q), x, q, keys=first, options=options)
    if kept == 2:  # the first layer is tied to no other
        module = perceiver(depth=4, weight_tie_layers=True)
        peer("perceiver-lucidrains", module, lambda m, x: m(x), x, keys=first, options=options)


def test_inside_of_a_language_model(peer, rng):
    """The Perceiver IO of `PerceiverLM` is found under its prefix; the inputs are the queries."""
    module = perceiver_io(queries_dim=7, logits_dim=9)
    x = draw(rng, 2, 6, 7)
    peer(
        "perceiver-io-lucidrains",
        module,
        lambda m, x, q: m(x, queries=q),
        x,
        x,
        prefix="perceiver_io.",
        options=HEADS,
    )


def test_a_set_without_elements(rng):
    """The difference that the table names: the original takes the mean of what the mask hides."""
    module = perceiver(depth=1)
    redraw(module)
    x, y, mask = draw(rng, 2, 5, 7), draw(rng, 2, 5, 7), np.zeros((2, 5), bool)
    block = setattn.load(dict(module.state_dict()), "perceiver-lucidrains", xp=np, **HEADS)
    with torch.no_grad():
        theirs = [module(torch.from_numpy(a), mask=torch.from_numpy(mask)).numpy() for a in (x, y)]
    ours = [block(a, mask=mask) for a in (x, y)]
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3
    assert (ours[0] == ours[1]).all()
    assert np.isfinite(ours[0]).all()


def test_attention_residuals_are_refused():
    state = dict(perceiver(attn_residual=True).state_dict())
    with pytest.raises(setattn.CheckpointError, match=r"layout 'perceiver-lucidrains': no attention over the outputs"):
        setattn.load(state, "perceiver-lucidrains", **HEADS)
