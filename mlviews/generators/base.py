"""Definition 1 of the paper as code: a generator is a stack of blocks, each taking one latent.

``g(z_1, ..., z_n) = to_image(l_n(z_n, l_{n-1}(z_{n-1}, ... l_1(z_1))))``

Because the blocks are explicit, what several views of one sample have in common (every block before the
first perturbed level) is computed once: :meth:`MLVGM.decode_views`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews import sampling
from mlviews.errors import integer, listing

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


class MLVGM(nn.Module):
    """A Multiple Latent Variable Generative Model (paper, Definition 1): frozen, in eval mode, images in [0, 1].

    Subclass it by handing ``__init__`` one block per level, in order. A block is a module called as
    ``block(z_i, state)`` that returns the next state; the first one gets ``state=None``. A state is a tensor whose
    first dimension is the batch, or a (nested) tuple of such tensors. Three hooks may be overridden:
    :meth:`condition`, :meth:`to_image` and :meth:`coordinates`.

    Args:
        blocks: one module per level.
        levels: ``Level(name, shape)`` or ``(name, shape)``, coarse to fine.
        image_shape: ``(C, H, W)`` of one image.
        tied: the levels share one draw (StyleGAN2: a single z feeds every style); sampled latents are then equal
            at every level, and perturbers move each level on its own.
        truncation: of the anchors that :meth:`sample_latents` draws when not told otherwise, in standard
            deviations; ``None`` for the full normal.
        num_classes: of a class-conditional generator, which takes a label for every sample besides its latents; 0 for all others.

    Raises:
        ValueError: if there are no levels, or not one block per level, or a shape is not positive, or two levels
            share a name.

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
        self.levels = _levels(levels)
        self.image_shape = _image_shape(image_shape)
        try:
            self.blocks = nn.ModuleList(blocks)
        except TypeError:
            raise ValueError(f"Invalid blocks={blocks!r}: give one torch.nn.Module per level.") from None
        # load_generator gives it the name and the options that it was asked for.
        self.name = type(self).__name__
        self.options: dict[str, Any] = {}
        self.tied = tied
        self.num_classes = integer("num_classes", num_classes, 0)
        self.truncation = sampling.Normal(1.0, truncation).truncation
        names = [level.name for level in self.levels]
        if not self.levels:
            raise ValueError("A generator needs at least one level: levels=() was given; pass levels=[Level(name, shape), ...].")
        if len(self.blocks) != len(self.levels):
            raise ValueError(
                f"Definition 1 has one block per level: got {len(self.blocks)} blocks for {len(self.levels)} levels "
                f"({listing(names)}). Merge or split blocks so that the two agree."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"Level names must differ: got {listing(names)}. Rename the repeated one.")
        for level in self.levels:
            if any(size < 1 for size in level.shape):
                raise ValueError(f"Level {level.name!r} has shape {level.shape}: every size must be at least 1.")
        if tied and len({level.shape for level in self.levels}) > 1:
            raise ValueError(
                f"tied=True shares one draw between all levels, so their shapes must agree: got "
                f"{listing(level.shape for level in self.levels)}. Use tied=False, or equal shapes."
            )
        # Follows .to(): a generator without parameters (a wrapped callable) has a device too.
        self.register_buffer("_where", torch.empty(0, dtype=torch.float32), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Freezes every module and parameter it is given, also those of a subclass's own ``__init__``."""
        if isinstance(value, nn.Module | nn.Parameter):
            value.requires_grad_(False)
        if isinstance(value, nn.Module):
            value.eval()
        super().__setattr__(name, value)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        """What each block takes as its latent, e.g. W from Z. Default: the latents themselves.

        Levels that were not moved hold the very same tensor (``is``) where levels are tied, and are worth mapping only once.
        ``labels`` is int64 ``[B]`` for a class-conditional generator, else None. Each result is a tensor whose first
        dimension is the batch, or a (nested) tuple of such tensors.
        """
        return latents

    def coordinates(self, latents: Latents, labels: Tensor | None) -> Sequence[Tensor]:
        """Each level's place ``[B, ...]`` in the space where its :meth:`distances` are measured. Default: that of the latents."""
        return latents

    def to_image(self, state: Any) -> Tensor:
        """The last block's state as float images ``[B, C, H, W]`` in [0, 1]. Default: the state itself."""
        image: Tensor = state
        return image

    # -- the forward pass ----------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Any], state: Any = None, *, start: int = 0, stop: int | None = None) -> Any:
        """Blocks ``start`` to ``stop`` (exclusive; ``None``: all) on conditioned latents, from ``state`` on."""
        for index in range(start, len(self.blocks) if stop is None else stop):
            state = self.blocks[index](inputs[index], state)
        return state

    def decode(self, latents: Latents, labels: Tensor | None = None, *, state: Any = None, start: int = 0) -> Tensor:
        """Images ``[B, C, H, W]`` in [0, 1] from latents, differentiable with respect to them.

        ``state`` is what the blocks before level ``start`` made of these latents, one of :meth:`states`; they are not run again.
        """
        latents = self._checked(latents)
        rows = len(latents[0])
        labels = self._checked_labels(labels, rows)
        if not rows:
            return self._no_images()
        # A copy: a block may change its state in place, and this one serves other views too.
        return self._images(self.run(self.condition(latents, labels), None if state is None else _stack([state]), start=start), rows)

    @torch.no_grad()
    def states(self, latents: Latents, labels: Tensor | None = None) -> list[Any]:
        """The state before each block, ``None`` before the first, and the one after the last: :meth:`decode` goes on from any of them."""
        latents = self._checked(latents)
        inputs = self.condition(latents, self._checked_labels(labels, len(latents[0])))
        found: list[Any] = [None]
        for index in range(len(self.blocks)):
            before = found[-1]
            found.append(self.run(inputs, None if before is None else _stack([before]), start=index, stop=index + 1))
        return found

    @torch.no_grad()
    def forward(self, latents: Latents, labels: Tensor | None = None) -> Tensor:
        """Images from latents, without a graph.

        Args:
            latents: one float tensor ``[B, *level.shape]`` per level, on the generator's device.
            labels: for a class-conditional generator, int64 ``[B]`` in ``[0, num_classes)``; see :meth:`sample_labels`.

        Returns:
            float32 images ``[B, C, H, W]`` in [0, 1] on the generator's device.

        Raises:
            ValueError: if the latents do not fit the levels, labels are missing, out of range or not wanted, or the
                generator does not return such images.
        """
        return self.decode(latents, labels)

    @torch.no_grad()
    def decode_views(self, views: Sequence[Latents], first: int, labels: Tensor | None = None) -> list[Tensor]:
        """Images of several views that agree below level ``first``, whose common blocks run once.

        Args:
            views: latents of each view, view 0 being the anchor.
            first: index of the first level at which views differ; ``len(levels)`` if none does.
            labels: as for :meth:`forward`; all views of a sample share its label.

        Returns:
            One float32 tensor ``[B, C, H, W]`` per view, equal to ``[g(z, labels) for z in views]`` up to float rounding.

        Raises:
            ValueError: as :meth:`forward`, and if there are no views or ``first`` is out of range.
        """
        count = len(views)
        if not count:
            raise ValueError("Invalid views=[]: there is at least one, the anchor.")
        first = integer("first", first, 0, len(self.levels))
        views = [self._checked(latents) for latents in views]
        rows = len(views[0][0])
        labels = self._checked_labels(labels, rows)
        if not rows:
            return [self._no_images() for _ in range(count)]
        anchor, *others = (self.condition(latents, labels) for latents in (views if first < len(self.levels) else views[:1]))
        state = self.run(anchor, stop=first) if first else None
        if first == len(self.levels):
            image = self._images(state, rows)
            return [image, *(image.clone() for _ in range(count - 1))]
        # One batch of all views from here on.
        inputs = [None] * first + [_stack(parts) for parts in zip(*(view[first:] for view in (anchor, *others)), strict=True)]
        state = self.run(inputs, _stack([state] * count) if first else None, start=first)
        return list(self._images(state, count * rows).chunk(count))

    @torch.no_grad()
    def distances(self, anchors: Latents, positives: Latents, labels: Tensor | None = None) -> list[Tensor]:
        """How far each level was moved: ``[B]`` per level, the L2 norm in the space that the level lives in (paper, sec. 3.1).

        Raises:
            ValueError: as :meth:`forward`, and if there are not as many positives as anchors.
        """
        anchors, positives = self._checked(anchors), self._checked(positives)
        if len(anchors[0]) != len(positives[0]):
            raise ValueError(f"Got {len(positives[0])} positives for {len(anchors[0])} anchors: give one of each sample.")
        labels = self._checked_labels(labels, len(anchors[0]))
        pairs = zip(self.coordinates(anchors, labels), self.coordinates(positives, labels), strict=True)
        return [(there - here).flatten(1).norm(dim=1) for here, there in pairs]

    # -- sampling ------------------------------------------------------------------------------------------------

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
        """Anchor latents of the samples with these global indices (paper, sec. 3.2).

        Sample *i* depends on ``(seed, epoch, i)`` only, so any subset in any order gives the same values. They are
        the anchors that a :class:`mlviews.MLViewSource` with the same seed, epoch and anchor distribution draws.

        Args:
            indices: ``B`` global sample indices in ``[0, 2**32)``: a range, a list or an integer tensor.
            seed: integer in ``[0, 2**64)``.
            epoch: integer in ``[0, 2**32)``.
            mean: of the (truncated) normal.
            std: of the normal before truncation, at least 0.
            truncation: support ``mean ± truncation * std``; ``None`` for the full normal; by default the
                generator's own ``truncation``.

        Returns:
            One float32 tensor ``[B, *level.shape]`` per level on the generator's device (the same tensor for every
            level of a tied generator).

        Raises:
            ValueError: for a seed, epoch or index out of range, a negative std or a truncation that is not positive.
        """
        cut = self.truncation if truncation == "default" else truncation
        if isinstance(cut, str):
            raise ValueError(f"Invalid truncation={truncation!r}: give a positive number, None, or leave it out.")
        anchor = sampling.Normal(std, cut, mean)
        draw = sampling.Draw(
            [sampling.Field(level.size, sampling.ANCHOR, 0, index, anchor) for index, level in enumerate(self.drawn_levels)],
            device=self.device,
        )
        values = draw(sampling.as_indices(indices, self.device), seed, epoch)
        return self.shape_latents(values)

    def sample_noise(
        self,
        indices: Iterable[int] | Tensor,
        law: sampling.Normal,
        seed: int = 0,
        epoch: int = 0,
        *,
        view: int = 1,
        levels: Iterable[int] | None = None,
    ) -> list[Tensor]:
        """Noise for these levels (None: all), float32 ``[B, *level.shape]`` each: what the perturbers of a source's view get.

        Raises:
            ValueError: for a seed, epoch, index or view out of range.
        """
        chosen = list(range(len(self.levels)) if levels is None else levels)
        fields = [sampling.Field(self.levels[index].size, sampling.NOISE, view, index, law) for index in chosen]
        values = sampling.Draw(fields, device=self.device)(sampling.as_indices(indices, self.device), seed, epoch)
        return [value.reshape(-1, *self.levels[index].shape) for value, index in zip(values, chosen, strict=True)]

    def sample_labels(self, indices: Iterable[int] | Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """Labels of the samples with these global indices, int64 ``[B]``, uniform over the classes: those a source draws.

        Raises:
            ValueError: if the generator has no classes, or for a seed, epoch or index out of range.
        """
        if not self.num_classes:
            raise ValueError("This generator has no classes (num_classes=0): it takes no labels.")
        draw = sampling.Draw([sampling.LABEL_FIELD], device=self.device)
        return self.as_labels(draw(sampling.as_indices(indices, self.device), seed, epoch)[0])

    def as_labels(self, uniform: Tensor) -> Tensor:
        """int64 labels ``[B]`` from uniform numbers ``[B, 1]`` in (0, 1)."""
        return (uniform[:, 0] * self.num_classes).long().clamp_(max=self.num_classes - 1)

    @property
    def drawn_levels(self) -> tuple[Level, ...]:
        """The levels whose anchors are drawn: all, or the first one where they share one draw."""
        return self.levels[:1] if self.tied else self.levels

    def shape_latents(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Anchor latents ``[B, *level.shape]`` of all levels from the flat draws of :attr:`drawn_levels`."""
        shaped = [value.contiguous().view(-1, *level.shape) for value, level in zip(values, self.drawn_levels, strict=True)]
        return shaped * len(self.levels) if self.tied else shaped

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the generator is."""
        where: Tensor = self._where  # type: ignore[assignment]
        return where.device

    def train(self, mode: bool = True) -> MLVGM:
        """Stays in eval mode: a view source's statistics must not move, whoever calls ``.train()`` around it."""
        super().train(False)
        return self

    def _no_images(self) -> Tensor:
        """An empty batch's: no block has to care."""
        return torch.empty((0, *self.image_shape), device=self.device)

    def _images(self, state: Any, rows: int) -> Tensor:
        """:meth:`to_image`, held to its word; half-precision generators give float32 images too."""
        image = self.to_image(state)
        expected = (rows, *self.image_shape)
        if not isinstance(image, Tensor) or not image.is_floating_point() or tuple(image.shape) != expected:
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"The generator returned {found}: it must return a float tensor {expected} with values in [0, 1].")
        return image.float()

    def _checked(self, latents: Latents) -> Latents:
        """The latents, in the generator's precision."""
        if isinstance(latents, Tensor) or not isinstance(latents, Sequence):
            raise ValueError(
                f"Invalid latents of type {type(latents).__name__}: pass a list of one tensor per level, as sample_latents does."
            )
        if len(latents) != len(self.levels):
            raise ValueError(
                f"Got {len(latents)} latents for {len(self.levels)} levels ({listing(self.level_names)}): "
                f"pass one tensor per level, as sample_latents returns them."
            )
        rows = len(latents[0]) if isinstance(latents[0], Tensor) and latents[0].ndim else 0
        for value, level in zip(latents, self.levels, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != self.device:
                found = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"Level {level.name!r} got {found}: expected a float tensor on the generator's device, {self.device}.")
            if tuple(value.shape[1:]) != level.shape or value.ndim == 0 or len(value) != rows:
                raise ValueError(
                    f"Level {level.name!r} got a latent of shape {tuple(value.shape)}: expected "
                    f"{(rows, *level.shape)}, the batch and the level's shape."
                )
        cast = {id(z): z.to(self._where.dtype) for z in latents}  # type: ignore[arg-type]
        return [cast[id(z)] for z in latents]  # one tensor stays one tensor

    def _checked_labels(self, labels: Tensor | None, rows: int) -> Tensor | None:
        if labels is None and self.num_classes:
            raise ValueError(
                f"This generator is class-conditional: pass labels in [0, {self.num_classes}), e.g. g.sample_labels(range({rows}))."
            )
        if labels is None:
            return None
        if not self.num_classes:
            raise ValueError("Invalid labels: this generator has no classes (num_classes=0); leave them out.")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != (rows,) or labels.device != self.device:
            found = f"{labels.dtype} {tuple(labels.shape)} on {labels.device}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"Invalid labels, {found}: expected int64 ({rows},) on the generator's device, {self.device}.")
        if labels.device.type == "cpu" and rows and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"Invalid labels from {int(labels.min())} to {int(labels.max())}: they are in [0, {self.num_classes}).")
        return labels

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the levels, coarse to fine."""
        return tuple(level.name for level in self.levels)


def _levels(levels: Any) -> tuple[Level, ...]:
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise ValueError(f"Invalid levels={levels!r}: give a list of Level(name, shape), coarse to fine.")
    found = []
    for level in levels:
        try:
            name, shape = level
            if not isinstance(name, str) or isinstance(shape, str):
                raise TypeError
            found.append(Level(name, tuple(operator.index(size) for size in shape)))
        except (TypeError, ValueError):
            raise ValueError(f"Invalid level {level!r}: give Level(name, shape), a string and a tuple of integers.") from None
        if ":" in name or name.lstrip("-").isdigit():
            raise ValueError(f"Invalid level name {name!r}: it would be read as an index or a range of levels; use another name.")
    return tuple(found)


def _image_shape(shape: Any) -> tuple[int, int, int]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"Invalid image_shape={shape!r}: it must be (channels, height, width), integers of at least 1.")
    return sizes[0], sizes[1], sizes[2]


def _stack(parts: Sequence[Any]) -> Any:
    """The states (or blocks' inputs) of several views as one batch."""
    if isinstance(parts[0], tuple):
        return tuple(_stack(same) for same in zip(*parts, strict=True))
    return torch.cat(list(parts))


class _Collect(nn.Module):
    """A block that only hands its latent on: a wrapped callable needs all of them at once. The last one has the labels too."""

    def forward(self, z: Tensor | tuple[Tensor, Tensor], state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return (*(state or ()), *(z if isinstance(z, tuple) else (z,)))


class WrappedGenerator(MLVGM):
    """See :func:`wrap_generator`."""

    def __init__(self, fn: Callable[..., Tensor], levels: Sequence[Any], image_shape: tuple[int, int, int], **options: Any) -> None:
        super().__init__([_Collect() for _ in levels], levels, image_shape, **options)
        self.fn = fn

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Any]:
        return latents if labels is None else [*latents[:-1], (latents[-1], labels)]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        count = len(self.levels)
        return self.fn(list(state[:count]), *state[count:])


def wrap_generator(
    fn: Callable[..., Tensor],
    *,
    levels: Iterable[Level | tuple[str, tuple[int, ...]]],
    image_shape: tuple[int, int, int],
    tied: bool = False,
    truncation: float | None = 2.0,
    num_classes: int = 0,
) -> MLVGM:
    """Any callable as a generator.

    Its blocks are not known, so views share no work; everything else works as for a subclass of :class:`MLVGM`.

    Args:
        fn: called with the list of latents (one float tensor ``[B, *shape]`` per level), and with int64 labels ``[B]`` if it
            has classes; returns float images ``[B, C, H, W]`` in [0, 1]. If it is a module, it is frozen, put in eval mode
            and moved with the generator.
        levels: ``Level(name, shape)`` or ``(name, shape)``, coarse to fine.
        image_shape: ``(C, H, W)``.
        tied: see :class:`MLVGM`.
        truncation: see :class:`MLVGM`.
        num_classes: see :class:`MLVGM`.

    Raises:
        ValueError: if ``fn`` is not callable, or the levels or the image shape are invalid.

    Examples:
        >>> g = wrap_generator(lambda z: z[0].sigmoid().view(-1, 1, 4, 4), levels=[("z", (16,))], image_shape=(1, 4, 4))
        >>> g(g.sample_latents(range(2))).shape
        torch.Size([2, 1, 4, 4])
    """
    if not callable(fn):
        raise ValueError(f"Invalid fn={fn!r}: it must be callable with a list of latents and return images [B, C, H, W] in [0, 1].")
    return WrappedGenerator(fn, _levels(levels), image_shape, tied=tied, truncation=truncation, num_classes=num_classes)
