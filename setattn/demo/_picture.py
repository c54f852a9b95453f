"""The picture: digits, and the pixels that the pooling's seed attends to."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

TITLE = "Handwritten digits as sets of pixels: what the model reads, and where it looks"
COLUMNS = 5
LARGEST = 290.0  # the area of a disc as wide as a pixel, in square points
WRONG = "#b3261e"


def draw(
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    probabilities: np.ndarray[Any, Any],
    attention: np.ndarray[Any, Any],
) -> bytes:
    """Draw digits in grey and the attention as discs on them, and return a PNG file.

    Parameters
    ----------
    images : array, shape (k, 8, 8)
        The digits.
    labels : array, shape (k,)
        What they are.
    probabilities : array, shape (k, 10)
        What the model says they are.
    attention : array, shape (k, 8, 8)
        The share of the attention that each pixel gets; 0 where there is no ink.

    Returns
    -------
    bytes
        The content of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    rows = -(-len(images) // COLUMNS)
    ink = LinearSegmentedColormap.from_list("ink", ["#ffffff", "#8f959e"])
    heat = LinearSegmentedColormap.from_list("heat", ["#ffe08a", "#ff8c1a", "#c4161c", "#5c0011"])
    share = Normalize(0.0, float(attention.max(initial=0.0)))
    figure = Figure(figsize=(10.0, 2.15 * rows + 1.5), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(TITLE, fontsize=15, fontweight="bold")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image, label, p, weights in zip(axes.flat, images, labels, probabilities, attention, strict=False):
        axis.imshow(image, cmap=ink, vmin=0, vmax=16)
        row, column = np.nonzero(weights)
        w = weights[row, column]
        axis.scatter(column, row, s=LARGEST * w / share.vmax, c=w, cmap=heat, norm=share, linewidths=0)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_color("#c8ccd2")
        said = int(p.argmax())
        right = said == label
        title = f"reads {said}  ({100 * p[said]:.0f} %)" + ("" if right else f", is {label}")
        axis.set_title(title, fontsize=13, color="black" if right else WRONG)
    bar = figure.colorbar(
        ScalarMappable(share, heat),
        ax=axes,
        location="bottom",
        shrink=0.6,
        aspect=45,
        format=lambda x, _: f"{100 * x:.0f} %",
    )
    bar.set_label("disc: share of the pooling seed's attention that a pixel gets        grey: its ink", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
