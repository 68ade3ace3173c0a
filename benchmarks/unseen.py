"""Images of classes that the generator never saw: what positives of them teach an encoder.

``python benchmarks/unseen.py --data DIR``

Two NVAEs are trained alike, one on all training images of Fashion-MNIST, the other on those of eight
classes: sneakers, which are much like the sandals and boots that it sees, and bags, which are like nothing
else, are left out. Then encoders learn by SimCLR from real images of all ten classes: from two pixel
augmentations of an image, from an image and a positive that either NVAE makes of it, and from anchors that
either one draws. Accuracies on real test images are counted for the classes left out and for the others.
Every generator and every cell (arm, seed) is kept in the working folder, and a second call goes on from
there. Prints tables, writes ``benchmarks/results/unseen.json``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from documents.anchors import unseen_classes, unseen_differences, unseen_generators
from probe import Budget, check_budget, run_in_processes
from real_images import all_to_train_on, train_and_test
from record import RESULTS, command, intervals, off_the_records, paired_differences, publish
from rich.console import Console
from torch import Tensor
from view_sources import TRANSFORMS

from mlviews import MLViewSource, load_generator
from mlviews.evaluation.data import CLASSES, Labelled
from mlviews.evaluation.learner import train
from mlviews.evaluation.readout import embed, predict
from mlviews.generators.nvae.network import NVAE
from mlviews.runs.files import sha256, whole
from mlviews.runs.records import environment
from mlviews.zoo import train_nvae, tune_nvae
from mlviews.zoo.training import run

LEFT_OUT = (CLASSES.index("Sneaker"), CLASSES.index("Bag"))
GENERATORS = {"all classes": (), "eight classes": LEFT_OUT}  # the classes that each of them never sees
RECIPE = "nvae"
BORDER = 2  # black pixels on each side of an image of 32
REAL, DRAWN = "fashion-nvae-real-resample", "fashion-nvae-resample"
BOTH_FINER = {"perturb": {"1:": "resample"}}  # as of the preset for real images
LABELS = 10_000  # labeled real images that probes are fitted on


class Arm(NamedTuple):
    """A row of the table."""

    generator: str
    preset: str
    arguments: dict[str, Any]


ARMS = {
    "real only": Arm("all classes", REAL, {"generated": 0.0}),
    "real anchor, positive by the NVAE of all classes": Arm("all classes", REAL, {}),
    "real anchor, positive by the NVAE of eight": Arm("eight classes", REAL, {}),
    "drawn anchor, the NVAE of all classes": Arm("all classes", DRAWN, BOTH_FINER),
    "drawn anchor, the NVAE of eight": Arm("eight classes", DRAWN, BOTH_FINER),
}
DIFFERENCES = (
    ("real anchor, positive by the NVAE of eight", "real only"),
    ("real anchor, positive by the NVAE of all classes", "real only"),
    (
        "real anchor, positive by the NVAE of eight",
        "real anchor, positive by the NVAE of all classes",
    ),
    ("real anchor, positive by the NVAE of eight", "drawn anchor, the NVAE of eight"),
    ("real anchor, positive by the NVAE of all classes", "drawn anchor, the NVAE of all classes"),
    ("drawn anchor, the NVAE of eight", "drawn anchor, the NVAE of all classes"),
)


# -- generators ----------------------------------------------------------------------------------------------


def train_generator(name: str, images: int, bf16: bool, data: str | None, work: Path) -> dict[str, Any]:
    """Train an NVAE and then its samples, as the zoo's two scripts do, and measure its reconstructions.

    Args:
        name: a key of GENERATORS.
        images: real images to show in the first training; the second one shows half as many.
        bf16: whether to train under bfloat16 autocast.
        data: the folder of Fashion-MNIST.
        work: the working folder; a training that was interrupted there is continued.

    Returns:
        The name, the file's SHA-256, and the reconstruction errors by groups of classes.
    """
    torch.set_num_threads(1)
    left_out = GENERATORS[name]
    real = all_to_train_on(None if data is None else Path(data))
    seen = real.images[~of_classes(real.labels, left_out)]
    folder = work / name.replace(" ", "-")
    provenance = {
        "data": f"Fashion-MNIST train, {len(seen)} images",
        "left_out": [CLASSES[label] for label in left_out],
        "border": BORDER,
    }
    first = train_nvae.Trainer(train_nvae.RECIPES[RECIPE], seen, images, 0, bf16)
    begun = run(first, RECIPE, images, folder / "first", 20_000, provenance)
    # The discriminator learns alone for 30,000 images, unless the run is a short one.
    recipe = dataclasses.replace(tune_nvae.RECIPES[RECIPE], alone=min(30_000, images // 8))
    second = tune_nvae.Trainer(recipe, seen, images // 2, 0, bf16, start=NVAE.load(begun))
    path = run(second, RECIPE, images // 2, folder / "second", 20_000, provenance)
    facts = {
        "generator": name,
        "images": len(seen),
        "shown": [images, images // 2],
        "bf16": bf16,
        "sha256": sha256(path),
        "scores": reconstruction_errors(path, data),
        "environment": environment(),
    }
    with whole(work / f"{folder.name}.json") as part:
        part.write_text(json.dumps(facts))
    return facts


@torch.no_grad()
def reconstruction_errors(path: Path, data: str | None) -> dict[str, float]:
    """Return 1,000 times the mean squared error of real test images that are encoded and decoded."""
    generator = load_generator(RECIPE, weights=path)
    _, test = train_and_test(data)
    errors = []
    for rows in F.pad(test.images, (BORDER,) * 4).split(250):
        pixels = rows.float() / 255
        difference = generator(generator.encode(pixels)) - pixels
        errors.append(F.pad(difference, (-BORDER,) * 4).square().mean((1, 2, 3)))
    return by_group(1000 * torch.cat(errors), test.labels)


def of_classes(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return a mask ``[N]`` of the labels that are among some classes."""
    return torch.isin(labels, torch.tensor(classes, dtype=labels.dtype))


def by_group(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean of values ``[N]`` over all images, each class left out, and the other eight."""
    groups = {
        "all": torch.ones_like(labels, dtype=torch.bool),
        **{CLASSES[label]: labels == label for label in LEFT_OUT},
        "others": ~of_classes(labels, LEFT_OUT),
    }
    return {group: round(float(values[mask].mean()), 3) for group, mask in groups.items()}


# -- cells ---------------------------------------------------------------------------------------------------


def measure_into(path: Path, name: str, seed: int, budget: Budget, work: Path) -> dict[str, Any]:
    """Train one encoder, count what its probes get right, and write the cell's file."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    arm = ARMS[name]
    real, test = train_and_test(budget.data)
    weights = work / arm.generator.replace(" ", "-") / "second" / f"{RECIPE}.safetensors"
    views = MLViewSource.from_config(
        {
            "preset": arm.preset,
            "generator": {"name": RECIPE, "weights": str(weights)},
            **({"images": real.images} if arm.preset == REAL else {}),
            **arm.arguments,
        },
        transform=TRANSFORMS["gentle"],
        batch_size=budget.batch_size,
        seed=seed,
    )
    encoder, losses = train(views, budget.steps, "simclr", seed=seed)
    trained = time.perf_counter()
    to_fit = Labelled(real.images[: budget.labels], real.labels[: budget.labels])
    features, test_features = embed(encoder, to_fit.images), embed(encoder, test.images)
    predictions = predict(features, to_fit.labels, test_features, seed, shares=(1.0,))
    scores = {
        f"{probe} {group}": score
        for probe, classes in (("linear", predictions.linear[1.0]), ("kNN", predictions.knn))
        for group, score in by_group(100.0 * (classes == test.labels), test.labels).items()
    }
    cell = {
        "arm": name,
        "seed": seed,
        "scores": scores,
        "loss": round(losses[-1], 4),
        "seconds_of_training": round(trained - begin, 1),
        "environment": environment(),
    }
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


Scored = dict[str, dict[int, dict[str, float]]]
"""Scores by name, of each seed, of each arm."""


def summarized(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of the table, and the differences of arms at the same seed."""
    scored: Scored = {}
    for cell in cells:
        scored.setdefault(cell["arm"], {})[cell["seed"]] = cell["scores"]
    rows = [{"arm": arm, "scores": intervals(list(of_seeds.values()))} for arm, of_seeds in scored.items()]
    differences = [
        {"of": arm, "less": less, "scores": intervals(paired_differences(scored[arm], scored[less]))}
        for arm, less in DIFFERENCES
    ]
    return {"rows": rows, "differences": differences}


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's idx files; none: the slice.")
    ] = None,
    images: Annotated[
        int, typer.Option(help="Real images that a generator's first training shows.", min=128)
    ] = 240_000,
    steps: Annotated[int, typer.Option(help="Training steps of each encoder.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    bf16: Annotated[
        bool, typer.Option(help="Train generators under bfloat16 autocast, for a CPU with AVX-512 BF16.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds of each arm.", min=1)] = 3,
    work: Annotated[Path, typer.Option(help="Folder of generators and cells.")] = Path("runs/unseen"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "unseen.json",
) -> None:
    """Compare positives of real images by generators that saw all of their classes, or not."""
    console = Console(stderr=True)
    folder = None if data is None else str(data)
    budget = Budget(steps, batch_size, LABELS, folder)
    check_budget(budget, work, {"images": images, "bf16": bf16})
    generators = {name: work / f"{name.replace(' ', '-')}.json" for name in GENERATORS}
    tasks = {
        path: (name, images, bf16, folder, work) for name, path in generators.items() if not path.exists()
    }
    run_in_processes(train_generator, tasks, jobs, console)
    paths = {
        (name, seed): work / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
        for seed in range(seeds)
        for name in ARMS
    }
    missing = {key: path for key, path in paths.items() if not path.exists()}
    run_in_processes(
        measure_into, {path: (path, *key, budget, work) for key, path in missing.items()}, jobs, console
    )
    cells = [json.loads(path.read_text()) for path in paths.values()]
    partial = (images, steps, batch_size, seeds) != (240_000, 500, 64, 3) or data is None
    record = {
        "command": command("unseen.py"),
        "left_out": [CLASSES[label] for label in LEFT_OUT],
        "steps": steps,
        "batch_size": batch_size,
        "generators": [json.loads(path.read_text()) for path in generators.values()],
        **summarized(cells),
        "cells": cells,
        **cells[-1]["environment"],
    }
    tables = (unseen_generators(record), unseen_classes(record), unseen_differences(record))
    publish(record, off_the_records(out) if partial else out, *tables)


if __name__ == "__main__":
    typer.run(main)
