"""What an encoder that learned from real images sees in samples, and how far its distribution is off.

No labels are used: the encoder learns by SimCLR (Chen et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from mlviews.evaluation import learner
from mlviews.evaluation.real_views import RealViews
from mlviews.transforms import IMAGENET, Augmentation

_MOST = 60_000  # real images that the components are taken of


class Features(nn.Module):
    """The principal components of an encoder's features.

    Images ``[B, C, H, W]`` in [0, 1] -> ``[B, components]``.
    Over real images they have a mean of 0 and a total variance of 1. They are half whitened: a component that
    varies less counts for less, by its standard deviation and not by its variance.

    Args:
        components: how many; at most the encoder's features, 512.
    """

    center: Tensor  # [512]
    basis: Tensor  # [512, components]
    variances: Tensor  # [components], over real images, largest first

    def __init__(self, components: int) -> None:
        super().__init__()
        self.encoder = learner.Encoder()
        width = learner.Encoder.features
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, components))
        self.register_buffer("variances", torch.zeros(components))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encode(images)
        with torch.autocast(images.device.type, enabled=False):
            components: Tensor = (features.float() - self.center) @ self.basis
        return components

    def encode(self, images: Tensor) -> Tensor:
        """Return the encoder's own features ``[B, 512]`` of images."""
        features: Tensor = self.encoder(normalize(images.expand(-1, 3, -1, -1), *map(list, IMAGENET)))
        return features

    def learn(self, read: Callable[[Tensor], Tensor], count: int, size: int, steps: int, seed: int) -> None:
        """Train the encoder on real images, and take the components of its features.

        Args:
            read: returns images ``[B, C, size, size]``, uint8, of indices ``[B]``.
            count: the number of images.
            size: pixels of a side.
            steps: of the encoder's training, of 64 images each.
            seed: of its weights, the order of the images, and T_x.

        Raises:
            ModuleNotFoundError: if lightly is not installed.
        """
        gentle = Augmentation(size=size, scale=(0.6, 1.0), jitter=(0.4, 0.4, 0.0, 0.0), normalize=IMAGENET)
        encoder, _ = learner.train(RealViews(read, count, gentle, 64, seed), steps, seed=seed)
        self.encoder.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            rows = torch.arange(min(count, _MOST)).split(500)
            self._analyse(torch.cat([self.encode(read(part).float() / 255) for part in rows]))

    def _analyse(self, features: Tensor) -> None:
        """Take the principal components of real images' features ``[N, 512]``."""
        self.center.copy_(features.mean(0))
        centered = features - self.center
        values, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))  # smallest first
        count = len(self.variances)
        deviations = values.flip(0)[:count].clamp_min(1e-12).sqrt()
        total = deviations.sum()
        self.basis.copy_(vectors.flip(1)[:, :count] / (deviations * total).sqrt())
        self.variances.copy_(deviations / total)


class Transport(nn.Module):
    """The optimal transport from samples' features to real images', both taken as Gaussians.

    The squared distance between features and their targets has, up to a factor, the gradient of the Frechet
    distance (Dowson and Landau 1982) between the two Gaussians. The samples' moments are running averages, so
    that they are of many batches, and gradients reach the current one.

    Args:
        variances: of the real images' features ``[D]``, which are uncorrelated and have a mean of 0.
    """

    EVERY = 16
    """Steps between updates of the map."""

    mean: Tensor  # [D], of samples
    second: Tensor  # [D, D], moment of samples
    weight: Tensor  # of all that was noted; it tends to 1
    noted: Tensor  # number of samples
    map: Tensor  # [D, D]
    distance: Tensor  # Frechet's, at the last update

    def __init__(self, variances: Tensor) -> None:
        super().__init__()
        count = len(variances)
        self.variances = variances
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("second", torch.zeros(count, count))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("noted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("map", torch.eye(count))
        self.register_buffer("distance", torch.zeros((), dtype=torch.float64))

    def targets(self, features: Tensor) -> Tensor:
        """Return the place ``[B, D]`` that each sample's features move to; no gradient goes through it."""
        return (features.detach() - self.mean / self.weight) @ self.map.T

    @torch.no_grad()
    def note(self, features: Tensor, kept: float) -> None:
        """Update the samples' moments by a batch ``[B, D]``; the averages keep a share of what they were."""
        self.noted += len(features)
        self.weight.lerp_(torch.ones(()), 1 - kept)
        self.mean.lerp_(features.mean(0), 1 - kept)
        self.second.lerp_(features.T @ features / len(features), 1 - kept)

    @torch.no_grad()
    def update(self) -> None:
        """Compute the map and the distance, unless the samples are too few for a covariance."""
        if self.noted < 4 * len(self.variances):
            return
        mean = self.mean / self.weight
        covariance = (self.second / self.weight - mean[:, None] * mean).double()
        roots = self.variances.double().sqrt()
        values, vectors = torch.linalg.eigh(roots[:, None] * covariance * roots)
        values = values.clamp_min(1e-12)
        self.map.copy_(roots[:, None] * (vectors / values.sqrt() @ vectors.T) * roots)
        spread = self.variances.sum() + covariance.trace() - 2 * values.sqrt().sum()
        self.distance.copy_(mean.double().square().sum() + spread)
