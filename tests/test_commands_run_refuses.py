"""What the command ``run`` refuses, in one line and writing nothing."""

from __future__ import annotations

import json

import commands
import numpy as np
import pytest
from commands import HEAD, MASK, X, finish, head, start, weights, write
from siglip import PREFIX, D, F

import setattn
from setattn.__main__ import main

folder, say, refused = commands.folder, commands.say, commands.refused


def test_run_refuses_shapes_as_the_library_does(refused):
    np.save("narrow.npy", X[..., :7])
    np.save("flat.npy", X[0, 0])
    np.save("nine.npy", MASK[:9])
    np.save("short.npy", MASK[:, :4])
    np.save("row.npy", MASK[0])
    key = "params.attention.key.weight of shape (8, 2, 4)"
    wanted = f"INPUT narrow.npy has shape (20, 5, 7); wanted (..., 8) to match {key}"
    assert refused("run", "head.safetensors", "narrow.npy", "y.npy", *HEAD, "--batch", 3) == wanted
    wanted = "INPUT flat.npy has shape (8,); wanted (..., n, dim)"
    assert refused("run", "head.safetensors", "flat.npy", "y.npy", *HEAD) == wanted
    for name, shape in {"nine": "(9, 5)", "short": "(20, 4)", "row": "(5,)"}.items():
        wanted = f"--mask {name}.npy has shape {shape}; wanted (20, 5), one entry for each element of x"
        call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", 3, "--mask", f"{name}.npy")
        assert refused(*call) == wanted


def test_run_refuses_batches_that_differ(refused):
    setattn.save("own.safetensors", setattn.Block("mab", setattn.init_mab(D, num_heads=2, rng=0)))
    np.save("y.npy", X[:9])
    wanted = "INPUT x.npy has shape (20, 5, 8); wanted (9, 5, 8), as the other array has shape (9, 5, 8), or (5, 8)"
    got = refused("run", "own.safetensors", "x.npy", "out.npy", "--second", "y.npy")
    assert got == f"{wanted} for all of the batch"


def test_run_refuses_dtypes(refused):
    np.save("c.npy", X.astype(np.complex64))
    np.save("o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("i.npy", X.astype(np.int32))
    hint = "wanted float32, as the weights have"
    call = ("run", "head.safetensors")
    for name, dtype in {"x64": "float64", "i": "int32"}.items():
        wanted = f"INPUT {name}.npy has dtype {dtype}; {hint}, or --dtype float32 to convert it"
        assert refused(*call, f"{name}.npy", "y.npy", *HEAD) == wanted
    assert refused(*call, "mask.npy", "y.npy", *HEAD) == f"INPUT mask.npy has dtype bool; {hint}"
    got = refused(*call, "c.npy", "y.npy", *HEAD)
    assert got == "INPUT c.npy has dtype complex64; wanted real numbers or booleans"
    assert "o.npy is no whole .npy file of numbers: Array can't be memory-mapped" in refused(*call, "o.npy", "y", *HEAD)
    got = refused(*call, "x.npy", "y.npy", *HEAD, "--mask", "x.npy")
    assert got == "--mask x.npy has dtype float32; wanted bool, True where an element takes part"


def test_run_refuses_broken_arrays(refused, folder):
    content = (folder / "x.npy").read_bytes()
    for name, broken in {"short": content[:500], "header": content[:50], "nothing": b"", "text": b"1 2 3"}.items():
        (folder / f"{name}.npy").write_bytes(broken)
        got = refused("run", "head.safetensors", f"{name}.npy", "y.npy", *HEAD)
        assert got.startswith(f"INPUT {name}.npy is no whole .npy file of numbers: ")
    got = refused("run", "head.safetensors", "none.npy", "y.npy", *HEAD)
    assert got == "INPUT none.npy cannot be read: No such file or directory"
    assert refused("run", "head.safetensors", ".", "y.npy", *HEAD).startswith("INPUT . cannot be read: ")


def test_run_refuses_a_second_array_too_much_or_too_little(refused):
    got = refused("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--second", "x.npy")
    assert got == "--second is not for attention_pool, which takes one array, x"
    setattn.save("own.safetensors", setattn.Block("mab", setattn.init_mab(D, num_heads=2, rng=0)))
    got = refused("run", "own.safetensors", "x.npy", "y.npy")
    assert got == "--second is not given; wanted the y of mab, beside its x, INPUT"
    layers = setattn.init_latent_transformer(D, num_layers=1, num_heads=2, rng=0)
    setattn.save("own.safetensors", setattn.Block("latent_transformer", layers))
    got = refused("run", "own.safetensors", "x.npy", "y.npy", "--mask", "mask.npy")
    assert got == "--mask is not for latent_transformer, which takes none"


def test_run_refuses_options(refused):
    call = ("run", "head.safetensors", "x.npy", "y.npy", "--prefix", PREFIX)
    assert refused(*call) == (
        "--option num_heads is not given; wanted an integer for layout 'siglip': number of heads of the attention "
        "(in a config.json: vision_config.num_attention_heads or num_attention_heads)"
    )
    got = refused(*call, "--option", "num_heads=two")
    assert got == "--option num_heads is 'two'; wanted an integer of at least 1"
    got = refused(*call, *HEAD, "--option", "eps=nan")
    assert got == "--option eps is nan; wanted a finite number of at least 0"
    assert refused(*call, *HEAD, "--option", "num_heads=2") == "--option num_heads is given twice"
    for name in ("heads", "source", "layout", "prefix", "config", "xp", "device", "dtype", "allow_nonfinite"):
        assert refused(*call, "--option", f"{name}=1") == f"--option {name} is no option of any layout"
    got = refused(*call, *HEAD, "--option", "depth=2")
    assert got == "--option depth is an unknown option; wanted one of layout 'siglip': num_heads, eps, activation"
    for text in ("num_heads", "=3", "a b=3"):
        got = refused(*call, "--option", text)
        assert got == f"argument --option: {text!r} is not NAME=VALUE; see python -m setattn run --help"
    assert "of shape (3 * 3 * " in refused(*call, "--option", "num_heads=3")


def test_run_says_layouts_and_prefixes_as_arguments(refused):
    call = ("run", "head.safetensors", "x.npy", "y.npy")
    fits = f"; what would fit: --layout siglip --prefix {PREFIX}"
    got = refused(*call)
    assert got.startswith("--layout is not given; wanted --layout, as the tensors of 'head.safetensors'")
    assert got.endswith(fits)
    got = refused(*call, "--layout", "siglip", "--option", "num_heads=2")
    assert "missing probe" in got
    assert got.endswith(fits)
    assert refused(*call, "--layout", "nope").startswith("--layout is 'nope'; wanted one of '")


def test_run_refuses_weights(refused, folder):
    assert refused("run", "none", "x.npy", "y.npy").startswith("FILE is 'none'; wanted a file that can be read: ")
    assert refused("run", ".", "x.npy", "y.npy").startswith("FILE is '.'; wanted a file that can be read: ")
    (folder / "text").write_text("no weights at all")
    assert refused("run", "text", "x.npy", "y.npy").startswith("FILE is 'text'; wanted a safetensors file: ")
    (folder / "model.pt").write_bytes(b"PK")
    assert "is the pickled file 'model.pt'" in refused("run", "model.pt", "x.npy", "y.npy")
    tensors = weights()
    tensors["probe"][0, 0, 0] = np.nan
    write(folder / "nan.safetensors", tensors)
    call = ("run", "nan.safetensors", "x.npy", "y.npy", "--option", "num_heads=2")
    assert refused(*call) == "FILE is 'nan.safetensors'; wanted finite numbers in tensor 'probe', or --allow-nonfinite"
    assert main([*call, "--allow-nonfinite"]) == 0
    tensors = weights() | {"mlp.fc1.bias": np.ones(F)}
    write(folder / "mixed.safetensors", tensors)
    call = ("run", "mixed.safetensors", "x.npy", "z.npy", "--option", "num_heads=2")
    assert refused(*call).startswith("--dtype is not given; wanted one dtype for all by --dtype, as 'probe' is float32")
    assert main([*call, "--dtype", "float32"]) == 0


def test_run_refuses_what_only_a_saved_file_can_hold(say, refused):
    setattn.save("own.safetensors", setattn.Block("attention_pool", head().params, {"zeal": 3}))
    got = refused("run", "own.safetensors", "x.npy", "y.npy")
    assert got == "FILE has the option 'zeal'; wanted one that attention_pool takes"
    setattn.save("own.safetensors", setattn.Block("attention_pool", head().params, {"eps": "small"}))
    got = refused("run", "own.safetensors", "x.npy", "y.npy")
    assert got == "attention_pool: argument 'eps' is 'small'; wanted a finite number greater than 0"
    setattn.save("own.safetensors", setattn.Block("latent_transformer", ()))
    assert say("run", "own.safetensors", "x.npy", "y.npy")[0] == 0
    assert np.array_equal(np.load("y.npy"), X)
    np.save("i.npy", X.astype(np.int32))
    assert refused("run", "own.safetensors", "i.npy", "z.npy") == "INPUT i.npy has dtype int32; wanted floating numbers"
    assert "block    latent_transformer, 0 parameters\n" in say("inspect", "own.safetensors")[1]


def test_run_reads_a_configuration(say, refused, folder):
    (folder / "c.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_act": "gelu"}))
    call = ("run", "head.safetensors", "x.npy", "y.npy", "--prefix", PREFIX)
    assert say(*call, "--config", "c.json")[0] == 0
    assert np.array_equal(np.load("y.npy"), head(activation="gelu")(X))
    assert (
        refused(*call, "--config", "d.json") == "--config is 'd.json'; wanted a file of JSON: No such file or directory"
    )
    (folder / "config.json").write_text("{")
    assert refused(*call).startswith("the config.json beside FILE is 'config.json'; wanted a file of JSON: ")
    (folder / "config.json").write_text('{"num_attention_heads": "many"}')
    assert refused(*call) == "config.json: num_attention_heads is 'many'; wanted an integer of at least 1"


def test_run_refuses_outputs(refused, folder):
    call = ("run", "head.safetensors", "x.npy")
    assert refused(*call, "none/y.npy", *HEAD).startswith("cannot write none/y.npy: No such file or directory")
    assert refused(*call, ".", *HEAD) == "cannot write .: it exists and is no ordinary file"
    got = refused(*call, "o" * 300, *HEAD)
    assert got.startswith("cannot write ooo")
    assert got.endswith("File name too long")
    (folder / "circle.npy").symlink_to("circle.npy")
    assert refused(*call, "circle.npy", *HEAD).startswith("cannot write circle.npy: ")
    (folder / "link.npy").symlink_to("x.npy")
    (folder / "hard.npy").hardlink_to("x.npy")
    for name in ("x.npy", "link.npy", "hard.npy", "../" + folder.name + "/x.npy"):
        assert refused(*call, name, *HEAD) == f"OUTPUT {name} is INPUT itself; wanted another file"
    assert refused(*call, "head.safetensors", *HEAD).startswith("OUTPUT head.safetensors is FILE itself")
    assert refused(*call, "mask.npy", *HEAD, "--mask", "mask.npy").startswith("OUTPUT mask.npy is --mask itself")
    assert np.array_equal(np.load("x.npy"), X)


def test_run_refuses_words(refused):
    call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD)
    for number in ("0", "-1", "1.5", "many"):
        assert "--batch: " in refused(*call, f"--batch={number}")
    assert "invalid choice: 'int8'" in refused(*call, "--dtype", "int8")
    assert "invalid choice: 'tensorflow'" in refused(*call, "--backend", "tensorflow")
    assert "required: FILE, INPUT, OUTPUT" in refused("run")


def test_run_says_what_a_library_lacks(folder):
    pytest.importorskip("jax")
    call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--dtype", "float64", "--backend", "jax")
    code, _, error = finish(start(folder, *call, code="import os; os.environ['JAX_ENABLE_X64'] = '0'"))
    assert (code, error.count("\n")) == (2, 1)
    assert "FILE head.safetensors is holding an array of dtype float64; wanted a dtype that can be had" in error
    assert "--dtype" in error


def test_run_without_a_library(folder):
    code = "import sys; sys.modules['torch'] = None"
    call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--backend", "torch")
    code, output, error = finish(start(folder, *call, code=code))
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert 'pip install "setattn[torch]"' in error


def test_run_out_of_memory(refused, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(setattn.Block, "__call__", fail)
    got = refused("run", "head.safetensors", "x.npy", "y.npy", *HEAD)
    assert got == "not enough memory; wanted a smaller --batch"
