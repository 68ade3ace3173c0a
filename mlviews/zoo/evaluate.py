"""Measure a bundled generator: ``python -m mlviews.zoo.evaluate WEIGHTS.safetensors --data DIR --out runs/eval``.

Writes ``quality.json`` and, unless told otherwise, grids. What is measured, with a classifier trained on real images:

- *fidelity*: its confidence on samples, the entropy of their classes, and the Fréchet distance in its feature space, of
  the anchors that a source draws (truncated) and of the full prior (or the other way round), beside the same figures for real images;
- *levels*: how often the class survives when one level is moved, and how many grey values that changes;
- *memorisation*: how far samples are from the nearest training image, beside how far real test images are;
- *likelihood*, of a VAE: the error of its reconstructions of real test images, and the evidence lower bound in bits per dimension.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.image import imsave
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from mlviews import sampling
from mlviews.errors import WeightsError
from mlviews.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mlviews.evaluation.data import CLASSES, Labelled, load_fashion_mnist
from mlviews.generators import MLVGM, load_generator
from mlviews.generators.film import FilmGenerator
from mlviews.generators.nvae.network import NVAE
from mlviews.runs.records import environment
from mlviews.viz import mosaic, save_figure
from mlviews.weights.files import read_safetensors

BATCH = 250  # images per forward pass
PAIRS = 2_000  # of anchor and positive, for the class-keeping shares
QUERIES = 1_000  # samples whose nearest training image is searched
SHIFT = sampling.TruncatedNormal(1.0, 2.0)  # N^t(0, 1, 2), the paper's perturbation and that of the preset fashion-ml-random

Advance = Callable[[int], None]


class Judged(NamedTuple):
    """What the classifier says about ``N`` images: features ``[N, 128]`` and class probabilities ``[N, 10]``."""

    features: Tensor
    probabilities: Tensor


class Gaussian(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` in float64."""

    mean: Tensor
    covariance: Tensor


# -- images and what the classifier says ---------------------------------------------------------------------------


@torch.no_grad()
def render(generator: MLVGM, latents: list[Tensor], advance: Advance) -> Tensor:
    """Images ``[N, C, H, W]`` in [0, 1] of any number of latents."""
    parts = []
    for rows in torch.split(torch.arange(len(latents[0])), BATCH):
        parts.append(generator([z[rows] for z in latents]))
        advance(len(rows))
    return torch.cat(parts)


@torch.no_grad()
def judge(model: Classifier, images: Tensor, advance: Advance) -> Judged:
    """Classify images ``[N, 1, 32, 32]``, uint8 or floats in [0, 1]."""
    features, probabilities = [], []
    for batch in torch.split(images, BATCH):
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        feature, logits = model(batch.contiguous(memory_format=torch.channels_last))
        features.append(feature)
        probabilities.append(logits.softmax(1))
        advance(len(batch))
    return Judged(torch.cat(features), torch.cat(probabilities))


# -- fidelity ------------------------------------------------------------------------------------------------------


def gaussian(features: Tensor) -> Gaussian:
    """The Gaussian with the features' mean and covariance."""
    features = features.double()
    return Gaussian(features.mean(0), torch.cov(features.T))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    ``C_a C_b`` has the eigenvalues of the symmetric ``S C_b S`` with ``S = C_a^(1/2)``, so that no root of an
    asymmetric matrix is needed, and a singular covariance does no harm.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def entropy_share(distribution: Tensor) -> float:
    """Entropy of a distribution over ``K`` classes as a share of ``log K``."""
    return float(torch.special.entr(distribution.double()).sum()) / math.log(len(distribution))


def class_figures(judged: Judged) -> dict[str, Any]:
    """Confidence (mean of the largest probability) and evenness of the classes."""
    confidence, found = judged.probabilities.max(1)
    counts = torch.bincount(found, minlength=len(CLASSES))
    by_class = torch.bincount(found, confidence, minlength=len(CLASSES)) / counts.clamp(min=1)
    histogram = counts / len(found)
    return {
        "samples": len(found),
        "confidence": confidence.mean().item(),
        "confidence_by_class": dict(zip(CLASSES, by_class.tolist(), strict=True)),
        "entropy_of_mean_prediction": entropy_share(judged.probabilities.mean(0)),
        "entropy_of_classes": entropy_share(histogram),
        "classes": dict(zip(CLASSES, histogram.tolist(), strict=True)),
    }


def accuracy(judged: Judged, labels: Tensor) -> float:
    """Share of images whose most probable class is their label."""
    return (judged.probabilities.argmax(1) == labels).double().mean().item()


# -- levels --------------------------------------------------------------------------------------------------------


def level_figures(
    generator: MLVGM, model: Classifier, anchors: list[Tensor], images: Tensor, judged: Judged, seed: int, advance: Advance
) -> list[dict[str, Any]]:
    """Per level, and for all but the first together: what remains when only these are moved.

    Args:
        generator: to measure.
        model: tells the classes.
        anchors: their latents.
        images: of the anchors.
        judged: the anchors' classes.
        seed: of the noise.
        advance: called with the number of images done.

    Returns:
        Per set of levels and perturbation, the share of pairs whose class is kept and the mean absolute change of a pixel.
    """
    count, depth = len(images), len(generator.levels)
    shifts = [z + w for z, w in zip(anchors, generator.sample_noise(range(count), SHIFT, seed), strict=True)]
    fresh = generator.sample_noise(range(count), sampling.TruncatedNormal(1.0, generator.truncation), seed)
    sets = [(f"{i}", level.name, {i}) for i, level in enumerate(generator.levels)] + [("1:", "all but the first", set(range(1, depth)))]
    rows = []
    for key, name, moved in sets:
        row: dict[str, Any] = {"level": key, "name": name, "pairs": count}
        for kind, positives in (("normal", shifts), ("resample", fresh)):
            after = render(generator, [positives[i] if i in moved else z for i, z in enumerate(anchors)], advance)
            kept = judge(model, after, advance).probabilities.argmax(1) == judged.probabilities.argmax(1)
            row[kind] = {"class_kept": kept.double().mean().item(), "pixel_change": (after - images).abs().mean().item()}
        rows.append(row)
    return rows


# -- memorisation --------------------------------------------------------------------------------------------------


def nearest(queries: Tensor, train: Tensor, advance: Advance) -> tuple[Tensor, Tensor]:
    """L2 distance to, and index of, the nearest training image.

    Args:
        queries: float ``[N, C, H, W]`` in [0, 1].
        train: uint8 ``[M, C, H, W]``.
        advance: called with the number of training images done.

    Returns:
        Distances ``[N]`` (in grey values of range 1, over all pixels) and indices ``[N]``.
    """
    flat = queries.flatten(1)
    best, where = torch.full((len(flat),), math.inf), torch.zeros(len(flat), dtype=torch.int64)
    for start in range(0, len(train), 5_000):
        chunk = train[start : start + 5_000].flatten(1).float() / 255
        # |q - t|^2 without |q|^2, which does not change the order.
        value, index = torch.addmm(chunk.square().sum(1), flat, chunk.T, alpha=-2).min(1)
        closer = value < best
        best, where = torch.where(closer, value, best), torch.where(closer, index + start, where)
        advance(len(chunk))
    found = train[where].flatten(1).float() / 255
    return (flat - found).square().sum(1).sqrt(), where


def distance_figures(distances: Tensor) -> dict[str, float]:
    """Mean and low quantiles."""
    low = torch.quantile(distances, torch.tensor([0.01, 0.05, 0.5])).tolist()
    return {"mean": distances.mean().item()} | dict(zip(("quantile_01", "quantile_05", "median"), low, strict=True))


# -- likelihood ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihood_figures(generator: NVAE, images: Tensor, seed: int, advance: Advance) -> dict[str, Any]:
    """How well a VAE explains real images, of which the outer two pixels are padding.

    Args:
        generator: to measure; its prior's temperature does not matter here, as the bound is that of temperature 1.
        images: uint8 ``[N, 1, 32, 32]``.
        seed: of the posterior's noise, one draw for each image.
        advance: called with the number of images done.

    Returns:
        The bound counts every nat, those of the padding too, over the 28x28 real dimensions; errors are means over the real pixels.
    """
    real = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    totals: dict[str, Tensor] = {}
    for rows in torch.split(torch.arange(len(images)), BATCH):
        batch = images[rows].float() / 255
        log, divergences = generator.elbo(batch, generator.sample_latents(rows, seed, truncation=None))
        error = (generator(generator.encode(batch)) - batch)[real].flatten(1)
        parts = {"distortion": -log, "rates": torch.stack(divergences, 1), "mse": error.square().mean(1), "mae": error.abs().mean(1)}
        for name, value in parts.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.double().sum(0)
        advance(len(rows))
    means = {name: value / len(images) for name, value in totals.items()}
    pixels = images[:1][real].numel()
    nats = (means["distortion"] + means["rates"].sum()).item()
    return {
        "images": len(images),
        "dimensions": pixels,
        "bits_per_dimension": nats / (pixels * math.log(2)),
        "nats": {"distortion": means["distortion"].item(), "rate_of_each_group": means["rates"].tolist()},
        "reconstruction": {"mse": means["mse"].item(), "mae": means["mae"].item(), "psnr": -10 * math.log10(means["mse"].item())},
    }


# -- pictures ------------------------------------------------------------------------------------------------------


def draw_samples(images: Tensor, path: Path) -> None:
    """160 samples in their order, at twice their size."""
    rows = [list(row) for row in images[:160].split(16)]
    imsave(path, mosaic(rows).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


def draw_levels(generator: MLVGM, anchors: list[Tensor], seed: int, path: Path, positives: int = 8, resample: bool = False) -> None:
    """Three anchors (first column), each with positives that move (or resample) one level only: a block of three rows per level."""
    count = 3
    distribution = sampling.TruncatedNormal(1.0, generator.truncation) if resample else SHIFT
    noises = [generator.sample_noise(range(count), distribution, seed, view=view) for view in range(1, positives + 1)]
    chosen = [z[:count] for z in anchors]
    moved = noises if resample else [[z + w for z, w in zip(chosen, noise, strict=True)] for noise in noises]
    figure = Figure(figsize=(6.4, 2.1 * len(generator.levels)), layout="constrained")
    axes = figure.subplots(len(generator.levels), 1, squeeze=False)[:, 0]
    for i, (level, ax) in enumerate(zip(generator.levels, axes, strict=True)):
        views = [generator(chosen)] + [generator([other[k] if k == i else z for k, z in enumerate(chosen)]) for other in moved]
        ax.imshow(mosaic([[view[row] for view in views] for row in range(count)]).numpy(), interpolation="nearest")
        ax.axvline(generator.image_shape[-1] + 1, color="tab:red", linewidth=1.5)
        ax.set_ylabel(f"level {i} ({level.name})", fontsize=9)
        ax.set(xticks=[], yticks=[])
    how = "drawn anew" if resample else "moved by N(0, 1), truncated at 2"
    axes[0].set_title(f"anchor | positives: this level alone {how}", fontsize=9)
    save_figure(figure, path)


def draw_reconstructions(generator: NVAE, images: Tensor, path: Path) -> None:
    """Real test images, each above its reconstruction from all levels, and from the first levels alone (the others drawn anew)."""
    batch = images[:16].float() / 255
    latents = generator.encode(batch)
    fresh = generator.sample_latents(range(len(batch)))
    depth = len(latents)
    rows = [batch] + [generator([*latents[:kept], *fresh[kept:]]) for kept in reversed(range(1, depth + 1))]
    imsave(path, mosaic([list(row) for row in rows]).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


def draw_nearest(queries: Tensor, found: Tensor, distances: Tensor, path: Path) -> None:
    """Samples above their nearest training images, closest pair first."""
    figure = Figure(figsize=(0.85 * len(queries), 2.1), layout="constrained")
    axes = figure.subplots(2, len(queries))
    for column, (query, match, distance) in enumerate(zip(queries, found, distances.tolist(), strict=True)):
        for ax, image in zip(axes[:, column], (query, match), strict=True):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"{distance:.2f}", fontsize=8)
    axes[0, 0].set_ylabel("sample", fontsize=8)
    axes[1, 0].set_ylabel("nearest", fontsize=8)
    save_figure(figure, path)


# -- command -------------------------------------------------------------------------------------------------------


def _load(path: Path, temperature: float) -> tuple[MLVGM, dict[str, Any]]:
    """A generator from a training script's export, and where it comes from."""
    try:
        _, metadata = read_safetensors(path, NVAE.FORMAT)
        generator: MLVGM = NVAE.load(path, temperature=temperature, levels="scale")
    except WeightsError:
        generator = load_generator("fashion", path)
        _, metadata = read_safetensors(path, FilmGenerator.FORMAT)
    return generator, json.loads(metadata.get("provenance", "{}"))


def summary(report: dict[str, Any]) -> list[Table]:
    """The report's main figures as tables."""
    fidelity = Table("images", "confidence", "entropy", "Fréchet to train", "to test", title="Fidelity")
    for name, row in report["fidelity"].items():
        frechet = (f"{row[key]:.3f}" if key in row else "" for key in ("frechet_to_train", "frechet_to_test"))
        fidelity.add_row(name, f"{row['confidence']:.3f}", f"{row['entropy_of_mean_prediction']:.4f}", *frechet)
    levels = Table("level", "class kept: normal", "resample", "pixel change: normal", "resample", title="Levels")
    for row in report["levels"]["table"]:
        shares = [f"{row[kind]['class_kept']:.1%}" for kind in ("normal", "resample")]
        changes = [f"{row[kind]['pixel_change']:.4f}" for kind in ("normal", "resample")]
        levels.add_row(f"{row['level']} ({row['name']})", *shares, *changes)
    memory = Table("distance to nearest training image", "mean", "1 %", "5 %", "median", title="Memorisation")
    for name in ("samples", "test", "ratio"):
        memory.add_row(name, *(f"{report['memorisation'][name][key]:.3f}" for key in ("mean", "quantile_01", "quantile_05", "median")))
    tables = [fidelity, levels, memory]
    if "likelihood" in report:
        found = report["likelihood"]
        tables.append(Table("bits per dimension", "error (MSE)", "PSNR, dB", title="Likelihood, and reconstruction of real test images"))
        tables[-1].add_row(
            f"{found['bits_per_dimension']:.3f}", f"{found['reconstruction']['mse']:.5f}", f"{found['reconstruction']['psnr']:.1f}"
        )
    return tables


def main(
    weights: Annotated[Path, typer.Argument(help="Weights that mlviews.zoo.train exported.", exists=True, dir_okay=False)],
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's idx files.")],
    out: Annotated[Path, typer.Option(help="Folder for quality.json and the grids.")],
    classifier: Annotated[
        Path | None, typer.Option(help="The classifier's weights, trained if absent; OUT/classifier.safetensors by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to measure the fidelity on.", min=256)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seeds the samples, the noise, and a classifier trained here.", min=0)] = 0,
    temperature: Annotated[float, typer.Option(help="Of a VAE's priors.")] = 1.0,
    grids: Annotated[bool, typer.Option(help="Draw samples.png, levels.png, nearest.png; of a VAE, reconstructions.png too.")] = True,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast to train the classifier (measuring is in float32).")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
) -> None:
    """Measure a bundled generator against Fashion-MNIST's real images."""
    if threads:
        torch.set_num_threads(threads)
    train, test = load_fashion_mnist(data, "train"), load_fashion_mnist(data, "test")
    generator, provenance = _load(weights, temperature)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        model, settings = _classifier(classifier or out / "classifier.safetensors", train, seed, bf16, progress)
        report = _measure(generator, model, train, test, samples, seed, out if grids else None, progress)
    report = {
        "weights": {
            "file": weights.name,
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "parameters": sum(p.numel() for p in generator.parameters()),
        },
        "provenance": provenance,
        "run": {
            "command": shlex.join(["python", "-m", "mlviews.zoo.evaluate", *sys.argv[1:]]),
            "seed": seed,
            **environment(),
            "seconds": time.perf_counter() - begin,
        },
    } | {"classifier": report.pop("classifier") | {"training": settings}} | report  # fmt: skip
    (out / "quality.json").write_text(json.dumps(_rounded(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    Console(width=100).print(*summary(report), out / "quality.json", sep="\n")


@contextmanager
def _stage(progress: Progress, name: str, total: int) -> Iterator[Advance]:
    task = progress.add_task(name, total=total)
    yield lambda count: progress.advance(task, count)
    progress.update(task, completed=total)


def _classifier(path: Path, train: Labelled, seed: int, bf16: bool, progress: Progress) -> tuple[Classifier, dict[str, Any]]:
    """The cached classifier, or a new one in its place."""
    if not path.exists():
        epochs, begin = 4, time.perf_counter()
        with _stage(progress, "classifier", epochs * len(train.images)) as advance:
            model = train_classifier(train, seed=seed, epochs=epochs, bf16=bf16, advance=advance)
        settings = {
            "seed": seed, "epochs": epochs, "bf16": bf16, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - begin, 1),
        }  # fmt: skip
        save_classifier(model, path, settings)
    return load_classifier(path)


def _measure(
    generator: MLVGM, model: Classifier, train: Labelled, test: Labelled, samples: int, seed: int, grids: Path | None, progress: Progress
) -> dict[str, Any]:
    """All figures, and the grids where ``grids`` names a folder."""
    with _stage(progress, "real images", len(train.images) + len(test.images)) as advance:
        real_train, real_test = judge(model, train.images, advance), judge(model, test.images, advance)
    to_train, to_test = gaussian(real_train.features), gaussian(real_test.features)

    fidelity: dict[str, Any] = {"test": class_figures(real_test), "train": class_figures(real_train)}
    fidelity["test"]["frechet_to_train"] = frechet_distance(to_test, to_train)
    kept: dict[str, tuple[list[Tensor], Tensor, Judged]] = {}
    other = ("prior", None) if generator.truncation is not None else ("truncated", SHIFT.truncation)
    for name, truncation in (("anchors", generator.truncation), other):
        with _stage(progress, f"samples: {name}", 2 * samples) as advance:
            latents = generator.sample_latents(range(samples), seed, truncation=truncation)
            images = render(generator, latents, advance)
            judged = judge(model, images, advance)
        features = gaussian(judged.features)
        fidelity[name] = {"truncation": truncation} | class_figures(judged)
        fidelity[name] |= {"frechet_to_train": frechet_distance(features, to_train), "frechet_to_test": frechet_distance(features, to_test)}
        kept[name] = latents, images, judged

    latents, images, judged = kept["anchors"]
    pairs = min(samples, PAIRS)
    with _stage(progress, "levels", 4 * pairs * (len(generator.levels) + 1)) as advance:
        anchors, some = [z[:pairs] for z in latents], Judged(*(value[:pairs] for value in judged))
        levels = level_figures(generator, model, anchors, images[:pairs], some, seed, advance)

    with _stage(progress, "nearest images", 2 * len(train.images)) as advance:
        queries = images[:QUERIES]
        distances, where = nearest(queries, train.images, advance)
        others, _ = nearest(test.images[:QUERIES].float() / 255, train.images, advance)
    near, far = distance_figures(distances), distance_figures(others)

    if grids is not None:
        closest = distances.argsort()[:10]
        draw_samples(images, grids / "samples.png")
        draw_levels(generator, latents, seed, grids / "levels.png", resample=isinstance(generator, NVAE))
        draw_nearest(queries[closest], train.images[where[closest]].float() / 255, distances[closest], grids / "nearest.png")

    likelihood: dict[str, Any] = {}
    if isinstance(generator, NVAE):
        with _stage(progress, "likelihood", len(test.images)) as advance:
            likelihood = {"temperature": generator.temperature, "likelihood": likelihood_figures(generator, test.images, seed, advance)}
        if grids is not None:
            draw_reconstructions(generator, test.images, grids / "reconstructions.png")

    size = min(samples, len(test.images), len(train.images) // 2)
    first, second = gaussian(real_train.features[:size]), gaussian(real_train.features[size : 2 * size])
    return {
        "classifier": {
            "test_accuracy": accuracy(real_test, test.labels),
            "train_accuracy": accuracy(real_train, train.labels),
            "feature_dims": real_train.features.shape[1],
        },
        "fidelity": fidelity,
        "frechet_floor": {
            "images_per_side": size,
            "train_to_test": frechet_distance(first, gaussian(real_test.features[:size])),
            "train_to_train": frechet_distance(first, second),
        },
        "levels": {"normal": "z + N(0, 1) truncated at 2", "resample": "a fresh draw of the anchor's distribution", "table": levels},
        "memorisation": {
            "queries": len(queries),
            "training_images": len(train.images),
            "samples": near,
            "test": far,
            "ratio": {key: near[key] / far[key] for key in near},
        },
    } | likelihood


def _rounded(value: Any) -> Any:
    """Floats to six decimals, everywhere in a JSON value."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
