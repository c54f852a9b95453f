"""Bad chunks: what each of them does, on every backend, and that the message names the chunk."""

from __future__ import annotations

import os

import numpy as np
import pytest
import strategies
from backends import BACKENDS
from strategies import same

import setattn
from setattn import streaming

one_thread = strategies.one_thread

PMA = setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0)
ISAB = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
X = np.random.default_rng(1).normal(size=(2, 6, 8)).astype(np.float32)
MASK = np.arange(6) < np.array([[4], [6]])


# A chunk and its mask, which a backend converts if they are arrays; the error, and words of its message.
BAD = {
    "another dim": (X[..., :7], None, setattn.ShapeError, "chunk 1' has shape (2, 6, 7); wanted (2, n, 8)"),
    "another batch": (X[:1], None, setattn.ShapeError, "chunk 1' has shape (1, 6, 8); wanted (2, n, 8)"),
    "no batch": (X[0], None, setattn.ShapeError, "chunk 1' has shape (6, 8); wanted (2, n, 8)"),
    "one element": (X[0, 0], None, setattn.ShapeError, "chunk 1' has shape (8,); wanted (..., n, dim)"),
    "integers": (np.ones(X.shape, np.int32), None, setattn.DTypeError, "chunk 1' has dtype "),
    "booleans": (X > 0, None, setattn.DTypeError, "chunk 1' has dtype "),
    "a list": (X.tolist(), None, setattn.NamespaceError, "chunk 1' is a list; wanted an array of "),
    "nothing": (None, None, setattn.NamespaceError, "chunk 1' is a NoneType; wanted an array of "),
    "a number": (3.0, None, setattn.NamespaceError, "chunk 1' is a float; wanted an array of "),
    "a long mask": (X[:, :3], MASK, setattn.MaskError, "mask of chunk 1' has shape (2, 6); wanted (2, 3), one entry"),
    "a mask of one set": (X, MASK[0], setattn.MaskError, "mask of chunk 1' has shape (6,); wanted (2, 6)"),
    "a mask of numbers": (X, MASK * 1.0, setattn.DTypeError, "mask of chunk 1' has dtype "),
    "a list as a mask": (X, MASK.tolist(), setattn.NamespaceError, "mask of chunk 1' is a list; wanted an array"),
}


def converted(backend, a):
    return backend.asarray(a, "float32") if isinstance(a, np.ndarray) else a


def params(backend, of=PMA):
    p = backend.params(of, "float32")
    if backend.module == "dask.array":
        p = setattn.map_params(lambda a: backend.xp.from_array(a, chunks=-1), p)
    return p


@pytest.mark.parametrize("fault", BAD)
def test_bad_chunks(fault, backend):
    """One line names the chunk, and the state before it goes on."""
    good = backend.asarray(X, "float32")
    chunk, mask = (converted(backend, a) for a in BAD[fault][:2])
    refused_as(backend, good, chunk, mask, *BAD[fault][2:])


def test_another_library_half_way(backend):
    other = BACKENDS["strict" if backend.module in ("numpy", "dask.array") else "numpy"]
    good = backend.asarray(X, "float32")
    words = "of chunk 1' is an array of "
    refused_as(backend, good, other.asarray(X), None, setattn.NamespaceError, words[3:])
    refused_as(backend, good, good, other.asarray(MASK), setattn.NamespaceError, words)


def refused_as(backend, good, chunk, mask, error, words):
    state = streaming.update(streaming.create("pma", params(backend), batch=(2,)), good)
    before = backend.numpy(streaming.finish(state))
    rows = streaming.create("isab", params(backend, ISAB), batch=(2,))
    rows = streaming.advance(streaming.update(streaming.update(rows, good), good))
    rows, _ = streaming.rows(rows, good)
    calls = [
        lambda: streaming.update(state, chunk, mask=mask),
        lambda: streaming.rows(rows, chunk, mask=mask),
        lambda: streaming.fold("pma", params(backend), [good, (chunk, mask), good]),
        lambda: list(streaming.transform("isab", params(backend, ISAB), [good, (chunk, mask), good])),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        message = str(raised.value)
        assert words in message, message
        assert "\n" not in message
    same(backend.numpy(streaming.finish(state)), before)
    streaming.finish(streaming.update(state, good))


def test_another_dtype_half_way(backend):
    for dtype in set(backend.dtypes) - {"float32"}:
        words = "pma: argument 'chunk 1' has dtype "
        with pytest.raises(setattn.DTypeError) as raised:
            streaming.fold("pma", params(backend), [backend.asarray(X, "float32"), backend.asarray(X, dtype)])
        assert str(raised.value).startswith(words)
        assert str(raised.value).endswith("float32, as params has")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38, 1e-45])
def test_what_is_masked_changes_no_bit(garbage, backend):
    """NaN and anything else under a mask is never looked at, in whatever chunk."""
    results = []
    for x in (X, np.where(MASK[..., None], X, np.float32(garbage))):
        chunks = [(backend.asarray(x[:, i : i + 2], "float32"), backend.asarray(MASK[:, i : i + 2])) for i in (0, 2, 4)]
        results.append(backend.numpy(streaming.fold("pma", params(backend), chunks)))
    same(*results)
    assert np.isfinite(results[0]).all()


def test_nan_stays_in_its_set(backend):
    """An element that takes part and is NaN makes its own set NaN, and no bit of another."""
    bad = X.copy()
    bad[0, 3, 0] = np.nan
    a, b = (
        backend.numpy(
            streaming.fold("pma", params(backend), [backend.asarray(x[:, i:j], "float32") for i, j in ((0, 3), (3, 6))])
        )
        for x in (X, bad)
    )
    assert np.isnan(b[0]).all()
    same(a[1], b[1])


def test_chunks_without_elements_are_the_identity(backend):
    """Of any number, anywhere, with a mask or without."""
    x, none = backend.asarray(X, "float32"), backend.asarray(X[:, :0], "float32")
    empty_mask = backend.asarray(MASK[:, :0])
    p = params(backend)
    want = backend.numpy(streaming.fold("pma", p, [x]))
    same(backend.numpy(streaming.fold("pma", p, [none, (none, empty_mask), x, none])), want)
    nothing = backend.numpy(streaming.fold("pma", p, [none, none]))
    same(nothing, backend.numpy(streaming.finish(streaming.create("pma", p, batch=(2,)))))
    wholly_masked = backend.numpy(streaming.fold("pma", p, [(x, backend.asarray(np.zeros((2, 6), bool)))]))
    same(wholly_masked, nothing)


@pytest.mark.parametrize("kind", ["reversed", "transposed", "repeated", "read-only", "another byte order"])
def test_strides_do_not_matter(kind):
    """Chunks of any strides and byte order work, and are not written to."""
    x = {
        "reversed": X[:, ::-1],
        "transposed": np.asfortranarray(X),
        "repeated": np.broadcast_to(X[:, :1], X.shape),
        "read-only": X,
        "another byte order": X.astype(">f4"),
    }[kind]
    x = x.view()
    x.flags.writeable = False
    y = streaming.fold("pma", PMA, [x, x])
    plain = np.ascontiguousarray(x).astype(np.float32)
    assert np.allclose(y, streaming.fold("pma", PMA, [plain, plain]), rtol=0, atol=2.0**-20)
    assert y.dtype == np.float32


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "files", "mask"])
def test_a_file_that_is_cut_short_in_the_middle(tmp_path, kind):
    """The message names the file and the chunk, in a list of files and of a mask, too."""
    x = np.concatenate([X] * 4, axis=1)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "m.npy", np.ones(x.shape[:-1], bool))
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", X)
    source = [tmp_path / f"{i}.npy" for i in range(4)] if kind == "files" else tmp_path / "x.npy"
    given = {"mask": tmp_path / "m.npy"} if kind == "mask" else {}
    rows = streaming.transform("isab", ISAB, source, chunk_bytes=X.nbytes, **given)
    next(rows)
    name = {"file": "x.npy", "files": "2.npy", "mask": "m.npy"}[kind]
    os.truncate(tmp_path / name, 140)
    number = 2 if kind == "files" else 1
    with pytest.raises(streaming.SourceError) as raised:
        list(rows)
    message = str(raised.value)
    assert f"argument 'source' is '{name}' with 140 bytes, not " in message
    assert message.endswith(f"wanted a file that stays as it is; it had changed by chunk {number}")
