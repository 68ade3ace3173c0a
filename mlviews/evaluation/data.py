"""Real labelled images to evaluate on: the bundled slice of Fashion-MNIST's test set, or the full data set from disk."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer, path_of
from mlviews.zoo import FOLDER

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Labelled(NamedTuple):
    """Images ``[N, C, H, W]`` (uint8, or float in [0, 1]) and their classes ``[N]`` (int64)."""

    images: Tensor
    labels: Tensor


def read_idx(path: Path) -> Tensor:
    """An idx file (LeCun's format, gzipped or not) of unsigned bytes as a uint8 tensor of its shape.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not such a file, or shorter than its header says.
    """
    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{rank}I", data, 4)
        if zero or kind != 8:
            raise ValueError("no idx header for unsigned bytes")
        values = np.frombuffer(data, np.uint8, count=int(np.prod(shape)), offset=4 + 4 * rank)
    except (struct.error, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes ({error}); download it again.") from error
    return torch.from_numpy(values.reshape(shape).copy())


def load_fashion_mnist(folder: str | Path, split: str, size: int = 32) -> Labelled:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence) from its four idx files.

    Args:
        folder: where ``train-images-idx3-ubyte[.gz]`` and its three companions are.
        split: ``"train"`` (60 000 images) or ``"test"`` (10 000).
        size: side of the images returned; 28-pixel originals are padded with black on all sides, as the bundled
            generators were trained on them.

    Returns:
        uint8 images ``[N, 1, size, size]`` and int64 labels ``[N]``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for another split, a damaged file, or a size below 28.
    """
    stems = {"train": "train", "test": "t10k"}
    if not isinstance(split, str) or split not in stems:
        raise ValueError(f"Invalid split={split!r}: it must be 'train' or 'test'.")
    size = integer("size", size, 28)
    root = path_of(folder, "folder")
    parts = []
    for part in (f"{stems[split]}-images-idx3-ubyte", f"{stems[split]}-labels-idx1-ubyte"):
        candidates = [root / part, root / f"{part}.gz"]
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise FileNotFoundError(
                f"No {part}[.gz] in {folder}. It holds none of Fashion-MNIST's idx files: they come with Debian's package "
                f"dataset-fashion-mnist, or from https://github.com/zalandoresearch/fashion-mnist."
            )
        parts.append(read_idx(found))
    images, labels = parts
    before = (size - 28) // 2
    after = size - 28 - before
    return Labelled(F.pad(images[:, None], (before, after, before, after)), labels.long())


SLICE = FOLDER / "fashion_mnist_slice.npz"


def bundled_slice() -> tuple[Labelled, Labelled]:
    """5 000 images of Fashion-MNIST's test set (MIT licence) that come with the package: half to fit probes on, half to test.

    Each half holds 250 images of each class, in the order of the data set. No bundled generator has seen any of them.

    Returns:
        Two sets of uint8 images ``[2500, 1, 28, 28]`` and int64 labels ``[2500]``.
    """
    with np.load(SLICE) as file:
        images, labels = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()
    half = len(labels) // 2
    return Labelled(images[:half], labels[:half]), Labelled(images[half:], labels[half:])


def make_slice(folder: str | Path, per_class: int = 250) -> None:
    """Write the bundled slice from the data set's idx files: ``python -m mlviews.evaluation.data FOLDER``."""
    images, labels = load_fashion_mnist(folder, "test", 28)
    own = torch.stack([torch.nonzero(labels == c)[: 2 * per_class, 0] for c in range(len(CLASSES))])
    rows = torch.cat([half.flatten().sort().values for half in own.split(per_class, dim=1)])
    np.savez_compressed(SLICE, images=images[rows, 0].numpy(), labels=labels[rows].numpy().astype(np.uint8))


if __name__ == "__main__":
    make_slice(sys.argv[1])
