"""JSON files of settings: tables of bounded length, whose numbers no network can be too large for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlviews.checks import is_number
from mlviews.weights.files import Refused, printable, reading

_LARGEST = 4 << 20  # of a file, bytes
_LARGEST_NUMBER = 1 << 20  # more than any setting needs


def read_table(path: Path, most_values: int = 50_000) -> dict[str, Any]:
    """Return the content of a JSON file: a table whose numbers and lengths are bounded.

    Args:
        path: the file.
        most_values: what it may hold, nested values included.

    Raises:
        mlviews.WeightsError: if it is damaged, or something else.
    """
    with reading(path, _LARGEST) as data:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise Refused(f"{type(content).__name__}, expected a table of settings")
        _check_values(content, most_values)
    return content


def _check_values(content: Any, most_values: int) -> None:
    """Raise a Refused for more values, or larger numbers, than settings have."""
    values = [content]
    count = 0
    while values:
        value = values.pop()
        count += 1
        if count > most_values:
            raise Refused(f"more than {most_values:,} settings")
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            values += value
        elif value is not None and not isinstance(value, str | bool):
            if is_number(value) and abs(value) <= _LARGEST_NUMBER:
                continue
            raise Refused(f"the number {printable(value, 40)}")
