"""``film``: a small convolutional MLVGM, one block per resolution, each with a latent of its own.

Block 1 maps its latent to 4x4 features; every later block doubles the resolution, and its latent scales and
shifts the channels after each group norm (FiLM, Perez et al. 2018). A latent thus acts on everything that its
block draws, at that block's resolution and no coarser.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import choice, flag, integer
from mlviews.generators.base import MLVGM, Level
from mlviews.generators.cpu import fast, to_few_channels
from mlviews.weights import configs

_MOST_LEVELS = 10  # 2048 pixels
_WIDEST = 1 << 27  # channels, or scalars of a latent; products of them have to fit into 64 bits
_CACHED = 3 << 18  # values of an activation of one view: by trial, the fastest on a CPU


@dataclass(frozen=True)
class FilmConfig:
    """Architecture of a :class:`FilmGenerator`; one entry per level."""

    dims: tuple[int, ...] = (8, 16, 16, 16)  # scalars of each level's latent
    channels: tuple[int, ...] = (128, 112, 64, 24)  # of each block's output, at 4, 8, 16, 32 pixels
    deep_first: bool = (
        False  # a modulated convolution in block 1 too: the coarsest level decides more by itself
    )
    image_channels: int = 1
    groups: int = 8  # of the group norms
    upsample: str = "bilinear"  # or "nearest"

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together, and the layers take them.

        What a file says is bounded before anything is made of it.
        """
        if not 1 <= len(self.dims) == len(self.channels) <= _MOST_LEVELS:
            raise ValueError(
                f"Invalid dims and channels of {len(self.dims)} and {len(self.channels)} levels: "
                f"they are as many, from 1 to {_MOST_LEVELS}."
            )
        integer("groups", self.groups, 1, _WIDEST)
        integer("image_channels", self.image_channels, 1, _WIDEST)
        for dim in self.dims:
            integer("dims", dim, 1, _WIDEST)
        for width in self.channels:
            integer("channels", width, 1, _WIDEST)
            if width % self.groups:
                raise ValueError(f"Invalid channels={width}: they must be divisible by groups={self.groups}.")
        flag("deep_first", self.deep_first)
        choice("upsampling", self.upsample, ("bilinear", "nearest"))

    @property
    def image_size(self) -> int:
        """Pixels of one side."""
        return 4 * int(2 ** (len(self.dims) - 1))


class Film(nn.Module):
    """A group norm whose scale and shift come from a latent, then leaky ReLU.

    ``x [B, C, H, W], z [B, d] -> [B, C, H, W]``.
    """

    def __init__(self, dim: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.style = nn.Linear(dim, 2 * channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.style(z)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        x = torch.addcmul(shift, self.norm(x), 1 + scale)
        return F.leaky_relu(x, 0.2, inplace=True)


class FirstBlock(nn.Module):
    """``z [B, d] -> [B, C, 4, 4]``: a linear map, followed by a modulated convolution if ``deep``."""

    def __init__(self, dim: int, channels: int, groups: int, deep: bool) -> None:
        super().__init__()
        self.channels = channels
        self.linear = nn.Linear(dim, channels * 16)
        self.film = Film(dim, channels, groups) if deep else None
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if deep else None

    def forward(self, z: Tensor, state: Tensor | None) -> Tensor:
        x: Tensor = self.linear(z).view(-1, self.channels, 4, 4)  # [B, C, 4, 4]
        if self.film is not None and self.conv is not None:
            x = self.conv(self.film(x, z))
        return x


class UpBlock(nn.Module):
    """``z [B, d], state [B, C', H, W] -> [B, C, 2H, 2W]``; the first convolution is before the upsampling."""

    def __init__(self, dim: int, channels_in: int, channels: int, groups: int, upsample: str) -> None:
        super().__init__()
        self.upsample = upsample
        self.film_in = Film(dim, channels_in, groups)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.film_out = Film(dim, channels, groups)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        x: Tensor = self.conv_in(self.film_in(state, z))  # [B, C, H, W]
        align_corners = False if self.upsample == "bilinear" else None  # torch takes it for bilinear only
        x = F.interpolate(x, scale_factor=2.0, mode=self.upsample, align_corners=align_corners)
        x = self.conv_out(self.film_out(x, z))  # [B, C, 2H, 2W]
        return x


class FilmGenerator(MLVGM):
    """The architecture of the bundled ``fashion`` generator: images ``[B, C, H, W]`` in [0, 1].

    Args:
        config: the architecture; by default that of ``fashion``.
    """

    FORMAT = "mlviews.film"

    def __init__(self, config: FilmConfig | None = None) -> None:
        config = config or FilmConfig()
        first = FirstBlock(config.dims[0], config.channels[0], config.groups, config.deep_first)
        blocks: list[nn.Module] = [first]
        for dim, (before, channels) in zip(config.dims[1:], pairwise(config.channels), strict=False):
            blocks.append(UpBlock(dim, before, channels, config.groups, config.upsample))
        sides = [4 * 2**index for index in range(len(config.dims))]
        levels = [Level(f"{side}x{side}", (dim,)) for side, dim in zip(sides, config.dims, strict=True)]
        super().__init__(blocks, levels, (config.image_channels, config.image_size, config.image_size))
        self.config = config
        largest = max(width * side**2 for width, side in zip(config.channels, sides, strict=True))
        self.cached_samples = max(_CACHED // largest, 1)
        self.norm = nn.GroupNorm(config.groups, config.channels[-1])
        self.rgb = nn.Conv2d(config.channels[-1], config.image_channels, 3, padding=1)
        for weight in self.parameters():
            if weight.ndim == 4:  # this layout is the faster one on a CPU
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def to_image(self, state: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(state), 0.2, inplace=True)
        if fast(x) and self.rgb.bias is not None:
            return to_few_channels(x, self.rgb.weight, self.rgb.bias).sigmoid_()
        return torch.sigmoid(self.rgb(x))

    @classmethod
    def load(cls, path: str | Path) -> FilmGenerator:
        """Read a file that ``python -m mlviews.zoo.train`` or ``tune_film`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        return configs.load(path, cls.FORMAT, FilmConfig, cls)
