"""What a file of weights holds, found without reading a tensor: the layouts that fit, and where, or why none does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from setattn._errors import OptionError
from setattn._params import count_params
from setattn.checkpoints._canonical import is_canonical, load_canonical
from setattn.checkpoints._fit import Fit, fits, grouped, listed, nearest
from setattn.checkpoints._options import choose_options, configured, read_config
from setattn.checkpoints._safetensors import itemsize
from setattn.checkpoints._sources import Source, open_source
from setattn.checkpoints._words import Dim, Stand, arrays_of, name_dims


class DTypeShare(NamedTuple):
    """How many tensors of a file are of one dtype, and how many bytes they take."""

    tensors: int
    nbytes: int


class Setting(NamedTuple):
    """An option of a layout: its value, ``None`` where it is not known, and where it came from or could come from."""

    name: str
    value: Any
    origin: str  # "given", "config", "default", "shapes", "file" where it is known; "needed", "wrong" where it is not
    about: str


class Place(NamedTuple):
    """A layout that fits whole, at one or several places of a file that differ in one number."""

    layout: str
    original: str
    prefixes: tuple[str, ...]
    function: str
    parts: dict[str, tuple[Dim, ...]]  # shapes of the parameters by their paths in the tree
    parameters: int  # of one block
    settings: tuple[Setting, ...]
    call: str  # Python that loads the first of them
    part_of: str | None = None  # prefix of the larger block that it is a part of


class Miss(NamedTuple):
    """A layout that does not fit, and what speaks against it."""

    layout: str
    prefix: str
    share: float  # of its tensors and the file's under the prefix, those that are in both
    reasons: tuple[str, ...]
    settings: tuple[Setting, ...]  # of which one may be wrong, where all tensors are there


class Report(NamedTuple):
    """What is in a file."""

    tensors: int
    dtypes: dict[str, DTypeShare]
    places: tuple[Place, ...]
    misses: tuple[Miss, ...]  # the best first; where a layout fits, those alone whose tensors are all there


def examine(
    source: Any, *, config: Any = None, prefix: str | None = None, options: Mapping[str, Any] | None = None
) -> Report:
    """Look at the names and shapes of a file's tensors, or a mapping's.

    Parameters
    ----------
    source, config
        As for :func:`load`.
    prefix : str, optional
        What the names of the block's tensors begin with; all places that come into question if not given.
    options : mapping, optional
        Options of layouts; those that a layout does not have are not for it.

    Returns
    -------
    Report
        The layouts that fit, or those that come nearest.
    """
    opened = open_source(source)
    dtypes: dict[str, DTypeShare] = {}
    for name, shape in opened.shapes.items():
        dtype = opened.dtype(name)
        before = dtypes.get(dtype, DTypeShare(0, 0))
        dtypes[dtype] = DTypeShare(before.tensors + 1, before.nbytes + math.prod(shape) * itemsize(dtype))
    file = None if opened.folder is None else str(source)
    if is_canonical(opened):
        return Report(len(opened.shapes), dtypes, (_saved(opened, file),), ())
    what = _Known(file, opened, options or {}, read_config(config, opened.folder), config)
    found = fits(opened.shapes, what.options, what.config, prefix=prefix)
    if prefix is None and not any(f.is_whole for f in found):
        found = nearest(opened.shapes, what.options, what.config)
    good = [f for f in found if f.is_whole and not f.problems]
    places = [
        _place(several[0], what)._replace(prefixes=tuple(f.prefix for f in several), part_of=outer)
        for several, outer in _alike(good, opened)
    ]
    misses = [f for f in found if f.used and f not in good and (f.is_whole or not places)]
    return Report(len(opened.shapes), dtypes, tuple(places), tuple(_miss(f, what) for f in misses))


class _Known(NamedTuple):
    """What is known of a file, and of the options."""

    file: str | None
    source: Source
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    given_config: Any


def _alike(good: list[Fit], source: Source) -> Iterator[tuple[list[Fit], str | None]]:
    """Group what fits at places that differ in one number, each with the place of a larger block it is a part of."""
    groups: dict[Any, list[Fit]] = {}
    for f in sorted(good, key=lambda f: -len(f.used)):  # stable: a whole model before its parts
        outer = min((g.prefix for g in good if {*g.used} > {*f.used}), key=len, default=None)
        tensors = tuple(sorted((n.removeprefix(f.prefix), source.shapes[n], source.dtype(n)) for n in f.used))
        groups.setdefault((f.layout.name, tensors, outer), []).append(f)
    for (*_, outer), several in groups.items():
        by_prefix = {f.prefix: f for f in several}
        yield from (([by_prefix[prefix] for prefix in group], outer) for group in grouped(by_prefix).values())


# --- what fits ------------------------------------------------------------------------------------------------------


def _saved(source: Source, file: str | None) -> Place:
    """Describe what the library saved, whose form is in its metadata."""
    block = load_canonical(source, lambda name: Stand(source.shapes[name]), "", {})
    settings = tuple(Setting(name, value, "file", "") for name, value in block.options.items())
    parts = {path: tuple(Dim(n, "") for n in a.shape) for path, a in arrays_of(block.params)}
    origin = f"setattn.save, from layout {block.layout!r}" if block.layout else "setattn.save"
    call = f"setattn.load({'...' if file is None else repr(file)})"
    return Place("setattn", origin, ("",), block.function, parts, count_params(block.params), settings, call)


def _place(f: Fit, known: _Known) -> Place:
    settings = _settings(f, known)
    unknown = {s.name for s in settings if s.value is None and s.origin in ("needed", "wrong")}
    mine = {name: known.source.shapes[name] for name in f.used}
    block, parts = name_dims(f.layout, mine, f.prefix, f.options, unknown)
    parameters, call = count_params(block.params), _call(f, settings, known)
    return Place(f.layout.name, f.layout.original, (f.prefix,), block.function, parts, parameters, settings, call)


def _settings(f: Fit, known: _Known) -> tuple[Setting, ...]:
    found = []
    for option in f.layout.options:
        one = f.layout._replace(options=(option,))
        given = {name: value for name, value in known.options.items() if name == option.name}
        field, _ = configured(option, known.config)
        try:
            value = choose_options(one, given, known.config)[option.name]
        except OptionError as error:
            if field or given:
                name = field if not given else "what is given"
                found.append(Setting(option.name, None, "wrong", f"{name} is {error.got}; wanted {error.wanted}"))
                continue
            if option.name == f.told:
                found.append(Setting(option.name, f.options[option.name], "shapes", option.about))
                continue
            where = f"; in a config.json {' or '.join(option.config)}" if option.config else ""
            found.append(Setting(option.name, None, "needed", f"{option.about}{where}"))
        else:
            origin = "given" if given else "config" if field else "default"
            about = field if origin == "config" else option.about
            found.append(Setting(option.name, value, origin, about))
    return tuple(found)


def _call(f: Fit, settings: tuple[Setting, ...], known: _Known) -> str:
    """Write the call that loads a block."""
    parts = ["..." if known.file is None else repr(known.file), f"layout={f.layout.name!r}"]
    if f.prefix:
        parts.append(f"prefix={f.prefix!r}")
    if known.given_config is not None:
        is_content = isinstance(known.given_config, Mapping)
        parts.append("config=..." if is_content else f"config={str(known.given_config)!r}")
    if len(stored := {known.source.dtype(name) for name in f.used}) > 1:
        parts.append(f"dtype=numpy.{'float64' if 'float64' in stored else 'float32'}")
    parts += [f"{s.name}={s.value!r}" for s in settings if s.origin in ("given", "shapes")]
    parts += [f"{s.name}=..." for s in settings if s.origin in ("needed", "wrong")]
    return f"setattn.load({', '.join(parts)})"


# --- what does not --------------------------------------------------------------------------------------------------


def _miss(f: Fit, known: _Known) -> Miss:
    reasons = [
        f"{word} {listed(names)}" for word, names in (("missing", f.missing), ("unexpected", f.unexpected)) if names
    ]
    reasons += f.problems
    share = len(f.used) / (len(f.used) + len(f.missing) + len(f.unexpected))
    return Miss(f.layout.name, f.prefix, share, tuple(reasons), _settings(f, known))
