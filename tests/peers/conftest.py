"""The fixture of the comparisons, and the record of them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is ever downloaded

import pytest

# The harness needs PyTorch; without --peers, which is refused in one line, this file is read where there is none.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the originals warn of is their own affair; what the library warns of is an error, in the harness."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def peer():
    """The comparison with an original: `harness.check`."""
    import harness

    return harness.check


@pytest.fixture
def rng():
    """Random numbers, always the same."""
    import numpy as np

    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Write the record; a failed comparison would be missing from it without a trace, so it must not have any."""
    path = config.getoption("--record")
    if not path:
        return
    import harness

    if harness.RECORDS and exitstatus == pytest.ExitCode.OK:
        harness.write(Path(path))
        terminalreporter.write_line(f"{path}: {len(harness.RECORDS)} layouts written")
    else:
        terminalreporter.write_line(f"{path}: not written, as not every comparison passed")
