"""The errors users meet, and the two ways in which their messages are completed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeightsError(ValueError):
    """A weights file that is unreadable, corrupt, hostile, or made for another architecture."""


def listing(names: Iterable[object]) -> str:
    """``a, b, c`` for the "allowed values" part of a message."""
    return ", ".join(str(name) for name in names)


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` (with a leading blank) when one allowed name is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
