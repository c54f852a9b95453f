"""The attention-pooling head of SigLIP, CoCa and MiniCPM-V."""

from __future__ import annotations

from setattn import _check as check
from setattn import _structure as structure
from setattn._attend import attend
from setattn._blocks import Plan
from setattn._call import begin, evaluate
from setattn._context import Context
from setattn._dask import over_chunks
from setattn._layers import Options, linear, norm, options, residual_feed_forward
from setattn._params import AttentionPool
from setattn._typing import Array


def attention_pool(
    x: Array,
    /,
    params: AttentionPool,
    *,
    mask: Array | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    scale: float | None = None,
    plan: Plan | None = None,
) -> Array:
    r"""Pool a set with the attention of a learned probe, without a residual of the probe.

    .. math::

        H &= \operatorname{attention}(\operatorname{norm}_q(P), \operatorname{norm}_c(X)) \\
        \operatorname{attention\_pool}(X) &=
            \operatorname{linear}(\operatorname{norm}_o(H + \operatorname{ff}(\operatorname{norm}_f(H))))

    where every part but the attention may be absent. This is the pooling head of SigLIP (norm f and ff), of CoCa as
    OpenCLIP has it (norms q and c, no ff) and, without its positions on the keys, of MiniCPM-V (norms q, c and o, no
    ff, an output layer).

    Parameters
    ----------
    x : array, shape (..., n, dim_x)
        The set.
    params : AttentionPool
        The probe :math:`P`, of shape ``(k, dim)``, and the parts.
    mask : array of bool, shape (..., n), optional
        True where an element takes part. The values of the others are never looked at.
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
        Does not depend on the order of the elements.

    Raises
    ------
    ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError
        Before any arithmetic, if the arguments do not fit together.

    Notes
    -----
    Cost: :math:`O(n d^2 + n k d)` operations.

    X. Zhai et al., *Scaling Vision Transformers*, 2022, section 3.2 (the MAP head); X. Zhai et al., *Sigmoid Loss for
    Language Image Pre-Training*, 2023.

    Examples
    --------
    >>> import numpy as np, setattn
    >>> params = setattn.init_attention_pool(8, num_heads=2, rng=0)
    >>> setattn.attention_pool(np.ones((4, 5, 8), np.float32), params).shape
    (4, 1, 8)
    """
    call = begin("attention_pool", "x", x, by_chunks=True)
    structure.attention_pool(call, "params", params, check.data(call, "x", x))
    check.context_mask(call, mask, x, "x")
    o = options(call, activation=activation, eps=eps, scale=scale, plan=plan)

    def body(p: AttentionPool) -> Array:
        return _pool(Context(p.probe), Context(x, mask), p._replace(probe=()), o)

    return evaluate(call, body, params)


@over_chunks
def _pool(probe: Context, y: Context, p: AttentionPool, o: Options) -> Array:
    h = attend(probe.elements, [y._replace(norm=p.context_norm)], p.attention, o, p.query_norm)
    h = residual_feed_forward(h, p, o)
    return linear(norm(h, p.output_norm, o), p.output, o.xp)
