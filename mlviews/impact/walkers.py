"""Training a walker (paper, eq. 5): ``max_phi min_f L(f(g(z)), f(g(T_phi(z))))``, a game between a walker and a critic.

The critic learns alone first, until it tells images apart that the walker has hardly moved. Then the walker climbs, ever more slowly
as the smoothed loss nears its target, and there waits for the critic: the run ends when the loss stays at the target. How far the walker
got is the magnitude of the level; a level whose loss never gets there is under-used.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlviews.anchors import Sampler
from mlviews.checks import integer, is_number, output_folder, positive
from mlviews.generators.base import MLVGM
from mlviews.impact.distances import EVALUATE, TRAIN, measure_distances
from mlviews.impact.figures import Distances, History
from mlviews.latents import with_levels
from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import info_nce, mi_bound, reachable
from mlviews.perturb import Fixed, Walker
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import fingerprint
from mlviews.runs.processes import launch, mean, rows, share
from mlviews.runs.progress import bar
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal

if TYPE_CHECKING:
    from lightning_fabric import Fabric

WINDOW = 25  # steps that the smoothed loss is the mean of
KNOWN = 0.1  # of the target: below it the critic knows unmoved images, and the walker starts
APART = 3.0  # weight of the penalty on shifts that lie in fewer directions than asked for
REACH = 10.0  # of the prior's own distance: farther out a walker says nothing about the prior any more
STALL = 300  # steps without a larger smoothed loss after which a level is given up
EVALUATIONS = 32  # batches of fresh pairs on which the final loss is measured


class TrainedWalker(Walker):
    """A walker, and the run that trained it."""

    levels: tuple[int, ...]  # that it moves
    status: str  # "reached" the target, or "under-used": it never did
    loss: float  # plain InfoNCE in nats at the end, on fresh pairs; of an under-used level the largest smoothed loss
    stderr: float
    distances: Distances
    history: History
    seconds: float
    checkpoint: Path | None  # that the run goes on from; its folder also has walker.safetensors and history.csv


class Game(nn.Module):
    """One step of both players, in one module so that DDP keeps all of it alike: latents -> loss, shared direction, distance."""

    def __init__(
        self, generator: MLVGM, levels: tuple[int, ...], walker: Walker, critic: nn.Module, temperature: float, directions: float
    ) -> None:
        super().__init__()
        self._generator = (generator,)  # not a part: it does not learn
        self.levels, self.walker, self.critic = levels, walker, critic
        self.temperature, self.directions = temperature, directions

    def forward(self, latents: Sequence[Tensor], labels: Tensor | None, gain: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """The InfoNCE loss over all processes, how far the shifts lie in too few directions, and this process's mean distance.

        With a negative gain the walker's gradient of the loss changes its sign: it goes back. None: it has not begun, and positives are
        the anchors themselves.
        """
        (generator,) = self._generator
        first = self.levels[0]
        states = generator.states(latents, labels)
        anchors = generator.decode(latents, labels, state=states[-1], start=len(generator.levels))
        if gain is None:
            embedded = self.critic(anchors)
            still = torch.stack([weight.sum() for weight in self.walker.parameters()]).sum() * 0  # DDP waits for every weight's gradient
            return info_nce(embedded, embedded, self.temperature), still, still.detach()
        own = [latents[level] for level in self.levels]
        moved = self.walker(own)
        shown = [z.detach() + math.copysign(1.0, gain) * (z - z.detach()) for z in moved]
        positives = with_levels(latents, self.levels, shown)
        images = torch.cat([anchors, generator.decode(positives, labels, state=states[first], start=first)])
        embedded, moved_too = self.critic(images).chunk(2)
        loss = info_nce(embedded, moved_too, self.temperature)
        shift = torch.cat([(there - here).flatten(1) for here, there in zip(own, moved, strict=True)], dim=1)
        size = shift.norm(dim=1).mean().detach()
        units = nn.functional.normalize(shift, dim=1)
        count = len(units)
        # The mean squared cosine between the shifts of two anchors; times their length, as its gradient would else outgrow the loss's.
        common = ((units @ units.T).square().sum() - count) / max(1, count * (count - 1))
        crowded = size * torch.relu(common - 1 / self.directions)
        parts = generator.distances(latents, [z.detach() for z in positives], labels)
        return loss, crowded, torch.stack([parts[level] for level in self.levels]).norm(dim=0).mean()


@torch.inference_mode(False)  # whatever the caller's modes are
@torch.enable_grad()
def train_walker(
    generator: MLVGM,
    levels: Sequence[int],
    target_loss: float = 0.7,
    out: str | Path | None = None,
    *,
    pairs: int = 64,
    temperature: float = 0.1,
    steps: int = 1000,
    warmup: int = 300,
    lr_walker: float = 1e-3,
    lr_critic: float = 1e-3,
    tolerance: float = 0.1,
    patience: int = 100,
    directions: float = 1.0,
    keep_norm: bool = False,
    width: int | None = None,
    anchor: TruncatedNormal | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    devices: int = 1,
    resume: bool = True,
    checkpoint_every: int = 50,
    monte_carlo: int = 100_000,
    progress: bool = True,
    fabric: Fabric | None = None,
) -> TrainedWalker:
    """Train a walker for one level, or one for several together, until InfoNCE stays at the target (paper, eq. 5).

    Args:
        generator: an MLVGM; its weights do not change.
        levels: indices of the levels to move, one after another.
        target_loss: plain InfoNCE in nats; 0.7 is what the paper's code reports as 1.
        out: folder for ``checkpoint.pt``, ``walker.safetensors`` and ``history.csv``; None keeps nothing on disk.
        pairs: K of a batch, over all processes.
        temperature: of InfoNCE.
        steps: of the walker, at most.
        warmup: steps of the critic alone, at most; it ends once the smoothed loss is below a tenth of the target.
        lr_walker: Adam's, for a walker 16 wide; wider ones take ``sqrt(16 / width)`` of it, as each of Adam's steps changes
            every weight by about the rate, so that an output of many weights moves more.
        lr_critic: Adam's.
        tolerance: share of the target within which the smoothed loss counts as there.
        patience: steps at the target in all, in which the critic learns to follow the walker: with few, a surprised critic is enough.
        directions: that the anchors' shifts spread over, at least: a penalty sets in where the mean squared cosine between two of them is
            above ``1 / directions``. 1 is the paper's, without one, whose walkers move all anchors in one direction.
        keep_norm: positives keep their anchor's length, and so stay in the prior's typical set; see :class:`Walker`.
        width: of the critic's first stage; None: by the image's size.
        anchor: law of the anchors; None: N(0, 1) truncated as the generator prefers.
        seed: of the samples and of both networks' first weights.
        device: kind of device; None: where the generator is.
        devices: processes on this machine, one device each: gloo on CPUs, NCCL on GPUs. The script runs once in each of them, as under
            Lightning's ``ddp``; torchrun's processes are used instead where it started this one.
        resume: go on from ``out``'s checkpoint. History and result are those of a run that was never stopped.
        checkpoint_every: steps between checkpoints.
        monte_carlo: anchors for the distances of the result.
        progress: show a bar.
        fabric: a launched Fabric, in place of device and devices.

    Returns:
        The walker in eval mode, with its history, its loss and distances, and the path of its checkpoint.

    Raises:
        ValueError: for a value out of range, or a checkpoint of a run with other settings.
    """
    levels = check_levels(generator, levels)
    pairs, steps, warmup = integer("pairs", pairs, 2), integer("steps", steps, 1), integer("warmup", warmup, WINDOW)
    target, temperature = reachable(target_loss, pairs), positive("temperature", temperature)
    patience, checkpoint_every = integer("patience", patience, 1), integer("checkpoint_every", checkpoint_every, 1)
    rates = positive("lr_walker", lr_walker), positive("lr_critic", lr_critic)
    tolerance = positive("tolerance", tolerance)
    if not is_number(directions) or directions < 1:
        raise ValueError(f"Invalid directions={directions!r}: it must be a number of at least 1; 1 is the paper's.")
    fabric = launch(generator.freeze(), device or generator.device, devices) if fabric is None else fabric
    share(pairs, fabric)
    draw = Sampler(generator, anchor, seed)
    sizes = [generator.levels[level].size for level in levels]
    settings = {
        "generator": generator.name, "fingerprint": fingerprint(generator), "levels": list(levels), "target_loss": target, "pairs": pairs,
        "temperature": temperature, "steps": steps, "warmup": warmup, "lr_walker": rates[0], "lr_critic": rates[1],
        "tolerance": tolerance, "patience": patience, "directions": float(directions), "keep_norm": keep_norm, "width": width,
        "anchor": dataclasses.asdict(draw.law), "seed": seed, "monte_carlo": monte_carlo,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        walker = TrainedWalker(sizes[0] if generator.tied else sum(sizes), keep_norm=keep_norm)
        critic = ImageCritic(generator.image_shape, width)
    rate = rates[0] * min(1.0, math.sqrt(16 / walker.width))
    climb = torch.optim.Adam(walker.parameters(), rate, betas=(0.5, 0.999), maximize=True)
    descend = torch.optim.Adam(critic.parameters(), rates[1], betas=(0.5, 0.999))
    game = Game(generator, levels, walker, critic, temperature, directions)
    wrapped, *_ = fabric.setup(game, climb, descend)
    parts: dict[str, Any] = {"game": game, "climb": climb, "descend": descend}
    walker.levels = levels

    where = output_folder(out)
    checkpoint = Checkpoint(None if where is None else where / "checkpoint.pt", settings, resume)
    state = checkpoint.load() or {}
    for name, saved in state.get("parts", {}).items():
        parts[name].load_state_dict(saved)
    log = _Log(**state["log"]) if state else _Log()
    begin = time.perf_counter() - state.get("seconds", 0.0)

    def save() -> None:
        if fabric.global_rank == 0:
            checkpoint.save({
                "parts": {name: part.state_dict() for name, part in parts.items()},
                "log": dataclasses.asdict(log), "seconds": time.perf_counter() - begin,
            })  # fmt: skip

    prior = measure_distances(generator, levels, Fixed(), 2000, seed, anchor).prior
    name = f"walker of level {', '.join(str(level) for level in levels)}"
    with bar(name, warmup + steps, len(log.losses), progress and fabric.global_rank == 0) as advance:
        while not log.status:
            step = len(log.losses)
            gain = log.gain(target)
            loss, crowded, distance = wrapped(*draw(rows(step, pairs, fabric), TRAIN), gain)
            for optimiser in (climb, descend):
                optimiser.zero_grad()
            fabric.backward(loss - APART * crowded)
            descend.step()
            if gain:
                climb.param_groups[0]["lr"] = rate * abs(gain)
                climb.step()
            means = mean(fabric, torch.stack([loss.detach(), distance]))
            log.add(*means.tolist(), target=target, warmup=warmup, steps=steps, tolerance=tolerance, patience=patience, reach=REACH * prior)
            advance(step + 1, f": loss {log.smoothed[-1]:.2f} of {target:.2f} nats, distance {log.distances[-1]:.2f}")
            if log.status or len(log.losses) % checkpoint_every == 0:
                save()

    walker.eval().requires_grad_(False)
    losses = []
    with torch.no_grad():
        for batch in range(EVALUATIONS):
            losses.append(mean(fabric, game(*draw(rows(batch, pairs, fabric), EVALUATE), 1.0)[0]).item())
    walker.status, walker.stderr = log.status, mi_bound(losses, pairs).stderr
    walker.loss = statistics.mean(losses) if log.status == "reached" else max(log.climbed or log.smoothed[-1:])
    walker.distances = measure_distances(generator, levels, walker, monte_carlo, seed, anchor)
    walker.history = History(log.losses, log.smoothed, log.distances, log.begun)
    walker.seconds, walker.checkpoint = time.perf_counter() - begin, checkpoint.path
    found = {key: value for key, value in dataclasses.asdict(walker.distances).items() if key not in ("edges", "counts")}
    walker.provenance = {
        **settings, "status": walker.status, "loss": walker.loss, "stderr": walker.stderr, "distances": found,
        "trained_steps": len(log.losses), "processes": fabric.world_size, **environment(fabric.device),
    }  # fmt: skip
    if where is not None and fabric.global_rank == 0:
        walker.save(where / "walker.safetensors")
        _write_history(walker.history, where / "history.csv")
    return walker


@dataclasses.dataclass
class _Log:
    """The losses so far, and what follows from them: all that the stopping rule knows."""

    losses: list[float] = dataclasses.field(default_factory=list)
    smoothed: list[float] = dataclasses.field(default_factory=list)
    distances: list[float] = dataclasses.field(default_factory=list)
    begun: int = 0  # step at which the walker began to climb; 0: not yet
    held: int = 0  # steps at which the smoothed loss was at the target
    status: str = ""

    @property
    def climbed(self) -> list[float]:
        """Smoothed losses since the walker began, once it has played a whole window."""
        return self.smoothed[self.begun + WINDOW - 1 :]

    def gain(self, target: float) -> float | None:
        """The share of its rate at which the walker climbs: 1 far below the target, less from half of it on, below 0 above it.

        None before it has begun.
        """
        if not self.begun:
            return None
        return max(-1.0, min(1.0, (target - self.smoothed[-1]) / (0.5 * target)))

    def add(
        self, loss: float, distance: float, *, target: float, warmup: int, steps: int, tolerance: float, patience: int, reach: float
    ) -> None:
        """One more step."""
        self.losses.append(loss)
        self.distances.append(distance)
        count = len(self.losses)
        # Losses of the critic's beginnings, which pass the target on their way down, must not count for the walker.
        recent = self.losses[max(self.begun, count - WINDOW) :]
        self.smoothed.append(statistics.fmean(recent))
        if not self.begun:
            if count >= warmup or (count >= WINDOW and self.smoothed[-1] < KNOWN * target):
                self.begun = count
            return
        there = len(recent) == WINDOW and abs(self.smoothed[-1] - target) <= tolerance * target
        self.held += there
        climbed = self.climbed
        stalled = len(climbed) > STALL and max(climbed[-STALL:]) <= max(climbed[:-STALL])
        if self.held >= patience:
            self.status = "reached"
        elif count - self.begun >= steps or distance > reach or (stalled and max(climbed) < (1 - tolerance) * target):
            self.status = "under-used"


def check_levels(generator: MLVGM, levels: Sequence[int]) -> tuple[int, ...]:
    """The levels as indices, if they are ones to move together.

    Raises:
        ValueError: if they are not indices of the generator's levels that follow each other, or it is no generator.
    """
    if not isinstance(generator, MLVGM):
        raise ValueError(f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM.")
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
        raise ValueError(f"Invalid levels={levels!r}: give a list of indices, e.g. [2] or [1, 2, 3].")
    found = tuple(integer("level", level, 0, len(generator.levels) - 1) for level in levels)
    if found != tuple(range(found[0], found[0] + len(found))):
        raise ValueError(f"Invalid levels={list(levels)}: levels that are moved together must follow each other, e.g. [1, 2, 3].")
    return found


def _write_history(history: History, path: Path) -> None:
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "walker", "loss", "smoothed_loss", "mean_distance"])
        for step, row in enumerate(zip(history.losses, history.smoothed, history.distances, strict=True)):
            writer.writerow([step, int(step >= history.warmup), *row])
    partial.replace(path)
