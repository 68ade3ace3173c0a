"""Where anchors come from: which samples an epoch has, in which order, and what their latents and labels are.

A step (:mod:`mlviews.step`) asks the anchors of its source for three things: the samples of a range of the
epoch, the epoch that their latents are drawn in, and the latents themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mlviews import sampling
from mlviews.generators.base import MLVGM
from mlviews.perturb import Normal
from mlviews.sampling import Field, TruncatedNormal


class Prior:
    """Anchors that are drawn from the prior: new ones for every sample of every epoch (paper, sec. 3.3).

    Args:
        generator: the generator whose levels are drawn.
        law: the law of every scalar; None: N(0, 1) with the truncation that the generator prefers.

    Raises:
        ValueError: if the law is no normal.
    """

    endless = True
    """Whether an epoch's samples are its own. If so they come in the order of their indices."""

    def __init__(self, generator: MLVGM, law: TruncatedNormal | None = None) -> None:
        self.generator = generator
        self.law = Normal(1.0, generator.truncation) if law is None else law
        if not isinstance(self.law, TruncatedNormal):
            raise ValueError(f"Invalid anchor={law!r}: it must be a perturb.Normal(std, truncation, mean).")

    def indices(self, start: int, stop: int, seed: int, epoch: int, device: torch.device) -> Tensor:
        """Return the global indices of the epoch's samples in these places, int64 ``[stop - start]``."""
        return torch.arange(start, stop, device=device)

    def latent_epoch(self, epoch: int) -> int:
        """Return the epoch of the counter streams that latents and noise are drawn in."""
        return epoch

    def fields(self) -> dict[sampling.Name, Field]:
        """Name what to draw for the anchors of a batch."""
        return {**self.generator.anchor_fields(self.law), **self.generator.label_fields()}

    def __call__(self, drawn: Mapping[sampling.Name, Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Return a tensor ``[B, *level.shape]`` per level, and int64 labels ``[B]`` if there are classes."""
        labels = self.generator.labels_of(drawn) if self.generator.num_classes else None
        return self.generator.anchor_latents(drawn), labels


class Pool(Prior):
    """A finite set of anchors: every epoch has the same ones, index by index, in a new order.

    Args:
        generator: the generator whose levels are drawn.
        law: the law of every scalar; None: N(0, 1) with the truncation that the generator prefers.
        size: the number of samples.
    """

    endless = False

    def __init__(self, generator: MLVGM, law: TruncatedNormal | None, size: int) -> None:
        super().__init__(generator, law)
        self.size = size
        self._order: tuple[tuple[int, int, torch.device], Tensor] | None = (
            None  # of one epoch, as long as it lasts
        )

    def indices(self, start: int, stop: int, seed: int, epoch: int, device: torch.device) -> Tensor:
        key = seed, epoch, device
        if self._order is None or self._order[0] != key:
            with torch.inference_mode(False):  # it is kept, and may be needed outside
                self._order = key, sampling.permutation(self.size, seed, epoch, device)
        return self._order[1][start:stop].clone()  # a layout may work in place

    def latent_epoch(self, epoch: int) -> int:
        return 0


class Sampler:
    """Anchors and noise of given samples, as a source with this seed and law draws them: for measurements.

    Args:
        generator: the generator to draw for.
        law: the law of the anchors; None: N(0, 1) with the truncation that the generator prefers.
        seed: an integer in ``[0, 2**64)``.

    Raises:
        ValueError: if the law is no normal.
    """

    def __init__(self, generator: MLVGM, law: TruncatedNormal | None, seed: int) -> None:
        self.generator, self.seed = generator, seed
        self.law = Prior(generator, law).law

    def __call__(self, indices: Iterable[int], epoch: int) -> tuple[list[Tensor], Tensor | None]:
        """Return latents of every level, and labels for a class-conditional generator."""
        law, generator = self.law, self.generator
        latents = generator.sample_latents(
            indices, self.seed, epoch, mean=law.mean, std=law.std, truncation=law.truncation
        )
        labels = generator.sample_labels(indices, self.seed, epoch) if generator.num_classes else None
        return latents, labels

    def noise(
        self, indices: Iterable[int], law: TruncatedNormal, epoch: int, levels: Sequence[int], view: int = 1
    ) -> list[Tensor]:
        """Return the noise of some levels of a view."""
        return self.generator.sample_noise(indices, law, self.seed, epoch, view=view, levels=levels)
