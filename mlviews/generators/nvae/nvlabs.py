"""The layout of NVlabs/NVAE, Vahdat and Kautz's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mlviews.generators.nvae.network import INVERTED, RESIDUAL, ROLES, NVAEConfig
from mlviews.generators.nvae.walk import (
    Conv,
    GroupPlace,
    Operation,
    Walk,
    causal_mask,
    halved,
)
from mlviews.weights.reader import Facts, Reader

SIZES = {"mnist": 32, "omniglot": 32, "cifar10": 32, "ffhq": 256}
"""Pixels of one side of NVlabs' data sets; others carry them in their name."""


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
        groups = _groups(facts, scales)
        mixtures = facts.integer("num_mixture_dec", 1, 100, 10)
        if images is None:
            size = _size(facts)
            is_gray = facts.values["dataset"] in ("mnist", "omniglot")
        else:
            size = images[1] << (num_blocks + scales - 1)
            is_gray = images[0] == 1
        head = "normal" if mixtures == 1 else "logistic"
        doublings = range(num_blocks + scales)
        return NVAEConfig(
            image_channels=1 if is_gray else 3,
            image_size=halved(facts, size, num_blocks + scales - 1),
            groups=groups,
            latents=(facts.integer("num_latent_per_group", 1, 1024),) * scales,
            encoder=tuple(facts.integer("num_channels_enc", 2, 4096) << power for power in doublings),
            decoder=tuple(facts.integer("num_channels_dec", 2, 4096) << power for power in doublings),
            cells=_cells(facts),
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


def implied_images(reader: Reader) -> tuple[int, int] | None:
    """Return the images' channels, and pixels of one side of the coarsest latents, as the tensors imply them.

    People train NVlabs' code on data sets of their own, whose names say nothing. None where a tensor is
    missing or of no such shape: the data set's name has to do, and the shapes are compared with it.
    """
    start, stem = (reader.tensors.get(name) for name in ("prior_ftr0", "stem.weight"))
    if start is None or stem is None or start.ndim != 3 or stem.ndim != 4:
        return None
    channels, side = stem.shape[1], start.shape[1]
    return (channels, side) if channels in (1, 3) and start.shape[2] == side > 0 else None


def _size(facts: Facts) -> int:
    """Return the pixels of one side of the data set's images."""
    data = facts.values.get("dataset")
    if isinstance(data, str) and data in SIZES:
        return SIZES[data]
    size = str(data).rpartition("_")[2]
    if str(data).startswith(("celeba_", "imagenet_", "lsun_")) and size in ("32", "64", "128", "256"):
        return int(size)
    raise facts.error("dataset", "one of NVlabs' data sets, e.g. cifar10, mnist or celeba_64")


def _groups(facts: Facts, scales: int) -> tuple[int, ...]:
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


def _cells(facts: Facts) -> dict[str, tuple[str, ...]]:
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
