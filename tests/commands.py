"""What the tests of the command line share: a folder to stand in, and calls of commands in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from siglip import HEADS, PREFIX, SHAPES, D

import setattn
from setattn.__main__ import main
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
