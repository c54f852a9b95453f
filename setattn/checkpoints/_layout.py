"""What a layout of weights is: a name, how its tensors are called, and how they make a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from setattn.checkpoints._block import Block

REQUIRED: Any = object()


class Convention(NamedTuple):
    """How a framework names and orients the tensors of its layers."""

    separator: str
    weight: str
    bias: str
    scale: str  # of a norm
    shift: str
    outputs_first: bool  # whether a weight is (out, in)
    flat: bool  # whether heads are laid side by side


TORCH = Convention(".", "weight", "bias", "weight", "bias", outputs_first=True, flat=True)
HAIKU = Convention("/", "w", "b", "scale", "offset", outputs_first=False, flat=True)
FLAX = Convention("/", "kernel", "bias", "scale", "bias", outputs_first=False, flat=False)


class Option(NamedTuple):
    """Something that the shapes of a layout's tensors do not say."""

    name: str
    kind: type  # int, a count; float, a number of at least 0; str, an activation; bool
    default: Any = REQUIRED
    config: tuple[str, ...] = ()  # fields of a config.json, the first that is there counts; dots lead into parts
    about: str = ""


class Layout(NamedTuple):
    """A layout in which a known implementation keeps its weights.

    Attributes
    ----------
    name : str
        Its name, the value of ``layout=``.
    original : str
        The implementation that it is of.
    functions : tuple of str
        The functions that a block of it calls: one, or one for each kind of block.
    anchors : tuple of str
        Tensors of it, without a prefix; each kind of block has one of them.
    build : callable
        Makes a block from tensors and options.
    options : tuple of Option
        What its shapes do not say, with the defaults of the published weights.
    prefix : str
        Where published files have it.
    convention : Convention
        How its tensors are named and oriented.
    """

    name: str
    original: str
    functions: tuple[str, ...]
    anchors: tuple[str, ...]
    build: Callable[..., Block]
    options: tuple[Option, ...] = ()
    prefix: str = ""
    convention: Convention = TORCH
