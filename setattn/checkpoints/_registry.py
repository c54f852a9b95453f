"""The layouts by their names. Their files are imported when the first one is asked for."""

from __future__ import annotations

import functools
import importlib

from setattn.checkpoints._layout import Layout

FAMILIES = ("gated", "perceiver_krasserm", "perceiver_lucidrains", "pooling", "set_transformer", "tabular")


@functools.cache
def _all() -> dict[str, Layout]:
    modules = [importlib.import_module(f"setattn.checkpoints.{family}") for family in FAMILIES]
    return {layout.name: layout for module in modules for layout in module.LAYOUTS}


def layouts() -> dict[str, Layout]:
    """Return the layouts of weights that :func:`load` knows.

    Returns
    -------
    dict of str to Layout
        Each layout by its name, which is the value of ``layout=``, with the implementation it is of, the functions its
        blocks call and its options.

    Examples
    --------
    >>> import setattn
    >>> setattn.layouts()["siglip"].functions
    ('attention_pool',)
    >>> [option.name for option in setattn.layouts()["siglip"].options]
    ['num_heads', 'eps', 'activation']
    """
    return dict(_all())
