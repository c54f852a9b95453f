"""The documentation is whole and true: it builds, its examples run, its tables are those of the test matrix."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import setattn

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")] if DOCS.is_dir() else [])
FUNCTIONS = [n for n in setattn.__all__ if inspect.isfunction(getattr(setattn, n))]
HELPERS = ("attention_weights", "convert_params", "map_params", "count_params", "load", "save", "layouts", "trace")
BLOCKS = [n for n in FUNCTIONS if not n.startswith("init_") and n not in HELPERS]
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?^```pycon\n(?P<code>.*?)^```$", re.M | re.S)

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")


def fences(page):
    """Return the line, the needed package and the code of every example on a page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start("code")].count("\n"), m["needs"], m["code"]) for m in FENCE.finditer(text)]


def examples():
    for page in PAGES:
        found = fences(page)
        for needs in sorted({needs for _, needs, _ in found}, key=str):
            yield pytest.param(page, needs, id=f"{page.relative_to(ROOT)}{f'[{needs}]' if needs else ''}")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # see tolerances.product
@pytest.mark.parametrize(("page", "needs"), [*examples()])
def test_examples(page, needs):
    """Examples that need nothing run together; those that need a package run after them, with that package."""
    if needs is not None:
        pytest.importorskip(needs)
    parser = doctest.DocTestParser()
    found = []
    for line, need, code in fences(page):
        if need in (None, needs):
            found += parser.get_examples(code)
            for example in found[-len(parser.get_examples(code)) :]:
                example.lineno += line
    assert found
    report = []
    test = doctest.DocTest(found, {"__name__": "__main__"}, page.name, str(page), 0, None)
    doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def test_no_example_is_missed():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count(">>> ") == sum(code.count(">>> ") for _, _, code in fences(page)), page


@pytest.mark.parametrize("name", setattn.__all__)
def test_every_name_is_in_the_reference(name):
    kind = "function" if name in FUNCTIONS else "(?:class|exception)"
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    assert len(re.findall(rf"^\.\. auto{kind}:: {name}$", api, re.M)) == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_a_page(name):
    page = (DOCS / "blocks" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert f"{{func}}`setattn.{name}`" in page
    assert "How this differs from the paper and from known code" in page
    assert f"blocks/{name}\n" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert f"docs/blocks/{name}.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pages_have_no_strangers():
    assert {p.stem for p in (DOCS / "blocks").glob("*.md")} == set(BLOCKS)


def test_the_rooms_are_those_that_are_there():
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    rooms = set(re.findall(r"^  (\w+(?:\.py|/)) ", text, re.M))
    package = Path(setattn.__file__).parent
    there = {p.name for p in package.glob("*.py")}
    there |= {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    assert rooms == there
    order = re.findall(r"^  (_\w+)(?:\.py|/) ", text, re.M)
    for i, room in enumerate(order[order.index("_typing") :], order.index("_typing")):
        files = [package / f"{room}.py"] if (package / f"{room}.py").is_file() else (package / room).glob("*.py")
        for file in files:
            source = file.read_text(encoding="utf-8")
            used = set(re.findall(r"^\s*from setattn\.(_[a-z_]+)", source, re.M))
            used |= set(re.findall(r"^\s*from setattn import (_[a-z_]+)", source, re.M))
            assert used <= set(order[: i + 1]), file


def test_rooms_that_are_not_there_yet_are_not_there():
    text = (DOCS / "design.md").read_text(encoding="utf-8").partition("## Not there yet")[2]
    rooms = set(re.findall(r"`(\w+(?:\.py|/))`", text)) - {"tests/"}
    assert rooms == {"testing/"}
    assert not any((Path(setattn.__file__).parent / room).exists() for room in rooms)


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_profiles_of_hypothesis_are_told():
    variable = "SETATTN_HYPOTHESIS_PROFILE"
    source = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert variable in source
    assert variable in told
    profiles = re.findall(r'register_profile\(\s*"(\w+)", max_examples=(\d+)', source)
    assert [name for name, _ in profiles] == ["dev", "ci", "nightly"]
    assert all(f"`{name}` ({examples}," in told for name, examples in profiles)
    script = ROOT / ".ci" / "run"
    assert not script.is_file() or f"export {variable}=ci" in script.read_text(encoding="utf-8")


def test_tables_are_those_of_the_test_matrix():
    make_tables = runpy.run_path(str(DOCS / "make_tables.py"))
    assert make_tables["main"](check=True) == 0, "run python docs/make_tables.py"


def test_every_layout_was_compared_with_its_original():
    make_tables = runpy.run_path(str(DOCS / "make_tables.py"))
    records = make_tables["compared"]()
    assert set(records) == set(setattn.layouts()), "run python -m pytest tests/peers --peers --record docs/layouts.json"
    rows = make_tables["layouts"](setattn.layouts(), records).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == sorted(records)
    for name, record in records.items():
        assert record["originals"], name
        assert record["float64"] <= 1e-12, name
    assert "not compared" in make_tables["layouts"](setattn.layouts(), {})


def test_only_what_is_tested_is_advertised():
    make_tables = runpy.run_path(str(DOCS / "make_tables.py"))
    backends, record = make_tables["load_backends"](), (DOCS / "gpu-record.md").read_text(encoding="utf-8")

    def rows(record):
        cells = [line.strip("| ").split(" | ") for line in make_tables["table"](backends, record).splitlines()[2:]]
        return {name: (devices, how) for name, devices, _, _, how in cells}

    on_gpu = {b.module for b in backends.values() if b.hardware == "CUDA"}
    for b in (b for b in backends.values() if b.listed):
        devices, how = rows(record)[make_tables["TITLES"][b.name]]
        assert ("CUDA" in devices) == (b.module in on_gpu) == ("docs/gpu-record.md" in how)
    ran = "| {} | A100 | 570, 13.0 | 14.0, 2.4 | abc | `python -m pytest --backends {}` | 5 passed |\n"
    empty = record[: record.index("| --- |")]
    assert rows(empty)["CuPy"] == ("CUDA", "by hand on a GPU machine, none so far: see docs/gpu-record.md")
    two = rows(empty + ran.format("2026-02-03", "cupy") + ran.format("2026-02-01", "cupy,torch-cuda"))
    assert two["CuPy"] == ("CUDA", "by hand on a GPU machine, last on 2026-02-03: see docs/gpu-record.md")
    assert two["PyTorch"][1].endswith("; CUDA by hand on a GPU machine, last on 2026-02-01: see docs/gpu-record.md")


def test_figures_are_those_of_the_script(tmp_path):
    pytest.importorskip("matplotlib")
    make_figures = runpy.run_path(str(DOCS / "make_figures.py"))
    make_figures["main"](tmp_path)
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn == {p.name for p in (DOCS / "images").glob("*.svg")}
    pages = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    assert all(f"images/{name}" in pages for name in drawn)
    for path in (DOCS / "images").glob("*.svg"):
        old, new = path.read_text(encoding="utf-8"), (tmp_path / path.name).read_text(encoding="utf-8")
        version = re.search(r"Matplotlib v[\d.]+", old)[0]
        assert old == new or version not in new, f"{path.name}: run python docs/make_figures.py"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_numpydoc(name):
    validate = pytest.importorskip("numpydoc.validate")
    docscrape = pytest.importorskip("numpydoc.docscrape")
    with (ROOT / "pyproject.toml").open("rb") as file:
        checks = set(tomllib.load(file)["tool"]["numpydoc_validation"]["checks"])
    if "all" in checks:
        checks = set(validate.ERROR_MSGS) - checks
    found = [error for error in validate.validate(f"setattn.{name}")["errors"] if error[0] in checks]
    # Parameters that are "As for" another function have their types there, and stand together out of order.
    parameters = docscrape.FunctionDoc(getattr(setattn, name))["Parameters"]
    groups = [p.name.split(", ") for p in parameters if " ".join(p.desc).startswith("As for ")]
    excused = {("PR04", f'Parameter "{parameter}" has no type') for group in groups for parameter in group}
    found = [error for error in found if error not in excused and not (error[0] == "PR03" and groups)]
    assert found == []


def test_it_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", DOCS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, tmp_path / "html"], capture_output=True, text=True, check=False, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="setattn.{name}"' in reference for name in setattn.__all__)
