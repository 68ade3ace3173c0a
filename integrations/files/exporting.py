"""From a source to files. A sample is a function of (seed, epoch, index): any rank can make any shard, at any time."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mlviews.checks import integer
from mlviews.runs.files import fingerprint
from mlviews.runs.processes import resolve_rank
from mlviews.runs.progress import bar
from mlviews.source import MLViewSource
from mlviews.transforms import unnormalized

from .formats import Format, Samples, choose, pixels
from .shards import Folder

PACKED = "views"  # the one file that ffcv's shards become


class Export(NamedTuple):
    """What an export has written."""

    out: Path
    complete: bool  # all shards are there, those of other ranks included
    made: int  # samples that this call made; the others were there, or are other ranks'
    images: int  # per sample
    seconds: float
    files: int  # of the complete export; 0 until then
    bytes: int  # of these


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
    """Write the source's current epoch (see :meth:`MLViewSource.set_epoch`): all its views, latents and targets.

    A second call with the same settings goes on where the first stopped, and mends what is damaged. On several ranks
    (the source's, or the launcher's) each writes every ``world_size``-th shard, and the last one to end the manifest. The bytes
    depend on neither, as long as versions, kind of device and number of threads are the same.

    Args:
        source: what to write; ``num_samples`` samples, made ``batch_size`` at a time. It is left as it was.
        out: folder to write to: new, empty, or with a part of this export.
        format: "folder" (PNG), "webdataset" (tar) or "ffcv" (one .beton).
        augmented: write the views after the source's T_x, without its normalisation. Default: the raw views, as T_x belongs to the
            trainer, which draws it anew in every epoch.
        shard_size: samples of a shard: what is lost when a run is killed, and with "ffcv" what is held in memory.
        preset: name to note in the manifest.
        progress: show a bar (on rank 0).

    Raises:
        ValueError: for a bad value, images that are not in [0, 1], a folder with something else, or one with an export of other
            settings, naming which.
        ModuleNotFoundError: if the format needs a package that is not installed.

    Examples:
        >>> source = mlviews.MLViewSource.from_config({"preset": "fashion-ml-random", "num_samples": 1000})
        >>> export(source, "runs/export").complete
        True
    """
    begin = time.perf_counter()
    chosen, size = choose(format), integer("shard_size", shard_size, 1)
    source = _prepared(source, augmented)
    folder = Folder(out, _settings(source, format, chosen, size))
    shards = {
        f"shard-{number:06d}": (start, min(start + size, source.num_samples))
        for number, start in enumerate(range(0, source.num_samples, size))
    }
    rank, world_size = resolve_rank(*source.requested_rank)
    own = list(shards.items())[rank::world_size]
    if chosen.pack is not None and folder.keep(PACKED):
        own = []
    made = done = 0
    with bar(f"export ({format})", total=sum(stop - start for _, (start, stop) in own), show=progress and rank == 0) as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, "")

        for name, (start, stop) in own:
            # A shard that is gone since another rank has packed it is not made again: the packed file is listed before.
            if folder.keep(name) or folder.is_listed(PACKED):
                advance(stop - start)
                continue
            with folder.writing(name) as stage:
                chosen.write(stage, name, _samples(source, start, stop, advance))
            made += stop - start
    sizes = [path.stat().st_size for path in _finish(folder, chosen, shards, preset)]
    return Export(folder.path, bool(sizes), made, len(source.crops), time.perf_counter() - begin, len(sizes), sum(sizes))


def _finish(folder: Folder, chosen: Format, shards: dict[str, tuple[int, int]], preset: str | None) -> list[Path]:
    """Write the manifest, if all shards are there; returns all files of the export then, else none."""
    with folder.lock():
        if chosen.pack is None:
            if not all(map(folder.is_listed, shards)):
                return []
            files = folder.finish(shards, preset=preset)
        else:
            total = max(stop for _, stop in shards.values())
            if not folder.is_listed(PACKED):
                if not all(map(folder.is_whole, shards)):
                    return []
                with folder.writing(PACKED) as stage:
                    chosen.pack(stage, [folder.path / "shards" / f"{name}.safetensors" for name in shards], total)
            for name in shards:
                folder.remove(name)
            files = folder.finish({PACKED: (0, total)}, preset=preset)
        folder.leave()
    return files


def _prepared(source: MLViewSource, augmented: bool) -> MLViewSource:
    """The source with the views to be written; the one given keeps its own."""
    if not isinstance(source, MLViewSource):
        raise ValueError(f"Invalid source of type {type(source).__name__}: it must be an mlviews.MLViewSource.")
    if not augmented:
        return source.replace(transform=None, crops=None)
    return source.replace(transform=[unnormalized(transform) for transform in source.transforms])


def _settings(source: MLViewSource, format: str, chosen: Format, shard_size: int) -> dict[str, Any]:
    """What the bytes depend on."""
    generator = source.generator
    device = source.prepare().type  # with the generator there, before it is looked at
    return {
        "export": 1,
        "format": format,
        "generator": {"name": generator.name, "options": generator.options, "weights": fingerprint(generator)},
        "levels": {level.name: level.shape for level in generator.levels},
        "image_shape": generator.image_shape,
        "anchor": {"std": source.anchor.std, "truncation": source.anchor.truncation, "mean": source.anchor.mean},
        "perturb": {",".join(map(str, levels)): _described(perturber) for levels, perturber in source.assignments},
        "transform": None if set(source.transforms) == {None} else [_described(transform) for transform in source.transforms],
        "crops": source.crops,
        **{name: getattr(source, name) for name in ("num_samples", "num_views", "pool", "seed", "epoch", "batch_size", "micro_batch_size")},
        "dtype": source.dtype,
        "device": device,
        "shard_size": shard_size,
        "versions": {name: importlib.metadata.version(name) for name in ("mlviews", "torch", *chosen.packages)},
    }


def _described(part: object) -> str:
    """A perturber or a transform, the same in every run: its repr without addresses, and what that may not show."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))
    if text != repr(part) or isinstance(part, nn.Module):
        own = getattr(part, "__dict__", {})
        text += "".join(
            f" {name}={value!r}" for name, value in sorted(own.items()) if name[0] != "_" and isinstance(value, str | int | float | tuple)
        )
    return f"{text} {fingerprint(part)}" if isinstance(part, nn.Module) else text


def _samples(source: MLViewSource, start: int, stop: int, advance: Callable[[int], None]) -> Iterator[Samples]:
    """The samples of a shard. Batches start with it, so that rounding does not depend on what was made before."""
    names = [level.name for level in source.generator.levels]
    for first in range(start, stop, source.batch_size):
        batch = source.batch(first, min(first + source.batch_size, stop))
        latents = [dict(zip(names, (z.cpu() for z in view), strict=True)) for view in batch.latents]
        yield Samples(source.epoch, batch.indices.cpu(), batch.targets.cpu(), [pixels(view) for view in batch.views], latents)
        advance(len(batch.indices))
