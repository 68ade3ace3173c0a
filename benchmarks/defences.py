"""The defences that ``purify.py`` attacks: each takes a classifier's images, and none knows of the attack.

A defence has ``logits(classifier, images, *, indices, epoch)``, as :class:`mlviews.Purifier` has, so that
:class:`mlviews.purify.Defended` draws for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torch.nn import functional as F

from mlviews import Purifier, load_generator, sampling
from mlviews.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mlviews.evaluation.data import Labelled
from mlviews.runs.files import sha256
from mlviews.zoo import FOLDER

SIDE = 32  # pixels of the generators' images


class Logits(nn.Module):
    """The logits of the classifier of :mod:`mlviews.evaluation`."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[1]
        return logits


class Plain(nn.Module):
    """No defence, or a fixed filter of the image."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.change = change

    def logits(self, classifier: nn.Module, images: Tensor, **draw: Any) -> Tensor:
        """Return the classifier's logits ``[B, classes]`` of the filtered images."""
        result: Tensor = classifier(images if self.change is None else self.change(images))
        return result

    def copies(self, images: Tensor, **draw: Any) -> Tensor:
        """Return the filtered images, ``[1, B, C, H, W]``."""
        return (images if self.change is None else self.change(images))[None]


class Noise(Plain):
    """Gaussian noise on the pixels, and the mean of so many copies' logits.

    Args:
        std: of the noise, in gray values of 0 to 1.
        samples: copies of an image.
    """

    def __init__(self, std: float, samples: int) -> None:
        super().__init__()
        self.std, self.samples = std, samples
        fields = {
            copy: sampling.Field(SIDE * SIDE, sampling.NOISE, copy, 0, sampling.TruncatedNormal(std))
            for copy in range(1, samples + 1)
        }
        self.plan = sampling.Draw(fields, torch.device("cpu"))

    def copies(
        self, images: Tensor, *, indices: Iterable[int] | Tensor | None = None, epoch: int = 0
    ) -> Tensor:
        """Return noisy images ``[samples, B, 1, 32, 32]``."""
        numbers = range(len(images)) if indices is None else indices
        drawn = self.plan(sampling.as_indices(numbers, images.device), 0, epoch)
        noise = torch.stack([drawn[copy].view_as(images) for copy in range(1, self.samples + 1)])
        return (images + noise).clamp(0, 1)

    def logits(self, classifier: nn.Module, images: Tensor, **draw: Any) -> Tensor:
        """Return the mean logits ``[B, classes]`` of the noisy copies."""
        copies = self.copies(images, **draw)
        votes: Tensor = classifier(copies.flatten(0, 1))
        return votes.view(*copies.shape[:2], -1).mean(dim=0)


class Defence(NamedTuple):
    """A row of the table."""

    make: Callable[[int], Any]  # from the number of copies
    random: bool = True
    trained: bool = False  # whether the classifier is the adversarially trained one
    bare: bool = False  # whether nothing comes before the classifier
    generator: str | None = None


def blur(images: Tensor) -> Tensor:
    """Blur images with a standard deviation of a pixel."""
    return gaussian_blur2d(images, 5, (1.0, 1.0))


def purifier(name: str, random: bool = True, **options: Any) -> Defence:
    """Return a bundled generator's purifier."""
    return Defence(
        lambda samples: Purifier(load_generator(name), samples=samples, **options), random, generator=name
    )


DEFENCES = {
    "none": Defence(lambda samples: Plain(), random=False, bare=True),
    "adversarial training": Defence(lambda samples: Plain(), random=False, trained=True, bare=True),
    "blur": Defence(lambda samples: Plain(blur), random=False),
    "noise": Defence(lambda samples: Noise(0.2, samples)),
    "fashion, autoencoder": purifier("fashion", random=False, mix=0.0),
    "fashion, keep 3": purifier("fashion", keep=3),
    "fashion, keep 2": purifier("fashion", keep=2),
    "fashion, keep 1": purifier("fashion", keep=1),
    "fashion, keep 1, mix 0.5": purifier("fashion", keep=1, mix=0.5),
    "fashion-nvae, autoencoder": purifier("fashion-nvae", random=False, mix=0.0),
    "fashion-nvae, keep 2": purifier("fashion-nvae", keep=2),
    "fashion-nvae, keep 1": purifier("fashion-nvae", keep=1),
    "fashion-nvae, keep 1, mix 0.5": purifier("fashion-nvae", keep=1, mix=0.5),
    "fashion-nvae, keep 0, mix 0.3": purifier("fashion-nvae", keep=0, mix=0.3),
    # DiffPure: noised to the last level or the one above, whose noise is drawn too.
    "fashion-diffusion, keep 4": purifier("fashion-diffusion", keep=4),
    "fashion-diffusion, keep 3": purifier("fashion-diffusion", keep=3),
    # The encoder chooses the label, a step that has no gradient.
    "fashion-semafo, keep 2": purifier("fashion-semafo", keep=2),
}

FILES = {
    "fashion": ("fashion.safetensors", "fashion-inverter.safetensors"),
    "fashion-nvae": ("fashion-nvae.safetensors",),
    "fashion-diffusion": (
        "fashion-diffusion/unet/diffusion_pytorch_model.safetensors",
        "fashion-diffusion/scheduler/scheduler_config.json",
    ),
    "fashion-semafo": ("fashion-semafo.safetensors",),
}
"""The bundled files that a generator's purifier depends on."""


def weights(defence: str) -> dict[str, str]:
    """Return the SHA-256 of the files of a defence's generator, by their paths in the zoo's folder."""
    generator = DEFENCES[defence].generator
    return {} if generator is None else {name: sha256(FOLDER / name) for name in FILES[generator]}


# -- classifiers ---------------------------------------------------------------------------------------------


class Classifiers(NamedTuple):
    """The files of the plain and the adversarially trained classifier."""

    plain: Path
    adversarial: Path

    @classmethod
    def within(cls, folder: Path) -> Classifiers:
        """Return where the files of a working folder are."""
        return cls(folder / "classifier.safetensors", folder / "adversarial.safetensors")


def classifiers(folder: Path, data: Labelled, epochs: int) -> Classifiers:
    """Return the files of the plain and the adversarially trained classifier; train those that are missing.

    Args:
        folder: of the files.
        data: uint8 images ``[N, 1, 32, 32]`` and labels.
        epochs: of both trainings.
    """
    paths = Classifiers.within(folder)
    if not paths.plain.exists():
        save_classifier(train_classifier(data, epochs=epochs), paths.plain, {"epochs": epochs})
    if not paths.adversarial.exists():
        network = train_adversarially(load_classifier(paths.plain)[0], data, epochs)
        settings = {"epochs": epochs, "attack": f"PGD, Linf {_RADIUS:.3f}, 5 steps"}
        save_classifier(network, paths.adversarial, settings)
    return paths


_RADIUS = 16 / 255


def train_adversarially(network: Classifier, data: Labelled, epochs: int, batch: int = 64) -> Classifier:
    """Go on with the training of a classifier, on attacked images alone (Madry et al. 2018).

    Args:
        network: the classifier to start from.
        data: uint8 images ``[N, 1, 32, 32]`` and labels.
        epochs: passes over the data.
        batch: images of a step.
    """
    from torchattacks import PGD

    network.requires_grad_(True)
    model = Logits(network)
    attack = PGD(model, eps=_RADIUS, alpha=_RADIUS / 2.5, steps=5)
    steps = len(data.images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    torch.manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.images))[: steps * batch].split(batch):
            images, labels = data.images[rows].float() / 255, data.labels[rows]
            attacked = attack(images, labels)
            model.train()
            loss = F.cross_entropy(model(attacked), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return network.requires_grad_(False)
