"""The sources of views that ``benchmarks/probe.py`` compares: the rows of its tables, and the pairs whose
differences it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from record import SCORES
from torch import Tensor

from mlviews import MLViewSource
from mlviews.config import source_arguments
from mlviews.perturb import Perturber
from mlviews.sampling import TruncatedNormal
from mlviews.transforms import Augmentation, build

Config = dict[str, Any]

AS_IT_IS = Augmentation(size=28, scale=None, flip=0.0)


def centre(images: Tensor) -> Tensor:
    """Return the 28 pixels that Fashion-MNIST's images have, of the generators' 32: no T_x."""
    return AS_IT_IS(images[..., 2:-2, 2:-2], range(len(images)), seed=0, epoch=0, view=0)


TRANSFORMS: dict[str, Any] = {
    "none": centre,
    "crop": build({"name": "simclr", "size": 28, "color": False}),  # and flip
    "full": build({"name": "simclr", "size": 28, "color": True}),  # of gray images: brightness and contrast
    # The full one with crops of 60 % of the area and more.
    "gentle": build({"name": "custom", "size": 28, "scale": [0.6, 1.0], "jitter": [0.4, 0.4, 0.0, 0.0]}),
}


class Borrowed(Perturber):
    """``T(z) = z + p(z')`` with a fresh ``z'``: a walker's shifts, drawn like noise and not a function of the
    anchor.
    """

    def __init__(self, walker: Perturber) -> None:
        self.walker = walker

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal:
        return anchor

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        fresh = noise or ()
        moved = self.walker(fresh, None)
        return [z + after - before for z, before, after in zip(latents, fresh, moved, strict=True)]


class InFewDirections(Perturber):
    """Noise of the same mean square, in few directions of its levels together, drawn once for all anchors."""

    def __init__(self, noisy: Perturber, directions: int = 4) -> None:
        self.noisy, self.directions = noisy, directions

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal | None:
        return self.noisy.law(anchor)

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        flat = [values.flatten(1) for values in noise or ()]
        widths = [values.shape[1] for values in flat]
        directions = torch.randn(sum(widths), self.directions, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(directions)[0].to(flat[0])  # [all scalars, directions]
        scale = (len(basis) / self.directions) ** 0.5
        projected = (torch.cat(flat, dim=1) @ basis @ basis.T * scale).split(widths, dim=1)
        return self.noisy(latents, [values.view_as(z) for values, z in zip(projected, latents, strict=True)])


WRAPPERS = {"borrowed": Borrowed, "few": InFewDirections}


class Source(NamedTuple):
    """A row of the tables: the table it belongs to, its T_x, and its configuration (None: real images)."""

    group: str
    transform: str
    config: Config | None


def normal(stds: dict[int | str, float]) -> Config:
    """Return the configuration of normal noise of these deviations on some levels."""
    return {
        "perturb": {levels: {"name": "normal", "std": std, "truncation": 2.0} for levels, std in stds.items()}
    }


POOR = {"generator": {"name": "fashion", "weights": "runs/fashion-poor/fashion.safetensors"}}
"""A generator trained for 40,000 images and not for 800,000:

``python -m mlviews.zoo.train fashion --data DIR --out runs/fashion-poor --images 40000 --bf16 --threads 1``;
its rows are left out if the file is missing.
"""
NONE, SINGLE, ML = ({"preset": f"fashion-{name}"} for name in ("none", "single-random", "ml-random"))
SINGLE_LEARNED, ML_LEARNED = {"preset": "fashion-single-learned"}, {"preset": "fashion-ml-learned"}
ML_DRAWN = {"preset": "fashion-ml-drawn"}
WIDE = {
    "preset": "fashion-ml-matched",
    "perturb": {0: {"name": "normal", "std": 0.3, "truncation": 2.0}, "1:": "resample"},
}
BORROWED = ML_LEARNED | {"wrap": "borrowed"}
FEW = ML | normal({"1:": 0.7}) | {"wrap": "few"}
NVAE = {"preset": "fashion-nvae-resample"}
NVAE_SINGLE = NVAE | normal({":": 0.1})
# Four passes of a U-Net an image, so every sample is shown four times (its price is in the tables of reuse).
STEPS_SINGLE, STEPS_RESAMPLE, STEPS_MIX = (
    {"preset": f"fashion-diffusion-{name}", "reuse": 4, "dtype": "bfloat16"}
    for name in ("single-random", "resample", "mix")
)

SOURCES: dict[str, Source] = {
    "raw pixels": Source("untrained", "", {}),
    "untrained encoder": Source("untrained", "", {}),
    # Tables 2 and 3, every source with the T_x that the paper gives it.
    "real, crop and flip": Source("sources", "crop", None),
    "real": Source("sources", "full", None),
    "none": Source("sources", "full", NONE),
    "single random": Source("sources", "full", SINGLE),
    "ML random": Source("sources", "crop", ML),
    "ML matched": Source("sources", "crop", {"preset": "fashion-ml-matched"}),
    "single learned": Source("sources", "full", SINGLE_LEARNED),
    "ML learned": Source("sources", "crop", ML_LEARNED),
    # Appendix E: T_x on top.
    "none, crop": Source("transforms", "crop", NONE),
    "single random, no T_x": Source("transforms", "none", SINGLE),
    "single random, crop": Source("transforms", "crop", SINGLE),
    "ML random, no T_x": Source("transforms", "none", ML),
    "ML random, full": Source("transforms", "full", ML),
    "real, gentle": Source("transforms", "gentle", None),
    "none, gentle": Source("transforms", "gentle", NONE),
    "single random, gentle": Source("transforms", "gentle", SINGLE),
    "ML random, gentle": Source("transforms", "gentle", ML),
    # Learned and random views with the same T_x; and what is between them, all of the learned views' extent:
    # noise, learned shifts that are another anchor's, noise in few directions.
    "single learned, gentle": Source("learned", "gentle", SINGLE_LEARNED),
    "ML learned, gentle": Source("learned", "gentle", ML_LEARNED),
    "ML learned, no T_x": Source("learned", "none", ML_LEARNED),
    # A walker that draws.
    "ML drawn": Source("drawn", "crop", ML_DRAWN),
    "ML drawn, gentle": Source("drawn", "gentle", ML_DRAWN),
    "ML drawn, no T_x": Source("drawn", "none", ML_DRAWN),
    "ML random of 0.55, crop": Source("learned", "crop", ML | normal({"1:": 0.55})),
    "ML borrowed, crop": Source("learned", "crop", BORROWED),
    "ML borrowed, no T_x": Source("learned", "none", BORROWED),
    "ML random of 0.7 in 4 directions, crop": Source("learned", "crop", FEW),
    "ML random of 0.7 in 4 directions, no T_x": Source("learned", "none", FEW),
    # How far to move, with no T_x beside it.
    "single random of 0.1": Source("magnitudes", "none", SINGLE | normal({":": 0.1})),
    "single random of 0.4": Source("magnitudes", "none", SINGLE | normal({":": 0.4})),
    "single random of 0.8": Source("magnitudes", "none", SINGLE | normal({":": 0.8})),
    "ML random of 0.5": Source("magnitudes", "none", ML | normal({"1:": 0.5})),
    "ML random of 2.0": Source("magnitudes", "none", ML | normal({"1:": 2.0})),
    "ML of 0.2 and 1.0": Source("magnitudes", "none", ML | normal({0: 0.2, "1:": 1.0})),
    "ML of 0.3 and drawn afresh, gentle": Source("magnitudes", "gentle", WIDE),
    # How good the generator is.
    "poor generator, none, gentle": Source("quality", "gentle", NONE | POOR),
    "poor generator, single random": Source("quality", "none", SINGLE | POOR),
    "poor generator, ML random": Source("quality", "none", ML | POOR),
    # Table 4 (app. F): an NVAE's finest scale drawn afresh, against noise on all of them.
    "NVAE, single random": Source("nvae", "full", NVAE_SINGLE),
    "NVAE, ML resample": Source("nvae", "crop", NVAE),
    "NVAE, single random, crop": Source("nvae", "crop", NVAE_SINGLE),
    "NVAE, ML resample, full": Source("nvae", "full", NVAE),
    # A sampler's late steps drawn afresh, or mixed as far as the sweep says, against a little of all steps.
    "diffusion, single random, gentle": Source("diffusion", "gentle", STEPS_SINGLE),
    "diffusion, single random, no T_x": Source("diffusion", "none", STEPS_SINGLE),
    "diffusion, ML resample, gentle": Source("diffusion", "gentle", STEPS_RESAMPLE),
    "diffusion, ML resample, no T_x": Source("diffusion", "none", STEPS_RESAMPLE),
    "diffusion, ML mix, gentle": Source("diffusion", "gentle", STEPS_MIX),
    "diffusion, ML mix, no T_x": Source("diffusion", "none", STEPS_MIX),
}
# Sec. 3.3: continuous sampling against a fixed set.
for transform, suffix in (("crop", ""), ("none", ", no T_x")):
    for count in (250, 1_000, 10_000, 60_000):
        pool = ML | {"pool": True, "num_samples": count}
        SOURCES[f"pool of {count:,}{suffix}"] = Source("pools", transform, pool)
    # Every sample serves so many of the training's steps.
    for times in (4, 16, 64):
        SOURCES[f"reuse {times}{suffix}"] = Source("reuse", transform, ML | {"reuse": times})
ENDLESS = {"crop": "ML random", "none": "ML random, no T_x"}  # what pools and reuse are compared with

METHODS = ("simclr", "simsiam", "byol")
TELLING = (
    "real, gentle",
    "none, gentle",
    "single random, gentle",
    "ML random, gentle",
)  # for SimSiam and BYOL
CELLS = [("simclr", name) for name in SOURCES] + [
    (method, name) for method in METHODS[1:] for name in TELLING
]

# One source less another, at the same seed: initial weights and the probe's labels are then the same.
PAIRS = (
    ("ML random", "single random"),
    ("ML random", "none"),
    ("ML random", "real"),
    ("ML random", "real, crop and flip"),
    ("single random", "none"),
    ("ML matched", "ML random"),
    ("ML matched", "real"),
    ("ML learned", "ML random"),
    ("ML learned", "single learned"),
    ("ML random", "none, crop"),
    ("ML random, full", "real"),
    ("ML random, full", "single random"),
    ("ML random, full", "none"),
    ("ML random, gentle", "real, gentle"),
    ("ML random, gentle", "single random, gentle"),
    ("ML random, gentle", "none, gentle"),
    ("single random, gentle", "none, gentle"),
    ("ML random, no T_x", "single random, no T_x"),
    ("ML random, no T_x", "real, gentle"),
    ("NVAE, ML resample", "NVAE, single random"),
    ("NVAE, ML resample, full", "NVAE, single random"),
    ("NVAE, ML resample", "NVAE, single random, crop"),
    ("diffusion, ML resample, gentle", "diffusion, single random, gentle"),
    ("diffusion, ML mix, gentle", "diffusion, single random, gentle"),
    ("diffusion, ML resample, no T_x", "diffusion, single random, no T_x"),
    ("diffusion, ML mix, no T_x", "diffusion, single random, no T_x"),
    ("diffusion, ML resample, gentle", "ML random, gentle"),
    ("diffusion, ML mix, gentle", "ML random, gentle"),
    ("diffusion, ML resample, no T_x", "ML random, no T_x"),
    ("diffusion, ML mix, no T_x", "ML random, no T_x"),
    ("ML learned, gentle", "ML random, gentle"),
    ("ML learned, gentle", "single learned, gentle"),
    ("ML learned, no T_x", "ML random, no T_x"),
    ("ML drawn", "ML random"),
    ("ML drawn", "ML learned"),
    ("ML drawn, gentle", "ML random, gentle"),
    ("ML drawn, gentle", "ML learned, gentle"),
    ("ML drawn, no T_x", "ML random, no T_x"),
    ("ML drawn, no T_x", "ML learned, no T_x"),
    ("ML learned", "ML random of 0.55, crop"),
    ("ML borrowed, crop", "ML learned"),
    ("ML borrowed, no T_x", "ML learned, no T_x"),
    ("ML borrowed, crop", "ML random of 0.55, crop"),
    ("ML borrowed, no T_x", "ML random of 0.5"),
    ("ML random of 0.7 in 4 directions, crop", "ML learned"),
    ("ML random of 0.7 in 4 directions, no T_x", "ML learned, no T_x"),
    ("ML random of 0.7 in 4 directions, crop", "ML random of 0.55, crop"),
    ("ML random of 0.7 in 4 directions, no T_x", "ML random of 0.5"),
    ("ML random of 0.5", "single random of 0.8"),
    ("poor generator, ML random", "poor generator, single random"),
    ("poor generator, ML random", "ML random, no T_x"),
    ("poor generator, ML random", "real, gentle"),
    *((ENDLESS[source.transform], name) for name, source in SOURCES.items() if source.group == "pools"),
    *((name, ENDLESS[source.transform]) for name, source in SOURCES.items() if source.group == "reuse"),
)
EXTENTS = (  # sources whose extent is on record
    "ML random",
    "ML random of 0.55, crop",
    "ML random of 0.5",
    "ML random of 0.7 in 4 directions, crop",
    "ML learned",
    "ML drawn, no T_x",
    "ML borrowed, crop",
)


class Comparison(NamedTuple):
    """What a benchmark compares."""

    sources: Mapping[str, Any]  # NamedTuples by their names
    cells: Sequence[tuple[str, str]]  # methods and sources, in the order of the tables
    pairs: Sequence[tuple[str, str]]  # sources whose difference is taken, seed by seed
    scores: Sequence[str]  # by name


FASHION = Comparison(SOURCES, CELLS, PAIRS, SCORES)


def generated(config: Config, **options: Any) -> MLViewSource:
    """Return a source from its configuration; what moves levels is wrapped if it says so (``wrap``, of
    WRAPPERS).
    """
    config = config | options
    wrapper = WRAPPERS.get(config.pop("wrap", None))
    arguments = source_arguments(config)
    if wrapper is not None:
        arguments["perturb"] = {
            levels: wrapper(perturber) if perturber.moves else perturber
            for levels, perturber in arguments["perturb"].items()
        }
    return MLViewSource(**arguments)


def extent(name: str) -> float:
    """Return the mean L2 distance of a positive's pixels, in [0, 1], from its anchor's, before T_x."""
    config = SOURCES[name].config or {}
    (views,) = generated(config, transform=None, batch_size=2_000, num_samples=2_000, seed=0)
    return round(float((views[0] - views[1]).flatten(1).norm(dim=1).mean()), 3)
