"""Where tensors come from: files and mappings, of which names and shapes are known before a tensor is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from setattn._errors import CheckpointError
from setattn._namespace import namespace_of, native
from setattn._typing import Array, Shape
from setattn.checkpoints._safetensors import SafetensorsFile


class Source(Protocol):
    """Tensors by their names."""

    name: str  # as an error names it
    folder: Path | None  # where a configuration may lie beside it
    metadata: dict[str, str]
    shapes: dict[str, Shape]

    def dtype(self, name: str) -> str:
        """Name the dtype in which a tensor is stored."""

    def read(self, name: str) -> Array:
        """Read one tensor; NumPy, which lacks bfloat16, gets it widened to float32."""


class Tensors:
    """Tensors that are in memory, of any library."""

    folder: Path | None = None

    def __init__(self, tree: Mapping[Any, Any]) -> None:
        self.name = f"a {type(tree).__qualname__}"
        self.metadata: dict[str, str] = {}
        self._arrays = dict(_leaves(tree, ""))
        self.shapes: dict[str, Shape] = {name: tuple(a.shape) for name, a in self._arrays.items()}

    def dtype(self, name: str) -> str:
        """Name the dtype of a tensor."""
        return str(native(self._arrays[name].dtype)).rpartition(".")[2]

    def read(self, name: str) -> Array:
        """Return the tensor as it is."""
        return self._arrays[name]


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Array]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise CheckpointError("load", "source", f"a mapping with the key {key!r}", "names of tensors as its keys")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}/")
        elif namespace_of(value) is None:
            wanted = "arrays, or mappings of them, as its values"
            raise CheckpointError("load", "source", f"a mapping with a {type(value).__qualname__} as {name!r}", wanted)
        else:
            yield name, value


_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pystate", ".joblib")


def open_source(source: Any) -> Source:
    """Open a file by its content and name, or take a mapping."""
    if isinstance(source, Mapping):
        return Tensors(source)
    if not isinstance(source, str | os.PathLike):
        wanted = "the path of a file (.safetensors, .npz), or a mapping of names to arrays"
        raise CheckpointError("load", "source", f"a {type(source).__qualname__}", wanted)
    path = Path(source)
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(
            "load", "source", repr(str(path)), f"a file that can be read: {error.strerror}"
        ) from error
    suffix = path.suffix.lower()
    if suffix in _PICKLED or (start[:1] == b"\x80" and suffix != ".safetensors"):
        wanted = (
            "a file that no program is hidden in; what a pickled one holds is loaded once, by what wrote it and saved: "
            "with PyTorch, setattn.save('block.safetensors', "
            f"setattn.load(torch.load({str(path)!r}, weights_only=True), ...))"
        )
        raise CheckpointError("load", "source", f"the pickled file {path.name!r}", wanted)
    if start == b"PK" or suffix == ".npz":
        from setattn.checkpoints._npz import NpzFile

        return NpzFile(path)
    return SafetensorsFile(path)
