"""Diffusion models as MLVGMs: one latent for each noise that a stochastic sampler adds.

The first latent is the noise that sampling begins from, the others are added on the way. A sampler's noises
as a latent code are the subject of CycleDiffusion (Wu and De la Torre, ICCV 2023, arXiv 2210.05559).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlviews import sampling
from mlviews.checks import integer
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.diffusion.autoencoder import Autoencoder
from mlviews.generators.diffusion.denoisers import Denoiser
from mlviews.generators.diffusion.samplers import Chain, Step
from mlviews.levels import Blend

_MULTIPLIER = 2654435761
"""Knuth's, of multiplicative hashing: the golden ratio's share of 2^32, a prime."""

State = Tensor | tuple[Tensor, Tensor] | None
"""The mean of the next sample ``[B, C, H, W]``; with the scale of its noise, where that is one per pixel."""


class Block(nn.Module):
    """One noise is added, then all steps run up to the next noise.

    A state holds the sample before the noise is added. So views that differ in this noise share all passes
    of the network that come before it.

    Args:
        denoiser: the network, which all blocks share.
        scale: of the noise; None where the state has it.
        steps: the passes of the network; none for noise that stays in the image.
    """

    def __init__(self, denoiser: Denoiser, scale: float | None, steps: Sequence[Step]) -> None:
        super().__init__()
        # The generator holds the network: as a module of every block, it would be stored once for each.
        object.__setattr__(self, "denoiser", denoiser)
        self.denoiser: Denoiser
        self.scale, self.steps = scale, tuple(steps)

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor], state: State) -> State:
        z, labels = inputs if isinstance(inputs, tuple) else (inputs, None)
        return self.denoised(self.noised(z.float(), state), labels)

    def noised(self, z: Tensor, state: State) -> Tensor:
        """Return the sample with the noise ``z [B, C, H, W]``."""
        mean, scale = self.prior(state)
        return z * scale if mean is None else mean + z * scale

    def noise(self, x: Tensor, state: State) -> Tensor:
        """Return the noise that makes the sample ``x`` of a state; the inverse of :meth:`noised`."""
        mean, scale = self.prior(state)
        return x / scale if mean is None else (x - mean) / scale

    def prior(self, state: State) -> tuple[Tensor | None, Tensor | float]:
        """Return the mean of the sample, None for zeros, and the scale of its noise."""
        if isinstance(state, tuple):
            return state
        assert self.scale is not None
        return state, self.scale

    def target(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return an image ``[B, C, H, W]`` that is noised to where this block's steps begin."""
        if not self.steps:
            return image
        step = self.steps[0]
        return torch.add(image * step.signal, noise, alpha=step.noise)

    def denoised(self, x: Tensor, labels: Tensor | None) -> State:
        """Run the steps on a sample that has its noise; return the state that follows."""
        scales = None
        for step in self.steps:
            output, variance = self.denoiser(x * step.input_scale, step.time, labels)
            x = step.mean(x, output)
            if step.log_variance is not None:
                scales = step.scales(variance)
        return x if scales is None else (x, scales)


class DiffusionGenerator(MLVGM):
    """A diffusion model with a stochastic sampler: images ``[B, C, H, W]`` in [0, 1].

    Args:
        denoiser: the network.
        chain: the sampler's steps.
        sample_shape: ``(C, H, W)`` of the samples: of the image, or of the autoencoder's code.
        image_shape: ``(C, H, W)`` of the image.
        autoencoder: makes images of samples; None: a sample is an image in [-1, 1].
    """

    def __init__(
        self,
        denoiser: Denoiser,
        chain: Chain,
        sample_shape: tuple[int, int, int],
        image_shape: tuple[int, int, int],
        autoencoder: Autoencoder | None = None,
    ) -> None:
        blocks = []
        scale: float | None = chain.start
        begin = 0
        for index, step in enumerate(chain.steps):
            if step.adds_noise:
                blocks.append(Block(denoiser, scale, chain.steps[begin : index + 1]))
                scale, begin = step.scale or None, index + 1
        blocks.append(Block(denoiser, scale, chain.steps[begin:]))
        # A block without steps adds the noise that stays in the image.
        names = [block.steps[0].name if block.steps else "residual" for block in blocks]
        levels = [Level(name, sample_shape) for name in names]
        # The network was trained on white noise, and sees a truncated law's smaller variance.
        super().__init__(blocks, levels, image_shape, truncation=None, num_classes=denoiser.num_classes)
        self.denoiser, self.autoencoder = denoiser, autoencoder
        self._plan: sampling.Draw | None = None

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        return latents if labels is None else [(z, labels) for z in latents]

    def to_image(self, state: Tensor) -> Tensor:
        if self.autoencoder is not None:
            state = self.autoencoder.decode(state)
        return (state / 2 + 0.5).clamp(0, 1)

    # -- from images to latents ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Return latents that decode to the images, by edit-friendly inversion.

        The image is noised to the beginning of every block, with noises that are independent of each other;
        a latent is the noise that leads there from the block before (Huberman-Spiegelglas et al., CVPR 2024,
        arXiv 2304.06140). Latents so made reach every noised image to rounding, whatever the network says:
        what is lost is the last block's own error. If that adds noise that stays in the image (the level
        "residual"), nothing is lost. The latents are no draws from the prior: the later ones have larger
        variances, and depend on each other.

        The noises are a function of the image alone, to 8 bits.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.
            labels: the images' classes, int64 ``[B]``, for a generator that has some.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level.

        Raises:
            ValueError: if the images are not of this shape, or labels are missing or out of range.
        """
        images = self._checked_images(images)
        return self.infer(images, self._checked_labels(labels, len(images)))

    def encode_labelled(self, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self.encode(images, labels)

    def infer(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        if not len(images):
            return [torch.empty((0, *level.shape), device=images.device) for level in self.levels]
        image = self._sample_of(images)
        drawn = self._noises(images)
        state: State = None
        latents = []
        for index, block in enumerate(self._blocks):
            target = block.target(image, self.noise_of(drawn, 0, index))
            latents.append(block.noise(target, state))
            if index + 1 < len(self.levels):
                state = block.denoised(target, labels)
        return latents

    def noised_state(
        self, images: Tensor, level: int, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> State:
        """Return the state before a level, of images that are noised to the level above it.

        ``decode(latents, labels, state=state, start=level)`` with fresh latents from this level on is SDEdit,
        and DiffPure's purification: it is the same as to keep the levels above of :meth:`encode`, and takes
        one pass of the network in their place. It is differentiable with respect to the images.

        Args:
            images: as of :meth:`encode`.
            level: the index of the first level that is not kept, from 0 to the number of levels.
            labels: as of :meth:`encode`.
            noise: float ``[B, *shape]`` of the level above; None: a function of the image, as for
                :meth:`encode`.

        Raises:
            ValueError: as :meth:`encode`, and for a level out of range, or noise of another shape.
        """
        level = integer("level", level, 0, len(self.levels))
        images = self._checked_images(images)
        labels = self._checked_labels(labels, len(images))
        if level == 0:
            return None
        block = self._blocks[level - 1]
        image = self._sample_of(images)
        if noise is None:
            noise = self.noise_of(self._noises(images), 0, level - 1)
        if noise.shape != image.shape:
            raise ValueError(f"Invalid noise of shape {tuple(noise.shape)}: expected {tuple(image.shape)}.")
        return block.denoised(block.target(image, noise.float()), labels)

    def regenerate(
        self,
        images: Tensor,
        blends: Sequence[Blend],
        noise: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return images like the given ones, see :meth:`MLVGM.regenerate`.

        Where levels are kept and all after them are drawn anew, the image is noised to the last one that is
        kept, and no level is encoded (:meth:`noised_state`): DiffPure (Nie et al. 2022). So the last level
        that is kept takes noise too, of every copy its own; without it, as where levels are mixed, images
        are noised by a function of themselves (:meth:`encode`).
        """
        images = self._checked_images(images)
        labels = self._checked_labels(labels, len(images))
        start = _first_drawn(blends)
        if start is None or all(values is None for values in noise):
            return self._decode_blended(self.infer(images, labels), blends, noise, labels)
        copies = self._copies(noise, len(images))
        images = images.repeat(copies, 1, 1, 1)
        labels = None if labels is None else labels.repeat(copies)
        state = self.noised_state(images, start, labels, noise[start - 1] if start else None)
        if start == len(blends):
            return self._images(state, len(images))
        # Blocks before the first level that is drawn do not run: any latents will do for them.
        drawn: list[Tensor] = noise[start:]  # type: ignore[assignment]
        return self.decode([drawn[0]] * start + drawn, labels, state=state, start=start)

    def noisy_levels(self, blends: Sequence[Blend]) -> list[int]:
        start = _first_drawn(blends)
        return super().noisy_levels(blends) if not start else list(range(start - 1, len(blends)))

    @property
    def _blocks(self) -> list[Block]:
        """The blocks, by their own type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def _sample_of(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the sampler has them."""
        sample = images.float() * 2 - 1
        return sample if self.autoencoder is None else self.autoencoder.encode(sample).float()

    def _noises(self, images: Tensor) -> sampling.Drawn:
        """Return the noises of every level as a function of the images: an image's hash is its index."""
        if self._plan is None or self._plan.device != images.device:
            fields = self.noise_fields(sampling.TruncatedNormal(), 0, range(len(self.levels)))
            self._plan = sampling.Draw(fields, images.device)
        pixels = (images.detach().float() * 255).round().long().flatten(1)  # [B, C * H * W]
        factors = torch.arange(pixels.shape[1], device=images.device) * _MULTIPLIER % (1 << 32)
        return self._plan(((pixels + 1) * factors).sum(1) % (1 << 32), 0, 0)


def _first_drawn(blends: Sequence[Blend]) -> int | None:
    """Return the first level that is drawn anew, if all after it are, and all before it kept; else None."""
    start = sum(not blend.noise for blend in blends)
    pure = (Blend(1.0, 0.0),) * start + (Blend(0.0, 1.0),) * (len(blends) - start)
    return start if tuple(blends) == pure else None
