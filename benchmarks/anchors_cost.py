"""What a step with the user's own images costs: ``python benchmarks/anchors_cost.py --data DIR``.

Pairs of Fashion-MNIST images at 32 pixels, from torch's DataLoader and from sources whose positives a bundled
generator makes, timed in turns; the peak of memory, of each in a process of its own; and what is on disk,
beside what the published systems that write their candidates to files would take. Prints a table, writes
``benchmarks/results/anchors-cost.json``.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from documents.anchors import anchors_cost
from feeds import Case, torch_views
from real_images import all_to_train_on
from record import RESULTS, command, off_the_records, publish
from timing import median_and_quartiles, take_turns
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mlviews import MLViewSource, info_nce
from mlviews.evaluation.learner import Encoder
from mlviews.images import Folder, Shape
from mlviews.integrations import files
from mlviews.runs.records import environment
from mlviews.transforms import simclr

SIZE, CROP = 32, 28
REFINE = 30
PEERS = {"GenView": 1, "CLSP": 8, "GenerativeSSL": 10, "DA-Fusion": 15}
"""Candidates of each image that published code writes to files."""

NVAE: dict[str, Any] = {"generator": "fashion-nvae", "perturb": {"1:": "resample"}}
GAN: dict[str, Any] = {
    "generator": "fashion",
    "perturb": {"1:": {"name": "normal", "std": 1.0, "truncation": 2.0}},
}
REFINED = f"`fashion` positive, {REFINE} steps of refinement, kept"
ARMS: dict[str, dict[str, Any]] = {
    "real only": {**NVAE, "generated": 0.0},
    "NVAE positive": NVAE,
    "NVAE positive, files decoded at every step": {**NVAE, "decoded": True},
    "both reconstructed, NVAE": {**NVAE, "anchor_view": "reconstructed"},
    "`fashion` positive, by its inverter": GAN,
    REFINED: {**GAN, "refine": REFINE, "codes": True},
}
TORCH = "real only, torch's DataLoader"


class Decoded(Folder):
    """A folder that counts as too large to be kept on the device."""

    is_small = False


def write_images(data: Path | None, count: int, folder: Path) -> None:
    """Write real images as PNG files of 28 pixels (the generators add the border), one folder a class."""
    images, labels = all_to_train_on(data)
    offset = (images.shape[-1] - CROP) // 2
    for index in range(count):
        path = folder / "jpeg" / str(int(labels[index])) / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(images[index, :, offset : offset + CROP, offset : offset + CROP]).save(path)


def pairs(arm: str, folder: Path, batch_size: int, steps: int) -> Iterator[Any]:
    """Return an endless iterator over pairs of views."""
    if arm == TORCH:
        case = Case("torch", SIZE, batch_size, "cpu", 1, folder, 1)
        return torch_views(case, steps)
    options = dict(ARMS[arm])
    images: str | Folder = str(folder / "jpeg")
    if options.pop("decoded", False):
        images = Decoded(images, Shape(1, SIZE, SIZE, (SIZE - CROP) // 2))
    if options.pop("codes", False):
        options["codes"] = folder / "codes"
    source = MLViewSource.from_config(
        options,
        images=images,
        transform=simclr(size=CROP, color=False),
        batch_size=batch_size,
        workers=1,
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from source

    return endless()


def peak(arm: str, folder: Path, batch_size: int, steps: int) -> int:
    """Return the most memory that an arm takes, above that of a process with its source, in bytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_peak, arm, folder, batch_size, steps).result()


def _peak(arm: str, folder: Path, batch_size: int, steps: int) -> int:
    torch.set_num_threads(1)
    views = pairs(arm, folder, batch_size, steps + 1)
    process = psutil.Process()
    before = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    workers = 0
    for _ in range(steps):
        next(views)
        # Of what a worker shares with this process it counts its part.
        children = process.children(recursive=True)
        workers = max(workers, sum(child.memory_full_info().pss for child in children))
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024 - before + workers


def training_step(views: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Return a step of SimCLR on these views, of the encoder that the benchmarks train."""
    encoder = Encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)

    def step() -> None:
        first, second = encoder(torch.cat(views)).chunk(2)
        optimizer.zero_grad()
        info_nce(first, second).backward()
        optimizer.step()

    return step


def stored(folder: Path, count: int) -> dict[str, Any]:
    """Return bytes on disk for each image: the image, the kept latents, and a positive as a PNG file."""
    source = MLViewSource.from_config(
        {**NVAE, "images": str(folder / "jpeg"), "num_samples": min(256, count), "batch_size": 64}
    )
    with tempfile.TemporaryDirectory() as out:
        files.export(source, Path(out) / "export", progress=False)
        positives = sorted(Path(out).rglob("*.png"))
        positive = sum(path.stat().st_size for path in positives) / len(positives)
    images = [path.stat().st_size for path in folder.rglob("*.png")]
    codes = [path.stat().st_size for path in (folder / "codes").glob("*.safetensors")]
    return {
        "image": round(sum(images) / count, 1),
        "codes": round(sum(codes) / count, 1),
        "positive": round(positive, 1),
        "candidates": PEERS,
    }


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's idx files; none: the slice.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of the folder.", min=64)] = 512,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    turns: Annotated[int, typer.Option(help="Timed turns of each arm.", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="Steps of a turn.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "anchors-cost.json",
) -> None:
    """Time and weigh steps with real anchors."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(data, images, folder)
        arms = (TORCH, *ARMS)
        total = (turns + 2) * steps
        views = {arm: pairs(arm, folder, batch_size, total) for arm in arms}

        def turn(arm: str) -> Callable[[], object]:
            return lambda: [next(views[arm]) for _ in range(steps)]

        begin = time.perf_counter()
        next(views[REFINED])
        refinement = time.perf_counter() - begin
        calls = {arm: turn(arm) for arm in arms}
        train = training_step(next(views["real only"]))
        calls["training"] = lambda: [train() for _ in range(steps)]
        seconds = take_turns(calls, turns, "steps")
        memory = {arm: peak(arm, folder, batch_size, 4) for arm in arms}
        disk = stored(folder, images)
    rows = [
        {
            "arm": arm,
            "milliseconds": {
                clock: median_and_quartiles([1e3 * value / steps for value in values])
                for clock, values in seconds[arm].items()
            },
            "memory": memory.get(arm),
        }
        for arm in calls
    ]
    record = {
        "command": command("anchors_cost.py"),
        "images": images,
        "batch_size": batch_size,
        "turns": turns,
        "steps": steps,
        "rows": rows,
        "milliseconds_to_refine_an_image": round(1e3 * refinement / images, 1),
        "bytes": disk,
        "shared": "other jobs ran on the machine; the arms took turns",
        "seed": 0,
        **environment(),
    }
    partial = (images, batch_size, turns, steps) != (512, 64, 10, 2) or data is None
    out = off_the_records(out) if partial else out
    publish(record, out, anchors_cost(record), generators=["fashion", "fashion-nvae"])


if __name__ == "__main__":
    typer.run(main)
