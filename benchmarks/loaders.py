"""A training step fed by files and by a generator: the paper's figure 5, scaled to a machine.

``python benchmarks/loaders.py --data DIR``

One SimCLR step of a ResNet-18 takes its two views from torch's DataLoader over JPEG files, from FFCV's
Loader, and from MLViewSource; all crop and flip, and normalise. The three take turns in one run, so that
their ratios hold whatever else the machine does. Waiting for a batch and training on it are timed apart.
Prints a table, writes ``benchmarks/results/loaders.json`` and a plot.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from documents.loaders import loaders as loaders_table
from feeds import CROPS, FEEDS, Case, Views, bytes_on_disk, different, write_files
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from timing import now, ratios
from torch import nn

from mlviews.runs.records import environment

LOADERS = {"torch": "tab:blue", "ffcv": "tab:orange", "mlviews": "tab:green"}  # and colors of the plot
EPOCH = 60_000  # images, for what an epoch takes

Row = dict[str, Any]


# -- what is fed ---------------------------------------------------------------------------------------------


class Learner:
    """A ResNet-18 and its SimCLR step."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        self.model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(
            device, memory_format=torch.channels_last
        )
        self.loss = NTXentLoss(0.2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, views: Views) -> None:
        """Take a step, in one memory format: FFCV's batches have another than torch's and ours."""
        images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        loss = self.loss(*self.model(images).chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def queue(case: Case) -> int:
    """Return how many batches a loader's workers are ahead at most."""
    return 0 if case.loader == "mlviews" else 2 * case.workers


def timed_steps(case: Case, steps: int) -> int:
    """Return how many steps to time: at least one batch of each worker."""
    return max(steps, queue(case) // 2)


def time_round(case: Case, learner: Learner, steps: int) -> tuple[list[float], list[float]]:
    """Return seconds of waiting for each batch and of training on it, in the steady state.

    A loader with workers fills its queue, or falls behind, in the first steps, which are left out; it goes on
    making batches to the end of the last timed step.
    """
    steps = timed_steps(case, steps)
    untimed = queue(case) + 1
    views = FEEDS[case.loader](case, untimed + steps + queue(case))
    waiting, training = [], []
    for _ in range(untimed + steps):
        begin = now(case.device)
        batch = next(views)
        arrival = now(case.device)
        learner.step(batch)
        waiting.append(arrival - begin)
        training.append(now(case.device) - arrival)
    for _ in views:  # to its end, so that no worker is left behind
        pass
    return waiting[-steps:], training[-steps:]


def time_alone(case: Case, steps: int) -> float:
    """Return seconds of a batch with nothing beside the loader: it keeps up if training takes longer."""
    untimed, count = queue(case) + 1, queue(case) + steps
    views = FEEDS[case.loader](case, untimed + count)
    for _ in range(untimed):
        next(views)
    begin = now(case.device)
    for _ in range(count):
        next(views)
    return (now(case.device) - begin) / count


def peak_memory(case: Case) -> dict[str, float]:
    """Return the most MiB that this process and its workers take over a few steps, and those of a GPU.

    A page that processes share is counted once.
    """
    import psutil

    torch.set_num_threads(case.threads)
    finished, peaks = threading.Event(), [0.0]

    def watch() -> None:
        while not finished.wait(0.05):
            main = psutil.Process()
            total = 0
            for process in (main, *main.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_full_info().pss
            peaks.append(total / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        time_round(case, Learner(case.device), 1)
    finally:
        finished.set()
        thread.join()
    memory = {"host_mib": round(max(peaks), 1)}
    if torch.device(case.device).type == "cuda":
        memory["device_mib"] = round(torch.cuda.max_memory_allocated(case.device) / 2**20, 1)
    return memory


class Meter:
    """Energy and CO2 by codecarbon, where there is something to read them from.

    Args:
        device: what is measured.
        country: ISO code of the country whose electricity it is.
    """

    def __init__(self, device: str, country: str) -> None:
        self.country, self.why_not, self.note = country, "", ""
        cuda = torch.device(device).type == "cuda"
        counters = Path("/sys/class/powercap").glob("intel-rapl*/energy_uj")
        readable = any(os.access(path, os.R_OK) for path in counters)
        missing = "this machine shows no RAPL counters, without which codecarbon assumes a constant power"
        if not importlib.util.find_spec("codecarbon"):
            self.why_not = "codecarbon is not installed (extra bench)"
        elif not readable and not cuda:
            self.why_not = missing
        if cuda and not readable:
            self.note = f"the GPU's is read; of the CPU, {missing}"

    def measure(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float] | None]:
        """Return what the call returns, and its mean power: kWh and grams of CO2 equivalent a second."""
        if self.why_not:
            return call(), None
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code=self.country, measure_power_secs=1, save_to_file=False, log_level="error"
        )
        begin = time.perf_counter()
        tracker.start()
        try:
            result = call()
        finally:
            tracker.stop()
        emissions, seconds = tracker.final_emissions_data, time.perf_counter() - begin
        return result, {
            "kwh": emissions.energy_consumed / seconds,
            "co2_g": 1000 * emissions.emissions / seconds,
        }


# -- the benchmark -------------------------------------------------------------------------------------------


class Figures:
    """Figures of one loader, round by round."""

    def __init__(self) -> None:
        self.data: list[float] = []  # mean seconds of waiting for a batch
        self.training: list[float] = []  # mean seconds of training on it
        self.alone: list[float] = []  # seconds of a batch with nothing beside the loader
        self.power: list[dict[str, float]] = []

    @property
    def step(self) -> list[float]:
        """Seconds of a step."""
        return [data + training for data, training in zip(self.data, self.training, strict=True)]

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
            "data_share": round(sum(self.data) / sum(self.step), 4),
            "step_of_first": median_and_range(ratios(self.step, first.step)),
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


def median_and_range(values: list[float]) -> dict[str, Any]:
    """Return median and range over rounds."""
    return {
        "median": round(statistics.median(values), 4),
        "range": [round(min(values), 4), round(max(values), 4)],
    }


def compare(cases: list[Case], steps: int, rounds: int, meter: Meter, console: Console) -> list[Row]:
    """Time the loaders in turns, at one size and batch size.

    Seconds of a step are means over a round, for waits come in bursts.
    """
    learner = Learner(cases[0].device)
    figures = [Figures() for _ in cases]
    for number in range(rounds):
        for case, of_case in zip(cases, figures, strict=True):
            console.print(
                f"{case.size} px, batch {case.batch_size}, round {number + 1}/{rounds}: {case.loader}"
            )
            (waiting, training), power = meter.measure(lambda case=case: time_round(case, learner, steps))
            of_case.data.append(statistics.fmean(waiting))
            of_case.training.append(statistics.fmean(training))
            # A generator makes nothing beside the training.
            of_case.alone.append(of_case.data[-1] if case.loader == "mlviews" else time_alone(case, steps))
            if power is not None:
                of_case.power.append(power)
    return [
        of_case.row(case, rounds * timed_steps(case, steps), figures[0])
        for case, of_case in zip(cases, figures, strict=True)
    ]


def draw(rows: list[Row], path: Path) -> Path:
    """Draw seconds of waiting and of training, and the share of waiting, against the batch size."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    batches = sorted({row["batch_size"] for row in rows})
    figure, axes = plt.subplots(2, len(sizes), figsize=(5 * len(sizes), 6.4), squeeze=False, sharex="col")
    for size, seconds, shares in zip(sizes, *axes, strict=True):
        for loader, color in LOADERS.items():
            cases = [row for row in rows if (row["loader"], row["size"]) == (loader, size)]
            if not cases:
                continue
            x = [row["batch_size"] for row in cases]
            waiting = [row["data_s"]["median"] for row in cases]
            ends = [
                [abs(row["data_s"]["range"][end] - row["data_s"]["median"]) for row in cases]
                for end in (0, 1)
            ]
            training = [row["training_s"]["median"] for row in cases]
            seconds.errorbar(
                x, waiting, yerr=ends, fmt="o-", color=color, capsize=3, label=f"{loader}: waiting"
            )
            seconds.plot(x, training, "x--", color=color, alpha=0.6, label=f"{loader}: training")
            shares.plot(x, [100 * row["data_share"] for row in cases], "o-", color=color, label=loader)
        seconds.set(title=f"{size} px", ylabel="seconds of a step", xscale="log", yscale="log")
        shares.set(xlabel="batch size", ylabel="share of waiting, %", ylim=(0, 100))
        shares.set_xticks(batches, map(str, batches))
        shares.minorticks_off()
        seconds.grid(alpha=0.3)
        shares.grid(alpha=0.3)
    axes[1][0].legend(fontsize=8)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, ncol=len(LOADERS), loc="lower center", fontsize=8, title="above")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
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
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "32,64,128,256",
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
    rows, disk, unique = [], [], []
    for size in numbers(sizes, CROPS):
        folder = work / f"{size}px-{images}"
        write_files(data, size, images, folder)
        few_steps, samples = (steps, 1_000) if size == 32 else (max(2, steps // 8), 32)
        samples = min(images, samples)
        cases = [Case(name, size, 1, device, workers, folder, torch.get_num_threads()) for name in names]
        for batch_size in numbers(batches):
            sized = [case._replace(batch_size=batch_size) for case in cases]
            for row, case in zip(compare(sized, few_steps, rounds, meter, console), sized, strict=True):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rows.append(row | {"peak": pool.submit(peak_memory, case).result()})
        for case in cases:
            facts = {"loader": case.loader, "size": size}
            disk.append(facts | {"bytes": bytes_on_disk(case)})
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
        "rows": rows, "disk": disk, "unique": unique, "skipped": skipped,
        "energy_not_measured": meter.why_not or None, "energy_note": meter.note or None,
        **facts, "versions": facts["versions"] | {name: version(name) for name in packages},
    }  # fmt: skip
    publish(record, out / "loaders.json", loaders_table(record), str(draw(rows, out / "loaders.png")))


if __name__ == "__main__":
    typer.run(main)
