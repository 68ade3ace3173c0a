"""Training an inverter: an encoder for a generator that has none.

The first part learns from endless pairs, latents z and the image G(z) that the generator makes of them,
without any data. The second part, if there are real images, learns to reconstruct them too, and pulls their
latents to the prior. Every step's samples follow from the seed and the step, so that a resumed run continues
the interrupted one to the bit, and several processes train what one would.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mlviews import checks
from mlviews.anchors import Sampler
from mlviews.checks import described, integer, is_number, output_folder, positive
from mlviews.generators.base import MLVGM
from mlviews.generators.inverter import Inverter, InverterConfig, excess
from mlviews.identity import generator_identity
from mlviews.images import Shape, as_image_set
from mlviews.latents import with_levels
from mlviews.runs.checkpoint import Checkpoint
from mlviews.runs.files import fingerprint, whole
from mlviews.runs.processes import check_dtype, launch, mean
from mlviews.runs.progress import bar
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal, check_seed, permutation

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Inverter", "InverterConfig", "InverterOptions", "InverterRun", "train_inverter"]

TRAIN = 0  # the epoch of the counter streams that the pairs to learn from are drawn in
EVALUATE = 1  # the epoch of the pairs to evaluate on, and of the order that chooses the held-out images
WARMUP = 100  # steps over which the learning rate rises from 0
FLOOR = 0.02  # share of the learning rate that is left at the last step
CHUNK = 128  # images that are evaluated at a time


@dataclass
class InverterOptions:
    """How an inverter is trained. Values are checked when it is made."""

    batch: int = 64  # images of a step, over all processes
    steps: int = 20_000  # at most
    pair_steps: int = 5_000  # of them on pairs alone, before real images join; without images all are
    pairs: int | None = None  # of a batch that stay pairs once real images have joined; None: a quarter
    lr: float = 2e-3  # AdamW's largest rate
    decay_from: float = 0.4  # share of the steps after which the rate falls along a line
    average: float = 0.995  # share of the moving average of the weights that a step keeps
    latent: float = 0.1  # weight of the error of the latents of pairs
    image: float = 1.0  # weight of the error of the reconstructed image, pixel by pixel
    feature: float = 0.1  # weight of its error in the features of a fixed random network
    pull: float = 0.005  # weight of the pull of real images' latents to the prior
    width: int = 48  # channels of the inverter at 16 pixels
    blocks: int = 1  # residual blocks of the inverter at each resolution
    hidden: int = 256  # scalars that the inverter's heads read
    dtype: str | None = None  # "bfloat16" or "float16" for autocast; None for float32
    # Law of the pairs; None: N(0, 1), truncated as the generator prefers.
    anchor: TruncatedNormal | None = None
    held_out: int = 1_000  # real images to evaluate on, at most a fifth of them
    evaluation: int = 512  # pairs to evaluate on
    evaluate_every: int = 250  # steps between evaluations, at which the checkpoint is replaced too
    patience: int = 20  # evaluations without a better one after which the run ends
    tolerance: float = 0.002  # share by which an evaluation has to be lower to count as a better one
    seed: int = 0  # of the pairs, the order of the images and the first weights
    resume: bool = True  # go on from the checkpoint
    progress: bool = True  # show a bar

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "width", "blocks", "hidden", "held_out", "evaluation"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        self.evaluate_every = integer("evaluate_every", self.evaluate_every, 1)
        self.patience = integer("patience", self.patience, 1)
        self.pair_steps = integer("pair_steps", self.pair_steps, 0)
        pairs = self.batch // 4 if self.pairs is None else self.pairs
        self.pairs = integer("pairs", pairs, 0, self.batch - 1)
        self.lr = positive("lr", self.lr)
        self.image = positive("image", self.image)
        for name in ("latent", "feature", "pull"):
            setattr(self, name, _at_least_0(name, getattr(self, name)))
        for name in ("decay_from", "average", "tolerance"):
            value = _at_least_0(name, getattr(self, name))
            if value >= 1:
                raise ValueError(f"Invalid {name}={value!r}: it must be a number from 0 to below 1.")
            setattr(self, name, value)
        self.seed = check_seed(self.seed)
        checks.flag("resume", self.resume)
        checks.flag("progress", self.progress)


SILENT = ("resume", "progress")
"""Options that do not change what is trained."""


class Images(Protocol):
    """Real images by number, as a folder of them can be: what ``images=`` takes besides a tensor."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images on the device, uint8 or float in [0, 1], ``[B, C, H, W]``."""

    def identity(self) -> str:
        """Return a digest that tells these images from others."""


class TensorImages:
    """The images of a tensor, uint8 or float in [0, 1], ``[N, C, H, W]``."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images on the device."""
        rows = torch.tensor(list(numbers), dtype=torch.int64, device=self.images.device)
        return self.images[rows].to(device)

    def identity(self) -> str:
        """Return sixteen hex digits that tell the images from others."""
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        for part in self.images.split(4096):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


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


@torch.inference_mode(False)  # whatever the caller's modes are
@torch.enable_grad()
def train_inverter(
    generator: MLVGM,
    images: str | Path | Tensor | Images | None = None,
    out: str | Path | None = None,
    *,
    start: Inverter | None = None,
    device: str | torch.device | None = None,
    devices: int = 1,
    fabric: Fabric | None = None,
    **options: Any,
) -> Inverter:
    """Train an encoder for a generator that has none: a network from images to the latents of every level.

    Args:
        generator: an MLVGM; its weights do not change.
        images: real images to reconstruct: a folder, or a tensor, uint8 or float in [0, 1], ``[N, C, H, W]``
            of the generator's image shape, or an object with the methods of :class:`Images`; N at least 10.
            None: it learns from the generator's own images alone. Some are held out for the evaluations.
        out: folder for ``checkpoint.pt``, ``inverter.safetensors`` and ``history.csv``; None keeps nothing on
            disk.
        start: an inverter of this generator to start from, e.g. to refine it on other images; None: a new
            one.
        device: the kind of device; None: where the generator is.
        devices: processes on this machine, one device each, as for :func:`mlviews.train_walker`.
        fabric: a launched Fabric, in place of device and devices.
        **options: fields of :class:`InverterOptions`, by keyword:

            - batch (64): images of a step, over all processes.
            - steps (20,000): at most.
            - pair_steps (5,000): of them on pairs alone, before real images join; without images all are.
            - pairs (None): of a batch that stay pairs once real images have joined; None: a quarter.
            - lr (2e-3): AdamW's largest rate, which rises over the first 100 steps.
            - decay_from (0.4): share of the steps after which the rate falls along a line.
            - average (0.995): share of the moving average of the weights that a step keeps. The inverter that
              is evaluated and returned is the average.
            - latent (0.1): weight of the mean squared error of pairs' latents, levels weighted by how much an
              image changes when they are drawn anew.
            - image (1.0): weight of the mean squared error of the reconstructed images, in units of the
              variance of the generator's pixels.
            - feature (0.1): weight of the same in the features of a fixed random network.
            - pull (0.005): weight of the pull of real images' latents to a mean square of 1, the prior's.
            - width (48): channels of the inverter at 16 pixels. It, blocks and hidden are those of ``start``
              where there is one.
            - blocks (1): residual blocks of the inverter at each resolution.
            - hidden (256): scalars that the inverter's heads read.
            - dtype (None): "bfloat16" or "float16" for autocast; None for float32.
            - anchor (None): law of the pairs; None: N(0, 1) truncated as the generator prefers.
            - held_out (1,000): real images to evaluate on, at most a fifth of them.
            - evaluation (512): pairs to evaluate on.
            - evaluate_every (250): steps between evaluations, at which the checkpoint is replaced too.
            - patience (20): evaluations without a better one after which the run ends.
            - tolerance (0.002): share by which an evaluation has to be lower to count as a better one.
            - seed (0): of the pairs, the order of the images and the first weights.
            - resume (True): go on from ``out``'s checkpoint. The result is that of a run that was never
              stopped.
            - progress (True): show a bar.

    Returns:
        The best inverter of the run by its evaluations, in eval mode and frozen, on the generator's device.
        Its ``run`` is an :class:`InverterRun`. ``generator.inverter = inverter`` makes ``generator.encode``
        use it.

    Raises:
        ValueError: for an unknown option, a value out of range, images that do not fit, real images with a
            class-conditional generator (whose labels nobody knows), or a checkpoint of a run with other
            settings.
    """
    checks.options("train_inverter", options, [item.name for item in dataclasses.fields(InverterOptions)])
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM."
        )
    chosen = InverterOptions(**options)
    real = _checked_images(images, generator)
    if start is not None:
        if not isinstance(start, Inverter):
            raise ValueError(
                f"Invalid start of type {type(start).__name__}: it must be an Inverter, or None."
            )
        start.check(generator)
    if fabric is None:
        fabric = launch(generator.freeze(), device or generator.device, devices)
    training = _Training(generator, real, output_folder(out), start, chosen, fabric)
    training.run()
    return training.finish()


# -- what a step minimizes -----------------------------------------------------------------------------------


class RandomFeatures(nn.Module):
    """Three stages of a fixed random network, in whose features images are compared besides in their pixels.

    Random filters respond to edges and texture, which single pixels' errors say little of; they need no
    pretrained weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        stages = [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in pairwise([channels, 16, 32, 64])
        ]
        for stage in stages:
            nn.init.normal_(stage.weight, std=1 / math.sqrt(stage.weight[0].numel()))
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features ``[B, channels, h, w]`` of each stage."""
        features = []
        x = images * 2 - 1
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        return features


class Scales(NamedTuple):
    """What the parts of the loss are counted in, measured once on the generator's samples."""

    levels: list[float]  # share of each level: of the mean squared change of an image when it is drawn anew
    image: float  # mean squared difference between two samples' pixels, halved: their variance
    features: list[float]  # the same of each stage of the random network


class Inversion(nn.Module):
    """The loss of a batch, in one module so that DDP keeps the inverter alike on all processes.

    Args:
        generator: an MLVGM on the inverter's device.
        inverter: the inverter.
        features: the fixed random network.
        scales: what the parts of the loss are counted in.
        options: the weights of the parts, and the precision.
        dtype: of autocast; None for float32.
    """

    def __init__(
        self,
        generator: MLVGM,
        inverter: Inverter,
        features: RandomFeatures,
        scales: Scales,
        options: InverterOptions,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._fixed = (generator, features)  # not parts: they do not learn
        self.inverter = inverter
        self.scales, self.options, self.dtype = scales, options, dtype

    def forward(self, images: Tensor, latents: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            images: ``[B, C, H, W]`` in [0, 1]; the first ones are the pairs'.
            latents: the latents ``[P, *level.shape]`` of the pairs, per level; P may be 0.
            labels: int64 ``[P]`` for a class-conditional generator, for which all are pairs; else None.
        """
        options = self.options
        generator, features = self._fixed
        count = len(latents[0])
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            predicted = self.inverter(images)  # per level [B, *level.shape]
            decoded = generator.decode(predicted, labels)  # [B, C, H, W]
        loss = options.image * F.mse_loss(decoded, images) / self.scales.image
        if options.feature:
            errors = [
                F.mse_loss(ours, theirs) / scale
                for ours, theirs, scale in zip(
                    features(decoded), features(images), self.scales.features, strict=True
                )
            ]
            loss = loss + options.feature * torch.stack(errors).mean()
        if count and options.latent:
            loss = loss + options.latent * self.latent_error(predicted, latents)
        if count < len(images) and options.pull:
            levels = predicted[:1] if generator.tied else predicted
            pull = torch.stack([excess(z[count:]).mean() for z in levels]).mean()
            loss = loss + options.pull * pull
        return loss

    def latent_error(self, predicted: Sequence[Tensor], latents: Sequence[Tensor]) -> Tensor:
        """Return the mean squared error of the first latents, levels weighted by what they show."""
        count = len(latents[0])
        errors = [
            share * F.mse_loss(guess[:count], z)
            for share, guess, z in zip(self.scales.levels, predicted, latents, strict=True)
        ]
        return torch.stack(errors).sum()


@torch.no_grad()
def measure_scales(generator: MLVGM, draw: Sampler, features: RandomFeatures, count: int) -> Scales:
    """Measure what each level shows, and the variance of pixels and features, on the generator's samples."""
    totals = [0.0] * len(generator.levels)
    pixels = 0.0
    stages = [0.0] * len(features.stages)
    for begin in range(0, count, CHUNK):
        indices = range(begin, min(count, begin + CHUNK))
        latents, labels = draw(indices, EVALUATE)
        images = generator(latents, labels)
        anew = draw.noise(indices, draw.law, EVALUATE)
        for level in range(len(generator.levels)):
            changed = with_levels(latents, [level], [anew[level]])
            change = (generator(changed, labels) - images).square().mean()
            totals[level] += change.item() * len(indices)
        # Two neighbours are two independent samples.
        pixels += _variance(images) * len(indices)
        for stage, maps in enumerate(features(images)):
            stages[stage] += _variance(maps) * len(indices)
    if generator.tied:  # one draw shows what all its levels show
        totals = [1.0] + [0.0] * (len(totals) - 1)
    total = sum(totals)
    shares = [value / total if total else 1 / len(totals) for value in totals]
    tiny = 1e-8  # a generator that makes one image only
    return Scales(shares, max(tiny, pixels / count), [max(tiny, value / count) for value in stages])


def _variance(values: Tensor) -> float:
    """Return half the mean squared difference between neighbours of a batch."""
    return (values - values.roll(1, 0)).square().mean().item() / 2


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


class _Training:
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


def _at_least_0(name: str, value: Any) -> float:
    """Return the value as a float if it is a number of at least 0; else raise a ValueError."""
    if not is_number(value) or value < 0:
        raise ValueError(f"Invalid {name}={value!r}: it must be a number of at least 0.")
    return float(value)


def _checked_images(images: Any, generator: MLVGM) -> Images | None:
    """Return the real images if they fit the generator."""
    if images is None:
        return None
    if generator.num_classes:
        raise ValueError(
            f"Invalid images: generator {generator.name!r} needs the class of every image to reconstruct it. "
            "Load it with one class (label=K of biggan), or leave images out."
        )
    methods = ("__len__", "batch", "identity")
    if isinstance(images, str | Path):
        images = as_image_set(images, Shape(*generator.image_shape, generator.border))
    if isinstance(images, Tensor) or not all(hasattr(images, name) for name in methods):
        images = _checked_tensor(images, tuple(generator.image_shape))
    if len(images) < 10:
        raise ValueError(
            f"Invalid images: there are {len(images)}, and at least 10 are needed; or leave them out."
        )
    real: Images = images
    return real


def _checked_tensor(images: Any, shape: tuple[int, ...]) -> TensorImages:
    """Return a tensor's images, which have this shape and are in [0, 1] unless they are bytes."""
    if not isinstance(images, Tensor) or not _fits(images, shape):
        raise ValueError(
            f"Invalid images, {described(images)}: expected a tensor of uint8, or of floats in [0, 1], of "
            f"shape (N, {', '.join(map(str, shape))})."
        )
    if images.is_floating_point() and len(images):
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"Invalid images from {low:.3g} to {high:.3g}: floats must be in [0, 1]; divide by 255 if "
                "they are gray values."
            )
    return TensorImages(images)


def _fits(images: Tensor, shape: tuple[int, ...]) -> bool:
    """Are these images ``[N, *shape]``, of bytes or floats?"""
    is_image_type = images.dtype == torch.uint8 or images.is_floating_point()
    return is_image_type and images.ndim == 4 and tuple(images.shape[1:]) == shape


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
