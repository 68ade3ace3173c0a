"""What computes: a generator that is loaded once, and the images of any state."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mlviews
from mlviews import latents
from mlviews.config import load_config, source_arguments, walker_files
from mlviews.explorer import classes
from mlviews.explorer.costs import Costs
from mlviews.explorer.measuring import Job
from mlviews.explorer.state import State, rows_of
from mlviews.images import Pixels, Shape
from mlviews.levels import with_levels
from mlviews.perturb import build
from mlviews.source import MLViewSource
from mlviews.viz import view_images
from mlviews.weights.download import is_remote

PURIFIED = 3
"""How many purified copies of an image are shown."""

BATCH_SIZE = 256
"""What a configuration without batch_size has."""

DIRECTIONS = 2
"""How many leading directions of a level are traversed."""


class Views(NamedTuple):
    """The images of the tab "Views": ``[anchors, C, H, W]`` in [0, 1], one tensor per column."""

    generated: list[Tensor]  # the anchors, and their positives
    augmented: list[Tensor] | None  # the same after T_x; None where T_x is no Augmentation
    alone: list[Tensor]  # the anchor as generated, then the first positive with a single row moved


class OwnImages(NamedTuple):
    """The images of the tab "Your images": ``[images, C, H, W]`` in [0, 1], one tensor per column."""

    images: Tensor  # as the generator's encoder sees them
    reconstructed: Tensor  # what the generator makes of their latents
    positives: list[Tensor]
    purified: list[Tensor]  # copies by mlviews.Purifier


class Session:
    """A preset's source, of which every state is a variation.

    It may be used by several threads: they take turns.

    Args:
        preset: a preset's name, a YAML file, or the name of a generator.
        weights: of its generator; None: the preset's.
        images: a folder of images that become the anchors; the generator must have an encoder.
        report: the folder of an impact report, where measurements go too; None: that of `mlviews impact`.
        seed: None: the preset's, else 0.
        device: None: the preset's, else the default one.
        default_device: None: where the generator is.

    Raises:
        ValueError: for an unknown preset or a bad value, or a report of another generator.
        FileNotFoundError: for missing weights or images, or a report that was named and is not there.
    """

    def __init__(
        self,
        preset: str,
        *,
        weights: str | None = None,
        images: str | Path | None = None,
        report: str | Path | None = None,
        seed: int | None = None,
        device: str | None = None,
        default_device: str | None = None,
    ) -> None:
        self.preset = preset
        overrides = {"weights": weights, "images": images}
        config = _configuration(
            preset, {name: value for name, value in overrides.items() if value is not None}
        )
        arguments = source_arguments(config)
        # Whatever the preset says of batches: its samples are looked at in any number, each the first time.
        arguments |= {"batch_size": 1, "rank": 0, "world_size": 1, "reuse": 1}
        arguments |= {} if seed is None else {"seed": seed}
        arguments["device"] = device or arguments.get("device") or default_device
        self.source = MLViewSource(**arguments)
        self.configuration = config
        self.generator = self.source.generator
        self.rows = rows_of(self.generator, self.source.assignments)
        self.folder = Path(report or Path("runs", f"impact-{self.generator.name}-sweep"))
        if report is not None and not self.folder.is_dir():
            raise FileNotFoundError(f"No folder {self.folder}: give the folder of an impact report.")
        self._stored_costs = Costs.load(self.folder, self.generator)
        self.job: Job | None = None
        self._turn = threading.Lock()

    @property
    def initial(self) -> State:
        """The preset's state."""
        return State.initial(self.rows, self.source.seed, self.source.num_samples)

    @property
    def costs(self) -> Costs:
        """What levels cost: as stored, or as measured since."""
        measured = None if self.job is None else self.job.costs
        return self._stored_costs if measured is None else measured

    @property
    def missing(self) -> str:
        """What can be measured and was not, in words; "" if there is nothing."""
        if self.costs.report is None:
            return "what levels cost"
        lacks_classes = self.costs.classes is None and classes.has_classifier(self.generator)
        return "how many keep their class" if lacks_classes else ""

    @property
    def encodes(self) -> bool:
        """Whether images can be turned into latents."""
        try:
            self.generator.check_encodes()
        except ValueError:
            return False
        return True

    @property
    def shape(self) -> Shape:
        """What images are brought to."""
        return Shape(*self.generator.image_shape, self.generator.border)

    def read(self, text: str) -> State:
        """Return the state of a link.

        Raises:
            ValueError: if it is none of this session's.
        """
        return State.read(text, self.rows, len(self.generator.levels), self.initial)

    def configuration_of(self, state: State) -> dict[str, Any]:
        """Return the configuration of the source whose images are on screen.

        Its batches are no larger than an epoch: a preset of few images would else have none.
        """
        configuration = state.configuration(self.rows, self.configuration, self.generator.levels)
        samples = self.source.num_samples
        if samples < configuration.get("batch_size", BATCH_SIZE):
            configuration["batch_size"] = samples
        return configuration

    def source_of(self, state: State) -> MLViewSource:
        """Return the source whose images are on screen.

        Raises:
            ValueError: for a perturber that a level cannot have.
        """
        perturb = {}
        for row, setting in zip(self.rows, state.settings, strict=True):
            key = int(row.key) if row.key.isdigit() else row.key
            keeps = setting.kind == row.setting.kind == "preset" and row.perturber is not None
            perturb[key] = row.perturber if keeps else build(setting.specification)
        return self.source.replace(perturb=perturb, seed=state.seed)

    # -- images ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def views(self, state: State) -> Views:
        """Return anchors and positives, before and after T_x, and each row moved alone."""
        with self._turn:
            images = view_images(self.source_of(state), state.anchors, state.views)
            anchors, positive = images.batch.latents[:2]
            if not len(anchors):  # all views are the user's own images
                return Views(images.generated, images.augmented, [])
            # Noise is drawn level by level, so that a level moved alone moves as it does with all others.
            alone = [
                with_levels(anchors, row.levels, [positive[level] for level in row.levels])
                for row, setting in zip(self.rows, state.settings, strict=True)
                if setting.kind != "fixed"
            ]
            labels = self._labels(images.batch.targets)
            decoded = latents.decode(self.generator, [anchors, *alone], labels)
            return Views(images.generated, images.augmented, decoded)

    def _labels(self, targets: Tensor) -> Tensor | None:
        return targets if self.generator.num_classes else None

    @torch.no_grad()
    def own_images(self, state: State, images: Tensor | None) -> OwnImages:
        """Return images, what the generator makes of them, and their positives.

        Args:
            state: what is on screen.
            images: uint8 ``[N, C, H, W]``; None: those of the folder.

        Raises:
            ValueError: if there are no images, or the generator has no encoder.
        """
        with self._turn:
            source = self._source_of_images(state, images)
            rows = min(state.anchors, source.num_samples)
            views = view_images(source, rows, state.views)
            order = views.batch.indices.argsort()  # an epoch has an order of its own
            z = [level[order] for level in views.batch.latents[0]]
            labels = self._labels(views.batch.targets[order])
            first, *positives = (view[order] for view in views.generated)
            purifier = mlviews.Purifier(self.generator, state.keep, samples=PURIFIED, seed=state.seed)
            purified = list(purifier.copies(first, labels))
            return OwnImages(first, self.generator(z, labels), positives, purified)

    def _source_of_images(self, state: State, images: Tensor | None) -> MLViewSource:
        source = self.source_of(state)
        if images is None and source.images is None:
            raise ValueError("There are no images: drop some here, or start with --images DIR.")
        of_images = {"generated": 1.0, "anchor_view": "real", "num_samples": None}
        if images is not None:
            # Stored latents are those of the preset's images.
            of_images |= {"images": Pixels(images[: state.anchors], self.shape), "codes": None}
        return source.replace(**of_images)

    # -- latents in hand -------------------------------------------------------------------------------------

    @torch.no_grad()
    def traversal(self, state: State) -> list[list[Tensor]]:
        """Return the anchors moved along one level: for each direction a column per step, ``[anchors, C, H,
        W]`` each.
        """
        with self._turn:
            z, labels = self._anchors(state)
            size = self.generator.levels[state.level].size
            if state.dim is not None and state.dim >= size:
                raise ValueError(
                    f"Invalid coordinate {state.dim}: level {self.generator.levels[state.level].name} has "
                    f"{size}, counted from 0."
                )
            leading = 1 if state.dim is not None else min(DIRECTIONS, size)
            moved = latents.traverse(
                self.generator,
                z,
                state.level,
                state.dim,
                state.span,
                state.steps,
                leading=leading,
                labels=labels,
            )
            return [list(direction) for direction in moved.images(self.generator, labels)]

    @torch.no_grad()
    def intervention(self, state: State) -> list[list[Tensor]]:
        """Return the anchors, and what they become when a level is set to that of the first one.

        Two groups of columns follow the anchors: finer levels as they were, and drawn anew.
        """
        with self._turn:
            z, labels = self._anchors(state)
            value: dict[int | str, Tensor | float] = {state.level: z[state.level][:1]}
            set_level = latents.intervene(self.generator, z, value)
            anew = [
                latents.intervene(self.generator, z, value, finer="draw", seed=state.seed, epoch=epoch)
                for epoch in range(state.views - 2)
            ]
            anchors, first, *drawn = latents.decode(self.generator, [z, set_level, *anew], labels)
            return [[anchors], [first], drawn] if drawn else [[anchors], [first]]

    @torch.no_grad()
    def recombination(self, state: State) -> list[list[Tensor]]:
        """Return a matrix of images: the coarse levels of its row's anchor, the fine ones of its column's.

        The first column holds the anchors of the rows, the first row those of the columns; their corner is
        white.
        """
        with self._turn:
            z, labels = self._anchors(state)
            combined = latents.matrix(z, z, state.split, levels=len(self.generator.levels))
            anchors, *columns = latents.decode(self.generator, [z, *combined], labels)
            corner = torch.ones_like(anchors[:1])
            heads = [
                torch.cat([anchors[number : number + 1], column]) for number, column in enumerate(columns)
            ]
            return [[torch.cat([corner, anchors])], heads]

    def _anchors(self, state: State) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the anchors' latents and labels."""
        source = self.source_of(state).replace(num_views=1, transform=None, crops=None)
        batch = source.batch(0, min(state.anchors, source.num_samples))
        return batch.latents[0], self._labels(batch.targets)

    # -- measuring -------------------------------------------------------------------------------------------

    def measure(self, *options: str) -> Job:
        """Return the measurement that is under way, which begins if there is none.

        Args:
            options: further words of the command `mlviews impact`.
        """
        if self.job is None or not self.job.is_running:
            self.job = Job(self.configuration, self.source, self.costs, self.folder, options)
        return self.job

    def close(self) -> None:
        """Stop what is under way."""
        if self.job is not None:
            self.job.stop()


def _configuration(preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose files have whole paths; that of a generator moves all levels but the
    first.
    """
    names = [info.name for info in mlviews.list_generators()]
    if preset in names and preset not in mlviews.list_presets():
        config = load_config({"generator": preset}, **overrides)
        config["perturb"] = {":": {"name": "normal", "std": 0.5, "truncation": 2.0}}
    else:
        config = load_config(preset, **overrides)
    if "walkers" in config:
        config["perturb"] = walker_files(config.get("perturb"), config.pop("walkers"))
    absolute: dict[str, Any] = _absolute(config)
    return absolute


def _absolute(value: Any, key: str = "") -> Any:
    """Return a configuration in which the paths of files do not depend on the folder that it is read in."""
    if isinstance(value, Mapping):
        return {name: _absolute(part, str(name)) for name, part in value.items()}
    is_path = key in ("weights", "images", "inverter", "path", "codes") and isinstance(value, str | Path)
    return str(Path(value).resolve()) if is_path and not is_remote(value) else value
