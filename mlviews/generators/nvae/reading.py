"""NVAE checkpoints that people have, translated for :mod:`mlviews.generators.nvae.network`.

Two layouts: NVlabs/NVAE (Vahdat and Kautz's own) and SerezD/NVAE-from-scratch (the one of the paper's
    appendix F). A checkpoint's
facts say how the network was built; walking through that network names every tensor the file must hold, with
its shape, and what becomes of it. The walk is made twice, first without memory, so that the file is compared
with its facts before anything is computed.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from mlviews.errors import WeightsError, listing
from mlviews.generators.nvae.network import INVERTED, NVAE, RESIDUAL, ROLES, NVAEConfig, check_options, widen
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import MOST_TENSORS, Refused
from mlviews.weights.reader import Facts, Reader

SIZES = {"mnist": 32, "omniglot": 32, "cifar10": 32, "ffhq": 256}
"""Pixels of one side of NVlabs' data sets; others carry them in their name."""

DERIVED = (".num_batches_tracked", ".weight_normalized")
"""Ends of names of tensors that are in some files, and of no use: a counter, and a copy of another tensor."""

_LARGEST_TENSOR = 1 << 32  # values; the largest of a published network has less than 2**26


def load(checkpoint: Checkpoint, *, temperature: float = 1.0, levels: str = "group") -> NVAE:
    """Return the generator of a checkpoint of NVlabs/NVAE or SerezD/NVAE-from-scratch.

    Differences of the two that stay: NVlabs adds 0.01 to every sigma; in SerezD's encoder the groups of a
        scale come in
    the decoder's order. NVlabs' gray models (MNIST, Omniglot) never learned the outer two pixels of their 32:
    their loss leaves them out. Size and colors of the images are those of the tensors, so that NVlabs' code
    may have been trained on any data set.

    Args:
        checkpoint: of layout "nvae-nvlabs" or "nvae-serezd".
        temperature: see :class:`NVAE`.
        levels: see :class:`NVAE`.

    Raises:
        ValueError: for a temperature that is not positive, or other levels.
        mlviews.WeightsError: if the file and what it says about itself do not agree, or make no network.
    """
    check_options(temperature, levels)
    config, tensors = convert(checkpoint)

    def make() -> NVAE:
        return NVAE(config, temperature=temperature, levels=levels)

    return weights.fit(make, tensors, checkpoint.path)


def convert(checkpoint: Checkpoint) -> tuple[NVAEConfig, dict[str, Tensor]]:
    """Return our configuration and weights from a checkpoint's.

    Raises:
        mlviews.WeightsError: for facts that make no network, or tensors that are missing, unknown or of
            another shape.
    """
    layout, facts, path = checkpoint.layout, checkpoint.facts, str(checkpoint.path)
    reader = _Reader(checkpoint)
    # Room for a few that are missing, which are then named.
    most = len(reader.tensors) + 1000
    images = _images(reader) if layout == "nvae-nvlabs" else None
    expected = _walk(layout, facts, None, path, most, images).expected
    reader.check_names(expected)
    tensors = {name: reader.take(name, *shape) for name, shape in expected.items()}
    walk = _walk(layout, facts, tensors, path, images=images)
    return walk.config, walk.weights


def source_shapes(
    layout: str, facts: Mapping[str, Any], path: str = "the checkpoint"
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a checkpoint, built by these facts, has to hold.

    Args:
        layout: "nvae-nvlabs" or "nvae-serezd".
        facts: what a file says about the network; may hold anything.
        path: of the file, for messages.

    Raises:
        mlviews.WeightsError: if the facts make no network.
    """
    return _walk(layout, facts, None, path).expected


def _walk(
    layout: str,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    path: str,
    most: int = MOST_TENSORS,
    images: tuple[int, int] | None = None,
) -> Walk:
    """Return a walk that is through the network.

    Args:
        layout: of the checkpoint.
        facts: what the file says about the network.
        tensors: of the file; None for a walk without memory.
        path: of the file, for messages.
        most: tensors that the network may have.
        images: what :func:`_images` returned; None for what the facts say.
    """
    walker = LAYOUTS.get(layout)
    if walker is None:
        raise WeightsError(f"{path} holds {layout!r}, which is no NVAE; expected {listing(LAYOUTS)}.")
    walk = walker(walker.configuration(Facts(facts, path), images), tensors, most)
    try:
        walk.walk()
    except Refused as error:
        raise WeightsError(f"{path} has no valid configuration: it describes {error}.") from error
    return walk


class _Reader(Reader):
    """An NVAE file's tensors, without those that are of no use."""

    problem = "was made for another architecture than it says"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.tensors = {name: value for name, value in self.tensors.items() if not name.endswith(DERIVED)}


# -- layers


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


class NVlabs(Walk):
    """NVlabs/NVAE: ``state_dict`` with lists of cells.

    Weight norm is ``exp(log_weight_norm) * w / (|w| + 1e-5)``.
    """

    @staticmethod
    def configuration(facts: Facts, images: tuple[int, int] | None = None) -> NVAEConfig:
        """Return the architecture that ``vars(args)`` and ``arch_instance`` describe.

        Settings that old files lack default as in the official evaluation.

        Args:
            facts: what the file says.
            images: channels of the images, and pixels of one side of the coarsest latents. None: those of the
                data set, which has to be one of NVlabs' then.
        """
        scales = facts.integer("num_latent_scales", 1, 8)
        num_blocks = facts.integer("num_preprocess_blocks", 0, 8)
        if facts.integer("num_postprocess_blocks", 0, 8) != num_blocks:
            raise facts.error("num_postprocess_blocks", f"num_preprocess_blocks, which is {num_blocks}")
        groups = _nvlabs_groups(facts, scales)
        mixtures = facts.integer("num_mixture_dec", 1, 100, 10)
        if images is None:
            size = _nvlabs_size(facts)
            is_gray = facts.values["dataset"] in ("mnist", "omniglot")
        else:
            size = images[1] << (num_blocks + scales - 1)
            is_gray = images[0] == 1
        head = "normal" if mixtures == 1 else "logistic"
        doublings = range(num_blocks + scales)
        return NVAEConfig(
            image_channels=1 if is_gray else 3,
            image_size=_halved(facts, size, num_blocks + scales - 1),
            groups=groups,
            latents=(facts.integer("num_latent_per_group", 1, 1024),) * scales,
            encoder=tuple(facts.integer("num_channels_enc", 2, 4096) << power for power in doublings),
            decoder=tuple(facts.integer("num_channels_dec", 2, 4096) << power for power in doublings),
            cells=_nvlabs_cells(facts),
            pre_cells=facts.integer("num_preprocess_cells", 1, 64),
            enc_cells=facts.integer("num_cell_per_cond_enc", 1, 64),
            dec_cells=facts.integer("num_cell_per_cond_dec", 1, 64),
            post_cells=facts.integer("num_postprocess_cells", 1, 64),
            gated=facts.flag("use_se"),
            relative=facts.flag("res_dist"),
            floor=1e-2,
            flows=facts.integer("num_nf", 0, 16, 0),
            flow_elus=2,
            head="bernoulli" if is_gray else head,
            mixtures=mixtures,
            bits=facts.integer("num_x_bits", 1, 8, 8),
        )

    def conv(self, name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Conv:
        weight = self._normed(name, self.read(f"{name}.weight", outputs, inputs, kernel, kernel))
        return Conv(weight, self.read(f"{name}.bias", outputs) if bias else weight.new_zeros(outputs))

    def _normed(self, name: str, weight: Tensor) -> Tensor:
        length = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        return self.read(f"{name}.log_weight_norm", len(weight), 1, 1, 1).exp() * weight / (length + 1e-5)

    def skip(self, name: str, inputs: int, outputs: int, stride: int) -> Conv:
        if stride < 0:
            return self.conv(f"{name}.skip.1", outputs, inputs, 1, bias=False)
        # Four 1x1 convolutions of stride 2, each on another of four neighboring pixels: one 2x2 convolution.
        quarter = outputs // 4
        widths = (quarter, quarter, quarter, outputs - 3 * quarter)
        pixels = ((0, 0), (1, 1), (0, 1), (1, 0))
        kernels, biases = [], []
        for index, (width, (down, right)) in enumerate(zip(widths, pixels, strict=True), start=1):
            conv = self.conv(f"{name}.skip.conv_{index}", width, inputs, 1)
            kernel = conv.weight.new_zeros(width, inputs, 2, 2)
            kernel[:, :, down, right] = conv.weight[:, :, 0, 0]
            kernels.append(kernel)
            biases.append(conv.bias)
        return Conv(torch.cat(kernels), torch.cat(biases))

    def operation(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> Operation:
        kind, source = self.config.cells[role][index], f"{name}._ops.{index}"
        if kind in RESIDUAL:
            norm_names = {"res_elu": None, "res_bnelu": f"{source}.bn.bn"}
            norm_name = norm_names.get(kind, f"{source}.bn_act")
            norm = None if norm_name is None else self.norm(norm_name, inputs)
            return [norm], [self.conv(f"{source}.conv_0", outputs, inputs, 3)]
        first = 1 if stride < 0 else 0  # the upsampling is a layer of its own
        layers = (
            (0, ".bn"),
            (1, ".conv.0"),
            (1, ".conv.1"),
            (2, ".conv.0"),
            (2, ".conv.1"),
            (3, ""),
            (4, ".bn"),
        )
        names = [f"{source}.conv.{first + layer}{end}" for layer, end in layers]
        return self.inverted(names, kind, inputs, outputs)

    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        return f"{name}.se.se.0", f"{name}.se.se.2"

    def flow(self, target: str, name: str, latent: int, mirror: bool) -> None:
        """Translate an autoregressive cell: its three masked convolutions."""
        hidden = 6 * latent
        for part, layer, outputs, inputs, kernel, strict in (
            ("expand", "conv.convz.0", hidden, latent, 3, True),
            ("filter", "conv.convz.2", hidden, 1, 5, False),
            ("contract", "mu.conv_0", latent, hidden, 1, False),
        ):
            weight = self.read(f"{name}.{layer}.weight", outputs, inputs, kernel, kernel)
            if not weight.is_meta:  # else the shape is the facts' only, and the mask would take memory
                weight = weight * causal_mask(outputs, inputs, kernel, strict, mirror)
            weight = self._normed(f"{name}.{layer}", weight)
            has_bias = part == "contract"
            bias = self.read(f"{name}.{layer}.bias", outputs) if has_bias else weight.new_zeros(outputs)
            self.put(f"{target}.{part}", Conv(weight, bias))

    def walk(self) -> None:
        config, enc = self.config, self.config.encoder
        self.put("encoder.stem", self.conv("stem", enc[0], config.image_channels, 3))
        self.pre_cells("pre_process.{flat}")
        combiners = self._encoder_tower()
        self.put("encoder.top", self.conv("enc0.1", enc[-1], enc[-1], 1))
        layers = itertools.count()  # of the decoder's tower, a flat list
        for index, group in enumerate(self.groups()):
            self._encoder_group(index, group)
            if index:
                self._decoder_group(index, group, combiners[group.step], layers)
            self._combine(index, group, next(layers))
        self.post_cells("post_process.{flat}")
        self._head()

    def _encoder_tower(self) -> list[int]:
        """Translate the encoder's tower, a flat list.

        Return the places of its combiners, one for each step but the last.
        """
        config, enc = self.config, self.config.encoder
        layers = itertools.count()
        combiners = []
        for scale in reversed(range(config.scales)):
            width = enc[-1 - scale]
            for index in range(config.groups[scale]):
                step = sum(config.groups[scale + 1 :]) + index
                cells = itertools.count()
                if scale < config.scales - 1 and not index:
                    target, name = f"encoder.tower.{step}.{next(cells)}", f"enc_tower.{next(layers)}"
                    self.cell(target, name, "down_enc", enc[-2 - scale], width, 2)
                for _ in range(config.enc_cells):
                    target, name = f"encoder.tower.{step}.{next(cells)}", f"enc_tower.{next(layers)}"
                    self.cell(target, name, "enc", width, width)
                if scale or index < config.groups[scale] - 1:
                    combiners.append(next(layers))
        return combiners

    def _encoder_group(self, index: int, group: GroupPlace) -> None:
        """Translate a group's posterior, with its flows."""
        config = self.config
        latent, width = config.latents[group.scale], config.encoder[-1 - group.scale]
        self.put(f"encoder.samplers.{index}", self.conv(f"enc_sampler.{index}", 2 * latent, width, 3))
        for flow in range(config.flows):
            for part, mirror in ((0, False), (1, True)):
                name = f"nf_cells.{index * config.flows + flow}.cell{part + 1}"
                self.flow(f"encoder.flows.{index}.{2 * flow + part}", name, latent, mirror)

    def _decoder_group(self, index: int, group: GroupPlace, combiner: int, layers: Iterator[int]) -> None:
        """Translate what comes before a group's latent: where the encoder joins, the cells, and the prior."""
        config, dec = self.config, self.config.decoder
        latent, width = config.latents[group.scale], dec[-1 - group.scale]
        mix = self.conv(f"enc_tower.{combiner}.conv", config.encoder[-1 - group.scale], width, 1)
        self.put(f"encoder.mix.{index - 1}", mix)
        cells = itertools.count()
        if not group.number:
            target, name = f"groups.{index}.cells.{next(cells)}", f"dec_tower.{next(layers)}"
            self.cell(target, name, "up_dec", dec[-group.scale], width, -1)
        for _ in range(config.dec_cells):
            target, name = f"groups.{index}.cells.{next(cells)}", f"dec_tower.{next(layers)}"
            self.cell(target, name, "dec", width, width)
        self.put(f"groups.{index}.prior", self.conv(f"dec_sampler.{index - 1}.1", 2 * latent, width, 1))

    def _combine(self, index: int, group: GroupPlace, layer: int) -> None:
        """Translate where a group's latent joins the features."""
        latent, width = self.config.latents[group.scale], self.config.decoder[-1 - group.scale]
        side = self.size_of(group.scale)
        start = None if index else self.read("prior_ftr0", width, side, side)[None]
        conv = self.conv(f"dec_tower.{layer}.conv", width, width + latent, 1)
        self.combine(f"groups.{index}", conv, start)

    def _head(self) -> None:
        """Translate the last convolution, whose outputs are the likelihood's parameters."""
        mixtures, width = self.config.mixtures, self.config.decoder[0]
        if self.config.head != "logistic":
            outputs = 1 if self.config.head == "bernoulli" else 6
            self.put("head.conv", self.conv("image_conditional.1", outputs, width, 3))
            return
        conv = self.conv("image_conditional.1", 10 * mixtures, width, 3)
        order = torch.arange(mixtures, 10 * mixtures).view(3, 3, mixtures)  # [color, kind, component]
        self.mixture(conv, order.transpose(0, 1))


class SerezD(Walk):
    """SerezD/NVAE-from-scratch: ``state_dict`` with named cells; weight norm is torch's parametrization."""

    @staticmethod
    def configuration(facts: Facts, images: tuple[int, int] | None = None) -> NVAEConfig:
        """Return the architecture that ``configuration`` describes, as in the project's YAML files."""
        model = Facts(facts.values.get("autoencoder"), facts.path)
        size = _serezd_size(facts)
        scales = model.integer("num_scales", 1, 8)
        num_blocks = model.integer("num_pre-post_process_blocks", 0, 8)
        groups = _serezd_groups(model, scales)
        cells = model.integer("num_pre-post_process_cells", 1, 64)
        base = model.integer("initial_channels", 4, 4096)
        per_group = model.integer("num_cells_per_group", 1, 64)
        widths = tuple(base << power for power in range(num_blocks + scales))
        has_flows = model.values.get("num_nf_cells") is not None
        return NVAEConfig(
            image_channels=3,
            image_size=_halved(facts, size, num_blocks + scales - 1),
            groups=groups,
            latents=(model.integer("num_latent_per_group", 1, 1024),) * scales,
            encoder=widths,
            decoder=widths,
            cells={
                **dict.fromkeys(("pre", "down_pre", "enc", "down_enc"), ("res_bnswish", "res_bnswish")),
                **dict.fromkeys(("dec", "up_dec"), ("mconv_e6k5g0",)),
                **dict.fromkeys(("post", "up_post"), ("mconv_e3k5g0",)),
            },
            pre_cells=cells,
            enc_cells=per_group,
            dec_cells=per_group,
            post_cells=cells,
            gated=True,
            skip=1,
            mirrored=False,
            flows=model.integer("num_nf_cells", 0, 16) if has_flows else 0,
            mixtures=model.integer("num_logistic_mixtures", 1, 100),
        )

    def conv(self, name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Conv:
        weight = self.read(f"{name}.parametrizations.weight.original1", outputs, inputs, kernel, kernel)
        length = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        gain = self.read(f"{name}.parametrizations.weight.original0", outputs, 1, 1, 1)
        return Conv(gain * weight / length, self.read(f"{name}.bias", outputs))

    def skip(self, name: str, inputs: int, outputs: int, stride: int) -> Conv:
        return self.conv(f"{name}.skip_connection.conv", outputs, inputs, 1)

    def operation(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> Operation:
        kind = self.config.cells[role][index]
        if kind in RESIDUAL:
            norm = self.norm(f"{name}.residual.{3 * index}", inputs)
            return [norm], [self.conv(f"{name}.residual.{3 * index + 2}", outputs, inputs, 3)]
        first = 1 if stride < 0 else 0  # the upsampling is a layer of its own
        names = [f"{name}.residual.{first + layer}" for layer in (0, 1, 2, 4, 5, 7, 8)]
        return self.inverted(names, kind, inputs, outputs)

    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        after_inverted = 10 if stride < 0 else 9
        layer = 6 if len(self.config.cells[role]) == 2 else after_inverted
        return f"{name}.residual.{layer}.linear_1", f"{name}.residual.{layer}.linear_2"

    def flow(self, target: str, name: str, latent: int) -> None:
        """Translate a normalizing-flow cell: its three masked convolutions; the masks are in the file."""
        hidden = 6 * latent
        for part, layer, shape in (
            ("expand", 0, (hidden, latent, 3, 3)),
            ("filter", 2, (hidden, 1, 5, 5)),
            ("contract", 4, (latent, hidden, 1, 1)),
        ):
            weight = self.read(f"{name}.layers.{layer}.weight", *shape)
            mask = self.read(f"{name}.layers.{layer}.mask", *shape)
            bias = self.read(f"{name}.layers.{layer}.bias", shape[0])
            self.put(f"{target}.{part}", Conv(weight * mask, bias))

    def walk(self) -> None:
        widths = self.config.encoder
        self.put("encoder.stem", self.conv("preprocessing_block.init_conv", widths[0], 3, 3))
        self.pre_cells("preprocessing_block.block_{block}.cell_{cell}")
        self.put("encoder.top", self.conv("encoder_0.1", widths[-1], widths[-1], 1))
        for index, group in enumerate(self.groups()):
            self._encoder_cells(group)
            self._encoder_group(index, group)
            if index:
                self._decoder_group(index, group)
            self._combine(index, group)
        self.post_cells("postprocessing_block.block_{block}.cell_{cell}")
        self._head()

    def _encoder_cells(self, group: GroupPlace) -> None:
        """Translate the cells of the encoder's step that meets a group."""
        config, widths = self.config, self.config.encoder
        width, scale = widths[-1 - group.scale], group.scale
        cells = itertools.count()
        if scale < config.scales - 1 and not group.number:
            target, name = f"encoder.tower.{group.step}.{next(cells)}", f"scale_{scale + 1}.downsampling"
            self.cell(target, f"encoder_tower.{name}", "down_enc", widths[-2 - scale], width, 2)
        for cell in range(config.enc_cells):
            target, name = f"encoder.tower.{group.step}.{next(cells)}", f"scale_{scale}.group_{group.number}"
            self.cell(target, f"encoder_tower.{name}.cell_{cell}", "enc", width, width)

    def _encoder_group(self, index: int, group: GroupPlace) -> None:
        """Translate a group's posterior, with its flows."""
        latent, width = self.config.latents[group.scale], self.config.encoder[-1 - group.scale]
        tag = f"{group.scale}:{group.number}"
        sampler = self.conv(f"enc_sampler.sampler_{tag}", 2 * latent, width, 3)
        self.put(f"encoder.samplers.{index}", sampler)
        for flow, part in itertools.product(range(self.config.flows), (0, 1)):
            name = f"nf_cells.nf_{tag}.{flow}.cell{part + 1}"
            self.flow(f"encoder.flows.{index}.{2 * flow + part}", name, latent)

    def _decoder_group(self, index: int, group: GroupPlace) -> None:
        """Translate what comes before a group's latent: where the encoder joins, the cells, and the prior."""
        config, widths = self.config, self.config.decoder
        latent, width, scale = config.latents[group.scale], widths[-1 - group.scale], group.scale
        tag = f"{scale}:{group.number}"
        mix = self.conv(f"encoder_combiners.combiner_{tag}.conv", width, width, 1)
        self.put(f"encoder.mix.{index - 1}", mix)
        cells = itertools.count()
        if not group.number:
            target, name = f"groups.{index}.cells.{next(cells)}", f"scale_{scale - 1}.upsampling"
            self.cell(target, f"decoder_tower.{name}", "up_dec", widths[-scale], width, -1)
        for cell in range(config.dec_cells):
            target, name = f"groups.{index}.cells.{next(cells)}", f"scale_{scale}.group_{group.number}"
            self.cell(target, f"decoder_tower.{name}.cell_{cell}", "dec", width, width)
        self.put(f"groups.{index}.prior", self.conv(f"dec_sampler.sampler_{tag}.1", 2 * latent, width, 1))

    def _combine(self, index: int, group: GroupPlace) -> None:
        """Translate where a group's latent joins the features."""
        latent, width = self.config.latents[group.scale], self.config.decoder[-1 - group.scale]
        side = self.size_of(group.scale)
        start = None if index else self.read("const_prior", 1, width, side, side)
        name = f"decoder_combiners.combiner_{group.scale}:{group.number}.conv"
        self.combine(f"groups.{index}", self.conv(name, width, width + latent, 1), start)

    def _head(self) -> None:
        """Translate the last convolution, whose outputs are the likelihood's parameters."""
        mixtures = self.config.mixtures
        conv = self.conv("to_logits.1", 10 * mixtures, self.config.decoder[0], 3)
        order = torch.arange(mixtures, 10 * mixtures).view(mixtures, 3, 3)  # [component, kind, color]
        self.mixture(conv, order.permute(1, 2, 0))


LAYOUTS: dict[str, type[NVlabs] | type[SerezD]] = {"nvae-nvlabs": NVlabs, "nvae-serezd": SerezD}


# -- facts


def _images(reader: Reader) -> tuple[int, int] | None:
    """Return the images' channels, and pixels of one side of the coarsest latents, as the tensors imply them.

    People train NVlabs' code on data sets of their own, whose names say nothing. None where a tensor is
    missing or of no such shape: the data set's name has to do, and the shapes are compared with it.
    """
    start, stem = (reader.tensors.get(name) for name in ("prior_ftr0", "stem.weight"))
    if start is None or stem is None or start.ndim != 3 or stem.ndim != 4:
        return None
    channels, side = stem.shape[1], start.shape[1]
    return (channels, side) if channels in (1, 3) and start.shape[2] == side > 0 else None


def _nvlabs_size(facts: Facts) -> int:
    """Return the pixels of one side of the data set's images."""
    data = facts.values.get("dataset")
    if isinstance(data, str) and data in SIZES:
        return SIZES[data]
    size = str(data).rpartition("_")[2]
    if str(data).startswith(("celeba_", "imagenet_", "lsun_")) and size in ("32", "64", "128", "256"):
        return int(size)
    raise facts.error("dataset", "one of NVlabs' data sets, e.g. cifar10, mnist or celeba_64")


def _nvlabs_groups(facts: Facts, scales: int) -> tuple[int, ...]:
    """Return the groups of each scale, coarse to fine.

    The finest has ``num_groups_per_scale``, every coarser one half as many as the one after it if they are
    adaptive.
    """
    count = facts.integer("num_groups_per_scale", 1, 64)
    adaptive = facts.flag("ada_groups", False)
    least = facts.integer("min_groups_per_scale", 1, 64, 1)
    groups = [count]
    for _ in range(scales - 1):
        groups.insert(0, max(least, groups[0] // 2) if adaptive else count)
    if sum(groups) == 1:
        raise facts.error("num_groups_per_scale", "more than one latent group: a single one is no hierarchy")
    return tuple(groups)


def _nvlabs_cells(facts: Facts) -> dict[str, tuple[str, ...]]:
    """Return the operations of each kind of cell."""
    table = facts.values.get("arch_instance")
    names = {"pre": "normal_pre", "enc": "normal_enc", "dec": "normal_dec", "post": "normal_post"}
    cells = {}
    for role in ROLES:
        name = names.get(role, role)
        kinds = table.get(name) if isinstance(table, Mapping) else None
        if not _are_operations(kinds):
            raise facts.error(
                "arch_instance", f"a table of operations for each kind of cell, with known ones for {name!r}"
            )
        cells[role] = tuple(kinds)
    return cells


def _are_operations(kinds: Any) -> TypeGuard[Sequence[str]]:
    """Is this a list of the operations of a cell?"""
    if not isinstance(kinds, list | tuple) or not 1 <= len(kinds) <= 8:
        return False
    return all(isinstance(kind, str) and (kind in RESIDUAL or INVERTED.fullmatch(kind)) for kind in kinds)


def _serezd_size(facts: Facts) -> int:
    """Return the pixels of one side."""
    shape = facts.values.get("resolution")
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        raise facts.error("resolution", "[3, size, size]")
    channels, height, width = shape
    if channels != 3 or height != width or type(height) is not int:
        raise facts.error("resolution", "[3, size, size]")
    return height


def _serezd_groups(model: Facts, scales: int) -> tuple[int, ...]:
    """Return the groups of each scale, coarse to fine.

    If they are adaptive, each scale has half of those of the finer one.
    """
    count = model.integer("num_groups_per_scale", 1, 64)
    least = model.integer("min_groups_per_scale", 1, 64, 1)
    if not model.flag("is_adaptive", False):
        return (count,) * scales
    return tuple(max(least, count // 2**halvings) for halvings in reversed(range(scales)))


def _halved(facts: Facts, size: int, halvings: int) -> int:
    """Return the size, if it can be halved so many times."""
    if not 1 <= size <= 4096 or size % 2**halvings:
        raise WeightsError(
            f"{facts.path} has no valid configuration: {size} pixels cannot be halved {halvings} times."
        )
    return size
