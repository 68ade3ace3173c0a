"""Measure a bundled generator: ``python -m mlviews.zoo.evaluate WEIGHTS --data DIR --out runs/eval``.

It writes ``quality.json`` and, unless told otherwise, grids; :mod:`mlviews.zoo.quality` says what is
measured. The classifier that it takes is trained first, unless its weights are there.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from mlviews.evaluation.classifier import Classifier, cached_classifier
from mlviews.evaluation.data import Labelled, load_fashion_mnist
from mlviews.generators import MLVGM, load_generator
from mlviews.generators.nvae.network import NVAE
from mlviews.generators.semafo import SemafoVAE
from mlviews.runs.files import sha256, whole
from mlviews.runs.progress import bars
from mlviews.runs.records import environment
from mlviews.weights.files import format_of
from mlviews.zoo import PROVENANCE
from mlviews.zoo.quality.batches import stage
from mlviews.zoo.quality.measurement import Measurement
from mlviews.zoo.quality.tables import summary
from mlviews.zoo.training import start

EPOCHS = 4  # of a classifier trained here


def _load(path: Path, temperature: float) -> tuple[MLVGM, dict[str, Any]]:
    """Return a generator from a training script's export, and where it comes from."""
    if path.is_dir():
        generator: MLVGM = load_generator("fashion-diffusion", path)
        return generator, json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    kind = format_of(path)
    if kind == NVAE.FORMAT:
        generator = NVAE.load(path, temperature=temperature, levels="scale")
    else:
        generator = load_generator("fashion-semafo" if kind == SemafoVAE.FORMAT else "fashion", path)
    return generator, generator.provenance


def main(
    weights: Annotated[
        Path, typer.Argument(help="The file or folder that a training script exported.", exists=True)
    ],
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's idx files.")],
    out: Annotated[Path, typer.Option(help="Folder for quality.json and the grids.")],
    classifier: Annotated[
        Path | None,
        typer.Option(
            help="The classifier's weights, trained if absent; OUT/classifier.safetensors by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to measure the fidelity on.", min=256)] = 10_000,
    pairs: Annotated[int, typer.Option(help="Samples to measure the levels on.", min=10)] = 2_000,
    seed: Annotated[
        int, typer.Option(help="Seeds the samples, the noise, and a classifier trained here.", min=0)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of a VAE's priors.")] = 1.0,
    grids: Annotated[
        bool,
        typer.Option(
            help="Draw samples.png, levels.png, nearest.png; of what encodes, reconstructions.png too."
        ),
    ] = True,
    bf16: Annotated[
        bool, typer.Option(help="bfloat16 autocast to train the classifier (measuring is in float32).")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
) -> None:
    """Measure a bundled generator against Fashion-MNIST's real images."""
    if threads:
        torch.set_num_threads(threads)
    train, test = load_fashion_mnist(data, "train"), load_fashion_mnist(data, "test")
    generator, provenance = _load(weights, temperature)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    # The stages count different things, images and pairs of them: the bars have no counts.
    with bars(None, unit=None) as progress:
        path = classifier or out / "classifier.safetensors"
        model, settings = _classifier(path, train, seed, bf16, progress)
        folder = out if grids else None
        figures = Measurement(generator, model, train, test, samples, pairs, seed, folder, progress).report()
    paths = [path for path in weights.rglob("*") if path.is_file()] or [weights]
    report = {
        "weights": {
            "file": weights.name,
            "bytes": sum(path.stat().st_size for path in paths),
            "sha256": sha256(max(paths, key=lambda path: path.stat().st_size)),  # a folder has one large file
            "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        },
        "provenance": provenance,
        "run": {
            "command": shlex.join(["python", "-m", "mlviews.zoo.evaluate", *sys.argv[1:]]),
            "seed": seed,
            **environment(),
            "seconds": time.perf_counter() - begin,
        },
        **figures,
        "classifier": figures["classifier"] | {"training": settings},
    }
    record = out / "quality.json"
    text = json.dumps(_rounded(report), indent=2, ensure_ascii=False) + "\n"
    with whole(record) as part:
        part.write_text(text, encoding="utf-8")
    Console(width=100).print(*summary(report), record, sep="\n")


def _classifier(
    path: Path, train: Labelled, seed: int, bf16: bool, progress: Progress
) -> tuple[Classifier, dict[str, object]]:
    """Return the cached classifier, or a new one, whose training has a bar."""
    if path.exists():
        return cached_classifier(path, train, seed=seed, epochs=EPOCHS, bf16=bf16)
    with stage(progress, "classifier", EPOCHS * len(train.images)) as advance:
        return cached_classifier(path, train, seed=seed, epochs=EPOCHS, bf16=bf16, advance=advance)


def _rounded(value: Any) -> Any:
    """Return a JSON value with its floats rounded to six decimals."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    start(main)
