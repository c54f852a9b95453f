"""The Set Transformer and its blocks: the authors' code, PyTorch Geometric, DGL; the induced block of isab-pytorch."""

from __future__ import annotations

import math

from setattn._params import ISAB, MAB, PMA, Attention, FeedForward, LayerNorm, Linear, SetTransformer
from setattn._typing import Absent
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout, Option
from setattn.checkpoints._torch import torch_attention
from setattn.checkpoints._weights import Weights

_EPS = 1e-5  # of every norm here: PyTorch's own


def _optional_norm(w: Weights, key: str) -> LayerNorm | Absent:
    return w.layer_norm(key, "dim") if w.has(key) else ()


# --- juho-lee/set_transformer ---------------------------------------------------------------------------------------


def _official(w: Weights, *, num_heads: int) -> Block:
    function: str
    params: SetTransformer | ISAB | PMA | MAB
    if w.has("enc") or w.has("dec"):
        function, params = "set_transformer", _official_model(w, num_heads)
    elif w.has("I"):
        function, params = "isab", _official_isab(w, "dim_x", num_heads)
    elif w.has("S"):
        function, params = "pma", _official_pma(w, num_heads)
    elif w.has("mab"):
        function, params = "sab", _official_mab(w.at("mab"), "dim_x", "dim_x", num_heads)
    else:
        function, params = "mab", _official_mab(w, "dim_x", "dim_y", num_heads)
    width = w.size("dim")
    if width % num_heads:
        w.refuse(_silent_heads(width, num_heads))
    return Block(function, params, {"activation": "relu", "eps": _EPS, "scale": 1.0 / math.sqrt(max(width, 1))})


def _silent_heads(width: int, num_heads: int) -> str:
    """Say what the original, which cuts the width into pieces of ``width // num_heads``, makes of a remainder."""
    wanted = f"a num_heads that divides the width {width}, not {num_heads}"
    head_dim = width // num_heads
    if head_dim == 0 or width % head_dim:
        return f"{wanted}, with which the original fails"
    return f"{wanted}, of which the original silently makes {width // head_dim}: num_heads={width // head_dim}"


def _official_model(w: Weights, num_heads: int) -> SetTransformer:
    encoder: list[ISAB | MAB] = []
    for i in _numbers(w, "enc"):
        block, width = w.at(f"enc.{i}"), "dim" if encoder else "dim_x"
        if block.has("mab"):
            encoder.append(_official_mab(block.at("mab"), width, width, num_heads))
        else:
            encoder.append(_official_isab(block, width, num_heads))
    first, *rest = _numbers(w, "dec") or [0]
    pma = _official_pma(w.at(f"dec.{first}"), num_heads)
    decoder: list[MAB] = []
    output: Linear | Absent = ()
    for i in rest:
        if w.has(f"dec.{i}.mab"):
            decoder.append(_official_mab(w.at(f"dec.{i}").at("mab"), "dim", "dim", num_heads))
        elif i == rest[-1]:  # a linear layer anywhere else is left over
            output = w.linear(f"dec.{i}", ["dim"], ["dim_out"])
    return SetTransformer(tuple(encoder), pma, tuple(decoder), output)


def _numbers(w: Weights, key: str) -> list[int]:
    """Return the numbers of the groups ``key.0``, ``key.1``, ...; a dropout has a number and no tensors."""
    numbers, i = [], 0
    while w.has(f"{key}.{i}") or w.has(f"{key}.{i + 1}"):
        numbers += [i] if w.has(f"{key}.{i}") else []
        i += 1
    return numbers


def _official_isab(w: Weights, width: str, num_heads: int) -> ISAB:
    return ISAB(
        inducing_points=w.array("I", 1, w.local("inducing points"), "dim"),
        mab_inducing=_official_mab(w.at("mab0"), "dim", width, num_heads),
        mab_set=_official_mab(w.at("mab1"), width, "dim", num_heads),
    )


def _official_pma(w: Weights, num_heads: int) -> PMA:
    return PMA(w.array("S", 1, "seeds", "dim"), _official_mab(w.at("mab"), "dim", "dim", num_heads))


def _official_mab(w: Weights, dim_x: str, dim_y: str, num_heads: int) -> MAB:
    project = w.linear("fc_q", [dim_x], ["dim"])
    heads = 1 if w.size("dim") % num_heads else num_heads  # a remainder is told once, for the whole
    head: list[int | str] = [heads, w.local("head_dim")]
    return MAB(
        attention=Attention((), w.linear("fc_k", [dim_y], head), w.linear("fc_v", [dim_y], head)),
        ff=FeedForward(w.linear("fc_o", ["dim"], ["dim"])),
        project=project,
        attention_norm=_optional_norm(w, "ln0"),
        output_norm=_optional_norm(w, "ln1"),
    )


# --- PyTorch Geometric ----------------------------------------------------------------------------------------------


def _pyg(w: Weights, *, num_heads: int) -> Block:
    function: str
    params: SetTransformer | ISAB | PMA | MAB

    def sabs(key: str) -> tuple[MAB, ...]:
        return tuple(_pyg_mab(w.at(f"{key}.{i}.mab"), num_heads) for i in range(w.count(key)))

    if w.has("pma"):
        pma = _pyg_pma(w.at("pma"), num_heads)
        function, params = "set_transformer", SetTransformer(sabs("encoders"), pma, sabs("decoders"))
    elif w.has("ind"):
        inducing = w.array("ind", 1, "inducing points", "dim")
        function = "isab"
        params = ISAB(inducing, _pyg_mab(w.at("mab1"), num_heads), _pyg_mab(w.at("mab2"), num_heads))
    elif w.has("seed"):
        function, params = "pma", _pyg_pma(w, num_heads)
    elif w.has("mab"):
        function, params = "sab", _pyg_mab(w.at("mab"), num_heads)
    else:
        function, params = "mab", _pyg_mab(w, num_heads)
    return Block(function, params, {"activation": "relu", "eps": _EPS})


def _pyg_pma(w: Weights, num_heads: int) -> PMA:
    seeds, ff = w.array("seed", 1, "seeds", "dim"), FeedForward(w.linear("lin", ["dim"], ["dim"]))
    return PMA(seeds, _pyg_mab(w.at("mab"), num_heads), ff)


def _pyg_mab(w: Weights, num_heads: int) -> MAB:
    return MAB(
        attention=torch_attention(w, "attn", "dim", "dim", num_heads),
        ff=FeedForward(w.linear("lin", ["dim"], ["dim"])),
        attention_norm=_optional_norm(w, "layer_norm1"),
        output_norm=_optional_norm(w, "layer_norm2"),
    )


# --- DGL ------------------------------------------------------------------------------------------------------------


def _dgl(w: Weights, *, num_heads: int) -> Block:
    function: str
    params: SetTransformer | ISAB | PMA | MAB
    if w.has("encoder") or w.has("decoder"):
        encoder = _dgl_layers(w.at("encoder"), num_heads)
        function, params = "set_transformer", _dgl_decoder(w.at("decoder"), encoder, num_heads)
    elif w.has("pma"):
        function, params = "set_transformer", _dgl_decoder(w, (), num_heads)
    elif w.has("layers"):
        layers = _dgl_layers(w, num_heads) or (_dgl_layer(w.at("layers.0"), num_heads),)
        function, params = "isab" if isinstance(layers[0], ISAB) else "sab", layers[0]
        if len(layers) > 1:
            w.refuse(
                "one layer, as several without a decoder are no block: the encoder and the decoder "
                "under the prefixes 'encoder.' and 'decoder.', or each layer by itself"
            )
    elif w.has("seed_vectors"):
        function, params = "pma", _dgl_pma(w, num_heads)
    elif w.has("inducing_points") or w.has("mha"):
        params = _dgl_layer(w, num_heads)
        function = "isab" if isinstance(params, ISAB) else "sab"
    else:
        function, params = "mab", _dgl_mab(w, num_heads)
    return Block(function, params, {"activation": "relu", "eps": _EPS})


def _dgl_decoder(w: Weights, encoder: tuple[ISAB | MAB, ...], num_heads: int) -> SetTransformer:
    decoder = tuple(_dgl_mab(w.at(f"layers.{i}.mha"), num_heads) for i in range(w.count("layers")))
    return SetTransformer(encoder, _dgl_pma(w.at("pma"), num_heads), decoder)


def _dgl_layers(w: Weights, num_heads: int) -> tuple[ISAB | MAB, ...]:
    return tuple(_dgl_layer(w.at(f"layers.{i}"), num_heads) for i in range(w.count("layers")))


def _dgl_layer(w: Weights, num_heads: int) -> ISAB | MAB:
    if not w.has("inducing_points"):
        return _dgl_mab(w.at("mha"), num_heads)
    inducing = w.array("inducing_points", w.local("inducing points"), "dim")
    return ISAB(inducing, _dgl_mab(w.at("mha.0"), num_heads), _dgl_mab(w.at("mha.1"), num_heads))


def _dgl_pma(w: Weights, num_heads: int) -> PMA:
    return PMA(w.array("seed_vectors", "seeds", "dim"), _dgl_mab(w.at("mha"), num_heads), _dgl_ff(w))


def _dgl_mab(w: Weights, num_heads: int) -> MAB:
    head: list[int | str] = [num_heads, w.local("head_dim")]
    query, key, value = (w.linear(f"proj_{name}", ["dim"], head, bias=False) for name in "qkv")
    return MAB(
        attention=Attention(query, key, value, w.linear("proj_o", head, ["dim"], bias=False)),
        ff=_dgl_ff(w),
        attention_norm=w.layer_norm("norm_in", "dim"),
        output_norm=w.layer_norm("norm_inter", "dim"),
    )


def _dgl_ff(w: Weights) -> FeedForward:
    hidden = w.local("hidden")
    return FeedForward(w.linear("ffn.0", ["dim"], [hidden]), w.linear("ffn.3", [hidden], ["dim"]))


# --- isab-pytorch ---------------------------------------------------------------------------------------------------


def _lucidrains(w: Weights, *, latent_self_attend: bool, inverted_attention: bool) -> Block:
    for name, given in (("latent_self_attend", latent_self_attend), ("inverted_attention", inverted_attention)):
        if given:
            w.refuse(f"{name}=False, the one form of the block that setattn.isab computes")
    params = ISAB(w.array("latents", "inducing points", "dim"), _lucidrains_mab(w, 1), _lucidrains_mab(w, 2))
    return Block("isab", params, {"query_residual": False})


def _lucidrains_mab(w: Weights, number: int) -> MAB:
    w = w.at(f"attn{number}")
    head: list[int | str] = ["heads", 64]
    query = w.linear("to_q", ["dim"], head, bias=False)
    key, value = w.fused("to_kv", 2, ["dim"], head, bias=False)
    return MAB(Attention(query, key, value, w.linear("to_out", head, ["dim"], bias=False)))


def _heads(arguments: str) -> Option:
    return Option("num_heads", int, about=f"number of heads of every attention, the {arguments} of the original")


LAYOUTS = (
    Layout(
        name="set-transformer",
        original="juho-lee/set_transformer: SetTransformer, ISAB, SAB, PMA, MAB",
        functions=("set_transformer", "isab", "sab", "pma", "mab"),
        anchors=("enc.0.I", "enc.0.mab.fc_q.weight", "I", "mab.fc_q.weight", "S", "fc_q.weight"),
        build=_official,
        options=(_heads("argument num_heads"),),
    ),
    Layout(
        name="set-transformer-pyg",
        original="torch_geometric SetTransformerAggregation and the blocks of torch_geometric.nn.aggr.utils",
        functions=("set_transformer", "isab", "sab", "pma", "mab"),
        anchors=("pma.seed", "ind", "mab.attn.in_proj_weight", "seed", "attn.in_proj_weight"),
        build=_pyg,
        options=(_heads("argument heads"),),
    ),
    Layout(
        name="set-transformer-dgl",
        original="dgl SetTransformerEncoder, SetTransformerDecoder and their layers",
        functions=("set_transformer", "isab", "sab", "pma", "mab"),
        anchors=(
            "decoder.pma.seed_vectors",
            "pma.seed_vectors",
            "layers.0.mha.proj_q.weight",
            "layers.0.inducing_points",
            "inducing_points",
            "mha.proj_q.weight",
            "seed_vectors",
            "proj_q.weight",
        ),
        build=_dgl,
        options=(_heads("arguments n_heads and num_heads"),),
    ),
    Layout(
        name="isab-lucidrains",
        original="isab_pytorch.ISAB, whose first result it is",
        functions=("isab",),
        anchors=("latents",),
        build=_lucidrains,
        options=(
            Option("latent_self_attend", bool, False, about="whether the latents attend to themselves, too; refused"),
            Option("inverted_attention", bool, False, about="whether the queries share each element; refused"),
        ),
    ),
)
