"""What the documents' tables have in common: where they come from, and how they look."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import weights
from record import RESULTS

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "mlviews" / "zoo"
FOLDERS = (
    ".",
    "benchmarks",
    "benchmarks/paper",
    "mlviews/zoo",
    "mlviews/generators",
    "mlviews/impact",
    "mlviews/latents",
    "integrations/cluster",
    "integrations/lightly",
    "integrations/solo_learn",
    "integrations/stable_pretraining",
)
WEIGHTS = "Which weights the figures belong to"
"""The heading of what benchmarks/README.md says of weights that were replaced."""
DOCUMENTS = [ROOT / folder / "README.md" for folder in FOLDERS]
Record = dict[str, Any]
TABLES: dict[str, Callable[..., str]] = {}


def table(
    *names: str,
    absent: str | None = None,
    also: Sequence[str] = (),
    generators: Collection[str] | None = None,
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function of these records as the table of its name in the documents.

    A sentence below it names the weights that its records were measured with, if they are bundled no longer.

    Args:
        names: the records that the function gets.
        absent: stands in its place as long as a record is missing; None: all of them have to be there.
        also: records that the function reads itself.
        generators: the bundled generators whose figures the table has; None for all of its records'; none if
            its rows name the weights.
    """

    def register(function: Callable[..., str]) -> Callable[..., str]:
        def rendered(page: Path = DOCUMENTS[0]) -> str:
            if absent is not None and not all(path_of(name).exists() for name in names):
                return absent
            records = {name: read(name) for name in names}
            text = function(*records.values())
            records |= {name: read(name) for name in also}
            files = {f"{name}.json": record for name, record in records.items()}
            sentence = weights.outdated(files, generators)
            return text if sentence is None else f"{text}\n\n{sentence} ([which]({_weights_link(page)}))."

        TABLES[function.__name__] = rendered
        return function

    return register


def _weights_link(page: Path) -> str:
    """Return the link from a page to the section on weights."""
    target = ROOT / "benchmarks" / "README.md"
    file = "" if page == target else os.path.relpath(target, page.parent)
    return f"{file}#{WEIGHTS.lower().replace(' ', '-')}"


def path_of(name: str) -> Path:
    """Return where a record of a benchmark or of a bundled generator is, by its name without ``.json``."""
    path = RESULTS / f"{name}.json"
    return path if path.exists() else ZOO / path.name


def read(name: str) -> Record:
    """Return the record of this name."""
    record: Record = json.loads(path_of(name).read_text())
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
