"""The array libraries that commands can run on: the one place outside the library's own that names them."""

from __future__ import annotations

import importlib
import warnings
from typing import NamedTuple

from setattn._commands._errors import CommandError, first_line, to_install
from setattn._typing import Namespace


class Backend(NamedTuple):
    """The library to import, the module of its arrays, and the extras of setattn that install it."""

    library: str
    arrays: str
    extras: tuple[str, ...]


BACKENDS = {
    "numpy": Backend("numpy", "numpy", ()),
    "cupy": Backend("cupy", "cupy", ("cupy-cuda12x", "cupy-cuda13x")),
    "torch": Backend("torch", "torch", ("torch",)),
    "jax": Backend("jax", "jax.numpy", ("jax",)),
    "dask": Backend("dask", "dask.array", ("dask",)),
}


def load_backend(name: str) -> tuple[Namespace, str]:
    """Import an array library and return its namespace and its version.

    Raises
    ------
    CommandError
        If it is not installed, or does not work on this machine.
    """
    backend = BACKENDS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is amiss is said below, in one line
            version: str = importlib.import_module(backend.library).__version__
            xp = importlib.import_module(backend.arrays)
            xp.ones((1, 1)) @ xp.ones((1, 1)) + 1.0  # a library for GPUs comes to its GPU only now
    except ModuleNotFoundError as error:
        install = to_install(*backend.extras)
        raise CommandError(f"the package {error.name} is not installed; install it: {install}") from error
    except Exception as error:
        raise CommandError(f"{name} is installed but does not work on this machine: {first_line(error)}") from error
    return xp, version
