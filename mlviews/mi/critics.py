"""Residual networks that look at images (He et al. 2016): the critics that measure mutual information.

The encoders of :mod:`mlviews.evaluation.learner` are made of the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlviews.checks import integer


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut: ``[B, C', H, W] -> [B, C, H / stride, W / stride]``.

    Args:
        channels_in: C'.
        channels: C.
        stride: 1, or 2 to halve the sides.
        norm: makes the normalization layer for a number of channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            norm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            norm(channels),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1:
            self.skip = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(channels_in, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class ImageTrunk(nn.Module):
    """ResNet-18's four stages, sized to the image: images ``[B, C, H, W]`` in [0, 1] -> features ``[B,
    features]``.

    The norms are group norms: the features of an image then depend on that image alone, as the bound on
    mutual information presumes (with batch norms they would depend on the other candidates), and processes
    have no statistics to synchronise.

    Args:
        image_shape: ``(C, H, W)``.
        width: the channels of the first stage, doubled by each later one. None: 64, as ResNet-18, for sides
            above 64 pixels, else 16, which a CPU can train.

    Raises:
        ValueError: if the width is not a positive multiple of 8.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int | None = None) -> None:
        super().__init__()
        channels, side = image_shape[0], max(image_shape[1:])
        is_large = side > 64
        if width is None:
            width = 64 if is_large else 16
        width = integer("width", width, 8)
        if width % 8:
            raise ValueError(f"Invalid width={width}: the group norms need a multiple of 8.")
        if is_large:
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 7, 2, 3)]
        else:
            layers = [nn.Conv2d(channels, width, 3, 2 if side > 16 else 1, 1)]
        if side > 32:
            layers.append(nn.MaxPool2d(3, 2, 1))
        before = width
        for stage in range(4):
            after = width << stage
            layers.append(Residual(before, after, 1 if stage == 0 else 2, _group_norm))
            layers.append(Residual(after, after, 1, _group_norm))
            before = after
        grid = 2 if side > 8 else 1  # the side of the pooled features
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten())
        self.features = before * grid**2
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        centered = 2 * images - 1
        features: Tensor = self.body(centered.contiguous(memory_format=torch.channels_last))
        return features


class ImageCritic(nn.Module):
    """A trunk and an MLP head: images ``[B, C, H, W]`` in [0, 1] -> embeddings ``[B, dim]``.

    The paper's (sec. 3.1) is a ResNet-18 with embeddings of 128.

    Args:
        image_shape: ``(C, H, W)``.
        width: the width of the :class:`ImageTrunk`.
        dim: the size of the embeddings.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int | None = None, dim: int = 128) -> None:
        super().__init__()
        self.trunk = ImageTrunk(image_shape, width)
        self.head = nn.Sequential(
            nn.Linear(self.trunk.features, 2 * dim), nn.ReLU(inplace=True), nn.Linear(2 * dim, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.head(self.trunk(images))
        return embedding


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)
