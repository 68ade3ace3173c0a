"""Our VDVAE against the official one on this machine's CPU.

``python benchmarks/vdvae_speed.py --vdvae DIR``

DIR is a checkout of openai/vdvae, run on the same random weights of the published sizes. They take turns in
one process, so that a busy machine slows both; the time is the process' own (wall time is recorded beside
it). Compared are images (theirs are drawn from the mixture of logistics, ours are its means), and pairs of an
anchor and a positive that differ in the last scale only (the official code makes both images whole). Prints a
table, writes ``benchmarks/results/vdvae-speed.json``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.generators import vdvae_speed
from record import RESULTS, command, publish
from stylegan2_speed import time_case
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "parity"))
from compare import SEED, checkout, imported, largest, shapes_of
from vdvae import mean_image, random_weights, scripted, settings

from mlviews import MLViewSource
from mlviews.generators.vdvae.reading import load as load_vdvae
from mlviews.perturb import Resample
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint

WIDTHS = {"cifar10": 384, "imagenet32": 512}
"""Channels of the published networks."""


@torch.no_grad()
def compare(folder: Path, hps: str, rows: int, turns: int) -> list[dict[str, Any]]:
    """Time whole images, then pairs that differ in the last scale."""
    facts = settings(hps, 32, WIDTHS[hps])
    with imported(folder) as load:
        vae, helpers, hyperparameters = load("vae"), load("vae_helpers"), load("hps")
    network = vae.VAE(hyperparameters.Hyperparams(facts)).eval()
    tensors = random_weights(shapes_of(network.state_dict()))
    network.load_state_dict(tensors)
    blocks = {key: facts[key] for key in ("dec_blocks", "enc_blocks")}
    reading = partial(load_vdvae, Checkpoint("vdvae", tensors, {}, hps), hps=hps, **blocks)
    ours, by_block = reading(), reading(levels="block")
    z = ours.sample_latents(range(rows), SEED)
    last = len(ours.levels) - 1
    source = MLViewSource(ours, {last: Resample()}, batch_size=rows, num_samples=rows, seed=SEED)

    def official() -> Any:
        return network.forward_uncond_samples(rows)

    images = time_case(hps, rows, official, lambda: ours(z), turns)
    noises = by_block.sample_latents(range(rows), SEED)
    with scripted(vae, list(noises)):
        features: Tensor = network.decoder.out_net(network.decoder.forward_uncond(rows))
    expected = mean_image(helpers, features, facts["num_mixtures"])
    images["largest_difference"] = largest(by_block(noises), expected)
    pairs = time_case(
        f"{hps}, last of {len(ours.levels)} scales",
        2 * rows,
        lambda: (official(), official()),
        lambda: source.batch(0, rows),
        turns,
    )
    return [images, pairs]


def main(
    vdvae: Annotated[Path, checkout("openai/vdvae")],
    turns: Annotated[int, typer.Option(help="Runs of each, after one to warm up.", min=1)] = 5,
    rows: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    shared: Annotated[
        bool, typer.Option("--shared", help="Note that others computed at the same time.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "vdvae-speed.json",
) -> None:
    """Compare the networks of 32 pixels."""
    torch.set_num_threads(threads)
    cases = [row for hps in WIDTHS for row in compare(vdvae, hps, rows, turns)]
    arguments = ["--vdvae", vdvae.name, "--turns", str(turns), "--rows", str(rows), "--threads", str(threads)]
    record = {"command": command("vdvae_speed.py", arguments), "seed": SEED, "machine_was_shared": shared}
    record |= {**environment(), "cases": cases}
    publish(record, out, vdvae_speed(record))


if __name__ == "__main__":
    typer.run(main)
