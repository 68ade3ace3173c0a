"""The pictures of a measurement, for screen and print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from torch import Tensor

from mlviews.impact.figures import OVER_USED, Curve, History, LevelImpact, Measurement, digits
from mlviews.viz import mosaic, save_figure

# Okabe and Ito's colors, which the color-blind can tell apart; each has a shape or a dash of its own as well.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "figure.titlesize": 14,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2,
    "text.parse_math": False,  # names are not formulas
}
MARKS = {"over-used": ("v", RED), "balanced": ("o", BLUE), "weak": ("s", GREY), "under-used": ("^", GREY)}
LEGEND_LABELS = {"under-used": "under-used: at least this far", "weak": "weak: farther than a fresh draw"}
PRIOR_LINE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.5}
TARGET_LINE: dict[str, Any] = {"color": RED, "linestyle": "--", "linewidth": 1.5}
TILE = 64  # pixels of a view's side, about

Drawing = Callable[[Measurement], tuple[Figure, str]]


def draw(measurement: Measurement, folder: Path) -> dict[Path, str]:
    """Write the pictures that the measurement has figures for.

    Returns:
        Their paths and captions, in the order to show them.
    """
    drawings: dict[str, Drawing] = {"magnitude": _magnitude}
    if any(impact.name in measurement.grids for impact in measurement.impacts):
        drawings["views"] = _views
    if any(impact.curve for impact in measurement.impacts):
        drawings["curves"] = _curves
    if any(impact.history for impact in measurement.impacts):
        drawings["dynamics"] = _dynamics
    drawings["distances"] = _distances
    captions = {}
    with matplotlib.rc_context(STYLE):
        for name, drawing in drawings.items():
            figure, caption = drawing(measurement)
            captions[save_figure(figure, folder / f"{name}.png")] = caption
    return captions


def _title(impact: LevelImpact) -> str:
    return f"level {impact.key} ({impact.label})"


def _panels(measurement: Measurement, height: float, most: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel per impact; panels left over stay empty.

    Args:
        measurement: the figures.
        height: of a row of panels, in inches.
        most: the largest number of columns.
    """
    count = len(measurement.impacts)
    columns = min(count, most)
    rows = -(-count // columns)
    size = (max(8, min(11, 5.5 * columns)), height * rows + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.axis("off")
    for axis, impact in zip(axes[:count], measurement.impacts, strict=True):
        axis.set_title(_title(impact), loc="left")
    return figure, axes[:count]


# -- how far each level moves ---------------------------------------------------------------------------


def _magnitude(measurement: Measurement) -> tuple[Figure, str]:
    impacts, target = measurement.impacts, measurement.target_loss
    many = len(impacts) > 8
    size = (min(max(8, 3 + 1.2 * len(impacts)), 13), 5.2 + many)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set_yscale("log", nonpositive="clip")
    for x, impact in enumerate(impacts):
        _magnitude_mark(axis, x, impact)
    _magnitude_legend(axis)
    labels = [f"{impact.key}\n{impact.label}" for impact in impacts]
    axis.set_xticks(range(len(impacts)), labels, rotation=45 * many)
    axis.set(xlim=(-0.6, len(impacts) - 0.4), xlabel="level", ylabel="L2 distance of positive from anchor")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.08)  # room for the topmost figure
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.grid(axis="x", visible=False)
    figure.suptitle(f"How far each level moves for an InfoNCE of {target:.3g} nats")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, (
        f"Mean distance that brings the loss to {target:.3g} nats, level by level (log scale; bars: standard "
        "deviation over anchors). Lines mark the distance between two independent draws of the level, and "
        "the share of it below which a level counts as over-used."
    )


def _magnitude_mark(axis: Axes, x: float, impact: LevelImpact) -> None:
    """Draw a level's mean distance, and the lines to compare it with."""
    distances, (marker, color) = impact.distances, MARKS[impact.verdict]
    hollow = impact.verdict == "under-used"
    ends = [x - 0.28, x + 0.28]
    axis.plot(ends, [distances.prior] * 2, color="black", linewidth=1.5)
    axis.plot(ends, [distances.prior * OVER_USED] * 2, **PRIOR_LINE)
    axis.errorbar(
        x,
        distances.mean,
        distances.std,
        color=color,
        marker=marker,
        markersize=10,
        capsize=5,
        mfc="white" if hollow else color,
    )
    axis.annotate(
        f"{'≥ ' if hollow else ''}{digits(distances.mean)}",
        (x, distances.mean + distances.std),
        (0, 10),
        textcoords="offset points",
        ha="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _magnitude_legend(axis: Axes) -> None:
    axis.plot([], [], color="black", linewidth=1.5, label="distance of two draws")
    axis.plot([], [], **PRIOR_LINE, label=f"{OVER_USED:.0%} of it: over-used below")
    for verdict, (marker, color) in MARKS.items():
        face = "white" if verdict == "under-used" else color
        label = LEGEND_LABELS.get(verdict, verdict)
        axis.plot([], [], marker, color=color, markersize=10, mfc=face, label=label)


# -- the sweep's curves ---------------------------------------------------------------------------------


class _Span(NamedTuple):
    """The extent of the axes that all curves share."""

    low: float  # of the magnitudes
    edge: float  # where the fresh draw stands, beyond the magnitudes
    top: float  # of the losses


def _curves(measurement: Measurement) -> tuple[Figure, str]:
    figure, axes = _panels(measurement, 3.3, 2)
    curves = [impact.curve for impact in measurement.impacts if impact.curve]
    span = _Span(
        low=0.8 * min(curve.magnitudes[0] for curve in curves),
        edge=2.2 * max(curve.magnitudes[-1] for curve in curves),
        top=1.08 * max(measurement.target_loss, *(max(*curve.losses, curve.resample) for curve in curves)),
    )
    for axis, impact in zip(axes, measurement.impacts, strict=True):
        _curve(axis, impact, curves, measurement.target_loss, span)
    for axis in axes:
        axis.set(xlabel="standard deviation σ of the perturbation", ylabel="InfoNCE, nats")
        axis.label_outer()
    first = axes[0]
    handles = [
        first.plot([], [], color=BLUE, marker="o", markersize=4, label="this level, ± standard error")[0],
        first.plot([], [], color="0.85", linewidth=1.2, label="other levels")[0],
        first.plot([], [], "s", color=GREEN, markersize=7, label="fresh draw")[0],
        first.plot([], [], **TARGET_LINE, marker="D", label="target, and σ with 95% interval")[0],
    ]
    figure.suptitle(f"Loss against the magnitude of the perturbation, {measurement.generator}")
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, (
        "Loss of each level against the standard deviation of the noise it is moved by. The curve through "
        "the measurements may only rise; it meets the target at the level's σ. Right edge: the loss when "
        "the level is a fresh draw."
    )


def _curve(axis: Axes, impact: LevelImpact, curves: Sequence[Curve], target: float, span: _Span) -> None:
    """Draw the curve of a level before those of all levels, and where it meets the target."""
    for curve in curves:
        axis.plot(curve.magnitudes, curve.monotone, color="0.85", linewidth=1.2)
    if impact.curve:
        _curve_points(axis, impact.curve, span.edge)
    axis.axhline(target, **TARGET_LINE)
    if impact.magnitude is not None and impact.status == "reached":
        sigma = impact.magnitude
        axis.axvspan(*(impact.interval or (sigma, sigma)), color=RED, alpha=0.18, linewidth=0)
        axis.plot(sigma, target, "D", color=RED, markersize=8, mec="white")
        label = f"σ = {digits(sigma)}"
        axis.annotate(label, (sigma, target), (-8, 7), textcoords="offset points", ha="right", color=RED)
    axis.set_xscale("log")
    axis.axvline(span.edge / 1.45, color="0.8", linewidth=1)
    decades = [step * 10.0**power for power in range(-6, 6) for step in (1, 3)]
    ticks = [tick for tick in decades if span.low <= tick <= span.edge / 2]
    axis.set_xticks([*ticks, span.edge], [*(f"{tick:g}" for tick in ticks), "fresh\ndraw"])
    axis.set(xlim=(span.low, span.edge * 1.4), ylim=(-0.02 * span.top, span.top))
    axis.minorticks_off()


def _curve_points(axis: Axes, curve: Curve, edge: float) -> None:
    """Draw a curve, the losses that it goes through, and the loss of a fresh draw at the edge."""
    points: dict[str, Any] = {"fmt": "o", "color": BLUE, "markersize": 4, "capsize": 2, "linewidth": 1}
    fresh: dict[str, Any] = {"fmt": "s", "color": GREEN, "markersize": 7, "capsize": 3}
    axis.plot(curve.magnitudes, curve.monotone, color=BLUE)
    axis.errorbar(curve.magnitudes, curve.losses, curve.stderrs, **points)
    axis.errorbar(edge, curve.resample, curve.resample_stderr, **fresh)


# -- the walkers' games ---------------------------------------------------------------------------------


def _dynamics(measurement: Measurement) -> tuple[Figure, str]:
    target = measurement.target_loss
    games = [(impact, impact.history) for impact in measurement.impacts if impact.history]
    columns = min(len(games), 4)
    bands = -(-len(games) // columns)
    size = (max(8, min(11, 5.5 * columns)), 4.6 * bands + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    # The first steps stand far above all that matters later.
    late_losses = [loss for _, history in games for loss in history.losses[history.warmup :]]
    top = max([2.5 * target, *(1.1 * loss for loss in late_losses)])
    for place in range(bands * columns):
        band, column = divmod(place, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        if place < len(games):
            impact, history = games[place]
            _game(above, below, impact, history, target, top)
        else:
            above.axis("off")
            below.axis("off")
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("InfoNCE, nats")
        axes[2 * band + 1, 0].set_ylabel("L2 distance")
    figure.suptitle(f"The game between critic and walker, {measurement.generator}")
    figure.legend(handles=_game_handles(axes[0, 0]), loc="outside lower center", ncols=3)
    return figure, (
        "The critic brings the loss down while the walker stands still (warm-up); then the walker raises it "
        "by moving farther, and waits at the target for the critic to follow. Losses above "
        f"{top:.2g} nats, of the first steps, are cut off."
    )


def _game(above: Axes, below: Axes, impact: LevelImpact, history: History, target: float, top: float) -> None:
    """Draw a walker's losses above, and its distances below."""
    steps = np.arange(1, len(history.losses) + 1)
    above.plot(steps, history.losses, color=BLUE, alpha=0.3, linewidth=0.8)
    above.plot(steps[-len(history.smoothed) :], history.smoothed, color=BLUE)
    above.axhline(target, **TARGET_LINE)
    above.set(ylim=(0, top), xticklabels=[])
    above.set_title(_title(impact), loc="left", wrap=True)
    below.plot(steps[-len(history.distances) :], history.distances, color=GREEN)
    below.axhline(impact.distances.prior, **PRIOR_LINE)
    below.set(ylim=(0, None), xlabel="step")
    for axis in (above, below):
        axis.axvspan(0, history.warmup, color="0.92", linewidth=0)
        axis.set_xlim(0, len(history.losses))


def _game_handles(axis: Axes) -> list[Any]:
    """Return the legend's entries."""
    return [
        axis.plot([], [], color=BLUE, alpha=0.3, linewidth=0.8, label="loss of each step")[0],
        axis.plot([], [], color=BLUE, label="smoothed")[0],
        axis.plot([], [], **TARGET_LINE, label="target")[0],
        axis.plot([], [], color=GREEN, label="mean distance")[0],
        axis.plot([], [], **PRIOR_LINE, label="distance of two draws")[0],
        axis.fill_between([], [], color="0.92", label="warm-up: critic alone"),
    ]


# -- distances over anchors -----------------------------------------------------------------------------


def _distances(measurement: Measurement) -> tuple[Figure, str]:
    figure, axes = _panels(measurement, 2.6, 4)
    for axis, impact in zip(axes, measurement.impacts, strict=True):
        distances = impact.distances
        shares = np.array(distances.counts) / max(distances.count, 1)
        axis.stairs(shares, distances.edges, fill=True, color=BLUE, alpha=0.35)
        axis.axvline(distances.mean, color=BLUE)
        axis.axvline(distances.prior, **PRIOR_LINE)
        axis.set(xlim=(0, 1.05 * max(distances.edges[-1], distances.prior)), yticks=[])
        axis.grid(visible=False)
    for axis in axes:
        axis.set_xlabel("L2 distance")
    first = axes[0]
    handles = [
        first.fill_between([], [], color=BLUE, alpha=0.35, label="anchors"),
        first.plot([], [], color=BLUE, label="mean")[0],
        first.plot([], [], **PRIOR_LINE, label="distance of two draws")[0],
    ]
    figure.suptitle("Distances over anchors: how evenly a level's perturbation treats them")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    count = max(impact.distances.count for impact in measurement.impacts)
    return figure, (
        f"Distribution of the distance over {count:,} anchors (height: share of them), "
        "with the distance between two independent draws for comparison."
    )


# -- views ----------------------------------------------------------------------------------------------


def _views(measurement: Measurement) -> tuple[Figure, str]:
    """Draw pixel by pixel: axes have the size of the mosaics, so that nothing is resampled."""
    dpi, gap, head = 110, 26, 34  # the last two in pixels: around the mosaics, and above them
    grids = measurement.grids
    blocks = [(impact, _block(grids[impact.name])) for impact in measurement.impacts if impact.name in grids]
    width = max(block.shape[1] for _, block in blocks)
    height = max(block.shape[0] for _, block in blocks)
    columns = 2 if len(blocks) > 1 and 2 * width + 3 * gap <= 1400 else 1
    rows = -(-len(blocks) // columns)
    total_width = columns * (width + gap) + gap
    total_height = head + rows * (head + height + gap)
    figure = Figure(figsize=(total_width / dpi, total_height / dpi))
    for place, (impact, block) in enumerate(blocks):
        row, column = divmod(place, columns)
        left = gap + column * (width + gap)
        top = head + row * (head + height + gap) + head
        bottom = total_height - top - block.shape[0]
        extent = (
            left / total_width,
            bottom / total_height,
            block.shape[1] / total_width,
            block.shape[0] / total_height,
        )
        axis = figure.add_axes(extent)
        axis.imshow(block.numpy(), interpolation="nearest")
        axis.axis("off")
        axis.set_title(f"{_title(impact)}: {impact.verdict}", loc="left", pad=4)
    kind = "positives"
    movement = "moved by the perturber of the table, each time by other noise"
    if any(impact.walked for impact in measurement.impacts):
        kind = "steps on the walker's way"
        movement = "in equal steps to where the walker takes it"
    title = f"Anchor | {kind}: one level moved, the others fixed"
    figure.suptitle(title, x=gap / total_width, ha="left", y=1 - 10 / total_height)
    return figure, (
        f"Anchors (first column) and what differs from them in one level only, {movement}: "
        "what the level decides, and what its budget buys."
    )


def _block(grid: Tensor) -> Tensor:
    """Return views ``uint8 [anchors, views, C, H, W]`` as a picture ``[H', W', 3]``.

    Anchors are set apart, and each view is about ``TILE`` pixels wide.
    """
    images = grid.flatten(0, 1).float() / 255  # [anchors * views, C, H, W]
    side = images.shape[-1]
    if side > 1.5 * TILE:
        images = F.interpolate(images, scale_factor=TILE / side, mode="bilinear", antialias=True)
    else:
        times = max(1, round(TILE / side))
        images = images.repeat_interleave(times, -1).repeat_interleave(times, -2)
    pictures = images.unflatten(0, grid.shape[:2])  # [anchors, views, C, H', W']
    anchors = mosaic([[row[0]] for row in pictures], 2)
    positives = mosaic([list(row[1:]) for row in pictures], 2)
    gap = torch.ones(len(anchors), 8, 3)
    return torch.cat([anchors, gap, positives], 1)
