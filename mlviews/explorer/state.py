"""What is on screen, as a value: one JSON, from which a link, a preset and Python lines are made."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pprint
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from mlviews.checks import choice, integer, is_number, options
from mlviews.errors import listing
from mlviews.generators.base import MLVGM, Level
from mlviews.levels import level_indices
from mlviews.perturb import Assignment, Mix, Normal, Perturber, Resample

KINDS = ("fixed", "normal", "mix", "resample")
"""The perturbers of a row, by their names in configurations."""

PRESET = "preset"
"""The kind of a row that the preset moves in a way of its own, by a walker for example."""

UNITS = {"normal": "std", "mix": "rate"}
"""The configuration's key for how far a perturber moves, by its kind; the others have none."""

LARGEST = {"std": 8.0, "rate": 1.0}
"""How far the perturbers move at most, by their unit."""

ANCHORS, VIEWS, STEPS = 16, 25, 15
"""The most anchors, views of each (the anchor included), and steps of a traversal on screen."""


class Row(NamedTuple):
    """What is moved together: a level, or some levels that the preset moves by one perturber."""

    key: str  # of perturb=: an index, or "start:stop"
    levels: tuple[int, ...]
    name: str  # of the level, or of the levels
    perturber: Perturber | None  # the preset's; None if it leaves the row as it is

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that it can be moved by."""
        return KINDS if self.setting.kind != PRESET else (PRESET, *KINDS)

    @property
    def setting(self) -> Setting:
        """How the preset moves it."""
        perturber = self.perturber
        if perturber is None:
            return Setting("fixed")
        if isinstance(perturber, Normal) and perturber.mean == 0:
            return Setting("normal", perturber.std, perturber.truncation)
        if isinstance(perturber, Mix):
            return Setting("mix", perturber.rate)
        return Setting("resample" if perturber == Resample() else PRESET)


def rows_of(generator: MLVGM, assignments: Sequence[Assignment]) -> tuple[Row, ...]:
    """Return the rows of a source: a level each, but for levels that a perturber of another kind shares."""
    rows: dict[int, Row] = {}
    levels = generator.levels
    for moved, perturber in assignments:
        shared = not isinstance(perturber, Normal | Mix | Resample)
        for group in [moved] if shared else [(level,) for level in moved]:
            rows[group[0]] = _row(group, levels, perturber)
    moved_levels = {level for row in rows.values() for level in row.levels}
    for level in set(range(len(levels))) - moved_levels:
        rows[level] = _row((level,), levels, None)
    return tuple(rows[level] for level in sorted(rows))


def _row(group: tuple[int, ...], levels: Sequence[Level], perturber: Perturber | None) -> Row:
    return Row(_key(group), group, " + ".join(levels[level].name for level in group), perturber)


def _key(levels: Sequence[int]) -> str:
    """Return consecutive levels as a key of ``perturb=``."""
    return str(levels[0]) if len(levels) == 1 else f"{levels[0]}:{levels[-1] + 1}"


@dataclass(frozen=True)
class Setting:
    """How a row is moved.

    Raises:
        ValueError: for a kind that there is not, or an amount or truncation out of range.
    """

    kind: str  # one of KINDS, or PRESET
    amount: float = 1.0  # in the kind's unit; of no meaning for kinds without
    truncation: float | None = 2.0  # of normal noise, in standard deviations; None: not truncated

    def __post_init__(self) -> None:
        choice("perturber", self.kind, (*KINDS, PRESET), problem="Invalid")
        largest = LARGEST[UNITS.get(self.kind, "std")]
        if not is_number(self.amount) or not 0 <= self.amount <= largest:
            unit = UNITS.get(self.kind, "amount")
            raise ValueError(f"Invalid {unit}={self.amount!r}: it must be a number from 0 to {largest:g}.")
        if self.truncation is not None and (not is_number(self.truncation) or self.truncation <= 0):
            raise ValueError(
                f"Invalid truncation={self.truncation!r}: it must be a number above 0, or None for the full "
                "normal."
            )

    @property
    def specification(self) -> str | dict[str, Any]:
        """How a configuration writes it."""
        unit = UNITS.get(self.kind)
        if unit is None:
            return self.kind
        cut = {"truncation": self.truncation} if self.kind == "normal" else {}
        return {"name": self.kind, unit: self.amount, **cut}

    @classmethod
    def of(cls, specification: Any) -> Setting:
        """Return the setting of a specification; files, such as a walker's, are never looked at.

        Raises:
            ValueError: if it is none.
        """
        values = {"name": specification} if isinstance(specification, str) else specification
        if not isinstance(values, Mapping):
            raise ValueError(f"Invalid perturber {specification!r}: give {listing(KINDS)}, or a mapping.")
        values = dict(values)
        kind = choice("perturber", values.pop("name", None), (*KINDS, PRESET), problem="Invalid")
        unit = UNITS.get(kind)
        allowed = {"normal": ("std", "truncation"), "mix": ("rate",)}.get(kind, ())
        options(f"perturber {kind!r}", values, allowed)
        if unit is None:
            return cls(kind)
        return cls(kind, values.get(unit, 1.0), values.get("truncation"))


@dataclass(frozen=True)
class State:
    """Everything that the pictures depend on, besides what the command was started with.

    Raises:
        ValueError: for a value out of range, naming those that are allowed.
    """

    settings: tuple[Setting, ...]  # one per row
    seed: int = 0
    anchors: int = 8  # rows of the pictures
    views: int = 6  # columns, the anchor's included
    level: int = 0  # that the tab "Latents" traverses and intervenes at
    dim: int | None = None  # the coordinate that is traversed; None: the level's leading directions
    span: float = 3.0  # how far, in standard deviations
    steps: int = 7  # of a traversal
    split: int = 1  # levels of the coarse image, in a recombination
    keep: int = 1  # levels that purification leaves as they are

    def __post_init__(self) -> None:
        integer("seed", self.seed, 0, (1 << 53) - 1)  # browsers round larger ones
        integer("anchors", self.anchors, 1, ANCHORS)
        integer("views", self.views, 2, VIEWS)
        integer("level", self.level, 0)
        integer("steps", self.steps, 2, STEPS)
        integer("split", self.split, 0)
        integer("keep", self.keep, 0)
        if self.dim is not None:
            integer("dim", self.dim, 0)
        if not is_number(self.span) or not 0 < self.span <= 20:
            raise ValueError(f"Invalid span={self.span!r}: it must be a number above 0, at most 20.")

    @classmethod
    def initial(cls, rows: Sequence[Row], seed: int, anchors: int) -> State:
        """Return the state that the page begins with: the preset's.

        Args:
            rows: of the preset's source.
            seed: the source's.
            anchors: the most that there are.
        """
        return cls(tuple(row.setting for row in rows), seed, min(cls.anchors, anchors))

    def check(self, rows: Sequence[Row], levels: int) -> None:
        """Raise a ValueError if the state is not one of these rows and of so many levels."""
        if len(self.settings) != len(rows):
            raise ValueError(f"Got {len(self.settings)} perturbers for {len(rows)} rows: give one each.")
        for row, setting in zip(rows, self.settings, strict=True):
            choice(f"perturber of level {row.key}", setting.kind, row.kinds, problem="Invalid")
        integer("level", self.level, 0, levels - 1)
        integer("split", self.split, 0, levels)
        integer("keep", self.keep, 0, levels)

    # -- JSON ------------------------------------------------------------------------------------------------

    def json(self, rows: Sequence[Row]) -> str:
        """Return the state as one JSON object, in which perturbers are written as in a configuration."""
        values = dataclasses.asdict(self)
        del values["settings"]
        settings = {row.key: setting.specification for row, setting in zip(rows, self.settings, strict=True)}
        return json.dumps({"perturb": settings, **values}, separators=(",", ":"))

    @classmethod
    def read(cls, text: str, rows: Sequence[Row], levels: int, initial: State) -> State:
        """Return the state of a JSON text; what it leaves out is as in the initial state.

        Raises:
            ValueError: if it is no such text, naming the value and what is allowed.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The state is not JSON ({error}): copy the whole link.") from None
        if not isinstance(values, dict):
            raise ValueError(f"Invalid state of type {type(values).__name__}: it must be a JSON object.")
        names = [field.name for field in dataclasses.fields(cls) if field.name != "settings"]
        options("the state", values, ["perturb", *names], word="key")
        perturb = values.pop("perturb", {})
        if not isinstance(perturb, dict):
            raise ValueError(f"Invalid perturb={perturb!r}: it must be an object from levels to perturbers.")
        options("perturb", perturb, [row.key for row in rows], word="level")
        settings = tuple(
            Setting.of(perturb[row.key]) if row.key in perturb else setting
            for row, setting in zip(rows, initial.settings, strict=True)
        )
        state = dataclasses.replace(initial, settings=settings, **values)
        state.check(rows, levels)
        return state

    # -- what a configuration says of it ---------------------------------------------------------------------

    def perturb(
        self, rows: Sequence[Row], base: Mapping[Any, Any], levels: Sequence[Level]
    ) -> dict[int | str, Any]:
        """Return the perturbers as a configuration writes them; alike neighbors have one key.

        Args:
            rows: of the preset's source.
            base: the preset's configuration, which says how it moves rows in a way of its own.
            levels: the generator's.
        """
        groups: list[tuple[tuple[int, ...], Any]] = []
        for row, setting in zip(rows, self.settings, strict=True):
            specification = setting.specification
            if setting.kind == PRESET:
                specification = _of_preset(base.get("perturb"), row, levels)
            groups.append((row.levels, specification))
        merged: dict[int | str, Any] = {}
        for (_, specification), group in itertools.groupby(groups, key=lambda item: (_alone(item), item[1])):
            key = _key([level for members, _ in group for level in members])
            merged[int(key) if key.isdigit() else key] = specification
        return merged

    def configuration(
        self, rows: Sequence[Row], base: Mapping[Any, Any], levels: Sequence[Level]
    ) -> dict[str, Any]:
        """Return the configuration of the source whose images are on screen; arguments as of
        :meth:`perturb`.
        """
        return {**base, "perturb": self.perturb(rows, base, levels), "seed": self.seed}


def _alone(item: tuple[tuple[int, ...], Any]) -> tuple[int, ...] | None:
    """Return what keeps a row from sharing a key with its neighbors: being a group already."""
    levels, _ = item
    return levels if len(levels) > 1 else None


def _of_preset(spec: Any, row: Row, levels: Sequence[Level]) -> Any:
    """Return how the preset writes the perturber of a row."""
    if not isinstance(spec, Mapping) or "name" in spec:
        return spec
    for key, specification in spec.items():
        if row.levels[0] in level_indices(key, levels):
            return specification
    return "fixed"


def preset_yaml(configuration: Mapping[str, Any], state: State) -> str:
    """Return a configuration as the YAML of a preset."""
    text = yaml.safe_dump(
        dict(configuration), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    return (
        f"# {state.anchors} anchors and {state.views - 1} positives of each, as they were on screen:\n"
        f"# mlviews views --preset THIS.yaml --anchors {state.anchors} --num-views {state.views}\n{text}"
    )


def python_lines(configuration: Mapping[str, Any], state: State) -> str:
    """Return Python that makes the source, and the images that are on screen."""
    literal = pprint.pformat(dict(configuration), width=96, sort_dicts=False)
    sizes = f"num_views={state.views}, batch_size={state.anchors}, drop_last=False"
    return (
        "import mlviews\n\n"
        f"source = mlviews.MLViewSource.from_config(\n{_indented(literal)}\n)\n\n"
        "# What is on screen, before T_x: a tensor [anchors, C, H, W] for each view.\n"
        f"screen = source.replace(\n    {sizes}, transform=None, crops=None\n)\n"
        f"views = screen.batch(0, {state.anchors}).views\n"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
