"""The errors users meet, and the two ways their messages are completed."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class WeightsError(ValueError):
    """A weights file that is unreadable, corrupt, hostile, or made for another architecture."""


def listing(names: Iterable[object]) -> str:
    """``a, b, c`` for the "allowed values" part of a message."""
    return ", ".join(str(name) for name in names)


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` (with a leading blank) when one allowed name is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int (numpy's and the like included), if it is one from ``low`` to ``high``, both included.

    Raises:
        ValueError: if it is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {_readable(high)}"
        raise ValueError(f"Invalid {name}={value!r}: it must be an integer {allowed}.")
    return number


def is_number(value: object) -> bool:
    """Is it a finite real number (numpy's included), and not a boolean?"""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _readable(bound: int) -> str:
    for offset, suffix in ((0, ""), (1, " - 1")):
        power = (bound + offset).bit_length() - 1
        if power >= 32 and bound + offset == 1 << power:
            return f"2**{power}{suffix}"
    return str(bound)


def path_of(value: Any, meaning: str) -> Path:
    """The value as a path.

    Raises:
        ValueError: if it is not one.
    """
    try:
        return Path(value)
    except TypeError:
        found = repr(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"
        raise ValueError(f"Invalid {meaning} {found}: it must be a path.") from None
