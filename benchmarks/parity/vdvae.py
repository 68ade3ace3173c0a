"""Our VDVAE beside the official one on the same random weights.

``python benchmarks/parity/vdvae.py --vdvae DIR``

The directory is a checkout of openai/vdvae, run on the CPU as it is but for its random draws, which take
given noises (see :func:`scripted`). Compared are images from given noises, at two temperatures and with
levels by resolution, reconstructions of given images, and the KL divergences. An official image is the mean
over the mixture's components, each at the means of its logistics. Writes
``benchmarks/results/parity-vdvae.json``; with ``--goldens`` also what CI compares with. Exits with 1 if an
image differs by more than 1e-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
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
from torch import Tensor

from mlviews.generators.vdvae.reading import HPS
from mlviews.generators.vdvae.reading import load as load_vdvae
from mlviews.weights.checkpoints import Checkpoint


def settings(hps: str, size: int, width: int, **options: Any) -> dict[str, Any]:
    """Return the official settings, of a published network but for the width and the options."""
    return {
        "width": width, "zdim": 16, "bottleneck_multiple": 0.25, "custom_width_str": "", "no_bias_above": 64,
        "num_mixtures": 10, "image_channels": 3, "image_size": size, "dataset": hps,
        "dec_blocks": HPS[hps].dec_blocks, "enc_blocks": HPS[hps].enc_blocks,
    } | options  # fmt: skip


TINY = {"dec_blocks": "1x1,4m1,4x1,8m4,8x1", "enc_blocks": "8x1,8d2,4x1,4d4,1x1", "zdim": 4}
WIDTHS = "512:4,256:8,128:16,64:16,32:16,16:16,8:16,4:16,1:16"
_V = partial(Case, layout="vdvae")
CASES = (
    _V("tiny-8", facts=settings("cifar10", 8, 16, num_mixtures=3, **TINY), golden=1),
    _V(
        "tiny-8-widths",
        facts=settings("cifar10", 8, 8, custom_width_str="1:32,4:16", no_bias_above=4, **TINY),
    ),
    _V("cifar10", facts=settings("cifar10", 32, 128)),
    _V("imagenet32", facts=settings("imagenet32", 32, 64)),
    _V("imagenet64", facts=settings("imagenet64", 64, 64)),
    _V("ffhq256", facts=settings("ffhq256", 256, 16), rows=1),
    _V(
        "ffhq1024",
        facts=settings("ffhq1024", 1024, 4, custom_width_str=WIDTHS, num_mixtures=2),
        rows=1,
    ),
)


def random_weights(name_to_shape: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights by name; what each of so many blocks adds to the features is small, as in training."""
    weights = fill(name_to_shape, SEED)
    blocks = sum(name.endswith("z_proj.weight") for name in weights)
    for name, values in weights.items():
        if name in ("decoder.gain", "decoder.bias"):
            weights[name] = 0.1 * values.abs() * values.numel() ** 0.5 + (name == "decoder.gain")
        elif name.endswith(("c4.weight", "z_proj.weight")):
            weights[name] = values * blocks**-0.5
    return weights


@contextlib.contextmanager
def scripted(module: Any, noises: list[Tensor] | None) -> Iterator[None]:
    """Within this block, draws of the latents take these noises in turn; None for the means."""
    rest = iter(noises or [])

    def draw(mean: Tensor, log_std: Tensor) -> Tensor:
        return mean if noises is None else mean + log_std.exp() * next(rest)

    with mock.patch.object(module, "draw_gaussian_diag_samples", draw):
        yield


def mean_image(helpers: Any, parameters: Tensor, mixtures: int) -> Tensor:
    """Return the mean ``[B, 3, H, W]`` in [0, 1] over the components of the official samples.

    Its draws of a component and of a logistic become that component, and the logistic's mean.
    """
    share = parameters[..., :mixtures].softmax(-1)
    images = torch.zeros(*parameters.shape[:3], 3)
    for component in range(mixtures):
        chosen = parameters.clone()
        chosen[..., :mixtures] = -1e4
        chosen[..., component] = 1e4
        with mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.fill_(0.5)):
            sample = helpers.sample_from_discretized_mix_logistic(chosen, mixtures)
        images += share[..., component, None] * sample
    return (images.permute(0, 3, 1, 2) + 1) / 2


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the differences of one case; write its golden if asked to."""
    facts = case.facts
    with imported(checkouts["vdvae"]) as load:
        vae, helpers, hps = load("vae"), load("vae_helpers"), load("hps")
    network = vae.VAE(hps.Hyperparams(facts)).eval()
    tensors = random_weights(shapes_of(network.state_dict()))
    network.load_state_dict(tensors)

    options = {"hps": facts["dataset"]} | {key: facts[key] for key in ("dec_blocks", "enc_blocks")}
    ours, cooler, scales = (
        load_vdvae(Checkpoint("vdvae", tensors, {}, case.name), **options, **more)
        for more in ({"levels": "block"}, {"levels": "block", "temperature": 0.6}, {})
    )
    noises = ours.sample_latents(range(case.rows), SEED)
    images = pictures(ours.image_shape, case.rows, SEED)
    image = partial(mean_image, helpers, mixtures=facts["num_mixtures"])

    with scripted(vae, list(noises)):
        decoded = image(network.decoder.out_net(network.decoder.forward_uncond(case.rows)))
    with scripted(vae, list(noises)):
        cooled = image(network.decoder.out_net(network.decoder.forward_uncond(case.rows, t=0.6)))
    mean, std = HPS[facts["dataset"]].normalization
    inputs = ((255 * images - mean) / std).permute(0, 2, 3, 1)
    with scripted(vae, None):
        features, stats = network.decoder.forward(network.encoder.forward(inputs))
    reconstructed = image(network.decoder.out_net(features))
    rates = torch.stack([stat["kl"].sum((1, 2, 3)) for stat in stats], dim=1)  # [B, groups]
    our_rates = torch.stack(ours.posterior(images).divergences, dim=1)
    if case.golden and goldens:
        write_golden(
            f"vdvae-{case.name}",
            facts=as_json(facts),
            shapes=as_json(shapes_of(tensors)),
            seed=SEED,
            decoded=decoded.numpy(),
            reconstructed=reconstructed.numpy(),
            rates=rates.numpy(),
        )
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "width": facts["width"],
        "groups": len(noises),
        "scales": len(scales.levels),
        "spread": decoded.std().item(),
        "decode": largest(ours(noises), decoded),
        "decode_0.6": largest(cooler(noises), cooled),
        "decode_scales": largest(scales(scales._merge(list(noises))), decoded),
        "reconstruct": largest(ours(ours.encode(images)), reconstructed),
        "rate_relative": ((our_rates - rates).abs() / rates.abs().clamp(min=1)).max().item(),
    }


def main(
    vdvae: Annotated[Path, checkout("openai/vdvae")],
    only: Only = "",
    goldens: Goldens = False,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare all cases."""
    columns = ("case", "image", "groups", "scales", "spread", "rate_relative")
    keys = ("decode", "decode_0.6", "decode_scales", "reconstruct")
    run("vdvae", CASES, compare, {"vdvae": vdvae}, (columns, keys), (only, goldens, threads, out))


if __name__ == "__main__":
    typer.run(main)
