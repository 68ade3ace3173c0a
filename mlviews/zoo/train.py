"""Train a bundled generator: ``python -m mlviews.zoo.train fashion --data DIR --out runs/fashion``.

Or one of images of your own: ``python -m mlviews.zoo.train film --data FOLDER --out runs/mine``.

It is a GAN with the non-saturating loss, lazy R1 (Mescheder et al. 2018; Karras et al. 2020), an exponential
moving average of the generator, and one addition that makes every level matter: the discriminator also
regresses each level's latent from the image, and the generator is rewarded when it can (Chen et al. 2016,
InfoGAN). A level that the adversarial loss alone would leave idle then has to show in the image. Labels are
never used.

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
from torch import Tensor

from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.images import ImageSet
from mlviews.runs.modes import plain
from mlviews.weights.files import write_safetensors
from mlviews.zoo.adversarial import AdversarialTrainer, Discriminator, equalise, plain_weight
from mlviews.zoo.training import average_decay, command, start, update_average


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    model: FilmConfig
    batch: int = 64  # images per step, of each network
    lr: float = 2e-3  # Adam, betas (0, 0.99), both networks, with equalised learning rates
    decay_from: float = 0.6  # share of the run after which lr falls linearly to a tenth
    r1: float = 1.0  # gamma of the R1 penalty, on images in [-1, 1]
    r1_every: int = 16  # steps between lazy R1 penalties
    info: float = 0.5  # weight of the latent regression
    ema: int = 20_000  # half-life of the moving average, in images
    width: int = 48  # channels of the discriminator at 16 pixels; doubled at 8 and again at 4

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe for images of so many channels, of 32 pixels or 64: those have a block more."""
        model = dataclasses.replace(self.model, image_channels=channels)
        if size > model.image_size:
            # Half as many channels at twice the size, as a multiple of the norms' groups.
            channels = -(-model.channels[-1] // (2 * model.groups)) * model.groups
            dims, widths = (*model.dims, model.dims[-1]), (*model.channels, channels)
            model = dataclasses.replace(model, dims=dims, channels=widths)
        return dataclasses.replace(self, model=model)


RECIPES = {
    "fashion": Recipe(FilmConfig()),
    # The same, for images of your own.
    "film": Recipe(FilmConfig()),
    # What the model card compares with: equal latents, block 1 as deep as the others, nearest upsampling, and
    # no regression.
    "fashion-trial": Recipe(
        FilmConfig(dims=(16,) * 4, channels=(96, 80, 48, 32), deep_first=True, upsample="nearest"),
        decay_from=1.0, r1=0.1, r1_every=8, info=0.0,
    ),
}  # fmt: skip


class FilmTrainer(AdversarialTrainer):
    """A ``film`` generator, its moving average, and a discriminator that also reads the latents."""

    PARTS: tuple[str, ...] = ("generator", "average", "discriminator", "opt_g", "opt_d")

    @plain()
    def __init__(
        self,
        recipe: Any,
        images: Tensor | ImageSet,
        total: int,
        seed: int,
        bf16: bool,
        model: FilmConfig,
    ) -> None:
        super().__init__(recipe, images, total, seed, bf16)
        self.model = model
        torch.manual_seed(seed)
        self.generator = FilmGenerator(model)
        equalise(self.generator).requires_grad_(True).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        discriminator = Discriminator(model.image_channels, recipe.width, sum(model.dims), model.image_size)
        self.discriminator = equalise(discriminator)
        self.discriminator.to(memory_format=torch.channels_last)
        self.set_optimizers(self.generator, recipe.lr, recipe.lr)

    def real(self) -> Tensor:
        """Return the step's real images ``[B, C, H, W]`` in [-1, 1]."""
        images = self.pixels().float() / 127.5 - 1
        return images.contiguous(memory_format=torch.channels_last)

    def drawn(self, noise: torch.Generator) -> list[Tensor]:
        """Return a batch of latents of the prior, ``[B, dim]`` of each level."""
        return [torch.randn(self.recipe.batch, dim, generator=noise) for dim in self.model.dims]

    def fake(self, latents: list[Tensor]) -> Tensor:
        """Return samples ``[B, C, H, W]`` in [-1, 1], which no gradient goes through."""
        with self.autocast(), torch.no_grad():
            return self.generator.decode(latents).float() * 2 - 1

    def step_discriminator(self, real: Tensor, fake: Tensor, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Update the discriminator by real images, and by samples and their latents.

        Returns:
            Its adversarial loss, and its errors of the latents that it reads, ``[levels]``.
        """
        recipe = self.recipe
        # The adversarial loss and the regression of the latents.
        with self.autocast():
            logits, regressed = self.discriminator(torch.cat([real, fake]))
        info = self.info(regressed[recipe.batch :], latents)
        loss = F.softplus(-logits[: recipe.batch]).mean() + F.softplus(logits[recipe.batch :]).mean()
        (loss + recipe.info * info.mean()).backward()
        self.penalize(lambda images: self.discriminator(images)[0], real)
        self.opt_d.step()
        self.opt_d.zero_grad(set_to_none=True)
        return loss, info

    def step_generator(self, loss: Tensor) -> None:
        """Update the generator by a loss, whose gradient reaches nothing of the discriminator."""
        loss.backward()
        self.opt_g.step()
        self.opt_g.zero_grad(set_to_none=True)

    def update_average(self) -> None:
        """Move the moving average towards the generator, after the step."""
        decay = average_decay(self.recipe.ema, self.recipe.batch, self.seen)
        update_average(self.average, self.generator, decay)

    def info(self, regressed: Tensor, latents: list[Tensor]) -> Tensor:
        """Return the mean squared errors of the regressed latents, ``[levels]``.

        It is 1 for a level that does not show.

        Args:
            regressed: ``[B, sum(dims)]``.
            latents: ``[B, dim]`` of each level.
        """
        parts = regressed.split(list(self.model.dims), dim=1)
        return torch.stack([F.mse_loss(part, z) for part, z in zip(parts, latents, strict=True)])

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the moving average as plain weights, with the equalisation folded in.

        The file's metadata has the network's configuration, and where the weights come from.
        """
        names = [name for name, _ in FilmGenerator(self.model).named_parameters()]
        tensors = {name: plain_weight(self.average, name) for name in names}
        metadata = {
            "format": FilmGenerator.FORMAT,
            "config": json.dumps(dataclasses.asdict(self.model)),
            "provenance": json.dumps(provenance),
        }
        write_safetensors(path, tensors, metadata)


class Trainer(FilmTrainer):
    """The first training of a ``film`` generator."""

    LOSSES = ("loss_d", "loss_g", "info")

    def __init__(self, recipe: Recipe, images: Tensor | ImageSet, total: int, seed: int, bf16: bool) -> None:
        super().__init__(recipe, images, total, seed, bf16, recipe.model)

    def step(self) -> dict[str, float]:
        """Update the discriminator and the generator once each, and return the losses."""
        noise = self.noise()
        first, second = self.drawn(noise), self.drawn(noise)
        self.set_learning_rates()
        loss_d, _ = self.step_discriminator(self.real(), self.fake(first), first)
        loss_g, info = self.losses(second)
        self.step_generator(loss_g + self.recipe.info * info)
        self.steps += 1
        self.update_average()
        return {"loss_d": loss_d.item(), "loss_g": loss_g.item(), "info": info.item()}

    def losses(self, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the generator's adversarial loss, and the error of the regressed latents."""
        self.discriminator.requires_grad_(False)
        with self.autocast():
            fake = self.generator.decode(latents).float() * 2 - 1
            logits, regressed = self.discriminator(fake)
        self.discriminator.requires_grad_(True)
        return F.softplus(-logits).mean(), self.info(regressed, latents).mean()


main = command(RECIPES, Trainer, 1_200_000)

if __name__ == "__main__":
    start(main)
