"""Progress of long jobs: bars in a terminal, plain lines elsewhere.

rich is imported where progress is shown: the import takes a number from Python's global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def columns(unit: str | None = "") -> list[ProgressColumn]:
    """Return the columns of a bar: description, bar, count, the time so far and the time to go.

    Args:
        unit: what is counted, written after the count, e.g. "images"; None leaves the count out.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    count: list[ProgressColumn] = []
    if unit == "":
        count = [MofNCompleteColumn()]
    elif unit is not None:
        count = [TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}")]
    return [TextColumn("{task.description}"), BarColumn(), *count, TimeElapsedColumn(), TimeRemainingColumn()]


@contextmanager
def bars(console: Console | None, show: bool = True, unit: str | None = "") -> Iterator[Progress]:
    """Show bars on a console while the block runs.

    Where the console is no terminal (a log, CI, nohup), it gets a line about every half minute instead
    (:class:`mlviews.runs.lines.Lines`).

    Args:
        console: where to show them; None: on stderr.
        show: whether to show them at all.
        unit: what is counted, as of :func:`columns`.

    Yields:
        rich's progress, whose ``add_task`` adds a bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    if console is None:
        console = Console(stderr=True)
    if show and not console.is_interactive and not console.is_jupyter:
        from mlviews.runs.lines import Lines

        progress: Progress = Lines(console, unit)
    else:
        progress = Progress(*columns(unit), console=console, disable=not show)
    with progress:
        yield progress


@contextmanager
def bar(
    description: str, total: int, start: int = 0, show: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Show one bar on stderr while the block runs, or lines as :func:`bars` does.

    Args:
        description: the text before the bar.
        total: the count at the end.
        start: the count at the start.
        show: whether to show the bar at all.

    Yields:
        A function of the count so far, and of what to add to the description.
    """
    with bars(None, show) as progress:
        task = progress.add_task(description, total=total, completed=start)

        def update(completed: int, note: str) -> None:
            progress.update(task, completed=completed, description=f"{description}{note}")

        yield update
