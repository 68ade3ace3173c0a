"""The classifier that measures the bundled generators: a small CNN trained on real Fashion-MNIST.

It is meant as a ruler and not as a record: about 92 % test accuracy, and about as confident on real test images as it
is right, so that its confidence on samples can be read against that on real images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.evaluation.data import CLASSES, Labelled
from mlviews.weights.files import fit, read_safetensors, write_safetensors

FORMAT = "mlviews.classifier"
SHIFT = 1  # pixels by which training images move at most, in each direction


class Classifier(nn.Module):
    """Images ``[B, 1, 32, 32]`` in [0, 1] -> features ``[B, 128]`` and class logits ``[B, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.dense = nn.Linear(128 * 16, 128)
        self.logits = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.dense(self.trunk(images * 2 - 1).flatten(1)))
        return features, self.logits(features)


def train_classifier(
    data: Labelled, *, seed: int = 0, epochs: int = 4, batch: int = 64, lr: float = 2e-3, bf16: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Classifier:  # fmt: skip
    """Train on real images, each shifted at random by up to a pixel; Adam with a one-cycle learning rate.

    Args:
        data: uint8 images ``[N, 1, 32, 32]`` and labels.
        seed: of the weights, the order and the shifts.
        epochs: passes over the data.
        batch: images per step.
        lr: the largest learning rate.
        bf16: bfloat16 autocast.
        advance: called after every step with its number of images.

    Returns:
        The classifier, in eval mode and frozen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    noise = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    steps = len(data.images) // batch
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.2)
    size = data.images.shape[-1]
    padded, side = F.pad(data.images[:, 0], (SHIFT,) * 4), torch.arange(size)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(padded), generator=noise)[: steps * batch], batch):
            down, right = torch.randint(2 * SHIFT + 1, (2, batch, 1), generator=noise)
            images = padded[rows[:, None, None], (down + side)[:, :, None], (right + side)[:, None, :]][:, None].float() / 255
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(images.contiguous(memory_format=torch.channels_last))[1]
            optimiser.zero_grad()
            F.cross_entropy(logits.float(), data.labels[rows]).backward()
            optimiser.step()
            schedule.step()
            advance(batch)
    return model.eval().requires_grad_(False)


def save_classifier(model: Classifier, path: Path, settings: dict[str, object]) -> None:
    """Write the weights, with how they were trained as metadata."""
    write_safetensors(path, model.state_dict(), {"format": FORMAT, "settings": json.dumps(settings)})


def load_classifier(path: Path) -> tuple[Classifier, dict[str, object]]:
    """A saved classifier, in eval mode and frozen, and how it was trained.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if the file is damaged or holds something else.
    """
    tensors, metadata = read_safetensors(path, FORMAT)
    model = fit(Classifier, tensors, path).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last), json.loads(metadata["settings"])
