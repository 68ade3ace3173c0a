"""Our StyleGAN2 beside the official ones on the same random weights.

``python benchmarks/parity/stylegan2.py --ada DIR --rosinality DIR``

The directories are checkouts of NVlabs/stylegan2-ada-pytorch and rosinality/stylegan2-pytorch, run on the CPU
in float32. Variables in the TensorFlow layout go through the former's own converter. Compared are whole
images, on our fast path and on the one that gradients take, and images cropped and averaged. Writes
``benchmarks/results/parity-stylegan2.json``; with ``--goldens`` also what CI compares with where there are no
checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple
from unittest import mock

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
from fill import fill
from torch import Tensor

from mlviews.generators.stylegan.reading import load as load_stylegan2
from mlviews.weights.checkpoints import Checkpoint

Decode = Callable[[Tensor, Tensor | None, float], Tensor]
"""Images in [-1, 1] of latents ``[B, z]``, classes ``[B]`` and the truncation psi."""


def ada(
    resolution: int,
    base: int,
    largest: int = 512,
    classes: int = 0,
    dim: int = 512,
    layers: int = 8,
    **synthesis: Any,
) -> dict[str, Any]:
    """Return arguments of StyleGAN2-ADA's generator."""
    return {
        "z_dim": dim, "c_dim": classes, "w_dim": dim, "img_resolution": resolution, "img_channels": 3,
        "mapping_kwargs": {"num_layers": layers},
        "synthesis_kwargs": {"channel_base": base, "channel_max": largest, **synthesis},
    }  # fmt: skip


def tf(
    resolution: int,
    base: int,
    largest: int = 512,
    classes: int = 0,
    dim: int = 512,
    layers: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Return arguments of the TensorFlow releases' generator."""
    return {
        "latent_size": dim, "label_size": classes, "dlatent_size": dim, "mapping_fmaps": dim,
        "resolution": resolution, "num_channels": 3, "mapping_layers": layers,
        "fmap_base": base // 2, "fmap_max": largest, **options,
    }  # fmt: skip


def rosinality(size: int, dim: int = 512, layers: int = 8, **options: Any) -> dict[str, Any]:
    """Return arguments of rosinality's generator."""
    return {"size": size, "style_dim": dim, "n_mlp": layers, **options}


ADA, TF, ROSINALITY = "stylegan2-ada", "stylegan2-tf", "stylegan2-rosinality"
CONCAT = "stylegan2-tf, labels concatenated"  # as in StyleGAN2, before StyleGAN2-ADA
SMALL_CLASSES = ada(32, 2048, 64, 3, dim=16, layers=2, conv_clamp=2.0)
CASES = (
    Case("ada-16px-tiny", ADA, ada(16, 128, 8, dim=16, layers=2), golden=1),
    Case("ada-32px-classes-tiny", ADA, SMALL_CLASSES, psi=0.7, golden=1, rows=1),
    Case("ada-32px", ADA, ada(32, 32768)),
    Case("ada-64px-classes", ADA, ada(64, 16384, classes=10, conv_clamp=256), psi=0.5),
    Case("ada-64px-filter", ADA, ada(64, 4096, resample_filter=[1, 2, 4, 3])),
    Case("ada-64px-without-noise", ADA, ada(64, 4096, use_noise=False)),
    Case("ada-128px", ADA, ada(128, 32768)),
    Case("ada-256px", ADA, ada(256, 16384), psi=0.7),
    Case("ada-512px", ADA, ada(512, 4096)),
    Case("ada-512px-config-f", ADA, ada(512, 32768), rows=1),
    Case("ada-1024px", ADA, ada(1024, 8192), rows=1),
    Case("tf-16px-tiny", TF, tf(16, 128, 8, dim=16, layers=2), golden=1),
    Case("tf-64px", TF, tf(64, 32768), psi=0.7),
    Case("tf-64px-classes", TF, tf(64, 4096, classes=7)),
    Case("tf-64px-classes-concatenated", CONCAT, tf(64, 4096, classes=7)),
    Case("tf-512px", TF, tf(512, 4096)),
    Case("rosinality-16px-tiny", ROSINALITY, rosinality(16, 16, 2, narrow=8), golden=1),
    Case("rosinality-64px", ROSINALITY, rosinality(64), psi=0.7),
    Case("rosinality-128px", ROSINALITY, rosinality(128, channel_multiplier=1)),
)


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int = SEED, kernel: Tensor | None = None
) -> dict[str, Tensor]:
    """Return weights by name, in any of the layouts: N(0, 1) before their gain, as training would leave them.

    Args:
        shapes: names and shapes.
        seed: an integer; other seeds give other values.
        kernel: the filter that images are resampled with; None for the usual one.
    """
    weights = fill(shapes, seed)
    if kernel is None:
        axis = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(axis, axis)
    for name, value in weights.items():
        if name.endswith("resample_filter"):
            weights[name] = kernel
        elif name.endswith("kernel"):
            weights[name] = 4 * kernel
        elif value.ndim > 1:
            value *= max(value.numel() // value.shape[0], 1) ** 0.5
            if re.search(r"(torgb|ToRGB|to_rgb\w*(\.\d)?)[./](conv\.)?weight", name):
                value *= 0.25  # most pixels within [-1, 1], where differences show
        elif name.endswith(("noise_strength", "noise.weight")):
            value *= 0.3 if value.ndim else 3
        elif name.endswith(("affine.bias", "modulation.bias")):
            value += 1
        if re.search(r"mapping\.fc|Dense\d|^style\.", name):
            value *= 100  # the learning rate's multiplier, 0.01, comes with the gain
    return weights


# -- the official networks -----------------------------------------------------------------------------------


class Official(NamedTuple):
    """An official network: its tensors, in the layout of its files, and what it decodes."""

    tensors: dict[str, Tensor]
    decode: Decode


def load_ada(checkout: Path, facts: dict[str, Any]) -> Official:
    """Return NVlabs' Generator."""
    with imported(checkout) as load:
        network = load("training.networks").Generator(**facts).eval().requires_grad_(False)
    tensors = network.state_dict()
    weights = random_weights(shapes_of(tensors), kernel=tensors["synthesis.b8.resample_filter"])
    network.load_state_dict(weights)
    return Official(weights, decode_ada(network))


def decode_ada(network: Any) -> Decode:
    """Return its forward pass with labels as numbers."""

    def decode(z: Tensor, labels: Tensor | None, psi: float) -> Tensor:
        classes = None if labels is None else F.one_hot(labels, network.c_dim).float()
        images: Tensor = network(z, classes, truncation_psi=psi, noise_mode="const", force_fp32=True)
        return images

    return decode


def load_tf(checkout: Path, facts: dict[str, Any], concatenated: bool) -> Official:
    """Return variables in the TensorFlow layout, and the network that NVlabs' converter makes of them.

    The converter knows no concatenated labels: to it, they are part of z.
    """
    weights = random_weights(variables(facts, concatenated))
    arrays = {name: value.numpy() for name, value in weights.items() if "LabelConcat" not in name}
    components = {}
    for part in ("mapping", "synthesis"):
        prefix = f"G_{part}/"
        entries = [
            (name.removeprefix(prefix), value) for name, value in arrays.items() if name.startswith(prefix)
        ]
        components[part] = SimpleNamespace(components={}, variables=entries)
    widened = {"latent_size": 2 * facts["latent_size"], "label_size": 0} if concatenated else {}
    pickled = SimpleNamespace(
        version=4,
        static_kwargs=facts | widened,
        components=components,
        variables=[("dlatent_avg", arrays["dlatent_avg"])],
    )
    with imported(checkout) as load:  # the converter imports, too
        decode = decode_ada(load("legacy").convert_tf_generator(pickled))
    if not concatenated:
        return Official(weights, decode)
    embedding = weights["G_mapping/LabelConcat/weight"]
    return Official(
        weights, lambda z, labels, psi: decode(torch.cat([z, embedding[labels]], dim=1), None, psi)
    )


def variables(facts: dict[str, Any], concatenated: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the TensorFlow generator's variables."""
    dim, classes = facts["latent_size"], facts["label_size"]
    shapes: dict[str, tuple[int, ...]] = {"dlatent_avg": (dim,)}
    if concatenated:
        shapes["G_mapping/LabelConcat/weight"] = (classes, dim)
    elif classes:
        shapes |= {"G_mapping/LabelEmbed/weight": (classes, dim), "G_mapping/LabelEmbed/bias": (dim,)}
    for layer in range(facts["mapping_layers"]):
        inputs = 2 * dim if classes and layer == 0 else dim
        shapes |= {f"G_mapping/Dense{layer}/weight": (inputs, dim), f"G_mapping/Dense{layer}/bias": (dim,)}
    before, size = 0, 4
    while size <= facts["resolution"]:
        width = min(facts["fmap_base"] * 2 // size, facts["fmap_max"])
        if before:
            convolutions = {"Conv0_up": (before, width), "Conv1": (width, width)}
        else:
            convolutions = {"Conv": (width, width)}
            shapes["G_synthesis/4x4/Const/const"] = (1, width, 4, 4)
        for name, (inputs, outputs) in {**convolutions, "ToRGB": (width, 3)}.items():
            kernel = 1 if name == "ToRGB" else 3
            layer_name = f"G_synthesis/{size}x{size}/{name}"
            shapes |= {
                f"{layer_name}/weight": (kernel, kernel, inputs, outputs), f"{layer_name}/bias": (outputs,),
                f"{layer_name}/mod_weight": (dim, inputs), f"{layer_name}/mod_bias": (inputs,),
            }  # fmt: skip
            if kernel == 3:
                shapes[f"{layer_name}/noise_strength"] = ()
                index = 2 * (size.bit_length() - 3) - (name == "Conv0_up")
                shapes[f"G_synthesis/noise{index}"] = (1, 1, size, size)
        before, size = width, 2 * size
    return shapes


def load_rosinality(checkout: Path, facts: dict[str, Any]) -> Official:
    """Return rosinality's Generator.

    Its compiled operators have an equivalent for the CPU, and its fixed widths can be made narrow.
    """
    with imported(checkout) as load, mock.patch("torch.utils.cpp_extension.load"):
        model = load("model")
    narrow = facts.get("narrow", 512)

    class Generator(model.Generator):  # type: ignore[name-defined,misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "channels":
                value = {size: min(width, narrow) for size, width in value.items()}
            super().__setattr__(name, value)

    arguments = {key: value for key, value in facts.items() if key != "narrow"}
    network = Generator(**arguments).eval().requires_grad_(False)
    tensors = network.state_dict()
    weights = random_weights(shapes_of(tensors) | {"latent_avg": (facts["style_dim"],)})
    for name, value in tensors.items():
        if name.endswith("blur.kernel") and not torch.equal(weights[name], value):
            raise SystemExit(f"{name} is not the filter it should be")
    network.load_state_dict({name: weights[name] for name in tensors})

    def decode(z: Tensor, labels: Tensor | None, psi: float) -> Tensor:
        average = weights["latent_avg"]
        images: Tensor = network([z], truncation=psi, truncation_latent=average, randomize_noise=False)[0]
        return images

    return Official(weights, decode)


# -- comparison ----------------------------------------------------------------------------------------------


def load_official(case: Case, checkouts: Mapping[str, Path]) -> Official:
    """Return the official network of a case."""
    if case.layout == ADA:
        return load_ada(checkouts["ada"], case.facts)
    if case.layout == ROSINALITY:
        return load_rosinality(checkouts["rosinality"], case.facts)
    return load_tf(checkouts["ada"], case.facts, case.layout == CONCAT)


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the largest differences of one case; write its golden if asked to."""
    official = load_official(case, checkouts)
    facts = {} if case.layout == ROSINALITY else case.facts
    checkpoint = Checkpoint(case.layout.partition(",")[0], official.tensors, facts, case.name)
    ours = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi)
    resolution = ours.image_shape[1]
    z = ours.sample_latents(range(case.rows), SEED, truncation=None)
    labels = ours.sample_labels(range(case.rows), SEED) if ours.num_classes else None
    raw = official.decode(z[0], labels, case.psi)
    expected = unit(raw)
    if case.golden and goldens:
        write_golden(
            f"stylegan2-{case.name}",
            layout=case.layout,
            facts=as_json(facts),
            seed=SEED,
            psi=case.psi,
            shapes=as_json(shapes_of(official.tensors)),
            images=expected.numpy(),
        )
    side = max(resolution * 3 // 4 // 4 * 4, 2)
    low = (resolution - side) // 2
    centre = (..., slice(low, low + side), slice(low, low + side))
    cropped = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi, crop=side)(z, labels)
    averaged = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi, crop=side, size=side // 2)(
        z, labels
    )
    images = ours(z, labels)
    with torch.enable_grad():
        tracked = ours.decode([value.clone().requires_grad_() for value in z], labels).detach()
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "parameters": sum(value.numel() for value in official.tensors.values()),
        "spread": expected.std().item(),
        "decode": largest(images, expected),
        "with_gradients": largest(tracked, expected),
        "crop": largest(cropped, unit(raw[centre])),
        "crop_and_average": largest(averaged, unit(F.avg_pool2d(raw[centre], 2))),
        "crop_to_own_whole": largest(cropped, images[centre]),
    }


def unit(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as images in [0, 1]."""
    return (images * 0.5 + 0.5).clamp(0, 1)


def main(
    ada: Annotated[Path, checkout("NVlabs/stylegan2-ada-pytorch")],
    rosinality: Annotated[Path, checkout("rosinality/stylegan2-pytorch")],
    only: Only = "",
    goldens: Goldens = False,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare all cases."""
    keys = ("decode", "with_gradients", "crop", "crop_and_average", "crop_to_own_whole")
    checkouts = {"ada": ada, "rosinality": rosinality}
    tables = (("case", "image", "spread"), keys)
    run("stylegan2", CASES, compare, checkouts, tables, (only, goldens, threads, out))


if __name__ == "__main__":
    typer.run(main)
