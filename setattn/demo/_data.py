"""Handwritten digits as sets: the elements of an image are its pixels that hold ink."""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

import numpy as np

SIDE = 8
INK = 16  # the darkest value of a pixel


class Digits(NamedTuple):
    """Images of 8 x 8 pixels, 0 for paper to 16 for ink, and the digits they show."""

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


def load_digits(*, held_out: bool) -> Digits:
    """Load the 500 images that the training never sees, or the 1297 others."""
    with resources.files(__package__).joinpath("data/digits.npz").open("rb") as file, np.load(file) as data:
        chosen = data["held_out"] == held_out
        return Digits(data["images"][chosen], data["labels"][chosen])


def to_sets(images: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Turn images into sets of (row, column, intensity), each within [-1, 1].

    Returns
    -------
    x : array of float32, shape (images, n, 3)
        The elements, in reading order; ``n`` is the size of the largest set, and smaller ones are filled up with 0.
    mask : array of bool, shape (images, n)
        True for an element, False for filling.
    """
    sizes = np.count_nonzero(images, axis=(1, 2))
    mask = np.arange(sizes.max(initial=0)) < sizes[:, None]
    x = np.zeros((*mask.shape, 3), dtype=np.float32)
    image, row, column = np.nonzero(images)
    center = (SIDE - 1) / 2
    x[mask] = np.stack([row / center - 1, column / center - 1, images[image, row, column] / (INK / 2) - 1], axis=-1)
    return x, mask


def to_images(
    x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Put a value ``(images, n)`` of each element where its pixel is; 0 stands where there is no element."""
    position = np.rint((x[..., :2] + 1) * (SIDE - 1) / 2).astype(int)
    images = np.zeros((len(x), SIDE, SIDE), dtype=values.dtype)
    images[np.nonzero(mask)[0], position[mask][:, 0], position[mask][:, 1]] = values[mask]
    return images


def shuffle(
    x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], rng: np.random.Generator
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Put every set's elements, and the filling between them, in an order of its own."""
    order = rng.random(mask.shape).argsort(axis=1)
    return np.take_along_axis(x, order[..., None], axis=1), np.take_along_axis(mask, order, axis=1)
