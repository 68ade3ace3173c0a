"""What ``benchmarks/loaders.py`` feeds a training step from: JPEG files, FFCV's file, and generators."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from real_images import all_to_train_on
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import mlviews
from mlviews import MLViewSource, perturb
from mlviews.generators.biggan.network import BigGAN, BigGANConfig
from mlviews.transforms import IMAGENET, simclr
from mlviews.zoo import FOLDER

CROPS = {32: 28, 128: 112}  # side of the images -> side of the views
SCALE = (0.2, 1.0)
BIGBIGAN_BYTES = 281_990_528  # of the published file's tensors, before a class is folded into them

Views = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """What to time."""

    loader: str
    size: int
    batch_size: int
    device: str
    workers: int
    folder: Path  # of the files of this size
    threads: int


def write_files(data: Path | None, size: int, count: int, folder: Path) -> None:
    """Write real images as JPEG files, one folder a class, and as FFCV's file, unless they are there.

    Images of 128 pixels are enlarged ones.
    """
    marker = folder / "done"
    if marker.exists() and int(marker.read_text()) == count:
        return
    images, labels = all_to_train_on(data)
    for index, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
        image = F.pad(image, [(32 - image.shape[-1]) // 2] * 4)
        if size > 32:
            image = F.interpolate(image[None].float(), size=size, mode="bicubic").clamp(0, 255).byte()[0]
        path = folder / "jpeg" / str(label) / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image.expand(3, -1, -1)).save(path, quality=95)
    if importlib.util.find_spec("ffcv"):
        write_beton(folder, "raw" if size <= 64 else "jpg")  # small images are read faster as they are
    marker.write_text(str(count))


def write_beton(folder: Path, mode: str) -> None:
    """Write FFCV's file from the JPEG files."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    writer = DatasetWriter(str(folder / "images.beton"), fields, num_workers=1)
    writer.from_indexed_dataset(torchvision.datasets.ImageFolder(folder / "jpeg"))


def torch_views(case: Case, steps: int) -> Iterator[Views]:
    """Yield from torch's DataLoader: JPEG files, decoded and augmented by worker processes."""
    pipeline = v2.Compose([
        v2.RandomResizedCrop(CROPS[case.size], scale=SCALE),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*IMAGENET),
    ])  # fmt: skip
    dataset = torchvision.datasets.ImageFolder(
        case.folder / "jpeg", lambda image: (pipeline(image), pipeline(image))
    )
    cuda = torch.device(case.device).type == "cuda"
    loader: Iterable[Any] = torch.utils.data.DataLoader(
        dataset,
        case.batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=steps * case.batch_size),
        num_workers=case.workers,
        pin_memory=cuda,
        drop_last=True,
        multiprocessing_context="fork",
    )
    for (first, second), _ in loader:
        yield first.to(case.device, non_blocking=cuda), second.to(case.device, non_blocking=cuda)


def ffcv_views(case: Case, steps: int) -> Iterator[Views]:
    """Yield from FFCV's Loader: compiled pipelines in threads, two of the one image."""
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import Convert, RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    device = torch.device(case.device)
    mean, std = (np.array(values) * 255 for values in IMAGENET)

    def pipeline() -> PipelineSpec:
        decoder = RandomResizedCropRGBImageDecoder((CROPS[case.size],) * 2, scale=SCALE)
        normalize = torchvision.transforms.Normalize(mean, std)
        on_device = [
            ToTensor(),
            ToDevice(device, non_blocking=True),
            ToTorchImage(),
            Convert(torch.float32),
            normalize,
        ]
        return PipelineSpec("image", decoder, [RandomHorizontalFlip(), *on_device])

    count = len(jpeg_files(case))
    loader = Loader(
        str(case.folder / "images.beton"),
        case.batch_size,
        num_workers=case.workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        indices=np.arange(steps * case.batch_size) % count,
        os_cache=True,
        pipelines={"image": pipeline(), "second": pipeline(), "label": None},
    )
    for first, second, *_ in loader:
        yield first, second


def mlviews_views(case: Case, steps: int) -> Iterator[Views]:
    """Yield anchors and positives, made on the device: of the first step, and of an epoch with ``reuse=2``.

    The first half of the epoch's steps makes samples, the second half shows them again. With a larger reuse
    more steps are like those of the second half.
    """
    transform = simclr(CROPS[case.size], color=False)
    views = source(case, (steps - 1) * case.batch_size, transform, reuse=2)
    yield from itertools.islice(views, 1)
    yield from views  # its next epoch


FEEDS: dict[str, Callable[[Case, int], Iterator[Views]]] = {
    "torch": torch_views,
    "ffcv": ffcv_views,
    "mlviews": mlviews_views,
}


def source(case: Case, num_samples: int, transform: Any, reuse: int = 1) -> MLViewSource:
    """Return the paper's multi-level setting: a sample's two images differ from the second level on."""
    micro_batch_size = None
    if case.size > 32 and torch.device(case.device).type == "cpu":
        micro_batch_size = min(case.batch_size, 32)
    return MLViewSource(
        generator(case.size),
        {"1:": perturb.Normal(std=1.0, truncation=2.0)},
        transform=transform,
        batch_size=case.batch_size,
        num_samples=num_samples,
        device=case.device,
        micro_batch_size=micro_batch_size,
        reuse=reuse,
    )


def generator(size: int) -> mlviews.MLVGM:
    """Return the bundled generator, or a BigBiGAN of random weights.

    What a generator costs follows from the size of its weights, not from their values.
    """
    return mlviews.load_generator("fashion") if size == 32 else random_bigbigan()


@functools.cache
def random_bigbigan() -> mlviews.MLVGM:
    """Return a BigBiGAN for 128 pixels of the published size, of random weights."""
    torch.manual_seed(0)
    return BigGAN(BigGANConfig())


def jpeg_files(case: Case) -> list[Path]:
    """Return the image files."""
    return sorted((case.folder / "jpeg").glob("*/*.jpg"))


def bytes_on_disk(case: Case) -> int:
    """Return the bytes that the loader reads from; a generator's are those of its weights."""
    if case.loader == "torch":
        return sum(path.stat().st_size for path in jpeg_files(case))
    if case.loader == "ffcv":
        return (case.folder / "images.beton").stat().st_size
    if case.size == 32:
        return (FOLDER / "fashion.safetensors").stat().st_size
    return BIGBIGAN_BYTES


def different(case: Case, samples: int) -> dict[str, int]:
    """Count the images in two epochs of these samples before T_x, and how many of them differ."""
    if case.loader == "mlviews":
        views = source(case, samples, None)
        contents: Iterable[bytes] = (
            image.numpy(force=True).tobytes()
            for _ in range(2)
            for batch in views
            for images in batch
            for image in images
        )
    else:
        contents = (path.read_bytes() for _ in range(2) for path in jpeg_files(case)[:samples])
    digests = [hashlib.sha256(content).digest() for content in contents]
    return {"images": len(digests), "different": len(set(digests))}
