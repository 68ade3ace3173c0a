"""What StyleGANs share: the mapping network from Z to W, linear layers, and levels as runs of styles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import integer, is_number
from mlviews.generators.stylegan.regions import Span
from mlviews.levels import distinct

GAIN = math.sqrt(2)  # of every leaky ReLU
SLOPE = 0.2  # of every leaky ReLU, below 0


class MappingNetwork(nn.Module):
    """The network that maps Z to W: ``z [B, z_dim], labels int64 [B] or None -> w [B, layers[-1]]``.

    Args:
        z_dim: values of a z.
        layers: outputs of each layer; the last one is w's.
        psi: moves w towards the mean w, the buffer ``average`` (1: not at all; 0: all the way).
        num_classes: number of classes; 0 for a network that takes no labels.
        label_dim: values of a class's embedding.
        label_normalized: whether z is normalized apart from the embedding (StyleGAN2-ADA), or both together.
        class_means: whether each class has a mean w (StyleGAN-XL); ``average`` is then ``[classes, w]``.
    """

    average: Tensor

    def __init__(
        self,
        z_dim: int,
        layers: Sequence[int],
        psi: float,
        *,
        num_classes: int = 0,
        label_dim: int = 0,
        label_normalized: bool = True,
        class_means: bool = False,
    ) -> None:
        super().__init__()
        self.psi = psi
        self.label_normalized = label_normalized
        self.embedding: nn.Embedding | None = None
        widths = [z_dim, *layers]
        if num_classes:
            self.embedding = nn.Embedding.from_pretrained(random_normal(num_classes, label_dim))
            widths[0] += label_dim
        self.layers = nn.ModuleList(Linear(before, after) for before, after in pairwise(widths))
        self.class_means = class_means
        means = (num_classes, widths[-1]) if class_means else (widths[-1],)
        self.register_buffer("average", torch.zeros(means))

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        x = normalized(z) if self.label_normalized else z
        if self.embedding is not None:
            # The embedding was normalized when it was read, if it is normalized on its own.
            x = torch.cat([x, self.embedding(labels)], dim=1)  # [B, z_dim + label_dim]
        if not self.label_normalized:
            x = normalized(x)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE) * GAIN
        if self.psi == 1:
            return x
        return torch.lerp(self.average[labels] if self.class_means else self.average, x, self.psi)

    def by_level(self, latents: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Return each level's w ``[B, w_dim]`` of its z; levels that hold one tensor share one w."""
        tensors, places = distinct(latents)
        repeated = None if labels is None else labels.repeat(len(tensors))
        with full_precision(latents[0]):
            w = self(torch.cat(tensors), repeated)  # [tensors * B, w_dim]
        parts = w.chunk(len(tensors))
        return [parts[place] for place in places]


class Linear(nn.Linear):
    """A linear map, float ``[B, i] -> [B, o]``, whose initial weights are N(0, 1 / i).

    These are what the papers' runtime gain leaves of N(0, 1).
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))
            nn.init.zeros_(self.bias)


def normalized(x: Tensor) -> Tensor:
    """Return ``[B, n]`` scaled to a second moment of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def random_normal(*shape: int) -> Tensor:
    """Return draws from N(0, 1).

    On the meta device, where a draw has no result but costs seconds of imports, nothing is drawn.
    """
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_()


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the tensor's device; layers choose their precision themselves."""
    return torch.autocast(x.device.type, enabled=False)


def working_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of activations: autocast's, if it is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def check_psi(truncation_psi: Any) -> None:
    """Raise a ValueError unless a truncation towards the mean w is a number from 0 to 1."""
    if not (is_number(truncation_psi) and 0 <= truncation_psi <= 1):
        raise ValueError(
            f"Invalid truncation_psi={truncation_psi!r}: it must be a number from 0 (always the mean image) "
            "to 1 (no truncation)."
        )


def style_runs(styles: int, groups: int | None) -> list[Span]:
    """Return the run of styles of each level.

    Args:
        styles: number of styles.
        groups: number of levels; the runs are as even as possible, longer ones first. None: one level per
            style.

    Raises:
        ValueError: unless there are from 1 to ``styles`` groups.
    """
    count = styles if groups is None else integer("groups", groups, 1, styles)
    size, longer = divmod(styles, count)
    starts = [group * size + min(group, longer) for group in range(count + 1)]
    return [Span(start, stop) for start, stop in pairwise(starts)]


def run_name(run: Span) -> str:
    """Return a level's name, which counts styles from 1."""
    return f"style {run.start + 1}" if run.length == 1 else f"styles {run.start + 1}-{run.stop}"
