"""Views compared by what an encoder learns from them: the paper's tables 2 to 4 in miniature, ``python benchmarks/probe.py --data DIR``.

Small encoders are trained for the same number of steps, each on another source of views; then linear probes and kNN on real
Fashion-MNIST images say what they learned. Every cell (source, method, seed) is a file of its own in the working folder, kept as soon as
it is there; a second call goes on from what there is. Prints tables, writes ``benchmarks/results/probe.json`` and two plots.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from record import RESULTS, SCORES, apart, shown, write
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from mlviews import MLViewSource
from mlviews.config import source_arguments
from mlviews.evaluation.data import Labelled, bundled_slice, load_fashion_mnist
from mlviews.evaluation.probe import Scores, evaluate, initial, train
from mlviews.perturb import Perturber
from mlviews.runs.records import environment
from mlviews.sampling import TruncatedNormal, permutation
from mlviews.source import pair_layout
from mlviews.transforms import Augmentation, build

CROP = {"name": "simclr", "size": 28, "color": False}  # and flip
FULL = {"name": "simclr", "size": 28, "color": True}  # of gray images color changes brightness and contrast
GENTLE = {"name": "custom", "size": 28, "scale": [0.6, 1.0], "jitter": [0.4, 0.4, 0.0, 0.0]}  # FULL with crops of 60 % of the area and more
AS_IT_IS = Augmentation(size=28, scale=None, flip=0.0)


def centre(images: Tensor) -> Tensor:
    """No T_x: the 28 pixels that Fashion-MNIST's images have, of the generators' 32."""
    return AS_IT_IS(images[..., 2:-2, 2:-2], range(len(images)), seed=0, epoch=0, view=0)


class Borrowed(Perturber):
    """``T(z) = z + p(z')`` with a fresh ``z'``: a walker's shifts, drawn like noise and no longer a function of the anchor."""

    def __init__(self, walker: Perturber) -> None:
        self.walker = walker

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal:
        return anchor

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        others = noise or ()
        return [z + moved - other for z, other, moved in zip(latents, others, self.walker(others, None), strict=True)]


class InFewDirections(Perturber):
    """Noise of the same mean square, in few directions of its levels together, drawn once for all anchors."""

    def __init__(self, noisy: Perturber, directions: int = 4) -> None:
        self.noisy, self.directions = noisy, directions

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal | None:
        return self.noisy.law(anchor)

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        widths = [values[0].numel() for values in noise or ()]
        flat = torch.cat([values.flatten(1) for values in noise or ()], dim=1)
        basis = torch.linalg.qr(torch.randn(sum(widths), self.directions, generator=torch.Generator().manual_seed(0)))[0].to(flat)
        turned = (flat @ basis @ basis.T * (len(basis) / self.directions) ** 0.5).split(widths, dim=1)
        return self.noisy(latents, [new.view_as(z) for new, z in zip(turned, latents, strict=True)])


class Source(NamedTuple):
    """A row of the tables: what it stands for, the T_x it gets, and its configuration (None: real images)."""

    group: str
    transform: str
    config: dict[str, Any] | None


def _noise(stds: dict[int | str, float]) -> dict[str, Any]:
    return {"perturb": {levels: {"name": "normal", "std": std, "truncation": 2.0} for levels, std in stds.items()}}


POOR = {"generator": {"name": "fashion", "weights": "runs/fashion-poor/fashion.safetensors"}}
"""A generator trained for 40,000 images and not for 800,000: ``python -m mlviews.zoo.train fashion --data DIR --out runs/fashion-poor
--images 40000 --bf16 --threads 1``; its rows are left out where there is none."""
ML, SINGLE = {"preset": "fashion-ml-random"}, {"preset": "fashion-single-random"}
NVAE, NVAE_SINGLE = {"preset": "fashion-nvae-resample"}, _noise({":": 0.1})
SOURCES: dict[str, Source] = {
    "raw pixels": Source("untrained", "", {}),
    "untrained encoder": Source("untrained", "", {}),
    # Tables 2 and 3, every source with the T_x that the paper gives it.
    "real, crop and flip": Source("sources", "crop", None),
    "real": Source("sources", "full", None),
    "none": Source("sources", "full", {"preset": "fashion-none"}),
    "single random": Source("sources", "full", SINGLE),
    "ML random": Source("sources", "crop", ML),
    "ML matched": Source("sources", "crop", {"preset": "fashion-ml-matched"}),
    "single learned": Source("sources", "full", {"preset": "fashion-single-learned"}),
    "ML learned": Source("sources", "crop", {"preset": "fashion-ml-learned"}),
    # Appendix E: T_x on top.
    "none, crop": Source("transforms", "crop", {"preset": "fashion-none"}),
    "single random, no T_x": Source("transforms", "none", SINGLE),
    "single random, crop": Source("transforms", "crop", SINGLE),
    "ML random, no T_x": Source("transforms", "none", ML),
    "ML random, full": Source("transforms", "full", ML),
    "real, gentle": Source("transforms", "gentle", None),
    "none, gentle": Source("transforms", "gentle", {"preset": "fashion-none"}),
    "single random, gentle": Source("transforms", "gentle", SINGLE),
    "ML random, gentle": Source("transforms", "gentle", ML),
    # Learned and random views with the same T_x; and what is between them, all of the learned views' extent: noise, learned shifts that
    # are another anchor's, noise in few directions.
    "single learned, gentle": Source("learned", "gentle", {"preset": "fashion-single-learned"}),
    "ML learned, gentle": Source("learned", "gentle", {"preset": "fashion-ml-learned"}),
    "ML learned, no T_x": Source("learned", "none", {"preset": "fashion-ml-learned"}),
    "ML random of 0.55, crop": Source("learned", "crop", ML | _noise({"1:": 0.55})),
    "ML borrowed, crop": Source("learned", "crop", {"preset": "fashion-ml-learned", "wrap": "borrowed"}),
    "ML borrowed, no T_x": Source("learned", "none", {"preset": "fashion-ml-learned", "wrap": "borrowed"}),
    "ML random of 0.7 in 4 directions, crop": Source("learned", "crop", ML | _noise({"1:": 0.7}) | {"wrap": "few"}),
    "ML random of 0.7 in 4 directions, no T_x": Source("learned", "none", ML | _noise({"1:": 0.7}) | {"wrap": "few"}),
    # How far to move, with no T_x beside it.
    **{f"single random of {std}": Source("magnitudes", "none", SINGLE | _noise({":": std})) for std in (0.1, 0.4, 0.8)},
    **{f"ML random of {std}": Source("magnitudes", "none", ML | _noise({"1:": std})) for std in (0.5, 2.0)},
    "ML of 0.2 and 1.0": Source("magnitudes", "none", ML | _noise({0: 0.2, "1:": 1.0})),
    # How good the generator is.
    "poor generator, none, gentle": Source("quality", "gentle", {"preset": "fashion-none"} | POOR),
    "poor generator, single random": Source("quality", "none", SINGLE | POOR),
    "poor generator, ML random": Source("quality", "none", ML | POOR),
    # Table 4 (app. F): an NVAE's finest scale drawn afresh, against noise on all of them.
    "NVAE, single random": Source("nvae", "full", NVAE | NVAE_SINGLE),
    "NVAE, ML resample": Source("nvae", "crop", NVAE),
    "NVAE, single random, crop": Source("nvae", "crop", NVAE | NVAE_SINGLE),
    "NVAE, ML resample, full": Source("nvae", "full", NVAE),
    # Sec. 3.3: continuous sampling against a fixed set.
    **{
        f"pool of {count:,}{name}": Source("pools", transform, ML | {"pool": True, "num_samples": count})
        for transform, name in (("crop", ""), ("none", ", no T_x"))
        for count in (250, 1_000, 10_000, 60_000)
    },
}
WRAPS = {"borrowed": Borrowed, "few": InFewDirections}
TRANSFORMS: dict[str, Any] = {"none": centre, "crop": build(CROP), "full": build(FULL), "gentle": build(GENTLE)}
TELLING = ("real, gentle", "none, gentle", "single random, gentle", "ML random, gentle")  # for SimSiam and BYOL
CELLS = [("simclr", name) for name in SOURCES] + [(method, name) for method in ("simsiam", "byol") for name in TELLING]
PAIRS = (  # one source less another, at the same seed: the encoder's initial weights and the probe's labels are then the same
    ("ML random", "single random"), ("ML random", "none"), ("ML random", "real"), ("ML random", "real, crop and flip"),
    ("single random", "none"), ("ML matched", "ML random"), ("ML matched", "real"), ("ML learned", "ML random"),
    ("ML learned", "single learned"), ("ML random", "none, crop"),
    ("ML random, full", "real"), ("ML random, full", "single random"), ("ML random, full", "none"),
    ("ML random, gentle", "real, gentle"), ("ML random, gentle", "single random, gentle"), ("ML random, gentle", "none, gentle"),
    ("single random, gentle", "none, gentle"), ("ML random, no T_x", "single random, no T_x"), ("ML random, no T_x", "real, gentle"),
    ("NVAE, ML resample", "NVAE, single random"), ("NVAE, ML resample, full", "NVAE, single random"),
    ("NVAE, ML resample", "NVAE, single random, crop"),
    ("ML learned, gentle", "ML random, gentle"), ("ML learned, gentle", "single learned, gentle"),
    ("ML learned, no T_x", "ML random, no T_x"), ("ML learned", "ML random of 0.55, crop"),
    ("ML borrowed, crop", "ML learned"), ("ML borrowed, no T_x", "ML learned, no T_x"),
    ("ML borrowed, crop", "ML random of 0.55, crop"), ("ML borrowed, no T_x", "ML random of 0.5"),
    ("ML random of 0.7 in 4 directions, crop", "ML learned"), ("ML random of 0.7 in 4 directions, no T_x", "ML learned, no T_x"),
    ("ML random of 0.7 in 4 directions, crop", "ML random of 0.55, crop"), ("ML random of 0.7 in 4 directions, no T_x", "ML random of 0.5"),
    ("ML random of 0.5", "single random of 0.8"), ("poor generator, ML random", "poor generator, single random"),
    ("poor generator, ML random", "ML random, no T_x"), ("poor generator, ML random", "real, gentle"),
    *((f"ML random{', no T_x' * name.endswith('T_x')}", name) for name, source in SOURCES.items() if source.group == "pools"),
)  # fmt: skip
EXTENTS = ("ML random", "ML random of 0.55, crop", "ML random of 0.5", "ML random of 0.7 in 4 directions, crop", "ML learned",
           "ML borrowed, crop")  # fmt: skip


class RealViews:
    """Real images as a source: two augmented views of each, in a new order every epoch, prepared as the generators' are."""

    num_views, layout, device = 2, staticmethod(pair_layout), torch.device("cpu")

    def __init__(self, images: Tensor, transform: Augmentation, batch_size: int, seed: int) -> None:
        self.images, self.transform, self.batch_size, self.seed, self.epoch = images, transform, batch_size, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = permutation(len(self.images), self.seed, self.epoch, self.device)
        for rows in order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size):
            padded = F.pad(self.images[rows], (2, 2, 2, 2)).float() / 255
            yield tuple(self.transform(padded, rows, seed=self.seed, epoch=self.epoch, view=view) for view in (0, 1))
        self.epoch += 1


def generated(config: dict[str, Any], **options: Any) -> MLViewSource:
    """A source from its configuration, with what moves levels wrapped if it says so (``wrap``, of WRAPS)."""
    config = config | options
    wrap = config.pop("wrap", None)
    arguments = source_arguments(config)
    if wrap is not None:
        arguments["perturb"] = {key: WRAPS[wrap](one) if one.moves else one for key, one in arguments["perturb"].items()}
    return MLViewSource(**arguments)


def extent(name: str) -> float:
    """How far a source moves: the mean L2 distance of a positive's pixels, in [0, 1], from its anchor's, before T_x."""
    (views,) = generated(SOURCES[name].config or {}, transform=None, batch_size=2_000, num_samples=2_000, seed=0)
    return round(float((views[0] - views[1]).flatten(1).norm(dim=1).mean()), 3)


class Budget(NamedTuple):
    """What every cell gets."""

    steps: int
    batch_size: int
    labels: int  # of real images, to fit the probes on
    data: str | None


def real(budget: Budget) -> tuple[Labelled, Labelled]:
    """Real images to train or fit on, and to test on."""
    if budget.data is None:
        return bundled_slice()
    return load_fashion_mnist(budget.data, "train", 28), load_fashion_mnist(budget.data, "test", 28)


def measure(method: str, name: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Train one encoder, and score it."""
    begin = time.perf_counter()
    source, (images, test) = SOURCES[name], real(budget)
    encoder, losses = (None if name == "raw pixels" else initial(method, 0.2, seed).encoder.eval()), []
    if source.group != "untrained":
        transform = TRANSFORMS[source.transform]
        if source.config is None:
            views: Any = RealViews(images.images, transform, budget.batch_size, seed)
        else:
            own = {"num_samples": 60_000, **source.config}
            views = generated(own, transform=transform, batch_size=budget.batch_size, seed=seed)
        encoder, losses = train(views, budget.steps, method, seed=seed)
    trained = time.perf_counter()
    scores = evaluate(encoder, Labelled(*(part[: budget.labels] for part in images)), test, seed)
    return {
        "method": method, "source": name, "seed": seed, "scores": flat(scores), "loss": [round(loss, 4) for loss in losses[::25]],
        "seconds": {"training": round(trained - begin, 1), "evaluation": round(time.perf_counter() - trained, 1)},
    }  # fmt: skip


def flat(scores: Scores) -> dict[str, float]:
    """Scores by the names in SCORES."""
    return {name: round(value, 2) for name, value in zip(SCORES, (*scores.linear.values(), scores.knn), strict=True)}


def work_off(method: str, name: str, seed: int, budget: Budget, path: Path) -> tuple[str, dict[str, Any]]:
    """Measure a cell in a process of its own, and keep it."""
    torch.set_num_threads(1)
    made = measure(method, name, seed, budget)
    made["environment"] = environment()
    part = path.with_suffix(".part")
    part.write_text(json.dumps(made))
    part.rename(path)
    return path.stem, made


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, and half the width of its 95 % interval by Student's t; None of a single value."""
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 2), "half": None if spread is None else round(spread, 2), "seeds": len(values)}


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: the scores of each method and source, and paired differences."""
    found = {(cell["method"], cell["source"], cell["seed"]): cell["scores"] for cell in cells}
    seeds = sorted({cell["seed"] for cell in cells})

    def over(method: str, one: str, other: str | None = None) -> dict[str, Any] | None:
        own = [found[method, one, seed] for seed in seeds if (method, one, seed) in found]
        if other is not None:
            both = [seed for seed in seeds if {(method, one, seed), (method, other, seed)} <= found.keys()]
            own = [{key: found[method, one, seed][key] - found[method, other, seed][key] for key in SCORES} for seed in both]
        return {key: interval([scores[key] for scores in own]) for key in SCORES} if own else None

    rows = [{"method": method, "source": name, **SOURCES[name]._asdict(), "scores": over(method, name)} for method, name in CELLS]
    differences = [
        {"method": method, "of": one, "less": other, "scores": over(method, one, other)}
        for method in ("simclr", "simsiam", "byol")
        for one, other in PAIRS
    ]
    return {
        "rows": [row for row in rows if row["scores"] is not None],
        "differences": [row for row in differences if row["scores"] is not None],
    }


def draw(summary: dict[str, Any], out: Path) -> list[Path]:
    """The sources side by side, and accuracy against the pool's size."""
    import matplotlib.pyplot as plt

    rows = [row for row in summary["rows"] if SOURCES[row["source"]].group in ("untrained", "sources") or row["source"] in TELLING]
    paths = []
    if rows:
        methods = list(dict.fromkeys(row["method"] for row in rows))
        names = [name for name in SOURCES if any(row["source"] == name for row in rows)]
        figure, axes = plt.subplots(1, len(methods), figsize=(4.2 * len(methods) + 1, 4), sharey=True, squeeze=False)
        for ax, method in zip(axes[0], methods, strict=True):
            for key, marker, shift in (("linear 100%", "o", -0.12), ("kNN", "s", 0.12)):
                own = [row for row in rows if row["method"] == method or (SOURCES[row["source"]].group == "untrained")]
                scores = [row["scores"][key] for row in own]
                at = [names.index(row["source"]) + shift for row in own]
                half = [score["half"] or 0 for score in scores]
                ax.errorbar([score["mean"] for score in scores], at, xerr=half, fmt=marker, ms=5, capsize=3, label=key)
            ax.set(title=method, xlabel="top-1 on real test images, %", yticks=range(len(names)), yticklabels=names)
            ax.grid(axis="x", alpha=0.3)
        axes[0][0].invert_yaxis()
        axes[0][-1].legend(loc="best")
        figure.tight_layout()
        paths.append(out / "probe.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)

    found = {row["source"]: row["scores"] for row in summary["rows"] if row["method"] == "simclr"}
    endless = {"crop": "ML random", "none": "ML random, no T_x"}
    if pools := [name for name in found if SOURCES[name].group == "pools"]:
        transforms = list(dict.fromkeys(SOURCES[name].transform for name in pools))
        figure, axes = plt.subplots(1, len(transforms), figsize=(4.5 * len(transforms), 3.6), sharey=True, squeeze=False)
        for ax, transform in zip(axes[0], transforms, strict=True):
            without_end = endless[transform]
            shown_here = [name for name in (*pools, without_end) if name in found and SOURCES[name].transform == transform]
            labels = ["endless" if name == without_end else name.removeprefix("pool of ").split(", no")[0] for name in shown_here]
            for key, marker in (("linear 100%", "o"), ("kNN", "s")):
                scores = [found[name][key] for name in shown_here]
                half = [score["half"] or 0 for score in scores]
                at = range(len(scores))
                ax.errorbar(at, [score["mean"] for score in scores], yerr=half, fmt=f"{marker}-", ms=5, capsize=3, label=key)
            ax.set(xticks=range(len(labels)), xticklabels=labels, xlabel="different samples", title=f"T_x: {transform}")
            ax.grid(alpha=0.3)
        axes[0][0].set_ylabel("top-1 on real test images, %")
        axes[0][-1].legend(loc="best")
        figure.tight_layout()
        paths.append(out / "pools.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def print_tables(summary: dict[str, Any], console: Console) -> None:
    """Scores, then differences."""
    table = Table("method", "views", "T_x", *SCORES, title="Top-1 on real test images, %: mean ± half of the 95 % interval")
    group = None
    for row in summary["rows"]:
        source = SOURCES[row["source"]]
        if group not in (None, (row["method"], source.group)):
            table.add_section()
        group = row["method"], source.group
        method = "" if source.group == "untrained" else row["method"]
        table.add_row(method, row["source"], source.transform, *(shown(row["scores"][key]) for key in SCORES))
    console.print(table)
    table = Table("method", "views", "less", *SCORES, title="Differences at the same seed, points")
    for row in summary["differences"]:
        table.add_row(row["method"], row["of"], row["less"], *(shown(row["scores"][key], "+") for key in SCORES))
    console.print(table)


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice.")] = None,
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    labels: Annotated[int, typer.Option(help="Most labelled real images to fit the probes on.", min=100)] = 10_000,
    only: Annotated[str, typer.Option(help="Sources to measure, with semicolons; none: all of them.")] = "",
    jobs: Annotated[int, typer.Option(help="Cells at a time, one thread each.", min=1)] = 2,
    work: Annotated[Path, typer.Option(help="Folder for the cells.")] = Path("runs/probe-table"),
    out: Annotated[Path, typer.Option(help="Folder for the record and the plots.")] = RESULTS,
    collect: Annotated[bool, typer.Option(help="Measure nothing: take the cells that are there.")] = False,
    quick: Annotated[bool, typer.Option(help="SimCLR's sources with one seed and fewer labels; no record.")] = False,
) -> None:
    """Measure every cell that is not there yet, then print, write and draw the tables."""
    console = Console()
    if unknown := [name for name in only.split(";") if name and name not in SOURCES]:
        raise typer.BadParameter(f"No source {unknown[0]!r}: there are {'; '.join(SOURCES)}.")
    if quick:
        seeds, labels, work = 1, min(labels, 2_000), work / "quick"
    if quick or only:
        out = apart(out, work)
    budget = Budget(steps, batch_size, labels, None if data is None else str(data))
    wanted = [
        (method, name, seed)
        for seed in range(seeds)
        for method, name in CELLS
        if (not only or name in only.split(";")) and (not quick or (method == "simclr" and SOURCES[name].group in ("untrained", "sources")))
    ]
    work.mkdir(parents=True, exist_ok=True)
    about, own = work / "budget.json", [*budget[:3], data is not None]
    if about.exists() and json.loads(about.read_text()) != own:
        raise typer.BadParameter(
            f"{work} holds cells of another budget (steps, batch size, labels, whole data set: {about.read_text()}): give another --work."
        )
    about.write_text(json.dumps(own))
    paths = {cell: work / f"{'-'.join(map(str, cell)).replace(' ', '_')}.json" for cell in wanted}

    poor = Path(POOR["generator"]["weights"]).exists()
    missing = [cell for cell in wanted if not collect and not paths[cell].exists() and (poor or SOURCES[cell[1]].group != "quality")]
    os.environ["OMP_NUM_THREADS"] = "1"  # of scikit-learn's solver, in the workers
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work_off, *cell, budget, paths[cell]) for cell in missing]
        for number, future in enumerate(as_completed(futures), 1):
            name, cell = future.result()
            scores = ", ".join(f"{key} {value:.1f}" for key, value in cell["scores"].items())
            console.print(f"{number}/{len(missing)} {name}: {scores}; {sum(cell['seconds'].values()):.0f} s")

    cells = [json.loads(paths[cell].read_text()) for cell in wanted if paths[cell].exists()]
    if not cells:
        raise typer.BadParameter(f"There are no cells in {work}: leave out --collect.")
    made = [cell.pop("environment") for cell in cells]
    summary = summarise(cells)
    print_tables(summary, console)
    record = {
        "command": shlex.join(["python", "benchmarks/probe.py", *sys.argv[1:]]),
        **budget._asdict(), "test_images": len(real(budget)[1].labels), "probe_images": min(labels, len(real(budget)[0].labels)),
        "seeds": seeds, **made[-1], "commits": sorted({one["versions"].get("commit", "") for one in made}),
        "extents": {name: extent(name) for name in EXTENTS if any(cell["source"] == name for cell in cells)},
        "summary": summary, "cells": cells,
    }  # fmt: skip
    for path in (write(record, out / "probe.json"), *draw(summary, out)):
        console.print(path)


if __name__ == "__main__":
    typer.run(main)
