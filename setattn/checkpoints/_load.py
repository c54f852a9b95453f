"""Loading weights of any known layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setattn._convert import convert_params
from setattn._errors import CheckpointError, DTypeError, OptionError
from setattn._kernels import all_finite
from setattn._namespace import bits_of, namespace_of, normalize_namespace
from setattn._typing import Array, Namespace
from setattn.checkpoints._block import Block
from setattn.checkpoints._canonical import is_canonical, load_canonical
from setattn.checkpoints._fit import Fit, fit, fits, listed
from setattn.checkpoints._layout import Layout
from setattn.checkpoints._options import choose_options, read_config
from setattn.checkpoints._registry import known_layouts
from setattn.checkpoints._sources import Source, open_source
from setattn.checkpoints._weights import Findings, Weights


def load_block(
    source: Any,
    layout: str | None,
    prefix: str,
    config: Any,
    xp: Namespace | None,
    device: Any,
    dtype: Any,
    allow_nonfinite: bool,
    options: Mapping[str, Any],
) -> Block:
    """Load a block; see :func:`setattn.load`."""
    if layout is not None and layout != "setattn" and layout not in known_layouts():
        wanted = "one of " + ", ".join(map(repr, (*known_layouts(), "setattn")))
        raise OptionError("load", "layout", repr(layout), wanted)
    if not isinstance(prefix, str):
        raise OptionError("load", "prefix", repr(prefix), "what the names of the tensors begin with")
    opened = open_source(source)
    reader = _Reader(opened, xp, device, dtype, allow_nonfinite)
    if layout == "setattn" or (layout is None and is_canonical(opened)):
        return load_canonical(opened, reader.read, prefix, options)
    known = read_config(config, opened.folder)
    chosen = known_layouts()[layout] if layout is not None else _recognised(opened, prefix, options, known)
    values = choose_options(chosen, options, known)
    names = fit(chosen, opened.shapes, prefix, values)
    if not names.is_whole or names.problems:
        hints = "" if names.is_whole else _elsewhere(opened, options, known, chosen)
        raise _unlike(opened, names, hints)

    mine = {name: shape for name, shape in opened.shapes.items() if name.startswith(prefix)}
    findings = Findings(mine, reader.read, chosen.convention)
    block = chosen.build(Weights(findings, prefix), **values)
    return Block(block.function, block.params, block.options, chosen.name)


class _Reader:
    """Reads tensors, converts them, and sees to their values and dtypes."""

    def __init__(self, source: Source, xp: Namespace | None, device: Any, dtype: Any, allow_nonfinite: bool) -> None:
        self._source, self._xp, self._device, self._dtype = source, xp, device, dtype
        self._allow_nonfinite = allow_nonfinite
        self._first: tuple[str, str] | None = None

    def read(self, name: str) -> Array:
        """Read one tensor."""
        stored = self._source.dtype(name)
        a = self._source.read(name)
        xp: Any = namespace_of(a)
        if not bits_of(a.dtype, xp):
            wanted = f"real floating numbers in tensor {name!r}, not {stored}"
            raise CheckpointError("load", "source", self._source.name, wanted)
        if self._dtype is None and self._first is not None and self._first[1] != stored:
            wanted = f"one dtype for all by dtype=, as {self._first[0]!r} is {self._first[1]} and {name!r} is {stored}"
            raise DTypeError("load", "dtype", "not given", wanted)
        self._first = self._first or (name, stored)
        if not self._allow_nonfinite and not all_finite(a, xp):
            wanted = f"finite numbers in tensor {name!r}, or allow_nonfinite=True"
            raise CheckpointError("load", "source", self._source.name, wanted)
        target = xp if self._xp is None else self._xp
        dtype = self._dtype
        if dtype is None and stored == "bfloat16" and self._xp is not None:
            dtype = getattr(normalize_namespace(target), "bfloat16", None)
        if self._xp is None and dtype is None and self._device is None:
            return a
        return convert_params(a, target, device=self._device, dtype=dtype)


def _recognised(source: Source, prefix: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> Layout:
    """Return the one layout whose tensors these are."""
    whole = [f for f in fits(source.shapes, given, config, prefix=prefix) if f.is_whole]
    if len(whole) == 1:
        return whole[0].layout
    if whole:
        wanted = f"layout=, as the tensors of {source.name} fit {' and '.join(f.layout.name for f in whole)}"
        raise CheckpointError("load", "layout", "not given", wanted)
    hints = _elsewhere(source, given, config)
    wanted = f"layout=, as the tensors of {source.name} under prefix {prefix!r} are those of no known layout{hints}"
    raise CheckpointError("load", "layout", "not given", wanted)


def _unlike(source: Source, names: Fit, hints: str) -> CheckpointError:
    """Say all that speaks against a layout, before a tensor is read."""
    parts = [f"{word} {listed(found)}" for word in ("missing", "unexpected") if (found := getattr(names, word))]
    wanted = f"the tensors of layout {names.layout.name!r}: {'; '.join([*parts, *names.problems])}{hints}"
    return CheckpointError("load", "source", source.name, wanted)


def _elsewhere(
    source: Source, given: Mapping[str, Any], config: Mapping[str, Any], layout: Layout | None = None
) -> str:
    """Say under which prefix, or as which layout, tensors would fit."""
    whole: list[Fit] = []
    if layout is not None:
        whole = [f for f in fits(source.shapes, given, config, layout=layout) if f.is_whole]
    whole = whole or [f for f in fits(source.shapes, given, config) if f.is_whole]
    places: dict[str, list[str]] = {}
    for f in whole:
        places.setdefault(f.layout.name, []).append(f.prefix)
    hints = [f"layout={name!r} with prefix={listed(prefixes)!r}" for name, prefixes in places.items()]
    return f"; what would fit: {', '.join(hints)}" if hints else ""
