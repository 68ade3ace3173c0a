"""What a step of an inverter's training minimizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.anchors import Sampler
from mlviews.generators.base import MLVGM
from mlviews.generators.inverter import Inverter, excess
from mlviews.invert.options import InverterOptions
from mlviews.latents import with_levels

EVALUATE = 1  # the epoch of the pairs to evaluate on, and of the order that chooses the held-out images
CHUNK = 128  # images that are evaluated at a time


class RandomFeatures(nn.Module):
    """Three stages of a fixed random network, in whose features images are compared besides in their pixels.

    Random filters respond to edges and texture, which single pixels' errors say little of; they need no
    pretrained weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        stages = [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in pairwise([channels, 16, 32, 64])
        ]
        for stage in stages:
            nn.init.normal_(stage.weight, std=1 / math.sqrt(stage.weight[0].numel()))
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features ``[B, channels, h, w]`` of each stage."""
        features = []
        x = images * 2 - 1
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        return features


class Scales(NamedTuple):
    """What the parts of the loss are counted in, measured once on the generator's samples."""

    levels: list[float]  # share of each level: of the mean squared change of an image when it is drawn anew
    image: float  # mean squared difference between two samples' pixels, halved: their variance
    features: list[float]  # the same of each stage of the random network


class Inversion(nn.Module):
    """The loss of a batch, in one module so that DDP keeps the inverter alike on all processes.

    Args:
        generator: an MLVGM on the inverter's device.
        inverter: the inverter.
        features: the fixed random network.
        scales: what the parts of the loss are counted in.
        options: the weights of the parts, and the precision.
        dtype: of autocast; None for float32.
    """

    def __init__(
        self,
        generator: MLVGM,
        inverter: Inverter,
        features: RandomFeatures,
        scales: Scales,
        options: InverterOptions,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._fixed = (generator, features)  # not parts: they do not learn
        self.inverter = inverter
        self.scales, self.options, self.dtype = scales, options, dtype

    def forward(self, images: Tensor, latents: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            images: ``[B, C, H, W]`` in [0, 1]; the first ones are the pairs'.
            latents: the latents ``[P, *level.shape]`` of the pairs, per level; P may be 0.
            labels: int64 ``[P]`` for a class-conditional generator, for which all are pairs; else None.
        """
        options = self.options
        generator, features = self._fixed
        count = len(latents[0])
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            predicted = self.inverter(images)  # per level [B, *level.shape]
            decoded = generator.decode(predicted, labels)  # [B, C, H, W]
        loss = options.image * F.mse_loss(decoded, images) / self.scales.image
        if options.feature:
            errors = [
                F.mse_loss(ours, theirs) / scale
                for ours, theirs, scale in zip(
                    features(decoded), features(images), self.scales.features, strict=True
                )
            ]
            loss = loss + options.feature * torch.stack(errors).mean()
        if count and options.latent:
            loss = loss + options.latent * self.latent_error(predicted, latents)
        if count < len(images) and options.pull:
            levels = predicted[:1] if generator.tied else predicted
            pull = torch.stack([excess(z[count:]).mean() for z in levels]).mean()
            loss = loss + options.pull * pull
        return loss

    def latent_error(self, predicted: Sequence[Tensor], latents: Sequence[Tensor]) -> Tensor:
        """Return the mean squared error of the first latents, levels weighted by what they show."""
        count = len(latents[0])
        errors = [
            share * F.mse_loss(guess[:count], z)
            for share, guess, z in zip(self.scales.levels, predicted, latents, strict=True)
        ]
        return torch.stack(errors).sum()


@torch.no_grad()
def measure_scales(generator: MLVGM, draw: Sampler, features: RandomFeatures, count: int) -> Scales:
    """Measure what each level shows, and the variance of pixels and features, on the generator's samples."""
    totals = [0.0] * len(generator.levels)
    pixels = 0.0
    stages = [0.0] * len(features.stages)
    for begin in range(0, count, CHUNK):
        indices = range(begin, min(count, begin + CHUNK))
        latents, labels = draw(indices, EVALUATE)
        images = generator(latents, labels)
        anew = draw.noise(indices, draw.law, EVALUATE)
        for level in range(len(generator.levels)):
            changed = with_levels(latents, [level], [anew[level]])
            change = (generator(changed, labels) - images).square().mean()
            totals[level] += change.item() * len(indices)
        # Two neighbours are two independent samples.
        pixels += _variance(images) * len(indices)
        for stage, maps in enumerate(features(images)):
            stages[stage] += _variance(maps) * len(indices)
    if generator.tied:  # one draw shows what all its levels show
        totals = [1.0] + [0.0] * (len(totals) - 1)
    total = sum(totals)
    shares = [value / total if total else 1 / len(totals) for value in totals]
    tiny = 1e-8  # a generator that makes one image only
    return Scales(shares, max(tiny, pixels / count), [max(tiny, value / count) for value in stages])


def _variance(values: Tensor) -> float:
    """Return half the mean squared difference between neighbours of a batch."""
    return (values - values.roll(1, 0)).square().mean().item() / 2
