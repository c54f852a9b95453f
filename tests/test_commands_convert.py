"""The command ``convert``."""

from __future__ import annotations

import commands
import numpy as np
from commands import HEAD, NUMBERS, X, head, leaves, weights
from siglip import PREFIX

import setattn

folder, say, refused = commands.folder, commands.say, commands.refused


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
