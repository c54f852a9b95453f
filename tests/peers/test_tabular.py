"""Induced set attention blocks of models of tables: TabICL, TabPFN v3 and v3.5."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import originals
import pytest
import torch
from harness import draw, redraw, some

import setattn

SKIPPED = "a set of nothing but -100 is left out"
NO_MASKS = "takes no mask: compared with each set cut to its elements"
MACHINE_EPS = "eps is the smallest step at 1 of the dtype of a call; here that of float32, unless given"
LOG_FLOAT32 = "the logarithm of the number of elements in float32 whatever the dtype: compared in float64"


def set_by_set(call, m, x, mask=None):
    """Call the original for each set of a batch, without the elements that take no part; their rows are 0."""
    if mask is None:
        return call(m, x)
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        out[i, mask[i]] = call(m, x[i : i + 1, mask[i]])[0]
    return out


# --- TabICL ---------------------------------------------------------------------------------------------------------

SSMAX = ("none", "ssmax", "ssmax-mlp", "ssmax-mlp-elementwise", "qassmax-mlp", "qassmax-mlp-elementwise")


def tabicl(ssmax: str = "qassmax-mlp-elementwise", **options) -> torch.nn.Module:
    block = originals.tabicl("InducedSelfAttentionBlock")
    return block(d_model=16, nhead=4, dim_feedforward=20, num_inds=5, ssmax=ssmax, **options)


of_tabicl = partial(set_by_set, lambda m, x: m(x))
TABICL = {"options": {"num_heads": 4}, "differences": [NO_MASKS, SKIPPED]}


@pytest.mark.parametrize("bias_free_ln", [False, True])
@pytest.mark.parametrize("ssmax", SSMAX)
def test_tabicl(peer, rng, ssmax, bias_free_ln):
    """Every scaling by the number of elements, with sets of several sizes, of one element among them."""
    module = tabicl(ssmax, bias_free_ln=bias_free_ln)
    for shape in (2, 7, 16), (3, 1, 16):
        peer("tabicl-isab", module, of_tabicl, draw(rng, *shape), **TABICL)
    peer("tabicl-isab", module, of_tabicl, draw(rng, 4, 9, 16), masks={"mask": some(rng, 4, 9)}, **TABICL)


def test_tabicl_batch_axes_and_prefix(peer, rng):
    """A table's columns are sets: any batch axes; options from a configuration; where published files have it."""
    prefix = setattn.layouts()["tabicl-isab"].prefix
    config = {"col_nhead": 4, "activation": "gelu", "norm_first": True}
    peer("tabicl-isab", tabicl(), of_tabicl, draw(rng, 2, 3, 7, 16), config=config, prefix=prefix)


@pytest.mark.parametrize("ssmax", ["none", "ssmax"])
def test_tabicl_norms_after_the_branches(peer, rng, ssmax):
    """The form with norms after the branches; its activation may be another where no network scales the queries."""
    module = tabicl(ssmax, norm_first=False, activation="relu")
    options = {"num_heads": 4, "norm_first": False, "activation": "relu"}
    peer("tabicl-isab", module, of_tabicl, draw(rng, 2, 7, 16), options=options)


@pytest.mark.parametrize("ssmax", SSMAX)
def test_tabicl_training_rows(rng, ssmax):
    """With a ``train_size``, the inducing points see the first rows alone: the two blocks of an ISAB, one masked."""
    module = tabicl(ssmax)
    redraw(module)
    block = setattn.load(module.state_dict(), "tabicl-isab", num_heads=4)
    x, mask = torch.from_numpy(draw(rng, 2, 7, 16)), (torch.arange(7) < 4).expand(2, 7)
    with torch.no_grad():
        original, p = module(x, train_size=4), block.params
        h = setattn.mab(p.inducing_points, x, p.mab_inducing, mask=mask, **block.options)
        torch.testing.assert_close(setattn.mab(x, h, p.mab_set, **block.options), original, rtol=0, atol=1e-12)
        assert (block(x) - original).abs().amax() > 0.01


def test_tabicl_leaves_sets_of_its_skip_value_out(rng):
    """The original gives -100 back for a set of nothing but -100; to the block it is a set like any other."""
    module = tabicl()
    redraw(module)
    block = setattn.load(module.state_dict(), "tabicl-isab", num_heads=4)
    x = torch.from_numpy(draw(rng, 2, 7, 16))
    x[1] = -100.0
    with torch.no_grad():
        original, ours = module(x), block(x)
    torch.testing.assert_close(ours[0], original[0], rtol=0, atol=1e-12)
    assert (original[1] == -100).all()
    assert (ours[1] - original[1]).abs().amax() > 0.01


# --- TabPFN ---------------------------------------------------------------------------------------------------------


def tabpfn(version: str, scaling: bool = True, affine: bool = True) -> torch.nn.Module:
    norm = originals.tabpfn("_DtypeMatchingRMSNorm", version)
    scale = originals.tabpfn("SoftmaxScalingMLP", version)(num_heads=4, head_dim=4, n_hidden=6)
    return originals.tabpfn("InducedSelfAttentionBlock", version)(
        emsize=16,
        nhead=4,
        num_inducing_points=5,
        dim_feedforward=20,
        norm_factory=partial(norm, elementwise_affine=affine),
        softmax_scaling_layer=scale if scaling else None,
    )


# The original has the rows of a table before its columns, which are sets.
of_tabpfn = partial(set_by_set, lambda m, x: m(x.unsqueeze(-2))[0].squeeze(-2))
EPS = float(np.finfo(np.float64).eps)
TABPFN = {"options": {"num_heads": 4, "eps": EPS}, "differences": [NO_MASKS, MACHINE_EPS, LOG_FLOAT32]}


@pytest.fixture
def exact_logarithm(monkeypatch):
    """Let the original take the logarithm of the number of elements in the dtype of its queries."""

    def log(n, device, dtype):
        return torch.tensor(max(int(n), 1), device=device, dtype=dtype).log()

    for version in "v3", "v3_5":
        module = sys.modules[originals.tabpfn("SoftmaxScalingMLP", version).__module__]
        monkeypatch.setattr(module, "_safe_log_seqlen", log)


@pytest.mark.usefixtures("exact_logarithm")
@pytest.mark.parametrize("scaling", [True, False])
# The norms of v3.5 fail without scales.
@pytest.mark.parametrize(("version", "affine"), [("v3", True), ("v3", False), ("v3_5", True)])
def test_tabpfn(peer, rng, version, scaling, affine):
    """With and without scaling, and scales of the norms; sets of several sizes, of one element among them."""
    module = tabpfn(version, scaling, affine)
    for shape in (2, 7, 16), (3, 1, 16):
        peer("tabpfn-isab", module, of_tabpfn, draw(rng, *shape), **TABPFN)
    peer("tabpfn-isab", module, of_tabpfn, draw(rng, 4, 9, 16), masks={"mask": some(rng, 4, 9)}, **TABPFN)


@pytest.mark.usefixtures("exact_logarithm")
def test_tabpfn_columns_and_prefix(peer, rng):
    """The columns of a table are a batch axis after its rows there, before them here."""

    def call(m, x):
        return m(x.transpose(1, 2))[0].transpose(1, 2)

    prefix = setattn.layouts()["tabpfn-isab"].prefix
    options, config = {"eps": EPS}, {"dist_embed_num_heads": 4}
    module = tabpfn("v3")
    peer("tabpfn-isab", module, call, draw(rng, 2, 3, 7, 16), options=options, config=config, prefix=prefix)


def test_tabpfn_as_it_is(rng):
    """In float32, with the default eps, the original and the block agree as far as float32 goes."""
    module = tabpfn("v3")
    redraw(module)
    module.float()
    block = setattn.load(module.state_dict(), "tabpfn-isab", num_heads=4)
    x = torch.from_numpy(draw(rng, 2, 7, 16)).float()
    with torch.no_grad():
        original = of_tabpfn(module, x)
        torch.testing.assert_close(block(x), original, rtol=0, atol=1e-5)
        module.double()
        original, ours = (
            of_tabpfn(module, x.double()),
            setattn.isab(
                x.double(), setattn.map_params(lambda a: a.double(), block.params), **(block.options | {"eps": EPS})
            ),
        )
    off = float((original - ours).abs().amax())
    assert 1e-12 < off < 1e-5  # what the logarithm in float32 costs


@pytest.mark.usefixtures("exact_logarithm")
def test_tabpfn_training_rows(rng):
    """With a ``single_eval_pos``, the inducing points see the first rows alone."""
    module = tabpfn("v3")
    redraw(module)
    block = setattn.load(module.state_dict(), "tabpfn-isab", num_heads=4, eps=EPS)
    x, mask = torch.from_numpy(draw(rng, 2, 7, 16)), (torch.arange(7) < 4).expand(2, 7)
    with torch.no_grad():
        original, p = module(x.unsqueeze(-2), single_eval_pos=4)[0].squeeze(-2), block.params
        h = setattn.mab(p.inducing_points, x, p.mab_inducing, mask=mask, **block.options)
        torch.testing.assert_close(setattn.mab(x, h, p.mab_set, **block.options), original, rtol=0, atol=1e-12)
