"""Backends on the command line, Hypothesis profiles, and a closing summary of what ran."""

from __future__ import annotations

import collections
import inspect
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # threads only get in one another's way on arrays as small as these
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # a GPU's TF32 is no float32

import tolerances  # noqa: E402, what is set above is read when these import their libraries
from backends import BACKENDS, EVERYWHERE, Backend  # noqa: E402

PEERS = Path(__file__).resolve().parent / "peers"

_SETTINGS = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("dev", max_examples=25, **_SETTINGS)
hypothesis.settings.register_profile(
    "ci", max_examples=50, derandomize=True, database=None, print_blob=True, **_SETTINGS
)
hypothesis.settings.register_profile("nightly", max_examples=1000, print_blob=True, **_SETTINGS)
hypothesis.settings.load_profile(os.environ.get("SETATTN_HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

_reports: pytest.StashKey[dict[str, collections.Counter[str]]] = pytest.StashKey()
_passed: pytest.StashKey[list[str]] = pytest.StashKey()
_CACHE = "setattn/passed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default=None,
        help="comma-separated backends to test instead of all, of: " + ", ".join(BACKENDS),
    )
    parser.addoption(
        "--require-backends",
        default="",
        help="comma-separated backends whose absence is an error instead of a skip",
    )
    parser.addoption(
        "--peers",
        action="store_true",
        help="also run tests/peers, the comparisons with the original implementations, which must be installed",
    )
    parser.addoption(
        "--not-passed",
        action="store_true",
        help="leave out what passed in the run before, with fewer libraries; tests of an environment run again",
    )
    parser.addoption("--record", default=None, metavar="FILE", help="write the results of tests/peers to a JSON file")


def _in_peers(path: Path) -> bool:
    return PEERS in (path.resolve(), *path.resolve().parents)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the comparisons with the originals, which are seldom installed, to those who ask for them."""
    return True if collection_path == PEERS and not config.getoption("peers") else None


def _names(config: pytest.Config, option: str) -> list[str]:
    return [n.strip() for n in (config.getoption(option) or "").split(",") if n.strip()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "environment: what is installed is what is tested, so that --not-passed runs it")
    if not config.getoption("peers"):
        if any(_in_peers(Path(argument.partition("::")[0])) for argument in config.args):
            raise pytest.UsageError(f"{PEERS.parent.name}/{PEERS.name} runs with --peers alone: see CONTRIBUTING.md")
        if config.getoption("record"):
            raise pytest.UsageError("--record is of the comparisons that run with --peers")
    for option in ("backends", "require_backends"):
        for name in _names(config, option):
            if name not in BACKENDS:
                raise pytest.UsageError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
            if option == "require_backends" and (reason := BACKENDS[name].missing()):
                raise pytest.UsageError(f"backend {name} is required, but {reason}")
    config.stash[_reports] = {}
    config.stash[_passed] = []
    config.pluginmanager.register(_Counts(config.stash[_reports], config.stash[_passed]), "setattn-backend-counts")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that has a ``backend`` on all of them, and with a ``dtype`` beside it on every pair there is."""
    given = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _arguments(mark.args[0])}
    if "backend" not in metafunc.fixturenames or "backend" in given:
        return
    if "dtype" in metafunc.fixturenames and "dtype" not in given:
        pairs = [(name, dtype) for name in EVERYWHERE for dtype in BACKENDS[name].dtypes]
        metafunc.parametrize(("backend", "dtype"), pairs, indirect=["backend"])
    else:
        metafunc.parametrize("backend", EVERYWHERE, indirect=True)


def _arguments(names: str | list[str] | tuple[str, ...]) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the backends that were not chosen, and those that nobody expects to be there."""
    chosen = _names(config, "backends")
    unexpected = {name for name, b in BACKENDS.items() if not b.expected and name not in chosen and b.missing()}
    before = set(_last_passed(config))
    kept, dropped = [], []
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        drop = name in unexpected or (chosen and name in BACKENDS and name not in chosen)
        drop = drop or (item.nodeid in before and not item.get_closest_marker("environment"))
        (dropped if drop else kept).append(item)
    if dropped:
        items[:] = kept
        config.hook.pytest_deselected(items=[item for item in dropped if chosen or before])


def _last_passed(config: pytest.Config) -> list[str]:
    cache = getattr(config, "cache", None)
    return cache.get(_CACHE, []) if cache and config.getoption("not_passed") else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Note what passed, for ``--not-passed``; a worker of pytest-xdist leaves that to the process that it works for."""
    config = session.config
    cache = getattr(config, "cache", None)
    if cache and _passed in config.stash and not hasattr(config, "workerinput"):
        cache.set(_CACHE, config.stash[_passed])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One backend of the matrix, active for the test."""
    chosen = BACKENDS[request.param]
    request.node.user_properties.append(("backend", chosen.name))
    if reason := chosen.missing():
        pytest.skip(reason)
    with chosen.active():
        yield chosen


@pytest.fixture(autouse=True)
def _inspected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tests of layouts, see to it that what inspection says of every block that is loaded is what it is."""
    if not request.node.path.name.startswith("test_checkpoints_"):
        return
    import setattn
    from setattn.checkpoints._inspect import examine
    from setattn.checkpoints._words import arrays_of

    true = setattn.load

    def load(source: Any, /, layout: str | None = None, **given: Any) -> setattn.Block:
        block = true(source, layout, **given)
        if block.layout and layout != "setattn" and not _was_saved(source):
            options = {k: v for k, v in given.items() if k not in inspect.signature(true).parameters}
            report = examine(source, config=given.get("config"), prefix=given.get("prefix", ""), options=options)
            [place] = [p for p in report.places if (p.layout, p.function) == (block.layout, block.function)]
            shapes = {path: tuple(a.shape) for path, a in arrays_of(block.params)}
            assert {path: tuple(d.size for d in dims) for path, dims in place.parts.items()} == shapes
            assert place.parameters == setattn.count_params(block.params)
        return block

    monkeypatch.setattr(setattn, "load", load)


def _was_saved(source: Any) -> bool:
    from setattn.checkpoints._canonical import is_canonical
    from setattn.checkpoints._sources import open_source

    return is_canonical(open_source(source))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let all skips for one missing backend come from one place, so that they are one line of the summary."""
    report = yield
    names = [name for key, name in item.user_properties if key == "backend"]
    if report.skipped and names and (reason := BACKENDS[names[0]].missing()):
        report.longrepr = (__file__, None, f"Skipped: {reason}")
    return report


class _Counts:
    """Counts by backend and outcome, of reports, which carry the name: so those of pytest-xdist's workers count."""

    def __init__(self, reports: dict[str, collections.Counter[str]], passed: list[str]) -> None:
        self.reports, self.passed = reports, passed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
        elif report.failed and report.nodeid in self.passed:  # on the way out
            self.passed.remove(report.nodeid)
        if report.when == "call" or report.outcome != "passed":
            for key, name in report.user_properties:
                if key == "backend":
                    self.reports.setdefault(name, collections.Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    reports = config.stash[_reports]
    if not reports:
        return
    terminalreporter.section("backends")
    for name in [name for name in BACKENDS if name in reports]:
        count = reports[name]
        ran = [f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if count[outcome]]
        reason = BACKENDS[name].missing()
        terminalreporter.write_line(f"{name}: {f'did not run, {reason} ' if reason else ''}({', '.join(ran)})")
    if config.get_verbosity() > 0:
        for line in tolerances.report():
            terminalreporter.write_line(line)
