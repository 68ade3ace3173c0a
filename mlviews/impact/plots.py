"""The pictures of an impact report, for screen and print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from torch import Tensor

from mlviews.impact.report import OVER_USED, ImpactReport, LevelImpact, digits
from mlviews.viz import mosaic, save_figure

# Okabe and Ito's colours, which the colour-blind can tell apart; each has a shape or a dash of its own as well.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"
STYLE: dict[Any, Any] = {
    "font.size": 13, "axes.titlesize": 13, "figure.titlesize": 14, "legend.fontsize": 12, "legend.frameon": False, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.alpha": 0.25, "lines.linewidth": 2,
    "text.parse_math": False,  # names are not formulas
}  # fmt: skip
MARKS = {"over-used": ("v", RED), "balanced": ("o", BLUE), "weak": ("s", GREY), "under-used": ("^", GREY)}
TILE = 64  # pixels of a view's side, about


def draw(report: ImpactReport, folder: Path) -> dict[Path, str]:
    """Write the pictures that the report has figures for: paths and captions, in the order to show them."""
    drawn: dict[str, Callable[[ImpactReport], tuple[Figure, str]]] = {"magnitude": _magnitude}
    if any(impact.name in report.grids for impact in report.impacts):
        drawn["views"] = _views
    if any(impact.curve for impact in report.impacts):
        drawn["curves"] = _curves
    if any(impact.history for impact in report.impacts):
        drawn["dynamics"] = _dynamics
    drawn["distances"] = _distances
    found = {}
    with matplotlib.rc_context(STYLE):
        for name, make in drawn.items():
            figure, caption = make(report)
            found[save_figure(figure, folder / f"{name}.png")] = caption
    return found


def _magnitude(report: ImpactReport) -> tuple[Figure, str]:
    many = len(report.impacts) > 8
    figure = Figure(figsize=(min(max(8, 3 + 1.2 * len(report.impacts)), 13), 5.2 + many), layout="constrained")
    axis = figure.subplots()
    axis.set_yscale("log", nonpositive="clip")
    for x, impact in enumerate(report.impacts):
        found, (marker, color) = impact.distances, MARKS[impact.verdict]
        hollow = impact.verdict == "under-used"
        axis.plot([x - 0.28, x + 0.28], [found.prior] * 2, color="black", linewidth=1.5)
        axis.plot([x - 0.28, x + 0.28], [found.prior * OVER_USED] * 2, color="black", linewidth=1.5, linestyle=":")
        axis.errorbar(x, found.mean, found.std, color=color, marker=marker, markersize=10, capsize=5, mfc="white" if hollow else color)
        label = f"{'≥ ' if hollow else ''}{digits(found.mean)}"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(label, (x, found.mean + found.std), (0, 10), textcoords="offset points", ha="center", bbox=behind)
    axis.plot([], [], color="black", linewidth=1.5, label="distance of two draws")
    axis.plot([], [], color="black", linewidth=1.5, linestyle=":", label=f"{OVER_USED:.0%} of it: over-used below")
    for verdict, (marker, color) in MARKS.items():
        hollow = verdict == "under-used"
        label = {"under-used": "under-used: at least this far", "weak": "weak: farther than a fresh draw"}.get(verdict, verdict)
        axis.plot([], [], marker, color=color, markersize=10, mfc="white" if hollow else color, label=label)
    axis.set_xticks(range(len(report.impacts)), [f"{impact.key}\n{impact.name}" for impact in report.impacts], rotation=45 * many)
    axis.set(xlim=(-0.6, len(report.impacts) - 0.4), xlabel="level", ylabel="L2 distance of positive from anchor")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.08)  # room for the topmost figure
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.grid(axis="x", visible=False)
    figure.suptitle(f"How far each level moves for an InfoNCE of {report.target_loss:.3g} nats")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, (
        f"Mean distance that brings the loss to {report.target_loss:.3g} nats, level by level (log scale; bars: standard deviation over "
        "anchors). Lines mark the distance between two independent draws of the level, and the share of it below which a level counts "
        "as over-used."
    )


def _panels(report: ImpactReport, height: float, most: int) -> tuple[Figure, list[Axes]]:
    """One panel per impact, with its title; panels left over stay empty."""
    count = len(report.impacts)
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(8, min(11, 5.5 * columns)), height * rows + 1.1), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.axis("off")
    for axis, impact in zip(axes[:count], report.impacts, strict=True):
        axis.set_title(_title(impact), loc="left")
    return figure, axes[:count]


def _curves(report: ImpactReport) -> tuple[Figure, str]:
    figure, axes = _panels(report, 3.3, 2)
    curves = [impact.curve for impact in report.impacts if impact.curve]
    top = 1.08 * max(report.target_loss, *(max(*curve.losses, curve.resample) for curve in curves))
    edge = 2.2 * max(curve.magnitudes[-1] for curve in curves)  # where the fresh draw stands
    low = 0.8 * min(curve.magnitudes[0] for curve in curves)
    for axis, impact in zip(axes, report.impacts, strict=True):
        for other in curves:
            axis.plot(other.magnitudes, other.monotone, color="0.85", linewidth=1.2)
        if impact.curve:
            curve = impact.curve
            axis.plot(curve.magnitudes, curve.monotone, color=BLUE)
            axis.errorbar(curve.magnitudes, curve.losses, curve.stderrs, fmt="o", color=BLUE, markersize=4, capsize=2, linewidth=1)
            axis.errorbar(edge, curve.resample, curve.resample_stderr, fmt="s", color=GREEN, markersize=7, capsize=3)
        axis.axhline(report.target_loss, color=RED, linestyle="--", linewidth=1.5)
        if impact.magnitude is not None and impact.status == "reached":
            bounds = impact.interval or (impact.magnitude, impact.magnitude)
            axis.axvspan(*bounds, color=RED, alpha=0.18, linewidth=0)
            axis.plot(impact.magnitude, report.target_loss, "D", color=RED, markersize=8, mec="white")
            text, where = f"σ = {digits(impact.magnitude)}", (impact.magnitude, report.target_loss)
            axis.annotate(text, where, (-8, 7), textcoords="offset points", ha="right", color=RED)
        axis.set_xscale("log")
        axis.axvline(edge / 1.45, color="0.8", linewidth=1)
        ticks = [tick for power in range(-6, 6) for tick in (10.0**power, 3 * 10.0**power) if low <= tick <= edge / 2]
        axis.set_xticks([*ticks, edge], [*(f"{tick:g}" for tick in ticks), "fresh\ndraw"])
        axis.set(xlim=(low, edge * 1.4), ylim=(-0.02 * top, top))
        axis.minorticks_off()
    for axis in axes:
        axis.set(xlabel="standard deviation σ of the perturbation", ylabel="InfoNCE, nats")
        axis.label_outer()
    handles = [
        axes[0].plot([], [], color=BLUE, marker="o", markersize=4, label="this level, ± standard error")[0],
        axes[0].plot([], [], color="0.85", linewidth=1.2, label="other levels")[0],
        axes[0].plot([], [], "s", color=GREEN, markersize=7, label="fresh draw")[0],
        axes[0].plot([], [], color=RED, linestyle="--", linewidth=1.5, marker="D", label="target, and σ with 95% interval")[0],
    ]
    figure.suptitle(f"Loss against the magnitude of the perturbation, {report.generator}")
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, (
        "Loss of each level against the standard deviation of the noise it is moved by. The curve through the measurements may only rise; "
        "it meets the target at the level's σ. Right edge: the loss when the level is fresh draw."
    )


def _dynamics(report: ImpactReport) -> tuple[Figure, str]:
    impacts = [impact for impact in report.impacts if impact.history]
    columns = min(len(impacts), 4)
    bands = -(-len(impacts) // columns)
    figure = Figure(figsize=(max(8, min(11, 5.5 * columns)), 4.6 * bands + 1.1), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    histories = [impact.history for impact in impacts if impact.history]
    # The first steps stand far above all that matters later.
    top = max([2.5 * report.target_loss, *(1.1 * loss for history in histories for loss in history.losses[history.warmup :])])
    for place in range(bands * columns):
        band, column = divmod(place, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        if place >= len(impacts) or (history := impacts[place].history) is None:
            above.axis("off")
            below.axis("off")
            continue
        steps = np.arange(1, len(history.losses) + 1)
        above.plot(steps, history.losses, color=BLUE, alpha=0.3, linewidth=0.8)
        above.plot(steps[-len(history.smoothed) :], history.smoothed, color=BLUE)
        above.axhline(report.target_loss, color=RED, linestyle="--", linewidth=1.5)
        above.set(ylim=(0, top), xticklabels=[])
        above.set_title(_title(impacts[place]), loc="left", wrap=True)
        below.plot(steps[-len(history.distances) :], history.distances, color=GREEN)
        below.axhline(impacts[place].distances.prior, color="black", linestyle=":", linewidth=1.5)
        below.set(ylim=(0, None), xlabel="step")
        for axis in (above, below):
            axis.axvspan(0, history.warmup, color="0.92", linewidth=0)
            axis.set_xlim(0, len(history.losses))
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("InfoNCE, nats")
        axes[2 * band + 1, 0].set_ylabel("L2 distance")
    first = axes[0, 0]
    handles = [
        first.plot([], [], color=BLUE, alpha=0.3, linewidth=0.8, label="loss of each step")[0],
        first.plot([], [], color=BLUE, label="smoothed")[0],
        first.plot([], [], color=RED, linestyle="--", linewidth=1.5, label="target")[0],
        first.plot([], [], color=GREEN, label="mean distance")[0],
        first.plot([], [], color="black", linestyle=":", linewidth=1.5, label="distance of two draws")[0],
        first.fill_between([], [], color="0.92", label="warm-up: critic alone"),
    ]
    figure.suptitle(f"The game between critic and walker, {report.generator}")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, (
        "The critic brings the loss down while the walker stands still (warm-up); then the walker raises it by moving farther, and waits "
        f"at the target for the critic to follow. Losses above {top:.2g} nats, of the first steps, are cut off."
    )


def _distances(report: ImpactReport) -> tuple[Figure, str]:
    figure, axes = _panels(report, 2.6, 4)
    for axis, impact in zip(axes, report.impacts, strict=True):
        found = impact.distances
        axis.stairs(np.array(found.counts) / max(found.count, 1), found.edges, fill=True, color=BLUE, alpha=0.35)
        axis.axvline(found.mean, color=BLUE)
        axis.axvline(found.prior, color="black", linestyle=":", linewidth=1.5)
        axis.set(xlim=(0, 1.05 * max(found.edges[-1], found.prior)), yticks=[])
        axis.grid(visible=False)
    for axis in axes:
        axis.set_xlabel("L2 distance")
    handles = [
        axes[0].fill_between([], [], color=BLUE, alpha=0.35, label="anchors"),
        axes[0].plot([], [], color=BLUE, label="mean")[0],
        axes[0].plot([], [], color="black", linestyle=":", linewidth=1.5, label="distance of two draws")[0],
    ]
    figure.suptitle("Distances over anchors: how evenly a level's perturbation treats them")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, (
        f"Distribution of the distance over {max(impact.distances.count for impact in report.impacts):,} anchors (height: share of them), "
        "with the distance between two independent draws for comparison."
    )


def _views(report: ImpactReport) -> tuple[Figure, str]:
    """Pixel by pixel: axes have the size of the mosaics, so that nothing is resampled."""
    dpi, gap, head = 110, 26, 34
    blocks = [(impact, _block(report.grids[impact.name])) for impact in report.impacts if impact.name in report.grids]
    width, height = max(block.shape[1] for _, block in blocks), max(block.shape[0] for _, block in blocks)
    columns = 2 if len(blocks) > 1 and 2 * width + 3 * gap <= 1400 else 1
    rows = -(-len(blocks) // columns)
    size = (columns * (width + gap) + gap, head + rows * (head + height + gap))
    figure = Figure(figsize=(size[0] / dpi, size[1] / dpi))
    for place, (impact, block) in enumerate(blocks):
        row, column = divmod(place, columns)
        left, top = gap + column * (width + gap), head + row * (head + height + gap) + head
        bottom = size[1] - top - block.shape[0]
        axis = figure.add_axes((left / size[0], bottom / size[1], block.shape[1] / size[0], block.shape[0] / size[1]))
        axis.imshow(block.numpy(), interpolation="nearest")
        axis.axis("off")
        axis.set_title(f"{_title(impact)}: {impact.verdict}", loc="left", pad=4)
    walked = report.method == "walker"
    kind = "steps on the walker's way" if walked else "positives"
    figure.suptitle(f"Anchor | {kind}: one level moved, the others fixed", x=gap / size[0], ha="left", y=1 - 10 / size[1])
    return figure, (
        "Anchors (first column) and what differs from them in one level only, "
        + ("in equal steps to where the walker takes it" if walked else "moved by the perturber of the table, each time by other noise")
        + ": what the level decides, and what its budget buys."
    )


def _block(grid: Tensor) -> Tensor:
    """Views ``uint8 [anchors, views, C, H, W]`` as one picture ``[H', W', 3]``, anchors set apart, each about ``TILE`` pixels wide."""
    images = grid.flatten(0, 1).float() / 255
    side = images.shape[-1]
    if side > 1.5 * TILE:
        images = F.interpolate(images, scale_factor=TILE / side, mode="bilinear", antialias=True)
    else:
        times = max(1, round(TILE / side))
        images = images.repeat_interleave(times, -1).repeat_interleave(times, -2)
    pictures = images.unflatten(0, grid.shape[:2])
    anchors, positives = mosaic([[row[0]] for row in pictures], 2), mosaic([list(row[1:]) for row in pictures], 2)
    return torch.cat([anchors, torch.ones(len(anchors), 8, 3), positives], 1)


def _title(impact: LevelImpact) -> str:
    return f"level {impact.key} ({impact.name})"
