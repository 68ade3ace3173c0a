"""The three formats: what the samples of one shard become on disk.

Each writes its shard into a folder of its own, laid out as the export is; :mod:`.shards` moves the files into place.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlviews.errors import did_you_mean, listing
from mlviews.weights.files import read_safetensors, write_safetensors

LATENTS, ROWS = "mlviews.export.latents", "mlviews.export.rows"  # what the safetensors files declare to hold


class Samples(NamedTuple):
    """A batch on the CPU, ready to write."""

    epoch: int
    indices: Tensor  # int64 [B]
    targets: Tensor  # int64 [B], -1 where there are no classes
    views: list[Tensor]  # per view, uint8 [B, H, W, C] with 1 or 3 channels
    latents: list[dict[str, Tensor]]  # per view, by the levels' names, float32 [B, *level.shape]


class Format(NamedTuple):
    """How to write one format."""

    write: Callable[[Path, str, Iterable[Samples]], None]  # (folder, the shard's name, its samples)
    pack: Callable[[Path, Sequence[Path], int], None] | None  # (folder, all shards' files, samples): one file of them; None: shards stay
    packages: tuple[str, ...]  # whose versions decide about the bytes


def choose(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: for an unknown one.
        ModuleNotFoundError: if a package it needs is not installed.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"Unknown format {name!r}: there are {listing(FORMATS)}.{did_you_mean(name, FORMATS)}")
    for package in FORMATS[name].packages:
        if package != "pillow" and importlib.util.find_spec(package) is None:
            more = ", which is compiled against OpenCV and libturbojpeg" if package == "ffcv" else ""
            raise ModuleNotFoundError(f"Writing {name} needs {package}: pip install 'mlviews[{package}]'{more}.", name=package)
    return FORMATS[name]


def pixels(images: Tensor) -> Tensor:
    """``round(255 x)`` as uint8 ``[B, H, W, C]`` on the CPU, of float images ``[B, C, H, W]`` in [0, 1] with 1 or 3 channels.

    Raises:
        ValueError: for other images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"Images of shape {tuple(images.shape[1:])} cannot be written: they need 1 or 3 channels, [C, H, W].")
    scaled = images.mul(255).round()
    low, high = (float(bound) for bound in scaled.aminmax())
    if not (low >= 0 and high <= 255):  # NaN included
        raise ValueError(
            f"Images with values from {low / 255:.3g} to {high / 255:.3g} cannot be written: they must be in [0, 1]; "
            f"export the raw views, or use a transform without normalisation."
        )
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1)


def png(image: Tensor) -> bytes:
    """A PNG file of uint8 ``[H, W, C]``: gray for 1 channel, RGB for 3."""
    data = image.contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data).save(file, "PNG")
    return file.getvalue()


def _write_folder(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    kept = []
    for batch in samples:
        for view, images in enumerate(batch.views):
            for index, target, image in zip(batch.indices.tolist(), batch.targets.tolist(), images, strict=True):
                path = folder / f"view{view}" / ("unlabelled" if target < 0 else f"{target:04d}") / f"{index:010d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(image))
        kept.append({"index": batch.indices, "target": batch.targets, **_named(batch.latents)})
    write_safetensors(folder / "latents" / f"{shard}.safetensors", _joined(kept), {"format": LATENTS})


def _write_tar(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    from webdataset import TarWriter

    with (
        open(folder / f"{shard}.tar", "wb") as file,
        TarWriter(file, user="mlviews", group="mlviews", mtime=0, compress=False, encoder=False) as tar,
    ):
        for batch in samples:
            latents = {name: values.numpy() for name, values in _named(batch.latents).items()}
            for row, (index, target) in enumerate(zip(batch.indices.tolist(), batch.targets.tolist(), strict=True)):
                arrays = io.BytesIO()  # its members carry a fixed date
                np.savez(arrays, **{name: values[row] for name, values in latents.items()})
                facts = {"index": index, "epoch": batch.epoch, "target": target}
                images = {f"view{view}.png": png(images[row]) for view, images in enumerate(batch.views)}
                tar.write(
                    {"__key__": f"{index:010d}", **images, "latents.npz": arrays.getvalue(), "json": json.dumps(facts).encode()},
                )


def _write_rows(folder: Path, shard: str, samples: Iterable[Samples]) -> None:
    """What :func:`_pack_beton` reads: a .beton cannot grow, nor be written by several processes that do not share a machine."""
    kept = []
    for batch in samples:
        flat = [torch.cat([z.flatten(1) for z in view.values()], dim=1) for view in batch.latents]
        views = {f"view{view}": images for view, images in enumerate(batch.views)}
        kept.append({**views, "index": batch.indices, "target": batch.targets, "latents": torch.stack(flat, dim=1)})
    write_safetensors(folder / "shards" / f"{shard}.safetensors", _joined(kept), {"format": ROWS})


def _pack_beton(folder: Path, shards: Sequence[Path], num_samples: int) -> None:
    """One .beton of all shards, by ffcv's DatasetWriter in this process.

    Its own ``from_indexed_dataset`` forks workers, which may deadlock once torch has threads, waits forever for one that died, and
    with several of them the order in the file is not fixed.
    """
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

    first = next(_rows(shards[:1]))
    images = [name for name in first if name.startswith("view")]
    fields = {
        **{name: RGBImageField(write_mode="raw") for name in images},
        "index": IntField(),
        "target": IntField(),
        "latents": NDArrayField(first["latents"].dtype, first["latents"].shape),
    }
    sample_bytes = sum(first[name].nbytes for name in (*images, "latents"))
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
    """Write the samples' data; returns where each piece is."""
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import handle_sample

    metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    with allocator:
        for position, row in enumerate(rows):
            handle_sample(row, position, writer.metadata_type.names, metadata, allocator, writer.fields)
    return list(allocator.allocations)


def _rows(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The samples of these shards, each by the names of its fields. ffcv's images have 3 channels."""
    for path in shards:
        tensors, _ = read_safetensors(path, ROWS)
        arrays = {
            name: (value.expand(*value.shape[:3], 3) if name.startswith("view") else value).numpy()
            for name, value in sorted(tensors.items())
        }
        for row in range(len(arrays["index"])):
            yield {name: value[row].copy() for name, value in arrays.items()}


def _named(latents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"view{view}.{level}": z for view, levels in enumerate(latents) for level, z in levels.items()}


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches' tensors one after the other, in storage of their own: where levels are fixed, views share theirs."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


FORMATS = {
    "folder": Format(_write_folder, None, ("pillow",)),
    "webdataset": Format(_write_tar, None, ("pillow", "webdataset")),
    "ffcv": Format(_write_rows, _pack_beton, ("ffcv",)),
}
