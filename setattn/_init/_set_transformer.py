"""Set Transformer blocks and attention pooling from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from setattn import _check as check
from setattn._errors import OptionError
from setattn._init._draw import (
    FORMS,
    NORMS,
    divide_heads,
    draw_attention,
    draw_feed_forward,
    draw_norm,
    make_rng,
    positive,
    uniform,
    xavier,
    xavier_array,
)
from setattn._params import ISAB, MAB, PMA, AttentionPool, SetTransformer


def init_mab(
    dim: int,
    /,
    *,
    num_heads: int,
    dim_x: int | None = None,
    dim_y: int | None = None,
    hidden: int | None = None,
    form: str = "post_norm",
    norm: str | None = None,
    rng: Any = None,
) -> MAB:
    """Draw a multihead attention block, with weights as :func:`init_linear` draws them.

    Parameters
    ----------
    dim : int
        Width of the output.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    dim_x, dim_y : int, optional
        Widths of the two sets; ``dim`` if not given. If ``dim_x`` is another, the block has a ``project`` for its
        residual.
    hidden : int, optional
        Width of the hidden layer of the feed-forward network; without it, the network is one layer.
    form : {"post_norm", "pre_norm", "official"}
        Form of the paper, with norms after the residuals; with norms before attention and network; or form of the
        authors' code: a projected residual, no output projection, no norm. The last one is called with
        ``scale=dim**-0.5``.
    norm : {"layer", "rms", "none"}, optional
        Kind of norm; ``"layer"``, or ``"none"`` for the official form, if not given.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    MAB
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer, the heads do not divide the width, or a word is unknown.

    Examples
    --------
    >>> import setattn
    >>> setattn.count_params(setattn.init_mab(8, num_heads=2, rng=0))
    392
    """
    return _mab("init_mab", make_rng("init_mab", rng), dim, num_heads, dim_x, dim_y, hidden, form, norm)


def init_isab(
    dim: int,
    /,
    *,
    num_inducing: int,
    num_heads: int,
    dim_x: int | None = None,
    hidden: int | None = None,
    form: str = "post_norm",
    norm: str | None = None,
    rng: Any = None,
) -> ISAB:
    """Draw an induced set attention block: inducing points by Xavier's uniform rule, as the authors' code does.

    Parameters
    ----------
    dim : int
        Width of the output and of the inducing points.
    num_inducing : int
        Number of inducing points.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    dim_x : int, optional
        Width of the set; ``dim`` if not given.
    hidden, form, norm, rng
        As for :func:`init_mab`.

    Returns
    -------
    ISAB
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer, the heads do not divide the width, or a word is unknown.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0).inducing_points.shape
    (3, 8)
    """
    positive("init_isab", num_inducing=num_inducing, **({} if dim_x is None else {"dim_x": dim_x}))
    return _isab("init_isab", make_rng("init_isab", rng), dim, num_inducing, num_heads, dim_x, hidden, form, norm)


def init_pma(
    dim: int,
    /,
    *,
    num_heads: int,
    num_seeds: int = 1,
    hidden: int | None = None,
    form: str = "post_norm",
    norm: str | None = None,
    rng: Any = None,
) -> PMA:
    """Draw a pooling by multihead attention: seeds by Xavier's uniform rule, as the authors' code does.

    Parameters
    ----------
    dim : int
        Width of the set, of the seeds and of the output.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    num_seeds : int, default 1
        Number of seeds.
    hidden, norm, rng
        As for :func:`init_mab`.
    form : {"post_norm", "pre_norm", "official"}
        As for :func:`init_mab`; the official one has no row-wise network before the pooling.

    Returns
    -------
    PMA
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer, the heads do not divide the width, or a word is unknown.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_pma(8, num_heads=2, num_seeds=3, rng=0).seeds.shape
    (3, 8)
    """
    positive("init_pma", num_seeds=num_seeds)
    return _pma("init_pma", make_rng("init_pma", rng), dim, num_heads, num_seeds, hidden, form, norm)


def init_set_transformer(
    dim_x: int,
    dim: int,
    dim_out: int,
    /,
    *,
    num_heads: int,
    num_inducing: int | None = None,
    num_encoders: int = 2,
    num_seeds: int = 1,
    num_decoders: int = 1,
    hidden: int | None = None,
    form: str = "post_norm",
    norm: str | None = None,
    rng: Any = None,
) -> SetTransformer:
    """Draw a Set Transformer: the paper's is two encoder blocks, pooling, one decoder block and an output layer.

    Parameters
    ----------
    dim_x, dim, dim_out : int
        Widths of the set, of the model and of the output.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    num_inducing : int, optional
        Number of inducing points; without it, the encoder is made of set attention blocks.
    num_encoders, num_decoders : int
        Numbers of encoder (default 2) and decoder blocks (default 1).
    num_seeds : int, default 1
        Number of seeds, the rows of the output.
    hidden, form, norm, rng
        As for :func:`init_mab`.

    Returns
    -------
    SetTransformer
        Arrays of float32, drawn as :func:`init_isab` and :func:`init_pma` draw them.

    Raises
    ------
    OptionError
        If a number is no positive integer, the heads do not divide the width, or a word is unknown.

    Examples
    --------
    >>> import setattn
    >>> params = setattn.init_set_transformer(2, 16, 4, num_heads=4, num_inducing=8, rng=0)
    >>> len(params.encoder), params.output.weight.shape
    (2, (16, 4))
    """
    function = "init_set_transformer"
    generator = make_rng(function, rng)
    positive(function, dim_x=dim_x, dim=dim, dim_out=dim_out, num_seeds=num_seeds)
    check.integer(function, "num_encoders", num_encoders, least=0)
    check.integer(function, "num_decoders", num_decoders, least=0)
    if num_encoders == 0 and dim_x != dim:
        raise OptionError(function, "dim_x", dim_x, f"{dim}, as there is no encoder to change the width")

    def encoder(width: int) -> ISAB | MAB:
        if num_inducing is None:
            return _mab(function, generator, dim, num_heads, width, width, hidden, form, norm)
        positive(function, num_inducing=num_inducing)
        return _isab(function, generator, dim, num_inducing, num_heads, width, hidden, form, norm)

    return SetTransformer(
        encoder=tuple(encoder(dim if i else dim_x) for i in range(num_encoders)),
        pma=_pma(function, generator, dim, num_heads, num_seeds, hidden, form, norm),
        decoder=tuple(
            _mab(function, generator, dim, num_heads, None, None, hidden, form, norm) for _ in range(num_decoders)
        ),
        output=uniform(generator, (dim,), (dim_out,), True),
    )


def init_attention_pool(
    dim: int, /, *, num_heads: int, num_probes: int = 1, hidden: int | None = None, rng: Any = None
) -> AttentionPool:
    """Draw the attention-pooling head of SigLIP: all by Xavier's uniform rule, biases 0, as its code does.

    Parameters
    ----------
    dim : int
        Width of the set, of the probe and of the output.
    num_heads : int
        Number of heads, a divisor of ``dim``.
    num_probes : int, default 1
        Number of probes.
    hidden : int, optional
        Width of the hidden layer of the feed-forward network; ``4 * dim`` if not given.
    rng : numpy.random.Generator or int, optional
        Source of randomness, normalised by :func:`numpy.random.default_rng`.

    Returns
    -------
    AttentionPool
        Arrays of float32.

    Raises
    ------
    OptionError
        If a number is no positive integer or the heads do not divide the width.

    Examples
    --------
    >>> import setattn
    >>> setattn.init_attention_pool(8, num_heads=2, rng=0).probe.shape
    (1, 8)
    """
    function = "init_attention_pool"
    generator = make_rng(function, rng)
    positive(function, dim=dim, num_probes=num_probes)
    hidden = 4 * dim if hidden is None else hidden
    positive(function, hidden=hidden)
    head_dim = divide_heads(function, dim, num_heads, None)
    return AttentionPool(
        probe=xavier_array(generator, (num_probes, dim), num_probes, dim),
        attention=draw_attention(generator, dim, dim, num_heads, head_dim, scheme=xavier),
        ff=draw_feed_forward(generator, dim, hidden, scheme=xavier),
        ff_norm=draw_norm(dim, "layer"),
    )


def _mab(
    function: str,
    rng: np.random.Generator,
    dim: int,
    num_heads: int,
    dim_x: int | None,
    dim_y: int | None,
    hidden: int | None,
    form: str,
    norm: str | None,
) -> MAB:
    dim_x, dim_y = dim if dim_x is None else dim_x, dim if dim_y is None else dim_y
    check.choice(function, "form", form, FORMS)
    official = form == "official"
    norm = ("none" if official else "layer") if norm is None else norm
    check.choice(function, "norm", norm, NORMS)
    positive(function, dim=dim, dim_x=dim_x, dim_y=dim_y, **({} if hidden is None else {"hidden": hidden}))
    head_dim = divide_heads(function, dim, num_heads, None)
    project = uniform(rng, (dim_x,), (dim,), True) if official or dim_x != dim else ()
    attention = draw_attention(rng, dim, dim_y, num_heads, head_dim)
    before, after = ("none", norm) if form != "pre_norm" else (norm, "none")
    return MAB(
        attention=attention._replace(query=(), output=()) if official else attention,
        ff=draw_feed_forward(rng, dim, hidden),
        project=project,
        query_norm=draw_norm(dim, before),
        context_norm=draw_norm(dim_y, before),
        attention_norm=draw_norm(dim, after),
        ff_norm=draw_norm(dim, before),
        output_norm=draw_norm(dim, after),
    )


def _isab(
    function: str,
    rng: np.random.Generator,
    dim: int,
    num_inducing: int,
    num_heads: int,
    dim_x: int | None,
    hidden: int | None,
    form: str,
    norm: str | None,
) -> ISAB:
    inducing = _mab(function, rng, dim, num_heads, None, dim_x, hidden, form, norm)
    return ISAB(
        inducing_points=xavier_array(rng, (num_inducing, dim), num_inducing, dim),
        mab_inducing=inducing,
        mab_set=_mab(function, rng, dim, num_heads, dim_x, None, hidden, form, norm),
    )


def _pma(
    function: str,
    rng: np.random.Generator,
    dim: int,
    num_heads: int,
    num_seeds: int,
    hidden: int | None,
    form: str,
    norm: str | None,
) -> PMA:
    block = _mab(function, rng, dim, num_heads, None, None, hidden, form, norm)
    return PMA(
        seeds=xavier_array(rng, (num_seeds, dim), num_seeds, dim),
        mab=block,
        ff=() if form == "official" else draw_feed_forward(rng, dim, hidden),
    )
