"""Our StyleGAN2 beside the official ones on the same random weights: ``python benchmarks/parity/stylegan2.py --ada DIR --rosinality DIR``.

The directories are checkouts of NVlabs/stylegan2-ada-pytorch and rosinality/stylegan2-pytorch, run on the CPU in float32. Variables in the
TensorFlow layout go through the former's own converter. Compared are whole images, on our fast path and on the one that gradients take,
and images cropped and averaged. Writes ``benchmarks/results/parity-stylegan2.json``; with ``--goldens`` also what CI compares with where
there are no checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import typer
from fill import fill
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mlviews.generators.stylegan.reading import load as load_stylegan2
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import Checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GOLDEN = ROOT / "tests" / "golden"
LIMIT = 1e-3  # on images in [0, 1]
SEED = 0


class Case(NamedTuple):
    """A network to compare: constructor arguments in its own project's terms."""

    name: str
    layout: str
    facts: dict[str, Any]
    psi: float = 1.0
    golden: bool = False  # small enough for CI
    rows: int = 2


def ada(
    resolution: int, base: int, largest: int = 512, classes: int = 0, dim: int = 512, layers: int = 8, **synthesis: Any
) -> dict[str, Any]:
    """Arguments of StyleGAN2-ADA's generator."""
    return {
        "z_dim": dim, "c_dim": classes, "w_dim": dim, "img_resolution": resolution, "img_channels": 3,
        "mapping_kwargs": {"num_layers": layers}, "synthesis_kwargs": {"channel_base": base, "channel_max": largest, **synthesis},
    }  # fmt: skip


def tf(resolution: int, base: int, largest: int = 512, classes: int = 0, dim: int = 512, layers: int = 8, **rest: Any) -> dict[str, Any]:
    """Arguments of the TensorFlow releases' generator."""
    return {
        "latent_size": dim, "label_size": classes, "dlatent_size": dim, "mapping_fmaps": dim, "resolution": resolution, "num_channels": 3,
        "mapping_layers": layers, "fmap_base": base // 2, "fmap_max": largest, **rest,
    }  # fmt: skip


CONCAT = "stylegan2-tf, labels concatenated"  # as in StyleGAN2, before StyleGAN2-ADA
CASES = (
    Case("ada-16px-tiny", "stylegan2-ada", ada(16, 128, 8, dim=16, layers=2), golden=True),
    Case("ada-32px-classes-tiny", "stylegan2-ada", ada(32, 2048, 64, 3, dim=16, layers=2, conv_clamp=2.0), psi=0.7, golden=True, rows=1),
    Case("ada-32px", "stylegan2-ada", ada(32, 32768)),
    Case("ada-64px-classes", "stylegan2-ada", ada(64, 16384, classes=10, conv_clamp=256), psi=0.5),
    Case("ada-64px-filter", "stylegan2-ada", ada(64, 4096, resample_filter=[1, 2, 4, 3])),
    Case("ada-64px-without-noise", "stylegan2-ada", ada(64, 4096, use_noise=False)),
    Case("ada-128px", "stylegan2-ada", ada(128, 32768)),
    Case("ada-256px", "stylegan2-ada", ada(256, 16384), psi=0.7),
    Case("ada-512px", "stylegan2-ada", ada(512, 4096)),
    Case("ada-512px-config-f", "stylegan2-ada", ada(512, 32768), rows=1),
    Case("ada-1024px", "stylegan2-ada", ada(1024, 8192), rows=1),
    Case("tf-16px-tiny", "stylegan2-tf", tf(16, 128, 8, dim=16, layers=2), golden=True),
    Case("tf-64px", "stylegan2-tf", tf(64, 32768), psi=0.7),
    Case("tf-64px-classes", "stylegan2-tf", tf(64, 4096, classes=7)),
    Case("tf-64px-classes-concatenated", CONCAT, tf(64, 4096, classes=7)),
    Case("tf-512px", "stylegan2-tf", tf(512, 4096)),
    Case("rosinality-16px-tiny", "stylegan2-rosinality", {"size": 16, "style_dim": 16, "n_mlp": 2, "narrow": 8}, golden=True),
    Case("rosinality-64px", "stylegan2-rosinality", {"size": 64, "style_dim": 512, "n_mlp": 8}, psi=0.7),
    Case("rosinality-128px", "stylegan2-rosinality", {"size": 128, "style_dim": 512, "n_mlp": 8, "channel_multiplier": 1}),
)


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int, filter: Tensor | None = None) -> dict[str, Tensor]:
    """Random weights by name, in any of the layouts, scaled as training would leave them: N(0, 1) before their gain at run time."""
    made = fill(shapes, seed)
    if filter is None:
        axis = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        filter = torch.outer(axis, axis)
    for name, value in made.items():
        if name.endswith("resample_filter"):
            made[name] = filter
        elif name.endswith("kernel"):
            made[name] = 4 * filter
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
    return made


# -- the official networks -----------------------------------------------------------------------------------------


class Official(NamedTuple):
    """An official network: its tensors, in the layout of its files, and images in [-1, 1] of latents, labels and psi."""

    tensors: dict[str, Tensor]
    decode: Callable[[Tensor, Tensor | None, float], Tensor]


@contextmanager
def imports(folder: Path) -> Iterator[None]:
    """Imports from a checkout."""
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def load_ada(folder: Path, facts: dict[str, Any]) -> Official:
    """NVlabs' Generator."""
    with imports(folder):
        networks = importlib.import_module("training.networks")
    network = networks.Generator(**facts).eval().requires_grad_(False)
    own = network.state_dict()
    values = weights({name: tuple(value.shape) for name, value in own.items()}, SEED, own["synthesis.b8.resample_filter"])
    network.load_state_dict(values)
    return Official(values, run_ada(network))


def run_ada(network: Any) -> Callable[[Tensor, Tensor | None, float], Tensor]:
    """Its forward pass with labels as numbers."""

    def decode(z: Tensor, labels: Tensor | None, psi: float) -> Tensor:
        classes = None if labels is None else F.one_hot(labels, network.c_dim).float()
        image: Tensor = network(z, classes, truncation_psi=psi, noise_mode="const", force_fp32=True)
        return image

    return decode


def load_tf(folder: Path, facts: dict[str, Any], concatenated: bool) -> Official:
    """Variables in the TensorFlow layout, through NVlabs' converter (which knows no concatenated labels: they are part of z to it)."""
    with imports(folder):
        legacy = importlib.import_module("legacy")
    values = weights(variables(facts, concatenated), SEED)
    known = {name: value.numpy() for name, value in values.items() if "LabelConcat" not in name}
    components = {
        part: SimpleNamespace(
            components={}, variables=[(name[len(f"G_{part}/") :], value) for name, value in known.items() if f"G_{part}/" in name]
        )
        for part in ("mapping", "synthesis")
    }
    widened = {"latent_size": 2 * facts["latent_size"], "label_size": 0} if concatenated else {}
    own = [("dlatent_avg", known["dlatent_avg"])]
    network = legacy.convert_tf_generator(SimpleNamespace(version=4, static_kwargs=facts | widened, components=components, variables=own))
    decode = run_ada(network)
    if not concatenated:
        return Official(values, decode)
    return Official(values, lambda z, labels, psi: decode(torch.cat([z, values["G_mapping/LabelConcat/weight"][labels]], dim=1), None, psi))


def variables(facts: dict[str, Any], concatenated: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the TensorFlow generator's variables."""
    dim, classes = facts["latent_size"], facts["label_size"]
    found: dict[str, tuple[int, ...]] = {"dlatent_avg": (dim,)}
    if concatenated:
        found["G_mapping/LabelConcat/weight"] = (classes, dim)
    elif classes:
        found |= {"G_mapping/LabelEmbed/weight": (classes, dim), "G_mapping/LabelEmbed/bias": (dim,)}
    for layer in range(facts["mapping_layers"]):
        found[f"G_mapping/Dense{layer}/weight"] = (dim * (2 if classes and not layer else 1), dim)
        found[f"G_mapping/Dense{layer}/bias"] = (dim,)
    before, size = 0, 4
    while size <= facts["resolution"]:
        width = min(facts["fmap_base"] * 2 // size, facts["fmap_max"])
        convolutions = {"Conv0_up": (before, width), "Conv1": (width, width)} if before else {"Conv": (width, width)}
        if not before:
            found["G_synthesis/4x4/Const/const"] = (1, width, 4, 4)
        for name, (channels_in, channels) in {**convolutions, "ToRGB": (width, 3)}.items():
            kernel = 1 if name == "ToRGB" else 3
            layer = f"G_synthesis/{size}x{size}/{name}"
            found |= {
                f"{layer}/weight": (kernel, kernel, channels_in, channels), f"{layer}/bias": (channels,),
                f"{layer}/mod_weight": (dim, channels_in), f"{layer}/mod_bias": (channels_in,),
            }  # fmt: skip
            if kernel == 3:
                found[f"{layer}/noise_strength"] = ()
                index = 2 * (size.bit_length() - 3) - (name == "Conv0_up")
                found[f"G_synthesis/noise{index}"] = (1, 1, size, size)
        before, size = width, 2 * size
    return found


def load_rosinality(folder: Path, facts: dict[str, Any]) -> Official:
    """rosinality's Generator; its compiled operators have an equivalent for the CPU, and its fixed widths can be made narrow."""
    with imports(folder), mock.patch("torch.utils.cpp_extension.load"):
        model = importlib.import_module("model")

    class Generator(model.Generator):  # type: ignore[name-defined,misc]
        def __setattr__(self, name: str, value: Any) -> None:
            narrow = facts.get("narrow", 512)
            super().__setattr__(name, {size: min(width, narrow) for size, width in value.items()} if name == "channels" else value)

    network = Generator(**{key: value for key, value in facts.items() if key != "narrow"}).eval().requires_grad_(False)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    values = weights(shapes | {"latent_avg": (facts["style_dim"],)}, SEED)
    for name in shapes:
        if name.endswith("blur.kernel") and not torch.equal(values[name], network.state_dict()[name]):
            raise SystemExit(f"{name} is not the filter it should be")
    network.load_state_dict({name: values[name] for name in shapes})

    def decode(z: Tensor, labels: Tensor | None, psi: float) -> Tensor:
        image: Tensor = network([z], truncation=psi, truncation_latent=values["latent_avg"], randomize_noise=False)[0]
        return image

    return Official(values, decode)


# -- comparison ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(case: Case, ada: Path, rosinality: Path, golden: bool) -> dict[str, Any]:
    """Largest differences of one case; writes its golden if asked to."""
    if case.layout == "stylegan2-ada":
        official = load_ada(ada, case.facts)
    elif case.layout == "stylegan2-rosinality":
        official = load_rosinality(rosinality, case.facts)
    else:
        official = load_tf(ada, case.facts, case.layout == CONCAT)
    facts = {} if case.layout == "stylegan2-rosinality" else case.facts
    checkpoint = Checkpoint(case.layout.partition(",")[0], official.tensors, facts, case.name)
    ours = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi)
    resolution = ours.image_shape[1]
    z = ours.sample_latents(range(case.rows), SEED, truncation=None)
    labels = ours.sample_labels(range(case.rows), SEED) if ours.num_classes else None
    raw = official.decode(z[0], labels, case.psi)
    theirs = unit(raw)
    if golden:
        np.savez_compressed(
            GOLDEN / f"stylegan2-{case.name}.npz", layout=np.array(case.layout), facts=np.array(json.dumps(facts)), seed=SEED, psi=case.psi,
            shapes=np.array(json.dumps({name: list(value.shape) for name, value in official.tensors.items()})), images=theirs.numpy(),
        )  # fmt: skip
    side = max(resolution * 3 // 4 // 4 * 4, 2)
    low = (resolution - side) // 2
    part = raw[:, :, low : low + side, low : low + side]
    cropped = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi, crop=side)
    averaged = load_stylegan2(checkpoint, groups=4, truncation_psi=case.psi, crop=side, size=side // 2)
    images = ours(z, labels)
    with torch.enable_grad():
        tracked = ours.decode([value.clone().requires_grad_() for value in z], labels).detach()
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "parameters": sum(value.numel() for value in official.tensors.values()),
        "spread": theirs.std().item(),
        "decode": (images - theirs).abs().max().item(),
        "with_gradients": (tracked - theirs).abs().max().item(),
        "crop": (cropped(z, labels) - unit(part)).abs().max().item(),
        "crop_and_average": (averaged(z, labels) - unit(F.avg_pool2d(part, 2))).abs().max().item(),
        "crop_to_own_whole": (cropped(z, labels) - images[:, :, low : low + side, low : low + side]).abs().max().item(),
    }


def unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images * 0.5 + 0.5).clamp(0, 1)


def main(
    ada: Annotated[Path, typer.Option(help="Checkout of NVlabs/stylegan2-ada-pytorch.", exists=True, file_okay=False)],
    rosinality: Annotated[Path, typer.Option(help="Checkout of rosinality/stylegan2-pytorch.", exists=True, file_okay=False)],
    goldens: Annotated[bool, typer.Option(help="Write tests/golden/stylegan2-*.npz.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this; no record is written.")] = "",
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "parity-stylegan2.json",
) -> None:
    """Compare, print a table, write the record."""
    torch.manual_seed(SEED)
    chosen = [case for case in CASES if only in case.name]
    rows = [compare(case, ada, rosinality, goldens and case.golden) for case in track(chosen, "cases", console=Console(stderr=True))]
    keys = ("decode", "with_gradients", "crop", "crop_and_average", "crop_to_own_whole")
    table = Table("case", "image", "spread", *keys, title="Largest difference from the official code")
    for row in rows:
        table.add_row(row["case"], "x".join(map(str, row["image"])), f"{row['spread']:.3f}", *(f"{row[key]:.1e}" for key in keys))
    worst = max((row[key] for row in rows for key in keys), default=0.0)
    Console(width=140).print(table, f"Largest difference of an image: {worst:.1e}; allowed: {LIMIT:.0e}.", sep="\n")
    command = ["python", "benchmarks/parity/stylegan2.py", "--ada", ada.name, "--rosinality", rosinality.name]
    record = {"command": shlex.join(command), "seed": SEED, **environment(), "limit": LIMIT, "worst": worst, "cases": rows}
    if not only:
        out.write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    typer.run(main)
