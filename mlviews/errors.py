"""The errors users meet, and the ways in which their messages are completed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeightsError(ValueError):
    """A weights file that is unreadable, corrupt, hostile, or made for another architecture."""


def listing(names: Iterable[object]) -> str:
    """``a, b, c`` for the "allowed values" part of a message."""
    return ", ".join(str(name) for name in names)


def nearest(name: object, allowed: Iterable[str], most: int = 24) -> str:
    """Return the listing of the allowed names; of a long list, only those that are most like the name."""
    names = list(allowed)
    if len(names) <= most:
        return listing(names)
    close = difflib.get_close_matches(str(name), names, n=most // 2, cutoff=0)
    return f"{listing(close)} and {len(names) - len(close)} more"


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` (with a leading blank) when one allowed name is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
