"""The network that inverts a generator: images to the latents that decode to them.

It stands in for the encoder that most generators do not have. :func:`mlviews.train_inverter` trains it on
pairs of latents and the images that the generator makes of them, and on real images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews import checks
from mlviews.checks import integer, path_of, positive
from mlviews.errors import listing
from mlviews.generators.base import MLVGM, Latents, Level, as_levels
from mlviews.weights import configs, files

SMALLEST = 4  # pixels of a side at which the trunk stops halving
REFINE_RATE = 0.1  # Adam's first rate for latents that are refined, in the prior's standard deviations
REFINE_PULL = 1e-3  # weight of the pull to the prior, of the mean squared error


@dataclass(frozen=True)
class InverterConfig:
    """Architecture of an :class:`Inverter`."""

    image_shape: tuple[int, int, int]  # (C, H, W)
    levels: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each level, coarse to fine
    tied: bool = False  # whether all levels hold one draw
    width: int = 48  # channels at 16 pixels; twice as many at 8, four times at 4, half at 32
    blocks: int = 1  # residual blocks at each resolution
    hidden: int = 256  # scalars that the heads read


class ResidualBlock(nn.Module):
    """``x [B, C, H, W] -> [B, C, H, W]``: the identity at first, as its last convolution starts from 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(F.leaky_relu(self.first(F.leaky_relu(self.norm(x), 0.2)), 0.2))
        return x + change


class Inverter(nn.Module):
    """A residual convolutional network from images to latents, with one head per level.

    The trunk halves the image until a side is at most four pixels long, so it fits images from 28 to 256
    pixels. Its output is differentiable with respect to the images. Of a tied generator (StyleGAN2: all
    levels share one z) it predicts the shared draw, and all levels hold it. (Published StyleGAN2 encoders
    predict one w per style, which enters after the mapping network:
    :mod:`mlviews.generators.stylegan.encoder`.)

    Args:
        config: the architecture, with the levels and the image shape of the generator to invert.
        provenance: what it was trained on and how; stored with it.
    """

    FORMAT = "mlviews.inverter"

    def __init__(self, config: InverterConfig, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.provenance = dict(provenance or {})
        self.run: Any = None  # the mlviews.invert.InverterRun that trained it; None for one from a file
        self.levels: tuple[Level, ...] = as_levels(config.levels)
        self.image_shape = tuple(config.image_shape)
        color, height, width = self.image_shape
        layers: list[nn.Module] = []
        before = color
        while max(height, width) > SMALLEST or not layers:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            channels = _channels(config.width, max(height, width))
            layers.append(nn.Conv2d(before, channels, 3, stride=2, padding=1))
            layers += [ResidualBlock(channels) for _ in range(config.blocks)]
            before = channels
        self.trunk = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(_groups(before), before)
        self.dense = nn.Linear(before * height * width, config.hidden)
        heads = self.levels[:1] if config.tied else self.levels
        self.heads = nn.ModuleList(nn.Linear(config.hidden, level.size) for level in heads)
        for weight in self.parameters():
            if weight.ndim == 4:  # this layout is the faster one on a CPU
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    def of(cls, generator: MLVGM, **options: Any) -> Inverter:
        """Return an untrained inverter of a generator; options are ``width``, ``blocks``, ``hidden``."""
        levels = tuple((level.name, level.shape) for level in generator.levels)
        return cls(InverterConfig(generator.image_shape, levels, generator.tied, **options))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return latents of images.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1].

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level, coarse to fine; of a tied generator the same
            tensor for every level.
        """
        pixels = images.to(self.dense.weight.dtype) * 2 - 1
        maps = self.trunk(pixels.contiguous(memory_format=torch.channels_last))  # [B, 4 width, 4, 4]
        maps = F.leaky_relu(self.norm(maps), 0.2)
        hidden = F.leaky_relu(self.dense(maps.flatten(1)), 0.2)  # [B, hidden]
        with torch.autocast(images.device.type, enabled=False):
            hidden = hidden.to(self.dense.weight.dtype)
            flat = [head(hidden).float() for head in self.heads]
        if self.config.tied:
            return [flat[0].view(-1, *self.levels[0].shape)] * len(self.levels)
        return [z.view(-1, *level.shape) for z, level in zip(flat, self.levels, strict=True)]

    def check(self, generator: MLVGM) -> None:
        """Raise a ValueError if it was made for other levels or another image shape than the generator's."""
        if self.image_shape != tuple(generator.image_shape):
            raise ValueError(
                f"This inverter takes images of shape {self.image_shape}, and generator {generator.name!r} "
                f"makes {tuple(generator.image_shape)}: train its own with mlviews.train_inverter."
            )
        if self.levels != generator.levels or self.config.tied != generator.tied:
            raise ValueError(
                f"This inverter is for levels {_described(self.levels, self.config.tied)}, and generator "
                f"{generator.name!r} has {_described(generator.levels, generator.tied)}: train its own with "
                "mlviews.train_inverter."
            )

    @torch.inference_mode(False)  # whatever the caller's modes are
    @torch.enable_grad()
    def refine(
        self,
        generator: MLVGM,
        images: Tensor,
        latents: Latents | None = None,
        *,
        steps: int = 30,
        rate: float = REFINE_RATE,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Return latents that reconstruct images better, by a few steps of Adam on the latents themselves.

        The loss is the mean squared error of each image plus a small pull of its latents to the prior. An
        image does not depend on the others of its batch, and never gets worse.

        Args:
            generator: the generator that this inverter is for.
            images: float ``[B, C, H, W]`` in [0, 1], on the generator's device.
            latents: where to start; None: the inverter's own.
            steps: how many steps; each costs a decoding forward and backward.
            rate: Adam's first rate, which falls to 0 along a line; above 0.
            labels: int64 ``[B]`` for a class-conditional generator, else None.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level, without a graph.

        Raises:
            ValueError: if the inverter is not for this generator, or an argument is out of range.
        """
        self.check(generator)
        steps = integer("steps", steps, 0)
        rate = positive("rate", rate)
        images = images.detach().clone()
        with torch.no_grad():
            start = self(images) if latents is None else list(latents)
        count = 1 if generator.tied else len(generator.levels)
        free = [z.detach().clone().requires_grad_(True) for z in start[:count]]
        best = [z.detach().clone() for z in free]
        lowest = torch.full((len(images),), math.inf, device=images.device)
        optimizer = torch.optim.Adam(free, rate, betas=(0.9, 0.99))
        for step in range(steps + 1):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / (steps + 1))
            whole = free * len(generator.levels) if generator.tied else free
            error = (generator.decode(whole, labels) - images).square().flatten(1).mean(dim=1)  # [B]
            better = error.detach() < lowest
            lowest = torch.where(better, error.detach(), lowest)
            # By where(), as to index by a mask would wait for the device.
            best = [
                torch.where(better.view(-1, *[1] * (z.ndim - 1)), z.detach(), lowest_latent)
                for lowest_latent, z in zip(best, free, strict=True)
            ]
            if step == steps or not len(images):
                break
            pull = torch.stack([excess(z) for z in free]).mean(dim=0)  # [B]
            gradients = torch.autograd.grad((error + REFINE_PULL * pull).sum(), free)
            for z, gradient in zip(free, gradients, strict=True):
                z.grad = gradient
            optimizer.step()
        return best * len(generator.levels) if generator.tied else best

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a ``.safetensors`` file with the weights, the architecture and the provenance.

        Args:
            path: the file to write.
            half: whether weights are stored in float16, which halves the file.
        """
        dtype = torch.float16 if checks.flag("half", half) else torch.float32
        tensors = {name: value.to(dtype) for name, value in self.state_dict().items()}
        files.write_safetensors(path, tensors, configs.metadata(self.FORMAT, self.config, self.provenance))

    @classmethod
    def load(cls, path: str | Path) -> Inverter:
        """Read an inverter that :meth:`save` wrote, in eval mode and frozen.

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        path = path_of(path, "inverter file")
        inverter: Inverter = configs.load(path, cls.FORMAT, InverterConfig, cls)
        return inverter.eval().requires_grad_(False)


def excess(z: Tensor) -> Tensor:
    """Return how far a level's latents are from the prior's typical set, ``[B]``.

    It is the square of (the mean square of a sample's scalars - 1): a standard normal has a mean square of 1.
    """
    return (z.flatten(1).square().mean(dim=1) - 1).square()


def _channels(width: int, side: int) -> int:
    """Return the trunk's channels where the longer side has so many pixels."""
    channels = width * 16 // max(side, 1)
    return max(8, width // 4, min(4 * width, channels) // 8 * 8)


def _groups(channels: int) -> int:
    """Return the number of groups for a group norm: eight if they divide the channels."""
    return math.gcd(8, channels)


def _described(levels: tuple[Level, ...], tied: bool) -> str:
    """Return names and shapes of levels, for a message."""
    text = listing(f"{level.name} {level.shape}" for level in levels)
    return f"{text} that share one draw" if tied else text
