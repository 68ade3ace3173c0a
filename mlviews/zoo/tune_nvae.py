"""Train the samples of an NVAE that is trained already.

The command is ``python -m mlviews.zoo.tune_nvae fashion-nvae --start FILE --data DIR --out runs/tuned``; the
file is one of :mod:`mlviews.zoo.train_nvae`. For images of your own the recipe is ``nvae``.

A bound on the likelihood counts every bit of an image alike, and a small network spends few of them on what
makes a sample look real. So the second training goes on with the bound, whose divergences weigh less and
beside which stands the squared error of the reconstruction, and adds a discriminator (as Larsen et al. 2016,
"Autoencoding beyond pixels using a learned similarity metric"), which tells samples from real images. Half of
the samples keep the coarse latents of a real image, as positives of it do. Labels are never used.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.nvae.network import NVAE
from mlviews.images import ImageSet
from mlviews.runs.files import fingerprint
from mlviews.runs.modes import plain
from mlviews.weights.files import write_safetensors
from mlviews.zoo.adversarial import AdversarialTrainer, Discriminator, checked_start, equalise
from mlviews.zoo.training import average_decay, command, start, update_average


@dataclass(frozen=True)
class Recipe:
    """How a trained network is trained on. Weights are those of terms in nats per image."""

    batch: int = 64  # real images per step, and samples
    lr: float = 5e-4  # of the NVAE: Adam, betas (0.5, 0.99)
    lr_discriminator: float = 2e-3  # Adam, betas (0, 0.99), with equalised learning rates
    alone: int = 30_000  # images at first that only the discriminator learns from
    ramp: int = 10_000  # images after these over which the NVAE's learning rate rises from 0
    decay_from: float = 0.3  # share of the run after which both rates fall linearly to a tenth
    rate: float = 0.5  # weight of the divergences
    squares: float = 60.0  # weight of the squared error, which is summed over pixels in [0, 1]
    adversarial: float = 1000.0  # weight of the discriminator's opinion of the samples
    r1: float = 0.1  # gamma of the R1 penalty, on images in [-1, 1]
    r1_every: int = 16  # steps between lazy R1 penalties
    clip: float = 2000.0  # largest norm of the NVAE's gradient, which most steps exceed
    ema: int = 20_000  # half-life of the moving average, in images
    width: int = 32  # channels of the discriminator at 16 pixels; doubled at 8 and again at 4

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe for images of so many channels and pixels."""
        # The other terms are sums over pixels, and so are their gradients.
        values = channels * size**2 / 32**2
        return dataclasses.replace(self, adversarial=self.adversarial * values, clip=self.clip * values)


RECIPES = {
    "fashion-nvae": Recipe(),
    # The same, for images of your own.
    "nvae": Recipe(),
}


class Trainer(AdversarialTrainer):
    """Both networks, their optimizers, and the moving average of the NVAE.

    Args:
        recipe: how the network is trained on.
        images: as for :class:`~mlviews.zoo.training.BaseTrainer`.
        total: likewise.
        seed: likewise.
        bf16: likewise.
        start: the trained network; it is trained on in place.

    Raises:
        ValueError: if there is no network to go on from, it makes other images or has one level, or all
            images are those that only the discriminator learns from.
    """

    PARTS = ("network", "average", "discriminator", "opt_g", "opt_d")
    LOSSES = ("distortion", "rate", "squares", "loss_d", "loss_g", "gradient")

    @plain()
    def __init__(
        self,
        recipe: Recipe,
        images: Tensor | ImageSet,
        total: int,
        seed: int,
        bf16: bool,
        start: NVAE | None = None,
    ) -> None:
        network = checked_start(recipe, images, total, start)
        super().__init__(recipe, images, total, seed, bf16)
        torch.manual_seed(seed)
        self.origin = {"start": fingerprint(network), "model": dataclasses.asdict(network.config)}
        self.network = network.requires_grad_(True)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        config = network.config
        self.discriminator = equalise(
            Discriminator(config.image_channels, recipe.width, 1, config.image_size)
        )
        self.discriminator.to(memory_format=torch.channels_last)
        self.set_optimizers(self.network, recipe.lr, recipe.lr_discriminator, betas=(0.5, 0.99), fused=True)

    def step(self) -> dict[str, float]:
        """Update the discriminator and the NVAE once each.

        Returns:
            The parts of the bound and the squared error (nats per image), the adversarial losses, and the
            norm of the gradient. While the discriminator learns alone, there are zeros for the NVAE.
        """
        recipe = self.recipe
        noise = self.noise()
        real = self.pixels().float() / 255
        real = real.contiguous(memory_format=torch.channels_last)
        self.set_learning_rates()
        if self.seen < recipe.alone:
            losses = self._step_alone(real, noise)
        else:
            self.opt_g.param_groups[0]["lr"] *= min(1.0, (self.seen - recipe.alone) / recipe.ramp)
            losses = self._step_both(real, noise)
        self.steps += 1
        update_average(self.average, self.network, average_decay(recipe.ema, recipe.batch, self.seen))
        return dict.fromkeys(self.LOSSES, 0.0) | losses

    def _step_alone(self, real: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Update the discriminator on samples of the network as it is."""
        with torch.no_grad(), self.autocast():
            fake = self.network.decode(self._drawn(noise))
        loss_d = self.teach_discriminator(self.scores, 2 * real - 1, 2 * fake.float() - 1)
        return {"loss_d": loss_d.item()}

    def _step_both(self, real: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Update both networks."""
        recipe, network = self.recipe, self.network
        # The bound.
        with self.autocast():
            posterior = network.posterior(real, self._drawn(noise))
            features = network.post(posterior.features)
            distortion = -network.head.log_probability(network.head(features), real).mean()
            reconstructed = network.head.mean(features)
        rate = torch.stack(posterior.divergences).mean(1).sum()
        squares = (reconstructed - real).square().sum((1, 2, 3)).mean()
        (distortion + recipe.rate * rate + recipe.squares * squares).backward()

        # The samples.
        with self.autocast():
            fake = 2 * network.decode(self._mixed(posterior.latents, noise)).float() - 1
        loss_d = self.teach_discriminator(self.scores, 2 * real - 1, fake.detach())
        self.discriminator.requires_grad_(False)
        loss_g = F.softplus(-self.scores(fake)).mean()
        self.discriminator.requires_grad_(True)
        (recipe.adversarial * loss_g).backward()

        gradient = nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        if gradient.isfinite():
            self.opt_g.step()
        self.opt_g.zero_grad(set_to_none=True)
        return {
            "distortion": distortion.item(),
            "rate": rate.item(),
            "squares": squares.item(),
            "loss_d": loss_d.item(),
            "loss_g": loss_g.item(),
            "gradient": gradient.item(),
        }

    def _drawn(self, noise: torch.Generator) -> list[Tensor]:
        """Return a batch of latents of the prior."""
        return [
            torch.randn(self.recipe.batch, *level.shape, generator=noise) for level in self.network.levels
        ]

    def _mixed(self, latents: list[Tensor], noise: torch.Generator) -> list[Tensor]:
        """Return drawn latents, of which the second half keeps a random number of coarse levels.

        Args:
            latents: of real images, by the posterior; no gradient reaches them.
            noise: draws the others, and how many levels each image keeps.
        """
        drawn = self._drawn(noise)
        counts = torch.randint(1, len(drawn), (self.recipe.batch,), generator=noise)  # [B]
        counts[: self.recipe.batch // 2] = 0
        counts = counts[:, None, None, None]
        pairs = zip(latents, drawn, strict=True)
        return [
            torch.where(counts > level, coded.detach(), fresh) for level, (coded, fresh) in enumerate(pairs)
        ]

    def scores(self, images: Tensor) -> Tensor:
        """Return the discriminator's logits ``[B]`` of images in [-1, 1]."""
        with self.autocast():
            logits: Tensor = self.discriminator(images.contiguous(memory_format=torch.channels_last))[0]
        return logits

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the moving average, with configuration and provenance as metadata."""
        write_safetensors(path, self.average.state_dict(), self.average.metadata(provenance))


main = command(RECIPES, Trainer, 240_000, load=NVAE.load)

if __name__ == "__main__":
    start(main)
