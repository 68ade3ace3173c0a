"""Training a walker (paper, eq. 5), a game with a critic: ``max_phi min_f L(f(g(z)), f(g(T_phi(z))))``.

The critic learns alone first, until it tells images apart that the walker has hardly moved. Then the walker
climbs, ever more slowly as the smoothed loss nears its target, and waits at the target for the critic: the
run ends when the loss stays there. How far the walker got is the magnitude of the level; a level whose loss
never gets there is under-used.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import remove_parametrizations

from mlviews import checks
from mlviews.anchors import Sampler
from mlviews.checks import integer, is_number, output_folder, positive
from mlviews.generators.base import MLVGM
from mlviews.identity import generator_identity
from mlviews.impact.distances import measure_distances
from mlviews.impact.figures import Distances, History
from mlviews.impact.streams import EVALUATE, TRAIN
from mlviews.latents import with_levels
from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import info_nce, mi_bound, reachable
from mlviews.perturb import Fixed, Walker
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import whole
from mlviews.runs.modes import plain
from mlviews.runs.processes import launch, mean, rows, share
from mlviews.runs.progress import bar
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal, check_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

WINDOW = 25  # steps that the smoothed loss is the mean of
KNOWN = 0.1  # share of the target below which the critic knows unmoved images, and the walker starts
APART = 3.0  # weight of the penalty on shifts that lie in fewer directions than asked for
REACH = 10.0  # times the prior's own distance: farther out a walker says nothing about the prior any more
STALL = 300  # steps without a larger smoothed loss after which a level is given up
EVALUATIONS = 32  # batches of fresh pairs on which the final loss is measured
STATUSES = ("", "reached", "under-used")  # of a game: it goes on, or how it ended
WIDEST = 8192  # scalars that a walker moves: it has twice their square of weights
PRIOR_ANCHORS = 2000  # anchors for the prior's own distance, which REACH is counted in


@dataclass
class WalkerOptions:
    """How a walker is trained. Values are checked when it is made."""

    pairs: int = 64  # K of a batch, over all processes; at least 2
    temperature: float = 0.1  # of InfoNCE
    steps: int = 1000  # of the walker, at most
    warmup: int = 300  # steps of the critic alone, at most; at least WINDOW
    lr_walker: float = 1e-3  # Adam's rate for a walker 16 wide
    lr_critic: float = 1e-3  # Adam's rate for the critic
    tolerance: float = 0.1  # share of the target within which the smoothed loss counts as there
    patience: int = 100  # steps at the target in all, after which the run ends
    directions: float = 1.0  # that shifts spread over, at least 1: the paper's, without a penalty
    keep_norm: bool = False  # whether positives keep their anchor's length
    noise: bool = False  # whether the walker draws
    entropy: float = 0.2  # nats of the loss that it gives for a nat more of each scalar's noise, if it draws
    width: int | None = None  # channels of the critic's first stage; None: by the image's size
    anchor: TruncatedNormal | None = None  # their law; None: N(0, 1), truncated as the generator prefers
    seed: int = 0  # of the samples and of both networks' first weights
    resume: bool = True  # go on from the checkpoint
    checkpoint_every: int = 50  # steps between checkpoints
    monte_carlo: int = 100_000  # anchors for the distances of the result
    progress: bool = True  # show a bar

    def __post_init__(self) -> None:
        self.pairs = integer("pairs", self.pairs, 2)
        self.temperature = positive("temperature", self.temperature)
        self.steps = integer("steps", self.steps, 1)
        self.warmup = integer("warmup", self.warmup, WINDOW)
        self.lr_walker = positive("lr_walker", self.lr_walker)
        self.lr_critic = positive("lr_critic", self.lr_critic)
        self.tolerance = positive("tolerance", self.tolerance)
        self.patience = integer("patience", self.patience, 1)
        self.checkpoint_every = integer("checkpoint_every", self.checkpoint_every, 1)
        self.seed = check_seed(self.seed)
        self.noise = checks.flag("noise", self.noise)
        self.entropy = positive("entropy", self.entropy)
        if not is_number(self.directions) or self.directions < 1:
            raise ValueError(
                f"Invalid directions={self.directions!r}: it must be a number of at least 1; 1 is the "
                "paper's."
            )
        self.directions = float(self.directions)


@dataclass(frozen=True)
class WalkerRun:
    """The run that trained a walker."""

    levels: tuple[int, ...]  # indices of the levels that it moves
    status: str  # "reached" the target, or "under-used": it never did
    loss: float  # plain InfoNCE at the end, on fresh pairs, nats; under-used: the largest smoothed loss
    stderr: float  # standard error of the loss, nats
    distances: Distances  # how far it moves the levels
    history: History  # losses and distances of each step
    seconds: float  # what the run took, all its parts together
    checkpoint: Path | None  # that it goes on from; walker.safetensors and history.csv are beside it


class TrainedWalker(Walker):
    """A walker, and the run that trained it.

    Args:
        walker: the walker, whose weights it takes over.
        run: the run that trained it; its fields are also attributes of the walker.
    """

    def __init__(self, walker: Walker, run: WalkerRun) -> None:
        with plain(), torch.random.fork_rng(devices=[]):  # its first weights are drawn, and not used
            super().__init__(walker.width, walker.provenance, walker.keep_norm, walker.noise)
        self.net = walker.net
        if walker.noise:
            self.basis = walker.basis
        self.run = run

    @classmethod
    def load(cls, path: str | Path) -> Walker:
        """Read a walker's file, which does not hold the run: see :meth:`Walker.load`."""
        return Walker.load(path)

    @property
    def levels(self) -> tuple[int, ...]:
        """Indices of the levels that it moves."""
        return self.run.levels

    @property
    def status(self) -> str:
        """How it ended: "reached" the target, or "under-used": it never did."""
        return self.run.status

    @property
    def loss(self) -> float:
        """Plain InfoNCE in nats at the end, on fresh pairs; under-used: the largest smoothed loss."""
        return self.run.loss

    @property
    def stderr(self) -> float:
        """The standard error of the loss, in nats."""
        return self.run.stderr

    @property
    def distances(self) -> Distances:
        """How far it moves the levels."""
        return self.run.distances

    @property
    def history(self) -> History:
        """Losses and distances of each step."""
        return self.run.history

    @property
    def seconds(self) -> float:
        """What the run took, all its parts together."""
        return self.run.seconds

    @property
    def checkpoint(self) -> Path | None:
        """The file that the run goes on from; its folder also has walker.safetensors and history.csv."""
        return self.run.checkpoint


class Game(nn.Module):
    """A step of both players, in one module so that DDP keeps all of it alike.

    Args:
        generator: an MLVGM on the players' device.
        levels: the indices of the levels that the walker moves.
        walker: the walker.
        critic: a network from images to embeddings.
        temperature: of InfoNCE.
        directions: how many directions the shifts are to spread over, at least.
        entropy: what a nat of entropy per scalar is worth to a walker that draws, in nats of the loss.
    """

    def __init__(
        self,
        generator: MLVGM,
        levels: tuple[int, ...],
        walker: Walker,
        critic: nn.Module,
        temperature: float,
        directions: float,
        entropy: float,
    ) -> None:
        super().__init__()
        self._generator = (generator,)  # not a part: it does not learn
        self.levels, self.walker, self.critic = levels, walker, critic
        self.temperature, self.directions, self.entropy = temperature, directions, entropy

    def forward(
        self,
        latents: Sequence[Tensor],
        labels: Tensor | None,
        noise: Sequence[Tensor] | None,
        gain: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Play a batch.

        Args:
            latents: the anchors' tensors ``[B, *level.shape]``, one per level.
            labels: int64 ``[B]``; None without classes.
            noise: what the walker draws for the levels that it moves, shaped like them; None if it does not
                draw.
            gain: the sign is that of the walker's gradient of the loss: with a negative one it goes back. A
                walker that draws takes the gradient as many times. None: the walker has not begun, and
                positives are the anchors themselves.

        Returns:
            The InfoNCE loss over all processes, what the walker pays for shifts in too few directions and is
            paid for entropy (nats), and this process's mean distance; scalars.
        """
        (generator,) = self._generator
        first = self.levels[0]
        states = generator.states(latents, labels)
        anchors = generator.decode(latents, labels, state=states[-1], start=len(generator.levels))
        if gain is None:
            return self._stand_still(anchors)

        # Positives, whose gradient the gain's sign turns round.
        start = [latents[level] for level in self.levels]
        moved = self.walker(start, noise)
        factor = math.copysign(1.0, gain) if noise is None else gain
        turned = [z.detach() + factor * (z - z.detach()) for z in moved]
        positives = with_levels(latents, self.levels, turned)
        images = generator.decode(positives, labels, state=states[first], start=first)  # [B, C, H, W]

        # The critic sees both sides in one batch.
        anchors_embedded, positives_embedded = self.critic(torch.cat([anchors, images])).chunk(2)  # [B, dim]
        loss = info_nce(anchors_embedded, positives_embedded, self.temperature)
        by_level = generator.distances(latents, [z.detach() for z in positives], labels)
        distances = torch.stack([by_level[level] for level in self.levels]).norm(dim=0)  # [B]
        penalty = APART * self._crowded(start, moved)
        if noise is not None:
            penalty = penalty - self.entropy * self.walker.entropy(start)
        return loss, penalty, distances.mean()

    def _stand_still(self, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Play with the anchors as their own positives."""
        embedded = self.critic(anchors)
        # DDP waits for every weight's gradient, so that the walker's are in the sum, with a factor of 0.
        zero = torch.stack([weight.sum() for weight in self.walker.parameters()]).sum() * 0
        return info_nce(embedded, embedded, self.temperature), zero, zero.detach()

    def _crowded(self, start: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
        """Return how far the shifts lie in fewer directions than asked for; 0 if they do not."""
        shifts = [(end - begin).flatten(1) for begin, end in zip(start, moved, strict=True)]
        shift = torch.cat(shifts, dim=1)  # [B, width]
        size = shift.norm(dim=1).mean().detach()
        units = nn.functional.normalize(shift, dim=1)
        count = len(units)
        # The mean squared cosine between the shifts of two anchors, without those of an anchor with itself.
        common = ((units @ units.T).square().sum() - count) / max(1, count * (count - 1))
        # Times their length, as the loss's gradient would else outgrow this one's.
        crowded: Tensor = size * torch.relu(common - 1 / self.directions)
        return crowded


def train_walker(
    generator: MLVGM,
    levels: Sequence[int],
    target_loss: float = 0.7,
    out: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    devices: int = 1,
    fabric: Fabric | None = None,
    **options: Any,
) -> TrainedWalker:
    """Train a walker for some levels together, until InfoNCE stays at the target (paper, eq. 5).

    Args:
        generator: an MLVGM; its weights do not change.
        levels: the indices of the levels to move, which follow each other.
        target_loss: plain InfoNCE in nats; 0.7 is what the paper's code reports as 1.
        out: folder for ``checkpoint.pt``, ``walker.safetensors`` and ``history.csv``; None keeps nothing on
            disk.
        device: the kind of device; None: where the generator is.
        devices: processes on this machine, one device each: gloo on CPUs, NCCL on GPUs. The script runs once
            in each of them, as under Lightning's ``ddp``; torchrun's processes are used instead if it started
            this one.
        fabric: a launched Fabric, in place of device and devices.
        **options: fields of :class:`WalkerOptions`, by keyword:

            - pairs (64): K of a batch, over all processes; at least 2.
            - temperature (0.1): of InfoNCE.
            - steps (1000): of the walker, at most.
            - warmup (300): steps of the critic alone, at most; it ends once the smoothed loss is below a
              tenth of the target.
            - lr_walker (1e-3): Adam's rate for a walker 16 wide; wider ones take ``sqrt(16 / width)`` of it,
              as each of Adam's steps changes every weight by about the rate, so that an output of many
              weights moves more.
            - lr_critic (1e-3): Adam's rate for the critic.
            - tolerance (0.1): share of the target within which the smoothed loss counts as there.
            - patience (100): steps at the target in all, in which the critic learns to follow the walker:
              with few, a surprised critic is enough.
            - directions (1.0): how many directions the anchors' shifts spread over, at least: a penalty sets
              in where the mean squared cosine between two of them is above ``1 / directions``. 1 is the
              paper's, without a penalty, whose walkers move all anchors in one direction.
            - keep_norm (False): positives keep their anchor's length, and so stay in the prior's typical set;
              see :class:`Walker`.
            - noise (False): the walker draws, so that an anchor has as many positives as are asked for; see
              :class:`Walker`. It raises the loss to the target and is rewarded for its entropy, before and
              there: of the perturbations that leave so much information it seeks the most random one.
            - entropy (0.2): what a nat of it per scalar is worth to a walker that draws, in nats of the loss.
            - width (None): channels of the critic's first stage; None: by the image's size.
            - anchor (None): law of the anchors; None: N(0, 1) truncated as the generator prefers.
            - seed (0): of the samples and of both networks' first weights.
            - resume (True): go on from ``out``'s checkpoint. History and result are those of a run that was
              never stopped.
            - checkpoint_every (50): steps between checkpoints.
            - monte_carlo (100,000): anchors for the distances of the result.
            - progress (True): show a bar.

    Returns:
        The walker in eval mode, with its history, its loss and distances, and the path of its checkpoint.

    Raises:
        ValueError: for an unknown option, a value out of range, or a checkpoint of a run with other settings.
    """
    names = [item.name for item in dataclasses.fields(WalkerOptions)]
    checks.options("train_walker", options, names)
    levels = check_levels(generator, levels)
    _check_width(generator, levels)
    chosen = WalkerOptions(**options)
    target = reachable(target_loss, chosen.pairs)
    if fabric is None:
        fabric = launch(generator.freeze(), device or generator.device, devices)
    with plain(fabric.device):
        training = _Training(generator, levels, target, output_folder(out), chosen, fabric)
        training.play()
        return training.finish()


class _Training:
    """A walker's training, from its first networks or a checkpoint to the files of the result.

    Args:
        generator: an MLVGM on Fabric's device.
        levels: the indices of the levels to move.
        target: plain InfoNCE in nats.
        folder: where its files go; None keeps nothing on disk.
        options: how to train.
        fabric: launched.
    """

    def __init__(
        self,
        generator: MLVGM,
        levels: tuple[int, ...],
        target: float,
        folder: Path | None,
        options: WalkerOptions,
        fabric: Fabric,
    ) -> None:
        share(options.pairs, fabric)  # a ValueError now, if they cannot be shared
        self.generator, self.levels, self.target = generator, levels, target
        self.folder, self.options, self.fabric = folder, options, fabric
        self.draw = Sampler(generator, options.anchor, options.seed)
        self._make_players()
        self.settings = self._settings()
        path = None if folder is None else folder / "checkpoint.pt"
        self.checkpoint = Checkpoint(path, self.settings, options.resume)
        self._restore()

    def _settings(self) -> dict[str, Any]:
        """Return what the run depends on: a checkpoint with other values belongs to another run."""
        options = self.options
        return {
            "generator": generator_identity(self.generator),
            "levels": list(self.levels),
            "target_loss": self.target,
            "pairs": options.pairs,
            "temperature": options.temperature,
            "steps": options.steps,
            "warmup": options.warmup,
            "lr_walker": options.lr_walker,
            "lr_critic": options.lr_critic,
            "tolerance": options.tolerance,
            "patience": options.patience,
            "directions": options.directions,
            "keep_norm": options.keep_norm,
            **({"noise": True, "entropy": options.entropy} if options.noise else {}),
            "width": options.width,
            "anchor": dataclasses.asdict(self.draw.law),
            "seed": options.seed,
            "monte_carlo": options.monte_carlo,
        }

    def _make_players(self) -> None:
        """Make both networks and their optimizers."""
        generator, options = self.generator, self.options
        sizes = [generator.levels[level].size for level in self.levels]
        with plain(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed % (1 << 63))
            width = sizes[0] if generator.tied else sum(sizes)
            self.walker = Walker(width, keep_norm=options.keep_norm, noise=options.noise)
            critic = ImageCritic(generator.image_shape, options.width)
        if options.noise:
            orthogonal(self.walker, "basis", orthogonal_map="matrix_exp")
        self.rate = options.lr_walker * min(1.0, math.sqrt(16 / width))
        betas = (0.5, 0.999)
        # At the target a walker that draws goes on, by gradients a tenth of those on its way there.
        climb_betas = (0.5, 0.99) if options.noise else betas
        self.climb = torch.optim.Adam(self.walker.parameters(), self.rate, climb_betas, maximize=True)
        self.descend = torch.optim.Adam(critic.parameters(), options.lr_critic, betas)
        self.game = Game(
            generator,
            self.levels,
            self.walker,
            critic,
            options.temperature,
            options.directions,
            options.entropy,
        )
        self.wrapped, *_ = self.fabric.setup(self.game, self.climb, self.descend)

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        self.log, seconds = _Log(), 0.0
        state = self.checkpoint.load()
        if state is not None:
            with self.checkpoint.reading():
                self.log = _Log.restore(state["log"])
                seconds = float(state["seconds"])
                for name, part in self._parts().items():
                    part.load_state_dict(state["parts"][name])
        self.begin = time.perf_counter() - seconds

    def _parts(self) -> dict[str, Any]:
        return {"game": self.game, "climb": self.climb, "descend": self.descend}

    def _save(self) -> None:
        """Replace the checkpoint."""
        if self.fabric.global_rank == 0:
            state = {
                "parts": {name: part.state_dict() for name, part in self._parts().items()},
                "log": dataclasses.asdict(self.log),
                "seconds": time.perf_counter() - self.begin,
            }
            self.checkpoint.save(state)

    def play(self) -> None:
        """Play until the log says that the game is over."""
        options, log = self.options, self.log
        prior = measure_distances(
            self.generator, self.levels, Fixed(), PRIOR_ANCHORS, options.seed, options.anchor
        ).prior
        name = f"walker of level {', '.join(str(level) for level in self.levels)}"
        show = options.progress and self.fabric.global_rank == 0
        with bar(name, options.warmup + options.steps, len(log.losses), show) as advance:
            while not log.status:
                loss, distance = self._step(len(log.losses))
                log.add(
                    loss,
                    distance,
                    target=self.target,
                    warmup=options.warmup,
                    steps=options.steps,
                    tolerance=options.tolerance,
                    patience=options.patience,
                    reach=REACH * prior,
                )
                note = f": loss {log.smoothed[-1]:.2f} of {self.target:.2f} nats, distance {distance:.2f}"
                advance(len(log.losses), note)
                if log.status or len(log.losses) % options.checkpoint_every == 0:
                    self._save()

    def _step(self, step: int) -> tuple[float, float]:
        """Train both players on a batch; return its loss and mean distance over all processes."""
        gain = self.log.gain(self.target)
        loss, penalty, distance = self.wrapped(*self._batch(step, TRAIN), gain)
        for optimizer in (self.climb, self.descend):
            optimizer.zero_grad()
        self.fabric.backward(loss - penalty)
        self.descend.step()
        if gain is not None:
            # At the target a walker that draws goes on spreading: its gain is in its gradient.
            self.climb.param_groups[0]["lr"] = self.rate if self.walker.noise else self.rate * abs(gain)
            self.climb.step()
        means = mean(self.fabric, torch.stack([loss.detach(), distance]))
        mean_loss, mean_distance = means.tolist()
        return mean_loss, mean_distance

    def _batch(self, step: int, epoch: int) -> tuple[list[Tensor], Tensor | None, list[Tensor] | None]:
        """Return this process's anchors, labels and noise of a batch, as :class:`Game` takes them."""
        indices = rows(step, self.options.pairs, self.fabric)
        law = self.walker.law(self.draw.law)
        noise = None if law is None else self.draw.noise(indices, law, epoch, self.levels)
        return *self.draw(indices, epoch), noise

    def finish(self) -> TrainedWalker:
        """Measure the walker, write its files, and return it with its run."""
        if self.walker.noise:
            remove_parametrizations(self.walker, "basis")
        self.walker.eval().requires_grad_(False)
        run = self._measure()
        trained = TrainedWalker(self.walker, run).eval()
        trained.provenance = self._provenance(run)
        if self.folder is not None and self.fabric.global_rank == 0:
            trained.save(self.folder / "walker.safetensors")
            _write_history(run.history, self.folder / "history.csv")
        return trained

    def _measure(self) -> WalkerRun:
        """Measure loss and distances of the walker as it is now, on fresh samples."""
        options, log = self.options, self.log
        losses = []
        with torch.no_grad():
            for batch in range(EVALUATIONS):
                loss, _, _ = self.game(*self._batch(batch, EVALUATE), 1.0)
                losses.append(mean(self.fabric, loss).item())
        if log.status == "reached":
            loss_reached = statistics.mean(losses)
        else:
            loss_reached = max(log.climbed or log.smoothed[-1:])
        distances = measure_distances(
            self.generator, self.levels, self.walker, options.monte_carlo, options.seed, options.anchor
        )
        return WalkerRun(
            levels=self.levels,
            status=log.status,
            loss=loss_reached,
            stderr=mi_bound(losses, options.pairs).stderr,
            distances=distances,
            history=History(log.losses, log.smoothed, log.distances, log.begun),
            seconds=time.perf_counter() - self.begin,
            checkpoint=self.checkpoint.path,
        )

    def _provenance(self, run: WalkerRun) -> dict[str, Any]:
        """Return what the walker's file says about its training."""
        distances = dataclasses.asdict(run.distances)
        del distances["edges"], distances["counts"]
        identity = self.settings["generator"]
        return {
            **self.settings,
            "generator": identity["name"],
            "fingerprint": identity["weights"],
            "status": run.status,
            "loss": run.loss,
            "stderr": run.stderr,
            "distances": distances,
            "trained_steps": len(run.history.losses),
            "processes": self.fabric.world_size,
            **environment(self.fabric.device),
        }


@dataclass
class _Log:
    """The losses so far, and what follows from them: all that the stopping rule knows."""

    losses: list[float] = field(default_factory=list)  # of each step's batch, nats
    smoothed: list[float] = field(default_factory=list)  # means over a window, nats
    distances: list[float] = field(default_factory=list)  # mean of each step's batch
    begun: int = 0  # the step at which the walker began to climb; 0: not yet
    held: int = 0  # steps at which the smoothed loss was at the target
    status: str = ""  # how the game ended; empty while it goes on

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> _Log:
        """Return the log that a checkpoint holds.

        Raises:
            ValueError: if its values do not fit each other.
        """
        log = cls(**values)
        counts = {len(figures) for figures in (log.losses, log.smoothed, log.distances)}
        numbers = (*log.losses, *log.smoothed, *log.distances)
        if len(counts) > 1 or not all(map(is_number, numbers)):
            raise ValueError("its log has no number for every step")
        if not 0 <= log.begun <= len(log.losses) or log.status not in STATUSES:
            raise ValueError(f"its log says begun={log.begun!r}, status={log.status!r}")
        return log

    @property
    def climbed(self) -> list[float]:
        """Smoothed losses since the walker began, once it has played a whole window."""
        return self.smoothed[self.begun + WINDOW - 1 :]

    def gain(self, target: float) -> float | None:
        """Return the share of its rate at which the walker climbs.

        It is 1 far below the target, less from half of it on, and below 0 above it. None before it has begun.
        """
        if not self.begun:
            return None
        return max(-1.0, min(1.0, (target - self.smoothed[-1]) / (0.5 * target)))

    def add(
        self,
        loss: float,
        distance: float,
        *,
        target: float,
        warmup: int,
        steps: int,
        tolerance: float,
        patience: int,
        reach: float,
    ) -> None:
        """Count a step, and say whether it was the last one.

        Args:
            loss: plain InfoNCE of the step's batch, in nats.
            distance: the mean distance of the step's batch.
            target: the loss to get to, in nats.
            warmup: steps of the critic alone, at most.
            steps: of the walker, at most.
            tolerance: share of the target within which the smoothed loss counts as there.
            patience: steps at the target after which it is reached.
            reach: the distance beyond which the walker has left the prior.
        """
        self.losses.append(loss)
        self.distances.append(distance)
        count = len(self.losses)
        # Losses of the critic's beginnings, which pass the target on their way down, must not count for the
        # walker.
        recent = self.losses[max(self.begun, count - WINDOW) :]
        self.smoothed.append(statistics.fmean(recent))
        if not self.begun:
            knows_unmoved = count >= WINDOW and self.smoothed[-1] < KNOWN * target
            if count >= warmup or knows_unmoved:
                self.begun = count
            return
        if len(recent) == WINDOW and abs(self.smoothed[-1] - target) <= tolerance * target:
            self.held += 1
        climbed = self.climbed
        stalled = len(climbed) > STALL and max(climbed[-STALL:]) <= max(climbed[:-STALL])
        given_up = stalled and max(climbed) < (1 - tolerance) * target
        if self.held >= patience:
            self.status = "reached"
        elif count - self.begun >= steps or distance > reach or given_up:
            self.status = "under-used"


def check_levels(generator: MLVGM, levels: Sequence[int]) -> tuple[int, ...]:
    """Return the levels as indices, if they are ones to move together.

    Raises:
        ValueError: if they are not indices of the generator's levels that follow each other, or it is no
            generator.
    """
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM."
        )
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
        raise ValueError(f"Invalid levels={levels!r}: give a list of indices, e.g. [2] or [1, 2, 3].")
    indices = tuple(integer("level", level, 0, len(generator.levels) - 1) for level in levels)
    if indices != tuple(range(indices[0], indices[0] + len(indices))):
        raise ValueError(
            f"Invalid levels={list(levels)}: levels that are moved together must follow each other, "
            "e.g. [1, 2, 3]."
        )
    return indices


def _check_width(generator: MLVGM, levels: Sequence[int]) -> None:
    """Raise a ValueError for levels that are too wide for a walker."""
    sizes = [generator.levels[level].size for level in levels]
    width = sizes[0] if generator.tied else sum(sizes)
    if width > WIDEST:
        raise ValueError(
            f"Invalid levels={list(levels)}: they have {width:,} scalars, of which a walker can move "
            f"{WIDEST:,} at most. Use measure_impact(..., method='sweep', perturber='mix')."
        )


def _write_history(history: History, path: Path) -> None:
    """Write the history as a CSV file with a row per step."""
    steps = zip(history.losses, history.smoothed, history.distances, strict=True)
    with whole(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "walker", "loss", "smoothed_loss", "mean_distance"])
        for step, figures in enumerate(steps):
            writer.writerow([step, int(step >= history.warmup), *figures])
