"""The user's own images: a folder, a data set or a tensor, as uint8 images of the generator's shape.

An :class:`ImageSet` is asked for images by their numbers. Small sets are decoded once and kept on the device;
a large one is decoded batch by batch by a :class:`Reader`, ahead of the steps that need it.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mlviews import columns
from mlviews.checks import described, integer, path_of
from mlviews.errors import listing
from mlviews.runs.files import sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
"""The files of a folder that are taken for images."""

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""What they may hold, whatever they are called, by Pillow's names: for EPS it would run Ghostscript."""

RESIDENT = 1 << 30
"""A set of at most so many bytes, at the generator's size, is decoded once and kept on the device."""

_THREADS = min(8, os.cpu_count() or 1)
_MOST_PIXELS = 1 << 26  # of a file's image: more would take gigabytes to decode
_GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue, as Pillow's


def fits_device(size: int) -> bool:
    """Say whether so many bytes of a set are kept on the device."""
    return size <= RESIDENT


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

    def content(self) -> str:
        """Return a digest of every image and of their order, for which all of them are read."""
        digest = hashlib.sha256(str(self.shape).encode())
        for start in range(0, len(self), 1024):
            digest.update(self._decode(range(start, min(start + 1024, len(self)))).numpy().data)
        return digest.hexdigest()[:16]

    def glance(self) -> str | None:
        """Return what changes whenever the content does, at the cost of a glance; None if there is no such
        thing.
        """
        return None

    @property
    def bytes(self) -> int:
        """What the whole set takes in memory."""
        return len(self) * self.shape.channels * self.shape.height * self.shape.width

    @property
    def is_small(self) -> bool:
        """Whether the whole set is kept on the device."""
        return fits_device(self.bytes)

    def resident(self, device: torch.device) -> Tensor:
        """Return the whole set, uint8 ``[N, C, H, W]`` on the device; it is decoded at the first call."""
        if self._resident is None:
            with torch.inference_mode(False):
                self._resident = self._decode(range(len(self)))
        if self._resident.device != device:
            self._resident = self._resident.to(device)
        return self._resident

    def batch(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return these images, uint8 ``[B, C, H, W]`` on the device."""
        return sent(self._decode(numbers), device)

    def _decode(self, numbers: Sequence[int]) -> Tensor:
        # Pillow decodes without Python's lock, so threads are enough for images that are needed at once.
        images = torch.empty(len(numbers), *self.shape[:3], dtype=torch.uint8, device="cpu")
        with ThreadPoolExecutor(_THREADS) as threads:
            for place, image in enumerate(threads.map(self.read, numbers)):
                images[place] = image
        return images


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
            file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.is_dir()
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
        try:
            return read_image(file, self.shape)
        except ValueError as error:
            raise ValueError(
                f"{error}: mend or remove it, or leave such files out by "
                "images=mlviews.images.Folder(path, shape, on_error='skip')."
            ) from error

    def identity(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)}\0{file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def content(self) -> str:
        # Of the files: to read them is cheaper than to decode them.
        digest = hashlib.sha256(str(self.shape).encode())
        with ThreadPoolExecutor(_THREADS) as threads:
            for file, checksum in zip(self.files, threads.map(sha256, self.files), strict=True):
                digest.update(f"{file.relative_to(self.path)}\0{checksum}\n".encode())
        return digest.hexdigest()[:16]

    def glance(self) -> str:
        digest = hashlib.sha256(f"{self.path.resolve()}\0{self.shape}".encode())
        for file in self.files:
            facts = file.stat()
            digest.update(f"{file.relative_to(self.path)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
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
    labels once, by its ``targets`` if these are an integer for each item; else its labels are -1.

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
        labels = _integers(getattr(dataset, "targets", None))
        if labels.shape != (count,):
            labels = torch.full((count,), -1, device="cpu")
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


def _integers(values: Any) -> Tensor:
    """Return integers as int64 ``[N]``; an empty tensor for anything else, such as boxes or files' names."""
    try:
        numbers = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.tensor([math.nan], device="cpu")
    integers = numbers.long()
    return integers if torch.equal(integers.to(numbers.dtype), numbers) else integers[:0]


class Rows(Items):
    """The images of a Hugging Face data set, ``datasets.Dataset``.

    :mod:`mlviews.columns` chooses the columns. The format makes no difference, but for the columns that it
    selects; a transform of the user's (``with_transform``) applies. Labels that are missing are -1.

    Args:
        dataset: the data set.
        shape: of the generator's images.

    Raises:
        ValueError: if it is a stream or a dictionary of splits, is empty, or leaves open which column is
            meant.
    """

    def __init__(self, dataset: Any, shape: Shape) -> None:
        columns.check(dataset)
        features = columns.shown(dataset)
        plain = dataset.with_format(None)
        label = columns.label_column(features)
        labels = [-1] * len(dataset)
        if label is not None:
            values = plain.select_columns([label])[:][label]
            labels = [-1 if value is None else value for value in values]
        if not labels:
            raise ValueError("The data set of images= is empty.")
        ImageSet.__init__(self, shape, torch.tensor(labels, dtype=torch.int64, device="cpu"))
        self.dataset = dataset
        if dataset.format["type"] == "custom":
            self.column = columns.transformed_column(features, self._item(0))
            return
        self.column = columns.image_column(features)
        feature = features[self.column]
        if columns.is_array(feature):
            plain = dataset.with_format("numpy")
        elif not feature.decode:
            plain = plain.cast_column(self.column, type(feature)())
        self.dataset = plain.select_columns([self.column])  # nothing else is read

    def read(self, number: int) -> Tensor:
        name = f"item {number} of the data set"
        value = self._item(number)[self.column]
        if isinstance(value, np.ndarray):
            value = columns.as_bytes(value, name)  # integers come with 64 bits
            if value.ndim == 3 and columns.channels_first(value.shape, name):
                value = torch.from_numpy(value)
        return as_pixels(value, self.shape, name)

    def _item(self, number: int) -> dict[str, Any]:
        try:
            return dict(self.dataset[number])
        except Exception as error:  # whatever a damaged image, or a user's transform, raises
            problem = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            raise ValueError(
                f"Invalid images: item {number} of the data set cannot be read ({problem})."
            ) from error


class Reader:
    """The batches of a large set, decoded by the workers of torch's DataLoader before a step asks for them.

    Args:
        images: the set.
        workers: how many processes decode; 0: none, and batches are decoded when they are asked for; None: as
            many as there are processors, at most eight, and none for the images of a tensor.

    Raises:
        ValueError: if it is no such number.
    """

    def __init__(self, images: ImageSet, workers: int | None = None) -> None:
        self.images = images
        if workers is None:
            workers = 0 if isinstance(images, Pixels) else _THREADS
        self.workers = integer("workers", workers, 0)
        self._plan = _Plan()
        self._loader: DataLoader[Any] | None = None
        self._batches: Iterator[np.ndarray | ValueError] | None = None

    def __call__(
        self, numbers: list[int], device: torch.device, following: Iterable[list[int]] | None = None
    ) -> Tensor:
        """Return images, uint8 ``[B, C, H, W]`` on the device.

        Args:
            numbers: of the images.
            device: where they are needed.
            following: the numbers of the batches that will be asked for after this one, which are read as
                far as workers decode ahead; None: nobody knows.

        Raises:
            ValueError: if an image cannot be read, naming it.
        """
        if not self.workers or following is None:
            return self.images.batch(numbers, device)
        if self._batches is None or self._plan.next != numbers:  # a new pass, or one that was set elsewhere
            self._plan.batches = chain([numbers], following)
            self._batches = iter(self._started())
        try:
            images = next(self._batches)
        except BaseException:  # a worker that was killed, an error of a data set's, or Ctrl+C
            self._loader = self._batches = None
            raise
        self._plan.advance()
        if isinstance(images, ValueError):
            self._batches = None
            raise images
        return sent(torch.from_numpy(images), device)

    def _started(self) -> DataLoader[Any]:
        """Return the loader, whose workers serve all passes."""
        if self._loader is None:
            self._loader = DataLoader(
                _Batches(self.images),
                batch_sampler=self._plan,
                num_workers=self.workers,
                collate_fn=_unchanged,
                persistent_workers=True,
                generator=torch.Generator(),  # the workers' seeds, else drawn from the global random state
            )
        return self._loader

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the workers and what they are doing."""
        return {**self.__dict__, "_plan": _Plan(), "_loader": None, "_batches": None}


class _Plan:
    """The batches of a pass, in the place of a sampler: workers are sent one after the other."""

    def __init__(self) -> None:
        self.batches: Iterable[list[int]] = ()
        self._sent: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self._sent.clear()
        for numbers in self.batches:
            self._sent.append(numbers)
            yield numbers

    @property
    def next(self) -> list[int] | None:
        """The batch that comes back next; None if none is under way."""
        return self._sent[0] if self._sent else None

    def advance(self) -> None:
        """Take note that a batch has come back."""
        self._sent.popleft()


class _Batches(Dataset[Any]):
    """An image set as DataLoader's workers ask for it: a whole batch at a time."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitems__(self, numbers: list[int]) -> np.ndarray | ValueError:
        """Return images, uint8 ``[B, C, H, W]``; or the error, of which DataLoader would make a long one."""
        # No tensor: it would take the shared memory of the machine, of which containers have little.
        try:
            return torch.stack([self.images.read(number) for number in numbers]).numpy()
        except ValueError as error:
            return ValueError(*error.args)


def _unchanged(images: Any) -> Any:
    return images


def sent(images: Tensor, device: torch.device) -> Tensor:
    """Return images on a device, to which the CPU sends them without waiting."""
    if device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


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


def read_image(file: Path, shape: Shape, formats: tuple[str, ...] = FORMATS) -> Tensor:
    """Return the image of a file as uint8 ``[C, H, W]`` of this shape.

    Args:
        file: the image.
        shape: what to bring it to.
        formats: the names of Pillow's formats that it may have.

    Raises:
        ValueError: if it cannot be read, or would take gigabytes to decode; the message names the file.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are too many")
            image.draft("RGB", (shape.width, shape.height))  # a JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            return _fitted(upright, shape)
    except Exception as error:  # whatever a damaged file makes Pillow raise
        reason = str(error).replace(str(file), file.name).partition("\n")[0][:100]
        raise ValueError(f"{file} cannot be read as an image ({reason})") from error


def _fitted(image: Image.Image, shape: Shape) -> Tensor:
    """Return Pillow's image as uint8 ``[C, H, W]``, scaled until it covers the size and cut centrally."""
    if image.mode == "F":  # floats, which Pillow's conversion would take for 0 to 255
        return as_pixels(np.array(image), shape, "it")
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
        images: a folder, a map-style data set (torch's or Hugging Face's), a tensor ``[N, C, H, W]``, or an
            :class:`ImageSet`.
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
    if columns.kind(images) is not None:
        return Rows(images, shape)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return Items(images, shape)
    raise ValueError(
        f"Invalid images of type {type(images).__name__}: give a folder, a map-style data set (with __len__ "
        "and __getitem__), or a tensor [N, C, H, W]."
    )
