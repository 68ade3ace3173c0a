"""The three formats: what the samples of one shard become on disk.

Each format writes its shard into an empty folder, laid out as the export is;
:mod:`mlviews.integrations.files.shards` moves the files into place.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlviews import checks
from mlviews.weights.files import read_safetensors, write_safetensors

LATENTS, ROWS = "mlviews.export.latents", "mlviews.export.rows"  # what the safetensors files declare to hold


class Samples(NamedTuple):
    """A batch on the CPU, ready to write."""

    epoch: int
    indices: Tensor  # int64 [B]
    targets: Tensor  # int64 [B], -1 if there are no classes
    views: list[Tensor]  # per view, uint8 [B, H, W, C] with 1 or 3 channels
    # per view, by the levels' names, float32 [B, *level.shape]; of views that are the user's own images: none
    latents: list[dict[str, Tensor]]


class Format(NamedTuple):
    """How to write one format."""

    write: Callable[[Path, str, Iterable[Samples]], None]  # (folder, name of the shard, its samples)
    # (folder, files of all shards, number of samples): makes one file of them; None if the shards stay
    pack: Callable[[Path, Sequence[Path], int], None] | None
    packages: tuple[str, ...]  # packages whose versions decide about the bytes
    # (folder of the export, files of a shard): the samples in each part of the shard, as its files tell
    indices: Callable[[Path, Sequence[str]], dict[str, list[int]]]
    parts: tuple[str, ...]  # the parts beside the views', that with the latents first
    view: str  # the name of a view's part


def choose(name: str) -> Format:
    """Return the format of this name.

    Raises:
        ValueError: for an unknown one.
        ModuleNotFoundError: if a package that it needs is not installed.
    """
    format = FORMATS[checks.choice("format", name, FORMATS)]
    for package in format.packages:
        if package != "pillow" and importlib.util.find_spec(package) is None:
            note = ", which is compiled against OpenCV and libturbojpeg" if package == "ffcv" else ""
            raise ModuleNotFoundError(
                f"Writing {name} needs {package}: pip install 'mlviews[{package}]'{note}.", name=package
            )
    return format


def pixels(images: Tensor) -> Tensor:
    """Return ``round(255 x)`` as uint8 ``[B, H, W, C]`` on the CPU.

    Args:
        images: float ``[B, C, H, W]`` in [0, 1], with 1 or 3 channels.

    Raises:
        ValueError: for other images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape[1:])
        raise ValueError(f"Images of shape {shape} cannot be written: they need 1 or 3 channels, [C, H, W].")
    scaled = images.mul(255).round()
    low, high = (float(bound) for bound in scaled.aminmax())
    if not (low >= 0 and high <= 255):  # true for NaN as well
        raise ValueError(
            f"Images with values from {low / 255:.3g} to {high / 255:.3g} cannot be written: "
            f"they must be in [0, 1]; export the raw views, or use a transform without normalization."
        )
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]


def png(image: Tensor) -> bytes:
    """Return a PNG file of a uint8 image ``[H, W, C]``: gray for 1 channel, RGB for 3."""
    array = image.contiguous().numpy()
    if array.shape[-1] == 1:
        array = array[..., 0]  # [H, W], as pillow takes gray images
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _write_folder(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    """Write PNG files, and the shard's latents beside them."""
    batches = []
    for batch in samples:
        indices, targets = batch.indices.tolist(), batch.targets.tolist()
        for view, images in enumerate(batch.views):
            for index, target, image in zip(indices, targets, images, strict=True):
                class_folder = "unlabelled" if target < 0 else f"{target:04d}"
                path = folder / f"view{view}" / class_folder / f"{index:010d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(image))
        batches.append({"index": batch.indices, "target": batch.targets, **_by_view_and_level(batch.latents)})
    write_safetensors(folder / "latents" / f"{shard}.safetensors", _joined(batches), {"format": LATENTS})


def _write_tar(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    """Write one tar, as webdataset reads it."""
    from webdataset import TarWriter

    fixed = {"user": "mlviews", "group": "mlviews", "mtime": 0}  # what would differ from run to run
    with (
        open(folder / f"{shard}.tar", "wb") as file,
        TarWriter(file, **fixed, compress=False, encoder=False) as tar,
    ):
        for batch in samples:
            latents = {name: z.numpy() for name, z in _by_view_and_level(batch.latents).items()}
            for row, (index, target) in enumerate(
                zip(batch.indices.tolist(), batch.targets.tolist(), strict=True)
            ):
                arrays = io.BytesIO()
                # numpy gives members a fixed date
                np.savez(arrays, **{name: z[row] for name, z in latents.items()})
                facts = {"index": index, "epoch": batch.epoch, "target": target}
                tar.write(
                    {
                        "__key__": f"{index:010d}",
                        **{f"view{view}.png": png(images[row]) for view, images in enumerate(batch.views)},
                        "latents.npz": arrays.getvalue(),
                        "json": json.dumps(facts).encode(),
                    }
                )


def _write_rows(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    """Write what :func:`_pack_beton` reads.

    A .beton cannot grow, and processes that do not share a machine cannot write one together.
    """
    batches = []
    for batch in samples:
        rows = {f"view{view}": images for view, images in enumerate(batch.views)}
        rows |= {"index": batch.indices, "target": batch.targets}
        if all(batch.latents):
            # All levels of a view one after the other: [B, D].
            latents = [torch.cat([z.flatten(1) for z in view.values()], dim=1) for view in batch.latents]
            rows["latents"] = torch.stack(latents, dim=1)  # [B, num_views, D]
        batches.append(rows)
    write_safetensors(folder / "shards" / f"{shard}.safetensors", _joined(batches), {"format": ROWS})


def _pack_beton(folder: Path, shards: Sequence[Path], num_samples: int) -> None:
    """Write one .beton of all shards, by ffcv's DatasetWriter in this process.

    The writer's ``from_indexed_dataset`` forks workers. These may deadlock once torch has threads, it waits
    forever for a worker that died, and with several workers the order in the file is not fixed.
    """
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

    first = next(_rows(shards[:1]))
    images = [name for name in first if name.startswith("view")]
    fields = {
        **{name: RGBImageField(write_mode="raw") for name in images},
        "index": IntField(),
        "target": IntField(),
    }
    if "latents" in first:
        fields["latents"] = NDArrayField(first["latents"].dtype, first["latents"].shape)
    sample_bytes = sum(first[name].nbytes for name in (*images, "latents") if name in first)
    page = max(4 * MIN_PAGE_SIZE, 1 << (sample_bytes - 1).bit_length())  # a sample lies within one page
    writer = DatasetWriter(str(folder / "views.beton"), fields, page_size=page, num_workers=1)
    writer.num_samples = num_samples
    writer.prepare()
    try:
        writer.finalize(_encode(writer, ([row[name] for name in fields] for row in _rows(shards))))
    finally:
        writer.metadata_sm.unlink()
    writer.metadata_sm.close()


def _encode(writer: Any, rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Write the samples' data; return the place of each piece."""
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import handle_sample

    metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    with allocator:
        for position, row in enumerate(rows):
            handle_sample(row, position, writer.metadata_type.names, metadata, allocator, writer.fields)
    return list(allocator.allocations)


def _rows(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the samples of these shards as arrays, by the names of their fields."""
    for path in shards:
        tensors, _ = read_safetensors(path, ROWS)
        for name, images in tensors.items():
            if name.startswith("view"):  # ffcv stores no gray images
                tensors[name] = images.expand(*images.shape[:3], 3)  # [N, H, W, 3]
        arrays = {name: tensors[name].numpy() for name in sorted(tensors)}
        for row in range(len(arrays["index"])):
            yield {name: array[row].copy() for name, array in arrays.items()}


def _by_view_and_level(latents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the latents of all views under names like ``view0.4x4``."""
    return {f"view{view}.{level}": z for view, levels in enumerate(latents) for level, z in levels.items()}


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the batches' tensors, concatenated.

    They get storage of their own, as views share the latents of fixed levels.
    """
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def lacking(
    format: Format, folder: Path, files: Sequence[str], places: range, images: int, *, shuffled: bool
) -> str:
    """Say what a shard lacks of its samples, or has beside them; return an empty text if nothing.

    Args:
        format: the shard's format.
        folder: the folder of the export.
        files: the shard's files, by their paths in the folder.
        places: of its samples in the epoch.
        images: the images of each sample.
        shuffled: whether the epoch has an order of its own, that of a pool or of the user's images. Else a
            sample's index is its place. Which samples these are is then known from the part with the latents
            alone, which all others must agree with.

    Raises:
        ValueError: if a file is not of the format.
    """
    expected = {*format.parts, *(format.view.format(view) for view in range(images))}
    parts = format.indices(folder, files)
    samples = set(places)
    if shuffled:
        samples = {index for index in parts.get(format.parts[0], []) if index >= 0}
    for part in sorted(expected | parts.keys()):
        indices = parts.get(part, [])
        if part not in expected:
            return f"{part} is no part of it"
        if sorted(indices) != sorted(samples) or len(samples) != len(places):
            return f"{len(samples.intersection(indices))} of {len(places)} in {part}"
    return ""


def _indices_in_folder(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Return the samples of each view by the names of its images, and those of the latents."""
    parts: dict[str, list[int]] = {}
    for file in files:
        path = PurePosixPath(file)
        if path.suffix == ".safetensors":
            parts["latents"] = _stored_indices(folder / file, LATENTS)
        else:
            parts.setdefault(path.parts[0], []).append(_number(path.stem))
    return parts


def _indices_in_tar(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Return the samples that a tar has each kind of file of."""
    parts: dict[str, list[int]] = {}
    for file in files:
        try:
            with tarfile.open(folder / file, "r:") as tar:
                names = tar.getnames()
        except tarfile.TarError as error:
            raise ValueError(f"{folder / file} is no whole tar file ({error}).") from error
        for name in names:
            key, _, part = name.partition(".")
            parts.setdefault(part, []).append(_number(key))
    return parts


def _indices_of_rows(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Return the samples of a shard before it is packed; a row holds all of a sample."""
    return {"rows": [index for file in files for index in _stored_indices(folder / file, ROWS)]}


def _stored_indices(path: Path, format: str) -> list[int]:
    """Return the samples that a safetensors file says it holds."""
    tensors, _ = read_safetensors(path, format)
    return [int(index) for index in tensors["index"].flatten().tolist()] if "index" in tensors else []


def _number(text: str) -> int:
    """Return a sample's index from a name of ten digits; -1 if it is none."""
    return int(text) if len(text) <= 10 and text.isdecimal() else -1


FORMATS = {
    "folder": Format(_write_folder, None, ("pillow",), _indices_in_folder, parts=("latents",), view="view{}"),
    "webdataset": Format(
        _write_tar,
        None,
        ("pillow", "webdataset"),
        _indices_in_tar,
        parts=("latents.npz", "json"),
        view="view{}.png",
    ),
    "ffcv": Format(_write_rows, _pack_beton, ("ffcv",), _indices_of_rows, parts=("rows",), view="rows"),
}
