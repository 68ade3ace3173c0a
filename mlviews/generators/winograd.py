"""3x3 convolutions as matrix products: minimal filtering F(4x4, 3x3) (Winograd 1980; Lavin and Gray 2016), for CPUs.

An output tile of 4x4 pixels takes 36 multiplications per pair of channels instead of 144. Tiles are gathered from the
input, 36 linear forms of each are taken, channels are mixed by 36 matrix products, and 16 linear forms of the results
are the output's pixels. Upsampling before the convolution is linear in the input too, so it merges with the forms of
the tile. In float32, it rounds five to ten times as much as the plain convolution: about 1e-5 of the output's standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE = 4  # output pixels of a tile's side
FORMS = TILE + 2  # per axis
# Where the polynomials of Toom-Cook are evaluated, besides infinity: found by trial, they round half as much as the usual 0, ±1, ±2.
_POINTS = (0.0, 0.7, -0.7, 1.5, -1.5)
# Values of a strip of tiles: more would not stay in the processor's cache; fewer columns would read the weights too often.
_STRIP, _MIN_COLUMNS = 1 << 20, 96


def _powers(degree: int) -> Tensor:
    """Polynomials of ``degree`` coefficients at every point: float64 ``[6, degree]``."""
    rows = [[point**power for power in range(degree)] for point in _POINTS] + [[0.0] * (degree - 1) + [1.0]]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def weight_forms(weight: Tensor) -> Tensor:
    """Weights ``[O, I, 3, 3]`` of a correlation as the 36 matrices ``[36, O, I]`` that mix channels."""
    axis = _powers(3)
    forms = torch.einsum("ai,bj,ocij->aboc", axis, axis, weight.double())
    return forms.flatten(0, 1).float().contiguous()


def input_forms(taps: tuple[Sequence[float], Sequence[float]] | None = None) -> Tensor:
    """The 36 forms ``[36, patch**2]`` of an input patch.

    Without ``taps``, a patch is the 6x6 pixels that an output tile depends on. With the four taps of a filter for rows and
    for columns, the input is upsampled by 2 first (zeros between pixels, then correlation with the taps), and a patch is
    the 4x4 pixels, from the one before the tile's corner, that the tile depends on.
    """
    axis = torch.linalg.inv(_powers(FORMS)).T
    if taps is None:
        return torch.kron(axis, axis).float()
    # Pixel p of the upsampled axis, counted from two before the tile, takes tap j of pixel i where 2i = p - 1 + j.
    upsample = [
        [[side[j] if 0 <= (j := 2 * i - p + 1) < 4 else 0.0 for i in range(4)] for p in range(FORMS)]
        for side in taps
    ]
    rows, columns = (axis @ torch.tensor(matrix, dtype=torch.float64, device="cpu") for matrix in upsample)
    return torch.kron(rows, columns).float()


def output_forms() -> Tensor:
    """The pixels of an output tile from the mixed forms: ``[16, 36]``."""
    axis = _powers(TILE).T
    return torch.kron(axis, axis).float()


@torch.no_grad()
def convolve(
    x: Tensor,
    weight: Tensor,
    forms: Tensor,
    pixels: Tensor,
    size: tuple[int, int],
    finish: Callable[[Tensor, slice, slice], object],
) -> Tensor:
    """The convolution of an input that is padded so that patches begin at its corner and cover it.

    Args:
        x: float32 ``[B, I, h, w]``, on the CPU.
        weight: :func:`weight_forms`.
        forms: :func:`input_forms`.
        pixels: :func:`output_forms`.
        size: rows and columns of the output.
        finish: called once with every part of the output ``[b, O, rows, columns]``, its samples and its rows, while it is in
            the cache; may change it in place.

    Returns:
        float32 ``[B, O, *size]``.
    """
    patch = math.isqrt(forms.shape[1])
    step = TILE if patch == FORMS else TILE // 2
    down, across = -(-size[0] // TILE), -(-size[1] // TILE)
    out_channels, channels = weight.shape[1:]
    whole = x.new_empty(len(x), out_channels, down * TILE, across * TILE)
    patches = (
        x.unfold(2, patch, step).unfold(3, patch, step).permute(4, 5, 1, 0, 2, 3)
    )  # [patch, patch, I, B, down, across]
    tiles = whole.view(len(x), out_channels, down, TILE, across, TILE).permute(
        3, 5, 1, 0, 2, 4
    )  # [4, 4, O, B, down, across]
    columns = max(_STRIP // (FORMS**2 * max(channels, out_channels)), _MIN_COLUMNS)
    rows = min(down, -(-columns // across))
    batch = min(len(x), max(1, columns // (down * across)))
    sizes = (patch**2 * channels, FORMS**2 * channels, FORMS**2 * out_channels, TILE**2 * out_channels)
    rooms = [x.new_empty(each * batch * rows * across) for each in sizes]  # to be used again for each part
    for first in range(0, len(x), batch):
        samples = slice(first, min(first + batch, len(x)))
        for row in range(0, down, rows):
            part = slice(row, min(row + rows, down))
            shape = (samples.stop - first, part.stop - row, across)
            n = math.prod(shape)
            gathered, taken, mixed, made = (room[: each * n] for room, each in zip(rooms, sizes, strict=True))
            gathered.view(patch, patch, channels, *shape).copy_(patches[:, :, :, samples, part, :across])
            torch.mm(forms, gathered.view(patch**2, -1), out=taken.view(FORMS**2, -1))
            torch.bmm(weight, taken.view(FORMS**2, channels, n), out=mixed.view(FORMS**2, out_channels, n))
            torch.mm(pixels, mixed.view(FORMS**2, -1), out=made.view(TILE**2, -1))
            tiles[:, :, :, samples, part].copy_(made.view(TILE, TILE, out_channels, *shape))
            seen = slice(row * TILE, min(part.stop * TILE, size[0]))
            finish(whole[samples, :, seen, : size[1]], samples, seen)
    return whole[:, :, : size[0], : size[1]]
