"""The table of an impact report for a terminal."""

from __future__ import annotations

import io
import shutil

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlviews.impact.report import TEXT, ImpactReport

STYLES = {"over-used": "yellow", "weak": "dim", "under-used": "dim"}


class Printable(Table):
    """A rich table that ``print`` shows too."""

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=shutil.get_terminal_size((120, 24)).columns).print(self)
        return text.getvalue().rstrip("\n")


def table(report: ImpactReport) -> Table:
    """Title, one row per impact, and how to read it."""
    cells = report.cells()
    made = Printable(
        title=escape(report.title), caption=escape("\n".join(report.notes)), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    made.title_justify = made.caption_justify = "left"
    for header in cells[0]:
        text = header in TEXT
        made.add_column(header.replace(" (", "\n("), justify="left" if text else "right", no_wrap=text, overflow="fold")
    for row, impact in zip(cells, report.impacts, strict=True):
        made.add_row(*map(escape, row.values()), style=STYLES.get(impact.verdict, ""))
    return made
