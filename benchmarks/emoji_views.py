"""Views compared on color images: emoji as four vendors draw them.

``python benchmarks/emoji_views.py --data DIR --weights FILE``, after ``benchmarks/emoji_data.py`` and
``python -m mlviews.zoo.train film --data DIR/train``

Measures the levels of the generator (a short sweep), and how good it is. Then small encoders are trained by
SimCLR for the same number of steps, each on another source of views with another T_x, and tested on held-out
emoji: by linear probes and kNN for Unicode's groups, and by the retrieval of the same emoji from another
vendor, a positive pair that nobody made. Every cell is a file in the working folder, and a second call goes
on from there. Prints tables, writes ``benchmarks/results/emoji.json`` and a picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from documents.emoji import emoji, emoji_differences, emoji_generator
from emoji_data import SIDE, VENDORS
from impact import VARIANTS
from matplotlib.image import imsave
from probe import Budget, Cell, check_budget, run_in_processes, summarise
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor
from view_sources import Comparison, Source, normal

import mlviews
from mlviews import MLViewSource, perturb, transforms
from mlviews.evaluation.learner import Encoder, endless, initial, train
from mlviews.evaluation.readout import embed, predict
from mlviews.evaluation.real_views import RealViews
from mlviews.evaluation.retrieval import retrieve
from mlviews.images import Folder, Shape
from mlviews.runs.files import sha256, whole
from mlviews.runs.records import environment
from mlviews.source import pair_layout
from mlviews.viz import mosaic
from mlviews.zoo.quality.figures import distance_figures, frechet_distance, gaussian, nearest

SCORES = ("linear", "linear, balanced", "kNN", "kNN, balanced", "recall@1", "recall@5", "mAP")
TRANSFORMS = {
    "none": transforms.Augmentation(size=SIDE, scale=None, flip=0.0),
    "crop": transforms.simclr(size=SIDE, color=False),  # and flip
    "full": transforms.simclr(size=SIDE, color=True),  # brightness, contrast, saturation, hue, grayscale too
}
MATCHED = "matched"
VIEWS: dict[str, dict[str, Any] | None] = {
    "real": None,
    "single random": normal({":": 0.2}),
    "ML random": normal({"1:": 1.0}),
    "ML matched": {"perturb": MATCHED},  # what the sweep found for the generator
    "real + generated": normal({"1:": 1.0}),  # batches of both in turn
}
MIXED = "real + generated"
LAW = perturb.Normal(std=1.0, truncation=2.0)  # of the anchors
STEPS = 300
REUSE = 4  # steps that show each generated sample


UNTRAINED = ("raw pixels", "untrained encoder")
ROWS = {name: Source("untrained", "", None) for name in UNTRAINED} | {
    f"{views}, {transform}": Source(views, transform, config)
    for views, config in VIEWS.items()
    for transform in TRANSFORMS
}
PAIRS = (
    # What the color half of T_x does, and the crop.
    *((f"{views}, full", f"{views}, crop") for views in VIEWS),
    *((f"{views}, crop", f"{views}, none") for views in VIEWS),
    # Generated views against real ones, and among themselves, with one T_x for both.
    *(
        (f"{views}, {transform}", f"real, {transform}")
        for transform in TRANSFORMS
        for views in list(VIEWS)[1:]
    ),
    # The best of both kinds, each with the T_x that suits it.
    ("ML random, none", "real, full"),
    ("real + generated, none", "real, full"),
    *((f"ML random, {transform}", f"single random, {transform}") for transform in TRANSFORMS),
    *((f"ML matched, {transform}", f"ML random, {transform}") for transform in TRANSFORMS),
)
COMPARED = Comparison(ROWS, [("simclr", name) for name in ROWS], PAIRS, SCORES)


# -- data ----------------------------------------------------------------------------------------------------


class Emoji(NamedTuple):
    """The images of a split, and what is known of each."""

    images: Tensor  # uint8 [N, 3, 32, 32]
    labels: Tensor  # Unicode's group, [N]
    items: Tensor  # the emoji, which has one number for all vendors, [N]
    vendors: Tensor  # [N]


def read_split(folder: Path) -> Emoji:
    """Return the images that ``emoji_data.py`` wrote into a folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else.
    """
    files = Folder(folder, Shape(3, SIDE, SIDE))
    names = [path.stem.split("_") for path in files.files]
    if any(len(name) != 2 or name[1] not in VENDORS for name in names):
        raise ValueError(f"{folder} is not what emoji_data.py writes: make it anew.")
    numbers = {code: number for number, code in enumerate(dict.fromkeys(code for code, _ in names))}
    items = torch.tensor([numbers[code] for code, _ in names])
    vendors = torch.tensor([VENDORS.index(vendor) for _, vendor in names])
    return Emoji(files.resident(torch.device("cpu")), files.labels, items, vendors)


# -- views ---------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """What the generated views are made with."""

    weights: Path  # of the generator
    levels: Path  # folder of the sweep's report


class InTurn:
    """Batches of two sources in turn."""

    num_views, layout, device = 2, staticmethod(pair_layout), torch.device("cpu")

    def __init__(self, first: Any, second: Any) -> None:
        self.sources = (first, second)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batches in zip(*map(endless, self.sources), strict=True):
            yield from batches


def generated(row: Source, files: Files, samples: int, **options: Any) -> MLViewSource:
    """Return the source of a row's generated views, which makes so many samples, showings counted."""
    config = row.config or {}
    moved = config["perturb"]
    if moved == MATCHED:
        perturbers: Any = perturb.matched(mlviews.ImpactReport.load(files.levels))
    else:
        perturbers = {levels: perturb.build(spec) for levels, spec in moved.items()}
    generator = mlviews.load_generator("film", files.weights)
    return MLViewSource(generator, perturbers, LAW, num_samples=samples, **options)


def views_of(row: Source, images: Tensor, seed: int, budget: Budget, files: Files) -> Any:
    """Return the source of a row's views."""
    transform = TRANSFORMS[row.transform]
    real = RealViews(images.__getitem__, len(images), transform, budget.batch_size, seed)
    if row.config is None:
        return real
    samples = budget.steps * budget.batch_size
    if row.group == MIXED:
        samples //= 2
    options = {"transform": transform, "batch_size": budget.batch_size, "seed": seed, "reuse": REUSE}
    views = generated(row, files, samples, **options)
    return InTurn(real, views) if row.group == MIXED else views


# -- cells ---------------------------------------------------------------------------------------------------


def score(encoder: Encoder | None, train_set: Emoji, test: Emoji, seed: int) -> dict[str, float]:
    """Return what an encoder knows of held-out emoji, in percent, by the names in SCORES."""
    features = embed(encoder, test.images)
    predicted = predict(embed(encoder, train_set.images), train_set.labels, features, seed, shares=(1.0,))
    accuracies = [
        100 * measure(test.labels, classes)
        for classes in (predicted.linear[1.0], predicted.knn)
        for measure in (accuracy_score, balanced_accuracy_score)
    ]
    retrieval = retrieve(features, test.items, test.vendors)
    values = (*accuracies, *retrieval.recall.values(), retrieval.precision)
    return {name: round(float(value), 2) for name, value in zip(SCORES, values, strict=True)}


def measure_cell(name: str, seed: int, budget: Budget, files: Files) -> Cell:
    """Train one encoder, and score it."""
    begin = time.perf_counter()
    train_set, test = (read_split(Path(budget.data or "", part)) for part in ("train", "test"))
    row = ROWS[name]
    losses: list[float] = []
    encoder = None if name == "raw pixels" else initial("simclr", 0.2, seed).encoder.eval()
    if name not in UNTRAINED:
        views = views_of(row, train_set.images, seed, budget, files)
        encoder, losses = train(views, budget.steps, seed=seed)
    trained = time.perf_counter()
    scores = score(encoder, train_set, test, seed)
    seconds = {"training": trained - begin, "evaluation": time.perf_counter() - trained}
    return {
        "method": "simclr",
        "source": name,
        "seed": seed,
        "scores": scores,
        "loss": [round(loss, 4) for loss in losses[::25]],
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
    }


def measure_into(path: Path, name: str, seed: int, budget: Budget, files: Files) -> Cell:
    """Measure a cell on one thread and write its file; for a process of its own."""
    torch.set_num_threads(1)
    cell = {**measure_cell(name, seed, budget, files), "environment": environment()}
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


# -- the generator -------------------------------------------------------------------------------------------


def measure_generator(budget: Budget, files: Files) -> dict[str, Any]:
    """Return how far the generator's samples are from real images, and where its weights come from.

    Fréchet distances are those of features of an encoder trained on real images with the full T_x (seed 0).
    Beside the distance of samples from the training images stands that of one half of these from the other,
    held out by emoji. Distances to the nearest training image, of samples and of test images, are L2 of
    pixels in [0, 1].
    """
    train_set, test = (read_split(Path(budget.data or "", part)) for part in ("train", "test"))
    count = len(train_set.images)
    generator = mlviews.load_generator("film", files.weights)
    anchors = generator(generator.sample_latents(range(count), seed=1, truncation=LAW.truncation))
    samples = (anchors * 255).round().to(torch.uint8)
    real = views_of(ROWS["real, full"], train_set.images, 0, budget, files)
    encoder, _ = train(real, budget.steps, seed=0)
    even = train_set.items % 2 == 0
    features = {
        "samples": embed(encoder, samples),
        "train": embed(encoder, train_set.images),
        "half": embed(encoder, train_set.images[even]),
        "other half": embed(encoder, train_set.images[~even]),
    }
    gaussians = {name: gaussian(values) for name, values in features.items()}
    distances = {
        name: nearest(images.float() / 255, train_set.images, lambda images: None)[0]
        for name, images in (("samples", samples[:1_000]), ("test", test.images))
    }
    return {
        "sha256": sha256(files.weights),
        "provenance": generator.provenance,
        "frechet": {
            "samples": round(frechet_distance(gaussians["samples"], gaussians["train"]), 2),
            "halves": round(frechet_distance(gaussians["half"], gaussians["other half"]), 2),
        },
        "nearest": {name: distance_figures(values) for name, values in distances.items()},
    }


def measure_levels(files: Files) -> list[dict[str, Any]]:
    """Return the rows of the sweep's report, which is measured first unless it is there."""
    if not (files.levels / "impact.json").exists():
        generator = mlviews.load_generator("film", files.weights)
        method, options = VARIANTS["sweep-short"]
        mlviews.measure_impact(generator, method, 0.7, files.levels, anchor=LAW, **options).save(files.levels)
    return mlviews.ImpactReport.load(files.levels).rows()


def draw(files: Files, path: Path) -> Path:
    """Draw 48 samples; then anchors, and two positives of each as "ML random" and "ML matched" make them."""
    rows: list[list[Tensor]] = []
    count = 16  # columns
    for name in ("ML random, none", "ML matched, none"):
        source = generated(
            ROWS[name], files, 3 * count, batch_size=3 * count, num_views=3, seed=0, transform=None
        )
        views = next(iter(source))
        if not rows:
            rows += [list(part) for part in views[0].split(count)]
        rows += [list(view[:count]) for view in views]
    imsave(path, mosaic(rows).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())
    return path


# -- the benchmark -------------------------------------------------------------------------------------------


def stored(path: Path, content: Any) -> Any:
    """Return what a file of the working folder holds, which ``content`` makes if there is none."""
    if not path.exists():
        with whole(path) as part:
            part.write_text(json.dumps(content()))
    return json.loads(path.read_text())


def file_stem(name: str) -> str:
    """Return a row's name as a file's."""
    return name.replace(" ", "_").replace(",", "")


def main(
    data: Annotated[Path, typer.Option(help="Folder that emoji_data.py wrote.", exists=True)],
    weights: Annotated[
        Path, typer.Option(help="The generator that was trained on its training images.", exists=True)
    ],
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of training.", min=4)] = STEPS,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    only: Annotated[
        str, typer.Option(help="Rows to measure, with semicolons, without a record; none: all of them.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Cells at a time, one thread each.", min=1)] = 1,
    work: Annotated[
        Path, typer.Option(help="Folder for the cells; those of a generator have one of their own in it.")
    ] = Path("runs/emoji-probe"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "emoji.json",
) -> None:
    """Measure every cell that has no file, then print, write and draw the tables."""
    torch.set_num_threads(1)
    names = only.split(";") if only else list(ROWS)
    for name in names:
        if name not in ROWS:
            raise typer.BadParameter(f"No row {name!r}: there are {'; '.join(ROWS)}.")
    manifest = json.loads((data / "manifest.json").read_text())
    labels = sum(manifest["images"]["train"].values())
    budget = Budget(steps, batch_size, labels, str(data))
    check_budget(budget, work, {})  # cells of a generator are in a folder of its digest
    of_generator = work / sha256(weights)[:8]
    files = Files(weights, of_generator / "levels")
    paths = {
        (name, seed): (work if ROWS[name].config is None else of_generator) / f"{file_stem(name)}-{seed}.json"
        for seed in range(seeds)
        for name in names
        if name != "raw pixels" or seed == 0  # whose scores hardly depend on it
    }
    missing = {key: path for key, path in paths.items() if not path.exists()}
    if any(name.startswith("ML matched") for name, _ in missing):
        measure_levels(files)
    tasks = {path: (path, *key, budget, files) for key, path in missing.items()}
    run_in_processes(measure_into, tasks, jobs, Console(stderr=True))
    if only:
        return
    cells = [json.loads(path.read_text()) for path in paths.values()]
    environments = [cell.pop("environment") for cell in cells]
    if seeds < 3 or steps != STEPS:
        out = off_the_records(out, work)
    record = {
        "command": command("emoji_views.py"),
        **budget._asdict(),
        "manifest": manifest,
        "seeds": seeds,
        "reuse": REUSE,
        **environments[-1],
        "commits": sorted({machine["versions"].get("commit", "") for machine in environments}),
        "generator": stored(of_generator / "generator.json", lambda: measure_generator(budget, files)),
        "levels": measure_levels(files),
        "score_names": SCORES,
        "summary": summarise(cells, COMPARED),
        "cells": cells,
    }
    publish(record, out, emoji_generator(record), emoji(record), emoji_differences(record))
    print(draw(files, out.with_suffix(".png")))


if __name__ == "__main__":
    typer.run(main)
