"""Generators by name, and the base class to bring a new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mlviews import zoo
from mlviews.distributed import check_device
from mlviews.errors import did_you_mean, listing, path_of
from mlviews.generators.base import MLVGM, Level, wrap_generator
from mlviews.generators.film import FilmGenerator

__all__ = ["MLVGM", "GeneratorInfo", "Level", "list_generators", "load_generator", "wrap_generator"]


class _Entry(NamedTuple):
    load: Callable[[Path], MLVGM]
    bundled: Path | None  # used when no weights are given
    needs: str  # for people: which weights it takes


_GENERATORS = {
    "fashion": _Entry(FilmGenerator.load, zoo.FOLDER / "fashion.safetensors", "bundled (or another file of mlviews.zoo.train)"),
}


class GeneratorInfo(NamedTuple):
    """A line of :func:`list_generators`."""

    name: str
    levels: tuple[Level, ...]
    image_shape: tuple[int, ...]
    weights: str


def load_generator(name: str, weights: str | Path | None = None, device: str | torch.device | None = None) -> MLVGM:
    """A generator, frozen and in eval mode.

    Args:
        name: one of :func:`list_generators`.
        weights: a weights file; None for the bundled one, where there is one.
        device: where to put it; None for the CPU.

    Raises:
        ValueError: for an unknown name, a device that is not there, or where weights are needed and none are given.
        FileNotFoundError: if the weights file is missing.
        mlviews.WeightsError: if it is damaged, or was made for another architecture.
    """
    if not isinstance(name, str) or name not in _GENERATORS:
        raise ValueError(f"Unknown generator {name!r}: there are {listing(_GENERATORS)}.{did_you_mean(name, _GENERATORS)}")
    entry = _GENERATORS[name]
    path = entry.bundled if weights is None else path_of(weights, "weights file")
    if path is None:
        raise ValueError(f"Generator {name!r} has no bundled weights: pass weights=FILE ({entry.needs}).")
    where = None if device is None else check_device(device)
    generator = entry.load(path)
    return generator if where is None else generator.to(where)


def list_generators() -> list[GeneratorInfo]:
    """Every generator's name, levels, image shape and the weights it needs."""
    found = []
    for name, entry in _GENERATORS.items():
        generator = load_generator(name)
        found.append(GeneratorInfo(name, generator.levels, generator.image_shape, entry.needs))
    return found
