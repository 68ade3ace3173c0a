"""NVAE (Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder"): decoder and encoder, in plain PyTorch.

The latents form groups, coarse to fine; group *i* is normal given the groups before it, ``z_i ~ N(mu_i(z_<i), sigma_i(z_<i))``.
Here a level is parametrised by its **standard-normal noise** ``eps_i``, with ``z_i = mu_i + temperature * sigma_i * eps_i``, so that the
prior of every level is N(0, 1), as for every other generator, and :meth:`NVAE.encode` returns noises too.

The network is the one that inference needs: every batch norm is an affine map (folded into a convolution wherever one is next to
it), weight norms are multiplied out, the 0.1 of the residual cells is in their weights, and the constant that the decoder starts from
has gone through its first convolution.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import is_number
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.weights import files as weights

ROLES = ("pre", "down_pre", "enc", "down_enc", "dec", "up_dec", "post", "up_post")
PLAIN = dict.fromkeys(ROLES, ("res_bnswish", "res_bnswish"))
"""The cells of the bundled model: two 3x3 convolutions everywhere, no depthwise ones, which are slow on a CPU."""


@dataclass(frozen=True)
class NVAEConfig:
    """Architecture of an :class:`NVAE`."""

    image_channels: int = 1
    image_size: int = 32  # pixels of one side
    groups: tuple[int, ...] = (3, 2, 1)  # latent groups of each scale, coarse to fine
    latents: tuple[int, ...] = (8, 4, 4)  # channels of one group's latent, per scale
    encoder: tuple[int, ...] = (16, 32, 48, 48)  # channels at full size, half, ... down to the coarsest scale
    decoder: tuple[int, ...] = (
        16,
        32,
        64,
        64,
    )  # the same; one entry for each pre-processing block and each scale
    cells: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: dict(PLAIN)
    )  # operations of each kind of cell
    pre_cells: int = 1  # cells of a pre-processing block, the last of which halves the size
    enc_cells: int = 1  # cells before each group, in the encoder
    dec_cells: int = 1  # and in the decoder
    post_cells: int = 1  # cells of a post-processing block, the first of which doubles the size
    gated: bool = False  # squeeze and excitation at the end of each cell
    skip: int = 2  # kernel of the halving skip connections: 2 (all four pixels) or 1 (one of them)
    relative: bool = True  # the posterior is relative to the prior (paper, sec. 3.2)
    floor: float = 0.0  # added to every sigma
    mirrored: bool = True  # the encoder meets the groups of a scale in the reverse of the decoder's order
    flows: int = 0  # pairs of autoregressive flow cells after each posterior (paper, sec. 3.2)
    flow_elus: int = 1  # activations before a flow cell's last convolution
    head: str = "logistic"  # likelihood: a mixture of discretised logistics, "bernoulli", or "normal"
    mixtures: int = 3  # components of "logistic"
    bits: int = 8  # of a pixel, for the likelihood

    def __post_init__(self) -> None:
        """Raises a ValueError unless the parts fit together; what a file says is bounded before anything is made of it."""
        depth, halvings = len(self.encoder), len(self.encoder) - 1
        counts = (
            *self.groups,
            *self.latents,
            *self.encoder,
            *self.decoder,
            self.pre_cells,
            self.enc_cells,
            self.dec_cells,
            self.post_cells,
        )
        fits = (
            len(self.latents) == len(self.groups) <= depth == len(self.decoder) <= 16
            and all(type(count) is int and 1 <= count <= 1 << 20 for count in counts)
            and sum(self.groups) <= 1024
            and max(counts[-4:]) <= 64
            and type(self.image_size) is int
            and 1 <= self.image_size <= 4096
            and self.image_size % 2**halvings == 0
            and self.skip in (1, 2)
            and 0 <= self.flows <= 16
            and 1 <= self.mixtures <= 100
            and 1 <= self.bits <= 8
            and set(self.cells) == set(ROLES)
        )
        if not fits:
            raise ValueError(f"{self} does not fit together.")

    @property
    def scales(self) -> int:
        """Number of resolutions that have latents."""
        return len(self.groups)


# -- parts ---------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """Scale and shift of each channel, ``[B, C, H, W] -> [B, C, H, W]``: what is left of a batch norm with fixed statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class Residual(nn.Module):
    """(Affine,) activation, (upsampling,) convolution: ``res_elu``, ``res_bnelu``, ``res_bnswish`` and ``res_bnswish5``."""

    def __init__(self, before: int, after: int, stride: int, kind: str, *, first: bool) -> None:
        super().__init__()
        self.swish = "swish" in kind
        # A later operation's batch norm is part of the convolution before it.
        self.norm = Affine(before) if first and "bn" in kind else None
        reach = 2 if kind.endswith("5") else 1  # "5": three taps that span five pixels
        self.conv = (
            up_conv(before, after, reach) if stride < 0 else nn.Conv2d(before, after, 3, stride, reach, reach)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        x = self.conv(F.silu(x) if self.swish else F.elu(x))
        return x


class Inverted(nn.Module):
    """``mconv_e6k5g0`` and the like: expand by 1x1, (upsample,) filter depthwise, contract by 1x1 (paper, fig. 3a)."""

    def __init__(self, before: int, after: int, stride: int, expand: int, kernel: int, groups: int) -> None:
        super().__init__()
        hidden = before * expand
        groups, reach = groups or hidden, kernel // 2
        # The expansion is before the upsampling, with which a 1x1 convolution and an activation commute.
        self.expand = nn.Conv2d(before, hidden, 1)
        self.filter = (
            up_conv(hidden, hidden, reach, groups)
            if stride < 0
            else nn.Conv2d(hidden, hidden, kernel, stride, reach, groups=groups)
        )
        self.contract = nn.Conv2d(hidden, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.contract(F.silu(self.filter(F.silu(self.expand(x)))))
        return x


def up_conv(before: int, after: int, reach: int, groups: int = 1) -> nn.ConvTranspose2d:
    """Nearest-neighbour upsampling and a convolution of ``2 * reach + 1`` taps a side as one transposed convolution; see :func:`widen`."""
    return nn.ConvTranspose2d(before, after, 2 * reach + 2, 2, reach, groups=groups)


def widen(weight: Tensor, groups: int = 1) -> Tensor:
    """The weight of :func:`up_conv` from that of the convolution after the upsampling.

    An output pixel sees each input pixel through those taps that fall on its two (by two) copies: their sum is one wider tap.

    Args:
        weight: ``[O, I / groups, k, k]``.
        groups: of the convolution.

    Returns:
        ``[I, O / groups, k + 1, k + 1]``.
    """
    side = weight.shape[-1]
    taps = torch.eye(side, device=weight.device, dtype=weight.dtype).flip(0)
    taps = F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))  # [k, k + 1]
    wide: Tensor = (taps.T @ weight @ taps).unflatten(0, (groups, -1))
    return wide.transpose(1, 2).flatten(0, 1)


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]


class Down(nn.Module):
    """The skip connection of a cell that halves the size."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.silu(x))
        return x


class Up(nn.Module):
    """The skip connection of a cell that doubles the size; its 1x1 convolution commutes with the interpolation, and comes first."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)


class Cell(nn.Module):
    """A residual cell: ``skip(x) + operations(x)``; the paper's factor of 0.1 is in the weights.

    Args:
        before: channels of the input.
        after: channels of the output.
        stride: 1, 2 to halve the size, -1 to double it.
        operations: names, as in :class:`NVAEConfig`.
        gated: squeeze and excitation at the end.
        skip: kernel of a halving skip connection.
    """

    def __init__(
        self, before: int, after: int, stride: int, operations: Sequence[str], gated: bool, skip: int
    ) -> None:
        super().__init__()
        self.skip: nn.Module | None = (
            None if stride == 1 else Down(before, after, skip) if stride == 2 else Up(before, after)
        )
        parts: list[nn.Module] = []
        for index, kind in enumerate(operations):
            width, step = (after, 1) if index else (before, stride)
            if inverted := INVERTED.fullmatch(kind):
                parts.append(Inverted(width, after, step, *map(int, inverted.groups())))
            elif kind in RESIDUAL:
                parts.append(Residual(width, after, step, kind, first=not index))
            else:
                raise ValueError(f"Unknown operation {kind!r} of a cell.")
        self.operations = nn.Sequential(*parts)
        self.gate = Gate(after) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.operations(x)
        y = y if self.gate is None else self.gate(y)
        x = x if self.skip is None else self.skip(x)
        return x + y


RESIDUAL = ("res_elu", "res_bnelu", "res_bnswish", "res_bnswish5")
INVERTED = re.compile(r"mconv_e([1-9])k(3|5|7|9|11)g(0|[1-9]\d?)")


class Gaussian(NamedTuple):
    """A diagonal normal, in float32 ``[B, C, H, W]``."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, parameters: Tensor, floor: float) -> Gaussian:
        """From raw mean and log standard deviation ``[B, 2C, H, W]``, both kept within ±5 softly, as the published models do."""
        mean, log = (5 * torch.tanh(parameters.float() / 5)).chunk(2, dim=1)
        return cls(mean, log.exp() + floor)

    def divergence(self, prior: Gaussian) -> Tensor:
        """KL divergence from the prior, nats ``[B]``."""
        ratio = self.std / prior.std
        return (
            0.5 * (((self.mean - prior.mean) / prior.std).square() + ratio.square() - 1) - ratio.log()
        ).sum((1, 2, 3))

    def log_density(self, z: Tensor) -> Tensor:
        """Log density, nats ``[B]``."""
        return -(
            0.5 * ((z - self.mean) / self.std).square() + self.std.log() + 0.5 * math.log(2 * math.pi)
        ).sum((1, 2, 3))


class Group(nn.Module):
    """A latent group of the decoder: the cells before it, its prior, and where its latent joins the features.

    The first group has neither cells nor a learned prior; it starts from a constant.
    """

    def __init__(self, config: NVAEConfig, scale: int, index: int) -> None:
        super().__init__()
        width, latent = config.decoder[-1 - scale], config.latents[scale]
        self.floor = config.floor
        self.shape = (latent, *[config.image_size >> (len(config.decoder) - 1 - scale)] * 2)
        first = scale == index == 0
        cells = []
        if scale and not index:
            cells.append(
                Cell(config.decoder[-scale], width, -1, config.cells["up_dec"], config.gated, config.skip)
            )
        if not first:
            cells += [
                Cell(width, width, 1, config.cells["dec"], config.gated, config.skip)
                for _ in range(config.dec_cells)
            ]
        self.cells = nn.Sequential(*cells)
        self.prior = None if first else nn.Conv2d(width, 2 * latent, 1)
        self.start = nn.Parameter(torch.zeros(1, width, *self.shape[1:])) if first else None
        self.combine = nn.Conv2d(latent if first else width + latent, width, 1, bias=not first)

    def prepare(self, features: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
        """From the features after the group before: those that this group's latent joins, and the raw parameters of its prior."""
        if self.start is not None:
            return self.start, self.start.new_zeros(rows, 2 * self.shape[0], *self.shape[1:])
        assert features is not None
        assert self.prior is not None
        features = self.cells(features)
        return features, self.prior(F.elu(features))

    def join(self, features: Tensor, z: Tensor) -> Tensor:
        """The features ``[B, C, H, W]`` with the latent ``[B, c, H, W]``."""
        z = z.to(features.dtype, memory_format=torch.channels_last)  # or torch.cat would leave the layout
        joined: Tensor = self.combine(z if self.start is not None else torch.cat([features, z], dim=1))
        return joined if self.start is None else joined + features


class Block(nn.Module):
    """A level: some groups of one scale. It ends where the next level's latent is needed, so that views share all that comes before.

    Args:
        groups: all groups of the network, whose owner is the :class:`NVAE`.
        start: the first one of this level.
        stop: the one after its last.
        temperature: factor of every standard deviation.
    """

    def __init__(self, groups: Sequence[Group], start: int, stop: int, temperature: float) -> None:
        super().__init__()
        # In a tuple they are not registered: the same weights belong to one module, whatever the levels are.
        self.groups = tuple(groups[start:stop])
        self.following = (*groups[start + 1 : stop], groups[stop] if stop < len(groups) else None)
        self.temperature = temperature

    def forward(self, eps: Tensor, state: Any) -> Any:
        if state is None:
            features, raw = self.groups[0].prepare(None, len(eps))
            state = (features, *Gaussian.of(raw, self.groups[0].floor))
        noises = eps.split(self.groups[0].shape[0], dim=1)
        for group, following, noise in zip(self.groups, self.following, noises, strict=True):
            features, mean, std = state
            features = group.join(features, torch.addcmul(mean, noise, std, value=self.temperature))
            if following is None:
                return features
            features, raw = following.prepare(features, len(eps))
            state = (features, *Gaussian.of(raw, following.floor))
        return state


class Flow(nn.Module):
    """One autoregressive cell ``z - f(z)``, of unit Jacobian determinant (paper, sec. 3.2); its masks are in the weights."""

    def __init__(self, latent: int, elus: int) -> None:
        super().__init__()
        hidden = 6 * latent
        self.expand = nn.Conv2d(latent, hidden, 3, padding=1)
        self.filter = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.contract = nn.Conv2d(hidden, latent, 1)
        self.elus = elus

    def forward(self, z: Tensor) -> Tensor:
        x = self.filter(F.elu(self.expand(z)))
        for _ in range(self.elus):
            x = F.elu(x)
        shift: Tensor = self.contract(x)
        return z - shift


class Encoder(nn.Module):
    """The bottom-up half, and the posterior of each group."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        widths, depth = config.encoder, len(config.encoder)

        def cell(role: str, before: int, after: int, stride: int = 1) -> Cell:
            return Cell(before, after, stride, config.cells[role], config.gated, config.skip)

        self.stem = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        pre: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[: depth - config.scales + 1]):
            pre += [cell("pre", before, before) for _ in range(config.pre_cells - 1)]
            pre.append(cell("down_pre", before, after, 2))
        self.pre = nn.Sequential(*pre)
        self.tower = nn.ModuleList()  # a step for each group, fine to coarse
        for scale in reversed(range(config.scales)):
            width = widths[-1 - scale]
            for index in range(config.groups[scale]):
                cells = [cell("enc", width, width) for _ in range(config.enc_cells)]
                if scale < config.scales - 1 and not index:
                    cells.insert(0, cell("down_enc", widths[-2 - scale], width, 2))
                self.tower.append(nn.Sequential(*cells))
        self.top = nn.Conv2d(widths[-1], widths[-1], 1)
        each = [(scale, index) for scale, count in enumerate(config.groups) for index in range(count)]
        self.mix = nn.ModuleList(
            nn.Conv2d(config.decoder[-1 - scale], widths[-1 - scale], 1) for scale, _ in each[1:]
        )
        self.samplers = nn.ModuleList(
            nn.Conv2d(widths[-1 - scale], 2 * config.latents[scale], 3, padding=1) for scale, _ in each
        )
        self.flows = nn.ModuleList(
            nn.Sequential(*(Flow(config.latents[scale], config.flow_elus) for _ in range(2 * config.flows)))
            for scale, _ in each
        )
        # The step after which the tower's features meet each group.
        self.meets = []
        for scale, index in each:
            finer = sum(config.groups[scale + 1 :])
            self.meets.append(finer + (config.groups[scale] - 1 - index if config.mirrored else index))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features for each group, coarse to fine, from images ``[B, C, H, W]`` in [0, 1]."""
        x = self.pre(self.stem(2 * images - 1))
        steps = []
        for step in self.tower:
            x = step(x)
            steps.append(x)
        return [F.elu(self.top(F.elu(x))), *(steps[meets] for meets in self.meets[1:])]

    def parameters_of(self, index: int, features: list[Tensor], decoder: Tensor) -> Tensor:
        """Raw parameters ``[B, 2c, H, W]`` of a group's posterior."""
        own = features[index] if not index else features[index] + self.mix[index - 1](decoder)
        parameters: Tensor = self.samplers[index](own)
        return parameters


class Head(nn.Module):
    """The likelihood ``p(x | z)``: features ``[B, C, H, W]`` to its parameters, its mean, and the log probability of images.

    ``logistic`` is a mixture of discretised logistics whose colours depend on each other linearly (Salimans et al. 2017). Its channels:
    logits, means, coefficients (RGB only), log scales, each by colour and then component.
    """

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.kind, self.colors, self.mixtures, self.bits, self.floor = (
            config.head, config.image_channels, config.mixtures, config.bits, config.floor,
        )  # fmt: skip
        if self.kind not in ("logistic", "bernoulli", "normal") or (
            self.kind == "logistic" and self.colors not in (1, 3)
        ):
            raise ValueError(f"Unknown head {self.kind!r} for {self.colors} channels.")
        coefficients = 3 if self.colors == 3 else 0
        self.sizes = {
            "bernoulli": (self.colors,),
            "normal": (self.colors, self.colors),
            "logistic": tuple(self.mixtures * part for part in (1, self.colors, coefficients, self.colors)),
        }[self.kind]
        self.conv = nn.Conv2d(config.decoder[0], sum(self.sizes), 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """All parameters of the likelihood."""
        parameters: Tensor = self.conv(F.elu(features))
        return parameters

    def mean(self, features: Tensor) -> Tensor:
        """The mean image in [0, 1]; what only the scales need is not computed. Of a mixture: as its authors take it, see :meth:`color`."""
        if self.kind == "bernoulli":
            return torch.sigmoid(self(features))
        count = sum(self.sizes[:-1])
        x = F.conv2d(F.elu(features), self.conv.weight[:count], self.conv.bias[:count], padding=1).float()  # type: ignore[index]
        return self.color(x)

    def color(self, x: Tensor) -> Tensor:
        """Images from all parameters but the scales: expected means, then expected coefficients times the colours before."""
        if self.kind == "normal":
            return (5 * torch.tanh(x / 5)).clamp(-1, 1) / 2 + 0.5
        logits, means, coefficients = x.split(self.sizes[:-1], dim=1)
        share = logits.softmax(1)[:, None]
        means = (means.unflatten(1, (self.colors, -1)) * share).sum(2)
        if self.colors == 1:
            gray: Tensor = means.clamp(-1, 1) / 2 + 0.5
            return gray
        a, b, c = (torch.tanh(coefficients.unflatten(1, (3, -1))) * share).sum(2).unbind(1)
        red, green, blue = means.unbind(1)
        red = red.clamp(-1, 1)
        green = (green + a * red).clamp(-1, 1)
        blue = (blue + b * red + c * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5

    def log_probability(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Log probability in nats ``[B]`` (``normal``: log density) of images in [0, 1], which "logistic" takes as whole grey values."""
        parameters = parameters.float()
        if self.kind == "bernoulli":
            return -F.binary_cross_entropy_with_logits(parameters, images, reduction="none").sum((1, 2, 3))
        x = 2 * images - 1
        if self.kind == "normal":
            return Gaussian.of(parameters, self.floor).log_density(x)
        logits, means, coefficients, scales = parameters.split(self.sizes, dim=1)
        means = means.unflatten(1, (self.colors, -1))  # [B, colour, component, H, W]
        if self.colors == 3:
            a, b, c = torch.tanh(coefficients.unflatten(1, (3, -1))).unbind(1)
            red, green = x[:, :1], x[:, 1:2]
            means = torch.stack(
                [means[:, 0], means[:, 1] + a * red, means[:, 2] + b * red + c * green], dim=1
            )
        scales = scales.unflatten(1, (self.colors, -1)).clamp(min=-7)
        half, inverse, value = 1 / (2**self.bits - 1), torch.exp(-scales), x[:, :, None]
        above, below = inverse * (value - means + half), inverse * (value - means - half)
        # log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), whose last term is common; the outer bins reach to infinity.
        lower, upper = F.logsigmoid(above), F.logsigmoid(-below)
        inner = torch.log(-torch.expm1(-2 * half * inverse))
        edge_low, edge_high = value < -1 + half, value > 1 - half
        log = torch.where(edge_low, lower, torch.where(edge_high, upper, lower + upper + inner))
        return torch.logsumexp(log.sum(1) + logits.log_softmax(1), dim=1).sum((1, 2))


class Posterior(NamedTuple):
    """What the encoder makes of ``B`` images."""

    latents: list[Tensor]  # of each level
    divergences: list[Tensor]  # of each group from its prior, nats [B]
    features: Tensor  # the decoder's, after the last group


# -- the generator -------------------------------------------------------------------------------------------------


class NVAE(MLVGM):
    """A deep hierarchical VAE as a generator, whose levels are the standard-normal noises of its latent groups.

    Args:
        config: the architecture.
        temperature: factor of every prior's standard deviation (paper, sec. 4.2), above 0.
        levels: ``"group"``: one level per latent group, of shape ``(channels, h, w)``; ``"scale"``: one per resolution, whose groups
            are stacked along the channels, ``(groups * channels, h, w)``. The images are the same.

    Raises:
        ValueError: for a temperature that is not positive, other levels, or a configuration that does not fit together.
    """

    FORMAT = "mlviews.nvae"

    def __init__(
        self, config: NVAEConfig | None = None, *, temperature: float = 1.0, levels: str = "group"
    ) -> None:
        config = config or NVAEConfig()
        check_options(temperature, levels)
        depth = len(config.encoder)
        groups = [
            Group(config, scale, index) for scale, count in enumerate(config.groups) for index in range(count)
        ]
        runs = (
            [(k, 1) for k, count in enumerate(config.groups) for _ in range(count)]
            if levels == "group"
            else list(enumerate(config.groups))
        )
        blocks, named, start = [], [], 0
        seen: dict[int, int] = {}
        for scale, count in runs:
            blocks.append(Block(groups, start, start + count, temperature))
            latent, side, _ = groups[start].shape
            index = seen[scale] = seen.get(scale, -1) + 1
            suffix = f".{index}" if levels == "group" and config.groups[scale] > 1 else ""
            named.append(Level(f"{side}x{side}{suffix}", (count * latent, side, side)))
            start += count
        # The whole prior: of so many latents, each cut at two standard deviations, none would look like those of training.
        super().__init__(
            blocks, named, (config.image_channels, config.image_size, config.image_size), truncation=None
        )
        self.config, self.temperature, self.merged = config, float(temperature), levels == "scale"
        self.groups = nn.ModuleList(groups)
        post = []
        for before, after in itertools.pairwise(reversed(config.decoder[: depth - config.scales + 1])):
            post.append(Cell(before, after, -1, config.cells["up_post"], config.gated, config.skip))
            post += [
                Cell(after, after, 1, config.cells["post"], config.gated, config.skip)
                for _ in range(config.post_cells - 1)
            ]
        self.post = nn.Sequential(*post)
        self.head = Head(config)
        self.encoder = Encoder(config)
        for weight in self.parameters():
            if (
                weight.ndim == 4
            ):  # on a CPU within 6 % of the other layout, either way (benchmarks/results/parity-nvae.json)
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def to_image(self, state: Tensor) -> Tensor:
        """The mean of the likelihood, whose own noise is nothing to look at."""
        return self.head.mean(self.post(state))

    def posterior(self, images: Tensor, noise: Latents | None = None) -> Posterior:
        """One pass through the encoder and the decoder, differentiable; see :meth:`encode` for the arguments."""
        rows, groups = len(images), list(self.groups)
        split = None if noise is None else self._split(noise)
        bottom_up = self.encoder(images)
        features: Tensor | None = None
        found, divergences = [], []
        for index, group in enumerate(groups):
            features, raw = group.prepare(features, rows)  # type: ignore[operator]
            prior = Gaussian.of(raw, self.config.floor)
            own = self.encoder.parameters_of(index, bottom_up, features)
            z, divergence = self._draw(
                index, own + raw if index and self.config.relative else own, prior, split
            )
            divergences.append(divergence)
            found.append((z - prior.mean) / (self.temperature * prior.std))
            features = group.join(features, z)  # type: ignore[operator]
        assert features is not None
        return Posterior(self._merge(found), divergences, features)

    def _draw(
        self, index: int, raw: Tensor, prior: Gaussian, noise: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """A latent from the posterior, and its divergence from the prior."""
        posterior = Gaussian.of(raw, self.config.floor)
        z = posterior.mean if noise is None else torch.addcmul(posterior.mean, posterior.std, noise[index])
        if not self.config.flows:
            return z, posterior.divergence(prior)
        log = posterior.log_density(z)
        z = self.encoder.flows[index](z.to(raw.dtype)).float()
        return z, log - prior.log_density(
            z
        )  # an estimate from one sample: the flow's Jacobian determinant is 1

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Latents | None = None) -> list[Tensor]:
        """The latents of given images, in the levels' space: noises that :meth:`decode` turns back into the images.

        They are measured in the prior's standard deviations, ``eps = (z - mu) / (temperature * sigma)``, and so they are standard normal
        on average over images (at temperature 1) only as far as the posterior matches the prior.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.
            noise: standard-normal noise like :meth:`sample_latents` gives (with ``truncation=None``), to sample the posterior;
                None for its mean.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level.

        Raises:
            ValueError: if the images or the noise do not have these shapes.
        """
        images = self._checked_images(images)
        return self.posterior(
            images, None if noise is None else self._checked_noise(noise, len(images))
        ).latents

    @torch.no_grad()
    def elbo(self, images: Tensor, noise: Latents) -> tuple[Tensor, list[Tensor]]:
        """The evidence lower bound's two parts, in nats.

        Args:
            images: as for :meth:`encode`; a "logistic" head takes them as whole grey values, of ``bits`` bits.
            noise: standard normal, as for :meth:`encode`: the sample that the expectation is estimated from.

        Returns:
            The log likelihood ``[B]``, and each group's KL divergence ``[B]``, coarse to fine; the bound is the first less the others.
        """
        images = self._checked_images(images)
        found = self.posterior(images, self._checked_noise(noise, len(images)))
        return self.log_likelihood(found.features, images), found.divergences

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        """``log p(x | z)`` in nats ``[B]``, from the decoder's last features."""
        return self.head.log_probability(self.head(self.post(features)), images)

    def _checked_noise(self, noise: Latents, rows: int) -> Latents:
        noise = self._checked(noise)
        if len(noise[0]) != rows:
            raise ValueError(f"Got noise for {len(noise[0])} images, and {rows} images: give each its own.")
        return noise

    def _checked_images(self, images: Tensor) -> Tensor:
        shape = ("B", *self.image_shape)
        if (
            not isinstance(images, Tensor)
            or not images.is_floating_point()
            or images.shape[1:] != self.image_shape
            or images.ndim != 4
        ):
            found = (
                f"{images.dtype} {tuple(images.shape)}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise ValueError(
                f"Invalid images, {found}: expected floats in [0, 1] of shape ({', '.join(map(str, shape))})."
            )
        if images.device != self.device:
            raise ValueError(f"Invalid images on {images.device}: the generator is on {self.device}.")
        return images.to(self._place.dtype)  # type: ignore[arg-type]

    def _split(self, latents: Latents) -> list[Tensor]:
        """One tensor per group, from one per level."""
        if not self.merged:
            return list(latents)
        return [
            part
            for z, size in zip(latents, self.config.latents, strict=True)
            for part in z.split(size, dim=1)
        ]

    def _merge(self, parts: list[Tensor]) -> list[Tensor]:
        """One tensor per level, from one per group."""
        if not self.merged:
            return parts
        rest = iter(parts)
        return [torch.cat([next(rest) for _ in range(count)], dim=1) for count in self.config.groups]

    # -- files -------------------------------------------------------------------------------------------------------

    def metadata(self, provenance: dict[str, Any] | None = None) -> dict[str, str]:
        """What a file of this generator's ``state_dict`` says besides the weights."""
        return {
            "format": self.FORMAT,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "provenance": json.dumps(provenance or {}),
        }

    @classmethod
    def load(cls, path: str | Path, *, temperature: float = 1.0, levels: str = "group") -> NVAE:
        """Read a file of ``mlviews.zoo.train_nvae``, as the bundled one is.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a temperature that is not positive, or other levels.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        check_options(temperature, levels)
        tensors, metadata = weights.read_safetensors(path, cls.FORMAT)
        return weights.fit(
            lambda: cls(_config(metadata["config"]), temperature=temperature, levels=levels), tensors, path
        )


def check_options(temperature: float, levels: str) -> None:
    if not is_number(temperature) or not 1e-3 <= temperature <= 10:
        raise ValueError(f"Invalid temperature={temperature!r}: it must be a number from 0.001 to 10.")
    if levels not in ("group", "scale"):
        raise ValueError(f"Invalid levels={levels!r}: it must be 'group' or 'scale'.")


def _config(text: str) -> NVAEConfig:
    """A configuration from a file's metadata; whatever is wrong with it becomes an exception."""
    stored: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
    }
    stored["cells"] = {role: tuple(kinds) for role, kinds in stored["cells"].items()}
    return NVAEConfig(**stored)
