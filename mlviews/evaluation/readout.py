"""Read out what an encoder learned: a linear probe and kNN on its frozen features of real images.

The linear probe is scikit-learn's, the kNN lightly's (extra ``lightly``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews.evaluation.data import Labelled
from mlviews.evaluation.extras import lightly
from mlviews.transforms import Augmentation

SHARES = (0.01, 0.1, 1.0)
"""The shares of the probe's labels that linear probes are fitted on."""

PENALTIES = (0.003, 0.03, 0.3)
"""The inverse strengths of the penalty that a linear probe chooses from."""


class Scores(NamedTuple):
    """Accuracies in percent on real test images."""

    linear: dict[float, float]  # share of the probe's labels -> top-1 of a linear probe
    knn: float  # top-1 of a cosine kNN (k = 20) with all of the probe's labels


@torch.no_grad()
def embed(encoder: nn.Module | None, images: Tensor, batch: int = 500) -> Tensor:
    """Return the features ``[N, D]`` of real images.

    The encoder gets the images as the presets' T_x makes views: with 3 channels and ImageNet's normalization.

    Args:
        encoder: the network; None returns the pixels themselves, in [0, 1].
        images: uint8 ``[N, C, H, W]``, gray or color.
        batch: the number of images that the encoder sees at once.
    """
    if encoder is None:
        return images.flatten(1).float() / 255
    plain = Augmentation(size=images.shape[-1], scale=None, flip=0.0)
    device = next(encoder.parameters()).device
    features = []
    for rows in images.split(batch):
        pixels = rows.to(device).float() / 255
        views = plain(pixels, range(len(pixels)), seed=0, epoch=0, view=0)  # [batch, 3, H, W]
        features.append(encoder(views).cpu())
    return torch.cat(features)


def evaluate(encoder: nn.Module | None, probe: Labelled, test: Labelled, seed: int = 0) -> Scores:
    """Return the scores of a linear probe and kNN on frozen features (paper, sec. 4).

    The linear probe is a logistic regression on standardised features, its penalty chosen on a fifth of the
    probe's labels held out; smaller shares are the first labels in an order shuffled by the seed, class by
    class.

    Args:
        encoder: a frozen network; None for raw pixels.
        probe: real images and labels to fit the probes on.
        test: real images and labels to score them on.
        seed: the seed of the shuffled order.
    """
    y = probe.labels
    predicted = predict(embed(encoder, probe.images), y, embed(encoder, test.images), seed)

    def top1(classes: Tensor) -> float:
        return 100 * float((classes == test.labels).float().mean())

    return Scores({share: top1(classes) for share, classes in predicted.linear.items()}, top1(predicted.knn))


class Predictions(NamedTuple):
    """The classes ``[N]`` that probes predict."""

    linear: dict[float, Tensor]  # by the share of the labels that a linear probe is fitted on
    knn: Tensor


def predict(
    x: Tensor, y: Tensor, x_test: Tensor, seed: int = 0, shares: Sequence[float] = SHARES
) -> Predictions:
    """Return what linear probes and kNN predict, as :func:`evaluate` fits them.

    Args:
        x: features ``[M, D]`` to fit the probes on.
        y: their classes ``[M]``, from 0 on.
        x_test: features ``[N, D]`` whose classes are predicted.
        seed: the seed of the shuffled order.
        shares: the shares of the labels that linear probes are fitted on.
    """
    knn_predict = lightly().knn_predict
    seed %= 1 << 32  # scikit-learn takes no more
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = [order[y[order] == label] for label in y.unique()]
    linear = {}
    for share in shares:
        rows = torch.cat([members[: max(1, round(share * len(members)))] for members in by_class])
        linear[share] = _linear(x[rows], y[rows], x_test, seed)

    unit, unit_test = nn.functional.normalize(x), nn.functional.normalize(x_test)
    neighbors = knn_predict(
        unit_test, unit.T.contiguous(), y, num_classes=int(y.max()) + 1, knn_k=20, knn_t=0.1
    )
    return Predictions(linear, neighbors[:, 0])


def _linear(x: Tensor, y: Tensor, x_test: Tensor, seed: int) -> Tensor:
    """Return the classes that a linear probe predicts, fitted on features ``[N, D]`` and labels ``[N]``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(penalty: float, features: Any, labels: Any) -> Any:
        regression = LogisticRegression(C=penalty, max_iter=200, tol=1e-3)
        return make_pipeline(StandardScaler(), regression).fit(features, labels)

    features, labels = x.numpy(), y.numpy()
    counts = y.unique(return_counts=True)[1]  # labels of each class
    best = PENALTIES[len(PENALTIES) // 2]
    if counts.min() > 1:  # there are some of each class to fit on, and some to hold out
        held_out = max(len(counts), len(y) // 5)
        fit_x, held_x, fit_y, held_y = train_test_split(
            features, labels, test_size=held_out, random_state=seed, stratify=labels
        )
        scores = {
            penalty: float(fitted(penalty, fit_x, fit_y).score(held_x, held_y)) for penalty in PENALTIES
        }
        best = max(PENALTIES, key=scores.__getitem__)
    return torch.from_numpy(fitted(best, features, labels).predict(x_test.numpy()))
