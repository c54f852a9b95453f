"""The attention-pooling head of SigLIP, CoCa, MiniCPM-V and Qwen-VL."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend
from setattn._blocks import Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import over_chunks
from setattn._embedding import rows_for
from setattn._layers import AnyNorm, Options, linear, norm, options, residual_feed_forward
from setattn._params import AttentionPool, InputEmbedding, is_absent
from setattn._typing import Array


def attention_pool(
    x: Array,
    /,
    params: AttentionPool,
    *,
    mask: Array | None = None,
    key_positions: Array | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Pool a set with the attention of a learned probe, without a residual of the probe.

    .. math::

        Y &= \operatorname{norm}_c(\operatorname{linear}_i(X) + E) \\
        H &= \operatorname{attention}(\operatorname{norm}_q(P) + E_q, Y) \\
        \operatorname{attention\_pool}(X) &=
            \operatorname{linear}_o(\operatorname{norm}_o(H + \operatorname{ff}(\operatorname{norm}_f(H))))

    where every part but the attention may be absent, and keys come from :math:`Y + E_k` where there are key positions
    :math:`E_k`. This is the pooling head of SigLIP (norm f and ff), of timm (the same, and :math:`E`), of CoCa as
    OpenCLIP has it (norms q and c, no ff), of MiniCPM-V (linear i, norms q, c and o, :math:`E_k`, linear o) and of
    Qwen-VL (linear i, norms q and c, :math:`E_q`, :math:`E_k`).

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : AttentionPool
        The probe :math:`P`, of shape ``(k, dim)``, and the parts.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at.
    key_positions : array, shape (n, dim) or (..., n, dim), optional
        Added, after the norm, to what the keys come from and not to the values: those of :func:`sincos_features`, say.
        Those of elements that do not take part are never looked at.
    activation : {"gelu_tanh", "gelu", "relu", "squared_relu", "silu"}
        Activation of the feed-forward network; the default is SigLIP's.
    eps : float, default 1e-6
        Added to the variance in the norms; the default is SigLIP's.
    scale : float, optional
        Factor on the scores; ``1 / sqrt(head_dim)`` if not given.
    plan : Plan, optional
        How the result is computed: the order of products, the size of a block, threads.

    Returns
    -------
    array, shape (..., k, dim_out)
        Does not depend on the order of the elements, if each takes its positions along.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(n d^2 + n k d)` operations.

    X. Zhai et al., *Scaling Vision Transformers*, 2022, section 3.2 (the MAP head); X. Zhai et al., *Sigmoid Loss for
    Language Image Pre-Training*, 2023; J. Bai et al., *Qwen-VL: A Versatile Vision-Language Model*, 2023, section 2.1
    (positions).

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_attention_pool(8, num_heads=2, rng=0)
    >>> setattn.attention_pool(np.ones((4, 5, 8), np.float32), params).shape
    (4, 1, 8)
    """
    call = begin("attention_pool", "x", x, by_chunks=True)
    width = structure.attention_pool(call, "params", params, x)
    check.context_mask(call, mask, x, "x")
    check.key_positions(call, key_positions, x, width)
    o = options(call, x, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: AttentionPool) -> Array:
        y = pool_context(x, mask, p)._replace(norm=(), key_positions=key_positions)
        return _pool(Context(p.probe), y, p._replace(probe=(), input=(), position=()), o)

    return evaluate(call, body, params, o.plan.threads)


@over_chunks
def _pool(probe: Context, y: Context, p: AttentionPool, o: Options) -> Array:
    queries, query_norm = pool_queries(p._replace(probe=probe.elements), o)
    y = y._replace(norm=p.context_norm)
    return after_pool(attend(queries, [y], p.attention, o, query_norm), p, o)


def pool_context(x: Array, mask: Array | None, p: AttentionPool, first: int = 0) -> Context:
    """Make a context of elements; ``first`` is the place of the first of them."""
    y = Context(x, mask, norm=p.context_norm)
    if is_absent(p.input) and is_absent(p.position):
        return y
    embedding = InputEmbedding(project=p.input, position=p.position)
    return y._replace(embedding=rows_for(embedding, slice(first, first + x.shape[-2])))


def pool_queries(p: AttentionPool, o: Options) -> tuple[Array, AnyNorm]:
    """Return the probe, and the norm that is left to be applied to it."""
    if is_absent(p.probe_position):
        return p.probe, p.query_norm
    return norm(p.probe, p.query_norm, o) + p.probe_position, ()


def after_pool(h: Array, p: AttentionPool, o: Options) -> Array:
    """Compute what follows the attention ``h`` of the probe."""
    h = residual_feed_forward(h, p, o)
    return linear(norm(h, p.output_norm, o), p.output, o.xp)
