"""The commands ``inspect``, ``run`` and ``convert``: what they print, write and refuse, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from siglip import HEADS, PREFIX, SHAPES, D, F

import setattn
from setattn.__main__ import main
from setattn._commands import _stream
from setattn.checkpoints._inspect import examine
from setattn.checkpoints._safetensors import write_safetensors

NUMBERS = sum(int(np.prod(shape)) for shape in SHAPES.values())
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 5, D)).astype(np.float32)
MASK = RNG.random((20, 5)) < 0.6
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(setattn.__file__).parents[1])}
HEAD = ("--prefix", PREFIX, "--option", f"num_heads={HEADS}")


def weights(prefix="", seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {prefix + name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write(path, tensors):
    write_safetensors(path, tensors, {})
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stand in a folder with weights and arrays."""
    write(tmp_path / "head.safetensors", {**weights(PREFIX), "other.weight": np.ones((2, 3), np.float32)})
    for name, a in {"x": X, "x64": X.astype(np.float64), "mask": MASK, "one": X[0]}.items():
        np.save(tmp_path / f"{name}.npy", a)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(folder, capsys):
    """Run a command line and return its exit code and what it printed."""

    def run(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        output, error = capsys.readouterr()
        assert "Traceback" not in error
        return code, output, error

    return run


@pytest.fixture
def refused(say, folder):
    """Run a command line that is refused in one line, writing nothing, and return this line without its beginning."""

    def run(*arguments):
        before = sorted(path.name for path in folder.iterdir())
        code, _, error = say(*arguments)
        beginning = f"python -m setattn {arguments[0]}: "
        assert (code, error.count("\n"), error[-1:]) == (2, 1, "\n"), error
        assert error.startswith(beginning)
        assert sorted(path.name for path in folder.iterdir()) == before
        return error[len(beginning) : -1]

    return run


def head(**options):
    return setattn.load("head.safetensors", prefix=PREFIX, num_heads=HEADS, **options)


def leaves(block):
    found = []
    setattn.map_params(found.append, block.params)
    return found


def words(output):
    return " ".join(output.split())


def start(folder, *arguments, code=""):
    """Start the command line as a process of its own, after some code."""
    lines = f"import runpy, sys\n{code}\nsys.argv = ['setattn', *{[str(a) for a in arguments]!r}]\n"
    lines += "runpy.run_module('setattn', run_name='__main__', alter_sys=True)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen([sys.executable, "-W", "error", "-c", lines], cwd=folder, **pipes)


def finish(process):
    output, error = process.communicate(timeout=300)
    assert "Traceback" not in error, error
    return process.returncode, output, error


# --- run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 20, 1000, None])
def test_run_is_the_call_bit_by_bit(batch, say, folder):
    arguments = () if batch is None else ("--batch", batch)
    code, output, error = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--mask", "mask.npy", *arguments)
    assert (code, error) == (0, "")
    y = np.load("y.npy")
    wanted = head()(X, mask=MASK)
    assert (y.dtype, y.shape, y.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert output.splitlines() == [
        f"block    attention_pool of layout siglip, {NUMBERS} parameters",
        f"backend  numpy {np.__version__}",
        "input    x.npy: (20, 5, 8) float32",
        "input    mask.npy: (20, 5) bool",
        "output   y.npy: (20, 1, 8) float32",
    ]
    assert {path.name for path in folder.iterdir()} == {
        *("head.safetensors", "x.npy", "x64.npy", "mask.npy", "one.npy", "y.npy")
    }


def test_run_writes_what_numpy_would(say, folder):
    assert say("run", "head.safetensors", "x.npy", "y.npy", *HEAD)[0] == 0
    np.save("z.npy", head()(X))
    assert (folder / "y.npy").read_bytes() == (folder / "z.npy").read_bytes()


def test_run_takes_one_set(say):
    code, output, _ = say("run", "head.safetensors", "one.npy", "y.npy", *HEAD)
    assert code == 0
    assert "input    one.npy: (5, 8) float32\noutput   y.npy: (1, 8) float32\n" in output
    assert np.array_equal(np.load("y.npy"), head()(X[0]))


@pytest.mark.parametrize("shape", [(0, 5, D), (3, 0, D), (2, 3, 5, D), (0, D)])
def test_run_takes_empty_batches_empty_sets_and_batches_of_batches(shape, say):
    x = RNG.normal(size=shape).astype(np.float32)
    np.save("x.npy", x)
    assert say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", 2)[0] == 0
    assert np.array_equal(np.load("y.npy"), head()(x))


@pytest.mark.parametrize("kind", ["f64", "big-endian", "fortran", "integers"])
def test_run_converts_where_it_is_asked_to(kind, say):
    x = {"f64": X.astype(float), "big-endian": X.astype(">f4"), "fortran": np.asfortranarray(X)}.get(
        kind, np.round(X).astype(np.int8)
    )
    np.save("x.npy", x)
    asked = ("--dtype", "float32") if kind in ("f64", "integers") else ()
    assert say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, *asked)[0] == 0
    assert np.array_equal(np.load("y.npy"), head()(x.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_run_in_another_dtype(dtype, say):
    assert say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--dtype", dtype)[0] == 0
    wanted = head(xp=np, dtype=getattr(np, dtype))(X.astype(dtype))
    y = np.load("y.npy")
    assert y.dtype == dtype
    assert np.array_equal(y, wanted)


def blocks():
    """Yield a block of every function that has parameters, and the arrays it takes for a batch of 6."""
    rng = np.random.default_rng(1)

    def a(*shape):
        return rng.normal(size=shape).astype(np.float32)

    heads, seed = {"num_heads": 2}, {"rng": 0}
    sets, some = a(6, 5, 8), {"num_latents": 3, "num_layers": 1, **heads, **seed}
    yield "attention", setattn.init_attention(8, **heads, **seed), [a(6, 3, 8), sets]
    yield "cross_attention", setattn.init_cross_attention(8, **heads, **seed), [a(6, 3, 8), sets]
    yield "mab", setattn.init_mab(8, **heads, **seed), [a(6, 3, 8), sets]
    yield "sab", setattn.init_mab(8, **heads, **seed), [sets]
    yield "isab", setattn.init_isab(8, num_inducing=3, **heads, **seed), [sets]
    yield "pma", setattn.init_pma(8, **heads, **seed), [sets]
    yield "set_transformer", setattn.init_set_transformer(8, 8, 2, num_inducing=3, **heads, **seed), [sets]
    yield "attention_pool", setattn.init_attention_pool(8, **heads, **seed), [sets]
    yield "latent_transformer", setattn.init_latent_transformer(8, num_layers=1, **heads, **seed), [sets]
    yield "perceiver", setattn.init_perceiver(8, 8, **some), [sets]
    yield "perceiver_io", setattn.init_perceiver_io(8, 8, 7, 2, **some), [sets, a(6, 4, 7)]
    yield "perceiver_resampler", setattn.init_perceiver_resampler(8, **some), [sets]
    frames = setattn.init_perceiver_resampler(8, num_frames=4, num_media=3, **some)
    yield "perceiver_resampler", frames, [a(6, 2, 4, 5, 8)]
    yield (
        "gated_cross_attention",
        setattn.init_gated_cross_attention(8, 6, **heads, **seed),
        [a(6, 5, 8), a(6, 2, 3, 6)],
    )


@pytest.mark.parametrize(
    ("function", "params", "arrays"), [pytest.param(*b, id=f"{b[0]}-{i}") for i, b in enumerate(blocks())]
)
def test_run_every_block(function, params, arrays, say):
    block = setattn.Block(function, params)
    setattn.save("own.safetensors", block)
    for name, a in zip(("x.npy", "second.npy"), arrays, strict=False):
        np.save(name, a)
    second = ("--second", "second.npy") if len(arrays) == 2 else ()
    mask, masked = {}, ()
    if function != "latent_transformer":
        of = arrays[0] if function == "perceiver_io" else arrays[-1]
        mask = {"mask": np.random.default_rng(2).random(of.shape[:-1]) < 0.7}
        np.save("mask.npy", mask["mask"])
        masked = ("--mask", "mask.npy")
    code, _, error = say("run", "own.safetensors", "x.npy", "y.npy", *second, *masked, "--batch", 4)
    assert (code, error) == (0, "")
    y, wanted = np.load("y.npy"), block(*arrays, **mask)
    assert y.shape == wanted.shape
    assert y.tobytes() == wanted.tobytes()
    if len(arrays) == 2:  # what is put to all sets has no batch
        for alone in ([arrays[0][0], arrays[1]], [arrays[0], arrays[1][0]]):
            if (alone[0].ndim == 2) == (function == "perceiver_io"):
                continue
            np.save("x.npy", alone[0])
            np.save("second.npy", alone[1])
            assert say("run", "own.safetensors", "x.npy", "y.npy", *second, "--batch", 4)[0] == 0
            assert np.array_equal(np.load("y.npy"), block(*alone))


def test_run_takes_the_options_of_a_saved_block(say):
    params = setattn.init_perceiver(D, D, num_latents=3, num_layers=1, num_heads=2, rng=0)
    block = setattn.Block("perceiver", params, {"depth": 3, "activation": "relu"})
    setattn.save("own.safetensors", block)
    assert say("run", "own.safetensors", "x.npy", "y.npy")[0] == 0
    assert np.array_equal(np.load("y.npy"), block(X))


@pytest.mark.skipif(not hasattr(setattn, "InputEmbedding"), reason="no table of tokens yet")
@pytest.mark.parametrize("dtype", ["int64", "uint8", "int32"])
def test_run_takes_tokens(dtype, say, refused):
    params = setattn.init_perceiver(D, D, num_latents=3, num_layers=1, num_heads=2, rng=0)
    table = setattn.InputEmbedding(tokens=RNG.normal(size=(11, D)).astype(np.float32))
    block = setattn.Block("perceiver", params._replace(input=table))
    setattn.save("own.safetensors", block)
    tokens = RNG.integers(0, 11, (6, 5)).astype(dtype)
    np.save("t.npy", tokens)
    np.save("m.npy", MASK[:6])
    code, _, error = say("run", "own.safetensors", "t.npy", "y.npy", "--batch", 4, "--mask", "m.npy")
    assert (code, error) == (0, "")
    assert np.array_equal(np.load("y.npy"), block(tokens, mask=MASK[:6]))
    np.save("t.npy", tokens[0])
    assert say("run", "own.safetensors", "t.npy", "y.npy")[0] == 0
    assert np.array_equal(np.load("y.npy"), block(tokens[0]))
    wanted = "INPUT x.npy has dtype float32; wanted integers, the rows of a table of tokens"
    assert refused("run", "own.safetensors", "x.npy", "z.npy") == wanted
    if dtype == "int64":  # not one that fits once its upper half is lost
        np.save("t.npy", np.full((2, 3), 2**32 + 1))
        assert "2 of 2 results hold numbers" in say("run", "own.safetensors", "t.npy", "y.npy")[1]


@pytest.mark.parametrize("library", ["torch", "jax", "dask"])
def test_run_on_other_libraries(library, say):
    pytest.importorskip(library)
    code, output, _ = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--backend", library, "--batch", 7)
    assert code == 0
    assert f"backend  {library} " in output
    assert np.allclose(np.load("y.npy"), head()(X), atol=1e-4)


def test_run_says_what_is_not_finite(say):
    x = X.copy()
    x[3, 0, 0], x[7, 1, 2] = np.nan, np.inf
    np.save("x.npy", x)
    code, output, error = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", 5)
    assert (code, error) == (0, "")
    assert output.endswith("note     2 of 20 results hold numbers that are not finite\n")
    np.save("x.npy", x[3])
    assert "note     1 of 1 results" in say("run", "head.safetensors", "x.npy", "y.npy", *HEAD)[1]


def test_run_holds_neither_input_nor_output(say):
    sets = 4000
    x = np.lib.format.open_memmap("x.npy", mode="w+", dtype=np.float32, shape=(sets, 500, D))  # 64 MB
    del x
    tracemalloc.start()
    code, _, _ = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 0
    assert peak < 16e6
    assert np.load("y.npy", mmap_mode="r").shape == (sets, 1, D)


def test_parts_are_not_large_by_default():
    def given(*shape):
        a = np.broadcast_to(np.float32(0), shape)
        return _stream.Given("x", "INPUT", a, 2, a.dtype)

    assert _stream.default_batch([given(1000, 100, 100)]) == 419
    assert _stream.default_batch([given(10, 10**5, 100)]) == 1
    assert _stream.default_batch([given(10, 0, 8)]) >= 10
    assert _stream.default_batch([given(5, 8)]) >= 1


# --- what run refuses -----------------------------------------------------------------------------------------------


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


# --- what is left behind --------------------------------------------------------------------------------------------


def slow(folder):
    """Return the arguments of a run that takes long, whose output exists already."""
    params = setattn.init_set_transformer(D, 64, 2, num_heads=4, num_inducing=16, rng=0)
    setattn.save(folder / "slow.safetensors", setattn.Block("set_transformer", params))
    x = np.lib.format.open_memmap(folder / "many.npy", mode="w+", dtype=np.float32, shape=(50_000, 100, D))
    del x  # a file with a hole
    (folder / "y.npy").write_text("old")
    return "run", "slow.safetensors", "many.npy", "y.npy", "--batch", "1"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_stopped_run_leaves_nothing(name, folder):
    word = "interrupted" if name == "SIGINT" else "terminated"
    number = getattr(signal, name)
    arguments = slow(folder)
    before = sorted(path.name for path in folder.iterdir())
    process = start(folder, *arguments)
    deadline = time.monotonic() + 120
    while not any(folder.glob(".y.npy.*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # it is well under way
    process.send_signal(number)
    code, _, error = finish(process)
    assert (code, error) == (128 + number, f"{word}\n")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "y.npy").read_text() == "old"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits of POSIX")
def test_a_full_disk_leaves_nothing(folder):
    before = sorted(path.name for path in folder.iterdir())
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"
    call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD)
    code, _, error = finish(start(folder, *call, code=limit))
    assert (code, error) == (2, "python -m setattn run: cannot write y.npy: File too large\n")
    code, _, error = finish(start(folder, "convert", "head.safetensors", "y.safetensors", *HEAD, code=limit))
    assert code == 2
    assert error == "python -m setattn convert: cannot write y.safetensors: File too large\n"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_error_on_the_way_leaves_nothing(say, folder, monkeypatch):
    calls = []
    true = setattn.convert_params

    def fail(params, *arguments, **options):
        calls.append(params)
        if len(calls) == 4:
            raise MemoryError
        return true(params, *arguments, **options)

    monkeypatch.setattr(setattn, "convert_params", fail)
    before = sorted(path.name for path in folder.iterdir())
    code, _, error = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", 3)
    assert (code, error) == (2, "python -m setattn run: not enough memory; wanted a smaller --batch\n")
    assert sorted(path.name for path in folder.iterdir()) == before


# --- progress -------------------------------------------------------------------------------------------------------


def test_no_bar_without_a_terminal_or_its_package(folder):
    call = ("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", "1")
    assert finish(start(folder, *call))[::2] == (0, "")
    assert finish(start(folder, *call, code="import sys; sys.modules['tqdm'] = None"))[::2] == (0, "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="terminals of POSIX")
def test_a_bar_on_a_terminal(folder):
    pytest.importorskip("tqdm")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    call = ("-m", "setattn", "run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--batch", "1")
    with subprocess.Popen(
        [sys.executable, *call], cwd=folder, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT
    ) as process:
        os.close(theirs)
        shown = os.read(ours, 10_000).decode()
        assert process.stdout.read().endswith(b"output   y.npy: (20, 1, 8) float32\n")
    os.close(ours)
    assert process.returncode == 0
    assert "/20 " in shown


# --- convert --------------------------------------------------------------------------------------------------------


def test_convert_saves_what_load_loads(say):
    code, output, error = say("convert", "head.safetensors", "own.safetensors", *HEAD, "--option", "activation=gelu")
    assert (code, error) == (0, "")
    assert output == f"wrote    own.safetensors\nblock    attention_pool, {NUMBERS} parameters\n"
    block, wanted = setattn.load("own.safetensors"), head(activation="gelu")
    assert (block.function, block.options, block.layout) == (wanted.function, wanted.options, "siglip")
    assert [a.tobytes() for a in leaves(block)] == [a.tobytes() for a in leaves(wanted)]
    assert block(X).tobytes() == wanted(X).tobytes()
    assert say("convert", "own.safetensors", "half.safetensors", "--dtype", "float16")[0] == 0
    assert setattn.load("half.safetensors").params.probe.dtype == np.float16
    np.savez("w.npz", **weights())
    assert say("convert", "w.npz", "w.safetensors", "--option", "num_heads=2")[0] == 0
    assert say("run", "own.safetensors", "x.npy", "y.npy")[0] == 0
    assert np.array_equal(np.load("y.npy"), wanted(X))


def test_convert_refuses(refused, folder):
    call = ("convert", "head.safetensors")
    assert refused(*call, "own.npz").startswith("argument OUT: 'own.npz' does not end in .safetensors")
    assert refused(*call, "head.safetensors", *HEAD) == "OUT head.safetensors is FILE itself; wanted another file"
    assert refused(*call, "none/o.safetensors", *HEAD).startswith("cannot write none/o.safetensors: No such file")
    assert refused(*call, "o.safetensors", "--prefix", PREFIX).startswith("--option num_heads is not given; wanted")
    (folder / "folder.safetensors").mkdir()
    assert "it exists and is no ordinary file" in refused(*call, "folder.safetensors", *HEAD)


# --- inspect --------------------------------------------------------------------------------------------------------


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
    assert f"  {'siglip':24} probe\n" in output
    _, output, _ = say("inspect", "other.npz", "--prefix", "b")
    assert "No tensor of a known layout is here under prefix 'b'." in output


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


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "run", "convert"])
def test_help_has_an_example(command, say):
    code, output, _ = say(command, "--help")
    assert code == 0
    assert f"example: python -m setattn {command} " in output


def test_unknown_commands_name_the_known_ones(say):
    code, _, error = say("rnu")
    assert (code, error.count("\n")) == (2, 1)
    assert all(name in error for name in ("demo", "inspect", "run", "convert"))


def test_they_run_as_users_start_them(folder):
    for call in (["inspect", "head.safetensors"], ["convert", "head.safetensors", "own.safetensors", *HEAD]):
        done = subprocess.run(
            [sys.executable, "-m", "setattn", *call], capture_output=True, text=True, check=False, env=ENVIRONMENT
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "attention_pool" in done.stdout


def test_importing_the_library_does_not_import_the_commands():
    names = ("setattn._commands", "setattn.checkpoints._inspect", "setattn.checkpoints._words", "argparse")
    code = f"import setattn, sys; print([m for m in sys.modules if m.startswith({names})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == "[]\n"
