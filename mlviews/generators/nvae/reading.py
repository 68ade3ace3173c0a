"""NVAE checkpoints that people have, as the weights and the configuration of an :class:`~mlviews.generators.nvae.network.NVAE`.

Two layouts: NVlabs/NVAE (Vahdat and Kautz's own) and SerezD/NVAE-from-scratch (the one of the paper's appendix F). A checkpoint's facts
say how the network was built; walking through that network names every tensor the file must hold, with its shape, and what
becomes of it. The walk is made twice, first without memory, so that the file is compared with its facts before anything is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlviews.errors import WeightsError, listing
from mlviews.generators.nvae.network import INVERTED, NVAE, RESIDUAL, ROLES, NVAEConfig, check_options, widen
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint

SIZES = {
    "mnist": 32,
    "omniglot": 32,
    "cifar10": 32,
    "ffhq": 256,
}  # of NVlabs' data sets; others carry it in their name


class Conv(NamedTuple):
    """A convolution's weight and bias."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """A batch norm with fixed statistics, as scale and shift ``[C]``."""

    scale: Tensor
    shift: Tensor


def after(conv: Conv, norm: Norm) -> Conv:
    """The convolution followed by the norm, as one convolution."""
    return Conv(conv.weight * norm.scale[:, None, None, None], conv.bias * norm.scale + norm.shift)


def before(norm: Norm, conv: Conv) -> Conv:
    """The norm followed by the 1x1 convolution, as one convolution (a larger one would see the shift in its padding)."""
    return Conv(
        conv.weight * norm.scale[:, None, None], conv.bias + (conv.weight[:, :, 0, 0] * norm.shift).sum(1)
    )


class Facts:
    """Constructor facts of a file that may hold anything: every look-up checks what it finds."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise WeightsError(
                f"{where} has no valid configuration: expected a table of settings, found {type(values).__name__}."
            )
        self.values, self.where = values, where

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from ``low`` to ``high``."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or False."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "True or False")
        return value

    def error(self, name: str, expected: str) -> WeightsError:
        """What to raise for this setting."""
        found = repr(self.values[name])[:80] if name in self.values else "missing"
        return WeightsError(
            f"{self.where} has no valid configuration: {name} is {found}; expected {expected}."
        )


class Walk(ABC):
    """A walk through the network of a layout: reads the file's tensors, collects ours.

    Args:
        config: the architecture.
        tensors: of the file; None to learn only what it must hold, on the meta device.
    """

    def __init__(self, config: NVAEConfig, tensors: Mapping[str, Tensor] | None) -> None:
        self.config, self.tensors = config, tensors
        self.expected: dict[str, tuple[int, ...]] = {}
        self.made: dict[str, Tensor] = {}

    def read(self, name: str, *shape: int) -> Tensor:
        """A tensor of the file, as float32."""
        self.expected[name] = shape
        return torch.empty(shape, device="meta") if self.tensors is None else self.tensors[name].float()

    def put(self, name: str, conv: Conv, up: int = 0, dilate: bool = False) -> None:
        """A convolution of ours.

        Args:
            name: the layer's.
            conv: its weight and bias.
            up: groups, if an upsampling before it is to be part of it.
            dilate: its taps are two pixels apart, which such a one has to spell out.
        """
        weight = conv.weight
        if up and dilate:
            weight = weight.new_zeros(*weight.shape[:2], 5, 5)
            weight[:, :, ::2, ::2] = conv.weight
        self.made[f"{name}.weight"] = widen(weight, up) if up else weight
        self.made[f"{name}.bias"] = conv.bias

    # What the layouts differ in.

    @abstractmethod
    def conv(self, name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Conv:
        """A convolution with weight norm."""

    def norm(self, name: str, channels: int) -> Norm:
        """A batch norm."""
        scale = (
            self.read(f"{name}.weight", channels) / (self.read(f"{name}.running_var", channels) + 1e-5).sqrt()
        )
        return Norm(
            scale, self.read(f"{name}.bias", channels) - self.read(f"{name}.running_mean", channels) * scale
        )

    @abstractmethod
    def skip(self, name: str, inputs: int, outputs: int, stride: int) -> Conv:
        """The convolution of a skip connection that changes the size."""

    @abstractmethod
    def parts(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> tuple[list[Norm | None], list[Conv]]:
        """The norms and convolutions of a cell's operation, in order."""

    @abstractmethod
    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        """The names of a cell's two gate layers."""

    # What they share.

    def plain(self, name: str, outputs: int, inputs: int, kernel: int) -> Conv:
        """A convolution without bias or weight norm."""
        weight = self.read(f"{name}.weight", outputs, inputs, kernel, kernel)
        return Conv(weight, weight.new_zeros(outputs))

    def inverted(
        self, names: Sequence[str], kind: str, inputs: int, outputs: int
    ) -> tuple[list[Norm | None], list[Conv]]:
        """Those of ``mconv_...``, whose seven layers have these names: norm, expand, norm, filter, norm, contract, norm."""
        match = INVERTED.fullmatch(kind)
        assert match is not None
        expand, kernel, groups = map(int, match.groups())
        hidden = inputs * expand
        norms: list[Norm | None] = [
            self.norm(name, width)
            for name, width in zip(names[::2], (inputs, hidden, hidden, outputs), strict=True)
        ]
        convs = [
            self.plain(names[1], hidden, inputs, 1),
            self.plain(names[3], hidden, hidden // groups if groups else 1, kernel),
            self.plain(names[5], outputs, hidden, 1),
        ]
        return norms, convs

    def cell(self, target: str, name: str, role: str, inputs: int, outputs: int, stride: int = 1) -> None:
        """A residual cell: every norm but a leading one goes into a convolution, the factor 0.1 into the last."""
        if stride != 1:
            self.put(f"{target}.skip.conv", self.skip(name, inputs, outputs, stride))
        kinds = self.config.cells[role]
        last: Conv | None = None
        pending: tuple[str, int, bool] = (
            "",
            0,
            False,
        )  # where the last convolution goes, once the norm after it is known
        for index, kind in enumerate(kinds):
            own = f"{target}.operations.{index}"
            width, step = (outputs, 1) if index else (inputs, stride)
            norms, convs = self.parts(name, role, index, width, outputs, step)
            if kind in RESIDUAL:
                norm = norms[0]
                if last is not None:
                    last = last if norm is None else after(last, norm)
                elif norm is not None:
                    self.made[f"{own}.norm.scale"], self.made[f"{own}.norm.shift"] = (
                        part[:, None, None] for part in norm
                    )
            if last is not None:
                self.put(pending[0], last, *pending[1:])
            if kind in RESIDUAL:
                last, pending = convs[0], (f"{own}.conv", int(step < 0), kind.endswith("5"))
            else:
                opening, *others = [norm for norm in norms if norm is not None]
                opened = (before(opening, convs[0]), *convs[1:])
                expand, filtering, contract = (
                    after(conv, norm) for conv, norm in zip(opened, others, strict=True)
                )
                self.put(f"{own}.expand", expand)
                self.put(f"{own}.filter", filtering, _groups_of(kind, expand) if step < 0 else 0)
                last, pending = contract, (f"{own}.contract", 0, False)
        assert last is not None
        self.put(pending[0], Conv(0.1 * last.weight, 0.1 * last.bias), *pending[1:])
        if self.config.gated:
            hidden = max(outputs // 16, 4)
            squeeze, excite = self.gate(name, role, stride)
            # The gate looks at ten times what it is given now, and multiplies it.
            self.made[f"{target}.gate.squeeze.weight"] = 10 * self.read(f"{squeeze}.weight", hidden, outputs)
            self.made[f"{target}.gate.squeeze.bias"] = self.read(f"{squeeze}.bias", hidden)
            self.made[f"{target}.gate.excite.weight"] = self.read(f"{excite}.weight", outputs, hidden)
            self.made[f"{target}.gate.excite.bias"] = self.read(f"{excite}.bias", outputs)

    def combine(self, target: str, conv: Conv, start: Tensor | None) -> None:
        """Where a latent joins the features; for the first group these are a constant ``[1, C, h, w]``."""
        if start is None:
            self.put(f"{target}.combine", conv)
            return
        width = start.shape[1]
        self.made[f"{target}.combine.weight"] = conv.weight[:, width:]
        fixed = torch.einsum("oc,nchw->nohw", conv.weight[:, :width, 0, 0], start)
        self.made[f"{target}.start"] = fixed + conv.bias[:, None, None]

    def sizes(self) -> list[tuple[int, int, int]]:
        """Scale, index and encoder step of each group, coarse to fine."""
        found = []
        for scale, count in enumerate(self.config.groups):
            finer = sum(self.config.groups[scale + 1 :])
            found += [
                (scale, index, finer + (count - 1 - index if self.config.mirrored else index))
                for index in range(count)
            ]
        return found


class NVlabs(Walk):
    """NVlabs/NVAE: ``state_dict`` with lists of cells; weight norm as ``exp(log_weight_norm) * w / (|w| + 1e-5)``."""

    @staticmethod
    def configuration(facts: Facts) -> NVAEConfig:
        """From ``vars(args)`` and ``arch_instance``. Settings that old files lack default as in the official evaluation."""
        data = facts.values.get("dataset")
        tail = str(data).rpartition("_")[2]
        size = SIZES.get(data) if isinstance(data, str) else None
        if (
            size is None
            and str(data).startswith(("celeba_", "imagenet_", "lsun_"))
            and tail in ("32", "64", "128", "256")
        ):
            size = int(tail)
        if size is None:
            raise facts.error("dataset", "one of NVlabs' data sets, e.g. cifar10, mnist or celeba_64")
        scales = facts.integer("num_latent_scales", 1, 8)
        pre, post = (
            facts.integer("num_preprocess_blocks", 0, 8),
            facts.integer("num_postprocess_blocks", 0, 8),
        )
        if pre != post:
            raise facts.error("num_postprocess_blocks", f"num_preprocess_blocks, which is {pre}")
        count, adaptive = facts.integer("num_groups_per_scale", 1, 64), facts.flag("ada_groups", False)
        least = facts.integer("min_groups_per_scale", 1, 64, 1)
        groups = _groups(scales, count, least, adaptive)
        if sum(groups) == 1:
            raise facts.error(
                "num_groups_per_scale", "more than one latent group: a single one is no hierarchy"
            )
        mixtures = facts.integer("num_mixture_dec", 1, 100, 10)
        gray = data in ("mnist", "omniglot")
        return NVAEConfig(
            image_channels=1 if gray else 3,
            image_size=_size(facts, size, pre + scales - 1),
            groups=groups,
            latents=(facts.integer("num_latent_per_group", 1, 1024),) * scales,
            encoder=tuple(facts.integer("num_channels_enc", 2, 4096) << k for k in range(pre + scales)),
            decoder=tuple(facts.integer("num_channels_dec", 2, 4096) << k for k in range(pre + scales)),
            cells=_arch(facts),
            pre_cells=facts.integer("num_preprocess_cells", 1, 64),
            enc_cells=facts.integer("num_cell_per_cond_enc", 1, 64),
            dec_cells=facts.integer("num_cell_per_cond_dec", 1, 64),
            post_cells=facts.integer("num_postprocess_cells", 1, 64),
            gated=facts.flag("use_se"),
            relative=facts.flag("res_dist"),
            floor=1e-2,
            flows=facts.integer("num_nf", 0, 16, 0),
            flow_elus=2,
            head="bernoulli" if gray else "normal" if mixtures == 1 else "logistic",
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
        # Four 1x1 convolutions of stride 2, each on another of four neighbouring pixels: one 2x2 convolution.
        quarter, parts, biases = outputs // 4, [], []
        for index, (down, right) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
            width = quarter if index < 3 else outputs - 3 * quarter
            own = self.conv(f"{name}.skip.conv_{index + 1}", width, inputs, 1)
            part = own.weight.new_zeros(width, inputs, 2, 2)
            part[:, :, down, right] = own.weight[:, :, 0, 0]
            parts.append(part)
            biases.append(own.bias)
        return Conv(torch.cat(parts), torch.cat(biases))

    def parts(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> tuple[list[Norm | None], list[Conv]]:
        kind, own = self.config.cells[role][index], f"{name}._ops.{index}"
        if kind in RESIDUAL:
            norm = {"res_elu": None, "res_bnelu": f"{own}.bn.bn"}.get(kind, f"{own}.bn_act")
            return [norm and self.norm(norm, inputs)], [self.conv(f"{own}.conv_0", outputs, inputs, 3)]  # type: ignore[list-item]
        first = 1 if stride < 0 else 0  # the upsampling is a layer of its own
        layers = ("{}.bn", "{}.conv.0", "{}.conv.1", "{}.conv.0", "{}.conv.1", "{}", "{}.bn")
        names = [
            layer.format(f"{own}.conv.{first + at}")
            for layer, at in zip(layers, (0, 1, 1, 2, 2, 3, 4), strict=True)
        ]
        return self.inverted(names, kind, inputs, outputs)

    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        return f"{name}.se.se.0", f"{name}.se.se.2"

    def flow(self, target: str, name: str, latent: int, mirror: bool) -> None:
        """An autoregressive cell: its three masked convolutions."""
        hidden = 6 * latent
        for own, layer, outputs, inputs, kernel, strict in (
            ("expand", "conv.convz.0", hidden, latent, 3, True),
            ("filter", "conv.convz.2", hidden, 1, 5, False),
            ("contract", "mu.conv_0", latent, hidden, 1, False),
        ):
            weight = self.read(f"{name}.{layer}.weight", outputs, inputs, kernel, kernel)
            weight = self._normed(
                f"{name}.{layer}",
                weight * causal_mask(outputs, inputs, kernel, strict, mirror).to(weight.device),
            )
            bias = (
                self.read(f"{name}.{layer}.bias", outputs) if own == "contract" else weight.new_zeros(outputs)
            )
            self.put(f"{target}.{own}", Conv(weight, bias))

    def walk(self) -> None:
        """All of it."""
        config, enc, dec = self.config, self.config.encoder, self.config.decoder
        blocks, depth, groups = len(enc) - config.scales, len(enc), self.sizes()
        self.put("encoder.stem", self.conv("stem", enc[0], config.image_channels, 3))
        for block in range(blocks):
            for index in range(config.pre_cells):
                at, last = block * config.pre_cells + index, index == config.pre_cells - 1
                role, width, step = ("down_pre", enc[block + 1], 2) if last else ("pre", enc[block], 1)
                self.cell(f"encoder.pre.{at}", f"pre_process.{at}", role, enc[block], width, step)
        at = 0  # in the tower, a flat list
        combiners = []
        for scale in reversed(range(config.scales)):
            width = enc[-1 - scale]
            for index in range(config.groups[scale]):
                step, first = sum(config.groups[scale + 1 :]) + index, 0
                if scale < config.scales - 1 and not index:
                    self.cell(
                        f"encoder.tower.{step}.0", f"enc_tower.{at}", "down_enc", enc[-2 - scale], width, 2
                    )
                    at, first = at + 1, 1
                for cell in range(config.enc_cells):
                    self.cell(f"encoder.tower.{step}.{first + cell}", f"enc_tower.{at}", "enc", width, width)
                    at += 1
                if scale or index < config.groups[scale] - 1:
                    combiners.append(at)
                    at += 1
        self.put("encoder.top", self.conv("enc0.1", enc[-1], enc[-1], 1))
        at = 0
        for index, (scale, inner, step) in enumerate(groups):
            latent, wide, width = config.latents[scale], enc[-1 - scale], dec[-1 - scale]
            self.put(f"encoder.samplers.{index}", self.conv(f"enc_sampler.{index}", 2 * latent, wide, 3))
            for flow in range(config.flows):
                for part, mirror in ((0, False), (1, True)):
                    name = f"nf_cells.{index * config.flows + flow}.cell{part + 1}"
                    self.flow(f"encoder.flows.{index}.{2 * flow + part}", name, latent, mirror)
            own = f"groups.{index}"
            if index:
                self.put(
                    f"encoder.mix.{index - 1}", self.conv(f"enc_tower.{combiners[step]}.conv", wide, width, 1)
                )
                first = 0
                if not inner:
                    self.cell(f"{own}.cells.0", f"dec_tower.{at}", "up_dec", dec[-scale], width, -1)
                    at, first = at + 1, 1
                for cell in range(config.dec_cells):
                    self.cell(f"{own}.cells.{first + cell}", f"dec_tower.{at}", "dec", width, width)
                    at += 1
                self.put(f"{own}.prior", self.conv(f"dec_sampler.{index - 1}.1", 2 * latent, width, 1))
            side = config.image_size >> (depth - 1 - scale)
            start = None if index else self.read("prior_ftr0", width, side, side)[None]
            self.combine(own, self.conv(f"dec_tower.{at}.conv", width, width + latent, 1), start)
            at += 1
        for block in range(blocks):
            coarse, fine = dec[blocks - block], dec[blocks - block - 1]
            for index in range(config.post_cells):
                at = block * config.post_cells + index
                role, width, step = ("post", fine, 1) if index else ("up_post", coarse, -1)
                self.cell(f"post.{at}", f"post_process.{at}", role, width, fine, step)
        mixtures = config.mixtures
        if config.head == "logistic":
            conv = self.conv("image_conditional.1", 10 * mixtures, dec[0], 3)
            order = torch.arange(mixtures, 10 * mixtures).view(
                3, 3, mixtures
            )  # colour; mean, scale or coefficient; component
            rest = [order[:, kind].flatten() for kind in (0, 2, 1)]
            order = torch.cat([torch.arange(mixtures), *rest])
            conv = Conv(conv.weight[order], conv.bias[order])
        else:
            conv = self.conv("image_conditional.1", 1 if config.head == "bernoulli" else 6, dec[0], 3)
        self.put("head.conv", conv)


class SerezD(Walk):
    """SerezD/NVAE-from-scratch: ``state_dict`` with named cells; weight norm as torch's parametrisation."""

    @staticmethod
    def configuration(facts: Facts) -> NVAEConfig:
        """From ``configuration``, as in the project's YAML files."""
        own = Facts(facts.values.get("autoencoder"), facts.where)
        shape = facts.values.get("resolution")
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != 3
            or shape[0] != 3
            or shape[1] != shape[2]
            or type(shape[1]) is not int
        ):
            raise facts.error("resolution", "[3, size, size]")
        scales, blocks = own.integer("num_scales", 1, 8), own.integer("num_pre-post_process_blocks", 0, 8)
        count, least = (
            own.integer("num_groups_per_scale", 1, 64),
            own.integer("min_groups_per_scale", 1, 64, 1),
        )
        adaptive = own.flag("is_adaptive", False)
        groups = tuple(max(least, count // 2**k) if adaptive else count for k in reversed(range(scales)))
        cells, base = (
            own.integer("num_pre-post_process_cells", 1, 64),
            own.integer("initial_channels", 4, 4096),
        )
        per_group = own.integer("num_cells_per_group", 1, 64)
        plain = ("res_bnswish", "res_bnswish")
        return NVAEConfig(
            image_channels=3,
            image_size=_size(facts, shape[1], blocks + scales - 1),
            groups=groups,
            latents=(own.integer("num_latent_per_group", 1, 1024),) * scales,
            encoder=tuple(base << k for k in range(blocks + scales)),
            decoder=tuple(base << k for k in range(blocks + scales)),
            cells={
                **dict.fromkeys(("pre", "down_pre", "enc", "down_enc"), plain),
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
            flows=0 if own.values.get("num_nf_cells") is None else own.integer("num_nf_cells", 0, 16),
            mixtures=own.integer("num_logistic_mixtures", 1, 100),
        )

    def conv(self, name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Conv:
        weight = self.read(f"{name}.parametrizations.weight.original1", outputs, inputs, kernel, kernel)
        length = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        weight = self.read(f"{name}.parametrizations.weight.original0", outputs, 1, 1, 1) * weight / length
        return Conv(weight, self.read(f"{name}.bias", outputs))

    def skip(self, name: str, inputs: int, outputs: int, stride: int) -> Conv:
        return self.conv(f"{name}.skip_connection.conv", outputs, inputs, 1)

    def parts(
        self, name: str, role: str, index: int, inputs: int, outputs: int, stride: int
    ) -> tuple[list[Norm | None], list[Conv]]:
        if self.config.cells[role][index] in RESIDUAL:
            return (
                [self.norm(f"{name}.residual.{3 * index}", inputs)],
                [self.conv(f"{name}.residual.{3 * index + 2}", outputs, inputs, 3)],
            )
        first = 1 if stride < 0 else 0
        names = [f"{name}.residual.{first + at}" for at in (0, 1, 2, 4, 5, 7, 8)]
        return self.inverted(names, self.config.cells[role][index], inputs, outputs)

    def gate(self, name: str, role: str, stride: int) -> tuple[str, str]:
        at = 6 if len(self.config.cells[role]) == 2 else 10 if stride < 0 else 9
        return f"{name}.residual.{at}.linear_1", f"{name}.residual.{at}.linear_2"

    def flow(self, target: str, name: str, latent: int) -> None:
        """A normalising-flow cell: its three masked convolutions, the masks being part of the file."""
        hidden = 6 * latent
        shapes = ((hidden, latent, 3, 3), (hidden, 1, 5, 5), (latent, hidden, 1, 1))
        for own, layer, shape in zip(("expand", "filter", "contract"), (0, 2, 4), shapes, strict=True):
            weight, mask = (self.read(f"{name}.layers.{layer}.{part}", *shape) for part in ("weight", "mask"))
            self.put(
                f"{target}.{own}", Conv(weight * mask, self.read(f"{name}.layers.{layer}.bias", shape[0]))
            )

    def walk(self) -> None:
        """All of it."""
        config, widths = self.config, self.config.encoder
        blocks, depth = len(widths) - config.scales, len(widths)
        self.put("encoder.stem", self.conv("preprocessing_block.init_conv", widths[0], 3, 3))
        for block in range(blocks):
            for index in range(config.pre_cells):
                last = index == config.pre_cells - 1
                role, width, step = ("down_pre", widths[block + 1], 2) if last else ("pre", widths[block], 1)
                name = f"preprocessing_block.block_{block}.cell_{index}"
                self.cell(
                    f"encoder.pre.{block * config.pre_cells + index}", name, role, widths[block], width, step
                )
        self.put("encoder.top", self.conv("encoder_0.1", widths[-1], widths[-1], 1))
        for index, (scale, inner, step) in enumerate(self.sizes()):
            latent, width = config.latents[scale], widths[-1 - scale]
            tag, own, tower = f"{scale}:{inner}", f"groups.{index}", f"encoder.tower.{step}"
            first = 0
            if scale < config.scales - 1 and not inner:
                self.cell(
                    f"{tower}.0",
                    f"encoder_tower.scale_{scale + 1}.downsampling",
                    "down_enc",
                    widths[-2 - scale],
                    width,
                    2,
                )
                first = 1
            for cell in range(config.enc_cells):
                self.cell(
                    f"{tower}.{first + cell}",
                    f"encoder_tower.scale_{scale}.group_{inner}.cell_{cell}",
                    "enc",
                    width,
                    width,
                )
            self.put(
                f"encoder.samplers.{index}", self.conv(f"enc_sampler.sampler_{tag}", 2 * latent, width, 3)
            )
            for flow in range(config.flows):
                for part in (0, 1):
                    self.flow(
                        f"encoder.flows.{index}.{2 * flow + part}",
                        f"nf_cells.nf_{tag}.{flow}.cell{part + 1}",
                        latent,
                    )
            if index:
                self.put(
                    f"encoder.mix.{index - 1}",
                    self.conv(f"encoder_combiners.combiner_{tag}.conv", width, width, 1),
                )
                first = 0
                if not inner:
                    self.cell(
                        f"{own}.cells.0",
                        f"decoder_tower.scale_{scale - 1}.upsampling",
                        "up_dec",
                        widths[-scale],
                        width,
                        -1,
                    )
                    first = 1
                for cell in range(config.dec_cells):
                    self.cell(
                        f"{own}.cells.{first + cell}",
                        f"decoder_tower.scale_{scale}.group_{inner}.cell_{cell}",
                        "dec",
                        width,
                        width,
                    )
                self.put(f"{own}.prior", self.conv(f"dec_sampler.sampler_{tag}.1", 2 * latent, width, 1))
            side = config.image_size >> (depth - 1 - scale)
            start = None if index else self.read("const_prior", 1, width, side, side)
            self.combine(
                own, self.conv(f"decoder_combiners.combiner_{tag}.conv", width, width + latent, 1), start
            )
        for block in range(blocks):
            coarse, fine = widths[blocks - block], widths[blocks - block - 1]
            for index in range(config.post_cells):
                role, width, step = ("post", fine, 1) if index else ("up_post", coarse, -1)
                name = f"postprocessing_block.block_{block}.cell_{index}"
                self.cell(f"post.{block * config.post_cells + index}", name, role, width, fine, step)
        mixtures = config.mixtures
        conv = self.conv("to_logits.1", 10 * mixtures, widths[0], 3)
        order = torch.arange(mixtures, 10 * mixtures).view(
            mixtures, 3, 3
        )  # component; mean, scale or coefficient; colour
        rest = [order[:, kind].T.flatten() for kind in (0, 2, 1)]
        order = torch.cat([torch.arange(mixtures), *rest])
        self.put("head.conv", Conv(conv.weight[order], conv.bias[order]))


LAYOUTS: dict[str, type[NVlabs] | type[SerezD]] = {"nvae-nvlabs": NVlabs, "nvae-serezd": SerezD}
DERIVED = (
    ".num_batches_tracked",
    ".weight_normalized",
)  # in some files, and of no use: a counter, and a copy of another tensor


def causal_mask(outputs: int, inputs: int, kernel: int, strict: bool, mirror: bool) -> Tensor:
    """The mask ``[outputs, inputs, k, k]`` of an autoregressive convolution: pixels before the centre in raster order, and at
    the centre the channels before the output's own (``strict``) or those up to it; ``inputs=1`` for a depthwise one.
    ``mirror`` turns the order of the pixels around.
    """
    mask = torch.zeros(outputs, inputs, kernel * kernel)
    middle = kernel * kernel // 2
    mask[:, :, :middle] = 1
    units = min(outputs, inputs)  # channels are ordered in as many blocks
    row, column = torch.arange(outputs)[:, None] * units // outputs, torch.arange(inputs) * units // inputs
    mask[:, :, middle] = (column < row if strict else column <= row).float()
    return (mask.flip(2) if mirror else mask).view(outputs, inputs, kernel, kernel)


def source_shapes(
    layout: str, facts: Mapping[str, Any], where: str = "the checkpoint"
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of this layout, built by these facts, has to hold.

    Raises:
        mlviews.WeightsError: if the facts make no network.
    """
    walk = _walk(layout, facts, None, where)
    return walk.expected


def load(
    checkpoint: Checkpoint, *, temperature: float = 1.0, levels: str = "group"
) -> NVAE:
    """From a checkpoint of NVlabs/NVAE or SerezD/NVAE-from-scratch; see :class:`NVAE` for the options.

    Differences of the two that stay: NVlabs adds 0.01 to every sigma; in SerezD's encoder the groups of a scale come in the
    decoder's order. NVlabs' gray models (MNIST, Omniglot) never learned the outer two pixels of their 32: their loss leaves them out.

    Raises:
        mlviews.WeightsError: if the file and what it says about itself do not agree, or make no network.
    """
    check_options(temperature, levels)
    config, tensors = convert(
        checkpoint.layout, checkpoint.tensors, checkpoint.facts, str(checkpoint.path)
    )
    return weights.fit(
        lambda: NVAE(config, temperature=temperature, levels=levels), tensors, checkpoint.path
    )


def convert(
    layout: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], where: str
) -> tuple[NVAEConfig, dict[str, Tensor]]:
    """Our configuration and weights from a checkpoint's.

    Args:
        layout: ``"nvae-nvlabs"`` or ``"nvae-serezd"``.
        tensors: its state dict.
        facts: what it says about the network; may hold anything.
        where: the file, for messages.

    Raises:
        mlviews.WeightsError: for facts that make no network, or tensors that are missing, unknown or of another shape.
    """
    expected = _walk(layout, facts, None, where).expected
    given = {name: value for name, value in tensors.items() if not name.endswith(DERIVED)}
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"{where} was made for another architecture than it says: missing {_some(missing)}; unknown {_some(unknown)}."
        )
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise WeightsError(
                f"{where} was made for another architecture than it says: {name} has shape {tuple(given[name].shape)}, expected {shape}."
            )
        if not given[name].is_floating_point():
            raise WeightsError(f"{where} is damaged: {name} holds {given[name].dtype}, not floats.")
    walk = _walk(layout, facts, given, where)
    return walk.config, walk.made


def _walk(layout: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, where: str) -> Walk:
    kind = LAYOUTS.get(layout)
    if kind is None:
        raise WeightsError(f"{where} holds {layout!r}, which is no NVAE; expected {listing(LAYOUTS)}.")
    walk = kind(kind.configuration(Facts(facts, where)), tensors)
    walk.walk()
    return walk


def _groups_of(kind: str, expand: Conv) -> int:
    """Groups of the filter of ``mconv_...``; 0 there means one for each channel."""
    return int(kind.rpartition("g")[2]) or len(expand.weight)


def _some(names: Sequence[str]) -> str:
    return (
        "none"
        if not names
        else listing(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    )


def _groups(scales: int, count: int, least: int, adaptive: bool) -> tuple[int, ...]:
    """Groups of each scale, coarse to fine: the finest has ``count``, every coarser one half as many if adaptive."""
    found = [count]
    for _ in range(scales - 1):
        found.append(max(least, found[-1] // 2) if adaptive else found[-1])
    return tuple(reversed(found))


def _size(facts: Facts, size: int, halvings: int) -> int:
    if not 1 <= size <= 4096 or size % 2**halvings:
        raise WeightsError(
            f"{facts.where} has no valid configuration: {size} pixels cannot be halved {halvings} times."
        )
    return size


def _arch(facts: Facts) -> dict[str, tuple[str, ...]]:
    """The operations of each kind of cell."""
    arch = facts.values.get("arch_instance")
    names = {"pre": "normal_pre", "enc": "normal_enc", "dec": "normal_dec", "post": "normal_post"}
    found = {role: arch.get(names.get(role, role)) if isinstance(arch, Mapping) else None for role in ROLES}
    for role, kinds in found.items():
        fine = isinstance(kinds, list | tuple) and 1 <= len(kinds) <= 8
        if not fine or not all(
            isinstance(kind, str) and (kind in RESIDUAL or INVERTED.fullmatch(kind)) for kind in kinds or ()
        ):
            raise facts.error(
                "arch_instance",
                f"a table of operations for each kind of cell, with known ones for {names.get(role, role)!r}",
            )
    return {role: tuple(kinds) for role, kinds in found.items() if kinds}
