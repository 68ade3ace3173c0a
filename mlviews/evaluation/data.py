"""Real labelled images to evaluate on: a bundled slice of Fashion-MNIST's test set, or all from disk."""

from __future__ import annotations

import gzip
import math
import struct
import sys
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer, path_of

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""The names of Fashion-MNIST's classes, by label."""

SLICE = Path(str(files("mlviews"))) / "zoo" / "fashion_mnist_slice.npz"
"""The file of the bundled slice."""

SIDE = 28
"""The side of Fashion-MNIST's images, in pixels."""

_MOST_BYTES = 1 << 28  # of an idx file's values; the largest of Fashion-MNIST has a sixth of it
_FILES = {"train": "train", "test": "t10k"}  # how the names of a split's two idx files begin


class Labelled(NamedTuple):
    """Images ``[N, C, H, W]`` (uint8, or float in [0, 1]) and their classes ``[N]`` (int64)."""

    images: Tensor
    labels: Tensor


def read_idx(path: Path) -> Tensor:
    """Return the content of an idx file (LeCun's format, gzipped or not) of unsigned bytes.

    Returns:
        A uint8 tensor of the shape that the file's header gives.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not such a file, or is shorter than its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            # The header: two zero bytes, the values' type (8: unsigned bytes), the number of sizes, sizes.
            zero, kind, rank = struct.unpack(">HBB", file.read(4))
            if zero or kind != 8 or rank > 4:
                raise ValueError("no idx header for unsigned bytes")
            shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            count = math.prod(shape)
            if count > _MOST_BYTES:
                raise ValueError(f"{count} values are more than the {_MOST_BYTES} that are read")
            content = file.read(count)  # no more is decompressed
    except (struct.error, ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole idx file of unsigned bytes ({error}); download it again."
        ) from error
    if len(content) < count:
        raise ValueError(
            f"{path} is not a whole idx file of unsigned bytes ({len(content)} of {count}); "
            "download it again."
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def load_fashion_mnist(folder: str | Path, split: str, size: int = 32) -> Labelled:
    """Return Fashion-MNIST (Xiao et al. 2017, MIT licence), read from its four idx files.

    Args:
        folder: the folder of ``train-images-idx3-ubyte[.gz]`` and its three companions.
        split: ``"train"`` (60 000 images) or ``"test"`` (10 000).
        size: the side of the images returned. The 28-pixel originals are padded with black on all sides, as
            the bundled generators were trained on them.

    Returns:
        uint8 images ``[N, 1, size, size]`` and int64 labels ``[N]``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for another split, a damaged file, or a size below 28.
    """
    if not isinstance(split, str) or split not in _FILES:
        raise ValueError(f"Invalid split={split!r}: it must be 'train' or 'test'.")
    size = integer("size", size, SIDE)
    root = path_of(folder, "folder")
    images = read_idx(_idx_file(root, f"{_FILES[split]}-images-idx3-ubyte"))  # [N, 28, 28]
    labels = read_idx(_idx_file(root, f"{_FILES[split]}-labels-idx1-ubyte"))  # [N]
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"The images of {root} are {tuple(images.shape)} and their labels {tuple(labels.shape)}: "
            f"Fashion-MNIST's are (N, {SIDE}, {SIDE}) and (N,)."
        )
    before = (size - SIDE) // 2
    after = size - SIDE - before
    return Labelled(F.pad(images[:, None], (before, after, before, after)), labels.long())


def _idx_file(folder: Path, name: str) -> Path:
    """Return the path of an idx file, which may be gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"No {name}[.gz] in {folder}. It holds none of Fashion-MNIST's idx files: they come with Debian's "
        "package dataset-fashion-mnist, or from https://github.com/zalandoresearch/fashion-mnist."
    )


def bundled_slice() -> tuple[Labelled, Labelled]:
    """Return the two halves of a slice of Fashion-MNIST's test set (MIT licence) that comes with the package.

    The first half is for fitting probes, the second for testing them. Each holds 250 images of each class, in
    the order of the data set. No bundled generator has seen any of the 5 000 images.

    Returns:
        Two sets of uint8 images ``[2500, 1, 28, 28]`` and int64 labels ``[2500]``.
    """
    with np.load(SLICE) as arrays:
        images = torch.from_numpy(arrays["images"])[:, None]
        labels = torch.from_numpy(arrays["labels"]).long()
    half = len(labels) // 2
    return Labelled(images[:half], labels[:half]), Labelled(images[half:], labels[half:])


def real_images(folder: str | Path | None = None, labels: int | None = None) -> tuple[Labelled, Labelled]:
    """Return real images to fit probes on, and others to test them on.

    Args:
        folder: the folder of Fashion-MNIST's four idx files; None: the bundled slice.
        labels: the most images to fit on, the first ones; None: all.

    Returns:
        The training set and the test set (of the slice: its halves): uint8 images ``[N, 1, 28, 28]`` and
        int64 labels ``[N]``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a damaged file, or a number of labels below 1.
    """
    if labels is not None:
        labels = integer("labels", labels, 1)
    if folder is None:
        fit, test = bundled_slice()
    else:
        fit, test = load_fashion_mnist(folder, "train", SIDE), load_fashion_mnist(folder, "test", SIDE)
    return Labelled(fit.images[:labels], fit.labels[:labels]), test


def make_slice(folder: str | Path, per_class: int = 250) -> None:
    """Write the bundled slice from the data set's idx files: ``python -m mlviews.evaluation.data FOLDER``."""
    images, labels = load_fashion_mnist(folder, "test", SIDE)
    by_class = [torch.nonzero(labels == label)[: 2 * per_class, 0] for label in range(len(CLASSES))]
    halves = torch.stack(by_class).split(per_class, dim=1)  # two of [classes, per_class]
    rows = torch.cat([half.flatten().sort().values for half in halves])
    np.savez_compressed(SLICE, images=images[rows, 0].numpy(), labels=labels[rows].numpy().astype(np.uint8))


if __name__ == "__main__":
    make_slice(sys.argv[1])
