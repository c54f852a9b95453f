"""A block with its parameters and options, ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from setattn._params import PerceiverIO, count_params
from setattn._typing import Array


class Block:
    """A function of the library with the parameters and options that it is called with.

    ``block(x, mask=mask)`` is ``getattr(setattn, block.function)(x, block.params, **block.options, mask=mask)``.
    Options given in a call come before the block's own. A ``perceiver_io`` may be called with its inputs alone, where
    its queries are the learned ones, or the inputs.

    Attributes
    ----------
    function : str
        Name of the function.
    params : tree
        The parameters.
    options : dict
        What the shapes of the parameters cannot say, such as ``eps``.
    layout : str
        The layout that the parameters came from; nothing where they came from none.
    """

    __slots__ = ("function", "layout", "options", "params")

    def __init__(self, function: str, params: Any, options: Mapping[str, Any] | None = None, layout: str = "") -> None:
        self.function = function
        self.params = params
        self.options = dict(options or {})
        self.layout = layout

    def __call__(self, *arrays: Array | None, **options: Any) -> Array:
        """Call the function."""
        function, arguments, named = self.written_out(arrays, options)
        return function(*arguments, **named)

    def written_out(
        self, arrays: tuple[Array | None, ...], options: Mapping[str, Any]
    ) -> tuple[Callable[..., Array], tuple[Any, ...], dict[str, Any]]:
        """Return the function and all that it is called with."""
        import setattn

        if isinstance(self.params, PerceiverIO) and len(arrays) == 1:
            arrays = (*arrays, None)
        return getattr(setattn, self.function), (*arrays, self.params), {**self.options, **options}

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        layout = f", layout {self.layout}" if self.layout else ""
        return f"<setattn.Block {self.function}{options}: {count_params(self.params)} parameters{layout}>"
