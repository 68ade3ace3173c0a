"""Our BigGAN beside the official ones on the same random weights: ``python benchmarks/parity/biggan.py --pretrained DIR --biggan DIR``.

The directories are checkouts of lukemelas/pytorch-pretrained-gans (BigBiGAN, and BigGAN in the same code) and
ajbrock/BigGAN-PyTorch (BigGAN), run on the CPU as they are. Compared are images from given latents and classes, with and
without a graph, which take different ways. Writes ``benchmarks/results/parity-biggan.json``; with ``--goldens`` also what CI
compares with where there are no checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from fill import fill
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mlviews.generators.biggan.reading import HUB_EPS, TORCH_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GOLDEN = ROOT / "tests" / "golden"
LIMIT = 1e-3  # on images in [0, 1]
SEED = 0


class Case(NamedTuple):
    """A network to compare."""

    name: str
    code: str  # which checkout
    options: dict[str, Any]  # of its generator
    label: int | None = None  # of every image, folded into our weights; None: labels per sample
    golden: int = 0  # small enough for CI, which gets every so-manyth pixel
    rows: int = 2


def sizes(resolution: int, width: int, attention: str, **options: Any) -> dict[str, Any]:
    """Arguments of a generator with 10 classes, but for the options."""
    z = {32: 80, 64: 100, 128: 120, 256: 140, 512: 128}[resolution]
    fixed = {"G_shared": True, "hier": True, "skip_init": True, "no_optim": True, "G_activation": nn.ReLU(inplace=True)}
    known = {"G_ch": width, "resolution": resolution, "G_attn": attention, "dim_z": z, "shared_dim": 16, "n_classes": 10}
    return fixed | known | {"BN_eps": HUB_EPS, "SN_eps": 1e-4} | options


TORCH = {"BN_eps": TORCH_EPS, "SN_eps": 1e-6}  # as BigGAN-PyTorch trains
FULL = {"shared_dim": 128, "n_classes": 1000}
CASES = (
    Case("small-128", "pretrained", sizes(128, 16, "64"), label=0, golden=8),
    Case("tiny-32", "biggan", sizes(32, 16, "16_32", **TORCH), golden=2),
    Case("bigbigan-128", "pretrained", sizes(128, 96, "64", **FULL), label=0),
    Case("hub-256-small", "pretrained", sizes(256, 16, "128")),
    Case("hub-512-small", "pretrained", sizes(512, 8, "64"), label=7, rows=1),
    Case("biggan-128", "biggan", sizes(128, 96, "64", **FULL, **TORCH)),
    Case("biggan-128-small", "biggan", sizes(128, 32, "64", **TORCH), rows=4),
    Case("biggan-128-label", "biggan", sizes(128, 16, "32_64", **TORCH), label=3, rows=4),
    Case("biggan-128-mybn", "biggan", sizes(128, 16, "64", mybn=True, **TORCH)),
    Case("biggan-256-small", "biggan", sizes(256, 16, "128", **TORCH)),
    Case("biggan-512-small", "biggan", sizes(512, 8, "64", **TORCH), rows=1),
)


@contextmanager
def imported(folder: Path, name: str) -> Iterator[Any]:
    """A module of a checkout; what it brought along is forgotten afterwards, as the checkouts share names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for module in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[module], "__file__", "")):
                del sys.modules[module]


def official(case: Case, folders: dict[str, Path]) -> nn.Module:
    """The official generator, with weights that follow from their names; large ones with the norms' statistics of a few passes."""
    folder, name = folders[case.code], "BigGAN"
    if case.code == "pretrained":
        folder, name = folder / "pytorch_pretrained_gans" / "BigBiGAN", "model.BigGAN"
    with imported(folder, name) as module, contextlib.redirect_stdout(io.StringIO()):
        network: nn.Module = module.Generator(**case.options)
    network.load_state_dict(filled({key: tuple(value.shape) for key, value in network.state_dict().items()}))
    if not case.golden:
        generator = torch.Generator().manual_seed(SEED)
        network.output_layer[0].gain.data += 5  # contrast, after a norm of true statistics and before a spectral norm of 1
        network.train()  # power iterations and running statistics
        for _ in range(6):
            z = torch.randn(8, network.dim_z, generator=generator)
            y = torch.randint(case.options["n_classes"], (8,), generator=generator)
            network(z, network.shared(y))
    return network.eval()


def filled(name_to_shape: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by name; variances are such that images have contrast, and attention counts."""
    made = fill(name_to_shape, SEED)
    for end, factor, offset in (("_var", 0.3, 0.0), (".gamma", 1.0, 1.0)):
        for name in made:
            if name.endswith(end):
                made[name] = made[name] * factor + offset
    return made


@torch.no_grad()
def reference(network: Any, latents: list[Tensor], labels: Tensor) -> Tensor:
    """Its images in [0, 1]."""
    images: Tensor = network(torch.cat(latents, dim=1), network.shared(labels))
    return (images + 1) / 2


def main(
    pretrained: Annotated[Path, typer.Option(help="Checkout of lukemelas/pytorch-pretrained-gans.", exists=True)],
    biggan: Annotated[Path, typer.Option(help="Checkout of ajbrock/BigGAN-PyTorch.", exists=True)],
    only: Annotated[str, typer.Option(help="Cases whose name has this in it; no JSON is written then.")] = "",
    goldens: Annotated[bool, typer.Option(help="Write what CI compares with.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "parity-biggan.json",
) -> None:
    """Compare all cases."""
    torch.set_num_threads(threads)
    folders = {"pretrained": pretrained.resolve(), "biggan": biggan.resolve()}
    table = Table("network", "code", "image", "classes", "contrast", "max", "mean", "max, graph", title="difference on [0, 1]")
    found: dict[str, Any] = {}
    for case in CASES:
        if only not in case.name:
            continue
        network = official(case, folders)
        tensors = network.state_dict()
        ours = load_biggan(Checkpoint("biggan", tensors, {}, case.name), label=case.label, bn_eps=case.options["BN_eps"])
        latents = ours.sample_latents(range(case.rows), SEED)
        labels = torch.full((case.rows,), case.label) if case.label is not None else ours.sample_labels(range(case.rows), SEED)
        expected = reference(network, latents, labels)
        asked = None if case.label is not None else labels
        difference, graph = (ours(latents, asked) - expected).abs(), (ours.decode(latents, asked) - expected).abs()
        figures = {
            "resolution": case.options["resolution"], "width": case.options["G_ch"], "levels": len(ours.levels), "images": case.rows,
            "label": case.label, "contrast": expected.std().item(), "max": difference.max().item(), "mean": difference.mean().item(),
            "max_with_graph": graph.max().item(),
        }  # fmt: skip
        found[case.name] = {"code": case.code} | figures
        table.add_row(
            case.name, case.code, f"{case.options['resolution']} px", "all" if case.label is None else f"only {case.label}",
            f"{figures['contrast']:.2f}", f"{figures['max']:.1e}", f"{figures['mean']:.1e}", f"{figures['max_with_graph']:.1e}",
        )  # fmt: skip
        if case.golden and goldens:
            facts = {
                "step": case.golden, "label": case.label, "bn_eps": case.options["BN_eps"], "seed": SEED,
                "shapes": {name: list(value.shape) for name, value in tensors.items()},
            }  # fmt: skip
            images = expected[:, :, :: case.golden, :: case.golden].numpy()
            np.savez_compressed(GOLDEN / f"biggan-{case.name}.npz", images=images, facts=json.dumps(facts))
    Console().print(table)
    passed = all(max(one["max"], one["max_with_graph"]) <= LIMIT for one in found.values())
    record = {
        "command": shlex.join(["python", "benchmarks/parity/biggan.py", "--pretrained", "DIR", "--biggan", "DIR"]),
        "limit": LIMIT, "passed": passed, "seed": SEED, "cases": found,
    } | environment()  # fmt: skip
    if not only:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        Console().print(out)
    raise SystemExit(not passed)


if __name__ == "__main__":
    typer.run(main)
