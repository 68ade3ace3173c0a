"""Levels by index or name, and lists of one tensor per level in which levels may hold the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from mlviews.errors import did_you_mean, listing

Result = TypeVar("Result")


class Named(Protocol):
    """A level, as far as it has a name."""

    @property
    def name(self) -> str:
        """The level's name."""


def levels_text(levels: Sequence[Named]) -> str:
    """Return a sentence that names the levels, for a message."""
    return f"The levels are {listing(f'{index} ({level.name})' for index, level in enumerate(levels))}."


def level_indices(key: int | str, levels: Sequence[Named]) -> tuple[int, ...]:
    """Return the levels that a key of ``perturb=`` names: an index, a name, or ``"start:stop"`` as in a
    slice.

    Raises:
        ValueError: for an unknown key, an index out of range, or an empty range; the message names the levels
            there are.
    """
    names = [level.name for level in levels]
    if isinstance(key, str) and key in names:
        return (names.index(key),)
    remedy = f"use an index, a name, or 'start:stop'. {levels_text(levels)}"
    try:
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ValueError
        bounds = [int(part) if part.strip() else None for part in str(key).split(":")]
    except ValueError:
        raise ValueError(f"Invalid level {key!r}: {remedy}{did_you_mean(key, names)}") from None
    count = len(levels)
    if len(bounds) > 2 or bounds == [None]:
        raise ValueError(f"Invalid level {key!r}: {remedy}")
    limit = count if len(bounds) == 2 else count - 1
    if any(bound is not None and not -count <= bound <= limit for bound in bounds):
        raise ValueError(
            f"Level {key!r} is out of range. {levels_text(levels)} "
            "(In YAML, quote ranges: 1:3 without quotes is the number 63.)"
        )
    if len(bounds) == 1:
        return (range(count)[bounds[0] or 0],)
    indices = tuple(range(count)[bounds[0] : bounds[1]])
    if not indices:
        raise ValueError(f"Level range {key!r} is empty. {levels_text(levels)}")
    return indices


def level_index(key: int | str, levels: Sequence[Named]) -> int:
    """Return the level that an index or a name stands for.

    Raises:
        ValueError: as :func:`level_indices`, and for a range of more than one.
    """
    indices = level_indices(key, levels)
    if len(indices) > 1:
        raise ValueError(f"Invalid level {key!r}: name one. {levels_text(levels)}")
    return indices[0]


def with_levels(latents: Sequence[Tensor], levels: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the latents with some levels replaced."""
    changed = list(latents)
    for level, value in zip(levels, values, strict=True):
        changed[level] = value
    return changed


class Blend(NamedTuple):
    """A level's latents as a sum: so much of an image's latents, and so much of noise."""

    image: float
    noise: float

    def __call__(self, z: Tensor, noise: Tensor | None) -> Tensor:
        """Return the sum, of the shape of both; noise that has no share may be None."""
        if noise is None or not self.noise:
            return z if self.image == 1 else self.image * z
        if not self.image:
            return noise if self.noise == 1 else self.noise * noise
        return self.image * z + self.noise * noise


def distinct(latents: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that the levels hold, each once, and the place of each level's tensor among them.

    The levels of a tied generator hold one tensor until a perturber moves some of them. What is computed of
    it level by level (StyleGAN2's W from Z) would else be computed as often as there are levels.
    """
    tensors = {id(z): z for z in latents}
    places = {key: place for place, key in enumerate(tensors)}
    return list(tensors.values()), [places[id(z)] for z in latents]


def once(function: Callable[[Tensor], Result], latents: Sequence[Tensor]) -> list[Result]:
    """Apply a function to each latent, once to each tensor: levels that hold one tensor share the result."""
    tensors, places = distinct(latents)
    results = [function(z) for z in tensors]
    return [results[place] for place in places]
