"""The table of a measurement for a terminal."""

from __future__ import annotations

import io
import shutil

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlviews.impact.figures import TEXT, Measurement

STYLES = {"over-used": "yellow", "weak": "dim", "under-used": "dim"}


class Printable(Table):
    """A rich table that ``print`` shows too."""

    def __str__(self) -> str:
        text = io.StringIO()
        width = shutil.get_terminal_size((120, 24)).columns
        Console(file=text, width=width).print(self)
        return text.getvalue().rstrip("\n")


def table(measurement: Measurement) -> Table:
    """Return a table of title, a row per impact, and how to read it."""
    cells = measurement.cells()
    printable = Printable(
        title=escape(measurement.title),
        caption=escape("\n".join(measurement.notes)),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    printable.title_justify = printable.caption_justify = "left"
    for header in cells[0]:
        is_text = header in TEXT
        printable.add_column(
            header.replace(" (", "\n("),
            justify="left" if is_text else "right",
            no_wrap=is_text,
            overflow="fold",
        )
    for row, impact in zip(cells, measurement.impacts, strict=True):
        printable.add_row(*map(escape, row.values()), style=STYLES.get(impact.verdict, ""))
    return printable
