"""Train the bundled SemafoVAE, with the labels of one image in a hundred.

The command is ``python -m mlviews.zoo.train_semafo fashion-semafo --data DIR --out runs/fashion-semafo``; for
images of your own, one folder a class, ``python -m mlviews.zoo.train_semafo semafo --data FOLDER --out
runs/mine``. A second, short training of the priors alone goes on from there: ``python -m
mlviews.zoo.train_semafo fashion-semafo-priors --start runs/fashion-semafo/fashion-semafo.safetensors --data
DIR --out runs/priors --images 16000``, or ``semafo-priors``.

It maximizes the evidence lower bound of images with and without labels (Trong 2022, "Semi-supervised
Variational Autoencoder with a transitive information"); the label of the latter is drawn from ``q(y | x)``.
Unlike in the paper, no gradient of the bound reaches ``q(y | x)``: it learns from the labels that are
known, and from those that a moving average of it is sure of (:meth:`Trainer.classes`; Sohn et al. 2020,
FixMatch). Besides, u has to tell the label (:meth:`Trainer.bound`, as in the paper), and images that are
made for a label have to show it (:meth:`Trainer.control`).

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.nvae.likelihood import Gaussian
from mlviews.generators.semafo import SemafoConfig, SemafoVAE
from mlviews.images import ImageSet
from mlviews.runs.files import digest
from mlviews.runs.modes import plain
from mlviews.weights.files import write_safetensors
from mlviews.zoo.training import BaseTrainer, average_decay, command, start, update_average


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Weights are those of terms in nats per image."""

    model: SemafoConfig
    labels: int = 600  # images whose labels are used, as many of each class
    batch: int = 32  # images per step, as if none had a label
    labelled: int = 8  # images with labels per step, besides
    views: int = 32  # augmented images with labels per step, which only q(y | x) sees
    lr: float = 2e-3  # Adam, betas (0.9, 0.99)
    ramp: int = 10_000  # images over which lr rises from 0; over the whole run it falls to 1/100 by a cosine
    warm_up: float = 0.15  # share of the run over which the weight of the divergences of u and z0 rises to 1
    clip: float = 500.0  # largest norm of the gradient
    ema: int = 5_000  # half-life of the moving average, in images
    pixels: float = 3.0  # weight of log p(x | z): how much the latents have to say of an image
    free_u: float = 6.0  # nats of level u that cost nothing
    free_z0: float = 10.0  # nats of level z0 that cost nothing
    narrow: float = 2.0  # weight of the nats of u beyond these: shape is for z0 to say
    semaphore: float = 10.0  # weight of log p(y | u)
    label: float = 100.0  # weight of log q(y | x) of labels that are known
    consistency: float = 100.0  # weight of log q(y | x) of labels that the moving average is sure of
    sure: float = 0.95  # their least probability
    control: float = 5.0  # weight of log q(y | x) of images that are made for a label
    control_from: float = 0.3  # share of the run after which there are such images
    control_temperature: float = 1.0  # of that q(y | x): the higher, the more certain it has to be
    priors_only: bool = False  # go on from trained weights, and change nothing but the priors

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe for images of so many channels, of 32 pixels or 64 (halved once more)."""
        model = dataclasses.replace(self.model, image_channels=channels)
        if size > model.image_size:
            encoder, decoder = model.encoder, model.decoder
            model = dataclasses.replace(model, encoder=(encoder[0], *encoder), decoder=(decoder[0], *decoder))
        # The bound is a sum over pixels, and so is its gradient.
        values = channels * size**2 / (self.model.image_channels * self.model.image_size**2)
        return dataclasses.replace(self, model=model, clip=self.clip * values)


_PRIORS = Recipe(
    SemafoConfig(),
    lr=2e-4,
    ramp=2_000,
    warm_up=0.0,
    ema=2_000,
    control=60.0,
    control_from=0.0,
    control_temperature=4.0,
    priors_only=True,
)

RECIPES = {
    "fashion-semafo": Recipe(SemafoConfig()),
    "fashion-semafo-priors": _PRIORS,
    # The same, for images of your own.
    "semafo": Recipe(SemafoConfig()),
    "semafo-priors": _PRIORS,
}

PRIORS = ("classes", "blocks.0.prior.", "blocks.1.prior.", "blocks.1.skip.")
"""How the names of the priors' weights begin: of p(u | y), p(z0 | u) and p(z1 | z0, u)."""


# -- images and labels ---------------------------------------------------------------------------------------


def labelled_rows(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the rows of the images whose labels are used, as many of each class, int64 ``[count]``.

    Args:
        labels: int64 ``[N]`` of all images.
        count: how many are used; rounded down to a multiple of the number of classes.
        seed: which ones.

    Raises:
        ValueError: if there are images without a class, or a class has too few.
    """
    classes = int(labels.max()) + 1
    if int(labels.min()) < 0:
        raise ValueError("Invalid images: some have no class; give a folder with one folder a class.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    smallest = int(torch.bincount(labels, minlength=classes).min())
    if not 1 <= count // classes <= smallest:
        raise ValueError(
            f"Invalid labels={count}: of {classes} classes, the smallest has {smallest} images. The recipe "
            f"uses as many labels of each class, from {classes} to at most {classes * smallest}: add images "
            "to the small classes, or leave them out."
        )
    return torch.cat([order[shuffled == label][: count // classes] for label in range(classes)])


def augment(images: Tensor, noise: torch.Generator, strength: float = 1.0, covered: bool = True) -> Tensor:
    """Return images that are flipped, turned, scaled, shifted, changed in brightness, and partly covered.

    Args:
        images: ``[B, C, S, S]`` in [0, 1].
        noise: draws the changes of each image.
        strength: of the changes: at 1 turns of up to 0.2 rad, 15 % of the size, a tenth of the side, and 30 %
            of the brightness.
        covered: whether a square of a third of the side is black.
    """
    rows, _, side, _ = images.shape
    turn, scale, right, down, gain, x, y = (2 * torch.rand(7, rows, generator=noise) - 1).unbind()
    flip = (torch.rand(rows, generator=noise) < 0.5).float() * 2 - 1
    # From places in the new image, of range [-1, 1], to places in the old one.
    turn, scale = 0.2 * strength * turn, 1 + 0.15 * strength * scale
    right, down = 0.2 * strength * right, 0.2 * strength * down
    cos, sin = scale * turn.cos(), scale * turn.sin()
    maps = torch.stack([flip * cos, -sin, right, flip * sin, cos, down], 1).view(rows, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    moved = (moved * (1 + 0.3 * strength * gain[:, None, None, None])).clamp(0, 1)
    if not covered:
        return moved
    places = torch.linspace(-1, 1, side)
    columns = (places - 0.8 * x[:, None]).abs() < 1 / 3  # [B, S]
    lines = (places - 0.8 * y[:, None]).abs() < 1 / 3  # [B, S]
    return moved * ~(lines[:, None, :, None] & columns[:, None, None, :])


def weakly(images: Tensor, noise: torch.Generator) -> Tensor:
    """Return images that are flipped and moved a little, as those with labels are."""
    return augment(images, noise, strength=0.4, covered=False)


# -- training ------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """The evidence lower bound of a batch, and what it is made of; nats per image."""

    loss: Tensor  # weighted, with the terms about u and the labels
    z0: Tensor  # drawn from the posterior, [B, d]
    terms: dict[str, Tensor]  # columns of the log


class Trainer(BaseTrainer):
    """The network, its optimizer and its moving average.

    Args:
        recipe: what is trained, and how.
        images: as for :class:`~mlviews.zoo.training.BaseTrainer`.
        total: likewise.
        seed: likewise.
        bf16: likewise.
        labels: of all images, int64 ``[N]``; those of ``recipe.labels`` images are used.
        start: a trained network to go on from, for a recipe of priors only; None for fresh weights.

    Raises:
        ValueError: if a recipe of priors has no network to go on from, or another one has, or it makes other
            images or has other classes.
    """

    PARTS = ("network", "average", "optimizer")
    LOSSES = (
        "nats", "distortion", "rate_u", "rate_z0", "rate_z1", "semaphore", "label", "consistency", "sure",
        "control", "gradient",
    )  # fmt: skip

    @plain()
    def __init__(
        self,
        recipe: Recipe,
        images: Tensor | ImageSet,
        total: int,
        seed: int,
        bf16: bool,
        labels: Tensor,
        start: SemafoVAE | None = None,
    ) -> None:
        self.with_label = labelled_rows(labels, recipe.labels, seed)  # rows of images
        self.labels = labels[self.with_label]
        model = dataclasses.replace(recipe.model, classes=int(labels.max()) + 1)
        super().__init__(dataclasses.replace(recipe, model=model), images, total, seed, bf16)
        torch.manual_seed(seed)
        self.start = _checked_start(start, model, recipe.priors_only)
        self.network = SemafoVAE(model)
        if start is not None:
            self.network.load_state_dict(start.state_dict())
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(not recipe.priors_only or name.startswith(PRIORS))
        learning = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr=recipe.lr, betas=(0.9, 0.99))

    def settings(self) -> dict[str, Any]:
        """Return what the training depends on, with the weights that it goes on from."""
        start = {} if self.start is None else {"start": digest(self.start.state_dict())}
        return super().settings() | start

    def learning_rate(self) -> float:
        """Return the step's learning rate."""
        ramp = min(1.0, (self.seen + self.recipe.batch) / self.recipe.ramp)
        cosine = 0.505 + 0.495 * math.cos(math.pi * min(self.seen / self.total, 1.0))
        return float(self.recipe.lr * ramp * cosine)

    def warmth(self) -> float:
        """Return the step's weight of the divergences of u and z0."""
        if not self.recipe.warm_up:
            return 1.0
        return float(min(1.0, max(1e-3, self.seen / self.total / self.recipe.warm_up)))

    def step(self) -> dict[str, float]:
        """Update the network, and return the losses, nats per image.

        Returns:
            The bound's parts, the terms beside it, the share of labels that the moving average is sure of,
            and the gradient's norm.
        """
        recipe = self.recipe
        noise = self.noise()
        images = self.pixels().float() / 255
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            guesses = self.average.classify(images)
            bound = self.bound(images, guesses, noise)
            classes = self.classes(images, guesses, noise)
            control = self.control(bound.z0[: recipe.batch // 2].detach(), noise)
        controls = self.seen >= recipe.control_from * self.total
        loss = bound.loss + recipe.label * classes["label"] + recipe.consistency * classes["consistency"]
        (loss + recipe.control * controls * control).backward()
        gradient = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        if gradient.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.steps += 1
        update_average(self.average, self.network, average_decay(recipe.ema, recipe.batch, self.seen))
        terms = bound.terms | classes | {"control": control, "gradient": gradient}
        return {name: terms[name].item() for name in self.LOSSES}

    def bound(self, images: Tensor, guesses: Tensor, noise: torch.Generator) -> Bound:
        """Return the bound of a batch without labels, and of some images with labels.

        Args:
            images: those without, float ``[B, C, H, W]`` in [0, 1].
            guesses: the moving average's ``q(y | x)`` of these, ``[B, K]``.
            noise: draws the images with labels, the labels of the others, and the latents.
        """
        recipe, network = self.recipe, self.network
        supervised, labels = self._labelled(recipe.labelled, noise)
        images = torch.cat([images, supervised]).contiguous(memory_format=torch.channels_last)
        eps = [torch.randn(len(images), *level.shape, generator=noise) for level in network.levels]
        maps, dense = network.encoder(images)

        # The labels: drawn from q(y | x), and known.
        drawn = torch.multinomial(guesses, 1, generator=noise)[:, 0]
        labels = torch.cat([drawn, labels])

        # The bound, given these.
        posterior = network.posterior(maps, dense, labels, eps)
        pixels = network.logits(posterior.features).float()
        distortion = (
            F.binary_cross_entropy_with_logits(pixels, images, reduction="none").sum((1, 2, 3)).mean()
        )
        rates = torch.stack(posterior.divergences).mean(1)  # of u, z0 and z1

        # p(u | y) of each class: near N(0, I), and such that u tells the class, by Bayes' rule.
        prior = Gaussian.of(network.classes, network.config.floor)  # [K, d]
        unit = Gaussian(torch.zeros_like(prior.mean), torch.ones_like(prior.std))
        densities = torch.stack([
            Gaussian(mean, std).log_density(posterior.values[0])
            for mean, std in zip(prior.mean, prior.std, strict=True)
        ], 1)  # fmt: skip
        semaphore = F.cross_entropy(densities, labels)

        # z1 costs from the start: what is said at u and z0 first is not said again there.
        coarse = recipe.narrow * (rates[0] - recipe.free_u).clamp(min=0)
        coarse = coarse + (rates[1] - recipe.free_z0).clamp(min=0) + prior.divergence(unit).mean()
        weight = self.warmth()
        loss = recipe.pixels * distortion + weight * coarse + rates[2] + recipe.semaphore * semaphore
        terms = {"nats": distortion + rates.sum(), "distortion": distortion, "semaphore": semaphore}
        terms |= dict(zip(("rate_u", "rate_z0", "rate_z1"), rates, strict=True))
        return Bound(loss, posterior.values[1], terms)

    def classes(self, images: Tensor, guesses: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        """Return how badly q(y | x) tells labels from augmented images, and of how many it was asked.

        Args:
            images: without labels, float ``[B, C, H, W]`` in [0, 1]; asked are those whose label the moving
                average is sure of.
            guesses: the moving average's ``q(y | x)`` of these, ``[B, K]``.
            noise: draws the images with labels, and the augmentations.
        """
        recipe = self.recipe
        sure, labels_guessed = guesses.max(1)
        mask = (sure > recipe.sure).float()
        supervised, labels = self._labelled(recipe.views, noise)
        views = torch.cat([augment(images, noise), weakly(supervised, noise)])
        logits = self.network.labeller(views.contiguous(memory_format=torch.channels_last)).float()
        consistency = F.cross_entropy(logits[: recipe.batch], labels_guessed, reduction="none")
        return {
            "label": F.cross_entropy(logits[recipe.batch :], labels),
            "consistency": (consistency * mask).mean(),
            "sure": mask.mean(),
        }

    def control(self, z0: Tensor, noise: torch.Generator) -> Tensor:
        """Return how badly the moving average tells, from images that are made for a label, this label.

        Half of them have all their levels from the label's priors. The other half keep the z0 of an image of
        perhaps another class, so that the label has to show in z1 too. The moving average also decodes the
        latents: only the priors learn from it, and not the decoder, which could learn to draw what fools it.
        A temperature above 1 divides the logits, so that certainty goes on paying: of the images that
        q(y | x) is just sure of, others see another class in many, and the surer it is, the fewer these are.

        Args:
            z0: of images, ``[B, d]``.
            noise: draws the labels and the latents.
        """
        network, average = self.network, self.average
        count = len(z0)
        labels = torch.randint(network.num_classes, (count,), generator=noise)
        eps = [torch.randn(count, *level.shape, generator=noise) for level in network.levels]

        def value(level: int, prior: Gaussian, _: Tensor | None) -> Tensor:
            drawn = prior.value(eps[level])
            return torch.cat([z0[: count // 2], drawn[count // 2 :]]) if level == 1 else drawn

        values = network.run_through(network.classes[labels], value).values
        passage = average.run_through(average.classes[labels], lambda level, *_: values[level])
        logits = average.labeller(average.to_image(passage.features))
        temperature: float = self.recipe.control_temperature
        return temperature * F.cross_entropy(logits.float() / temperature, labels)

    def _labelled(self, count: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return some of the images with labels, float ``[count, C, H, W]`` in [0, 1], and their labels."""
        places = torch.randint(len(self.with_label), (count,), generator=noise)
        return self.pixels_of(self.with_label[places]).float() / 255, self.labels[places]

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the moving average in float16, with configuration and provenance as metadata."""
        tensors = {name: value.half() for name, value in self.average.state_dict().items()}
        write_safetensors(path, tensors, self.average.metadata(provenance))


def _checked_start(start: SemafoVAE | None, model: SemafoConfig, needed: bool) -> SemafoVAE | None:
    """Return the network to go on from, if the recipe can.

    Raises:
        ValueError: if it cannot.
    """
    if needed and start is None:
        raise ValueError("The recipe changes the priors of a trained network: give its file by --start.")
    if start is not None and not needed:
        raise ValueError("The recipe begins with fresh weights: leave --start out, or take that of priors.")
    if start is not None and start.config != model:
        raise ValueError(f"The file of --start has {start.config}; the images need {model}.")
    return start


main = command(RECIPES, Trainer, 130_000, labelled=True, load=SemafoVAE.load)

if __name__ == "__main__":
    start(main)
