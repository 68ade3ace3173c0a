"""The view source: a generator in the place of a data loader (paper, sec. 3.3, "continuous sampling").

One step, in :meth:`MLViewSource.batch`: indices -> latents -> perturbed latents -> shared blocks -> images -> T_x. Every
number in it is a function of ``(seed, epoch, global sample index, view, level)``, so the source keeps no random state:
where it is in the epoch is all there is to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from mlviews import sampling
from mlviews.distributed import check_device, check_dtype, resolve_rank
from mlviews.errors import did_you_mean, integer, listing
from mlviews.generators.base import MLVGM
from mlviews.perturb import Normal, Perturber, assign
from mlviews.transforms import FACTORIES, Augmentation

Transform = Callable[[Tensor], Tensor]
"""T_x: an :class:`~mlviews.transforms.Augmentation`, or any callable on images ``[B, C, H, W]``, whose randomness is its own."""


class Batch(NamedTuple):
    """What a layout arranges. View 0 is the anchor, the others are its positives."""

    views: list[Tensor]  # float images [B, C, H, W], one tensor per view (per crop, if the source has crops)
    indices: Tensor  # int64 [B], global sample indices, unique over all ranks of an epoch
    targets: Tensor  # int64 [B], the classes drawn for a class-conditional generator; -1 for all others
    latents: list[Sequence[Tensor]]  # per view, one float32 tensor [B, *level.shape] per level
    first_index: int | None  # of consecutive indices, as a number, so that no layout has to ask the device; None in a pool


def pair_layout(batch: Batch) -> tuple[Tensor, ...]:
    """``(anchor, positive, ...)``: a tuple of views, for ``for anchor, positive in source``."""
    return tuple(batch.views)


def solo_layout(batch: Batch) -> list[Any]:
    """``[indexes, [views], targets]``, as solo-learn's trainers take it."""
    return [batch.indices, list(batch.views), batch.targets]


def lightly_layout(batch: Batch) -> tuple[list[Tensor], Tensor, list[str]]:
    """``(views, targets, filenames)``, as lightly's trainers take it."""
    first, count = batch.first_index, len(batch.indices)
    numbers = batch.indices.tolist() if first is None else range(first, first + count)
    return list(batch.views), batch.targets, [f"{number:010d}" for number in numbers]


LAYOUTS: dict[str, Callable[[Batch], Any]] = {"pair": pair_layout, "solo": solo_layout, "lightly": lightly_layout}


class MLViewSource(IterableDataset[Any]):
    """Fresh anchors and positives at every step, made on the training device; iterate over it like over a data loader.

    Each pass is one epoch of ``num_samples`` new samples. A pass that reached its end is followed by the next epoch;
    :meth:`set_epoch` chooses one. The samples of one step are consecutive, rank 0's first; a last, smaller batch is left
    out unless ``drop_last=False``. Content does not depend on batch size, ranks, device (up to float rounding) or on
    where a run was resumed. Epoch, ranks and device are looked up when the first batch is asked for, not before.
    ``len(source)`` counts batches, ``source.num_samples`` samples.

    Args:
        generator: an :class:`~mlviews.MLVGM`; moved to ``device``.
        perturb: a perturber for all levels, or ``{level: perturber}`` with a level's index, its name or ``"start:stop"``.
            Levels not named are fixed.
        anchor: distribution of the anchors' latents; by default N(0, 1) truncated as the generator prefers.
        transform: T_x, applied to every view: an :class:`~mlviews.transforms.Augmentation`, or any callable on images
            ``[B, C, H, W]``; a sequence of them gives each view its own (or each crop); None for raw views in [0, 1].
        batch_size: samples per batch and rank.
        num_samples: samples per epoch over all ranks.
        num_views: views of each sample, the anchor included.
        crops: for multi-crop training, the view that each image of a batch is cut from: ``(0, 1, 0, 1, 0, 1)`` with six
            transforms for two large crops and four small ones. Each crop is augmented on its own. None: one of each view.
        pool: keep to ``num_samples`` samples: every epoch has the same latents, index by index, in a new order and newly
            augmented. For methods that keep something per sample, and to compare a finite set with the endless stream.
        seed: integer in ``[0, 2**64)``; the only source of randomness.
        device: where views are made; None: where the generator is.
        layout: "pair", "solo", "lightly", or a callable that gets a :class:`Batch`; see the functions ``*_layout``.
        rank: of this process; None: torch.distributed's, else the variable RANK, else 0.
        world_size: number of processes; None likewise.
        drop_last: leave out a last, smaller batch. If kept, every rank gets as many of its samples; up to ``world_size - 1`` are left
            out.
        micro_batch_size: most samples the generator sees at once, to bound its memory; None: the whole batch.
        dtype: "bfloat16" or "float16": of the generator's convolutions and products, under ``torch.autocast``; None: float32.
            Views are float32 all the same. Content changes by the rounding.
        compile: run the generator under ``torch.compile`` (on a CPU this needs a C++ compiler, and gains nothing).

    Raises:
        ValueError: for any argument out of range, naming the values that are allowed.
    """

    def __init__(
        self,
        generator: MLVGM,
        perturb: Perturber | Mapping[int | str, Perturber] | None = None,
        anchor: sampling.Normal | None = None,
        transform: Transform | Sequence[Transform | None] | None = None,
        batch_size: int = 256,
        num_samples: int = 60_000,
        num_views: int = 2,
        crops: Sequence[int] | None = None,
        pool: bool = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        layout: str | Callable[[Batch], Any] = "pair",
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
        micro_batch_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        if not isinstance(generator, MLVGM):
            raise ValueError(
                f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM. "
                f"Wrap a callable with mlviews.wrap_generator(fn, levels=..., image_shape=...)."
            )
        self.generator = generator
        self.assignments = assign(perturb, generator.levels)
        self.anchor = Normal(1.0, generator.truncation) if anchor is None else anchor
        if not isinstance(self.anchor, sampling.Normal):
            raise ValueError(f"Invalid anchor={anchor!r}: it must be a perturb.Normal(std, truncation, mean).")
        self.batch_size = integer("batch_size", batch_size, 1)
        self.num_samples = integer("num_samples", num_samples, 1, 1 << 32)
        self.num_views = integer("num_views", num_views, 1, sampling.MAX_VIEWS)
        self.micro_batch_size = self.batch_size if micro_batch_size is None else integer("micro_batch_size", micro_batch_size, 1)
        self.crops = tuple(range(self.num_views)) if crops is None else _crops(crops, self.num_views)
        self.transforms = _transforms(
            transform, len(self.crops), f"num_views={num_views}" if crops is None else f"crops={crops!r}", generator
        )
        self.seed = sampling.check_seed(seed)
        self.requested_device = None if device is None else check_device(device)
        self.layout = _layout(layout)
        for name, value in (("drop_last", drop_last), ("compile", compile), ("pool", pool)):
            if not isinstance(value, bool):
                raise ValueError(f"Invalid {name}={value!r}: it must be True or False.")
        self.drop_last = drop_last
        self.pool = pool
        self.dtype = check_dtype(dtype, self.requested_device or generator.device)
        self._decode_views = torch.compile(generator.decode_views) if compile else generator.decode_views
        self.requested_rank = rank, world_size
        self._epoch = 0
        self._position = 0  # samples of this epoch that the latest pass has handed out, over all ranks
        self._resume = False  # the next pass starts at _position, not at 0
        self._moves = 0  # how often the position was set from outside: a pass begun before is over
        self._draw: sampling.Draw | None = None
        self._order: tuple[int, Tensor] | None = None  # of a pool's samples in an epoch
        len(self)  # an impossible size or rank is an error here, not at the first batch

    # -- one step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def batch(self, start: int, stop: int) -> Batch:
        """The samples ``start`` to ``stop`` (exclusive) of the current epoch: the whole step, start to finish.

        Raises:
            ValueError: if the range is empty or outside ``[0, num_samples]``, or if the generator, a perturber or a transform
                returns something of the wrong shape.
        """
        start, stop = integer("start", start, 0, self.num_samples - 1), integer("stop", stop, start + 1, self.num_samples)
        generator, (device, draw) = self.generator, self._prepare()
        with torch.autocast(device.type, enabled=False):  # content must not depend on where the loop is run
            indices = self._shuffled(device)[start:stop] if self.pool else torch.arange(start, stop, device=device)
            drawn = draw(indices, self.seed, 0 if self.pool else self._epoch)

            anchors = generator.shape_latents(drawn[: len(generator.drawn_levels)])
            labels = generator.as_labels(drawn.pop()) if generator.num_classes else None
            noise = iter(drawn[len(generator.drawn_levels) :])
            latents: list[Sequence[Tensor]] = [anchors, *(self._positive(anchors, noise) for _ in range(1, self.num_views))]

            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                chunks = [
                    self._decode_views(_rows(latents, part), self._first, None if labels is None else labels[part])
                    for part in _slices(stop - start, self.micro_batch_size)
                ]
            views = chunks[0] if len(chunks) == 1 else [torch.cat(parts) for parts in zip(*chunks, strict=True)]
            views = [self._augment(views[view], indices, crop) for crop, view in enumerate(self.crops)]
        targets = torch.full_like(indices, -1) if labels is None else labels
        return Batch(views, indices, targets, latents, None if self.pool else start)

    def _shuffled(self, device: torch.device) -> Tensor:
        """The order of a pool's samples in this epoch."""
        if self._order is None or self._order[0] != self._epoch or self._order[1].device != device:
            with torch.inference_mode(False):  # it is kept, and may be needed outside
                self._order = self._epoch, sampling.permutation(self.num_samples, self.seed, self._epoch, device)
        return self._order[1]

    def _positive(self, anchors: Sequence[Tensor], noise: Iterator[Tensor]) -> list[Tensor]:
        """One positive's latents; takes its noise off ``noise``, in the order of :meth:`_prepare`'s plan."""
        moved = list(anchors)
        for levels, perturber in self.assignments:
            own = [anchors[level] for level in levels]
            drawn = None if perturber.noise(self.anchor) is None else [next(noise).view_as(z) for z in own]
            made = perturber(own, drawn)
            if not isinstance(made, Sequence) or [getattr(z, "shape", None) for z in made] != [z.shape for z in own]:
                raise ValueError(
                    f"Perturber {perturber!r} must return one tensor per level, shaped like the anchor's: levels {listing(levels)}."
                )
            for level, z in zip(levels, made, strict=True):
                moved[level] = z
        return moved

    def _augment(self, images: Tensor, indices: Tensor, crop: int) -> Tensor:
        transform = self.transforms[crop]
        if isinstance(transform, Augmentation):
            return transform(images, indices, seed=self.seed, epoch=self._epoch, view=crop)
        if transform is None:  # a view cut twice is still two tensors
            return images if self.crops.index(self.crops[crop]) == crop else images.clone()
        made = transform(images)
        if not isinstance(made, Tensor) or len(made) != len(images):
            found = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"The transform of view {crop} returned {found}: it must return a tensor of {len(images)} images.")
        return made

    @property
    def device(self) -> torch.device:
        """Where views are made. Asking moves the generator there."""
        return self._prepare()[0]

    @property
    def _first(self) -> int:
        """The first level that differs between views: all blocks before it run once per sample."""
        return self.assignments[0].levels[0] if self.assignments else len(self.generator.levels)

    def _prepare(self) -> tuple[torch.device, sampling.Draw]:
        """The device, with the generator and the walkers on it, and the plan of what to draw there."""
        if self._draw is None or self._draw.device != self.generator.device:
            _move(self.generator, self.requested_device)
            device = self.generator.device
            check_dtype(self.dtype, device)  # the generator may have been moved since
            size = {index: level.size for index, level in enumerate(self.generator.levels)}
            fields = [
                sampling.Field(level.size, sampling.ANCHOR, 0, index, self.anchor)
                for index, level in enumerate(self.generator.drawn_levels)
            ]
            for view in range(1, self.num_views):
                for levels, perturber in self.assignments:
                    if isinstance(perturber, nn.Module):
                        _move(perturber, device)
                        perturber.eval()
                    law = perturber.noise(self.anchor)
                    fields += [sampling.Field(size[level], sampling.NOISE, view, level, law) for level in levels if law is not None]
            if self.generator.num_classes:
                fields.append(sampling.LABEL_FIELD)
            self._draw = sampling.Draw(fields, device)
        return self._draw.device, self._draw

    # -- the epoch -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """A pass over the epoch. Nothing happens, and nothing is looked up, before its first ``next()``."""
        if get_worker_info() is not None:
            raise ValueError(
                "MLViewSource cannot run inside DataLoader workers (num_workers > 0): the generator lives on the training device, "
                "and every worker would make the same views. Iterate over the source itself, or use num_workers=0, batch_size=None."
            )
        rank, world_size = resolve_rank(*self.requested_rank)
        len(self)  # the launcher's ranks may have come after the source was made
        if not self._step_size(self._position, world_size):  # the latest pass reached its end
            self._epoch += 1
            self._position = 0
            self._moves += 1
        elif not self._resume:
            self._position = 0
        self._resume = False
        position, moves = self._position, self._moves
        while count := self._step_size(position, world_size):
            if self._moves != moves:
                raise RuntimeError(
                    "The epoch or the position was set during a pass, or another pass came to its end and the next epoch began: "
                    "that ends it; start a new one with iter(source)."
                )
            batch = self.batch(position + count * rank // world_size, position + count * (rank + 1) // world_size)
            position += count
            self._position = position
            yield self.layout(batch)

    def _step_size(self, position: int, world_size: int) -> int:
        """Samples of the step that starts at this position of the epoch, over all ranks; 0 at its end."""
        left, full = self.num_samples - position, self.batch_size * world_size
        if left >= full:
            return full
        return 0 if self.drop_last else left - left % world_size  # alike on all ranks, for losses that gather

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank.

        Raises:
            ValueError: if there is none, naming the sizes.
        """
        count = self.batches_after(0)
        if count == 0:
            world_size = resolve_rank(*self.requested_rank)[1]
            raise ValueError(
                f"An epoch would have no batch: num_samples={self.num_samples} for batch_size={self.batch_size} on world_size={world_size} "
                + (
                    f"needs at least {self.batch_size * world_size}. Raise num_samples, lower batch_size, or pass drop_last=False."
                    if self.drop_last
                    else f"needs at least {world_size}, one for each rank. Raise num_samples."
                )
            )
        return count

    def batches_after(self, position: int) -> int:
        """Batches on each rank from this place in an epoch on: ``position`` samples, over all ranks, were handed out before."""
        world_size = resolve_rank(*self.requested_rank)[1]
        full, left = divmod(self.num_samples - position, self.batch_size * world_size)
        return full + bool(self._step_size(self.num_samples - left, world_size))

    @property
    def epoch(self) -> int:
        """The current epoch: of the latest pass, or the one set since."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, from its start (or from where :meth:`load_state_dict` left that very epoch).

        Raises:
            ValueError: if it is not an integer in ``[0, 2**32)``.
        """
        epoch = sampling.check_epoch(epoch)
        resumes = self._resume and epoch == self._epoch and self._step_size(self._position, resolve_rank(*self.requested_rank)[1]) > 0
        if not resumes:
            self._position = 0
            self._resume = False
        self._epoch = epoch
        self._moves += 1

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    @property
    def sampler(self) -> MLViewSource:
        """The source itself: Lightning and others set the epoch through ``loader.sampler.set_epoch``."""
        return self

    def state_dict(self) -> dict[str, int]:
        """Where the latest pass is: ``seed``, ``epoch``, ``position`` (the samples handed out over all ranks); of a pool its size too."""
        size = {"num_samples": self.num_samples} if self.pool else {}
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position} | size

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next pass go on where the state was taken, on any number of ranks and with any batch size.

        Raises:
            ValueError: if the state is incomplete, belongs to another seed or to a pool of another size, or lies beyond this epoch's end.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"Invalid state {state!r}: pass what state_dict() returned.")
        missing = {"seed", "epoch", "position"} - set(state)
        if missing:
            raise ValueError(f"Invalid state {dict(state)!r}: it lacks {listing(sorted(missing))}; pass what state_dict() returned.")
        if state["seed"] != self.seed:
            raise ValueError(f"The state belongs to seed={state['seed']!r}, this source has seed={self.seed}: make it with the same seed.")
        if self.pool and state.get("num_samples", self.num_samples) != self.num_samples:
            raise ValueError(
                f"The state belongs to a pool of num_samples={state['num_samples']!r}, this one has {self.num_samples}, in another order: "
                "make it with as many."
            )
        position, epoch = integer("position", state["position"], 0, self.num_samples), sampling.check_epoch(state["epoch"])
        self._position, self._epoch = position, epoch
        self._resume = True
        self._moves += 1

    @classmethod
    def from_config(cls, config: Any) -> MLViewSource:
        """A source from a preset's name or a mapping; the schema is that of the presets (``mlviews/presets/README.md``).

        Raises:
            ValueError: for an unknown key or a bad value, naming those that are allowed.

        Examples:
            >>> source = MLViewSource.from_config({"preset": "fashion-ml-random", "batch_size": 4})
            >>> anchor, positive = next(iter(source))
        """
        from mlviews.config import source_arguments  # config reads presets into the arguments of this very class

        return cls(**source_arguments(config))


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _rows(latents: list[Sequence[Tensor]], part: slice) -> list[list[Tensor]]:
    """These samples' latents; what is one tensor in several places stays one."""
    cut = {id(z): z[part] for view in latents for z in view}
    return [[cut[id(z)] for z in view] for view in latents]


def _move(module: nn.Module, device: torch.device | None) -> None:
    """Put a module on a device, unless it is there ("cuda" stands for whichever GPU it is on)."""
    tensors = [*module.parameters(), *module.buffers()]
    if device is not None and any(t.device.type != device.type or device.index not in (None, t.device.index) for t in tensors):
        module.to(device)


def _layout(layout: str | Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    if isinstance(layout, str) and layout in LAYOUTS:
        return LAYOUTS[layout]
    if isinstance(layout, str) or not callable(layout):
        raise ValueError(
            f"Invalid layout={layout!r}: use {listing(LAYOUTS)}, or a callable that gets a Batch.{did_you_mean(layout, LAYOUTS)}"
        )
    return layout


def _crops(crops: object, num_views: int) -> tuple[int, ...]:
    if not isinstance(crops, Sequence) or isinstance(crops, str) or not 0 < len(crops) <= sampling.MAX_VIEWS:
        raise ValueError(f"Invalid crops={crops!r}: give the view of each crop, e.g. (0, 1, 0, 1), or None for one of each view.")
    return tuple(integer("crops", view, 0, num_views - 1) for view in crops)


def _transforms(
    transform: Transform | Sequence[Transform | None] | None, count: int, wanted: str, generator: MLVGM
) -> list[Transform | None]:
    """T_x of each view, or of each crop."""
    each = list(transform) if isinstance(transform, Sequence) else [transform] * count
    if len(each) != count:
        raise ValueError(f"Got {len(each)} transforms for {wanted}: give one for all of them, or one for each.")
    for one in each:
        if one is not None and (not callable(one) or one in FACTORIES):  # type: ignore[comparison-overlap]
            raise ValueError(f"Invalid transform={one!r}: use mlviews.transforms.simclr(size=...), another callable on images, or None.")
        if isinstance(one, Augmentation):
            one.check(generator.image_shape[0])
    return list(each)
