"""How much each latent level matters (paper, sec. 3.1 and Table 1): :func:`measure_impact`."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
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
from mlviews.impact.sweep import HIGH, Swept, sweep
from mlviews.impact.walkers import check_levels, train_walker
from mlviews.latents import with_levels
from mlviews.perturb import Normal, Resample, Walker
from mlviews.runs.processes import launch
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal
from mlviews.source import MLViewSource

if TYPE_CHECKING:
    from lightning_fabric import Fabric

METHODS: dict[str, Callable[..., Any]] = {"sweep": sweep, "walker": train_walker}
ANCHORS, VIEWS = 4, 8  # of a level's picture
ENDS = 10_000  # anchors for the distances at the ends of an interval


@torch.inference_mode(False)  # whatever the caller's modes are
@torch.enable_grad()
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
    """Table 1 of the paper for a generator: what it takes, level by level, to cost the same amount of mutual information.

    Args:
        generator: an MLVGM; its weights do not change.
        method: "sweep": critics trained once, and every level's loss as a curve of its noise (:func:`mlviews.impact.sweep.sweep`);
            "walker": the paper's, a learned walker for each level (:func:`mlviews.train_walker`).
        target_loss: plain InfoNCE in nats that each level is moved to; 0.7 is what the paper's code reports as 1.
        out: folder for the checkpoints of a run that can be resumed; None keeps nothing on disk. ``report.save(out)`` adds the report.
        levels: rows of the report: indices, or (method "walker") lists of levels to move together; None: every level alone.
        anchor: law of the anchors; None: N(0, 1) truncated as the generator prefers.
        seed: of everything random.
        device: kind of device; None: where the generator is.
        devices: processes on this machine, one device each; see :func:`mlviews.train_walker`.
        monte_carlo: anchors for the distances.
        options: of the method's function, e.g. ``pairs=64, steps=600, resume=False, progress=False``.

    Raises:
        ValueError: for an unknown method or option, a value out of range, or a checkpoint of a run with other settings.
    """
    if method not in METHODS:
        raise ValueError(f"Invalid method={method!r}: it must be one of {listing(METHODS)}.{did_you_mean(method, METHODS)}")
    parameters = inspect.signature(METHODS[method]).parameters
    allowed = [name for name in parameters if name not in ("generator", "target_loss", "fabric", "out", "levels", "device", "devices")]
    for name in options:
        if name not in allowed:
            raise ValueError(f"Unknown option {name!r} of method {method!r}: it takes {listing(allowed)}.{did_you_mean(name, allowed)}")
    if not isinstance(generator, MLVGM):
        raise ValueError(f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM.")
    target = positive("target_loss", target_loss)
    monte_carlo = integer("monte_carlo", monte_carlo, 2)
    if levels is not None and (isinstance(levels, str) or not isinstance(levels, Sequence) or not levels):
        raise ValueError(f"Invalid levels={levels!r}: give a row each, e.g. [0, 2] or [[1, 2, 3]], or None for every level alone.")
    groups = [(level,) for level in range(len(generator.levels))] if levels is None else [_group(generator, one, method) for one in levels]
    law = Sampler(generator, anchor, seed).law
    where = output_folder(out)
    fabric = launch(generator.freeze(), device or generator.device, devices)
    begin = time.perf_counter()
    impacts = (_by_walker if method == "walker" else _by_sweep)(generator, groups, target, where, fabric, law, seed, monte_carlo, options)
    values = {name: options.get(name, parameters[name].default) for name in allowed if name not in ("anchor", "seed", "monte_carlo")}
    return ImpactReport(
        generator=generator.name,
        image_shape=generator.image_shape,
        levels=tuple((level.name, tuple(level.shape)) for level in generator.levels),
        method=method,
        target_loss=target,
        temperature=values.pop("temperature"),
        pairs=values.pop("pairs"),
        seed=seed,
        impacts=impacts,
        seconds=time.perf_counter() - begin,
        environment=environment(fabric.device),
        options={
            "generator": dict(generator.options), "monte_carlo": monte_carlo, "anchor": dataclasses.asdict(law),
            "processes": fabric.world_size,
            **{name: value for name, value in values.items() if name not in ("resume", "progress", "checkpoint_every")},
        },
        grids={impact.name: _grid(generator, impact, law, seed) for impact in impacts},
    )  # fmt: skip


def _by_walker(
    generator: MLVGM, groups: Sequence[tuple[int, ...]], target: float, out: Path | None, fabric: Fabric, law: TruncatedNormal, seed: int,
    monte_carlo: int, options: dict[str, Any],
) -> tuple[LevelImpact, ...]:  # fmt: skip
    """One walker after the other."""
    found = []
    for levels in groups:
        walker = train_walker(
            generator, levels, target, None if out is None else out / f"walker-{'-'.join(map(str, levels))}",
            anchor=law, seed=seed, monte_carlo=monte_carlo, fabric=fabric, **options,
        )  # fmt: skip
        found.append(
            LevelImpact(
                levels=levels,
                name=_name(generator, levels),
                status=walker.status,
                perturber=walker,
                loss=walker.loss,
                stderr=walker.stderr,
                distances=walker.distances,
                steps=len(walker.history.losses),
                seconds=walker.seconds,
                history=walker.history,
            )
        )
    return tuple(found)


def _by_sweep(
    generator: MLVGM, groups: Sequence[tuple[int, ...]], target: float, out: Path | None, fabric: Fabric, law: TruncatedNormal, seed: int,
    monte_carlo: int, options: dict[str, Any],
) -> tuple[LevelImpact, ...]:  # fmt: skip
    """The curves of all levels, of which those asked for become rows."""
    done = sweep(generator, target, fabric, out, anchor=law, seed=seed, **options)
    truncation = options.get("truncation", 2.0)
    found = []
    for levels in groups:
        swept = done.levels[levels[0]]
        status, perturber, loss, stderr = _outcome(swept, target, truncation)
        ends = None
        if swept.interval is not None:
            low, high = (
                measure_distances(generator, levels, Normal(std, truncation), min(ENDS, monte_carlo), seed, law).mean
                for std in swept.interval
            )
            ends = (low, high)
        found.append(
            LevelImpact(
                levels=levels,
                name=_name(generator, levels),
                status=status,
                perturber=perturber,
                loss=loss,
                stderr=stderr,
                distances=measure_distances(generator, levels, perturber, monte_carlo, seed, law),
                magnitude=swept.std,
                interval=swept.interval,
                distance_interval=ends,
                steps=done.steps,
                seconds=done.seconds / len(done.levels),
                curve=swept.curve,
            )
        )
    return tuple(found)


def _outcome(swept: Swept, target: float, truncation: float | None) -> tuple[str, Normal | Resample, float, float]:
    """Status, perturber, loss and its standard error."""
    curve = swept.curve
    if swept.std is not None:
        loss, stderr = (float(np.interp(np.log(swept.std), np.log(curve.magnitudes), values)) for values in (curve.losses, curve.stderrs))
        return "reached", Normal(swept.std, truncation), loss, stderr
    if curve.resample >= target:
        return "resample", Resample(), curve.resample, curve.resample_stderr
    return "under-used", Normal(HIGH, truncation), curve.losses[-1], curve.stderrs[-1]


def _group(generator: MLVGM, levels: int | Sequence[int], method: str) -> tuple[int, ...]:
    found = check_levels(generator, [levels] if isinstance(levels, int) else levels)
    if len(found) > 1 and method == "sweep":
        raise ValueError(f"Invalid levels={list(found)} for method 'sweep', which moves one level at a time: use method='walker'.")
    return found


def _name(generator: MLVGM, levels: Sequence[int]) -> str:
    return " + ".join(generator.levels[level].name for level in levels)


@torch.no_grad()
def _grid(generator: MLVGM, impact: LevelImpact, law: TruncatedNormal, seed: int) -> Tensor:
    """Anchors and views of them, uint8 ``[anchors, views, C, H, W]``: independent positives, or steps along a walker's path."""
    key = f"{impact.levels[0]}:{impact.levels[-1] + 1}"
    views = 2 if isinstance(impact.perturber, Walker) else VIEWS
    source = MLViewSource(
        generator, {key: impact.perturber}, anchor=law, batch_size=ANCHORS, num_samples=ANCHORS, num_views=views, seed=seed,
        rank=0, world_size=1,
    )  # fmt: skip
    batch = source.batch(0, ANCHORS)
    images = batch.views
    if isinstance(impact.perturber, Walker):  # all its positives are one
        here, there = ([view[level] for level in impact.levels] for view in batch.latents)
        labels = batch.targets if generator.num_classes else None
        images = [
            generator(with_levels(batch.latents[0], impact.levels, [a + share * (b - a) for a, b in zip(here, there, strict=True)]), labels)
            for share in np.linspace(0, 1, VIEWS)
        ]
    return (torch.stack(list(images), dim=1) * 255).round().to(torch.uint8).cpu()
