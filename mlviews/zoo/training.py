"""What the zoo's trainings share: a trainer, its run with checkpoints and a log, and its command line."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlviews.generators.base import MLVGM
from mlviews.images import ImageSet
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import digest, sha256
from mlviews.runs.modes import plain
from mlviews.runs.progress import bars
from mlviews.zoo.images import SIZES, training_images

# -- trainers --------------------------------------------------------------------------------------------


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

    def prepare(self) -> None:  # noqa: B027 (most have nothing to do)
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
