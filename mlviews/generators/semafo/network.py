"""SemafoVAE (Trong 2022, arXiv 2203.05074): a hierarchical VAE whose priors a label controls at every level.

Its latents are ``u ~ p(u | y)``, ``z0 ~ p(z0 | u)`` and ``z1 ~ p(z1 | z0, u)``: the label y of an image is
known at every level, and only through u, the "semaphore". Each is normal given those before it, ``z ~ N(mu,
sigma)``, and a level of the generator is the **standard-normal noise** ``eps`` of ``z = mu + sigma * eps``,
as in :mod:`mlviews.generators.hierarchy`. The same noise under another label is therefore another *value*:
:meth:`SemafoVAE.values` and :meth:`SemafoVAE.noises` translate, and :meth:`SemafoVAE.relabel` keeps values.

The structure is that of the author's code, in fewer and narrower layers, with these differences: u is
inferred from the image and its label, ``q(u | x, y)``, where the original has ``q(u | y)`` (u would then
know nothing of an image but its label, and moving it within a class would mean nothing); ``p(u | y)`` is
one normal a class; the mean of ``p(z1 | z0, u)`` depends on u alone; and ``q(y | x)`` is a network of its
own, not read from z0, which so need not say the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.nvae.likelihood import Gaussian
from mlviews.generators.semafo.config import SemafoConfig
from mlviews.levels import Blend, level_index
from mlviews.weights import configs

_SIDE = 4  # of the decoder's first features, and of z1


# -- the decoder ---------------------------------------------------------------------------------------------


class LevelU(nn.Module):
    """The first block: u, and the prior of z0 given it.

    Its input is the noise ``[B, d]``, and mean and standard deviation of ``p(u | y)``.
    """

    def __init__(self, config: SemafoConfig) -> None:
        super().__init__()
        self.floor = config.floor
        self.prior = nn.Sequential(
            nn.Linear(config.u, config.features), nn.ELU(), nn.Linear(config.features, 2 * config.z0)
        )

    def after(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next block's state: u, and mean and standard deviation of ``p(z0 | u)``."""
        return u, *Gaussian.of(self.prior(u), self.floor)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], state: None) -> tuple[Tensor, Tensor, Tensor]:
        noise, mean, std = inputs
        return self.after(torch.addcmul(mean, std, noise).to(noise.dtype))


class LevelZ0(nn.Module):
    """The second block: z0, the features ``[B, C, 4, 4]`` that it makes, and the prior of z1 given z0 and u.

    The prior's mean depends on u alone, its standard deviation on both. If z0 could move the mean, z1 would
    repeat for nothing what z0 says, and the decoder would listen to z1 alone.
    """

    def __init__(self, config: SemafoConfig) -> None:
        super().__init__()
        self.floor = config.floor
        self.width = config.decoder[-1]
        self.dense = nn.Sequential(
            nn.Linear(config.z0, config.features),
            nn.ELU(),
            nn.Linear(config.features, self.width * _SIDE**2),
        )
        self.prior = nn.Conv2d(self.width, config.z1, 3, padding=1)
        self.skip = nn.Sequential(
            nn.Linear(config.u, config.features),
            nn.ELU(),
            nn.Linear(config.features, 2 * config.z1 * _SIDE**2),
        )

    def after(self, z0: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next block's state: features, and mean and standard deviation of ``p(z1 | z0, u)``."""
        features = self.dense(z0).view(-1, self.width, _SIDE, _SIDE)  # [B, C, 4, 4]
        log_std = self.prior(F.elu(features))  # [B, c, 4, 4]
        mean, skip = self.skip(u).view(len(u), 2, *log_std.shape[1:]).unbind(1)
        return features, *Gaussian.of(torch.cat([mean, log_std + skip], 1), self.floor)

    def forward(self, noise: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        u, mean, std = state
        return self.after(torch.addcmul(mean, std, noise).to(noise.dtype), u)


class LevelZ1(nn.Module):
    """The last block: z1 ``[B, c, 4, 4]``, which joins the features."""

    def __init__(self, config: SemafoConfig) -> None:
        super().__init__()
        width = config.decoder[-1]
        self.z1 = nn.Conv2d(config.z1, width, 3, padding=1)
        self.features = nn.Conv2d(width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)

    def after(self, z1: Tensor, features: Tensor) -> Tensor:
        """Return the features ``[B, C, 4, 4]`` with z1."""
        deterministic = self.features(F.elu(features))
        joined: Tensor = self.join(F.elu(torch.cat([self.z1(z1), deterministic], 1)))
        return features + joined

    def forward(self, noise: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        features, mean, std = state
        return self.after(torch.addcmul(mean, std, noise).to(noise.dtype), features)


class Doubling(nn.Module):
    """Features of twice the size: ``[B, C, H, W] -> [B, C', 2H, 2W]``."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, before)
        self.mix = nn.Conv2d(before, before, 3, padding=1)
        self.up = nn.ConvTranspose2d(before, after, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(F.elu(self.norm(x)))
        doubled: Tensor = self.up(F.elu(x))
        return doubled


# -- the encoder ---------------------------------------------------------------------------------------------


class Halving(nn.Module):
    """Features of half the size: ``[B, C, H, W] -> [B, C', H / 2, W / 2]``."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 4, 2, 1)
        self.norm = nn.GroupNorm(groups, after)
        self.mix = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.down(x)))
        return F.elu(x + self.mix(x))


class Features(nn.Module):
    """From images to maps ``[B, C, 4, 4]`` and dense features ``[B, F]``."""

    def __init__(self, config: SemafoConfig, width: int) -> None:
        super().__init__()
        widths = (config.image_channels, *config.encoder)
        self.trunk = nn.Sequential(
            *(Halving(before, after, config.groups) for before, after in pairwise(widths))
        )
        self.dense = nn.Linear(widths[-1] * _SIDE**2, width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.trunk(2 * images - 1)
        return maps, F.elu(self.dense(maps.flatten(1)))


class Labeller(nn.Module):
    """``q(y | x)``: from images ``[B, C, H, W]`` in [0, 1] to logits of the classes ``[B, K]``."""

    def __init__(self, config: SemafoConfig) -> None:
        super().__init__()
        self.features = Features(config, config.label_features)
        self.logits = nn.Linear(config.label_features, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(images)[1])
        return logits


class Encoder(nn.Module):
    """The posteriors of the levels: raw means and log standard deviations."""

    def __init__(self, config: SemafoConfig) -> None:
        super().__init__()
        self.features = Features(config, config.features)
        self.u = nn.Linear(config.features, 2 * config.u)
        self.u_label = nn.Linear(config.classes, 2 * config.u, bias=False)
        self.z0 = nn.Linear(config.features, 2 * config.z0)
        self.z1 = nn.Conv2d(config.encoder[-1] + config.decoder[-1], 2 * config.z1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, maps ``[B, C, 4, 4]`` and dense ones ``[B, F]``.

        Args:
            images: ``[B, C, H, W]`` in [0, 1].
        """
        features: tuple[Tensor, Tensor] = self.features(images)
        return features


class Passage(NamedTuple):
    """A pass through the levels of ``B`` samples."""

    values: list[Tensor]  # u, z0 and z1
    priors: list[Gaussian]  # of each, given those before
    features: Tensor  # the decoder's, after z1

    @property
    def noises(self) -> list[Tensor]:
        """The values as latents of the generator."""
        return [prior.noise(value) for prior, value in zip(self.priors, self.values, strict=True)]


class Posterior(NamedTuple):
    """What the encoder makes of ``B`` images."""

    values: list[Tensor]  # u, z0 and z1
    noises: list[Tensor]  # the same as latents of the generator
    divergences: list[Tensor]  # of each level from its prior, nats [B]
    features: Tensor  # the decoder's, after z1


# -- the generator -------------------------------------------------------------------------------------------


class SemafoVAE(MLVGM):
    """A VAE with three levels, u, z0 and z1, whose priors depend on the label; see this module's text.

    Args:
        config: the architecture; by default that of ``fashion-semafo``.
    """

    FORMAT = "mlviews.semafo"

    def __init__(self, config: SemafoConfig | None = None) -> None:
        config = config or SemafoConfig()
        levels = [
            Level("u", (config.u,)),
            Level("z0", (config.z0,)),
            Level("z1", (config.z1, _SIDE, _SIDE)),
        ]
        size = config.image_size
        super().__init__(
            [LevelU(config), LevelZ0(config), LevelZ1(config)],
            levels,
            (config.image_channels, size, size),
            num_classes=config.classes,
        )
        self.config = config
        self.classes = nn.Parameter(torch.randn(config.classes, 2 * config.u))  # of p(u | y), raw
        widths = reversed(config.decoder)
        self.up = nn.Sequential(
            *(Doubling(before, after, config.groups) for before, after in pairwise(widths))
        )
        self.pixels = nn.Conv2d(config.decoder[0], config.image_channels, 3, padding=1)
        self.encoder = Encoder(config)
        self.labeller = Labeller(config)
        for weight in self.parameters():
            if weight.ndim == 4:  # this layout is the faster one on a CPU
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    # -- from latents to images

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        assert labels is not None
        u, z0, z1 = latents
        return [(u, *Gaussian.of(self.classes[labels], self.config.floor)), z0, z1]

    def to_image(self, state: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(state))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, C, H, W]`` of ``p(x | z)``, from the features after z1."""
        logits: Tensor = self.pixels(F.elu(self.up(features)))
        return logits

    # -- from images to labels and latents

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return ``q(y | x)``, the probabilities of the classes, float32 ``[B, num_classes]``.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.

        Raises:
            ValueError: if the images are not of this shape.
        """
        probabilities: Tensor = self.labeller(self._checked_images(images)).float().softmax(1)
        return probabilities

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return the latents of images under their labels, by the posteriors' means.

        :meth:`decode` turns them back into the images, with the same labels.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.
            labels: int64 ``[B]``; None: the most probable ones, ``g.classify(images).argmax(1)``.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level, in the prior's standard deviations.

        Raises:
            ValueError: if the images are not of this shape, or the labels are no such labels.
        """
        images = self._checked_images(images)
        return self.infer(images, None if labels is None else self._checked_labels(labels, len(images)))

    def encode_labelled(self, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self.encode(images, labels)

    def infer(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        maps, dense = self.encoder(images)
        return self.posterior(maps, dense, self._labels(images, labels)).noises

    def regenerate(
        self,
        images: Tensor,
        blends: Sequence[Blend],
        noise: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return images like the given ones, see :meth:`MLVGM.regenerate`.

        What the encoder says of z1 depends on z0, so each level is blended within the posterior's pass.
        Labels that are None are the most probable ones.
        """
        images = self._checked_images(images)
        labels = None if labels is None else self._checked_labels(labels, len(images))
        copies = self._copies(noise, len(images))
        maps, dense = self.encoder(images)
        labels = self._labels(images, labels).repeat(copies)
        maps, dense = maps.repeat(copies, 1, 1, 1), dense.repeat(copies, 1)

        def blended(level: int, latent: Tensor) -> Tensor:
            return blends[level](latent, noise[level])

        features = self.posterior(maps, dense, labels, change=blended).features
        return self._images(features, copies * len(images))

    def posterior(
        self,
        maps: Tensor,
        dense: Tensor,
        labels: Tensor,
        noise: Latents | None = None,
        *,
        change: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Posterior:
        """Return the posteriors of the levels given the encoder's features, differentiably.

        Args:
            maps: the encoder's, ``[B, C, 4, 4]``.
            dense: the encoder's, ``[B, F]``.
            labels: of the images, int64 ``[B]``.
            noise: standard normal, one ``[B, *level.shape]`` per level, to sample the posteriors; None for
                their means.
            change: takes a level's index and its latent, and returns the latent to go on with, on which the
                levels after it depend.
        """
        encoder = self.encoder
        one_hot = F.one_hot(labels, self.num_classes).to(self.classes.dtype)
        divergences: list[Tensor] = []

        def inferred(level: int, prior: Gaussian, features: Tensor | None) -> Tensor:
            if level == 0:
                raw = encoder.u(dense) + encoder.u_label(one_hot)
            elif level == 1:
                raw = encoder.z0(dense)
            else:
                assert features is not None
                raw = encoder.z1(torch.cat([maps, features], 1))
            posterior = Gaussian.of(raw, self.config.floor)
            divergences.append(posterior.divergence(prior))
            value = posterior.mean
            if noise is not None:
                value = torch.addcmul(value, posterior.std, noise[level])
            return value if change is None else prior.value(change(level, prior.noise(value)))

        passed = self.run_through(self.classes[labels], inferred)
        return Posterior(passed.values, passed.noises, divergences, passed.features)

    def _labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return the labels; if there are none, the most probable ones of the images."""
        return self.labeller(images).argmax(1) if labels is None else labels

    # -- values: what a latent stands for under a label

    @torch.no_grad()
    def values(self, latents: Latents, labels: Tensor) -> list[Tensor]:
        """Return the values of u, z0 and z1 that latents stand for under their labels.

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level.
            labels: int64 ``[B]``.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level.

        Raises:
            ValueError: as :meth:`forward`.
        """
        latents, raw = self._checked_pair(latents, labels)
        return self.run_through(raw, lambda level, prior, _: prior.value(latents[level])).values

    @torch.no_grad()
    def noises(self, values: Latents, labels: Tensor) -> list[Tensor]:
        """Return the latents that stand for values under labels: the inverse of :meth:`values`.

        Values of several samples may be put together: u of one, z0 of another, z1 of a third.

        Args:
            values: one float tensor ``[B, *level.shape]`` per level.
            labels: int64 ``[B]``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        values, raw = self._checked_pair(values, labels)
        return self.run_through(raw, lambda level, prior, _: values[level]).noises

    @torch.no_grad()
    def priors(self, latents: Latents, labels: Tensor) -> list[Gaussian]:
        """Return mean and standard deviation of each level's prior, given the label and the levels before.

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level.
            labels: int64 ``[B]``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        latents, raw = self._checked_pair(latents, labels)
        return self.run_through(raw, lambda level, prior, _: prior.value(latents[level])).priors

    @torch.no_grad()
    def relabel(
        self, latents: Latents, labels: Tensor, to: Tensor, keep: Iterable[str | int] = ("z0",)
    ) -> list[Tensor]:
        """Return latents under other labels, do(y := to), in which some levels keep their values.

        The other levels keep their noises, so that they follow the new label: each has the value that the
        same random numbers stand for there. (The same latents handed other labels keep no value: latents are
        noises.)

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level.
            labels: their labels, int64 ``[B]``.
            to: the new labels, int64 ``[B]``.
            keep: names or indices of the levels whose values stay.

        Raises:
            ValueError: as :meth:`forward`, and for a level that there is not.
        """
        levels = {level_index(level, self.levels) for level in keep}
        latents, raw = self._checked_pair(latents, to)
        values = self.values(latents, labels)

        def value(level: int, prior: Gaussian, _: Tensor | None) -> Tensor:
            return values[level] if level in levels else prior.value(latents[level])

        return self.run_through(raw, value).noises

    def _checked_pair(self, latents: Latents, labels: Tensor) -> tuple[Latents, Tensor]:
        """Check latents (or values) and labels, and return them, the labels as parameters of ``p(u | y)``."""
        latents = self._checked(latents)
        return latents, self.classes[self._checked_labels(labels, len(latents[0]))]

    def run_through(self, raw: Tensor, choose: Callable[[int, Gaussian, Tensor | None], Tensor]) -> Passage:
        """Go through the levels, whose values are chosen one after the other.

        Args:
            raw: parameters of ``p(u | y)``, ``[B, 2 d]``.
            choose: takes a level's index, its prior, and the decoder's features before z1 (None for other
                levels), and returns the level's value.
        """
        first, second, last = self.blocks
        dtype = self.classes.dtype
        priors = [Gaussian.of(raw, self.config.floor)]
        u = choose(0, priors[0], None).to(dtype)
        _, *prior = first.after(u)  # type: ignore[operator]
        priors.append(Gaussian(*prior))
        z0 = choose(1, priors[1], None).to(dtype)
        features, *prior = second.after(z0, u)  # type: ignore[operator]
        priors.append(Gaussian(*prior))
        z1 = choose(2, priors[2], features).to(dtype)
        return Passage([u, z0, z1], priors, last.after(z1, features))  # type: ignore[operator]

    # -- files

    def metadata(self, provenance: dict[str, Any] | None = None) -> dict[str, str]:
        """Return what a file of this generator's ``state_dict`` says besides the weights."""
        return configs.metadata(self.FORMAT, self.config, provenance)

    @classmethod
    def load(cls, path: str | Path) -> SemafoVAE:
        """Read a file of ``mlviews.zoo.train_semafo``, as the bundled one is.

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        return configs.load(path, cls.FORMAT, SemafoConfig, cls)
