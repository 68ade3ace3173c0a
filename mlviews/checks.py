"""Checks of arguments: each returns the value in its one form, or raises a ValueError.

The message names the value, the values that are allowed, and the remedy.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from mlviews.errors import did_you_mean, listing, nearest


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return the value as an int (numpy's and the like included) if it is one from ``low`` to ``high``, both
    included.

    Raises:
        ValueError: if it is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {_power(high)}"
        raise ValueError(f"Invalid {name}={value!r}: it must be an integer {allowed}.")
    return number


def _power(bound: int) -> str:
    """Return a large bound as a power of two, so that people can read it."""
    for offset, suffix in ((0, ""), (1, " - 1")):
        power = (bound + offset).bit_length() - 1
        if power >= 32 and bound + offset == 1 << power:
            return f"2**{power}{suffix}"
    return str(bound)


def is_number(value: object) -> bool:
    """Is it a finite real number (numpy's included), and not a boolean?"""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def positive(name: str, value: Any) -> float:
    """Return the value as a float if it is a number above 0; else raise a ValueError."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"Invalid {name}={value!r}: it must be a number above 0.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return the value if it is True or False; else raise a ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}={value!r}: it must be True or False.")
    return value


def choice(meaning: str, name: Any, allowed: Collection[str], problem: str = "Unknown") -> str:
    """Return the name if it is one of those allowed; else raise a ValueError that names the nearest one.

    Args:
        meaning: the kind of thing that is chosen, e.g. "preset".
        name: what the user gave.
        allowed: the names there are.
        problem: the first word of the message.
    """
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(
            f"{problem} {meaning} {name!r}: there are {nearest(name, allowed)}.{did_you_mean(name, allowed)}"
        )
    return name


def options(owner: str, names: Iterable[Any], allowed: Collection[str], *, word: str = "option") -> None:
    """Raise a ValueError for the first option that its owner does not take.

    Args:
        owner: what the options are for, e.g. "generator 'fashion'".
        names: the names of the options that the user gave.
        allowed: the names of the options that there are.
        word: what an option is called here.
    """
    for name in names:
        if name not in allowed:
            raise ValueError(
                f"Invalid {word} {name!r} of {owner}: it takes "
                f"{listing(allowed) or 'none'}.{did_you_mean(name, allowed)}"
            )


def described(value: Any) -> str:
    """Return dtype and shape of a tensor, or the name of another value's type, for a message."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def path_of(value: Any, meaning: str) -> Path:
    """Return the value as a path.

    Raises:
        ValueError: if it is not one.
    """
    try:
        return Path(value)
    except TypeError:
        text = repr(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"
        raise ValueError(f"Invalid {meaning} {text}: it must be a path.") from None


def output_folder(out: str | Path | None) -> Path | None:
    """Return the folder for results, which is made if it is missing; None for none."""
    if out is None:
        return None
    folder = path_of(out, "output folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
