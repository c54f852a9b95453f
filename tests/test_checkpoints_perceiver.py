"""The layouts of DeepMind's Perceivers, without the originals: names by hand, what the weights say by plain products.

The comparisons with transformers itself are in tests/peers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError

LATENTS, DIM, VOCABULARY, ROWS, WIDTH = 3, 8, 9, 6, 4
HEADS = {"num_self_attention_heads": 4, "num_cross_attention_heads": 2, "num_decoder_attention_heads": 2}
TEXT, IMAGE, FLOW = "text", "image", "flow"
LAYOUTS = ("perceiver", "perceiver-haiku")

# The parts of a layer: norms of the queries, the context and the network, its two maps, queries, keys, values, output.
TRANSFORMERS = (
    "attention.self.layernorm1",
    "attention.self.layernorm2",
    "layernorm",
    "mlp.dense1",
    "mlp.dense2",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
HAIKU_CROSS = (
    "layer_norm",
    "layer_norm_1",
    "layer_norm_2",
    "mlp/linear",
    "mlp/linear_1",
    "attention/linear",
    "attention/linear_1",
    "attention/linear_2",
    "attention/linear_3",
)
HAIKU_SELF = ("layer_norm", "", "layer_norm_1", *HAIKU_CROSS[3:])

PLACES = {
    "perceiver": {
        "latents": "perceiver.embeddings.latents",
        "cross": "perceiver.encoder.cross_attention.",
        "self 0": "perceiver.encoder.self_attends.0.",
        "self 1": "perceiver.encoder.self_attends.1.",
        "tokens": "perceiver.input_preprocessor.embeddings.weight",
        "rows": "perceiver.input_preprocessor.position_embeddings.weight",
        "bias": "embedding_decoder.bias",
        "decoder text": "perceiver.decoder.decoding_cross_attention.",
        "queries text": "perceiver.decoder.output_position_encodings.position_embeddings",
        "pixels": "perceiver.input_preprocessor.convnet_1x1",
        "places": "perceiver.input_preprocessor.position_embeddings.position_embeddings",
        "project": "perceiver.input_preprocessor.positions_projection",
        "decoder image": "perceiver.decoder.decoder.decoding_cross_attention.",
        "queries image": "perceiver.decoder.decoder.output_position_encodings.position_embeddings",
        "output image": "perceiver.decoder.decoder.final_layer",
        "patches": "perceiver.input_preprocessor.conv_after_patches",
        "decoder flow": "perceiver.decoder.decoder.decoding_cross_attention.",
        "output flow": "perceiver.decoder.decoder.final_layer",
    },
    "perceiver-haiku": {
        "latents": "perceiver_encoder/~/trainable_position_encoding/pos_embs",
        "cross": "perceiver_encoder/~/cross_attention/",
        "self 0": "perceiver_encoder/~/self_attention/",
        "self 1": "perceiver_encoder/~/self_attention_1/",
        "tokens": "embed/embeddings",
        "rows": "trainable_position_encoding/pos_embs",
        "bias": "embedding_decoder/bias",
        "decoder text": "basic_decoder/cross_attention/",
        "queries text": "basic_decoder/~/trainable_position_encoding/pos_embs",
        "pixels": "image_preprocessor/~/conv2_d",
        "places": "image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs",
        "project": "image_preprocessor/~_build_network_inputs/position_encoding_projector/linear",
        "decoder image": "classification_decoder/~/basic_decoder/cross_attention/",
        "queries image": "classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs",
        "output image": "classification_decoder/~/basic_decoder/output",
        "patches": "image_preprocessor/patches_linear",
        "decoder flow": "flow_decoder/~/basic_decoder/cross_attention/",
        "output flow": "flow_decoder/~/basic_decoder/output",
    },
}


class Model:
    """A small model: its tensors as a file has them, and what they say."""

    def __init__(self, layout, kind):
        self.torch, self.kind, self.names = layout == "perceiver", kind, PLACES[layout]
        self.rng, self.tensors, self.layers, self.maps = np.random.default_rng(3), {}, {}, {}
        n = self.names
        width = {TEXT: WIDTH, IMAGE: 5 + 6, FLOW: 5 + 258}[kind]
        self.tables = {"latents": self.put(n["latents"], LATENTS, DIM)}
        self.layer("cross", n["cross"], DIM, width)
        self.layer("self 0", n["self 0"], DIM, DIM)
        self.layer("self 1", n["self 1"], DIM, DIM)
        queries = {TEXT: WIDTH, IMAGE: DIM, FLOW: width}[kind]
        self.layer("decoder", n[f"decoder {kind}"], queries, DIM)
        if kind == TEXT:
            self.tables["tokens"] = self.put(n["tokens"], VOCABULARY, WIDTH)
            self.tables["rows"] = self.put(n["rows"], ROWS, WIDTH)
            self.tables["bias"] = self.put(n["bias"], VOCABULARY)
            self.tables["queries"] = self.put(n["queries text"], ROWS, queries)
        elif kind == IMAGE:
            self.map("pixels", n["pixels"], 3, 5)
            w = f"{n['pixels']}{'.weight' if self.torch else '/w'}"
            self.tensors[w] = self.tensors[w][:, :, None, None] if self.torch else self.tensors[w][None, None]
            self.tables["places"] = self.put(n["places"], 4, 7)
            self.map("project", n["project"], 7, 6)
            self.tables["queries"] = self.put(n["queries image"], 1, queries)
            self.map("output", n["output image"], queries, 10)
        else:
            self.map("pixels", n["patches"], 54, 5)
            self.map("output", n["output flow"], queries, 2)

    def put(self, name, *shape):
        self.tensors[name] = self.rng.normal(size=shape)
        return self.tensors[name]

    def map(self, key, name, inputs, outputs):
        w, b = (".weight", ".bias") if self.torch else ("/w", "/b")
        weight = self.put(name + w, *((outputs, inputs) if self.torch else (inputs, outputs)))
        self.maps[key] = weight.T if self.torch else weight, self.put(name + b, outputs)

    def layer(self, key, place, q, kv):
        cross = key in ("cross", "decoder")
        names = TRANSFORMERS if self.torch else HAIKU_CROSS if cross else HAIKU_SELF
        for i, width in enumerate((q, kv, q)):
            if i != 1 or cross:
                scale, shift = (".weight", ".bias") if self.torch else ("/scale", "/offset")
                parts = [self.put(place + names[i] + end, width) for end in (scale, shift)]
                self.layers[key, i] = parts
        scores, values = 8, 12
        sizes = ((q, 16), (16, q), (q, scores), (kv, scores), (kv, values), (values, q))
        for i, (inputs, outputs) in enumerate(sizes, 3):
            self.map((key, i), place + names[i], inputs, outputs)

    # What it calculates.

    def affine(self, key, x):
        w, b = self.maps[key]
        return x @ w + b

    def norm(self, key, i, x):
        scale, shift = self.layers[key, i]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift

    def attend(self, key, x, y, heads, residual):
        q = self.norm(key, 0, x)
        y = self.norm(key, 1, y) if (key, 1) in self.layers else q
        q, k, v = self.affine((key, 5), q), self.affine((key, 6), y), self.affine((key, 7), y)
        parts = []
        for q_h, k_h, v_h in zip(*(np.split(a, heads, axis=-1) for a in (q, k, v)), strict=True):
            e = np.exp(q_h @ np.swapaxes(k_h, -1, -2) / math.sqrt(q_h.shape[-1]))
            parts.append(e / e.sum(-1, keepdims=True) @ v_h)
        h = self.affine((key, 8), np.concatenate(parts, axis=-1)) + (x if residual else 0)
        z = self.affine((key, 3), self.norm(key, 2, h))
        if self.torch:
            z = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        else:
            z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return h + self.affine((key, 4), z)

    def embed(self, x, height, width):
        if self.kind == TEXT:
            return self.tables["tokens"][x] + self.tables["rows"][: len(x)]
        x = self.affine("pixels", x)
        if self.kind == IMAGE:
            return np.concatenate([x, self.affine("project", self.tables["places"])], axis=-1)
        own, sines, cosines = [], [], []
        for place in np.ndindex(height, width):
            at = [2 * i / (n - 1) - 1 for i, n in zip(place, (height, width), strict=True)]
            angles = [
                [math.pi * p * (1 + k * (n / 2 - 1) / 63) for k in range(64)]
                for p, n in zip(at, (height, width), strict=True)
            ]
            own.append(at)
            sines.append([math.sin(a) for axis in angles for a in axis])
            cosines.append([math.cos(a) for axis in angles for a in axis])
        return np.concatenate([x, own, sines, cosines], axis=-1)

    def __call__(self, x, blocks, height=0, width=0):
        y = self.embed(x, height, width)
        z = self.attend("cross", self.tables["latents"], y, 2, True)
        for _ in range(blocks):
            for key in ("self 0", "self 1"):
                z = self.attend(key, z, z, 4, True)
        out = self.attend("decoder", self.tables.get("queries", y), z, 2, self.kind == IMAGE)
        if self.kind == TEXT:
            return out @ self.tables["tokens"].T + self.tables["bias"]
        return self.affine("output", out) / (100 if self.kind == FLOW else 1)

    def inputs(self):
        rng = np.random.default_rng(5)
        return {
            TEXT: lambda: rng.integers(0, VOCABULARY, 5),
            IMAGE: lambda: rng.normal(size=(4, 3)),
            FLOW: lambda: rng.normal(size=(6, 54)),
        }[self.kind]()


every_model = pytest.mark.parametrize("layout", LAYOUTS)
every_kind = pytest.mark.parametrize("kind", [TEXT, IMAGE, FLOW])


def load(tensors, layout, **options):
    return setattn.load(tensors, layout, **({"num_blocks": 2} | HEADS | options))


@every_kind
@every_model
def test_a_block_calculates_what_its_weights_say(layout, kind, tmp_path):
    model = Model(layout, kind)
    size = {"height": 2, "width": 3} if kind == FLOW else {}
    for blocks in 1, 2:
        block = load(model.tensors, layout, num_blocks=blocks, **size)
        x = model.inputs()
        want = model(x, blocks, **size)
        np.testing.assert_allclose(block(x), want, rtol=0, atol=1e-12 * np.abs(want).max())
        np.testing.assert_array_equal(block(np.stack([x, x]))[1], block(x))
    assert (block.function, block.layout) == ("perceiver_io", layout)
    assert block.options["decoder_residual"] is (kind == IMAGE)
    options = {"num_blocks": 2} | HEADS | size
    assert setattn.load(model.tensors, **options).layout == layout  # recognised
    setattn.save(tmp_path / "a.safetensors", block)
    assert setattn.load(tmp_path / "a.safetensors")(x).tobytes() == block(x).tobytes()


def test_a_tree_may_be_nested():
    """Haiku keeps the parameters of a module under its path."""
    layout = "perceiver-haiku"
    model = Model(layout, TEXT)
    nested = {}
    for name, a in model.tensors.items():
        module, _, parameter = name.rpartition("/")
        nested.setdefault(module, {})[parameter] = a
    x = model.inputs()
    np.testing.assert_array_equal(load(nested, layout)(x), load(model.tensors, layout)(x))


@every_model
def test_weights_are_not_copied(layout):
    """But for the last layer of the flow, which is divided by 100."""
    for kind in (TEXT, IMAGE, FLOW):
        model = Model(layout, kind)
        block = load(model.tensors, layout, **({"height": 2, "width": 3} if kind == FLOW else {}))
        own = list(model.tensors.values())
        left = []
        setattn.map_params(
            lambda a, own=own, left=left: None if any(np.shares_memory(a, b) for b in own) else left.append(a.shape),
            block.params,
        )
        assert left == ([(6, 258), (263, 2), (2,)] if kind == FLOW else [])


def test_the_encoder_alone():
    """A bare model is a Perceiver, whose inputs come embedded."""
    model = Model("perceiver", TEXT)
    start = "perceiver."
    names = [n for n in model.tensors if n.startswith((f"{start}encoder", f"{start}embeddings"))]
    options = {"num_blocks": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 2}
    block = setattn.load({n.removeprefix(start): model.tensors[n] for n in names}, **options)
    assert block.function == "perceiver"
    y = np.random.default_rng(0).normal(size=(5, WIDTH))
    z = model.attend("cross", model.tables["latents"], y, 2, True)
    for key in ("self 0", "self 1") * 2:
        z = model.attend(key, z, z, 4, True)
    np.testing.assert_allclose(block(y), z, rtol=0, atol=1e-12 * np.abs(z).max())
    # Part of a file, the rest of which is left alone.
    inside = {f"model.{n}": a for n, a in model.tensors.items()}
    whole = setattn.load(inside | {"other": np.ones(3)}, prefix="model.", **options, num_decoder_attention_heads=2)
    assert whole.function == "perceiver_io"


def test_fourier_features_of_published_images():
    """Without sizes, an image has those of the published model; of the convolution's output, a quarter of them."""
    model = Model("perceiver", IMAGE)
    pre = "perceiver.input_preprocessor."
    tensors = {n: a for n, a in model.tensors.items() if not n.startswith((pre, "perceiver.encoder.cross"))}
    sizes = (("pixels", 3, 224, 224), ("convolution", 64, 56, 56))
    for kind, channels, height, width in sizes:
        model.tensors = dict(tensors)
        model.layer("cross", model.names["cross"], DIM, channels + 258)
        if kind == "convolution":
            model.put(f"{pre}convnet.conv.weight", 64, 3, 7, 7)
            model.put(f"{pre}convnet.batchnorm.weight", 64)
            model.tensors[f"{pre}convnet.batchnorm.num_batches_tracked"] = np.asarray(3)
        block = load(model.tensors, "perceiver")
        table = block.params.encoder.input.features
        assert table.shape == (height * width, 258)
        np.testing.assert_array_equal(table[0, :2], [-1, -1])
        np.testing.assert_array_equal(table[-1, :2], [1, 1])
        np.testing.assert_array_equal(table[width, :2], [2 / (height - 1) - 1, -1])
        assert block(np.zeros((2, 20, channels))).shape == (2, 1, 10)
        small = load(model.tensors, "perceiver", height=3, width=5).params.encoder.input.features
        assert small.shape == (15, 258)


@every_model
def test_other_libraries(layout):
    """Tables that no file has are made in the library, the dtype and on the device of the weights."""
    torch = pytest.importorskip("torch")
    model = Model(layout, FLOW)
    block = load(model.tensors, layout, height=2, width=3, xp=torch, dtype=torch.float32)
    dtypes = set()
    setattn.map_params(lambda a: dtypes.add((type(a), a.dtype)), block.params)
    assert dtypes == {(torch.Tensor, torch.float32)}
    want = model(model.inputs(), 2, 2, 3)
    out = block(torch.asarray(model.inputs(), dtype=torch.float32)).numpy()
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(tensors, layout, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        load(tensors, layout, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@every_model
def test_missing_unexpected_and_misshapen(layout):
    model = Model(layout, TEXT)
    n = model.names
    last = n["self 1"] + (TRANSFORMERS if model.torch else HAIKU_SELF)[4] + (".bias" if model.torch else "/b")
    without = {name: a for name, a in model.tensors.items() if name != last}
    assert refused(without, layout).endswith(f"the tensors of layout {layout!r}: missing {last}")
    more = model.tensors | {"something": np.ones(2)}
    assert f"the tensors of layout {layout!r}: unexpected something" in refused(more, layout)
    wrong = model.tensors | {n["rows"]: np.ones((ROWS, WIDTH + 1))}
    assert f"{n['rows']} of shape (rows, {WIDTH} (inputs of " in refused(wrong, layout)
    assert refused(wrong, layout).endswith(f", not ({ROWS}, {WIDTH + 1})")


@every_model
def test_features_beside_each_other_must_make_up_the_inputs(layout):
    model = Model(layout, IMAGE)
    model.layer("cross", model.names["cross"], DIM, 12)
    assert refused(model.tensors, layout).endswith("inputs of 5 features and 6 of their place, not 12 in all")


@every_model
def test_required_options(layout):
    model = Model(layout, TEXT)
    for name in ("num_blocks", "num_self_attention_heads", "num_cross_attention_heads"):
        options = {key: value for key, value in ({"num_blocks": 2} | HEADS).items() if key != name}
        with pytest.raises(OptionError) as caught:
            setattn.load(model.tensors, layout, **options)
        assert f"argument '{name}' is not given" in str(caught.value)
        assert f"in a config.json: {name}" in str(caught.value)
        config = {name: ({"num_blocks": 2} | HEADS)[name]}
        assert setattn.load(model.tensors, layout, config=config, **options).function == "perceiver_io"
    # A decoder's heads are no field of a configuration: 8 in the language model, for which 12 features are too few.
    options = {"num_blocks": 2} | HEADS | {"num_decoder_attention_heads": None}
    with pytest.raises(CheckpointError, match="8 \\* "):
        setattn.load(model.tensors, layout, **options)
    assert "an unknown option" in refused(model.tensors, layout, OptionError, heads=2)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("perceiver", "perceiver.decoder.padding.audio"),
        ("perceiver", "perceiver.input_preprocessor.padding.image"),
        ("perceiver-haiku", "multimodal_preprocessor/audio_padding/pos_embs"),
        ("perceiver-haiku", "multimodal_decoder/~decoder_query/audio_padding/pos_embs"),
    ],
)
def test_several_modalities(layout, name):
    tensors = Model(layout, TEXT).tensors
    kept = [n for n in tensors if n.startswith(("perceiver.", "perceiver_encoder/"))]
    message = refused({n: tensors[n] for n in kept} | {name: np.ones((1, 4))}, layout)
    assert message.endswith(f"layout {layout!r}: no model of several modalities, whose inputs are no one set")
