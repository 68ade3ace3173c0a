"""Purification of attacked images by a generator (Serez et al. 2025, "Pretrained Multiple Latent Variable
Generative Models are good defenders against Adversarial Attacks").

An image is encoded; its coarse levels, which say what it shows, are kept; its fine ones, in which an
adversarial perturbation may hide, are mixed with noise or drawn anew; and it is decoded. Whether that makes a
classifier robust has to be measured, by attacks that know of it: see ``mlviews/latents/README.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlviews import sampling
from mlviews.checks import choice, integer, is_number
from mlviews.generators.base import MLVGM
from mlviews.levels import Blend, level_indices
from mlviews.sampling import TruncatedNormal, check_epoch, check_seed

Classifier = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` to logits ``[B, classes]``."""

BLENDS: dict[str, Callable[[float], Blend]] = {
    "variance": lambda rate: Blend(math.sqrt(1 - rate**2), rate),
    "linear": lambda rate: Blend(1 - rate, rate),
}
"""How a mixing rate becomes the shares of the image and of the noise."""


class Purifier(nn.Module):
    """Images to purified images, differentiably.

    Its noise is a function of (seed, epoch, index of the image, copy, level). So a purifier gives the same
    result for the same images until ``epoch`` changes: an attacker who knows the seed has the exact gradient,
    and a defender draws afresh by one argument. :meth:`defend` does so at every call.

    Args:
        generator: a generator that encodes: by an encoder of its own (NVAE) or an inverter. It is frozen.
        keep: how many of the coarse levels are kept as they are encoded, from 0 to all.
        mix: the mixing rates of the finer levels, from 0 (kept) to 1 (drawn anew): one for all of them, or a
            mapping from levels (an index, a name, ``"start:stop"``) to rates, kept ones included. None: 1.
        samples: how many purified copies :meth:`copies`, :meth:`logits` and :meth:`predict` make of an image,
            at most 4095.
        seed: of the noise, an integer in ``[0, 2**64)``.
        blend: "variance": ``sqrt(1 - rate^2) z + rate w``, which keeps the prior's variance; "linear":
            ``(1 - rate) z + rate w``, which is the paper's.

    Raises:
        ValueError: if the generator cannot encode, a level is not there, or a value is out of range.
    """

    def __init__(
        self,
        generator: MLVGM,
        keep: int = 1,
        mix: float | Mapping[int | str, float] | None = None,
        samples: int = 8,
        seed: int = 0,
        *,
        blend: str = "variance",
    ) -> None:
        super().__init__()
        generator.check_encodes()
        self.generator = generator.freeze()
        self.keep = integer("keep", keep, 0, len(generator.levels))
        self.samples = integer("samples", samples, 1, sampling.MAX_VIEWS - 1)
        self.seed = check_seed(seed)
        self.blend = choice("blend", blend, BLENDS, problem="Invalid")
        self.rates = self._rates(mix)
        self.blends = tuple(BLENDS[blend](rate) for rate in self.rates)
        self._plan: sampling.Draw | None = None

    def _rates(self, mix: float | Mapping[int | str, float] | None) -> tuple[float, ...]:
        """Return the mixing rate of every level."""
        levels = self.generator.levels
        rates: list[Any] = [0.0] * self.keep + [1.0] * (len(levels) - self.keep)
        if isinstance(mix, Mapping):
            for key, rate in mix.items():
                for index in level_indices(key, levels):
                    rates[index] = rate
        elif mix is not None:
            rates[self.keep :] = [mix] * (len(levels) - self.keep)
        for rate in rates:
            if not is_number(rate) or not 0 <= rate <= 1:
                raise ValueError(
                    f"Invalid mix={rate!r}: give a rate from 0 (kept) to 1 (drawn anew), or a mapping from "
                    "levels to rates."
                )
        return tuple(float(rate) for rate in rates)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        indices: Iterable[int] | Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Return one purified copy of each image, the first of :meth:`copies`.

        Args:
            images: as for :meth:`copies`.
            labels: as for :meth:`copies`.
            indices: as for :meth:`copies`.
            epoch: as for :meth:`copies`.

        Returns:
            Float32 ``[B, C, H, W]`` in [0, 1].
        """
        return self.copies(images, labels, count=1, indices=indices, epoch=epoch)[0]

    def copies(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        count: int | None = None,
        indices: Iterable[int] | Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Return purified copies of each image, with independent noise.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.
            labels: int64 ``[B]`` for a class-conditional generator, else None.
            count: the number of copies, at most ``samples``; None for ``samples``.
            indices: the images' ``B`` indices in ``[0, 2**32)``, on which their noise depends; None: 0, 1...
            epoch: an integer in ``[0, 2**32)``; every epoch has noise of its own.

        Returns:
            Float32 ``[count, B, C, H, W]`` in [0, 1].

        Raises:
            ValueError: if the images do not fit the generator, the indices are not as many as the images, or
                a value is out of range.
        """
        count = self.samples if count is None else integer("count", count, 1, self.samples)
        rows = len(images)
        numbers = sampling.as_indices(range(rows) if indices is None else indices, self.generator.device)
        if len(numbers) != rows:
            raise ValueError(f"Got {len(numbers)} indices for {rows} images: give one of each.")
        noise = self._noise(numbers, epoch, count)
        purified: Tensor = self.generator.regenerate(images, self.blends, noise, labels)
        if len(purified) == rows:  # without noise all copies are equal
            return purified.expand(count, *purified.shape)
        return purified.view(count, rows, *purified.shape[1:])

    def logits(
        self, classifier: Classifier, images: Tensor, labels: Tensor | None = None, **draw: Any
    ) -> Tensor:
        """Return a classifier's logits ``[B, classes]``, the mean over the purified copies.

        Args:
            classifier: takes images ``[samples * B, C, H, W]`` in [0, 1] and returns logits.
            images: as for :meth:`copies`.
            labels: as for :meth:`copies`: the generator's, not the classifier's.
            draw: ``indices`` and ``epoch``, as for :meth:`copies`.
        """
        return self._votes(classifier, images, labels, **draw).mean(dim=0)

    def predict(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        vote: str = "mean",
        **draw: Any,
    ) -> Tensor:
        """Return the classes that a classifier sees in the purified copies, int64 ``[B]``.

        Args:
            classifier: as for :meth:`logits`.
            images: as for :meth:`copies`.
            labels: as for :meth:`copies`.
            vote: "mean": the class of the mean logits; "majority": the class of most copies, of equally many
                that of the larger mean logit.
            draw: ``indices`` and ``epoch``, as for :meth:`copies`.
        """
        choice("vote", vote, ("mean", "majority"), problem="Invalid")
        votes = self._votes(classifier, images, labels, **draw)  # [copies, B, classes]
        mean = votes.mean(dim=0)
        if vote == "mean":
            return mean.argmax(dim=1)
        counts = F.one_hot(votes.argmax(dim=2), votes.shape[2]).sum(dim=0)
        fewer = counts < counts.amax(dim=1, keepdim=True)  # [B, classes]
        return mean.masked_fill(fewer, -math.inf).argmax(dim=1)

    def defend(self, classifier: nn.Module, *, fresh: bool = True) -> Defended:
        """Return the classifier behind this purifier as one module, for attacks and evaluations.

        Args:
            classifier: as for :meth:`logits`.
            fresh: whether every call and image has new noise. Else all have the noise of image 0 in epoch 0:
                a deterministic classifier, as before an attacker who knows the seed.
        """
        return Defended(self, classifier, fresh)

    def extra_repr(self) -> str:
        return f"rates={self.rates}, samples={self.samples}, seed={self.seed}, blend={self.blend!r}"

    def _votes(self, classifier: Classifier, images: Tensor, labels: Tensor | None, **draw: Any) -> Tensor:
        """Return the logits of all copies, ``[copies, B, classes]``."""
        purified = self.copies(images, labels, **draw)
        votes = classifier(purified.flatten(0, 1))
        return votes.view(*purified.shape[:2], -1)

    def _noise(self, indices: Tensor, epoch: int, count: int) -> list[Tensor | None]:
        """Return noise ``[count * B, *level.shape]`` for every level that takes some."""
        generator = self.generator
        if self._plan is None or self._plan.device != generator.device:
            law = TruncatedNormal(1.0, generator.truncation)
            levels = self._drawn_levels()
            fields: dict[sampling.Name, sampling.Field] = {}
            for copy in range(1, self.samples + 1):
                fields |= generator.noise_fields(law, copy, levels)
            self._plan = sampling.Draw(fields, generator.device)
        drawn = self._plan(indices, self.seed, check_epoch(epoch))
        noise: list[Tensor | None] = [None] * len(generator.levels)
        for level in self._drawn_levels():
            noise[level] = torch.cat([generator.noise_of(drawn, copy, level) for copy in range(1, count + 1)])
        if generator.tied:  # its levels share one draw
            noise = [noise[self._drawn_levels()[0]] if blend.noise else None for blend in self.blends]
        return noise

    def _drawn_levels(self) -> list[int]:
        """Return the levels whose noise is drawn: of a tied generator the first that takes any."""
        levels = self.generator.noisy_levels(self.blends)
        return levels[:1] if self.generator.tied else levels


class Defended(nn.Module):
    """A classifier behind a purifier: images to mean logits; see :meth:`Purifier.defend`."""

    def __init__(self, purifier: Purifier, classifier: nn.Module, fresh: bool = True) -> None:
        super().__init__()
        self.purifier, self.classifier, self.fresh = purifier, classifier, fresh
        self.epoch = 0
        """Of the next call's noise."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.fresh:
            indices = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            return self.purifier.logits(self.classifier, images, indices=indices)
        epoch = self.epoch
        self.epoch += 1
        return self.purifier.logits(self.classifier, images, epoch=epoch)
