"""Pictures: views, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mlviews.source import MLViewSource
from mlviews.transforms import Augmentation


def mosaic(rows: Sequence[Sequence[Tensor]], gap: int = 1) -> Tensor:
    """One image ``[H, W, 3]`` from rows of images ``[C, h, w]`` in [0, 1], white lines between them.

    Of more than 3 channels the first three are shown, of 2 the first. Smaller images leave the rest of their place white.
    """
    height, width = (max(image.shape[dim] for row in rows for image in row) for dim in (-2, -1))
    canvas = torch.ones(3, len(rows) * (height + gap) + gap, max(map(len, rows)) * (width + gap) + gap)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            seen = image[: 3 if len(image) > 2 else 1]
            canvas[:, top : top + image.shape[-2], left : left + image.shape[-1]] = seen.detach().cpu().clamp(0, 1)
    return canvas.permute(1, 2, 0)


def draw_views(arguments: Mapping[str, Any], path: str | Path, anchors: int = 8, views: int = 6, title: str = "") -> Path:
    """Write a PNG with one row per anchor: the anchor and its positives, before and after T_x.

    Args:
        arguments: of an :class:`MLViewSource`; its number of views and sizes are replaced. Of a view's crops the first is shown.
        path: of the PNG.
        anchors: rows.
        views: columns, the anchor's included.
        title: above the picture.
    """
    own = {"num_views": views, "batch_size": anchors, "num_samples": anchors, "drop_last": True, "transform": None, "crops": None}
    source = MLViewSource(**{**arguments, **own, "rank": 0, "world_size": 1})
    batch = source.batch(0, anchors)
    panels = [("anchor | positives", [[view[row] for view in batch.views] for row in range(anchors)])]
    transform = arguments.get("transform")
    each = list(transform) if isinstance(transform, Sequence) else [transform]
    if crops := arguments.get("crops"):
        each = [each[min(list(crops).index(view), len(each) - 1)] for view in sorted(set(crops))]
    pipelines = [replace(one, normalize=None) for one in each if isinstance(one, Augmentation)]  # normalised pixels are not for eyes
    if len(pipelines) == len(each):
        seen = [
            pipelines[min(view, len(each) - 1)](images, batch.indices, seed=source.seed, epoch=source.epoch, view=view)
            for view, images in enumerate(batch.views)
        ]
        panels.append(("the same after T_x", [[view[row] for view in seen] for row in range(anchors)]))
    figure = Figure(figsize=(0.85 * views * len(panels) + 0.4, 0.85 * anchors + 0.6), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.imshow(mosaic(rows).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def draw_loss(losses: Sequence[float], path: str | Path, title: str, chance: float | None = None) -> Path:
    """Write a PNG with the loss of every step, its running mean, and the loss of an encoder that cannot tell views apart."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    if chance is not None:
        axis.axhline(chance, color="C3", linestyle=":", label="views not told apart")
    axis.set(xlabel="step", ylabel="loss (nats)" if chance is not None else "loss", title=title)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.2)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure, making its folder where there is none."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Invalid picture {str(path)!r}: its name must end in .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
