"""The command `purify`: a folder of images, purified by a generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from mlviews.cli.shared import Run, app, folder_to_write, generator_and_law, with_options, write
from mlviews.images import Folder, Shape
from mlviews.purify import BLENDS, Purifier
from mlviews.runs.files import whole
from mlviews.runs.progress import bar

_BATCH = 32
_SHOWN = 8  # images of the picture


@app.command()
@with_options
def purify(
    images: Annotated[Path, typer.Argument(help="Folder of images, e.g. attacked ones.")],
    generator: Annotated[
        str,
        typer.Option(
            help="A generator's name, or a preset or YAML file whose generator to take; it encodes."
        ),
    ] = "fashion-nvae",
    keep: Annotated[int, typer.Option(help="Coarse levels that are kept as they are encoded.", min=0)] = 1,
    mix: Annotated[
        float, typer.Option(help="Of the finer levels: 0 keeps them, 1 draws them anew.", min=0, max=1)
    ] = 1.0,
    blend: Annotated[
        str, typer.Option(help=f"One of: {', '.join(BLENDS)}; how rates between 0 and 1 mix.")
    ] = "variance",
    samples: Annotated[int, typer.Option(help="Purified copies in the picture.", min=1, max=64)] = 5,
    out: Annotated[
        Path, typer.Option(help="Folder for the purified images and grid.png, clean and purified.")
    ] = Path("runs/purify"),
    *,
    options: Run,
) -> None:
    """Purify images: keep coarse levels of their latents, mix or draw anew the fine ones, and decode.

    It writes one purified copy of each image, at the generator's size, under the image's name. Whether a
    classifier gains by it is another question, which `benchmarks/purify.py` measures.
    """
    from mlviews.viz import Panel, draw_panels  # matplotlib takes a second that errors need not wait for

    network, _ = generator_and_law(generator, options.weights)
    purifier = Purifier(network.to(options.place), keep, mix, samples, options.seed, blend=blend)
    folder = Folder(images, Shape(*network.image_shape, network.border))
    out = folder_to_write(out)
    rows: list[list[Tensor]] = []
    with bar("images", len(folder)) as advance, torch.no_grad():
        for start in range(0, len(folder), _BATCH):
            numbers = range(start, min(start + _BATCH, len(folder)))
            clean = folder.batch(numbers, network.device).float() / 255
            labels = folder.labels[start : numbers.stop].to(network.device) if network.num_classes else None
            if len(rows) < _SHOWN:
                copies = purifier.copies(clean, labels, indices=numbers)  # [samples, B, C, H, W]
                table = torch.cat([clean[None], copies])[:, : _SHOWN - len(rows)]
                rows += [list(row) for row in table.transpose(0, 1)]
                purified = copies[0]
            else:
                purified = purifier(clean, labels, indices=numbers)
            for number, image in zip(numbers, purified, strict=True):
                file = folder.files[number].relative_to(folder.path)
                suffix = "" if file.suffix.lower() == ".png" else ".png"
                _save(image, out / "images" / f"{file}{suffix}")
            advance(numbers.stop, "")
    names = ["image", *(str(copy) for copy in range(samples))]
    plural = "" if purifier.keep == 1 else "s"
    title = f"{generator}, {purifier.keep} level{plural} kept: an image and its purified copies"
    write(out / "images", draw_panels([[Panel(title, rows, column_names=names)]], out / "grid.png"))


def _save(image: Tensor, path: Path) -> None:
    """Write an image ``[C, H, W]`` in [0, 1] as PNG, whole or not at all."""
    pixels = (image * 255).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    with whole(path) as part:
        Image.fromarray(np.squeeze(pixels)).save(part, format="PNG")
