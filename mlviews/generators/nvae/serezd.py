"""The layout of SerezD/NVAE-from-scratch, the one of the paper's appendix F."""

from __future__ import annotations

import itertools

import torch

from mlviews.generators.nvae.network import RESIDUAL, NVAEConfig
from mlviews.generators.nvae.walk import (
    Conv,
    GroupPlace,
    Operation,
    Walk,
    halved,
)
from mlviews.weights.reader import Facts


class SerezD(Walk):
    """SerezD/NVAE-from-scratch: ``state_dict`` with named cells; weight norm is torch's parametrization."""

    @staticmethod
    def configuration(facts: Facts, images: tuple[int, int] | None = None) -> NVAEConfig:
        """Return the architecture that ``configuration`` describes, as in the project's YAML files.

        Args:
            facts: what the file says.
            images: not looked at, as these facts have the images' size.
        """
        model = Facts(facts.values.get("autoencoder"), facts.path)
        size = _size(facts)
        scales = model.integer("num_scales", 1, 8)
        num_blocks = model.integer("num_pre-post_process_blocks", 0, 8)
        groups = _groups(model, scales)
        cells = model.integer("num_pre-post_process_cells", 1, 64)
        base = model.integer("initial_channels", 4, 4096)
        per_group = model.integer("num_cells_per_group", 1, 64)
        widths = tuple(base << power for power in range(num_blocks + scales))
        has_flows = model.values.get("num_nf_cells") is not None
        return NVAEConfig(
            image_channels=3,
            image_size=halved(facts, size, num_blocks + scales - 1),
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


def _size(facts: Facts) -> int:
    """Return the pixels of one side."""
    shape = facts.values.get("resolution")
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        raise facts.error("resolution", "[3, size, size]")
    channels, height, width = shape
    if channels != 3 or height != width or type(height) is not int:
        raise facts.error("resolution", "[3, size, size]")
    return height


def _groups(model: Facts, scales: int) -> tuple[int, ...]:
    """Return the groups of each scale, coarse to fine.

    If they are adaptive, each scale has half of those of the finer one.
    """
    count = model.integer("num_groups_per_scale", 1, 64)
    least = model.integer("min_groups_per_scale", 1, 64, 1)
    if not model.flag("is_adaptive", False):
        return (count,) * scales
    return tuple(max(least, count // 2**halvings) for halvings in reversed(range(scales)))
