"""Measure a bundled generator.

The command is ``python -m mlviews.zoo.evaluate WEIGHTS --data DIR --out runs/eval``. It writes
``quality.json`` and, unless told otherwise, grids. With a classifier trained on real images, it measures

- *fidelity*: its confidence on samples, the entropy of their classes, and the Fréchet distance in its feature
  space, of the anchors that a source draws (truncated) and of the full prior (or the other way round), beside
  the same figures for real images; and how many samples of a class-conditional generator are of their class;
- *levels*: how often the class survives when one level is moved, and how many grey values that changes;
- *memorisation*: how far samples are from the nearest training image, beside how far real test images are;
- *likelihood*, of a VAE: the error of its reconstructions of real test images, and the evidence lower bound
  in bits per dimension.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.image import imsave
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mlviews import sampling
from mlviews.evaluation.classifier import Classifier, cached_classifier
from mlviews.evaluation.data import CLASSES, Labelled, load_fashion_mnist
from mlviews.generators import MLVGM, load_generator
from mlviews.generators.diffusion import DiffusionGenerator
from mlviews.generators.nvae.network import NVAE
from mlviews.generators.semafo import SemafoVAE
from mlviews.runs.files import sha256, whole
from mlviews.runs.progress import bars
from mlviews.runs.records import environment
from mlviews.viz import mosaic, save_figure
from mlviews.weights.files import format_of
from mlviews.zoo import PROVENANCE
from mlviews.zoo.training import start

BATCH = 250  # images per forward pass
QUERIES = 1_000  # samples whose nearest training image is searched
EPOCHS = 4  # of a classifier trained here
SHIFT = sampling.TruncatedNormal(1.0, 2.0)  # N^t(0, 1, 2), the paper's, as in the preset fashion-ml-random

Advance = Callable[[int], None]


class Judged(NamedTuple):
    """What the classifier says about ``N`` images."""

    features: Tensor  # [N, 128]
    probabilities: Tensor  # of the classes, [N, 10]

    def first(self, count: int) -> Judged:
        """Return what it says about the first images."""
        return Judged(self.features[:count], self.probabilities[:count])


class Gaussian(NamedTuple):
    """A Gaussian in float64."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


# -- images and what the classifier says ---------------------------------------------------------------------


@torch.no_grad()
def render(generator: MLVGM, latents: list[Tensor], labels: Tensor | None, advance: Advance) -> Tensor:
    """Return images ``[N, C, H, W]`` in [0, 1] of any number of latents, and labels if it takes some."""
    images = []
    for rows in torch.split(torch.arange(len(latents[0])), BATCH):
        images.append(generator([z[rows] for z in latents], _of(labels, rows)))
        advance(len(rows))
    return torch.cat(images)


def _of(labels: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """Return the labels of some rows; None if there are no labels."""
    return None if labels is None else labels[rows]


@torch.no_grad()
def judge(model: Classifier, images: Tensor, advance: Advance) -> Judged:
    """Classify images ``[N, 1, 32, 32]``, uint8 or floats in [0, 1]."""
    features, probabilities = [], []
    for batch in torch.split(images, BATCH):
        if batch.dtype == torch.uint8:
            batch = batch.float() / 255
        feature, logits = model(batch.contiguous(memory_format=torch.channels_last))
        features.append(feature)
        probabilities.append(logits.softmax(1))
        advance(len(batch))
    return Judged(torch.cat(features), torch.cat(probabilities))


# -- fidelity ------------------------------------------------------------------------------------------------


def gaussian(features: Tensor) -> Gaussian:
    """Return the Gaussian with the mean and covariance of features ``[N, D]``."""
    features = features.double()
    return Gaussian(features.mean(0), torch.cov(features.T))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians.

    It is ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. ``C_a C_b`` has the eigenvalues of the
    symmetric ``S C_b S`` with ``S = C_a^(1/2)``, so that no root of an asymmetric matrix is needed, and a
    singular covariance does no harm.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def entropy_share(distribution: Tensor) -> float:
    """Return the entropy of a distribution over ``K`` classes as a share of ``log K``."""
    return float(torch.special.entr(distribution.double()).sum()) / math.log(len(distribution))


def class_figures(judged: Judged) -> dict[str, Any]:
    """Return the confidence (mean of the largest probability) and the evenness of the classes."""
    confidence, classes = judged.probabilities.max(1)
    counts = torch.bincount(classes, minlength=len(CLASSES))
    by_class = torch.bincount(classes, confidence, minlength=len(CLASSES)) / counts.clamp(min=1)
    histogram = counts / len(classes)
    return {
        "samples": len(classes),
        "confidence": confidence.mean().item(),
        "confidence_by_class": dict(zip(CLASSES, by_class.tolist(), strict=True)),
        "entropy_of_mean_prediction": entropy_share(judged.probabilities.mean(0)),
        "entropy_of_classes": entropy_share(histogram),
        "classes": dict(zip(CLASSES, histogram.tolist(), strict=True)),
    }


def accuracy(judged: Judged, labels: Tensor) -> float:
    """Return the share of images whose most probable class is their label."""
    return (judged.probabilities.argmax(1) == labels).double().mean().item()


# -- levels --------------------------------------------------------------------------------------------------


@torch.no_grad()
def level_figures(
    generator: MLVGM,
    model: Classifier,
    anchors: list[Tensor],
    labels: Tensor | None,
    images: Tensor,
    judged: Judged,
    seed: int,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Return what remains when one level alone is moved, or all but the first together.

    Args:
        generator: the one to measure.
        model: tells the classes.
        anchors: latents of ``N`` anchors.
        labels: of the anchors, int64 ``[N]``, for a class-conditional generator.
        images: of the anchors, ``[N, C, H, W]``.
        judged: the anchors' classes.
        seed: of the noise.
        advance: called with the number of images after each pass.

    Returns:
        For each set of levels and each perturbation, the share of pairs whose class is kept and the mean
        absolute change of a pixel.
    """
    count, depth = len(images), len(generator.levels)
    positives = {}
    if not isinstance(generator, DiffusionGenerator):  # whose noises would be too long
        noise = generator.sample_noise(range(count), SHIFT, seed)
        positives["normal"] = [z + w for z, w in zip(anchors, noise, strict=True)]
    anew = sampling.TruncatedNormal(1.0, generator.truncation)
    positives["resample"] = generator.sample_noise(range(count), anew, seed)
    sets = [(f"{index}", level.name, {index}) for index, level in enumerate(generator.levels)]
    sets.append(("1:", "all but the first", set(range(1, depth))))
    after: dict[tuple[str, str], list[Tensor]] = {(key, kind): [] for key, _, _ in sets for kind in positives}
    for rows in torch.split(torch.arange(count), BATCH):
        before = [z[rows] for z in anchors]
        states = generator.states(before, _of(labels, rows))  # blocks before the moved levels run once
        for (key, _, moved), kind in itertools.product(sets, positives):
            mixed = [positives[kind][level][rows] if level in moved else z for level, z in enumerate(before)]
            first = min(moved)
            images_after = generator.decode(mixed, _of(labels, rows), state=states[first], start=first)
            after[key, kind].append(images_after)
            advance(len(rows))
    figures = []
    for key, name, _ in sets:
        row: dict[str, Any] = {"level": key, "name": name, "pairs": count}
        for kind in positives:
            changed = torch.cat(after.pop((key, kind)))
            classes = judge(model, changed, advance).probabilities.argmax(1)
            same = classes == judged.probabilities.argmax(1)
            row[kind] = {
                "class_kept": same.double().mean().item(),
                "pixel_change": (changed - images).abs().mean().item(),
            }
        figures.append(row)
    return figures


# -- memorisation --------------------------------------------------------------------------------------------


def nearest(queries: Tensor, train: Tensor, advance: Advance) -> tuple[Tensor, Tensor]:
    """Return the L2 distance to, and the index of, the nearest training image of each query.

    Args:
        queries: float ``[N, C, H, W]`` in [0, 1].
        train: uint8 ``[M, C, H, W]``.
        advance: called with the number of training images after each chunk of them.

    Returns:
        Distances ``[N]`` (in grey values of range 1, over all pixels) and indices ``[N]``.
    """
    flat = queries.flatten(1)
    smallest = torch.full((len(flat),), math.inf)
    indices = torch.zeros(len(flat), dtype=torch.int64)
    for first in range(0, len(train), 5_000):
        chunk = train[first : first + 5_000].flatten(1).float() / 255
        # |q - t|^2 without |q|^2, which does not change the order.
        value, index = torch.addmm(chunk.square().sum(1), flat, chunk.T, alpha=-2).min(1)
        closer = value < smallest
        smallest = torch.where(closer, value, smallest)
        indices = torch.where(closer, index + first, indices)
        advance(len(chunk))
    matches = train[indices].flatten(1).float() / 255
    return (flat - matches).square().sum(1).sqrt(), indices


def distance_figures(distances: Tensor) -> dict[str, float]:
    """Return the mean and low quantiles of distances ``[N]``."""
    quantiles = torch.quantile(distances, torch.tensor([0.01, 0.05, 0.5])).tolist()
    names = ("quantile_01", "quantile_05", "median")
    return {"mean": distances.mean().item()} | dict(zip(names, quantiles, strict=True))


# -- likelihood ----------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihood_figures(generator: NVAE, images: Tensor, seed: int, advance: Advance) -> dict[str, Any]:
    """Return how well a VAE explains real images, of which the outer two pixels are padding.

    Args:
        generator: the one to measure; its prior's temperature does not matter here, as the bound is that of
            temperature 1.
        images: uint8 ``[N, 1, 32, 32]``.
        seed: of the posterior's noise, one draw for each image.
        advance: called with the number of images after each batch.

    Returns:
        The bound counts every nat, those of the padding too, over the 28x28 real dimensions; errors are means
        over the real pixels.
    """
    real = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    totals: dict[str, Tensor] = {}
    for rows in torch.split(torch.arange(len(images)), BATCH):
        batch = images[rows].float() / 255
        log, divergences = generator.elbo(batch, generator.sample_latents(rows, seed, truncation=None))
        error = (generator(generator.encode(batch)) - batch)[real].flatten(1)  # [B, 784]
        parts = {
            "distortion": -log,  # [B]
            "rates": torch.stack(divergences, 1),  # [B, groups]
            "mse": error.square().mean(1),
            "mae": error.abs().mean(1),
        }
        for name, value in parts.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.double().sum(0)
        advance(len(rows))
    means = {name: value / len(images) for name, value in totals.items()}
    dimensions = images[:1][real].numel()
    nats = (means["distortion"] + means["rates"].sum()).item()
    mse = means["mse"].item()
    return {
        "images": len(images),
        "dimensions": dimensions,
        "bits_per_dimension": nats / (dimensions * math.log(2)),
        "nats": {"distortion": means["distortion"].item(), "rate_of_each_group": means["rates"].tolist()},
        "reconstruction": {"mse": mse, "mae": means["mae"].item(), "psnr": -10 * math.log10(mse)},
    }


# -- pictures ------------------------------------------------------------------------------------------------


def _save_doubled(rows: list[list[Tensor]], path: Path) -> None:
    """Write rows of images as a grid, at twice their size."""
    imsave(path, mosaic(rows).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


def draw_samples(images: Tensor, path: Path) -> None:
    """Write 160 samples in their order."""
    _save_doubled([list(row) for row in images[:160].split(16)], path)


def draw_levels(
    generator: MLVGM,
    anchors: list[Tensor],
    seed: int,
    path: Path,
    positives: int = 8,
    resample: bool = False,
    labels: Tensor | None = None,
) -> None:
    """Draw three anchors (first column), each with positives that move one level only.

    The picture has a block of three rows for each level.

    Args:
        generator: makes the images.
        anchors: their latents; the first three are drawn.
        seed: of the noise.
        path: the file to write.
        positives: of each anchor.
        resample: whether the level is drawn anew, and not moved by N(0, 1).
        labels: of the anchors, for a class-conditional generator.
    """
    count = 3
    chosen = [z[:count] for z in anchors]
    classes = _of(labels, slice(count))
    law = sampling.TruncatedNormal(1.0, generator.truncation) if resample else SHIFT
    moved = []
    for view in range(1, positives + 1):
        noise = generator.sample_noise(range(count), law, seed, view=view)
        moved.append(noise if resample else [z + w for z, w in zip(chosen, noise, strict=True)])

    depth = len(generator.levels)
    figure = Figure(figsize=(6.4, 2.1 * depth), layout="constrained")
    axes = figure.subplots(depth, 1, squeeze=False)[:, 0]
    for index, (level, ax) in enumerate(zip(generator.levels, axes, strict=True)):
        views = [generator(chosen, classes)]
        for latents in moved:
            views.append(generator([*chosen[:index], latents[index], *chosen[index + 1 :]], classes))
        rows = [[view[row] for view in views] for row in range(count)]
        ax.imshow(mosaic(rows).numpy(), interpolation="nearest")
        ax.axvline(generator.image_shape[-1] + 1, color="tab:red", linewidth=1.5)
        ax.set_ylabel(f"level {index} ({level.name})", fontsize=9)
        ax.set(xticks=[], yticks=[])
    how = "drawn anew" if resample else "moved by N(0, 1), truncated at 2"
    axes[0].set_title(f"anchor | positives: this level alone {how}", fontsize=9)
    save_figure(figure, path)


def draw_reconstructions(generator: MLVGM, images: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Draw real test images, each above its reconstructions.

    The first is from all levels, the next ones from ever fewer first levels, with the rest drawn anew.
    """
    batch = images[:16].float() / 255
    labels = _of(labels, slice(16))
    latents = generator.encode_labelled(batch, labels)
    fresh = generator.sample_latents(range(len(batch)))
    rows = [list(batch)]
    for first in range(len(latents), 0, -1):
        rows.append(list(generator([*latents[:first], *fresh[first:]], labels)))
    _save_doubled(rows, path)


def draw_nearest(queries: Tensor, matches: Tensor, distances: Tensor, path: Path) -> None:
    """Draw samples above their nearest training images, in their order."""
    figure = Figure(figsize=(0.85 * len(queries), 2.1), layout="constrained")
    axes = figure.subplots(2, len(queries))
    for column, (query, match, distance) in enumerate(zip(queries, matches, distances.tolist(), strict=True)):
        for ax, image in zip(axes[:, column], (query, match), strict=True):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"{distance:.2f}", fontsize=8)
    axes[0, 0].set_ylabel("sample", fontsize=8)
    axes[1, 0].set_ylabel("nearest", fontsize=8)
    save_figure(figure, path)


# -- the measurement -----------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """A generator, what it is measured by, and what all of its figures share."""

    generator: MLVGM
    model: Classifier
    train: Labelled
    test: Labelled
    samples: int  # to measure the fidelity on
    pairs: int  # of anchor and positive, for the class-keeping shares; at most as many as samples
    seed: int  # of the samples and the noise
    grids: Path | None  # folder for pictures; None for none
    progress: Progress

    @property
    def vae(self) -> NVAE | None:
        """The generator, if it can encode and has a likelihood."""
        return self.generator if isinstance(self.generator, NVAE) else None

    def report(self) -> dict[str, Any]:
        """Measure everything, draw the grids, and return all figures."""
        with _stage(self.progress, "real images", len(self.train.images) + len(self.test.images)) as advance:
            real_train = judge(self.model, self.train.images, advance)
            real_test = judge(self.model, self.test.images, advance)
        fidelity, latents, images, judged = self._fidelity(real_train, real_test)
        levels = self._levels(latents, images, judged)
        memorisation = self._memorisation(images)
        if self.grids is not None:
            # Latents that are not truncated are a VAE's or a sampler's noises, which a fresh draw moves.
            resample = self.generator.truncation is None
            draw_samples(images, self.grids / "samples.png")
            if isinstance(self.generator, NVAE | SemafoVAE | DiffusionGenerator):
                labels = self.test.labels if self.generator.num_classes else None
                path = self.grids / "reconstructions.png"
                draw_reconstructions(self.generator, self.test.images, path, labels)
            path = self.grids / "levels.png"
            draw_levels(self.generator, latents, self.seed, path, resample=resample, labels=self.labels)
        return {
            "classifier": {
                "test_accuracy": accuracy(real_test, self.test.labels),
                "train_accuracy": accuracy(real_train, self.train.labels),
                "feature_dims": real_train.features.shape[1],
            },
            "fidelity": fidelity,
            "frechet_floor": self._frechet_floor(real_train, real_test),
            "levels": {
                "normal": "z + N(0, 1) truncated at 2",
                "resample": "a fresh draw of the anchor's distribution",
                "table": levels,
            },
            "memorisation": memorisation,
        } | self._likelihood()

    def _fidelity(
        self, real_train: Judged, real_test: Judged
    ) -> tuple[dict[str, Any], list[Tensor], Tensor, Judged]:
        """Compare samples with real images.

        Returns:
            The figures; and latents, images and classes of the anchors, which other figures use.
        """
        to_train, to_test = gaussian(real_train.features), gaussian(real_test.features)
        figures = {"test": class_figures(real_test), "train": class_figures(real_train)}
        figures["test"]["frechet_to_train"] = frechet_distance(to_test, to_train)

        anchors = self._samples("anchors", self.generator.truncation)
        samples = {"anchors": (self.generator.truncation, anchors)}
        # Beside the anchors, samples of the full prior, or truncated ones if the anchors are not (but no
        # truncated noises for a diffusion model: its network knows white noise only).
        if self.generator.truncation is not None:
            samples["prior"] = (None, self._samples("prior", None))
        elif not isinstance(self.generator, DiffusionGenerator):
            samples["truncated"] = (SHIFT.truncation, self._samples("truncated", SHIFT.truncation))
        for name, (truncation, (_, _, judged)) in samples.items():
            features = gaussian(judged.features)
            figures[name] = {
                "truncation": truncation,
                **self._agreement(judged),
                **class_figures(judged),
                "frechet_to_train": frechet_distance(features, to_train),
                "frechet_to_test": frechet_distance(features, to_test),
            }
        return figures, *anchors

    @functools.cached_property
    def labels(self) -> Tensor | None:
        """The samples' labels, for a class-conditional generator."""
        if not self.generator.num_classes:
            return None
        return self.generator.sample_labels(range(self.samples), self.seed)

    def _agreement(self, judged: Judged) -> dict[str, Any]:
        """Return how many samples the classifier takes for their label, in all and by class."""
        if self.labels is None:
            return {}
        right = (judged.probabilities.argmax(1) == self.labels).double()
        counts = torch.bincount(self.labels, minlength=len(CLASSES)).clamp(min=1)
        by_class = torch.bincount(self.labels, right, minlength=len(CLASSES)) / counts
        shares = dict(zip(CLASSES, by_class.tolist(), strict=True))
        return {"agreement": right.mean().item(), "agreement_by_class": shares}

    def _samples(self, name: str, truncation: float | None) -> tuple[list[Tensor], Tensor, Judged]:
        """Return latents, images and classes of samples of a truncated prior."""
        with _stage(self.progress, f"samples: {name}", 2 * self.samples) as advance:
            latents = self.generator.sample_latents(range(self.samples), self.seed, truncation=truncation)
            images = render(self.generator, latents, self.labels, advance)
            return latents, images, judge(self.model, images, advance)

    def _frechet_floor(self, real_train: Judged, real_test: Judged) -> dict[str, Any]:
        """Return the Fréchet distances of real images to real images."""
        size = min(self.samples, len(self.test.images), len(self.train.images) // 2)
        first = gaussian(real_train.features[:size])
        second = gaussian(real_train.features[size : 2 * size])
        return {
            "images_per_side": size,
            "train_to_test": frechet_distance(first, gaussian(real_test.features[:size])),
            "train_to_train": frechet_distance(first, second),
        }

    def _levels(self, latents: list[Tensor], images: Tensor, judged: Judged) -> list[dict[str, Any]]:
        """Return the figures of the levels, on the first anchors."""
        pairs = min(self.samples, self.pairs)
        anchors = [z[:pairs] for z in latents]
        with _stage(self.progress, "levels", 4 * pairs * (len(self.generator.levels) + 1)) as advance:
            return level_figures(
                self.generator,
                self.model,
                anchors,
                _of(self.labels, slice(pairs)),
                images[:pairs],
                judged.first(pairs),
                self.seed,
                advance,
            )

    def _memorisation(self, images: Tensor) -> dict[str, Any]:
        """Compare how far samples, and real test images, are from the training images."""
        train = self.train.images
        with _stage(self.progress, "nearest images", 2 * len(train)) as advance:
            queries = images[:QUERIES]
            distances, indices = nearest(queries, train, advance)
            test_distances, _ = nearest(self.test.images[:QUERIES].float() / 255, train, advance)
        if self.grids is not None:
            closest = distances.argsort()[:10]
            matches = train[indices[closest]].float() / 255
            draw_nearest(queries[closest], matches, distances[closest], self.grids / "nearest.png")
        near, far = distance_figures(distances), distance_figures(test_distances)
        return {
            "queries": len(queries),
            "training_images": len(train),
            "samples": near,
            "test": far,
            "ratio": {key: near[key] / far[key] for key in near},
        }

    def _likelihood(self) -> dict[str, Any]:
        """Return the figures that a VAE has besides; nothing of another generator."""
        vae, images = self.vae, self.test.images
        if vae is None:
            return {}
        with _stage(self.progress, "likelihood", len(images)) as advance:
            figures = likelihood_figures(vae, images, self.seed, advance)
        return {"temperature": vae.temperature, "likelihood": figures}


@contextmanager
def _stage(progress: Progress, name: str, total: int) -> Iterator[Advance]:
    """Show a bar for a part of the work; it is full at the end."""
    task = progress.add_task(name, total=total)
    yield lambda count: progress.advance(task, count)
    progress.update(task, completed=total)


# -- command -------------------------------------------------------------------------------------------------


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


def summary(report: dict[str, Any]) -> list[Table]:
    """Return the report's main figures as tables."""
    tables = [
        _fidelity_table(report["fidelity"]),
        _level_table(report["levels"]["table"]),
        _memorisation_table(report["memorisation"]),
    ]
    if "likelihood" in report:
        tables.append(_likelihood_table(report["likelihood"]))
    return tables


def _fidelity_table(fidelity: dict[str, Any]) -> Table:
    """Return a row for each set of images."""
    table = Table("images", "confidence", "entropy", "Fréchet to train", "to test", title="Fidelity")
    for name, row in fidelity.items():
        keys = ("frechet_to_train", "frechet_to_test")
        distances = [f"{row[key]:.3f}" if key in row else "" for key in keys]
        table.add_row(
            name, f"{row['confidence']:.3f}", f"{row['entropy_of_mean_prediction']:.4f}", *distances
        )
    return table


def _level_table(levels: list[dict[str, Any]]) -> Table:
    """Return a row for each set of levels that is moved."""
    kinds = [kind for kind in ("normal", "resample") if kind in levels[0]]
    titles = [f"{figure}: {kind}" for figure in ("class kept", "pixel change") for kind in kinds]
    table = Table("level", *titles, title="Levels")
    for row in levels:
        shares = [f"{row[kind]['class_kept']:.1%}" for kind in kinds]
        changes = [f"{row[kind]['pixel_change']:.4f}" for kind in kinds]
        table.add_row(f"{row['level']} ({row['name']})", *shares, *changes)
    return table


def _memorisation_table(memorisation: dict[str, Any]) -> Table:
    """Return the quantiles of the distances, and their ratios."""
    table = Table("distance to nearest training image", "mean", "1 %", "5 %", "median", title="Memorisation")
    for name in ("samples", "test", "ratio"):
        figures = memorisation[name]
        keys = ("mean", "quantile_01", "quantile_05", "median")
        table.add_row(name, *(f"{figures[key]:.3f}" for key in keys))
    return table


def _likelihood_table(likelihood: dict[str, Any]) -> Table:
    """Return the bound and the errors of the reconstructions, in one row."""
    title = "Likelihood, and reconstruction of real test images"
    table = Table("bits per dimension", "error (MSE)", "PSNR, dB", title=title)
    errors = likelihood["reconstruction"]
    bits = likelihood["bits_per_dimension"]
    table.add_row(f"{bits:.3f}", f"{errors['mse']:.5f}", f"{errors['psnr']:.1f}")
    return table


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
    with _stage(progress, "classifier", EPOCHS * len(train.images)) as advance:
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
