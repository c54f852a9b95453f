"""Perceiver IO of perceiver-io against the package, with the names of tensors of its version 0.6 and of later ones."""

from __future__ import annotations

import re
from dataclasses import asdict

import numpy as np
import originals
import pytest
import torch
from harness import draw, redraw, some

import setattn

LAYOUT = "perceiver-io-krasserm"
DIFFERENCES = (
    "a set without elements that take part: the mean of the hidden ones, where the library adds nothing",
    "one row of output instead of a set of one; of texts as many rows as there are tokens",
)
LATER = {
    r"^0\.latent$": "0.latent_provider._query",
    r"^0\.input_adapter\.position_encoding$": "0.input_adapter.position_encoding.position_encoding",
    r"^0\.input_adapter\.pos_encoding$": "0.input_adapter.pos_embedding.weight",
    r"^1\.output_adapter\._output_query$": "1.output_query_provider._query",
}


def version_0_6(state):
    return state


def later(state):
    """Rename to what the tensors of the published models are called."""
    for old, new in LATER.items():
        state = {re.sub(old, new, name): a for name, a in state.items()}
    return state


def model(name, encoder, decoder, **changed):
    """Make a small model and its configuration, as it is published."""
    get = originals.perceiver_krasserm
    kinds = {"ImageClassifier": ("ImageEncoderConfig", "ClassificationDecoderConfig")}
    kinds["MaskedLanguageModel"] = "TextEncoderConfig", "TextDecoderConfig"
    of_encoder, of_decoder = map(get, kinds[name])
    sizes = {
        "num_cross_attention_heads": 1,
        "num_self_attention_heads": 2,
        "num_self_attention_layers_per_block": 2,
        "self_attention_widening_factor": 3,
    }
    config = get("PerceiverConfig")(
        encoder=of_encoder(**(sizes | encoder | changed)),
        decoder=of_decoder(num_cross_attention_heads=2, **decoder),
        num_latents=4,
        num_latent_channels=8,
    )
    return get(name)(config), {"model_config": asdict(config)}


def images(residual=True, **changed):
    decoder = {"num_output_query_channels": 6, "num_classes": 5, "cross_attention_residual": residual}
    return model("ImageClassifier", {"image_shape": (4, 5, 3), "num_frequency_bands": 2}, decoder, **changed)


def texts(tied=True, **changed):
    encoder = {"vocab_size": 9, "max_seq_len": 7, "num_input_channels": 6, "num_self_attention_blocks": 2}
    decoder = {"max_seq_len": 7, "vocab_size": 9, "num_output_query_channels": None if tied else 4}
    return model("MaskedLanguageModel", encoder, decoder, **changed)


@pytest.mark.parametrize("keys", [version_0_6, later])
@pytest.mark.parametrize(
    ("blocks", "crosses", "shared", "first_shared"),
    [(1, 1, False, True), (3, 1, False, True), (2, 2, False, False), (3, 2, False, True), (3, 2, True, False)],
)
def test_images(peer, rng, blocks, crosses, shared, first_shared, keys):
    """Pixels in a row; the features of their places are in the file."""
    module, config = images(
        num_self_attention_blocks=blocks,
        num_cross_attention_layers=crosses,
        first_cross_attention_layer_shared=shared,
        first_self_attention_block_shared=first_shared,
    )
    x = draw(rng, 3, 20, 3)
    peer(
        LAYOUT,
        module,
        lambda m, x: m(x.reshape(-1, 4, 5, 3))[:, None],
        x,
        keys=keys,
        prefix="backend_model.",
        config=config,
        differences=DIFFERENCES,
    )


@pytest.mark.parametrize("keys", [version_0_6, later])
@pytest.mark.parametrize("tied", [True, False])
def test_texts(peer, rng, tied, keys):
    """Tokens with positions; the output layer may be the table of the tokens."""
    module, config = texts(tied)
    given = {"txt_embedding": module.encoder.input_adapter.txt_embedding} if tied else {}
    for n in 7, 5, 1:
        x = rng.integers(0, 9, (2, n))
        call = lambda m, x: m.decoder(m.encoder(x), **given)  # noqa: E731, in one line
        peer(LAYOUT, module, call, x, keys=keys, prefix="backend_model.", config=config)
        with torch.no_grad():
            assert (module(torch.from_numpy(x)) == call(module, torch.from_numpy(x))[:, :n]).all()
    mask = some(rng, 3, 7)
    x = rng.integers(0, 9, (3, 7))
    options = {
        "num_cross_attention_heads": 1,
        "num_self_attention_heads": 2,
        "num_decoder_attention_heads": 2,
        "num_self_attention_blocks": 2,
    }
    peer(LAYOUT, module, lambda m, x, mask: m(x, pad_mask=~mask), x, masks={"mask": mask}, keys=keys, options=options)


@pytest.mark.parametrize("residual", [True, False])
def test_sets(peer, rng, residual):
    """A set that needs no adapter, widths of scores and values that differ, a decoder without a residual connection."""
    get = originals.perceiver_krasserm

    class Same(get("InputAdapter")):
        def forward(self, x):
            return x

    class Rows(get("OutputAdapter")):
        def forward(self, x):
            return x

    encoder = get("PerceiverEncoder")(
        Same(6),
        num_latents=5,
        num_latent_channels=8,
        num_cross_attention_heads=2,
        num_cross_attention_qk_channels=10,
        num_cross_attention_v_channels=4,
        num_self_attention_heads=4,
        num_self_attention_qk_channels=12,
        num_self_attention_v_channels=20,
        num_self_attention_layers_per_block=2,
        num_self_attention_blocks=2,
        cross_attention_widening_factor=2,
    )
    decoder = get("PerceiverDecoder")(
        Rows(torch.empty(3, 9), 0.02),
        num_latent_channels=8,
        num_cross_attention_heads=3,
        num_cross_attention_qk_channels=6,
        num_cross_attention_v_channels=15,
        cross_attention_widening_factor=3,
        cross_attention_residual=residual,
    )
    module = get("PerceiverIO")(encoder, decoder)
    heads = dict(zip(("cross", "self", "decoder"), (2, 4, 3), strict=True))
    options = {f"num_{kind}_attention_heads": number for kind, number in heads.items()}
    options["num_self_attention_blocks"] = 2
    for shape in (2, 7), (3, 1):
        peer(LAYOUT, module, lambda m, x: m(x), draw(rng, *shape, 6), options=options)
    masks = {"mask": some(rng, 2, 7)}
    x = draw(rng, 2, 7, 6)
    block = peer(LAYOUT, module, lambda m, x, mask: m[1](m[0](x, pad_mask=~mask)), x, masks=masks, options=options)
    assert block.options["decoder_residual"] is residual
    # Queries of a call come before the learned ones.
    queries = draw(rng, 4, 9)
    module[1].output_adapter._output_query = torch.nn.Parameter(torch.from_numpy(queries))
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    assert np.abs(block(x, queries) - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_a_set_without_elements(rng):
    """The difference that the table names: the original takes the mean of what the mask hides."""
    module, config = texts()
    redraw(module)
    block = setattn.load(dict(module.state_dict()), LAYOUT, xp=np, config=config)
    x, y, mask = rng.integers(0, 9, (2, 7)), rng.integers(0, 9, (2, 7)), np.zeros((2, 7), bool)
    with torch.no_grad():
        theirs = [module(torch.from_numpy(a), pad_mask=torch.from_numpy(~mask)).numpy() for a in (x, y)]
    ours = [block(a, mask=mask) for a in (x, y)]
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3
    assert (ours[0] == ours[1]).all()


def test_causal_models_are_refused():
    get = originals.perceiver_krasserm
    sizes = {"vocab_size": 9, "max_seq_len": 6, "num_latents": 2, "num_channels": 8, "num_heads": 2}
    module = get("CausalLanguageModel")(get("CausalLanguageModelConfig")(**sizes, num_self_attention_layers=1))
    options = dict.fromkeys(("num_cross_attention_heads", "num_self_attention_heads", "num_self_attention_blocks"), 2)
    with pytest.raises(setattn.CheckpointError) as error:
        setattn.load(dict(module.state_dict()), LAYOUT, **options, num_decoder_attention_heads=2)
    wanted = "no Perceiver AR, whose causal attention and rotary positions no function here has"
    assert str(error.value).endswith(f"the tensors of layout {LAYOUT!r}: {wanted}")
