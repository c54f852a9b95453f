"""The pictures of a run, as SVG: the same results give the same bytes with one version of Matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import TITLES, find

INK, LINE = "#22303c", "#7b8794"
COLORS = {"numpy": "#2f6db3", "torch": "#d9772b", "jax": "#4a9a5b", "": "#7b8794"}
STYLE = {
    "svg.hashsalt": "setattn",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what a run has measured, and return the files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figures = {}
    with mpl.rc_context(STYLE):
        if results["rows"]:
            figures["ratios"] = ratios(results, Figure)
        if results["growth"]:
            figures["time"] = curves(results, Figure, "seconds")
            figures["memory"] = curves(results, Figure, "memory")
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return [folder / f"{name}.svg" for name in figures]


def ratios(results: dict[str, Any], figure_class: type) -> Any:
    """Draw the ratio to the best peer as bars with their quartiles, and the targets as lines across them."""
    rows, backends = results["rows"], results["backends"]
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = figure_class(figsize=(8, 1.2 + 0.17 * len(rows) * (len(backends) + 0.9)), layout="constrained")
    ax = figure.add_subplot()
    step = 0.8 / len(backends)
    for j, backend in enumerate(backends):
        for i, row in enumerate(rows):
            c, y = find(row, backend), i + (j - (len(backends) - 1) / 2) * step
            if not c or not c["ratio"]:
                continue
            value, low, high = (c["ratio"][key] for key in ("median", "low", "high"))
            label = f"setattn, {TITLES[backend]}" if i == 0 else None
            ax.barh(y, value - 1, step * 0.9, left=1, color=COLORS[backend], label=label)
            ax.plot([low, high], [y, y], color=INK, lw=0.8)
            if backend in row["targets"]:
                target = row["targets"][backend]
                ax.plot([target, target], [y - step * 0.5, y + step * 0.5], color="#c0392b", lw=1.6)
    ax.plot([], [], color="#c0392b", lw=1.6, label="target")
    ax.axvline(1, color=LINE, lw=0.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(rows)), [f"{row['name']}\n(best peer: {row['best_peer'] or 'none'})" for row in rows])
    ax.tick_params(axis="y", labelsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("times as fast as the best peer of the same run")
    figure.legend(fontsize=7, loc="outside upper right", ncols=4, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def curves(results: dict[str, Any], figure_class: type, key: str) -> Any:
    """Draw time or memory against the size of the set, one panel for each family."""
    families = results["growth"]
    figure = figure_class(figsize=(4.2 * len(families), 3.4), layout="constrained")
    for ax, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families, strict=True):
        for name, curve in family["curves"].items():
            style = {"color": COLORS[curve["backend"]], "marker": "o", "ms": 3, "lw": 1.2}
            variant = name.endswith("threads")
            style["ls"] = ":" if variant else "-" if curve["backend"] else "--"
            if key == "seconds":
                label = f"{name}: slope {curve['slope']:.2f}"
                ax.plot(curve["n"], [1e3 * s["median"] for s in curve["seconds"]], label=label, **style)
            else:
                ax.plot(curve["n"], [max(m, 1) / 2**20 for m in curve["memory"]], label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="elements", title=family["name"].removeprefix("growth of "))
        ax.set_ylabel("time, ms" if key == "seconds" else "peak memory beyond input and result, MiB")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=6.5, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure
