"""Our BigGAN-deep against the original on this machine's CPU.

``python benchmarks/biggan_deep_speed.py --deep DIR``

DIR is a checkout of huggingface/pytorch-pretrained-BigGAN, run on the same random weights of the published
sizes. They take turns in one process, so that a busy machine slows both; the time is the process' own (wall
time is recorded beside it). Compared are images, and pairs of an anchor and a positive that differ in the
last two resolutions only (the original makes both images whole). Prints a table, writes
``benchmarks/results/biggan-deep-speed.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from documents.generators import deep_speed
from record import RESULTS, command, publish
from stylegan2_speed import time_case
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "parity"))
from biggan_deep import LAYERS, official_network, settings
from compare import SEED, Case, checkout, largest

from mlviews import MLViewSource
from mlviews.generators.biggan.deep_reading import load as load_deep
from mlviews.perturb import Resample
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint


@torch.no_grad()
def compare(folder: Path, resolution: int, width: int, rows: int, turns: int) -> list[dict[str, Any]]:
    """Time whole images, then pairs that differ in the last two resolutions."""
    case = Case(f"{resolution}", "deep", settings(resolution, LAYERS[resolution], width))
    network = official_network(case, folder)
    checkpoint = Checkpoint("biggan-deep", network.state_dict(), case.facts, "The original")
    ours = load_deep(checkpoint, groups="scale")
    z, labels = ours.sample_latents(range(rows), SEED), ours.sample_labels(range(rows), SEED)
    classes = F.one_hot(labels, ours.num_classes).float()
    last = len(ours.levels) - 2
    source = MLViewSource(ours, {f"{last}:": Resample()}, batch_size=rows, num_samples=rows, seed=SEED)

    def original() -> Tensor:
        images: Tensor = network(z[0], classes, 1.0)
        return images

    name = f"{resolution} px"
    images = time_case(name, rows, original, lambda: ours(z, labels), turns)
    images["largest_difference"] = largest(ours(z, labels), (original() + 1) / 2)

    def originals() -> tuple[Tensor, Tensor]:
        return original(), original()

    pairs = time_case(
        f"{name}, last two resolutions", 2 * rows, originals, lambda: source.batch(0, rows), turns
    )
    return [images, pairs]


def main(
    deep: Annotated[Path, checkout("huggingface/pytorch-pretrained-BigGAN")],
    turns: Annotated[int, typer.Option(help="Runs of each, after one to warm up.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    width: Annotated[
        int, typer.Option(help="Channels of the last block; the published networks' is 128.")
    ] = 128,
    shared: Annotated[
        bool, typer.Option("--shared", help="Note that others computed at the same time.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "biggan-deep-speed.json",
) -> None:
    """Compare all sizes."""
    torch.set_num_threads(threads)
    rows = [row for size, count in ((128, 4), (256, 2)) for row in compare(deep, size, width, count, turns)]
    arguments = ["--deep", deep.name, "--turns", str(turns), "--threads", str(threads), "--width", str(width)]
    record = {"command": command("biggan_deep_speed.py", arguments), "seed": SEED, "threads": threads}
    record |= {"width": width, "machine_was_shared": shared, **environment(), "cases": rows}
    publish(record, out, deep_speed(record))


if __name__ == "__main__":
    typer.run(main)
