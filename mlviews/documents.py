"""Configuration files as plain values: YAML that cannot take more time or memory than its length, and no
environment.

A file may come from somebody else. It is read by PyYAML's safe loader, after its nodes have been counted with
every alias written out, and interpolations of environment variables are refused: they would carry a secret
into a URL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MOST_BYTES = 1 << 20
_MOST_NODES = 10_000  # with every alias written out
_DEEPEST = 50
# An interpolation that calls a resolver, as oc.env is, or that is put together from others and may call one.
_RESOLVER = re.compile(r"\$\{[^}]*[:$][^}]*\}?")


def read_yaml(path: Path) -> Any:
    """Return a YAML file's content with its interpolations (``${seed}``) resolved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, is too large or too deep, or asks for an environment variable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No configuration file {path}.")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"{path} is no configuration: it has more than {_MOST_BYTES} bytes.")
        text = data.decode("utf-8-sig")
        _check_nodes(
            yaml.compose(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader), path
        )
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a YAML mapping ({reason[:200]}).") from error


def _check_nodes(node: yaml.Node | None, path: Path) -> None:
    """Raise a ValueError for a document of too many nodes, aliases written out, or of too many levels.

    Texts are looked at too: here they are without YAML's escapes.
    """
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in inside or depth > _DEEPEST:
            raise ValueError(
                f"{path} is no configuration: it is nested in itself, or deeper than {_DEEPEST} levels."
            )
        if id(node) not in sizes:
            inside.add(id(node))
            children: Sequence[yaml.Node] = ()
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            else:
                _check_text(str(node.value), path)
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
            inside.remove(id(node))
        if sizes[id(node)] > _MOST_NODES:
            raise ValueError(
                f"{path} is no configuration: written out it has more than {_MOST_NODES} values."
            )
        return sizes[id(node)]

    if node is not None:
        size(node, 0)


def _check_text(text: str, path: Path) -> None:
    """Raise a ValueError for a text that calls a resolver."""
    if call := _RESOLVER.search(text):
        raise ValueError(
            f"{path} asks for {call[0][:60]!r}: a file's environment variables and other resolvers are not "
            "read, as they could be sent to a server. Write the value, or pass it from Python or the command "
            "line."
        )


MISSING = "???"
"""How OmegaConf writes a value that somebody else is to give."""


def plain(value: Any) -> Any:
    """Return a configuration's value in Python's own types: OmegaConf's containers and numpy's scalars are
    converted.

    Entries whose value is missing (``???``) are left out, as if they were not there.

    Args:
        value: the value; objects (a generator, a perturber, a callable) are returned as they are.

    Raises:
        ValueError: for an interpolation that cannot be resolved.
    """
    if isinstance(value, DictConfig | ListConfig):
        try:
            value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            raise ValueError(
                f"The configuration cannot be resolved ({str(error).splitlines()[0]})."
            ) from error
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        entries = {plain(key): plain(entry) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if not is_missing(entry)}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def is_missing(value: Any) -> bool:
    """Is it a value that somebody else is to give?"""
    return isinstance(value, str) and value == MISSING
