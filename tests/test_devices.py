"""Sets over several devices and processes: programs of the page on devices, and of the tests, are started for them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "devices.md"
PROGRAM = re.compile(r"<!-- run: (?P<launcher>\w+) -->\n```python\n(?P<code>.*?)^```$", re.M | re.S)

FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def run(*command, **environment):
    """Run a program with the library at hand, and show what it said if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])} | environment
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_four_devices(*arguments):
    """Run tests where JAX has four devices, which it must be told before it starts."""
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backends", "jax", *arguments, **FOUR)
    assert re.search(r"\d+ passed", said), said
    return said


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_sharded_arrays(backend):
    on_four_devices(ROOT / "tests" / "sharded.py")


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")
def test_examples_on_four_devices(backend):
    on_four_devices(ROOT / "tests" / "test_docs.py", "-k", "devices.md")


def programs():
    if PAGE.is_file():
        for i, found in enumerate(PROGRAM.finditer(PAGE.read_text(encoding="utf-8"))):
            yield pytest.param(found["launcher"], found["code"], id=f"{found['launcher']}-{i}")


@pytest.mark.parametrize(("launcher", "code"), [*programs()])
def test_programs_in_two_processes(launcher, code, tmp_path):
    """The programs of the page compare their results with those of one process."""
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    if launcher == "torchrun":
        if importlib.util.find_spec("torch") is None:
            pytest.skip("torch is not installed")
        run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program)
        return
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = shutil.which("mpiexec", path=beside)
    if importlib.util.find_spec("mpi4py") is None or command is None:
        pytest.skip("mpi4py or mpiexec is not installed")
    run(command, "-n", "2", sys.executable, program)


def test_the_page_has_a_program_for_each_launcher():
    if PAGE.is_file():
        assert {found.values[0] for found in programs()} == {"torchrun", "mpiexec"}
