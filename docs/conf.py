"""How Sphinx builds these pages: ``python -m sphinx -W docs docs/_build``."""

from __future__ import annotations

import re
from typing import Any

import setattn

project = "setattn"
author = "The setattn developers"
copyright = "2026, The setattn developers"
version = release = setattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # every array is Any; the docstrings say what is wanted
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"numpy\..*"),  # other projects' inventories are not fetched
    (r"py:class", r"(?!setattn).*"),  # types in docstrings are sentences, such as "array, shape (..., n, dim)"
]

html_theme = "furo"
html_title = f"setattn {release}"
html_copy_source = False


def link_errors(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Link every error of a ``Raises`` section that names several at once."""
    for i, line in enumerate(lines):
        if found := re.fullmatch(r":raises ((?:\w+, )*\w+): (.*)", line):
            errors = ", ".join(f":exc:`~setattn.{error}`" for error in found[1].split(", "))
            lines[i] = f":Raises: {errors} -- {found[2]}"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", link_errors, priority=900)  # after napoleon
