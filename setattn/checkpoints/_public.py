"""The public functions. What they do is imported when it is asked for, so that nobody else pays for it."""

from __future__ import annotations

import os
from typing import Any

from setattn._typing import Namespace
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout


def load(
    source: Any,
    /,
    layout: str | None = None,
    *,
    prefix: str = "",
    config: Any = None,
    xp: Namespace | None = None,
    device: Any = None,
    dtype: Any = None,
    allow_nonfinite: bool = False,
    **options: Any,
) -> Block:
    """Load a block from a weights file, or a mapping, of a known layout.

    Parameters
    ----------
    source : path or mapping
        A ``.safetensors`` or ``.npz`` file, or arrays of any library by their names, such as a ``state_dict()`` or a
        tree of Flax or Haiku. Nothing in a file is ever executed; a pickled one is refused.
    layout : str, optional
        Name of the layout, one of :func:`layouts`, or ``"setattn"`` for what :func:`save` wrote. If not given it is
        recognised by the names of the tensors, where exactly one layout has these.
    prefix : str, default ""
        What the names of the block's tensors begin with; tensors without it are left alone.
    config : path or mapping, optional
        A ``config.json`` of Hugging Face, or its content, to take options from; the one beside the file if not given.
    xp : module, optional
        The array library of the parameters; NumPy for a file, that of its arrays for a mapping.
    device, dtype : optional
        As for :func:`convert_params`. Tensors of bfloat16 stay so where the library has it, and become float32,
        exactly, where it lacks it.
    allow_nonfinite : bool, default False
        Whether NaN and infinite weights are let through.
    **options
        What the shapes of the tensors do not say, such as ``num_heads``: the options of the layout.

    Returns
    -------
    Block
        The parameters and the options that the function takes, ready to be called. Arrays that are already as they are
        needed are not copied.

    Raises
    ------
    CheckpointError
        If the source cannot be read, is broken, or is not of the layout. The message names every tensor that is
        missing, unexpected or of a wrong shape, and the prefix or the layout that would fit.
    OptionError
        If an option is unknown, missing or out of its range.
    DTypeError, NamespaceError
        If the tensors are of several dtypes and none is asked for, or cannot be converted.

    See Also
    --------
    layouts : The known layouts and their options.
    save : The reverse, in one layout of its own.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> shapes = {"probe": (1, 1, 8), "attention.in_proj_weight": (24, 8), "attention.in_proj_bias": (24,)}
    >>> shapes |= {"attention.out_proj.weight": (8, 8), "attention.out_proj.bias": (8,)}
    >>> shapes |= {"layernorm.weight": (8,), "layernorm.bias": (8,), "mlp.fc1.weight": (16, 8), "mlp.fc1.bias": (16,)}
    >>> shapes |= {"mlp.fc2.weight": (8, 16), "mlp.fc2.bias": (8,)}
    >>> rng = np.random.default_rng(0)
    >>> weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    >>> block = setattn.load(weights, layout="siglip", num_heads=2)
    >>> block
    <setattn.Block attention_pool, activation='gelu_tanh', eps=1e-06: 592 parameters, layout siglip>
    >>> block(np.ones((4, 5, 8))).shape
    (4, 1, 8)
    """
    from setattn.checkpoints._load import load_block

    return load_block(source, layout, prefix, config, xp, device, dtype, allow_nonfinite, options)


def save(path: str | os.PathLike[str], block: Block) -> None:
    """Save a block to a ``.safetensors`` file, in the library's own layout.

    Parameters
    ----------
    path : path
        The file. It is written beside its place and moved there when it is whole.
    block : Block
        The block, with parameters of any library.

    Returns
    -------
    None
        Reading the file with :func:`load` gives the same function, options and, bit by bit, parameters. They lie in
        memory as they did, so that NumPy's results are the same, too.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    ParameterError, OptionError
        If the block calls no function of the library, or something in it has no place in a file.

    See Also
    --------
    load : The reverse.

    Examples
    --------
    >>> import pathlib, tempfile, setattn
    >>> block = setattn.Block("isab", setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0), {"eps": 1e-6})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "isab.safetensors")
    ...     setattn.save(path, block)
    ...     setattn.load(path)
    <setattn.Block isab, eps=1e-06: 808 parameters>
    """
    from setattn.checkpoints._canonical import save_block

    save_block(path, block)


def layouts() -> dict[str, Layout]:
    """Return the layouts of weights that :func:`load` knows.

    Returns
    -------
    dict of str to Layout
        Each layout by its name, which is the value of ``layout=``, with the implementation it is of, the functions its
        blocks call and its options.

    Examples
    --------
    >>> import setattn
    >>> setattn.layouts()["siglip"].functions
    ('attention_pool',)
    >>> [option.name for option in setattn.layouts()["siglip"].options]
    ['num_heads', 'eps', 'activation']
    """
    from setattn.checkpoints._registry import known_layouts

    return dict(known_layouts())
