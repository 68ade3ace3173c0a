"""From a source to files.

A sample is a function of (seed, epoch, index), so any rank can make any shard at any time.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mlviews.checks import integer
from mlviews.identity import generator_identity, projections
from mlviews.integrations.files.formats import Format, Samples, choose, pixels
from mlviews.integrations.files.shards import PACKED, TRANSFORMED, VIEWS, Folder
from mlviews.runs.files import fingerprint
from mlviews.runs.processes import resolve_rank, under_torchrun
from mlviews.runs.progress import bar
from mlviews.source import MLViewSource
from mlviews.transforms import unnormalized

VERSION = 2  # of the settings; 1 knew a generator by its weights alone


class Export(NamedTuple):
    """What an export has written."""

    out: Path
    complete: bool  # whether all shards are in the folder, those of other ranks included
    written: int  # samples that this call wrote; the rest was in the folder, or belongs to other ranks
    images: int  # images of each sample
    seconds: float
    files: int  # files of the complete export; 0 until then
    bytes: int  # their size

    @property
    def made(self) -> int:
        """The name of ``written`` in version 0.1."""
        return self.written


def export(
    source: MLViewSource,
    out: str | Path,
    format: str = "folder",
    *,
    augmented: bool = False,
    shard_size: int = 1024,
    preset: str | None = None,
    progress: bool = True,
) -> Export:
    """Write the source's current epoch: all its views, latents and targets.

    :meth:`MLViewSource.set_epoch` chooses the epoch.

    A second call with the same settings goes on where the first one stopped, and mends what is damaged. On
    several ranks (the source's, or the launcher's) each rank writes every ``world_size``-th shard, and under
    torchrun also what a rank that died has left; the last one to end writes the manifest. The bytes depend on
    neither, as long as the versions, the kind of device and the number of threads are the same.

    Args:
        source: the source to write; its ``num_samples`` samples are made ``batch_size`` at a time, each once,
            whatever its ``reuse``: a trainer reads files as often as it likes. It is left as it was.
        out: the folder to write to: a new one, an empty one, or one with a part of this export.
        format: "folder" (PNG), "webdataset" (tar) or "ffcv" (one .beton).
        augmented: whether to write the views after the source's T_x, without its normalization. By default
            the raw views are written, as T_x belongs to the trainer, which draws it anew in every epoch.
        shard_size: samples of a shard. This much is lost when a run is killed, and "ffcv" holds this much in
            memory.
        preset: the preset's name, for the manifest.
        progress: whether to show a bar (on rank 0).

    Raises:
        ValueError: for a bad value, images that are not in [0, 1], a folder with something else in it, or a
            folder with an export of other settings, naming the setting.
        ModuleNotFoundError: if the format needs a package that is not installed.

    Examples:
        >>> source = mlviews.MLViewSource.from_config("fashion-ml-random", num_samples=1000)
        >>> export(source, "runs/export").complete
        True
    """
    begin = time.perf_counter()
    writer = choose(format)
    shard_size = integer("shard_size", shard_size, 1)
    source = _prepared(source, augmented)
    folder = Folder(out, _settings(source, format, writer, shard_size))
    written = _write_shards(source, folder, format, writer, progress)
    sizes = [path.stat().st_size for path in _finish(folder, writer, preset)]
    seconds = time.perf_counter() - begin
    return Export(folder.path, bool(sizes), written, len(source.crops), seconds, len(sizes), sum(sizes))


def _write_shards(source: MLViewSource, folder: Folder, format: str, writer: Format, progress: bool) -> int:
    """Write those of this rank's shards that are not whole yet; return the number of samples written."""
    rank, world_size = resolve_rank(*source.requested_rank)
    rank_shards = dict(list(folder.shards.items())[rank::world_size])
    if writer.pack is not None and folder.keep(PACKED):
        rank_shards = {}
    total = sum(len(samples) for samples in rank_shards.values())
    completed = written = 0
    with bar(f"export ({format})", total=total, show=progress and rank == 0) as show:

        def advance(count: int) -> None:
            nonlocal completed
            completed += count
            show(completed, "")

        for name, samples in rank_shards.items():
            # Shards that are missing because another rank has packed them are not made again: the packed file
            # is listed before they are removed.
            if folder.keep(name) or folder.is_listed(PACKED):
                advance(len(samples))
                continue
            written += _write_shard(source, folder, writer, name, advance)
    if under_torchrun():
        written += _write_missing(source, folder, writer)
    return written


def _write_shard(
    source: MLViewSource, folder: Folder, writer: Format, name: str, advance: Callable[[int], None]
) -> int:
    """Write a shard; return the number of its samples, or 0 if another process was faster."""
    samples = folder.shards[name]
    with folder.staging(name) as stage:
        writer.write(stage, name, _samples(source, samples.start, samples.stop, advance))
        return len(samples) if folder.place(name, stage) else 0


def _write_missing(source: MLViewSource, folder: Folder, writer: Format) -> int:
    """Write what other ranks have not written yet; return the number of samples written.

    Where a node's process has ended already, torchrun does not start it again: if another rank dies then, its
    shards would be missing. The others go from the first shard to the last, so this begins at the end.
    """
    written = 0
    for name in reversed(folder.shards):
        if not folder.is_listed(name) and not folder.is_listed(PACKED):
            written += _write_shard(source, folder, writer, name, lambda count: None)
    return written


def _finish(folder: Folder, writer: Format, preset: str | None) -> list[Path]:
    """Write the manifest if all shards are in the folder; return all files of the export then, else none."""
    shards = folder.shards
    files: list[Path]
    with folder.lock():
        if writer.pack is None:
            if not all(map(folder.is_listed, shards)):
                return []
            files = folder.finish(shards, preset=preset)
        else:
            total = max(samples.stop for samples in shards.values())
            if not folder.is_listed(PACKED):
                if not all(map(folder.is_whole, shards)):
                    return []
                paths = [folder.path / "shards" / f"{name}.safetensors" for name in shards]
                with folder.staging(PACKED) as stage:
                    writer.pack(stage, paths, total)
                    folder.place(PACKED, stage)
            for name in shards:
                folder.remove(name)
            files = folder.finish({PACKED: range(total)}, preset=preset)
        folder.leave()
    return files


def _prepared(source: MLViewSource, augmented: bool) -> MLViewSource:
    """Return a source of the views to write; the user's source keeps its own."""
    if not isinstance(source, MLViewSource):
        raise ValueError(
            f"Invalid source of type {type(source).__name__}: it must be an mlviews.MLViewSource."
        )
    if not augmented:
        return source.replace(reuse=1, transform=None, crops=None)
    return source.replace(reuse=1, transform=[unnormalized(transform) for transform in source.transforms])


def _settings(source: MLViewSource, format: str, writer: Format, shard_size: int) -> dict[str, Any]:
    """Return everything that the bytes depend on.

    Not all of it can be read from the source (a perturber may hold tensors, or be a closure), so the settings
    hold numbers that follow from its first samples too.
    """
    generator, anchor = source.generator, source.anchor
    device = source.prepare().type  # moves the generator to the source's device, before its weights are read
    transforms = None
    if any(transform is not None for transform in source.transforms):
        transforms = [_described(transform) for transform in source.transforms]
    sizes = ("num_samples", "num_views", "pool", "seed", "epoch", "batch_size", "micro_batch_size")
    return {
        "export": VERSION,
        "format": format,
        "generator": generator_identity(generator),
        "levels": {level.name: level.shape for level in generator.levels},
        "image_shape": generator.image_shape,
        "anchor": {"std": anchor.std, "truncation": anchor.truncation, "mean": anchor.mean},
        "perturb": {
            ",".join(map(str, levels)): _described(perturber) for levels, perturber in source.assignments
        },
        "transform": transforms,
        "crops": source.crops,
        **_images(source),
        **{name: getattr(source, name) for name in sizes},
        "dtype": source.dtype,
        "device": device,
        "shard_size": shard_size,
        "versions": {
            name: importlib.metadata.version(name) for name in ("mlviews", "torch", *writer.packages)
        },
        # Last, as a setting that differs by its name says more.
        VIEWS: _projections(source.replace(transform=None, crops=None)),
        TRANSFORMED: None if transforms is None else _projections(source),
    }


def _images(source: MLViewSource) -> dict[str, Any]:
    """Return what tells the user's own images from others, and how they are used; nothing without any."""
    if source.images is None:
        return {}
    inverter = source.generator.inverter
    refine = source.arguments["refine"]
    return {
        "images": source.images.identity(),
        "inverter": None if inverter is None else fingerprint(inverter),
        **{name: source.arguments[name] for name in ("generated", "anchor_view")},
        **({"refine": refine} if refine else {}),  # exports of earlier versions do not have it
    }


def _projections(source: MLViewSource) -> dict[str, list[float]]:
    """Return numbers that follow from the first two samples; none if these are not the same each time.

    A T_x of the user's own may draw from torch's global random numbers, which are left as they were.
    """
    draws = []
    devices = [source.device] if source.device.type == "cuda" else []
    for _ in range(2):
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            draws.append(projections(source.batch(0, min(2, source.num_samples)).views))
    return {"samples": draws[0]} if draws[0] == draws[1] else {}


def _described(part: object) -> str:
    """Return a text that stands for a perturber or a transform, the same in every run.

    It is the repr without addresses, followed by what such a repr may not show: plain attributes, and a
    network's weights.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))
    has_address = text != repr(part)
    if has_address or isinstance(part, nn.Module):
        for name, value in sorted(getattr(part, "__dict__", {}).items()):
            if not name.startswith("_") and isinstance(value, str | int | float | tuple):
                text += f" {name}={value!r}"
    if isinstance(part, nn.Module):
        text += f" {fingerprint(part)}"
    return text


def _samples(
    source: MLViewSource, start: int, stop: int, advance: Callable[[int], None]
) -> Iterator[Samples]:
    """Yield the samples of a shard.

    Batches start with the shard, so that rounding does not depend on what was made before it.
    """
    # Latents of drawn anchors end with the levels; those of real images may hold offsets after them.
    names = [level.name for level in (*source.generator.levels, *source.generator.offsets)]
    for first in range(start, stop, source.batch_size):
        batch = source.batch(first, min(first + source.batch_size, stop))
        yield Samples(
            source.epoch,
            batch.indices.cpu(),
            batch.targets.cpu(),
            [pixels(view) for view in batch.views],
            [dict(zip(names, (z.cpu() for z in latents), strict=False)) for latents in batch.latents],
        )
        advance(len(batch.indices))
