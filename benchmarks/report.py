"""Measuring the rows, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.account import account
from benchmarks.contestants import TOLERANCE, Contestant, error_of, peer_contestants, setattn_contestants
from benchmarks.floor import Floor, Rates, Work
from benchmarks.library import Library
from benchmarks.problem import Row
from benchmarks.timing import Settings, Spread, cpu_count, in_turns, ratio

TITLES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "jax.jit"}


def measure_row(
    row: Row,
    backends: tuple[str, ...],
    rates: Rates,
    libraries: dict[str, Library],
    settings: Settings,
    progress: Callable[[], Any],
) -> tuple[dict[str, Any], Work]:
    """Check and time everything that computes a row; return the results for the JSON file, and what had to be done."""
    problem, missing = row.problem(), {}
    reference = problem.reference()
    contestants, errors, wrong = {}, {}, {}
    for c in (*setattn_contestants(problem, backends), *peer_contestants(row, problem, missing)):
        try:
            errors[c.name], reason = check(c, reference)
        except NotImplementedError:
            continue
        if reason:
            wrong[c.name] = reason
        else:
            contestants[c.name] = c
    floor = Floor.of(problem, reference.size, rates)
    del reference
    for backend in backends:  # and once more after all rows: rates are the best of several moments
        libraries[backend].floor(floor.work, rates)
    samples = in_turns({name: c.run for name, c in contestants.items()}, settings, progress)
    spreads = {name: Spread.of(times) for name, times in samples.items()}
    peers = [name for name, c in contestants.items() if not c.backend]
    best = min(peers, key=lambda name: spreads[name].median, default=None)
    results = {
        "name": row.name,
        "size": row.size,
        "targets": row.targets,
        "floor": floor.as_dict(),
        "best_peer": best,
        "missing": missing,
        "wrong": wrong,
        "contestants": {
            name: {
                "backend": c.backend,
                "variant": c.variant,
                "error": errors[name],
                "seconds": vars(spreads[name]),
                "of_floor": floor.seconds / spreads[name].median,
                "ratio": vars(ratio(samples[best], samples[name])) if best else None,
                "rounds": len(samples[name]),
                "account": None if problem.traced else accounted(c, spreads[name].median),
            }
            for name, c in contestants.items()
        },
    }
    return results, floor.work


def accounted(contestant: Contestant, seconds: float) -> dict[str, float] | None:
    """Return what the time of a call of setattn goes to, where the library tells."""
    shares = account(contestant.run, contestant.backend, cpu_count() if contestant.variant else 1)
    return shares and {kind: share * seconds for kind, share in shares.items()}


def add_own_floors(row: dict[str, Any], work: Work, libraries: dict[str, Library], rates: Rates) -> None:
    """Add to the results of a row the least time that each library needs for what has to be done."""
    peer = row["contestants"].get(row["best_peer"])
    for c in row["contestants"].values():
        if not c["backend"]:
            c["own_floor"] = None
            continue
        own = libraries[c["backend"]].floor(work, rates, cpu_count() if c["variant"] else 1)
        reachable = {"reachable": peer["seconds"]["median"] / own.seconds} if peer else {}
        c["own_floor"] = own.as_dict() | {"of_floor": own.seconds / c["seconds"]["median"]} | reachable


def check(contestant: Contestant, reference: Any) -> tuple[float | None, str]:
    """Return the error of a contestant and, if its numbers are not those of the reference, what is wrong."""
    try:
        error = error_of(contestant.run(), reference)
    except NotImplementedError:
        raise
    except Exception as failure:
        return None, f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if not error <= TOLERANCE:  # NaN too
        return error, f"differs by {error:.1e} of the largest entry, more than {TOLERANCE:.0e}"
    return error, ""


# --- the table ------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], backends: tuple[str, ...]) -> str:
    """Return the table in Markdown, its columns aligned."""
    head = ["workload", "size", "best peer", "ms"]
    head += [f"{TITLES[backend]}: {what}" for backend in backends for what in ("ratio (target)", "ms")]
    head += ["floor, ms", f"of the own floor ({', '.join(TITLES[b] for b in backends)})"]
    cells = [head]
    for row in rows:
        for variant in variants(row):
            ours = [find(row, backend, variant) for backend in backends]
            peer = row["contestants"].get(row["best_peer"])
            line = [row["name"] + (f", {variant}" if variant else ""), row["size"], row["best_peer"] or "none"]
            line.append(milliseconds(peer))
            for backend, c in zip(backends, ours, strict=True):
                line += [ratio_cell(c, row["targets"].get(backend)), milliseconds(c)]
            line.append(f"{digits(1e3 * row['floor']['seconds'])} ({row['floor']['bound']})")
            line.append(" / ".join(f"{c['own_floor']['of_floor']:.2f}" if c else "-" for c in ours))
            cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in cells)


def variants(row: dict[str, Any]) -> list[str]:
    """Return the names of setattn's variants in a row, the plain call first."""
    return list(dict.fromkeys(c["variant"] for c in row["contestants"].values() if c["backend"]))


def find(row: dict[str, Any], backend: str, variant: str = "") -> dict[str, Any] | None:
    """Return what setattn did on a backend."""
    wanted = (backend, variant)
    return next((c for c in row["contestants"].values() if (c["backend"], c["variant"]) == wanted), None)


def ratio_cell(contestant: dict[str, Any] | None, target: float | None) -> str:
    if not contestant or not contestant["ratio"]:
        return "-"
    value = contestant["ratio"]["median"]
    if target is None:
        return digits(value)
    return f"{digits(value)} ({target:g})" if value >= target else f"{digits(value)} ({missed(contestant, target)})"


def missed(contestant: dict[str, Any], target: float) -> str:
    """Say what a ratio should have been, and whether the library's own floor lets it be that."""
    reachable = contestant["own_floor"]["reachable"]
    return f"of {target:g}; at most {digits(reachable)}" if reachable < target else f"of {target:g}"


def milliseconds(contestant: dict[str, Any] | None) -> str:
    if not contestant:
        return "-"
    median, low, high = (1e3 * contestant["seconds"][key] for key in ("median", "low", "high"))
    return f"{digits(median)} [{digits(low)}, {digits(high)}]"


def digits(value: float) -> str:
    """Write a number with three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
