"""Table 1 of the paper for the bundled generators, by both methods: ``python benchmarks/impact.py``.

Every cell (generator, method, seed) is a report of its own in the working folder, kept as soon as it is there; a second call goes on
from what there is. With ``--data``, a classifier trained on real images says which share of each level's pairs keeps its class.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from record import RESULTS, apart, write
from rich.console import Console
from rich.table import Table

import mlviews
from mlviews.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mlviews.evaluation.data import load_fashion_mnist
from mlviews.impact.report import LevelImpact
from mlviews.runs.processes import resolve_rank
from mlviews.runs.records import environment

PAIRS, BATCH = 2_000, 250  # for the share of kept classes
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sweep": ("sweep", {}),
    "walker": ("walker", {}),
    # What helps against walkers' two flaws, on one level; the walker of the preset fashion-ml-learned; and a run of two processes.
    "walker-diverse": ("walker", {"levels": [1], "directions": 4.0}),
    "walker-norm": ("walker", {"levels": [1], "keep_norm": True}),
    "walker-diverse-norm": ("walker", {"levels": [1], "directions": 4.0, "keep_norm": True}),
    "walker-joint": ("walker", {"levels": [[1, 2, 3]], "directions": 4.0, "keep_norm": True}),
    "walker-2-processes": ("walker", {"levels": [1], "devices": 2}),  # with --seeds 1
}
QUICK = {"sweep": {"steps": 10, "evaluations": 2}, "walker": {"steps": 10, "warmup": 25}}


def main(
    generators: Annotated[str, typer.Option(help="Names, with commas.")] = "fashion,fashion-nvae",
    methods: Annotated[str, typer.Option(help=f"With commas, of {', '.join(VARIANTS)}.")] = "sweep,walker",
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    target_loss: Annotated[float, typer.Option(help="Plain InfoNCE in nats.")] = 0.7,
    data: Annotated[Path | None, typer.Option(help="Folder with Fashion-MNIST's idx files, to see which pairs keep their class.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for the cells' reports and checkpoints.")] = Path("runs/impact-table"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "impact.json",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    collect: Annotated[bool, typer.Option(help="Measure nothing: take the cells that are there.")] = False,
    quick: Annotated[bool, typer.Option(help="A few steps and no more: to see that it runs.")] = False,
) -> None:
    """Measure every cell that is not there yet, then print and write the table."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    classifier = None if data is None else _classifier(data, work / "classifier.safetensors")
    if quick:
        work = work / "quick"
        out = apart(out, work)
    cells = []
    for generator, method, seed in itertools.product(generators.split(","), methods.split(","), range(seeds)):
        path = work / f"{generator}-{method}-{seed}"
        kind, options = VARIANTS[method]
        there = (path / "impact.json").exists()
        if collect and not there:
            continue
        if not there:
            options = {**options, **QUICK[kind], "monte_carlo": 2_000} if quick else options
            report = mlviews.measure_impact(mlviews.load_generator(generator), kind, target_loss, path, seed=seed, **options)
            if resolve_rank(None, None)[0]:
                return
            report.save(path)
        report = mlviews.ImpactReport.load(path)
        rows = report.rows()
        if classifier is not None:
            for row, one in zip(rows, report.impacts, strict=True):
                row["class_kept"] = class_kept(mlviews.load_generator(generator), one, classifier, seed)
        cells.append({
            "generator": generator, "method": method, "seed": seed, "seconds": report.seconds, "options": report.options,
            "target_loss": report.target_loss, "temperature": report.temperature, "pairs": report.pairs,
            "rows": rows, "curves": [None if one.curve is None else dataclasses.asdict(one.curve) for one in report.impacts],
            **report.environment,
        })  # fmt: skip
    record = {
        "command": shlex.join(["python", "benchmarks/impact.py", *sys.argv[1:]]),
        "cells": cells,
        "agreement": {name: agreement([cell for cell in cells if cell["generator"] == name]) for name in generators.split(",")},
        **environment(),
    }
    for name, method in dict.fromkeys((cell["generator"], cell["method"]) for cell in cells):
        console.print(_table(name, method, [cell for cell in cells if (cell["generator"], cell["method"]) == (name, method)]))
    console.print(record["agreement"])
    for path in (write(record, out), draw(cells, out.with_suffix(".png"))):
        console.print(path)


def draw(cells: list[dict[str, Any]], path: Path) -> Path:
    """Distances for the target, level by level: mean and range over seeds; hollow where the target was not reached."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(cell["generator"] for cell in cells))
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for method, marker in (("sweep", "o"), ("walker", "s")):
            own = [cell["rows"] for cell in cells if (cell["generator"], cell["method"]) == (name, method)]
            colour, shift = ("tab:blue", -0.08) if method == "sweep" else ("tab:orange", 0.08)
            for at, rows in enumerate(zip(*own, strict=True)):
                found = [row["distance_mean"] for row in rows]
                mean = statistics.fmean(found)
                ends = [[mean - min(found)], [max(found) - mean]]
                face = "white" if any(row["status"] == "under-used" for row in rows) else colour
                label = None if at else method
                ax.errorbar(at + shift, mean, yerr=ends, fmt=marker, capsize=3, color=colour, markerfacecolor=face, label=label)
        levels = [f"{row['level']}\n{row['name']}" for row in next(cell["rows"] for cell in cells if cell["generator"] == name)]
        ax.set(title=name, yscale="log", xlabel="level", ylabel="distance for the target", xticks=range(len(levels)), xticklabels=levels)
        ax.grid(axis="y", alpha=0.3)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@torch.no_grad()
def class_kept(generator: mlviews.MLVGM, impact: LevelImpact, classifier: Classifier, seed: int) -> float:
    """Share of pairs whose positive, moved by the measured perturber, is classified as its anchor is."""
    key = int(impact.key) if impact.key.isdigit() else impact.key
    source = mlviews.MLViewSource(generator, {key: impact.perturber}, batch_size=BATCH, num_samples=PAIRS, seed=seed)
    kept = 0
    for views in source:
        first, second = (classifier(view)[1].argmax(1) for view in views)
        kept += int((first == second).sum())
    return kept / PAIRS


def agreement(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation of the levels' mean distances, averaged over seeds: between methods, and with the level's index.

    A level that never reached the target lies farther away than any that did.
    """
    means: dict[str, Any] = {}
    for method in sorted({cell["method"] for cell in cells}):
        rows = [
            [math.inf if row["status"] == "under-used" else row["distance_mean"] for row in cell["rows"]]
            for cell in cells
            if cell["method"] == method
        ]
        if len(rows[0]) > 1:
            means[method] = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    found = {f"{method} with the level": _spearman(range(len(values)), values) for method, values in means.items()}
    if len(means) == 2:
        found["between methods"] = _spearman(*means.values())
    return found


def _spearman(one: Any, other: Any) -> float:
    """Equal values share their mean rank: two levels that never reached the target are not told apart."""
    return float(np.corrcoef(pd.Series(list(one)).rank(), pd.Series(list(other)).rank())[0, 1])


def _classifier(data: Path, path: Path) -> Classifier:
    """The zoo's ruler, trained on real images unless it is there."""
    if not path.exists():
        model = train_classifier(load_fashion_mnist(data, "train"))
        save_classifier(model, path, {"seed": 0, "epochs": 4})
    return load_classifier(path)[0]


def _table(name: str, method: str, cells: list[dict[str, Any]]) -> Table:
    """Means over seeds, and their range."""
    seconds = statistics.fmean(cell["seconds"] for cell in cells)
    table = Table("level", "loss, nats", "distance", "relative", "class kept", title=f"{name}, {method}: {seconds:.0f} s")
    for rows in zip(*(cell["rows"] for cell in cells), strict=True):
        values = {key: [row.get(key) for row in rows] for key in ("loss_nats", "distance_mean", "distance_relative", "class_kept")}
        shown = ["" if None in found else f"{statistics.fmean(found):.3g} ({min(found):.3g}–{max(found):.3g})" for found in values.values()]
        table.add_row(rows[0]["level"], *shown)
    return table


if __name__ == "__main__":
    typer.run(main)
