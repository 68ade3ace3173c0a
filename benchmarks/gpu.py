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
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.gpu import gpu_checks, gpu_loaders, gpu_overlap, gpu_speed
from gpu_feeding import loaders, overlap
from gpu_run import Clock, Row, Run, step_source, tried
from networks import NETWORKS
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from timing import now
from torch import Tensor

from mlviews import MLVGM, MLViewSource, load_generator
from mlviews.perturb import Normal, Resample, Walker
from mlviews.runs.records import environment
from mlviews.transforms import byol, simclr

DTYPES = ("float32", "float16", "bfloat16")
SHARES = {"device": 0.06, "equal": 0.1, "speed": 0.3, "loaders": 0.2, "overlap": 0.06, "compiled": 0.28}

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
    tables = (table(record) for table in (gpu_checks, gpu_speed, gpu_loaders, gpu_overlap))
    publish(record, out, *tables, generators=["fashion"])


if __name__ == "__main__":
    typer.run(main)
