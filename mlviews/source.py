"""The view source: a generator in the place of a data loader (paper, sec. 3.3, "continuous sampling").

What one step makes is in :mod:`mlviews.step`. Here is the loader around it: epochs, the place in them, ranks
and layouts. Every number in a batch is a function of ``(seed, epoch, global sample index, view, level)``, so
the source keeps no random state, and its place in the epoch is all there is to save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mlviews import checks, sampling
from mlviews.anchors import Images, Pool, Prior
from mlviews.checks import integer
from mlviews.codes import Codes, Encoding
from mlviews.config import ARGUMENTS, source_arguments
from mlviews.errors import did_you_mean, listing
from mlviews.generators.base import MLVGM
from mlviews.images import ImageSet, Reader, Shape, as_image_set
from mlviews.perturb import Assignment, Perturber, Walker, assign
from mlviews.reuse import MOST, Reuse
from mlviews.runs import callers
from mlviews.runs.files import warn_of_other_weights
from mlviews.runs.processes import check_device, check_dtype, resolve_rank
from mlviews.sampling import TruncatedNormal
from mlviews.step import Batch, ByOrigin, Step, Transform
from mlviews.transforms import FACTORIES, Augmentation


def pair_layout(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return ``(anchor, positive, ...)``: a tuple of views, for ``for anchor, positive in source``."""
    return tuple(batch.views)


def solo_layout(batch: Batch) -> list[Any]:
    """Return ``[indexes, [views], targets]``, as solo-learn's trainers take it."""
    return [batch.indices, list(batch.views), batch.targets]


def lightly_layout(batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor, list[str]]:
    """Return ``(views, targets, filenames)``, as lightly's trainers take it."""
    first, count = batch.first_index, len(batch.indices)
    numbers = batch.indices.tolist() if first is None else range(first, first + count)
    return list(batch.views), batch.targets, [f"{number:010d}" for number in numbers]


def stable_pretraining_layout(batch: Batch) -> dict[str, Any]:
    """Return ``{"views": ...}``, as stable-pretraining's modules take it.

    Every view is ``{"image", "label", "sample_idx"}``. Views of one size are a list. Crops of several sizes
    have names, as its DINO wants them: ``global_1``, ``global_2``, ... are the largest, ``local_1``, ... the
    others.
    """
    views = [{"image": image, "label": batch.targets, "sample_idx": batch.indices} for image in batch.views]
    sizes = [image.shape[-2] * image.shape[-1] for image in batch.views]
    if len(set(sizes)) == 1:
        return {"views": views}
    kinds: dict[str, list[dict[str, Tensor]]] = {"global": [], "local": []}
    for view, size in zip(views, sizes, strict=True):
        kinds["global" if size == max(sizes) else "local"].append(view)
    return {
        "views": {
            f"{kind}_{number}": view
            for kind, of_kind in kinds.items()
            for number, view in enumerate(of_kind, start=1)
        }
    }


DEFAULT_SAMPLES = 60_000

LAYOUTS: dict[str, Callable[[Batch], Any]] = {
    "pair": pair_layout,
    "solo": solo_layout,
    "lightly": lightly_layout,
    "stable_pretraining": stable_pretraining_layout,
}
BUILT_IN_LAYOUTS = tuple(LAYOUTS.values())


def separate(batch: Batch) -> Batch:
    """Return the batch with every latent in storage of its own, so that its reader may work in place."""
    return batch._replace(latents=[[z.clone() for z in view] for view in batch.latents])


_ROUND = 1 << 20  # rounds of one trainer's epoch are this far apart: more epochs than any training has


@dataclass
class Cursor:
    """The place of a source in its epochs. It changes by the methods below and in no other way.

    The rule: **a pass goes on with samples that no pass has handed out, unless a state was loaded or an epoch
    was named.** A pass that begins after a loaded state goes on from its position. After a pass that handed
    anything out, to its end or not, the next one begins the next epoch. A named epoch begins at its start,
    however often it is named.

    A trainer that names its epochs (Lightning, through ``sampler``) may pass over the source several times in
    one of them. The second of these passes cannot be the next epoch, which the trainer will name later: it is
    a further *round* of this one, with samples of its own.

    A pass in progress is over as soon as anything else has moved the cursor: it compares ``moves``.
    """

    epoch: int = 0  # of the counter streams: the epoch, plus _ROUND for each round of it before this one
    position: int = 0  # samples that the latest pass has handed out, over all ranks
    resumes: bool = False  # the next pass starts at position
    # The epoch of a loaded state has no batch left, and a trainer goes on with that very epoch.
    exhausted: bool = False
    by_trainer: bool = False  # a trainer named the epoch
    moves: int = 0  # how often a pass began, or the cursor was set

    def begin(self, at_end: bool) -> tuple[int, int]:
        """Begin a pass; return its first position, and the count of moves that it is valid for."""
        begun = self.position > 0
        if self.exhausted:
            self.exhausted = False
        elif begun and (at_end or not self.resumes):
            self.epoch += _ROUND if self.by_trainer else 1
            self.position = 0
        self.resumes = False
        self.moves += 1
        return self.position, self.moves

    def advance(self, position: int) -> None:
        """Take note of what a pass has handed out."""
        self.position = position

    def set_epoch(self, epoch: int, at_end: bool, by_trainer: bool = False) -> None:
        """Make the next pass this epoch, from where a loaded state left it, else from its start."""
        goes_on = self.resumes and epoch in (self.epoch, self.epoch % _ROUND)
        self.exhausted = goes_on and at_end and by_trainer
        if not goes_on or (at_end and not by_trainer):
            self.epoch, self.position = epoch, 0
            self.resumes = False
        self.by_trainer = by_trainer
        self.moves += 1

    def load(self, epoch: int, position: int) -> None:
        """Make the next pass go on at this place."""
        self.epoch, self.position = epoch, position
        self.resumes, self.exhausted = True, False
        self.moves += 1


class TrainerEpochs:
    """What Lightning finds as ``loader.sampler``: where a trainer names its epochs."""

    def __init__(self, source: MLViewSource) -> None:
        self._source = source

    def set_epoch(self, epoch: int) -> None:
        """Make the next passes rounds of this epoch of the trainer's.

        Raises:
            ValueError: if it is not an integer in ``[0, 2**32)``.
        """
        self._source.set_epoch(epoch, by_trainer=True)


class MLViewSource(IterableDataset[Any]):
    """Fresh anchors and positives at every step, made on the training device; iterate over it like over a
    data loader.

    Each pass is one epoch of ``num_samples`` new samples. A pass goes on with samples that no pass has handed
    out, unless a state was loaded or an epoch was named by :meth:`set_epoch`: after a pass that was left
    early the next one begins the next epoch too. The samples of one step are consecutive, rank 0's first; a
    last, smaller batch is left out unless ``drop_last=False``. Content does not depend on batch size, ranks,
    device (up to float rounding) or on where a run was resumed. Epoch, ranks and device are looked up when
    the first batch is asked for, not before. ``len(source)`` counts batches, ``source.num_samples`` samples.

    What to make:

    Args:
        generator: an :class:`~mlviews.MLVGM`; it is frozen, and moved to ``device``.
        perturb: a perturber for all levels, or ``{level: perturber}`` with a level's index, its name or
            ``"start:stop"``. Levels not named are fixed.
        anchor: the law of the anchors' latents; by default N(0, 1) truncated as the generator prefers.
        transform: T_x, applied to every view: an :class:`~mlviews.transforms.Augmentation`, or any callable
            on images ``[B, C, H, W]``; a sequence of them gives each view its own (or each crop); None for
            raw views in [0, 1].

        images: the user's own images as anchors: a folder (one folder a class, or flat), a map-style data
            set (torch's or Hugging Face's), or a tensor ``[N, C, H, W]`` (uint8, or floats in [0, 1]); the
            generator must have an encoder. Targets are their labels, -1 for images that have none. None:
            anchors are drawn.
        generated: with ``images``, the probability that a positive is the generator's, for each sample and
            positive; else it is the image itself.
        anchor_view: with ``images``, "real": view 0 is the image itself; "reconstructed": what the generator
            makes of its latents.
        refine: with ``images``, how many steps of optimization bring the latents of each image closer to it,
            after the generator's inverter. They cost about a hundred times as much as the inverter: keep
            their result by ``codes``.
        codes: with ``images``, a folder in which their latents are kept: made before the first batch, and
            read by every later run. It is refused for other images, another generator or another encoder.
            None: images are encoded at every step.
        workers: with ``images`` that are too many to be kept on the device, how many processes decode them
            ahead; None: as many as processors, at most eight; 0: none.

    How much of it:

        batch_size: samples per batch and rank.
        num_samples: samples per epoch over all ranks; None: the number of ``images``, or 60,000 without any.
        num_views: views of each sample, the anchor included.
        crops: for multi-crop training, the view that each image of a batch is cut from: ``(0, 1, 0, 1, 0,
            1)`` with six transforms makes two large crops and four small ones. Each crop is augmented on its
            own. None: one of each view.
        pool: whether to keep to ``num_samples`` samples: every epoch then has the same latents, index by
            index, in a new order and newly augmented. For methods that keep something per sample, and to
            compare a finite set with the endless stream.
        reuse: how many steps every generated sample serves, from 1 to 4,096: an epoch then has
            ``num_samples / reuse`` samples, and shows each that often, far apart and newly augmented by T_x.
            What a sample is does not change, but that it is rounded to 8 bits. Batches then hold no latents.
        reuse_memory: with ``reuse``, the most bytes that the images kept on the device may take;
            ``source.step.memory`` is what they take. The more there are, the farther apart a sample's
            showings are.
        drop_last: whether to leave out a last, smaller batch. If it is kept, every rank gets as many of its
            samples, and up to ``world_size - 1`` are left out.

    In which order, and for whom:

        seed: an integer in ``[0, 2**64)``; the only source of randomness.
        layout: "pair", "solo", "lightly", "stable_pretraining", or a callable that gets a :class:`Batch`;
            see the functions ``*_layout``.
        rank: the number of this process; None: torch.distributed's, else the variable RANK, else 0.
        world_size: the number of processes; None likewise.

    Where, and how:

        device: where views are made; None: where the generator is.
        micro_batch_size: the most samples that the generator sees at once, to bound its memory; None: the
            whole batch, on a CPU as many as the generator is fastest with (``cached_samples``).
        dtype: "bfloat16" or "float16" for the generator's convolutions and products, under
            ``torch.autocast``; None: float32. Views are float32 all the same. Content changes by the
            rounding.
        compile: whether to run the generator under ``torch.compile`` (on a CPU this needs a C++ compiler, and
            gains nothing).

    Raises:
        ValueError: for any argument out of range, naming the values that are allowed.
    """

    def __init__(
        self,
        generator: MLVGM,
        perturb: Perturber | Mapping[int | str, Perturber] | None = None,
        anchor: TruncatedNormal | None = None,
        transform: Transform | Mapping[str, Transform | None] | Sequence[Any] | None = None,
        batch_size: int = 256,
        num_samples: int | None = None,
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
        images: str | Path | Tensor | Dataset[Any] | ImageSet | None = None,
        generated: float = 1.0,
        anchor_view: str = "real",
        refine: int = 0,
        codes: str | Path | None = None,
        workers: int | None = None,
        reuse: int = 1,
        reuse_memory: int = 1 << 30,
    ) -> None:
        parameters = locals()
        self.arguments = {name: parameters[name] for name in ARGUMENTS}
        self._generator = generator = _generator(generator)
        self.assignments = assign(perturb, generator.levels)
        _warn_of_walkers(self.assignments, generator)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.images = _image_set(images, generator)
        self.num_samples = _num_samples(num_samples, self.images)
        self.num_views = integer("num_views", num_views, 1, sampling.MAX_VIEWS)
        self.crops = _crops(crops, self.num_views)
        views = f"num_views={num_views}" if crops is None else f"crops={crops!r}"
        self.transforms = _transforms(transform, len(self.crops), views, generator)
        self.pool = checks.flag("pool", pool)
        self.drop_last = checks.flag("drop_last", drop_last)
        self.seed = sampling.check_seed(seed)
        self.layout = _layout(layout)
        self.requested_rank = rank, world_size
        self.requested_device = None if device is None else check_device(device)
        self.dtype = check_dtype(dtype, self.requested_device or generator.device)
        if micro_batch_size is not None:
            micro_batch_size = integer("micro_batch_size", micro_batch_size, 1)
        self.micro_batch_size = micro_batch_size or self.batch_size
        anchors = self._anchors(anchor)
        self.anchor = anchors.law
        step = Step(
            generator,
            anchors,
            self.assignments,
            self.transforms,
            self.crops,
            self.num_views,
            self.seed,
            self.requested_device,
            micro_batch_size,
            self.dtype,
            checks.flag("compile", compile),
        )
        self.reuse = integer("reuse", reuse, 1, MOST)
        reuse_memory = integer("reuse_memory", reuse_memory, 1)
        self.step = step if reuse == 1 else Reuse(step, self.num_samples, self.reuse, reuse_memory)
        self.cursor = Cursor()
        len(self)  # an impossible size or rank is an error here, not at the first batch

    def _anchors(self, law: TruncatedNormal | None) -> Prior:
        """Return where the anchors come from."""
        arguments = self.arguments
        if self.images is None:
            for name, default in _OF_IMAGES.items():
                if arguments[name] != default:
                    raise ValueError(
                        f"Invalid {name}={arguments[name]!r} without images: it is of a source with images=; "
                        "give a folder, a data set or a tensor, or leave it out."
                    )
            return Pool(self._generator, law, self.num_samples) if self.pool else Prior(self._generator, law)
        encoding = Encoding(self._generator, arguments["refine"], self.micro_batch_size)
        folder = arguments["codes"]
        return Images(
            self._generator,
            law,
            Reader(self.images, arguments["workers"]),
            self.num_samples,
            arguments["generated"],
            arguments["anchor_view"],
            self.pool,
            encoding,
            None if folder is None else Codes(folder, self.images, encoding),
        )

    @classmethod
    def from_config(cls, config: str | Path | Mapping[Any, Any], **overrides: Any) -> MLViewSource:
        """Make a source of a preset's name, a YAML file, or a mapping (the schema:
        ``mlviews/presets/README.md``).

        Args:
            config: the preset, the file, or the mapping.
            overrides: values that replace the configuration's.

        Raises:
            ValueError: for an unknown key or a bad value, naming those that are allowed.
            FileNotFoundError: for a missing file.

        Examples:
            >>> source = MLViewSource.from_config("fashion-ml-random", batch_size=4)
            >>> anchor, positive = next(iter(source))
        """
        return cls(**source_arguments(config, **overrides))

    def replace(self, **changes: Any) -> MLViewSource:
        """Return a source with some arguments changed; it stands at the start of this one's epoch.

        Raises:
            ValueError: for an unknown argument, or a bad value.
        """
        checks.options("MLViewSource", changes, ARGUMENTS, word="argument")
        arguments = {**self.arguments, **changes}
        if not changes.keys() & {"images", "generator"}:
            arguments["images"] = self.images  # as they were read: they are not read again
        source = type(self)(**arguments)
        source.set_epoch(self.epoch)
        return source

    @property
    def generator(self) -> MLVGM:
        """The generator.

        Raises:
            ValueError: if accelerate asks, which takes the ``generator`` of a data set for one of random
                numbers when it is about to share out batches that are each process's already.
        """
        if callers.accelerate_asks():
            raise ValueError(
                "accelerate would share out the batches of one process: give it the source itself, "
                "accelerator.prepare(source), which has each process's share, and not DataLoader(source)."
            )
        return self._generator

    @property
    def device(self) -> torch.device:
        """The device that views are made on."""
        device = self.generator.device
        requested = self.requested_device
        # "cuda" stands for whichever GPU the generator is on, once it is on one.
        if requested is None or (requested.type == device.type and requested.index in (None, device.index)):
            return device
        return requested

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle is made of: it has a place of its own."""
        return {**self.__dict__, "cursor": replace(self.cursor)}

    def prepare(self) -> torch.device:
        """Move the generator and the walkers to the source's device, as the first batch would; return the
        device.
        """
        return self.step.prepare()

    def batch(self, start: int, stop: int) -> Batch:
        """Return the samples ``start`` to ``stop`` (exclusive) of the current epoch.

        Raises:
            ValueError: if the range is empty or outside ``[0, num_samples]``, or if the generator, a
                perturber or a transform returns something of the wrong shape.
        """
        start = integer("start", start, 0, self.num_samples - 1)
        stop = integer("stop", stop, start + 1, self.num_samples)
        return separate(self.step(start, stop, self.epoch))

    # -- the epoch -------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """Pass over the epoch. Nothing happens, and nothing is looked up, before the first ``next()``."""
        if get_worker_info() is not None:
            raise ValueError(
                "MLViewSource cannot run inside DataLoader workers (num_workers > 0): the generator lives on "
                "the training device, and every worker would make the same views. Iterate over the source "
                "itself, or use num_workers=0, batch_size=None."
            )
        if callers.lightning_forgets():
            warnings.warn(
                "Lightning's checkpoints do not hold the place of a torch DataLoader: a resumed run would "
                "begin with samples that were trained on. Pass the source itself, MLViewDataModule, or "
                "torchdata's StatefulDataLoader.",
                UserWarning,
                stacklevel=2,
            )
        rank, world_size = self._ranks()
        len(self)  # the launcher's ranks may have come after the source was made
        position, moves = self.cursor.begin(at_end=not self._step_size(self.cursor.position, world_size))
        while count := self._step_size(position, world_size):
            if self.cursor.moves != moves:
                raise RuntimeError(
                    "The epoch or the position was set during a pass, or another pass began, and the next "
                    "epoch began with it: that ends it; start a new one with iter(source)."
                )
            start, stop = position + count * rank // world_size, position + count * (rank + 1) // world_size
            batch = self.step(start, stop, self.epoch, stride=count)
            position += count
            self.cursor.advance(position)
            yield self.layout(batch if self.layout in BUILT_IN_LAYOUTS else separate(batch))

    def _ranks(self) -> tuple[int, int]:
        """Return rank and world size; 0 of 1 where accelerate's first process reads the batches of all."""
        return (0, 1) if callers.accelerate_shares_out() else resolve_rank(*self.requested_rank)

    def _step_size(self, position: int, world_size: int) -> int:
        """Return the samples of the step that starts at this position of the epoch, over all ranks; 0 at its
        end.
        """
        left, full = self.num_samples - position, self.batch_size * world_size
        if left >= full:
            return full
        return 0 if self.drop_last else left - left % world_size  # alike on all ranks, for losses that gather

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on each rank.

        Raises:
            ValueError: if there is none, naming the sizes.
        """
        count = self.batches_after(0)
        world_size = self._ranks()[1]
        if count:
            if isinstance(self.step, Reuse):
                self.step.check(self.batch_size * world_size)
            return count
        remedy = f"needs at least {world_size}, one for each rank. Raise num_samples."
        if self.drop_last:
            remedy = (
                f"needs at least {self.batch_size * world_size}. "
                "Raise num_samples, lower batch_size, or pass drop_last=False."
            )
        raise ValueError(
            f"An epoch would have no batch: num_samples={self.num_samples} for batch_size={self.batch_size} "
            f"on world_size={world_size} {remedy}"
        )

    def batches_after(self, position: int) -> int:
        """Return the batches that each rank has left when ``position`` samples of an epoch are handed out,
        over all ranks.
        """
        world_size = self._ranks()[1]
        full, left = divmod(self.num_samples - position, self.batch_size * world_size)
        return full + bool(self._step_size(self.num_samples - left, world_size))

    @property
    def epoch(self) -> int:
        """The current epoch: of the latest pass, or the one set since."""
        return self.cursor.epoch

    def set_epoch(self, epoch: int, *, by_trainer: bool = False) -> None:
        """Make the next pass this epoch, from its start (or from where :meth:`load_state_dict` left that very
        epoch).

        Args:
            epoch: an integer in ``[0, 2**32)``.
            by_trainer: whether a trainer names its own epoch, and may pass over the source more than once in
                it.

        Raises:
            ValueError: if it is no such integer.
        """
        epoch = sampling.check_epoch(epoch)
        if callers.accelerate_asks() and epoch <= self.epoch:
            return  # it counts the passes that came to their end in this process, which names no epoch
        at_end = not self._step_size(self.cursor.position, self._ranks()[1])
        self.cursor.set_epoch(epoch, at_end, by_trainer)

    @property
    def repeats(self) -> bool:
        """Whether samples come more than once: of a pool, of the user's own images, or with ``reuse``.

        Which of them are in which place depends on ``num_samples`` then.
        """
        return not self.step.anchors.endless or self.reuse > 1

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    @property
    def sampler(self) -> TrainerEpochs:
        """Lightning sets the epoch through ``loader.sampler.set_epoch``."""
        return TrainerEpochs(self)

    def state_dict(self) -> dict[str, int]:
        """Return where the latest pass is: ``seed``, ``epoch``, ``position``, and what the places depend on.

        ``position`` counts the samples handed out over all ranks. Where samples come more than once,
        ``num_samples`` is there too; with reuse also ``reuse``, and the number of ``windows`` of an epoch.
        """
        state = {"seed": self.seed, "epoch": self.epoch, "position": self.cursor.position}
        if self.repeats:
            state["num_samples"] = self.num_samples
        if isinstance(self.step, Reuse):
            state |= {"reuse": self.reuse, "windows": self.step.schedule.windows}
        return state

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next pass go on where the state was taken, on any number of ranks and with any batch size.

        Raises:
            ValueError: if the state is incomplete, belongs to another seed, to a pool of another size or to
                another reuse, or lies beyond this epoch's end.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"Invalid state {state!r}: pass what state_dict() returned.")
        missing = {"seed", "epoch", "position"} - set(state)
        if missing:
            raise ValueError(
                f"Invalid state {dict(state)!r}: it lacks {listing(sorted(missing))}; "
                "pass what state_dict() returned."
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"The state belongs to seed={state['seed']!r}, this source has seed={self.seed}: "
                "make it with the same seed."
            )
        if state.get("reuse", 1) != self.reuse:
            raise ValueError(
                f"The state belongs to reuse={state.get('reuse', 1)!r}, this source has reuse={self.reuse}: "
                "make it with the same reuse."
            )
        if self.repeats and state.get("num_samples", self.num_samples) != self.num_samples:
            raise ValueError(
                f"The state belongs to a pool of num_samples={state['num_samples']!r}, "
                f"this one has {self.num_samples}, in another order: make it with as many."
            )
        windows = self.step.schedule.windows if isinstance(self.step, Reuse) else 1
        if state.get("windows", windows) != windows:
            raise ValueError(
                f"The state belongs to an epoch that was cut into {state['windows']!r} windows, this one's "
                f"memory makes {windows}: make it with the same reuse_memory and num_views."
            )
        position = integer("position", state["position"], 0, self.num_samples)
        self.cursor.load(sampling.check_epoch(state["epoch"]), position)


_OF_IMAGES = {"generated": 1.0, "anchor_view": "real", "refine": 0, "codes": None, "workers": None}
"""The arguments that say how images are used, and their defaults."""


def _generator(generator: Any) -> MLVGM:
    if not isinstance(generator, MLVGM):
        raise ValueError(
            f"Invalid generator of type {type(generator).__name__}: it must be an mlviews.MLVGM. "
            "Wrap a callable with mlviews.wrap_generator(fn, levels=..., image_shape=...)."
        )
    return generator


def _warn_of_walkers(assignments: Sequence[Assignment], generator: MLVGM) -> None:
    """Warn of walkers that belong to other weights than the generator has."""
    for levels, perturber in assignments:
        if isinstance(perturber, Walker):
            trained_for = perturber.provenance.get("fingerprint")
            names = listing(generator.levels[level].name for level in levels)
            warn_of_other_weights(f"The walker of {names}", trained_for, generator, generator.name)


def _image_set(images: Any, generator: MLVGM) -> ImageSet | None:
    """Return the user's own images, for a generator that can encode them."""
    if images is None:
        return None
    generator.check_encodes()
    return as_image_set(images, Shape(*generator.image_shape, generator.border))


def _num_samples(num_samples: int | None, images: ImageSet | None) -> int:
    """Return the samples of an epoch: if not given, the number of images."""
    if num_samples is None:
        num_samples = DEFAULT_SAMPLES if images is None else len(images)
    return integer("num_samples", num_samples, 1, 1 << 32)


def _layout(layout: str | Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    if isinstance(layout, str) and layout in LAYOUTS:
        return LAYOUTS[layout]
    if isinstance(layout, str) or not callable(layout):
        raise ValueError(
            f"Invalid layout={layout!r}: use {listing(LAYOUTS)}, or a callable that gets a Batch."
            f"{did_you_mean(layout, LAYOUTS)}"
        )
    return layout


def _crops(crops: object, num_views: int) -> tuple[int, ...]:
    """Return the view that each image of a batch is cut from."""
    if crops is None:
        return tuple(range(num_views))
    if not isinstance(crops, Sequence) or isinstance(crops, str) or not 0 < len(crops) <= sampling.MAX_VIEWS:
        raise ValueError(
            f"Invalid crops={crops!r}: give the view of each crop, e.g. (0, 1, 0, 1), "
            "or None for one of each view."
        )
    return tuple(integer("crops", view, 0, num_views - 1) for view in crops)


def _transforms(
    transform: Any, count: int, views: str, generator: MLVGM
) -> list[Transform | ByOrigin | None]:
    """Return T_x of each view, or of each crop."""
    is_single = isinstance(transform, str | ByOrigin) or not isinstance(transform, Sequence)
    transforms = [transform] * count if is_single else list(transform)
    if len(transforms) != count:
        raise ValueError(
            f"Got {len(transforms)} transforms for {views}: give one for all of them, or one for each."
        )
    return [_transform(view_transform, generator) for view_transform in transforms]


def _transform(transform: Any, generator: MLVGM) -> Transform | ByOrigin | None:
    """Return T_x of one view, checked."""
    if isinstance(transform, ByOrigin | Mapping):
        origins = transform._asdict() if isinstance(transform, ByOrigin) else dict(transform)
        if set(origins) != set(ByOrigin._fields):
            raise ValueError(
                f"Invalid transform={transform!r}: by origin, give one for 'real' and one for 'generated' "
                "images."
            )
        real, generated = (_transform(origins[name], generator) for name in ByOrigin._fields)
        return ByOrigin(real, generated)  # type: ignore[arg-type]
    is_factory = transform in FACTORIES
    if transform is not None and (not callable(transform) or is_factory):
        raise ValueError(
            f"Invalid transform={transform!r}: use mlviews.transforms.simclr(size=...), "
            "another callable on images, or None."
        )
    if isinstance(transform, Augmentation):
        transform.check(generator.image_shape[0])
    return transform  # type: ignore[no-any-return]
