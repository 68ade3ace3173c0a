"""Real Fashion-MNIST images for the benchmarks, and the classifier that judges by them."""

from __future__ import annotations

from pathlib import Path

import torch

from mlviews.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mlviews.evaluation.data import Labelled, bundled_slice, load_fashion_mnist


def train_and_test(data: Path | str | None) -> tuple[Labelled, Labelled]:
    """Return 28-pixel images to fit on and to test on; without a folder, those of the bundled slice."""
    if data is None:
        return bundled_slice()
    return load_fashion_mnist(data, "train", 28), load_fashion_mnist(data, "test", 28)


def all_to_train_on(data: Path | None) -> Labelled:
    """Return the training images, or without a folder all of the bundled slice."""
    if data is not None:
        return load_fashion_mnist(data, "train")
    images, labels = (torch.cat(halves) for halves in zip(*bundled_slice(), strict=True))
    return Labelled(images, labels)


def classifier_of(data: Path, path: Path) -> Classifier:
    """Return the classifier of a file, which is trained on real images first if there is none."""
    if not path.exists():
        save_classifier(train_classifier(load_fashion_mnist(data, "train")), path, {"seed": 0, "epochs": 4})
    return load_classifier(path)[0]
