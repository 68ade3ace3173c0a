"""Our BigGAN beside the official ones on the same random weights.

``python benchmarks/parity/biggan.py --pretrained DIR --biggan DIR``

The directories are checkouts of lukemelas/pytorch-pretrained-gans (BigBiGAN, and BigGAN in the same code) and
ajbrock/BigGAN-PyTorch (BigGAN), run on the CPU as they are. Compared are images from given latents and
classes, with and without a graph, which take different ways. Writes
``benchmarks/results/parity-biggan.json``; with ``--goldens`` also what CI compares with where there are no
checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from compare import (
    SEED,
    Case,
    Row,
    as_json,
    compare_all,
    conclude,
    imported,
    largest,
    shapes_of,
    write_golden,
)
from fill import fill
from record import RESULTS
from torch import Tensor, nn

from mlviews.generators.biggan.reading import HUB_EPS, TORCH_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.weights.checkpoints import Checkpoint

CODE = {  # folder of the checkout that its imports begin from, and the module
    "pretrained": ("pytorch_pretrained_gans/BigBiGAN", "model.BigGAN"),
    "biggan": (".", "BigGAN"),
}
DIM_Z = {32: 80, 64: 100, 128: 120, 256: 140, 512: 128}


def arguments(resolution: int, width: int, attention: str, **options: Any) -> dict[str, Any]:
    """Return the arguments of an official generator, with 10 classes but for the options."""
    return {
        "G_shared": True, "hier": True, "skip_init": True, "no_optim": True,
        "G_activation": nn.ReLU(inplace=True), "G_ch": width, "resolution": resolution,
        "G_attn": attention, "dim_z": DIM_Z[resolution],
        "shared_dim": 16, "n_classes": 10, "BN_eps": HUB_EPS, "SN_eps": 1e-4,
    } | options  # fmt: skip


TORCH = {"BN_eps": TORCH_EPS, "SN_eps": 1e-6}  # as BigGAN-PyTorch trains
FULL = {"shared_dim": 128, "n_classes": 1000}
CASES = (
    Case("small-128", "pretrained", arguments(128, 16, "64"), label=0, golden=8),
    Case("tiny-32", "biggan", arguments(32, 16, "16_32", **TORCH), golden=2),
    Case("bigbigan-128", "pretrained", arguments(128, 96, "64", **FULL), label=0),
    Case("hub-256-small", "pretrained", arguments(256, 16, "128")),
    Case("hub-512-small", "pretrained", arguments(512, 8, "64"), label=7, rows=1),
    Case("biggan-128", "biggan", arguments(128, 96, "64", **FULL, **TORCH)),
    Case("biggan-128-small", "biggan", arguments(128, 32, "64", **TORCH), rows=4),
    Case("biggan-128-label", "biggan", arguments(128, 16, "32_64", **TORCH), label=3, rows=4),
    Case("biggan-128-mybn", "biggan", arguments(128, 16, "64", mybn=True, **TORCH)),
    Case("biggan-256-small", "biggan", arguments(256, 16, "128", **TORCH)),
    Case("biggan-512-small", "biggan", arguments(512, 8, "64", **TORCH), rows=1),
)


def official_network(case: Case, checkout: Path) -> Any:
    """Return the official generator with weights that follow from their names.

    Networks that are not for CI get the norms' statistics of a few training passes.
    """
    folder, module = CODE[case.layout]
    with imported(checkout / folder) as load, contextlib.redirect_stdout(io.StringIO()):
        network = load(module).Generator(**case.facts)
    network.load_state_dict(random_weights(shapes_of(network.state_dict())))
    if not case.golden:
        generator = torch.Generator().manual_seed(SEED)
        # Contrast, after a norm of true statistics and before a spectral norm of 1.
        network.output_layer[0].gain.data += 5
        network.train()  # power iterations and running statistics
        for _ in range(6):
            z = torch.randn(8, network.dim_z, generator=generator)
            classes = torch.randint(case.facts["n_classes"], (8,), generator=generator)
            network(z, network.shared(classes))
    return network.eval()


def random_weights(name_to_shape: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights by name; variances are such that images have contrast, and attention counts."""
    weights = fill(name_to_shape, SEED)
    for name, values in weights.items():
        if name.endswith("_var"):
            weights[name] = values * 0.3
        elif name.endswith(".gamma"):
            weights[name] = values + 1
    return weights


@torch.no_grad()
def compare(case: Case, checkout: Path, goldens: bool) -> Row:
    """Return the differences of one case; write its golden if asked to."""
    network = official_network(case, checkout)
    tensors = network.state_dict()
    bn_eps = case.facts["BN_eps"]
    ours = load_biggan(Checkpoint("biggan", tensors, {}, case.name), label=case.label, bn_eps=bn_eps)
    latents = ours.sample_latents(range(case.rows), SEED)
    if case.label is None:
        labels = our_labels = ours.sample_labels(range(case.rows), SEED)
    else:
        labels, our_labels = torch.full((case.rows,), case.label), None
    expected = (network(torch.cat(latents, dim=1), network.shared(labels)) + 1) / 2
    images = ours(latents, our_labels)
    with torch.enable_grad():
        tracked = ours.decode(latents, our_labels).detach()
    if case.golden and goldens:
        facts = {
            "step": case.golden,
            "label": case.label,
            "bn_eps": bn_eps,
            "seed": SEED,
            "shapes": shapes_of(tensors),
        }
        pixels = expected[:, :, :: case.golden, :: case.golden].numpy()
        write_golden(f"biggan-{case.name}", images=pixels, facts=as_json(facts))
    return {
        "case": case.name,
        "code": case.layout,
        "resolution": case.facts["resolution"],
        "width": case.facts["G_ch"],
        "levels": len(ours.levels),
        "images": case.rows,
        "label": case.label,
        "contrast": expected.std().item(),
        "max": largest(images, expected),
        "mean": (images - expected).abs().mean().item(),
        "max_with_graph": largest(tracked, expected),
    }


def main(
    pretrained: Annotated[
        Path, typer.Option(help="Checkout of lukemelas/pytorch-pretrained-gans.", exists=True)
    ],
    biggan: Annotated[Path, typer.Option(help="Checkout of ajbrock/BigGAN-PyTorch.", exists=True)],
    only: Annotated[str, typer.Option(help="Cases whose name has this in it; no JSON is written then.")] = "",
    goldens: Annotated[bool, typer.Option(help="Write what CI compares with.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "parity-biggan.json",
) -> None:
    """Compare all cases."""
    torch.set_num_threads(threads)
    checkouts = {"pretrained": pretrained.resolve(), "biggan": biggan.resolve()}
    rows = compare_all(CASES, only, lambda case: compare(case, checkouts[case.layout], goldens))
    columns = ("case", "code", "resolution", "label", "contrast", "mean")
    command = ["--pretrained", "DIR", "--biggan", "DIR"]
    conclude(rows, columns, ("max", "max_with_graph"), "biggan.py", command, None if only else out)


if __name__ == "__main__":
    typer.run(main)
