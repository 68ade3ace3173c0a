"""The figures of a measurement, and the words for them: what every table, picture and page is made of."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import torch
import yaml
from torch import Tensor

from mlviews.generators import list_generators
from mlviews.impact.stored import Stored, StoredPerturber
from mlviews.mi.infonce import mi_lower_bound, to_paper_scale
from mlviews.perturb import Fixed, Mix, Normal, Perturber, Resample, Walker

OVER_USED = 0.25
"""The share of the distance between two draws below which a level decides nearly everything."""

BEYOND = 1.01
"""The share of the same above which a level goes farther than a fresh draw (0.01 for Monte Carlo's error)."""

COLLAPSED = 0.1
"""The diversity of directions below which a walker moves all anchors the same way."""

OFF_PRIOR = 1.5
"""The ratio of norms above which a perturbation has left what the generator was trained on."""

METHODS = ("sweep", "walker")
STATUSES = ("reached", "resample", "under-used")
VERDICTS = ("over-used", "balanced", "weak", "under-used")
LONGEST = 1000  # characters of a text from elsewhere
TEXT = ("level", "name", "verdict")  # the columns that are no numbers
TOGETHER = (
    "Each level was measured alone, with all others fixed. Levels moved together cost more than any one of "
    "them: start with these figures, look at the views, and go down from there."
)


@dataclass(frozen=True)
class Distances(Stored):
    """How far a perturbation moves a level, by Monte Carlo (paper, sec. 3.1).

    Distances are L2, in the space where the level lives (W for StyleGAN2).
    """

    count: int  # the number of anchors that were drawn
    mean: float  # mean of the distances
    std: float  # their standard deviation over anchors
    edges: list[float]  # edges of the histogram's bins, one more than counts
    counts: list[int]  # anchors in each bin of the histogram
    prior: float  # mean distance between two independent draws: the unit that levels can be compared in
    norm: float  # mean |T(z)| / mean |z| of the latents: 1 where T stays in the prior's typical set
    # 1 - |mean unit direction| of the shifts: 0 if all anchors move in one direction, ~1 if in all.
    diversity: float
    # Participation ratio of the directions' second moments: 1 for a line, d for d dimensions.
    directions: float

    @property
    def relative(self) -> float:
        """The mean in units of the prior's own distance: 1 is as far as a fresh draw."""
        return self.mean / self.prior


@dataclass(frozen=True)
class History(Stored):
    """The game between critic and walker, step by step (method "walker")."""

    losses: list[float]  # plain InfoNCE of each step's batch, nats
    smoothed: list[float]  # what the stopping rule looks at, nats
    distances: list[float]  # mean L2 distance of each step's batch
    warmup: int  # steps in which the critic learned alone


@dataclass(frozen=True)
class Curve(Stored):
    """The loss of one level against the magnitude of its perturbation (method "sweep")."""

    magnitudes: list[float]  # standard deviations, rising
    losses: list[float]  # plain InfoNCE as it was measured, nats
    stderrs: list[float]  # standard errors of the losses, nats
    monotone: list[float]  # the rising curve through the losses, which is solved for the target
    resample: float  # loss of a fresh draw of the level, nats
    resample_stderr: float  # its standard error, nats


@dataclass(frozen=True)
class LevelImpact(Stored):
    """One row of the paper's Table 1.

    The status is "reached"; "resample" where a fresh draw reaches the target and no shift within the grid
    does; or "under-used" where nothing does.
    """

    levels: tuple[int, ...]  # indices: a single one, or some that are moved together
    name: str  # of the level, or of the levels
    status: str  # "reached", "resample" or "under-used"
    # Spends the budget; under-used: the farthest that was tried.
    perturber: Annotated[Perturber, StoredPerturber]
    loss: float  # plain InfoNCE under that perturber, nats; under-used: the largest that was reached
    stderr: float  # standard error of the loss, nats
    distances: Distances  # how far that perturber moves the level
    magnitude: float | None = None  # standard deviation of the noise (sweep); Mix: of the anchors'
    interval: tuple[float, float] | None = None  # 95 % interval of the magnitude (sweep)
    distance_interval: tuple[float, float] | None = None  # the mean distances at its ends (sweep)
    steps: int = 0  # of training
    seconds: float = 0.0  # what the row took
    history: History | None = field(default=None, repr=False)
    curve: Curve | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        """Compare figures, and what the perturbers do: most have no equality of their own."""
        if not isinstance(other, LevelImpact):
            return NotImplemented
        names = [item.name for item in fields(self) if item.name != "perturber"]
        same_figures = all(getattr(self, name) == getattr(other, name) for name in names)
        return same_figures and _equal(self.perturber, other.perturber)

    @property
    def label(self) -> str:
        """The name as a line of plain text."""
        return plain_text(self.name)

    @property
    def verdict(self) -> str:
        """One of "over-used", "balanced", "weak" (farther than a fresh draw), "under-used"."""
        if self.status == "under-used":
            return "under-used"
        if self.distances.relative > BEYOND:
            return "weak"
        return "over-used" if self.distances.relative < OVER_USED else "balanced"

    @property
    def choice(self) -> Perturber:
        """The perturber to make views with: the measured one, or a fresh draw where that leaves the prior."""
        weak_noise = self.verdict == "weak" and not isinstance(self.perturber, Walker)
        if self.status == "under-used" or weak_noise:
            return Resample()
        return self.perturber

    @property
    def walked(self) -> bool:
        """Whether all positives of an anchor are the same: a walker moved it that does not draw."""
        return isinstance(self.perturber, Walker) and not self.perturber.noise

    @property
    def key(self) -> str:
        """The levels as a key of ``perturb=``: an index, or ``start:stop``.

        Levels that are not in a row have no such key: they are listed with commas.
        """
        first, last = self.levels[0], self.levels[-1]
        if len(self.levels) == 1:
            return str(first)
        if self.levels == tuple(range(first, last + 1)):
            return f"{first}:{last + 1}"
        return ", ".join(map(str, self.levels))

    @property
    def specification(self) -> dict[str, Any]:
        """The measured perturber's configuration, as :func:`mlviews.perturb.build` takes it.

        A walker's path is the name that it is saved by.

        Raises:
            ValueError: for a perturber that has no configuration.
        """
        return self.specify(self.perturber)

    def specify(self, perturber: Perturber) -> dict[str, Any]:
        """Return the configuration of a perturber of this level, as :attr:`specification` does."""
        if isinstance(perturber, Normal):
            return {
                "name": "normal",
                "std": perturber.std,
                "truncation": perturber.truncation,
                "mean": perturber.mean,
            }
        if isinstance(perturber, Mix):
            return {"name": "mix", "rate": perturber.rate}
        if isinstance(perturber, Walker):
            return {"name": "walker", "path": f"walker-{'-'.join(map(str, self.levels))}.safetensors"}
        if isinstance(perturber, Fixed):
            return {"name": "fixed"}
        if isinstance(perturber, Resample):
            return {"name": "resample"} | ({} if perturber.keeps_offsets else {"offsets": perturber.offsets})
        raise ValueError(
            f"Perturber {perturber!r} of level {self.name!r} cannot be written: "
            "a report holds Fixed, Mix, Normal, Resample or Walker."
        )

    @property
    def advice(self) -> str:
        """What to do with the level, in words."""
        share, distance = _share(self.distances.relative), digits(self.distances.mean)
        remedy = _code(self.perturber)
        if isinstance(self.perturber, Walker):
            remedy = f"the walker ({self.specification['path']})"
        if self.status == "under-used":
            return (
                f"Under-used: nothing reaches the target; the loss is {self.loss:.3f} nats even at {share} "
                "the distance between two draws. Moving it does not spend the budget: Resample() does no "
                "harm, and adds little to the views."
            )
        if self.status == "resample":
            return (
                f"No shift within the grid reaches the target, a fresh draw does ({self.loss:.3f} nats): use "
                "Resample(). Nothing of this level is then left for the encoder to learn."
            )
        if self.verdict == "over-used":
            return (
                f"Over-used: {share} the distance between two draws already spends the budget, so this level "
                "decides nearly all that tells images apart. Keep it fixed, or move it by a mean distance of "
                f"at most {distance}: {remedy}."
            )
        if self.verdict == "weak":
            cost = f" costs {self.curve.resample:.2f} nats and" if self.curve else ""
            return (
                f"Weak: it takes {remedy}, {share} the distance between two draws, to spend the budget. A "
                f"fresh draw, Resample(),{cost} stays within what the generator was trained on."
            )
        return (
            f"Balanced: {remedy} spends the budget, at a mean distance of {distance}, {share} that between "
            "two draws."
        )

    @property
    def warnings(self) -> list[str]:
        """What makes the perturber a poor source of views although it reaches its loss."""
        sentences = []
        if isinstance(self.perturber, Walker) and self.distances.diversity < COLLAPSED:
            sentences.append(
                f"The walker's directions have collapsed (diversity {self.distances.diversity:.2f}, below "
                f"{COLLAPSED}): it moves all anchors in one direction. Train it with directions=4 to keep "
                "them apart, or use Normal."
            )
        if self.status == "reached" and self.distances.norm > OFF_PRIOR:
            sentences.append(
                f"The perturbed latents have left the prior (norms {self.distances.norm:.2f} times the "
                f"anchors', above {OFF_PRIOR}): the generator was not trained there. Look at the views "
                "before using them; Resample(), or a walker trained with keep_norm=True, does not leave it."
            )
        return sentences


@dataclass(frozen=True)
class Measurement(Stored):
    """Table 1 of the paper for one generator: the figures, and the words for them."""

    generator: str  # its name, or its class's
    image_shape: tuple[int, int, int]  # [C, H, W]
    levels: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes, coarse to fine
    method: str  # "walker" or "sweep"
    target_loss: float  # plain InfoNCE, nats
    temperature: float  # of InfoNCE
    pairs: int  # K of the batches in which losses were measured, over all ranks
    seed: int  # of everything random
    impacts: tuple[LevelImpact, ...]  # the rows of the table
    seconds: float  # what the measurement took
    environment: dict[str, Any]  # versions and machine
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    # Pictures: by the row's name a tensor uint8 [anchors, views, C, H, W], whose view 0 is the anchor.
    grids: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ceiling(self) -> float:
        """The largest bound that so many pairs can show, ``log(2K - 1)`` nats."""
        return math.log(2 * self.pairs - 1)

    # -- words ------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The generator's name as a line of plain text."""
        return plain_text(self.generator)

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return f"Impact of the levels of {self.label} ({self.method}, target {self.target_loss:.3g} nats)"

    @property
    def headline(self) -> list[str]:
        """The result in a few sentences."""
        groups = []
        for verdict in VERDICTS:
            members = [
                f"{impact.key} ({impact.label})" for impact in self.impacts if impact.verdict == verdict
            ]
            if members:
                verb = "is" if len(members) == 1 else "are"
                groups.append(f"{_joined(members)} {verb} {verdict}")
        sentences = [f"Of {self.label}'s {len(self.levels)} levels, {_joined(groups)}."]
        moved = [impact for impact in self.impacts if impact.status != "under-used"]
        if len(moved) > 1:
            sentences.append(self._trend(moved))
        return sentences

    def _trend(self, moved: Sequence[LevelImpact]) -> str:
        """Say how the distances of these rows go with the level."""
        first, last = moved[0], moved[-1]
        means = [impact.distances.mean for impact in moved]
        trend = "grows with the level" if means == sorted(means) else "does not grow steadily with the level"
        return (
            f"The shift that costs {self.target_loss:.3g} nats {trend}: from {digits(means[0])} at level "
            f"{first.key} ({_share(first.distances.relative)} the distance between two draws) to "
            f"{digits(means[-1])} at level {last.key} ({_share(last.distances.relative)} it)."
        )

    @property
    def notes(self) -> list[str]:
        """How to read the table."""
        factor = to_paper_scale(1.0, self.temperature)
        return [
            f"Loss: plain InfoNCE in nats at temperature {self.temperature:g}, ± standard error; "
            f"the target is {self.target_loss:.3g}.",
            f"MI bound: log(2K − 1) − loss in nats, K = {self.pairs} pairs; "
            f"it cannot exceed its ceiling of {self.ceiling:.2f} nats.",
            f"Paper's scale: the same loss × {factor:.2f} (temperature / 0.07), as the research code prints "
            "it. A conversion only: the bound does not hold for it.",
            "Distance: L2 between a positive's latent and its anchor's. Relative: 1 is as far as a fresh "
            "draw of the level. ≥: the target was not reached within this distance.",
        ]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run was: names and values as text."""
        levels = [
            f"{index}: {plain_text(name)} [{'×'.join(map(str, shape))}]"
            for index, (name, shape) in enumerate(self.levels)
        ]
        paper_target = to_paper_scale(self.target_loss, self.temperature)
        counts = sorted({f"{impact.distances.count:,}" for impact in self.impacts})
        return [
            ("generator", f"{self.label}, images {'×'.join(map(str, self.image_shape))}"),
            ("levels", "; ".join(levels)),
            ("method", self.method),
            ("target loss", f"{self.target_loss:g} nats ({paper_target:.2f} on the paper's scale)"),
            ("temperature", f"{self.temperature:g}"),
            ("pairs K", str(self.pairs)),
            ("anchors for distances", _joined(counts)),
            ("seed", str(self.seed)),
            ("time", duration(self.seconds)),
            *_flat(self.options),
            *_flat(self.environment),
        ]

    # -- tables -----------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per impact, with columns that name their units.

        Every table is made of them. A figure that the method does not have is None.
        """
        return [self._row(impact) for impact in self.impacts]

    def _row(self, impact: LevelImpact) -> dict[str, Any]:
        distances = impact.distances
        distance_low, distance_high = impact.distance_interval or (None, None)
        sigma_low, sigma_high = impact.interval or (None, None)
        return {
            "level": impact.key,
            "name": impact.label,
            "verdict": impact.verdict,
            "status": impact.status,
            "loss_nats": impact.loss,
            "loss_stderr": impact.stderr,
            "mi_bound_nats": mi_lower_bound(impact.loss, self.pairs),
            "mi_ceiling_nats": self.ceiling,
            "loss_paper_scale": to_paper_scale(impact.loss, self.temperature),
            "distance_mean": distances.mean,
            "distance_std": distances.std,
            "distance_low": distance_low,
            "distance_high": distance_high,
            "distance_prior": distances.prior,
            "distance_relative": distances.relative,
            "norm_ratio": distances.norm,
            "diversity": distances.diversity,
            "directions": distances.directions,
            "sigma": impact.magnitude,
            "sigma_low": sigma_low,
            "sigma_high": sigma_high,
            "perturber": impact.specification["name"],
            "steps": impact.steps,
            "seconds": impact.seconds,
        }

    def cells(self) -> list[dict[str, str]]:
        """Return the table as text: per impact, what stands under each header."""
        return [self._cells(row) for row in self.rows()]

    def _cells(self, row: Mapping[str, Any]) -> dict[str, str]:
        least = "≥ " if row["status"] == "under-used" else ""
        mean, std = digits(row["distance_mean"]), digits(row["distance_std"], row["distance_mean"])
        factor = to_paper_scale(1.0, self.temperature)
        cells = {
            "level": row["level"],
            "name": row["name"],
            "loss, nats": f"{row['loss_nats']:.3f} ± {row['loss_stderr']:.3f}",
            f"MI bound (≤ {self.ceiling:.2f})": f"{row['mi_bound_nats']:.2f}",
            f"paper's scale (× {factor:.2f})": f"{row['loss_paper_scale']:.2f}",
            "distance": f"{least}{mean} ± {std}",
            "relative": f"{least}{row['distance_relative']:.2f}",
        }
        if self.method == "sweep":
            cells["σ [95%]"] = f"{least}{_sigma(row)}" if row["sigma"] is not None else row["perturber"]
        else:
            cells["diversity"] = f"{row['diversity']:.2f}"
            cells["directions"] = f"{row['directions']:.1f}"
            cells["norm ratio"] = f"{row['norm_ratio']:.2f}"
        cells["verdict"] = row["verdict"]
        return cells

    # -- what to do with it -----------------------------------------------------------------------------

    @property
    def snippet(self) -> str:
        """Python that makes views with the perturbers of this report, run where it was saved."""
        arguments = self._generator
        setup, generator = ["generator = ...  # the one that was measured"], "generator"
        if arguments:
            setup, generator = [], f"mlviews.load_generator({_call(arguments)})"
        return "\n".join(
            [
                "import mlviews",
                "from mlviews import perturb",
                "",
                *setup,
                'report = mlviews.ImpactReport.load(".")  # the folder of impact.json',
                "source = mlviews.MLViewSource(",
                f"    {generator},",
                "    perturb=perturb.matched(report),",
                f"    transform=mlviews.transforms.simclr(size={self._crop}, color=False),",
                "    batch_size=256,",
                "    num_samples=60_000,",
                ")",
            ]
        )

    @property
    def configuration(self) -> str:
        """The same as a YAML configuration; empty where its levels have no keys of their own."""
        keys = [impact.key for impact in self.impacts]
        moved = [level for impact in self.impacts for level in impact.levels]
        if any(", " in key for key in keys) or len(set(moved)) < len(moved):
            return ""
        values: dict[str, Any] = {}
        arguments = self._generator
        if arguments:
            values["generator"] = arguments if len(arguments) > 1 else self.generator
        values["perturb"] = {
            int(key) if key.isdigit() else key: _short(impact.specify(impact.choice))
            for key, impact in zip(keys, self.impacts, strict=True)
        }
        values["transform"] = {"name": "simclr", "size": self._crop, "color": False}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)

    @property
    def _generator(self) -> dict[str, Any] | None:
        """How a configuration names the generator, with a weights file if it needs one.

        None for a user's own.
        """
        bundled = {information.name: information.bundled for information in list_generators()}
        if self.generator not in bundled:
            return None
        weights = {} if bundled[self.generator] else {"weights": "FILE"}
        options = dict(self.options.get("generator", {}))
        options.pop("name", None)
        return {"name": self.generator, **weights, **options}

    @property
    def _crop(self) -> int:
        """7/8 of the side, as in the paper."""
        return round(0.875 * self.image_shape[-1])


def _equal(first: Perturber, second: Perturber) -> bool:
    """Return whether two perturbers do the same."""
    if isinstance(first, Walker) and isinstance(second, Walker):
        if first.provenance != second.provenance or first.keep_norm != second.keep_norm:
            return False
        if first.noise != second.noise:
            return False
        weights, second_weights = first.state_dict(), second.state_dict()
        return all(torch.equal(value, second_weights[name]) for name, value in weights.items())
    if type(first) is not type(second):
        return False
    return isinstance(first, Fixed) or first == second


# -- text -----------------------------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """Return a text from elsewhere as one line without control characters, of at most 1000 characters.

    Line breaks end a table's row, and escape sequences are a terminal's commands.
    """
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _call(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of a call as Python, the first one without its name.

    Values and names may be from a file: they are quoted.
    """
    names = [name for name in arguments if name.isidentifier() and not keyword.iskeyword(name)]
    words = [_quoted(next(iter(arguments.values())))]
    words += [f"{name}={_quoted(arguments[name])}" for name in names[1:]]
    unnamed = {name: value for name, value in arguments.items() if name not in names}
    return ", ".join([*words, f"**{unnamed!r}"] if unnamed else words)


def _quoted(value: Any) -> str:
    """Return a value as Python; plain texts stand between double quotes."""
    is_plain = isinstance(value, str) and value.isprintable() and not set(value) & set('"\\')
    return f'"{value}"' if is_plain else repr(value)


def digits(value: float, scale: float | None = None) -> str:
    """Return the value with three significant digits, and no fewer than its whole part.

    Args:
        value: the number.
        scale: the value whose number of decimals to take; None: this one's own.
    """
    size = abs(value if scale is None else scale)
    decimals = 2
    if size:
        decimals = min(max(2 - math.floor(math.log10(size)), 0), 6)
    return f"{value:.{decimals}f}"


def _share(relative: float) -> str:
    """Return ``13% of``, or ``2.9 times``."""
    return f"{relative:.0%} of" if relative < 1.5 else f"{relative:.1f} times"


def duration(seconds: float) -> str:
    """Return seconds, minutes, or hours and minutes, as they are read best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _joined(words: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _sigma(row: Mapping[str, Any]) -> str:
    """Return a row's standard deviation, with its interval if there is one."""
    low, high = row["sigma_low"], row["sigma_high"]
    interval = f" [{digits(low)}, {digits(high)}]" if low is not None else ""
    return f"{digits(row['sigma'])}{interval}"


def _short(specification: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return a perturber's configuration without its defaults, with numbers of four digits."""
    values = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in specification.items()
        if value or key == "std"
    }
    return values if len(values) > 1 else str(specification["name"])


def _code(perturber: Perturber) -> str:
    """Return the call that makes a perturber, with numbers of three digits."""
    if isinstance(perturber, Mix):
        return f"Mix(rate={perturber.rate:.3g})"
    if not isinstance(perturber, Normal):
        return f"{type(perturber).__name__}()"
    arguments = [f"std={perturber.std:.3g}"]
    for name in ("truncation", "mean"):
        value = getattr(perturber, name)
        if value:
            arguments.append(f"{name}={value:.3g}")
    return f"Normal({', '.join(arguments)})"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return nested facts as a list; the names of groups are left out."""
    facts: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += _flat(value)
            continue
        items = value if isinstance(value, list | tuple) else [value]
        facts.append((plain_text(name.replace("_", " ")), plain_text(", ".join(map(_text, items)))))
    return facts


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
