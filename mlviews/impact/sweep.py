"""The sweep: every level's loss as a curve of the perturbation's magnitude, from critics trained once.

A walker is trained against a critic of its own. Here critics learn from random pairs of a level and a
magnitude, which they are told. Their loss is then read off on a grid of magnitudes, on fresh pairs that all
magnitudes share, and each level's curve is solved for the target. The far end of every curve is a fresh draw
of the level.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlviews import checks, sampling
from mlviews.anchors import Sampler
from mlviews.checks import choice, integer, output_folder, positive
from mlviews.generators.base import MLVGM
from mlviews.identity import generator_identity
from mlviews.impact.figures import Curve
from mlviews.impact.streams import EVALUATE, TRAIN
from mlviews.latents import with_levels
from mlviews.mi.critics import ImageTrunk
from mlviews.mi.infonce import info_nce, reachable
from mlviews.perturb import Mix, Normal, Resample
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.modes import plain
from mlviews.runs.processes import mean, rows, share
from mlviews.runs.progress import bar
from mlviews.sampling import TruncatedNormal, check_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Array = np.ndarray[Any, Any]

LOW, HIGH, POINTS = 0.05, 8.0, 12  # the grid of standard deviations: its ends, and how many
FRESH = 0.1  # share of the training's perturbations that are fresh draws
AVERAGE = 0.98  # decay of the critics' moving averages, per step
WARMUP = 20  # steps in which the learning rate rises
RESAMPLINGS = 1000  # bootstrap draws of evaluation batches
QUANTILE = 1.96  # standard errors on either side of a 95 % interval


@dataclass
class SweepOptions:
    """How a sweep is trained and measured. Values are checked when it is made."""

    pairs: int = 64  # K of the batches that the curves are measured on, over all processes; at least 2
    temperature: float = 0.1  # of InfoNCE
    steps: int = 500  # of the critics, at least 10; each sees one perturbation of every level
    train_pairs: int = 32  # K of the batches that the critics learn from, over all processes; at least 2
    critics: int = 2  # trained side by side, at least 2: their differences are a part of the intervals
    lr: float = 1e-3  # Adam's rate at the peak of a cosine schedule
    truncation: float | None = 2.0  # of the noise, in standard deviations; None for the full normal
    perturber: str = "normal"  # or "mix": the noise is of the anchors' law, and the variance is kept
    evaluations: int = 8  # batches of fresh pairs on which the curves are measured, at least 2
    width: int | None = None  # channels of the critics' first stages; None: by the image's size
    anchor: TruncatedNormal | None = None  # their law; None: N(0, 1), truncated as the generator prefers
    seed: int = 0  # of the samples, the magnitudes and the critics' first weights
    resume: bool = True  # go on from the checkpoint
    checkpoint_every: int = 50  # steps between checkpoints
    progress: bool = True  # show a bar

    def __post_init__(self) -> None:
        self.pairs = integer("pairs", self.pairs, 2)
        self.temperature = positive("temperature", self.temperature)
        self.steps = integer("steps", self.steps, 10)
        self.train_pairs = integer("train_pairs", self.train_pairs, 2)
        self.critics = integer("critics", self.critics, 2)
        self.lr = positive("lr", self.lr)
        self.evaluations = integer("evaluations", self.evaluations, 2)
        choice("perturber", self.perturber, ("normal", "mix"), problem="Invalid")
        self.checkpoint_every = integer("checkpoint_every", self.checkpoint_every, 1)
        self.seed = check_seed(self.seed)

    def shift(self, std: float) -> Normal | Mix:
        """Return the perturber with noise of this standard deviation; of "mix", in units of the anchors'.

        ``(z + std w) / sqrt(1 + std^2)`` is the mixture with the rate ``std / sqrt(1 + std^2)``.
        """
        if self.perturber == "mix":
            return Mix(std / math.hypot(1.0, std))
        return Normal(std, self.truncation)


class Condition(NamedTuple):
    """What a critic is told: which level was moved, and how far; None for a fresh draw."""

    level: int
    std: float | None


class Swept(NamedTuple):
    """What a level's curve says."""

    curve: Curve
    std: float | None  # the one that meets the target; None if none up to HIGH does
    # 95 %, of evaluation pairs and critics; its ends are within the grid's.
    interval: tuple[float, float] | None


class Sweep(NamedTuple):
    """All levels' curves, and how long the training and the evaluation took together."""

    levels: list[Swept]
    steps: int
    seconds: float


# -- critics --------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Embeds images for a condition: a trunk, and a head whose hidden layer the condition scales and shifts.

    Args:
        image_shape: ``(C, H, W)``.
        levels: how many there are.
        width: channels of the trunk's first stage; None: by the image's size.
        dim: the size of the embeddings.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], levels: int, width: int | None = None, dim: int = 128
    ) -> None:
        super().__init__()
        self.trunk = ImageTrunk(image_shape, width)
        self.hidden = nn.Linear(self.trunk.features, 2 * dim)
        self.style = nn.Linear(4 * levels, 4 * dim)
        nn.init.zeros_(self.style.weight)
        nn.init.zeros_(self.style.bias)
        self.out = nn.Linear(2 * dim, dim)

    def head(self, features: Tensor, told: Tensor) -> Tensor:
        """Return unit embeddings ``[B, dim]``.

        Args:
            features: the trunk's, ``[B, F]``.
            told: a row of :func:`_told`, ``[4 * levels]``.
        """
        scale, shift = self.style(told).chunk(2)  # [2 * dim]
        hidden = self.hidden(features) * (1 + scale) + shift  # [B, 2 * dim]
        return F.normalize(self.out(torch.relu(hidden)), dim=1)


class Critics(nn.Module):
    """Several critics that learn from the same pairs.

    Together they tell more than a single one, and their differences tell how much to trust them.

    Args:
        count: how many there are.
        image_shape: ``(C, H, W)``.
        levels: how many the generator has.
        width: channels of the trunks' first stages; None: by the image's size.
    """

    def __init__(self, count: int, image_shape: tuple[int, int, int], levels: int, width: int | None) -> None:
        super().__init__()
        self.levels = levels
        self.members = nn.ModuleList(Critic(image_shape, levels, width) for _ in range(count))

    def forward(
        self,
        anchors: Tensor,
        positives: Sequence[Tensor],
        conditions: Sequence[Condition],
        temperature: float,
    ) -> Tensor:
        """Return InfoNCE in nats ``[conditions, members + 1]``, over all processes.

        The last column is that of the members' mean similarity.

        Args:
            anchors: images ``[B, C, H, W]``.
            positives: such a tensor for each condition.
            conditions: what the critics are told.
            temperature: similarities are divided by it.
        """
        members: list[Critic] = list(self.members)  # type: ignore[arg-type]
        images = torch.cat([anchors, *positives])
        features = [member.trunk(images).split(len(anchors)) for member in members]
        losses = []
        for index, told in enumerate(_told(conditions, self.levels, anchors)):
            anchor_embeddings, positive_embeddings = (
                [member.head(parts[place], told) for member, parts in zip(members, features, strict=True)]
                for place in (0, index + 1)
            )
            # The cosine of joined embeddings is the mean of the members' cosines.
            anchor_embeddings.append(torch.cat(anchor_embeddings, dim=1))
            positive_embeddings.append(torch.cat(positive_embeddings, dim=1))
            sides = zip(anchor_embeddings, positive_embeddings, strict=True)
            losses.append(torch.stack([info_nce(a, b, temperature) for a, b in sides]))
        return torch.stack(losses)


def _told(conditions: Sequence[Condition], levels: int, like: Tensor) -> Tensor:
    """Return what critics are told, ``[conditions, 4 * levels]``, in one copy to the device.

    For the level that is moved: 1, the place on the log grid in [-1, 1], its square, and whether it is a
    fresh draw.
    """
    rows_told = []
    for level, std in conditions:
        place = 0.0 if std is None else 2 * math.log(std / LOW) / math.log(HIGH / LOW) - 1
        row = [0.0] * 4 * levels
        row[4 * level : 4 * level + 4] = [1.0, place, place**2, float(std is None)]
        rows_told.append(row)
    return like.new_tensor(rows_told)


class _Pairs:
    """Images of anchors, and of a positive for each condition.

    Blocks before the moved level run once per anchor.

    Args:
        generator: an MLVGM.
        draw: what draws the anchors.
        shift: returns the perturber with noise of a standard deviation.
    """

    def __init__(self, generator: MLVGM, draw: Sampler, shift: Callable[[float], Normal | Mix]) -> None:
        self.generator, self.draw, self.shift = generator, draw, shift

    @torch.no_grad()
    def __call__(
        self, indices: range, epoch: int, conditions: Sequence[Condition]
    ) -> tuple[Tensor, list[Tensor]]:
        generator = self.generator
        latents, labels = self.draw(indices, epoch)
        states = generator.states(latents, labels)
        positives = []
        for level, std in conditions:
            moved = with_levels(latents, [level], [self._moved(latents[level], indices, epoch, level, std)])
            positives.append(generator.decode(moved, labels, state=states[level], start=level))
        anchors = generator.decode(latents, labels, state=states[-1], start=len(generator.levels))
        return anchors, positives

    def _moved(self, z: Tensor, indices: range, epoch: int, level: int, std: float | None) -> Tensor:
        """Return the level's latents with noise, or drawn afresh.

        The noise is the same at every magnitude: curves are smooth, and differences between magnitudes are
        theirs.
        """
        perturber = Resample() if std is None else self.shift(std)
        law = perturber.law(self.draw.law)
        assert law is not None
        noise = self.draw.noise(indices, law, epoch, (level,), 2 if std is None else 1)
        (moved,) = perturber([z], noise)
        return moved


def _random_condition(level: int, seed: int, step: int) -> Condition:
    """Return a magnitude, log-uniform over the grid, or a fresh draw.

    It is a function of the seed and the step, so that runs can be resumed.
    """
    field = sampling.Field(2, sampling.NOISE, sampling.MAX_VIEWS - 1, level, sampling.Uniform())
    draw = sampling.Draw({"condition": field}, torch.device("cpu"))
    ((kind, place),) = draw(torch.tensor([step]), seed, TRAIN)["condition"].tolist()
    return Condition(level, None if kind < FRESH else LOW * (HIGH / LOW) ** place)


# -- training and measuring -----------------------------------------------------------------------------


def sweep(
    generator: MLVGM, target_loss: float, fabric: Fabric, out: str | Path | None = None, **options: Any
) -> Sweep:
    """Measure every level's loss as a curve of its noise's standard deviation, and solve it for the target.

    Args:
        generator: an MLVGM on Fabric's device.
        target_loss: plain InfoNCE in nats.
        fabric: launched.
        out: folder for the checkpoint; None keeps nothing on disk.
        **options: fields of :class:`SweepOptions`, by keyword:

            - pairs (64): K of the batches that the curves are measured on, over all processes; at least 2.
            - temperature (0.1): of InfoNCE.
            - steps (500): of the critics, at least 10; each sees one perturbation of every level.
            - train_pairs (32): K of the batches that the critics learn from: small ones, more often, teach
              more in the same time.
            - critics (2): trained side by side, at least 2: their differences are a part of the intervals.
            - lr (1e-3): Adam's rate at the peak of a cosine schedule.
            - truncation (2.0): of the noise, in standard deviations; None for the full normal.
            - perturber (normal): or "mix", whose noise is of the anchors' law and which keeps the variance
              (:class:`mlviews.perturb.Mix`). Its standard deviations are in units of the anchors'.
            - evaluations (8): batches of fresh pairs on which the curves are measured, at least 2.
            - width (None): channels of the critics' first stages; None: by the image's size.
            - anchor (None): law of the anchors; None: N(0, 1) truncated as the generator prefers.
            - seed (0): of the samples, the magnitudes and the critics' first weights.
            - resume (True): go on from ``out``'s checkpoint.
            - checkpoint_every (50): steps between checkpoints.
            - progress (True): show a bar.

    Raises:
        ValueError: for an unknown option, a value out of range, or a checkpoint of a run with other settings.
    """
    checks.options("sweep", options, [item.name for item in dataclasses.fields(SweepOptions)])
    chosen = SweepOptions(**options)
    target = reachable(target_loss, chosen.pairs)
    with plain(fabric.device):
        training = _Training(generator, output_folder(out), chosen, fabric)
        training.train()
        losses = training.measure()
    curves = _solved(losses, training.grid, target, chosen.seed)
    return Sweep(curves, chosen.steps, time.perf_counter() - training.begin)


class _Training:
    """The critics' training, and the losses that they then have on fresh pairs.

    Args:
        generator: an MLVGM on Fabric's device.
        folder: where the checkpoint goes; None keeps nothing on disk.
        options: how to train and measure.
        fabric: launched.
    """

    def __init__(self, generator: MLVGM, folder: Path | None, options: SweepOptions, fabric: Fabric) -> None:
        for count in (options.pairs, options.train_pairs):
            share(count, fabric)  # a ValueError now, if they cannot be shared
        self.generator, self.options, self.fabric = generator, options, fabric
        draw = Sampler(generator, options.anchor, options.seed)
        self.pairs = _Pairs(generator, draw, options.shift)
        self.grid: list[float] = np.geomspace(LOW, HIGH, POINTS).tolist()
        self._make_critics()
        path = None if folder is None else folder / "sweep.pt"
        self.checkpoint = Checkpoint(path, self._settings(), options.resume)
        self._restore()

    def _settings(self) -> dict[str, Any]:
        """Return what the training depends on: a checkpoint with other values belongs to another run."""
        options = self.options
        return {
            "generator": generator_identity(self.generator),
            "train_pairs": options.train_pairs,
            "temperature": options.temperature,
            "steps": options.steps,
            "critics": options.critics,
            "lr": options.lr,
            "truncation": options.truncation,
            "width": options.width,
            "anchor": dataclasses.asdict(self.pairs.draw.law),
            "seed": options.seed,
            # Checkpoints of version 0.1 know of no other than normal.
            **({} if options.perturber == "normal" else {"perturber": options.perturber}),
        }

    def _make_critics(self) -> None:
        """Make the critics, their optimizer and schedule, and their moving averages."""
        options, generator = self.options, self.generator
        with plain(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed % (1 << 63))
            self.model = Critics(options.critics, generator.image_shape, len(generator.levels), options.width)
        self.optimizer = torch.optim.Adam(self.model.parameters(), options.lr, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate(step, options.steps)
        )
        self.wrapped, _ = self.fabric.setup(self.model, self.optimizer)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        self.first_step, seconds = 0, 0.0
        state = self.checkpoint.load()
        if state is not None:
            with self.checkpoint.reading():
                self.first_step = integer("step", state["step"], 1, self.options.steps)
                seconds = float(state["seconds"])
                for name, part in self._parts().items():
                    part.load_state_dict(state["parts"][name])
        self.begin = time.perf_counter() - seconds

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimiser": self.optimizer,  # its spelling in the checkpoints of version 0.1
            "schedule": self.schedule,
        }

    def _save(self, steps: int) -> None:
        """Replace the checkpoint by one of so many steps."""
        if self.fabric.global_rank == 0:
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            seconds = time.perf_counter() - self.begin
            self.checkpoint.save({"step": steps, "seconds": seconds, "parts": parts})

    def _bar(self, description: str, total: int, first: int) -> Any:
        show = self.options.progress and self.fabric.global_rank == 0
        return bar(description, total, first, show)

    def train(self) -> None:
        """Train the critics on a random magnitude of every level in each step."""
        options = self.options
        note = ""
        with self._bar("sweep: critics", options.steps, self.first_step) as advance:
            for step in range(self.first_step, options.steps):
                losses = self._step(step)
                save = (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps
                if save:  # not at every step, which would wait for the device
                    note = f": loss {losses.mean().item():.2f} nats"
                advance(step + 1, note)
                if save:
                    self._save(step + 1)

    def _step(self, step: int) -> Tensor:
        """Train the critics on a batch; return the members' losses ``[levels, members]``."""
        options = self.options
        conditions = [
            _random_condition(level, options.seed, step) for level in range(len(self.generator.levels))
        ]
        indices = rows(step, options.train_pairs, self.fabric)
        images = self.pairs(indices, TRAIN, conditions)
        losses: Tensor = self.wrapped(*images, conditions, options.temperature)[:, :-1]
        self.optimizer.zero_grad()
        self.fabric.backward(losses.mean(0).sum())
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return losses

    @torch.no_grad()
    def measure(self) -> Array:
        """Return the losses of the averaged critics on fresh pairs.

        Returns:
            Plain InfoNCE in nats, float64 ``[levels, grid + 1, members + 1, batches]``: the last point of the
            grid is a fresh draw, and the last member the union of all.
        """
        options, levels = self.options, len(self.generator.levels)
        points = [*self.grid, None]
        losses = np.empty((levels, len(points), options.critics + 1, options.evaluations))
        with self._bar("sweep: curves", options.evaluations * levels, 0) as advance:
            for batch in range(options.evaluations):
                indices = rows(batch, options.pairs, self.fabric)
                for level in range(levels):
                    conditions = [Condition(level, std) for std in points]
                    images = self.pairs(indices, EVALUATE, conditions)
                    values = self.average.module(*images, conditions, options.temperature)
                    losses[level, :, :, batch] = mean(self.fabric, values).cpu().numpy()
                    advance(batch * levels + level + 1, "")
        return losses


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a short warm-up, then a cosine to a twentieth."""
    return min(1.0, (step + 1) / WARMUP) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


# -- curves and their solutions -------------------------------------------------------------------------


def _solved(measured: Array, grid: list[float], target: float, seed: int) -> list[Swept]:
    """Return curves and solutions, with intervals on the scale of log magnitudes.

    An interval has two parts. How far the solution moves with the evaluation pairs is a bootstrap over
    batches. How far it moves with the critics is seen in the members' own solutions, whose variance is pooled
    over levels, as two members alone say little.

    Args:
        measured: losses ``[levels, grid + 1, members + 1, batches]``, as :meth:`_Training.measure` returns
            them.
        grid: the standard deviations.
        target: the loss to solve for.
        seed: the seed of the bootstrap.
    """
    logs = np.log(grid)
    joint = measured[:, :, -1]  # [levels, grid + 1, batches]
    members = measured[:, :-1, :-1].mean(-1)  # [levels, grid, members]
    batches = joint.shape[-1]
    resamplings = np.random.default_rng(seed).integers(batches, size=(RESAMPLINGS, batches))
    critics_variance = _critics_variance(members, logs, target)
    return [_solved_level(losses, grid, target, resamplings, critics_variance) for losses in joint]


def _critics_variance(members: Array, logs: Array, target: float) -> float:
    """Return the variance of the solution with the critics: the mean over the levels that have one.

    Args:
        members: losses ``[levels, grid, members]``.
        logs: the logarithms of the grid.
        target: the loss to solve for.
    """
    variances = []
    for losses in members:
        if losses.min() < target < losses.max():
            solutions = [_solve(logs, _monotone(curve), target) for curve in losses.T]
            variances.append(np.var(solutions, ddof=1) / len(solutions))
    return float(np.mean(variances)) if variances else 0.0


def _solved_level(
    losses: Array, grid: list[float], target: float, resamplings: Array, critics_variance: float
) -> Swept:
    """Return a level's curve and solution.

    Args:
        losses: of the critics' union, ``[grid + 1, batches]``.
        grid: the standard deviations.
        target: the loss to solve for.
        resamplings: batches of each bootstrap draw, ``[draws, batches]``.
        critics_variance: the variance of the solution with the critics, in log magnitudes.
    """
    logs = np.log(grid)
    means = losses.mean(-1)  # [grid + 1]
    monotone = _monotone(means[:-1])
    std, interval = None, None
    if monotone[-1] >= target:
        solution = _solve(logs, monotone, target)
        std = math.exp(solution)
        drawn = [_solve(logs, _monotone(losses[:-1, batches].mean(-1)), target) for batches in resamplings]
        error = QUANTILE * math.sqrt(np.var(drawn) + critics_variance)
        # Below the grid all that is known is that less is enough.
        low = 0.0 if monotone[0] >= target else math.exp(max(solution - error, logs[0]))
        interval = (low, math.exp(min(solution + error, logs[-1])))
    errors = (losses.std(-1, ddof=1) / math.sqrt(losses.shape[-1])).tolist()
    curve = Curve(
        magnitudes=grid,
        losses=means[:-1].tolist(),
        stderrs=errors[:-1],
        monotone=monotone.tolist(),
        resample=float(means[-1]),
        resample_stderr=errors[-1],
    )
    return Swept(curve, std, interval)


def _solve(logs: Array, monotone: Array, target: float) -> float:
    """Return where the curve through these points, straight between them, is at the target.

    It is an end of the grid where it never is.
    """
    return float(np.interp(target, monotone, logs))


def _monotone(values: Array) -> Array:
    """Return the non-decreasing sequence nearest to the values in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # mean and length of each constant stretch
    for value in values:
        mean_value, count = float(value), 1
        while blocks and blocks[-1][0] >= mean_value:
            # A block that is not below the next is pooled with it.
            previous_mean, previous_count = blocks.pop()
            total = previous_mean * previous_count + mean_value * count
            count += previous_count
            mean_value = total / count
        blocks.append((mean_value, count))
    return np.concatenate([np.full(count, mean_value) for mean_value, count in blocks])
