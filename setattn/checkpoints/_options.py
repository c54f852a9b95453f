"""What the shapes of a layout's tensors do not say: arguments, a configuration file, the published defaults."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setattn._check import is_integer
from setattn._errors import OptionError
from setattn._layers import ACTIVATIONS
from setattn.checkpoints._layout import REQUIRED, Layout, Option

# How configurations call an activation.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}


def read_config(config: Any, folder: Path | None) -> Mapping[str, Any]:
    """Return a configuration: a mapping, the content of a file, or of the ``config.json`` beside the weights."""
    if isinstance(config, Mapping):
        return config
    if config is None:
        if folder is None or not (folder / "config.json").is_file():
            return {}
        path = folder / "config.json"
    elif isinstance(config, str | os.PathLike):
        path = Path(config)
    else:
        raise OptionError("load", "config", f"a {type(config).__qualname__}", "a mapping, or the path of a config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise OptionError("load", "config", repr(str(path)), f"a file of JSON: {reason}") from error
    if not isinstance(content, dict):
        raise OptionError("load", "config", repr(str(path)), "a file with an object of JSON")
    return content


def choose_options(layout: Layout, given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the value of every option of a layout."""
    known = [option.name for option in layout.options]
    for name in given:
        if name not in known:
            wanted = f"one of layout {layout.name!r}: {', '.join(known) or 'it has none'}"
            raise OptionError("load", name, "an unknown option", wanted)
    return {option.name: _value(layout, option, given, config) for option in layout.options}


def for_matching(
    layout: Layout, given: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Choose values that tensors can be matched with, and name those that are a guess of 1: required and not known."""
    values, guesses = {}, []
    for option in layout.options:
        try:
            values[option.name] = _value(layout, option, given, config)
        except OptionError:
            values[option.name] = 1 if option.default is REQUIRED else option.default
            guesses += [option.name] if option.default is REQUIRED else []
    return values, tuple(guesses)


def configured(option: Option, config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the field of a configuration that holds an option, and what stands there; no name if there is none."""
    for field in option.config:
        value: Any = config
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return field, value
    return "", None


def _value(layout: Layout, option: Option, given: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    if option.name in given:
        return _checked(option, given[option.name], option.name)
    field, value = configured(option, config)
    if field:
        if option.kind is str and isinstance(value, str):
            value = _ACTIVATIONS.get(value, value)
        return _checked(option, value, f"config: {field}")
    if option.default is REQUIRED:
        where = f" (in a config.json: {' or '.join(option.config)})" if option.config else ""
        kind = "an integer" if option.kind is int else "a value"
        raise OptionError("load", option.name, "not given", f"{kind} for layout {layout.name!r}: {option.about}{where}")
    return option.default


def _checked(option: Option, value: Any, argument: str) -> Any:
    if option.default is None and value is None:
        return None
    if option.kind is bool:
        fits, wanted = isinstance(value, bool), "True or False"
    elif option.kind is int:
        fits, wanted = is_integer(value) and value >= 1, "an integer of at least 1"
    elif option.kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, wanted = number and 0 <= value < float("inf"), "a finite number of at least 0"
    else:
        fits, wanted = value in ACTIVATIONS, "one of " + ", ".join(map(repr, ACTIVATIONS))
    if not fits:
        raise OptionError("load", argument, repr(value), wanted)
    return value
