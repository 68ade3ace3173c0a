"""Train on a ``film`` generator that is trained already, for what its finer levels do.

The command is ``python -m mlviews.zoo.tune_film fashion --start FILE --data DIR --out runs/tuned``; the file
is one of :mod:`mlviews.zoo.train`. For images of your own the recipe is ``film``. It needs the extra
``lightly``.

The first training asks two things of a level: that it shows, and that images look real. Nothing says what a
finer level may change, and one that turns shoes into bags shows very well. So the second training has an
encoder beside it that learned from the real images alone, by SimCLR and without labels
(:mod:`mlviews.zoo.features`), and adds three terms to the first one's loss:

- ``projected``: discriminators that look at the encoder's maps tell samples from real images, too;
- ``steady``: samples that share their coarsest latent have features that differ little;
- ``hidden``: redrawing one finer level changes the pixels by no less than a given amount.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.evaluation.extras import lightly
from mlviews.generators.film import FilmGenerator
from mlviews.images import ImageSet
from mlviews.runs.files import fingerprint
from mlviews.runs.modes import plain
from mlviews.zoo.adversarial import checked_start, set_plain_weight
from mlviews.zoo.features import Features, Heads
from mlviews.zoo.train import FilmTrainer
from mlviews.zoo.training import command, start


@dataclass(frozen=True)
class Recipe:
    """How a trained generator is trained on; of values by level, the last one stands for all that follow."""

    batch: int = 64  # real images per step, and samples
    lr: float = 1e-3  # Adam, betas (0, 0.99), both networks, with equalised learning rates
    lr_heads: float = 2e-3  # of the heads: Adam, betas (0, 0.99), with spectral norms
    alone: int = 10_000  # images at first that only the discriminator and the heads learn from
    ramp: int = 10_000  # images after these over which the generator's learning rate rises from 0
    decay_from: float = 0.3  # share of the run after which the rates fall linearly to a tenth
    r1: float = 0.1  # gamma of the R1 penalty, on images in [-1, 1]
    r1_every: int = 16  # steps between lazy R1 penalties
    info: float = 0.5  # weight of the regression of the latents
    shares: tuple[float, ...] = (1.5, 0.8, 1.0, 0.8)  # of each level in the generator's part of it
    encoder_steps: int = 2_000  # of the encoder's training
    projected: float = 2.0  # weight of the heads' opinion
    steady: float = 1.2  # weight of the share of the features' variance that finer levels make
    hidden: float = 0.5  # weight of what is missing of `visible`, as a share of it, summed over levels
    visible: tuple[float, ...] = (0.055, 0.06, 0.04)  # least mean change of a pixel by each finer level
    ema: int = 50_000  # half-life of the moving average, in images
    width: int = 48  # channels of the discriminator at 16 pixels; doubled at 8 and again at 4
    width_heads: int = 128  # channels of the heads

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe, which is the same for all channels and sizes."""
        return self


RECIPES = {
    "fashion": Recipe(),
    # The same, for images of your own.
    "film": Recipe(),
}


class Trainer(FilmTrainer):
    """Both networks, the encoder, and the heads that look through it.

    The log has the errors of the latents that the discriminator reads, in its own step (``read_0``, ...) and
    in the generator's (``info_0``, ...), and the change of a pixel by each finer level (``change_1``, ...).

    Args:
        recipe: how the generator is trained on.
        images: as for :class:`~mlviews.zoo.training.BaseTrainer`.
        total: likewise.
        seed: likewise.
        bf16: likewise.
        start: the trained generator.

    Raises:
        ValueError: as :func:`~mlviews.zoo.adversarial.checked_start`, or if there are fewer images than a
            batch.
        ModuleNotFoundError: if lightly is not installed.
    """

    PARTS = (*FilmTrainer.PARTS, "features", "heads", "opt_h")

    @plain()
    def __init__(
        self,
        recipe: Recipe,
        images: Tensor | ImageSet,
        total: int,
        seed: int,
        bf16: bool,
        start: FilmGenerator | None = None,
    ) -> None:
        lightly()  # before all else, an error that says how to install it
        network = checked_start(recipe, images, total, start)
        super().__init__(recipe, images, total, seed, bf16, network.config)
        self.origin = {"start": fingerprint(network), "model": dataclasses.asdict(network.config)}
        for copy in (self.generator, self.average):
            for name, value in network.named_parameters():
                set_plain_weight(copy, name, value)
        self.features = Features()
        self.heads = Heads(self.features.widths(), recipe.width_heads)
        self.opt_h = torch.optim.Adam(self.heads.parameters(), lr=recipe.lr_heads, betas=(0.0, 0.99))
        levels = range(len(network.levels))
        self.LOSSES = (
            "loss_d",
            *(f"read_{level}" for level in levels),
            "loss_h",
            "loss_g",
            "loss_p",
            "steady",
            *(f"change_{level}" for level in levels[1:]),
            *(f"info_{level}" for level in levels),
        )
        self.shares = torch.tensor(_by_level(recipe.shares, len(levels)))
        self.visible = torch.tensor(_by_level(recipe.visible, len(levels) - 1))

    def prepare(self) -> None:
        """Train the encoder on the real images."""
        recipe = self.recipe
        print(f"An encoder learns from the real images first, {recipe.encoder_steps:,} steps.")
        self.features.learn(
            self.pixels_of,
            len(self.images),
            self.model.image_size,
            recipe.batch,
            recipe.encoder_steps,
            self.seed,
        )

    def step(self) -> dict[str, float]:
        """Update the discriminators and the generator once each.

        Returns:
            The columns of the log. While the discriminators learn alone, those of the generator are missing.
        """
        recipe = self.recipe
        noise = self.noise()
        first, second = self.drawn(noise), self.pairs(self.drawn(noise))
        real, fake = self.real(), self.fake(first)
        self.set_learning_rates()
        loss_d, read = self.step_discriminator(real, fake, first)
        loss_h = self._step_heads(real, fake)
        losses: dict[str, float] = {}
        if self.seen >= recipe.alone:
            self.opt_g.param_groups[0]["lr"] *= min(1.0, (self.seen - recipe.alone) / recipe.ramp)
            losses = self._step_generator(second)
        self.steps += 1
        self.update_average()
        return {"loss_d": loss_d.item(), "loss_h": loss_h.item(), **_columns("read", read), **losses}

    def set_learning_rates(self) -> None:
        """Give the optimizers the learning rates of this step."""
        super().set_learning_rates()
        self.opt_h.param_groups[0]["lr"] = self.recipe.lr_heads * self.decay()

    def pairs(self, latents: list[Tensor]) -> list[Tensor]:
        """Make neighbours in the batch pairs, in place, and return the latents.

        The batch has a block for each level. Pairs of the first block share their coarsest latent only; those
        of a finer level's block share all but that level's. What is left of the batch shares nothing.
        """
        count = self._block(latents)
        for level, latent in enumerate(latents):
            for block in range(len(latents)):
                shared = level == 0 or block not in (0, level)
                if shared:
                    rows = latent[block * count : (block + 1) * count]
                    rows[1::2] = rows[::2]
        return latents

    def _block(self, latents: Sequence[Tensor]) -> int:
        """Return the number of samples in a block, which is even."""
        count: int = self.recipe.batch // len(latents) // 2 * 2
        return count

    def _step_heads(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the heads by images in [-1, 1], and return their loss."""
        with self.autocast():
            with torch.no_grad():
                maps = self.features(torch.cat([real, fake]) / 2 + 0.5).maps
            loss = self.heads.loss(maps)
        loss.backward()
        self.opt_h.step()
        self.opt_h.zero_grad(set_to_none=True)
        return loss

    def _step_generator(self, latents: list[Tensor]) -> dict[str, float]:
        """Update the generator on samples that are pairs."""
        recipe = self.recipe
        for discriminator in (self.discriminator, self.heads):
            discriminator.eval().requires_grad_(False)
        with self.autocast():
            images = self.generator.decode(latents).float()
            logits, regressed = self.discriminator(images * 2 - 1)
            maps, features = self.features(images)
            loss_p = self.heads.loss_of_generator(maps)
        for discriminator in (self.discriminator, self.heads):
            discriminator.train().requires_grad_(True)
        loss_g = F.softplus(-logits).mean()
        info = self.info(regressed, latents)
        count = self._block(latents)
        steady = (features[:count:2] - features[1:count:2]).square().sum(1).mean() / 2
        blocks = images.split(count)[1 : len(latents)]
        changes = torch.stack([(block[::2] - block[1::2]).abs().mean() for block in blocks])
        hidden = F.relu(1 - changes / self.visible).sum()
        self.step_generator(
            loss_g
            + recipe.info * (self.shares * info).mean()
            + recipe.projected * loss_p
            + recipe.steady * steady
            + recipe.hidden * hidden
        )
        return {
            "loss_g": loss_g.item(),
            "loss_p": loss_p.item(),
            "steady": steady.item(),
            **_columns("change", changes, first=1),
            **_columns("info", info),
        }


def _by_level(values: Sequence[float], count: int) -> list[float]:
    """Return a value for each of so many levels, of which the last one is repeated."""
    return [values[min(index, len(values) - 1)] for index in range(count)]


def _columns(name: str, values: Tensor, first: int = 0) -> dict[str, float]:
    """Return the columns of the log of a value by level."""
    return {f"{name}_{level}": value for level, value in enumerate(values.tolist(), first)}


main = command(RECIPES, Trainer, 720_000, load=FilmGenerator.load)

if __name__ == "__main__":
    start(main)
