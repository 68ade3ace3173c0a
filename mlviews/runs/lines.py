"""Progress as plain lines, for logs: about one every half minute."""

from __future__ import annotations

import datetime
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, Task, TaskID

FIRST = 3.0  # seconds from a job's begin to its first line
EVERY = 30.0  # seconds between its lines


class Lines(Progress):
    """rich's progress where the output is no terminal: lines that say how far a job is.

    A job's first line comes after 3 seconds, the others every 30 seconds, and the last one at its end, or
    where the block is left without an error. What goes wrong with the output (a closed pipe, a full disk)
    ends the lines, not the job.

    Args:
        console: the lines go to its file.
        unit: what is counted, e.g. "images"; None leaves the count out.
    """

    def __init__(self, console: Console, unit: str | None = "") -> None:
        super().__init__(console=console, disable=True)  # rich itself writes nothing
        self._file = console.file
        self._unit = unit
        self._due: dict[TaskID, float] = {}  # when a job's next line is due
        self._counts: dict[TaskID, float] = {}  # of a job's last line; -1 where a job has begun and has none
        self._broken = False

    def add_task(self, description: str, *arguments: Any, **options: Any) -> TaskID:
        """Add a job; see rich."""
        task = super().add_task(description, *arguments, **options)
        self._due[task] = time.monotonic() + FIRST
        return task

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a job's count or description; see rich."""
        finished = self._tasks[task_id].finished
        super().update(task_id, **changes)
        self._write_if_due(task_id, finished)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Add to a job's count; see rich."""
        finished = self._tasks[task_id].finished
        super().advance(task_id, advance)
        self._write_if_due(task_id, finished)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        super().__exit__(kind, *error)
        if kind is None:
            for task_id, task in self._tasks.items():
                if not task.finished and task_id in self._counts and self._counts[task_id] != task.completed:
                    self._write(task_id)

    def _write_if_due(self, task_id: TaskID, was_finished: bool) -> None:
        """Write a job's line if it is time for one, or the job has just ended."""
        finished = self._tasks[task_id].finished
        self._counts.setdefault(task_id, -1)
        if finished != was_finished or (not finished and time.monotonic() >= self._due[task_id]):
            self._write(task_id)

    def _write(self, task_id: TaskID) -> None:
        """Write a job's line."""
        task = self._tasks[task_id]
        self._due[task_id] = time.monotonic() + EVERY
        self._counts[task_id] = task.completed
        if self._broken:
            return
        try:
            print(self._line(task), file=self._file, flush=True)
        except (OSError, ValueError):  # a closed pipe, a full disk; a closed file
            self._broken = True

    def _line(self, task: Task) -> str:
        """Return e.g. "training, loss 2.31: 120/400, 0:00:45, 0:01:45 left"."""
        parts = (
            []
            if self._unit is None
            else [f"{task.completed:,.0f}/{task.total or 0:,.0f} {self._unit}".strip()]
        )
        parts.append(_clock(task.elapsed))
        if not task.finished:
            parts.append(f"{_clock(task.time_remaining)} left")
        separator = "; " if ": " in task.description else ": "
        return f"{task.description}{separator}{', '.join(parts)}"


def _clock(seconds: float | None) -> str:
    """Return hours, minutes and seconds; "-:--:--" where they are not known yet."""
    return "-:--:--" if seconds is None else str(datetime.timedelta(seconds=int(seconds)))
