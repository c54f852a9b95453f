"""The original implementations, each by a function that returns its class.

Several packages import, on the way to the one class that is wanted, things that are not installed and that the class
does not use. `found` goes round them: packages whose own ``__init__`` is not run, and empty stand-ins for modules that
are not there. The stand-ins are gone when it returns, for other packages look for what they stand for.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def _stand_ins(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Put modules of the given names and contents where imports find them, as long as the block lasts."""
    added = []
    for name, content in contents.items():
        if name not in sys.modules:
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            vars(module).update(content)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def found(
    module: str, name: str, bare: Sequence[str] = (), stand_ins: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """Import a name from a module; of the packages `bare`, only where their files are is taken."""
    for package in bare:
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"{package} is not installed; see CONTRIBUTING.md")
            empty = types.ModuleType(package)
            empty.__path__, empty.__spec__ = list(spec.submodule_search_locations), spec
            sys.modules[package] = empty
            outer, _, inner = package.rpartition(".")
            if outer:
                setattr(sys.modules[outer], inner, empty)
    with warnings.catch_warnings(), _stand_ins(stand_ins or {}):
        warnings.simplefilter("ignore")  # what they say while they are imported is their affair
        return getattr(importlib.import_module(module), name)


def _torchvision() -> dict[str, dict[str, Any]]:
    """The one class of torchvision that image libraries want when they are imported."""
    import torch

    frozen = type("FrozenBatchNorm2d", (torch.nn.Module,), {})
    return {"torchvision": {}, "torchvision.ops": {}, "torchvision.ops.misc": {"FrozenBatchNorm2d": frozen}}


# Set Transformer and relatives.


def pyg(name: str) -> Any:
    """A class of ``torch_geometric.nn.aggr``, or ``MultiheadAttentionBlock`` and its like of ``.utils``."""
    where = "torch_geometric.nn.aggr" if name.endswith("Aggregation") else "torch_geometric.nn.aggr.utils"
    return found(where, name)


def dgl(name: str) -> Any:
    """A class of ``dgl.nn.pytorch.glob``; the rest, built for older versions of PyTorch, is left out."""
    import torch

    class DGLError(Exception):
        pass

    def pad_packed_tensor(x: Any, lengths: Any, value: float, l_min: int | None = None) -> Any:
        sets = torch.split(x, [int(n) for n in lengths])
        width = max([*map(len, sets), l_min or 0])
        padded = torch.full((len(sets), width, *x.shape[1:]), float(value), dtype=x.dtype)
        for i, rows in enumerate(sets):
            padded[i, : len(rows)] = rows
        return padded

    def pack_padded_tensor(x: Any, lengths: Any) -> Any:
        return torch.cat([rows[: int(n)] for rows, n in zip(x, lengths, strict=True)])

    readouts = ("broadcast_nodes", "max_nodes", "mean_nodes", "softmax_nodes", "sum_nodes", "topk_nodes")
    return found(
        "dgl.nn.pytorch.glob",
        name,
        ("dgl", "dgl.nn", "dgl.nn.pytorch"),
        {
            "dgl.backend": {
                "pytorch": types.SimpleNamespace(
                    pad_packed_tensor=pad_packed_tensor, pack_padded_tensor=pack_padded_tensor
                )
            },
            "dgl.base": {"dgl_warning": lambda *_, **__: None, "DGLError": DGLError},
            "dgl.readout": dict.fromkeys(readouts),
        },
    )


def isab_pytorch() -> Any:
    """``isab_pytorch.ISAB``."""
    return found("isab_pytorch", "ISAB")


def tabicl(name: str) -> Any:
    """A class of ``tabicl._model.layers``, without the estimators and their scikit-learn."""
    return found(
        f"tabicl._model.{'encoders' if name == 'SetTransformer' else 'layers'}", name, ("tabicl", "tabicl._model")
    )


def tabpfn(name: str, version: str = "v3") -> Any:
    """A class of TabPFN's architecture, without the estimators."""
    bare = ("tabpfn", "tabpfn.architectures", "tabpfn.preprocessing", "tabpfn.preprocessing.torch")
    return found(f"tabpfn.architectures.tabpfn_{version}", name, bare)


# Perceiver.


def perceiver_lucidrains(name: str) -> Any:
    """``Perceiver`` or ``PerceiverIO`` of perceiver-pytorch."""
    return found("perceiver_pytorch", name)


def perceiver_krasserm(name: str) -> Any:
    """A class of perceiver-io, without its training framework and the activation checkpoints."""
    core, texts, images = "perceiver.model.core", "perceiver.model.text", "perceiver.model.image"
    bare = ("perceiver", "perceiver.model", core, texts, images)
    nothing = type("Nothing", (), {})
    loops = {"LitModel": nothing, "LitClassifier": nothing}
    stand_ins = {
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": lambda module, **_: module},
        "pytorch_lightning": {"LightningModule": nothing},
        "pytorch_lightning.loggers": {"TensorBoardLogger": nothing},
    }
    found(f"{core}.modules", "PerceiverIO", bare, stand_ins)
    for part in "modules", "config":
        module = importlib.import_module(f"{core}.{part}")
        vars(sys.modules[core]).update({key: value for key, value in vars(module).items() if key[0] != "_"} | loops)
    if name in vars(sys.modules[core]):
        return getattr(sys.modules[core], name)
    if name.startswith("Causal"):
        return found(f"{texts}.clm", name, bare, stand_ins)
    texts_own = name.startswith(("Text", "Masked"))
    return found(f"{texts}.mlm" if texts_own else f"{images}.classifier", name, bare, stand_ins)


def transformers(module: str, name: str) -> Any:
    """A class of a module of ``transformers.models``, such as ``perceiver.modeling_perceiver``."""
    return found(f"transformers.models.{module}", name)


# Flamingo.


def flamingo_lucidrains(name: str) -> Any:
    """``PerceiverResampler`` or ``GatedCrossAttentionBlock`` of flamingo-pytorch."""
    return found("flamingo_pytorch", name)


def open_flamingo(name: str) -> Any:
    """A class of ``open_flamingo.src.helpers``, without the language and vision models beside it."""
    return found("open_flamingo.src.helpers", name, ("open_flamingo", "open_flamingo.src"))


def ip_adapter(name: str = "Resampler") -> Any:
    """``Resampler`` of ip_adapter, without its pipelines, which want an older diffusers."""
    return found("ip_adapter.resampler", name, ("ip_adapter",))


def diffusers(name: str = "IPAdapterPlusImageProjection") -> Any:
    """A class of ``diffusers.models.embeddings``."""
    return found("diffusers.models.embeddings", name)


# Pooling heads.


def timm(name: str = "AttentionPoolLatent") -> Any:
    """A class of ``timm.layers``, without the models and torchvision."""
    return found("timm.layers", name, ("timm",), _torchvision())


def open_clip(name: str = "AttentionalPooler") -> Any:
    """A class of ``open_clip.transformer``, without the models and torchvision."""
    return found("open_clip.transformer", name, ("open_clip",), _torchvision())


def x_transformers(name: str) -> Any:
    """A class of ``x_transformers.x_transformers``."""
    return found("x_transformers.x_transformers", name)
