"""``film``: a small convolutional MLVGM, one block per resolution, each with a latent of its own.

Block 1 maps its latent to 4x4 features; every later block doubles the resolution, and its latent
scales and shifts the channels after each group norm (FiLM, Perez et al. 2018). A latent thus acts on everything that
its block draws, at that block's resolution and no coarser.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Level
from mlviews.weights import files as weights


@dataclass(frozen=True)
class FilmConfig:
    """Architecture of a :class:`FilmGenerator`; one entry per level."""

    dims: tuple[int, ...] = (8, 16, 16, 16)  # scalars of each level's latent
    channels: tuple[int, ...] = (128, 112, 64, 24)  # of each block's output, at 4, 8, 16, 32 pixels
    deep_first: bool = False  # a modulated convolution in block 1 too; without it, the coarsest level decides less on its own
    image_channels: int = 1
    groups: int = 8  # of the group norms
    upsample: str = "bilinear"  # or "nearest"

    @property
    def image_size(self) -> int:
        """Pixels of one side."""
        return 4 * int(2 ** (len(self.dims) - 1))


class Film(nn.Module):
    """Group norm whose scale and shift come from a latent, then leaky ReLU: ``[B, C, H, W], [B, d] -> [B, C, H, W]``."""

    def __init__(self, dim: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.style = nn.Linear(dim, 2 * channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.style(z)[:, :, None, None].chunk(2, dim=1)
        return F.leaky_relu(torch.addcmul(shift, self.norm(x), 1 + scale), 0.2, inplace=True)


class FirstBlock(nn.Module):
    """``z [B, d] -> [B, C, 4, 4]``: a linear map, followed by a modulated convolution if ``deep``."""

    def __init__(self, dim: int, channels: int, groups: int, deep: bool) -> None:
        super().__init__()
        self.channels = channels
        self.linear = nn.Linear(dim, channels * 16)
        self.film = Film(dim, channels, groups) if deep else None
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if deep else None

    def forward(self, z: Tensor, state: Tensor | None) -> Tensor:
        x: Tensor = self.linear(z).view(-1, self.channels, 4, 4)
        if self.film is not None and self.conv is not None:
            x = self.conv(self.film(x, z))
        return x


class UpBlock(nn.Module):
    """``z [B, d], state [B, C', H, W] -> [B, C, 2H, 2W]``; the first convolution runs before the upsampling."""

    def __init__(self, dim: int, channels_in: int, channels: int, groups: int, upsample: str) -> None:
        super().__init__()
        self.upsample = upsample
        self.film_in = Film(dim, channels_in, groups)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.film_out = Film(dim, channels, groups)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        x: Tensor = self.conv_in(self.film_in(state, z))
        x = F.interpolate(
            x,
            scale_factor=2.0,
            mode=self.upsample,
            align_corners=False if self.upsample == "bilinear" else None,
        )
        x = self.conv_out(self.film_out(x, z))
        return x


class FilmGenerator(MLVGM):
    """The architecture of the bundled ``fashion`` generator."""

    FORMAT = "mlviews.film"

    def __init__(self, config: FilmConfig | None = None) -> None:
        config = config or FilmConfig()
        blocks: list[nn.Module] = [
            FirstBlock(config.dims[0], config.channels[0], config.groups, config.deep_first)
        ]
        for dim, before, channels in zip(config.dims[1:], config.channels, config.channels[1:], strict=False):
            blocks.append(UpBlock(dim, before, channels, config.groups, config.upsample))
        levels = [Level(f"{4 * 2**i}x{4 * 2**i}", (dim,)) for i, dim in enumerate(config.dims)]
        super().__init__(blocks, levels, (config.image_channels, config.image_size, config.image_size))
        self.config = config
        self.norm = nn.GroupNorm(config.groups, config.channels[-1])
        self.rgb = nn.Conv2d(config.channels[-1], config.image_channels, 3, padding=1)
        for weight in self.parameters():
            if weight.ndim == 4:  # the faster layout on a CPU
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def to_image(self, state: Tensor) -> Tensor:
        return torch.sigmoid(self.rgb(F.leaky_relu(self.norm(state), 0.2, inplace=True)))

    @classmethod
    def load(cls, path: str | Path) -> FilmGenerator:
        """Read a file that ``python -m mlviews.zoo.train`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        tensors, metadata = weights.read_safetensors(path, cls.FORMAT)

        def build() -> FilmGenerator:
            stored = json.loads(metadata["config"])
            options: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
            }
            return cls(FilmConfig(**options))

        return weights.fit(build, tensors, path)
