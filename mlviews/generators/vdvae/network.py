"""VDVAE (Child 2021, "Very Deep VAEs Generalize Autoregressive Models"), in plain PyTorch.

A latent group is a block of the decoder; there are up to forty at a resolution. What a level is, and how
images are encoded, is in :mod:`mlviews.generators.hierarchy`. The affine map before the output is folded
into its convolution, and the scales of the mixture of logistics, which no image needs, are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators import hierarchy
from mlviews.generators.base import Latents
from mlviews.generators.hierarchy import HierarchicalVAE, Posterior
from mlviews.generators.nvae.likelihood import Gaussian

LOCAL = 2
"""Pixels of one side of features up to which all convolutions are 1x1."""


@dataclass(frozen=True)
class VDVAEConfig:
    """Architecture of a :class:`VDVAE`; the default is a small one."""

    counts: dict[int, int] = dataclasses.field(default_factory=lambda: {1: 1, 4: 2, 8: 2})
    """Latent groups by pixels of one side, coarse to fine; the last one is that of the images."""

    encoder: tuple[tuple[int, int], ...] = ((8, 1), (8, 2), (4, 1), (4, 4), (1, 1))
    """Pixels of one side that each block of the encoder takes, and by how much it then divides them."""

    widths: dict[int, int] = dataclasses.field(default_factory=lambda: {1: 16, 4: 16, 8: 16})
    """Channels by pixels of one side."""

    inner: dict[int, int] = dataclasses.field(default_factory=lambda: {1: 4, 4: 4, 8: 4})
    """Channels between a block's first and last convolution, likewise."""

    biases: int = 64  # pixels of one side up to which the decoder's features start from a constant
    latent: int = 16  # channels of a group's latent
    mixtures: int = 10  # components of the mixture of logistics
    mean: float = 0.5  # of the values in the training's images in [0, 1], which the encoder subtracts
    std: float = 0.25  # and by which it then divides

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together."""
        sizes = list(self.counts)
        counts = [*sizes, *self.counts.values(), *self.widths.values(), *self.inner.values()]
        fits = (
            len(sizes) >= 1
            and set(self.widths) == set(self.inner) == set(sizes)
            and min(*counts, self.latent, self.mixtures) >= 1
            and all(fine % coarse == 0 and coarse < fine for coarse, fine in itertools.pairwise(sizes))
            and all(self.widths[fine] <= self.widths[coarse] for coarse, fine in itertools.pairwise(sizes))
            and self.std > 0
            and self._descends()
        )
        if not fits:
            raise ValueError(f"{str(self)[:300]} does not fit together.")

    def _descends(self) -> bool:
        """Does the encoder go from the images' resolution to the coarsest one, through all of them?"""
        size = self.image_size
        passed = {size}
        for block_size, down in self.encoder:
            if block_size != size or down < 1 or size % down:
                return False
            size //= down
            passed.add(size)
        return passed == set(self.counts)

    @property
    def image_size(self) -> int:
        """Pixels of one side of the images."""
        return max(self.counts)


class Bottleneck(nn.Module):
    """Four convolutions, each after a GELU: 1x1, twice 3x3 (1x1 on up to 2x2 pixels), and 1x1.

    ``[B, C, h, w] -> [B, C', h, w]``.
    """

    def __init__(self, channels: int, inner: int, out_channels: int, size: int) -> None:
        super().__init__()
        side = 3 if size > LOCAL else 1
        self.c1 = nn.Conv2d(channels, inner, 1)
        self.c2 = nn.Conv2d(inner, inner, side, padding=side // 2)
        self.c3 = nn.Conv2d(inner, inner, side, padding=side // 2)
        self.c4 = nn.Conv2d(inner, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.c1, self.c2, self.c3, self.c4):
            x = conv(F.gelu(x))
        return x


class Group(hierarchy.Group):
    """A block of the decoder: its prior and posterior, and how its latent joins the features.

    Args:
        config: the network's architecture.
        size: h and w.
        first: whether it is the first one of its resolution, which upsamples the features before.
    """

    def __init__(self, config: VDVAEConfig, size: int, first: bool) -> None:
        super().__init__()
        width, inner, latent = config.widths[size], config.inner[size], config.latent
        self.shape = (latent, size, size)
        self.width = width
        self.splits = [latent, latent, width]
        self.enc = Bottleneck(2 * width, inner, 2 * latent, size)
        self.prior = Bottleneck(width, inner, 2 * latent + width, size)
        self.z_proj = nn.Conv2d(latent, width, 1)
        self.resnet = Bottleneck(width, inner, width, size)
        biased = first and size <= config.biases
        self.start = nn.Parameter(torch.zeros(1, width, size, size)) if biased else None

    def features(self, before: Tensor | None) -> Tensor:
        """Return what the prior looks at, ``[B, C, h, w]``; of the first group ``[1, C, h, w]``.

        Args:
            before: the features after the group before, ``[B, C', h', w']``; None for the first group.
        """
        if before is None:
            assert self.start is not None
            return self.start
        size = self.shape[1]
        if before.shape[2] == size:
            return before
        upsampled = F.interpolate(before[:, : self.width], size=(size, size))
        return upsampled if self.start is None else upsampled + self.start

    def split(self, features: Tensor) -> tuple[Tensor, Gaussian]:
        """Return the features that the latent joins, and its prior."""
        mean, log_std, residual = self.prior(features).split(self.splits, dim=1)
        return features + residual, Gaussian(mean.float(), log_std.float().exp())

    def enter(self, features: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        joined, prior = self.split(self.features(features))
        return joined, prior.mean, prior.std

    def join(self, features: Tensor, z: Tensor) -> Tensor:
        # Sums into what a convolution has just made: fresh memory for features as wide as these costs time.
        x: Tensor = self.z_proj(z.to(features.dtype)).add_(features)
        joined: Tensor = self.resnet(x).add_(x)
        return joined


class Encoder(nn.Module):
    """The bottom-up half: from images to features at each resolution."""

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__()
        self.widths = config.widths
        self.downs = [down for _, down in config.encoder]
        self.in_conv = nn.Conv2d(3, config.widths[config.image_size], 3, padding=1)
        self.enc_blocks = nn.ModuleList(
            Bottleneck(config.widths[size], config.inner[size], config.widths[size], size)
            for size, _ in config.encoder
        )

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return features ``[B, C, h, w]`` by pixels of one side, from normalized images."""
        x = self.in_conv(images)
        features = {x.shape[2]: x}
        for block, down in zip(self.enc_blocks, self.downs, strict=True):
            x = x + block(x)
            if down > 1:
                x = F.avg_pool2d(x, down)
                # There may be more channels at the coarser resolution: the others begin with zeros.
                x = F.pad(x, (0, 0, 0, 0, 0, self.widths[x.shape[2]] - x.shape[1]))
            features[x.shape[2]] = x
        return features


class Head(nn.Module):
    """From features ``[B, C, H, W]`` to images: the mean of a mixture of discretized logistics.

    The colors of a component depend on each other linearly (Salimans et al. 2017). They are those that the
    original code makes of the component at its logistics' means, clipped to the range of images.
    """

    def __init__(self, width: int, mixtures: int) -> None:
        super().__init__()
        self.sizes = [mixtures, 3 * mixtures, 3 * mixtures]  # of logits, means, coefficients
        self.conv = nn.Conv2d(width, sum(self.sizes), 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]`` in [0, 1]."""
        logits, means, coefficients = self.conv(features).float().split(self.sizes, dim=1)
        red, green, blue = means.chunk(3, dim=1)  # [B, component, H, W] each
        a, b, c = coefficients.tanh().chunk(3, dim=1)  # likewise
        # Each color given the colors before it.
        red = red.clamp(-1, 1)
        green = (green + a * red).clamp(-1, 1)
        blue = (blue + b * red + c * green).clamp(-1, 1)
        # The expectation over components.
        colors = torch.stack([red, green, blue], dim=1)  # [B, 3, component, H, W]
        mean: Tensor = (colors * logits.softmax(1)[:, None]).sum(2)
        return mean / 2 + 0.5


class VDVAE(HierarchicalVAE):
    """VDVAE as a generator, with random weights; images ``[B, 3, H, W]`` in [0, 1].

    :func:`mlviews.generators.vdvae.reading.load` makes one of a file's weights.

    Args:
        config: the architecture; None for a small one.
        temperature: factor of every prior's standard deviation, from 0.001 to 10.
        levels: ``"scale"``: one level per resolution, whose groups are stacked along the channels,
            ``(groups * channels, h, w)``; ``"block"``: one per latent group, ``(channels, h, w)``. The images
            are the same.

    Raises:
        ValueError: for a temperature out of range, or other levels.
    """

    def __init__(
        self, config: VDVAEConfig | None = None, *, temperature: float = 1.0, levels: str = "scale"
    ) -> None:
        config = config or VDVAEConfig()
        groups = [
            Group(config, size, index == 0) for size, count in config.counts.items() for index in range(count)
        ]
        side = config.image_size
        super().__init__(
            groups,
            list(config.counts.values()),
            (3, side, side),
            temperature=temperature,
            levels=levels,
            unit="block",
        )
        self.config = config
        self.head = Head(config.widths[side], config.mixtures)
        self.encoder = Encoder(config)

    def to_image(self, state: Tensor) -> Tensor:
        """Return the mean of the likelihood, whose own noise is nothing to look at."""
        images: Tensor = self.head(state)
        return images

    def posterior(
        self,
        images: Tensor,
        noise: Latents | None = None,
        *,
        change: Callable[[int, Tensor], Tensor] | None = None,
        copies: int = 1,
    ) -> Posterior:
        noises = None if noise is None else self._split(noise)
        encoded = self.encoder((images - self.config.mean) / self.config.std)
        bottom_up = {size: level.repeat(copies, 1, 1, 1) for size, level in encoded.items()}
        rows = copies * len(images)
        features: Tensor | None = None
        latents = []
        divergences = []
        for index, group in enumerate(self.groups):
            assert isinstance(group, Group)
            # Of the first group, all rows have the same features.
            before = group.features(features).expand(rows, -1, -1, -1)  # [B, C, h, w]
            # The group's prior, given the latents before it, and its posterior, given the images too.
            joined, prior = group.split(before)
            raw = group.enc(torch.cat([before, bottom_up[group.shape[1]]], dim=1))
            mean, log_std = raw.float().chunk(2, dim=1)
            posterior = Gaussian(mean, log_std.exp())
            z = posterior.mean
            if noises is not None:
                z = torch.addcmul(posterior.mean, posterior.std, noises[index])
            eps, z = self._noise_and_value(index, z, *prior, change)
            latents.append(eps)
            divergences.append(posterior.divergence(prior))
            features = group.join(joined, z)
        assert features is not None
        return Posterior(self._merge(latents), divergences, features)
