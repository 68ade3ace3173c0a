"""Pictures of samples, of levels that move, of reconstructions, and of the nearest training images."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from mlviews import sampling
from mlviews.generators import MLVGM
from mlviews.viz import mosaic, save_figure
from mlviews.zoo.quality.batches import labels_of
from mlviews.zoo.quality.figures import SHIFT


def _save_doubled(rows: list[list[Tensor]], path: Path) -> None:
    """Write rows of images as a grid, at twice their size."""
    imsave(path, mosaic(rows).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


def draw_samples(images: Tensor, path: Path) -> None:
    """Write 160 samples in their order."""
    _save_doubled([list(row) for row in images[:160].split(16)], path)


def draw_levels(
    generator: MLVGM,
    anchors: list[Tensor],
    seed: int,
    path: Path,
    positives: int = 8,
    resample: bool = False,
    labels: Tensor | None = None,
) -> None:
    """Draw three anchors (first column), each with positives that move one level only.

    The picture has a block of three rows for each level.

    Args:
        generator: makes the images.
        anchors: their latents; the first three are drawn.
        seed: of the noise.
        path: the file to write.
        positives: of each anchor.
        resample: whether the level is drawn anew, and not moved by N(0, 1).
        labels: of the anchors, for a class-conditional generator.
    """
    count = 3
    chosen = [z[:count] for z in anchors]
    classes = labels_of(labels, slice(count))
    law = sampling.TruncatedNormal(1.0, generator.truncation) if resample else SHIFT
    moved = []
    for view in range(1, positives + 1):
        noise = generator.sample_noise(range(count), law, seed, view=view)
        moved.append(noise if resample else [z + w for z, w in zip(chosen, noise, strict=True)])

    depth = len(generator.levels)
    figure = Figure(figsize=(6.4, 2.1 * depth), layout="constrained")
    axes = figure.subplots(depth, 1, squeeze=False)[:, 0]
    for index, (level, ax) in enumerate(zip(generator.levels, axes, strict=True)):
        views = [generator(chosen, classes)]
        for latents in moved:
            views.append(generator([*chosen[:index], latents[index], *chosen[index + 1 :]], classes))
        rows = [[view[row] for view in views] for row in range(count)]
        ax.imshow(mosaic(rows).numpy(), interpolation="nearest")
        ax.axvline(generator.image_shape[-1] + 1, color="tab:red", linewidth=1.5)
        ax.set_ylabel(f"level {index} ({level.name})", fontsize=9)
        ax.set(xticks=[], yticks=[])
    how = "drawn anew" if resample else "moved by N(0, 1), truncated at 2"
    axes[0].set_title(f"anchor | positives: this level alone {how}", fontsize=9)
    save_figure(figure, path)


def draw_reconstructions(generator: MLVGM, images: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Draw real test images, each above its reconstructions.

    The first is from all levels, the next ones from ever fewer first levels, with the rest drawn anew.
    """
    batch = images[:16].float() / 255
    labels = labels_of(labels, slice(16))
    latents = generator.encode_labelled(batch, labels)
    fresh = generator.sample_latents(range(len(batch)))
    rows = [list(batch)]
    for first in range(len(latents), 0, -1):
        rows.append(list(generator([*latents[:first], *fresh[first:]], labels)))
    _save_doubled(rows, path)


def draw_nearest(queries: Tensor, matches: Tensor, distances: Tensor, path: Path) -> None:
    """Draw samples above their nearest training images, in their order."""
    figure = Figure(figsize=(0.85 * len(queries), 2.1), layout="constrained")
    axes = figure.subplots(2, len(queries))
    for column, (query, match, distance) in enumerate(zip(queries, matches, distances.tolist(), strict=True)):
        for ax, image in zip(axes[:, column], (query, match), strict=True):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"{distance:.2f}", fontsize=8)
    axes[0, 0].set_ylabel("sample", fontsize=8)
    axes[1, 0].set_ylabel("nearest", fontsize=8)
    save_figure(figure, path)
