"""States in files, so that a stream outlives its process, and several processes can share one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from setattn._blocks import Levels, Plan
from setattn._check import is_integer
from setattn._convert import convert_params
from setattn._errors import ArgumentError, CheckpointError
from setattn._namespace import convert_array, namespace_of, normalize_namespace
from setattn._order import Order
from setattn._params import is_absent
from setattn._state import State as Part
from setattn._typing import Array, Namespace
from setattn.checkpoints._canonical import form_of, tree_of
from setattn.checkpoints._safetensors import SafetensorsFile, write_safetensors
from setattn.streaming._stream import State, create_for, empty_part, in_pass, is_state
from setattn.streaming._work import Beside

_VERSION = 2
_KEY = "setattn.streaming"
_COUNTS = ("first", "elements", "chunks")


def save(path: str | os.PathLike[str], state: State, /) -> None:
    """Save a state to a ``.safetensors`` file.

    Parameters
    ----------
    path : path
        The file. It is written beside its place and moved there when it is whole, so that a process that is killed
        leaves the one from before.
    state : State
        The state, of any library. Its parameters, queries and options are saved with it.

    Returns
    -------
    None
        Reading the file with :func:`load` gives a state that goes on as this one does, bit by bit.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    ParameterError
        If ``state`` is none.

    See Also
    --------
    load : The reverse.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, setattn, setattn.streaming
    >>> state = setattn.streaming.create("pma", setattn.init_pma(8, num_heads=2, rng=0))
    >>> state = setattn.streaming.update(state, np.ones((5, 8), np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "state.safetensors")
    ...     setattn.streaming.save(path, state)
    ...     setattn.streaming.load(path)
    <setattn.streaming.State pma, batch (), 5 elements in 1 chunks>
    """
    is_state("save", "state", state)
    plan = state.options.get("plan")
    known = is_integer(state.length) or state.length is None
    tree = {
        "params": state.params,
        **{name: () if getattr(state, name) is None else getattr(state, name) for name in Beside._fields},
        "length": () if known else state.length,
        "found": state.found,
        "parts": tuple(tuple(part) for _, part in state.levels),
    }
    arrays: dict[str, Array] = {}
    about = {
        "version": _VERSION,
        "function": state.function,
        "options": {key: value for key, value in state.options.items() if key != "plan"},
        "plan": None if plan is None else [None if plan.order is None else list(plan.order), *plan[1:]],
        "batch": state.batch,
        "length": state.length if known else None,
        "expected": state.expected,
        "sizes": [size for size, _ in state.levels],
        "forms": {name: form_of(part, name, arrays) for name, part in tree.items()},
        **{name: getattr(state, name) for name in _COUNTS},
    }
    write_safetensors(Path(path), arrays, {_KEY: json.dumps(about)})


def load(path: str | os.PathLike[str], /, *, xp: Namespace | None = None, device: Any = None) -> State:
    """Load a state that :func:`save` wrote.

    Parameters
    ----------
    path : path
        The file.
    xp : module, optional
        The array library that the stream goes on with; NumPy if not given. The same bits come from the same library.
    device : object, optional
        Where the arrays go, in that library's own terms.

    Returns
    -------
    State
        The state, with its parameters.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is broken, or holds no state.
    NamespaceError, DTypeError
        If the library cannot hold the arrays.

    See Also
    --------
    save : The reverse.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, setattn, setattn.streaming as streaming
    >>> empty = streaming.create("pma", setattn.init_pma(8, num_heads=2, rng=0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(3):  # each in a process of its own, say
    ...         part = np.full((4, 8), i, np.float32)
    ...         streaming.save(f"{folder}/{i}.safetensors", streaming.update(empty, part))
    ...     state = empty
    ...     for i in range(3):
    ...         state = streaming.merge(state, streaming.load(f"{folder}/{i}.safetensors"))
    >>> state
    <setattn.streaming.State pma, batch (), 12 elements in 3 chunks>
    """
    try:
        source = SafetensorsFile(Path(path))
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "a path is a string"
        raise CheckpointError("load", "path", repr(path), f"a file that can be read: {reason}") from error

    def broken(wanted: str) -> CheckpointError:
        return CheckpointError("load", "path", source.name, wanted)

    def read(name: str) -> Array:
        a, stored = source.read(name), source.dtype(name)
        here = namespace_of(a)
        target = here if xp is None else normalize_namespace(xp)
        if name == "length" and target is not None:
            return convert_array(a, target, device, None)
        dtype = getattr(target, stored, None) if stored == "bfloat16" else None
        if stored == "bfloat16" and dtype is None:
            raise broken("xp=, a library with bfloat16, which the state is in")
        same = xp is None and device is None
        return a if same else convert_params(a, here if xp is None else xp, device=device, dtype=dtype)

    if _KEY not in source.metadata:
        raise broken("a file that setattn.streaming.save wrote")
    try:
        about = json.loads(source.metadata[_KEY])
        if about["version"] != _VERSION:
            raise broken(f"version {_VERSION} of a state, not {about['version']!r}; a newer setattn may know it")
        names = set(source.shapes)
        trees = {name: tree_of(form, name, names, read) for name, form in about["forms"].items()}
        if names:
            raise broken(f"the arrays of a state alone, not {', '.join(sorted(names))}")
        state = _restored(about, trees)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, RuntimeError) as error:
        if isinstance(error, ArgumentError) and error.function == "convert_params":
            raise
        raise broken(f"the parts of a state that fit together: {' '.join(str(error).split())}") from error
    return state


def _restored(about: dict[str, Any], trees: dict[str, Any]) -> State:
    options = dict(about["options"])
    if "plan" not in options:
        order, *rest = about["plan"] or [None]
        plan = None if about["plan"] is None else Plan(None if order is None else Order(*order), *rest)
        options = options | {"plan": plan}
    beside = Beside(*(None if is_absent(trees[name]) else trees[name] for name in Beside._fields))
    length = about["length"] if is_absent(trees["length"]) else trees["length"]
    state = create_for(
        "load", about["function"], trees["params"], beside, about["batch"], about["first"], length, options
    )
    counts = {name: about[name] for name in _COUNTS}
    sizes, expected, found = about["sizes"], about["expected"], trees["found"]
    if not all(type(n) is int and n >= 0 for n in (*counts.values(), *sizes, expected or 0)):
        raise ValueError("counts that are no integers of at least 0")
    powers = all(size & (size - 1) == 0 < size for size in sizes) and sorted(set(sizes), reverse=True) == sizes
    if not powers or len(found) >= state.passes or (expected is None) != (not found):
        raise ValueError("counts that are none of a stream")
    state = in_pass(state, found)
    levels: Levels[Part] = tuple((n, Part(*part)) for n, part in zip(sizes, trees["parts"], strict=True))
    if state._pass is not None:
        shapes = [(a.shape, a.dtype) for a in empty_part(state, state._pass)]
        if any([(a.shape, a.dtype) for a in part] != shapes for _, part in levels):
            raise ValueError(f"parts of other shapes than {shapes}")
    elif levels:
        raise ValueError("parts in the pass through the rows")
    return replace(state, levels=levels, expected=expected, **counts)
