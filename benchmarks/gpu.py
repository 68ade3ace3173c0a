"""What only a GPU can show, on one card within eight minutes: ``python benchmarks/gpu.py``.

It needs nothing but the base install (the diffusion model: diffusers). Sections, each with a budget of time:

- ``device``: steps under ``torch.cuda.set_sync_debug_mode("error")``, where any wait for the device raises.
- ``equal``: the same samples on the CPU and on the device.
- ``speed``: pairs per second and peak memory of eight architectures, in float32, float16 and bfloat16.
- ``loaders``: a training step fed by torch's DataLoader over JPEG files, and by generators, every sample of
  which serves 1 to 16 steps (the paper's figure 5).
- ``overlap``: how much of the generator's time is hidden behind training, in one stream and in two.
- ``compiled``: the speeds under ``torch.compile``, each in a process that is ended when its time is up.

What a section has no time for is listed in the record. Prints tables, writes ``benchmarks/results/gpu.json``,
which the documents show. ``--device cpu`` runs the same code with tiny networks, and its figures mean
nothing.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from documents.gpu import gpu_checks, gpu_loaders, gpu_overlap, gpu_speed
from networks import NETWORKS
from PIL import Image
from real_images import all_to_train_on
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from timing import now
from torch import Tensor

from mlviews import MLVGM, MLViewSource, load_generator
from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import info_nce
from mlviews.perturb import Normal, Resample, Walker
from mlviews.runs.records import environment
from mlviews.transforms import IMAGENET, byol, simclr

DTYPES = ("float32", "float16", "bfloat16")
REUSE = (1, 4, 8, 16)
FED = {"fashion, 32 px": (32, 256), "bigbigan, 128 px": (128, 64)}
"""The generators that feed a training step: pixels of their images' side, and the batch."""
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of a crop's area, and of its sides
SHARES = {"device": 0.06, "equal": 0.1, "speed": 0.3, "loaders": 0.2, "overlap": 0.06, "compiled": 0.28}

Row = dict[str, Any]
Views = tuple[Tensor, Tensor]


class Run(NamedTuple):
    """What every section is given."""

    device: torch.device
    tiny: bool  # on a CPU: the tiny networks, and only a few samples
    data: Path | None  # folder of Fashion-MNIST's files; None: the bundled slice
    work: Path  # folder for the files that loaders read

    def clip(self, count: int, most: int = 4) -> int:
        """Return the count, or a small one on a CPU."""
        return min(count, most) if self.tiny else count


class Clock:
    """The time that a section has.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.end - time.perf_counter())

    def within(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names as long as there is time, and note those that there was none for."""
        for name in names:
            if self.left:
                yield name
            else:
                self.left_out.append(name)


# -- on the device -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Within this block, whatever waits for a CUDA device raises a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watched_step(source: MLViewSource, device: torch.device) -> str:
    """Return what a step did that it must not do; empty if it neither waited nor left the device."""
    steps = iter(source)
    next(steps)  # the plan's constants are sent to the device once
    try:
        with waits_are_errors(device):
            batch = next(steps)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    elsewhere = {leaf.device.type for leaf in tensors(batch)} - {device.type}
    return f"tensors on {', '.join(sorted(elsewhere))}" if elsewhere else ""


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def settings() -> dict[str, dict[str, Any]]:
    """Return arguments of sources on ``fashion``, by what is special about them."""
    noise = {"1:": Normal(1.0, 2.0)}
    return {
        "raw": {"perturb": noise},
        "crop, flip, color; four views": {"perturb": noise, "transform": simclr(28), "num_views": 4},
        "BYOL's two pipelines": {"perturb": noise, "transform": byol(28)},
        "walker": {"perturb": {"1:": Walker(48)}},
        "walker that draws": {"perturb": {"1:": Walker(48, noise=True)}},
        "micro-batches": {"perturb": {0: Resample()}, "micro_batch_size": 4},
        "pool": {"perturb": noise, "pool": True},
        "reuse": {"perturb": noise, "transform": simclr(28), "reuse": 4},
        "layout lightly": {"perturb": noise, "layout": "lightly"},
    }


def on_device(run: Run, clock: Clock) -> list[Row]:
    """Look at a step of each setting, and of each tiny architecture."""
    rows = []
    generator = load_generator("fashion")
    of_source = settings()
    for name in clock.within([f"fashion, {name}" for name in of_source]):
        options = {"layout": "solo", **of_source[name.removeprefix("fashion, ")]}
        source = MLViewSource(generator, batch_size=8, num_samples=64, device=run.device, **options)
        rows.append({"case": name, "problem": watched_step(source, run.device)})
    for name in clock.within([name for name in NETWORKS if not missing(name)]):
        source = step_source(NETWORKS[name].make(run.device, tiny=True), 4, run.device)
        rows.append({"case": f"{name} (tiny)", "problem": watched_step(source, run.device)})
    return rows


# -- equal to the CPU ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Within this block, float32 products and convolutions may or may not round to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def equal(run: Run, clock: Clock) -> list[Row]:
    """Compare samples with the CPU's: of ``fashion`` with T_x, and of each tiny architecture."""
    cases: dict[str, Callable[[], MLVGM]] = {"fashion, crop, flip, color": lambda: load_generator("fashion")}
    for name in NETWORKS:
        if not missing(name):
            cases[f"{name} (tiny)"] = lambda name=name: NETWORKS[name].make(torch.device("cpu"), tiny=True)
    rows = []
    for name in clock.within(list(cases)):
        generator = cases[name]()
        transform = simclr(28) if name.startswith("fashion,") and "tiny" not in name else None
        reference = whole_batch(copy.deepcopy(generator), torch.device("cpu"), transform)
        row: Row = {"case": name}
        for precision, allowed in (("float32", False), ("TF32", True)):
            with tensor_float(allowed):
                batch = whole_batch(copy.deepcopy(generator), run.device, transform)
            row[f"latents, {precision}"] = largest(batch.latents[1], reference.latents[1])
            row[f"images, {precision}"] = largest(batch.views, reference.views)
        rows.append(row)
    return rows


def whole_batch(generator: MLVGM, device: torch.device, transform: Any) -> Any:
    """Return a small batch with its latents."""
    source = step_source(generator, 8, device, transform=transform, layout=lambda batch: batch)
    return next(iter(source))


def largest(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Return the largest difference, to three digits."""
    differences = [
        (value.cpu() - reference).abs().max() for value, reference in zip(values, references, strict=True)
    ]
    return float(f"{float(torch.stack(differences).max()):.3g}")


# -- speed and memory ----------------------------------------------------------------------------------------


def missing(name: str) -> str:
    """Return the package that an architecture needs and that is not installed; empty if there is none."""
    package = NETWORKS[name].needs
    return package if package and importlib.util.find_spec(package) is None else ""


def step_source(generator: MLVGM, batch: int, device: torch.device, **options: Any) -> MLViewSource:
    """Return a source whose views differ in the finer half of the levels, which are drawn afresh."""
    first = max(1, len(generator.levels) // 2)
    defaults = {"num_samples": batch * 10_000, "layout": "pair"}
    return MLViewSource(
        generator, {f"{first}:": Resample()}, batch_size=batch, device=device, **(defaults | options)
    )


def time_steps(source: MLViewSource, device: torch.device, seconds: float) -> float:
    """Return seconds of a step, the mean over steps of about so many seconds, at least three."""
    steps = iter(source)
    for _ in range(2):
        next(steps)
    begin = now(device)
    next(steps)
    single = now(device) - begin
    count = max(3, min(1000, int(seconds / max(single, 1e-6))))
    begin = now(device)
    for _ in range(count):
        next(steps)
    return (now(device) - begin) / count


def speed_of(generator: MLVGM, batch: int, dtype: str, compile: bool, run: Run) -> Row:
    """Return pairs a second and the peak memory, with this batch or the largest half of it that fits."""
    while True:
        source = step_source(generator, batch, run.device, dtype=dtype, compile=compile)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)
        try:
            step = time_steps(source, run.device, 0.01 if run.tiny else 1.0)
            break
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
    row: Row = {"batch_size": batch, "pairs_per_s": round(batch / step, 2)}
    if run.device.type == "cuda":
        row["peak_mib"] = round(torch.cuda.max_memory_allocated(run.device) / 2**20, 1)
    if not compile:
        row["problem"] = watched_step(source, run.device)
    return row


def tried(call: Callable[[], Row], facts: Row) -> Row:
    """Return these facts and those that a call returns, or what went wrong."""
    try:
        return facts | call()
    except Exception as error:  # the sections after it have to be measured all the same
        return facts | {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}


def speed(run: Run, clock: Clock) -> list[Row]:
    """Time every network in every precision."""
    rows: list[Row] = []
    for name in clock.within(list(NETWORKS)):
        if missing(name):
            clock.left_out.append(f"{name}: {missing(name)} is not installed")
            continue
        generator = NETWORKS[name].make(run.device, run.tiny)
        batch = run.clip(NETWORKS[name].batch)
        for dtype in DTYPES[: 1 if run.tiny else None]:
            facts = {"network": name, "dtype": dtype, "compile": False}
            rows.append(tried(partial(speed_of, generator, batch, dtype, False, run), facts))
    return rows


def compiled(run: Run, clock: Clock) -> list[Row]:
    """Time every architecture under torch.compile, each in a process that is ended when the time is up."""
    rows: list[Row] = []
    names = [name for name in NETWORKS if not missing(name)]
    cases = [f"{name}; {dtype}" for dtype in ("bfloat16", "float32") for name in names]
    for case in clock.within(cases):
        name, dtype = case.split("; ")
        facts = {"network": name, "dtype": dtype, "compile": True}
        arguments = [sys.executable, __file__, "--device", str(run.device), "--compiled", case]
        try:
            process = subprocess.run(
                arguments, capture_output=True, text=True, timeout=clock.left, check=False
            )
        except subprocess.TimeoutExpired:
            clock.left_out.append(f"{case}: not compiled and timed before the section's time was up")
            continue
        lines = process.stdout.splitlines()
        if process.returncode or not lines:
            reason = (process.stderr.splitlines() or ["no message"])[-1]
            rows.append(facts | {"problem": reason[:300]})
        else:
            rows.append(facts | json.loads(lines[-1]))
    return rows


# -- figure 5 ------------------------------------------------------------------------------------------------


class Learner:
    """A SimCLR step of a ResNet-18's stages, of this project's blocks (the base install has no torchvision).

    Args:
        side: pixels of the images that views are cropped from.
        run: where, and how large.
    """

    def __init__(self, side: int, run: Run) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = ImageCritic((3, side * 7 // 8, side * 7 // 8), width=8 if run.tiny else 64).to(
                run.device
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, views: Views) -> None:
        """Take a step."""
        loss = info_nce(*self.model(torch.cat(views)).chunk(2), temperature=0.2)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Files(torch.utils.data.Dataset[Views]):
    """Two crops of each JPEG file, flipped and normalized, as torchvision's pipeline makes them with PIL.

    Args:
        folder: of the files.
        side: pixels of a view.
        count: samples of an epoch, which may be more than there are files.
    """

    def __init__(self, folder: Path, side: int, count: int) -> None:
        self.paths, self.side, self.count = sorted(folder.glob("*.jpg")), side, count
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in IMAGENET)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Views:
        image = Image.open(self.paths[index % len(self.paths)]).convert("RGB")
        return self._view(image), self._view(image)

    def _view(self, image: Image.Image) -> Tensor:
        width, height = image.size
        area = width * height * random.uniform(*SCALE)
        ratio = random.uniform(*RATIO)
        w, h = (min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5)))
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        view = image.resize((self.side, self.side), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255  # [3, H, W]
        return (pixels - self.mean) / self.std


def write_files(run: Run, side: int, count: int) -> Path:
    """Write real images as JPEG files of this side, unless they are there; return their folder."""
    folder = run.work / f"{side}px"
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = all_to_train_on(run.data)
    for index, image in enumerate(images[:count]):
        path = folder / f"{index:05d}.jpg"
        if not path.exists():
            Image.fromarray(image[0].numpy()).resize((side, side)).convert("RGB").save(path, quality=95)
    return folder


class Feed(NamedTuple):
    """Batches in the steady state: more than are timed, so that workers go on to the end."""

    batches: Iterator[Views]
    untimed: int  # batches before those that are timed


def file_feed(run: Run, side: int, batch: int, steps: int) -> Feed:
    """Return batches of torch's DataLoader, with a worker for each processor, sixteen at most."""
    files = write_files(run, side, run.clip(1024, 16))
    workers = run.clip(min(16, os.cpu_count() or 1), 0)
    queue = 2 * workers  # batches that the workers are ahead at most
    is_cuda = run.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Files(files, side * 7 // 8, batch * (queue + 1 + steps + queue)),
        batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=is_cuda,
    )
    batches = (tuple(view.to(run.device, non_blocking=is_cuda) for view in views) for views in loader)
    return Feed(batches, queue + 1)


def generated_feed(run: Run, network: str, steps: int, reuse: int = 1) -> Feed:
    """Return batches of a generator: two of an epoch that is left early, then a whole epoch of steps."""
    side, size = FED[network]
    batch = run.clip(size)
    source = step_source(
        NETWORKS[network].make(run.device, run.tiny),
        batch,
        run.device,
        transform=simclr(side * 7 // 8, color=False),
        num_samples=batch * steps,
        reuse=reuse,
    )
    return Feed(itertools.chain(itertools.islice(source, 2), source), 2)


def reuses(run: Run) -> Sequence[int]:
    """Return in how many steps a sample is shown, from case to case."""
    return REUSE[:2] if run.tiny else REUSE


def feeds_of(run: Run, network: str, steps: int) -> dict[str, Callable[[], Feed]]:
    """Return what feeds so many training steps, by name."""
    side, size = FED[network]
    feeds: dict[str, Callable[[], Feed]] = {"torch": partial(file_feed, run, side, run.clip(size), steps)}
    for times in reuses(run):
        feeds[f"mlviews, reuse={times}"] = partial(generated_feed, run, network, steps, times)
    return feeds


def loaders(run: Run, clock: Clock) -> list[Row]:
    """Time steps fed by files and by generators; reuse over a whole epoch, first showings included."""
    rows: list[Row] = []
    for network in list(FED)[: 1 if run.tiny else None]:
        side, size = FED[network]
        learner = Learner(side, run)
        steps = 2 * reuses(run)[-1]  # two batches of samples at least, so that none is shown twice in a row
        feeds = feeds_of(run, network, steps)
        for case in clock.within([f"{network}; {name}" for name in feeds]):
            name = case.split("; ")[1]
            facts = {"case": network, "loader": name, "batch_size": run.clip(size), "steps": steps}
            call = partial(time_feed, feeds[name], learner, steps, run)
            rows.append(tried(call, facts))
    return rows


def time_feed(feed: Callable[[], Feed], learner: Learner, steps: int, run: Run) -> Row:
    """Return mean milliseconds of waiting for a batch and of training on it, in the steady state."""
    batches, untimed = feed()
    for views in itertools.islice(batches, untimed):
        learner.step(views)
    waiting = training = 0.0
    begin = now(run.device)
    for views in itertools.islice(batches, steps):
        arrival = now(run.device)
        learner.step(views)
        end = now(run.device)
        waiting, training, begin = waiting + arrival - begin, training + end - arrival, end
    for _ in batches:  # to its end, so that no worker is left behind
        pass
    return {
        "waiting_ms": round(1e3 * waiting / steps, 2),
        "training_ms": round(1e3 * training / steps, 2),
        "samples_per_s": round(len(views[0]) * steps / (waiting + training), 1),
    }


# -- data time behind training -------------------------------------------------------------------------------


def ahead(batches: Iterator[Views], device: torch.device) -> Iterator[Views]:
    """Yield batches that are made in a stream of their own, each while the one before it is trained on."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)

    def make() -> tuple[Views | None, torch.cuda.Event]:
        with torch.cuda.stream(side):
            views = next(batches, None)
            return views, side.record_event()

    views, ready = make()
    while views is not None:
        current.wait_event(ready)
        for view in views:
            view.record_stream(current)
        following, following_ready = make()
        yield views
        views, ready = following, following_ready


def overlap(run: Run, clock: Clock) -> list[Row]:
    """Time generating alone, training alone, both in turn in one stream, and in two streams."""
    rows: list[Row] = []
    for network in clock.within(list(FED)[: 1 if run.tiny else None]):
        side, size = FED[network]
        steps = run.clip(20, 2)
        feed = partial(generated_feed, run, network, steps)
        learner = Learner(side, run)
        views = next(feed().batches)
        row: Row = {"network": network, "batch_size": run.clip(size), "steps": steps}
        row["generating_ms"] = mean_ms(feed(), lambda _: None, run)
        row["training_ms"] = mean_ms(Feed(iter([views] * (steps + 2)), 2), learner.step, run)
        row["one_stream_ms"] = mean_ms(feed(), learner.step, run)
        if run.device.type == "cuda":
            batches, untimed = feed()
            row["two_streams_ms"] = mean_ms(Feed(ahead(batches, run.device), untimed), learner.step, run)
        rows.append(row)
    return rows


def mean_ms(feed: Feed, use: Callable[[Views], None], run: Run) -> float:
    """Return mean milliseconds of a step; the device is waited for at the end only."""
    batches, untimed = feed
    for views in itertools.islice(batches, untimed):
        use(views)
    begin = now(run.device)
    count = 0
    for views in batches:
        use(views)
        count += 1
    return round(1e3 * (now(run.device) - begin) / count, 2)


# -- the benchmark -------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Run, Clock], list[Row]]] = {
    "device": on_device,
    "equal": equal,
    "speed": speed,
    "loaders": loaders,
    "overlap": overlap,
    "compiled": compiled,
}


def card(device: torch.device) -> dict[str, Any]:
    """Return what the device is."""
    if device.type != "cuda":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_mib": properties.total_memory >> 20,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that it runs.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Of all sections together.", min=1)] = 440.0,
    sections: Annotated[str, typer.Option(help=f"With commas, of {', '.join(SECTIONS)}.")] = ",".join(
        SECTIONS
    ),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for the files that loaders read.")] = Path("runs/gpu"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "gpu.json",
    compiled: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all sections, then print and write the tables."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("This machine has no CUDA device: --device cpu runs the same code, small.")
    run = Run(place, place.type != "cuda", data, work)
    if compiled:
        name, dtype = compiled.split("; ")
        network = NETWORKS[name]
        generator = network.make(place, run.tiny)
        print(json.dumps(speed_of(generator, run.clip(network.batch), dtype, True, run)))
        return
    names = sections.split(",")
    for name in names:
        if name not in SECTIONS:
            raise typer.BadParameter(f"Unknown section {name!r}: there are {', '.join(SECTIONS)}.")
    if run.tiny or names != list(SECTIONS):
        out = off_the_records(out, work)
    console = Console(stderr=True)
    record: dict[str, Any] = {"command": command("gpu.py"), "seconds": seconds, "card": card(place)}
    whole = Clock(seconds)
    for name in names:
        # What an earlier section did not need is the later ones', in proportion to their shares.
        rest = sum(SHARES[later] for later in names[names.index(name) :])
        clock = Clock(whole.left * SHARES[name] / rest)
        begin = time.perf_counter()
        console.print(f"{name}: {clock.left:.0f} s at most")
        rows = SECTIONS[name](run, clock)
        took = round(time.perf_counter() - begin, 1)
        record[name] = {"seconds": took, "rows": rows, "left_out": clock.left_out}
    record |= environment(place)
    publish(record, out, *(table(record) for table in (gpu_checks, gpu_speed, gpu_loaders, gpu_overlap)))


if __name__ == "__main__":
    typer.run(main)
