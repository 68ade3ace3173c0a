"""Train the bundled diffusion model.

The command is ``python -m mlviews.zoo.train_diffusion fashion-diffusion --data DIR --out runs/DIR``.

It is a generator of few steps, in the form of a consistency model (Song et al. 2023, alg. 1): a step adds
Gaussian noise to an image, and a U-Net makes a clean image of that at once. It sees only the noise levels
that its sampler visits. What it learns from is adversarial, as in Sauer et al. (2023), "Adversarial Diffusion
Distillation", but without a teacher: a discriminator compares the clean images of every level with real ones,
by the non-saturating loss with lazy R1. Half of the images that a level cleans are noisy real ones, which
also have to come back as they were, more or less: this keeps a level from ignoring the ones before it. The
other half are what the level before has made in the training step before: so every level learns to put right
what the chain gets wrong. Labels are never used.

What is exported is a folder as diffusers writes it, which its ``ConsistencyModelPipeline`` reads.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.images import ImageSet
from mlviews.runs.files import whole_folder
from mlviews.runs.modes import plain
from mlviews.zoo import PROVENANCE
from mlviews.zoo.adversarial import AdversarialTrainer, Discriminator, equalise
from mlviews.zoo.training import average_decay, command, start, update_average


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    channels: tuple[int, ...] = (16, 32, 64, 96)  # of the U-Net, at 32, 16, 8 and 4 pixels
    levels: int = 4  # steps of the sampler, of which each adds a noise
    sigma_max: float = 20.0  # standard deviation of the first noise, images being in [-1, 1]
    sigma_min: float = 0.03  # where the noise levels between would end (Karras et al. 2022, eq. 5)
    batch: int = 32  # images per step, of each network; 8 for each level
    lr: float = 6e-4  # of the U-Net; Adam, betas (0, 0.99), both networks
    lr_discriminator: float = 2e-3  # with equalised learning rates
    decay_from: float = 0.5  # share of the run until which the anchor falls; then the lrs do, to a tenth
    r1: float = 1.0  # gamma of the R1 penalty, on images in [-1, 1]
    r1_every: int = 16  # steps between lazy R1 penalties
    anchor: tuple[float, float] = (1.0, 0.1)  # weight of the distance to the real image, at first and later
    excess: float = 1.0  # weight of the squares of what is outside of [-1, 1]
    ema: int = 10_000  # half-life of the moving average, in images
    width: int = 32  # channels of the discriminator at 16 pixels; doubled at 8 and again at 4
    image_channels: int = 1
    image_size: int = 32  # pixels of a side

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe for images of so many channels; those of 64 pixels have a resolution more."""
        widths = self.channels if size == self.image_size else (self.channels[0], *self.channels)
        return dataclasses.replace(self, channels=widths, image_channels=channels, image_size=size)


RECIPES = {"fashion-diffusion": Recipe()}


# -- the network and its noise levels ------------------------------------------------------------------------


def unet(recipe: Recipe) -> nn.Module:
    """Return diffusers' ``UNet2DModel`` for the recipe's images, with fresh weights.

    It has no attention: the convolutions at 4 pixels see the whole image.
    """
    import diffusers  # heavy, and an extra

    depth = len(recipe.channels)
    kind: Any = diffusers.UNet2DModel
    network: nn.Module = kind(
        sample_size=recipe.image_size,
        in_channels=recipe.image_channels,
        out_channels=recipe.image_channels,
        block_out_channels=recipe.channels,
        down_block_types=("DownBlock2D",) * depth,
        up_block_types=("UpBlock2D",) * depth,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )
    return network


def noise_schedule(recipe: Recipe) -> Any:
    """Return diffusers' ``CMStochasticIterativeScheduler``, set to the recipe's levels."""
    import diffusers

    # With one more training step than levels, diffusers' own spacing visits all of them.
    kind: Any = diffusers.CMStochasticIterativeScheduler
    schedule = kind(
        num_train_timesteps=recipe.levels + 1, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max
    )
    schedule.set_timesteps(recipe.levels)
    return schedule


class Denoiser:
    """The U-Net as a function from noisy images of any of the levels to clean ones.

    Args:
        recipe: says which levels there are.
    """

    def __init__(self, recipe: Recipe) -> None:
        schedule = noise_schedule(recipe)
        sigmas = schedule.sigmas[:-1]  # [L], float32, the largest first
        skip, out = schedule.get_scalings_for_boundary_condition(sigmas)
        self.times: Tensor = schedule.timesteps.float()  # [L]: what the U-Net knows the levels by
        self.noise: Tensor = (sigmas**2 - recipe.sigma_min**2).sqrt()  # [L]: added to images
        self.noise[0] = recipe.sigma_max  # the first level's noise comes without an image
        self.weight: Tensor = 1 / (1 + sigmas)  # [L], of the distance to the real image
        self._input = (sigmas**2 + schedule.config.sigma_data**2).rsqrt()[:, None, None, None]  # [L, 1, 1, 1]
        self._skip = skip[:, None, None, None]
        self._out = out[:, None, None, None]

    def noisy(self, images: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the images ``[B, C, H, W]`` with standard-normal noise added as their levels ``[B]`` say."""
        images = images * (levels > 0)[:, None, None, None]
        return images + self.noise[levels][:, None, None, None] * noise

    def __call__(self, network: nn.Module, noisy: Tensor, levels: Tensor) -> Tensor:
        """Return clean images, float32 ``[B, C, H, W]``, which are not yet clamped to [-1, 1]."""
        residual = network(self._input[levels] * noisy, self.times[levels]).sample
        clean: Tensor = self._skip[levels] * noisy + self._out[levels] * residual.float()
        return clean


# -- training ------------------------------------------------------------------------------------------------


class Trainer(AdversarialTrainer):
    """Both networks, their optimizers, the U-Net's moving average, and the images on their way to the end.

    Image ``i`` of a step belongs to level ``i % levels``: these are the groups of the discriminator's
    minibatch deviation too. The first half of the images are noisy real ones, the second half come from the
    level before; those of the first level are noise in both. The discriminator has an output for every level.
    """

    PARTS = ("network", "average", "discriminator", "opt_g", "opt_d")
    SUFFIX = ""  # exports are folders

    @plain()
    def __init__(self, recipe: Recipe, images: Tensor | ImageSet, total: int, seed: int, bf16: bool) -> None:
        super().__init__(recipe, images, total, seed, bf16)
        if recipe.batch != 8 * recipe.levels:
            raise ValueError(f"Invalid batch={recipe.batch}: 8 images for each of {recipe.levels} levels.")
        torch.manual_seed(seed)
        self.network = unet(recipe).train()
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.discriminator = equalise(
            Discriminator(recipe.image_channels, recipe.width, recipe.levels, recipe.image_size)
        )
        self.discriminator.to(memory_format=torch.channels_last)
        self.set_optimizers(self.network, recipe.lr, recipe.lr_discriminator, betas=(0.0, 0.99), fused=True)
        self.denoise = Denoiser(recipe)
        shape = (recipe.batch, recipe.image_channels, recipe.image_size, recipe.image_size)
        self.samples = torch.zeros(shape)  # what the step before made
        self.levels = torch.arange(recipe.batch) % recipe.levels
        self.chained = torch.arange(recipe.batch) >= recipe.batch // 2
        self.LOSSES = ("loss_d", "loss_g", *(f"distance_{level}" for level in range(1, recipe.levels)))

    def anchoring(self) -> float:
        """Return the weight of the distance to the real images: it falls along a line.

        At first the levels learn to clean images, and then what the discriminator tells them.
        """
        start, end = self.recipe.anchor
        return float(start + (end - start) * min(1.0, self.seen / self.total / self.recipe.decay_from))

    def step(self) -> dict[str, float]:
        """Update the discriminator and the U-Net once each.

        Returns:
            The adversarial losses, and for each level but the first the mean distance between its images and
            the real ones that were made noisy.
        """
        recipe = self.recipe
        self.set_learning_rates()
        real = self.pixels().float() / 127.5 - 1
        # The neighbour before is of the level before. (The first level's are replaced by noise.)
        images = torch.where(self.chained[:, None, None, None], self.samples.roll(1, 0), real)
        noise = torch.randn(real.shape, generator=self.noise())

        with self.autocast():
            clean = self.denoise(self.network, self.denoise.noisy(images, noise, self.levels), self.levels)
        fake = clean.clamp(-1, 1)
        self.samples = fake.detach()
        loss_d = self.teach_discriminator(self.scores, real, self.samples)

        self.discriminator.requires_grad_(False)
        loss_g = F.softplus(-self.scores(fake)).mean()
        self.discriminator.requires_grad_(True)
        # Lengths and not their squares: every image pulls alike, whatever its level leaves open.
        distances = (clean - real).flatten(1).norm(dim=1)  # [B]
        counts = ~self.chained & (self.levels > 0)
        anchor = (distances * self.denoise.weight[self.levels])[counts].sum() / recipe.batch
        # A clamped pixel gets no gradient from the discriminator: this draws it back.
        excess = (clean - fake).square().sum((1, 2, 3)).mean()
        (loss_g + self.anchoring() * anchor + recipe.excess * excess).backward()
        self.opt_g.step()
        self.opt_g.zero_grad(set_to_none=True)

        self.steps += 1
        update_average(self.average, self.network, average_decay(recipe.ema, recipe.batch, self.seen))
        by_level = distances[~self.chained].detach().view(-1, recipe.levels).mean(0).tolist()
        losses = {"loss_d": loss_d.item(), "loss_g": loss_g.item()}
        return losses | {f"distance_{level}": by_level[level] for level in range(1, recipe.levels)}

    def scores(self, images: Tensor) -> Tensor:
        """Return the discriminator's logits ``[B]``: a common one, and the level's on top of it."""
        with self.autocast():
            common, by_level = self.discriminator(images.contiguous(memory_format=torch.channels_last))
        scores: Tensor = common + by_level.gather(1, self.levels[:, None])[:, 0]
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return super().state_dict() | {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.samples = state["samples"]

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the moving average in float16 as a folder of diffusers' layout.

        ``training.json`` beside its files says where they come from.
        """
        import diffusers

        kind: Any = diffusers.ConsistencyModelPipeline
        pipeline = kind(copy.deepcopy(self.average).half(), noise_schedule(self.recipe))
        text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
        with whole_folder(path) as part:
            pipeline.save_pretrained(part)
            (part / PROVENANCE).write_text(text, encoding="utf-8")


main = command(RECIPES, Trainer, 400_000)

if __name__ == "__main__":
    start(main)
