"""The measurement of a generator against real images: all of its figures, and its pictures."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mlviews.evaluation.classifier import Classifier
from mlviews.evaluation.data import CLASSES, Labelled
from mlviews.generators import MLVGM
from mlviews.generators.diffusion import DiffusionGenerator
from mlviews.generators.nvae.network import NVAE
from mlviews.generators.semafo import SemafoVAE
from mlviews.zoo.quality.batches import Judged, judge, labels_of, render, stage
from mlviews.zoo.quality.figures import (
    SHIFT,
    accuracy,
    class_figures,
    distance_figures,
    frechet_distance,
    gaussian,
    level_figures,
    likelihood_figures,
    nearest,
)
from mlviews.zoo.quality.pictures import draw_levels, draw_nearest, draw_reconstructions, draw_samples

QUERIES = 1_000  # samples whose nearest training image is searched


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
        with stage(self.progress, "real images", len(self.train.images) + len(self.test.images)) as advance:
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
        with stage(self.progress, f"samples: {name}", 2 * self.samples) as advance:
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
        with stage(self.progress, "levels", 4 * pairs * (len(self.generator.levels) + 1)) as advance:
            return level_figures(
                self.generator,
                self.model,
                anchors,
                labels_of(self.labels, slice(pairs)),
                images[:pairs],
                judged.first(pairs),
                self.seed,
                advance,
            )

    def _memorisation(self, images: Tensor) -> dict[str, Any]:
        """Compare how far samples, and real test images, are from the training images."""
        train = self.train.images
        with stage(self.progress, "nearest images", 2 * len(train)) as advance:
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
        with stage(self.progress, "likelihood", len(images)) as advance:
            figures = likelihood_figures(vae, images, self.seed, advance)
        return {"temperature": vae.temperature, "likelihood": figures}
