"""The classifier that measures the bundled generators: a small CNN trained on real Fashion-MNIST.

It is meant as a ruler and not as a record: it has about 92 % test accuracy, and is about as confident on real
test images as it is right, so that its confidence on samples can be read against that on real images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.evaluation.data import CLASSES, Labelled
from mlviews.runs.checkpoint import differences
from mlviews.runs.files import digest
from mlviews.runs.modes import plain
from mlviews.weights.files import fit, read_safetensors, write_safetensors

FORMAT = "mlviews.classifier"
SHIFT = 1  # pixels by which training images move at most, in each direction


class Classifier(nn.Module):
    """A convolutional network that tells the classes of Fashion-MNIST."""

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
        """Return features ``[B, 128]`` and class logits ``[B, 10]``.

        Args:
            images: ``[B, 1, 32, 32]`` in [0, 1].
        """
        maps = self.trunk(images * 2 - 1)  # [B, 128, 4, 4]
        features = F.relu(self.dense(maps.flatten(1)))
        return features, self.logits(features)


@plain()
def train_classifier(
    data: Labelled,
    *,
    seed: int = 0,
    epochs: int = 4,
    batch: int = 64,
    lr: float = 2e-3,
    bf16: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Classifier:
    """Train on real images, each shifted at random by up to a pixel, by AdamW with a one-cycle learning rate.

    Args:
        data: uint8 images ``[N, 1, 32, 32]`` and labels ``[N]``.
        seed: of the weights, the order and the shifts.
        epochs: passes over the data.
        batch: images per step.
        lr: the largest learning rate.
        bf16: whether to train in bfloat16 autocast.
        advance: called after every step with its number of images.

    Returns:
        The classifier, in eval mode and frozen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    model.train().to(memory_format=torch.channels_last)
    noise = torch.Generator().manual_seed(seed)
    steps = len(data.images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    padded = F.pad(data.images[:, 0], (SHIFT,) * 4)  # [N, 34, 34]
    for _ in range(epochs):
        order = torch.randperm(len(padded), generator=noise)[: steps * batch]
        for rows in torch.split(order, batch):
            images = _shifted(padded, rows, noise)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _, logits = model(images.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), data.labels[rows]).backward()
            optimizer.step()
            schedule.step()
            advance(batch)
    return model.eval().requires_grad_(False)


def _shifted(padded: Tensor, rows: Tensor, noise: torch.Generator) -> Tensor:
    """Return images as floats in [0, 1], each shifted at random.

    Args:
        padded: uint8 images ``[N, S + 2 SHIFT, S + 2 SHIFT]``.
        rows: the images to take, ``[B]``.
        noise: draws the shifts.

    Returns:
        ``[B, 1, S, S]``.
    """
    side = torch.arange(padded.shape[-1] - 2 * SHIFT)
    down, right = torch.randint(2 * SHIFT + 1, (2, len(rows), 1), generator=noise)
    y, x = down + side, right + side  # [B, S]
    images = padded[rows[:, None, None], y[:, :, None], x[:, None, :]]  # [B, S, S]
    return images[:, None].float() / 255


def save_classifier(model: Classifier, path: Path, settings: Mapping[str, object]) -> None:
    """Write the weights, with how they were trained as metadata."""
    write_safetensors(path, model.state_dict(), {"format": FORMAT, "settings": json.dumps(dict(settings))})


def load_classifier(path: Path) -> tuple[Classifier, dict[str, object]]:
    """Return a saved classifier, in eval mode and frozen, and how it was trained.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if the file is damaged or holds something else.
    """
    tensors, metadata = read_safetensors(path, FORMAT)
    model = fit(Classifier, tensors, path).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last), json.loads(metadata["settings"])


def cached_classifier(
    path: Path,
    data: Labelled,
    *,
    seed: int = 0,
    epochs: int = 4,
    bf16: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[Classifier, dict[str, object]]:
    """Return the classifier in a file, which is trained and saved first if there is none.

    Args:
        path: the file.
        data: images and labels to train on.
        seed, epochs, bf16, advance: as of :func:`train_classifier`.

    Returns:
        The classifier, in eval mode and frozen, and how it was trained.

    Raises:
        WeightsError: if the file is damaged or holds something else.
        ValueError: if the classifier in it was trained on other data, or otherwise; the message says how.
    """
    key = {"seed": seed, "epochs": epochs, "bf16": bf16, "data": digest(data._asdict())}
    if not path.exists():
        begin = time.perf_counter()
        model = train_classifier(data, seed=seed, epochs=epochs, bf16=bf16, advance=advance)
        settings = {
            **key,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        save_classifier(model, path, settings)
    model, stored = load_classifier(path)
    # Files of earlier versions do not tell all of it.
    changed = differences(stored, stored | {name: key[name] for name in key if name in stored})
    if changed:
        raise ValueError(
            f"{path} holds a classifier of {changed[0]}: use another file, or delete it to train anew."
        )
    return model, stored
