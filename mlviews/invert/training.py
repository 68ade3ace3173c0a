"""The run that trains an inverter, on any number of processes, with a checkpoint."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mlviews.anchors import Sampler
from mlviews.generators.base import MLVGM
from mlviews.generators.inverter import Inverter
from mlviews.identity import generator_identity
from mlviews.invert.images import Images
from mlviews.invert.objective import CHUNK, EVALUATE, Inversion, RandomFeatures, measure_scales
from mlviews.invert.options import SILENT, InverterOptions
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import fingerprint, whole
from mlviews.runs.processes import check_dtype, mean
from mlviews.runs.progress import bar
from mlviews.runs.records import environment
from mlviews.sampling import permutation

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAIN = 0  # the epoch of the counter streams that the pairs to learn from are drawn in
WARMUP = 100  # steps over which the learning rate rises from 0
FLOOR = 0.02  # share of the learning rate that is left at the last step


class Evaluation(NamedTuple):
    """The moving average's inverter at one step, on samples that it does not learn from."""

    step: int  # steps so far
    images: int  # images learned from so far, pairs included
    loss: float  # mean training loss since the evaluation before
    latent_error: float  # mean squared error of pairs' latents, levels weighted by what they show; chance: 1
    pair_error: float  # mean squared error of pairs' reconstructed pixels
    real_error: float  # of held-out real images'; NaN without images
    mean_square: float  # of the latents of held-out real images (the prior's: 1); of pairs' without images
    seconds: float  # since the start, all parts of the run together

    @property
    def score(self) -> float:
        """What is to be low: the error of real images, if there are some, else that of pairs."""
        return self.pair_error if math.isnan(self.real_error) else self.real_error


@dataclass(frozen=True)
class InverterRun:
    """The run that trained an inverter."""

    status: str  # "stalled": it had stopped getting better; "finished": all steps were used
    best: Evaluation  # the evaluation of the inverter that was kept
    history: list[Evaluation]  # all evaluations
    weights: dict[str, float]  # share of each level in the error of the latents, by what it shows
    checkpoint: Path | None  # that the run goes on from; inverter.safetensors and history.csv are beside it


# -- a run ---------------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """What a run has seen so far."""

    step: int = 0  # steps so far
    losses: list[float] = field(default_factory=list)  # of the steps since the last evaluation
    history: list[list[float]] = field(default_factory=list)  # rows of Evaluation
    stalled: int = 0  # evaluations since the best one
    status: str = ""  # how it ended; empty while it goes on
    lowest: float = math.inf  # the best evaluation's score
    best: int = -1  # its place in the history

    def add(self, evaluation: Evaluation, options: InverterOptions, counts: bool) -> bool:
        """Add an evaluation, say how the run ended if it has, and return whether it is the best one.

        Args:
            evaluation: the newest one.
            options: the run's, with patience and tolerance.
            counts: whether the run is in its last part, and so may stall.
        """
        self.history.append(list(evaluation))
        self.losses = []
        better = evaluation.score < self.lowest
        enough = evaluation.score < self.lowest * (1 - options.tolerance)
        self.stalled = self.stalled + 1 if counts and not enough else 0
        if better:
            self.lowest = evaluation.score
            self.best = len(self.history) - 1
        if evaluation.step >= options.steps:
            self.status = "finished"
        elif self.stalled >= options.patience:
            self.status = "stalled"
        return better


class Training:
    """An inverter's training, from its first weights or a checkpoint to the files of the result.

    Args:
        generator: an MLVGM on Fabric's device.
        images: real images; None for none.
        folder: where its files go; None keeps nothing on disk.
        start: the inverter whose weights to start from; None for new ones.
        options: how to train.
        fabric: launched.
    """

    def __init__(
        self,
        generator: MLVGM,
        images: Images | None,
        folder: Path | None,
        start: Inverter | None,
        options: InverterOptions,
        fabric: Fabric,
    ) -> None:
        _check_shares(options, images is not None, fabric.world_size)
        self.generator, self.images, self.options, self.fabric = generator, images, options, fabric
        self.folder = folder
        self.pairs = options.pairs or 0  # of a batch, once real images have joined
        self.draw = Sampler(generator, options.anchor, options.seed)
        self.settings = self._settings(start)
        self._hold_out()
        self._make_networks(start)
        path = None if folder is None else folder / "checkpoint.pt"
        self.checkpoint = Checkpoint(path, self.settings, options.resume)
        self._restore()

    def _settings(self, start: Inverter | None) -> dict[str, Any]:
        """Return what the run depends on: a checkpoint with other values belongs to another run."""
        options = dataclasses.asdict(self.options)
        for name in SILENT:
            del options[name]
        return {
            "generator": generator_identity(self.generator),
            "images": None if self.images is None else self.images.identity(),
            "start": None if start is None else fingerprint(start),
            **options,
            "anchor": dataclasses.asdict(self.draw.law),
        }

    def _hold_out(self) -> None:
        """Choose the real images to evaluate on; the others are to learn from."""
        self.learned = self.held_out = torch.empty(0, dtype=torch.int64)
        if self.images is not None:
            count = len(self.images)
            order = permutation(count, self.options.seed, EVALUATE, torch.device("cpu"))
            split = min(self.options.held_out, count // 5)
            self.held_out, self.learned = order[:split], order[split:]
        self._order: tuple[int, Tensor] | None = None  # of one pass over the images, as long as it lasts

    def _make_networks(self, start: Inverter | None) -> None:
        """Make the inverter, its moving average and its optimizer."""
        options, device = self.options, self.fabric.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed % (1 << 63))
            features = RandomFeatures(self.generator.image_shape[0]).to(device)
            self.inverter = Inverter.of(
                self.generator, width=options.width, blocks=options.blocks, hidden=options.hidden
            )
            if start is not None:
                self.inverter = Inverter(start.config)
                self.inverter.load_state_dict(start.state_dict())
        self.scales = measure_scales(self.generator, self.draw, features, options.evaluation)
        dtype = check_dtype(options.dtype, device)
        self.inversion = Inversion(self.generator, self.inverter, features, self.scales, options, dtype)
        self.optimizer = torch.optim.AdamW(
            self.inverter.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=1e-3
        )
        self.wrapped, *_ = self.fabric.setup(self.inversion, self.optimizer)
        self.average = AveragedModel(self.inverter, multi_avg_fn=self._average)
        self.best: dict[str, Tensor] = {}

    def _average(self, averages: Any, weights: Any, count: Any) -> None:
        """Move the averages towards the weights; early in the run they forget the first ones soon."""
        decay = min(self.options.average, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        state = self.checkpoint.load()
        self.log = _Log()
        self.begin = time.perf_counter()
        if state is None:
            return
        with self.checkpoint.reading():
            for name, part in self._parts().items():
                part.load_state_dict(state["parts"][name])
            self.best = dict(state["best"])
            self.log = _Log(**state["log"])
            self.begin -= state["seconds"]

    def _parts(self) -> dict[str, Any]:
        return {"inverter": self.inverter, "average": self.average, "optimizer": self.optimizer}

    def _save(self) -> None:
        """Replace the checkpoint."""
        if self.fabric.global_rank == 0:
            state = {
                "parts": {name: part.state_dict() for name, part in self._parts().items()},
                "best": self.best,
                "log": dataclasses.asdict(self.log),
                "seconds": time.perf_counter() - self.begin,
            }
            self.checkpoint.save(state)
            if self.folder is not None:
                _write_history(self._history(), self.folder / "history.csv")

    def _history(self) -> list[Evaluation]:
        """Return the evaluations so far."""
        return [Evaluation(int(row[0]), int(row[1]), *row[2:]) for row in self.log.history]

    def run(self) -> None:
        """Train until the log says that the run is over."""
        options, log = self.options, self.log
        show = options.progress and self.fabric.global_rank == 0
        with bar(f"inverter of {self.generator.name}", options.steps, log.step, show) as advance:
            while not log.status:
                log.losses.append(self._step(log.step))
                log.step += 1
                if log.step % options.evaluate_every == 0 or log.step == options.steps:
                    self._evaluate()
                    self._save()
                advance(log.step, self._note())

    def _note(self) -> str:
        """Return what the bar says besides the count."""
        loss = f": loss {self.log.losses[-1]:.3f}" if self.log.losses else ""
        if not self.log.history:
            return loss
        return f"{loss}, error {self._history()[-1].score:.4f} (lowest {self.log.lowest:.4f})"

    # -- a step ----------------------------------------------------------------------------------------------

    def _mixed(self, step: int) -> bool:
        """Have real images joined the pairs by this step?"""
        return self.images is not None and step >= self.options.pair_steps

    def _step(self, step: int) -> float:
        """Train on a batch; return its loss over all processes."""
        images, latents, labels = self._batch(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * self._rate(step)
        self.inverter.train()
        loss = self.wrapped(images, latents, labels)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        self.average.update_parameters(self.inverter)
        return mean(self.fabric, loss.detach()).item()

    def _rate(self, step: int) -> float:
        """Return the factor of the learning rate: up along a line, 1, and down along a line."""
        options = self.options
        progress = step / options.steps
        decay = 1 - (1 - FLOOR) * max(0.0, (progress - options.decay_from) / (1 - options.decay_from))
        return min(1.0, (step + 1) / WARMUP) * decay

    def _batch(self, step: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Return this process's images of a step, the pairs' first, and the pairs' latents and labels."""
        options = self.options
        mixed = self._mixed(step)
        pairs = self.pairs if mixed else options.batch
        latents, labels = self.draw(self._places(step * options.batch, pairs), TRAIN)
        images = self.generator(latents, labels)
        if mixed:
            count = options.batch - pairs
            places = self._places((step - options.pair_steps) * count, count)
            images = torch.cat([images, self._real(self._rows(places))])
        return images, latents, labels

    def _places(self, first: int, count: int) -> range:
        """Return this process's part of ``count`` samples that begin with this one."""
        part = count // self.fabric.world_size
        first += self.fabric.global_rank * part
        return range(first, first + part)

    def _rows(self, places: range) -> Tensor:
        """Return which images are at these places of the endless sequence of passes over them."""
        rows = []
        for place in places:
            epoch, index = divmod(place, len(self.learned))
            if self._order is None or self._order[0] != epoch:
                order = permutation(len(self.learned), self.options.seed, epoch + 2, torch.device("cpu"))
                self._order = epoch, order
            rows.append(self._order[1][index])
        return self.learned[torch.stack(rows)]

    def _real(self, rows: Tensor) -> Tensor:
        """Return real images as floats on the run's device."""
        assert self.images is not None
        images = self.images.batch(rows.tolist(), self.fabric.device)
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()

    # -- evaluation and result -------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Evaluate the moving average, and keep it if it is the best one so far."""
        options, log = self.options, self.log
        inverter: Any = self.average.module
        inverter.eval()
        latent_error = pair_error = pair_square = 0.0
        for begin in range(0, options.evaluation, CHUNK):
            indices = range(begin, min(options.evaluation, begin + CHUNK))
            latents, labels = self.draw(indices, EVALUATE)
            images = self.generator(latents, labels)
            predicted = inverter(images)
            share = len(indices) / options.evaluation
            latent_error += share * self.inversion.latent_error(predicted, latents).item()
            pair_error += share * F.mse_loss(self.generator(predicted, labels), images).item()
            pair_square += share * _mean_square(predicted)
        real_error, real_square = math.nan, pair_square
        if self.images is not None:
            real_error = real_square = 0.0
            for rows in self.held_out.split(CHUNK):
                images = self._real(rows)
                predicted = inverter(images)
                share = len(rows) / len(self.held_out)
                real_error += share * F.mse_loss(self.generator(predicted), images).item()
                real_square += share * _mean_square(predicted)
        evaluation = Evaluation(
            step=log.step,
            images=log.step * options.batch,
            loss=sum(log.losses) / max(1, len(log.losses)),
            latent_error=latent_error,
            pair_error=pair_error,
            real_error=real_error,
            mean_square=real_square,
            seconds=time.perf_counter() - self.begin,
        )
        # Before real images have joined, the run cannot stall: its last part has not begun.
        counts = self.images is None or self._mixed(log.step)
        if log.add(evaluation, options, counts):
            self.best = {name: value.detach().clone() for name, value in inverter.state_dict().items()}

    def finish(self) -> Inverter:
        """Return the best inverter with its run, after its files are written."""
        history = self._history()
        best = history[max(self.log.best, 0)]
        inverter = copy.deepcopy(self.inverter)
        if self.best:
            inverter.load_state_dict(self.best)
        names = [level.name for level in self.generator.levels]
        weights = dict(zip(names, self.scales.levels, strict=True))
        inverter.provenance = {
            **self.settings,
            "status": self.log.status,
            "best": best._asdict(),
            "weights": weights,
            "processes": self.fabric.world_size,
            **environment(self.fabric.device),
        }
        inverter.run = InverterRun(self.log.status, best, history, weights, self.checkpoint.path)
        inverter.eval().requires_grad_(False)
        if self.folder is not None and self.fabric.global_rank == 0:
            inverter.save(self.folder / "inverter.safetensors")
        return inverter


# -- checks and files ----------------------------------------------------------------------------------------


def _check_shares(options: InverterOptions, real: bool, processes: int) -> None:
    """Raise a ValueError if a batch cannot be shared evenly among the processes."""
    pairs = options.pairs or 0
    for name, count in (("batch", options.batch), ("pairs", pairs if real else 0)):
        if count % processes:
            raise ValueError(
                f"Invalid {name}={count} for {processes} processes: it counts over all of them, and must be "
                "a multiple of them."
            )


def _mean_square(latents: Sequence[Tensor]) -> float:
    """Return the mean of the squares of all scalars."""
    return torch.cat([z.flatten(1) for z in latents], dim=1).square().mean().item()


def _write_history(history: Sequence[Evaluation], path: Path) -> None:
    """Write the evaluations as a CSV file."""
    with whole(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Evaluation._fields)
        writer.writerows(history)
