"""The comparison itself: it passes what is right, refuses what is slightly wrong, and notes what it saw."""

from __future__ import annotations

import json

import harness
import numpy as np
import originals
import pytest
import torch
from harness import draw


@pytest.fixture
def head():
    """A small pooling head of SigLIP."""
    from transformers import SiglipVisionConfig

    config = SiglipVisionConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    return originals.transformers("siglip.modeling_siglip", "SiglipMultiheadAttentionPoolingHead")(config)


@pytest.fixture
def records(monkeypatch):
    """What is noted in one test alone."""
    monkeypatch.setattr(harness, "RECORDS", {})
    return harness.RECORDS


def test_right(peer, rng, head, records, tmp_path):
    """What is right is noted, in place of what was noted before."""
    file = tmp_path / "layouts.json"
    file.write_text('{"siglip": {}, "another": {}}')
    for shape in (2, 5, 8), (1, 3, 8):
        peer("siglip", head, lambda m, x: m(x)[:, None], draw(rng, *shape), options={"num_heads": 2})
    harness.write(file)
    record = json.loads(file.read_text())["siglip"]
    assert record["shapes"] == ["2x5x8", "1x3x8"]
    assert record["originals"][0].startswith("SiglipMultiheadAttentionPoolingHead of transformers ")
    assert 0 < record["float64"] <= harness.FLOAT64
    assert 0 < record["float32"] < 100
    assert list(json.loads(file.read_text())) == ["another", "siglip"]


@pytest.mark.parametrize("off", [1e-11, 1e-6])
def test_slightly_wrong(peer, rng, head, records, off):
    with pytest.raises(AssertionError, match="float64 is off by"):
        peer("siglip", head, lambda m, x: m(x)[:, None] * (1 + off), draw(rng, 2, 5, 8), options={"num_heads": 2})
    assert not records


def test_another_activation(peer, rng, head, records):
    """The two GELUs are told apart."""
    options = {"num_heads": 2, "activation": "gelu"}
    with pytest.raises(AssertionError, match="float64 is off by"):
        peer("siglip", head, lambda m, x: m(x)[:, None], draw(rng, 2, 5, 8), options=options)
    assert not records


def test_weights_are_not_trivial():
    """After a redraw no number of a norm, a bias or a gate is where it makes no difference."""
    module = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))
    module.gate = torch.nn.Parameter(torch.zeros(1))
    harness.redraw(module)
    for name, p in module.state_dict().items():
        values = p.numpy()
        assert values.dtype == np.float64
        assert (values == values.astype(np.float32)).all()
        assert (np.abs(values) > 1e-3).all(), name
        assert (np.abs(values - 1) > 1e-4).all(), name
