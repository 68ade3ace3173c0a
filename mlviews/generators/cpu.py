"""What is computed in another way on a CPU, where no gradient is asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fast(x: Tensor) -> bool:
    """Is this computed on a CPU in float32, as written here, and with no gradient to keep anything for?"""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def to_few_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the 3x3 convolution to one channel or a few, padded by zeros, as a single matrix product.

    A convolution's kernel works on many output channels at a time, and takes as long for one as for sixteen.
    Here the product makes nine maps of each output channel, one for each tap, which are shifted and added.

    Args:
        x: ``[B, C, H, W]``, channels-last.
        weight: ``[O, C, 3, 3]``.
        bias: ``[O]``.

    Returns:
        ``[B, O, H, W]``.
    """
    count, channels, height, width = x.shape
    taps = weight.permute(0, 2, 3, 1).reshape(-1, channels)  # [O * 9, C]
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # [B * H * W, C]
    maps = F.pad((taps @ pixels.T).view(-1, 9, count, height, width), (1, 1, 1, 1))
    out = bias[:, None, None, None].expand(-1, count, height, width).clone()  # [O, B, H, W]
    for tap in range(9):
        row, column = divmod(tap, 3)
        out += maps[:, tap, :, row : row + height, column : column + width]
    return out.transpose(0, 1)
