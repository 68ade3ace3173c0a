"""A training step fed by files and by a generator: the paper's figure 5, scaled to a machine.

``python benchmarks/loaders.py --data DIR``

One SimCLR step of a ResNet-18 takes its two views from torch's DataLoader over JPEG files, from FFCV's
Loader, and from MLViewSource; all crop and flip, and normalise. The three take turns in one run, so that
their ratios hold whatever else the machine does. Waiting for a batch and training on it are timed apart.

Of MLViewSource, steps that make their samples are timed, and steps that show samples again. A step with
``reuse=k`` is the mean of one of the first and k - 1 of the second.

Prints a table, and the reuse with which a step waits for less than 5 % of its time; writes
``benchmarks/results/loaders.json`` and a plot.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.loaders import loaders as loaders_table
from documents.loaders import name_of, printed_reuse
from feeds import CROPS, Case, bytes_on_disk, different, write_files
from loader_rounds import Learner, Meter, Round, peak_memory, time_alone, time_round, timed_steps
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from timing import ratios

from mlviews.reuse import MOST
from mlviews.runs.records import environment

LOADERS = ("torch", "ffcv", "mlviews")
EPOCH = 60_000  # images, for what an epoch takes
WAITING = 0.05  # of a step: the share that the printed reuse keeps to

Row = dict[str, Any]


# -- the benchmark -------------------------------------------------------------------------------------------


class Figures:
    """Figures of one loader, round by round."""

    def __init__(self) -> None:
        self.data: list[float] = []  # mean seconds of waiting for a batch
        self.training: list[float] = []  # mean seconds of training on it
        self.cpu: list[float] = []  # mean seconds of all processors in a step
        self.alone: list[float] = []  # seconds of a batch with nothing beside the loader
        self.power: list[dict[str, float]] = []

    def add(self, part: Round, alone: float | None) -> None:
        """Take in a round; ``alone`` is None of a generator, which makes nothing beside the training."""
        self.data.append(statistics.fmean(part.waiting))
        self.training.append(statistics.fmean(part.training))
        self.cpu.append(part.cpu)
        self.alone.append(self.data[-1] if alone is None else alone)
        if part.power is not None:
            self.power.append(part.power)

    @property
    def step(self) -> list[float]:
        """Seconds of a step."""
        return [data + training for data, training in zip(self.data, self.training, strict=True)]

    @property
    def data_share(self) -> float:
        """The share of all steps' time that is waiting."""
        return sum(self.data) / sum(self.step)

    def with_reuse(self, again: Figures, times: int) -> Figures:
        """Return the mean of a step that makes its samples and of steps that show them again.

        Args:
            again: figures of the steps that show samples again.
            times: how often each sample is shown.
        """
        figures = Figures()
        for name in ("data", "training", "cpu", "alone"):
            pairs = zip(getattr(self, name), getattr(again, name), strict=True)
            setattr(figures, name, [(first + (times - 1) * later) / times for first, later in pairs])
        for first, later in zip(self.power, again.power, strict=True):
            figures.power.append({key: (first[key] + (times - 1) * later[key]) / times for key in first})
        return figures

    def row(self, case: Case, steps: int, first: Figures) -> Row:
        """Return a row of the record.

        Args:
            case: what was timed.
            steps: timed ones.
            first: figures of the loader that the others are compared with.
        """
        step_s = statistics.median(self.step)
        row = {
            "loader": case.loader,
            "size": case.size,
            "batch_size": case.batch_size,
            "steps": steps,
            "data_s": median_and_range(self.data),
            "training_s": median_and_range(self.training),
            "step_s": median_and_range(self.step),
            "cpu_s": median_and_range(self.cpu),
            "data_share": round(self.data_share, 4),
            "step_of_first": median_and_range(ratios(self.step, first.step)),
            "cpu_of_first": median_and_range(ratios(self.cpu, first.cpu)),
            "samples_per_s": round(case.batch_size / step_s, 2),
            "samples_per_s_alone": round(case.batch_size / statistics.median(self.alone), 2),
            "epoch_s": round(EPOCH / case.batch_size * step_s, 1),  # of the device: on CUDA, GPU seconds
        }
        if self.power:
            seconds = 1000 * step_s / case.batch_size
            row["per_1000_samples"] = {
                key: seconds * statistics.fmean(power[key] for power in self.power)
                for key in ("kwh", "co2_g")
            }
        return row


class Comparison:
    """The loaders' figures at one size and batch size.

    Args:
        cases: the loaders; the first is what the others are compared with.
    """

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.figures = [Figures() for _ in cases]
        self.again = Figures()  # of a generator's steps that show samples again

    def time(self, learner: Learner, steps: int, meter: Meter) -> None:
        """Time each loader once."""
        for case, figures in zip(self.cases, self.figures, strict=True):
            alone = None if case.loader == "mlviews" else time_alone(case, steps)
            for part, kind in zip(
                time_round(case, learner, steps, meter), (figures, self.again), strict=False
            ):
                kind.add(part, alone)

    @property
    def reuse(self) -> int | None:
        """The least reuse with which a generator's steps wait for no more than WAITING; None if none does."""
        for case, figures in zip(self.cases, self.figures, strict=True):
            if case.loader == "mlviews":
                for times in range(1, MOST + 1):
                    if figures.with_reuse(self.again, times).data_share <= WAITING:
                        return times
        return None

    def rows(self, steps: int, reuse: list[int]) -> list[Row]:
        """Return the rows of the record, a generator's with each reuse."""
        rows = []
        for case, figures in zip(self.cases, self.figures, strict=True):
            count = len(figures.data) * timed_steps(case, steps)
            if case.loader != "mlviews":
                rows.append(figures.row(case, count, self.figures[0]))
                continue
            for times in reuse:
                row = figures.with_reuse(self.again, times).row(case, count, self.figures[0])
                rows.append(row | {"reuse": times})
        return rows


def median_and_range(values: list[float]) -> dict[str, Any]:
    """Return median and range over rounds."""
    return {
        "median": round(statistics.median(values), 4),
        "range": [round(min(values), 4), round(max(values), 4)],
    }


def draw(rows: list[Row], path: Path) -> Path:
    """Draw seconds of waiting and of training, and the share of waiting, against the batch size."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = list(dict.fromkeys(name_of(row) for row in rows))
    grid = {"squeeze": False, "sharex": "col", "layout": "constrained"}
    figure, axes = plt.subplots(2, len(sizes), figsize=(5 * len(sizes), 6.4), **grid)
    for size, seconds, shares in zip(sizes, *axes, strict=True):
        batches = sorted({row["batch_size"] for row in rows if row["size"] == size})
        for number, name in enumerate(names):
            cases = [row for row in rows if (name_of(row), row["size"]) == (name, size)]
            if not cases:
                continue
            x = [row["batch_size"] for row in cases]
            waiting = [row["data_s"]["median"] for row in cases]
            ends = [
                [abs(row["data_s"]["range"][end] - row["data_s"]["median"]) for row in cases]
                for end in (0, 1)
            ]
            training = [row["training_s"]["median"] for row in cases]
            color = f"C{number}"
            seconds.errorbar(x, waiting, yerr=ends, fmt="o-", color=color, capsize=3, label=name)
            seconds.plot(x, training, "x--", color=color, alpha=0.6)
            shares.plot(x, [100 * row["data_share"] for row in cases], "o-", color=color)
        seconds.set(title=f"{size} px", ylabel="seconds of a step", xscale="log", yscale="log")
        shares.set(xlabel="batch size", ylabel="share of waiting, %", ylim=(0, 100))
        shares.set_xticks(batches, map(str, batches))
        shares.minorticks_off()
        seconds.grid(alpha=0.3)
        shares.grid(alpha=0.3)
    # Not every loader is at every size.
    handles = {
        label: handle
        for seconds in axes[0]
        for handle, label in zip(*seconds.get_legend_handles_labels(), strict=True)
    }
    title = "above: waiting (dots), training (crosses)"
    location = {"loc": "outside lower center", "ncol": len(LOADERS)}
    figure.legend(handles.values(), handles.keys(), **location, fontsize=8, title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def numbers(text: str, allowed: dict[int, Any] | None = None) -> list[int]:
    """Return the numbers of an option."""
    values = [int(value) for value in text.split(",")]
    for value in values:
        if allowed is not None and value not in allowed:
            raise typer.BadParameter(f"Unknown {value!r}: sizes are {', '.join(map(str, allowed))}.")
    return values


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice."),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help=f"Sides of the images, of {', '.join(map(str, CROPS))}.")
    ] = "32,128",
    batches: Annotated[str, typer.Option(help="Batch sizes at 32 pixels.")] = "64,128,256",
    large_batches: Annotated[str, typer.Option(help="Batch sizes above.")] = "64",
    reuse: Annotated[str, typer.Option(help="In how many steps a generated sample is shown.")] = "1,4,8,16",
    loaders: Annotated[
        str, typer.Option(help="In turns; the first is what the others are compared with.")
    ] = ",".join(LOADERS),
    images: Annotated[int, typer.Option(help="Files of each size.", min=32)] = 10_000,
    steps: Annotated[
        int,
        typer.Option(help="Timed in a round, at 32 pixels; an eighth as many above, at least two.", min=1),
    ] = 16,
    rounds: Annotated[int, typer.Option(help="Turns of each loader.", min=1)] = 3,
    workers: Annotated[
        int, typer.Option(help="Of the loaders that read files; 0: one for each core.", min=0)
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    country: Annotated[
        str, typer.Option(help="ISO code of the country whose electricity it is, for CO2.")
    ] = "ITA",
    work: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/loaders"),
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = RESULTS,
    quick: Annotated[
        bool, typer.Option(help="32 pixels, two small batches, two steps: to see that it runs.")
    ] = False,
) -> None:
    """Time the loaders, print, write and draw what comes out."""
    console = Console()
    if quick:
        sizes, batches, images, steps, rounds = "32", "8,16", 64, 2, 1
        out = off_the_records(out, work)
    skipped = {} if importlib.util.find_spec("ffcv") else {"ffcv": "not installed (extra ffcv)"}
    names = [name for name in loaders.split(",") if name not in skipped]
    for name in names:
        if name not in LOADERS:
            raise typer.BadParameter(f"Unknown {name!r}: loaders are {', '.join(LOADERS)}.")
    meter, workers = Meter(device, country), workers or os.cpu_count() or 1
    rows, disk, unique, needed = [], [], [], []
    for size in numbers(sizes, CROPS):
        folder = work / f"{size}px-{images}"
        write_files(data, size, images, folder)
        few_steps, samples = (steps, 1_000) if size == 32 else (max(2, steps // 8), 32)
        samples = min(images, samples)
        cases = [Case(name, size, 1, device, workers, folder, torch.get_num_threads()) for name in names]
        comparisons = []
        for batch_size in numbers(batches if size == 32 else large_batches):
            comparison = Comparison([case._replace(batch_size=batch_size) for case in cases])
            learner = Learner(device)
            for number in range(rounds):
                console.print(f"{size} px, batch {batch_size}, round {number + 1}/{rounds}")
                comparison.time(learner, few_steps, meter)
            comparisons.append(comparison)
        printed = [comparison.reuse for comparison in comparisons if comparison.reuse is not None]
        times = sorted({*numbers(reuse), *([max(printed)] if printed else [])})
        for comparison in comparisons:
            rows += comparison.rows(few_steps, times)
            batch_size = comparison.cases[0].batch_size
            needed.append({"size": size, "batch_size": batch_size, "reuse": comparison.reuse})
        for case in comparisons[-1].cases:
            facts = {"loader": case.loader, "size": size}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(peak_memory, case).result()
            disk.append(facts | {"bytes": bytes_on_disk(case), "batch_size": case.batch_size, "peak": peak})
            unique.append(facts | different(case._replace(batch_size=min(samples, 32)), samples))

    for name, reason in skipped.items():
        console.print(f"Not measured: {name}: {reason}.")
    if meter.why_not:
        console.print(f"Not measured: energy and CO2: {meter.why_not}.")
    facts = environment(device)
    packages = ["torchvision", "lightly", *({"ffcv"} - set(skipped))]
    record = {
        "command": command("loaders.py"),
        "images": images, "rounds": rounds, "workers": workers, "seed": 0, "epoch": EPOCH, "first": names[0],
        "rows": rows, "waiting": WAITING, "reuse": needed, "disk": disk, "unique": unique, "skipped": skipped,
        "energy_not_measured": meter.why_not or None, "energy_note": meter.note or None,
        **facts, "versions": facts["versions"] | {name: version(name) for name in packages},
    }  # fmt: skip
    plot = draw(rows, out / "loaders.png")
    tables = (loaders_table(record), printed_reuse(record))
    publish(record, out / "loaders.json", *tables, str(plot), generators=["fashion"])


if __name__ == "__main__":
    typer.run(main)
