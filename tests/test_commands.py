"""What all commands have in common."""

from __future__ import annotations

import subprocess
import sys

import commands
import pytest
from commands import ENVIRONMENT, HEAD

folder, say, refused = commands.folder, commands.say, commands.refused


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
