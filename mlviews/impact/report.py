"""What measuring a generator's levels found: the figures, the words for them, and the files they are written to."""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor

from mlviews.checks import is_number, path_of
from mlviews.generators import list_generators
from mlviews.mi.infonce import mi_lower_bound, to_paper_scale
from mlviews.perturb import Fixed, Normal, Perturber, Resample, Walker, build

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

FORMAT, VERSION = "mlviews.impact", 1
OVER_USED = 0.25  # of the distance between two draws of the prior: a level that spends its budget within it decides nearly everything
BEYOND = 1.01  # of the same: a level that has to go farther than a fresh draw (a hundredth for Monte Carlo's error)
COLLAPSED = 0.1  # diversity of directions below which a walker moves all anchors the same way
OFF_PRIOR = 1.5  # ratio of norms above which a perturbation has left what the generator was trained on

TEXT = ("level", "name", "verdict")  # columns that are no numbers
TOGETHER = (
    "Each level was measured alone, with all others fixed. Levels moved together cost more than any one of them: start with these figures, "
    "look at the views, and go down from there."
)


@dataclass(frozen=True)
class Distances:
    """How far a perturbation moves a level, by Monte Carlo (paper, sec. 3.1), in the space where the level lives (W for StyleGAN2)."""

    count: int  # anchors drawn
    mean: float  # of the L2 distances
    std: float
    edges: list[float]  # of the histogram's bins, one more than counts
    counts: list[int]
    prior: float  # mean distance between two independent draws of the level: the unit that levels can be compared in
    norm: float  # mean |T(z)| / mean |z| of the latents: 1 where T stays in the prior's typical set
    diversity: float  # 1 - |mean unit direction| of the shifts: 0 if all anchors move in one direction, about 1 if in all
    directions: float  # how many they spread over: the participation ratio of their second moments, 1 for a line, d for all of d dimensions

    @property
    def relative(self) -> float:
        """The mean in units of the prior's own distance: 1 is as far as a fresh draw."""
        return self.mean / self.prior


@dataclass(frozen=True)
class History:
    """The game between critic and walker, step by step (method "walker")."""

    losses: list[float]  # plain InfoNCE in nats, of each step's batch
    smoothed: list[float]  # what the stopping rule looks at
    distances: list[float]  # mean L2 distance of each step's batch
    warmup: int  # steps in which the critic learned alone


@dataclass(frozen=True)
class Curve:
    """The loss of one level against the magnitude of its perturbation (method "sweep")."""

    magnitudes: list[float]  # standard deviations, rising
    losses: list[float]  # as measured, nats
    stderrs: list[float]
    monotone: list[float]  # the rising curve through them that is solved for the target
    resample: float  # loss of a fresh draw of the level
    resample_stderr: float


@dataclass(frozen=True)
class LevelImpact:
    """One row of the paper's Table 1."""

    levels: tuple[int, ...]  # indices: one, or several moved together
    name: str
    status: str  # "reached"; "resample": a fresh draw reaches the target, no shift within the grid does; "under-used": nothing does
    perturber: Perturber  # that spends the budget; for an under-used level the farthest that was tried
    loss: float  # plain InfoNCE in nats under that perturber; for an under-used level the largest that was reached
    stderr: float
    distances: Distances
    magnitude: float | None = None  # standard deviation of the perturbation (sweep)
    interval: tuple[float, float] | None = None  # 95 % interval of the magnitude (sweep)
    distance_interval: tuple[float, float] | None = None  # of the mean distance
    steps: int = 0
    seconds: float = 0.0
    history: History | None = field(default=None, repr=False)
    curve: Curve | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        """Equal figures, and perturbers that do the same: most have no equality of their own."""
        if not isinstance(other, LevelImpact):
            return NotImplemented
        same = all(getattr(self, one.name) == getattr(other, one.name) for one in fields(self) if one.name != "perturber")
        return same and _equal(self.perturber, other.perturber)

    @property
    def verdict(self) -> str:
        """One of "over-used", "balanced", "weak" (the target lies farther away than a fresh draw does), "under-used"."""
        if self.status == "under-used":
            return "under-used"
        if self.distances.relative > BEYOND:
            return "weak"
        return "over-used" if self.distances.relative < OVER_USED else "balanced"

    @property
    def choice(self) -> Perturber:
        """The perturber to make views with: of the measured one and a fresh draw, the one that stays within the prior."""
        outside = self.status == "under-used" or (self.verdict == "weak" and not isinstance(self.perturber, Walker))
        return Resample() if outside else self.perturber

    @property
    def key(self) -> str:
        """The levels as a key of ``perturb=``: an index, or ``start:stop``; indices with commas if they are not in a row."""
        first, last = self.levels[0], self.levels[-1]
        if len(self.levels) == 1:
            return str(first)
        return f"{first}:{last + 1}" if self.levels == tuple(range(first, last + 1)) else ", ".join(map(str, self.levels))

    @property
    def specification(self) -> dict[str, Any]:
        """The measured perturber's configuration, as :func:`mlviews.perturb.build` takes it; a walker's path is the name it is saved by.

        Raises:
            ValueError: for a perturber that has no configuration.
        """
        return self._specification(self.perturber)

    def _specification(self, known: Perturber) -> dict[str, Any]:
        if isinstance(known, Normal):
            return {"name": "normal", "std": known.std, "truncation": known.truncation, "mean": known.mean}
        if isinstance(known, Walker):
            return {"name": "walker", "path": f"walker-{'-'.join(map(str, self.levels))}.safetensors"}
        if isinstance(known, Fixed | Resample):
            return {"name": type(known).__name__.lower()}
        raise ValueError(f"Perturber {known!r} of level {self.name!r} cannot be written: a report holds Fixed, Normal, Resample or Walker.")

    @property
    def advice(self) -> str:
        """What to do with the level, in words."""
        share, distance = _share(self.distances.relative), digits(self.distances.mean)
        how = f"the walker ({self.specification['path']})" if isinstance(self.perturber, Walker) else _code(self.perturber)
        if self.status == "under-used":
            return (
                f"Under-used: nothing reaches the target; the loss is {self.loss:.3f} nats even at {share} the distance between two "
                "draws. Moving it does not spend the budget: Resample() does no harm, and adds little to the views."
            )
        if self.status == "resample":
            return (
                f"No shift within the grid reaches the target, a fresh draw does ({self.loss:.3f} nats): use Resample(). "
                "Nothing of this level is then left for the encoder to learn."
            )
        if self.verdict == "over-used":
            return (
                f"Over-used: {share} the distance between two draws already spends the budget, so this level decides nearly all "
                f"that tells images apart. Keep it fixed, or move it by a mean distance of at most {distance}: {how}."
            )
        if self.verdict == "weak":
            cost = f" costs {self.curve.resample:.2f} nats and" if self.curve else ""
            return (
                f"Weak: it takes {how}, {share} the distance between two draws, to spend the budget. A fresh draw, Resample(),{cost} stays "
                "within what the generator was trained on."
            )
        return f"Balanced: {how} spends the budget, at a mean distance of {distance}, {share} that between two draws."

    @property
    def warnings(self) -> list[str]:
        """What makes the perturber a poor source of views although it reaches its loss."""
        found = []
        if isinstance(self.perturber, Walker) and self.distances.diversity < COLLAPSED:
            found.append(
                f"The walker's directions have collapsed (diversity {self.distances.diversity:.2f}, below {COLLAPSED}): it moves all "
                "anchors in one direction. Train it with directions=4 to keep them apart, or use Normal."
            )
        if self.status == "reached" and self.distances.norm > OFF_PRIOR:
            found.append(
                f"The perturbed latents have left the prior (norms {self.distances.norm:.2f} times the anchors', above {OFF_PRIOR}): the "
                "generator was not trained there. Look at the views before using them; Resample(), or a walker trained with "
                "keep_norm=True, does not leave it."
            )
        return found


@dataclass(frozen=True)
class ImpactReport:
    """What :func:`mlviews.measure_impact` returns: Table 1 of the paper for one generator."""

    generator: str  # its name, or its class's
    image_shape: tuple[int, int, int]
    levels: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes, coarse to fine
    method: str  # "walker" or "sweep"
    target_loss: float  # plain InfoNCE in nats
    temperature: float
    pairs: int  # K of the batches in which losses were measured, over all ranks
    seed: int
    impacts: tuple[LevelImpact, ...]
    seconds: float
    environment: dict[str, Any]  # versions and machine
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    # Pictures: per row's name uint8 [anchors, views, C, H, W], view 0 the anchor.
    grids: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()

    @property
    def ceiling(self) -> float:
        """The largest bound that so many pairs can show, ``log(2K - 1)`` nats."""
        return math.log(2 * self.pairs - 1)

    # -- words -----------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """One line: what was measured."""
        return f"Impact of the levels of {self.generator} ({self.method}, target {self.target_loss:.3g} nats)"

    @property
    def headline(self) -> list[str]:
        """The result in a few sentences."""
        groups = []
        for verdict in ("over-used", "balanced", "weak", "under-used"):
            members = [f"{impact.key} ({impact.name})" for impact in self.impacts if impact.verdict == verdict]
            if members:
                groups.append(f"{_joined(members)} {'is' if len(members) == 1 else 'are'} {verdict}")
        sentences = [f"Of {self.generator}'s {len(self.levels)} levels, {_joined(groups)}."]
        moved = [impact for impact in self.impacts if impact.status != "under-used"]
        if len(moved) > 1:
            first, last = moved[0], moved[-1]
            means = [impact.distances.mean for impact in moved]
            trend = "grows with the level" if means == sorted(means) else "does not grow steadily with the level"
            sentences.append(
                f"The shift that costs {self.target_loss:.3g} nats {trend}: from {digits(means[0])} at level {first.key} "
                f"({_share(first.distances.relative)} the distance between two draws) to {digits(means[-1])} at level {last.key} "
                f"({_share(last.distances.relative)} it)."
            )
        return sentences

    @property
    def notes(self) -> list[str]:
        """How to read the table."""
        factor = to_paper_scale(1.0, self.temperature)
        return [
            f"Loss: plain InfoNCE in nats at temperature {self.temperature:g}, ± standard error; the target is {self.target_loss:.3g}.",
            f"MI bound: log(2K − 1) − loss in nats, K = {self.pairs} pairs; it cannot exceed its ceiling of {self.ceiling:.2f} nats.",
            f"Paper's scale: the same loss × {factor:.2f} (temperature / 0.07), as the research code prints it. A conversion only: the "
            "bound does not hold for it.",
            "Distance: L2 between a positive's latent and its anchor's. Relative: 1 is as far as a fresh draw of the level. "
            "≥: the target was not reached within this distance.",
        ]

    # -- tables ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per impact: what every table is made of. None where the method has no such figure."""
        return [
            {
                "level": impact.key,
                "name": impact.name,
                "verdict": impact.verdict,
                "status": impact.status,
                "loss_nats": impact.loss,
                "loss_stderr": impact.stderr,
                "mi_bound_nats": mi_lower_bound(impact.loss, self.pairs),
                "mi_ceiling_nats": self.ceiling,
                "loss_paper_scale": to_paper_scale(impact.loss, self.temperature),
                "distance_mean": impact.distances.mean,
                "distance_std": impact.distances.std,
                "distance_low": impact.distance_interval and impact.distance_interval[0],
                "distance_high": impact.distance_interval and impact.distance_interval[1],
                "distance_prior": impact.distances.prior,
                "distance_relative": impact.distances.relative,
                "norm_ratio": impact.distances.norm,
                "diversity": impact.distances.diversity,
                "directions": impact.distances.directions,
                "sigma": impact.magnitude,
                "sigma_low": impact.interval and impact.interval[0],
                "sigma_high": impact.interval and impact.interval[1],
                "perturber": impact.specification["name"],
                "steps": impact.steps,
                "seconds": impact.seconds,
            }
            for impact in self.impacts
        ]

    def frame(self) -> pd.DataFrame:
        """One row per impact, with flat columns that name their units; NaN where the method has no such figure."""
        import pandas as pd  # half a second that measuring need not wait for

        frame = pd.DataFrame(self.rows())
        return frame.astype(dict.fromkeys(("distance_low", "distance_high", "sigma", "sigma_low", "sigma_high"), float))

    def cells(self) -> list[dict[str, str]]:
        """The table as text: per impact, what stands under each header."""
        found = []
        for row in self.rows():
            least = "≥ " if row["status"] == "under-used" else ""
            cells = {
                "level": row["level"],
                "name": row["name"],
                "loss, nats": f"{row['loss_nats']:.3f} ± {row['loss_stderr']:.3f}",
                f"MI bound (≤ {self.ceiling:.2f})": f"{row['mi_bound_nats']:.2f}",
                f"paper's scale (× {to_paper_scale(1.0, self.temperature):.2f})": f"{row['loss_paper_scale']:.2f}",
                "distance": f"{least}{digits(row['distance_mean'])} ± {digits(row['distance_std'], row['distance_mean'])}",
                "relative": f"{least}{row['distance_relative']:.2f}",
            }
            if self.method == "sweep":
                low, high, sigma = row["sigma_low"], row["sigma_high"], row["sigma"]
                interval = f" [{digits(low)}, {digits(high)}]" if low is not None else ""
                cells["σ [95%]"] = f"{least}{digits(sigma)}{interval}" if sigma is not None else row["perturber"]
            else:
                cells |= {
                    "diversity": f"{row['diversity']:.2f}",
                    "directions": f"{row['directions']:.1f}",
                    "norm ratio": f"{row['norm_ratio']:.2f}",
                }
            found.append({**cells, "verdict": row["verdict"]})
        return found

    def table(self) -> Table:
        """The table for a terminal: both ``print`` and a rich console show it."""
        from mlviews.impact.terminal import table  # importing rich takes a number from Python's random state

        return table(self)

    def markdown(self) -> str:
        """Headline, table, notes and advice as a Markdown document."""
        cells = self.cells()
        header = list(cells[0])
        rule = ["---" if name in TEXT else "---:" for name in header]
        lines = [header, rule, *([_markdown(text) for text in row.values()] for row in cells)]
        advice = [
            f"- **Level {impact.key} ({_markdown(impact.name)}).** {_markdown(' '.join([impact.advice, *impact.warnings]))}"
            for impact in self.impacts
        ]
        parts = [f"# {_markdown(self.title)}", _markdown(" ".join(self.headline)), "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        return "\n\n".join([*parts, *map(_markdown, self.notes), "\n".join(advice), TOGETHER]) + "\n"

    def latex(self) -> str:
        """The table as LaTeX (booktabs), with the columns of the paper's Table 1 first."""
        bodies = []
        for row in self.cells():
            mean, std = row.pop("distance").split(" ± ")
            order = {"level": row.pop("level"), "name": row.pop("name"), "loss, nats": row.pop("loss, nats"), "mean": mean, "std": std}
            bodies.append(order | row)
        kinds = "".join("l" if header in TEXT else "r" for header in bodies[0])
        lines = [" & ".join(_latex(text) for text in line) + r" \\" for line in (bodies[0], *(body.values() for body in bodies))]
        caption = " ".join([f"{self.title}.", *self.notes])
        return "\n".join(
            [
                r"% \usepackage{booktabs}", r"\begin{table}", r"  \centering", rf"  \caption{{{_latex(caption)}}}",
                rf"  \begin{{tabular}}{{{kinds}}}", r"    \toprule", f"    {lines[0]}", r"    \midrule",
                *(f"    {line}" for line in lines[1:]), r"    \bottomrule", r"  \end{tabular}", r"\end{table}", "",
            ]
        )  # fmt: skip

    # -- what to do with it ----------------------------------------------------------------------------------------

    @property
    def snippet(self) -> str:
        """Python that makes views with the perturbers of this report, run where it was saved."""
        named = self._generator
        arguments = {"name": named} if isinstance(named, str) else dict(named or {})
        name, *others = (f'"{value}"' if isinstance(value, str) else repr(value) for value in arguments.values()) if named else ("",)
        options = "".join(f", {key}={value}" for key, value in zip(list(arguments)[1:], others, strict=True))
        generator = f"mlviews.load_generator({name}{options})" if named else "generator"
        setup = [] if named else ["generator = ...  # the one that was measured"]
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
        named = self._generator
        values: dict[str, Any] = {"generator": named} if named else {}
        values["perturb"] = {
            int(key) if key.isdigit() else key: _short(impact._specification(impact.choice))
            for key, impact in zip(keys, self.impacts, strict=True)
        }
        values["transform"] = {"name": "simclr", "size": self._crop, "color": False}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)

    @property
    def _generator(self) -> str | dict[str, Any] | None:
        """How a configuration names the generator, with a weights file if it needs one; None for one of the user's own."""
        bundled = {info.name: info.bundled for info in list_generators()}
        if self.generator not in bundled:
            return None
        given = {} if bundled[self.generator] else {"weights": "FILE"}
        given |= self.options.get("generator", {})
        return {"name": self.generator, **given} if given else self.generator

    @property
    def _crop(self) -> int:
        """7/8 of the side, as in the paper."""
        return round(0.875 * self.image_shape[-1])

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run was: names and values as text."""
        found = {
            "generator": f"{self.generator}, images {'×'.join(map(str, self.image_shape))}",
            "levels": "; ".join(f"{i}: {name} [{'×'.join(map(str, shape))}]" for i, (name, shape) in enumerate(self.levels)),
            "method": self.method,
            "target loss": f"{self.target_loss:g} nats ({to_paper_scale(self.target_loss, self.temperature):.2f} on the paper's scale)",
            "temperature": f"{self.temperature:g}",
            "pairs K": str(self.pairs),
            "anchors for distances": _joined(sorted({f"{impact.distances.count:,}" for impact in self.impacts})),
            "seed": str(self.seed),
            "time": _duration(self.seconds),
        }
        return [*found.items(), *_flat(self.options), *_flat(self.environment)]

    # -- files -----------------------------------------------------------------------------------------------------

    def html(self, pictures: Mapping[Path, str]) -> str:
        """The report as one self-contained page.

        Args:
            pictures: PNG files to embed, with their captions.
        """
        from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a page needs it

        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        values = {
            "report": self,
            "cells": self.cells(),
            "pictures": [(path.stem, base64.b64encode(path.read_bytes()).decode(), caption) for path, caption in pictures.items()],
            "paper_target": to_paper_scale(self.target_loss, self.temperature),
            "time": _duration(self.seconds),
            "text": TEXT,
            "together": TOGETHER,
        }
        return environment.get_template("report.html.j2").render(values)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report, each file whole or not at all, and the page last.

        Args:
            folder: for ``impact.json``, ``impact.csv``, ``impact.md``, ``impact.tex``, the pictures, ``report.html``, and a
                ``walker-<levels>.safetensors`` for each walker; made where there is none.

        Returns:
            The files' paths, in the order in which they were written.

        Raises:
            ValueError: for a figure that is not finite, or a perturber that cannot be written.
        """
        from mlviews.impact.plots import draw  # matplotlib takes a second

        folder = path_of(folder, "folder")
        content = {"format": FORMAT, "version": VERSION, **_encode(self, "report")}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
            part = Path(name)
            walkers = {impact.specification["path"]: impact.perturber for impact in self.impacts if isinstance(impact.perturber, Walker)}
            for path, walker in walkers.items():
                walker.save(part / path)
            texts = {
                "impact.json": json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
                "impact.csv": self.frame().to_csv(index=False, lineterminator="\n"),
                "impact.md": self.markdown(),
                "impact.tex": self.latex(),
            }
            pictures = draw(self, part)
            texts["report.html"] = self.html(pictures)
            for path, text in texts.items():
                (part / path).write_text(text, encoding="utf-8", newline="\n")
            page = texts.popitem()[0]
            return [(part / path).replace(folder / path) for path in (*walkers, *texts, *(picture.name for picture in pictures), page)]

    @classmethod
    def load(cls, path: str | Path) -> ImpactReport:
        """Read the report that :meth:`save` wrote, without its grids.

        Args:
            path: of the folder, or of the ``impact.json`` in it; walkers are read from the files beside it.

        Raises:
            FileNotFoundError: if there is no such file, or a walker's is missing.
            ValueError: if it is damaged, or holds something else.
        """
        path = path_of(path, "report")
        path = path / "impact.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"No impact report {path}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); give the folder or the impact.json that ImpactReport.save wrote.") from error
        found = (content.pop("format", None), content.pop("version", None)) if isinstance(content, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path} holds {found[0]!r} of version {found[1]!r}, not {FORMAT!r} of version {VERSION}.")
        try:
            report: ImpactReport = _decode(cls, content, "report", path.parent)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error} Copy it again, or measure again.") from error
        return report


# -- JSON ----------------------------------------------------------------------------------------------------------


def _encode(value: Any, where: str) -> Any:
    """A dataclass as JSON's types; tensors of pictures stay out."""
    if isinstance(value, LevelImpact):
        return _members(value, where) | {"perturber": value.specification}
    if is_dataclass(value):
        return _members(value, where)
    if isinstance(value, Mapping):
        return {key: _encode(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(one, f"{where}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Invalid {where}={value!r}: a report holds finite numbers only; measure again.")
    return value


def _members(value: Any, where: str) -> dict[str, Any]:
    names = [one.name for one in fields(value) if one.name not in ("grids", "perturber")]
    return {name: _encode(getattr(value, name), f"{where}.{name}") for name in names}


def _decode(hint: Any, value: Any, where: str, folder: Path) -> Any:
    """JSON's value as what the annotation asks for; a ValueError that says where it is anything else."""
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return None if value is None else _decode(arguments[0], value, where, folder)
    if hint is Perturber:
        return _perturber(value, where, folder)
    if is_dataclass(hint) and isinstance(value, dict):
        hints = {name: kind for name, kind in get_type_hints(hint).items() if name in {one.name for one in fields(hint)} - {"grids"}}
        if value.keys() != hints.keys():
            raise ValueError(f"{where} has the keys {sorted(value)}, not {sorted(hints)}.")
        return hint(**{name: _decode(kind, value[name], f"{where}.{name}", folder) for name, kind in hints.items()})  # type: ignore[operator]
    if get_origin(hint) is dict and isinstance(value, dict):
        return value
    if get_origin(hint) in (list, tuple) and isinstance(value, list):
        kinds = arguments if get_origin(hint) is tuple and arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} values, not {len(kinds)}.")
        return get_origin(hint)(_decode(kind, one, f"{where}[{i}]", folder) for i, (kind, one) in enumerate(zip(kinds, value, strict=True)))
    if is_number(value) if hint is float else type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r:.80}.")


def _perturber(value: Any, where: str, folder: Path) -> Perturber:
    if isinstance(value, dict) and value.get("name") == "walker":
        name = value.get("path")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{where}.path is {name!r}: a walker is a file beside the report.")
        return Walker.load(folder / name)
    return build(value)


def _equal(one: Perturber, other: Perturber) -> bool:
    """Do they do the same?"""
    if isinstance(one, Walker) and isinstance(other, Walker):
        own, its = one.state_dict(), other.state_dict()
        facts = one.provenance == other.provenance and one.keep_norm == other.keep_norm
        return facts and all(torch.equal(value, its[name]) for name, value in own.items())
    return type(one) is type(other) and (isinstance(one, Fixed | Resample) or one == other)


# -- text ----------------------------------------------------------------------------------------------------------


def digits(value: float, scale: float | None = None) -> str:
    """Three significant digits, and no fewer than the whole part; or the decimals that ``scale`` would get."""
    size = abs(value if scale is None else scale)
    return f"{value:.{min(max(2 - math.floor(math.log10(size)), 0), 6) if size else 2}f}"


def _share(relative: float) -> str:
    """``13% of``, or ``2.9 times``."""
    return f"{relative:.0%} of" if relative < 1.5 else f"{relative:.1f} times"


def _joined(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _short(specification: Mapping[str, Any]) -> dict[str, Any] | str:
    """A perturber's configuration without its defaults, numbers to four digits."""
    given = {key: value for key, value in specification.items() if value or key == "std"}
    values = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in given.items()}
    return values if len(values) > 1 else str(specification["name"])


def _code(perturber: Perturber) -> str:
    """The call that makes it, numbers to three digits."""
    if not isinstance(perturber, Normal):
        return f"{type(perturber).__name__}()"
    parts = {"truncation": perturber.truncation, "mean": perturber.mean}
    return f"Normal(std={perturber.std:.3g}" + "".join(f", {name}={value:.3g}" for name, value in parts.items() if value) + ")"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested facts as a list; the names of groups are left out."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value)
        else:
            found.append((name.replace("_", " "), ", ".join(map(_text, value)) if isinstance(value, list | tuple) else _text(value)))
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\`*_|<[]" else letter for letter in text)


_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$"}
    | {"±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$", "−": "$-$", "σ": r"$\sigma$"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
