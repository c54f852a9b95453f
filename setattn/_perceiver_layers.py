"""The layers of Perceiver: cross-attention and latent transformer."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend, by_queries
from setattn._blocks import Block, Plan
from setattn._call import begin, evaluate
from setattn._context import Context, ready
from setattn._dask import of_sets, over_chunks
from setattn._kernels import into
from setattn._layers import Options, enter, linear, options, residual_feed_forward, select
from setattn._params import CrossAttention, Linear, SelfAttention
from setattn._parts import once
from setattn._typing import Absent, Array


def cross_attention(
    latents: Array,
    inputs: Array,
    /,
    params: CrossAttention,
    *,
    mask: Array | None = None,
    query_residual: bool = True,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply Perceiver's pre-norm cross-attention: latents attend to inputs.

    .. math::

        H &= Z + \operatorname{attention}(\operatorname{norm}_q(Z), \operatorname{norm}_c(Y)) \\
        \operatorname{cross\_attention}(Z, Y) &= H + \operatorname{ff}(\operatorname{norm}_f(H))

    Parameters
    ----------
    latents : array, shape (..., m, dim)
        The queries :math:`Z`. Latents of shape ``(m, dim)`` are put to every set of the batch.
    inputs : array, shape (..., n, dim_inputs)
        The set :math:`Y` to attend to.
    params : CrossAttention
        The attention, the feed-forward network and the norms.
    mask : array of bool, shape (..., n), optional
        True where an input takes part. The values of the others are never looked at.
    query_residual : bool, default True
        Whether :math:`Z` is added to the attention; decoders often leave it out.
    activation : {"gelu", "gelu_tanh", "relu", "squared_relu", "silu"}
        Activation of the feed-forward network. The paper says GELU; the authors' code computes its tanh form,
        ``"gelu_tanh"``.
    eps : float, default 1e-5
        Added to the variance in the norms.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., m, dim)
        Does not depend on the order of the inputs. Namespace, device and dtype of the input.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O((m + n)\, d^2 + m n d)` operations.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.1 and appendix C.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_cross_attention(8, 6, num_heads=2, rng=0)
    >>> setattn.cross_attention(np.ones((3, 8), np.float32), np.ones((4, 5, 6), np.float32), params).shape
    (4, 3, 8)
    """
    call = begin("cross_attention", "latents", latents, by_chunks=True)
    check.switch(call.function, "query_residual", query_residual)
    of_z, of_y = check.data(call, "latents", latents, "m, dim"), check.data(call, "inputs", inputs)
    once(structure.cross_attention, call, params, of_z, of_y, query_residual=query_residual)
    check.same_batch(call, "latents", latents, inputs)
    check.context_mask(call, mask, inputs, "inputs")
    o = options(call, latents, inputs, activation=activation, eps=eps, scale=scale, plan=plan)

    z, y = Context(latents), Context(inputs, mask)
    return evaluate(call, lambda p: cross_attend(z, y, (p, ()), o, query_residual), params, o.plan.threads)


def latent_transformer(
    latents: Array,
    /,
    params: tuple[SelfAttention, ...],
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Apply pre-norm self-attention layers to latents.

    Each layer is

    .. math::

        H &= Z + \operatorname{attention}(\operatorname{norm}(Z), \operatorname{norm}(Z)) \\
        Z &\leftarrow H + \operatorname{ff}(\operatorname{norm}_f(H))

    Parameters
    ----------
    latents : array, shape (..., m, dim)
        The latents :math:`Z`.
    params : tuple of SelfAttention
        The layers, in order.
    activation, eps, scale, plan
        As for :func:`cross_attention`.

    Returns
    -------
    array, shape (..., m, dim)
        Permuting the latents permutes the result in the same way.

    Raises
    ------
    ShapeError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(m d^2 + m^2 d)` operations a layer.

    A. Jaegle et al., *Perceiver: General Perception with Iterative Attention*, 2021, section 3.1.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_latent_transformer(8, num_layers=2, num_heads=2, rng=0)
    >>> setattn.latent_transformer(np.ones((4, 3, 8), np.float32), params).shape
    (4, 3, 8)
    """
    call = begin("latent_transformer", "latents", latents, by_chunks=True)
    once(structure.latent_transformer, call, params, check.data(call, "latents", latents, "m, dim"))
    o = options(call, latents, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(params: tuple[SelfAttention, ...]) -> Array:
        # A result never shares memory with an argument, even where there is nothing to do.
        return of_sets(transform, latents, params, o) if params else call.xp.astype(latents, latents.dtype, copy=True)

    return evaluate(call, body, params, o.plan.threads)


# --- the mathematics ------------------------------------------------------------------------------------------------


@over_chunks
def cross_attend(
    q: Context, y: Context, parts: tuple[CrossAttention, Linear | Absent], o: Options, query_residual: bool
) -> Array:
    """Let the elements of one context attend to those of another, and map the result; masked rows of it are 0."""
    p, output = parts

    def rows(_: Array, y: Context, block: Block | None) -> Array:
        own = q.block(block)
        z = ready(own, o).elements
        h = after_cross_attention(attend(z, [y], p.attention, o, p.query_norm), z, p, o, query_residual)
        return select(linear(h, output, o.xp), own.mask, o.xp)

    return by_queries(rows, q.elements, y._replace(norm=p.context_norm), p.attention, o)


def after_cross_attention(h: Array, z: Array, p: CrossAttention, o: Options, query_residual: bool) -> Array:
    """Compute what follows the attention ``h`` of queries ``z``."""
    return residual_feed_forward(into("add", h, z, o.xp) if query_residual else h, p, o)


def transform(z: Array, layers: tuple[SelfAttention, ...], o: Options) -> Array:
    """Apply the layers of a latent transformer."""
    for layer in layers:
        z = _self_attention(z, layer, o)
    return z


def _self_attention(z: Array, p: SelfAttention, o: Options) -> Array:
    def rows(x: Array, y: Context, _: Block | None) -> Array:
        x = enter(x, None, o)
        h = into("add", attend(x, [y], p.attention, o, p.norm), x, o.xp)
        return residual_feed_forward(h, p, o)

    return by_queries(rows, z, Context(z, norm=p.norm), p.attention, o)
