"""The share of positives that keep their anchor's class, level by level: what nats cannot say.

It needs a classifier of the generator's images. For generators of Fashion-MNIST it is trained on the bundled
slice of real images, in seconds; there is none for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.anchors import Sampler
from mlviews.evaluation.classifier import Classifier, train_classifier
from mlviews.evaluation.data import Labelled, bundled_slice
from mlviews.explorer.costs import ClassCurve, ClassShares
from mlviews.generators.base import MLVGM
from mlviews.impact.sweep import SweepOptions
from mlviews.levels import with_levels
from mlviews.perturb import Perturber, Resample
from mlviews.sampling import TruncatedNormal

DATA = "fashion"
"""How the names of the generators begin that were trained on Fashion-MNIST."""

PAIRS, BATCH, EPOCHS = 300, 50, 8
"""Pairs of each share, how many are made at once, and the classifier's passes over the slice."""

_EPOCH = (1 << 32) - 3  # of the counter streams: pairs that no source hands out


def has_classifier(generator: MLVGM) -> bool:
    """Say whether there is a classifier of this generator's images."""
    return generator.name.startswith(DATA) and generator.image_shape == (1, 32, 32)


def train() -> tuple[Classifier, float]:
    """Return a classifier of Fashion-MNIST, and its accuracy on images that it was not trained on."""
    fit, test = (
        Labelled(F.pad(half.images, (2, 2, 2, 2)), half.labels) for half in bundled_slice()
    )  # [2500, 1, 32, 32]
    classifier = train_classifier(fit, epochs=EPOCHS)
    correct = _classes(classifier, test.images.float() / 255) == test.labels
    return classifier, correct.double().mean().item()


@torch.no_grad()
def _classes(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the classes of images, int64 ``[B]``."""
    logits: Tensor = classifier(images)[1]
    return logits.argmax(1)


def measure(
    generator: MLVGM,
    anchor: TruncatedNormal | None,
    magnitudes: Sequence[float],
    sweep: SweepOptions,
    advance: Callable[[float], None] = lambda share: None,
) -> ClassShares:
    """Return the class curves of a generator of Fashion-MNIST.

    Args:
        generator: on the CPU or elsewhere; the classifier goes where it is.
        anchor: the law of the anchors; None: N(0, 1) truncated as the generator prefers.
        magnitudes: standard deviations of the noise, rising.
        sweep: which perturber the magnitudes are of, and its truncation.
        advance: called with the share of the work that is behind.
    """
    classifier, accuracy = train()
    classifier = classifier.to(generator.device)
    draw = Sampler(generator, anchor, seed=0)
    levels = range(len(generator.levels))
    perturbers = [*map(sweep.shift, magnitudes), Resample()]
    counts = torch.zeros(len(levels), len(magnitudes) + 1)
    for start in range(0, PAIRS, BATCH):
        for level in levels:
            indices = range(start, start + BATCH)
            counts[level] += _kept(draw, indices, level, perturbers, classifier)
            advance((start + BATCH * (level + 1) / len(levels)) / PAIRS)
    shares = (counts / PAIRS).tolist()
    curves = {level: ClassCurve(list(magnitudes), shares[level][:-1], shares[level][-1]) for level in levels}
    return ClassShares(generator.name, sweep.perturber, sweep.truncation, PAIRS, accuracy, curves)


def _kept(
    draw: Sampler,
    indices: range,
    level: int,
    perturbers: Sequence[Perturber],
    classifier: Classifier,
) -> Tensor:
    """Return how many pairs keep their class under each perturber, ``[P]``."""
    generator = draw.generator
    anchors, labels = draw(indices, _EPOCH)
    positives = []
    for perturber in perturbers:
        law = perturber.law(draw.law)
        noise = None if law is None else draw.noise(indices, law, _EPOCH, (level,))
        positives.append(with_levels(anchors, (level,), perturber([anchors[level]], noise)))
    first, *classes = (
        _classes(classifier, images)
        for images in generator.decode_views([anchors, *positives], level, labels)
    )
    return torch.stack([(view == first).sum() for view in classes]).cpu()
