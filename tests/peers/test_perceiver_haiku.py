"""DeepMind's own trees of Haiku: the models of transformers, into which they were once converted, under their names.

What the authors published is not a package. Their weights became those of transformers by a change of names and by
turning every kernel round; here both are undone, and the activation is theirs, GELU's tanh form.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from harness import draw, some
from test_perceiver import config, convolved, file, get, image, in_float64

LAYOUT = "perceiver-haiku"
DIFFERENCES = ("Fourier features are calculated in float32", "classes are one row of output instead of a set of one")
ACTIVATION = {"hidden_act": "gelu_pytorch_tanh"}
OPTIONS = {"num_self_attention_heads": 4, "num_cross_attention_heads": 2}

# In the order in which they are tried; the numbers of self-attentions are put in afterwards.
NAMES = (
    (r"^perceiver\.input_preprocessor\.embeddings\.weight$", "embed/embeddings"),
    (r"^perceiver\.input_preprocessor\.position_embeddings\.weight$", "trainable_position_encoding/pos_embs"),
    (r"^embedding_decoder\.bias$", "embedding_decoder/bias"),
    (r"^perceiver\.input_preprocessor\.convnet_1x1\.", "image_preprocessor/~/conv2_d/"),
    (
        r"^perceiver\.input_preprocessor\.position_embeddings\.position_embeddings$",
        "image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs",
    ),
    (
        r"^perceiver\.input_preprocessor\.positions_projection\.",
        "image_preprocessor/~_build_network_inputs/position_encoding_projector/linear/",
    ),
    (r"^perceiver\.input_preprocessor\.conv_after_patches\.", "image_preprocessor/patches_linear/"),
    (r"^perceiver\.input_preprocessor\.convnet\.", "image_preprocessor/~/conv2_d_downsample/~/"),
    (r"batchnorm\.running_(mean|var)$", r"batchnorm/~/\1_ema/average"),
    (r"batchnorm\.num_batches_tracked$", "batchnorm/~/mean_ema/counter"),
    (r"^perceiver\.embeddings\.latents$", "perceiver_encoder/~/trainable_position_encoding/pos_embs"),
    (r"^perceiver\.encoder\.cross_attention\.", "perceiver_encoder/~/cross_attention/"),
    (r"^perceiver\.encoder\.self_attends\.0\.", "perceiver_encoder/~/self_attention/"),
    (r"^perceiver\.encoder\.self_attends\.(\d+)\.", r"perceiver_encoder/~/self_attention_\1/"),
    (r"^perceiver\.decoder\.decoder\.decoding_cross_attention\.", "DECODER/~/basic_decoder/cross_attention/"),
    (r"^perceiver\.decoder\.decoder\.final_layer\.", "DECODER/~/basic_decoder/output/"),
    (
        r"^perceiver\.decoder\.decoder\.output_position_encodings\.position_embeddings$",
        "DECODER/~/basic_decoder/~/trainable_position_encoding/pos_embs",
    ),
    (r"^perceiver\.decoder\.decoding_cross_attention\.", "basic_decoder/cross_attention/"),
    (
        r"^perceiver\.decoder\.output_position_encodings\.position_embeddings$",
        "basic_decoder/~/trainable_position_encoding/pos_embs",
    ),
    (r"(cross_attention/)attention\.self\.layernorm1\.", r"\1layer_norm/"),
    (r"(cross_attention/)attention\.self\.layernorm2\.", r"\1layer_norm_1/"),
    (r"(cross_attention/)layernorm\.", r"\1layer_norm_2/"),
    (r"attention\.self\.layernorm1\.", "layer_norm/"),
    (r"layernorm\.", "layer_norm_1/"),
    (r"attention\.self\.query\.", "attention/linear/"),
    (r"attention\.self\.key\.", "attention/linear_1/"),
    (r"attention\.self\.value\.", "attention/linear_2/"),
    (r"attention\.output\.dense\.", "attention/linear_3/"),
    (r"mlp\.dense1\.", "mlp/linear/"),
    (r"mlp\.dense2\.", "mlp/linear_1/"),
    (r"(layer_norm(_\d)?|batchnorm)[./]weight$", r"\1/scale"),
    (r"(layer_norm(_\d)?|batchnorm)[./]bias$", r"\1/offset"),
    (r"(?<!embeddings)[./]weight$", "/w"),
    (r"(?<!embedding_decoder)[./]bias$", "/b"),
)


def haiku(state, decoder="classification_decoder"):
    """Turn a state dict round to what it was converted from."""
    tree = {}
    for name, a in state.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        a = np.moveaxis(a, (0, 1), (-1, -2)) if name.endswith("/w") else a
        tree[name.replace("DECODER", decoder)] = a
    return tree


def flow(state):
    return haiku(state, "flow_decoder")


@pytest.fixture
def peer(peer):
    """The comparison, of which the table is to say what it is one with."""

    def renamed(layout, module, *given, **told):
        return peer(layout, module, *given, title=f"{type(module).__name__}, under the names of the authors,", **told)

    return renamed


@pytest.mark.parametrize("blocks", [1, 2])
def test_language(peer, rng, blocks):
    c = config(d_model=16, vocab_size=9, max_position_embeddings=7, num_blocks=blocks, **ACTIVATION)
    module = get("PerceiverForMaskedLM")(c)
    x, masks = rng.integers(0, 9, (3, 6)), {"mask": some(rng, 3, 6)}
    call = lambda m, x, mask=None: m(x, attention_mask=mask).logits  # noqa: E731, in one line
    options = OPTIONS | {"num_blocks": blocks}
    peer(LAYOUT, module, call, x, keys=haiku, options=options, differences=DIFFERENCES)
    peer(LAYOUT, module, call, x, masks=masks, keys=haiku, options=options)


def test_learned_positions(peer, rng):
    c = config(image_size=4, num_blocks=2, **ACTIVATION)
    module = get("PerceiverForImageClassificationLearned")(c)
    call = lambda m, x, mask: m(image(x, 4, 4), attention_mask=mask).logits[:, None]  # noqa: E731, in one line
    x, masks = draw(rng, 2, 16, 3), {"mask": some(rng, 2, 16)}
    peer(LAYOUT, module, call, x, masks=masks, keys=haiku, config=file(c))


def test_fourier_positions(peer, rng):
    c = config(num_blocks=2, num_cross_attention_heads=1, **ACTIVATION)
    module = get("PerceiverForImageClassificationFourier")(c)
    call = in_float64(lambda m, x: m(image(x, 3, 5)).logits[:, None])
    options = {"height": 3, "width": 5}
    peer(LAYOUT, module, call, draw(rng, 2, 15, 3), keys=haiku, config=file(c), options=options)


def test_convolution(peer, rng):
    """The convolution and its norm are in the file, and the block begins behind them."""
    c = config(num_cross_attention_heads=1, **ACTIVATION)
    module = get("PerceiverForImageClassificationConvProcessing")(c)
    options = {"height": 3, "width": 5}
    call = in_float64(convolved)
    peer(LAYOUT, module, call, draw(rng, 2, 15, 64), keys=haiku, config=file(c), options=options)


def test_flow(peer, rng):
    c = config(train_size=[3, 5], num_cross_attention_heads=1, **ACTIVATION)
    module = get("PerceiverForOpticalFlow")(c)

    def call(m, x):
        return m(x.reshape(-1, 3, 5, 2, 27).permute(0, 3, 4, 1, 2)).logits.reshape(-1, 15, 2)

    options = {"height": 3, "width": 5}
    peer(LAYOUT, module, in_float64(call), draw(rng, 2, 15, 54), keys=flow, config=file(c), options=options)


def test_kernels_are_the_other_way_round():
    """The names of every tensor are those of Haiku, and nothing is lost."""
    module = get("PerceiverForImageClassificationLearned")(config(image_size=2))
    state = {name: a.numpy() for name, a in module.state_dict().items()}
    tree = haiku(state)
    assert len(tree) == len(state)
    assert not any(re.search(r"\.|weight", name) for name in tree)
    assert tree["image_preprocessor/~/conv2_d/w"].shape == (1, 1, 3, 256)
    assert tree["perceiver_encoder/~/cross_attention/attention/linear_1/w"].shape == (512, 512)
    assert torch.equal(
        torch.from_numpy(tree["perceiver_encoder/~/self_attention_1/mlp/linear/w"]),
        module.perceiver.encoder.self_attends[1].mlp.dense1.weight.detach().T,
    )
