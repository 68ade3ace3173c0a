"""How an inverter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlviews import checks
from mlviews.checks import integer, is_number, positive
from mlviews.sampling import TruncatedNormal, check_seed


@dataclass
class InverterOptions:
    """How an inverter is trained. Values are checked when it is made."""

    batch: int = 64  # images of a step, over all processes
    steps: int = 20_000  # at most
    pair_steps: int = 5_000  # of them on pairs alone, before real images join; without images all are
    pairs: int | None = None  # of a batch that stay pairs once real images have joined; None: a quarter
    lr: float = 2e-3  # AdamW's largest rate
    decay_from: float = 0.4  # share of the steps after which the rate falls along a line
    average: float = 0.995  # share of the moving average of the weights that a step keeps
    latent: float = 0.1  # weight of the error of the latents of pairs
    image: float = 1.0  # weight of the error of the reconstructed image, pixel by pixel
    feature: float = 0.1  # weight of its error in the features of a fixed random network
    pull: float = 0.005  # weight of the pull of real images' latents to the prior
    width: int = 48  # channels of the inverter at 16 pixels
    blocks: int = 1  # residual blocks of the inverter at each resolution
    hidden: int = 256  # scalars that the inverter's heads read
    dtype: str | None = None  # "bfloat16" or "float16" for autocast; None for float32
    # Law of the pairs; None: N(0, 1), truncated as the generator prefers.
    anchor: TruncatedNormal | None = None
    held_out: int = 1_000  # real images to evaluate on, at most a fifth of them
    evaluation: int = 512  # pairs to evaluate on
    evaluate_every: int = 250  # steps between evaluations, at which the checkpoint is replaced too
    patience: int = 20  # evaluations without a better one after which the run ends
    tolerance: float = 0.002  # share by which an evaluation has to be lower to count as a better one
    seed: int = 0  # of the pairs, the order of the images and the first weights
    resume: bool = True  # go on from the checkpoint
    progress: bool = True  # show a bar

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "width", "blocks", "hidden", "held_out", "evaluation"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        self.evaluate_every = integer("evaluate_every", self.evaluate_every, 1)
        self.patience = integer("patience", self.patience, 1)
        self.pair_steps = integer("pair_steps", self.pair_steps, 0)
        pairs = self.batch // 4 if self.pairs is None else self.pairs
        self.pairs = integer("pairs", pairs, 0, self.batch - 1)
        self.lr = positive("lr", self.lr)
        self.image = positive("image", self.image)
        for name in ("latent", "feature", "pull"):
            setattr(self, name, _at_least_0(name, getattr(self, name)))
        for name in ("decay_from", "average", "tolerance"):
            value = _at_least_0(name, getattr(self, name))
            if value >= 1:
                raise ValueError(f"Invalid {name}={value!r}: it must be a number from 0 to below 1.")
            setattr(self, name, value)
        self.seed = check_seed(self.seed)
        checks.flag("resume", self.resume)
        checks.flag("progress", self.progress)


SILENT = ("resume", "progress")
"""Options that do not change what is trained."""


def _at_least_0(name: str, value: Any) -> float:
    """Return the value as a float if it is a number of at least 0; else raise a ValueError."""
    if not is_number(value) or value < 0:
        raise ValueError(f"Invalid {name}={value!r}: it must be a number of at least 0.")
    return float(value)
