"""One step of a view source (paper, sec. 3.3).

indices -> noise -> anchors -> positives -> images -> T_x -> batch

A step keeps no state between calls: every number in a batch is a function of ``(seed, epoch, global sample
index, view, level)``. It issues no host synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews import sampling
from mlviews.anchors import Anchors, Places, Prior
from mlviews.errors import listing
from mlviews.generators.base import MLVGM
from mlviews.levels import once, with_levels
from mlviews.perturb import BUILT_IN, Assignment
from mlviews.runs.processes import check_dtype
from mlviews.transforms import Augmentation

Transform = Callable[[Tensor], Tensor]
"""T_x: an :class:`~mlviews.transforms.Augmentation`, or any other callable on images ``[B, C, H, W]``."""

Drawn = Mapping[sampling.Name, Tensor]

Origin = Tensor | bool
"""Which images of a view are the user's own: all, none, or a mask, bool ``[B]``."""


class ByOrigin(NamedTuple):
    """T_x of images that may be the user's own or the generator's, each with a pipeline of its own."""

    real: Transform | None
    generated: Transform | None


class Batch(NamedTuple):
    """What a layout arranges. View 0 is the anchor, the others are its positives."""

    views: list[Tensor]  # float images [B, C, H, W], one tensor per view (per crop, if the source has crops)
    indices: Tensor  # int64 [B], global sample indices; without reuse unique over all ranks of an epoch
    targets: Tensor  # int64 [B], the classes drawn for a class-conditional generator; -1 for all others
    latents: list[Sequence[Tensor]]  # per view, one float32 tensor [B, *level.shape] per level; none of
    # views that are all the user's own images
    first_index: int | None  # of consecutive indices, so that no layout has to ask the device; else None


class Content(NamedTuple):
    """What a step makes of its samples before T_x."""

    images: list[Tensor]  # float [B, C, H, W] in [0, 1], one tensor per view
    origins: list[Origin]  # which of them are the user's own, per view
    indices: Tensor  # int64 [B], global sample indices
    targets: Tensor  # int64 [B]
    latents: list[Sequence[Tensor]]  # per view, one tensor [B, *level.shape] per level


class Step:
    """The step of one source.

    Args:
        generator: the generator; frozen here.
        anchors: where the anchors come from.
        assignments: which perturber moves which levels, coarse to fine.
        transforms: T_x of each crop, or None.
        crops: the view that each image of a batch is cut from.
        num_views: views of each sample, the anchor included.
        seed: an integer in ``[0, 2**64)``.
        device: where views are made; None: where the generator is.
        micro_batch_size: the most samples that the generator sees at once; None: the whole batch, on a CPU as
            many as the generator says.
        dtype: of the generator's convolutions and products; None for float32.
        compile: whether to run the generator under ``torch.compile``.
    """

    def __init__(
        self,
        generator: MLVGM,
        anchors: Prior,
        assignments: Sequence[Assignment],
        transforms: Sequence[Transform | ByOrigin | None],
        crops: tuple[int, ...],
        num_views: int,
        seed: int,
        device: torch.device | None,
        micro_batch_size: int | None,
        dtype: torch.dtype | None,
        compile: bool,
    ) -> None:
        self.generator, self.anchors, self.assignments = generator.freeze(), anchors, assignments
        self.transforms, self.crops, self.num_views = transforms, crops, num_views
        self.seed, self.device = seed, device
        self.micro_batch_size, self.dtype = micro_batch_size, dtype
        self.compile = compile
        self._compiled: Callable[..., list[Tensor]] | None = None
        # The first level that differs between views: all blocks before it run once per sample.
        self.first_moved = assignments[0].levels[0] if assignments else len(generator.levels)
        self._plan: sampling.Draw | None = None

    @torch.no_grad()
    def __call__(self, start: int, stop: int, epoch: int, stride: int = 0) -> Batch:
        """Return the samples in places ``start`` to ``stop`` (exclusive) of an epoch.

        In a pass, ``stride`` is how far on its next range of as many places begins, so that files can be read
        ahead.
        """
        device = self.prepare()
        with torch.autocast(device.type, enabled=False):  # content must not depend on where the loop is run
            content = self.content(range(start, stop), epoch, device, stride)
            views = self.views(content.images, content.origins, content.indices, epoch)
        first_index = start if self.anchors.endless else None
        return Batch(views, content.indices, content.targets, content.latents, first_index)

    # -- stages ----------------------------------------------------------------------------------------------

    def content(self, places: Places, epoch: int, device: torch.device, stride: int = 0) -> Content:
        """Return what the samples in these places of an epoch are, before T_x."""
        samples = self.anchors.samples(places, self.seed, epoch, device, stride)
        drawn = self.draw(samples.indices, self.anchors.latent_epoch(epoch))
        anchors = self.anchors(samples, drawn)
        positives = [self.perturb(anchors.latents, drawn, view) for view in range(1, self.num_views)]
        latents: list[Sequence[Tensor]] = [anchors.latents, *positives]
        origins = [self.anchors.origins(drawn, view) for view in range(self.num_views)]
        images = self.images(latents, anchors, origins)
        return Content(images, origins, samples.indices, anchors.targets, latents)

    def views(
        self, images: Sequence[Tensor], origins: Sequence[Origin], indices: Tensor, epoch: int
    ) -> list[Tensor]:
        """Return every crop: T_x of the images of its view. T_x is a function of epoch and indices."""
        return [
            self.augment(images[view], indices, epoch, crop, origins[view])
            for crop, view in enumerate(self.crops)
        ]

    def prepare(self) -> torch.device:
        """Put the generator and the walkers on the step's device, and plan there what to draw."""
        device = self.generator.device
        if self._plan is not None and self._plan.device == device:
            return device
        move(self.generator, self.device)
        device = self.generator.device
        check_dtype(self.dtype, device)  # the generator may have been moved since the source was made
        fields = self.anchors.fields(self.num_views)
        for levels, perturber in self.assignments:
            if isinstance(perturber, nn.Module):
                move(perturber, device)
                perturber.eval()
            law = perturber.law(self.anchors.law)
            if law is not None:
                for view in range(1, self.num_views):
                    fields |= self.generator.noise_fields(law, view, levels)
        self._plan = sampling.Draw(fields, device)
        return device

    def draw(self, indices: Tensor, epoch: int) -> Drawn:
        """Return the random numbers of these samples by name; they are made when a stage asks for them."""
        assert self._plan is not None
        return self._plan(indices, self.seed, epoch)

    def perturb(self, anchors: Sequence[Tensor], drawn: Drawn, view: int) -> list[Tensor]:
        """Return the latents of one positive (paper, sec. 3.2)."""
        latents = list(anchors)
        for levels, perturber in self.assignments if latents else ():
            inputs = [anchors[level] for level in levels]
            noise = None
            if perturber.law(self.anchors.law) is not None:
                noise = [self.generator.noise_of(drawn, view, level) for level in levels]
            if type(perturber) not in BUILT_IN:
                # A user's perturber may work in place, and anchors and noise serve other views too.
                inputs = [z.clone() for z in inputs]
                noise = None if noise is None else [w.clone() for w in noise]
            moved = perturber(inputs, noise)
            shapes = [z.shape for z in inputs]
            if not isinstance(moved, Sequence) or [getattr(z, "shape", None) for z in moved] != shapes:
                raise ValueError(
                    f"Perturber {perturber!r} must return one tensor per level, shaped like the anchor's: "
                    f"levels {listing(levels)}."
                )
            latents = with_levels(latents, levels, moved)
            if not perturber.keeps_offsets and len(latents) > len(self.generator.levels):
                places = [len(self.generator.levels) + level for level in levels]
                latents = with_levels(latents, places, [torch.zeros_like(latents[place]) for place in places])
        return latents

    def images(
        self, latents: Sequence[Sequence[Tensor]], anchors: Anchors, origins: Sequence[Origin]
    ) -> list[Tensor]:
        """Return the images of all views: the generator's, the user's own, or a mixture of the two."""
        generated = [view for view, origin in enumerate(origins) if origin is not True]
        decoded = iter(
            self.decode([latents[view] for view in generated], anchors.labels) if generated else ()
        )
        images = []
        for origin in origins:
            if origin is False:
                images.append(next(decoded))
                continue
            assert anchors.images is not None
            if isinstance(origin, Tensor):
                images.append(torch.where(origin[:, None, None, None], anchors.images, next(decoded)))
            else:
                images.append(anchors.images)
        return images

    def decode(self, latents: Sequence[Sequence[Tensor]], labels: Tensor | None) -> list[Tensor]:
        """Return the images of all views; blocks below the first moved level run once for all of them."""
        device, count = self.generator.device, len(latents[0][0])
        micro_batch_size = self.micro_batch_size
        if micro_batch_size is None and device.type == "cpu" and not self.compile:
            micro_batch_size = self.generator.cached_samples
        micro_batch_size = micro_batch_size or count
        chunks = []
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            for start in range(0, count, micro_batch_size):
                rows = slice(start, start + micro_batch_size)
                views = [once(lambda z, rows=rows: z[rows], view) for view in latents]  # type: ignore[misc]
                rows_labels = None if labels is None else labels[rows]
                chunks.append(self.decode_views(views, self.first_moved, rows_labels))
        if len(chunks) == 1:
            return chunks[0]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    @property
    def decode_views(self) -> Callable[..., list[Tensor]]:
        """The generator's function, compiled if that was asked for."""
        if not self.compile:
            return self.generator.decode_views
        if self._compiled is None:
            self._compiled = torch.compile(self.generator.decode_views)
        return self._compiled

    def augment(self, images: Tensor, indices: Tensor, epoch: int, crop: int, origin: Origin) -> Tensor:
        """Return T_x of the images of one view; the user's own may have another than the generator's."""
        transform = self.transforms[crop]
        if not isinstance(transform, ByOrigin):
            return self.transformed(transform, images, indices, epoch, crop)
        if isinstance(origin, bool):
            chosen = transform.real if origin else transform.generated
            return self.transformed(chosen, images, indices, epoch, crop)
        real, generated = (self.transformed(part, images, indices, epoch, crop) for part in transform)
        if real.shape[2:] != generated.shape[2:]:
            raise ValueError(
                f"The transforms of view {crop} make real images of {tuple(real.shape[2:])} pixels and "
                f"generated ones of {tuple(generated.shape[2:])}, which are in one batch: give both one size."
            )
        return torch.where(origin[:, None, None, None], real, generated)

    def transformed(
        self, transform: Transform | None, images: Tensor, indices: Tensor, epoch: int, crop: int
    ) -> Tensor:
        """Return T_x of the images; an Augmentation is a function of the samples' indices."""
        if isinstance(transform, Augmentation):
            return transform(images, indices, seed=self.seed, epoch=epoch, view=crop)
        # A copy: views come in one tensor, may be cut more than once, and a transform may work in place.
        images = images.clone()
        if transform is None:
            return images
        augmented = transform(images)
        if not isinstance(augmented, Tensor) or len(augmented) != len(images):
            kind = type(augmented).__name__
            if isinstance(augmented, Tensor):
                kind = f"a tensor of shape {tuple(augmented.shape)}"
            raise ValueError(
                f"The transform of view {crop} returned {kind}: it must return a tensor of {len(images)} "
                "images."
            )
        return augmented

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy of the step makes anew: the plan, and compiled code."""
        return {**self.__dict__, "_plan": None, "_compiled": None}


def move(module: nn.Module, device: torch.device | None) -> None:
    """Put a module on a device, unless it is there ("cuda" stands for whichever GPU it is on)."""
    if device is None:
        return
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.device.type != device.type or device.index not in (None, t.device.index) for t in tensors):
        module.to(device)
