"""The user's own images: a folder, a data set or a tensor, as uint8 images of the generator's shape.

An :class:`ImageSet` is asked for images by their numbers. Small sets are decoded once and kept on the device;
a large one is decoded batch by batch, ahead of the steps that need it.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from mlviews.checks import described, path_of
from mlviews.errors import listing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
"""The files of a folder that are taken for images."""

RESIDENT = 1 << 30
"""A set of at most so many bytes, at the generator's size, is decoded once and kept on the device."""

_MOST_PIXELS = 1 << 26  # of a file's image: more would take gigabytes to decode
_GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue, as Pillow's


class Shape(NamedTuple):
    """What images are brought to: the shape of a generator's images, and the border it was trained with."""

    channels: int
    height: int
    width: int
    border: int = 0  # black pixels on each side; an image that has the whole shape already gets none

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width within the border."""
        return self.height - 2 * self.border, self.width - 2 * self.border

    def bordered(self, pixels: Tensor) -> Tensor:
        """Return pixels ``[C, h, w]`` with the border, if they do not have it."""
        if tuple(pixels.shape[1:]) == (self.height, self.width):
            return pixels
        return F.pad(pixels, (self.border,) * 4)


class ImageSet(ABC):
    """Images by number, all of one shape.

    Args:
        shape: of the generator's images; they have 1 or 3 channels.
        labels: the class of each image, int64 ``[N]``; -1 where there is none.
    """

    def __init__(self, shape: Shape, labels: Tensor) -> None:
        if shape.channels not in (1, 3):
            raise ValueError(
                f"Invalid images for a generator of {shape.channels} channels: images have 1 or 3."
            )
        self.shape, self.labels = shape, labels
        self._resident: Tensor | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, ...], Future[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, number: int) -> Tensor:
        """Return one image, uint8 ``[C, H, W]``.

        Raises:
            ValueError: if it cannot be read, naming it.
        """

    @abstractmethod
    def identity(self) -> str:
        """Return a digest that tells this set from others."""

    @property
    def bytes(self) -> int:
        """What the whole set takes in memory."""
        return len(self) * self.shape.channels * self.shape.height * self.shape.width

    @property
    def is_small(self) -> bool:
        """Whether the whole set is kept on the device."""
        return self.bytes <= RESIDENT

    def resident(self, device: torch.device) -> Tensor:
        """Return the whole set, uint8 ``[N, C, H, W]`` on the device; it is decoded at the first call."""
        if self._resident is None:
            with torch.inference_mode(False):
                self._resident = self._decode(range(len(self)))
        if self._resident.device != device:
            self._resident = self._resident.to(device)
        return self._resident

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images of a large set, uint8 ``[B, C, H, W]`` on the device."""
        ahead = self._ahead.pop(tuple(numbers), None)
        images = self._decode(numbers) if ahead is None else ahead.result()
        if device.type == "cuda":
            images = images.pin_memory()
        return images.to(device, non_blocking=True)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to decode the images of a step to come."""
        key = tuple(numbers)
        if key not in self._ahead:
            self._ahead.clear()  # a pass that was left early has asked for others
            self._ahead[key] = self._threads.submit(self._decode, key)

    def _decode(self, numbers: Sequence[int]) -> Tensor:
        # Pillow decodes without Python's lock, so threads are enough, and nothing has to be copied.
        images = torch.empty(len(numbers), *self.shape[:3], dtype=torch.uint8, device="cpu")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for place, image in enumerate(threads.map(self.read, numbers)):
                images[place] = image
        return images

    @property
    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1)
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        """Leave out threads and what they are doing."""
        return {**self.__dict__, "_pool": None, "_ahead": {}}


class Folder(ImageSet):
    """The images of a folder: one folder a class, as torchvision's ImageFolder has it, or all in one.

    Args:
        path: the folder.
        shape: of the generator's images. Files are brought to it: gray or color, scaled with
            antialiasing until they cover it, and cut from their center.
        on_error: "raise", or "skip": damaged files are then left out, counted in ``skipped``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no image, or nothing but damaged ones.
    """

    def __init__(self, path: str | Path, shape: Shape, on_error: str = "raise") -> None:
        self.path = path_of(path, "image folder").expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(f"No image folder {self.path}.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Invalid on_error={on_error!r}: it must be 'raise' or 'skip'.")
        self.files = sorted(
            file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not self.files:
            raise ValueError(f"{self.path} holds no image: give a folder with {listing(SUFFIXES)} files.")
        parts = [file.relative_to(self.path).parts for file in self.files]
        self.classes = sorted({part[0] for part in parts if len(part) > 1})
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = [numbers[part[0]] if len(part) > 1 else -1 for part in parts]
        super().__init__(shape, torch.tensor(labels, device="cpu"))
        self.skipped: list[Path] = []
        if on_error == "skip":
            self._skip()

    def _skip(self) -> None:
        whole = []
        for number, file in enumerate(self.files):
            try:
                self.read(number)
            except ValueError:
                self.skipped.append(file)
            else:
                whole.append(number)
        if not whole:
            raise ValueError(f"{self.path} holds {len(self.files)} images, all of them damaged.")
        self.files = [self.files[number] for number in whole]
        self.labels = self.labels[whole]

    def read(self, number: int) -> Tensor:
        file = self.files[number]
        height, width = self.shape.height, self.shape.width
        try:
            with Image.open(file) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels are too many")
                image.draft("RGB", (width, height))  # a JPEG is decoded at a fraction of its size
                upright = ImageOps.exif_transpose(image)
                pixels = _fitted(upright, self.shape)
        except Exception as error:  # whatever a damaged file makes Pillow raise
            reason = str(error).partition("\n")[0][:100]
            raise ValueError(
                f"{file} cannot be read as an image ({reason}): mend or remove it, or leave such files out "
                "by "
                "images=mlviews.images.Folder(path, shape, on_error='skip')."
            ) from error
        return pixels

    def identity(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)}\0{file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


class Pixels(ImageSet):
    """The images of a tensor.

    Args:
        images: uint8 ``[N, C, H, W]``, or floats in [0, 1].
        shape: of the generator's images; others are scaled to it, and made gray or color.
        labels: int64 ``[N]``, or None.

    Raises:
        ValueError: for a tensor of another kind, or without images.
    """

    def __init__(self, images: Tensor, shape: Shape, labels: Tensor | None = None) -> None:
        if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
            raise ValueError(f"Invalid images, {described(images)}: give [N, C, H, W] with 1 or 3 channels.")
        if labels is None:
            labels = torch.full((len(images),), -1, device="cpu")
        super().__init__(shape, labels.cpu().long())
        self.images = images

    def resident(self, device: torch.device) -> Tensor:
        if self.images.dtype == torch.uint8 and tuple(self.images.shape[1:]) == self.shape[:3]:
            self._resident = self.images  # as they are, and on the device already if the user put them there
        return super().resident(device)

    def read(self, number: int) -> Tensor:
        return as_pixels(self.images[number], self.shape, f"image {number}").cpu()

    def identity(self) -> str:
        content = self.images.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]


class Items(ImageSet):
    """The images of a map-style data set, whose items are images, ``(image, label)``, or ``{"image": …}``.

    Images are Pillow's, or tensors and arrays as :class:`Pixels` takes them. A data set is asked for its
    labels once, by its ``targets`` if it has them; else its targets are -1.

    Args:
        dataset: the data set; its own transforms apply.
        shape: of the generator's images.

    Raises:
        ValueError: if it is empty.
    """

    def __init__(self, dataset: Any, shape: Shape) -> None:
        count = len(dataset)
        if not count:
            raise ValueError("The data set of images= is empty.")
        targets = getattr(dataset, "targets", None)
        labels = torch.full((count,), -1, device="cpu")
        if targets is not None and len(targets) == count:
            labels = torch.as_tensor(targets, device="cpu").long()
        super().__init__(shape, labels)
        self.dataset = dataset

    def read(self, number: int) -> Tensor:
        item = self.dataset[number]
        if isinstance(item, dict):
            item = item.get("image", item.get("img"))
        elif isinstance(item, tuple | list):
            item = item[0]
        return as_pixels(item, self.shape, f"item {number} of the data set")

    def identity(self) -> str:
        digest = hashlib.sha256(str(len(self)).encode())
        for number in sorted({0, len(self) // 2, len(self) - 1}):
            digest.update(self.read(number).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def as_pixels(image: Any, shape: Shape, name: str) -> Tensor:
    """Return an image of a user's as uint8 ``[C, H, W]`` of this shape.

    Args:
        image: Pillow's image; a tensor ``[C, H, W]`` or ``[H, W]``, or an array ``[H, W, C]`` or ``[H, W]``;
            uint8, or floats in [0, 1].
        shape: what to bring it to.
        name: what to call it in a message.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(image, Image.Image):
        return _fitted(image, shape)
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels if pixels.ndim == 2 else pixels.movedim(-1, 0)
    else:
        pixels = image
    if not isinstance(pixels, Tensor) or pixels.ndim not in (2, 3):
        raise ValueError(f"Invalid images: {name} is {described(image)}, not an image [C, H, W] or Pillow's.")
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"Invalid images: {name} has values from {low:.3g} to {high:.3g}; floats are in [0, 1], "
                "before any normalization."
            )
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8 or pixels.shape[0] not in (1, 3):
        raise ValueError(
            f"Invalid images: {name} is {described(pixels)}; give uint8, or floats in [0, 1], of 1 or 3 "
            "channels."
        )
    if pixels.shape[0] > shape.channels:
        weights = torch.tensor(_GRAY, device=pixels.device)[:, None, None]
        pixels = (pixels.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    pixels = pixels.expand(shape.channels, *pixels.shape[1:])
    if tuple(pixels.shape[1:]) not in (shape.inner, (shape.height, shape.width)):
        pixels = _fit(pixels, *shape.inner)
    return shape.bordered(pixels)


def _fitted(image: Image.Image, shape: Shape) -> Tensor:
    """Return Pillow's image as uint8 ``[C, H, W]``, scaled until it covers the size and cut centrally."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip
        image = Image.fromarray(
            (np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        )
    pillow = image.convert("L" if shape.channels == 1 else "RGB")
    height, width = shape.inner
    if pillow.size != (shape.width, shape.height):
        pillow = ImageOps.fit(pillow, (width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(pillow))  # [H, W] or [H, W, 3]
    return shape.bordered(pixels[None] if shape.channels == 1 else pixels.permute(2, 0, 1))


def _fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale an image with antialiasing until it covers the size, and cut it from its center."""
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = (max(height, round(pixels.shape[1] * scale)), max(width, round(pixels.shape[2] * scale)))
    scaled = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[0, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)


def as_image_set(images: Any, shape: Shape) -> ImageSet:
    """Return what ``images=`` of a source stands for.

    Args:
        images: a folder, a map-style data set, a tensor ``[N, C, H, W]``, or an :class:`ImageSet`.
        shape: of the generator's images.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for anything else, an empty set, or one that was made for another shape.
    """
    if isinstance(images, ImageSet):
        if images.shape[:3] != shape[:3]:
            raise ValueError(
                f"The images were made for shape {images.shape[:3]}, the generator's is {shape[:3]}."
            )
        return images
    if isinstance(images, str | Path):
        return Folder(images, shape)
    if isinstance(images, Tensor):
        return Pixels(images, shape)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return Items(images, shape)
    raise ValueError(
        f"Invalid images of type {type(images).__name__}: give a folder, a map-style data set (with __len__ "
        "and "
        "__getitem__), or a tensor [N, C, H, W]."
    )
