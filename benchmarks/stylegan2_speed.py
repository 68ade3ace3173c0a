"""Our StyleGAN2 against the official generator on this machine's CPU: ``python benchmarks/stylegan2_speed.py DIR``.

DIR is a checkout of NVlabs/stylegan2-ada-pytorch, run in float32 with constant noise on the same random weights of config-f's sizes. They
take turns in one process, so that a busy machine slows both; the time is the process' own (wall time is recorded beside it). Compared are
128 px images, 512 px images through the cars' crop (512 to 384 to 128; the official code makes them whole, then crops and resizes as the
paper's does), and pairs that differ in the last of four groups only (the official code makes both images whole). Prints a table, writes
``benchmarks/results/stylegan2-speed.json``.
"""

from __future__ import annotations

import importlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from record import RESULTS, apart, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mlviews
from mlviews import perturb
from mlviews.generators.stylegan.reading import load as load_stylegan2
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint

GOALS = {"128 px": 1.6, "512 px, crop": 1.5, "128 px, last group": 2.0, "512 px, crop, last group": 2.0}
CARS: dict[str, Any] = {"crop": 384, "size": 128}


class Timing:
    """Process and wall seconds of a callable, run by run."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def __call__(self) -> None:
        """Run once more."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)


def official_generator(folder: Path, resolution: int, base: int, seed: int) -> Any:
    """The official network with random weights, noise and biases."""
    sys.path.insert(0, str(folder))
    torch.manual_seed(seed)
    network = importlib.import_module("training.networks").Generator(512, 0, 512, resolution, 3, synthesis_kwargs={"channel_base": base})
    for name, value in network.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            value.data += 0.1 * torch.randn_like(value)
    return network.eval().requires_grad_(False)


def main(
    checkout: Annotated[Path, typer.Argument(help="Checkout of NVlabs/stylegan2-ada-pytorch.", exists=True, file_okay=False)],
    runs: Annotated[int, typer.Option(help="Runs of each, after one to warm up.", min=1)] = 15,
    batch_128: Annotated[int, typer.Option(help="Images of 128 px at a time.", min=1)] = 8,
    batch_512: Annotated[int, typer.Option(help="Images of 512 px at a time.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    base: Annotated[int, typer.Option(help="The official channel_base; config-f has 32768.", min=512)] = 32768,
    seed: Annotated[int, typer.Option(help="Of weights and latents.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="3 runs of the smallest batches.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "stylegan2-speed.json",
) -> None:
    """Time both, case by case."""
    torch.set_num_threads(threads)
    if quick:
        runs, batch_128, batch_512 = 3, 1, 1
        out = apart(out)
    cases = []
    for resolution, batch, options in ((128, batch_128, {}), (512, batch_512, CARS)):
        cases += compare(official_generator(checkout, resolution, base, seed), resolution, batch, options, runs, seed)
    table = Table("case", "images", "official, s", "ours, s", "ratio (quartiles)", "ratio, wall", "goal", title=f"{threads} thread(s)")
    for case in cases:
        low, high = case["ratio_quartiles"]
        table.add_row(
            case["case"], str(case["images"]), f"{case['official']['cpu']['median']:.3f}", f"{case['ours']['cpu']['median']:.3f}",
            f"{case['ratio']:.2f} ({low:.2f} – {high:.2f})", f"{case['ratio_wall']:.2f}", f"{GOALS[case['case']]:.1f}",
        )  # fmt: skip
    Console().print(table)
    arguments = [Path(value).name if Path(value) == checkout else value for value in sys.argv[1:]]
    record = {
        "command": shlex.join(["python", "benchmarks/stylegan2_speed.py", *arguments]),
        "seed": seed, "runs": runs, "channel_base": base, "cases": cases,
    } | environment()  # fmt: skip
    Console().print(write(record, out))


@torch.no_grad()
def compare(network: Any, resolution: int, batch: int, options: dict[str, Any], runs: int, seed: int) -> list[dict[str, Any]]:
    """Whole images, then pairs that differ in the last group."""
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    ours = load_stylegan2(
        Checkpoint("stylegan2-ada", tensors, dict(network.init_kwargs), "The official network"), groups=4, **options
    )
    z = ours.sample_latents(range(batch), seed)
    source = mlviews.MLViewSource(ours, {3: perturb.Normal(0.8, 1.0)}, batch_size=batch, num_samples=batch, seed=seed)
    moved = source.batch(0, batch).latents[1]

    def official(latents: Tensor, style: Tensor | None = None) -> Tensor:
        w = network.mapping(latents, None)
        if style is not None:  # the last group's styles from another z
            first = ours.runs[-1].start
            w = torch.cat([w[:, :first], network.mapping(style, None)[:, first:]], dim=1)
        image: Tensor = network.synthesis(w, noise_mode="const", force_fp32=True)
        if options:  # as the paper's code: centre crop, then bilinear with aligned corners
            low = (resolution - options["crop"]) // 2
            image = image[:, :, low : resolution - low, low : resolution - low]
            image = F.interpolate(image, size=(options["size"],) * 2, mode="bilinear", align_corners=True)
        return (image * 0.5 + 0.5).clamp(0, 1)

    name = f"{resolution} px" + (", crop" if options else "")
    pairs = [
        (name, batch, lambda: official(z[0]), lambda: ours(z)),
        (f"{name}, last group", 2 * batch, lambda: (official(z[0]), official(z[0], moved[-1])), lambda: source.batch(0, batch)),
    ]
    found = []
    for case, images, theirs, own in pairs:
        timings = Timing(theirs), Timing(own)
        for call in (theirs, own):
            call()  # to warm up
        for run in track(range(runs), case, console=Console(stderr=True)):
            for timing in timings[:: 1 if run % 2 else -1]:
                timing()
        ratios = sorted(a / b for a, b in zip(timings[0].cpu, timings[1].cpu, strict=True))
        found.append({
            "case": case, "images": images, "official": figures(timings[0]), "ours": figures(timings[1]),
            "ratio": round(statistics.median(timings[0].cpu) / statistics.median(timings[1].cpu), 3),
            "ratio_quartiles": [round(value, 3) for value in quartiles(ratios)],
            "ratio_wall": round(statistics.median(timings[0].wall) / statistics.median(timings[1].wall), 3),
        })  # fmt: skip
    if not options:
        found[0]["largest_difference"] = (official(z[0]) - ours(z)).abs().max().item()
    return found


def figures(timing: Timing) -> dict[str, Any]:
    """Medians and quartiles, in seconds."""
    return {
        kind: {"median": round(statistics.median(values), 4), "quartiles": [round(value, 4) for value in quartiles(values)]}
        for kind, values in (("cpu", timing.cpu), ("wall", timing.wall))
    }


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else values * 2


if __name__ == "__main__":
    typer.run(main)
