"""Files as the originals' own packages write them, configuration included, and the commands on them."""

from __future__ import annotations

import numpy as np
import originals
import pytest
import tolerances
import torch
import transformers
from safetensors.torch import save_file

import setattn
from setattn.__main__ import main


def assert_close(got, module, x, block):
    """Compare a result in float32 with the original in float64."""
    with torch.no_grad():
        wanted = module.double()(torch.from_numpy(x.astype(np.float64))).numpy()
    _, bound, _ = tolerances.bounds(
        block.function, x.astype(np.float64), params=block.params, dtype="float32", mask=None, **block.options
    )
    tolerances.assert_close(got, wanted, np.reshape(bound, wanted.shape), block.layout)


@pytest.fixture
def siglip(tmp_path):
    """A whole SigLIP model, small, as ``save_pretrained`` writes it."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 4}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(text_config=text | {"vocab_size": 20}, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path / "model.safetensors"


def test_a_model_of_transformers_with_its_configuration(siglip):
    model, path = siglip
    head = setattn.load(path, "siglip", prefix="vision_model.head.")
    assert head.params.attention.key.weight.shape == (32, 4, 8)
    assert head.options == {"activation": "gelu_tanh", "eps": 1e-6}
    x = np.random.default_rng(0).normal(size=(3, 16, 32)).astype(np.float32)
    assert_close(head(x)[:, 0], model.vision_model.head, x, head)


def test_the_commands_on_it(siglip, tmp_path, capsys):
    model, path = siglip
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "siglip" in shown
    assert "vision_model.head." in shown
    x = np.random.default_rng(0).normal(size=(5, 16, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = ["--layout", "siglip", "--prefix", "vision_model.head.", "--batch", "2"]
    assert main(["run", str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), *words]) == 0
    got = np.load(tmp_path / "y.npy")
    assert main(["convert", str(path), str(tmp_path / "head.safetensors"), *words[:4]]) == 0
    head = setattn.load(tmp_path / "head.safetensors")
    assert head(x).tobytes() == got.tobytes()
    assert_close(got[:, 0], model.vision_model.head, x, head)


def test_an_ip_adapter_of_half_precision(tmp_path):
    """The published file holds the resampler beside the layers of the diffusion model, in float16."""
    torch.manual_seed(0)
    module = originals.ip_adapter("Resampler")(
        dim=128, depth=2, dim_head=64, heads=2, num_queries=3, embedding_dim=20, output_dim=24
    ).eval()
    module = module.half()
    tensors = {f"image_proj.{name}": a.contiguous() for name, a in module.state_dict().items()}
    tensors["ip_adapter.1.to_k_ip.weight"] = torch.zeros(4, 4, dtype=torch.float16)
    save_file(tensors, tmp_path / "ip-adapter-plus.safetensors")
    block = setattn.load(tmp_path / "ip-adapter-plus.safetensors", prefix="image_proj.", dtype=np.float32)
    assert block.layout == "ip-adapter"
    x = np.random.default_rng(0).normal(size=(2, 9, 20)).astype(np.float32)
    assert_close(block(x), module, x, block)
