"""The command ``run`` on sets that are large themselves: their elements go through in chunks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import commands
import numpy as np
import pytest
from commands import HEAD, D, finish, head, start

import setattn
from setattn import streaming
from setattn._commands import _chunks, _run, _stream

folder, say, refused = commands.folder, commands.say, commands.refused

WHOLE = ("sab", "latent_transformer", "gated_cross_attention")  # each element attends to all others, or is not streamed
ROWS = ("isab",)
PMA = setattn.init_pma(8, num_heads=2, rng=0)
ISAB = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
CHUNK = 4 * 8 * 2  # bytes of two elements of eight features
BLOCKS = [pytest.param(*b, id=f"{b[0]}-{i}") for i, b in enumerate(commands.blocks())]


@pytest.fixture
def small(monkeypatch):
    """Let sets of one element be small, and all others large."""
    monkeypatch.setattr(_chunks, "_SET_BYTES", 4 * 8)
    monkeypatch.setattr(_chunks, "PART_BYTES", CHUNK)


def save(block, *arrays, mask=None):
    setattn.save("own.safetensors", block)
    for name, a in zip(("x", "second"), arrays, strict=False):
        np.save(f"{name}.npy", a)
    if mask is not None:
        np.save("m.npy", mask)


def call(*arguments):
    return "run", "own.safetensors", "x.npy", "y.npy", *arguments


def streamed(block, arrays, mask=None):
    """Stack what the library makes of each set."""
    *asking, asked = arrays[::-1] if block.function == "perceiver_io" else arrays
    results = []
    for i in range(len(asked)):
        given = dict(block.options)
        if asking:
            given["queries"] = asking[0][i] if asking[0].ndim == 3 else asking[0]
        given |= {} if mask is None else {"mask": mask[i], "length": int(mask[i].sum())}
        if block.function in ROWS:
            parts = list(streaming.transform(block.function, block.params, asked[i], chunk_bytes=CHUNK, **given))
            results.append(np.concatenate(parts))
        else:
            results.append(streaming.fold(block.function, block.params, asked[i], chunk_bytes=CHUNK, **given))
    return np.stack(results)


@pytest.mark.parametrize(("function", "params", "arrays"), BLOCKS)
def test_every_block(function, params, arrays, say, small, monkeypatch):
    """In chunks where that is possible, to the bits of a stream of each set; whole where it is not."""
    block = setattn.Block(function, params)
    whole = function in WHOLE or arrays[0].ndim > 3
    monkeypatch.setattr(_chunks, "_SET_BYTES", 4 * 8 * 4)  # of five elements is large, of four is not
    of = arrays[0] if function == "perceiver_io" else arrays[-1]
    mask = None if function == "latent_transformer" else np.random.default_rng(2).random(of.shape[:-1]) < 0.7
    save(block, *arrays, mask=mask)
    second = ("--second", "second.npy") if len(arrays) == 2 else ()
    for masked in (False, True)[: 1 if mask is None else 2]:
        code, output, error = say(*call(*second, *(("--mask", "m.npy") if masked else ())))
        assert (code, error) == (0, "")
        assert ("\nchunks   of 0 MB of " in output) == (not whole)
        own = {"mask": mask} if masked else {}
        wanted = block(*arrays, **own) if whole else streamed(block, arrays, *own.values())
        y = np.load("y.npy")
        assert (y.shape, y.dtype, y.tobytes()) == (wanted.shape, wanted.dtype, wanted.tobytes())
        assert np.allclose(y, block(*arrays, **own), atol=1e-5)


@pytest.mark.parametrize("function", ["attention", "cross_attention", "mab"])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_attend_to_a_small_set(function, shared, say, small):
    """What asks goes through in chunks, where what it asks is small; it may ask all sets."""
    block = setattn.Block(function, getattr(setattn, f"init_{function}")(8, num_heads=2, rng=0))
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 7, 8), (3, 1, 8)))
    x, mask = x[0] if shared else x, np.array([[True], [False], [True]])
    save(block, x, y, mask=mask)
    code, output, error = say(*call("--second", "second.npy", "--mask", "m.npy"))
    assert (code, error) == (0, "")
    assert "chunks   of 0 MB of INPUT x.npy, gone through once" in output
    assert np.allclose(np.load("y.npy"), block(x, y, mask=mask), atol=1e-6)


@pytest.mark.parametrize("function", ["attention", "cross_attention", "mab"])
def test_queries_of_all_sets(function, say, small):
    """Queries without a batch are put to every set, whose elements come in chunks."""
    block = setattn.Block(function, getattr(setattn, f"init_{function}")(8, num_heads=2, rng=0))
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 8), (3, 7, 8)))
    save(block, x, y)
    code, output, error = say(*call("--second", "second.npy"))
    assert (code, error) == (0, "")
    assert "chunks   of 0 MB of --second second.npy, gone through once" in output
    assert np.allclose(np.load("y.npy"), block(x, y), atol=1e-6)


def test_batches_of_batches_and_single_sets(say, small):
    params = setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0)
    for shape in ((2, 3, 5, 8), (5, 8), (0, 5, 8), (2, 0, 8)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        save(setattn.Block("pma", params), x)
        assert say(*call())[0] == 0
        y = np.load("y.npy")
        assert y.shape == (*shape[:-2], 3, 8)
        assert np.allclose(y, setattn.pma(x, params), atol=1e-6)


def test_lengths_and_garbage(say, small):
    """Parameters that depend on how many elements take part know it; masked elements may hold anything."""
    params = setattn.init_pma(8, num_heads=2, rng=0)
    scale = setattn.LengthScale(setattn.Linear(np.full((1, 2), 0.3, np.float32)))
    params = params._replace(mab=params.mab._replace(attention=params.mab.attention._replace(length_scale=scale)))
    x, mask = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32), np.arange(9) < [[4], [0]]
    save(setattn.Block("pma", params), np.where(mask[..., None], x, np.nan), mask=mask)
    assert say(*call("--mask", "m.npy"))[::2] == (0, "")
    assert np.allclose(np.load("y.npy"), setattn.pma(x, params, mask=mask), atol=1e-6)
    assert "note     2 of 2 results hold" in say(*call())[1]
    save(setattn.Block("isab", ISAB), x.astype(float))
    assert say(*call("--dtype", "float32"))[0] == 0
    x[1, 4] = np.nan
    np.save("x.npy", x)
    assert "note     1 of 2 results hold" in say(*call())[1]


def test_tokens(say, small):
    params = setattn.init_perceiver(D, D, num_latents=3, num_layers=1, num_heads=2, rng=0)
    table = setattn.InputEmbedding(tokens=np.random.default_rng(0).normal(size=(11, D)).astype(np.float32))
    block = setattn.Block("perceiver", params._replace(input=table))
    tokens = np.random.default_rng(1).integers(0, 11, (2, 50))
    save(block, tokens)
    code, output, _ = say(*call())
    assert code == 0
    assert "chunks   " in output
    assert np.allclose(np.load("y.npy"), block(tokens), atol=1e-5)


def test_a_decoder_that_its_inputs_ask(say, small):
    params = setattn.init_perceiver_io(8, 8, 8, 2, num_latents=3, num_layers=1, num_heads=2, rng=0)
    x = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)
    block = setattn.Block("perceiver_io", params)
    save(block, x)
    assert say(*call())[0] == 0
    assert np.allclose(np.load("y.npy"), block(x), atol=1e-5)
    assert np.load("y.npy").shape == (2, 9, 2)


@pytest.mark.parametrize("library", ["torch", "jax", "dask"])
def test_other_libraries(library, say, small):
    pytest.importorskip(library)
    code, output, _ = say("run", "head.safetensors", "x.npy", "y.npy", *HEAD, "--backend", library)
    assert code == 0
    assert ("chunks   " in output) == (library != "dask")
    assert np.allclose(np.load("y.npy"), head()(commands.X), atol=1e-4)


def test_the_bar_counts_elements(say, small, monkeypatch):
    seen = []

    class Bar:
        update = staticmethod(seen.append)

    def bar(work):
        seen.append(-work.total)
        return contextlib.nullcontext(Bar)

    monkeypatch.setattr(_run, "_bar", bar)
    params = setattn.init_set_transformer(8, 8, 2, num_inducing=3, num_encoders=2, num_heads=2, rng=0)
    save(setattn.Block("set_transformer", params), commands.X)
    assert say(*call())[0] == 0
    assert seen[0] == -commands.X.shape[0] * commands.X.shape[1] * 3
    assert sum(seen) == 0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory(refused, small, monkeypatch):
    """A set that can neither be cut nor held is refused in one line, and says why it cannot be cut."""
    mab = setattn.init_mab(8, num_heads=2, rng=0)
    deep = setattn.init_set_transformer(8, 8, 2, num_inducing=3, num_heads=2, rng=0)._replace(encoder=(mab,))
    io = setattn.init_perceiver_io(8, 8, 8, 2, num_latents=3, num_layers=1, num_heads=2, rng=0)
    x = commands.X
    monkeypatch.setattr(_chunks, "_memory", lambda: 100)
    begins = "INPUT x.npy has sets of 0.0 GB, more than the memory of this machine, and "
    for block, why in {
        setattn.Block("sab", mab): "sab cannot take its elements in chunks",
        setattn.Block("set_transformer", deep): (
            "set_transformer cannot take its elements in chunks: params.encoder[0] is a MAB; wanted a setattn.ISAB: "
            "in a set attention block, each element attends to all the others"
        ),
    }.items():
        save(block, x)
        assert refused(*call()) == begins + why
    save(setattn.Block("mab", mab), x, x)
    got = refused(*call("--second", "second.npy"))
    assert got == begins + "mab cannot take INPUT x.npy and --second second.npy in chunks"
    save(setattn.Block("perceiver_io", io), x[:, :1], x)
    got = refused(*call("--second", "second.npy"))
    assert got.endswith("perceiver_io cannot take --second second.npy in chunks")
    pytest.importorskip("dask")
    save(setattn.Block("pma", PMA), x)
    got = refused(*call("--backend", "dask"))
    assert got == begins + "on the backend dask, sets go through whole"


def test_shapes(refused, small):
    params = setattn.init_mab(8, num_heads=2, rng=0)
    x = commands.X
    save(setattn.Block("pma", PMA), x[..., :7], mask=commands.MASK[:, 1:])
    assert refused(*call()) == "INPUT x.npy has shape (20, 5, 7); wanted (..., n, 8)"
    np.save("x.npy", x)
    wanted = "--mask m.npy has shape (20, 4); wanted (20, 5), one entry for each element of x"
    assert refused(*call("--mask", "m.npy")) == wanted
    save(setattn.Block("mab", params), x[:, :1], x[:9])
    got = refused(*call("--second", "second.npy"))
    assert got.startswith("INPUT x.npy has shape (20, 1, 8); wanted (9, 1, 8), as the other array has shape (9, 5, 8)")
    save(setattn.Block("mab", params), x[:9, :1, :7], x[:9])
    assert "INPUT x.npy has shape (9, 1, 7)" in refused(*call("--second", "second.npy"))
    pool = setattn.init_attention_pool(8, num_heads=2, rng=0)._replace(position=np.ones((4, 8), np.float32))
    save(setattn.Block("attention_pool", pool), x)
    assert "wanted at most 4 elements in all, the rows of the table for their places" in refused(*call())


@pytest.mark.parametrize("function", ["pma", "isab"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_file_that_changes_leaves_nothing(function, change, folder, say, small, monkeypatch):
    """A file that is cut short in the middle of the run is named, and no half of a result is there."""
    save(setattn.Block(function, {"pma": PMA, "isab": ISAB}[function]), commands.X)
    (folder / "y.npy").write_text("old")
    before = sorted(path.name for path in folder.iterdir())
    true, calls = _stream.Given.read, []

    def read(given, *keys):
        calls.append(keys)
        if len(calls) == 7:
            os.truncate("x.npy", 1000) if change == "cut" else (folder / "x.npy").unlink()
        return true(given, *keys)

    monkeypatch.setattr(_stream.Given, "read", read)
    code, _, error = say(*call())
    assert (code, error) == (2, "python -m setattn run: INPUT x.npy has changed while it was read\n")
    assert (folder / "y.npy").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == [
        name for name in before if change == "cut" or name != "x.npy"
    ]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits and sizes as Linux has them")
def test_where_memory_ends(folder):
    """A set that a limit on memory keeps out is refused in one line, and nothing is left behind."""
    setattn.save(folder / "own.safetensors", setattn.Block("sab", setattn.init_mab(64, num_heads=1, rng=0)))
    np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(1_600_000, 64))  # 410 MB
    before = sorted(path.name for path in folder.iterdir())
    limit = (
        "import pathlib, resource, setattn._commands._run\n"
        "now = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 950_000_000,) * 2)"  # for two maps, and not for a copy
    )
    code, _, error = finish(start(folder, *call(), code=limit))
    assert (code, error) == (2, "python -m setattn run: not enough memory for one set\n")
    assert sorted(path.name for path in folder.iterdir()) == before


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process as Linux tells it")
@pytest.mark.parametrize("function", ["pma", "isab"])
def test_memory_is_flat(function, folder):
    """Four times as many elements take no more memory, of the whole process, and less than half of their file."""
    params = {
        "pma": setattn.init_pma(64, num_heads=1, rng=0),
        "isab": setattn.init_isab(64, num_inducing=2, num_heads=1, rng=0),
    }[function]
    setattn.save(folder / "own.safetensors", setattn.Block(function, params))
    report = "import atexit, pathlib; atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text()))"
    peaks = []
    for n in (400_000, 1_600_000):  # 102 MB and 410 MB, of files with a hole
        np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(n, 64))
        code, output, error = finish(start(folder, *call(), code=report))
        assert (code, error) == (0, "")
        peaks.append(1024 * int(output.split("VmHWM:")[1].split()[0]))
    assert abs(peaks[1] - peaks[0]) < 16e6
    assert peaks[1] < 200e6
    assert np.load(folder / "y.npy", mmap_mode="r").shape == ((n, 64) if function == "isab" else (1, 64))
