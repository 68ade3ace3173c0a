"""The cells of NVAE: residual cells, their operations, and their skip connections."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.nvae.config import NVAEConfig

RESIDUAL = ("res_elu", "res_bnelu", "res_bnswish", "res_bnswish5")
INVERTED = re.compile(r"mconv_e([1-9])k(3|5|7|9|11)g(0|[1-9]\d?)")


class Cell(nn.Module):
    """A residual cell: ``skip(x) + operations(x)``; the paper's factor of 0.1 is in the weights.

    Args:
        config: the network's architecture, which names the operations of this kind of cell.
        role: the kind of cell, one of ``ROLES``.
        before: channels of the input.
        after: channels of the output.
    """

    def __init__(self, config: NVAEConfig, role: str, before: int, after: int) -> None:
        super().__init__()
        stride = 1
        self.skip: nn.Module | None = None
        if role.startswith("down_"):
            stride = 2
            self.skip = Down(before, after, config.skip)
        elif role.startswith("up_"):
            stride = -1
            self.skip = Up(before, after)
        # The first operation changes the channels and the size.
        operations: list[nn.Module] = []
        for index, kind in enumerate(config.cells[role]):
            if index == 0:
                operations.append(_operation(kind, before, after, stride, first=True))
            else:
                operations.append(_operation(kind, after, after, 1, first=False))
        self.operations = nn.Sequential(*operations)
        self.gate = Gate(after) if config.gated else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.operations(x)
        if self.gate is not None:
            y = self.gate(y)
        if self.skip is not None:
            x = self.skip(x)
        return x + y


def _operation(kind: str, before: int, after: int, stride: int, *, first: bool) -> nn.Module:
    """Return an operation by its name; a stride of 2 halves the size, one of -1 doubles it."""
    inverted = INVERTED.fullmatch(kind)
    if inverted:
        expand, kernel, groups = map(int, inverted.groups())
        return Inverted(before, after, stride, expand, kernel, groups)
    if kind in RESIDUAL:
        return Residual(before, after, stride, kind, first=first)
    raise ValueError(f"Unknown operation {kind!r} of a cell.")


# -- operations ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """(Affine,) activation, (upsampling,) convolution: the operations of ``RESIDUAL``."""

    def __init__(self, before: int, after: int, stride: int, kind: str, *, first: bool) -> None:
        super().__init__()
        self.swish = "swish" in kind
        # A later operation's batch norm is part of the convolution before it.
        self.norm = Affine(before) if first and "bn" in kind else None
        reach = 2 if kind.endswith("5") else 1  # "5": three taps that span five pixels
        self.conv: nn.Module
        if stride < 0:
            self.conv = up_conv(before, after, reach)
        else:
            self.conv = nn.Conv2d(before, after, 3, stride, padding=reach, dilation=reach)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        x = F.silu(x) if self.swish else F.elu(x)
        x = self.conv(x)
        return x


class Inverted(nn.Module):
    """``mconv_e6k5g0`` and the like: expand by 1x1, (upsample,) filter depthwise, contract by 1x1.

    The name gives the factor of expansion, the kernel and the convolution's groups, 0 for one per channel
    (paper, fig. 3a).
    """

    def __init__(self, before: int, after: int, stride: int, expand: int, kernel: int, groups: int) -> None:
        super().__init__()
        hidden = before * expand
        groups = groups or hidden
        reach = kernel // 2
        # The expansion is before the upsampling, with which a 1x1 convolution and an activation commute.
        self.expand = nn.Conv2d(before, hidden, 1)
        self.filter: nn.Module
        if stride < 0:
            self.filter = up_conv(hidden, hidden, reach, groups)
        else:
            self.filter = nn.Conv2d(hidden, hidden, kernel, stride, reach, groups=groups)
        self.contract = nn.Conv2d(hidden, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.expand(x))
        x = F.silu(self.filter(x))
        x = self.contract(x)
        return x


class Affine(nn.Module):
    """Scale and shift of each channel, ``[B, C, H, W] -> [B, C, H, W]``.

    They are what is left of a batch norm with fixed statistics.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018), ``[B, C, H, W] -> [B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.squeeze(x.mean((2, 3))))  # [B, hidden]
        share = torch.sigmoid(self.excite(hidden))  # [B, C]
        return x * share[:, :, None, None]


# -- halving and doubling ------------------------------------------------------------------------------------


class Down(nn.Module):
    """The skip connection of a cell that halves the size."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.silu(x))
        return x


class Up(nn.Module):
    """The skip connection of a cell that doubles the size.

    Its 1x1 convolution commutes with the interpolation, and comes first.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)


def up_conv(before: int, after: int, reach: int, groups: int = 1) -> nn.ConvTranspose2d:
    """Return nearest-neighbor upsampling and a convolution as one transposed convolution; see :func:`widen`.

    Args:
        before: channels of the input.
        after: channels of the output.
        reach: the convolution has ``2 * reach + 1`` taps a side.
        groups: groups of the convolution.
    """
    return nn.ConvTranspose2d(before, after, 2 * reach + 2, 2, reach, groups=groups)


def widen(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the weight of :func:`up_conv` from that of the convolution after the upsampling.

    An output pixel sees each input pixel through those taps that fall on its two (by two) copies: their sum
    is one wider tap.

    Args:
        weight: ``[O, I / groups, k, k]``.
        groups: groups of the convolution.

    Returns:
        ``[I, O / groups, k + 1, k + 1]``.
    """
    side = weight.shape[-1]
    # Each tap of the wide kernel is the sum of two neighbors of the narrow one's.
    taps = torch.eye(side, device=weight.device, dtype=weight.dtype).flip(0)  # [k, k]
    sums = F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))  # [k, k + 1]
    wide: Tensor = sums.T @ weight @ sums  # [O, I / groups, k + 1, k + 1]
    # A transposed convolution has its weight's input channels first.
    wide = wide.unflatten(0, (groups, -1))  # [groups, O / groups, I / groups, k + 1, k + 1]
    return wide.transpose(1, 2).flatten(0, 1)
