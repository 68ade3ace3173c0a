"""Where anchors come from: which samples an epoch has, in which order, and what their latents and labels are.

A step (:mod:`mlviews.step`) asks the anchors of its source for three things: the samples of a range of the
epoch, the epoch that their latents are drawn in, and the latents themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlviews import sampling
from mlviews.checks import choice, is_number
from mlviews.codes import Codes, Encoding
from mlviews.generators.base import MLVGM
from mlviews.images import Reader
from mlviews.perturb import Normal
from mlviews.sampling import Field, TruncatedNormal, Uniform


class Anchors(NamedTuple):
    """The anchors of one batch."""

    latents: list[Tensor]  # float32 [B, *level.shape] per level; empty if no view is decoded from them
    labels: Tensor | None  # int64 [B], what a class-conditional generator takes; None for all others
    targets: Tensor  # int64 [B], what a layout hands out; -1 where there is no class
    images: Tensor | None = None  # float32 [B, C, H, W] in [0, 1], the user's own; None if no view shows them


class Samples(NamedTuple):
    """The samples of one batch."""

    indices: Tensor  # int64 [B], global sample indices, on the device
    numbers: list[int] | None = None  # of the images behind them, where these or their latents are on disk
    following: Iterable[list[int]] | None = None  # the same of the pass's batches after this one, if known


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

    def samples(
        self, places: Places, seed: int, epoch: int, device: torch.device, stride: int = 0
    ) -> Samples:
        """Return the epoch's samples in these places.

        ``stride`` is how far on the pass asks for as many places again; 0 if that is not known.
        """
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
        # Of one epoch, as long as it lasts.
        self._order: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def order(self, seed: int, epoch: int, device: torch.device) -> Tensor:
        """Return the order of the samples in an epoch, int64 ``[size]``."""
        key = seed, epoch, device
        if self._order is None or self._order[0] != key:
            with torch.inference_mode(False):  # it is kept, and may be needed outside
                self._order = key, sampling.permutation(self.size, seed, epoch, device)
        return self._order[1]

    def samples(
        self, places: Places, seed: int, epoch: int, device: torch.device, stride: int = 0
    ) -> Samples:
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
        reader: of the images.
        size: samples of an epoch.
        generated: the probability that a positive is the generator's, for each sample and positive; else it
            is the image itself.
        anchor_view: "real": view 0 is the image itself; "reconstructed": what the generator makes of its
            latents.
        pool: whether every epoch has the same positives.
        encoding: how images become latents.
        codes: the folder in which latents are kept; None: images are encoded at every step.

    Raises:
        ValueError: for a value out of range, or classes that are not the generator's.
    """

    def __init__(
        self,
        generator: MLVGM,
        law: TruncatedNormal | None,
        reader: Reader,
        size: int,
        generated: float,
        anchor_view: str,
        pool: bool,
        encoding: Encoding,
        codes: Codes | None,
    ) -> None:
        # If there are fewer samples than images, an epoch is the first part of an order of all of them.
        images = reader.images
        super().__init__(generator, law, max(size, len(images)))
        self.epoch_size = size
        self.pool, self.encoding, self.codes = pool, encoding, codes
        if not is_number(generated) or not 0 <= generated <= 1:
            raise ValueError(f"Invalid generated={generated!r}: it is a probability, from 0 to 1.")
        self.images, self.reader, self.generated = images, reader, float(generated)
        self.real_anchor = choice("anchor_view", anchor_view, ANCHOR_VIEWS, problem="Invalid") == "real"
        classes = generator.num_classes
        if classes and not (int(images.labels.min()) >= 0 and int(images.labels.max()) < classes):
            raise ValueError(
                f"The images have labels from {int(images.labels.min())} to {int(images.labels.max())}, but "
                f"this generator makes images of {classes} classes: each image needs a label in "
                f"[0, {classes})."
            )
        self._labels = images.labels
        # What a step asks for: no image if none is shown or encoded, no latents if nothing is decoded.
        self.decodes = self.generated > 0 or not self.real_anchor
        self.shows = self.generated < 1 or self.real_anchor

    def samples(
        self, places: Places, seed: int, epoch: int, device: torch.device, stride: int = 0
    ) -> Samples:
        small_codes = self.codes is None or self.codes.is_small
        if self.images.is_small and small_codes:
            return super().samples(places, seed, epoch, device)
        order = self.order(seed, epoch, torch.device("cpu"))  # files are read there, by their numbers
        count = len(self.images)
        indices = order[placed(places, order.device)]
        samples = Samples(placed(indices, device), (indices % count).tolist())
        if not stride or not isinstance(places, range):
            return samples
        starts = range(places.start + stride, self.epoch_size - len(places) + 1, stride)
        return samples._replace(following=_batches(order, count, starts, len(places)))

    def fields(self, num_views: int) -> dict[sampling.Name, Field]:
        fields = self.generator.real_fields(self.law)
        for view in range(1, num_views) if 0 < self.generated < 1 else ():
            fields["origin", view] = Field(1, sampling.ORIGIN, view, 0, Uniform())
        return fields

    def __call__(self, samples: Samples, drawn: Mapping[sampling.Name, Tensor]) -> Anchors:
        device = samples.indices.device
        rows = samples.indices % len(self.images)
        if self._labels.device != device:
            self._labels = self._labels.to(device)
        targets = self._labels[rows]
        labels = targets if self.generator.num_classes else None
        images = None
        if self.shows or self.codes is None:
            images = self._pixels(rows, samples).float() / 255
        latents: list[Tensor] = []  # none if every view is the image itself
        if self.decodes and self.codes is not None:
            latents = self.codes(rows, samples.numbers)
        elif self.decodes:
            assert images is not None
            latents = self.encoding(images, labels)
        if latents:
            latents = self.generator.real_latents(latents, drawn)
        return Anchors(latents, labels, targets, images)

    def _pixels(self, rows: Tensor, samples: Samples) -> Tensor:
        """Return the images of these samples, uint8 ``[B, C, H, W]``."""
        if self.images.is_small:
            return self.images.resident(rows.device)[rows]
        assert samples.numbers is not None
        return self.reader(samples.numbers, rows.device, samples.following)

    def latent_epoch(self, epoch: int) -> int:
        return 0 if self.pool else epoch

    def origins(self, drawn: Mapping[sampling.Name, Tensor], view: int) -> Tensor | bool:
        if view == 0:
            return self.real_anchor
        if self.generated in (0, 1):
            return self.generated == 0
        return drawn["origin", view][:, 0] >= self.generated


def _batches(order: Tensor, count: int, starts: range, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the images of batches of a size, of so many images."""
    # No method: the reader would hold the anchors that hold the reader, and its workers would end late.
    for start in starts:
        yield (order[start : start + size] % count).tolist()


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
