"""Induced set attention blocks of models of tables."""

from __future__ import annotations

from setattn._params import ISAB, MAB, Attention, FeedForward, LengthScale, Linear, RMSNorm
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._weights import Weights


def _network(w: Weights, key: str, inputs: int | str, outputs: str) -> FeedForward:
    """Return a network of two layers, of numbers 0 and 2."""
    w, hidden = w.at(key), w.local(f"{key}.hidden")
    return FeedForward(w.linear("0", [inputs], [hidden]), w.linear("2", [hidden], [outputs]))


def _length_scale(w: Weights, heads: int, head_dim: str) -> LengthScale | Absent:
    """Return a scaling of the queries by the logarithm of the number of elements, of any of the published forms."""
    if not (w.has("scales") or w.has("mlp") or w.has("base_mlp") or w.has("query_mlp")):
        return ()
    base, query = w.local("factors"), w.local("factors of a query")
    if w.has("scales"):
        last, scale = "scales", LengthScale(Linear(w.row("scales", base)))
    elif w.has("mlp"):
        last, scale = "mlp.2", LengthScale(_network(w, "mlp", 1, base))
    else:
        last = "base_mlp.2"
        scale = LengthScale(_network(w, "base_mlp", 1, base), _network(w, "query_mlp", head_dim, query))
    width = w.size(head_dim)
    for key, size, fitting in (
        (last, w.size(base), (heads, heads * width)),
        ("query_mlp.2", w.size(query), (1, width)),
    ):
        if size not in (0, *fitting):
            one, each = fitting
            w.refuse(f"{w.local(key)} with {one} or {each} factors for {heads} heads of width {width}, not {size}")
    return scale


def _tabicl(w: Weights, *, num_heads: int, eps: float, activation: str, norm_first: bool) -> Block:
    params = ISAB(
        inducing_points=w.array("ind_vectors", "inducing", "dim"),
        mab_inducing=_tabicl_block(w.at("multihead_attn1"), num_heads, norm_first),
        mab_set=_tabicl_block(w.at("multihead_attn2"), num_heads, norm_first),
    )
    return Block("isab", params, {"activation": activation, "eps": eps})


def _tabicl_block(w: Weights, heads: int, norm_first: bool) -> MAB:
    attn, hidden = w.at("attn"), w.local("hidden")
    head: list[int | str] = [heads, attn.local("head_dim")]
    query, key, value = attn.fused("in_proj", 3, ["dim"], head, join="_")
    first, second = w.layer_norm("norm1", "dim", bias=None), w.layer_norm("norm2", "dim", bias=None)
    return MAB(
        attention=Attention(
            query=query,
            key=key,
            value=value,
            output=attn.linear("out_proj", head, ["dim"]),
            length_scale=_length_scale(attn.at("ssmax_layer"), heads, attn.local("head_dim")),
        ),
        ff=FeedForward(w.linear("linear1", ["dim"], [hidden]), w.linear("linear2", [hidden], ["dim"])),
        query_norm=first if norm_first else (),
        context_norm=first if norm_first else (),
        attention_norm=() if norm_first else first,
        ff_norm=second if norm_first else (),
        output_norm=() if norm_first else second,
    )


def _tabpfn(w: Weights, *, num_heads: int, eps: float, activation: str) -> Block:
    params = ISAB(
        inducing_points=w.array("inducing_vectors", "inducing", "dim"),
        mab_inducing=_tabpfn_block(w.at("cross_attn_block1"), num_heads),
        mab_set=_tabpfn_block(w.at("cross_attn_block2"), num_heads),
    )
    return Block("isab", params, {"activation": activation, "eps": eps})


def _tabpfn_block(w: Weights, heads: int) -> MAB:
    attn, hidden = w.at("attn"), w.local("hidden")
    head: list[int | str] = [heads, attn.local("head_dim")]
    query, key, value = (attn.linear(f"{name}_projection", ["dim"], head, bias=False) for name in "qkv")

    def norm(key: str) -> RMSNorm:
        return w.rms_norm(key, "dim") if w.has(key) else RMSNorm()

    def head_norm(key: str) -> RMSNorm | Absent:  # v3.5 has them, with scales always
        return attn.rms_norm(key, attn.local("head_dim")) if attn.has("q_norm") or attn.has("k_norm") else ()

    return MAB(
        attention=Attention(
            query=query,
            key=key,
            value=value,
            output=attn.linear("out_projection", head, ["dim"], bias=False),
            query_norm=head_norm("q_norm"),
            key_norm=head_norm("k_norm"),
            length_scale=_length_scale(attn.at("softmax_scaling_layer"), heads, attn.local("head_dim")),
        ),
        ff=FeedForward(
            w.linear("mlp.0", ["dim"], [hidden], bias=False), w.linear("mlp.2", [hidden], ["dim"], bias=False)
        ),
        query_norm=norm("layernorm_q"),
        context_norm=norm("layernorm_kv"),
        ff_norm=norm("layernorm2"),
    )


_EPS = "added to the variance in the norms"
_ACTIVATION = "activation of the networks"

LAYOUTS = (
    Layout(
        name="tabicl-isab",
        original="tabicl InducedSelfAttentionBlock",
        functions=("isab",),
        anchors=("ind_vectors",),
        build=_tabicl,
        options=(
            Option("num_heads", int, config=("col_nhead",), about="number of heads of the attentions"),
            Option("eps", float, 1e-5, about=_EPS),
            Option("activation", str, "gelu", config=("activation",), about=_ACTIVATION),
            Option("norm_first", bool, True, config=("norm_first",), about="whether the norms are before the branches"),
        ),
        prefix="col_embedder.tf_col.blocks.0.",
    ),
    Layout(
        name="tabpfn-isab",
        original="tabpfn InducedSelfAttentionBlock (v3, v3.5)",
        functions=("isab",),
        anchors=("inducing_vectors",),
        build=_tabpfn,
        options=(
            Option("num_heads", int, config=("dist_embed_num_heads",), about="number of heads of the attentions"),
            Option("eps", float, 2.0**-23, about=f"{_EPS}; the original takes the smallest step of the dtype at 1"),
            Option("activation", str, "gelu", about=_ACTIVATION),
        ),
        prefix="feature_distribution_embedder.layers.0.",
    ),
)
