"""Latents in hand: move along a level, set one, put the levels of two samples together.

Latents are a list of one tensor ``[B, *level.shape]`` per level, coarse to fine. All functions are pure: they
return new lists, in which the levels that do not change hold the very tensors that they were given. So
:func:`decode` sees what variants of a sample have in common, and runs the blocks below the first level that
differs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import choice, described, integer, is_number, positive
from mlviews.latents.directions import directions
from mlviews.levels import level_index, level_indices, levels_text, once, with_levels
from mlviews.sampling import TruncatedNormal

if TYPE_CHECKING:
    from mlviews.generators.base import MLVGM, Latents


# -- the levels of one sample, and of two --------------------------------------------------------------------


def interpolate(
    latents: Latents, levels: Sequence[int], ends: Sequence[Tensor], share: float
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


def intervene(
    g: MLVGM,
    z: Latents,
    values: Mapping[int | str, Tensor | float],
    *,
    finer: str = "keep",
    indices: Iterable[int] | Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> list[Tensor]:
    """Return the latents with some levels set: do(level := value), as in Pearl's calculus.

    Coarser levels, and finer ones by default, stay as they are.

    Args:
        g: the generator.
        z: its latents, float ``[B, *level.shape]`` per level.
        values: by level (an index, a name, or ``"start:stop"``): a number for all of its scalars, or a float
            tensor ``[*level.shape]``, ``[1, *level.shape]`` or ``[B, *level.shape]``.
        finer: "keep": levels finer than the coarsest one that is set keep their latents; "draw": they are
            drawn anew, as :class:`mlviews.perturb.Resample` draws them for view 1 of a source. Levels of a
            tied generator get one draw.
        indices: with ``finer="draw"``, the samples' ``B`` global indices in ``[0, 2**32)``; None: 0, 1, ...
        seed: of what is drawn, an integer in ``[0, 2**64)``.
        epoch: of what is drawn, an integer in ``[0, 2**32)``.

    Raises:
        ValueError: for a level that is not there or named twice, a value that does not fit its level, or
            indices that are not as many as the samples.
    """
    choice("finer", finer, ("keep", "draw"), problem="Invalid")
    changes: dict[int, Tensor] = {}
    for key, value in values.items():
        for index in level_indices(key, g.levels):
            if index in changes:
                raise ValueError(
                    f"Level {index} ({g.levels[index].name}) is set twice: name it once. "
                    f"{levels_text(g.levels)}"
                )
            changes[index] = _fitted(value, z[index], g.levels[index].name)
    if finer == "draw" and changes:
        drawn = [level for level in range(min(changes) + 1, len(g.levels)) if level not in changes]
        numbers = range(len(z[0])) if indices is None else indices
        noise = _fresh(g, drawn, numbers, seed, epoch)
        if noise and len(noise[0]) != len(z[0]):
            raise ValueError(f"Got {len(noise[0])} indices for {len(z[0])} samples: give one of each.")
        changes |= dict(zip(drawn, noise, strict=True))
    return with_levels(z, list(changes), list(changes.values()))


def recombine(coarse: Latents, fine: Latents, split: int, *, levels: int | None = None) -> list[Tensor]:
    """Return the coarse levels of some samples with the fine levels of others ("style mixing").

    Args:
        coarse: latents whose levels before ``split`` are taken, ``[B, *level.shape]`` each.
        fine: latents whose levels from ``split`` on are taken; of ``B`` samples, or of one for all.
        split: the index of the first fine level; 0 takes all of ``fine``, the number of levels none.
        levels: the number of levels, ``len(g.levels)``, where latents hold further tensors after those of the
            levels, level by level: these go with their levels. None: there are none.

    Raises:
        ValueError: if the two do not have as many levels, or ``fine`` has neither ``B`` samples nor one, or
            ``split`` is out of range, or latents hold offsets of a W+ code and ``levels`` is not given.
    """
    if len(coarse) != len(fine):
        raise ValueError(
            f"Got {len(coarse)} coarse and {len(fine)} fine levels: take latents of one generator."
        )
    if levels is None:
        if _with_offsets(coarse) or _with_offsets(fine):
            raise ValueError(
                f"Got {len(coarse)} tensors, of which the last {len(coarse) // 2} are offsets of a W+ code: "
                "pass levels=len(g.levels), so that each goes with its level."
            )
        levels = len(coarse)
    levels = integer("levels", levels, 1, len(coarse))
    split = integer("split", split, 0, levels)
    rows = len(coarse[0])
    if len(fine[0]) not in (1, rows):
        raise ValueError(f"Got {len(fine[0])} fine samples for {rows} coarse ones: give as many, or one.")
    fine = once(lambda z: z.expand(rows, *z.shape[1:]), fine)
    return [coarse[place] if place % levels < split else fine[place] for place in range(len(coarse))]


def matrix(coarse: Latents, fine: Latents, split: int, *, levels: int | None = None) -> list[list[Tensor]]:
    """Return all combinations of some samples' coarse levels with others' fine ones.

    Args:
        coarse: latents of R samples, the rows.
        fine: latents of C samples, the columns.
        split: as for :func:`recombine`.
        levels: as for :func:`recombine`.

    Returns:
        C latents of R samples each: column by column, for :func:`decode`.

    Raises:
        ValueError: as :func:`recombine`.
    """
    singles = [_sample(fine, column) for column in range(len(fine[0]))]
    return [recombine(coarse, single, split, levels=levels) for single in singles]


def decode(g: MLVGM, variants: Sequence[Latents], labels: Tensor | None = None) -> list[Tensor]:
    """Return the images of variants of the same samples.

    The blocks below the first level that differs run once. Levels are the same where the variants hold the
    very same tensor, as what the functions of this module return does.

    Args:
        g: the generator.
        variants: latents of ``B`` samples each.
        labels: int64 ``[B]`` for a class-conditional generator, else None.

    Returns:
        Float32 images ``[B, C, H, W]`` in [0, 1] of each variant, without a graph.

    Raises:
        ValueError: if there are no variants, or they do not fit the generator.
    """
    count = len(g.levels)
    tensors = enumerate(zip(*variants, strict=False))
    # What latents hold after those of the levels stands there level by level.
    changed = (place % count for place, column in tensors if any(z is not column[0] for z in column))
    return g.decode_views(variants, min(changed, default=count), labels)


# -- along a level -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traversal:
    """Samples that are moved along directions of one level; see :func:`traverse`."""

    level: int
    directions: Tensor  # [D, B or 1, *level.shape], of unit length
    offsets: tuple[float, ...]  # in standard deviations of the prior
    latents: list[list[list[Tensor]]]  # by direction and by offset: latents of the B samples

    def images(self, g: MLVGM, labels: Tensor | None = None) -> Tensor:
        """Return the images ``[D, offsets, B, C, H, W]``; blocks below the level run once."""
        variants = [latents for row in self.latents for latents in row]
        images = torch.stack(decode(g, variants, labels))  # [D offsets, B, C, H, W]
        return images.view(len(self.latents), len(self.offsets), *images.shape[1:])


def traverse(
    g: MLVGM,
    z: Latents,
    level: int | str,
    dim: int | Tensor | None = None,
    span: float = 3.0,
    count: int = 7,
    *,
    leading: int = 1,
    labels: Tensor | None = None,
) -> Traversal:
    """Move samples along a coordinate or a direction of a level, to both sides.

    Args:
        g: the generator.
        z: latents of the ``B`` samples, float ``[B, *level.shape]`` per level.
        level: the level's index or name.
        dim: a coordinate, counted over the flattened level; a direction ``[*level.shape]`` or directions
            ``[D, B or 1, *level.shape]``, as those of :func:`directions`; or None: each sample's own leading
            directions by the generator's Jacobian.
        span: how far to go, in standard deviations of the prior; above 0.
        count: the number of offsets from ``-span`` to ``span``; an odd one has the samples in its middle.
        leading: with ``dim=None``, how many directions.
        labels: int64 ``[B]`` for a class-conditional generator, else None.

    Raises:
        ValueError: for a level or a coordinate that is not there, directions of another shape, or a value out
            of range.
    """
    index = level_index(level, g.levels)
    span = positive("span", span)
    count = integer("count", count, 2)
    if dim is None:
        vectors = directions(g, z, index, leading, labels=labels).vectors
    elif isinstance(dim, Tensor):
        vectors = _unit(dim, z[index], g.levels[index].name)
    else:
        place = integer("dim", dim, 0, g.levels[index].size - 1)
        vectors = torch.zeros((1, 1, *g.levels[index].shape), device=g.device)
        vectors.view(-1)[place] = 1
    offsets = tuple(span * (2 * step / (count - 1) - 1) for step in range(count))
    rows = [
        [with_levels(z, [index], [z[index] + offset * vector]) for offset in offsets] for vector in vectors
    ]
    return Traversal(index, vectors, offsets, rows)


# -- arguments -----------------------------------------------------------------------------------------------


def _sample(z: Latents, place: int) -> list[Tensor]:
    """Return the latents of one sample, ``[1, *level.shape]`` each."""
    return once(lambda values: values[place : place + 1], z)


def _with_offsets(z: Latents) -> bool:
    """Return whether latents look like those of a W+ code: a vector per level, then styles for each."""
    half = len(z) // 2
    return half > 0 and [level.ndim for level in z] == [2] * half + [3] * half


def _fitted(value: Tensor | float, z: Tensor, name: str) -> Tensor:
    """Return the value of a level for all samples, ``[B, *level.shape]``."""
    if is_number(value):
        return torch.full_like(z, float(value))
    shapes = (z.shape[1:], (1, *z.shape[1:]), z.shape)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape not in shapes:
        raise ValueError(
            f"Invalid value for level {name!r}, {described(value)}: give a number, or a float tensor of "
            f"shape {tuple(z.shape[1:])} or {tuple(z.shape)}."
        )
    return value.to(z).expand_as(z)


def _unit(vectors: Tensor, z: Tensor, name: str) -> Tensor:
    """Return directions ``[D, B or 1, *level.shape]`` of unit length."""
    shape = tuple(z.shape[1:])
    if tuple(vectors.shape) == shape:
        vectors = vectors[None, None]
    fits = vectors.is_floating_point() and vectors.shape[2:] == shape and vectors.ndim == len(shape) + 2
    if not fits or vectors.shape[1] not in (1, len(z)):
        raise ValueError(
            f"Invalid dim, {described(vectors)}: directions of level {name!r} are float tensors of shape "
            f"{shape} or (D, {len(z)}, {', '.join(map(str, shape))})."
        )
    unit: Tensor = F.normalize(vectors.to(z).flatten(2), dim=2)
    return unit.view_as(vectors)


def _fresh(
    g: MLVGM, levels: Sequence[int], indices: Iterable[int] | Tensor, seed: int, epoch: int
) -> list[Tensor]:
    """Return new draws of some levels from the law of anchors; one draw for those of a tied generator."""
    law = TruncatedNormal(1.0, g.truncation)
    if g.tied:
        return g.sample_noise(indices, law, seed, epoch, levels=levels[:1]) * len(levels)
    return g.sample_noise(indices, law, seed, epoch, levels=levels)
