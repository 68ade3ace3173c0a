"""Generators by name, and the base class to bring a new one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mlviews import download, zoo
from mlviews.distributed import check_device
from mlviews.errors import did_you_mean, listing, path_of
from mlviews.generators.base import MLVGM, Level, wrap_generator
from mlviews.generators.film import FilmGenerator

__all__ = ["MLVGM", "GeneratorInfo", "Level", "list_generators", "load_generator", "wrap_generator"]


class _Entry(NamedTuple):
    load: Callable[..., MLVGM]  # (weights, **options)
    bundled: Path | None  # used when no weights are given
    needs: str  # for people: which weights it takes


_GENERATORS = {
    "fashion": _Entry(FilmGenerator.load, zoo.FOLDER / "fashion.safetensors", "bundled, or another file of mlviews.zoo.train"),
}


class GeneratorInfo(NamedTuple):
    """A line of :func:`list_generators`."""

    name: str
    levels: tuple[Level, ...] | None  # None: as many as the weights have
    image_shape: tuple[int, ...] | None  # None likewise
    weights: str  # what it takes
    options: tuple[str, ...]  # further arguments of load_generator


def load_generator(
    name: str, weights: str | Path | nn.Module | None = None, device: str | torch.device | None = None, **options: Any
) -> MLVGM:
    """A generator, frozen and in eval mode.

    Args:
        name: one of :func:`list_generators`.
        weights: a weights file; or a URL (``https://.../file.pkl#sha256=HEX``) or Hugging Face id (``owner/name``,
            ``hf://owner/name/file``), downloaded once; or a module of the project whose files it takes. None for the
            bundled weights, where there are some.
        device: where to put it; None for the CPU.
        options: of that generator, see its ``load``: e.g. ``groups=4`` of stylegan2.

    Raises:
        ValueError: for an unknown name or option, a device that is not there, or where weights are needed and none are given.
        FileNotFoundError: if the weights file is missing, or cannot be downloaded.
        mlviews.WeightsError: if it is damaged, was made for another architecture, or holds anything but data.
    """
    if not isinstance(name, str) or name not in _GENERATORS:
        raise ValueError(f"Unknown generator {name!r}: there are {listing(_GENERATORS)}.{did_you_mean(name, _GENERATORS)}")
    entry = _GENERATORS[name]
    for option in options:
        if option not in _options(entry):
            raise ValueError(
                f"Invalid option {option!r} of generator {name!r}: it takes {listing(_options(entry)) or 'none'}."
                f"{did_you_mean(option, _options(entry))}"
            )
    where = None if device is None else check_device(device)
    if weights is None and entry.bundled is None:
        raise ValueError(f"Generator {name!r} has no bundled weights: pass weights=FILE ({entry.needs}).")
    if download.is_remote(weights):
        weights = download.fetch(str(weights))
    elif weights is None or not isinstance(weights, nn.Module):
        weights = entry.bundled if weights is None else path_of(weights, "weights file")
    generator = entry.load(weights, **options)
    return generator if where is None else generator.to(where)


def list_generators() -> list[GeneratorInfo]:
    """Every generator's name, levels, image shape, the weights and the options it takes."""
    found = []
    for name, entry in _GENERATORS.items():
        info = GeneratorInfo(name, None, None, entry.needs, tuple(_options(entry)))
        if entry.bundled is not None:
            generator = load_generator(name)
            info = info._replace(levels=generator.levels, image_shape=generator.image_shape)
        found.append(info)
    return found


def _options(entry: _Entry) -> list[str]:
    parameters = inspect.signature(entry.load).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
