"""Real images as anchors: what an encoder learns from generated positives of them.

``python benchmarks/real_anchors.py --data DIR``

Small encoders are trained by SimCLR for the same number of steps on real Fashion-MNIST images: on two pixel
augmentations of an image, on an image and a positive that the bundled NVAE makes of it, on both
reconstructed, and on drawn anchors. Linear probes and kNN on real test images say what they learned. Every
cell (arm, images, seed) is a file in the working folder, and a second call goes on from there. Prints a
table, writes ``benchmarks/results/real-anchors.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from documents.anchors import real_anchors
from probe import by_name, interval, run_in_processes
from real_images import train_and_test
from record import RESULTS, SCORES, command, off_the_records, publish
from rich.console import Console
from view_sources import TRANSFORMS

from mlviews import MLViewSource
from mlviews.evaluation.data import Labelled
from mlviews.evaluation.probe import evaluate, train
from mlviews.runs.files import whole
from mlviews.runs.records import environment


class Arm(NamedTuple):
    """A row of the table: the preset that makes the views, T_x, and arguments of the source."""

    preset: str
    transform: str
    arguments: dict[str, Any]


REAL = "fashion-nvae-real-resample"
ARMS = {
    "real only, no T_x": Arm(REAL, "none", {"generated": 0.0}),
    "real only, gentle": Arm(REAL, "gentle", {"generated": 0.0}),
    "real anchor, NVAE positive, no T_x": Arm(REAL, "none", {}),
    "real anchor, NVAE positive, gentle": Arm(REAL, "gentle", {}),
    "real anchor, NVAE positive with p = 0.5, gentle": Arm(REAL, "gentle", {"generated": 0.5}),
    "both reconstructed, no T_x": Arm(REAL, "none", {"anchor_view": "reconstructed"}),
    "both reconstructed, gentle": Arm(REAL, "gentle", {"anchor_view": "reconstructed"}),
    "drawn anchors, NVAE, gentle": Arm("fashion-nvae-resample", "gentle", {"perturb": {"1:": "resample"}}),
}
SIZES = (1_000, 60_000)  # own images
SEEDS = (0, 1, 2)


def measure(
    name: str, images: int, seed: int, steps: int, batch_size: int, data: str | None
) -> dict[str, Any]:
    """Train one encoder, and score it."""
    begin = time.perf_counter()
    arm = ARMS[name]
    real, test = train_and_test(data)
    pixels = real.images[:images]
    transform = TRANSFORMS[arm.transform]
    real_images = {"images": pixels} if arm.preset == REAL else {}
    views = MLViewSource.from_config(
        arm.preset, transform=transform, batch_size=batch_size, seed=seed, **real_images, **arm.arguments
    )
    encoder, losses = train(views, steps, "simclr", seed=seed)
    seconds = time.perf_counter() - begin
    scores = evaluate(encoder, Labelled(real.images[:10_000], real.labels[:10_000]), test, seed)
    return {
        "arm": name,
        "images": images,
        "seed": seed,
        "scores": by_name(scores),
        "loss": round(losses[-1], 4),
        "seconds_of_training": round(seconds, 1),
    }


def measure_into(path: Path, *arguments: Any) -> dict[str, Any]:
    """Measure a cell on one thread and write its file; for a process of its own."""
    torch.set_num_threads(1)
    cell = {**measure(*arguments), "environment": environment()}
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


def summarized(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table: per arm and number of images, every score over the seeds."""
    rows = []
    for images in SIZES:
        for name in ARMS:
            chosen = [cell for cell in cells if (cell["arm"], cell["images"]) == (name, images)]
            if chosen:
                scores = {score: interval([cell["scores"][score] for cell in chosen]) for score in SCORES}
                rows.append({"arm": name, "images": images, "seeds": len(chosen), "scores": scores})
    return rows


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's idx files; none: the slice.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each encoder.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds of each cell.", min=1)] = len(SEEDS),
    work: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("runs/real-anchors"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "real-anchors.json",
) -> None:
    """Compare real and generated positives of real images."""
    console = Console(stderr=True)
    budget = (steps, batch_size, None if data is None else str(data))
    paths = {
        (name, images, seed): work / f"{name.replace(' ', '-').replace(',', '')}-{images}-{seed}.json"
        for seed in range(seeds)
        for images in SIZES
        for name, arm in ARMS.items()
        if arm.preset == REAL or images == SIZES[-1]  # drawn anchors are the same whatever images there are
    }
    missing = {key: path for key, path in paths.items() if not path.exists()}
    run_in_processes(
        measure_into, {path: (path, *key, *budget) for key, path in missing.items()}, jobs, console
    )
    cells = [json.loads(path.read_text()) for path in paths.values()]
    partial = (steps, batch_size, seeds) != (500, 64, len(SEEDS)) or data is None
    record = {
        "command": command("real_anchors.py"),
        "steps": steps,
        "batch_size": batch_size,
        "rows": summarized(cells),
        "cells": cells,
        **environment(),
    }
    publish(record, off_the_records(out) if partial else out, real_anchors(record))


if __name__ == "__main__":
    typer.run(main)
