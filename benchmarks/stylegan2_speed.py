"""Our StyleGAN2 against the official generator on this machine's CPU.

``python benchmarks/stylegan2_speed.py DIR``

DIR is a checkout of NVlabs/stylegan2-ada-pytorch, run in float32 with constant noise on the same random
weights of config-f's sizes. They take turns in one process, so that a busy machine slows both; the time is
the process' own (wall time is recorded beside it). Compared are 128 px images, 512 px images through the
cars' crop (512 to 384 to 128; the official code makes them whole, then crops and resizes as the paper's
does), and pairs that differ in the last of four groups only (the official code makes both images whole).
Prints a table, writes ``benchmarks/results/stylegan2-speed.json``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from documents.common import markdown
from documents.generators import TIMES, stylegan2_times
from parity.compare import imported, largest
from record import RESULTS, command, off_the_records, publish
from timing import median_and_quartiles, ratios, take_turns
from torch import Tensor

import mlviews
from mlviews import perturb
from mlviews.generators.stylegan.reading import load as load_stylegan2
from mlviews.generators.stylegan.stylegan2 import StyleGAN2
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint

GOALS = {"128 px": 1.6, "512 px, crop": 1.5, "128 px, last group": 2.0, "512 px, crop, last group": 2.0}
CARS: dict[str, Any] = {"crop": 384, "size": 128}

Row = dict[str, Any]


def official_generator(checkout: Path, resolution: int, base: int, seed: int) -> Any:
    """Return the official network with random weights, noise and biases."""
    torch.manual_seed(seed)
    with imported(checkout) as load:
        networks = load("training.networks")
        network = networks.Generator(512, 0, 512, resolution, 3, synthesis_kwargs={"channel_base": base})
    for name, value in network.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            value.data += 0.1 * torch.randn_like(value)
    return network.eval().requires_grad_(False)


def our_generator(network: Any, options: dict[str, Any]) -> StyleGAN2:
    """Return ours, with the weights of the official one."""
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    checkpoint = Checkpoint("stylegan2-ada", tensors, dict(network.init_kwargs), "The official network")
    return load_stylegan2(checkpoint, groups=4, **options)


def official_images(network: Any, ws: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the official images in [0, 1] of styles ``[B, layers, w]``, cropped and resized as the paper's
    code does.
    """
    images: Tensor = network.synthesis(ws, noise_mode="const", force_fp32=True)
    if options:  # centre crop, then bilinear with aligned corners
        side = images.shape[-1]
        low = (side - options["crop"]) // 2
        images = images[:, :, low : side - low, low : side - low]
        images = F.interpolate(images, size=(options["size"],) * 2, mode="bilinear", align_corners=True)
    return (images * 0.5 + 0.5).clamp(0, 1)


@torch.no_grad()
def compare(network: Any, batch: int, options: dict[str, Any], turns: int, seed: int) -> list[Row]:
    """Time whole images, then pairs that differ in the last group."""
    ours = our_generator(network, options)
    z = ours.sample_latents(range(batch), seed)
    source = mlviews.MLViewSource(
        ours, {3: perturb.Normal(0.8, 1.0)}, batch_size=batch, num_samples=batch, seed=seed
    )
    moved = source.batch(0, batch).latents[1]

    def anchors() -> Tensor:
        return official_images(network, network.mapping(z[0], None), options)

    def positives() -> Tensor:
        first = ours.runs[-1].start  # the last group's styles come from another z
        ws = torch.cat(
            [network.mapping(z[0], None)[:, :first], network.mapping(moved[-1], None)[:, first:]], dim=1
        )
        return official_images(network, ws, options)

    name = f"{network.img_resolution} px" + (", crop" if options else "")
    images = time_case(name, batch, anchors, lambda: ours(z), turns)
    last_group = f"{name}, last group"
    pairs = time_case(
        last_group, 2 * batch, lambda: (anchors(), positives()), lambda: source.batch(0, batch), turns
    )
    if not options:
        images["largest_difference"] = largest(ours(z), anchors())
    return [images, pairs]


def time_case(
    name: str, images: int, official: Callable[[], object], ours: Callable[[], object], turns: int
) -> Row:
    """Return medians and quartiles of both sides, and how many times as fast ours is."""
    seconds = take_turns({"official": official, "ours": ours}, turns, name)
    medians = {
        clock: [statistics.median(seconds[side][clock]) for side in ("official", "ours")]
        for clock in ("cpu", "wall")
    }
    quartiles = median_and_quartiles(ratios(seconds["official"]["cpu"], seconds["ours"]["cpu"]), "inclusive")
    row: Row = {"case": name, "images": images}
    for side, clocks in seconds.items():
        row[side] = {clock: median_and_quartiles(clocks[clock], "inclusive") for clock in ("cpu", "wall")}
    return row | {
        "ratio": round(medians["cpu"][0] / medians["cpu"][1], 3),
        "ratio_quartiles": [round(value, 3) for value in quartiles["quartiles"]],
        "ratio_wall": round(medians["wall"][0] / medians["wall"][1], 3),
    }


def main(
    checkout: Annotated[
        Path, typer.Argument(help="Checkout of NVlabs/stylegan2-ada-pytorch.", exists=True, file_okay=False)
    ],
    runs: Annotated[int, typer.Option(help="Runs of each, after one to warm up.", min=1)] = 15,
    batch_128: Annotated[int, typer.Option(help="Images of 128 px at a time.", min=1)] = 8,
    batch_512: Annotated[int, typer.Option(help="Images of 512 px at a time.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    base: Annotated[
        int, typer.Option(help="The official channel_base; config-f has 32768.", min=512)
    ] = 32768,
    seed: Annotated[int, typer.Option(help="Of weights and latents.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="3 runs of the smallest batches.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "stylegan2-speed.json",
) -> None:
    """Time both, case by case."""
    torch.set_num_threads(threads)
    if quick:
        runs, batch_128, batch_512 = 3, 1, 1
        out = off_the_records(out)
    rows = []
    for resolution, batch, options in ((128, batch_128, {}), (512, batch_512, CARS)):
        network = official_generator(checkout.resolve(), resolution, base, seed)
        rows += compare(network, batch, options, runs, seed)
    arguments = [Path(value).name if Path(value) == checkout else value for value in sys.argv[1:]]
    record = {
        "command": command("stylegan2_speed.py", arguments),
        "seed": seed,
        "runs": runs,
        "channel_base": base,
    }
    record |= {"cases": rows} | environment()
    publish(record, out, markdown(TIMES, stylegan2_times(record)), f"Goals by CPU time: {GOALS}.")


if __name__ == "__main__":
    typer.run(main)
