"""Real images as anchors: what an encoder learns from generated positives of them.

``python benchmarks/real_anchors.py --data DIR``

Small encoders are trained by SimCLR for the same number of steps on real Fashion-MNIST images: on two pixel
augmentations of an image, on an image and a positive that the bundled NVAE or GAN makes of it, on both
reconstructed, and on drawn anchors. Linear probes and kNN on real test images say what they learned. Every
cell (arm, images, seed) is a file in the working folder, and a second call goes on from there. Prints a
table, writes ``benchmarks/results/real-anchors.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
import weights
from documents.anchors import real_anchors
from probe import Budget, by_name, check_budget, run_in_processes
from real_images import train_and_test
from record import RESULTS, command, intervals, off_the_records, paired_differences, publish
from rich.console import Console
from view_sources import TRANSFORMS

from mlviews import MLViewSource
from mlviews.evaluation.data import Labelled
from mlviews.evaluation.learner import train
from mlviews.evaluation.readout import evaluate
from mlviews.runs.files import whole
from mlviews.runs.records import environment

SIZES = (1_000, 10_000, 60_000)  # own images
ALL = SIZES[-1]


class Arm(NamedTuple):
    """A row of the table: the preset of the views, T_x, arguments of the source, own images, and seeds."""

    preset: str
    transform: str
    arguments: dict[str, Any]
    sizes: tuple[int, ...] = SIZES
    seeds: int = 3  # 1: it only says which T_x to take


NVAE, GAN = "fashion-nvae-real-resample", "fashion-real-ml"
ONLY_REAL = {"generated": 0.0}
RECONSTRUCTED = {"anchor_view": "reconstructed"}
ARMS = {
    "real only, no T_x": Arm(NVAE, "none", ONLY_REAL, (ALL,), seeds=1),
    "real only, gentle": Arm(NVAE, "gentle", ONLY_REAL),
    "real only, full": Arm(NVAE, "full", ONLY_REAL),
    "real anchor, NVAE positive, no T_x": Arm(NVAE, "none", {}, seeds=1),
    "real anchor, NVAE positive, gentle": Arm(NVAE, "gentle", {}),
    "real anchor, NVAE positive, full": Arm(NVAE, "full", {}, (ALL,), seeds=1),
    "real anchor, NVAE positive with p = 0.5, gentle": Arm(NVAE, "gentle", {"generated": 0.5}, (ALL,), 1),
    "both reconstructed by the NVAE, no T_x": Arm(NVAE, "none", RECONSTRUCTED),
    "both reconstructed by the NVAE, gentle": Arm(NVAE, "gentle", RECONSTRUCTED, (ALL,), seeds=1),
    "real anchor, GAN positive, no T_x": Arm(GAN, "none", {}, (ALL,), seeds=1),
    "real anchor, GAN positive, gentle": Arm(GAN, "gentle", {}),
    "both reconstructed by the GAN, no T_x": Arm(GAN, "none", RECONSTRUCTED),
    # Drawn anchors are the same however many images there are.
    "drawn anchors, NVAE, gentle": Arm(
        "fashion-nvae-resample", "gentle", {"perturb": {"1:": "resample"}}, (ALL,), seeds=1
    ),
    "drawn anchors, GAN, no T_x": Arm("fashion-ml-random", "none", {}, (ALL,)),
}
LABELS = 10_000  # labeled real images that probes are fitted on


def measure(name: str, images: int, seed: int, budget: Budget) -> dict[str, Any]:
    """Train one encoder, and score it."""
    begin = time.perf_counter()
    arm = ARMS[name]
    real, test = train_and_test(budget.data)
    real_images = {"images": real.images[:images]} if arm.preset in (NVAE, GAN) else {}
    transform = TRANSFORMS[arm.transform]
    views = MLViewSource.from_config(
        arm.preset,
        transform=transform,
        batch_size=budget.batch_size,
        seed=seed,
        **real_images,
        **arm.arguments,
    )
    encoder, losses = train(views, budget.steps, "simclr", seed=seed)
    seconds = time.perf_counter() - begin
    to_fit = Labelled(real.images[: budget.labels], real.labels[: budget.labels])
    scores = evaluate(encoder, to_fit, test, seed)
    return {
        "arm": name,
        "images": images,
        "seed": seed,
        "scores": by_name(scores),
        "loss": round(losses[-1], 4),
        "seconds_of_training": round(seconds, 1),
    }


def measure_into(path: Path, name: str, images: int, seed: int, budget: Budget) -> dict[str, Any]:
    """Measure a cell on one thread and write its file; for a process of its own."""
    torch.set_num_threads(1)
    cell = {**measure(name, images, seed, budget), "environment": environment()}
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


Scored = dict[tuple[str, int], dict[int, dict[str, float]]]
"""Scores by name, of each seed, of each arm and number of images."""


def summarized(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of the table, and paired differences from the best controls.

    The controls are, by kNN, the best arm of real views only at the same number of images, and the best arm
    of drawn anchors.
    """
    scored: Scored = {}
    for cell in cells:
        scored.setdefault((cell["arm"], cell["images"]), {})[cell["seed"]] = cell["scores"]
    drawn = best([key for key in scored if is_drawn(key[0])], scored)
    rows = []
    differences = []
    for images in SIZES:
        keys = [(name, images) for name in ARMS if (name, images) in scored]
        for key in keys:
            of_seeds = scored[key]
            scores = intervals(list(of_seeds.values()))
            rows.append({"arm": key[0], "images": images, "seeds": len(of_seeds), "scores": scores})
        real_only = [key for key in keys if ARMS[key[0]].arguments == ONLY_REAL]
        for control in (best(real_only, scored), drawn):
            for key in keys:
                if control is None or key in real_only or (is_drawn(key[0]) and is_drawn(control[0])):
                    continue
                difference = paired(scored[key], scored[control])
                differences.append({"of": key[0], "less": control[0], "images": images, **difference})
    return {"rows": rows, "differences": differences}


def is_drawn(name: str) -> bool:
    """Return whether an arm's anchors are drawn, and no image is used."""
    return ARMS[name].preset not in (NVAE, GAN)


def best(keys: list[tuple[str, int]], scored: Scored) -> tuple[str, int] | None:
    """Return the arm and number of images with the best mean of kNN; None of no arms."""
    return max(keys, key=lambda key: mean_knn(scored[key]), default=None)


def mean_knn(of_seeds: dict[int, dict[str, float]]) -> float:
    """Return the mean accuracy of kNN over the seeds, in percent."""
    return statistics.fmean(scores["kNN"] for scores in of_seeds.values())


def paired(minuend: dict[int, dict[str, float]], subtrahend: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Return the difference of two arms, seed by seed."""
    of_seeds = paired_differences(minuend, subtrahend)
    return {"seeds": len(of_seeds), "scores": intervals(of_seeds)}


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's idx files; none: the slice.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each encoder.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds of each arm, at most.", min=1)] = 3,
    work: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("runs/real-anchors"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "real-anchors.json",
) -> None:
    """Compare real and generated positives of real images."""
    console = Console(stderr=True)
    budget = Budget(steps, batch_size, LABELS, None if data is None else str(data))
    check_budget(budget, work, weights.bundled("fashion", "fashion-nvae"))
    paths = {
        (name, images, seed): work / f"{name.replace(' ', '-').replace(',', '')}-{images}-{seed}.json"
        for seed in range(seeds)
        for name, arm in ARMS.items()
        for images in arm.sizes
        if seed < arm.seeds
    }
    missing = {key: path for key, path in paths.items() if not path.exists()}
    run_in_processes(
        measure_into, {path: (path, *key, budget) for key, path in missing.items()}, jobs, console
    )
    cells = [json.loads(path.read_text()) for path in paths.values()]
    partial = (steps, batch_size, seeds) != (500, 64, 3) or data is None
    record = {
        "command": command("real_anchors.py"),
        "steps": steps,
        "batch_size": batch_size,
        **summarized(cells),
        "cells": cells,
        **cells[-1]["environment"],
    }
    out = off_the_records(out) if partial else out
    publish(record, out, real_anchors(record), generators=["fashion", "fashion-nvae"])


if __name__ == "__main__":
    typer.run(main)
