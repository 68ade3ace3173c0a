"""Our BigGAN-deep beside the official one on the same random weights.

``python benchmarks/parity/biggan_deep.py --deep DIR``

The directory is a checkout of huggingface/pytorch-pretrained-BigGAN, run on the CPU as it is; the copy in
lukemelas/pytorch-pretrained-gans is the same code. Compared are images from given latents and classes, at
truncations for which the norms have statistics and between them, with and without a graph, which take
different ways. Writes ``benchmarks/results/parity-biggan-deep.json``; with ``--goldens`` also what CI
compares with where there is no checkout. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
from fill import fill, iterated
from torch import Tensor

from mlviews.generators.biggan.deep_reading import load as load_deep
from mlviews.weights.checkpoints import Checkpoint

Layers = list[list[Any]]

# Whether each block upsamples, and the factors of its channels before and after.
LAYERS: dict[int, Layers] = {
    128: [[False, 16, 16], [True, 16, 16], [False, 16, 16], [True, 16, 8], [False, 8, 8], [True, 8, 4],
          [False, 4, 4], [True, 4, 2], [False, 2, 2], [True, 2, 1]],
    256: [[False, 16, 16], [True, 16, 16], [False, 16, 16], [True, 16, 8], [False, 8, 8], [True, 8, 8],
          [False, 8, 8], [True, 8, 4], [False, 4, 4], [True, 4, 2], [False, 2, 2], [True, 2, 1]],
    512: [[False, 16, 16], [True, 16, 16], [False, 16, 16], [True, 16, 8], [False, 8, 8], [True, 8, 8],
          [False, 8, 8], [True, 8, 4], [False, 4, 4], [True, 4, 2], [False, 2, 2], [True, 2, 1],
          [False, 1, 1], [True, 1, 1]],
}  # fmt: skip
TINY: Layers = [[False, 16, 8], [True, 8, 4], [False, 4, 2], [True, 2, 1]]


def settings(resolution: int, layers: Layers, width: int = 128, **options: Any) -> dict[str, Any]:
    """Return the settings of an official generator, as its config.json has them."""
    return {
        "output_dim": resolution, "z_dim": 128, "class_embed_dim": 128, "channel_width": width,
        "num_classes": 1000, "layers": layers, "attention_layer_position": 8, "eps": 1e-4, "n_stats": 51,
    } | options  # fmt: skip


DOWNLOADERS: dict[str, dict[str, Any]] = {  # imports that are of no use here
    "boto3": {}, "botocore": {}, "botocore.exceptions": {"ClientError": OSError}
}  # fmt: skip
SMALL = {"z_dim": 12, "class_embed_dim": 12, "num_classes": 10}
CASES = (
    Case("tiny-16", "deep", settings(16, TINY, 8, attention_layer_position=2, n_stats=11, **SMALL), golden=1),
    Case("128", "deep", settings(128, LAYERS[128]), rows=1),
    Case("128-0.4", "deep", settings(128, LAYERS[128], 64), psi=0.4),
    Case("128-0.433", "deep", settings(128, LAYERS[128], 16), psi=0.433),
    Case("128-0.14", "deep", settings(128, LAYERS[128], 16), psi=0.14),
    Case("256-small", "deep", settings(256, LAYERS[256], 16), psi=0.7),
    Case("512-small", "deep", settings(512, LAYERS[512], 16), rows=1, psi=0.94),
)


def random_weights(name_to_shape: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights by name; statistics and gains are such that images have contrast."""
    weights = iterated(fill(name_to_shape, SEED))
    for name, values in weights.items():
        if name.endswith("running_vars"):
            weights[name] = 0.5 + values.abs()
        elif name.endswith(".gamma"):
            weights[name] = values + 1
    return weights


def calibrate(norm: Any, inputs: tuple[Any, ...]) -> None:
    """Give a norm the statistics of what it takes, and others than these at other truncations."""
    x = inputs[0]
    spread = torch.linspace(0.7, 1.3, len(norm.running_means))[:, None]  # [truncations, 1]
    norm.running_means.copy_(x.mean((0, 2, 3)) * spread)
    norm.running_vars.copy_(x.var((0, 2, 3)) * spread)


@torch.no_grad()
def official_network(case: Case, folder: Path) -> Any:
    """Return the official generator with weights that follow from their names.

    Networks that are not for CI get norms with the statistics of a batch.
    """
    with imported(folder, DOWNLOADERS) as load:
        model, config = load("pytorch_pretrained_biggan.model"), load("pytorch_pretrained_biggan.config")
    network = model.BigGAN(config.BigGANConfig.from_dict(case.facts))
    network.load_state_dict(random_weights(shapes_of(network.state_dict())))
    network.eval()
    if not case.golden:
        norms = [module for module in network.modules() if isinstance(module, model.BigGANBatchNorm)]
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
        z = torch.randn(4, case.facts["z_dim"], generator=torch.Generator().manual_seed(SEED))
        network(z, F.one_hot(torch.arange(4), case.facts["num_classes"]).float(), 1.0)
        for hook in hooks:
            hook.remove()
    return network


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the differences of one case; write its golden if asked to."""
    network = official_network(case, checkouts["deep"])
    tensors = network.state_dict()
    checkpoint = Checkpoint("biggan-deep", tensors, case.facts, case.name)
    ours, scales = (load_deep(checkpoint, truncation=case.psi, groups=groups) for groups in (None, "scale"))
    latents, labels = ours.sample_latents(range(case.rows), SEED), ours.sample_labels(range(case.rows), SEED)
    classes = F.one_hot(labels, ours.num_classes).float()
    expected = (network(case.psi * latents[0], classes, case.psi) + 1) / 2
    images = ours(latents, labels)
    with torch.enable_grad():
        tracked = ours.decode(latents, labels).detach()
    if case.golden and goldens:
        write_golden(
            f"deep-biggan-{case.name}",
            images=expected[:, :, :: case.golden, :: case.golden].numpy(),
            facts=as_json(case.facts),
            shapes=as_json(shapes_of(tensors)),
            seed=SEED,
        )
    return {
        "case": case.name,
        "resolution": ours.image_shape[1],
        "width": case.facts["channel_width"],
        "levels": len(ours.levels),
        "scales": len(scales.levels),
        "images": case.rows,
        "truncation": case.psi,
        "contrast": expected.std().item(),
        "max": largest(images, expected),
        "mean": (images - expected).abs().mean().item(),
        "max_with_graph": largest(tracked, expected),
        "max_by_scale": largest(scales(latents[: len(scales.levels)], labels), expected),
    }


def main(
    deep: Annotated[Path, checkout("huggingface/pytorch-pretrained-BigGAN")],
    only: Only = "",
    goldens: Goldens = False,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare all cases."""
    columns = ("case", "levels", "scales", "truncation", "contrast", "mean")
    keys = ("max", "max_with_graph", "max_by_scale")
    run("biggan-deep", CASES, compare, {"deep": deep}, (columns, keys), (only, goldens, threads, out))


if __name__ == "__main__":
    typer.run(main)
