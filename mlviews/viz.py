"""Pictures: views, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mlviews.runs.files import whole
from mlviews.source import MLViewSource
from mlviews.step import Batch, Transform
from mlviews.transforms import Augmentation, unnormalized


def mosaic(rows: Sequence[Sequence[Tensor]], gap: int = 1) -> Tensor:
    """Return one image ``[H, W, 3]`` of rows of images ``[C, h, w]`` in [0, 1], white lines between them.

    Of more than 3 channels the first three are shown, of 2 the first. Images smaller than the largest leave
    the rest of their place white.

    Args:
        rows: the images, row by row.
        gap: the width of the white lines, in pixels.
    """
    height = max(image.shape[-2] for row in rows for image in row)
    width = max(image.shape[-1] for row in rows for image in row)
    columns = max(len(row) for row in rows)
    canvas = torch.ones(3, len(rows) * (height + gap) + gap, columns * (width + gap) + gap)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            place = canvas[:, top : top + image.shape[-2], left : left + image.shape[-1]]
            channels = image[: 3 if len(image) > 2 else 1]  # [3 or 1, h, w]
            place[:] = channels.detach().cpu().clamp(0, 1)
    return canvas.permute(1, 2, 0)


class ViewImages(NamedTuple):
    """Anchors and their positives: images ``[anchors, C, H, W]`` in [0, 1], one tensor per view."""

    generated: list[Tensor]  # before T_x
    # After T_x, without its normalization; None where T_x is not all Augmentations.
    augmented: list[Tensor] | None
    batch: Batch  # what they are of: indices, targets, and the latents of each view


def view_images(source: MLViewSource, anchors: int = 8, views: int = 6) -> ViewImages:
    """Return images of the first anchors of a source's epoch and of their positives, before and after T_x.

    The source stays at its place. Of a view's crops the first is taken; views beyond the source's own get the
    T_x of its last one. Samples are those of the epoch without reuse.

    Args:
        source: a source with any number of views.
        anchors: the number of anchors.
        views: the number of views of each, the anchor included.
    """
    raw = source.replace(
        num_views=views,
        batch_size=anchors,
        num_samples=max(anchors, source.num_samples),  # the order of a pool's samples depends on it
        drop_last=True,
        reuse=1,
        transform=None,
        crops=None,
        rank=0,
        world_size=1,
    )
    batch = raw.batch(0, anchors)
    pipelines = _pipelines(source)
    if pipelines is None:
        return ViewImages(batch.views, None, batch)
    last = len(pipelines) - 1
    augmented = [
        pipelines[min(view, last)](images, batch.indices, seed=raw.seed, epoch=raw.epoch, view=view)
        for view, images in enumerate(batch.views)
    ]
    return ViewImages(batch.views, augmented, batch)


def _pipelines(source: MLViewSource) -> list[Augmentation] | None:
    """Return T_x of each view without its normalization, or None if one of them is no Augmentation."""
    pipelines: list[Augmentation] = []
    for view in sorted(set(source.crops)):
        transform: Transform | None = unnormalized(source.transforms[source.crops.index(view)])
        if not isinstance(transform, Augmentation):
            return None
        pipelines.append(transform)
    return pipelines


def draw_views(
    source: MLViewSource, path: str | Path, anchors: int = 8, views: int = 6, title: str = ""
) -> Path:
    """Write a PNG with one row per anchor: the anchor and its positives, before and after T_x.

    Args:
        source: the source of the views; it stays at its place.
        path: the PNG's path.
        anchors: the number of rows.
        views: the number of columns, the anchor's included.
        title: the text above the picture.

    Returns:
        The PNG's path.

    Raises:
        ValueError: if the path does not end in .png.
    """
    images = view_images(source, anchors, views)
    panels = {"anchor | positives": images.generated}
    if images.augmented is not None:
        panels["the same after T_x"] = images.augmented
    figure = Figure(figsize=(0.85 * views * len(panels) + 0.4, 0.85 * anchors + 0.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, columns) in zip(axes, panels.items(), strict=True):
        rows = [[view[row] for view in columns] for row in range(anchors)]
        axis.imshow(mosaic(rows).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.suptitle(title, fontsize=10, parse_math=False)  # a dollar sign in a file's name is one
    return save_figure(figure, path)


class Panel(NamedTuple):
    """A table of images with a name for every row and column."""

    title: str
    rows: Sequence[Sequence[Tensor]]  # images [C, h, w] in [0, 1], row by row, all of one size
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()


def draw_panels(panels: Sequence[Sequence[Panel]], path: str | Path, title: str = "") -> Path:
    """Write a PNG of panels: tables of images with their rows and columns named.

    Args:
        panels: the panels, row by row.
        path: the PNG's path.
        title: the text above the picture.

    Returns:
        The PNG's path.

    Raises:
        ValueError: if the path does not end in .png.
    """
    width = sum(len(panel.rows[0]) for panel in panels[0])
    height = sum(len(row[0].rows) for row in panels)
    columns = max(len(row) for row in panels)
    figure = Figure(
        figsize=(0.62 * width + 0.7 * columns, 0.64 * height + 0.4 * len(panels) + 0.2), layout="constrained"
    )
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for axis_row, row in zip(axes, panels, strict=True):
        for axis in axis_row[len(row) :]:
            axis.axis("off")
        for axis, panel in zip(axis_row, row, strict=False):
            axis.imshow(mosaic(panel.rows).numpy(), interpolation="nearest")
            height, width = (size + 1 for size in panel.rows[0][0].shape[-2:])  # with the gap
            axis.set_title(panel.title, fontsize=9, parse_math=False)
            axis.xaxis.tick_top()
            columns_named = range(len(panel.column_names))
            axis.set_xticks([(column + 0.5) * width for column in columns_named], panel.column_names)
            axis.set_yticks([(line + 0.5) * height for line in range(len(panel.row_names))], panel.row_names)
            axis.tick_params(length=0, labelsize=7, pad=1)
            axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return save_figure(figure, path)


def draw_loss(losses: Sequence[float], path: str | Path, title: str, chance: float | None = None) -> Path:
    """Write a PNG with the loss of every step and its running mean.

    Args:
        losses: the loss of every step.
        path: the PNG's path.
        title: the text above the picture.
        chance: the loss in nats of an encoder that cannot tell views apart, drawn as a line; None draws none,
            and the loss is then not said to be in nats.

    Returns:
        The PNG's path.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    if chance is not None:
        axis.axhline(chance, color="C3", linestyle=":", label="views not told apart")
    axis.set(xlabel="step", ylabel="loss (nats)" if chance is not None else "loss")
    axis.set_title(title, parse_math=False)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.2)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all, and its folder if it is missing; return the path.

    Raises:
        ValueError: if the path does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Invalid picture {str(path)!r}: its name must end in .png.")
    with whole(path) as part:
        figure.savefig(part, dpi=110, format="png")
    return path
