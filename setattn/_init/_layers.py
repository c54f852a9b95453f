"""Layers and attention from a seed."""

from __future__ import annotations

from typing import Any

from setattn import _check as check
from setattn._errors import OptionError
from setattn._init._draw import NORMS, divide_heads, draw_feed_forward, draw_norm, make_rng, positive, uniform
from setattn._params import Attention, FeedForward, LayerNorm, Linear, RMSNorm
from setattn._typing import Absent


def init_linear(dim_in: int, dim_out: int, /, *, bias: bool = True, rng: Any = None) -> Linear:
    """Draw an affine map, uniform between ``-1 / sqrt(dim_in)`` and ``1 / sqrt(dim_in)`` as PyTorch does.

    Parameters
    ----------
    dim_in, dim_out : int
        Widths.
    bias : bool, default True
        Whether there is a bias.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    Linear
        Arrays of float32.

    Raises
    ------
    OptionError
        If a width is no positive integer.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_linear(3, 2, rng=0).weight.shape
    (3, 2)
    """
    positive("init_linear", dim_in=dim_in, dim_out=dim_out)
    check.switch("init_linear", "bias", bias)
    return uniform(make_rng("init_linear", rng), (dim_in,), (dim_out,), bias)


def init_norm(dim: int, /, *, kind: str = "layer", bias: bool = True) -> LayerNorm | RMSNorm | Absent:
    """Make a norm that changes nothing but the scale of its input: scale 1, bias 0.

    Parameters
    ----------
    dim : int
        Width.
    kind : {"layer", "rms", "none"}
        Kind of norm.
    bias : bool, default True
        Whether a layer norm has a bias.

    Returns
    -------
    LayerNorm, RMSNorm or ()
        Arrays of float32.

    Raises
    ------
    OptionError
        If the width is no positive integer or the kind unknown.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_norm(2, kind="rms")
    RMSNorm(scale=array([1., 1.], dtype=float32))
    """
    positive("init_norm", dim=dim)
    check.choice("init_norm", "kind", kind, NORMS)
    check.switch("init_norm", "bias", bias)
    return draw_norm(dim, kind, bias)


def init_feed_forward(
    dim: int,
    /,
    *,
    hidden: int | None = None,
    gate: bool = False,
    bias: bool = True,
    rng: Any = None,
) -> FeedForward:
    """Draw a row-wise feed-forward network, with weights as :func:`init_linear` draws them.

    Parameters
    ----------
    dim : int
        Width of the input and the output.
    hidden : int, optional
        Width in between. Without it, there is one layer: ``activation(x @ weight + bias)``.
    gate : bool, default False
        Whether a second projection gates the hidden layer (GEGLU, SwiGLU).
    bias : bool, default True
        Whether the maps have biases.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    FeedForward
        Arrays of float32.

    Raises
    ------
    OptionError
        If a width is no positive integer.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_feed_forward(4, hidden=16, rng=0).hidden.weight.shape
    (4, 16)
    """
    function = "init_feed_forward"
    positive(function, dim=dim, **({} if hidden is None else {"hidden": hidden}))
    check.switch(function, "gate", gate)
    check.switch(function, "bias", bias)
    return draw_feed_forward(make_rng(function, rng), dim, hidden, gate=gate, bias=bias)


def init_attention(
    dim: int,
    dim_context: int | None = None,
    /,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    bias: bool = True,
    head_norm: str = "none",
    rng: Any = None,
) -> Attention:
    """Draw a multi-head attention, with weights as :func:`init_linear` draws them.

    Parameters
    ----------
    dim : int
        Width of the queries and of the output.
    dim_context : int, optional
        Width of the context; ``dim`` if not given.
    num_heads : int
        Number of heads.
    num_kv_heads : int, optional
        Number of heads of keys and values, a divisor of ``num_heads``; as many if not given.
    head_dim : int, optional
        Width of a head; ``dim / num_heads`` if not given.
    value_dim : int, optional
        Width of a value head; ``head_dim`` if not given.
    bias : bool, default True
        Whether the projections have biases.
    head_norm : {"none", "layer", "rms"}
        Norm on each head of the queries and keys.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    Attention
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer, or one does not divide the other.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_attention(8, num_heads=2, rng=0).query.weight.shape
    (8, 2, 4)
    """
    function, dim_context = "init_attention", dim if dim_context is None else dim_context
    positive(function, dim=dim, dim_context=dim_context, num_heads=num_heads)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    positive(function, num_kv_heads=num_kv_heads)
    head_dim = divide_heads(function, dim, num_heads, head_dim)
    value_dim = head_dim if value_dim is None else value_dim
    positive(function, value_dim=value_dim)
    check.choice(function, "head_norm", head_norm, NORMS)
    check.switch(function, "bias", bias)
    if num_heads % num_kv_heads:
        raise OptionError(function, "num_kv_heads", num_kv_heads, f"a divisor of num_heads={num_heads}")
    rng = make_rng(function, rng)
    return Attention(
        query=uniform(rng, (dim,), (num_heads, head_dim), bias),
        key=uniform(rng, (dim_context,), (num_kv_heads, head_dim), bias),
        value=uniform(rng, (dim_context,), (num_kv_heads, value_dim), bias),
        output=uniform(rng, (num_heads, value_dim), (dim,), bias),
        query_norm=draw_norm(head_dim, head_norm),
        key_norm=draw_norm(head_dim, head_norm),
    )
