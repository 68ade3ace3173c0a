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
import csv
import dataclasses
import inspect
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlviews.errors import listing
from mlviews.generators.base import MLVGM
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.images import ImageSet
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import digest, sha256
from mlviews.runs.modes import plain
from mlviews.runs.progress import bars
from mlviews.weights.files import write_safetensors
from mlviews.zoo.images import SIZES, training_images

Network = TypeVar("Network", bound=MLVGM)


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


# -- networks ------------------------------------------------------------------------------------------------


class Equalised(nn.Module):
    """A weight of unit variance that is scaled by He's constant at run time.

    Adam then moves all layers alike (Karras et al. 2018, sec. 4.1).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(weight[0].numel())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def equalise(network: nn.Module) -> nn.Module:
    """Equalise the learning rates of all convolutions and linear layers.

    Their weights start from fresh N(0, 1), their biases from zeros.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            # The check would run the module on the old weight; the two are equivalent by construction.
            parametrize.register_parametrization(module, "weight", Equalised(module.weight), unsafe=True)
    return network


def plain_weight(network: nn.Module, name: str) -> Tensor:
    """Return a copy of a parameter as the network uses it, whatever it is parametrised by."""
    module, _, parameter = name.rpartition(".")
    value: Tensor = getattr(network.get_submodule(module), parameter)
    return value.detach().clone(memory_format=torch.contiguous_format)


def set_plain_weight(network: nn.Module, name: str, value: Tensor) -> None:
    """Give an equalised network a parameter that it uses as it is: the inverse of :func:`plain_weight`."""
    module, _, parameter = name.rpartition(".")
    layer = network.get_submodule(module)
    with torch.no_grad():
        if not parametrize.is_parametrized(layer, parameter):
            getattr(layer, parameter).copy_(value)
            return
        parametrizations: Any = layer.parametrizations
        original = parametrizations[parameter].original
        original.copy_(value / parametrizations[parameter][0].scale)


class Discriminator(nn.Module):
    """The network that tells real images from generated ones, and regresses the latents of the latter."""

    def __init__(self, channels: int, width: int, latents: int, size: int = 32) -> None:
        super().__init__()
        halving: list[nn.Module] = []  # from 64 pixels to 32
        if size == 64:
            halving = [
                nn.Conv2d(channels, width // 2, 4, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(width // 2, width // 2, 3, 1, 1), nn.LeakyReLU(0.2),
            ]  # fmt: skip
            channels = width // 2
        self.trunk = nn.Sequential(
            *halving,
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.mix = nn.Conv2d(4 * width + 1, 4 * width, 3, 1, 1)
        self.dense = nn.Linear(16 * 4 * width, 4 * width)
        self.logit = nn.Linear(4 * width, 1)
        self.latent = nn.Linear(4 * width, latents)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B]``, and the latents ``[B, sum(dims)]`` that are regressed from the images.

        Args:
            images: ``[B, C, size, size]`` in [-1, 1]; ``B`` is a multiple of 8.
        """
        x = self.trunk(images)  # [B, 4 width, 4, 4]
        # Minibatch standard deviation (Karras et al. 2018), over groups of 8 images.
        groups = x.float().view(-1, len(x) // 8, *x.shape[1:])  # [8, B / 8, 4 width, 4, 4]
        deviation = groups.var(0, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3))  # [B / 8]
        deviation = deviation.repeat(8)[:, None, None, None].expand(-1, 1, *x.shape[2:])  # [B, 1, 4, 4]
        x = F.leaky_relu(self.mix(torch.cat([x, deviation.to(x.dtype)], 1)), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)  # [B, 4 width]
        with torch.autocast(x.device.type, enabled=False):
            return self.logit(x.float())[:, 0], self.latent(x.float())


# -- training ------------------------------------------------------------------------------------------------


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move a network's moving average towards its parameters.

    Args:
        average: a copy of the network; its parameters are changed.
        network: as it is after the step.
        decay: the share of the average that is kept.
    """
    # Not by AveragedModel, whose state has other names than those in the checkpoints of earlier runs.
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(network.parameters()), None)


def average_decay(half_life: float, batch: int, seen: int) -> float:
    """Return the share of the moving average that a step keeps.

    Early in the run the half-life is a tenth of the images seen, so that the first weights are soon forgotten
    (as by stylegan2-ada-pytorch's ``ema_rampup``).

    Args:
        half_life: in images.
        batch: images of the step.
        seen: images shown so far, those of the step included.
    """
    decay: float = 0.5 ** (batch / min(half_life, 0.1 * seen))
    return decay


class BaseTrainer(ABC):
    """What every trainer here has: the order of the data, and a state that is the sum of its parts'."""

    PARTS: tuple[str, ...]  # attributes that have a state
    LOSSES: tuple[str, ...]  # what step() returns: columns of the log
    SUFFIX = ".safetensors"  # of what export() writes; empty for a folder

    def __init__(self, recipe: Any, images: Tensor | ImageSet, total: int, seed: int, bf16: bool) -> None:
        if len(images) < recipe.batch:
            raise ValueError(
                f"There are {len(images)} images to train on, fewer than a batch of the recipe, "
                f"{recipe.batch}: give more."
            )
        self.recipe = recipe  # a dataclass: what is trained, and how
        self.images = images  # uint8 [N, C, H, W]
        self.total = total  # real images to show in all, which learning rates follow
        self.seed = seed
        self.bf16 = bf16
        self.batch: int = recipe.batch
        self.steps = 0

    def settings(self) -> dict[str, Any]:
        """Return what the training depends on: a checkpoint with other values belongs to another run."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "images": self.total,
            "seed": self.seed,
            "bf16": self.bf16,
            "data": self.data(),
        }

    def prepare(self) -> None:
        """Do what comes before the first step of a run, and not when one is resumed."""

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Update everything once, and return the losses."""

    @abstractmethod
    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the weights that are to be used, and where they come from."""

    @property
    def seen(self) -> int:
        """Number of real images shown so far."""
        return self.steps * self.batch

    def rows(self) -> Tensor:
        """Return the indices ``[B]`` of the step's real images, which are shuffled anew each epoch."""
        per_epoch = len(self.images) // self.batch
        epoch, index = divmod(self.steps, per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        return order[index * self.batch : (index + 1) * self.batch]

    def data(self) -> str:
        """Return a digest of the images."""
        if isinstance(self.images, Tensor):
            return digest({"images": self.images})
        return self.images.content()

    def pixels(self) -> Tensor:
        """Return the step's real images, uint8 ``[B, C, H, W]``."""
        return self.pixels_of(self.rows())

    def pixels_of(self, rows: Tensor) -> Tensor:
        """Return the real images of some rows, uint8 ``[B, C, H, W]``."""
        if isinstance(self.images, Tensor):
            return self.images[rows]
        if self.images.is_small:
            return self.images.resident(rows.device)[rows]
        return self.images.batch(rows.tolist(), rows.device)

    def noise(self) -> torch.Generator:
        """Return a random generator for the step's noise."""
        return torch.Generator().manual_seed((self.seed << 32) + self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"steps": self.steps} | {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.steps = state["steps"]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


class AdversarialTrainer(BaseTrainer):
    """What trainers with a discriminator have besides: ``opt_g``, ``opt_d``, and what both losses go with."""

    discriminator: nn.Module
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer
    base_lrs: tuple[float, float]  # of the two, at first

    def set_optimizers(
        self,
        network: nn.Module,
        lr: float,
        lr_discriminator: float,
        *,
        betas: tuple[float, float] = (0.0, 0.99),
        fused: bool = False,
    ) -> None:
        """Give both networks an Adam; the discriminator's betas are (0, 0.99).

        Args:
            network: what makes images.
            lr: its learning rate, at first.
            lr_discriminator: the discriminator's.
            betas: of the network's Adam.
            fused: of both.
        """
        # Lazy regularisation: fewer effective steps, so lr and betas are scaled (Karras et al. 2020, app. B).
        ratio = self.recipe.r1_every / (self.recipe.r1_every + 1)
        self.base_lrs = (lr, lr_discriminator * ratio)
        self.opt_g = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=fused)
        self.opt_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.base_lrs[1], betas=(0.0, 0.99**ratio), fused=fused
        )

    def teach_discriminator(self, scores: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        """Update the discriminator by the non-saturating loss, and return the loss.

        Args:
            scores: returns the discriminator's logits ``[B]`` of images.
            real: the step's, ``[B, C, H, W]`` in [-1, 1].
            fake: samples, which no gradient goes through.
        """
        loss = F.softplus(-scores(real)).mean() + F.softplus(scores(fake)).mean()
        loss.backward()
        self.penalize(scores, real)
        self.opt_d.step()
        self.opt_d.zero_grad(set_to_none=True)
        return loss

    def decay(self) -> float:
        """Return the factor of the learning rates at this step: 1, and then down to 0.1 along a line."""
        start = self.recipe.decay_from
        if start >= 1:
            return 1.0
        return float(1 - 0.9 * max(0.0, (self.seen / self.total - start) / (1 - start)))

    def set_learning_rates(self) -> None:
        """Give both optimizers the learning rates of this step."""
        decay = self.decay()
        for optimizer, lr in zip((self.opt_g, self.opt_d), self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * decay

    def penalize(self, scores: Callable[[Tensor], Tensor], real: Tensor) -> None:
        """Add lazy R1's gradient to the discriminator's, at the steps that have one.

        It is that of the squared slope of the logits at real images.

        Args:
            scores: returns the discriminator's logits ``[B]`` of images.
            real: the step's, ``[B, C, H, W]``.
        """
        recipe = self.recipe
        if self.steps % recipe.r1_every:
            return
        real = real.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(scores(real).sum(), real, create_graph=True)
        penalty = slope.square().sum((1, 2, 3)).mean()
        (penalty * (recipe.r1 / 2 * recipe.r1_every)).backward()

    def autocast(self) -> torch.autocast:
        """Return the context in which the networks run."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


def checked_start(recipe: Any, images: Tensor | ImageSet, total: int, start: Network | None) -> Network:
    """Return the network that a second training goes on from.

    Args:
        recipe: has ``alone``, the images at first that only discriminators learn from.
        images: as for :class:`BaseTrainer`.
        total: likewise.
        start: what the user gave.

    Raises:
        ValueError: if there is none, it makes other images or has one level, or all images are those that
            only discriminators learn from.
    """
    if start is None:
        raise ValueError("The recipe changes a trained network: give its file by --start.")
    shape = tuple(images.shape[1:] if isinstance(images, Tensor) else images.shape[:3])
    if start.image_shape != shape:
        raise ValueError(
            f"The file of --start makes images of shape {start.image_shape}, not {shape}: give its --size, "
            f"which is {listing(SIZES)}, and --color or --gray."
        )
    if len(start.levels) < 2:
        raise ValueError("The file of --start has one level, and samples share coarse ones: give another.")
    if total <= recipe.alone:
        raise ValueError(
            f"Invalid images={total}: only the discriminator learns from the first {recipe.alone}; give more."
        )
    return start


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


# -- runs ----------------------------------------------------------------------------------------------------


@plain()
def run(
    trainer: BaseTrainer, name: str, images: int, out: Path, snapshots: int, provenance: dict[str, Any]
) -> Path:
    """Train until so many images were shown, and resume from the folder's checkpoint if it has one.

    Args:
        trainer: as its constructor left it.
        name: of the exported weights, and on the progress bar.
        images: real images to show in all.
        out: folder for the checkpoint, the log, and the weights.
        snapshots: images between checkpoints; each also exports weights.
        provenance: what the weights say about where they come from, besides the number of images.

    Returns:
        The path of the final weights.

    Raises:
        ValueError: if the checkpoint is damaged, or of a training with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(
        out / "checkpoint.pt", trainer.settings(), resume=True, remedy="delete it", bare=True
    )
    state = checkpoint.load()
    if state is None:
        trainer.prepare()
    else:
        with checkpoint.reading():
            trainer.load_state_dict(state)
    provenance = provenance | {
        "seed": trainer.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with (out / "log.csv").open("a", newline="") as file, bars(None, unit="images") as progress:
        log = _Log(file, trainer)
        task = progress.add_task(name, total=images, completed=trainer.seen)
        while trainer.seen < images:
            losses = trainer.step()
            note = ", ".join(f"{loss} {value:.2f}" for loss, value in losses.items())
            progress.update(task, completed=trainer.seen, description=f"{name}, {note}")
            last = trainer.seen >= images
            if trainer.steps % 100 == 0 or last:
                log.write(losses)
            if last or trainer.seen // snapshots > (trainer.seen - trainer.batch) // snapshots:
                checkpoint.save(trainer.state_dict())
                trainer.export(
                    out / f"{trainer.seen:08d}{trainer.SUFFIX}", provenance | {"images": trainer.seen}
                )
    path = out / f"{name}{trainer.SUFFIX}"
    trainer.export(path, provenance | {"images": trainer.seen})
    return path


class _Log:
    """The losses and the speed of a run as rows of a CSV file, which a resumed run continues."""

    def __init__(self, file: TextIO, trainer: BaseTrainer) -> None:
        self._file = file
        self._trainer = trainer
        self._writer = csv.DictWriter(file, ["images", *trainer.LOSSES, "images_per_second"])
        if file.tell() == 0:
            self._writer.writeheader()
        self._start()

    def write(self, losses: dict[str, float]) -> None:
        """Add a row; the speed is that since the row before."""
        seen = self._trainer.seen
        speed = (seen - self._seen) / (time.perf_counter() - self._time)
        row = {"images": seen, "images_per_second": round(speed, 1)}
        self._writer.writerow(row | {name: round(loss, 4) for name, loss in losses.items()})
        self._file.flush()
        self._start()

    def _start(self) -> None:
        """Measure the speed from here."""
        self._time = time.perf_counter()
        self._seen = self._trainer.seen


def command(
    recipes: Mapping[str, Any],
    trainer: Callable[..., BaseTrainer],
    most: int,
    *,
    labelled: bool = False,
    load: Callable[[Path], MLVGM] | None = None,
) -> Callable[..., None]:
    """Return the command line of a training script.

    Args:
        recipes: by their names.
        trainer: what trains them.
        most: real images to show unless told otherwise.
        labelled: whether the trainer takes the images' labels too.
        load: reads what the trainer may go on from, by the option ``--start``; None: it cannot.
    """

    def main(
        recipe: Annotated[str, typer.Argument(help="A recipe's name.")],
        data: Annotated[
            Path, typer.Option(help="Folder of images, or of Fashion-MNIST's idx files.", exists=True)
        ],
        out: Annotated[
            Path,
            typer.Option(
                help="Folder for checkpoint, log and exported weights; resumed if it has a checkpoint."
            ),
        ],
        images: Annotated[int, typer.Option(help="Real images to show in all.", min=64)] = most,
        size: Annotated[int, typer.Option(help=f"Pixels of a side: {' or '.join(map(str, SIZES))}.")] = SIZES[
            0
        ],
        color: Annotated[
            bool | None,
            typer.Option("--color/--gray", help="Channels. Default: gray if no image has color."),
        ] = None,
        seed: Annotated[
            int,
            # A step's noise has the seed in the upper half of 64 bits.
            typer.Option(help="Seeds the networks, the data order and the noise.", min=0, max=2**32 - 1),
        ] = 0,
        snapshots: Annotated[
            int, typer.Option(help="Images between checkpoints; each also exports weights.", min=64)
        ] = 65_000,
        bf16: Annotated[bool, typer.Option(help="bfloat16 autocast, for a CPU with AVX-512 BF16.")] = False,
        threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
        start: Annotated[
            Path | None, typer.Option(help="Weights to go on from, for a recipe that does.", exists=True)
        ] = None,
    ) -> None:
        if recipe not in recipes:
            raise typer.BadParameter(f"Invalid recipe {recipe!r}: one of {', '.join(recipes)}.")
        if threads:
            torch.set_num_threads(threads)
        real = training_images(data, size, color)
        fitted = recipes[recipe].fitted(real.channels, size)
        provenance = {
            "data": real.name,
            "border": real.border,
            "recipe": dataclasses.asdict(fitted),
            "bf16": bf16,
        }
        options: dict[str, Any] = {"labels": real.labels} if labelled else {}
        if start is not None:
            assert load is not None
            options["start"] = load(start)
            provenance["start"] = {"sha256": sha256(start), **options["start"].provenance}
        job = trainer(fitted, real.images, images, seed, bf16, **options)
        print(run(job, recipe, images, out, snapshots, provenance))

    if load is None:
        _without(main, "start")
    names = ", ".join(recipes)
    main.__doc__ = f"Train a generator on a folder of images, or on Fashion-MNIST. Recipes: {names}."
    return main


def _without(main: Callable[..., None], option: str) -> None:
    """Take an option from a command line."""
    signature = inspect.signature(main, eval_str=True)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != option]
    main.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]


def start(main: Callable[..., None]) -> None:
    """Run a script's command line; bad input becomes one line on stderr."""
    try:
        typer.run(main)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"mlviews: {error}") from None


main = command(RECIPES, Trainer, 1_200_000)

if __name__ == "__main__":
    start(main)
