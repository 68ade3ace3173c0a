"""Networks that are built from a configuration: a dataclass, which a weights file holds as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

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
    """Return the network of a weights file.

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
        options = json.loads(stored["config"])
        return build(kind(**{name: _with_tuples(value) for name, value in options.items()}))

    return files.fit(build_from_file, tensors, path)


def _with_tuples(value: Any) -> Any:
    """Return a JSON value with tuples in the place of lists, which JSON makes of tuples."""
    if isinstance(value, list):
        return tuple(_with_tuples(part) for part in value)
    if isinstance(value, dict):
        return {name: _with_tuples(part) for name, part in value.items()}
    return value
