"""How much each latent level matters (paper, sec. 3.1 and Table 1): :func:`measure_impact`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mlviews.anchors import Sampler
from mlviews.checks import integer, output_folder, positive
from mlviews.errors import did_you_mean, listing
from mlviews.generators.base import MLVGM
from mlviews.impact.distances import measure_distances
from mlviews.impact.report import ImpactReport, LevelImpact
from mlviews.impact.sweep import HIGH, SweepOptions, Swept, sweep
from mlviews.impact.walkers import WalkerOptions, check_levels, train_walker
from mlviews.latents import interpolate
from mlviews.perturb import Mix, Normal, Resample
from mlviews.runs.files import fingerprint
from mlviews.runs.modes import plain
from mlviews.runs.processes import launch
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal
from mlviews.source import MLViewSource

if TYPE_CHECKING:
    from lightning_fabric import Fabric

METHODS: dict[str, type[SweepOptions] | type[WalkerOptions]] = {
    "sweep": SweepOptions,
    "walker": WalkerOptions,
}
"""The methods' options by the methods' names."""

NAMED = ("anchor", "seed", "monte_carlo", "temperature", "pairs")  # options that the report names elsewhere
RUN_ONLY = ("resume", "progress", "checkpoint_every")  # options that do not change a figure
ANCHORS, VIEWS = 4, 8  # of a level's picture
ENDS = 10_000  # anchors for the distances at the ends of an interval


def measure_impact(
    generator: MLVGM,
    method: str = "sweep",
    target_loss: float = 0.7,
    out: str | Path | None = None,
    *,
    levels: Sequence[int | Sequence[int]] | None = None,
    anchor: TruncatedNormal | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    devices: int = 1,
    monte_carlo: int = 100_000,
    **options: Any,
) -> ImpactReport:
    """Measure what it takes, level by level, to cost the same amount of mutual information (paper, Table 1).

    Args:
        generator: an MLVGM; its weights do not change.
        method: "sweep": critics trained once, and every level's loss as a curve of its noise
            (:func:`mlviews.impact.sweep.sweep`); "walker": the paper's, a learned walker for each level
            (:func:`mlviews.train_walker`).
        target_loss: plain InfoNCE in nats that each level is moved to; 0.7 is what the paper's code reports
            as 1.
        out: folder for the checkpoints of a run that can be resumed; None keeps nothing on disk.
            ``report.save(out)`` adds the report.
        levels: rows of the report: indices, or (method "walker") lists of levels to move together; None:
            every level alone.
        anchor: law of the anchors; None: N(0, 1) truncated as the generator prefers.
        seed: the seed of everything random.
        device: the kind of device; None: where the generator is.
        devices: processes on this machine, one device each; see :func:`mlviews.train_walker`.
        monte_carlo: anchors for the distances; at least 2.
        **options: the method's, e.g. ``pairs=64, steps=600, resume=False, progress=False``; see
            :class:`mlviews.impact.sweep.SweepOptions` and :class:`mlviews.impact.walkers.WalkerOptions`.

    Returns:
        A report with a row per level, or per list of levels.

    Raises:
        ValueError: for an unknown method or option, a value out of range, or a checkpoint of a run with other
            settings.
    """
    _check_method(method, options)
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM."
        )
    target = positive("target_loss", target_loss)
    monte_carlo = integer("monte_carlo", monte_carlo, 2)
    groups = _groups(generator, levels, method)
    law = Sampler(generator, anchor, seed).law
    folder = output_folder(out)
    fabric = launch(generator.freeze(), device or generator.device, devices)
    run = _Run(generator, groups, target, folder, fabric, law, seed, monte_carlo)
    begin = time.perf_counter()
    with plain(fabric.device):
        impacts = _by_walker(run, options) if method == "walker" else _by_sweep(run, options)
        seconds = time.perf_counter() - begin
        grids = {impact.name: _grid(generator, impact, law, seed) for impact in impacts}
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    values: dict[str, Any] = {**defaults, **options}
    return ImpactReport(
        generator=generator.name,
        image_shape=generator.image_shape,
        levels=tuple((level.name, tuple(level.shape)) for level in generator.levels),
        method=method,
        target_loss=target,
        temperature=values["temperature"],
        pairs=values["pairs"],
        seed=seed,
        impacts=impacts,
        seconds=seconds,
        environment=environment(fabric.device),
        options={
            "generator": dict(generator.options),
            "weights": fingerprint(generator),
            "monte_carlo": monte_carlo,
            "anchor": dataclasses.asdict(law),
            "processes": fabric.world_size,
            **{name: value for name, value in values.items() if name not in NAMED + RUN_ONLY},
        },
        grids=grids,
    )


def _check_method(method: str, options: dict[str, Any]) -> None:
    """Raise a ValueError if there is no such method, or it takes no such option."""
    if method not in METHODS:
        raise ValueError(
            f"Invalid method={method!r}: it must be one of {listing(METHODS)}.{did_you_mean(method, METHODS)}"
        )
    allowed = [field.name for field in dataclasses.fields(METHODS[method])]
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"Unknown option {name!r} of method {method!r}: it takes {listing(allowed)}."
                f"{did_you_mean(name, allowed)}"
            )


def _groups(
    generator: MLVGM, levels: Sequence[int | Sequence[int]] | None, method: str
) -> list[tuple[int, ...]]:
    """Return the levels of each row of the report."""
    if levels is None:
        return [(level,) for level in range(len(generator.levels))]
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
        raise ValueError(
            f"Invalid levels={levels!r}: give a row each, e.g. [0, 2] or [[1, 2, 3]], or None for every "
            "level alone."
        )
    groups = []
    for row in levels:
        group = check_levels(generator, row if isinstance(row, Sequence) else [row])
        if len(group) > 1 and method == "sweep":
            raise ValueError(
                f"Invalid levels={list(group)} for method 'sweep', which moves one level at a time: "
                "use method='walker'."
            )
        groups.append(group)
    return groups


@dataclass(frozen=True)
class _Run:
    """What both methods are given."""

    generator: MLVGM  # on Fabric's device
    groups: Sequence[tuple[int, ...]]  # levels of each row
    target: float  # plain InfoNCE, nats
    folder: Path | None  # for the checkpoints
    fabric: Fabric  # launched
    law: TruncatedNormal  # of the anchors
    seed: int
    monte_carlo: int  # anchors for the distances

    def name(self, levels: Sequence[int]) -> str:
        """Return the name of a row."""
        return " + ".join(self.generator.levels[level].name for level in levels)


def _by_walker(run: _Run, options: dict[str, Any]) -> tuple[LevelImpact, ...]:
    """Train a walker for each row, one after the other."""
    impacts = []
    for levels in run.groups:
        folder = None if run.folder is None else run.folder / f"walker-{'-'.join(map(str, levels))}"
        walker = train_walker(
            run.generator,
            levels,
            run.target,
            folder,
            anchor=run.law,
            seed=run.seed,
            monte_carlo=run.monte_carlo,
            fabric=run.fabric,
            **options,
        )
        impact = LevelImpact(
            levels=levels,
            name=run.name(levels),
            status=walker.status,
            perturber=walker,
            loss=walker.loss,
            stderr=walker.stderr,
            distances=walker.distances,
            steps=len(walker.history.losses),
            seconds=walker.seconds,
            history=walker.history,
        )
        impacts.append(impact)
    return tuple(impacts)


def _by_sweep(run: _Run, options: dict[str, Any]) -> tuple[LevelImpact, ...]:
    """Measure the curves of all levels, of which those asked for become rows."""
    curves = sweep(
        run.generator, run.target, run.fabric, run.folder, anchor=run.law, seed=run.seed, **options
    )
    shift = SweepOptions(**options).shift
    impacts = []
    for levels in run.groups:
        swept = curves.levels[levels[0]]
        outcome = _outcome(swept, run.target, shift)
        distances = measure_distances(
            run.generator, levels, outcome.perturber, run.monte_carlo, run.seed, run.law
        )
        impact = LevelImpact(
            levels=levels,
            name=run.name(levels),
            status=outcome.status,
            perturber=outcome.perturber,
            loss=outcome.loss,
            stderr=outcome.stderr,
            distances=distances,
            magnitude=swept.std,
            interval=swept.interval,
            distance_interval=_distance_interval(run, levels, swept.interval, shift),
            steps=curves.steps,
            seconds=curves.seconds / len(curves.levels),
            curve=swept.curve,
        )
        impacts.append(impact)
    return tuple(impacts)


def _distance_interval(
    run: _Run,
    levels: Sequence[int],
    interval: tuple[float, float] | None,
    shift: Callable[[float], Normal | Mix],
) -> tuple[float, float] | None:
    """Return the mean distances at the ends of an interval of standard deviations."""
    if interval is None:
        return None
    count = min(ENDS, run.monte_carlo)
    low, high = (
        measure_distances(run.generator, levels, shift(std), count, run.seed, run.law).mean
        for std in interval
    )
    return low, high


@dataclass(frozen=True)
class _Outcome:
    """What a level's curve comes to."""

    status: str
    perturber: Normal | Mix | Resample
    loss: float  # plain InfoNCE under the perturber, nats
    stderr: float  # its standard error, nats


def _outcome(swept: Swept, target: float, shift: Callable[[float], Normal | Mix]) -> _Outcome:
    """Return a level's perturber: the shift that meets the target, a fresh draw, or the farthest shift."""
    curve = swept.curve
    if swept.std is not None:
        place, places = np.log(swept.std), np.log(curve.magnitudes)
        loss = float(np.interp(place, places, curve.losses))
        stderr = float(np.interp(place, places, curve.stderrs))
        return _Outcome("reached", shift(swept.std), loss, stderr)
    if curve.resample >= target:
        return _Outcome("resample", Resample(), curve.resample, curve.resample_stderr)
    return _Outcome("under-used", shift(HIGH), curve.losses[-1], curve.stderrs[-1])


@torch.no_grad()
def _grid(generator: MLVGM, impact: LevelImpact, law: TruncatedNormal, seed: int) -> Tensor:
    """Return anchors and views of them, uint8 ``[anchors, views, C, H, W]``.

    The views are independent positives, or steps along the path of a walker that does not draw, as all its
    positives are the same.
    """
    source = MLViewSource(
        generator,
        {f"{impact.levels[0]}:{impact.levels[-1] + 1}": impact.perturber},
        anchor=law,
        batch_size=ANCHORS,
        num_samples=ANCHORS,
        num_views=2 if impact.walked else VIEWS,
        seed=seed,
        rank=0,
        world_size=1,
    )
    batch = source.batch(0, ANCHORS)
    images = list(batch.views)
    if impact.walked:
        anchors, positives = batch.latents
        ends = [positives[level] for level in impact.levels]
        labels = batch.targets if generator.num_classes else None
        images = [
            generator(interpolate(anchors, impact.levels, ends, share), labels)
            for share in np.linspace(0, 1, VIEWS).tolist()
        ]
    return (torch.stack(images, dim=1) * 255).round().to(torch.uint8).cpu()
