"""Our StyleGAN3 and StyleGAN-XL beside the official ones on the same random weights.

``python benchmarks/parity/stylegan3.py --stylegan3 DIR --xl DIR``

The directories are checkouts of NVlabs/stylegan3 and autonomousvision/stylegan-xl, run on the CPU in float32
by their reference operations. Networks go through their own pickles: what is compared is what a file of
theirs gives. Compared are whole images, on our fast path and on the one that gradients take, and images
cropped and averaged. Writes ``benchmarks/results/parity-stylegan3.json``; with ``--goldens`` also what CI
compares with where there are no checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
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

from mlviews.generators.stylegan.stylegan3_reading import load as load_stylegan3
from mlviews.weights import checkpoints

NVLABS, XL = "stylegan3", "stylegan-xl"
STORED = (
    "_filter",
    "magnitude_ema",
)  # tensors of a golden's own, which follow from the network and not from a name
STUBS = {"pkg_resources": {"parse_version": lambda text: tuple(int(part) for part in text.split(".")[:2])}}


def network(
    resolution: int, kind: str, base: int = 32768, largest: int = 512, dim: int = 512, **synthesis: Any
) -> dict[str, Any]:
    """Return arguments of the official generator: configuration t, or r with twice the channels."""
    radial = kind == "r"
    base, largest = base * (1 + radial), largest * (1 + radial)
    return {
        "z_dim": dim, "c_dim": 0, "w_dim": dim, "img_resolution": resolution, "img_channels": 3,
        "mapping_kwargs": {"num_layers": 2}, "channel_base": base, "channel_max": largest,
        "conv_kernel": 1 if radial else 3, "use_radial_filters": radial, **synthesis,
    }  # fmt: skip


def xl(
    resolution: int,
    kind: str,
    classes: int,
    *stages: int,
    base: int = 32768,
    largest: int = 512,
    dim: int = 64,
) -> dict[str, Any]:
    """Return arguments of a stem of StyleGAN-XL, and the factors of its super-resolution stages."""
    stem = network(resolution, kind, base, largest, dim, num_layers=10)
    # Tiny networks have a smaller w as well.
    stem |= {"z_dim": dim, "w_dim": min(8 * dim, 512), "c_dim": classes, "mapping_kwargs": {}}
    return {"stem": stem, "stages": list(stages)}


TINY = {"base": 256, "largest": 8, "dim": 16}
CASES = (
    Case("t-16px-tiny", NVLABS, network(16, "t", num_layers=6, **TINY), golden=1),
    Case("r-16px-tiny", NVLABS, network(16, "r", num_layers=6, **TINY), golden=1),
    Case("t-32px-classes", NVLABS, network(32, "t", 2048, 64, 64) | {"c_dim": 5}, psi=0.7),
    Case("t-64px", NVLABS, network(64, "t", 4096, 128)),
    Case("r-64px", NVLABS, network(64, "r", 2048, 64)),
    Case("t-128px", NVLABS, network(128, "t", 4096, 128), rows=1),
    Case("t-256px", NVLABS, network(256, "t", 4096, 128), rows=1, psi=0.7),
    Case("r-256px", NVLABS, network(256, "r", 1024, 32), rows=1),
    Case("t-512px", NVLABS, network(512, "t", 1024, 32), rows=1),
    Case("xl-stem-16px-tiny", XL, xl(16, "t", 3, base=256, largest=8, dim=8), psi=0.7, golden=1),
    Case("xl-32px-tiny", XL, xl(16, "t", 3, 2, base=256, largest=8, dim=8), golden=2),
    Case("xl-stem-16px", XL, xl(16, "t", 1000)),
    Case("xl-64px", XL, xl(16, "t", 1000, 2, 2, base=4096, largest=128), psi=0.5),
    Case("xl-128px", XL, xl(16, "t", 1000, 2, 2, 2, base=2048, largest=64), rows=1),
    Case("xl-256px", XL, xl(16, "t", 1000, 2, 2, 2, 2, base=1024, largest=32), rows=1),
    Case("xl-r-64px-unconditional", XL, xl(16, "r", 0, 4, base=2048, largest=64)),
)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED) -> dict[str, Tensor]:
    """Return weights by name: N(0, 1) before their gain, and means and magnitudes that are not trivial.

    Filters are not weights, and keep the values that they were designed with.
    """
    names = {name: shape for name, shape in shapes.items() if not name.endswith("_filter")}
    weights = fill(names, seed)
    for name, value in weights.items():
        if value.ndim > 1 and not name.endswith(("freqs", "transform", "w_avg")):
            value *= (value.numel() // len(value)) ** 0.5
        if name.endswith("magnitude_ema"):
            value.copy_((3 * value).exp())
        elif name.endswith("freqs"):
            value *= 2  # around the bandwidth of the first layer
        elif name.endswith("transform"):
            value.mul_(0.2).add_(torch.eye(3))
        elif name.endswith("phases"):
            value *= 3
        elif name.endswith("affine.bias"):
            # The input turns by an angle, and all layers have styles around 1.
            value += torch.tensor([1.0, 0.5, 0.2, -0.1]) if "synthesis.input" in name else 1
        if "mapping.fc" in name:
            value *= 100  # the learning rate's multiplier, 0.01, comes with the gain
    return weights


# -- the official networks -----------------------------------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder meanwhile: StyleGAN-XL looks there for its table of features."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def official(case: Case, checkouts: Mapping[str, Path], folder: Path) -> Any:
    """Return the official network, with random weights."""
    checkout = checkouts[case.layout]
    with imported(checkout, STUBS) as load, inside(checkout):
        if case.layout == NVLABS:
            generator = load("training.networks_stylegan3").Generator(**case.facts)
        else:
            networks = load("training.networks_stylegan3_resetting")
            generator = networks.Generator(**case.facts["stem"])
            for factor in case.facts["stages"]:
                # A stage is trained on the stored one before it.
                path = folder / f"stem-{generator.img_resolution}.pkl"
                path.write_bytes(pickle.dumps({"G": generator, "G_ema": generator}))
                generator = networks.SuperresGenerator(
                    generator.img_resolution * factor, str(path), head_layers=7, up_factor=factor
                )
        weights = random_weights(shapes_of(generator.state_dict()))
        generator.load_state_dict(weights, strict=False)
        measure(generator.eval().requires_grad_(False))
        (folder / "network.pkl").write_bytes(pickle.dumps({"G": generator, "D": None, "G_ema": generator}))
    return generator


@torch.no_grad()
def measure(generator: Any) -> None:
    """Scale each layer's magnitude by its input's, as in training: images are neither gray nor clamped."""

    def scale(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        layer.magnitude_ema *= inputs[0].square().mean()

    layers = [getattr(generator.synthesis, name) for name in generator.synthesis.layer_names]
    handles = [layer.register_forward_pre_hook(scale) for layer in layers]
    z = fill({"z": (1, generator.z_dim)}, SEED)["z"] * generator.z_dim**0.5
    decode(generator, z, torch.zeros(1, dtype=torch.int64) if generator.c_dim else None, 1)
    for handle in handles:
        handle.remove()


def decode(generator: Any, z: Tensor, labels: Tensor | None, psi: float) -> Tensor:
    """Return the official images, in about [-1, 1]."""
    classes = None if labels is None else F.one_hot(labels, generator.c_dim).float()
    images: Tensor = generator(z, classes, truncation_psi=psi, force_fp32=True)
    return images


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the largest differences of one case; write its golden if asked to."""
    with tempfile.TemporaryDirectory() as folder:
        generator: nn.Module = official(case, checkouts, Path(folder))
        checkpoint = checkpoints.read(Path(folder) / "network.pkl")
    assert checkpoint.layout == case.layout
    ours = load_stylegan3(checkpoint, groups=4, truncation_psi=case.psi)
    z = ours.sample_latents(range(case.rows), SEED, truncation=None)
    labels = ours.sample_labels(range(case.rows), SEED) if ours.num_classes else None
    raw = decode(generator, z[0], labels, case.psi)
    expected = unit(raw)
    if case.golden and goldens:
        stored = {name: value for name, value in checkpoint.tensors.items() if name.endswith(STORED)}
        write_golden(
            f"stylegan3-{case.name}",
            layout=case.layout,
            facts=as_json(checkpoint.facts),
            seed=SEED,
            psi=case.psi,
            step=case.golden,
            shapes=as_json(shapes_of(checkpoint.tensors)),
            images=expected[..., :: case.golden, :: case.golden].numpy(),
            **{name: value.numpy() for name, value in stored.items()},
        )
    side = ours.image_shape[1] * 3 // 4 // 4 * 4
    low = (ours.image_shape[1] - side) // 2
    center = raw[..., low : low + side, low : low + side]
    part = load_stylegan3(checkpoint, truncation_psi=case.psi, crop=side, size=side // 2)
    cropped = part([z[0]] * len(part.levels), labels)
    with torch.enable_grad():
        tracked = ours.decode([value.clone().requires_grad_() for value in z], labels).detach()
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "levels": ours.config.num_styles,
        "parameters": sum(value.numel() for value in checkpoint.tensors.values()),
        "spread": expected.std().item(),
        "decode": largest(ours(z, labels), expected),
        "with_gradients": largest(tracked, expected),
        "crop_and_average": largest(cropped, unit(F.avg_pool2d(center, 2))),
    }


def unit(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as images in [0, 1]."""
    return (images * 0.5 + 0.5).clamp(0, 1)


def main(
    stylegan3: Annotated[
        Path, typer.Option(help="Checkout of NVlabs/stylegan3.", exists=True, file_okay=False)
    ],
    xl: Annotated[Path, typer.Option(help="Checkout of autonomousvision/stylegan-xl.", exists=True)],
    goldens: Annotated[bool, typer.Option(help="Write tests/golden/stylegan3-*.npz.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this; no record is written.")] = "",
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "parity-stylegan3.json",
) -> None:
    """Compare, print a table, write the record."""
    torch.manual_seed(SEED)
    checkouts = {NVLABS: stylegan3.resolve(), XL: xl.resolve()}
    rows = compare_all(CASES, only, lambda case: compare(case, checkouts, goldens))
    keys = ("decode", "with_gradients", "crop_and_average")
    command = ["--stylegan3", stylegan3.name, "--xl", xl.name]
    conclude(
        rows, ("case", "image", "levels", "spread"), keys, "stylegan3.py", command, None if only else out
    )


if __name__ == "__main__":
    typer.run(main)
