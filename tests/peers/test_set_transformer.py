"""The Set Transformer's implementations: PyTorch Geometric, DGL, isab-pytorch, the equations of the authors' code."""

from __future__ import annotations

import numpy as np
import originals
import pytest
import test_checkpoints_set_transformer as formulas
import torch
from harness import draw, redraw, some

import setattn

MASKED_ROWS = "rows of elements that take no part are finite; here they are 0"
EMPTY = "its value of an empty set is PyTorch's affair: of the version compared with the one here, of older ones 0"
FLAT = "its result is one row for each set, the seeds side by side or their mean"


def shown(out: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Put zeros in the rows that take no part, as here."""
    return out if mask is None else torch.where(mask[..., None], out, 0.0)


# --- PyTorch Geometric ----------------------------------------------------------------------------------------------

PYG = {"num_heads": 4}


def flat(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay sets end to end, with the number of the set of each element."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    return x[mask], torch.nonzero(mask)[:, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_pyg_aggregation(peer, rng, layer_norm, masked):
    module = originals.pyg("SetTransformerAggregation")(
        16, num_seed_points=3, num_encoder_blocks=2, num_decoder_blocks=1, heads=4, layer_norm=layer_norm
    )

    def call(m, x, mask=None):
        return m(*flat(x, mask)).unflatten(-1, (3, 16))

    masks = {"mask": some(rng, 5, 9)} if masked else {}
    for x in draw(rng, 5, 9, 16), 3 * draw(rng, 5, 9, 16):
        peer("set-transformer-pyg", module, call, x, masks=masks, options=PYG, differences=[FLAT, EMPTY])


def test_pyg_aggregation_without_coders(peer, rng):
    module = originals.pyg("SetTransformerAggregation")(8, num_encoder_blocks=0, num_decoder_blocks=0, heads=2)

    def call(m, x):
        return m(*flat(x, None)).unflatten(-1, (1, 8))

    peer("set-transformer-pyg", module, call, draw(rng, 2, 3, 8), options={"num_heads": 2}, prefix="aggr.")


@pytest.mark.parametrize("layer_norm", [False, True])
def test_pyg_blocks(peer, rng, layer_norm):
    x, y, mask = draw(rng, 2, 5, 16), draw(rng, 2, 7, 16), some(rng, 2, 7)

    def of_two(m, x, y, query_mask=None, mask=None):
        return shown(m(x, y, query_mask, mask), query_mask)

    def of_one(m, x, mask=None):
        return shown(m(x, mask), mask)

    def build(name, *arguments):
        return originals.pyg(name)(*arguments, heads=4, layer_norm=layer_norm)

    told = {"options": PYG, "differences": [MASKED_ROWS]}
    for masks in {}, {"mask": mask}, {"mask": mask, "query_mask": some(rng, 2, 5)}:
        peer("set-transformer-pyg", build("MultiheadAttentionBlock", 16), of_two, x, y, masks=masks, **told)
    for masks in {}, {"mask": mask}:
        peer("set-transformer-pyg", build("SetAttentionBlock", 16), of_one, y, masks=masks, **told)
        peer("set-transformer-pyg", build("InducedSetAttentionBlock", 16, 4), of_one, y, masks=masks, **told)
        pooling = build("PoolingByMultiheadAttention", 16, 3)
        peer("set-transformer-pyg", pooling, lambda m, x, mask=None: m(x, mask), y, masks=masks, **told)


def test_pyg_rows_that_take_no_part(rng):
    """Where an element takes no part, PyTorch Geometric's row is that of an attention of 0, and here it is 0."""
    module = originals.pyg("SetAttentionBlock")(16, heads=4)
    redraw(module)
    block = setattn.load(module.state_dict(), **PYG)
    x, mask = torch.from_numpy(draw(rng, 2, 7, 16)), torch.from_numpy(some(rng, 2, 7))
    with torch.no_grad():
        theirs, ours = module(x, mask), block(x, mask=mask)
    assert (ours[~mask] == 0).all()
    rest = module.mab.layer_norm1(x)
    rest = module.mab.layer_norm2(rest + module.mab.lin(rest).relu())
    np.testing.assert_allclose(theirs[~mask].detach(), rest[~mask].detach(), atol=1e-12)
    assert (theirs[~mask].abs() > 1e-3).any()


def test_pyg_empty_sets(rng):
    """Of a set without elements, PyTorch Geometric's value is what PyTorch makes of it.

    The attention of the version of PyTorch that is compared with gives 0 there, before the output projection, as this
    library does; that of older ones is not a number, which PyTorch Geometric turns to zeros at the end.
    """
    module = originals.pyg("SetTransformerAggregation")(16, num_seed_points=3, heads=4)
    redraw(module)
    block = setattn.load(module.state_dict(), **PYG)
    x, mask = torch.from_numpy(draw(rng, 3, 7, 16)), torch.tensor([[True] * 7, [False] * 7, [True] * 3 + [False] * 4])
    with torch.no_grad():
        theirs, ours = module(*flat(x, mask), dim_size=3).unflatten(-1, (3, 16)), block(x, mask=mask)
    assert torch.isfinite(theirs).all()
    np.testing.assert_allclose(theirs, ours, atol=1e-12)
    state = module.state_dict()
    seeds = setattn.load(state, prefix="pma.", **PYG)(x[:1, :0, :])
    decoded = setattn.load(state, prefix="decoders.0.", **PYG)(seeds)
    np.testing.assert_allclose(ours[1:2], decoded, atol=1e-12)


# --- DGL ------------------------------------------------------------------------------------------------------------


class Graphs:
    """What DGL's modules ask of a batch of graphs: how many there are, and how many nodes each of them has."""

    def __init__(self, lengths: list[int]) -> None:
        self.batch_size, self._lengths = len(lengths), torch.tensor(lengths)

    def batch_num_nodes(self) -> torch.Tensor:
        return self._lengths


class Model(torch.nn.Module):
    """An encoder and a decoder, under the names that they usually have."""

    def __init__(self, encoder: torch.nn.Module, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, graphs: Graphs, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(graphs, self.encoder(graphs, x))


def lengths_of(x: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    return [x.shape[-2]] * len(x) if mask is None else mask.sum(dim=-1).tolist()


def first(rng: np.random.Generator, batch: int, n: int) -> np.ndarray:
    """Draw a mask of sets of different sizes, which DGL's have, padded at the end."""
    return np.arange(n) < rng.integers(1, n, size=(batch, 1))


def packed(mask: torch.Tensor | None, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Lay rows that came end to end back into sets."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    return torch.zeros((*mask.shape, out.shape[-1]), dtype=out.dtype).masked_scatter(mask[..., None], out)


DGL = {"num_heads": 4}


@pytest.mark.parametrize("block_type", ["sab", "isab"])
def test_dgl_model(peer, rng, block_type):
    encoder = originals.dgl("SetTransformerEncoder")(12, 4, 5, 9, n_layers=2, block_type=block_type, m=3)
    decoder = originals.dgl("SetTransformerDecoder")(12, 4, 2, 8, 2, k=3)

    def call(m, x, mask=None):
        graphs = Graphs(lengths_of(x, mask))
        return m(graphs, flat(x, mask)[0]).unflatten(-1, (3, 12))

    told = {"options": DGL, "differences": [FLAT], "package": "dgl"}
    both = {"title": "SetTransformerEncoder and SetTransformerDecoder"} | told
    for masks in {}, {"mask": first(rng, 4, 7)}:
        peer("set-transformer-dgl", Model(encoder, decoder), call, draw(rng, 4, 7, 12), masks=masks, **both)
        peer("set-transformer-dgl", decoder, call, draw(rng, 4, 7, 12), masks=masks, **told)
    peer("set-transformer-dgl", Model(encoder, decoder), call, draw(rng, 1, 2, 12), **both)


@pytest.mark.parametrize("block_type", ["sab", "isab"])
def test_dgl_encoder_of_one_layer(peer, rng, block_type):
    module = originals.dgl("SetTransformerEncoder")(12, 4, 3, 9, block_type=block_type, m=3)

    def call(m, x, mask=None):
        return packed(mask, m(Graphs(lengths_of(x, mask)), flat(x, mask)[0]), x)

    for masks in {}, {"mask": first(rng, 4, 7)}:
        peer("set-transformer-dgl", module, call, draw(rng, 4, 7, 12), masks=masks, options=DGL, prefix="encoder.")


def test_dgl_blocks(peer, rng):
    x, y, mask = draw(rng, 4, 5, 12), draw(rng, 4, 7, 12), first(rng, 4, 7)

    def of_two(m, x, y, mask=None):
        own = lengths_of(x, None)
        return packed(None, m(flat(x, None)[0], flat(y, mask)[0], own, lengths_of(y, mask)), x)

    def of_one(m, x, mask=None):
        return packed(mask, m(flat(x, mask)[0], lengths_of(x, mask)), x)

    def pooled(m, x, mask=None):
        return m(flat(x, mask)[0], lengths_of(x, mask)).reshape(len(x), -1, 12)

    for masks in {}, {"mask": mask}:
        told = {"masks": masks, "options": DGL}
        peer("set-transformer-dgl", originals.dgl("MultiHeadAttention")(12, 4, 5, 9), of_two, x, y, **told)
        peer("set-transformer-dgl", originals.dgl("SetAttentionBlock")(12, 4, 3, 9), of_one, y, **told)
        peer("set-transformer-dgl", originals.dgl("InducedSetAttentionBlock")(3, 12, 4, 3, 9), of_one, y, **told)
        peer("set-transformer-dgl", originals.dgl("PMALayer")(3, 12, 4, 3, 9), pooled, y, **told)


def test_dgl_empty_sets(peer, rng):
    """Over nothing DGL's attention is 0, as here, once its padding is right."""
    mask = np.array([[True] * 7, [False] * 7, [True] * 3 + [False] * 4])

    def call(m, x, mask):
        return m(flat(x, mask)[0], lengths_of(x, mask)).reshape(len(x), -1, 12)

    module = originals.dgl("PMALayer")(3, 12, 4, 3, 9)
    difference = "its padding puts elements of the next set into an empty one, for which this comparison has its own"
    peer(
        "set-transformer-dgl",
        module,
        call,
        draw(rng, 3, 7, 12),
        masks={"mask": mask},
        options=DGL,
        differences=[difference],
    )


# --- isab-pytorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_lucidrains(peer, rng, heads):
    module = originals.isab_pytorch()(dim=12, heads=heads, num_latents=3)

    def call(m, x, mask=None):
        return shown(m(x, mask=mask)[0], mask)

    differences = [
        MASKED_ROWS,
        "of a set that is all masked it gives the mean of the masked elements; here the attention is 0",
        "its second result, the latents, is the one of the block mab_inducing",
    ]
    for masks in {}, {"mask": some(rng, 2, 7)}:
        peer("isab-lucidrains", module, call, draw(rng, 2, 7, 12), masks=masks, differences=differences)
    peer("isab-lucidrains", module, call, draw(rng, 3, 1, 12), prefix="isab.")


def test_lucidrains_differences(rng):
    """What the differences that are named come to."""
    module = originals.isab_pytorch()(dim=12, heads=2, num_latents=3)
    redraw(module)
    block = setattn.load(module.state_dict())
    x, mask = torch.from_numpy(draw(rng, 2, 7, 12)), torch.from_numpy(some(rng, 2, 7))
    mask[1] = False
    with torch.no_grad():
        theirs, latents = module(x, mask=mask)
        unmasked, ours = module(x[1:], mask=None), block(x, mask=mask)
        p = block.params
        h = setattn.mab(p.inducing_points, x, p.mab_inducing, mask=mask, query_residual=False)
    assert (ours[~mask] == 0).all()
    assert (theirs[~mask].abs() > 1e-3).any()
    np.testing.assert_allclose(h[0], latents[0], atol=1e-12)
    assert (h[1] == 0).all()
    attention = module.attn1
    value = attention.to_kv(x[1]).chunk(2, dim=-1)[1].mean(dim=0)
    np.testing.assert_allclose(latents[1].detach(), attention.to_out(value).expand(3, 12).detach(), atol=1e-12)
    assert not torch.allclose(unmasked[1], latents[1:])


@pytest.mark.parametrize("form", ["latent_self_attend", "inverted_attention"])
def test_lucidrains_other_forms(rng, form):
    """The other forms have the same weights and other values, which is why they have to be told, and are refused."""
    module = originals.isab_pytorch()(dim=12, heads=2, num_latents=3, **{form: True})
    redraw(module)
    x = torch.from_numpy(draw(rng, 2, 7, 12))
    with torch.no_grad():
        assert not torch.allclose(module(x)[0], setattn.load(module.state_dict())(x))
    with pytest.raises(setattn.CheckpointError, match=f"{form}=False"):
        setattn.load(module.state_dict(), **{form: True})


# --- the authors' code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name, kind in formulas.KINDS.items() if kind.layout == "set-transformer"])
def test_official(peer, rng, name, masked):
    """There is no package of the authors' code: its equations are written anew in the tests."""
    kind = formulas.KINDS[name]
    state = {key: a.astype(np.float32).astype(np.float64) for key, a in formulas.drawn(kind.shapes).items()}

    def call(original, x, mask=None):
        out = original(state, x, mask)
        return np.where(mask[..., None], out, 0.0) if kind.function in ("sab", "isab") and mask is not None else out

    peer(
        "set-transformer",
        kind.formula,
        call,
        draw(rng, 2, 7, kind.dim_x),
        state=state,
        masks={"mask": some(rng, 2, 7)} if masked else {},
        options={"num_heads": formulas.HEADS},
        prefix="module.",
        differences=[
            "it knows no masks",
            "a number of heads that does not divide the width is silently replaced; here it is refused",
        ],
        package="numpy",
        title="juho-lee/set_transformer, its equations written anew in terms",
    )
