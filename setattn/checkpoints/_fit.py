"""How well the names of tensors fit the layouts, under which prefixes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from setattn._typing import Shape
from setattn.checkpoints._layout import Layout
from setattn.checkpoints._options import for_matching
from setattn.checkpoints._registry import known_layouts
from setattn.checkpoints._weights import Findings, Weights


class Fit(NamedTuple):
    """What a layout finds under a prefix."""

    layout: Layout
    prefix: str
    used: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    problems: tuple[str, ...]
    options: Mapping[str, Any]  # that it was matched with
    told: str = ""  # the one of them that was not known and has the only value that the shapes allow

    @property
    def is_whole(self) -> bool:
        """Say whether every tensor is there and none is left over."""
        return not self.missing and not self.unexpected


def fit(layout: Layout, shapes: Mapping[str, Shape], prefix: str, options: Mapping[str, Any]) -> Fit:
    """Match the names under a prefix with those of a layout."""
    mine = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    findings = Findings(mine, None, layout.convention)
    layout.build(Weights(findings, prefix), **options)
    unexpected = tuple(name for name in mine if name not in findings.used)
    used, missing, problems = map(tuple, (findings.used, findings.missing, findings.problems))
    return Fit(layout, prefix, used, missing, unexpected, problems, options)


def fits(
    shapes: Mapping[str, Shape],
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    layout: Layout | None = None,
    prefix: str | None = None,
) -> list[Fit]:
    """Match all layouts, or one, under a prefix, or under all that come into question; the best ones come first."""
    found: list[Fit] = []
    for candidate in known_layouts().values() if layout is None else (layout,):
        options, guesses = for_matching(candidate, given, config)
        places = _prefixes(candidate.anchors, shapes) if prefix is None else [prefix]
        found.extend(_fit_by_guesses(candidate, shapes, place, options, guesses) for place in places)
    return sorted(found, key=_rank)


def nearest(shapes: Mapping[str, Shape], given: Mapping[str, Any], config: Mapping[str, Any]) -> list[Fit]:
    """Match all layouts also where their anchor is missing, but most of the other tensors that they need are there."""
    found: list[Fit] = []
    for layout in known_layouts().values():
        options, guesses = for_matching(layout, given, config)
        needed = fit(layout, {}, "", options).missing
        most = [place for place, n in _prefixes(needed, shapes).items() if 2 * n > len(needed)]
        places = dict.fromkeys([*_prefixes(layout.anchors, shapes), *most])
        found.extend(_fit_by_guesses(layout, shapes, place, options, guesses) for place in places)
    return sorted(found, key=_rank)


_LARGEST_GUESS = 256


def _fit_by_guesses(
    layout: Layout, shapes: Mapping[str, Shape], prefix: str, options: Mapping[str, Any], guesses: tuple[str, ...]
) -> Fit:
    """Match names; a count that is a guess of 1 is another one where the shapes do not allow 1."""
    first = fit(layout, shapes, prefix, options)
    if not first.is_whole or not first.problems:
        return first
    mine = {name: shapes[name] for name in first.used}
    sizes = {size for shape in mine.values() for size in shape}
    counts = [n for n in range(2, _LARGEST_GUESS + 1) if any(size % n == 0 for size in sizes)]
    for guess in guesses:
        tried = (fit(layout, mine, prefix, {**options, guess: n}) for n in counts)
        allowed = list(itertools.islice((f for f in tried if not f.problems), 2))
        if allowed:
            return allowed[0]._replace(told=guess if len(allowed) == 1 else "")
    return first


def _rank(f: Fit) -> tuple[float, str, str]:
    share = len(f.used) / max(len(f.used) + len(f.missing) + len(f.unexpected), 1)
    return -share, f.prefix, f.layout.name


def _prefixes(names: Iterable[str], shapes: Mapping[str, Shape]) -> Counter[str]:
    """Count the tensors of these names that a file has under each prefix, which may be the key of a nested mapping."""
    return Counter(
        there.removesuffix(name)
        for there in shapes
        for name in names
        if there == name or there.endswith((f".{name}", f"/{name}"))
    )


def listed(names: Iterable[str]) -> str:
    """List names, those that differ in one number alone as one: ``layers.{0..5}.weight``."""
    return ", ".join(grouped(names))


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ in one number alone, under the name that stands for them."""
    pending = dict.fromkeys(names)
    lines: dict[str, list[str]] = {}
    while pending:
        name = next(iter(pending))
        parts = re.split(r"(?<![^./])(\d+)(?![^./])", name)
        best = [name]
        for i in range(1, len(parts), 2):
            run, number = [], int(parts[i])
            while (other := "".join([*parts[:i], str(number), *parts[i + 1 :]])) in pending:
                run.append(other)
                number += 1
            if len(run) > len(best):
                best = run
                name = "".join([*parts[:i], f"{{{parts[i]}..{number - 1}}}", *parts[i + 1 :]])
        for other in best:
            del pending[other]
        lines[name] = best
    return lines
