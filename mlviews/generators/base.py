"""Definition 1 of the paper as code: a generator is a stack of blocks, each taking one latent.

``g(z_1, ..., z_n) = to_image(l_n(z_n, l_{n-1}(z_{n-1}, ... l_1(z_1))))``

Because the blocks are explicit, what several views of one sample have in common (every block before the
first perturbed level) is computed once: :meth:`MLVGM.decode_views`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews import sampling
from mlviews.checks import described, integer
from mlviews.errors import listing
from mlviews.levels import Blend, once
from mlviews.sampling import ANCHOR, NOISE, Field, TruncatedNormal

Latents = Sequence[Tensor]
"""One tensor ``[B, *level.shape]`` per level, coarse to fine."""


class Level(NamedTuple):
    """One latent of Definition 1: its name and the shape of one sample's latent."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of scalars in one sample's latent."""
        return int(torch.Size(self.shape).numel())


class _FrozenOnceMade(type):
    """The metaclass that freezes a generator after its constructor, those of subclasses included."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        generator = super().__call__(*args, **kwargs)
        return generator.freeze()


class MLVGM(nn.Module, metaclass=_FrozenOnceMade):
    """A Multiple Latent Variable Generative Model (paper, Definition 1), frozen and in eval mode.

    Subclass it by handing ``__init__`` one block per level, in order. A block is a module called as
    ``block(z_i, state)`` that returns the next state; the first one gets ``state=None``. A state is a tensor
    whose first dimension is the batch, or a (nested) tuple of such tensors. Three hooks may be overridden:
    :meth:`condition`, :meth:`to_image` and :meth:`coordinates`. A generator whose images' latents take more
    than one tensor per level (``offsets``) overrides :meth:`encoded` and the hooks after it too.

    Args:
        blocks: one module per level.
        levels: ``Level(name, shape)`` or ``(name, shape)``, coarse to fine.
        image_shape: ``(C, H, W)`` of one image.
        tied: whether the levels share one draw (StyleGAN2: a single z feeds every style). Sampled latents are
            then equal at every level, and perturbers move each level on its own.
        truncation: where :meth:`sample_latents` truncates anchors by default, in standard deviations;
            ``None`` for the full normal.
        num_classes: the number of classes of a generator that takes a label for every sample besides its
            latents; 0 for all others.

    Raises:
        ValueError: if there are no levels, or not one block per level, or a shape is not positive, or two
            levels share a name.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, 16)
        ...     def forward(self, z, state):
        ...         return self.linear(z) if state is None else state.tanh() + self.linear(z)
        >>> class Small(MLVGM):
        ...     def to_image(self, state):
        ...         return state.sigmoid().view(-1, 1, 4, 4)
        >>> g = Small([Block(), Block()], [("coarse", (4,)), ("fine", (4,))], image_shape=(1, 4, 4))
        >>> g(g.sample_latents(range(3))).shape
        torch.Size([3, 1, 4, 4])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        levels: Iterable[Level | tuple[str, tuple[int, ...]]],
        image_shape: tuple[int, int, int],
        *,
        tied: bool = False,
        truncation: float | None = 2.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.levels = as_levels(levels)
        self.image_shape = _image_shape(image_shape)
        try:
            self.blocks = nn.ModuleList(blocks)
        except TypeError:
            raise ValueError(f"Invalid blocks={blocks!r}: give one torch.nn.Module per level.") from None
        # load_generator gives it the name and the options that it was asked for.
        self.name = type(self).__name__
        self.options: dict[str, Any] = {}
        self.weights_file: Path | None = None  # the file or folder that its weights were read from
        self.provenance: dict[str, Any] = {}  # what a weights file of ours says of the training
        # Black pixels on each side of the images that it was trained on; a user's images get them too.
        self.border = 0
        # The samples that a source gives it at a time on a CPU, whose cache then holds their activations;
        # None: the whole batch.
        self.cached_samples: int | None = None
        self.inverter: nn.Module | None = None
        # Tensors that latents of real images may hold after those of the levels, and no perturber moves: how
        # far a level is from the place that its latent alone stands for. A subclass names and reads them.
        self.offsets: tuple[Level, ...] = ()
        self.tied = tied
        self.num_classes = integer("num_classes", num_classes, 0)
        self.truncation = TruncatedNormal(1.0, truncation).truncation
        _check_structure(self.levels, len(self.blocks), tied)
        # It follows .to(), so that a generator without parameters (a wrapped callable) has a device and a
        # precision too.
        self.register_buffer("_place", place_of(self.blocks), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the inverter is no submodule, as it makes no image.

        State dicts, and the fingerprints that measurements are stored under, are then those of the generator
        alone.
        """
        if name == "inverter":
            if value is not None and not isinstance(value, nn.Module):
                raise ValueError(
                    f"Invalid inverter of type {type(value).__name__}: it must be a module from images to "
                    "latents, or None."
                )
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> MLVGM:
        """Move the inverter along with the generator: ``.to()``, ``.cuda()`` and the like call this."""
        if self.inverter is not None:
            self.inverter._apply(fn)
        moved: MLVGM = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def freeze(self) -> MLVGM:
        """Put the generator in eval mode, stop its weights from learning, and return it.

        A source's images must not drift: every generator is frozen when it is made, and again when a source
        or a measurement takes it. Code that trains a generator undoes it by ``requires_grad_(True)``.
        """
        self.eval()
        return self.requires_grad_(False)

    # -- hooks -----------------------------------------------------------------------------------------------

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        """Return what each block takes as its latent, e.g. W from Z. Default: the latents themselves.

        Levels of a tied generator that were not moved hold the very same tensor (``is``), which is worth
        mapping only once: see :func:`mlviews.levels.distinct`.

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level.
            labels: int64 ``[B]`` for a class-conditional generator, else None.

        Returns:
            For each block a tensor whose first dimension is the batch, or a (nested) tuple of such tensors.
        """
        return latents

    def coordinates(self, latents: Latents, labels: Tensor | None) -> Sequence[Tensor]:
        """Return each level's place ``[B, ...]`` in the space where its :meth:`distances` are measured.

        Default: the latents themselves.
        """
        return latents

    def to_image(self, state: Any) -> Tensor:
        """Return the last block's state as float images ``[B, C, H, W]`` in [0, 1].

        Default: the state itself.
        """
        image: Tensor = state
        return image

    # -- the forward pass ------------------------------------------------------------------------------------

    def run(
        self, inputs: Sequence[Any], state: Any = None, *, start: int = 0, stop: int | None = None
    ) -> Any:
        """Run some blocks, and return the state after them.

        Args:
            inputs: what :meth:`condition` returned, one for each block; those of blocks that do not run are
                not looked at.
            state: the state before block ``start``; ``None`` for the first.
            start: the first block.
            stop: the block after the last one; ``None`` for all.
        """
        for index in range(start, len(self.blocks) if stop is None else stop):
            state = self.blocks[index](inputs[index], state)
        return state

    def decode(
        self, latents: Latents, labels: Tensor | None = None, *, state: Any = None, start: int = 0
    ) -> Tensor:
        """Return images ``[B, C, H, W]`` in [0, 1] of latents, differentiable with respect to them.

        Args:
            latents: as for :meth:`forward`.
            labels: as for :meth:`forward`.
            state: what the blocks before level ``start`` made of these latents, one of :meth:`states`; these
                blocks are not run again.
            start: the first level whose block is run.

        Raises:
            ValueError: as :meth:`forward`.
        """
        latents = self._checked(latents)
        rows = len(latents[0])
        labels = self._checked_labels(labels, rows)
        if not rows:
            return self._no_images()
        inputs = self.condition(latents, labels)
        # A copy: a block may change its state in place, and this one serves other views too.
        state = None if state is None else _stack([state])
        return self._images(self.run(inputs, state, start=start), rows)

    @torch.no_grad()
    def states(self, latents: Latents, labels: Tensor | None = None, *, stop: int | None = None) -> list[Any]:
        """Return the state before each block, ``None`` before the first, and the one after the last.

        :meth:`decode` goes on from any of them.

        Args:
            latents: as for :meth:`forward`.
            labels: as for :meth:`forward`.
            stop: the last block whose state is returned; ``None`` for all, and the one after the last.
        """
        latents = self._checked(latents)
        inputs = self.condition(latents, self._checked_labels(labels, len(latents[0])))
        states: list[Any] = [None]
        for index in range(len(self.blocks) if stop is None else stop):
            state = None if states[-1] is None else _stack([states[-1]])  # it is a copy, as in decode
            states.append(self.run(inputs, state, start=index, stop=index + 1))
        return states

    @torch.no_grad()
    def forward(self, latents: Latents, labels: Tensor | None = None) -> Tensor:
        """Return images of latents, without a graph.

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level, on the generator's device.
            labels: for a class-conditional generator, int64 ``[B]`` in ``[0, num_classes)``; see
                :meth:`sample_labels`.

        Returns:
            float32 images ``[B, C, H, W]`` in [0, 1] on the generator's device.

        Raises:
            ValueError: if the latents do not fit the levels, labels are missing, out of range or not wanted,
                or the generator does not return such images.
        """
        return self.decode(latents, labels)

    @torch.no_grad()
    def decode_views(
        self, views: Sequence[Latents], first: int, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Return images of several views that agree below level ``first``; the blocks they share run once.

        Args:
            views: the latents of each view, view 0 being the anchor.
            first: the index of the first level at which views differ; ``len(levels)`` if none does.
            labels: as for :meth:`forward`; all views of a sample share its label.

        Returns:
            One float32 tensor ``[B, C, H, W]`` per view, equal to ``[g(z, labels) for z in views]`` up to
            float rounding.

        Raises:
            ValueError: as :meth:`forward`, and if there are no views or ``first`` is out of range.
        """
        count = len(views)
        if not count:
            raise ValueError("Invalid views=[]: there is at least one, the anchor.")
        first = integer("first", first, 0, len(self.levels))
        views = [self._checked(latents) for latents in views]
        if len({len(latents) for latents in views}) > 1:
            raise ValueError(
                "Invalid views: some have the offsets of real images and some have none; decode them one by "
                "one, with g(latents)."
            )
        rows = len(views[0][0])
        labels = self._checked_labels(labels, rows)
        if not rows:
            return [self._no_images() for _ in range(count)]
        # The blocks that all views share run on the anchors.
        anchor_inputs = self.condition(views[0], labels)
        state = self.run(anchor_inputs, stop=first) if first else None
        if first == len(self.levels):
            image = self._images(state, rows)
            return [image, *(image.clone() for _ in range(count - 1))]
        # From here on all views make one batch [count * B, ...].
        inputs = [anchor_inputs, *(self.condition(latents, labels) for latents in views[1:])]
        by_level = zip(*(view_inputs[first:] for view_inputs in inputs), strict=True)
        stacked = [None] * first + [_stack(level_inputs) for level_inputs in by_level]
        state = _stack([state] * count) if first else None
        state = self.run(stacked, state, start=first)
        images = self._images(state, count * rows)  # [count * B, C, H, W]
        return list(images.chunk(count))

    @torch.no_grad()
    def distances(self, anchors: Latents, positives: Latents, labels: Tensor | None = None) -> list[Tensor]:
        """Return how far each level was moved, ``[B]`` per level.

        It is the L2 norm in the level's space (paper, sec. 3.1), that of :meth:`coordinates`.

        Raises:
            ValueError: as :meth:`forward`, and if there are not as many positives as anchors.
        """
        anchors = self._checked(anchors)
        positives = self._checked(positives)
        if len(anchors[0]) != len(positives[0]):
            raise ValueError(
                f"Got {len(positives[0])} positives for {len(anchors[0])} anchors: give one of each sample."
            )
        labels = self._checked_labels(labels, len(anchors[0]))
        starts = self.coordinates(anchors, labels)
        ends = self.coordinates(positives, labels)
        return [(end - start).flatten(1).norm(dim=1) for start, end in zip(starts, ends, strict=True)]

    # -- from images to latents ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return latents of images: :meth:`decode` turns them back into the images, more or less.

        A generator with an encoder (NVAE) uses that. All others need an ``inverter``: any module from images
        to latents, as :func:`mlviews.train_inverter` trains it. The differentiable form is :meth:`infer`; a
        few steps of optimization, ``g.inverter.refine(g, images)``, reconstruct better.

        Args:
            images: float ``[B, C, H, W]`` in [0, 1], of the generator's image shape, on its device.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level. Levels of a tied generator hold one tensor.
            After them those of ``offsets``, if the generator has some and the encoder fills them.

        Raises:
            ValueError: if the images are not of this shape, or the generator has neither encoder nor
                inverter.
        """
        return self.infer(self._checked_images(images))

    def encode_labelled(self, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return :meth:`encode`'s latents of images whose classes are known; a hook for encoders that ask.

        Args:
            images: as for :meth:`encode`.
            labels: int64 ``[B]`` for a class-conditional generator, else None.
        """
        return self.encode(images)

    @property
    def encodes(self) -> bool:
        """Whether the generator has an encoder or an inverter."""
        has_encoder = type(self).infer is not MLVGM.infer or type(self).encode is not MLVGM.encode
        return has_encoder or self.inverter is not None

    def check_encodes(self) -> None:
        """Raise a ValueError if the generator has neither an encoder nor an inverter, with the remedy."""
        if not self.encodes:
            raise ValueError(
                f"Generator {self.name!r} has no encoder: train one with mlviews.train_inverter(generator), "
                "or load one with load_generator(..., inverter=FILE)."
            )

    def infer(self, images: Tensor) -> list[Tensor]:
        """Return what :meth:`encode` does, differentiable with respect to the images.

        A generator that has an encoder overrides this hook.

        Args:
            images: as for :meth:`encode`, and not checked again.
        """
        self.check_encodes()
        if not len(images):
            return [torch.empty((0, *level.shape), device=images.device) for level in self.levels]
        assert self.inverter is not None
        return self.encoded(self.inverter(images))

    def encoded(self, output: Any) -> list[Tensor]:
        """Return the latents that the inverter's output stands for. Default: the output is latents."""
        latents: list[Tensor] = output
        return latents

    def real_fields(self, law: TruncatedNormal) -> dict[sampling.Name, Field]:
        """Name what :meth:`real_latents` needs to be drawn for real images. Default: nothing.

        Args:
            law: the law of the source's anchors.
        """
        return {}

    def real_latents(self, latents: list[Tensor], drawn: Mapping[sampling.Name, Tensor]) -> list[Tensor]:
        """Return latents of the same images that positives are to be made of. Default: as they are.

        Args:
            latents: what :meth:`encode` returned.
            drawn: the numbers of these samples that :meth:`real_fields` names.
        """
        return latents

    def regenerate(
        self,
        images: Tensor,
        blends: Sequence[Blend],
        noise: Sequence[Tensor | None],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return images like the given ones: encoded, each level blended with noise, and decoded.

        It is differentiable with respect to the images, and what :class:`mlviews.Purifier` does. A generator
        in which an image's latents of a level depend on those of coarser ones (NVAE), or that gets to these
        images without encoding, overrides this hook.

        Args:
            images: as for :meth:`encode`.
            blends: for each level, how much of the image's latents and how much of the noise.
            noise: ``[copies * B, *level.shape]`` per level, so many copies of all images one after the other;
                None for levels without noise, which are all but :meth:`noisy_levels`.
            labels: int64 ``[B]`` for a class-conditional generator, else None.

        Returns:
            Float32 ``[copies * B, C, H, W]`` in [0, 1]; of no noise at all, one copy.

        Raises:
            ValueError: as :meth:`encode`.
        """
        return self._decode_blended(self.infer(self._checked_images(images)), blends, noise, labels)

    def noisy_levels(self, blends: Sequence[Blend]) -> list[int]:
        """Return the levels whose noise :meth:`regenerate` takes, coarse to fine: those blended with some."""
        return [level for level, blend in enumerate(blends) if blend.noise]

    def _decode_blended(
        self,
        latents: Latents,
        blends: Sequence[Blend],
        noise: Sequence[Tensor | None],
        labels: Tensor | None,
    ) -> Tensor:
        """Return the images of latents that are blended with noise; arguments as for :meth:`regenerate`."""
        copies = self._copies(noise, len(latents[0]))
        latents = once(lambda z: z.repeat(copies, *(1 for _ in z.shape[1:])), latents)
        values = [blend(z, drawn) for blend, z, drawn in zip(blends, latents, noise, strict=False)]
        # What latents of real images hold after those of the levels fades as its level is drawn anew.
        values += [blend(z, None) for blend, z in zip(blends, latents[len(blends) :], strict=False)]
        return self.decode(values, None if labels is None else labels.repeat(copies))

    @staticmethod
    def _copies(noise: Sequence[Tensor | None], rows: int) -> int:
        """Return how many copies of so many images the noise is for."""
        drawn = next((values for values in noise if values is not None), None)
        return 1 if drawn is None or not rows else len(drawn) // rows

    # -- sampling --------------------------------------------------------------------------------------------

    def sample_latents(
        self,
        indices: Iterable[int] | Tensor,
        seed: int = 0,
        epoch: int = 0,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        truncation: float | str | None = "default",
    ) -> list[Tensor]:
        """Return anchor latents of the samples with these global indices (paper, sec. 3.2).

        Sample *i* depends on ``(seed, epoch, i)`` only, so any subset in any order gives the same values.
        They are the anchors that a :class:`mlviews.MLViewSource` with the same seed, epoch and anchor
        distribution draws.

        Args:
            indices: ``B`` global sample indices in ``[0, 2**32)``: a range, a list or an integer tensor.
            seed: an integer in ``[0, 2**64)``.
            epoch: an integer in ``[0, 2**32)``.
            mean: the mean of the (truncated) normal.
            std: the standard deviation before truncation; at least 0.
            truncation: the support is ``mean ± truncation * std``; ``None`` for the full normal; by default
                the generator's ``truncation``.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level on the generator's device (the same tensor for
            every level of a tied generator).

        Raises:
            ValueError: for a seed, epoch or index out of range, a negative std or a truncation that is not
                positive.
        """
        cut = self.truncation if truncation == "default" else truncation
        if isinstance(cut, str):
            raise ValueError(
                f"Invalid truncation={truncation!r}: give a positive number, None, or leave it out."
            )
        fields = self.anchor_fields(TruncatedNormal(std, cut, mean))
        return self.anchor_latents(self._drawn(fields, indices, seed, epoch))

    def sample_noise(
        self,
        indices: Iterable[int] | Tensor,
        law: TruncatedNormal,
        seed: int = 0,
        epoch: int = 0,
        *,
        view: int = 1,
        levels: Iterable[int] | None = None,
    ) -> list[Tensor]:
        """Return noise for some levels, float32 ``[B, *level.shape]`` each.

        It is what the perturbers of a source's view get for these samples, if they ask for noise of this law.

        Args:
            indices: ``B`` global sample indices, as for :meth:`sample_latents`.
            law: the distribution of the noise.
            seed: an integer in ``[0, 2**64)``.
            epoch: an integer in ``[0, 2**32)``.
            view: the view, from 1; the anchor is view 0.
            levels: indices of the levels; None for all.

        Raises:
            ValueError: for a seed, epoch, index or view out of range.
        """
        levels = list(range(len(self.levels)) if levels is None else levels)
        drawn = self._drawn(self.noise_fields(law, view, levels), indices, seed, epoch)
        return [self.noise_of(drawn, view, level) for level in levels]

    def sample_labels(self, indices: Iterable[int] | Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """Return labels of the samples with these global indices, int64 ``[B]``, as a source draws them.

        They are uniform over the classes.

        Raises:
            ValueError: if the generator has no classes, or for a seed, epoch or index out of range.
        """
        if not self.num_classes:
            raise ValueError("This generator has no classes (num_classes=0): it takes no labels.")
        return self.labels_of(self._drawn(self.label_fields(), indices, seed, epoch))

    def _drawn(
        self, fields: Mapping[sampling.Name, Field], indices: Iterable[int] | Tensor, seed: int, epoch: int
    ) -> sampling.Drawn:
        """Draw the fields for the samples with these indices."""
        return sampling.Draw(fields, self.device)(sampling.as_indices(indices, self.device), seed, epoch)

    # -- what a step draws, by name, and how it is read ------------------------------------------------------

    def anchor_fields(self, law: TruncatedNormal) -> dict[sampling.Name, Field]:
        """Name what to draw for anchors: ``("anchor", level)``; one field where all levels share one draw."""
        levels = self.levels[:1] if self.tied else self.levels
        return {
            ("anchor", index): Field(level.size, ANCHOR, 0, index, law) for index, level in enumerate(levels)
        }

    def anchor_latents(self, drawn: Mapping[sampling.Name, Tensor]) -> list[Tensor]:
        """Read the anchors' latents ``[B, *level.shape]`` of all levels."""
        levels = self.levels[:1] if self.tied else self.levels
        latents = [
            drawn["anchor", index].contiguous().view(-1, *level.shape) for index, level in enumerate(levels)
        ]
        return latents * len(self.levels) if self.tied else latents

    def noise_fields(
        self, law: TruncatedNormal, view: int, levels: Iterable[int]
    ) -> dict[sampling.Name, Field]:
        """Name what to draw to perturb these levels of a view: ``("noise", view, level)``."""
        return {
            ("noise", view, index): Field(self.levels[index].size, NOISE, view, index, law)
            for index in levels
        }

    def noise_of(self, drawn: Mapping[sampling.Name, Tensor], view: int, level: int) -> Tensor:
        """Read the noise ``[B, *level.shape]`` of one level of a view."""
        return drawn["noise", view, level].reshape(-1, *self.levels[level].shape)

    def label_fields(self) -> dict[sampling.Name, Field]:
        """Name what to draw for labels: ``"label"``; nothing for a generator without classes."""
        return {"label": sampling.LABEL_FIELD} if self.num_classes else {}

    def labels_of(self, drawn: Mapping[sampling.Name, Tensor]) -> Tensor:
        """Read the labels, int64 ``[B]``."""
        uniform = drawn["label"][:, 0]  # [B], in [0, 1]
        return (uniform * self.num_classes).long().clamp_(max=self.num_classes - 1)

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the levels, coarse to fine."""
        return tuple(level.name for level in self.levels)

    @property
    def device(self) -> torch.device:
        """The device that the generator is on."""
        place: Tensor = self._place  # type: ignore[assignment]
        return place.device

    def train(self, mode: bool = True) -> MLVGM:
        """Stay in eval mode, whoever calls ``.train()``: a source's images must not drift."""
        super().train(False)
        return self

    # -- checks ----------------------------------------------------------------------------------------------

    def _no_images(self) -> Tensor:
        """Return the images of an empty batch, so that no block has to deal with one."""
        return torch.empty((0, *self.image_shape), dtype=torch.float32, device=self.device)

    def _images(self, state: Any, rows: int) -> Tensor:
        """Check what :meth:`to_image` returns, and return it in float32."""
        image = self.to_image(state)
        expected = (rows, *self.image_shape)
        if not isinstance(image, Tensor) or not image.is_floating_point() or tuple(image.shape) != expected:
            raise ValueError(
                f"The generator returned {described(image)}: it must return a float tensor {expected} "
                "with values in [0, 1]."
            )
        return image.float()

    def _checked(self, latents: Latents) -> Latents:
        """Check latents, and return them in the generator's precision."""
        if isinstance(latents, Tensor) or not isinstance(latents, Sequence):
            raise ValueError(
                f"Invalid latents of type {type(latents).__name__}: pass a list of one tensor per level, "
                "as sample_latents does."
            )
        expected = self.levels
        if self.offsets and len(latents) == len(self.levels) + len(self.offsets):
            expected = (*self.levels, *self.offsets)
        if len(latents) != len(expected):
            raise ValueError(
                f"Got {len(latents)} latents for {len(self.levels)} levels ({listing(self.level_names)}): "
                f"pass one tensor per level, as sample_latents returns them."
            )
        rows = len(latents[0]) if isinstance(latents[0], Tensor) and latents[0].ndim else 0
        for value, level in zip(latents, expected, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != self.device:
                is_tensor = isinstance(value, Tensor)
                kind = f"{value.dtype} on {value.device}" if is_tensor else type(value).__name__
                raise ValueError(
                    f"Level {level.name!r} got {kind}: expected a float tensor on the generator's device, "
                    f"{self.device}."
                )
            if tuple(value.shape[1:]) != level.shape or value.ndim == 0 or len(value) != rows:
                raise ValueError(
                    f"Level {level.name!r} got a latent of shape {tuple(value.shape)}: expected "
                    f"{(rows, *level.shape)}, the batch and the level's shape."
                )
        dtype: torch.dtype = self._place.dtype  # type: ignore[assignment]
        return once(lambda z: z.to(dtype), latents)

    def _checked_images(self, images: Tensor) -> Tensor:
        """Check images, and return them in the generator's precision."""
        fits = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        if not fits or images.shape[1:] != self.image_shape:
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"Invalid images, {described(images)}: expected floats in [0, 1] of shape (B, {shape})."
            )
        if images.device != self.device:
            raise ValueError(f"Invalid images on {images.device}: the generator is on {self.device}.")
        return images.to(self._place.dtype)  # type: ignore[arg-type]

    def _checked_labels(self, labels: Tensor | None, rows: int) -> Tensor | None:
        """Check labels, which there are if there are classes, and return them."""
        if labels is None and self.num_classes:
            raise ValueError(
                f"This generator is class-conditional: pass labels in [0, {self.num_classes}), "
                f"e.g. g.sample_labels(range({rows}))."
            )
        if labels is None:
            return None
        if not self.num_classes:
            raise ValueError("Invalid labels: this generator has no classes (num_classes=0); leave them out.")
        fits = isinstance(labels, Tensor) and labels.dtype == torch.int64 and tuple(labels.shape) == (rows,)
        if not fits or labels.device != self.device:
            device = f" on {labels.device}" if isinstance(labels, Tensor) else ""
            raise ValueError(
                f"Invalid labels, {described(labels)}{device}: expected int64 ({rows},) "
                f"on the generator's device, {self.device}."
            )
        if labels.device.type == "cpu" and rows:  # looking at values elsewhere would wait for the device
            low = int(labels.min())
            high = int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"Invalid labels from {low} to {high}: they are in [0, {self.num_classes}).")
        return labels


def as_levels(levels: Any) -> tuple[Level, ...]:
    """Return the levels as a tuple of :class:`Level`, or raise a ValueError."""
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise ValueError(f"Invalid levels={levels!r}: give a list of Level(name, shape), coarse to fine.")
    checked = []
    for level in levels:
        try:
            name, shape = level
            if not isinstance(name, str) or isinstance(shape, str):
                raise TypeError
            checked.append(Level(name, tuple(operator.index(size) for size in shape)))
        except (TypeError, ValueError):
            raise ValueError(
                f"Invalid level {level!r}: give Level(name, shape), a string and a tuple of integers."
            ) from None
        if ":" in name or name.lstrip("-").isdigit():
            raise ValueError(
                f"Invalid level name {name!r}: it would be read as an index or a range of levels; "
                "use another name."
            )
    return tuple(checked)


def _check_structure(levels: Sequence[Level], blocks: int, tied: bool) -> None:
    """Raise a ValueError for levels that do not make a generator of so many blocks."""
    names = [level.name for level in levels]
    if not levels:
        raise ValueError(
            "A generator needs at least one level: levels=() was given; "
            "pass levels=[Level(name, shape), ...]."
        )
    if blocks != len(levels):
        raise ValueError(
            f"Definition 1 has one block per level: got {blocks} blocks for {len(levels)} levels "
            f"({listing(names)}). Merge or split blocks so that the two agree."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"Level names must differ: got {listing(names)}. Rename the repeated one.")
    for level in levels:
        if any(size < 1 for size in level.shape):
            raise ValueError(f"Level {level.name!r} has shape {level.shape}: every size must be at least 1.")
    if tied and len({level.shape for level in levels}) > 1:
        raise ValueError(
            f"tied=True shares one draw between all levels, so their shapes must agree: got "
            f"{listing(level.shape for level in levels)}. Use tied=False, or equal shapes."
        )


def _image_shape(shape: Any) -> tuple[int, int, int]:
    """Return an image's shape as three integers, or raise a ValueError."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(
            f"Invalid image_shape={shape!r}: it must be (channels, height, width), integers of at least 1."
        )
    return sizes[0], sizes[1], sizes[2]


def place_of(module: nn.Module) -> Tensor:
    """Return an empty tensor where a module's weights are, in their precision, whatever torch's defaults are.

    For a module without weights it is float32, on the default device.
    """
    weight = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    return torch.empty(0, dtype=torch.float32) if weight is None else weight.detach().new_empty(0)


def _stack(parts: Sequence[Any]) -> Any:
    """Concatenate the states (or blocks' inputs) of several views into one batch."""
    if isinstance(parts[0], tuple):
        return tuple(_stack(members) for members in zip(*parts, strict=True))
    return torch.cat(list(parts))
