"""Our BigGAN beside the official ones on the same random weights.

``python benchmarks/parity/biggan.py --pretrained DIR --biggan DIR --studiogan DIR``

The directories are checkouts of lukemelas/pytorch-pretrained-gans (BigBiGAN, BigGAN in the same code, and
early StudioGAN), ajbrock/BigGAN-PyTorch (BigGAN) and POSTECH-CVLab/PyTorch-StudioGAN (``big_resnet``), run on
the CPU as they are. Compared are images from given latents and
classes, with and without a graph, which take different ways. Writes
``benchmarks/results/parity-biggan.json``; with ``--goldens`` also what CI compares with where there are no
checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

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
from fill import fill, iterated
from torch import Tensor, nn

from mlviews.generators.biggan.reading import HUB_EPS, TORCH_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.weights.checkpoints import Checkpoint

CODE = {  # checkout, folder in it that its imports begin from, and the module
    "pretrained": ("pretrained", "pytorch_pretrained_gans/BigBiGAN", "model.BigGAN"),
    "biggan": ("biggan", ".", "BigGAN"),
    "studiogan": ("studiogan", "src", "models.big_resnet"),
    "early studiogan": (
        "pretrained", "pytorch_pretrained_gans", "StudioGAN.models.big_resnet"
    ),
}  # fmt: skip
MISCELLANEA = {  # of StudioGAN: plots and tables, and one context that is of use
    name: {"dummy_context_mgr": contextlib.nullcontext} for name in ("utils.misc", "StudioGAN.utils.misc")
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


def studiogan(resolution: int, width: int, attention: list[int], z: int, **options: Any) -> dict[str, Any]:
    """Return the arguments of StudioGAN's generator, with 10 classes but for the options."""
    return {
        "z_dim": z, "g_shared_dim": 16, "img_size": resolution, "g_conv_dim": width,
        "apply_attn": bool(attention), "attn_g_loc": attention, "g_cond_mtd": "cBN", "num_classes": 10,
        "g_init": "N02", "g_depth": None, "mixed_precision": False, "spectral": True,
    } | options  # fmt: skip


def early_studiogan(resolution: int, width: int, attention: int, z: int) -> dict[str, Any]:
    """Return the arguments of StudioGAN's generator before its options had these names."""
    return {
        "z_dim": z, "shared_dim": 128, "img_size": resolution, "g_conv_dim": width, "g_spectral_norm": True,
        "attention": True, "attention_after_nth_gen_block": attention, "activation_fn": "ReLU",
        "conditional_strategy": "ContraGAN", "num_classes": 1000, "initialize": False, "G_depth": None,
        "mixed_precision": False,
    }  # fmt: skip


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
    Case("studiogan-32", "studiogan", studiogan(32, 8, [2], 80), golden=2),
    Case("studiogan-128", "studiogan", studiogan(128, 32, [4], 120, num_classes=1000, g_shared_dim=128)),
    Case("studiogan-128-label", "studiogan", studiogan(128, 16, [3, 4], 120), label=3),
    Case("studiogan-256-small", "studiogan", studiogan(256, 16, [4], 140)),
    Case("studiogan-64-plain", "studiogan", studiogan(64, 16, [], 100, spectral=False)),
    Case("studiogan-early-128", "early studiogan", early_studiogan(128, 32, 4, 120)),
)


def official_network(case: Case, checkouts: Mapping[str, Path]) -> Any:
    """Return the official generator with weights that follow from their names.

    Networks that are not for CI get the norms' statistics of a few training passes.
    """
    key, folder, module = CODE[case.layout]
    facts = dict(case.facts)
    with imported(checkouts[key] / folder, MISCELLANEA) as load, contextlib.redirect_stdout(io.StringIO()):
        if case.layout == "studiogan":
            facts |= studiogan_modules(load("utils.ops"), facts.pop("spectral"))
        network = load(module).Generator(**facts)
    network.load_state_dict(random_weights(shapes_of(network.state_dict())))
    if not case.golden:
        generator = torch.Generator().manual_seed(SEED)
        # Contrast, after a norm of true statistics and before a spectral norm of 1.
        norm, name = (
            (network.bn4, "weight") if "studiogan" in case.layout else (network.output_layer[0], "gain")
        )
        getattr(norm, name).data += 5
        network.train()  # power iterations and running statistics
        for _ in range(6):
            z = torch.randn(
                8, network.z_dim if "studiogan" in case.layout else network.dim_z, generator=generator
            )
            classes = torch.randint(network.shared.num_embeddings, (8,), generator=generator)
            images_of(case, network, z, classes)
    return network.eval()


def studiogan_modules(ops: Any, spectral: bool) -> dict[str, Any]:
    """Return what StudioGAN's configuration makes of its options: its layers, and no further inputs."""
    modules = SimpleNamespace(
        g_bn=ops.ConditionalBatchNorm2d,
        g_conv2d=ops.snconv2d if spectral else ops.conv2d,
        g_linear=ops.snlinear if spectral else ops.linear,
        g_act_fn=nn.ReLU(inplace=True),
    )
    return {"MODULES": modules, "MODEL": SimpleNamespace(info_type="N/A", g_info_injection="N/A")}


def images_of(case: Case, network: Any, z: Tensor, classes: Tensor) -> Tensor:
    """Return the official images in [-1, 1]."""
    second = classes if "studiogan" in case.layout else network.shared(classes)
    images: Tensor = network(z, second)
    return images


def random_weights(name_to_shape: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights by name; variances are such that images have contrast, and attention counts."""
    weights = iterated(fill(name_to_shape, SEED))
    for name, values in weights.items():
        if name.endswith("_var"):
            weights[name] = values * 0.3
        elif name.endswith((".gamma", ".sigma")):
            weights[name] = values + 1
    return weights


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the differences of one case; write its golden if asked to."""
    network = official_network(case, checkouts)
    tensors = network.state_dict()
    layout = "biggan-studiogan" if "studiogan" in case.layout else "biggan"
    bn_eps = case.facts.get("BN_eps")
    ours = load_biggan(Checkpoint(layout, tensors, {}, case.name), label=case.label, bn_eps=bn_eps)
    latents = ours.sample_latents(range(case.rows), SEED)
    if case.label is None:
        labels = our_labels = ours.sample_labels(range(case.rows), SEED)
    else:
        labels, our_labels = torch.full((case.rows,), case.label), None
    expected = (images_of(case, network, torch.cat(latents, dim=1), labels) + 1) / 2
    images = ours(latents, our_labels)
    with torch.enable_grad():
        tracked = ours.decode(latents, our_labels).detach()
    if case.golden and goldens:
        facts = {
            "layout": layout,
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
        "resolution": ours.image_shape[1],
        "width": case.facts.get("G_ch", case.facts.get("g_conv_dim")),
        "levels": len(ours.levels),
        "images": case.rows,
        "label": case.label,
        "contrast": expected.std().item(),
        "max": largest(images, expected),
        "mean": (images - expected).abs().mean().item(),
        "max_with_graph": largest(tracked, expected),
    }


def main(
    pretrained: Annotated[Path, checkout("lukemelas/pytorch-pretrained-gans")],
    biggan: Annotated[Path, checkout("ajbrock/BigGAN-PyTorch")],
    studiogan: Annotated[Path, checkout("POSTECH-CVLab/PyTorch-StudioGAN")],
    only: Only = "",
    goldens: Goldens = False,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare all cases."""
    checkouts = {"pretrained": pretrained, "biggan": biggan, "studiogan": studiogan}
    columns = ("case", "code", "resolution", "label", "contrast", "mean")
    keys = ("max", "max_with_graph")
    run("biggan", CASES, compare, checkouts, (columns, keys), (only, goldens, threads, out))


if __name__ == "__main__":
    typer.run(main)
