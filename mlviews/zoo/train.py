"""Train a bundled generator: ``python -m mlviews.zoo.train fashion --data DIR --out runs/fashion``.

A GAN with the non-saturating loss, lazy R1 (Mescheder et al. 2018; Karras et al. 2020), an exponential moving average
of the generator, and one addition that makes every level matter: the discriminator also regresses each level's latent
from the image, and the generator is rewarded when it can (Chen et al. 2016, InfoGAN). A level that the adversarial
loss alone would leave idle then has to show in the image. Labels are never used.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlviews.evaluation.data import load_fashion_mnist
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.weights.files import write_safetensors


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


RECIPES = {
    "fashion": Recipe(FilmConfig()),
    # What the model card compares with: equal latents, block 1 as deep as the others, nearest upsampling, no regression.
    "fashion-trial": Recipe(
        FilmConfig(dims=(16,) * 4, channels=(96, 80, 48, 32), deep_first=True, upsample="nearest"),
        decay_from=1.0, r1=0.1, r1_every=8, info=0.0,
    ),
}  # fmt: skip


class Equalised(nn.Module):
    """A unit-variance weight scaled by He's constant at run time, so that Adam moves all layers alike."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(weight[0].numel())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def equalise(network: nn.Module) -> nn.Module:
    """Equalised learning rates for every convolution and linear layer, from fresh N(0, 1) weights and zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            # The check would run the module on the old weight; the two are equivalent by construction.
            parametrize.register_parametrization(module, "weight", Equalised(module.weight), unsafe=True)
    return network


def plain_weight(network: nn.Module, name: str) -> Tensor:
    """A copy of a parameter as the network uses it, whatever it is parametrised by."""
    module, _, parameter = name.rpartition(".")
    value: Tensor = getattr(network.get_submodule(module), parameter)
    return value.detach().clone(memory_format=torch.contiguous_format)


class Discriminator(nn.Module):
    """Images ``[B, C, 32, 32]`` in [-1, 1] -> logits ``[B]`` and the latents regressed from them ``[B, sum(dims)]``."""

    def __init__(self, channels: int, width: int, latents: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
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
        x = self.trunk(images)
        # Minibatch standard deviation (Karras et al. 2018), over groups of 8 images.
        spread = x.float().view(-1, len(x) // 8, *x.shape[1:]).var(0, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3))
        spread = spread.repeat(8)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        x = F.leaky_relu(self.mix(torch.cat([x, spread.to(x.dtype)], 1)), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)
        with torch.autocast(x.device.type, enabled=False):
            return self.logit(x.float())[:, 0], self.latent(x.float())


class BaseTrainer(ABC):
    """What every trainer here has: the data's order, and its state as the sum of its parts'."""

    PARTS: tuple[str, ...]  # attributes that have a state
    LOSSES: tuple[str, ...]  # what step() returns: columns of the log

    def __init__(self, images: Tensor, batch: int, seed: int) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.steps = 0

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One update of everything; returns the losses."""

    @abstractmethod
    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write what is to be used, with where it comes from."""

    @property
    def seen(self) -> int:
        """Real images shown so far."""
        return self.steps * self.batch

    def rows(self) -> Tensor:
        """Indices of the step's real images: shuffled anew each epoch."""
        per_epoch = len(self.images) // self.batch
        epoch, index = divmod(self.steps, per_epoch)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return order[index * self.batch : (index + 1) * self.batch]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"steps": self.steps} | {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps = state["steps"]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


class Trainer(BaseTrainer):
    """Both networks, their optimisers and the moving average; :meth:`step` runs one of each."""

    PARTS = ("generator", "average", "discriminator", "opt_g", "opt_d")
    LOSSES = ("loss_d", "loss_g", "info")

    def __init__(self, recipe: Recipe, images: Tensor, total: int, seed: int, bf16: bool) -> None:
        super().__init__(images, recipe.batch, seed)
        torch.manual_seed(seed)
        self.recipe, self.total, self.bf16 = recipe, total, bf16
        self.generator = FilmGenerator(recipe.model)
        equalise(self.generator).requires_grad_(True).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.discriminator = equalise(Discriminator(recipe.model.image_channels, recipe.width, sum(recipe.model.dims)))
        self.discriminator.to(memory_format=torch.channels_last)
        # Lazy regularisation: fewer effective steps, so lr and betas are scaled (Karras et al. 2020, app. B).
        ratio = recipe.r1_every / (recipe.r1_every + 1)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), lr=recipe.lr, betas=(0.0, 0.99))
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=recipe.lr * ratio, betas=(0.0, 0.99**ratio))
        self.base_lrs = (recipe.lr, recipe.lr * ratio)

    def real(self) -> Tensor:
        """The step's real images in [-1, 1]."""
        return (self.images[self.rows()].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def step(self) -> dict[str, float]:
        """One update of the discriminator, one of the generator; returns the losses."""
        recipe = self.recipe
        noise = torch.Generator().manual_seed((self.seed << 32) + self.steps)
        latents = [[torch.randn(recipe.batch, dim, generator=noise) for dim in recipe.model.dims] for _ in range(2)]
        progress = self.seen / self.total
        decay = 1 - 0.9 * max(0.0, (progress - recipe.decay_from) / (1 - recipe.decay_from)) if recipe.decay_from < 1 else 1.0
        for optimiser, lr in zip((self.opt_g, self.opt_d), self.base_lrs, strict=True):
            optimiser.param_groups[0]["lr"] = lr * decay
        real = self.real()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

        with autocast:
            with torch.no_grad():
                fake = self.generator.decode(latents[0]).float() * 2 - 1
            logits, regressed = self.discriminator(torch.cat([real, fake]))
        info = self.info(regressed[recipe.batch :], latents[0])
        loss_d = F.softplus(-logits[: recipe.batch]).mean() + F.softplus(logits[recipe.batch :]).mean()
        (loss_d + recipe.info * info).backward()
        if self.steps % recipe.r1_every == 0:
            real.requires_grad_(True)
            (slope,) = torch.autograd.grad(self.discriminator(real)[0].sum(), real, create_graph=True)
            (slope.square().sum((1, 2, 3)).mean() * (recipe.r1 / 2 * recipe.r1_every)).backward()
        self.opt_d.step()
        self.opt_d.zero_grad(set_to_none=True)

        self.discriminator.requires_grad_(False)
        with autocast:
            logits, regressed = self.discriminator(self.generator.decode(latents[1]).float() * 2 - 1)
        info = self.info(regressed, latents[1])
        loss_g = F.softplus(-logits).mean()
        (loss_g + recipe.info * info).backward()
        self.discriminator.requires_grad_(True)
        self.opt_g.step()
        self.opt_g.zero_grad(set_to_none=True)

        self.steps += 1
        keep = 0.5 ** (recipe.batch / min(recipe.ema, 0.1 * self.seen))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        return {"loss_d": loss_d.item(), "loss_g": loss_g.item(), "info": info.item()}

    def info(self, regressed: Tensor, latents: list[Tensor]) -> Tensor:
        """Mean squared error of the regressed latents, each level counting the same; 1 for a level that does not show."""
        parts = regressed.split(list(self.recipe.model.dims), dim=1)
        return torch.stack([F.mse_loss(part, z) for part, z in zip(parts, latents, strict=True)]).mean()

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """The moving average as plain weights (equalisation folded in), with its configuration as metadata."""

        tensors = {name: plain_weight(self.average, name) for name, _ in FilmGenerator(self.recipe.model).named_parameters()}
        metadata = {
            "format": FilmGenerator.FORMAT,
            "config": json.dumps(dataclasses.asdict(self.recipe.model)),
            "provenance": json.dumps(provenance),
        }
        write_safetensors(path, tensors, metadata)


def run(trainer: BaseTrainer, name: str, images: int, out: Path, snapshots: int, provenance: dict[str, Any]) -> Path:
    """Train until so many images were shown, resuming from the folder's checkpoint if it has one.

    Args:
        trainer: as its constructor left it.
        name: of the exported weights, and on the progress bar.
        images: real images to show in all.
        out: folder for the checkpoint, the log, and the weights.
        snapshots: images between checkpoints; each also exports weights.
        provenance: what the weights say about where they come from, besides the number of images.

    Returns:
        The path of the final weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
    provenance = provenance | {"seed": trainer.seed, "torch": torch.__version__, "threads": torch.get_num_threads()}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
        TimeRemainingColumn(),
    )
    with (out / "log.csv").open("a", newline="") as log, Progress(*columns) as progress:
        writer = csv.DictWriter(log, ["images", *trainer.LOSSES, "images_per_second"])
        if log.tell() == 0:
            writer.writeheader()
        task = progress.add_task(name, total=images, completed=trainer.seen)
        begin, done = time.perf_counter(), trainer.seen
        while trainer.seen < images:
            losses = trainer.step()
            progress.update(task, completed=trainer.seen)
            last = trainer.seen >= images
            if trainer.steps % 100 == 0 or last:
                speed = (trainer.seen - done) / (time.perf_counter() - begin)
                writer.writerow(
                    {"images": trainer.seen, "images_per_second": round(speed, 1)} | {k: round(v, 4) for k, v in losses.items()}
                )
                log.flush()
                begin, done = time.perf_counter(), trainer.seen
            if last or trainer.seen // snapshots > (trainer.seen - trainer.batch) // snapshots:
                torch.save(trainer.state_dict(), checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
                trainer.export(out / f"{trainer.seen:08d}.safetensors", provenance | {"images": trainer.seen})
    trainer.export(out / f"{name}.safetensors", provenance | {"images": trainer.seen})
    return out / f"{name}.safetensors"


def command(recipes: Mapping[str, Any], trainer: Callable[..., BaseTrainer], most: int) -> Callable[..., None]:
    """The command line of a training script: its recipes, what trains them, and how many images to show unless told otherwise."""

    def main(
        recipe: Annotated[str, typer.Argument(help="A recipe's name.")],
        data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's idx files.")],
        out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and exported weights; resumed if it has a checkpoint.")],
        images: Annotated[int, typer.Option(help="Real images to show in all.", min=64)] = most,
        seed: Annotated[int, typer.Option(help="Seeds the networks, the data order and the noise.", min=0)] = 0,
        snapshots: Annotated[int, typer.Option(help="Images between checkpoints; each also exports weights.", min=64)] = 65_000,
        bf16: Annotated[bool, typer.Option(help="bfloat16 autocast, for a CPU with AVX-512 BF16.")] = False,
        threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    ) -> None:
        if recipe not in recipes:
            raise typer.BadParameter(f"Invalid recipe {recipe!r}: one of {', '.join(recipes)}.")
        if threads:
            torch.set_num_threads(threads)
        provenance = {"data": "Fashion-MNIST train, 60 000 images", "recipe": dataclasses.asdict(recipes[recipe]), "bf16": bf16}
        made = trainer(recipes[recipe], load_fashion_mnist(data, "train").images, images, seed, bf16)
        print(run(made, recipe, images, out, snapshots, provenance))

    main.__doc__ = f"Train a bundled generator on Fashion-MNIST's 60 000 training images. Recipes: {', '.join(recipes)}."
    return main


main = command(RECIPES, Trainer, 1_200_000)

if __name__ == "__main__":
    typer.run(main)
