"""Which figures a report from a file may hold: those that every word, table and picture can be made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlviews.impact.figures import METHODS, STATUSES, Curve, Distances, History, LevelImpact, Measurement

_LARGEST = 1 << 62  # of a count

Problem = tuple[str, Any, str]
"""Where a value is, the value, and what it must be."""


def check(measurement: Measurement) -> None:
    """Raise a ValueError that names the first value that is out of range, and says what it must be.

    Types are right already: :func:`mlviews.impact.stored.read` looks at them.
    """
    for place, value, rule in _problems(measurement):
        raise ValueError(f"report.{place} is {value!r:.80}: it must be {rule}.")


def _problems(measurement: Measurement) -> Iterator[Problem]:
    yield from _positive("", {"temperature": measurement.temperature, "target_loss": measurement.target_loss})
    yield from _counts("", {"pairs": measurement.pairs}, 2)
    yield from _counts("image_shape", dict(enumerate(measurement.image_shape)), 1)
    if measurement.method not in METHODS:
        yield "method", measurement.method, f"one of {', '.join(METHODS)}"
    if measurement.seconds < 0:
        yield "seconds", measurement.seconds, "at least 0"
    options = measurement.options.get("generator", {})
    if not isinstance(options, Mapping):
        yield "options.generator", options, "a mapping of options"
    if not measurement.impacts:
        yield "impacts", [], "one row or more"
    for index, impact in enumerate(measurement.impacts):
        yield from _impact(f"impacts[{index}]", impact, len(measurement.levels))


def _impact(place: str, impact: LevelImpact, levels: int) -> Iterator[Problem]:
    rule = f"indices of the {levels} levels, one or more"
    if not impact.levels or not all(0 <= level < levels for level in impact.levels):
        yield f"{place}.levels", list(impact.levels), rule
    if impact.status not in STATUSES:
        yield f"{place}.status", impact.status, f"one of {', '.join(STATUSES)}"
    yield from _not_negative(place, {"stderr": impact.stderr, "seconds": impact.seconds})
    yield from _counts(place, {"steps": impact.steps}, 0)
    if impact.magnitude is not None:
        yield from _positive(place, {"magnitude": impact.magnitude})
    for name in ("interval", "distance_interval"):
        ends = getattr(impact, name)
        if ends is not None and not 0 <= ends[0] <= ends[1]:
            yield f"{place}.{name}", list(ends), "two rising numbers of at least 0"
    yield from _distances(f"{place}.distances", impact.distances)
    if impact.history is not None:
        yield from _history(f"{place}.history", impact.history)
    if impact.curve is not None:
        yield from _curve(f"{place}.curve", impact.curve)


def _distances(place: str, distances: Distances) -> Iterator[Problem]:
    yield from _positive(place, {"prior": distances.prior})
    names = ("mean", "std", "norm", "directions")
    yield from _not_negative(place, {name: getattr(distances, name) for name in names})
    yield from _counts(place, {"count": distances.count}, 1)
    if distances.prior > 0 and not math.isfinite(distances.relative):
        yield f"{place}.prior", distances.prior, "the mean's size, about"
    if len(distances.edges) != len(distances.counts) + 1 or not _rising(distances.edges):
        yield f"{place}.edges", distances.edges, "rising numbers, one more than counts"
    yield from _counts(f"{place}.counts", dict(enumerate(distances.counts)), 0)


def _history(place: str, history: History) -> Iterator[Problem]:
    steps = len(history.losses)
    for name in ("losses", "smoothed", "distances"):
        if not len(getattr(history, name)) == steps > 0:
            yield f"{place}.{name}", getattr(history, name), "a number for every step"
    if not 0 <= history.warmup <= steps:
        yield f"{place}.warmup", history.warmup, "from 0 to the number of steps"


def _curve(place: str, curve: Curve) -> Iterator[Problem]:
    points = len(curve.magnitudes)
    for name in ("losses", "stderrs", "monotone"):
        if not len(getattr(curve, name)) == points > 0:
            yield f"{place}.{name}", getattr(curve, name), "a number for every magnitude"
    if not _rising(curve.magnitudes) or curve.magnitudes[0] <= 0:
        yield f"{place}.magnitudes", curve.magnitudes, "rising numbers above 0"


def _positive(place: str, values: Mapping[str, float]) -> Iterator[Problem]:
    for name, value in values.items():
        if value <= 0:
            yield f"{place}.{name}".lstrip("."), value, "a number above 0"


def _not_negative(place: str, values: Mapping[str, float]) -> Iterator[Problem]:
    for name, value in values.items():
        if value < 0:
            yield f"{place}.{name}", value, "at least 0"


def _counts(place: str, values: Mapping[Any, int], least: int) -> Iterator[Problem]:
    for name, value in values.items():
        if not least <= value <= _LARGEST:
            path = f"{place}[{name}]" if isinstance(name, int) else f"{place}.{name}".lstrip(".")
            yield path, value if abs(value) <= _LARGEST else "enormous", f"an integer of at least {least}"


def _rising(values: Sequence[float]) -> bool:
    return all(before <= after for before, after in itertools.pairwise(values))
