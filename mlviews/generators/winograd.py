"""3x3 convolutions as matrix products, for CPUs: minimal filtering F(4x4, 3x3).

This is Winograd (1980), as Lavin and Gray (2016) use it. An output tile of 4x4 pixels takes 36
multiplications per pair of channels instead of 144. Tiles are gathered from the input, 36 linear forms of
each are taken, channels are mixed by 36 matrix products, and 16 linear forms of the results are the output's
pixels. Upsampling before the convolution is linear in the input too, so it merges with the forms of the tile.
In float32, it rounds five to ten times as much as the plain convolution: about 1e-5 of the output's standard
deviation.

Images whose channels come first go through :func:`convolve`, those whose channels come last through
:func:`convolve_last`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE = 4  # output pixels of a tile's side
FORMS = TILE + 2  # per axis
# Where the polynomials of Toom-Cook are evaluated, besides infinity: found by trial, they round half as much
# as the usual 0, ±1, ±2.
_POINTS = (0.0, 0.7, -0.7, 1.5, -1.5)

_STRIP = 1 << 20  # values of a strip of tiles: more would not stay in the processor's cache
_MIN_TILES = 96  # of a strip: fewer would read the weights too often


# -- linear forms


def _powers(degree: int) -> Tensor:
    """Return the powers of every point, from 0 to below ``degree``: float64 ``[6, degree]``."""
    rows = [[point**power for power in range(degree)] for point in _POINTS]
    # At infinity, only the highest power counts.
    rows.append([0.0] * (degree - 1) + [1.0])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def weight_forms(weight: Tensor) -> Tensor:
    """Return weights ``[O, I, 3, 3]`` of a correlation as the matrices ``[36, O, I]`` that mix channels."""
    axis = _powers(3)
    forms = torch.einsum("ai,bj,ocij->aboc", axis, axis, weight.double())
    return forms.flatten(0, 1).float().contiguous()


def input_forms(taps: tuple[Sequence[float], Sequence[float]] | None = None) -> Tensor:
    """Return the 36 forms ``[36, patch**2]`` of an input patch.

    Without ``taps``, a patch is the 6x6 pixels that an output tile depends on. With the four taps of a filter
    for rows and for columns, the input is upsampled by 2 first (zeros between pixels, then correlation with
    the taps), and a patch is the 4x4 pixels, from the one before the tile's corner, that the tile depends on.
    """
    axis = torch.linalg.inv(_powers(FORMS)).T
    if taps is None:
        return torch.kron(axis, axis).float()
    rows, columns = (axis @ _upsampling(side) for side in taps)
    return torch.kron(rows, columns).float()


def _upsampling(taps: Sequence[float]) -> Tensor:
    """Return what makes 6 pixels of an upsampled axis from 4 of the input: float64 ``[6, 4]``."""
    matrix = torch.zeros(FORMS, 4, dtype=torch.float64, device="cpu")
    for p in range(FORMS):
        for i in range(4):
            # Pixel p of the upsampled axis, counted from two before the tile, takes tap j of pixel i where
            # 2i = p - 1 + j.
            j = 2 * i - p + 1
            if 0 <= j < 4:
                matrix[p, i] = taps[j]
    return matrix


def output_forms() -> Tensor:
    """Return what makes the pixels of an output tile from the mixed forms: ``[16, 36]``."""
    axis = _powers(TILE).T
    return torch.kron(axis, axis).float()


# -- convolutions


@torch.no_grad()
def convolve(
    x: Tensor,
    weight: Tensor,
    forms: Tensor,
    pixels: Tensor,
    size: tuple[int, int],
    finish: Callable[[Tensor, slice, slice], object],
) -> Tensor:
    """Return the convolution of an input that is padded so that patches begin at its corner and cover it.

    Args:
        x: float32 ``[B, I, h, w]``, on the CPU.
        weight: :func:`weight_forms`.
        forms: :func:`input_forms`.
        pixels: :func:`output_forms`.
        size: rows and columns of the output.
        finish: called once with every part of the output ``[b, O, rows, columns]``, its samples and its rows,
            while it is in the cache; may change it in place.

    Returns:
        float32 ``[B, O, *size]``.
    """
    patch = math.isqrt(forms.shape[1])
    step = TILE if patch == FORMS else TILE // 2
    down, across = -(-size[0] // TILE), -(-size[1] // TILE)
    out_channels = weight.shape[1]

    patches = x.unfold(2, patch, step).unfold(3, patch, step)  # [B, I, h', w', patch, patch]
    patches = patches[:, :, :down, :across].permute(4, 5, 1, 0, 2, 3)  # [patch, patch, I, B, down, across]
    whole = x.new_empty(len(x), out_channels, down * TILE, across * TILE)
    tiles = whole.view(len(x), out_channels, down, TILE, across, TILE)
    tiles = tiles.permute(3, 5, 1, 0, 2, 4)  # [4, 4, O, B, down, across]

    def finish_strip(samples: slice, rows: slice) -> None:
        pixel_rows = slice(rows.start * TILE, min(rows.stop * TILE, size[0]))
        finish(whole[samples, :, pixel_rows, : size[1]], samples, pixel_rows)

    _filter(patches, forms, weight, pixels, tiles, channels_last=False, finish=finish_strip)
    return whole[:, :, : size[0], : size[1]]


@torch.no_grad()
def convolve_last(x: Tensor, weight: Tensor, forms: Tensor, pixels: Tensor, step: int) -> Tensor:
    """Return the convolution of a padded input whose channels come last.

    Args:
        x: float32 ``[B, h, w, I]``, on the CPU.
        weight: a matrix for each form ``[forms, I, O]``.
        forms: the forms of a patch of ``s x s`` pixels, ``[forms, s**2]``.
        pixels: what makes the ``t x t`` pixels of an output tile from the mixed forms, ``[t**2, forms]``.
        step: pixels of the input from a patch to the next.

    Returns:
        float32 ``[B, down * t, across * t, O]``, of as many tiles as there are patches.
    """
    patch, side = math.isqrt(forms.shape[1]), math.isqrt(len(pixels))
    out_channels = weight.shape[2]

    patches = x.unfold(1, patch, step).unfold(2, patch, step)  # [B, down, across, I, patch, patch]
    patches = patches.permute(4, 5, 0, 1, 2, 3)  # [patch, patch, B, down, across, I]
    images, down, across = patches.shape[2:5]
    whole = x.new_empty(images, down, side, across, side, out_channels)
    tiles = whole.permute(2, 4, 0, 1, 3, 5)  # [side, side, B, down, across, O]

    _filter(patches, forms, weight, pixels, tiles, channels_last=True)
    return whole.view(images, down * side, across * side, out_channels)


def _filter(
    patches: Tensor,
    forms: Tensor,
    weight: Tensor,
    pixels: Tensor,
    tiles: Tensor,
    *,
    channels_last: bool,
    finish: Callable[[slice, slice], object] | None = None,
) -> None:
    """Fill the output's tiles strip by strip, so that what a strip needs stays in the cache.

    Args:
        patches: ``[s, s, I, B, down, across]``, or ``[s, s, B, down, across, I]`` if channels come last; any
            strides.
        forms: ``[forms, s**2]``.
        weight: ``[forms, O, I]``, or ``[forms, I, O]`` if channels come last.
        pixels: ``[t**2, forms]``.
        tiles: ``[t, t, O, B, down, across]``, or ``[t, t, B, down, across, O]``; any strides.
        channels_last: which of the two.
        finish: called with the samples and the rows of tiles of every strip, once they are filled.
    """
    axis = 2 if channels_last else 3  # of the images; rows and columns of tiles follow
    images, down, across = patches.shape[axis : axis + 3]
    channels, out_channels = (weight[0] if channels_last else weight[0].T).shape
    count, squares, out_pixels = len(forms), forms.shape[1], len(pixels)

    # A strip is some rows of tiles of one image, or several images.
    most = max(_STRIP // (count * max(channels, out_channels)), _MIN_TILES)
    batch = min(images, max(1, most // (down * across)))
    height = min(down, -(-most // across))

    # Buffers that every strip uses again: values of a tile in each, times the tiles of a strip.
    sizes = (squares * channels, count * channels, count * out_channels, out_pixels * out_channels)
    buffers = [patches.new_empty(size * batch * height * across) for size in sizes]
    for first in range(0, images, batch):
        samples = slice(first, min(first + batch, images))
        for top in range(0, down, height):
            rows = slice(top, min(top + height, down))
            part = (*[slice(None)] * axis, samples, rows)
            strip, output = patches[part], tiles[part]
            n = strip.shape[axis : axis + 3].numel()
            gathered, formed, mixed, combined = (
                buffer[: size * n] for buffer, size in zip(buffers, sizes, strict=True)
            )
            # Gather the patches.
            gathered.view(strip.shape).copy_(strip)
            # Take their linear forms.
            torch.mm(forms, gathered.view(squares, -1), out=formed.view(count, -1))
            # Mix the channels, form by form.
            if channels_last:
                torch.bmm(formed.view(count, n, channels), weight, out=mixed.view(count, n, out_channels))
            else:
                torch.bmm(weight, formed.view(count, channels, n), out=mixed.view(count, out_channels, n))
            # Combine the results to pixels, and put these where they belong.
            torch.mm(pixels, mixed.view(count, -1), out=combined.view(out_pixels, -1))
            output.copy_(combined.view(output.shape))
            if finish is not None:
                finish(samples, rows)
