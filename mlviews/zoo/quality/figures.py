"""Figures of a generator's quality: fidelity, levels, memorisation, and the likelihood that a VAE has."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlviews import sampling
from mlviews.evaluation.classifier import Classifier
from mlviews.evaluation.data import CLASSES
from mlviews.generators import MLVGM
from mlviews.generators.diffusion import DiffusionGenerator
from mlviews.generators.nvae.network import NVAE
from mlviews.zoo.quality.batches import BATCH, Advance, Judged, judge, labels_of

SHIFT = sampling.TruncatedNormal(1.0, 2.0)  # N^t(0, 1, 2), the paper's, as in the preset fashion-ml-random


# -- fidelity ------------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A Gaussian in float64."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


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
        states = generator.states(before, labels_of(labels, rows))  # blocks before the moved levels run once
        for (key, _, moved), kind in itertools.product(sets, positives):
            mixed = [positives[kind][level][rows] if level in moved else z for level, z in enumerate(before)]
            first = min(moved)
            images_after = generator.decode(mixed, labels_of(labels, rows), state=states[first], start=first)
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
