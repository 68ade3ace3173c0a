"""Views compared by what an encoder learns from them: the paper's tables 2 to 4 in miniature.

``python benchmarks/probe.py --data DIR``

Small encoders are trained for the same number of steps, each on another source of views; then linear probes
and kNN on real Fashion-MNIST images say what they learned. Every cell (source, method, seed) is a file in the
working folder, which stays as soon as it is written; a second call goes on from there. Prints tables, writes
``benchmarks/results/probe.json`` and two plots.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
import weights
from documents.views import differences_table, scores_table
from real_images import train_and_test
from record import RESULTS, SCORES, command, intervals, off_the_records, paired_differences, publish
from rich.console import Console
from view_sources import (
    CELLS,
    ENDLESS,
    EXTENTS,
    FASHION,
    METHODS,
    POOR,
    SOURCES,
    TELLING,
    TRANSFORMS,
    Comparison,
    extent,
    generated,
)  # fmt: skip

from mlviews.evaluation.data import Labelled
from mlviews.evaluation.learner import initial, train
from mlviews.evaluation.readout import Scores, evaluate
from mlviews.evaluation.real_views import RealViews
from mlviews.runs.files import whole
from mlviews.runs.records import environment

GROUPS = dict.fromkeys(source.group for source in SOURCES.values())

Cell = dict[str, Any]
Key = tuple[str, str, int]  # method, source, seed


class Budget(NamedTuple):
    """What every cell gets."""

    steps: int
    batch_size: int
    labels: int  # of real images, to fit the probes on
    data: str | None


# -- cells ---------------------------------------------------------------------------------------------------


def measure(method: str, name: str, seed: int, budget: Budget) -> Cell:
    """Train one encoder, and score it."""
    begin = time.perf_counter()
    source, (images, test) = SOURCES[name], train_and_test(budget.data)
    encoder = None if name == "raw pixels" else initial(method, 0.2, seed).encoder.eval()
    losses: list[float] = []
    if source.group != "untrained":
        transform = TRANSFORMS[source.transform]
        if source.config is None:
            # With a black border, as the generators make them.
            padded = F.pad(images.images, (2,) * 4)
            views: Any = RealViews(padded.__getitem__, len(padded), transform, budget.batch_size, seed)
        else:
            config = {"num_samples": 60_000, **source.config}
            if "reuse" in config:  # one epoch, at whose end each sample was shown so often
                config["num_samples"] = budget.steps * budget.batch_size
            views = generated(config, transform=transform, batch_size=budget.batch_size, seed=seed)
        encoder, losses = train(views, budget.steps, method, seed=seed)
    trained = time.perf_counter()
    to_fit = Labelled(images.images[: budget.labels], images.labels[: budget.labels])
    scores = evaluate(encoder, to_fit, test, seed)
    seconds = {"training": trained - begin, "evaluation": time.perf_counter() - trained}
    return {
        "method": method,
        "source": name,
        "seed": seed,
        "scores": by_name(scores),
        "loss": [round(loss, 4) for loss in losses[::25]],
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
    }


def by_name(scores: Scores) -> dict[str, float]:
    """Return scores by the names in SCORES."""
    values = (*scores.linear.values(), scores.knn)
    return {name: round(value, 2) for name, value in zip(SCORES, values, strict=True)}


def measure_into(path: Path, key: Key, budget: Budget) -> Cell:
    """Measure a cell on one thread and write its file; for a process of its own."""
    torch.set_num_threads(1)
    cell = {**measure(*key, budget), "environment": environment()}
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


def run_in_processes(
    function: Callable[..., Cell], tasks: dict[Path, tuple[Any, ...]], jobs: int, console: Console
) -> None:
    """Call a function for each cell's file, in processes, each of which writes its cell's file."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of scikit-learn's solver, in the workers
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, *arguments): path.stem for path, arguments in tasks.items()}
        for number, future in enumerate(as_completed(futures), 1):
            scores = ", ".join(f"{name} {score:.1f}" for name, score in future.result()["scores"].items())
            console.print(f"{number}/{len(tasks)} {futures[future]}: {scores}")


def key_of(cell: Cell) -> Key:
    """Return which cell it is."""
    return cell["method"], cell["source"], cell["seed"]


def recorded_cells(path: Path, keys: Sequence[Key], budget: Budget) -> list[Cell]:
    """Return those of the cells that a record of the same budget holds."""
    record = json.loads(path.read_text())
    if any(record[name] != value for name, value in budget._asdict().items() if name != "data"):
        raise typer.BadParameter(f"{path} is of another budget: measure its cells anew, without --earlier.")
    return [cell for cell in record["cells"] if key_of(cell) in keys]


def check_budget(budget: Budget, work: Path, settings: Mapping[str, Any]) -> None:
    """Note in the working folder what its cells depend on, and refuse to mix them with others.

    Args:
        budget: what every cell gets.
        work: the folder.
        settings: what the cells depend on besides, e.g. the digests of the weights.
    """
    path = work / "budget.json"
    facts = [*budget[:3], budget.data is not None, settings]
    if path.exists() and json.loads(path.read_text()) != facts:
        raise typer.BadParameter(
            f"{work} holds cells of another budget or of other settings (steps, batch size, labels, whole "
            f"data set, settings: {path.read_text()}): give another --work."
        )
    with whole(path) as part:  # another call may be reading it
        part.write_text(json.dumps(facts))


# -- statistics ----------------------------------------------------------------------------------------------


def summarise(cells: Sequence[Cell], compared: Comparison = FASHION) -> dict[str, Any]:
    """Return scores of each method and source over seeds, and paired differences."""
    scores: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for cell in cells:
        scores.setdefault((cell["method"], cell["source"]), {})[cell["seed"]] = cell["scores"]

    rows = []
    for method, name in dict.fromkeys([*compared.cells, *scores]):  # cells beside the tables' come last
        by_seed = scores.get((method, name), {})
        if by_seed:
            of_seeds = [by_seed[seed] for seed in sorted(by_seed)]
            source = compared.sources[name]._asdict()
            rows.append({"method": method, "source": name, **source, "scores": intervals(of_seeds)})
    differences = []
    for method in METHODS:
        for name, less in compared.pairs:
            of_seeds = paired_differences(scores.get((method, name), {}), scores.get((method, less), {}))
            if of_seeds:
                differences.append(
                    {"method": method, "of": name, "less": less, "scores": intervals(of_seeds)}
                )
    return {"rows": rows, "differences": differences}


# -- what is shown -------------------------------------------------------------------------------------------


def means_and_halves(scores: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return means and half intervals, for error bars."""
    return [score["mean"] for score in scores], [score["half"] or 0 for score in scores]


def draw(summary: dict[str, Any], out: Path) -> list[Path]:
    """Draw the sources side by side, and accuracy against the pool's size, as far as there are cells."""
    rows = [
        row
        for row in summary["rows"]
        if SOURCES[row["source"]].group in ("untrained", "sources") or row["source"] in TELLING
    ]
    scores = {row["source"]: row["scores"] for row in summary["rows"] if row["method"] == "simclr"}
    pools = [name for name in scores if SOURCES[name].group == "pools"]
    paths = []
    if rows:
        paths.append(draw_sources(rows, out / "probe.png"))
    if pools:
        paths.append(draw_pools(pools, scores, out / "pools.png"))
    return paths


def draw_sources(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the scores of every source, a panel for each method."""
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = [name for name in SOURCES if any(row["source"] == name for row in rows)]
    width = 4.2 * len(methods) + 1
    figure, axes = plt.subplots(1, len(methods), figsize=(width, 4), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        # What is not trained stands in every panel.
        panel = [
            row for row in rows if row["method"] == method or SOURCES[row["source"]].group == "untrained"
        ]
        for key, marker, shift in (("linear 100%", "o", -0.12), ("kNN", "s", 0.12)):
            means, halves = means_and_halves([row["scores"][key] for row in panel])
            heights = [names.index(row["source"]) + shift for row in panel]
            axis.errorbar(means, heights, xerr=halves, fmt=marker, ms=5, capsize=3, label=key)
        axis.set(
            title=method, xlabel="top-1 on real test images, %", yticks=range(len(names)), yticklabels=names
        )
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    return save(figure, axes, path)


def draw_pools(pools: Sequence[str], scores: dict[str, Any], path: Path) -> Path:
    """Draw accuracy against the pool's size, a panel for each T_x."""
    import matplotlib.pyplot as plt

    transforms = list(dict.fromkeys(SOURCES[name].transform for name in pools))
    width = 4.5 * len(transforms)
    figure, axes = plt.subplots(1, len(transforms), figsize=(width, 3.6), sharey=True, squeeze=False)
    for axis, transform in zip(axes[0], transforms, strict=True):
        labels = {
            name: name.removeprefix("pool of ").split(", no")[0]
            for name in pools
            if SOURCES[name].transform == transform
        }
        if ENDLESS[transform] in scores:
            labels[ENDLESS[transform]] = "endless"
        for key, marker in (("linear 100%", "o"), ("kNN", "s")):
            means, halves = means_and_halves([scores[name][key] for name in labels])
            axis.errorbar(
                range(len(labels)), means, yerr=halves, fmt=f"{marker}-", ms=5, capsize=3, label=key
            )
        axis.set_xticks(range(len(labels)), labels.values())
        axis.set(xlabel="different samples", title=f"T_x: {transform}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("top-1 on real test images, %")
    return save(figure, axes, path)


def save(figure: Any, axes: Any, path: Path) -> Path:
    """Put the legend into the last panel, and write the figure."""
    import matplotlib.pyplot as plt

    axes[0][-1].legend(loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# -- the benchmark -------------------------------------------------------------------------------------------


def choose(seeds: int, only: str, methods: str, quick: bool) -> list[Key]:
    """Return the cells to measure or collect."""
    names = only.split(";") if only else list(SOURCES)
    for name in names:
        if name and name not in SOURCES:
            raise typer.BadParameter(f"No source {name!r}: there are {'; '.join(SOURCES)}.")
    for method in filter(None, methods.split(",")):
        if method not in METHODS:
            raise typer.BadParameter(f"No method {method!r}: there are {', '.join(METHODS)}.")
    cells = [(method, name) for method, name in CELLS if name in names]
    if methods:
        cells = [(method, name) for method in methods.split(",") for name in names]
    if quick:
        groups = ("untrained", "sources")
        cells = [
            (method, name) for method, name in cells if method == "simclr" and SOURCES[name].group in groups
        ]
    return [(method, name, seed) for seed in range(seeds) for method, name in cells]


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    labels: Annotated[
        int, typer.Option(help="Most labelled real images to fit the probes on.", min=100)
    ] = 10_000,
    only: Annotated[str, typer.Option(help="Sources to measure, with semicolons; none: all of them.")] = "",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(METHODS)}, with commas: each on every source of --only; none: the tables'."
        ),
    ] = "",
    jobs: Annotated[int, typer.Option(help="Cells at a time, one thread each.", min=1)] = 2,
    work: Annotated[Path, typer.Option(help="Folder for the cells.")] = Path("runs/probe-table"),
    out: Annotated[Path, typer.Option(help="Folder for the record and the plots.")] = RESULTS,
    earlier: Annotated[
        Path | None,
        typer.Option(help="A record of the same budget, whose cells are taken from there and not measured."),
    ] = None,
    collect: Annotated[bool, typer.Option(help="Measure nothing: take the cells of earlier calls.")] = False,
    quick: Annotated[
        bool, typer.Option(help="SimCLR's sources with one seed and fewer labels; no record.")
    ] = False,
) -> None:
    """Measure every cell that has no file, then print, write and draw the tables."""
    console = Console()
    if quick:
        seeds, labels, work = 1, min(labels, 2_000), work / "quick"
    if quick or ((only or methods) and out.resolve() == RESULTS):  # a part has a folder of its own
        out = off_the_records(out, work)
    keys = choose(seeds, only, methods, quick)
    budget = Budget(steps, batch_size, labels, None if data is None else str(data))
    check_budget(budget, work, weights.bundled(*weights.versions()))
    recorded = [] if earlier is None else recorded_cells(earlier, keys, budget)
    keys = [key for key in keys if key not in {key_of(cell) for cell in recorded}]
    paths = {key: work / f"{'-'.join(map(str, key)).replace(' ', '_')}.json" for key in keys}
    if not collect:
        poor = Path(POOR["generator"]["weights"]).exists()
        missing = {
            key: path
            for key, path in paths.items()
            if not path.exists() and (poor or SOURCES[key[1]].group != "quality")
        }
        tasks = {path: (path, key, budget) for key, path in missing.items()}
        run_in_processes(measure_into, tasks, jobs, console)

    cells = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    if not cells:
        raise typer.BadParameter(f"There are no cells in {work}: leave out --collect.")
    environments = [cell.pop("environment") for cell in cells]
    cells += recorded
    summary = summarise(cells)
    images, test = train_and_test(budget.data)
    measured = {cell["source"] for cell in cells}
    record = {
        "command": command("probe.py"),
        **budget._asdict(),
        "test_images": len(test.labels),
        "probe_images": min(labels, len(images.labels)),
        "seeds": seeds,
        **environments[-1],
        "commits": sorted({facts["versions"].get("commit", "") for facts in environments}),
        "extents": {name: extent(name) for name in EXTENTS if name in measured},
        "summary": summary,
        "cells": cells,
    }
    out.mkdir(parents=True, exist_ok=True)
    plots = [str(path) for path in draw(summary, out)]
    publish(
        record,
        out / "probe.json",
        scores_table(record, *GROUPS, methods=METHODS),
        differences_table(record),
        *plots,
    )


if __name__ == "__main__":
    typer.run(main)
