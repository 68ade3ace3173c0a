"""What a setting costs, from measured curves: nats, and the share of positives that keep their class.

The nats are those of a report of :func:`mlviews.measure_impact` (method "sweep"), in which every level was
moved alone. Moved together, levels cost more than any one of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlviews.checks import is_number
from mlviews.explorer.state import LARGEST, Row, Setting
from mlviews.generators.base import MLVGM
from mlviews.impact.figures import BEYOND, Curve, LevelImpact
from mlviews.impact.report import ImpactReport
from mlviews.impact.sweep import SweepOptions
from mlviews.perturb import Mix
from mlviews.runs.files import warn_of_other_weights, whole

CLASSES_FILE = "class-kept.json"
"""The file beside a report that holds the shares of positives that keep their anchor's class."""

_FORMAT = "mlviews.class-kept"


@dataclass(frozen=True)
class ClassCurve:
    """The share of positives that keep their anchor's class, against the magnitude of one level's noise."""

    magnitudes: list[float]  # standard deviations, rising
    shares: list[float]  # at each of them
    resample: float  # of a fresh draw of the level


@dataclass(frozen=True)
class ClassShares:
    """The class curves of a generator."""

    generator: str  # its name
    perturber: str  # "normal" or "mix", as of a sweep
    truncation: float | None  # of normal noise, in standard deviations
    pairs: int  # on which each share was measured
    accuracy: float  # of the classifier, on real images
    curves: dict[int, ClassCurve]  # by level

    def save(self, folder: Path) -> Path:
        """Write ``class-kept.json`` into a folder, whole or not at all; return its path."""
        path = folder / CLASSES_FILE
        with whole(path) as part:
            part.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, folder: Path) -> ClassShares | None:
        """Read what :meth:`save` wrote; None if there is no such file.

        Raises:
            ValueError: if it is damaged.
        """
        path = folder / CLASSES_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            curves = {int(level): ClassCurve(**curve) for level, curve in values.pop("curves").items()}
            for curve in curves.values():
                _check_curve(curve)
            return cls(curves=curves, **values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and measure again.") from error


def _check_curve(curve: ClassCurve) -> None:
    """Raise a ValueError if a curve from a file cannot be read off."""
    numbers = [*curve.magnitudes, *curve.shares, curve.resample]
    rising = all(np.diff([0.0, *curve.magnitudes]) > 0)
    if not all(map(is_number, numbers)) or not rising or len(curve.shares) != len(curve.magnitudes) > 0:
        raise ValueError("a curve needs a number for each of its rising magnitudes")


@dataclass(frozen=True)
class Costs:
    """The curves that settings are looked up on.

    Args:
        report: of the generator; None if there is none yet.
        classes: of the generator; None if they were not measured.
    """

    report: ImpactReport | None = None
    classes: ClassShares | None = None

    @classmethod
    def load(cls, folder: Path, generator: MLVGM) -> Costs:
        """Read what a folder holds of a report and of class curves; nothing is an answer too.

        A report of other weights of the generator is warned of.

        Raises:
            ValueError: if a file is damaged, or is of another generator's levels.
        """
        report = ImpactReport.load(folder) if (folder / "impact.json").is_file() else None
        levels = tuple((level.name, tuple(level.shape)) for level in generator.levels)
        if report is not None and report.levels != levels:
            measured = ", ".join(name for name, _ in report.levels)
            raise ValueError(
                f"The report {folder} is of {report.label} with the levels {measured}, the generator's are "
                f"{', '.join(generator.level_names)}: give the report of this one (--report)."
            )
        if report is not None:
            weights = report.options.get("weights")
            warn_of_other_weights(f"The report {folder}", weights, generator, generator.name)
        return cls(report, ClassShares.load(folder))

    @property
    def sweep(self) -> SweepOptions:
        """How the report's noise was: its perturber and its truncation."""
        values = {} if self.report is None else self.report.options
        return SweepOptions(perturber=values.get("perturber", "normal"), truncation=values.get("truncation"))

    @property
    def _impacts(self) -> Sequence[LevelImpact]:
        report = self.report
        return () if report is None else [impact for impact in report.impacts if impact.curve is not None]

    def _impact(self, row: Row) -> LevelImpact | None:
        return next((impact for impact in self._impacts if impact.levels == row.levels), None)

    def nats(self, row: Row, setting: Setting) -> float | None:
        """Return what a row's setting costs when nothing else is moved, in nats; None if nobody knows."""
        if setting.kind == "fixed":
            return 0.0
        impact = self._impact(row)
        if impact is None or impact.curve is None:
            return None
        if _is_fresh(setting):
            return impact.curve.resample
        std = _magnitude(setting, self.sweep.perturber, self.sweep.truncation)
        return None if std is None else _read_off(std, impact.curve.magnitudes, impact.curve.monotone, 0.0)

    def class_kept(self, row: Row, setting: Setting) -> float | None:
        """Return the share of positives that keep their anchor's class; None if nobody knows."""
        if setting.kind == "fixed":
            return 1.0
        classes = self.classes
        if classes is None or len(row.levels) > 1 or row.levels[0] not in classes.curves:
            return None
        curve = classes.curves[row.levels[0]]
        if _is_fresh(setting):
            return curve.resample
        std = _magnitude(setting, classes.perturber, classes.truncation)
        return None if std is None else _read_off(std, curve.magnitudes, curve.shares, 1.0)

    def spend(self, row: Row, setting: Setting, nats: float) -> Setting:
        """Return the setting that spends so many nats at a row, as :func:`mlviews.perturb.matched` chooses.

        A row that cannot spend them within its prior is drawn afresh; one without a curve stays as it is.

        Args:
            row: the row.
            setting: its setting so far.
            nats: how much to spend.
        """
        impact = self._impact(row)
        if impact is None or impact.curve is None:
            return setting
        if nats <= 0:
            return Setting("fixed")
        if nats > impact.curve.monotone[-1]:
            return Setting("resample")
        std = _solution(impact.curve, nats)
        if self._leaves_prior(impact, impact.curve, std):
            return Setting("resample")
        shift = self.sweep.shift(std)
        if isinstance(shift, Mix):
            return Setting("mix", _rounded(shift.rate))
        return Setting("normal", min(_rounded(shift.std), LARGEST["std"]), shift.truncation)

    def _leaves_prior(self, impact: LevelImpact, curve: Curve, std: float) -> bool:
        """Say whether noise of a standard deviation goes farther than a fresh draw of the level."""
        if self.sweep.perturber == "mix":
            return False
        if impact.magnitude is None:
            return _read_off(std, curve.magnitudes, curve.monotone, 0.0) >= curve.resample
        return impact.distances.relative * std / impact.magnitude > BEYOND


def _solution(curve: Curve, nats: float) -> float:
    """Return the standard deviation that costs so many nats: the inverse of :func:`_read_off`."""
    first = curve.magnitudes[0]
    if nats < curve.monotone[0]:
        return max(nats / curve.monotone[0], 0.01) * first
    return math.exp(float(np.interp(nats, curve.monotone, np.log(curve.magnitudes))))


def _is_fresh(setting: Setting) -> bool:
    """Say whether a level is drawn afresh."""
    return setting.kind == "resample" or (setting.kind == "mix" and setting.amount == 1)


def _rounded(amount: float) -> float:
    """Return a number that people read, of three digits."""
    return float(f"{amount:.3g}")


def _magnitude(setting: Setting, perturber: str, truncation: float | None) -> float | None:
    """Return where a setting is on curves that were measured with a perturber; None if it is not on them.

    The sweep counts in standard deviations of the noise; those of a mixture are in units of the anchors'.
    """
    if setting.kind != perturber or (perturber == "normal" and setting.truncation != truncation):
        return None
    return setting.amount if perturber == "normal" else setting.amount / math.sqrt(1 - setting.amount**2)


def _read_off(std: float, magnitudes: Sequence[float], values: Sequence[float], start: float) -> float:
    """Return a curve's value at a standard deviation: straight over its logarithm, as the sweep is solved.

    Below the grid it is straight from the start, the value of no noise; above it, the last value.
    """
    if std < magnitudes[0]:
        return start + (values[0] - start) * std / magnitudes[0]
    return float(np.interp(math.log(std), np.log(magnitudes), values))


def described(nats: float | None, class_kept: float | None) -> str:
    """Return what a setting costs, in words."""
    if nats is None:
        return "cost not measured"
    words = f"{nats:.2f} nats"
    return words if class_kept is None else f"{words} · class kept {class_kept:.0%}"
