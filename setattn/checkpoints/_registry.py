"""The layouts by their names. Their files are imported when the first one is asked for."""

from __future__ import annotations

import functools
import importlib

from setattn.checkpoints._layout import Layout

FAMILIES = (
    "gated",
    "perceiver",
    "perceiver_krasserm",
    "perceiver_lucidrains",
    "pooling",
    "resamplers",
    "set_transformer",
    "tabular",
)


@functools.cache
def known_layouts() -> dict[str, Layout]:
    """Return the layouts by their names; the same ones every time."""
    modules = [importlib.import_module(f"setattn.checkpoints.{family}") for family in FAMILIES]
    return {layout.name: layout for module in modules for layout in module.LAYOUTS}
