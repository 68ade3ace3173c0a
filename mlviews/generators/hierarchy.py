"""Deep hierarchical VAEs as generators: what NVAE and VDVAE share.

The latents form groups, coarse to fine; group *i* is normal given the groups before it,
``z_i ~ N(mu_i(z_<i), sigma_i(z_<i))``. Here a level is parametrized by its **standard-normal noise**
``eps_i``, with ``z_i = mu_i + temperature * sigma_i * eps_i``, so that the prior of every level is N(0, 1),
as for every other generator, and :meth:`HierarchicalVAE.encode` returns noises too.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews.checks import is_number
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.levels import Blend


class Group(nn.Module):
    """A latent group of a decoder, whose latents have this shape ``(c, h, w)``."""

    shape: tuple[int, int, int]

    @abstractmethod
    def enter(self, features: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features that the latent joins, and the mean and standard deviation of its prior.

        Args:
            features: those after the group before, ``[B, C', h', w']``; None for the first group.
            rows: the size of the batch.

        Returns:
            ``[B, C, h, w]``, and twice ``[B, c, h, w]``; of the first group perhaps with 1 for B.
        """

    @abstractmethod
    def join(self, features: Tensor, z: Tensor) -> Tensor:
        """Return the features ``[B, C, h, w]`` with the latent ``[B, c, h, w]``."""


class Block(nn.Module):
    """A level: some groups of one scale.

    It ends where the next level's latent is needed, so that views share all that comes before. Its state is
    the features, and the mean and standard deviation of the next level's first prior; of the last block,
    features.

    Args:
        groups: all groups of the network, whose owner is the generator.
        start: the first group of this level.
        stop: the one after its last.
        temperature: factor of every standard deviation.
    """

    def __init__(self, groups: Sequence[Group], start: int, stop: int, temperature: float) -> None:
        super().__init__()
        # In a tuple they are not registered: the same weights belong to one module, whatever the levels are.
        self.groups = tuple(groups[start:stop])
        after = groups[stop] if stop < len(groups) else None
        self.following = (*groups[start + 1 : stop], after)
        self.temperature = temperature

    def forward(self, eps: Tensor, state: Any) -> Any:
        if state is None:
            state = self.groups[0].enter(None, len(eps))
        latent_channels = self.groups[0].shape[0]
        noises = eps.split(latent_channels, dim=1)  # [B, c, h, w] for each group
        for group, following, noise in zip(self.groups, self.following, noises, strict=True):
            features, mean, std = state
            z = torch.addcmul(mean, noise, std, value=self.temperature)
            features = group.join(features, z)
            if following is None:
                return features
            state = following.enter(features, len(eps))
        return state


class Posterior(NamedTuple):
    """What an encoder makes of ``B`` images."""

    latents: list[Tensor]  # of each level
    divergences: list[Tensor]  # of each group from its prior, nats [B]
    features: Tensor  # the decoder's, after the last group


class HierarchicalVAE(MLVGM):
    """A deep hierarchical VAE; its levels are the standard-normal noises of its latent groups.

    A subclass decodes in :meth:`to_image`, and encodes in :meth:`posterior`.

    Args:
        groups: coarse to fine.
        counts: the number of groups of each scale.
        image_shape: ``(C, H, W)``.
        temperature: factor of every prior's standard deviation, from 0.001 to 10.
        levels: ``unit``: one level per latent group, of shape ``(channels, h, w)``; ``"scale"``: one per
            resolution, whose groups are stacked along the channels, ``(groups * channels, h, w)``. The images
            are the same.
        unit: what the architecture calls a group.

    Raises:
        ValueError: for a temperature out of range, or other levels.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        counts: Sequence[int],
        image_shape: tuple[int, int, int],
        *,
        temperature: float,
        levels: str,
        unit: str,
    ) -> None:
        check_options(temperature, levels, unit)
        blocks = []
        named = []
        start = 0
        for name, count in _runs(counts, levels):
            latent, side, _ = groups[start].shape
            named.append(Level(f"{side}x{side}{name}", (count * latent, side, side)))
            blocks.append(Block(groups, start, start + count, temperature))
            start += count
        # Anchors have the whole prior: of so many latents, each cut at two standard deviations, none would
        # look like those of training.
        super().__init__(blocks, named, image_shape, truncation=None)
        self.temperature = float(temperature)
        self.merged = levels == "scale"
        self.counts = tuple(counts)
        self.groups = nn.ModuleList(groups)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Latents | None = None) -> list[Tensor]:
        """Return the latents of images, in the levels' space: :meth:`decode` turns them back into the images.

        They are noises in the prior's standard deviations, ``eps = (z - mu) / (temperature * sigma)``; so
        they are standard normal on average over images (at temperature 1) only as far as the posterior
        matches the prior.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.
            noise: standard-normal noise, one ``[B, *level.shape]`` per level, to sample the posterior, as
                :meth:`sample_latents` draws it with ``truncation=None``; None for the posterior's mean.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level.

        Raises:
            ValueError: if the images or the noise do not have these shapes.
        """
        images = self._checked_images(images)
        if noise is not None:
            noise = self._checked_noise(noise, len(images))
        return self.posterior(images, noise).latents

    def infer(self, images: Tensor) -> list[Tensor]:
        """Return the latents of images by the posterior's mean, differentiably."""
        return self.posterior(images).latents

    def regenerate(
        self,
        images: Tensor,
        blends: Sequence[Blend],
        noise: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return images like the given ones, see :meth:`MLVGM.regenerate`.

        Each group's posterior is inferred given the blended latents of the groups before it, as in Serez et
        al. 2025: what the images say of a finer level then fits to what became of the coarser ones.
        """
        images = self._checked_images(images)
        copies = self._copies(noise, len(images))
        runs = self.counts if self.merged else [1] * len(self.groups)  # groups of each level
        by_group = [blend for blend, count in zip(blends, runs, strict=True) for _ in range(count)]
        drawn: list[Tensor | None] = []
        for values, count in zip(noise, runs, strict=True):
            drawn += [None] * count if values is None else values.chunk(count, dim=1)

        def blended(index: int, eps: Tensor) -> Tensor:
            return by_group[index](eps, drawn[index])

        features = self.posterior(images, change=blended, copies=copies).features
        return self._images(features, copies * len(images))

    @abstractmethod
    def posterior(
        self,
        images: Tensor,
        noise: Latents | None = None,
        *,
        change: Callable[[int, Tensor], Tensor] | None = None,
        copies: int = 1,
    ) -> Posterior:
        """Go through the encoder and the decoder once, differentiably.

        Args:
            images: as for :meth:`encode`.
            noise: as for :meth:`encode`.
            change: takes a group's index and its latent in the prior's standard deviations, ``[B, c, h, w]``,
                and returns the latent to go on with; the groups after it depend on that.
            copies: how many copies of all images go through the decoder, one after the other.
        """

    def _noise_and_value(
        self,
        index: int,
        z: Tensor,
        mean: Tensor,
        std: Tensor,
        change: Callable[[int, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what a group's latent is in its prior's standard deviations, and its value to go on with.

        Args:
            index: the group's.
            z: the posterior's value, ``[B, c, h, w]``.
            mean: of the prior.
            std: of the prior.
            change: as for :meth:`posterior`.
        """
        eps = (z - mean) / (self.temperature * std)
        if change is not None:
            eps = change(index, eps)
            z = torch.addcmul(mean, eps, std, value=self.temperature)
        return eps, z

    def _split(self, latents: Latents) -> list[Tensor]:
        """Return one tensor per group, from one per level."""
        if not self.merged:
            return list(latents)
        parts: list[Tensor] = []
        for z, count in zip(latents, self.counts, strict=True):
            parts += z.chunk(count, dim=1)
        return parts

    def _merge(self, parts: list[Tensor]) -> list[Tensor]:
        """Return one tensor per level, from one per group."""
        if not self.merged:
            return parts
        rest = iter(parts)
        return [torch.cat(list(itertools.islice(rest, count)), dim=1) for count in self.counts]

    def _checked_noise(self, noise: Latents, rows: int) -> Latents:
        """Check noise, and return it in the generator's precision."""
        noise = self._checked(noise)
        if len(noise[0]) != rows:
            raise ValueError(f"Got noise for {len(noise[0])} images, and {rows} images: give each its own.")
        return noise


def check_options(temperature: float, levels: str, unit: str) -> None:
    """Raise a ValueError for a temperature that is not from 0.001 to 10, or levels that there are not."""
    if not is_number(temperature) or not 1e-3 <= temperature <= 10:
        raise ValueError(f"Invalid temperature={temperature!r}: it must be a number from 0.001 to 10.")
    if levels not in (unit, "scale"):
        raise ValueError(f"Invalid levels={levels!r}: it must be '{unit}' or 'scale'.")


def _runs(counts: Sequence[int], levels: str) -> list[tuple[str, int]]:
    """Return the number of groups of each level, and what its name has after its size."""
    if levels == "scale":
        return [("", count) for count in counts]
    # A group that is alone in its scale needs no number.
    return [(f".{index}" if count > 1 else "", 1) for count in counts for index in range(count)]
