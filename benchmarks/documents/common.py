"""What the documents' tables have in common: where they come from, how they look, and the sentence that says how to make them again."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "mlviews" / "zoo"
FOLDERS = (
    ".",
    "benchmarks",
    "mlviews/zoo",
    "mlviews/generators",
    "mlviews/impact",
    "integrations/lightly",
    "integrations/solo_learn",
)
DOCUMENTS = [ROOT / folder / "README.md" for folder in FOLDERS]
Record = dict[str, Any]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Register a function as the table of its name in the documents."""
    TABLES[function.__name__] = function
    return function


def read(name: str, folder: Path = RESULTS) -> Record:
    """Return a record by its name without ``.json``."""
    record: Record = json.loads((folder / f"{name}.json").read_text())
    return record


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns of numbers are aligned to the right."""
    numeric = [
        all(re.match(r"([≥+-] ?)?\d|$", cell) for cell in column) for column in zip(*rows, strict=True)
    ]
    rule = ["---:" if number and column else "---" for column, number in enumerate(numeric)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def captioned(lines: str, *sentences: str) -> str:
    """Return a table and, below it, a paragraph of these sentences."""
    return f"{lines}\n\n{' '.join(sentences)}"


def provenance(*records: Record, note: str = ".") -> str:
    """Return the sentence that says by which commands the records are made again; ``note`` ends it."""
    commands = ", ".join(f"`{record['command']}`" for record in records)
    return f"Command{'s' * (len(records) > 1)}: {commands}{note}"


def threads(record: Record) -> str:
    """Return what a record was measured with: ``2 thread(s) of AMD EPYC``."""
    machine = record["machine"]
    return f"{machine['threads']} thread(s) of {machine['processor']}"


def with_range(values: Sequence[float], form: str) -> str:
    """Return ``mean (smallest–largest)`` in a format; the mean alone if both ends read the same."""
    low, high = format(min(values), form), format(max(values), form)
    mean = format(statistics.mean(values), form)
    return mean if low == high else f"{mean} ({low}–{high})"
