"""What tells one generator from another: the key under which measurements and exports of it are kept.

Weights alone do not: options, a wrapped callable and a subclass's constants change what is made, and not all
of them can be looked at. So the key holds everything that is known of the generator, and a few numbers that
follow from samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlviews.generators.base import MLVGM
from mlviews.perturb import Normal
from mlviews.runs.files import fingerprint
from mlviews.runs.modes import plain
from mlviews.sampling import NOISE, Draw, Field, Name, TruncatedNormal

_SAMPLES = 2
_PROJECTIONS = 4  # numbers that are kept of an image


def generator_identity(generator: MLVGM) -> dict[str, Any]:
    """Return what a generator makes its samples of, as JSON can hold it.

    ``samples`` holds a few projections of two fixed samples, each as an anchor and with all levels drawn
    anew. They are compared up to rounding (:func:`mlviews.runs.checkpoint.differences`), as processors round
    differently.
    """
    with plain(generator.device), torch.no_grad():
        return _identity(generator)


def _identity(generator: MLVGM) -> dict[str, Any]:
    labels = generator.sample_labels(range(_SAMPLES)) if generator.num_classes else None
    law = Normal(1.0, generator.truncation)
    views = [generator.sample_latents(range(_SAMPLES)), generator.sample_noise(range(_SAMPLES), law)]
    images = [generator(latents, labels) for latents in views]
    return {
        "name": generator.name,
        "options": {name: repr(value) for name, value in sorted(generator.options.items())},
        "levels": {level.name: list(level.shape) for level in generator.levels},
        "image_shape": list(generator.image_shape),
        "num_classes": generator.num_classes,
        "tied": generator.tied,
        "truncation": generator.truncation,
        "weights": fingerprint(generator),
        "samples": projections(images),
    }


def projections(images: Sequence[Tensor]) -> list[float]:
    """Return a few numbers for every image of every view: sums of its pixels with fixed random weights.

    Args:
        images: a float tensor ``[B, ...]`` per view.

    Returns:
        ``views * B * 4`` numbers, rounded to six digits. A change of every pixel by d moves them by about d.
    """
    numbers: list[float] = []
    for view in images:
        flat = view.detach().float().cpu().flatten(1)  # [B, pixels]
        size = flat.shape[1]
        fields: dict[Name, Field] = {
            index: Field(size, NOISE, 0, index, TruncatedNormal()) for index in range(_PROJECTIONS)
        }
        drawn = Draw(fields, torch.device("cpu"))(torch.zeros(1, dtype=torch.int64), 0, 0)
        weights = torch.cat([drawn[index] for index in fields])  # [4, pixels]
        numbers += ((flat @ weights.T) / size**0.5).flatten().tolist()
    return [round(number, 6) for number in numbers]
