"""The command ``inspect``, and the function behind it."""

from __future__ import annotations

import json

import commands
import numpy as np
from commands import NUMBERS, X, head, weights, words, write
from siglip import HEADS, PREFIX, SHAPES, D, F

import setattn
from setattn.checkpoints._inspect import examine

folder, say, refused = commands.folder, commands.say, commands.refused


def test_inspect_finds_a_block_in_a_model(say):
    code, output, error = say("inspect", "head.safetensors")
    assert (code, error) == (0, "")
    lines = output.splitlines()
    assert lines[:2] == [
        "file     head.safetensors: 12 tensors, 2.1 kB",
        "dtypes   float32 (12 tensors, 2.1 kB)",
    ]
    assert "layout   siglip (transformers SiglipMultiheadAttentionPoolingHead)" in lines
    assert f"where    prefix {PREFIX}" in lines
    assert f"block    attention_pool, {NUMBERS} parameters" in lines
    assert "attention.query.weight (dim 8, num_heads, head_dim)" in words(output)
    assert "ff.hidden.weight (dim 8, hidden 12)" in words(output)
    needed = "vision_config.num_attention_heads or num_attention_heads"
    assert f"  num_heads is needed: number of heads of the attention; in a config.json {needed}" in lines
    assert "  eps = 1e-06  (default; added to the variance in the norms)" in lines
    assert lines[-2] == f"  setattn.load('head.safetensors', layout='siglip', prefix={PREFIX!r}, num_heads=...)"
    assert lines[-1].endswith(f" --layout siglip --prefix {PREFIX} --option num_heads=...")


def test_inspect_reads_the_configuration(say, folder):
    (folder / "config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 4, "hidden_act": "zelu"}}))
    _, output, _ = say("inspect", "head.safetensors")
    assert "attention.query.weight (dim 8, num_heads 4, head_dim 2)" in words(output)
    assert "  num_heads = 4  (config.json: vision_config.num_attention_heads)\n" in output
    assert "  activation is not usable: vision_config.hidden_act is 'zelu'; wanted one of " in output
    (folder / "config.json").unlink()
    (folder / "c.json").write_text(json.dumps({"num_attention_heads": 2}))
    _, output, _ = say("inspect", "head.safetensors", "--config", "c.json")
    [call] = [line for line in output.splitlines() if line.startswith("  setattn.load(")]
    assert eval(call, {"setattn": setattn})(X).tobytes() == head()(X).tobytes()  # copied and pasted


def test_inspect_tells_blocks_that_differ_in_one_number_as_one(say, folder):
    tensors = {name: a for i in range(3) for name, a in weights(f"a.{i}.", i).items()}
    write(folder / "three.safetensors", tensors)
    _, output, _ = say("inspect", "three.safetensors")
    assert output.count("layout   ") == 1
    assert "where    3 times, prefixes a.{0..2}.\n" in output
    assert f"{NUMBERS} parameters each" in output
    assert "prefix='a.0.'" in output


def test_inspect_says_why_nothing_fits(say, folder):
    tensors = weights() | {"mlp.fc2.weight": np.ones((7, F), np.float32), "extra.weight": np.ones(2, np.float32)}
    del tensors["mlp.fc1.bias"]
    write(folder / "bad.safetensors", tensors)
    code, output, _ = say("inspect", "bad.safetensors")
    assert code == 0
    assert "No layout fits whole. Those that come nearest:\n  siglip: 83 % of the names are in both\n" in output
    assert (
        "    missing mlp.fc1.bias\n    unexpected extra.weight\n    mlp.fc2.weight of shape (8 (dim of probe)" in output
    )
    np.savez("other.npz", a=np.ones(3), b=np.ones(2, np.int64))
    _, output, _ = say("inspect", "other.npz")
    assert "dtypes   float64 (1 tensor, 24 bytes), int64 (1 tensor, 16 bytes)\n" in output
    assert "No tensor of a known layout is here." in output
    width = max(map(len, setattn.layouts()))
    assert f"  {'siglip':{width}}  probe\n" in output
    _, output, _ = say("inspect", "other.npz", "--prefix", "b")
    assert "No tensor of a known layout is here under prefix 'b'." in output


def test_inspect_finds_a_layout_whose_anchor_is_missing(say, folder):
    tensors = weights(PREFIX) | {"other.layer.mlp.fc1.weight": np.ones((2, 2), np.float32)}
    del tensors[f"{PREFIX}probe"]
    write(folder / "bad.safetensors", tensors)
    _, output, _ = say("inspect", "bad.safetensors")
    assert "No layout fits whole. Those that come nearest:\n" in output
    assert f"  siglip under prefix {PREFIX!r}: 91 % of the names are in both\n    missing {PREFIX}probe\n" in output
    assert "other.layer." not in output


def test_inspect_takes_options(say, refused, folder):
    assert say("inspect", "head.safetensors", "--option", "num_heads=5")[0] == 0
    _, output, _ = say("inspect", "head.safetensors", "--option", "num_heads=5")
    assert "No layout fits whole. Those that come nearest:\n" in output
    assert f"  siglip under prefix {PREFIX!r}: all names are in both\n" in output
    assert "attention.in_proj_weight of shape (3 * 5 * " in output
    assert "    option num_heads = 5  (number of heads of the attention)\n" in output
    _, output, _ = say("inspect", "head.safetensors", "--option", "num_heads=2", "--option", "activation=relu")
    assert "attention.query.weight (dim 8, num_heads 2, head_dim 4)" in words(output)
    assert output.endswith(" --option num_heads=2 --option activation=relu\n")
    [call] = [line for line in output.splitlines() if line.startswith("  setattn.load(")]
    assert eval(call, {"setattn": setattn})(X).tobytes() == head(activation="relu")(X).tobytes()
    _, output, _ = say("inspect", "head.safetensors", "--option", "num_heads=two")
    assert "  num_heads is not usable: what is given is 'two'; wanted an integer of at least 1\n" in output
    got = refused("inspect", "head.safetensors", "--option", "heads=2")
    assert got == "--option heads is no option of any layout"


def test_inspect_finds_a_count_that_other_shapes_tell(say, folder):
    """Norms of heads have their width: what is not given is not taken for 1, which would speak against the layout."""
    shapes = {f"cross_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
    shapes |= {f"cross_attn.{name}_layer_norm.weight": (2,) for name in "qk"}
    shapes |= {f"{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    shapes |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    shapes |= {"alpha_cross_attn": (1,), "alpha_dense": (1,)}
    write(folder / "gated.safetensors", {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    _, output, _ = say("inspect", "gated.safetensors")
    assert "layout   idefics-gated (" in output
    assert "cross_attention.attention.query.weight (dim 8, num_heads 4, head_dim 2)" in words(output)
    assert "  num_heads = 4  (the only one that the shapes allow; number of heads of the attention)\n" in output
    assert output.endswith(" --layout idefics-gated --option num_heads=4\n")
    [call] = [line for line in output.splitlines() if line.startswith("  setattn.load(")]
    assert eval(call, {"setattn": setattn}).params.cross_attention.attention.query.weight.shape == (D, 4, 2)


def test_inspect_looks_where_it_is_told(say, folder):
    tensors = {name: a for i in range(2) for name, a in weights(f"a.{i}.", i).items()}
    write(folder / "two.safetensors", tensors)
    _, output, _ = say("inspect", "two.safetensors", "--prefix", "a.1.")
    assert "where    prefix a.1.\n" in output
    _, output, _ = say("inspect", "two.safetensors", "--prefix", "a.")
    assert "No layout fits whole under prefix 'a.'. What would fit:" in output
    assert "attention_pool siglip 2 times, prefixes a.{0..1}." in words(output)


def test_inspect_tells_parts_of_a_model_in_short(say):
    """The authors' Set Transformer, whose heads divide a width, and which is made of blocks of the same layout."""

    def affine(key, dim):
        return {f"{key}.weight": (4, dim), f"{key}.bias": (4,)}

    def mab(key, x, y):
        maps = {"fc_q": x, "fc_k": y, "fc_v": y, "fc_o": 4}
        return {name: shape for part, dim in maps.items() for name, shape in affine(f"{key}.{part}", dim).items()}

    shapes = {}
    for i, dim in enumerate((3, 4)):
        shapes |= {f"enc.{i}.I": (1, 2, 4)} | mab(f"enc.{i}.mab0", 4, dim) | mab(f"enc.{i}.mab1", dim, 4)
    shapes |= {"dec.0.S": (1, 1, 4)} | mab("dec.0.mab", 4, 4) | affine("dec.1", 4)
    np.savez("model.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    code, output, _ = say("inspect", "model.npz")
    assert code == 0
    assert output.count("layout   ") == 1
    assert "block    set_transformer, " in output
    output = words(output)
    assert "encoder.0.mab_inducing.attention.key.weight (dim_x 3, num_heads, head_dim)" in output
    assert "encoder.{0..1}.inducing_points (inducing points 2, dim 4)" in output
    assert "parts of it that can be loaded on their own isab set-transformer prefix enc." in output
    assert "pma set-transformer prefix dec.0." in output


def test_inspect_says_which_dtype_is_to_be_asked_for(say, folder):
    write(folder / "mixed.safetensors", weights() | {"mlp.fc1.bias": np.ones(F, np.float16)})
    _, output, _ = say("inspect", "mixed.safetensors")
    assert "layout='siglip', dtype=numpy.float32, num_heads=...)" in output
    assert "--layout siglip --dtype float32 --option num_heads=...\n" in output


def test_inspect_reads_what_the_library_saved(say):
    setattn.save("own.safetensors", head())
    code, output, _ = say("inspect", "own.safetensors")
    assert code == 0
    assert "layout   setattn (setattn.save, from layout 'siglip')\n" in output
    assert f"block    attention_pool, {NUMBERS} parameters\n" in output
    assert "attention.query.weight (8, 2, 4)" in words(output)
    assert "  eps = 1e-06  (in the file)\n" in output
    assert "  setattn.load('own.safetensors')\n  python -m setattn run own.safetensors INPUT.npy OUTPUT.npy\n" in output
    params = setattn.init_latent_transformer(D, num_layers=3, num_heads=2, rng=0)
    setattn.save("own.safetensors", setattn.Block("latent_transformer", params))
    assert "  {0..2}.attention.query.weight " in say("inspect", "own.safetensors")[1]


def test_inspect_refuses(refused, folder):
    assert refused("inspect", "none").startswith("FILE is 'none'; wanted a file that can be read: ")
    assert refused("inspect", "x.npy").startswith("FILE is 'x.npy'; wanted a safetensors file: ")
    got = refused("inspect", "head.safetensors", "--config", "none.json")
    assert got == "--config is 'none.json'; wanted a file of JSON: No such file or directory"
    (folder / "config.json").write_text("[]")
    got = refused("inspect", "head.safetensors")
    assert got == "the config.json beside FILE is 'config.json'; wanted a file with an object of JSON"


def test_examine_is_what_load_gives(folder):
    tensors = weights(PREFIX)
    report = examine(tensors, config={"num_attention_heads": HEADS})
    assert (report.tensors, report.dtypes["float32"]) == (len(SHAPES), (len(SHAPES), 4 * NUMBERS))
    [place] = report.places
    assert (place.layout, place.prefixes, place.function, report.misses) == ("siglip", (PREFIX,), "attention_pool", ())
    assert place.call == f"setattn.load(..., layout='siglip', prefix={PREFIX!r}, config=...)"
    params = head().params
    assert place.parameters == setattn.count_params(params)
    for path, dims in place.parts.items():
        a = params
        for name in path.split("."):
            a = getattr(a, name)
        assert tuple(d.size for d in dims) == a.shape
    assert [d.name for d in place.parts["attention.output.weight"]] == ["num_heads", "head_dim", "dim"]
    assert [(s.name, s.value, s.origin) for s in place.settings] == [
        ("num_heads", 2, "config"),
        ("eps", 1e-6, "default"),
        ("activation", "gelu_tanh", "default"),
    ]


def test_examine_reads_no_tensor(folder, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("setattn.checkpoints._safetensors.SafetensorsFile.read", fail)
    assert examine("head.safetensors").places
    assert not examine("head.safetensors", prefix="other.").places
