"""The command ``run``: what it prints and writes, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc

import commands
import numpy as np
import pytest
from commands import ENVIRONMENT, HEAD, MASK, NUMBERS, RNG, D, X, finish, head, start

import setattn
from setattn._commands import _stream

folder, say, refused = commands.folder, commands.say, commands.refused


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


@pytest.mark.parametrize(
    ("function", "params", "arrays"), [pytest.param(*b, id=f"{b[0]}-{i}") for i, b in enumerate(commands.blocks())]
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
    # Between NumPy's opening of a file and its "with", a signal leaves the file to the garbage collector. A process
    # that nohup or a shell starts in the background ignores signals.
    code = "import signal, warnings; warnings.simplefilter('ignore', ResourceWarning); "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(folder, *arguments, code=code)
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
