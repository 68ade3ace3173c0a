"""Our NVAE beside the official ones on the same random weights: ``python benchmarks/parity/nvae.py --serezd DIR --nvlabs DIR``.

The directories are checkouts of SerezD/NVAE-from-scratch and NVlabs/NVAE, run on the CPU as they are but for what needs a GPU or a
random draw (see the patches below). Compared are images from given noises, reconstructions of given images, and the KL
divergences; some are timed. Writes ``benchmarks/results/parity-nvae.json``; with ``--goldens`` also what CI compares with.
Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from fill import fill, pictures
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mlviews.generators.nvae.network import NVAE
from mlviews.generators.nvae.reading import load as load_nvae
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
    layout: str
    facts: dict[str, Any]
    golden: bool = False  # small enough for CI
    rows: int = 4
    timed: bool = False


def serezd(size: int, scales: int, groups: int, channels: int, **options: Any) -> dict[str, Any]:
    """A configuration of SerezD's."""
    return {
        "resolution": [3, size, size],
        "autoencoder": {
            "num_scales": scales, "num_groups_per_scale": groups, "is_adaptive": False, "min_groups_per_scale": 1, "num_cells_per_group": 2,
            "num_latent_per_group": 4, "num_nf_cells": None, "initial_channels": channels, "num_pre-post_process_blocks": 1,
            "num_pre-post_process_cells": 2, "num_logistic_mixtures": 5,
        } | options,
    }  # fmt: skip


def nvlabs(dataset: str, scales: int, groups: int, channels: int, cells: dict[str, list[str]], **options: Any) -> dict[str, Any]:
    """Arguments of NVlabs', with the operations of the cells."""
    return {
        "dataset": dataset, "num_latent_scales": scales, "num_groups_per_scale": groups, "num_channels_enc": channels,
        "num_channels_dec": channels, "num_latent_per_group": 4, "ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 5,
        "num_preprocess_blocks": 1, "num_postprocess_blocks": 1, "num_preprocess_cells": 2, "num_postprocess_cells": 2,
        "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2, "use_se": True, "res_dist": True, "num_nf": 0, "num_x_bits": 8,
        "arch_instance": cells,
    } | options  # fmt: skip


def cells(encoder: list[str], decoder: list[str], pre: list[str] | None = None, post: list[str] | None = None) -> dict[str, list[str]]:
    """Operations of all kinds of cells."""
    pre, post = pre or encoder, post or decoder
    return {
        "normal_enc": encoder, "down_enc": encoder, "normal_dec": decoder, "up_dec": decoder,
        "normal_pre": pre, "down_pre": pre, "normal_post": post, "up_post": post, "ar_nn": [""],
    }  # fmt: skip


SWISH, ELU, BNELU = ["res_bnswish"] * 2, ["res_elu"] * 2, ["res_bnelu"] * 2
BLOCKS = {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2}
DILATED = cells(["res_bnswish5", "res_bnswish"], ["res_bnswish", "res_bnswish5"])
USUAL = cells(SWISH, ["mconv_e6k5g0"], post=["mconv_e3k5g0"])  # "res_mbconv", the default there
CASES = (
    Case("serezd-tiny", "nvae-serezd", serezd(16, 2, 2, 4, num_cells_per_group=1, num_nf_cells=1), golden=True, rows=2),
    Case("serezd-3x1", "nvae-serezd", serezd(32, 3, 1, 32, num_latent_per_group=16, num_logistic_mixtures=10), timed=True),
    Case("serezd-3x8", "nvae-serezd", serezd(32, 3, 8, 16)),
    Case("serezd-64px-adaptive-flows", "nvae-serezd", serezd(64, 3, 4, 16, is_adaptive=True, num_nf_cells=2)),
    Case("serezd-2-blocks", "nvae-serezd", serezd(64, 2, 3, 8, **{"num_pre-post_process_blocks": 2})),
    Case(
        "nvlabs-mnist-tiny", "nvae-nvlabs",
        nvlabs("mnist", 2, 2, 4, USUAL, ada_groups=True, num_cell_per_cond_enc=1, num_cell_per_cond_dec=1), golden=True, rows=2,
    ),
    Case(
        "nvlabs-cifar10-tiny", "nvae-nvlabs",
        nvlabs("cifar10", 2, 2, 4, USUAL, num_nf=1, num_cell_per_cond_enc=1, num_cell_per_cond_dec=1), golden=True, rows=2,
    ),
    Case("nvlabs-mnist", "nvae-nvlabs", nvlabs("mnist", 2, 10, 8, USUAL, ada_groups=True, **BLOCKS)),
    Case("nvlabs-cifar10-flows", "nvae-nvlabs", nvlabs("cifar10", 1, 6, 32, USUAL, num_nf=2, num_mixture_dec=10), timed=True),
    Case("nvlabs-celeba64", "nvae-nvlabs", nvlabs("celeba_64", 3, 4, 16, USUAL, ada_groups=True, num_nf=1), timed=True),
    Case("nvlabs-ffhq", "nvae-nvlabs", nvlabs("ffhq", 5, 4, 4, USUAL, ada_groups=True, min_groups_per_scale=2, num_x_bits=5), rows=1),
    Case("nvlabs-normal", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, USUAL, num_mixture_dec=1)),
    Case("nvlabs-absolute", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, USUAL, res_dist=False, use_se=False)),
    Case("nvlabs-elu", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, cells(ELU, BNELU))),
    Case("nvlabs-swish", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, cells(BNELU, SWISH, ELU), num_channels_dec=24)),
    Case("nvlabs-mconv", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, cells(["mconv_e6k5g0"], ["mconv_e6k11g0"], ["mconv_e3k5g8"]))),
    Case("nvlabs-dilated", "nvae-nvlabs", nvlabs("cifar10", 2, 2, 16, DILATED)),
)  # fmt: skip


# -- the official networks -----------------------------------------------------------------------------------------


class Official(NamedTuple):
    """An official network, and what it makes of noises and images."""

    network: nn.Module
    decode: Callable[[list[Tensor], float], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    divergences: Callable[[Tensor, list[Tensor]], Tensor]  # [B, groups]


@contextmanager
def scripted(normal: Any, noises: list[Tensor] | None) -> Iterator[None]:
    """Draws of ``normal`` take these noises in turn; None for the means."""
    rest, original = iter(noises or []), normal.sample

    def sample(self: Any) -> tuple[Tensor, Tensor]:
        eps = torch.zeros_like(self.mu) if noises is None else next(rest)
        return self.mu + self.sigma * eps, eps

    normal.sample = sample
    yield
    normal.sample = original


def load_serezd(folder: Path, facts: dict[str, Any]) -> Official:
    """SerezD's AutoEncoder. It runs on a CPU as it is."""
    with _modules(folder, ("src",)):
        model, distributions = importlib.import_module("src.model"), importlib.import_module("src.modules.distributions")
    network = model.AutoEncoder(facts["autoencoder"], tuple(facts["resolution"])).eval()

    def decode(noises: list[Tensor], temperature: float) -> Tensor:
        # sample() ends in a draw from the likelihood: its mean is what a sharper image takes.
        mixture = model.DiscMixLogistic
        model.DiscMixLogistic = type("Mean", (mixture,), {"sample": mixture.mean})
        with scripted(distributions.Normal, noises):
            images = network.sample(len(noises[0]), temperature)
        model.DiscMixLogistic = mixture
        return images

    def divergences(images: Tensor, noises: list[Tensor]) -> Tensor:
        with scripted(distributions.Normal, noises):
            return network(images)[1]

    return Official(network, decode, lambda images: network.reconstruct(images, deterministic=True), divergences)


def load_nvlabs(folder: Path, facts: dict[str, Any]) -> Official:
    """NVlabs' AutoEncoder, with ``.cuda()`` and the GPU-only batch norm out of the way."""
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    sys.modules.setdefault("tensorboardX", types.SimpleNamespace(SummaryWriter=None))  # type: ignore[arg-type]
    names = ("model", "distributions", "neural_operations", "neural_ar_operations", "utils", "thirdparty")
    with _modules(folder, names):
        model, distributions, operations = map(importlib.import_module, ("model", "distributions", "neural_operations"))

    def swish_norm(self: Any, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return x * torch.sigmoid(x)

    operations.SyncBatchNormSwish.forward = swish_norm
    network = model.AutoEncoder(argparse.Namespace(**facts), None, facts["arch_instance"]).eval()
    for module in network.modules():
        if hasattr(module, "init_done"):
            module.init_done = True  # or the first batch would overwrite loaded weights

    def image(logits: Tensor) -> Tensor:
        output = network.decoder_output(logits)
        if isinstance(output, distributions.NormalDecoder):  # has no mean of its own
            return output.dist.mu.clamp(-1, 1) / 2 + 0.5
        return output.mean if isinstance(output, torch.distributions.Bernoulli) else output.mean()

    def decode(noises: list[Tensor], temperature: float) -> Tensor:
        with scripted(distributions.Normal, noises):
            return image(network.sample(len(noises[0]), temperature))

    def reconstruct(images: Tensor) -> Tensor:
        with scripted(distributions.Normal, None):
            return image(network(images)[0])

    def divergences(images: Tensor, noises: list[Tensor]) -> Tensor:
        with scripted(distributions.Normal, noises):
            return torch.stack(network(images)[3], dim=1)

    return Official(network, decode, reconstruct, divergences)


@contextmanager
def _modules(folder: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Imports from a checkout, whose top-level names are forgotten afterwards."""
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in list(sys.modules):
        if name.partition(".")[0] in names:
            del sys.modules[name]


# -- comparison ----------------------------------------------------------------------------------------------------


def filled(network: nn.Module) -> dict[str, Tensor]:
    """Random weights for an official network, which keeps its masks; loaded into it."""
    own = {name: value for name, value in network.state_dict().items() if not name.endswith(".weight_normalized")}
    values = fill({name: tuple(value.shape) for name, value in own.items()}, SEED)
    values |= {name: value for name, value in own.items() if name.endswith(".mask")}
    network.load_state_dict(values, strict=False)
    return values


@torch.no_grad()
def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Largest differences of one case; writes its golden where there is one."""
    official = (load_serezd if case.layout == "nvae-serezd" else load_nvlabs)(folder, case.facts)
    values = filled(official.network)
    if case.golden:  # CI cannot see the network's own masks
        values |= {name: torch.ones_like(value) for name, value in values.items() if name.endswith(".mask")}
        official.network.load_state_dict(values, strict=False)
    checkpoint = Checkpoint(case.layout, values, case.facts, case.name)
    ours, cooler = load_nvae(checkpoint), load_nvae(checkpoint, temperature=0.6)
    scales = load_nvae(checkpoint, levels="scale")
    eps = ours.sample_latents(range(case.rows), SEED, truncation=None)
    images = pictures(ours.image_shape, case.rows, SEED)
    merged = scales._merge(list(eps))

    theirs, theirs_cooler = official.decode(list(eps), 1.0), official.decode(list(eps), 0.6)
    reconstruction, rates = official.reconstruct(images), official.divergences(images, list(eps))
    own_rates = torch.stack(ours.elbo(images, eps)[1], dim=1)
    if case.golden:
        np.savez_compressed(
            GOLDEN / f"nvae-{case.name}.npz", facts=np.array(json.dumps(case.facts)), layout=np.array(case.layout), seed=SEED,
            decoded=theirs[:, :, ::2, ::2].numpy(), reconstructed=reconstruction[:, :, ::2, ::2].numpy(), rates=rates.numpy(),
        )  # fmt: skip
    return {
        "case": case.name,
        "groups": len(eps),
        "image": list(ours.image_shape),
        "parameters": sum(value.numel() for value in official.network.parameters()),
        "spread": theirs.std().item(),
        "decode": (ours(eps) - theirs).abs().max().item(),
        "decode_0.6": (cooler(eps) - theirs_cooler).abs().max().item(),
        "decode_scales": (scales(merged) - theirs).abs().max().item(),
        "reconstruct": (ours(ours.encode(images)) - reconstruction).abs().max().item(),
        "rate_relative": ((own_rates - rates).abs() / rates.abs().clamp(min=1)).max().item(),
    } | (timings(official, ours) if case.timed else {})


def timings(official: Official, ours: NVAE, rows: int = 16, rounds: int = 9) -> dict[str, Any]:
    """Median milliseconds to decode a batch, measured in turns: the official code, ours, and ours in the contiguous layout."""
    eps = ours.sample_latents(range(rows), SEED)
    contiguous = copy.deepcopy(ours)
    for weight in contiguous.parameters():
        weight.data = weight.data.contiguous()
    calls = {"official": lambda: official.decode(list(eps), 1.0), "ours": lambda: ours(eps), "ours_contiguous": lambda: contiguous(eps)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn > 1:  # the first ones warm up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}
    return {"batch": rows, "median_ms": medians, "speedup": round(medians["official"] / medians["ours"], 2)}


def main(
    serezd: Annotated[Path, typer.Option(help="Checkout of SerezD/NVAE-from-scratch.", exists=True, file_okay=False)],
    nvlabs: Annotated[Path, typer.Option(help="Checkout of NVlabs/NVAE.", exists=True, file_okay=False)],
    goldens: Annotated[bool, typer.Option(help="Write tests/golden/nvae-*.npz.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "parity-nvae.json",
) -> None:
    """Compare, print a table, write the record."""
    torch.manual_seed(SEED)
    if threads:
        torch.set_num_threads(threads)
    rows = []
    for case in CASES:
        if only in case.name:
            rows.append(compare(case._replace(golden=case.golden and goldens), serezd if case.layout == "nvae-serezd" else nvlabs))
    keys = ("decode", "decode_0.6", "decode_scales", "reconstruct", "rate_relative")
    table = Table("case", "image", "groups", "spread", *keys, "times as fast", title="Largest difference from the official code")
    for row in rows:
        size = "x".join(map(str, row["image"]))
        table.add_row(
            row["case"], size, str(row["groups"]), f"{row['spread']:.3f}", *(f"{row[key]:.1e}" for key in keys), str(row.get("speedup", ""))
        )
    worst = max(row[key] for row in rows for key in keys[:-1])
    Console(width=150).print(table, f"Largest difference of an image: {worst:.1e}; allowed: {LIMIT:.0e}.", sep="\n")
    command = [
        "python",
        "benchmarks/parity/nvae.py",
        "--serezd",
        serezd.name,
        "--nvlabs",
        nvlabs.name,
        *(["--threads", str(threads)] if threads else []),
    ]
    record = {"command": shlex.join(command), "seed": SEED, **environment(), "limit": LIMIT, "worst": worst, "cases": rows}
    if not only:
        out.write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    typer.run(main)
