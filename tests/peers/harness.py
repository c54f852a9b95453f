"""The comparison with an original: its weights through a file, its outputs beside those of the block that is loaded.

    def test_siglip(peer):
        module = originals.transformers("siglip.modeling_siglip", "SiglipMultiheadAttentionPoolingHead")(config)
        peer("siglip", module, lambda m, x: m(x)[:, None], x, options={"num_heads": 4}, prefix="vision_model.head.")

The original gets random weights, none of them trivial, that are float32 numbers, and calculates in float64. With the
same weights in float64 the block must give the same to `FLOAT64` times the largest number of the original's output; in
float32 it must stay within the bound of ``tests/tolerances.py``, element by element.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tolerances
import torch

import setattn

FLOAT64 = 1e-12
RECORDS: dict[str, dict[str, Any]] = {}


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw normal numbers that float32 holds exactly, in float64."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def some(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw a mask that shows every set at least one element and hides at least one of it."""
    mask = rng.random(shape) < 0.6
    mask[..., 0], mask[..., -1] = True, False
    return mask


def check(
    layout: str,
    original: Any,
    call: Callable[..., Any],
    *arrays: np.ndarray,
    masks: Mapping[str, np.ndarray] | None = None,
    state: Mapping[str, np.ndarray] | None = None,
    keys: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
    prefix: str = "",
    options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    recognised: bool = True,
    differences: Iterable[str] = (),
    package: str = "",
    title: str = "",
    seed: int = 0,
) -> Any:
    """Compare a layout with its original, note the result, and return the block, in float64.

    Parameters
    ----------
    layout : str
        Name of the layout.
    original : torch.nn.Module or object
        The original. A module gets new weights, in place, and becomes one of float64 that is not in training.
    call : callable
        ``call(original, *arrays, **masks)`` gives the output of the original in the form in which the block gives it.
        A module is given tensors, anything else arrays of NumPy.
    *arrays : numpy.ndarray
        The arrays that the block takes; of floating ones, what float32 holds of them.
    masks : dict, optional
        The keyword arguments that are arrays, such as ``mask``, of both.
    state : dict, optional
        The weights of an original that is no module: float64 arrays whose numbers float32 holds.
    keys : callable, optional
        Makes the content of the file from the weights, as where the file names them otherwise.
    prefix : str
        Put before every name in the file, beside which there is then a tensor of something else.
    options, config : dict, optional
        As `setattn.load` takes them.
    recognised : bool
        Whether the layout is the only one that the file fits.
    differences : iterable of str
        What the original does otherwise, for the table.
    package, title : str
        The distribution and the name of the original, where its class does not tell.
    seed : int
        Of the weights.
    """
    masks, options = dict(masks or {}), dict(options or {})
    arrays = tuple(np.asarray(a, np.float32).astype(np.float64) if a.dtype.kind == "f" else a for a in arrays)
    if isinstance(original, torch.nn.Module):
        redraw(original, seed)
        state = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
        wanted = _run(call, original, [torch.from_numpy(a) for a in arrays], masks)
    else:
        wanted = _run(call, original, arrays, masks)
    assert np.isfinite(wanted).all(), f"{layout}: the original gives what is not finite"
    content = dict(keys(dict(state)) if keys else state)
    content = {prefix + name: a for name, a in content.items()}
    assert content, f"{layout}: no weights"

    blocks = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("float64", "float32"):
            path = Path(folder, f"{dtype}.safetensors")
            _write(path, content, dtype, prefix)
            block = blocks[dtype] = setattn.load(path, layout, prefix=prefix, config=config, **options)
            assert block.layout == layout
            if recognised:
                _same(setattn.load(path, prefix=prefix, config=config, **options), block)
            again = Path(folder, f"again-{dtype}.safetensors")
            setattn.save(again, block)
            _same(setattn.load(again), block)
        tensors = {name: torch.from_numpy(np.array(a)) for name, a in content.items()}
        _same(setattn.load(tensors, layout, prefix=prefix, config=config, **options), blocks["float64"])
        exact, half = _ours(blocks["float64"], arrays, masks, "float64"), blocks["float32"]
        rounded = _ours(half, arrays, masks, "float32")

    assert exact.shape == wanted.shape, f"{layout}: shape {exact.shape}, the original has {wanted.shape}"
    largest = np.abs(wanted).max()
    error = float(np.abs(exact - wanted).max() / largest)
    assert error <= FLOAT64, f"{layout}: float64 is off by {error:.3g} of the largest number, {FLOAT64:g} is allowed"

    given = {**_defaults(half), **masks}
    params = setattn.map_params(np.asarray, half.params)
    _, bound, _ = tolerances.bounds(half.function, *arrays, params=params, dtype="float32", **given)
    # The original's own rounding in float64 comes to the bound of ours in float32.
    tolerances.assert_close(rounded, wanted, bound + FLOAT64 * largest, f"{layout} against the original")
    units = float(np.abs(rounded - wanted).max() / largest / tolerances.unit_roundoff("float32"))
    _note(layout, original, package, title, arrays, error, units, differences)
    return blocks["float64"]


def redraw(module: torch.nn.Module, seed: int = 0) -> None:
    """Give a module weights of float64 that float32 holds: no scale of a norm is 1, no bias and no gate is 0."""
    rng = np.random.default_rng(seed)
    module.double().eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            sign = rng.choice((-1.0, 1.0), p.shape)
            if p.ndim <= 1:
                low, high = (0.5, 1.5) if name.endswith(("weight", "scale", "gamma")) else (0.1, 0.6)
                values = sign * rng.uniform(low, high, p.shape)
            elif name.endswith("weight"):
                values = rng.standard_normal(p.shape) / np.sqrt(np.prod(p.shape[1:]))
            else:
                values = rng.standard_normal(p.shape)
            p.copy_(torch.from_numpy(np.asarray(values)))
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.float().double())


def _run(call: Callable[..., Any], original: Any, arrays: Iterable[Any], masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Call the original, whose warnings are its own affair."""
    if isinstance(original, torch.nn.Module):
        masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = call(original, *arrays, **masks)
    out = np.asarray(out.numpy() if isinstance(out, torch.Tensor) else out)
    assert out.dtype == np.float64, f"the original calculates in {out.dtype}"
    return out


def _write(path: Path, content: Mapping[str, np.ndarray], dtype: str, prefix: str) -> None:
    cast = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in content.items()}
    if prefix:
        cast["something.else.weight"] = np.zeros((2, 3), dtype)
    safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in cast.items()}, path)


def _leaves(tree: Any) -> list[np.ndarray]:
    leaves: list[np.ndarray] = []
    setattn.map_params(lambda a: leaves.append(np.asarray(a)), tree)
    return leaves


def _same(actual: Any, wanted: Any) -> None:
    """Fail unless two blocks are the same in function, options, form of the tree and every bit."""
    assert (actual.function, actual.options) == (wanted.function, wanted.options)
    assert setattn.map_params(np.shape, actual.params) == setattn.map_params(np.shape, wanted.params)
    for a, b in zip(_leaves(actual.params), _leaves(wanted.params), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def _ours(block: Any, arrays: Iterable[np.ndarray], masks: Mapping[str, np.ndarray], dtype: str) -> np.ndarray:
    cast = [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]
    out = block(*cast, **{name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in masks.items()})
    assert out.dtype == dtype
    return np.asarray(out, dtype=np.float64)


def _defaults(block: Any) -> dict[str, Any]:
    """Return the options of a call, those included that the function has by itself."""
    parameters = inspect.signature(getattr(setattn, block.function)).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not None}
    return own | block.options


def _note(
    layout: str,
    original: Any,
    package: str,
    title: str,
    arrays: Iterable[np.ndarray],
    error: float,
    units: float,
    differences: Iterable[str],
) -> None:
    distribution = package or _distribution(type(original).__module__.partition(".")[0])
    version = f"{distribution} {importlib.metadata.version(distribution)}"
    shapes = " and ".join("x".join(map(str, a.shape)) for a in arrays)
    record = RECORDS.setdefault(
        layout, {"originals": [], "shapes": [], "float64": 0.0, "float32": 0.0, "differences": []}
    )
    for name, found in (
        ("originals", [f"{title or type(original).__name__} of {version}"]),
        ("shapes", [shapes]),
        ("differences", differences),
    ):
        record[name] += [new for new in found if new not in record[name]]
    record["float64"] = max(record["float64"], error)
    record["float32"] = max(record["float32"], units)


def _distribution(module: str) -> str:
    """Name the distribution that a module comes from."""
    known = {"perceiver": "perceiver-io", "open_flamingo": "open-flamingo", "open_clip": "open_clip_torch"}
    return known.get(module, module.replace("_", "-"))


def write(path: Path) -> None:
    """Put what was noted in this session in place of what a file has about the same layouts."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for layout, record in RECORDS.items():
        records[layout] = record | {name: float(f"{record[name]:.2g}") for name in ("float64", "float32")}
    path.write_text(json.dumps(dict(sorted(records.items())), indent=2) + "\n", encoding="utf-8")
