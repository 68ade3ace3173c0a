"""Train a small encoder on views alone, by SimCLR, SimSiam or BYOL.

The heads and the losses are lightly's (extra ``lightly``). Our own are the small encoder and the order of
things.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlviews.checks import integer, positive
from mlviews.errors import did_you_mean, listing
from mlviews.evaluation.extras import lightly
from mlviews.evaluation.real_views import RealViews
from mlviews.mi.critics import Residual
from mlviews.source import MLViewSource, pair_layout

RATES = {"simclr": 1.5e-3, "simsiam": 6e-3, "byol": 1.5e-3}
"""The peak learning rate of each method."""

METHODS = tuple(RATES)
"""The names of the methods."""


class Encoder(nn.Module):
    """A small residual network of 0.3 M parameters: images ``[B, 3, 28, 28]`` -> features ``[B, 512]``.

    The images may have any side from 16 on.
    """

    features = 512

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),  # [B, 32, 14, 14], for a side of 28
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),  # [B, 64, 7, 7]
            Residual(2 * width, 4 * width, 2),  # [B, 128, 4, 4]
            nn.AdaptiveAvgPool2d(2),  # [B, 128, 2, 2]
            nn.Flatten(),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images.contiguous(memory_format=torch.channels_last))
        return features


class Learner(nn.Module):
    """An encoder, its method's heads, and the loss on two views.

    Args:
        method: "simclr", "simsiam" or "byol".
        temperature: SimCLR's NT-Xent divides similarities by it; above 0.

    Raises:
        ValueError: for another method, or a temperature that is not positive.
        ModuleNotFoundError: if lightly is not installed.
    """

    def __init__(self, method: str = "simclr", temperature: float = 0.2) -> None:
        super().__init__()
        modules = lightly()
        if method not in METHODS:
            raise ValueError(
                f"Invalid method={method!r}: it must be one of "
                f"{listing(METHODS)}.{did_you_mean(method, METHODS)}"
            )
        temperature = positive("temperature", temperature)
        self.method = method
        self.encoder = Encoder()
        width = Encoder.features
        if method == "simclr":
            self.head = modules.heads.SimCLRProjectionHead(width, 256, 128)
            self.loss = modules.loss.NTXentLoss(temperature)
        elif method == "simsiam":
            self.head = modules.heads.SimSiamProjectionHead(width, 512, 512)
            self.predictor = modules.heads.SimSiamPredictionHead(512, 128, 512)
            self.loss = modules.loss.NegativeCosineSimilarity()
        else:
            self.head = modules.heads.BYOLProjectionHead(width, 512, 128)
            self.predictor = modules.heads.BYOLPredictionHead(128, 512, 128)
            self.loss = modules.loss.NegativeCosineSimilarity()
            self.target = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the loss on two views ``[B, 3, H, W]``, a scalar."""
        views = torch.cat([first, second])  # [2B, 3, H, W]
        projections = self.head(self.encoder(views))  # [2B, D]
        if self.method == "simclr":
            loss: Tensor = self.loss(*projections.chunk(2))
            return loss
        predictions = self.predictor(projections)  # [2B, D]
        with torch.no_grad():
            targets = self.target(views) if self.method == "byol" else projections.detach()
        # Each view's prediction is compared with the other view's target.
        first_prediction, second_prediction = predictions.chunk(2)
        first_target, second_target = targets.chunk(2)
        loss = (self.loss(first_prediction, second_target) + self.loss(second_prediction, first_target)) / 2
        return loss

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update BYOL's moving average; the other methods have none.

        Its momentum rises from 0.9 (trainings are short) to 1.

        Args:
            progress: the share of the training that is over, in [0, 1].
        """
        if self.method != "byol":
            return
        rate = 0.1 * (math.cos(math.pi * progress) + 1) / 2
        online = nn.Sequential(self.encoder, self.head)
        # torch's AveragedModel counts updates, and would not know how long the training is.
        for average, value in zip(self.target.parameters(), online.parameters(), strict=True):
            average.lerp_(value, rate)


def initial(method: str, temperature: float, seed: int) -> Learner:
    """Return an untrained learner whose weights depend on the seed only.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learner(method, temperature)


def train(
    source: MLViewSource | RealViews,
    steps: int,
    method: str = "simclr",
    lr: float | None = None,
    temperature: float = 0.2,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Encoder, list[float]]:
    """Train an encoder on a source's views by AdamW with a one-cycle schedule.

    Args:
        source: a source of two or more views (the first two are used), with ``layout="pair"``; or real
            views.
        steps: the number of optimizer steps; the source goes on to its next epochs as they need.
        method: "simclr", "simsiam" or "byol".
        lr: the peak learning rate; None: the method's own (``RATES``).
        temperature: SimCLR's NT-Xent divides similarities by it; above 0.
        seed: the seed of the encoder's initial weights.
        on_step: called after each step with its number (from 1) and loss.

    Returns:
        The encoder in eval mode, and the loss of every step.

    Raises:
        ValueError: for an unknown method, a value that is not positive, a source that does not give pairs
            of 3 channels, or a loss that is not finite.
    """
    steps = integer("steps", steps, 1)
    if lr is not None:
        lr = positive("lr", lr)
    if source.num_views < 2:
        raise ValueError(
            f"Invalid num_views={source.num_views}: training takes two views; make the source with "
            "num_views=2."
        )
    if source.layout is not pair_layout:
        raise ValueError("Training takes views as they come: make the source with layout='pair'.")
    learner = initial(method, temperature, seed).to(source.device).train()
    if lr is None:
        lr = RATES[method]
    trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    losses = []
    for step, (first, second, *_) in zip(range(1, steps + 1), endless(source), strict=False):
        if first.shape[1] != 3:
            raise ValueError(
                f"The views have {first.shape[1]} channels and the encoder takes 3: use a transform, "
                "e.g. transforms.gray(28)."
            )
        loss = learner(first, second)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        learner.after_step(step / steps)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"The loss is {losses[-1]} at step {step}: lower lr={lr!r}.")
        on_step(step, losses[-1])
    return learner.encoder.eval(), losses


def endless(source: MLViewSource | RealViews) -> Iterator[Any]:
    """Yield the batches of the source's epochs, one epoch after the other."""
    while True:
        yield from source
