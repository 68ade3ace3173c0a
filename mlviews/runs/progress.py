"""Progress bars of long jobs. rich is imported where one is shown: the import takes a number from Python's global random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def bars(console: Console, show: bool = True) -> Iterator[Progress]:
    """Bars with a count, the time so far and the time to go."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not show) as progress:
        yield progress


@contextmanager
def bar(
    description: str, total: int, done: int = 0, show: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """One bar on stderr; what it yields takes how much is done, and what to add to its description."""
    from rich.console import Console

    with bars(Console(stderr=True), show) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda completed, note: progress.update(
            task, completed=completed, description=f"{description}{note}"
        )
