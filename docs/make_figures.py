"""Draw the figures of the documentation: ``python docs/make_figures.py``.

The same call gives the same bytes with one version of Matplotlib: text is drawn as paths, identifiers are seeded, and
no date is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

import setattn
from setattn._order import Sizes, choose, multiplications

IMAGES = Path(__file__).parent / "images"
INK, FAINT, LINE = "#22303c", "#7b8794", "#52606d"
COLORS = {
    "attention": "#cfe3f7",
    "norm": "#e9ecef",
    "ff": "#fde4c4",
    "linear": "#e5dcf4",
    "learned": "#cdeccf",
    "gate": "#f8d3d8",
    "plain": "#ffffff",
}
STYLE = {
    "svg.hashsalt": "setattn",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "mathtext.fontset": "dejavusans",
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
Point = tuple[float, float]


def axes(fig: Figure, position: Any, xlim: Point, ylim: Point, title: str = "") -> Axes:
    """Return empty axes in which one unit is as long upwards as sideways."""
    ax = fig.add_subplot(position)
    ax.set(xlim=xlim, ylim=ylim, aspect="equal")
    ax.set_axis_off()
    if title:
        ax.set_title(title, fontsize=10, fontweight="bold")
    return ax


def box(ax: Axes, x: float, y: float, text: str, kind: str, w: float = 1.7, h: float = 0.5, size: float = 9) -> None:
    style = "round,pad=0,rounding_size=0.09"
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, style, fc=COLORS[kind], ec=LINE, lw=1, zorder=3))
    ax.text(x, y, text, ha="center", va="center", zorder=4, fontsize=size, linespacing=1.15)


def plus(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Circle((x, y), 0.17, fc="white", ec=LINE, lw=1, zorder=3))
    ax.plot([x - 0.09, x + 0.09], [y, y], color=LINE, lw=1.2, zorder=4)
    ax.plot([x, x], [y - 0.09, y + 0.09], color=LINE, lw=1.2, zorder=4)


def arrow(ax: Axes, *points: Point, head: bool = True, style: str = "-", color: str = LINE) -> None:
    """Draw a line through points, with a head at its end."""
    *start, tail = points
    if len(points) > 2:
        ax.plot(*zip(*start, strict=True), color=color, lw=1.2, ls=style, zorder=2, solid_capstyle="round")
    arrowstyle = "-|>,head_width=0.22,head_length=0.4" if head else "-"
    props = {"arrowstyle": arrowstyle, "color": color, "lw": 1.2, "ls": style, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", tail, start[-1], arrowprops=props, zorder=2)


def label(ax: Axes, x: float, y: float, text: str, **kwargs: Any) -> None:
    ax.text(x, y, text, **{"ha": "center", "va": "center", "zorder": 4, **kwargs})


# --- multihead attention block --------------------------------------------------------------------------------------


def mab() -> Figure:
    """Three forms of the multihead attention block."""
    fig = Figure(figsize=(9.6, 5.2), layout="constrained")
    panel = {"xlim": (-1.6, 3.0), "ylim": (-0.3, 6.6)}

    def inputs(ax: Axes) -> None:
        label(ax, 0, 0, "$X$", fontsize=12)
        label(ax, 2.0, 0, "$Y$", fontsize=12)

    def residual(ax: Axes, start: float, end: float) -> None:
        arrow(ax, (0, start), (-1.25, start), (-1.25, end), (-0.17, end))

    ax = axes(fig, 131, **panel, title='form="post_norm": the paper')
    inputs(ax)
    arrow(ax, (0, 0.25), (0, 1.25))
    arrow(ax, (2.0, 0.25), (2.0, 1.5), (0.85, 1.5))
    box(ax, 0, 1.5, "attention", "attention")
    residual(ax, 0.7, 2.3)
    arrow(ax, (0, 1.75), (0, 2.13))
    plus(ax, 0, 2.3)
    arrow(ax, (0, 2.47), (0, 2.8))
    box(ax, 0, 3.05, "attention_norm", "norm")
    arrow(ax, (0, 3.3), (0, 3.85))
    box(ax, 0, 4.1, "ff", "ff")
    residual(ax, 3.5, 4.9)
    arrow(ax, (0, 4.35), (0, 4.73))
    plus(ax, 0, 4.9)
    arrow(ax, (0, 5.07), (0, 5.4))
    box(ax, 0, 5.65, "output_norm", "norm")
    arrow(ax, (0, 5.9), (0, 6.4))

    ax = axes(fig, 132, **panel, title='form="pre_norm"')
    inputs(ax)
    arrow(ax, (0, 0.25), (0, 0.85))
    box(ax, 0, 1.1, "query_norm", "norm")
    arrow(ax, (2.0, 0.25), (2.0, 0.85))
    box(ax, 2.0, 1.1, "context_norm", "norm")
    arrow(ax, (0, 1.35), (0, 1.8))
    arrow(ax, (2.0, 1.35), (2.0, 2.05), (0.85, 2.05))
    box(ax, 0, 2.05, "attention", "attention")
    residual(ax, 0.5, 2.85)
    arrow(ax, (0, 2.3), (0, 2.68))
    plus(ax, 0, 2.85)
    arrow(ax, (0, 3.02), (0, 3.6))
    box(ax, 0, 3.85, "ff_norm", "norm")
    arrow(ax, (0, 4.1), (0, 4.55))
    box(ax, 0, 4.8, "ff", "ff")
    residual(ax, 3.25, 5.6)
    arrow(ax, (0, 5.05), (0, 5.43))
    plus(ax, 0, 5.6)
    arrow(ax, (0, 5.77), (0, 6.4))

    ax = axes(fig, 133, **panel, title='form="official": the authors\' code')
    inputs(ax)
    arrow(ax, (0, 0.25), (0, 0.85))
    box(ax, 0, 1.1, "project", "linear")
    arrow(ax, (0, 1.35), (0, 2.0))
    arrow(ax, (2.0, 0.25), (2.0, 2.35), (0.85, 2.35))
    box(ax, 0, 2.35, "attention\n(query, output absent)", "attention", w=1.9, h=0.7, size=7.5)
    residual(ax, 1.65, 3.25)
    arrow(ax, (0, 2.7), (0, 3.08))
    plus(ax, 0, 3.25)
    arrow(ax, (0, 3.42), (0, 4.1))
    box(ax, 0, 4.4, "ff\n(one layer)", "ff", h=0.6, size=8)
    residual(ax, 3.75, 5.3)
    arrow(ax, (0, 4.7), (0, 5.13))
    plus(ax, 0, 5.3)
    arrow(ax, (0, 5.47), (0, 6.4))
    return fig


# --- sets as rows of circles ----------------------------------------------------------------------------------------


def row(ax: Axes, y: float, count: int, color: str, center: float = 0.0, gap: float = 0.62) -> list[Point]:
    """Draw elements side by side, and return where they are."""
    places = [(center + (i - (count - 1) / 2) * gap, y) for i in range(count)]
    for place in places:
        ax.add_patch(Circle(place, 0.17, fc=color, ec=LINE, lw=1, zorder=3))
    return places


def ask(ax: Axes, queries: Sequence[Point], context: Sequence[Point]) -> None:
    """Join every query to every element it attends to."""
    for qx, qy in queries:
        for cx, cy in context:
            ax.plot([qx, cx], [qy, cy], color="#8fb8de", lw=0.8, zorder=1)


def set_blocks() -> Figure:
    """Who attends to whom in SAB, ISAB and PMA."""
    fig = Figure(figsize=(9.6, 3.5), layout="constrained")
    element, learned, hidden = COLORS["attention"], COLORS["learned"], "#fff3c4"
    panel = {"xlim": (-2.6, 2.6), "ylim": (-0.75, 3.3)}
    n = 7

    ax = axes(fig, 131, **panel, title="SAB: $n \\times n$ pairs")
    below, above = row(ax, 0, n, element), row(ax, 2.4, n, element)
    ask(ax, above, below)
    label(ax, 0, -0.5, "set $X$: $n$ elements")
    label(ax, 0, 2.9, "mab$(X, X)$: $n$ elements")

    ax = axes(fig, 132, **panel, title="ISAB: $m \\times n$ pairs, twice")
    below, middle, above = row(ax, 0, n, element), row(ax, 1.2, 3, hidden, gap=1.0), row(ax, 2.4, n, element)
    ask(ax, middle, below)
    ask(ax, above, middle)
    label(ax, 0, -0.5, "set $X$: $n$ elements")
    label(ax, 1.45, 1.2, "$H = $ mab$(I, X)$", ha="left", fontsize=8)
    label(ax, -1.45, 1.2, "$m$ inducing\npoints ask", ha="right", fontsize=8)
    label(ax, 0, 2.9, "mab$(X, H)$: $n$ elements")

    ax = axes(fig, 133, **panel, title="PMA: $k \\times n$ pairs")
    below, above = row(ax, 0, n, element), row(ax, 2.4, 2, learned, gap=1.2)
    ask(ax, above, below)
    label(ax, 0, -0.5, "set ff$(X)$: $n$ elements")
    label(ax, 0, 2.9, "mab$(S, \\mathrm{ff}(X))$: $k$ learned seeds ask")
    return fig


def set_transformer() -> Figure:
    """The Set Transformer from left to right."""
    fig = Figure(figsize=(9.6, 1.9), layout="constrained")
    ax = axes(fig, 111, (-0.9, 14.4), (-0.75, 1.75))
    parts = [
        ("isab", "attention"),
        ("isab", "attention"),
        ("pma", "learned"),
        ("sab", "attention"),
        ("linear", "linear"),
    ]
    shapes = ["$(n, d_x)$", "$(n, d)$", "$(n, d)$", "$(k, d)$", "$(k, d)$", "$(k, d_{out})$"]
    x = 0.0
    for i, shape in enumerate(shapes):
        if i:
            box(ax, x + 0.45, 0.5, parts[i - 1][0], parts[i - 1][1], w=1.2, h=0.7, size=10)
            x += 1.05
        end = x + 1.4
        arrow(ax, (x, 0.5), (end - 0.15, 0.5))
        label(ax, (x + end - 0.15) / 2, 0.78, shape, fontsize=8.5)
        x = end
    for left, right, text in ((1.25, 5.0, "encoder"), (6.15, 7.45, "pooling"), (8.6, 12.3, "decoder, output layer")):
        ax.plot([left, left, right, right], [-0.15, -0.25, -0.25, -0.15], color=FAINT, lw=1)
        label(ax, (left + right) / 2, -0.5, text, color=FAINT)
    label(ax, -0.1, 0.5, "set", ha="right", fontsize=10)
    return fig


# --- Perceiver ------------------------------------------------------------------------------------------------------


def perceiver() -> Figure:
    """Iterations of a Perceiver and of a Perceiver IO, with the parts that share their weights."""
    fig = Figure(figsize=(9.6, 5.0), layout="constrained")

    def encoder(ax: Axes, cross: Sequence[str], layers: Sequence[str], kinds: dict[str, str]) -> float:
        box(ax, -0.1, 0, "latents\n$(m, d)$", "learned", w=1.25, h=0.75, size=8.5)
        x = 0.525
        for c, z in zip(cross, layers, strict=True):
            if c:
                arrow(ax, (x, 0), (x + 0.3, 0))
                box(ax, x + 0.9, 0, f"cross\n[{c}]", kinds["c" + c], w=1.2, h=0.75, size=8)
                arrow(ax, (x + 0.9, 1.35), (x + 0.9, 0.375))
                x += 1.5
            arrow(ax, (x, 0), (x + 0.3, 0))
            box(ax, x + 0.9, 0, f"latent\n[{z}]", kinds["l" + z], w=1.2, h=0.75, size=8)
            x += 1.5
        return x

    def inputs(ax: Axes, right: float) -> None:
        box(
            ax,
            (0.5 + right) / 2,
            1.6,
            "inputs: $n$ elements, attended to but never changed",
            "plain",
            w=right - 0.5,
            h=0.5,
        )

    ax = axes(fig, 211, (-0.9, 14.6), (-0.9, 2.1), "Perceiver: two cross-attentions, one latent transformer, depth=4")
    kinds = {"c0": "attention", "c1": "gate", "l0": "ff"}
    end = encoder(ax, "0111", "0000", kinds)
    inputs(ax, end)
    arrow(ax, (end, 0), (end + 0.5, 0))
    label(ax, end + 0.6, 0, "$(m, d)$", ha="left")
    label(ax, 6.5, -0.68, "one colour: the same weights", color=FAINT, fontsize=8.5)

    ax = axes(fig, 212, (-0.9, 14.6), (-1.5, 2.1), "Perceiver IO: cross_attentions=(block, ()), depth=3, and a decoder")
    end = encoder(ax, ["0", "", ""], "000", kinds)
    inputs(ax, end)
    arrow(ax, (end, 0), (end + 0.4, 0))
    box(ax, end + 1.1, 0, "decoder", "attention", w=1.4, h=0.75, size=8.5)
    box(ax, end + 1.1, -1.15, "output queries $(o, d_q)$", "plain", w=2.9, h=0.5, size=8.5)
    arrow(ax, (end + 1.1, -0.9), (end + 1.1, -0.375))
    arrow(ax, (end + 1.8, 0), (end + 2.2, 0))
    box(ax, end + 2.8, 0, "output", "linear", w=1.2, h=0.75, size=8.5)
    arrow(ax, (end + 3.4, 0), (end + 3.9, 0))
    label(ax, end + 4.0, 0, "$(o, d_{out})$", ha="left")
    return fig


def fourier() -> Figure:
    """The Fourier features of the places of an image."""
    fig = Figure(figsize=(9.6, 2.6), layout="constrained")
    side, bands = 33, 4
    line = np.linspace(-1.0, 1.0, side)
    positions = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    features = setattn.fourier_features(positions, num_bands=bands, max_resolution=8.0)
    names = ["row", "column"]
    names += [f"{f} {axis} {k}" for f in ("sin", "cos") for axis in ("row", "col") for k in range(bands)]
    grid = fig.add_gridspec(2, 9)
    for i, name in enumerate(names):
        ax = fig.add_subplot(grid[i % 2, 0] if i < 2 else grid[(i - 2) // 8, 1 + (i - 2) % 8])
        ax.imshow(features[:, :, i], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=8)
    return fig


# --- Flamingo -------------------------------------------------------------------------------------------------------


def resampler() -> Figure:
    """Which axes the features of a resampler have, by its embeddings, and what is resampled together."""
    fig = Figure(figsize=(9.6, 4.2), layout="constrained")
    tints = ["#cfe3f7", "#fde4c4", "#e5dcf4"]

    def cells(ax: Axes, x: float, y: float, colors: Sequence[str]) -> float:
        for i, color in enumerate(colors):
            ax.add_patch(Rectangle((x + 0.3 * i, y), 0.3, 0.3, fc=color, ec=LINE, lw=0.8, zorder=3))
        return x + 0.3 * len(colors)

    def group(ax: Axes, y: float, colors: Sequence[Sequence[str]], to: float) -> None:
        """Draw what is resampled together, and the latents it becomes."""
        x = 0.0
        for frame in colors:
            x = cells(ax, x, y, frame) + 0.12
        style = "round,pad=0.09,rounding_size=0.08"
        ax.add_patch(FancyBboxPatch((0, y), x - 0.12, 0.3, style, fc="none", ec=FAINT, lw=1, ls="--", zorder=2))
        arrow(ax, (x + 0.1, y + 0.15), (to, y + 0.15))
        cells(ax, to + 0.12, y, [COLORS["learned"]] * 2)

    panel = {"xlim": (-0.3, 6.0), "ylim": (-0.85, 1.75)}
    white = "#ffffff"

    def shapes(ax: Axes, features: str, out: str, to: float) -> None:
        label(ax, 0, -0.3, features, ha="left")
        label(ax, to + 0.42, -0.3, out, ha="center")

    ax = axes(fig, 221, **panel, title="no embedding")
    group(ax, 0.72, [[white] * 4], 4.6)
    shapes(ax, "(..., n, dim)", "(..., m, dim)", 4.6)
    ax = axes(fig, 222, **panel, title="frame_embedding: frames resampled together")
    group(ax, 0.72, [[c] * 4 for c in tints], 4.6)
    shapes(ax, "(..., frames, n, dim)", "(..., m, dim)", 4.6)
    ax = axes(fig, 223, **panel, title="media_embedding: each medium on its own")
    for i, c in enumerate(("#f8d3d8", "#d3ecf8")):
        group(ax, 1.1 - 0.75 * i, [[c] * 4], 4.6)
    shapes(ax, "(..., media, n, dim)", "(..., media, m, dim)", 4.4)
    ax = axes(fig, 224, **panel, title="both")
    for i, cs in enumerate((tints, ("#a8c8ea", "#f6c98f", "#c9b6e8"))):
        group(ax, 1.1 - 0.75 * i, [[c] * 4 for c in cs], 4.6)
    shapes(ax, "(..., media, frames, n, dim)", "(..., media, m, dim)", 4.4)
    return fig


def gated() -> Figure:
    """Which media each row of text sees."""
    fig = Figure(figsize=(9.0, 3.9), layout="constrained")
    words = ["Look:", "<image>", "a", "cat,", "<image>", "a", "dog."]
    media, elements = 2, 3
    locations = np.array([w == "<image>" for w in words])
    place = np.cumsum(locations)[:, None]
    number = np.repeat(np.arange(1, media + 1), elements)
    for i, (title, sees) in enumerate(
        (("immediate=True: the last medium", place == number), ("immediate=False: all media so far", place >= number))
    ):
        ax = fig.add_subplot(1, 2, i + 1)
        for r in range(len(words)):
            for c in range(media * elements):
                color = "#8fb8de" if sees[r, c] else "#ffffff"
                ax.add_patch(Rectangle((c, r), 1, 1, fc=color, ec="#c3ccd5", lw=0.8))
        ax.plot([elements, elements], [0, len(words)], color=INK, lw=1.4)
        ax.set(xlim=(0, media * elements), ylim=(len(words), 0), aspect="equal")
        ax.set_xticks([elements * (j + 0.5) for j in range(media)], [f"medium {j + 1}" for j in range(media)])
        ax.set_yticks([r + 0.5 for r in range(len(words))], words)
        ax.tick_params(length=0)
        ax.set_title(title, fontsize=10, fontweight="bold")
        label(ax, media * elements + 0.25, 0.5, "sees nothing:\nattention is 0", ha="left", fontsize=8, color=FAINT)
    return fig


# --- attention ------------------------------------------------------------------------------------------------------


def attention_map() -> Figure:
    """The weights of two heads over a set some of whose elements do not take part."""
    rng = np.random.default_rng(3)
    params = setattn.init_attention(8, num_heads=2, rng=rng)
    params = setattn.map_params(lambda a: a * 2.5, params)
    query, context = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(10, 8)).astype(np.float32)
    mask = np.ones(10, dtype=bool)
    mask[[3, 8, 9]] = False
    weights = setattn.attention_weights(query, context, params, mask=mask)
    fig = Figure(figsize=(9.0, 2.4), layout="constrained")
    for head in range(2):
        ax = fig.add_subplot(1, 2, head + 1)
        mesh = ax.pcolormesh(weights[head], vmin=0, vmax=1, cmap="Blues", edgecolors="#c3ccd5", linewidth=0.8)
        for j in np.flatnonzero(~mask):
            ax.add_patch(Rectangle((j, 0), 1, 4, fc="#f1f3f5", ec="#adb5bd", hatch="////", lw=0.8))
        ax.set(xticks=np.arange(10) + 0.5, yticks=np.arange(4) + 0.5, aspect="equal")
        ax.set_xticklabels(range(10))
        ax.set_yticklabels(range(4))
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.set(xlabel="element of the context", ylabel="query")
        ax.set_title(f"head {head}", fontsize=10, fontweight="bold")
    fig.colorbar(mesh, ax=fig.axes, label="weight", shrink=0.9, pad=0.02)
    return fig


def state() -> Figure:
    """Parts of a set become states, which are merged in any order and finished once."""
    fig = Figure(figsize=(9.6, 2.7), layout="constrained")
    ax = axes(fig, 111, (-0.9, 13.6), (-0.5, 3.6))
    rows = (3.1, 1.85, 0.6)
    names = ("part of the set", "another part", "nothing")
    for y, name in zip(rows, names, strict=True):
        box(ax, 0.5, y, name, "plain", w=2.4)
        arrow(ax, (1.7, y), (2.3, y))
        box(ax, 3.2, y, "make_state", "attention", w=1.8)
        arrow(ax, (4.1, y), (4.7, y))
        text = "$(-\\infty,\\; 0,\\; 0)$" if name == "nothing" else "(largest, total, weighted)"
        box(ax, 6.15, y, text, "norm", w=2.9, size=8.5)
    box(ax, 9.0, 2.475, "merge_states", "ff", w=1.9)
    arrow(ax, (7.6, 3.1), (9.0, 3.1), (9.0, 2.725))
    arrow(ax, (7.6, 1.85), (9.0, 1.85), (9.0, 2.225))
    box(ax, 10.6, 1.2, "merge_states", "ff", w=1.9)
    arrow(ax, (9.95, 2.475), (10.6, 2.475), (10.6, 1.45))
    arrow(ax, (7.6, 0.6), (10.6, 0.6), (10.6, 0.95))
    arrow(ax, (11.55, 1.2), (11.9, 1.2))
    box(ax, 12.6, 1.2, "finish", "learned", w=1.3)
    arrow(ax, (12.6, 0.95), (12.6, 0.35))
    label(ax, 12.6, 0.1, "weighted / total")
    return fig


def order() -> Figure:
    """The multiplications of the orders of products, against the size of the short side."""
    fig, panels = Figure(figsize=(9.6, 3.6), layout="constrained"), []
    counts = np.unique(np.geomspace(1, 1000, 120).astype(int))
    block = {"dim": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "value_dim": 32, "dim_query": 128, "dim_out": 128}
    sides = [
        ("queries", "elements", "m queries meet 100 000 elements", ("carry_queries", "carry_weights"), "#2f6fad"),
        ("elements", "queries", "100 000 queries meet n elements", ("carry_keys", "carry_output"), "#b7631c"),
    ]
    for i, (short, long, title, carried, color) in enumerate(sides):
        ax = fig.add_subplot(1, 2, i + 1, sharey=panels[0] if panels else None)
        sizes = [Sizes(**{short: int(count), long: 100_000}, **block) for count in counts]
        for names, line, shade in ((("project", "project"), "project both sides", FAINT), (carried, None, color)):
            millions = [multiplications(s, setattn.Order(*names)) / 1e9 for s in sizes]
            ax.plot(counts, millions, color=shade, lw=2, label=line or " and ".join(n.replace("_", " ") for n in names))
        best = [choose(s) for s in sizes]
        crossing = next(int(count) for count, b in zip(counts, best, strict=True) if b == setattn.Order())
        ax.axvline(crossing, color=LINE, lw=0.8, ls=":")
        ax.annotate(f"{crossing}", (crossing, 1.05), xytext=(4, 0), textcoords="offset points", color=LINE)
        ax.set(xscale="log", yscale="log", xlabel=f"{short} ({'m' if short == 'queries' else 'n'})", title=title)
        ax.legend(frameon=False, fontsize=8, loc="upper left")
        ax.spines[["top", "right"]].set_visible(False)
        panels.append(ax)
    panels[0].set_ylabel("multiplications, in 10\N{SUPERSCRIPT NINE}")
    return fig


FIGURES = {
    "mab": mab,
    "set_blocks": set_blocks,
    "set_transformer": set_transformer,
    "perceiver": perceiver,
    "fourier": fourier,
    "resampler": resampler,
    "gated": gated,
    "attention_map": attention_map,
    "state": state,
    "order": order,
}


def main(folder: Path = IMAGES, suffix: str = "svg") -> None:
    """Write every figure to a folder."""
    for name, draw in FIGURES.items():
        with mpl.rc_context(STYLE):
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            draw().savefig(folder / f"{name}.{suffix}", format=suffix, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main(*[Path(a) for a in sys.argv[1:2]], *sys.argv[2:3])
