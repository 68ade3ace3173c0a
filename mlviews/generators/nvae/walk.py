"""The walk through a checkpoint's NVAE: what the layouts of :mod:`mlviews.generators.nvae.reading` share.

A walk names every tensor that the file must hold, with its shape, and makes ours of them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlviews.errors import WeightsError
from mlviews.generators.nvae.network import INVERTED, RESIDUAL, NVAEConfig, widen
from mlviews.weights.files import MOST_TENSORS, Refused
from mlviews.weights.reader import Facts

_LARGEST_TENSOR = 1 << 32  # values; the largest of a published network has less than 2**26


class Conv(NamedTuple):
    """A convolution's weight ``[O, I, k, k]`` and bias ``[O]``."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """A batch norm with fixed statistics, as scale and shift ``[C]``."""

    scale: Tensor
    shift: Tensor


Operation = tuple[list[Norm | None], list[Conv]]
"""The norms and the convolutions of a cell's operation, in order."""


class Pending(NamedTuple):
    """A convolution that waits for the norm after it: what :meth:`Walk.put` is to be called with."""

    name: str
    conv: Conv
    up: int
    dilate: bool


class GroupPlace(NamedTuple):
    """A latent group's place."""

    scale: int  # coarse to fine
    number: int  # in its scale, in the decoder's order, from 0
    step: int  # of the encoder that it meets


def after(conv: Conv, norm: Norm) -> Conv:
    """Return the convolution followed by the norm, as one convolution."""
    return Conv(conv.weight * norm.scale[:, None, None, None], conv.bias * norm.scale + norm.shift)


def before(norm: Norm, conv: Conv) -> Conv:
    """Return the norm followed by the 1x1 convolution, as one convolution.

    A larger one would see the shift in its padding.
    """
    weight = conv.weight * norm.scale[:, None, None]
    return Conv(weight, conv.bias + (conv.weight[:, :, 0, 0] * norm.shift).sum(1))


def causal_mask(outputs: int, inputs: int, kernel: int, strict: bool, mirror: bool) -> Tensor:
    """Return the mask ``[outputs, inputs, k, k]`` of an autoregressive convolution.

    It lets through the pixels before the center in raster order, and at the center the channels up to the
    output's own.

    Args:
        outputs: channels.
        inputs: channels; 1 for a depthwise convolution.
        kernel: k.
        strict: whether the output's own channel is left out at the center.
        mirror: whether the order of the pixels is turned around.
    """
    mask = torch.zeros(outputs, inputs, kernel * kernel)
    middle = kernel * kernel // 2
    mask[:, :, :middle] = 1
    units = min(outputs, inputs)  # channels are ordered in as many blocks
    row = torch.arange(outputs)[:, None] * units // outputs
    column = torch.arange(inputs) * units // inputs
    visible = column < row if strict else column <= row
    mask[:, :, middle] = visible.float()
    if mirror:
        mask = mask.flip(2)
    return mask.view(outputs, inputs, kernel, kernel)


# -- the walk


class Walk(ABC):
    """A walk through the network of a layout: reads the file's tensors, collects ours.

    Args:
        config: the architecture.
        tensors: of the file, in float32; None to learn only what it must hold, on the meta device.
        most: tensors that the network may have. Each setting is bounded, but their product is what counts: a
            short file can describe a network of millions.
    """

    def __init__(
        self, config: NVAEConfig, tensors: Mapping[str, Tensor] | None, most: int = MOST_TENSORS
    ) -> None:
        self.config, self.tensors, self.most = config, tensors, most
        self.expected: dict[str, tuple[int, ...]] = {}  # shapes of the file's tensors
        self.weights: dict[str, Tensor] = {}  # ours
        self.num_blocks = len(config.encoder) - config.scales  # of pre-processing, and of post-processing

    def read(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of the file.

        Raises:
            Refused: if the network has more tensors than the file, or one that is larger than any.
        """
        self.expected[name] = shape
        if len(self.expected) > self.most:
            raise Refused(f"a network of more than {self.most:,} tensors, which the file does not have")
        if math.prod(shape) > _LARGEST_TENSOR:
            raise Refused(f"a tensor {name} of shape {shape}")
        return torch.empty(shape, device="meta") if self.tensors is None else self.tensors[name]

    def put(self, name: str, conv: Conv, up: int = 0, dilate: bool = False) -> None:
        """Put a convolution among our weights.

        Args:
            name: of the layer.
            conv: its weight and bias.
            up: groups, if an upsampling before it is to be part of it.
            dilate: its taps are two pixels apart, which a convolution with upsampling has to spell out.
        """
        weight = conv.weight
        if up and dilate:
            weight = weight.new_zeros(*weight.shape[:2], 5, 5)
            weight[:, :, ::2, ::2] = conv.weight
        self.weights[f"{name}.weight"] = widen(weight, up) if up else weight
        self.weights[f"{name}.bias"] = conv.bias

    # What the layouts differ in.

    @abstractmethod
    def walk(self) -> None:
        """Go through all of the network."""

    @abstractmethod
    def conv(self, name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Conv:
        """Read a convolution with weight norm."""

    @abstractmethod
    def skip(self, name: str, inputs: int, outputs: int, stride: int) -> Conv:
        """Read the convolution of a skip connection that changes the size."""

    @abstractmethod
    def operation(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> Operation:
        """Read an operation of a cell."""

    @abstractmethod
    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        """Return the names of a cell's two gate layers."""

    # What they share.

    def norm(self, name: str, channels: int) -> Norm:
        """Read a batch norm."""
        weight = self.read(f"{name}.weight", channels)
        scale = weight / (self.read(f"{name}.running_var", channels) + 1e-5).sqrt()
        bias = self.read(f"{name}.bias", channels)
        return Norm(scale, bias - self.read(f"{name}.running_mean", channels) * scale)

    def plain(self, name: str, outputs: int, inputs: int, kernel: int) -> Conv:
        """Read a convolution without bias or weight norm."""
        weight = self.read(f"{name}.weight", outputs, inputs, kernel, kernel)
        return Conv(weight, weight.new_zeros(outputs))

    def inverted(self, names: Sequence[str], kind: str, inputs: int, outputs: int) -> Operation:
        """Read ``mconv_...``, whose seven layers have these names.

        They are norm, expand, norm, filter, norm, contract, norm.
        """
        match = INVERTED.fullmatch(kind)
        assert match is not None
        expand, kernel, groups = map(int, match.groups())
        hidden = inputs * expand
        widths = (inputs, hidden, hidden, outputs)
        norms: list[Norm | None] = [
            self.norm(name, width) for name, width in zip(names[::2], widths, strict=True)
        ]
        convs = [
            self.plain(names[1], hidden, inputs, 1),
            self.plain(names[3], hidden, hidden // groups if groups else 1, kernel),
            self.plain(names[5], outputs, hidden, 1),
        ]
        return norms, convs

    def cell(self, target: str, name: str, role: str, inputs: int, outputs: int, stride: int = 1) -> None:
        """Translate a residual cell.

        Every norm but a leading one goes into a convolution, the factor 0.1 into the last convolution.

        Args:
            target: our name of the cell.
            name: the file's.
            role: which of the kinds of cells it is.
            inputs: channels.
            outputs: channels.
            stride: 2 to halve the size, -1 to double it, 1 to leave it.
        """
        if stride != 1:
            self.put(f"{target}.skip.conv", self.skip(name, inputs, outputs, stride))
        pending: Pending | None = None
        for index, kind in enumerate(self.config.cells[role]):
            # The first operation changes width and size, as far as they change.
            width, step = (outputs, 1) if index else (inputs, stride)
            norms, convs = self.operation(name, role, index, width, outputs, step)
            operation = f"{target}.operations.{index}"
            if kind in RESIDUAL:
                pending = self._residual(operation, kind, norms[0], convs[0], step, pending)
            else:
                pending = self._inverted(operation, kind, norms, convs, step, pending)
        assert pending is not None
        last = Conv(0.1 * pending.conv.weight, 0.1 * pending.conv.bias)
        self.put(*pending._replace(conv=last))
        if self.config.gated:
            self._gate(f"{target}.gate", self.gate(name, role, stride), outputs)

    def _residual(
        self, name: str, kind: str, norm: Norm | None, conv: Conv, step: int, pending: Pending | None
    ) -> Pending:
        """Translate ``res_...``: a norm, which some kinds do not have, and a convolution."""
        if norm is not None and pending is None:
            self.weights[f"{name}.norm.scale"] = norm.scale[:, None, None]
            self.weights[f"{name}.norm.shift"] = norm.shift[:, None, None]
        if norm is not None and pending is not None:
            pending = pending._replace(conv=after(pending.conv, norm))
        if pending is not None:
            self.put(*pending)
        return Pending(f"{name}.conv", conv, int(step < 0), kind.endswith("5"))

    def _inverted(
        self,
        name: str,
        kind: str,
        norms: Sequence[Norm | None],
        convs: Sequence[Conv],
        step: int,
        pending: Pending | None,
    ) -> Pending:
        """Translate ``mconv_...``.

        Its first norm goes into the convolution after it, the others into those before.
        """
        if pending is not None:
            self.put(*pending)
        first, *rest = [norm for norm in norms if norm is not None]
        opened = (before(first, convs[0]), *convs[1:])
        expand, filtering, contract = (after(conv, norm) for conv, norm in zip(opened, rest, strict=True))
        self.put(f"{name}.expand", expand)
        groups = int(kind.rpartition("g")[2]) or len(expand.weight)  # 0 means one for each channel
        self.put(f"{name}.filter", filtering, groups if step < 0 else 0)
        return Pending(f"{name}.contract", contract, 0, False)

    def _gate(self, target: str, names: tuple[str, str], channels: int) -> None:
        """Translate squeeze and excitation."""
        squeeze, excite = names
        hidden = max(channels // 16, 4)
        # The gate looks at ten times what it is given now, and multiplies it.
        self.weights[f"{target}.squeeze.weight"] = 10 * self.read(f"{squeeze}.weight", hidden, channels)
        self.weights[f"{target}.squeeze.bias"] = self.read(f"{squeeze}.bias", hidden)
        self.weights[f"{target}.excite.weight"] = self.read(f"{excite}.weight", channels, hidden)
        self.weights[f"{target}.excite.bias"] = self.read(f"{excite}.bias", channels)

    def combine(self, target: str, conv: Conv, start: Tensor | None) -> None:
        """Translate where a latent joins the features.

        For the first group these are a constant ``[1, C, h, w]``.
        """
        if start is None:
            self.put(f"{target}.combine", conv)
            return
        width = start.shape[1]
        self.weights[f"{target}.combine.weight"] = conv.weight[:, width:]
        fixed = torch.einsum("oc,nchw->nohw", conv.weight[:, :width, 0, 0], start)
        self.weights[f"{target}.start"] = fixed + conv.bias[:, None, None]

    def mixture(self, conv: Conv, order: Tensor) -> None:
        """Put the head's convolution, whose outputs are the means, scales and coefficients of "logistic".

        Args:
            conv: as in the file, where the components' weights come first.
            order: places of the other outputs in the file, ``[3 (mean, scale, coefficient), 3 (color),
                mixtures]``.
        """
        weights_of_components = torch.arange(self.config.mixtures)
        rest = [order[kind].flatten() for kind in (0, 2, 1)]
        places = torch.cat([weights_of_components, *rest])
        self.put("head.conv", Conv(conv.weight[places], conv.bias[places]))

    def groups(self) -> list[GroupPlace]:
        """Return the latent groups, coarse to fine."""
        groups = []
        for scale, count in enumerate(self.config.groups):
            finer = sum(self.config.groups[scale + 1 :])
            for index in range(count):
                step = count - 1 - index if self.config.mirrored else index
                groups.append(GroupPlace(scale, index, finer + step))
        return groups

    def pre_cells(self, name: str) -> None:
        """Translate the cells before the tower, of which the last one of a block halves the size.

        Args:
            name: the file's name of a cell, to be formatted with ``block``, ``cell`` (in its block) and
                ``flat``.
        """
        widths, count = self.config.encoder, self.config.pre_cells
        for block, cell in itertools.product(range(self.num_blocks), range(count)):
            flat = block * count + cell
            target, source = f"encoder.pre.{flat}", name.format(block=block, cell=cell, flat=flat)
            if cell == count - 1:
                self.cell(target, source, "down_pre", widths[block], widths[block + 1], 2)
            else:
                self.cell(target, source, "pre", widths[block], widths[block])

    def post_cells(self, name: str) -> None:
        """Translate the cells after the groups, of which the first one of a block doubles the size.

        Args:
            name: as for :meth:`pre_cells`.
        """
        widths, count = self.config.decoder, self.config.post_cells
        for block, cell in itertools.product(range(self.num_blocks), range(count)):
            flat = block * count + cell
            target, source = f"post.{flat}", name.format(block=block, cell=cell, flat=flat)
            coarse, fine = widths[self.num_blocks - block], widths[self.num_blocks - block - 1]
            if cell == 0:
                self.cell(target, source, "up_post", coarse, fine, -1)
            else:
                self.cell(target, source, "post", fine, fine)

    def size_of(self, scale: int) -> int:
        """Return the pixels of one side of a scale's latents."""
        return self.config.image_size >> (len(self.config.encoder) - 1 - scale)


def halved(facts: Facts, size: int, halvings: int) -> int:
    """Return the size, if it can be halved so many times."""
    if not 1 <= size <= 4096 or size % 2**halvings:
        raise WeightsError(
            f"{facts.path} has no valid configuration: {size} pixels cannot be halved {halvings} times."
        )
    return size
