"""The layout of perceiver-io, without the package: names and shapes of tensors, passes and layers, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

import setattn
from setattn import CheckpointError, OptionError
from setattn.checkpoints._inspect import examine

LATENTS, DIM, INPUTS, QUERIES, OUT, VOCABULARY, PLACES = 5, 6, 7, 8, 4, 11, 9
HEADS = {"cross": 2, "self": 3, "decoder": 1}
OPTIONS = {f"num_{kind}_attention_heads": number for kind, number in HEADS.items()} | {"num_self_attention_blocks": 1}


def linear(at, dim_in, dim_out):
    return {f"{at}.weight": (dim_out, dim_in), f"{at}.bias": (dim_out,)}


def layer(at, dim, context=None, *, scores, values, hidden, residual=True):
    norms = {"q_norm": dim, "kv_norm": context} if context else {"norm": dim}
    a = f"{at}.0.module" if residual else f"{at}.0"
    shapes = {f"{a}.{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    shapes |= linear(f"{a}.attention.q_proj", dim, scores) | linear(f"{a}.attention.k_proj", context or dim, scores)
    shapes |= linear(f"{a}.attention.v_proj", context or dim, values) | linear(f"{a}.attention.o_proj", values, dim)
    shapes |= {f"{at}.1.module.0.weight": (dim,), f"{at}.1.module.0.bias": (dim,)}
    return shapes | linear(f"{at}.1.module.1", dim, hidden) | linear(f"{at}.1.module.3", hidden, dim)


def cross(name, inputs=INPUTS):
    return layer(f"0.{name}", DIM, inputs, scores=4, values=10, hidden=5)


def selves(name):
    return layer(f"0.{name}.0", DIM, scores=6, values=3, hidden=12) | layer(
        f"0.{name}.1", DIM, scores=6, values=3, hidden=12
    )


def model(*names, inputs=INPUTS, queries=QUERIES, residual=True):
    """Give the shapes of a model with learned queries, and of the further layers of these names."""
    shapes = {"0.latent_provider._query": (LATENTS, DIM)} | cross("cross_attn_1", inputs) | selves("self_attn_1")
    for name in names:
        shapes |= cross(name, inputs) if name.startswith("cross") else selves(name)
    shapes |= layer("1.cross_attn", queries, DIM, scores=3, values=5, hidden=9, residual=residual)
    return shapes | {"1.output_query_provider._query": (3, queries)}


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


# The equations, from the tensors as they are.


def affine(w, at, x):
    return np.einsum("ni,oi->no", x, w[f"{at}.weight"]) + w[f"{at}.bias"]


def normed(x, w, at):
    centred = x - x.mean(axis=-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x * w[f"{at}.weight"] + w[f"{at}.bias"]


def step(w, at, heads, x, y=None, residual=True):
    a = f"{at}.0.module" if residual else f"{at}.0"
    q = normed(x, w, f"{a}.norm" if y is None else f"{a}.q_norm")
    y = q if y is None else normed(y, w, f"{a}.kv_norm")
    q, k, v = (
        affine(w, f"{a}.attention.{name}_proj", rows).reshape(len(rows), heads, -1)
        for name, rows in {"q": q, "k": y, "v": y}.items()
    )
    e = np.exp(np.einsum("mhd,nhd->hmn", q, k) / math.sqrt(q.shape[-1]))
    out = np.einsum("hmn,nhd->mhd", e / e.sum(axis=-1, keepdims=True), v).reshape(len(x), -1)
    out = affine(w, f"{a}.attention.o_proj", out)
    x = x + out if residual else out
    hidden = affine(w, f"{at}.1.module.1", normed(x, w, f"{at}.1.module.0"))
    return x + affine(w, f"{at}.1.module.3", hidden * np.vectorize(math.erfc)(-hidden / math.sqrt(2)) / 2)


def passes(w, y, blocks=1, crosses=1):
    z = w["0.latent_provider._query"]
    for i in range(blocks):
        n = {
            kind: "n" if i and any(name.startswith(f"0.{kind}_n") for name in w) else "1"
            for kind in ("cross_attn", "self_attn")
        }
        if i < crosses:
            z = step(w, f"0.cross_attn_{n['cross_attn']}", HEADS["cross"], z, y)
        for j in range(2):
            z = step(w, f"0.self_attn_{n['self_attn']}.{j}", HEADS["self"], z)
    return z


def close(actual, wanted):
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("names", "blocks", "crosses"),
    [
        ((), 1, 1),
        ((), 3, 1),
        ((), 3, 2),
        (("self_attn_n",), 3, 1),
        (("cross_attn_n",), 2, 2),
        (("cross_attn_n", "self_attn_n"), 4, 3),
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_model(names, blocks, crosses, residual):
    w, y = weights(model(*names, residual=residual)), np.random.default_rng(1).normal(size=(10, INPUTS))
    options = OPTIONS | {"num_self_attention_blocks": blocks, "num_cross_attention_layers": crosses}
    loaded = setattn.load(w, **options)
    assert (loaded.function, loaded.layout) == ("perceiver_io", "perceiver-io-krasserm")
    wanted = {"depth": blocks, "decoder_residual": residual, "activation": "gelu", "eps": 1e-5}
    assert loaded.options == wanted
    z = passes(w, y, blocks, crosses)
    close(loaded(y), step(w, "1.cross_attn", 1, w["1.output_query_provider._query"], z, residual))
    queries = np.random.default_rng(2).normal(size=(2, QUERIES))
    close(loaded(y, queries), step(w, "1.cross_attn", 1, queries, z, residual))


NAMES = {
    "0.latent_provider._query": "0.latent",
    "1.output_query_provider._query": "1.output_adapter._output_query",
    "0.input_adapter.pos_embedding.weight": "0.input_adapter.pos_encoding",
    "0.input_adapter.position_encoding.position_encoding": "0.input_adapter.position_encoding",
}


def earlier(w):
    """Rename to what the tensors were called until version 0.6."""
    return {NAMES.get(name, name): a for name, a in w.items()}


@pytest.mark.parametrize("rename", [dict, earlier])
def test_images(rename):
    shapes = model(inputs=INPUTS) | linear("1.output_adapter.linear", QUERIES, OUT)
    w = weights(shapes | {"0.input_adapter.position_encoding.position_encoding": (PLACES, 4)})
    pixels = np.random.default_rng(1).normal(size=(PLACES, 3))
    y = np.concatenate([pixels, w["0.input_adapter.position_encoding.position_encoding"]], axis=1)
    out = step(w, "1.cross_attn", 1, w["1.output_query_provider._query"], passes(w, y))
    close(setattn.load(rename(w), **OPTIONS)(pixels), affine(w, "1.output_adapter.linear", out))


@pytest.mark.parametrize("rename", [dict, earlier])
@pytest.mark.parametrize("tied", [True, False])
def test_texts(tied, rename):
    queries = INPUTS if tied else QUERIES
    shapes = model(queries=queries) | {"0.input_adapter.txt_embedding.weight": (VOCABULARY, INPUTS)}
    shapes |= {"0.input_adapter.pos_embedding.weight": (PLACES, INPUTS)}
    shapes |= (
        {"1.output_adapter.bias": (VOCABULARY,)} if tied else linear("1.output_adapter.linear", queries, VOCABULARY)
    )
    w, tokens = weights(shapes), np.random.default_rng(1).integers(0, VOCABULARY, 6)
    table = w["0.input_adapter.txt_embedding.weight"]
    y = table[tokens] + w["0.input_adapter.pos_embedding.weight"][:6]
    out = step(w, "1.cross_attn", 1, w["1.output_query_provider._query"], passes(w, y))
    wanted = out @ table.T + w["1.output_adapter.bias"] if tied else affine(w, "1.output_adapter.linear", out)
    close(setattn.load(rename(w), **OPTIONS)(tokens), wanted)


def test_published_names_and_configuration():
    w = {f"backend_model.{name}": a for name, a in weights(model()).items()}
    encoder = {f"num_{kind}_attention_heads": HEADS[kind] for kind in ("cross", "self")}
    config = {"model_config": {"encoder": encoder | {"num_self_attention_blocks": 3}}}
    config["model_config"]["decoder"] = {"num_cross_attention_heads": 1}
    loaded = setattn.load(w, prefix="backend_model.", config=config)
    assert loaded.options["depth"] == 3
    assert loaded.params.encoder.cross_attentions[0].attention.query.weight.shape == (DIM, 2, 2)
    assert loaded.params.encoder.latent_transformers[0][1].attention.value.weight.shape == (DIM, 3, 1)
    assert len(loaded.params.encoder.cross_attentions) == 2


BROKEN = [
    ({"0.self_attn_1.1.0.module.norm.bias": None}, {}, "missing 0.self_attn_1.1.0.module.norm.bias"),
    ({"0.input_adapter.linear.weight": (3, 4)}, {}, "unexpected 0.input_adapter.linear.weight"),
    (
        {"1.cross_attn.0.module.attention.k_proj.weight": (3, 7)},
        {},
        "q_proj.weight), 6 (dim of 0.latent_provider._query)), not (3, 7)",
    ),
    (cross("cross_attn_n"), {"num_self_attention_blocks": 2}, "no cross_attn_n, as num_cross_attention_layers=1 says"),
    (selves("self_attn_n"), {}, "no self_attn_n, as num_self_attention_blocks=1 says"),
    ({}, {"num_cross_attention_layers": 2}, "at most num_self_attention_blocks=1 cross-attentions, not 2"),
]


@pytest.mark.parametrize(("changed", "options", "message"), BROKEN)
def test_what_is_wrong_is_named(changed, options, message):
    shapes = {name: shape for name, shape in (model() | changed).items() if shape}
    with pytest.raises(CheckpointError) as error:
        setattn.load(weights(shapes), "perceiver-io-krasserm", **(OPTIONS | options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_causal_models_are_refused():
    w = weights({"cross_attention.0.module.q_norm.weight": (8,), "output_layer.weight": (9, 8)})
    with pytest.raises(CheckpointError) as error:
        setattn.load(w, "perceiver-io-krasserm", **OPTIONS)
    wanted = "no Perceiver AR, whose causal attention and rotary positions no function here has"
    assert str(error.value).endswith(f"the tensors of layout 'perceiver-io-krasserm': {wanted}")


@pytest.mark.parametrize("missing", OPTIONS)
def test_what_shapes_do_not_say_must_be_given(missing):
    given = {name: value for name, value in OPTIONS.items() if name != missing}
    with pytest.raises(OptionError, match=rf"argument '{missing}' is not given; .*: model_config\.(en|de)coder\.num_"):
        setattn.load(weights(model()), "perceiver-io-krasserm", **given)


def test_what_is_not_told_is_no_reason_against_the_layout():
    """A second group of self-attentions is there for several passes; how many, no shape says."""
    report = examine(weights(model("self_attn_n")))
    [place] = report.places
    assert (place.layout, report.misses) == ("perceiver-io-krasserm", ())
    assert [s.name for s in place.settings if s.origin == "needed"] == list(OPTIONS)
