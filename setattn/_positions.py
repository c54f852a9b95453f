"""Features of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from setattn import _check as check
from setattn._call import begin, evaluate, widen
from setattn._namespace import creation_device
from setattn._typing import Absent, Array


def fourier_features(
    positions: Array,
    /,
    *,
    num_bands: int,
    max_resolution: float | Sequence[float],
    concat_position: bool = True,
    order: str = "grouped",
) -> Array:
    r"""Encode positions by sines and cosines of evenly spaced frequencies.

    For each axis, with :math:`K` frequencies :math:`f_k`, evenly from 1 to half the axis' resolution (of one, 1),

    .. math:: \sin(\pi f_k p), \quad \cos(\pi f_k p)

    Parameters
    ----------
    positions : array, shape (..., axes)
        Positions, usually from -1 to 1 on each axis.
    num_bands : int
        Number of frequencies :math:`K` for each axis.
    max_resolution : float or sequence of float
        Resolution of each axis, or of all of them: twice the largest frequency.
    concat_position : bool, default True
        Whether the positions themselves are among the features.
    order : {"grouped", "per_axis"}
        Order of the features. ``"grouped"``, of the authors' code: the positions, the sines of all axes, the cosines of
        all axes. ``"per_axis"``, of lucidrains' perceiver-pytorch: for one axis after another its sines, its cosines,
        its position.

    Returns
    -------
    array, shape (..., axes * (2 * num_bands + concat_position))
        Namespace, device and dtype of the input.

    Raises
    ------
    ShapeError, DTypeError, NamespaceError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: one sine and one cosine for each feature.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.2.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> positions = np.array([[0.0, 0.5]])
    >>> setattn.fourier_features(positions, num_bands=2, max_resolution=4).round(3) + 0.0
    array([[ 0. ,  0.5,  0. ,  0. ,  1. ,  0. ,  1. ,  1. ,  0. , -1. ]])
    """
    call = begin("fourier_features", "positions", positions)
    axes = check.data(call, "positions", positions, "axes", ndim=1).size
    check.integer(call.function, "num_bands", num_bands)
    check.switch(call.function, "concat_position", concat_position)
    check.choice(call.function, "order", order, ("grouped", "per_axis"))
    resolutions = check.numbers_for_axes(call, "max_resolution", max_resolution, axes)

    def body(_: Absent) -> Array:
        xp = call.xp
        x = widen(positions, xp) if call.half else positions
        sines, cosines = [], []
        for axis, resolution in enumerate(resolutions):
            step = (resolution / 2.0 - 1.0) / max(num_bands - 1, 1)
            angles = [x[..., axis : axis + 1] * (math.pi * (1.0 + k * step)) for k in range(num_bands)]
            angle = xp.concat(angles, axis=-1)
            sines.append(xp.sin(angle))
            cosines.append(xp.cos(angle))
        if order == "grouped":
            parts = [x, *sines, *cosines] if concat_position else [*sines, *cosines]
        else:
            parts = []
            for axis in range(axes):
                parts += [sines[axis], cosines[axis]]
                parts += [x[..., axis : axis + 1]] if concat_position else []
        return xp.concat(parts, axis=-1)

    return evaluate(call, body, ())


# --- the mathematics ------------------------------------------------------------------------------------------------


def sincos_features(positions: Array, /, *, dim: int, temperature: float = 10000.0) -> Array:
    r"""Encode positions by sines and cosines of geometrically spaced frequencies.

    For each axis, with :math:`K = \text{dim} / (2 \cdot \text{axes})` frequencies
    :math:`f_k = \text{temperature}^{-k/K}`, first all sines, then all cosines,

    .. math:: \sin(f_k p), \quad \cos(f_k p), \qquad k = 0, \dots, K - 1

    Parameters
    ----------
    positions : array, shape (..., axes)
        Positions, usually whole numbers from 0 on each axis. For the tables of image models the first is the column and
        the second the row.
    dim : int
        Number of features, a multiple of ``2 * axes``.
    temperature : float, default 10000.0
        Inverse of what the frequencies, which start from 1, go down to.

    Returns
    -------
    array, shape (..., dim)
        Namespace, device and dtype of the input.

    Raises
    ------
    ShapeError, DTypeError, NamespaceError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: one sine or cosine for each feature.

    A. Vaswani et al., *Attention Is All You Need*, 2017, section 3.5 (one axis, sines and cosines in turn); K. He et
    al., *Masked Autoencoders Are Scalable Vision Learners*, 2021, appendix A.1 (images).

    Examples
    --------
    >>> import numpy as np, setattn
    >>> positions = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    >>> setattn.sincos_features(positions, dim=4).round(2)
    array([[ 0.  ,  1.  ,  0.  ,  1.  ],
           [ 0.84,  0.54,  0.  ,  1.  ],
           [ 0.84,  0.54,  0.91, -0.42]])
    """
    call = begin("sincos_features", "positions", positions)
    axes = check.data(call, "positions", positions, "axes", ndim=1).size
    check.integer(call.function, "dim", dim, multiple=2 * axes)
    temperature = check.number(call, "temperature", temperature, positive=True)

    def body(_: Absent) -> Array:
        xp, count = call.xp, dim // (2 * axes)
        x = widen(positions, xp) if call.half else positions
        frequencies = xp.asarray(
            [1.0 / temperature ** (k / count) for k in range(count)], dtype=x.dtype, device=creation_device(x, xp)
        )
        parts = []
        for axis in range(axes):
            angle = x[..., axis : axis + 1] * frequencies
            parts += [xp.sin(angle), xp.cos(angle)]
        return xp.concat(parts, axis=-1)

    return evaluate(call, body, ())
