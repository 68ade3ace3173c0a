"""Diffusion models as MLVGMs: one latent for each noise that a stochastic sampler adds.

The first latent is the noise that sampling begins from, the others are added on the way. A sampler's noises
as a latent code are the subject of CycleDiffusion (Wu and De la Torre, ICCV 2023, arXiv 2210.05559).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.diffusion.autoencoder import Autoencoder
from mlviews.generators.diffusion.denoisers import Denoiser
from mlviews.generators.diffusion.samplers import Chain, Step

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
        if state is None:
            assert self.scale is not None
            return z * self.scale
        if isinstance(state, tuple):
            mean, scales = state
            return torch.addcmul(mean, z, scales)
        assert self.scale is not None
        return torch.add(state, z, alpha=self.scale)

    def noise(self, x: Tensor, state: State) -> Tensor:
        """Return the noise that makes the sample ``x`` of a state; the inverse of :meth:`noised`."""
        if state is None:
            assert self.scale is not None
            return x / self.scale
        if isinstance(state, tuple):
            mean, scales = state
            return (x - mean) / scales
        assert self.scale is not None
        return (x - state) / self.scale

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

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        return latents if labels is None else [(z, labels) for z in latents]

    def to_image(self, state: Tensor) -> Tensor:
        if self.autoencoder is not None:
            state = self.autoencoder.decode(state)
        return (state / 2 + 0.5).clamp(0, 1)
