"""Networks that are built from a configuration: a dataclass, which a weights file holds as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from mlviews.checks import is_number
from mlviews.errors import listing
from mlviews.weights import files

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


def metadata(format: str, config: Any, provenance: dict[str, Any] | None = None) -> dict[str, str]:
    """Return what a weights file says besides the weights.

    Args:
        format: the name of the file's format.
        config: the dataclass that the network is built from.
        provenance: facts about the training.
    """
    return {
        "format": format,
        "config": json.dumps(dataclasses.asdict(config)),
        "provenance": json.dumps(provenance or {}),
    }


def load(path: str | Path, format: str, kind: type[Config], build: Callable[[Config], Module]) -> Module:
    """Return the network of a weights file; its ``provenance`` is what the file says of the training.

    Args:
        path: a file with the metadata of :func:`metadata`.
        format: the name of the format that it must have.
        kind: the dataclass of the configuration.
        build: makes the network from its configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is damaged or holds something else.
    """
    tensors, stored = files.read_safetensors(path, format)

    def build_from_file() -> Module:
        # Whatever is wrong with the configuration becomes an exception here, of which fit() makes one error.
        network = build(_configuration(kind, json.loads(stored["config"])))
        network.provenance = dict(json.loads(stored.get("provenance", "{}")))  # type: ignore[assignment]
        return network

    return files.fit(build_from_file, tensors, path)


def _configuration(kind: Callable[..., Config], settings: Any) -> Config:
    """Return the dataclass that settings of a file describe.

    Raises:
        ValueError: if they are no table, one has a name that the dataclass does not know, or a value of
            another type than it declares. Whether the values make sense is for the dataclass to say.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"its settings are {type(settings).__name__}, expected a table")
    types = _types(kind)
    values = {}
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"unknown setting {name[:40]!r}; there are {listing(types)}")
        values[name] = _typed(name, value, types[name])
    return kind(**values)


@functools.cache
def _types(kind: Callable[..., Any]) -> dict[str, Any]:
    """Return the types that a dataclass declares for its settings."""
    return get_type_hints(kind)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a JSON value as the type that a dataclass declares; tuples come as lists.

    Args:
        name: of the setting, for the message.
        value: of the setting.
        hint: ``int``, ``bool``, ``str``, ``float``, a tuple or a dictionary of these.

    Raises:
        ValueError: if it is of another type; a truth value is no number.
    """
    kind = get_origin(hint) or hint
    if kind is tuple and isinstance(value, list):
        items = get_args(hint)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) != len(value):
            raise ValueError(f"{name} has {len(value)} values, expected {len(items)}")
        return tuple(_typed(name, part, item) for part, item in zip(value, items, strict=True))
    if kind is dict and isinstance(value, dict):
        _, item = get_args(hint)
        return {key: _typed(name, part, item) for key, part in value.items()}
    if kind is float and is_number(value):
        return float(value)
    if type(value) is not kind or kind in (float, tuple, dict):
        raise ValueError(f"{name} is {repr(value)[:40]}, expected {_words(hint)}")
    return value


def _words(hint: Any) -> str:
    """Return the name of a declared type, for a message."""
    words = {int: "an integer", bool: "true or false", str: "a text", float: "a finite number"}
    if get_origin(hint) is tuple:
        return f"a list ({_words(get_args(hint)[0])} each)"
    if get_origin(hint) is dict:
        return f"a table ({_words(get_args(hint)[1])} each)"
    return words[hint]
