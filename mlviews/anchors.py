"""Where anchors come from: which samples an epoch has, in which order, and what their latents and labels are.

A step (:mod:`mlviews.step`) asks the anchors of its source for three things: the samples of a range of the
epoch, the epoch that their latents are drawn in, and the latents themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlviews import sampling
from mlviews.checks import choice, is_number
from mlviews.generators.base import MLVGM
from mlviews.images import ImageSet
from mlviews.perturb import Normal
from mlviews.sampling import Field, TruncatedNormal, Uniform


class Anchors(NamedTuple):
    """The anchors of one batch."""

    latents: list[Tensor]  # float32 [B, *level.shape] per level; empty if no view is decoded from them
    labels: Tensor | None  # int64 [B], what a class-conditional generator takes; None for all others
    targets: Tensor  # int64 [B], what a layout hands out; -1 where there is no class
    images: Tensor | None = None  # float32 [B, C, H, W] in [0, 1], the user's own; None for drawn anchors


class Samples(NamedTuple):
    """The samples of one batch."""

    indices: Tensor  # int64 [B], global sample indices, on the device
    numbers: list[int] | None = None  # of images that have to be decoded for them
    following: Sequence[int] = ()  # of those that the next batch will probably ask for


Places = range | Tensor
"""Places in an epoch: consecutive ones, or int64 ``[B]`` on the CPU."""


def placed(places: Places, device: torch.device) -> Tensor:
    """Return places as int64 ``[B]`` on the device."""
    if isinstance(places, range):
        return torch.arange(places.start, places.stop, device=device)
    if device.type == "cuda":
        places = places.pin_memory()
    return places.to(device, non_blocking=True)


ANCHOR_VIEWS = ("real", "reconstructed")


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

    def samples(self, places: Places, seed: int, epoch: int, device: torch.device) -> Samples:
        """Return the epoch's samples in these places."""
        return Samples(placed(places, device))

    def latent_epoch(self, epoch: int) -> int:
        """Return the epoch of the counter streams that latents and noise are drawn in."""
        return epoch

    def fields(self, num_views: int) -> dict[sampling.Name, Field]:
        """Name what to draw for the anchors of a batch, and for the choice of the views' origins."""
        return {**self.generator.anchor_fields(self.law), **self.generator.label_fields()}

    def __call__(self, samples: Samples, drawn: Mapping[sampling.Name, Tensor]) -> Anchors:
        """Return the anchors of these samples."""
        latents = self.generator.anchor_latents(drawn)
        if not self.generator.num_classes:
            return Anchors(latents, None, torch.full_like(samples.indices, -1))
        labels = self.generator.labels_of(drawn)
        return Anchors(latents, labels, labels)

    def origins(self, drawn: Mapping[sampling.Name, Tensor], view: int) -> Tensor | bool:
        """Say which images of a view are the user's own: all, none, or a mask, bool ``[B]``."""
        return False


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

    def order(self, seed: int, epoch: int, device: torch.device) -> Tensor:
        """Return the order of the samples in an epoch, int64 ``[size]``."""
        key = seed, epoch, device
        if self._order is None or self._order[0] != key:
            with torch.inference_mode(False):  # it is kept, and may be needed outside
                self._order = key, sampling.permutation(self.size, seed, epoch, device)
        return self._order[1]

    def samples(self, places: Places, seed: int, epoch: int, device: torch.device) -> Samples:
        return Samples(self.order(seed, epoch, device)[placed(places, device)])

    def latent_epoch(self, epoch: int) -> int:
        return 0


class Images(Pool):
    """The user's own images: their latents are what the generator's encoder makes of them.

    Every epoch has every image once, in a new order, and its positives are drawn anew. If there are more
    samples than images, images come again, each time as a sample of its own; if there are fewer, an epoch has
    a random part.

    Args:
        generator: the generator; it needs an encoder.
        law: the law that a :class:`~mlviews.perturb.Resample` draws from; None: that of the generator's
            anchors.
        images: the images.
        size: samples of an epoch.
        generated: the probability that a positive is the generator's, for each sample and positive; else it
            is the image itself.
        anchor_view: "real": view 0 is the image itself; "reconstructed": what the generator makes of its
            latents.
        pool: whether every epoch has the same positives.
        micro_batch_size: the most images that are encoded at once.

    Raises:
        ValueError: for a value out of range, or classes that are not the generator's.
    """

    def __init__(
        self,
        generator: MLVGM,
        law: TruncatedNormal | None,
        images: ImageSet,
        size: int,
        generated: float,
        anchor_view: str,
        pool: bool,
        micro_batch_size: int,
    ) -> None:
        # If there are fewer samples than images, an epoch is the first part of an order of all of them.
        super().__init__(generator, law, max(size, len(images)))
        self.pool, self.micro_batch_size = pool, micro_batch_size
        if not is_number(generated) or not 0 <= generated <= 1:
            raise ValueError(f"Invalid generated={generated!r}: it is a probability, from 0 to 1.")
        self.images, self.generated = images, float(generated)
        self.real_anchor = choice("anchor_view", anchor_view, ANCHOR_VIEWS, problem="Invalid") == "real"
        classes = generator.num_classes
        if classes and not (int(images.labels.min()) >= 0 and int(images.labels.max()) < classes):
            raise ValueError(
                f"The images have labels from {int(images.labels.min())} to {int(images.labels.max())}, but "
                "this "
                f"generator makes images of {classes} classes: each image needs a label in [0, {classes})."
            )
        self._labels = images.labels
        # The start of the latest range of a large set, and how far it was from the one before.
        self._stride = (0, 0)

    def samples(self, places: Places, seed: int, epoch: int, device: torch.device) -> Samples:
        if self.images.is_small:
            return super().samples(places, seed, epoch, device)
        order = self.order(seed, epoch, torch.device("cpu"))  # images are decoded there, by their numbers
        if not isinstance(places, range):
            return Samples(placed(order[places], device), self._numbers(order[places]))
        start, stop = places.start, places.stop
        latest, stride = self._stride
        if start != latest:
            stride = start - latest if start > latest else stop - start
            self._stride = start, stride
        following = self._numbers(order[start + stride : stop + stride])
        return Samples(order[start:stop].to(device), self._numbers(order[start:stop]), following)

    def _numbers(self, indices: Tensor) -> list[int]:
        numbers: list[int] = (indices % len(self.images)).tolist()
        return numbers

    def fields(self, num_views: int) -> dict[sampling.Name, Field]:
        if self.generated in (0, 1):
            return {}
        return {
            ("origin", view): Field(1, sampling.ORIGIN, view, 0, Uniform()) for view in range(1, num_views)
        }

    def __call__(self, samples: Samples, drawn: Mapping[sampling.Name, Tensor]) -> Anchors:
        device = samples.indices.device
        numbers = samples.indices % len(self.images)
        if samples.numbers is None:
            pixels = self.images.resident(device)[numbers]
        else:
            pixels = self.images.batch(samples.numbers, device)
            self.images.prefetch(samples.following)
        if self._labels.device != device:
            self._labels = self._labels.to(device)
        images = pixels.float() / 255
        targets = self._labels[numbers]
        labels = targets if self.generator.num_classes else None
        if self.generated == 0 and self.real_anchor:  # every view is the image itself
            return Anchors([], labels, targets, images)
        parts = []
        for start in range(0, len(images), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            part_labels = None if labels is None else labels[rows]
            parts.append(self.generator.encode_labelled(images[rows], part_labels))
        latents = [torch.cat(levels) for levels in zip(*parts, strict=True)]
        return Anchors(latents, labels, targets, images)

    def latent_epoch(self, epoch: int) -> int:
        return 0 if self.pool else epoch

    def origins(self, drawn: Mapping[sampling.Name, Tensor], view: int) -> Tensor | bool:
        if view == 0:
            return self.real_anchor
        if self.generated in (0, 1):
            return self.generated == 0
        return drawn["origin", view][:, 0] >= self.generated


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
        self,
        indices: Iterable[int],
        law: TruncatedNormal,
        epoch: int,
        levels: Sequence[int] | None = None,
        view: int = 1,
    ) -> list[Tensor]:
        """Return the noise of some levels of a view; None: of all levels."""
        return self.generator.sample_noise(indices, law, self.seed, epoch, view=view, levels=levels)
