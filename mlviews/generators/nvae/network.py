"""NVAE (Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder"), in plain PyTorch.

What a level is, and how images are encoded, is in :mod:`mlviews.generators.hierarchy`.

The network is the one that inference needs: every batch norm is an affine map (folded into a convolution
wherever one is next to it), weight norms are multiplied out, the 0.1 of the residual cells is in their
weights, and the constant that the decoder starts from has gone through its first convolution.

This file holds the decoder and the generator; the other parts are in :mod:`~mlviews.generators.nvae.cells`,
:mod:`~mlviews.generators.nvae.encoder` and :mod:`~mlviews.generators.nvae.likelihood`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators import hierarchy
from mlviews.generators.base import Latents
from mlviews.generators.hierarchy import HierarchicalVAE, Posterior, check_options
from mlviews.generators.nvae.cells import INVERTED, RESIDUAL, Cell, up_conv, widen
from mlviews.generators.nvae.config import ROLES, NVAEConfig
from mlviews.generators.nvae.encoder import Encoder
from mlviews.generators.nvae.likelihood import Gaussian, Head
from mlviews.weights import configs

__all__ = [
    "INVERTED",
    "NVAE",
    "RESIDUAL",
    "ROLES",
    "Cell",
    "Gaussian",
    "Head",
    "NVAEConfig",
    "up_conv",
    "widen",
]


# -- the decoder ---------------------------------------------------------------------------------------------


class Group(hierarchy.Group):
    """A latent group of the decoder: the cells before it, its prior, and how its latent joins the features.

    The first group has neither cells nor a learned prior; it starts from a constant.

    Args:
        config: the network's architecture.
        scale: the group's scale.
        index: its place among the groups of the scale.
    """

    def __init__(self, config: NVAEConfig, scale: int, index: int) -> None:
        super().__init__()
        width = config.decoder[-1 - scale]
        latent = config.latents[scale]
        side = config.image_size >> (len(config.decoder) - 1 - scale)
        first = scale == index == 0
        self.floor = config.floor
        self.shape = (latent, side, side)
        cells = []
        if scale and not index:
            cells.append(Cell(config, "up_dec", config.decoder[-scale], width))
        if not first:
            cells += [Cell(config, "dec", width, width) for _ in range(config.dec_cells)]
        self.cells = nn.Sequential(*cells)
        self.prior = None if first else nn.Conv2d(width, 2 * latent, 1)
        self.start = nn.Parameter(torch.zeros(1, width, side, side)) if first else None
        self.combine = nn.Conv2d(latent if first else width + latent, width, 1, bias=not first)

    def prepare(self, features: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
        """Return the features that this group's latent joins, and the raw parameters of its prior.

        Args:
            features: those after the group before, ``[B, C', h', w']``; None for the first group.
            rows: the size of the batch.

        Returns:
            ``[B, C, h, w]`` (of the first group ``[1, C, h, w]``) and ``[B, 2c, h, w]``.
        """
        if self.start is not None:
            channels, *size = self.shape
            return self.start, self.start.new_zeros(rows, 2 * channels, *size)
        assert features is not None
        assert self.prior is not None
        features = self.cells(features)
        return features, self.prior(F.elu(features))

    def enter(self, features: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        features, raw = self.prepare(features, rows)
        return (features, *Gaussian.of(raw, self.floor))

    def join(self, features: Tensor, z: Tensor) -> Tensor:
        z = z.to(features.dtype, memory_format=torch.channels_last)  # or torch.cat would leave the layout
        if self.start is not None:
            joined: Tensor = self.combine(z)
            return joined + features
        joined = self.combine(torch.cat([features, z], dim=1))
        return joined


# -- the generator -------------------------------------------------------------------------------------------


class NVAE(HierarchicalVAE):
    """A deep hierarchical VAE as a generator; its levels are the standard-normal noises of its latent groups.

    Args:
        config: the architecture.
        temperature: factor of every prior's standard deviation (paper, sec. 4.2), from 0.001 to 10.
        levels: ``"group"``: one level per latent group, of shape ``(channels, h, w)``; ``"scale"``: one per
            resolution, whose groups are stacked along the channels, ``(groups * channels, h, w)``. The images
            are the same.

    Raises:
        ValueError: for a temperature out of range, other levels, or a configuration whose parts do
            not fit together.
    """

    FORMAT = "mlviews.nvae"

    def __init__(
        self, config: NVAEConfig | None = None, *, temperature: float = 1.0, levels: str = "group"
    ) -> None:
        config = config or NVAEConfig()
        groups = [Group(config, scale, index) for scale, index in config.group_scales]
        image_shape = (config.image_channels, config.image_size, config.image_size)
        super().__init__(
            groups, config.groups, image_shape, temperature=temperature, levels=levels, unit="group"
        )
        self.config = config
        self.post = _post_processing(config)
        self.head = Head(config)
        self.encoder = Encoder(config)
        for weight in self.parameters():
            # On a CPU it is within 6 % of the other layout, either way (benchmarks/results/parity-nvae.json).
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def to_image(self, state: Tensor) -> Tensor:
        """Return the mean of the likelihood, whose own noise is nothing to look at."""
        return self.head.mean(self.post(state))

    @torch.no_grad()
    def elbo(self, images: Tensor, noise: Latents) -> tuple[Tensor, list[Tensor]]:
        """Return the two parts of the evidence lower bound, in nats.

        Args:
            images: as for :meth:`encode`; a "logistic" head takes them as whole gray values, of ``bits``
                bits.
            noise: standard normal, as for :meth:`encode`: the sample that the expectation is estimated from.

        Returns:
            The log likelihood ``[B]``, and each group's KL divergence ``[B]``, coarse to fine. The bound is
            the log likelihood less the sum of the divergences.

        Raises:
            ValueError: as :meth:`encode`.
        """
        images = self._checked_images(images)
        posterior = self.posterior(images, self._checked_noise(noise, len(images)))
        return self.log_likelihood(posterior.features, images), posterior.divergences

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        """Return ``log p(x | z)`` in nats ``[B]``, from the decoder's last features."""
        return self.head.log_probability(self.head(self.post(features)), images)

    def posterior(
        self,
        images: Tensor,
        noise: Latents | None = None,
        *,
        change: Callable[[int, Tensor], Tensor] | None = None,
        copies: int = 1,
    ) -> Posterior:
        group_noise = None if noise is None else self._split(noise)
        bottom_up = [level.repeat(copies, 1, 1, 1) for level in self.encoder(images)]
        features: Tensor | None = None
        latents = []
        divergences = []
        for index, group in enumerate(self.groups):
            # The group's prior, given the latents before it.
            features, prior_raw = group.prepare(features, copies * len(images))  # type: ignore[operator]
            prior = Gaussian.of(prior_raw, self.config.floor)
            # Its posterior, given the images too.
            raw = self.encoder.parameters_of(index, bottom_up, features)
            if index > 0 and self.config.relative:
                raw = raw + prior_raw
            z, divergence = self._draw(index, raw, prior, group_noise)
            eps, z = self._noise_and_value(index, z, *prior, change)
            latents.append(eps)
            divergences.append(divergence)
            features = group.join(features, z)  # type: ignore[operator]
        assert features is not None
        return Posterior(self._merge(latents), divergences, features)

    def _draw(
        self, index: int, raw: Tensor, prior: Gaussian, noise: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return a latent ``[B, c, h, w]`` of a group's posterior, and its divergence from the prior."""
        posterior = Gaussian.of(raw, self.config.floor)
        z = posterior.mean
        if noise is not None:
            z = torch.addcmul(posterior.mean, posterior.std, noise[index])
        if not self.config.flows:
            return z, posterior.divergence(prior)
        # With flows, an estimate from one sample: their Jacobian determinant is 1.
        log_density = posterior.log_density(z)
        z = self.encoder.flows[index](z.to(raw.dtype)).float()
        return z, log_density - prior.log_density(z)

    # -- files

    def metadata(self, provenance: dict[str, Any] | None = None) -> dict[str, str]:
        """Return what a file of this generator's ``state_dict`` says besides the weights."""
        return configs.metadata(self.FORMAT, self.config, provenance)

    @classmethod
    def load(cls, path: str | Path, *, temperature: float = 1.0, levels: str = "group") -> NVAE:
        """Read a file of ``mlviews.zoo.train_nvae`` or ``tune_nvae``; the bundled one is of the latter.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a temperature out of range, or other levels.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        check_options(temperature, levels, "group")

        def build(config: NVAEConfig) -> NVAE:
            return cls(config, temperature=temperature, levels=levels)

        return configs.load(path, cls.FORMAT, NVAEConfig, build)


def _post_processing(config: NVAEConfig) -> nn.Sequential:
    """Return the cells after the last group, which double the size up to that of the image."""
    cells = []
    widths = config.decoder[: len(config.decoder) - config.scales + 1]
    for before, after in itertools.pairwise(reversed(widths)):
        cells.append(Cell(config, "up_post", before, after))
        cells += [Cell(config, "post", after, after) for _ in range(config.post_cells - 1)]
    return nn.Sequential(*cells)
