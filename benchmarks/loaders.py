"""A training step fed by files and by a generator: the paper's figure 5, scaled to a machine: ``python benchmarks/loaders.py --data DIR``.

One SimCLR step of a ResNet-18 takes its two views from torch's DataLoader over JPEG files, from FFCV's Loader, and from MLViewSource; all
crop and flip, and normalise. The three take turns in one run, so that their ratios hold whatever else the machine does. Waiting for
a batch and training on it are timed apart. Prints a table, writes ``benchmarks/results/loaders.json`` and a plot.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import multiprocessing
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import typer
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from record import RESULTS, apart, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import mlviews
from mlviews import MLViewSource, perturb
from mlviews.evaluation.data import bundled_slice, load_fashion_mnist
from mlviews.generators.biggan.reading import HUB_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.runs.records import environment
from mlviews.transforms import IMAGENET, simclr
from mlviews.weights.checkpoints import Checkpoint
from mlviews.zoo import FOLDER

LOADERS = ("torch", "ffcv", "mlviews")
CROPS = {32: 28, 128: 112}  # side of the images -> side of the views
EPOCH = 60_000  # images, for what an epoch takes
SCALE = (0.2, 1.0)

Views = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """What to time."""

    loader: str
    size: int
    batch_size: int
    device: str
    workers: int
    folder: Path  # of the files of this size
    threads: int


# -- what is fed from --------------------------------------------------------------------------------------------------


def write_files(data: Path | None, size: int, count: int, folder: Path) -> None:
    """Real images as JPEG files, one folder a class, and as FFCV's file; 128-pixel ones are enlarged, for there are no others here."""
    done = folder / "done"
    if done.exists() and int(done.read_text()) == count:
        return
    images, labels = (
        (torch.cat(parts) for parts in zip(*bundled_slice(), strict=True)) if data is None else load_fashion_mnist(data, "train")
    )
    for index, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
        image = F.pad(image, [(32 - image.shape[-1]) // 2] * 4)
        if size > 32:
            image = F.interpolate(image[None].float(), size=size, mode="bicubic").clamp(0, 255).byte()[0]
        path = folder / "jpeg" / str(label) / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image.expand(3, -1, -1)).save(path, quality=95)
    if importlib.util.find_spec("ffcv"):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        mode = "raw" if size <= 64 else "jpg"  # small images are read faster as they are
        writer = DatasetWriter(str(folder / "images.beton"), {"image": RGBImageField(write_mode=mode), "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(torchvision.datasets.ImageFolder(folder / "jpeg"))
    done.write_text(str(count))


def torch_views(case: Case, steps: int) -> Iterator[Views]:
    """torch's DataLoader over ImageFolder: JPEG files, decoded and augmented by worker processes."""
    pipeline = v2.Compose([
        v2.RandomResizedCrop(CROPS[case.size], scale=SCALE), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET),
    ])  # fmt: skip
    dataset = torchvision.datasets.ImageFolder(case.folder / "jpeg", lambda image: (pipeline(image), pipeline(image)))
    cuda = torch.device(case.device).type == "cuda"
    loader: Iterable[Any] = torch.utils.data.DataLoader(
        dataset, case.batch_size, num_workers=case.workers, pin_memory=cuda, drop_last=True, multiprocessing_context="fork",
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=steps * case.batch_size),
    )  # fmt: skip
    for (first, second), _ in loader:
        yield first.to(case.device, non_blocking=cuda), second.to(case.device, non_blocking=cuda)


def ffcv_views(case: Case, steps: int) -> Iterator[Views]:
    """FFCV's Loader: compiled pipelines in threads, two of the one image."""
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import Convert, RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    device = torch.device(case.device)
    mean, std = (np.array(values) * 255 for values in IMAGENET)

    def pipeline() -> PipelineSpec:
        decoder = RandomResizedCropRGBImageDecoder((CROPS[case.size],) * 2, scale=SCALE)
        normalize = torchvision.transforms.Normalize(mean, std)
        on_device = [ToTensor(), ToDevice(device, non_blocking=True), ToTorchImage(), Convert(torch.float32), normalize]
        return PipelineSpec("image", decoder, [RandomHorizontalFlip(), *on_device])

    count = len(list((case.folder / "jpeg").glob("*/*.jpg")))
    loader = Loader(
        str(case.folder / "images.beton"), case.batch_size, num_workers=case.workers, order=OrderOption.RANDOM, drop_last=True,
        indices=np.arange(steps * case.batch_size) % count, os_cache=True,
        pipelines={"image": pipeline(), "second": pipeline(), "label": None},
    )  # fmt: skip
    for first, second, *_ in loader:
        yield first, second


def mlviews_views(case: Case, steps: int) -> Iterator[Views]:
    """Ours: anchors and positives, made on the device."""
    yield from source(case, steps * case.batch_size, simclr(CROPS[case.size], color=False))


def source(case: Case, num_samples: int, transform: Any) -> MLViewSource:
    """The paper's multi-level setting, which makes two different images a sample from the second level on."""
    moved = {"1:": perturb.Normal(std=1.0, truncation=2.0)}
    return MLViewSource(
        generator(case.size), moved, transform=transform, batch_size=case.batch_size, num_samples=num_samples, device=case.device,
        micro_batch_size=min(case.batch_size, 32) if case.size > 32 and torch.device(case.device).type == "cpu" else None,
    )  # fmt: skip


def generator(size: int) -> mlviews.MLVGM:
    """The bundled one, or a BigBiGAN of random weights: what it costs follows from their size, not from their values."""
    if size == 32:
        return mlviews.load_generator("fashion")
    if size not in _made:
        torch.manual_seed(0)
        tensors = {}
        for name, shape in bigbigan_shapes():
            values = torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
            tensors[name] = torch.ones(shape) if name.endswith(("sv0", "var", "gain")) else values
        _made[size] = load_biggan(Checkpoint("biggan", tensors, {}, "random weights"), label=0, bn_eps=HUB_EPS)
    return _made[size]


_made: dict[int, mlviews.MLVGM] = {}


def bigbigan_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of BigBiGAN's generator for 128 pixels (width 96), as its file has them."""

    def layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]
        yield from ((f"{name}.u0", (1, shape[0])), (f"{name}.sv0", (1,)))

    width, chunk, shared = 96, 20, 128
    widths = [width * factor for factor in (16, 16, 8, 4, 2, 1)]
    yield "shared.weight", (1000, shared)
    yield from layer("linear", widths[0] * 16, chunk)
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        name = f"blocks.{index}.0"
        yield from layer(f"{name}.conv1", after, before, 3, 3)
        yield from layer(f"{name}.conv2", after, after, 3, 3)
        yield from layer(f"{name}.conv_sc", after, before, 1, 1)
        for norm, channels in (("bn1", before), ("bn2", after)):
            yield from ((f"{name}.{norm}.stored_{kind}", (channels,)) for kind in ("mean", "var"))
            for kind in ("gain", "bias"):
                yield from layer(f"{name}.{norm}.{kind}", channels, chunk + shared, bias=False)
    channels, name = widths[4], "blocks.3.1"
    yield f"{name}.gamma", ()
    few, half = channels // 8, channels // 2
    for part, shape in {"theta": (few, channels), "phi": (few, channels), "g": (half, channels), "o": (channels, half)}.items():
        yield from layer(f"{name}.{part}", *shape, 1, 1, bias=False)
    yield from ((f"output_layer.0.{kind}", (width,)) for kind in ("gain", "bias", "stored_mean", "stored_var"))
    yield from layer("output_layer.2", 3, width, 3, 3)


FEEDS: dict[str, Callable[[Case, int], Iterator[Views]]] = {"torch": torch_views, "ffcv": ffcv_views, "mlviews": mlviews_views}


def bytes_on_disk(case: Case) -> int:
    """What the loader reads from; a generator's is the size of its weights."""
    if case.loader == "torch":
        return sum(path.stat().st_size for path in (case.folder / "jpeg").glob("*/*.jpg"))
    if case.loader == "ffcv":
        return (case.folder / "images.beton").stat().st_size
    if case.size == 32:
        return (FOLDER / "fashion.safetensors").stat().st_size
    return sum(4 * torch.Size(shape).numel() for _, shape in bigbigan_shapes())


def different(case: Case, samples: int) -> dict[str, int]:
    """Images in two epochs of ``samples`` samples before augmentation, and how many of them differ."""
    if case.loader == "mlviews":
        own = source(case, samples, None)
        images: Iterable[Tensor] = (image for _ in range(2) for views in own for view in views for image in view)
        found = [hashlib.sha256(image.numpy(force=True).tobytes()).digest() for image in images]
    else:
        files = sorted((case.folder / "jpeg").glob("*/*.jpg"))[:samples]
        found = [hashlib.sha256(path.read_bytes()).digest() for _ in range(2) for path in files]
    return {"images": len(found), "different": len(set(found))}


# -- what is fed -------------------------------------------------------------------------------------------------------


class Learner:
    """A ResNet-18 and its SimCLR step."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        self.model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device, memory_format=torch.channels_last)
        self.loss = NTXentLoss(0.2)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, views: Views) -> None:
        """Forward, backward, update; in one memory format, for FFCV's batches have another than torch's and ours."""
        images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        loss = self.loss(*self.model(images).chunk(2))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()


def now(device: str) -> float:
    """The time, once the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def queue(case: Case) -> int:
    """Batches that a loader's workers are ahead at most."""
    return 0 if case.loader == "mlviews" else 2 * case.workers


def timed(case: Case, steps: int) -> int:
    """Steps to time: at least one batch of each worker."""
    return max(steps, queue(case) // 2)


def time_round(case: Case, learner: Learner, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of waiting for each batch and of training on it, in the steady state.

    A loader with workers fills its queue, or falls behind, in the first steps, which are left out; it goes on making batches to the end
    of the last timed step.
    """
    steps = timed(case, steps)
    views = FEEDS[case.loader](case, queue(case) + 1 + steps + queue(case))
    waiting, training = [], []
    for _ in range(queue(case) + 1 + steps):
        begin = now(case.device)
        batch = next(views)
        there = now(case.device)
        learner.step(batch)
        waiting.append(there - begin)
        training.append(now(case.device) - there)
    for _ in views:  # to its end, so that no worker is left behind
        pass
    return waiting[-steps:], training[-steps:]


def time_alone(case: Case, steps: int) -> float:
    """Seconds of a batch with nothing beside the loader: below the training's, or it cannot keep up."""
    views, count = FEEDS[case.loader](case, 2 * queue(case) + 1 + steps), queue(case) + steps
    for _ in range(queue(case) + 1):
        next(views)
    begin = now(case.device)
    for _ in range(count):
        next(views)
    return (now(case.device) - begin) / count


def peak_memory(case: Case) -> dict[str, float]:
    """MiB of this process and its workers at most, each shared page counted once, over a few steps; on a GPU also of its memory."""
    import psutil

    torch.set_num_threads(case.threads)
    done, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.05):
            total = 0
            for process in (own := psutil.Process(), *own.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        time_round(case, Learner(case.device), 1)
    finally:
        done.set()
        thread.join()
    cuda = torch.device(case.device).type == "cuda"
    device = {"device_mib": round(torch.cuda.max_memory_allocated(case.device) / 2**20, 1)} if cuda else {}
    return {"host_mib": round(peak[0], 1)} | device


class Meter:
    """Energy and CO2 by codecarbon, where there is something to read them from."""

    def __init__(self, device: str, country: str) -> None:
        self.country = country
        self.why_not = "" if importlib.util.find_spec("codecarbon") else "codecarbon is not installed (extra bench)"
        counters = [path for path in Path("/sys/class/powercap").glob("intel-rapl*/energy_uj") if os.access(path, os.R_OK)]
        missing = "" if counters else "this machine shows no RAPL counters, without which codecarbon assumes a constant power"
        cuda = torch.device(device).type == "cuda"
        self.why_not = self.why_not or ("" if cuda else missing)
        self.note = f"the GPU's is read; of the CPU, {missing}" if cuda and missing else ""

    def measure(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float] | None]:
        """What the call returns, and its mean power: kWh and grams of CO2 equivalent a second."""
        if self.why_not:
            return call(), None
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(country_iso_code=self.country, measure_power_secs=1, save_to_file=False, log_level="error")
        begin = time.perf_counter()
        tracker.start()
        try:
            made = call()
        finally:
            tracker.stop()
        found, seconds = tracker.final_emissions_data, time.perf_counter() - begin
        return made, {"kwh": found.energy_consumed / seconds, "co2_g": 1000 * found.emissions / seconds}


# -- the benchmark -----------------------------------------------------------------------------------------------------


def over_rounds(values: list[float]) -> dict[str, Any]:
    """Median, and range."""
    return {"median": round(statistics.median(values), 4), "range": [round(min(values), 4), round(max(values), 4)]}


def compare(cases: list[Case], steps: int, rounds: int, meter: Meter, console: Console) -> list[dict[str, Any]]:
    """The loaders in turns, at one size and batch size: seconds of a step are means over a round, for waits come in bursts."""
    learner = Learner(cases[0].device)
    found: dict[str, dict[str, list[float]]] = {case.loader: {"data": [], "training": [], "alone": []} for case in cases}
    power: dict[str, list[dict[str, float]]] = {case.loader: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            console.print(f"{case.size} px, batch {case.batch_size}, round {number + 1}/{rounds}: {case.loader}")
            parts, used = meter.measure(lambda case=case: time_round(case, learner, steps))
            for name, values in zip(("data", "training"), parts, strict=True):
                found[case.loader][name].append(statistics.fmean(values))
            found[case.loader]["alone"].append(found[case.loader]["data"][-1] if case.loader == "mlviews" else time_alone(case, steps))
            if used is not None:
                power[case.loader].append(used)
    first = found[cases[0].loader]
    rows = []
    for case in cases:
        own = found[case.loader]
        both = [sum(parts) for parts in zip(own["data"], own["training"], strict=True)]
        ratios = [step / sum(parts) for step, *parts in zip(both, first["data"], first["training"], strict=True)]
        step_s = statistics.median(both)
        row = {
            "loader": case.loader, "size": case.size, "batch_size": case.batch_size, "steps": rounds * timed(case, steps),
            "data_s": over_rounds(own["data"]), "training_s": over_rounds(own["training"]), "step_s": over_rounds(both),
            "data_share": round(sum(own["data"]) / sum(both), 4), "step_of_first": over_rounds(ratios),
            "samples_per_s": round(case.batch_size / step_s, 2),
            "samples_per_s_alone": round(case.batch_size / statistics.median(own["alone"]), 2),
            "epoch_s": round(EPOCH / case.batch_size * step_s, 1),  # of the device: on CUDA, GPU seconds
        }  # fmt: skip
        if power[case.loader]:
            samples_s = 1000 * step_s / case.batch_size
            row["per_1000_samples"] = {
                key: samples_s * statistics.fmean(one[key] for one in power[case.loader]) for key in ("kwh", "co2_g")
            }
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], out: Path) -> Path:
    """Seconds of waiting and of training, and the share of waiting, against the batch size."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = plt.subplots(2, len(sizes), figsize=(5 * len(sizes), 6.4), squeeze=False, sharex="col")
    for column, size in enumerate(sizes):
        for loader, colour in zip(LOADERS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            own = [row for row in rows if (row["loader"], row["size"]) == (loader, size)]
            if not own:
                continue
            batches = [row["batch_size"] for row in own]
            data = [row["data_s"]["median"] for row in own]
            ends = [[abs(row["data_s"]["range"][end] - value) for value, row in zip(data, own, strict=True)] for end in (0, 1)]
            axes[0][column].errorbar(batches, data, yerr=ends, fmt="o-", color=colour, capsize=3, label=f"{loader}: waiting")
            training = [row["training_s"]["median"] for row in own]
            axes[0][column].plot(batches, training, "x--", color=colour, alpha=0.6, label=f"{loader}: training")
            axes[1][column].plot(batches, [100 * row["data_share"] for row in own], "o-", color=colour, label=loader)
        axes[0][column].set(title=f"{size} px", ylabel="seconds of a step", xscale="log", yscale="log")
        axes[1][column].set(xlabel="batch size", ylabel="share of waiting, %", ylim=(0, 100))
        axes[1][column].set_xticks(batches := sorted({row["batch_size"] for row in rows}), map(str, batches))
        axes[1][column].minorticks_off()
        for ax in axes[:, column]:
            ax.grid(alpha=0.3)
    axes[1][0].legend(fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), ncol=len(LOADERS), loc="lower center", fontsize=8, title="above")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    path = out / "loaders.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice.")] = None,
    sizes: Annotated[str, typer.Option(help=f"Sides of the images, of {', '.join(map(str, CROPS))}.")] = "32,128",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "32,64,128,256",
    loaders: Annotated[str, typer.Option(help="In turns; the first is what the others are compared with.")] = ",".join(LOADERS),
    images: Annotated[int, typer.Option(help="Files of each size.", min=32)] = 10_000,
    steps: Annotated[int, typer.Option(help="Timed in a round, at 32 pixels; an eighth as many above, at least two.", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="Turns of each loader.", min=1)] = 3,
    workers: Annotated[int, typer.Option(help="Of the loaders that read files; 0: one for each core.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    country: Annotated[str, typer.Option(help="ISO code of the country whose electricity it is, for CO2.")] = "ITA",
    work: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/loaders"),
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="32 pixels, two small batches, two steps: to see that it runs.")] = False,
) -> None:
    """Time the loaders, print, write and draw what comes out."""
    console = Console()
    if quick:
        sizes, batches, images, steps, rounds = "32", "8,16", 64, 2, 1
        out = apart(out, work)
    skipped = {} if importlib.util.find_spec("ffcv") else {"ffcv": "not installed (extra ffcv)"}
    names = [name for name in loaders.split(",") if name not in skipped]
    if unknown := [name for name in names if name not in LOADERS] + [size for size in sizes.split(",") if int(size) not in CROPS]:
        raise typer.BadParameter(f"Unknown {unknown[0]!r}: loaders are {', '.join(LOADERS)}, sizes {', '.join(map(str, CROPS))}.")
    meter, workers = Meter(device, country), workers or os.cpu_count() or 1
    rows, disk, unique = [], [], []
    for size in map(int, sizes.split(",")):
        folder = work / f"{size}px-{images}"
        write_files(data, size, images, folder)
        cases: list[Case] = []
        for batch_size in map(int, batches.split(",")):
            cases = [Case(name, size, batch_size, device, workers, folder, torch.get_num_threads()) for name in names]
            few = steps if size == 32 else max(2, steps // 8)
            own = compare(cases, few, rounds, meter, console)
            for row, case in zip(own, cases, strict=True):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    row["peak"] = pool.submit(peak_memory, case).result()
            rows += own
        for case in cases:
            disk.append({"loader": case.loader, "size": size, "bytes": bytes_on_disk(case)})
            few = min(images, 1_000 if size == 32 else 32)
            unique.append({"loader": case.loader, "size": size, **different(case._replace(batch_size=min(few, 32)), few)})

    first = names[0]
    table = Table("px", "batch", "loader", "waiting, ms", "training, ms", "waiting", "samples/s", "alone", f"step / {first}'s", "peak, MiB",
                  title="A step: median (range) of rounds")  # fmt: skip
    for row in rows:
        parts = (f"{1e3 * part['median']:.0f} ({1e3 * part['range'][0]:.0f}–{1e3 * part['range'][1]:.0f})"
                 for part in (row["data_s"], row["training_s"]))  # fmt: skip
        table.add_row(
            str(row["size"]), str(row["batch_size"]), row["loader"], *parts, f"{row['data_share']:.0%}", f"{row['samples_per_s']:.0f}",
            f"{row['samples_per_s_alone']:.0f}", f"{row['step_of_first']['median']:.2f}", f"{row['peak']['host_mib']:.0f}",
        )  # fmt: skip
    console.print(table)
    for name, why in [*skipped.items(), *([("energy and CO2", meter.why_not)] if meter.why_not else [])]:
        console.print(f"Not measured: {name}: {why}.")
    made = environment(device)
    record = {
        "command": shlex.join(["python", "benchmarks/loaders.py", *sys.argv[1:]]),
        "images": images, "rounds": rounds, "workers": workers, "seed": 0, "epoch": EPOCH, "first": first,
        "rows": rows, "disk": disk, "unique": unique, "skipped": skipped, "energy_not_measured": meter.why_not or None,
        "energy_note": meter.note or None,
        **made, "versions": made["versions"] | {name: version(name) for name in ("torchvision", "lightly", *({"ffcv"} - set(skipped)))},
    }  # fmt: skip
    for path in (write(record, out / "loaders.json"), draw(rows, out)):
        console.print(path)


if __name__ == "__main__":
    typer.run(main)
