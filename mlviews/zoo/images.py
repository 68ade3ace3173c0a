"""What the zoo's scripts train on: Fashion-MNIST's idx files, or any folder of images."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mlviews.evaluation.data import load_fashion_mnist
from mlviews.images import FORMATS, Folder, ImageSet, Shape

SIZES = (32, 64)
"""Pixels of a side that the recipes know."""

_LOOKED_AT = 64  # files of a folder, of which one in color makes all of them colored


class TrainingImages(NamedTuple):
    """Images to train a generator on."""

    images: Tensor | ImageSet  # uint8 [N, C, size, size]
    labels: Tensor  # int64 [N]; -1 for images without a class
    channels: int
    border: int  # black pixels on each side
    name: str  # for the weights' provenance


def training_images(data: Path, size: int = SIZES[0], color: bool | None = None) -> TrainingImages:
    """Return the images of a folder, brought to one shape.

    Args:
        data: a folder of images (one folder a class, or flat), or the folder of
            Fashion-MNIST's idx files.
        size: pixels of a side, 32 or 64.
        color: whether they have three channels or one; None: three, unless those that are looked at are gray.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for another size, a folder without images, or idx files in another shape than theirs.
    """
    if size not in SIZES:
        raise ValueError(f"Invalid size={size}: the recipes are for images of 32 or 64 pixels.")
    if any(data.glob("*-ubyte*")):
        if size != SIZES[0] or color:
            raise ValueError(
                f"Invalid size={size} or color for the idx files of {data}: Fashion-MNIST is gray, of 32 "
                "pixels with its border; leave both out, or give a folder of images."
            )
        images, labels = load_fashion_mnist(data, "train", size)
        return TrainingImages(images, labels, 1, 2, f"Fashion-MNIST train, {_count(images)} images")
    folder = Folder(data, Shape(3, size, size))
    if color is None:
        step = max(1, len(folder) // _LOOKED_AT)
        color = any(_is_colored(path) for path in folder.files[::step])
    channels = 3 if color else 1
    folder = Folder(data, Shape(channels, size, size))
    return TrainingImages(folder, folder.labels, channels, 0, f"a folder of {_count(folder)} images")


def _count(images: Sized) -> str:
    """Return how many images there are, in groups of three digits."""
    return f"{len(images):,}".replace(",", " ")


def _is_colored(path: Path) -> bool:
    """Say whether an image's channels differ; a damaged file is told of when it is read for training."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (64, 64))
            pixels = np.asarray(image.convert("RGB"))
    except Exception:
        return False
    return bool((pixels != pixels[..., :1]).any())
