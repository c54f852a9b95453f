"""The command line of the tests: which backends run, and what is said of those that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FEW = ("test_dtypes.py", "-k", "large_rows_on_every_backend")

NO_CUPY = """
import sys

class NoCuPy:
    def find_spec(self, name, *rest):
        if name == "cupy":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoCuPy())
"""


@pytest.fixture
def run(tmp_path):
    """Run these tests in a process of their own, which finds no CuPy, or a stand-in."""
    (tmp_path / "no_cupy.py").write_text(NO_CUPY)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    paths = [str(TESTS), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)

    def call(*arguments, plugin="no_cupy"):
        cache = ("-o", f"cache_dir={tmp_path / 'cache'}")
        command = [sys.executable, "-m", "pytest", "-p", plugin, *cache, "-q", *arguments]
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return call


def test_unknown_backend(run):
    """A name that is no backend is refused with those that are."""
    code, output = run("--backends", "numpy,cudapy", *FEW)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "unknown backend 'cudapy'; choose from numpy, " in output


def test_required_backend_that_is_missing(run):
    """What is required and not there is an error."""
    code, output = run("--require-backends", "numpy,cupy", *FEW)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "backend cupy is required, but cupy is not installed" in output


def test_peers_are_not_collected(run):
    """Nothing of the comparisons with the originals is looked at unless it is asked for."""
    code, output = run("--collect-only", "--ignore-glob", f"{TESTS}/*.py", ".")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED, output


@pytest.mark.parametrize("path", ["peers", "peers/test_harness.py::test_right"])
def test_peers_are_asked_for_by_name(run, path):
    """They are refused, not skipped, without the option."""
    code, output = run(path)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "tests/peers runs with --peers alone: see CONTRIBUTING.md" in output
    code, output = run("--record", "layouts.json", *FEW)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--record is of the comparisons that run with --peers" in output


WORKERS = ("-n", "2")


@pytest.mark.parametrize("workers", [(), WORKERS])
def test_chosen_backends(run, workers):
    """The summary counts the tests of every backend, and says which did not run and why; others are not looked at."""
    code, output = run("--backends", "numpy,strict,cupy", *FEW, *workers)
    assert code == pytest.ExitCode.OK, output
    assert "\nnumpy: (1 passed)\ncupy: did not run, cupy is not installed (1 skipped)\nstrict: (1 passed)\n" in output
    assert "torch" not in output


def test_cupy_is_one_more_backend(run):
    """With CuPy, or what looks like it, all tests of the matrix run on it by one command."""
    files = ("test_backends.py", "test_dask.py", "test_dtypes.py", "test_empty.py", "test_trace.py")
    code, output = run("--backends", "cupy", "--require-backends", "cupy", *files, "-k", "cupy", plugin="fake_cupy")
    assert code == pytest.ExitCode.OK, output
    assert "\ncupy: (" in output
    assert "skipped" not in output


@pytest.mark.parametrize("workers", [(), WORKERS])
def test_what_passed_is_left_out(run, workers):
    """A second run with more libraries tests what those add, and what is about the environment."""
    files = ("test_dtypes.py", "test_public_api.py", "-k", "large_rows_on_every_backend or import_brings")
    code, output = run("--backends", "numpy", *files, *workers)
    assert code == pytest.ExitCode.OK, output
    assert "2 passed" in output
    code, output = run("--backends", "numpy,strict", "--not-passed", *files, *workers)
    assert code == pytest.ExitCode.OK, output
    assert "\nstrict: (1 passed)\n" in output
    assert "numpy:" not in output
    assert "2 passed" in output
