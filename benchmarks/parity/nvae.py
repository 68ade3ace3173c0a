"""Our NVAE beside the official ones on the same random weights.

``python benchmarks/parity/nvae.py --serezd DIR --nvlabs DIR``

The directories are checkouts of SerezD/NVAE-from-scratch and NVlabs/NVAE, run on the CPU as they are but for
what needs a GPU or a random draw (see the patches below). Compared are images from given noises,
reconstructions of given images, and the KL divergences; some are timed. Writes
``benchmarks/results/parity-nvae.json``; with ``--goldens`` also what CI compares with. Exits with 1 if an
image differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from compare import (
    SEED,
    Case,
    Goldens,
    Only,
    Out,
    Row,
    Threads,
    as_json,
    checkout,
    imported,
    largest,
    run,
    shapes_of,
    write_golden,
)
from fill import fill, pictures
from timing import take_turns
from torch import Tensor, nn

from mlviews.generators.nvae.network import NVAE
from mlviews.generators.nvae.reading import load as load_nvae
from mlviews.weights.checkpoints import Checkpoint

Cells = dict[str, list[str]]


def serezd(size: int, scales: int, groups: int, channels: int, **options: Any) -> dict[str, Any]:
    """Return a configuration of SerezD's."""
    return {
        "resolution": [3, size, size],
        "autoencoder": {
            "num_scales": scales, "num_groups_per_scale": groups, "is_adaptive": False,
            "min_groups_per_scale": 1, "num_cells_per_group": 2, "num_latent_per_group": 4,
            "num_nf_cells": None, "initial_channels": channels,
            "num_pre-post_process_blocks": 1, "num_pre-post_process_cells": 2, "num_logistic_mixtures": 5,
        } | options,
    }  # fmt: skip


def nvlabs(
    dataset: str, scales: int, groups: int, channels: int, cells: Cells, **options: Any
) -> dict[str, Any]:
    """Return arguments of NVlabs', with the operations of the cells."""
    return {
        "dataset": dataset, "num_latent_scales": scales, "num_groups_per_scale": groups,
        "num_channels_enc": channels, "num_channels_dec": channels, "num_latent_per_group": 4,
        "ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 5,
        "num_preprocess_blocks": 1, "num_postprocess_blocks": 1,
        "num_preprocess_cells": 2, "num_postprocess_cells": 2,
        "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2,
        "use_se": True, "res_dist": True, "num_nf": 0, "num_x_bits": 8, "arch_instance": cells,
    } | options  # fmt: skip


def cells(
    encoder: list[str], decoder: list[str], pre: list[str] | None = None, post: list[str] | None = None
) -> Cells:
    """Return the operations of all kinds of cells."""
    pre, post = pre or encoder, post or decoder
    return {
        "normal_enc": encoder, "down_enc": encoder, "normal_dec": decoder, "up_dec": decoder,
        "normal_pre": pre, "down_pre": pre, "normal_post": post, "up_post": post, "ar_nn": [""],
    }  # fmt: skip


SWISH, ELU, BNELU = ["res_bnswish"] * 2, ["res_elu"] * 2, ["res_bnelu"] * 2
DILATED = cells(["res_bnswish5", "res_bnswish"], ["res_bnswish", "res_bnswish5"])
MCONV = cells(["mconv_e6k5g0"], ["mconv_e6k11g0"], ["mconv_e3k5g8"])
USUAL = cells(SWISH, ["mconv_e6k5g0"], post=["mconv_e3k5g0"])  # "res_mbconv", the default there
TINY = {"num_cell_per_cond_enc": 1, "num_cell_per_cond_dec": 1}
BLOCKS = {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2}
SMALL_FFHQ = {"ada_groups": True, "min_groups_per_scale": 2, "num_x_bits": 5}

_S = partial(Case, layout="nvae-serezd", rows=4)
_N = partial(Case, layout="nvae-nvlabs", rows=4)
CASES = (
    _S("serezd-tiny", facts=serezd(16, 2, 2, 4, num_cells_per_group=1, num_nf_cells=1), golden=2, rows=2),
    _S(
        "serezd-3x1",
        facts=serezd(32, 3, 1, 32, num_latent_per_group=16, num_logistic_mixtures=10),
        timed=True,
    ),
    _S("serezd-3x8", facts=serezd(32, 3, 8, 16)),
    _S("serezd-64px-adaptive-flows", facts=serezd(64, 3, 4, 16, is_adaptive=True, num_nf_cells=2)),
    _S("serezd-2-blocks", facts=serezd(64, 2, 3, 8, **{"num_pre-post_process_blocks": 2})),
    _N("nvlabs-mnist-tiny", facts=nvlabs("mnist", 2, 2, 4, USUAL, ada_groups=True, **TINY), golden=2, rows=2),
    _N("nvlabs-cifar10-tiny", facts=nvlabs("cifar10", 2, 2, 4, USUAL, num_nf=1, **TINY), golden=2, rows=2),
    _N("nvlabs-mnist", facts=nvlabs("mnist", 2, 10, 8, USUAL, ada_groups=True, **BLOCKS)),
    _N(
        "nvlabs-cifar10-flows",
        facts=nvlabs("cifar10", 1, 6, 32, USUAL, num_nf=2, num_mixture_dec=10),
        timed=True,
    ),
    _N("nvlabs-celeba64", facts=nvlabs("celeba_64", 3, 4, 16, USUAL, ada_groups=True, num_nf=1), timed=True),
    _N("nvlabs-ffhq", facts=nvlabs("ffhq", 5, 4, 4, USUAL, **SMALL_FFHQ), rows=1),
    _N("nvlabs-normal", facts=nvlabs("cifar10", 2, 2, 16, USUAL, num_mixture_dec=1)),
    _N("nvlabs-absolute", facts=nvlabs("cifar10", 2, 2, 16, USUAL, res_dist=False, use_se=False)),
    _N("nvlabs-elu", facts=nvlabs("cifar10", 2, 2, 16, cells(ELU, BNELU))),
    _N("nvlabs-swish", facts=nvlabs("cifar10", 2, 2, 16, cells(BNELU, SWISH, ELU), num_channels_dec=24)),
    _N("nvlabs-mconv", facts=nvlabs("cifar10", 2, 2, 16, MCONV)),
    _N("nvlabs-dilated", facts=nvlabs("cifar10", 2, 2, 16, DILATED)),
)


# -- the official networks -----------------------------------------------------------------------------------


class Official(NamedTuple):
    """An official network, and what it makes of noises and images."""

    network: nn.Module
    decode: Callable[[list[Tensor], float], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    divergences: Callable[[Tensor, list[Tensor]], Tensor]  # [B, groups]


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class or module within the block."""
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def scripted(normal: Any, noises: list[Tensor] | None) -> Any:
    """Return a block within which draws of ``normal`` take these noises in turn; None for the means."""
    rest = iter(noises or [])

    def sample(self: Any) -> tuple[Tensor, Tensor]:
        eps = torch.zeros_like(self.mu) if noises is None else next(rest)
        return self.mu + self.sigma * eps, eps

    return replaced(normal, "sample", sample)


def load_serezd(checkout: Path, facts: dict[str, Any]) -> Official:
    """Return SerezD's AutoEncoder. It runs on a CPU as it is."""
    with imported(checkout) as load:
        model, distributions = load("src.model"), load("src.modules.distributions")
    network = model.AutoEncoder(facts["autoencoder"], tuple(facts["resolution"])).eval()
    mixture = model.DiscMixLogistic
    mean = type("Mean", (mixture,), {"sample": mixture.mean})

    def decode(noises: list[Tensor], temperature: float) -> Tensor:
        # sample() ends in a draw from the likelihood: its mean is what a sharper image takes.
        with replaced(model, "DiscMixLogistic", mean), scripted(distributions.Normal, noises):
            images: Tensor = network.sample(len(noises[0]), temperature)
        return images

    def divergences(images: Tensor, noises: list[Tensor]) -> Tensor:
        with scripted(distributions.Normal, noises):
            rates: Tensor = network(images)[1]
        return rates

    return Official(
        network, decode, lambda images: network.reconstruct(images, deterministic=True), divergences
    )


def load_nvlabs(checkout: Path, facts: dict[str, Any]) -> Official:
    """Return NVlabs' AutoEncoder, with ``.cuda()`` and the GPU-only batch norm out of the way."""
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    with imported(checkout, {"tensorboardX": {"SummaryWriter": None}}) as load:
        model, distributions, operations = map(load, ("model", "distributions", "neural_operations"))

    def swish_norm(self: Any, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return x * torch.sigmoid(x)

    operations.SyncBatchNormSwish.forward = swish_norm
    network = model.AutoEncoder(argparse.Namespace(**facts), None, facts["arch_instance"]).eval()
    for module in network.modules():
        if hasattr(module, "init_done"):
            module.init_done = True  # or the first batch would overwrite loaded weights

    def mean_image(logits: Tensor) -> Tensor:
        output = network.decoder_output(logits)
        if isinstance(output, distributions.NormalDecoder):  # has no mean of its own
            return output.dist.mu.clamp(-1, 1) / 2 + 0.5
        return output.mean if isinstance(output, torch.distributions.Bernoulli) else output.mean()

    def decode(noises: list[Tensor], temperature: float) -> Tensor:
        with scripted(distributions.Normal, noises):
            return mean_image(network.sample(len(noises[0]), temperature))

    def reconstruct(images: Tensor) -> Tensor:
        with scripted(distributions.Normal, None):
            return mean_image(network(images)[0])

    def divergences(images: Tensor, noises: list[Tensor]) -> Tensor:
        with scripted(distributions.Normal, noises):
            return torch.stack(network(images)[3], dim=1)

    return Official(network, decode, reconstruct, divergences)


# -- comparison ----------------------------------------------------------------------------------------------


def random_weights(network: nn.Module, for_ci: bool) -> dict[str, Tensor]:
    """Return random weights for an official network, which are loaded into it.

    It keeps its masks of autoregressive convolutions, but for CI, which cannot see them and has ones.
    """
    tensors = {
        name: value for name, value in network.state_dict().items() if not name.endswith(".weight_normalized")
    }
    weights = fill(shapes_of(tensors), SEED)
    if not for_ci:
        weights |= {name: value for name, value in tensors.items() if name.endswith(".mask")}
    network.load_state_dict(weights, strict=False)
    return weights


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the largest differences of one case; write its golden if asked to."""
    project = case.layout.removeprefix("nvae-")
    load = load_serezd if project == "serezd" else load_nvlabs
    official = load(checkouts[project], case.facts)
    golden = bool(case.golden) and goldens
    checkpoint = Checkpoint(case.layout, random_weights(official.network, golden), case.facts, case.name)
    ours, cooler = load_nvae(checkpoint), load_nvae(checkpoint, temperature=0.6)
    scales = load_nvae(checkpoint, levels="scale")
    noises = ours.sample_latents(range(case.rows), SEED, truncation=None)
    images = pictures(ours.image_shape, case.rows, SEED)

    decoded, decoded_cooler = official.decode(list(noises), 1.0), official.decode(list(noises), 0.6)
    reconstructed, rates = official.reconstruct(images), official.divergences(images, list(noises))
    our_rates = torch.stack(ours.elbo(images, noises)[1], dim=1)  # [B, groups]
    if golden:
        step = case.golden
        write_golden(
            f"nvae-{case.name}",
            facts=as_json(case.facts),
            layout=case.layout,
            seed=SEED,
            decoded=decoded[:, :, ::step, ::step].numpy(),
            reconstructed=reconstructed[:, :, ::step, ::step].numpy(),
            rates=rates.numpy(),
        )
    row = {
        "case": case.name,
        "groups": len(noises),
        "image": list(ours.image_shape),
        "parameters": sum(value.numel() for value in official.network.parameters()),
        "spread": decoded.std().item(),
        "decode": largest(ours(noises), decoded),
        "decode_0.6": largest(cooler(noises), decoded_cooler),
        "decode_scales": largest(scales(scales._merge(list(noises))), decoded),
        "reconstruct": largest(ours(ours.encode(images)), reconstructed),
        "rate_relative": ((our_rates - rates).abs() / rates.abs().clamp(min=1)).max().item(),
    }
    return row | time_decoding(official, ours) if case.timed else row


def time_decoding(official: Official, ours: NVAE, rows: int = 16, turns: int = 9) -> Row:
    """Return median milliseconds to decode a batch, of ours also in contiguous layout."""
    noises = ours.sample_latents(range(rows), SEED)
    contiguous = copy.deepcopy(ours)
    for weight in contiguous.parameters():
        weight.data = weight.data.contiguous()
    calls = {
        "official": lambda: official.decode(list(noises), 1.0),
        "ours": lambda: ours(noises),
        "ours_contiguous": lambda: contiguous(noises),
    }
    seconds = take_turns(calls, turns, "decoding", warmup=2)
    medians = {name: round(1e3 * statistics.median(clocks["wall"]), 2) for name, clocks in seconds.items()}
    return {"batch": rows, "median_ms": medians, "speedup": round(medians["official"] / medians["ours"], 2)}


def main(
    serezd: Annotated[Path, checkout("SerezD/NVAE-from-scratch")],
    nvlabs: Annotated[Path, checkout("NVlabs/NVAE")],
    only: Only = "",
    goldens: Goldens = False,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare all cases."""
    columns = ("case", "image", "groups", "spread", "rate_relative", "speedup")
    keys = ("decode", "decode_0.6", "decode_scales", "reconstruct")
    checkouts = {"serezd": serezd, "nvlabs": nvlabs}
    run("nvae", CASES, compare, checkouts, (columns, keys), (only, goldens, threads, out))


if __name__ == "__main__":
    typer.run(main)
