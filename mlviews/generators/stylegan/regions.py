"""The part of an image that a layer computes: with a crop, no layer computes a pixel that nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer


class Span(NamedTuple):
    """The rows or columns from ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """The number of rows or columns."""
        return self.stop - self.start

    def grown(self, by: int, limit: int | None = None) -> Span:
        """Return the span with a halo of ``by`` pixels; inside ``[0, limit)``, if a limit is given."""
        if limit is None:
            return Span(self.start - by, self.stop + by)
        return Span(max(self.start - by, 0), min(self.stop + by, limit))

    @property
    def even(self) -> Span:
        """The smallest span around this one with even ends."""
        return Span(self.start // 2 * 2, (self.stop + 1) // 2 * 2)

    @property
    def halved(self) -> Span:
        """The pixels of half the resolution that upsampling by a 4-tap filter reads for this span.

        They are the same whether a 3x3 kernel comes before the filter or not.
        """
        return Span(self.start // 2 - 1, (self.stop + 1) // 2 + 1)


class Region(NamedTuple):
    """A rectangle of an image."""

    rows: Span
    columns: Span

    def padding_for(self, rows: Span, columns: Span) -> tuple[int, int, int, int]:
        """Return the sides ``(left, right, above, below)`` that F.pad adds to an image of this region.

        The padded image has the given rows and columns. A negative side is cut off.
        """
        return (
            self.columns.start - columns.start,
            columns.stop - self.columns.stop,
            self.rows.start - rows.start,
            rows.stop - self.rows.stop,
        )


class Regions(NamedTuple):
    """The regions that are computed at one resolution."""

    first: Region  # of the upsampling convolution's output
    second: Region  # of the other convolution's output
    image: Region


def needed_regions(sizes: Sequence[tuple[int, int]], region: Region) -> list[Regions]:
    """Return what the pixels of ``region`` depend on at each resolution.

    The regions are worked out from the last layer back to the first.

    Args:
        sizes: rows and columns at each resolution, from the first to the last, each twice those before.
        region: of the image at the last resolution.
    """
    regions: list[Regions] = []
    second = image = region
    for index in reversed(range(len(sizes))):
        # The 3x3 convolution reads a halo of one pixel; upsampling makes pixels in pairs.
        first = Region(*(span.grown(1, size).even for span, size in zip(second, sizes[index], strict=True)))
        regions.insert(0, Regions(first, second, image))
        if index == 0:
            break
        # What upsampling reads, of the features and of the image.
        before = sizes[index - 1]
        second = Region(*(span.halved.grown(0, size) for span, size in zip(first, before, strict=True)))
        image = Region(*(span.halved.grown(0, size) for span, size in zip(image, before, strict=True)))
    return regions


def visible(whole: tuple[int, int], crop: Any, size: Any) -> tuple[Region, tuple[int, int]]:
    """Return the part of the image that is computed, and how many of its rows and columns make one pixel.

    Args:
        whole: rows and columns of the whole image.
        crop: rows and columns (or one number for both) of the centre crop; None for the whole image.
        size: rows and columns (or one number) after averaging; None for those of the crop.

    Raises:
        ValueError: if a crop is odd or too large, or a size does not divide it.
    """
    crops = _pair("crop", whole if crop is None else crop, whole)
    sizes = _pair("size", crops if size is None else size, whole)
    spans, pool = [], []
    for side, cropped, pixels in zip(whole, crops, sizes, strict=True):
        if cropped % 2:
            raise ValueError(f"Invalid crop={crop!r}: rows and columns of a centre crop must be even.")
        if cropped % pixels:
            raise ValueError(
                f"Invalid size={size!r}: it must divide the {cropped} pixels that are left of the image "
                f"({side} before the crop)."
            )
        spans.append(Span((side - cropped) // 2, (side + cropped) // 2))
        pool.append(cropped // pixels)
    return Region(spans[0], spans[1]), (pool[0], pool[1])


def _pair(name: str, value: Any, limits: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns from two numbers, or from one for both."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return integer(name, value[0], 1, limits[0]), integer(name, value[1], 1, limits[1])
    side = integer(name, value, 1, min(limits))
    return side, side


def cropped(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Return a view without the pixels that negative (left, right, above, below) of F.pad cut off."""
    left, right, above, below = (max(-side, 0) for side in sides)
    return x[:, :, above : x.shape[2] - below, left : x.shape[3] - right]


def padded(x: Tensor, sides: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """Return the tensor with the zeros of positive (left, right, above, below), and the padding that is left.

    If a convolution can add the zeros itself, the tensor is returned as it is, and the padding is theirs.
    """
    left, right, above, below = (max(side, 0) for side in sides)
    if left == right and above == below:
        return x, (above, left)
    return F.pad(x, (left, right, above, below)), (0, 0)
