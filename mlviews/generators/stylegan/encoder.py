"""The encoders of pSp and e4e: images to W+ codes (Richardson et al. 2021, sec. 3; Tov et al. 2021, sec. 4).

A residual network (IR-SE-50, from face recognition) is followed by a small feature pyramid, of whose three
maps each style reads one by a head of its own. Batch norms are folded into convolutions, or into a scale and
a shift where a padded convolution comes after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.stylegan.mapping import Linear

UNITS = (3, 4, 14, 3)
"""Residual units in each of the four stages; every stage halves the image's sides."""

HEAD_STYLES = (3, 7)
"""The first styles that read the middle and the fine map of the pyramid; those before read the coarse one."""

HEAD_DEPTHS = (4, 5, 6)
"""Convolutions of a head that reads the coarse, the middle and the fine map."""


@dataclass(frozen=True)
class StyleEncoderConfig:
    """Architecture of a :class:`StyleEncoder`."""

    styles: int = 18
    w_dim: int = 512
    channels: tuple[int, ...] = (64, 64, 128, 256, 512)  # of the first convolution, and of the four stages
    reduction: int = 16  # channels of a stage for each one that its squeeze-and-excitation has
    heads: bool = True  # a head for each style; False: one linear map, and all styles are equal
    relative: bool = True  # whether heads after the first give differences from its style (e4e)
    size: tuple[int, int] = (256, 256)  # rows and columns that images are brought to
    margin: int = 0  # rows above and below that are cut off before


class ScaleShift(nn.Module):
    """A batch norm with fixed statistics: ``x [B, C, H, W] -> scale x + shift``, channel by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift[:, None, None], x, self.scale[:, None, None])


class ResidualUnit(nn.Module):
    """A unit of an IR-SE network (Deng et al. 2019), ``[B, I, H, W] -> [B, O, H / stride, W / stride]``."""

    def __init__(self, channels_in: int, channels: int, reduction: int, stride: int) -> None:
        super().__init__()
        squeezed = channels // reduction
        self.stride = stride
        self.norm = ScaleShift(channels_in)
        self.first = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.slope = nn.PReLU(channels)
        self.second = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.excite = nn.Conv2d(squeezed, channels, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(self.slope(self.first(self.norm(x))))
        # Squeeze and excitation: each channel times a factor that follows from the means of all.
        means = change.mean((2, 3), keepdim=True)  # [B, O, 1, 1]
        change = change * self.excite(F.relu(self.squeeze(means))).sigmoid()
        if self.shortcut is None:
            return change + x[:, :, :: self.stride, :: self.stride]
        shortcut: Tensor = self.shortcut(x)
        return change + shortcut


class Head(nn.Module):
    """The part of a style, ``[B, C, H, W] -> [B, w_dim]``; convolutions halve the sides until they are 1."""

    def __init__(self, channels: int, w_dim: int, depth: int) -> None:
        super().__init__()
        widths = [channels, *[w_dim] * depth]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, padding=1) for before, after in pairwise(widths)
        )
        self.linear = Linear(w_dim, w_dim)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), 0.01)
        code: Tensor = self.linear(x.flatten(1))
        return code


class StyleEncoder(nn.Module):
    """From images to W+ codes: float ``[B, 3, H, W]`` in [0, 1] ``-> [B, styles, w_dim]``.

    Args:
        config: the architecture.
    """

    average: Tensor

    def __init__(self, config: StyleEncoderConfig) -> None:
        super().__init__()
        self.config = config
        stem, *widths = config.channels
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.stem_slope = nn.PReLU(stem)
        self.stages = nn.ModuleList()
        before = stem
        for width, units in zip(widths, UNITS, strict=True):
            first = ResidualUnit(before, width, config.reduction, 2)
            rest = (ResidualUnit(width, width, config.reduction, 1) for _ in range(units - 1))
            self.stages.append(nn.Sequential(first, *rest))
            before = width
        self.laterals = nn.ModuleList()
        self.heads = nn.ModuleList()
        self.linear: nn.Module | None = None
        if config.heads:
            self.laterals.extend(nn.Conv2d(width, before, 1) for width in (widths[2], widths[1]))
            self.heads.extend(Head(before, config.w_dim, depth) for depth in head_depths(config.styles))
        else:
            self.linear = Linear(before, config.w_dim)
        self.register_buffer("average", torch.zeros(config.styles, config.w_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem_slope(self.stem(self.pixels(images)))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        codes = self._codes(maps) if self.linear is None else self.linear(x.mean((2, 3)))[:, None]
        return codes + self.average  # [B, styles, w_dim]

    def pixels(self, images: Tensor) -> Tensor:
        """Return the images as the encoder's files expect them: cut, scaled with antialiasing, in [-1, 1]."""
        rows = images.shape[2]
        images = images[:, :, self.config.margin : rows - self.config.margin]
        if images.shape[2:] != self.config.size:
            images = F.interpolate(images, self.config.size, mode="bilinear", antialias=True)
        return images * 2 - 1

    def _codes(self, maps: Sequence[Tensor]) -> Tensor:
        """Return what the heads make of the maps of the four stages, ``[B, styles, w_dim]``."""
        _, fine, middle, coarse = maps
        pyramid = [coarse]
        for lateral, finer in zip(self.laterals, (middle, fine), strict=True):
            side = lateral(finer)
            raised = F.interpolate(pyramid[-1], side.shape[2:], mode="bilinear", align_corners=True)
            pyramid.append(raised + side)
        codes = [head(pyramid[depth - HEAD_DEPTHS[0]]) for head, depth in self._heads_and_depths()]
        if self.config.relative:
            codes[1:] = [codes[0] + code for code in codes[1:]]
        return torch.stack(codes, dim=1)

    def _heads_and_depths(self) -> zip[tuple[nn.Module, int]]:
        return zip(self.heads, head_depths(self.config.styles), strict=True)


def head_depths(styles: int) -> list[int]:
    """Return the number of convolutions in the head of each style."""
    return [HEAD_DEPTHS[sum(style >= first for first in HEAD_STYLES)] for style in range(styles)]
