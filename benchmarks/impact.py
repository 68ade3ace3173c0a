"""Table 1 of the paper for the bundled generators, by both methods: ``python benchmarks/impact.py``.

Every cell (generator, method, seed) is a report of its own in the working folder, which stays as soon as it
is written; a second call goes on from there. With ``--data``, a classifier trained on real images says which
share of each level's pairs keeps its class.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from documents.impact import impact
from real_images import classifier_of
from record import RESULTS, command, off_the_records, publish
from scipy.stats import spearmanr

import mlviews
from mlviews.evaluation.classifier import Classifier
from mlviews.impact.report import LevelImpact
from mlviews.perturb import Walker
from mlviews.runs.processes import resolve_rank
from mlviews.runs.records import environment

PAIRS, BATCH = 2_000, 250  # for the share of pairs that keep their class
SHIFTS = 2_000  # anchors, for the directions of each level
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sweep": ("sweep", {}),
    "walker": ("walker", {}),
    # The sweep in a fifth of the time.
    "sweep-short": ("sweep", {"steps": 80, "train_pairs": 16, "evaluations": 2}),
    # For a sampler's noises, whose length has to stay; and the same in a third of the time.
    "sweep-mix": ("sweep", {"perturber": "mix"}),
    "sweep-mix-short": ("sweep", {"perturber": "mix", "steps": 250, "train_pairs": 16, "evaluations": 4}),
    # What helps against walkers' two flaws, on one level; the walker of the preset fashion-ml-learned; and a
    # run of two processes.
    "walker-diverse": ("walker", {"levels": [1], "directions": 4.0}),
    "walker-norm": ("walker", {"levels": [1], "keep_norm": True}),
    "walker-diverse-norm": ("walker", {"levels": [1], "directions": 4.0, "keep_norm": True}),
    "walker-joint": ("walker", {"levels": [[1, 2, 3]], "directions": 4.0, "keep_norm": True}),
    # The walker of the preset fashion-ml-drawn.
    "walker-drawn": (
        "walker",
        {
            "levels": [[1, 2, 3]],
            "noise": True,
            "lr_walker": 2e-3,
            "steps": 600,
            "warmup": 200,
            "patience": 200,
        },
    ),
    "walker-2-processes": ("walker", {"levels": [1], "devices": 2}),  # with --seeds 1
}
QUICK = {"sweep": {"steps": 10, "evaluations": 2}, "walker": {"steps": 10, "warmup": 25}}
STYLES = {  # marker, color, shift
    "sweep": ("o", "tab:blue", -0.08),
    "walker": ("s", "tab:orange", 0.08),
    "sweep-short": ("o", "tab:blue", 0.0),
    "sweep-mix": ("o", "tab:green", 0.0),
    "sweep-mix-short": ("o", "tab:green", 0.0),
}

Cell = dict[str, Any]


def measure(generator: str, method: str, seed: int, target_loss: float, folder: Path, quick: bool) -> bool:
    """Measure a cell; return False in a process that only helped another one, which writes the report."""
    kind, options = VARIANTS[method]
    if quick:
        options = {**options, **QUICK[kind], "monte_carlo": 2_000}
    network = mlviews.load_generator(generator)
    report = mlviews.measure_impact(network, kind, target_loss, folder, seed=seed, **options)
    rank, _ = resolve_rank(None, None)
    if rank:
        return False
    report.save(folder)
    return True


def read_cell(generator: str, method: str, seed: int, folder: Path, classifier: Classifier | None) -> Cell:
    """Return what goes into the record of a cell's report."""
    report = mlviews.ImpactReport.load(folder)
    rows = report.rows()
    for row, level in zip(rows, report.impacts, strict=True):
        if isinstance(level.perturber, Walker) and level.perturber.noise:
            row["by_level"] = by_level(mlviews.load_generator(generator), level, seed)
    if classifier is not None:
        for row, level in zip(rows, report.impacts, strict=True):
            row["class_kept"] = share_of_class(mlviews.load_generator(generator), level, classifier, seed)
    curves = [level.curve and dataclasses.asdict(level.curve) for level in report.impacts]
    return {
        "generator": generator, "method": method, "seed": seed, "seconds": report.seconds,
        "options": report.options, "target_loss": report.target_loss,
        "temperature": report.temperature, "pairs": report.pairs,
        "rows": rows, "curves": curves, **report.environment,
    }  # fmt: skip


@torch.no_grad()
def by_level(generator: mlviews.MLVGM, moved: LevelImpact, seed: int) -> list[dict[str, Any]]:
    """Return how far, and over how many directions, a walker that draws moves each of its levels.

    Directions are the participation ratio of the second moments of unit shifts, of anchors it has not seen.
    """
    source = mlviews.MLViewSource(
        generator,
        {moved.key: moved.perturber},
        batch_size=SHIFTS,
        num_samples=SHIFTS,
        micro_batch_size=BATCH,
        seed=seed + 1,
        layout=lambda batch: batch,
    )
    before, after = next(iter(source)).latents
    rows = []
    for level in moved.levels:
        shifts = (after[level] - before[level]).flatten(1)
        units = F.normalize(shifts, dim=1)
        moments = units.T @ units
        prior = (before[level] - before[level].roll(1, 0)).flatten(1).norm(dim=1).mean()
        rows.append({
            "level": generator.levels[level].name,
            "scalars": generator.levels[level].size,
            "directions": float((moments.trace() / moments.norm()).square()),
            "distance_relative": float(shifts.norm(dim=1).mean() / prior),
        })  # fmt: skip
    return rows


@torch.no_grad()
def share_of_class(generator: mlviews.MLVGM, level: LevelImpact, classifier: Classifier, seed: int) -> float:
    """Return the share of pairs that the measured perturber leaves in one class."""
    key = int(level.key) if level.key.isdigit() else level.key
    source = mlviews.MLViewSource(
        generator, {key: level.perturber}, batch_size=BATCH, num_samples=PAIRS, seed=seed
    )
    same = 0
    for views in source:
        first, second = (classifier(view)[1].argmax(1) for view in views)
        same += int((first == second).sum())
    return same / PAIRS


def agreement(cells: Sequence[Cell]) -> dict[str, float]:
    """Return Spearman's rank correlation of the levels' mean distances, averaged over seeds.

    It is taken between methods, and of each method with the level's index. A level that never reached the
    target lies farther away than any that did, and such levels rank as equal.
    """
    means: dict[str, list[float]] = {}
    for method in sorted({cell["method"] for cell in cells}):
        distances = [
            [math.inf if row["status"] == "under-used" else row["distance_mean"] for row in cell["rows"]]
            for cell in cells
            if cell["method"] == method
        ]
        if len(distances[0]) > 1:
            means[method] = [statistics.fmean(level) for level in zip(*distances, strict=True)]
    correlations = {
        f"{method} with the level": float(spearmanr(range(len(levels)), levels).statistic)
        for method, levels in means.items()
    }
    if len(means) == 2:
        correlations["between methods"] = float(spearmanr(*means.values()).statistic)
    return correlations


def draw(cells: Sequence[Cell], path: Path) -> Path:
    """Draw the levels' distances for the target: mean and range over seeds; hollow if a seed missed it."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(cell["generator"] for cell in cells))
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for method, (marker, color, shift) in STYLES.items():
            reports = [
                cell["rows"] for cell in cells if (cell["generator"], cell["method"]) == (name, method)
            ]
            for index, rows in enumerate(zip(*reports, strict=True)):
                distances = [row["distance_mean"] for row in rows]
                mean = statistics.fmean(distances)
                missed = any(row["status"] == "under-used" for row in rows)
                axis.errorbar(
                    index + shift, mean, yerr=[[mean - min(distances)], [max(distances) - mean]], fmt=marker,
                    capsize=3, color=color, markerfacecolor="white" if missed else color,
                    label=None if index else method,
                )  # fmt: skip
        rows = next(cell["rows"] for cell in cells if cell["generator"] == name)
        axis.set(title=name, yscale="log", xlabel="level", ylabel="distance for the target")
        axis.set_xticks(range(len(rows)), [f"{row['level']}\n{row['name']}" for row in rows])
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(
    generators: Annotated[str, typer.Option(help="Names, with commas.")] = "fashion,fashion-nvae",
    methods: Annotated[str, typer.Option(help=f"With commas, of {', '.join(VARIANTS)}.")] = "sweep,walker",
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    target_loss: Annotated[float, typer.Option(help="Plain InfoNCE in nats.")] = 0.7,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST's idx files, to see which pairs keep their class."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for the cells' reports and checkpoints.")] = Path(
        "runs/impact-table"
    ),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "impact.json",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    collect: Annotated[bool, typer.Option(help="Measure nothing: take the cells of earlier calls.")] = False,
    quick: Annotated[bool, typer.Option(help="A few steps and no more: to see that it runs.")] = False,
) -> None:
    """Measure every cell that has no report, then print and write the table."""
    if threads:
        torch.set_num_threads(threads)
    classifier = None if data is None else classifier_of(data, work / "classifier.safetensors")
    if quick:
        work = work / "quick"
        out = off_the_records(out)
    names = generators.split(",")
    cells = []
    for generator, method, seed in itertools.product(names, methods.split(","), range(seeds)):
        folder = work / f"{generator}-{method}-{seed}"
        if not (folder / "impact.json").exists():
            if collect:
                continue
            if not measure(generator, method, seed, target_loss, folder, quick):
                return
        cells.append(read_cell(generator, method, seed, folder, classifier))
    record = {
        "command": command("impact.py"),
        "cells": cells,
        "agreement": {
            name: agreement([cell for cell in cells if cell["generator"] == name]) for name in names
        },
        **environment(),
    }
    publish(record, out, impact(record), str(record["agreement"]), str(draw(cells, out.with_suffix(".png"))))


if __name__ == "__main__":
    typer.run(main)
