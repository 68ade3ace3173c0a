"""Train a small encoder on views alone, then ask what it learned: a linear probe and kNN on real, labelled images.

The heads, losses and the kNN are lightly's, the linear probe is scikit-learn's (extra ``lightly``); what is ours is the
small encoder and the order of things.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews.checks import integer
from mlviews.errors import did_you_mean, listing
from mlviews.evaluation.data import Labelled
from mlviews.mi.critics import Residual
from mlviews.source import MLViewSource, pair_layout

RATES = {"simclr": 1.5e-3, "simsiam": 6e-3, "byol": 1.5e-3}  # peak learning rates
METHODS = tuple(RATES)
SHARES = (0.01, 0.1, 1.0)  # of the probe's labels
PENALTIES = (0.003, 0.03, 0.3)  # inverse strengths that the linear probe chooses from


class Encoder(nn.Module):
    """A small residual network: images ``[B, 3, 28, 28]`` (any side from 16 on) -> features ``[B, 512]``; 0.3 M parameters."""

    features = 512

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images.contiguous(memory_format=torch.channels_last))
        return features


class Learner(nn.Module):
    """An encoder, its method's heads, and the loss on two views.

    Args:
        method: "simclr", "simsiam" or "byol".
        temperature: of SimCLR's NT-Xent.

    Raises:
        ValueError: for another method, or a temperature that is not positive.
        ModuleNotFoundError: if lightly is not installed.
    """

    def __init__(self, method: str = "simclr", temperature: float = 0.2) -> None:
        super().__init__()
        lightly = _lightly()
        if method not in METHODS:
            raise ValueError(f"Invalid method={method!r}: it must be one of {listing(METHODS)}.{did_you_mean(method, METHODS)}")
        if not temperature > 0:
            raise ValueError(f"Invalid temperature={temperature!r}: it must be above 0.")
        self.method = method
        self.encoder = Encoder()
        width = Encoder.features
        if method == "simclr":
            self.head = lightly.heads.SimCLRProjectionHead(width, 256, 128)
            self.loss = lightly.loss.NTXentLoss(temperature)
        elif method == "simsiam":
            self.head = lightly.heads.SimSiamProjectionHead(width, 512, 512)
            self.predictor = lightly.heads.SimSiamPredictionHead(512, 128, 512)
            self.loss = lightly.loss.NegativeCosineSimilarity()
        else:
            self.head = lightly.heads.BYOLProjectionHead(width, 512, 128)
            self.predictor = lightly.heads.BYOLPredictionHead(128, 512, 128)
            self.loss = lightly.loss.NegativeCosineSimilarity()
            self.target = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss on two views ``[B, 3, H, W]``, a scalar."""
        z = self.head(self.encoder(torch.cat([first, second])))
        if self.method == "simclr":
            loss: Tensor = self.loss(*z.chunk(2))
            return loss
        p0, p1 = self.predictor(z).chunk(2)
        with torch.no_grad():
            t0, t1 = (self.target(torch.cat([first, second])) if self.method == "byol" else z.detach()).chunk(2)
        loss = (self.loss(p0, t1) + self.loss(p1, t0)) / 2
        return loss

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """BYOL's moving average, its momentum rising from 0.9 (trainings are short) to 1 with the progress in [0, 1]."""
        if self.method == "byol":
            rate = 0.1 * (math.cos(math.pi * progress) + 1) / 2
            online = nn.Sequential(self.encoder, self.head)
            for mean, value in zip(self.target.parameters(), online.parameters(), strict=True):
                mean.lerp_(value, rate)


def train(
    source: MLViewSource,
    steps: int,
    method: str = "simclr",
    lr: float | None = None,
    temperature: float = 0.2,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Encoder, list[float]]:
    """Train an encoder on a source's views: AdamW, one-cycle schedule.

    Args:
        source: of two or more views (the first two are used), with ``layout="pair"``.
        steps: optimiser steps; the source goes on to its next epochs as they need.
        method: "simclr", "simsiam" or "byol".
        lr: peak learning rate; None: the method's own (``RATES``).
        temperature: of SimCLR's NT-Xent.
        seed: of the encoder's initial weights.
        on_step: called after each step with its number (from 1) and loss.

    Returns:
        The encoder in eval mode, and the loss of every step.

    Raises:
        ValueError: for an unknown method, a value that is not positive, or a source that does not give pairs of 3 channels.
    """
    steps = integer("steps", steps, 1)
    if lr is not None and not lr > 0:
        raise ValueError(f"Invalid lr={lr!r}: it must be above 0.")
    if source.num_views < 2:
        raise ValueError(f"Invalid num_views={source.num_views}: training takes two views; make the source with num_views=2.")
    if source.layout is not pair_layout:
        raise ValueError("Training takes views as they come: make the source with layout='pair'.")
    learner = initial(method, temperature, seed).to(source.device).train()
    lr = RATES[method] if lr is None else lr
    optimiser = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps + 1)
    losses = []
    for step, (first, second, *_) in zip(range(1, steps + 1), endless(source), strict=False):
        if first.shape[1] != 3:
            raise ValueError(
                f"The views have {first.shape[1]} channels and the encoder takes 3: use a transform, e.g. transforms.gray(28)."
            )
        loss = learner(first, second)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        learner.after_step(step / steps)
        losses.append(loss.item())
        on_step(step, losses[-1])
    return learner.encoder.eval(), losses


def initial(method: str, temperature: float, seed: int) -> Learner:
    """An untrained learner whose weights depend on the seed only; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learner(method, temperature)


def endless(source: MLViewSource) -> Iterator[Any]:
    """The source's epochs, one after the other."""
    while True:
        yield from source


class Scores(NamedTuple):
    """Accuracies in percent on real test images."""

    linear: dict[float, float]  # share of the probe's labels -> top-1 of a linear probe
    knn: float  # top-1 of a cosine kNN (k = 20) with all of the probe's labels


@torch.no_grad()
def embed(encoder: nn.Module | None, images: Tensor, batch: int = 500) -> Tensor:
    """Features ``[N, D]`` of real images ``[N, 1, H, W]`` (uint8); the pixels themselves if there is no encoder.

    The encoder gets them as the presets' T_x makes views: 3 channels, ImageNet's normalisation.
    """
    from mlviews.transforms import Augmentation

    if encoder is None:
        return images.flatten(1).float() / 255
    whole = Augmentation(size=images.shape[-1], scale=None, flip=0.0)
    device = next(encoder.parameters()).device
    parts = []
    for rows in images.split(batch):
        x = rows.to(device).float() / 255
        parts.append(encoder(whole(x, range(len(x)), seed=0, epoch=0, view=0)).cpu())
    return torch.cat(parts)


def evaluate(encoder: nn.Module | None, probe: Labelled, test: Labelled, seed: int = 0) -> Scores:
    """Linear probe and kNN on frozen features (paper, sec. 4).

    The linear probe is a logistic regression on standardised features, its penalty chosen on a fifth of the probe's
    labels held out; smaller shares are the first ones in an order shuffled by the seed, class by class.

    Args:
        encoder: a frozen network; None for raw pixels.
        probe: real images and labels to fit the probes on.
        test: real images and labels to score them on.
        seed: of the shuffled order.
    """
    seed %= 1 << 32  # scikit-learn takes no more
    lightly = _lightly()
    x, y = embed(encoder, probe.images), probe.labels
    x_test, y_test = embed(encoder, test.images), test.labels
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    linear = {}
    for share in SHARES:
        classes = [order[y[order] == c] for c in y.unique()]
        rows = torch.cat([own[: max(1, round(share * len(own)))] for own in classes])
        linear[share] = _linear(x[rows], y[rows], x_test, y_test, seed)
    unit, unit_test = nn.functional.normalize(x), nn.functional.normalize(x_test)
    predicted = lightly.knn_predict(unit_test, unit.T.contiguous(), y, num_classes=int(y.max()) + 1, knn_k=20, knn_t=0.1)
    return Scores(linear, _percent(predicted[:, 0], y_test))


def _linear(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(penalty: float, features: Any, labels: Any) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=200, tol=1e-3)).fit(features, labels)

    features, labels, classes = x.numpy(), y.numpy(), len(y.unique())
    best = PENALTIES[len(PENALTIES) // 2]
    if len(y) >= 2 * classes:  # some of each class to fit on, some to hold out
        held = max(classes, len(y) // 5)
        fit_x, held_x, fit_y, held_y = train_test_split(features, labels, test_size=held, random_state=seed, stratify=labels)
        best = max(PENALTIES, key=lambda penalty: float(fitted(penalty, fit_x, fit_y).score(held_x, held_y)))
    return 100 * float(fitted(best, features, labels).score(x_test.numpy(), y_test.numpy()))


def _percent(predicted: Tensor, truth: Tensor) -> float:
    return 100 * float((predicted == truth).float().mean())


def _lightly() -> SimpleNamespace:
    """What is used of lightly, or one line that says how to install it."""
    try:
        import sklearn  # noqa: F401 (the linear probe's)
        from lightly import loss
        from lightly.models.modules import heads
        from lightly.utils.benchmarking.knn import knn_predict
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Training and probing an encoder needs {error.name}: pip install 'mlviews[lightly]'.", name=error.name
        ) from None
    return SimpleNamespace(heads=heads, loss=loss, knn_predict=knn_predict)
