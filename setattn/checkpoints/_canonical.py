"""The library's own layout: each array of a tree as a tensor named by its path, the tree's form in the metadata.

A tensor lies in the file as it lay in memory, and the form says how its axes are to be turned: products of a loaded
block then run over the same memory as before, and round the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from setattn import _params as trees
from setattn._errors import CheckpointError, DTypeError, OptionError, ParameterError
from setattn._memory import memory_order
from setattn._namespace import namespace_of
from setattn._params import is_absent
from setattn._typing import Array
from setattn.checkpoints._block import Block
from setattn.checkpoints._safetensors import is_writable, write_safetensors
from setattn.checkpoints._sources import Source

_VERSION = 1
_KEY = "setattn"

_FUNCTIONS: dict[str, type] = {
    "attention": trees.Attention,
    "attention_pool": trees.AttentionPool,
    "cross_attention": trees.CrossAttention,
    "gated_cross_attention": trees.GatedCrossAttention,
    "isab": trees.ISAB,
    "latent_transformer": tuple,
    "mab": trees.MAB,
    "perceiver": trees.Perceiver,
    "perceiver_io": trees.PerceiverIO,
    "perceiver_resampler": trees.Resampler,
    "pma": trees.PMA,
    "sab": trees.MAB,
    "set_transformer": trees.SetTransformer,
}

_NODES = {name: kind for name, kind in vars(trees).items() if isinstance(kind, type) and hasattr(kind, "_fields")}


def save_block(path: str | os.PathLike[str], block: Block) -> None:
    """Save a block; see :func:`setattn.save`."""
    if not isinstance(block, Block):
        raise ParameterError("save", "block", f"a {type(block).__qualname__}", "a setattn.Block")
    kind = _FUNCTIONS.get(block.function)
    if kind is None or not isinstance(block.params, kind):
        got = f"{block.function!r} with a {type(block.params).__qualname__}"
        raise ParameterError("save", "block", got, "a function of the library with its parameters")
    for name, value in block.options.items():
        if not isinstance(value, bool | int | float | str | None):
            raise OptionError("save", f"block.options[{name!r}]", repr(value), "a number, a word, True, False or None")
    arrays: dict[str, Array] = {}
    form = form_of(block.params, "", arrays)
    about = {"version": _VERSION, "function": block.function, "layout": block.layout, "options": block.options}
    write_safetensors(Path(path), arrays, {_KEY: json.dumps(about | {"params": form})})


def form_of(tree: Any, path: str, arrays: dict[str, Array]) -> Any:
    """Describe a tree: ``"array 0 1"``, ``None`` for an absent part, a list, or the name of a node with its parts.

    The numbers say where each axis of an array is found in its tensor.
    """
    if is_absent(tree):
        return None
    if not isinstance(tree, tuple):
        if namespace_of(tree) is None:
            raise ParameterError("save", "block", f"holding a {type(tree).__qualname__}", "arrays alone")
        if not is_writable(tree):
            raise DTypeError("save", "block", tree.dtype, "arrays of a dtype that a file can hold", "an array of dtype")
        order = memory_order(tree)
        xp: Any = namespace_of(tree)
        arrays[path] = xp.permute_dims(tree, order)
        return " ".join(["array", *(str(order.index(axis)) for axis in range(len(order)))])
    if not hasattr(tree, "_fields"):
        return [form_of(part, _join(path, str(i)), arrays) for i, part in enumerate(tree)]
    node: Any = tree
    fields, optional = zip(node._fields, node, strict=True), node._field_defaults
    parts = {name: form_of(part, _join(path, name), arrays) for name, part in fields}
    # A part that a node is always given is written down where it is absent, too.
    return {type(tree).__name__: {k: part for k, part in parts.items() if part is not None or k not in optional}}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- reading --------------------------------------------------------------------------------------------------------


def is_canonical(source: Source) -> bool:
    """Say whether a file is one that :func:`save` wrote."""
    return _KEY in source.metadata


def load_canonical(source: Source, read: Callable[[str], Array], prefix: str, options: Mapping[str, Any]) -> Block:
    """Load what :func:`save` wrote."""

    def broken(wanted: str) -> CheckpointError:
        return CheckpointError("load", "source", source.name, wanted)

    if not is_canonical(source):
        raise broken("a file that setattn.save wrote, for layout 'setattn'")
    if prefix or options:
        name, value = ("prefix", prefix) if prefix else next(iter(options.items()))
        raise OptionError("load", name, repr(value), "nothing, as the file holds one block with its options")
    try:
        about = json.loads(source.metadata[_KEY])
        version, function, given = about["version"], about["function"], about["options"]
        layout, form = about["layout"], about["params"]
        if version != _VERSION:
            raise broken(f"version {_VERSION} of the layout, not {version!r}; a newer setattn may know it")
        plain = all(isinstance(value, bool | int | float | str | None) for value in given.values())
        if function not in _FUNCTIONS or not plain or not isinstance(layout, str):
            raise broken("a function of the library with plain options in its metadata")
        names = set(source.shapes)
        params = tree_of(form, "", names, read)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise broken(f"the form of a block in its metadata: {' '.join(str(error).split())}") from error
    if names or not isinstance(params, _FUNCTIONS[function]):
        reason = f"unexpected tensors {', '.join(sorted(names))}" if names else f"a tree that is none of {function}"
        raise broken(f"the tensors of its block alone: {reason}")
    return Block(function, params, given, layout)


def tree_of(form: Any, path: str, names: set[str], read: Callable[[str], Array]) -> Any:
    """Make the tree that a form describes."""
    if form is None:
        return ()
    if isinstance(form, str):
        word, *axes = form.split(" ")
        if path not in names or word != "array":
            raise ValueError(f"no tensor {path!r} for {form[:40]!r}")
        names.remove(path)
        a = read(path)
        order = [int(axis) for axis in axes]
        if sorted(order) != list(range(len(a.shape))):
            raise ValueError(f"axes of tensor {path!r} of shape {tuple(a.shape)} as {form[:40]!r}")
        xp: Any = namespace_of(a)
        return xp.permute_dims(a, tuple(order))
    if isinstance(form, list):
        return tuple(tree_of(part, _join(path, str(i)), names, read) for i, part in enumerate(form))
    (kind, parts), *more = form.items()
    if more or kind not in _NODES or not set(parts) <= set(_NODES[kind]._fields):
        raise ValueError(f"an unknown node {kind!r}")
    fields = {name: tree_of(parts.get(name), _join(path, name), names, read) for name in _NODES[kind]._fields}
    return _NODES[kind](**fields)
