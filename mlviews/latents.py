"""Latents of all levels, and what is done with them: one tensor ``[B, *level.shape]`` per level, coarse to
fine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")


def with_levels(latents: Sequence[Tensor], levels: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the latents with some levels replaced."""
    changed = list(latents)
    for level, value in zip(levels, values, strict=True):
        changed[level] = value
    return changed


def interpolate(
    latents: Sequence[Tensor], levels: Sequence[int], ends: Sequence[Tensor], share: float
) -> list[Tensor]:
    """Return the latents with some levels moved along the straight line to their ends.

    Args:
        latents: a tensor ``[B, *level.shape]`` per level.
        levels: the indices of the levels to move.
        ends: where each of them goes, of the same shape.
        share: how far they go: 0 is the latents themselves, 1 the ends.
    """
    starts = [latents[level] for level in levels]
    values = [start + share * (end - start) for start, end in zip(starts, ends, strict=True)]
    return with_levels(latents, levels, values)


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
