"""The sweep: every level's loss as a curve of the perturbation's magnitude, from critics trained once for all of them.

Where each level's walker is trained against a critic of its own, here critics learn from random (level, magnitude) pairs, and are told
which. Their loss is then read off on a grid of magnitudes, on fresh pairs that all magnitudes share, and each level's curve is
solved for the target. The far end of every curve is a fresh draw of the level.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlviews import sampling
from mlviews.anchors import Sampler
from mlviews.checks import integer, output_folder, positive
from mlviews.generators.base import MLVGM
from mlviews.impact.distances import EVALUATE, TRAIN
from mlviews.impact.figures import Curve
from mlviews.latents import with_levels
from mlviews.mi.critics import ImageTrunk
from mlviews.mi.infonce import info_nce, reachable
from mlviews.perturb import Normal
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import fingerprint
from mlviews.runs.processes import mean, rows, share
from mlviews.runs.progress import bar
from mlviews.sampling import TruncatedNormal

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LOW, HIGH, POINTS = 0.05, 8.0, 12  # the grid of standard deviations: its ends, and how many
FRESH = 0.1  # share of the training's perturbations that are fresh draws
AVERAGE = 0.98  # of the critics' moving averages, per step
RESAMPLINGS = 1000  # bootstrap draws of evaluation batches
QUANTILE = 1.96


class Condition(NamedTuple):
    """What a critic is told: which level was moved, and how far; None for a fresh draw."""

    level: int
    std: float | None


class Critic(nn.Module):
    """Embeds images for a condition: a trunk, and a head whose hidden layer is scaled and shifted by the condition.

    Args:
        image_shape: ``(C, H, W)``.
        levels: how many there are.
        width: of the trunk.
        dim: of the embeddings.
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: int, width: int | None = None, dim: int = 128) -> None:
        super().__init__()
        self.trunk = ImageTrunk(image_shape, width)
        self.hidden = nn.Linear(self.trunk.features, 2 * dim)
        self.style = nn.Linear(4 * levels, 4 * dim)
        nn.init.zeros_(self.style.weight)
        nn.init.zeros_(self.style.bias)
        self.out = nn.Linear(2 * dim, dim)

    def head(self, features: Tensor, told: Tensor) -> Tensor:
        """Unit embeddings ``[B, dim]`` of features ``[B, F]``, for one row of :func:`_told`."""
        scale, shift = self.style(told).chunk(2)
        return F.normalize(self.out(torch.relu(self.hidden(features) * (1 + scale) + shift)), dim=1)


class Critics(nn.Module):
    """Several critics that learn from the same pairs: together they tell more than one, and their differences how much to trust them."""

    def __init__(self, count: int, image_shape: tuple[int, int, int], levels: int, width: int | None) -> None:
        super().__init__()
        self.levels = levels
        self.members = nn.ModuleList(Critic(image_shape, levels, width) for _ in range(count))

    def forward(self, anchors: Tensor, positives: Sequence[Tensor], conditions: Sequence[Condition], temperature: float) -> Tensor:
        """InfoNCE in nats ``[conditions, members + 1]``, over all processes; the last column is that of the members' mean similarity."""
        members: list[Critic] = list(self.members)  # type: ignore[arg-type]
        features = [member.trunk(torch.cat([anchors, *positives])).split(len(anchors)) for member in members]
        losses = []
        for index, told in enumerate(_told(conditions, self.levels, anchors)):
            sides = [[member.head(own[place], told) for member, own in zip(members, features, strict=True)] for place in (0, index + 1)]
            joint = [torch.cat(side, dim=1) for side in sides]  # its cosine is the mean of theirs
            losses.append(
                torch.stack(
                    [info_nce(a, b, temperature) for a, b in zip(*sides, strict=True)] + [info_nce(joint[0], joint[1], temperature)]
                )
            )
        return torch.stack(losses)


class Swept(NamedTuple):
    """What a level's curve says."""

    curve: Curve
    std: float | None  # that meets the target; None where none up to HIGH does
    interval: tuple[float, float] | None  # 95 %, of the evaluation pairs and of the critics; its ends are within the grid's


class Sweep(NamedTuple):
    """All levels' curves, and how long the training and the evaluation took together."""

    levels: list[Swept]
    steps: int
    seconds: float


def sweep(
    generator: MLVGM,
    target_loss: float,
    fabric: Fabric,
    out: str | Path | None = None,
    *,
    pairs: int = 64,
    temperature: float = 0.1,
    steps: int = 500,
    train_pairs: int = 32,
    critics: int = 2,
    lr: float = 1e-3,
    truncation: float | None = 2.0,
    evaluations: int = 8,
    width: int | None = None,
    anchor: TruncatedNormal | None = None,
    seed: int = 0,
    resume: bool = True,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Sweep:
    """Every level's loss as a curve of the standard deviation of its noise, solved for the target.

    Args:
        generator: an MLVGM on Fabric's device.
        target_loss: plain InfoNCE in nats.
        fabric: launched.
        out: folder for the checkpoint; None keeps nothing on disk.
        pairs: K of the batches that the curves are measured on, over all processes.
        temperature: of InfoNCE.
        steps: of the critics; each sees one perturbation of every level.
        train_pairs: K of the batches that the critics learn from: small ones, more often, teach more in the same time.
        critics: trained side by side, at least 2: their differences are a part of the intervals.
        lr: Adam's, at the peak of a cosine schedule.
        truncation: of the noise, in standard deviations; None for the full normal.
        evaluations: batches of fresh pairs on which the curves are measured, at least 2.
        width: of the critics' first stages; None: by the image's size.
        anchor: law of the anchors; None: N(0, 1) truncated as the generator prefers.
        seed: of the samples, the magnitudes and the critics' first weights.
        resume: go on from ``out``'s checkpoint.
        checkpoint_every: steps between checkpoints.
        progress: show a bar.

    Raises:
        ValueError: for a value out of range, or a checkpoint of a run with other settings.
    """
    pairs, train_pairs = integer("pairs", pairs, 2), integer("train_pairs", train_pairs, 2)
    target, temperature, lr = reachable(target_loss, pairs), positive("temperature", temperature), positive("lr", lr)
    steps, critics = integer("steps", steps, 10), integer("critics", critics, 2)
    evaluations, checkpoint_every = integer("evaluations", evaluations, 2), integer("checkpoint_every", checkpoint_every, 1)
    for count in (pairs, train_pairs):
        share(count, fabric)
    pair = _Pairs(generator, Sampler(generator, anchor, seed), Normal(1.0, truncation))
    settings = {
        "generator": generator.name, "fingerprint": fingerprint(generator), "train_pairs": train_pairs, "temperature": temperature,
        "steps": steps, "critics": critics, "lr": lr, "truncation": truncation, "width": width,
        "anchor": dataclasses.asdict(pair.draw.law), "seed": seed,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        model = Critics(critics, generator.image_shape, len(generator.levels), width)
    optimiser = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    # A short warm-up, then a cosine to a twentieth.
    rate = lambda step: min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    wrapped, _ = fabric.setup(model, optimiser)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    parts: dict[str, Any] = {"model": model, "average": average, "optimiser": optimiser, "schedule": schedule}
    where = output_folder(out)
    checkpoint = Checkpoint(None if where is None else where / "sweep.pt", settings, resume)
    state = checkpoint.load() or {"step": 0, "seconds": 0.0, "parts": {}}
    for name, saved in state["parts"].items():
        parts[name].load_state_dict(saved)
    begin = time.perf_counter() - state["seconds"]

    levels = range(len(generator.levels))
    grid = np.geomspace(LOW, HIGH, POINTS).tolist()
    points = [[Condition(level, std) for std in (*grid, None)] for level in levels]
    shown = progress and fabric.global_rank == 0
    note = ""
    with bar("sweep: critics", steps, state["step"], shown) as advance:
        for step in range(state["step"], steps):
            conditions = [_random_condition(level, seed, step) for level in levels]
            losses = wrapped(*pair(rows(step, train_pairs, fabric), TRAIN, conditions), conditions, temperature)[:, :-1]
            optimiser.zero_grad()
            fabric.backward(losses.mean(0).sum())
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
            kept = (step + 1) % checkpoint_every == 0 or step + 1 == steps
            if kept:  # not at every step, which would wait for the device
                note = f": loss {losses.mean().item():.2f} nats"
            advance(step + 1, note)
            if kept and fabric.global_rank == 0:
                saved = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save({"step": step + 1, "seconds": time.perf_counter() - begin, "parts": saved})

    measured = np.empty((len(points), len(grid) + 1, critics + 1, evaluations))
    with torch.no_grad(), bar("sweep: curves", evaluations * len(points), 0, shown) as advance:
        for batch in range(evaluations):
            for level, conditions in enumerate(points):
                anchors, positives = pair(rows(batch, pairs, fabric), EVALUATE, conditions)
                losses = mean(fabric, average.module(anchors, positives, conditions, temperature))
                measured[level, :, :, batch] = losses.cpu().numpy()
                advance(batch * len(points) + level + 1, "")
    return Sweep(_solved(measured, grid, target, seed), steps, time.perf_counter() - begin)


class _Pairs:
    """Images of anchors, and of a positive for each condition; blocks before the moved level run once per anchor."""

    def __init__(self, generator: MLVGM, draw: Sampler, law: TruncatedNormal) -> None:
        self.generator, self.draw, self.law = generator, draw, law

    @torch.no_grad()
    def __call__(self, indices: range, epoch: int, conditions: Sequence[Condition]) -> tuple[Tensor, list[Tensor]]:
        generator = self.generator
        latents, labels = self.draw(indices, epoch)
        states = generator.states(latents, labels)
        positives = []
        for level, std in conditions:
            # The same noise at every magnitude: curves are smooth, and differences between magnitudes are theirs.
            law, view = (self.draw.law, 2) if std is None else (self.law, 1)
            (noise,) = self.draw.noise(indices, law, epoch, (level,), view)
            moved = noise if std is None else latents[level] + std * noise
            positives.append(generator.decode(with_levels(latents, [level], [moved]), labels, state=states[level], start=level))
        return generator.decode(latents, labels, state=states[-1], start=len(generator.levels)), positives


def _told(conditions: Sequence[Condition], levels: int, like: Tensor) -> Tensor:
    """What critics are told, ``[conditions, 4 * levels]``, in one copy to the device.

    For the level that is moved: 1, the place on the log grid in [-1, 1], its square, and whether it is a fresh draw.
    """
    rows = []
    for level, std in conditions:
        place = 0.0 if std is None else 2 * math.log(std / LOW) / math.log(HIGH / LOW) - 1
        rows.append([0.0] * 4 * level + [1.0, place, place**2, float(std is None)] + [0.0] * 4 * (levels - level - 1))
    return like.new_tensor(rows)


def _random_condition(level: int, seed: int, step: int) -> Condition:
    """A magnitude, log-uniform over the grid, or a fresh draw: a function of the seed and the step, so that runs can be resumed."""
    field = sampling.Field(2, sampling.NOISE, sampling.MAX_VIEWS - 1, level, sampling.Uniform())
    draw = sampling.Draw({"condition": field}, torch.device("cpu"))
    ((kind, place),) = draw(torch.tensor([step]), seed, TRAIN)["condition"].tolist()
    return Condition(level, None if kind < FRESH else LOW * (HIGH / LOW) ** place)


def _solved(measured: np.ndarray[Any, Any], grid: list[float], target: float, seed: int) -> list[Swept]:
    """Curves and solutions from losses ``[levels, grid + 1, members + 1, batches]``; intervals on the scale of log magnitudes.

    An interval has two parts. How far the solution moves with the evaluation pairs is a bootstrap over batches. How far it moves with the
    critics is seen in the members' own solutions, whose variance is pooled over levels, as two members alone say little.
    """
    logs = np.log(grid)
    joint = measured[:, :, -1]  # [levels, grid + 1, batches]
    choose = np.random.default_rng(seed).integers(joint.shape[-1], size=(RESAMPLINGS, joint.shape[-1]))
    members = measured[:, :-1, :-1].mean(-1)  # [levels, grid, members]
    spread = [
        np.var([_solve(logs, _monotone(curve), target) for curve in level.T], ddof=1) / level.shape[1]
        for level in members
        if level.min() < target < level.max()
    ]
    found = []
    for level in joint:
        means = level.mean(-1)
        monotone = _monotone(means[:-1])
        std, interval = None, None
        if monotone[-1] >= target:
            drawn = [_solve(logs, _monotone(level[:-1, batches].mean(-1)), target) for batches in choose]
            log = _solve(logs, monotone, target)
            error = QUANTILE * math.sqrt(np.var(drawn) + (np.mean(spread) if spread else 0.0))
            std = math.exp(log)
            # Below the grid all that is known is that less is enough.
            low = 0.0 if monotone[0] >= target else math.exp(max(log - error, logs[0]))
            interval = (low, math.exp(min(log + error, logs[-1])))
        errors = (level.std(-1, ddof=1) / math.sqrt(level.shape[-1])).tolist()
        curve = Curve(grid, means[:-1].tolist(), errors[:-1], monotone.tolist(), float(means[-1]), errors[-1])
        found.append(Swept(curve, std, interval))
    return found


def _solve(logs: np.ndarray[Any, Any], monotone: np.ndarray[Any, Any], target: float) -> float:
    """Where the curve through these points, straight between them, is at the target; an end of the grid where it never is."""
    return float(np.interp(target, monotone, logs))


def _monotone(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The non-decreasing sequence nearest to the values in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), count + size
        blocks.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in blocks])
