"""Chunks of Dask arrays that are made anew for a further use, where they would be held since the last one."""

from __future__ import annotations

from typing import Any

from setattn._context import Context
from setattn._typing import Array

FOUND = "-found-"  # in the names of what a pass over a set has found, which is small and never made again


def made_again(c: Context, found: Array) -> Context:
    """Make the chunks of a context anew, once ``found`` is there."""
    names = ("elements", "mask", "pair_mask", "bias", "key_positions")
    lazy = {name: a for name in names if hasattr(a := getattr(c, name), "dask")}
    return c._replace(**{name: _made_again(a, found) for name, a in lazy.items()})


def _made_again(a: Array, found: Array) -> Array:
    """Return the same array by other tasks, which begin when ``found`` is there.

    They have new names, down to those that read or generate the chunks; what is in memory or :data:`FOUND` stays.
    Arrays of one context, such as a mask that is made of the elements, are made of the same new chunks.
    """
    import dask.array as da
    from dask._task_spec import Alias, Task, TaskRef, convert_legacy_graph
    from dask.base import clone_key
    from dask.core import flatten
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

    nodes = convert_legacy_graph(dict(a.__dask_graph__()))
    keys, waits_for = list(flatten(a.__dask_keys__())), list(flatten(found.__dask_keys__()))
    names = {key: clone_key(key, seed=found.name) for key in _to_make(keys, nodes)}
    if not names:
        return a

    gate = f"after-{found.name}"

    def again(key: Any) -> Any:
        node = nodes[key].substitute(names, key=names[key])
        return node if names.keys() & nodes[key].dependencies else Task(names[key], _after, node, TaskRef(gate))

    layer = {gate: Task(gate, _nothing, *map(TaskRef, waits_for))} | {new: again(key) for key, new in names.items()}
    in_memory = {clone_key(key, seed=found.name): key for key in keys if key not in names}
    layer = layer | {new: Alias(new, key) for new, key in in_memory.items()}
    held = {key for node in layer.values() for key in node.dependencies} - layer.keys()
    own_layers = {name for name, tasks in a.dask.layers.items() if held & tasks.keys()}
    below = HighLevelGraph.merge(a.dask.cull_layers(own_layers), found.dask)
    name, owners = clone_key(a.name, seed=found.name), own_layers | set(found.__dask_layers__())
    graph = HighLevelGraph({**below.layers, name: MaterializedLayer(layer)}, {**below.dependencies, name: owners})
    return da.Array(graph, name, a.chunks, meta=a._meta)


def _to_make(keys: list[Any], nodes: dict[Any, Any]) -> set[Any]:
    """Return the keys of all that is computed for some keys, but for what is :data:`FOUND`."""
    from dask._task_spec import DataNode

    found: set[Any] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        node = nodes.get(key)
        if key not in found and node is not None and not isinstance(node, DataNode) and FOUND not in _name(key):
            found.add(key)
            waiting.extend(node.dependencies)
    return found


def _name(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _nothing(*found: Array) -> None:
    """Be done when they are there."""


def _after(made: Any, start: None) -> Any:
    return made
