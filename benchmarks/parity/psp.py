"""Our reading of pSp and e4e files beside the official code, on the same random weights.

``python benchmarks/parity/psp.py --e4e DIR --psp DIR``

The directories are checkouts of omertov/encoder4editing and eladrich/pixel2style2pixel, run on the CPU in
float32; their compiled operators are replaced by plain ones. Each network is saved as those projects save
it, read by ``load_generator``, and compared in the W+ codes of images, in their reconstructions, and in
images decoded from the official codes. Writes ``benchmarks/results/parity-psp.json``; with ``--goldens`` also
what CI compares with where there are no checkouts. Exits with 1 if an image differs by more than 1e-3.
"""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import stylegan2
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
from fill import fill, pictures
from record import RESULTS
from stylegan2 import unit
from torch import Tensor, nn
from torchvision.transforms import v2

import mlviews

E4E, PSP = "encoder4editing", "pixel2style2pixel"
TINY: dict[str, Any] = {"narrow": 8, "dim": 16, "layers": 2, "channels": (16, 16, 32, 32, 48)}
HALF: dict[str, Any] = {"narrow": 256, "dim": 256, "layers": 8, "channels": (32, 32, 64, 128, 256)}
WIDE_END = HALF | {"dim": 512, "channels": (32, 32, 64, 128, 512)}
FULL: dict[str, Any] = {"narrow": 512, "dim": 512, "layers": 8, "channels": None}


def opts(encoder: str, size: int, **facts: Any) -> dict[str, Any]:
    """Return what either project saves beside the weights, and the sizes of a narrow network."""
    return {
        **FULL, "encoder_type": encoder, "dataset_type": "ffhq_encode",
        "stylegan_size": size, "output_size": size,
        "start_from_latent_avg": True, "learn_in_w": False, "input_nc": 3, "label_nc": 0, "device": "cpu",
        "checkpoint_path": None, **facts,
    }  # fmt: skip


CARS = {"dataset_type": "cars_encode"}
GRADUAL, LAST = "GradualStyleEncoder", "BackboneEncoderUsingLastLayerIntoW"
CASES = (
    Case("e4e-32px-tiny", E4E, opts("Encoder4Editing", 32, **TINY), golden=1),
    Case("psp-32px-tiny", PSP, opts(GRADUAL, 32, **TINY, start_from_latent_avg=False), golden=1),
    Case("e4e-32px-last-layer-tiny", E4E, opts("SingleStyleCodeEncoder", 32, **TINY), golden=1),
    Case(
        "e4e-64px-cars-tiny",
        E4E,
        opts("Encoder4Editing", 64, **TINY, **CARS, heads=128),
        golden=1,
    ),
    Case("e4e-256px", E4E, opts("Encoder4Editing", 256, **HALF, dataset_type="church_encode")),
    Case("e4e-512px-cars", E4E, opts("Encoder4Editing", 512, **HALF, **CARS, heads=1024), rows=1),
    Case("psp-256px", PSP, opts(GRADUAL, 256, **HALF)),
    Case("psp-256px-last-layer", PSP, opts(LAST, 256, **WIDE_END, learn_in_w=True)),
    Case("psp-1024px", PSP, opts(GRADUAL, 1024, **HALF), rows=1),
    Case("e4e-1024px", E4E, opts("Encoder4Editing", 1024, **HALF), rows=1),
)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED) -> dict[str, Tensor]:
    """Return weights of an encoder, a decoder and the mean w, by name, as training would leave them."""
    inside = {name: shape for name, shape in shapes.items() if name.startswith("decoder.")}
    weights = stylegan2.random_weights(
        {name.removeprefix("decoder."): shape for name, shape in inside.items()}, seed
    )
    for name, value in weights.items():
        if name.startswith("to_rgb") and name.endswith("conv.weight"):
            value /= 4  # most pixels within [-1, 1], where differences show, at codes of this spread too
    weights = {f"decoder.{name}": value for name, value in weights.items()}
    for name, value in fill(
        {name: shape for name, shape in shapes.items() if name not in inside}, seed
    ).items():
        if re.search(r"(res_layer|input_layer)\.2\.weight", name):
            value -= 0.75  # slopes of leaky rectifiers: 0.25 and more or less
        elif name.endswith("linear.weight"):
            value *= 3 * value.shape[1] ** 0.5  # their gain comes at run time; codes are as far apart as w
        weights[name] = value
    return weights


# -- the official networks -----------------------------------------------------------------------------------


@contextmanager
def loaded(checkout: Path) -> Iterator[Callable[[str], Any]]:
    """Import from a checkout, with plain operators in the place of its compiled ones."""

    def leaky(x: Tensor, bias: Tensor, slope: float = 0.2, scale: float = 2**0.5) -> Tensor:
        return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), slope) * scale

    def resampled(
        x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
    ) -> Tensor:
        rows, columns = x.shape[2:]
        sides = (up, up, down, down, *pad, *pad)
        images = resampling.upfirdn2d_native(x.reshape(-1, rows, columns, 1), kernel, *sides)
        resized: Tensor = images.reshape(-1, x.shape[1], *images.shape[1:3])
        return resized

    with imported(checkout) as load, mock.patch("torch.utils.cpp_extension.load"):
        operators = load("models.stylegan2.op")
        resampling = load("models.stylegan2.op.upfirdn2d")
        resampling.F = F  # which its plain operator uses, and does not import
        operators.fused_leaky_relu = load("models.stylegan2.op.fused_act").fused_leaky_relu = leaky
        operators.upfirdn2d = resampled
        yield load


def load_official(checkout: Path, facts: dict[str, Any]) -> nn.Module:
    """Return the project's pSp, encoder and decoder, with random weights and a mean w."""
    with loaded(checkout) as load:
        module, encoders = load("models.psp"), load("models.encoders.psp_encoders")
        helpers, model = load("models.encoders.helpers"), load("models.stylegan2.model")

    class Generator(model.Generator):  # type: ignore[name-defined,misc]
        def __init__(self, size: int, *sizes: int, **options: Any) -> None:
            super().__init__(size, facts["dim"], facts["layers"], **options)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "channels":
                value = {size: min(width, facts["narrow"]) for size, width in value.items()}
            super().__setattr__(name, value)

    class Network(module.pSp):  # type: ignore[name-defined,misc]
        def load_weights(self) -> None:
            """Leave the weights to the caller."""

        def set_encoder(self) -> nn.Module:
            # Published cars have more heads than styles.
            size = self.opts.stylegan_size
            self.opts.stylegan_size = facts.get("heads", size)
            device = torch.device("cpu" if facts["channels"] is None else "meta")
            with device:
                encoder: nn.Module = super().set_encoder()
            self.opts.stylegan_size = size
            return encoder if facts["channels"] is None else narrowed(encoder, facts, encoders, helpers)

    with mock.patch.object(module, "Generator", Generator):
        network: nn.Module = Network(Namespace(**facts)).eval().requires_grad_(False)
    styles = getattr(network.encoder, "style_count", network.decoder.n_latent)
    shape = (facts["dim"],) if facts["learn_in_w"] else (styles, facts["dim"])
    weights = random_weights({**shapes_of(network.state_dict()), "latent_avg": shape})
    network.latent_avg = weights.pop("latent_avg")
    network.load_state_dict(weights)
    return network


def narrowed(encoder: Any, facts: dict[str, Any], encoders: Any, helpers: Any) -> nn.Module:
    """Return an official encoder with few channels: its parts are made anew, by its own classes."""
    stem, *widths = facts["channels"]
    dim = facts["dim"]
    encoder.input_layer = nn.Sequential(
        nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
    )
    pairs = zip([stem, *widths[:-1]], widths, (3, 4, 14, 3), strict=True)
    units = [unit for before, width, count in pairs for unit in helpers.get_block(before, width, count)]
    encoder.body = nn.Sequential(*(helpers.bottleneck_IR_SE(*unit) for unit in units))
    if hasattr(encoder, "styles"):
        encoder.latlayer1, encoder.latlayer2 = (nn.Conv2d(width, widths[3], 1) for width in widths[2:0:-1])
        encoder.styles = nn.ModuleList(
            encoders.GradualStyleBlock(widths[3], dim, 16 << (style >= 3) + (style >= 7))
            for style in range(len(encoder.styles))
        )
        return encoder
    encoder.linear = encoders.EqualLinear(widths[3], dim)
    if widths[3] != 512:  # which the official last-layer encoders take for granted
        encoder.forward = partial(last_layer, encoder)
    return encoder


def last_layer(encoder: Any, x: Tensor) -> Tensor:
    """Return what e4e's last-layer encoder of other widths gives, ``[B, styles, dim]``."""
    code: Tensor = encoder.linear(encoder.output_pool(encoder.body(encoder.input_layer(x))).flatten(1))
    return code.repeat(encoder.style_count, 1, 1).permute(1, 0, 2)


def codes_of(network: Any, images: Tensor, facts: dict[str, Any]) -> Tensor:
    """Return the W+ codes of images in [0, 1] as the official inference does, ``[B, styles, dim]``."""
    is_cars = facts["dataset_type"].startswith("cars")
    prepared = v2.functional.resize(images, [192 if is_cars else 256, 256], antialias=True) * 2 - 1
    codes: Tensor = network.encoder(prepared)
    styles = network.decoder.n_latent
    if facts["start_from_latent_avg"]:
        codes = codes + network.latent_avg
    if codes.ndim == 2:
        codes = codes[:, None].expand(-1, styles, -1)
    return codes[:, :styles]


# -- comparison ----------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(case: Case, checkouts: Mapping[str, Path], goldens: bool) -> Row:
    """Return the largest differences of one case; write its golden if asked to."""
    network: Any = load_official(checkouts[case.layout], case.facts)
    content = {
        "state_dict": network.state_dict(),
        "opts": {key: value for key, value in case.facts.items() if key not in FULL and key != "heads"},
        "latent_avg": network.latent_avg,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{case.name}.pt"
        torch.save(content, path)
        ours = mlviews.load_generator("stylegan2", weights=path, groups=4)
    images = pictures(ours.image_shape, case.rows, SEED)
    codes = codes_of(network, images, case.facts)
    raw: Tensor = network.decoder([codes], input_is_latent=True, randomize_noise=False)[0]
    above = (raw.shape[2] - ours.image_shape[1]) // 2
    expected = unit(raw[:, :, above : raw.shape[2] - above])
    if case.golden and goldens:
        write_golden(
            case.name,
            facts=as_json(content["opts"]),
            seed=SEED,
            shapes=as_json(shapes_of({**content["state_dict"], "latent_avg": network.latent_avg})),
            codes=codes.numpy(),
            images=expected.numpy(),
        )
    latents = ours.encode(images)
    return {
        "case": case.name,
        "image": list(ours.image_shape),
        "parameters": sum(value.numel() for value in network.state_dict().values()),
        "spread": expected.std().item(),
        "code_spread": codes.std().item(),
        "codes": largest(ours.w_plus(latents), codes),  # type: ignore[operator]
        "reconstruct": largest(ours(latents), expected),
        "decode": largest(ours(ours.from_w_plus(codes)), expected),  # type: ignore[operator]
    }


def main(
    e4e: Annotated[Path, typer.Option(help="Checkout of omertov/encoder4editing.", exists=True)],
    psp: Annotated[Path, typer.Option(help="Checkout of eladrich/pixel2style2pixel.", exists=True)],
    goldens: Annotated[bool, typer.Option(help="Write tests/golden/{e4e,psp}-*.npz.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this; no record is written.")] = "",
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "parity-psp.json",
) -> None:
    """Compare, print a table, write the record."""
    checkouts = {E4E: e4e.resolve(), PSP: psp.resolve()}
    rows = compare_all(CASES, only, lambda case: compare(case, checkouts, goldens))
    command = ["--e4e", e4e.name, "--psp", psp.name]
    columns = ("case", "image", "spread", "code_spread", "codes")
    conclude(rows, columns, ("reconstruct", "decode"), "psp.py", command, None if only else out)


if __name__ == "__main__":
    typer.run(main)
