"""The demo's Set Transformer: what it is made of, how it is called, and its bundled weights."""

from __future__ import annotations

from importlib import resources
from typing import Any

import setattn
from setattn._typing import Array

WEIGHTS = "data/digits.safetensors"
DIGITS = 10


def init_model(seed: int) -> setattn.SetTransformer:
    """Draw the model: two induced set attention blocks, pooling with one seed, an output layer."""
    params = setattn.init_set_transformer(
        3, 64, DIGITS, num_heads=4, num_inducing=16, num_encoders=2, num_seeds=1, num_decoders=0, rng=seed
    )
    # As the authors' code pools, without a row-wise network: the seed then attends to the encoded elements themselves.
    return params._replace(pma=params.pma._replace(ff=()))


def logits(x: Array, mask: Array, params: setattn.SetTransformer) -> Array:
    """Map sets ``(..., n, 3)`` to logits ``(..., 10)``."""
    return setattn.set_transformer(x, params, mask=mask)[..., 0, :]


def seed_attention(x: Array, mask: Array, params: setattn.SetTransformer) -> Array:
    """Return how strongly each head of the pooling's seed attends to each element, ``(..., heads, n)``."""
    for block in params.encoder:
        x = setattn.isab(x, block, mask=mask) if isinstance(block, setattn.ISAB) else setattn.sab(x, block, mask=mask)
    return setattn.attention_weights(params.pma.seeds, x, params.pma.mab.attention, mask=mask)[..., 0, :]


def flatten(params: Any, path: str = "") -> dict[str, Any]:
    """Return the arrays of a parameter tree by their paths, such as ``encoder.0.mab_set.attention.query.weight``."""
    if not isinstance(params, tuple):
        return {path: params}
    names = getattr(params, "_fields", range(len(params)))
    parts = [flatten(part, f"{path}.{name}" if path else str(name)) for name, part in zip(names, params, strict=True)]
    return {name: array for part in parts for name, array in part.items()}


def unflatten(arrays: dict[str, Any], like: setattn.SetTransformer) -> setattn.SetTransformer:
    """Return a tree of the structure of another, with the arrays of these paths in it."""
    leaves = iter([arrays[path] for path in flatten(like)])
    return setattn.map_params(lambda _: next(leaves), like)


def load_model() -> setattn.SetTransformer:
    """Load the bundled weights, as NumPy arrays of float32."""
    from safetensors.numpy import load

    return unflatten(load(resources.files(__package__).joinpath(WEIGHTS).read_bytes()), init_model(0))
