"""How well do the bundled generators reconstruct real images?

``python benchmarks/inverter.py --data DIR``

Real test images go through ``encode`` and back: the error over their 28x28 real pixels, and whether a
classifier trained on real images still gives the image its class; then with all levels finer than the first k
drawn anew. ``fashion`` goes through its inverter, alone and followed by a few steps of optimization;
``fashion-nvae`` through its encoder; and, for scale, as many principal components of the training images as
``fashion`` has latents. Prints a table, writes ``benchmarks/results/fashion-inverter.json``.

``python benchmarks/inverter.py --data DIR --diffusion --images 1000`` does so with ``fashion-diffusion``,
which takes longer, and writes ``benchmarks/results/fashion-diffusion-encoding.json``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.zoo import diffusion_encoding, reconstruction
from real_images import classifier_of
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlviews.evaluation.classifier import Classifier
from mlviews.evaluation.data import Labelled, load_fashion_mnist
from mlviews.generators import MLVGM, load_generator
from mlviews.generators.inverter import Inverter
from mlviews.runs.files import sha256
from mlviews.runs.records import environment
from mlviews.zoo import FOLDER

BATCH = 250  # images at a time
REAL = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # the pixels that are not padding


@torch.no_grad()
def classes(model: Classifier, images: Tensor) -> Tensor:
    """Return the classes ``[B]`` that the classifier gives to images."""
    _, logits = model(images.contiguous(memory_format=torch.channels_last))
    return logits.argmax(1)


class Totals:
    """Sums over images of what a reconstruction is judged by.

    Args:
        model: the classifier.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.count = 0
        self.squares = self.padded = self.kept_class = self.right = 0.0

    def add(self, images: Tensor, labels: Tensor, reconstructed: Tensor) -> None:
        """Judge the reconstructions of a batch."""
        error = (reconstructed - images).square()
        guessed = classes(self.model, reconstructed)
        self.count += len(images)
        self.squares += error[REAL].flatten(1).mean(1).sum().item()
        self.padded += error.flatten(1).mean(1).sum().item()
        self.kept_class += (guessed == classes(self.model, images)).sum().item()
        self.right += (guessed == labels).sum().item()

    def figures(self) -> dict[str, float]:
        """Return means over the images; the squared errors are those of the real pixels, and of all."""
        mse = self.squares / self.count
        return {
            "images": self.count,
            "mse": mse,
            "mse_with_padding": self.padded / self.count,
            "psnr": -10 * math.log10(mse),
            "class_kept": self.kept_class / self.count,
            "right": self.right / self.count,
        }


def measure(
    generator: MLVGM, model: Classifier, test: Labelled, seed: int, console: Console
) -> list[dict[str, Any]]:
    """Return a row for each number of levels that are kept, all of them first; finer ones are drawn anew."""
    depth = len(generator.levels)
    totals = [Totals(model) for _ in range(depth)]
    squares = torch.zeros(depth)
    rows = torch.arange(len(test.images)).split(BATCH)
    begin, encoding = time.perf_counter(), 0.0
    for batch in track(rows, generator.name, console=console):
        images = test.images[batch].float() / 255
        begin = time.perf_counter()
        latents = generator.encode(images)
        encoding += time.perf_counter() - begin
        squares += torch.stack([z.square().mean() for z in latents]) * len(batch)
        anew = generator.sample_latents(batch, seed)
        for levels, total in zip(range(depth, 0, -1), totals, strict=True):
            total.add(images, test.labels[batch], generator([*latents[:levels], *anew[levels:]]))
    count = len(test.images)
    shared = {"encoding_ms": 1000 * encoding / count, "mean_square": (squares / count).tolist()}
    figures = [
        {"levels": levels, **total.figures()}
        for levels, total in zip(range(depth, 0, -1), totals, strict=True)
    ]
    figures[0] |= shared
    return figures


def measure_refined(
    generator: MLVGM, model: Classifier, test: Labelled, steps: int, console: Console
) -> dict[str, Any]:
    """Return the row of the inverter followed by steps of optimization."""
    inverter = generator.inverter
    assert isinstance(inverter, Inverter)
    total = Totals(model)
    seconds, square = 0.0, 0.0
    rows = torch.arange(len(test.images)).split(BATCH)
    for batch in track(rows, f"{steps} steps", console=console):
        images = test.images[batch].float() / 255
        begin = time.perf_counter()
        latents = inverter.refine(generator, images, steps=steps)
        seconds += time.perf_counter() - begin
        square += torch.cat(latents, dim=1).square().mean().item() * len(batch)
        total.add(images, test.labels[batch], generator(latents))
    count = len(test.images)
    return {
        "steps": steps,
        **total.figures(),
        "encoding_ms": 1000 * seconds / count,
        "mean_square": square / count,
    }


def measure_components(
    count: int, model: Classifier, train: Labelled, test: Labelled, console: Console
) -> dict[str, Any]:
    """Return the row of the closest images that so many principal components of training images span."""
    pixels = train.images.flatten(1).float() / 255  # [N, D]
    mean = pixels.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov((pixels - mean).T))  # by rising variance
    widest = vectors[:, -count:]  # [D, count]
    total = Totals(model)
    for batch in track(torch.arange(len(test.images)).split(BATCH), "components", console=console):
        images = test.images[batch].float() / 255
        spanned = (images.flatten(1) - mean) @ widest @ widest.T + mean
        total.add(images, test.labels[batch], spanned.view_as(images))
    return {"components": count, **total.figures()}


def main(
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four idx files.")],
    classifier: Annotated[
        Path, typer.Option(help="The classifier's file; trained first if it is missing.")
    ] = Path("runs/classifier.safetensors"),
    images: Annotated[int, typer.Option(help="Test images, the first ones.", min=10)] = 10_000,
    refined: Annotated[int, typer.Option(help="Of them, those that are refined too.", min=10)] = 300,
    steps: Annotated[int, typer.Option(help="Of optimization, of those that are refined.", min=1)] = 30,
    inverter: Annotated[
        Path | None, typer.Option(help="Of fashion; the bundled one if none is given.")
    ] = None,
    diffusion: Annotated[bool, typer.Option(help="Measure fashion-diffusion, and no other.")] = False,
    seed: Annotated[int, typer.Option(help="Of the levels that are drawn anew.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "fashion-inverter.json",
) -> None:
    """Measure the reconstructions of real images by the bundled generators."""
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    test = Labelled(*(part[:images] for part in load_fashion_mnist(data, "test")))
    model = classifier_of(data, classifier)
    if diffusion:
        _measure_diffusion(model, test, seed, console)
        return
    if images < 10_000 or inverter is not None:
        out = off_the_records(out)
    fashion = load_generator("fashion", inverter=inverter)
    assert isinstance(fashion.inverter, Inverter)
    right = (classes(model, test.images.float() / 255) == test.labels).float().mean().item()
    part = Labelled(*(values[:refined] for values in test))
    latents = sum(math.prod(level.shape) for level in fashion.levels)
    record = {
        "command": command("inverter.py"),
        "seed": seed,
        "classifier": {"sha256": sha256(classifier)[:16], "right": right},
        "file": {"sha256": sha256(inverter or FOLDER / "fashion-inverter.safetensors")[:16]},
        "training": fashion.inverter.provenance,
        "fashion": measure(fashion, model, test, seed, console),
        "fashion_refined": [measure_refined(fashion, model, part, count, console) for count in (0, steps)],
        "fashion_nvae": measure(load_generator("fashion-nvae"), model, test, seed, console),
        "components": measure_components(latents, model, load_fashion_mnist(data, "train"), test, console),
        **environment(),
    }
    publish(record, out, reconstruction(record), generators=["fashion", "fashion-nvae"])


def _measure_diffusion(model: Classifier, test: Labelled, seed: int, console: Console) -> None:
    """Measure the bundled diffusion model, and write its record."""
    generator = load_generator("fashion-diffusion")
    right = (classes(model, test.images.float() / 255) == test.labels).float().mean().item()
    record = {
        "command": command("inverter.py"),
        "seed": seed,
        "classifier": {"right": right},
        "rows": measure(generator, model, test, seed, console),
        **environment(),
    }
    publish(record, RESULTS / "fashion-diffusion-encoding.json", diffusion_encoding(record))


if __name__ == "__main__":
    typer.run(main)
