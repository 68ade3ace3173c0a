"""The real images that an inverter learns to reconstruct."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mlviews.checks import described
from mlviews.generators.base import MLVGM
from mlviews.images import Shape, as_image_set


class Images(Protocol):
    """Real images by number, as a folder of them can be: what ``images=`` takes besides a tensor."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images on the device, uint8 or float in [0, 1], ``[B, C, H, W]``."""

    def identity(self) -> str:
        """Return a digest that tells these images from others."""


class TensorImages:
    """The images of a tensor, uint8 or float in [0, 1], ``[N, C, H, W]``."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images on the device."""
        rows = torch.tensor(list(numbers), dtype=torch.int64, device=self.images.device)
        return self.images[rows].to(device)

    def identity(self) -> str:
        """Return sixteen hex digits that tell the images from others."""
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        for part in self.images.split(4096):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def checked_images(images: Any, generator: MLVGM) -> Images | None:
    """Return the real images if they fit the generator."""
    if images is None:
        return None
    if generator.num_classes:
        raise ValueError(
            f"Invalid images: generator {generator.name!r} needs the class of every image to reconstruct it. "
            "Load it with one class (label=K of biggan), or leave images out."
        )
    methods = ("__len__", "batch", "identity")
    if isinstance(images, str | Path):
        images = as_image_set(images, Shape(*generator.image_shape, generator.border))
    if isinstance(images, Tensor) or not all(hasattr(images, name) for name in methods):
        images = _checked_tensor(images, tuple(generator.image_shape))
    if len(images) < 10:
        raise ValueError(
            f"Invalid images: there are {len(images)}, and at least 10 are needed; or leave them out."
        )
    real: Images = images
    return real


def _checked_tensor(images: Any, shape: tuple[int, ...]) -> TensorImages:
    """Return a tensor's images, which have this shape and are in [0, 1] unless they are bytes."""
    if not isinstance(images, Tensor) or not _fits(images, shape):
        raise ValueError(
            f"Invalid images, {described(images)}: expected a tensor of uint8, or of floats in [0, 1], of "
            f"shape (N, {', '.join(map(str, shape))})."
        )
    if images.is_floating_point() and len(images):
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"Invalid images from {low:.3g} to {high:.3g}: floats must be in [0, 1]; divide by 255 if "
                "they are gray values."
            )
    return TensorImages(images)


def _fits(images: Tensor, shape: tuple[int, ...]) -> bool:
    """Are these images ``[N, *shape]``, of bytes or floats?"""
    is_image_type = images.dtype == torch.uint8 or images.is_floating_point()
    return is_image_type and images.ndim == 4 and tuple(images.shape[1:]) == shape
