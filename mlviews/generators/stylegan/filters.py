"""A leaky ReLU between filters, so that it makes no frequency that pixels cannot hold (StyleGAN3, sec. 3.2).

The image is upsampled, activated, and downsampled again. Channels come last, because filters that treat all
channels alike then run through memory in order: on a CPU that is several times as fast. Upsampling is a
transposed convolution, which takes no tap times a zero, and downsampling is a convolution with a stride,
which computes no pixel that is thrown away. Separable filters run axis by axis. Without gradients, a CPU
works through one image after the other, in strips of rows that are upsampled while they fit into its cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.stylegan.mapping import SLOPE

_CACHED = 1 << 20  # values of a strip after upsampling
_MIN_ROWS = 8  # of a strip after downsampling: fewer would compute the rows that strips share too often


@dataclass(frozen=True)
class Resampling:
    """How an activation's image is upsampled before it, and downsampled after it."""

    up: int  # factor
    down: int  # factor
    up_taps: int  # of the separable filter on each axis
    down_taps: int  # of each axis
    is_radial: bool  # whether the downsampling filter is no product of one for rows and one for columns
    # Zeros before and after the upsampled rows, and columns; negative ones are cut off.
    padding: tuple[tuple[int, int], tuple[int, int]]

    def cut(self, axis: int) -> tuple[int, int]:
        """Return how much of the upsampling filter's full response is cut off before and after an axis."""
        before, after = self.padding[axis]
        # The full response to n pixels has (n - 1) * up + taps pixels; n * up with zeros in between have
        # up - 1 zeros more after the last pixel than before the first one.
        return self.up_taps - 1 - before, self.up_taps - self.up - after

    def between(self, size: int, axis: int) -> int:
        """Return the upsampled pixels of an axis of so many pixels."""
        return (size - 1) * self.up + self.up_taps - sum(self.cut(axis))

    def after(self, size: int, axis: int) -> int:
        """Return the pixels of an axis in the end."""
        return (self.between(size, axis) - self.down_taps) // self.down + 1


class FilteredActivation(nn.Module):
    """Upsampling, leaky ReLU and downsampling: ``x [B, h, w, C] -> [B, h', w', C]``.

    The gain of the activation is that of the upsampling filter, which comes before it: a leaky ReLU leaves
    factors as they are.

    Args:
        channels: C.
        resampling: the factors and filters.
        clamp: the largest absolute value between the filters; None for any.
    """

    up_filter: Tensor
    down_filter: Tensor

    def __init__(self, channels: int, resampling: Resampling, clamp: float | None) -> None:
        super().__init__()
        self.channels = channels
        self.resampling = resampling
        self.clamp = clamp
        taps = resampling.down_taps
        shape = (taps, taps) if resampling.is_radial else (taps,)
        # As a convolution's taps that scatter, and as a correlation's taps that gather.
        self.register_buffer("up_filter", torch.full([resampling.up_taps], 1 / resampling.up_taps))
        self.register_buffer("down_filter", torch.full(shape, 1 / torch.Size(shape).numel()))

    def forward(self, x: Tensor) -> Tensor:
        tracked = torch.is_grad_enabled() and x.requires_grad
        x = x.movedim(3, 1)  # [B, C, h, w], in the memory of [B, h, w, C]
        if tracked or torch.compiler.is_compiling() or x.device.type != "cpu":
            return self._rows(self._wide(x), 0, self.resampling.after(x.shape[2], 0), tracked).movedim(1, 3)
        return self._in_strips(x)

    def _in_strips(self, x: Tensor) -> Tensor:
        """Return the result image by image, in strips of rows: ``[B, C, h, w] -> [B, h', w', C]``."""
        height, width = (self.resampling.after(size, axis) for axis, size in enumerate(x.shape[2:]))
        result = x.new_empty(len(x), height, width, self.channels)
        row = self.resampling.between(x.shape[3], 1) * self.channels  # values of an upsampled row
        strip = max(_CACHED // (row * self.resampling.down), _MIN_ROWS)
        for image, output in zip(x.split(1), result, strict=True):
            wide = self._wide(image)
            for start in range(0, height, strip):
                stop = min(start + strip, height)
                output[start:stop] = self._rows(wide, start, stop, False)[0].movedim(0, 2)
        return result

    def _wide(self, x: Tensor) -> Tensor:
        """Return the image with its columns upsampled, ``[B, C, h, w'']``."""
        kernel = self.up_filter.to(x.dtype).expand(self.channels, 1, 1, -1)
        before, after = self.resampling.cut(1)
        shared = min(before, after)
        x = F.conv_transpose2d(
            x, kernel, stride=(1, self.resampling.up), padding=(0, shared), groups=self.channels
        )
        return x[..., before - shared : x.shape[3] - (after - shared)]

    def _rows(self, x: Tensor, start: int, stop: int, tracked: bool) -> Tensor:
        """Return some rows of the result, ``[B, C, stop - start, w']``; the columns are upsampled."""
        up, down = self.resampling.up, self.resampling.down
        taps = self.resampling.up_taps
        # The rows of the upsampling filter's full response that they need, and the pixels behind these.
        first = self.resampling.cut(0)[0] + start * down
        count = (stop - start - 1) * down + self.resampling.down_taps
        low = max(-((taps - 1 - first) // up), 0)
        high = min((first + count - 1) // up + 1, x.shape[2])
        kernel = self.up_filter.to(x.dtype).expand(self.channels, 1, -1)[..., None]
        x = F.conv_transpose2d(x[:, :, low:high], kernel, stride=(up, 1), groups=self.channels)
        x = x[:, :, first - low * up : first - low * up + count]  # [B, C, h'', w'']
        return self._lowered(self._activated(x, tracked))

    def _activated(self, x: Tensor, tracked: bool) -> Tensor:
        """Activate, in place unless gradients are needed."""
        x = F.leaky_relu(x, SLOPE, inplace=not tracked)
        if self.clamp is None:
            return x
        return x.clamp(-self.clamp, self.clamp) if tracked else x.clamp_(-self.clamp, self.clamp)

    def _lowered(self, x: Tensor) -> Tensor:
        """Return the image downsampled."""
        down, groups = self.resampling.down, self.channels
        taps = self.down_filter.to(x.dtype)
        if self.resampling.is_radial:
            return F.conv2d(x, taps.expand(groups, 1, -1, -1), stride=down, groups=groups)
        x = F.conv2d(x, taps.expand(groups, 1, 1, -1), stride=(1, down), groups=groups)
        return F.conv2d(x, taps.expand(groups, 1, -1)[..., None], stride=(down, 1), groups=groups)
