"""Passes over any number of images, a batch at a time and with a bar: to make them, and to classify them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from mlviews.evaluation.classifier import Classifier
from mlviews.generators import MLVGM

BATCH = 250  # images per forward pass

Advance = Callable[[int], None]
"""Moves a stage's bar on by a number of images."""


@contextmanager
def stage(progress: Progress, name: str, total: int) -> Iterator[Advance]:
    """Show a bar for a part of the work; it is full at the end."""
    task = progress.add_task(name, total=total)
    yield lambda count: progress.advance(task, count)
    progress.update(task, completed=total)


@torch.no_grad()
def render(generator: MLVGM, latents: list[Tensor], labels: Tensor | None, advance: Advance) -> Tensor:
    """Return images ``[N, C, H, W]`` in [0, 1] of any number of latents, and labels if it takes some."""
    images = []
    for rows in torch.split(torch.arange(len(latents[0])), BATCH):
        images.append(generator([z[rows] for z in latents], labels_of(labels, rows)))
        advance(len(rows))
    return torch.cat(images)


def labels_of(labels: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """Return the labels of some rows; None if there are no labels."""
    return None if labels is None else labels[rows]


class Judged(NamedTuple):
    """What the classifier says about ``N`` images."""

    features: Tensor  # [N, 128]
    probabilities: Tensor  # of the classes, [N, 10]

    def first(self, count: int) -> Judged:
        """Return what it says about the first images."""
        return Judged(self.features[:count], self.probabilities[:count])


@torch.no_grad()
def judge(model: Classifier, images: Tensor, advance: Advance) -> Judged:
    """Classify images ``[N, 1, 32, 32]``, uint8 or floats in [0, 1]."""
    features, probabilities = [], []
    for batch in torch.split(images, BATCH):
        if batch.dtype == torch.uint8:
            batch = batch.float() / 255
        feature, logits = model(batch.contiguous(memory_format=torch.channels_last))
        features.append(feature)
        probabilities.append(logits.softmax(1))
        advance(len(batch))
    return Judged(torch.cat(features), torch.cat(probabilities))
