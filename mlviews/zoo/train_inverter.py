"""Train the inverter of a bundled generator, or of one that :mod:`mlviews.zoo.train` has trained.

The command is ``python -m mlviews.zoo.train_inverter fashion --data DIR --out runs/fashion-inverter``; for a
generator of your own images, ``film --weights FILE --data FOLDER``. It goes on from the folder's checkpoint,
and writes ``fashion-inverter.safetensors`` in float16, as it is bundled, and the evaluations in
``history.csv``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mlviews.generators import load_generator
from mlviews.invert import Inverter, train_inverter
from mlviews.zoo.images import training_images
from mlviews.zoo.training import start

# A short run: on one thread of a busy machine its steps take half an hour to an hour.
SHORT: dict[str, Any] = {
    "batch": 32,
    "steps": 2600,
    "pair_steps": 250,
    "pairs": 4,
    "lr": 1.5e-3,
    "decay_from": 0.3,
    "evaluate_every": 200,
    "evaluation": 256,
    "held_out": 512,
}
RECIPES = {"fashion": SHORT, "film": SHORT}


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, which is that of its generator.")],
    data: Annotated[
        Path, typer.Option(help="Folder of images, or of Fashion-MNIST's idx files.", exists=True)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoint, history and weights; resumed if it has a checkpoint."),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="The generator's file. Default: the bundled one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, at most. Default: the recipe's.", min=1)] = None,
    first: Annotated[
        Path | None,
        typer.Option("--start", help="An inverter's file to start from. Default: fresh weights."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of pairs, the order of images and first weights.", min=0)] = 0,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast, for a CPU with AVX-512 BF16.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    progress: Annotated[bool, typer.Option(help="Show a bar.")] = True,
) -> None:
    """Train the inverter of a generator on the images that it was trained on."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"Invalid recipe {recipe!r}: one of {', '.join(RECIPES)}.")
    if threads:
        torch.set_num_threads(threads)
    options = dict(RECIPES[recipe])
    if steps is not None:
        options["steps"] = steps
    if first is not None:
        options["pair_steps"] = 0  # it has learned from pairs alone already
    generator = load_generator(recipe, weights)
    channels, side, _ = generator.image_shape
    real = training_images(data, side, channels == 3)
    inverter = train_inverter(
        generator,
        real.images,
        out,
        start=None if first is None else Inverter.load(first),
        seed=seed,
        dtype="bfloat16" if bf16 else None,
        progress=progress,
        **options,
    )
    inverter.provenance["data"] = real.name
    path = out / f"{recipe}-inverter.safetensors"
    inverter.save(path, half=True)
    print(f"{inverter.run.status}: {inverter.run.best}", path, sep="\n")


if __name__ == "__main__":
    start(main)
