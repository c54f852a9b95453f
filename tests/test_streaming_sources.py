"""Where chunks come from, and what is said where they are broken, change, or do not fit."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import strategies
import tolerances
import zarr
from strategies import same

import setattn
from setattn import streaming

one_thread = strategies.one_thread

PARAMS = setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0)
DEEP = setattn.init_set_transformer(8, 16, 4, num_heads=4, num_inducing=5, num_encoders=2, rng=0)
MAB = setattn.init_mab(8, num_heads=2, rng=0)
X = np.random.default_rng(1).normal(size=(2, 50, 8)).astype(np.float32)
MASK = np.random.default_rng(2).random((2, 50)) < 0.7
BYTES = 2 * 8 * 4 * 10  # of ten elements of both sets


class Watched:
    """An array on disk that notes which elements it is asked for."""

    def __init__(self, a):
        self._a, self.shape, self.dtype, self.chunks, self.asked = a, a.shape, a.dtype, a.chunks, []

    def __getitem__(self, key):
        self.asked.append((key[1].start, key[1].stop))
        return self._a[key]


@pytest.fixture
def on_disk(tmp_path):
    """Write arrays to disk as zarr or h5py does, in chunks or, in HDF5 alone, in none."""
    with h5py.File(tmp_path / "arrays.h5", "w") as file:

        def write(kind, a, chunks):
            name, grown = f"{kind}{len(made)}", (None,) * a.ndim if chunks else None
            if kind == "zarr":
                made.append(zarr.create_array(tmp_path / f"{name}.zarr", shape=a.shape, dtype=a.dtype, chunks=chunks))
            else:
                made.append(file.create_dataset(name, a.shape, a.dtype, chunks=chunks, maxshape=grown))
            made[-1][...] = a
            return made[-1]

        made = []
        yield write


def close(y, want):
    tolerances.assert_close(y, want, np.full(want.shape, 2.0**-18), "sources")


def pieces():
    return [X[:, i : i + 10] for i in range(0, 50, 10)]


def sources(folder, on_disk):
    np.save(folder / "x.npy", X)
    np.save(folder / "f.npy", np.asfortranarray(X))
    np.save(folder / "big.npy", X.astype(">f4"))
    for i, part in enumerate(pieces()):
        np.save(folder / f"{i}.npy", part)
    return {
        "list": pieces(),
        "tuple": tuple(pieces()),
        "pairs": [(part, None) for part in pieces()],
        "function": lambda: iter(pieces()),
        "array": X,
        "file": folder / "x.npy",
        "name": str(folder / "x.npy"),
        "Fortran's order": folder / "f.npy",
        "another byte order": folder / "big.npy",
        "files": [folder / f"{i}.npy" for i in range(5)],
        "files of a function": lambda: (str(folder / f"{i}.npy") for i in range(5)),
        "map": np.load(folder / "x.npy", mmap_mode="r"),
        "maps": [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(5)],
        "zarr": on_disk("zarr", X, (1, 10, 8)),
        "zarr in parts": [on_disk("zarr", part, (2, 5, 4)) for part in pieces()],
        "HDF5": on_disk("HDF5", X, (2, 5, 8)),
        "HDF5 without chunks": on_disk("HDF5", X, None),
    }


@pytest.mark.parametrize("function", ["pma", "set_transformer"])
def test_every_source(tmp_path, on_disk, function):
    """All sources of the same chunks give the same bits."""
    params = PARAMS if function == "pma" else DEEP
    want = getattr(setattn, function)(X, params)
    first = None
    for name, source in sources(tmp_path, on_disk).items():
        y = streaming.fold(function, params, source, chunk_bytes=BYTES)
        close(y, want)
        first = y if first is None else first
        assert y.dtype == first.dtype, name
        same(y, first)


@pytest.mark.parametrize("kind", ["array", "file", "zarr", "HDF5", "pairs", "pairs on disk"])
def test_masks(tmp_path, on_disk, kind):
    x = np.where(MASK[..., None], X, np.nan)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "m.npy", MASK)
    source, mask = {
        "array": (x, MASK),
        "file": (tmp_path / "x.npy", tmp_path / "m.npy"),
        "zarr": (on_disk("zarr", x, (2, 7, 8)), on_disk("zarr", MASK, (2, 7))),
        "HDF5": (on_disk("HDF5", x, (2, 7, 8)), on_disk("HDF5", MASK, (2, 9))),
        "pairs": ([(x[:, :30], MASK[:, :30]), (x[:, 30:], MASK[:, 30:])], None),
        "pairs on disk": ([(on_disk("zarr", x, (2, 7, 8)), on_disk("HDF5", MASK, None))], None),
    }[kind]
    close(
        streaming.fold("set_transformer", DEEP, source, mask=mask, chunk_bytes=BYTES),
        setattn.set_transformer(X, DEEP, mask=MASK),
    )


@pytest.mark.parametrize("kind", ["zarr", "HDF5"])
def test_chunks_on_disk_are_read_whole(on_disk, kind):
    source = Watched(on_disk(kind, X, (1, 7, 8)))
    streaming.fold("pma", PARAMS, source, chunk_bytes=BYTES * 2)
    assert source.asked == [(0, 14), (14, 28), (28, 42), (42, 50)]
    source = Watched(on_disk(kind, X, (1, 20, 8)))
    streaming.fold("pma", PARAMS, source, chunk_bytes=1)
    assert source.asked == [(0, 20), (20, 40), (40, 50)]


def test_a_file_goes_to_the_library_of_the_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    np.save(tmp_path / "x.npy", X)
    params = setattn.convert_params(PARAMS, torch)
    with torch.no_grad():
        y = streaming.fold("pma", params, tmp_path / "x.npy", chunk_bytes=BYTES)
        assert isinstance(y, torch.Tensor)
        close(y.numpy(), setattn.pma(X, PARAMS))
        with pytest.raises(setattn.NamespaceError, match="chunk 0' is an array of numpy; wanted an array of torch"):
            streaming.fold("pma", params, X)


@pytest.mark.parametrize(
    "empty", [[], [X[:, :0]], X[:, :0], lambda: iter(())], ids=["none", "chunk", "array", "function"]
)
def test_nothing_is_the_empty_set(empty):
    batch = () if len(empty if isinstance(empty, list) else "x") == 0 or callable(empty) else (2,)
    close(streaming.fold("pma", PARAMS, empty), setattn.pma(X[:, :0] if batch else X[0, :0], PARAMS))
    assert streaming.fold("set_transformer", DEEP, empty, batch=(2,)).shape == (2, 1, 4)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iterator", "array", "map", "zarr", "HDF5"])
def test_rows(tmp_path, on_disk, kind):
    params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
    want = setattn.isab(X, params, mask=MASK)
    if kind == "iterator":
        parts = list(streaming.transform("isab", params, X, mask=MASK, chunk_bytes=BYTES))
        assert [part.shape for part in parts] == [(2, 10, 8)] * 5
        y = np.concatenate(parts, axis=1)
    else:
        out = np.empty_like(X)
        if kind == "map":
            out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", X.dtype, X.shape)
        elif kind != "array":
            out = on_disk(kind, out, (2, 20, 8))
        y = streaming.transform("isab", params, X, mask=MASK, out=out, chunk_bytes=BYTES)
        assert y is out
    close(np.asarray(y[...]), want)
    assert not np.asarray(y[...])[~MASK].any()


def test_rows_of_a_context(tmp_path):
    """Rows that attend to a context in memory are made in one pass, in which a generator will do."""
    want = setattn.mab(X, X[:, ::-1][:, :7], MAB, query_mask=MASK, mask=MASK[:, :7])
    given = {"context": X[:, ::-1][:, :7], "context_mask": MASK[:, :7]}
    pairs = ((X[:, i : i + 10], MASK[:, i : i + 10]) for i in range(0, 50, 10))
    close(np.concatenate(list(streaming.transform("mab", MAB, pairs, **given)), axis=1), want)
    np.save(tmp_path / "x.npy", X)
    out = np.empty_like(X)
    y = streaming.transform("mab", MAB, tmp_path / "x.npy", mask=MASK, out=out, chunk_bytes=BYTES, **given)
    assert y is out
    close(out, want)
    state = streaming.create("mab", MAB, batch=(2,), **given)
    assert (state.passes, repr(state)) == (1, "<setattn.streaming.State mab, batch (2,), 0 elements in 0 chunks>")
    streaming.save(tmp_path / "state.safetensors", state)
    state, part = streaming.rows(streaming.load(tmp_path / "state.safetensors"), X[:, :9], mask=MASK[:, :9])
    close(part, want[:, :9])
    with pytest.raises(setattn.OptionError, match=r"one of rows that attend to a context; wanted .* see rows\(\)"):
        streaming.finish(state)
    with pytest.raises(setattn.ParameterError, match=r"'b\.context' is of other numbers"):
        streaming.merge(state, streaming.create("mab", MAB, batch=(2,), **(given | {"context": X[:, 1:8]})))
    with pytest.raises(setattn.ShapeError, match=r"chunk 1' has shape \(2, 10, 7\); wanted \(2, n, 8\)"):
        list(streaming.transform("mab", MAB, [X, X[:, :10, :7]], **given))


def test_rows_need_room():
    params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
    for shape in ((2, 49, 8), (2, 51, 8), (2, 50, 7), (100, 8)):
        with pytest.raises(setattn.ShapeError, match=r"'out' has shape .*; wanted .* a row for each element"):
            streaming.transform("isab", params, X, out=np.empty(shape, np.float32), chunk_bytes=BYTES)
    with pytest.raises(setattn.ShapeError, match="wanted 50 rows"):
        streaming.transform("isab", params, pieces(), out=np.empty((2, 60, 8), np.float32))
    with pytest.raises(setattn.OptionError, match="transform: argument 'function' is 'pma'; wanted one with a row"):
        streaming.transform("pma", PARAMS, X)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def refuses(error, words, source, function="pma", params=PARAMS, **options):
    with pytest.raises(error) as raised:
        streaming.fold(function, params, source, **options)
    message = str(raised.value)
    assert words in message, message
    assert "\n" not in message


def test_a_generator_is_not_gone_through_twice():
    """That is known before anything is taken from it."""
    taken = []

    def generate():
        for part in pieces():
            taken.append(part)
            yield part

    refuses(
        streaming.SourceError,
        "argument 'source' is a generator; wanted one to go through 3 times",
        generate(),
        "set_transformer",
        DEEP,
    )
    assert not taken
    close(streaming.fold("pma", PARAMS, generate()), setattn.pma(X, PARAMS))
    params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
    with pytest.raises(streaming.SourceError, match="to go through 2 times"):
        streaming.transform("isab", params, generate())


def test_a_source_is_the_same_in_every_pass():
    calls = []

    def once():
        calls.append(0)
        return iter(pieces()[: 5 if len(calls) == 1 else 4])

    words = "is one of 40 elements in pass 2; wanted the same in every pass: the first had 50 elements"
    refuses(streaming.SourceError, words, once, "set_transformer", DEEP)
    exhausted = iter(pieces())
    words = "is one of 0 elements in pass 2; wanted the same in every pass"
    refuses(streaming.SourceError, words, lambda: exhausted, "set_transformer", DEEP)


def test_the_error_names_the_chunk(on_disk):
    a, b = X[:, :10], X[:, 10:]
    refuses(setattn.ShapeError, "chunk 1' has shape (2, 40, 7); wanted (2, n, 8)", [a, b[..., :7]])
    refuses(setattn.ShapeError, "chunk 1' has shape (1, 40, 8); wanted (2, n, 8)", [a, b[:1]])
    refuses(setattn.ShapeError, "chunk 0' has shape (8,); wanted (..., n, dim)", [X[0, 0]])
    refuses(setattn.DTypeError, "chunk 2' has dtype float64; wanted float32, as params has", [a, a, b.astype(float)])
    refuses(setattn.DTypeError, "chunk 0' has dtype int64; wanted float32", [a.astype(np.int64)])
    refuses(setattn.NamespaceError, "chunk 1' is a list; wanted an array of numpy", [a, b.tolist()])
    refuses(setattn.MaskError, "mask of chunk 1' has shape (2, 50); wanted (2, 40)", [(a, None), (b, MASK)])
    refuses(setattn.DTypeError, "mask of chunk 0' has dtype float64; wanted bool", [(a, np.ones((2, 10)))])
    x = on_disk("zarr", X.astype(float), (2, 50, 8))
    refuses(setattn.DTypeError, "chunk 0' has dtype float64; wanted float32", x)


def test_another_library_half_way():
    torch = pytest.importorskip("torch")
    refuses(setattn.NamespaceError, "chunk 1' is an array of torch; wanted an array of numpy", [X, torch.tensor(X)])


def test_what_is_no_source():
    refuses(streaming.SourceError, "'source' is a int; wanted an iterable of chunks, an array", 3)
    refuses(streaming.SourceError, "No such file", "nowhere.npy")
    refuses(setattn.ShapeError, "'source' has shape (8,); wanted (..., n, dim)", X[0, 0])
    refuses(setattn.MaskError, "'mask' has shape (2, 49); wanted an array of shape (2, 50)", X, mask=MASK[:, 1:])
    refuses(setattn.OptionError, "'mask' is given; wanted None, as the chunks of an iterable", [X], mask=MASK)
    refuses(setattn.OptionError, "'chunk_bytes' is 0; wanted an integer of at least 1", X, chunk_bytes=0)
    refuses(setattn.OptionError, "'progress' is 1; wanted True or False", X, progress=1)
    refuses(setattn.OptionError, "'checkpoint_every' is 0", X, checkpoint_every=0)
    refuses(setattn.OptionError, "'heads' is given; wanted one of pma in a stream: query_residual", X, heads=3)


def test_broken_files(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"nothing")
    refuses(streaming.SourceError, "wanted a whole .npy file", path)
    np.save(path, X)
    path.write_bytes(path.read_bytes()[:-4])
    refuses(streaming.SourceError, "wanted a whole .npy file", path)
    np.save(path, np.array([{}]), allow_pickle=True)
    refuses(streaming.SourceError, "wanted a whole .npy file", path)
    np.savez(path.with_suffix(".npz"), X)
    refuses(streaming.SourceError, "wanted a whole .npy file", path.with_suffix(".npz"))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", ["cut", "touched", "gone"])
def test_files_must_not_change(tmp_path, mapped, change):
    path = tmp_path / "x.npy"
    np.save(path, X)
    source = np.load(path, mmap_mode="r") if mapped else path
    rows = streaming.transform(
        "isab", setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), source, chunk_bytes=BYTES
    )
    next(rows)
    size = path.stat().st_size
    if change == "cut":
        os.truncate(path, size - 1000)
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    words = {
        "cut": f"with {size - 1000} bytes, not {size}; wanted a file that stays as it is; it had changed by chunk 1",
        "touched": "with another time of change; wanted a file that stays as it is; it had changed by chunk 1",
        "gone": "wanted a file that is still there at chunk 1: No such file",
    }[change]
    with pytest.raises(streaming.SourceError) as raised:
        list(rows)
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", ["zarr", "HDF5"])
def test_arrays_on_disk_must_not_change(on_disk, kind):
    source = on_disk(kind, X, (2, 10, 8))
    rows = streaming.transform(
        "isab", setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), source, chunk_bytes=BYTES
    )
    next(rows)
    source.resize((2, 60, 8))
    with pytest.raises(streaming.SourceError, match=r"stays of shape .* until chunk 1"):
        list(rows)


# --- going on from a file, and a bar --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7, 12])
def test_a_killed_fold_goes_on_to_the_same_bits(tmp_path, stop):
    """Whatever pass it was in; the state on disk is that of the last multiple of two chunks."""
    path = tmp_path / "state.safetensors"
    read = []

    def source(limit):
        def generate():
            for part in pieces():
                if len(read) == limit:
                    raise KeyboardInterrupt
                read.append(0)
                yield part

        return generate

    options = {"checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        streaming.fold("set_transformer", DEEP, source(stop), **options)
    assert path.exists() == (stop >= 2)
    y = streaming.fold("set_transformer", DEEP, source(None), **options)
    same(y, streaming.fold("set_transformer", DEEP, pieces()))
    same(streaming.fold("set_transformer", DEEP, pieces(), **options), y)
    words = "is one whose first 5 chunks have 40 elements; wanted the chunks that the state has seen, of 50 elements"
    refuses(streaming.SourceError, words, [*pieces()[:4], X[:, :0]], "set_transformer", DEEP, **options)
    refuses(
        setattn.OptionError,
        "checkpoint.options['eps']' is 1e-05; wanted 0.001",
        pieces(),
        "set_transformer",
        DEEP,
        eps=1e-3,
        **options,
    )
    refuses(
        setattn.ParameterError, "'checkpoint' is a state of set_transformer; wanted one of pma", pieces(), **options
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, setattn
from setattn import streaming

read, saved = 0, 0
folder, kill, instant = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def count(n, what):
    if what == kill and n == instant:
        os.kill(os.getpid(), signal.SIGKILL)
    return n + 1

def source():
    global read
    for i in range(0, 50, 10):
        read = count(read, "reading")
        yield np.load(folder / "x.npy")[:, i : i + 10]

true = Path.replace
def replace(path, target):
    global saved
    saved = count(saved, "saving")
    return true(path, target)
Path.replace = replace

params = setattn.load(folder / "own.safetensors").params
streaming.fold("set_transformer", params, source, checkpoint=folder / "state.safetensors", checkpoint_every=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize("instant", ["reading 0", "reading 3", "reading 9", "reading 13", "saving 4"])
def test_a_process_that_is_killed(tmp_path, instant):
    """A real one, by SIGKILL, in any pass or while it saves its state; another one goes on to the same bits."""
    np.save(tmp_path / "x.npy", X)
    setattn.save(tmp_path / "own.safetensors", setattn.Block("set_transformer", DEEP))
    call = [sys.executable, "-c", KILLED, str(tmp_path), *instant.split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(setattn.__file__).parents[1])}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    path = tmp_path / "state.safetensors"
    saved = {"reading 3": (0, 20), "reading 9": (1, 40), "reading 13": (2, 20), "saving 4": (1, 20)}.get(instant)
    assert path.exists() == (saved is not None)
    if saved:
        state = streaming.load(path)
        assert (state.current_pass, state.elements) == saved
    y = streaming.fold("set_transformer", DEEP, pieces(), checkpoint=path)
    same(y, streaming.fold("set_transformer", DEEP, pieces()))


def test_progress(capsys, monkeypatch):
    streaming.fold("set_transformer", DEEP, X, chunk_bytes=BYTES, progress=True)
    shown = capsys.readouterr().err
    assert "set_transformer: 100%" in shown
    assert "150/150" in shown
    assert "elements/s" in shown
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    refuses(
        setattn.OptionError, "'progress' is True; wanted False, or the package tqdm: pip install tqdm", X, progress=True
    )


# --- states: what does not fit --------------------------------------------------------------------------------------


def test_states_of_other_streams_are_not_merged():
    a = streaming.create("pma", PARAMS, batch=(2,))
    other = setattn.init_pma(8, num_heads=2, num_seeds=3, rng=1)
    x = X[0]
    latents = np.ones((3, 8), np.float32)
    cross = setattn.init_cross_attention(8, 8, num_heads=2, rng=0)
    b = streaming.create("cross_attention", cross, queries=latents)
    wrong = [
        (a, streaming.create("pma", other, batch=(2,)), setattn.ParameterError, "b.params.seeds' is of other numbers"),
        (
            a,
            streaming.create("pma", PARAMS, batch=(3,)),
            setattn.ShapeError,
            "'b' has batch (3,); wanted (2,), as a has",
        ),
        (a, streaming.create("pma", PARAMS, batch=(2,), eps=1e-3), setattn.OptionError, "b.options['eps']' is 0.001"),
        (a, b, setattn.ParameterError, "'b' is a state of cross_attention; wanted one of pma"),
        (
            a,
            streaming.create("pma", setattn.init_pma(8, num_heads=4, num_seeds=3, rng=0), batch=(2,)),
            setattn.ShapeError,
            "has shape (8, 4, 2); wanted (8, 2, 4), as that of a",
        ),
        (
            a,
            streaming.create("pma", setattn.convert_params(PARAMS, np, dtype=np.float64), batch=(2,)),
            setattn.DTypeError,
            "has dtype float64; wanted float32",
        ),
        (
            b,
            streaming.create("cross_attention", cross, queries=latents + 1),
            setattn.ParameterError,
            "'b.queries' is of other numbers",
        ),
        (a, 3, setattn.ParameterError, "'b' is a int; wanted a setattn.streaming.State"),
    ]
    for first, second, error, words in wrong:
        with pytest.raises(error) as raised:
            streaming.merge(first, second)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)
    deep = streaming.create("set_transformer", DEEP)
    with pytest.raises(setattn.OptionError, match="in pass 2; wanted one in pass 1, as a is"):
        streaming.merge(deep, streaming.advance(deep))
    later = [streaming.advance(streaming.update(deep, part)) for part in (x[:9], x[9:])]
    with pytest.raises(setattn.ParameterError, match=r"b.found\[0\]' is of other numbers"):
        streaming.merge(*later)


def test_passes_come_one_after_another():
    deep = streaming.create("set_transformer", DEEP)
    seen = streaming.advance(streaming.update(deep, X[0]))
    wrong = [
        (
            lambda: streaming.finish(deep),
            "finish: argument 'state' is in pass 1 of 3; wanted one in pass 3: see advance()",
        ),
        (lambda: streaming.advance(seen), "after 0 elements in pass 2; wanted 50, as in the first pass"),
        (lambda: streaming.advance(streaming.create("pma", PARAMS)), "is in pass 1 of 1; wanted one in a pass before"),
        (lambda: streaming.rows(deep, X[0]), "rows: argument 'state' is in pass 1 of 3 of set_transformer"),
        (lambda: streaming.update(isab(), X[0]), "in the pass through the rows; wanted rows() in place of update()"),
    ]

    def isab():
        return streaming.advance(streaming.create("isab", setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)))

    for call, words in wrong:
        with pytest.raises(setattn.OptionError) as raised:
            call()
        assert words in str(raised.value)


def test_what_cannot_be_streamed():
    sab = DEEP._replace(encoder=(DEEP.encoder[0], setattn.init_mab(16, num_heads=4, rng=0)))
    wrong = [
        (("set_transformer", sab), {}, setattn.ParameterError, "params.encoder[1]' is a MAB; wanted a setattn.ISAB"),
        (
            (
                "perceiver_resampler",
                setattn.init_perceiver_resampler(8, num_latents=3, num_layers=1, num_heads=2, num_frames=4, rng=0),
            ),
            {},
            setattn.ParameterError,
            "params.frame_embedding' is there; wanted ()",
        ),
        ((setattn.sab, PARAMS), {}, setattn.OptionError, "'function' is 'sab'; wanted one of 'attention'"),
        (("cross_attention", PARAMS), {}, setattn.OptionError, "'queries' is None; wanted an array, the first one of"),
        (("pma", PARAMS), {"queries": X}, setattn.OptionError, "'queries' is given; wanted None, as pma has its"),
        (
            ("pma", PARAMS),
            {"context": X},
            setattn.OptionError,
            "'context' is given; wanted None, as nothing but the stream is attended to in pma",
        ),
        (
            ("mab", MAB),
            {"queries": X, "context": X},
            setattn.OptionError,
            "'context' is given; wanted None beside queries",
        ),
        (
            ("mab", MAB),
            {"queries": X, "context_mask": MASK},
            setattn.OptionError,
            "'context_mask' is given; wanted None without a context",
        ),
        (("mab", MAB), {"context": X[..., :7]}, setattn.ShapeError, "mab: argument 'y' has shape (2, 50, 7)"),
        (("pma", PARAMS), {"mask": X}, setattn.OptionError, "'mask' is given; wanted it with each chunk"),
        (("mab", MAB), {"queries": X, "pair_mask": MASK}, setattn.OptionError, "'pair_mask' is given; wanted none, as"),
        (
            ("attention_pool", setattn.init_attention_pool(8, num_heads=2, rng=0)),
            {"key_positions": X},
            setattn.OptionError,
            "'key_positions' is given; wanted none, as a chunk brings a mask, and no more",
        ),
        (("pma", PARAMS), {"batch": 3}, setattn.OptionError, "'batch' is 3; wanted a sequence of integers"),
        (("pma", PARAMS), {"first": -1}, setattn.OptionError, "'first' is -1; wanted an integer of at least 0"),
        (("pma", DEEP), {}, setattn.ParameterError, "pma: argument 'params' is a SetTransformer; wanted a setattn.PMA"),
        (("pma", None), {}, setattn.NamespaceError, "pma: argument 'params' is a NoneType; wanted an array"),
        (("pma", PARAMS), {"eps": -1}, setattn.OptionError, "pma: argument 'eps' is -1; wanted a finite number"),
    ]
    for arguments, options, error, words in wrong:
        with pytest.raises(error) as raised:
            streaming.create(*arguments, **options)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_files_that_hold_no_state(tmp_path):
    path = tmp_path / "state.safetensors"
    state = streaming.update(streaming.create("pma", PARAMS, batch=(2,)), X)
    wrong = setattn.CheckpointError
    with pytest.raises(wrong, match=r"load: argument 'path' .* wanted a file that can be read"):
        streaming.load(path)
    setattn.save(path, setattn.Block("pma", PARAMS))
    with pytest.raises(wrong, match=r"wanted a file that setattn\.streaming\.save wrote"):
        streaming.load(path)
    with pytest.raises(wrong, match=r"save: argument 'path' .* wanted a file that can be written"):
        streaming.save(tmp_path / "no" / "state.safetensors", state)
    streaming.save(path, state)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    for at in rng.integers(0, 8 + header, 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            loaded = streaming.load(path)
            assert isinstance(loaded, streaming.State)
        except setattn.ArgumentError:
            pass
    for size in rng.integers(0, len(whole), 50):
        path.write_bytes(whole[:size])
        with pytest.raises(wrong):
            streaming.load(path)
