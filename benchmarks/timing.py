"""Times of calls that take turns, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

Seconds = dict[str, list[float]]
"""Seconds of each turn by clock: ``wall``, and ``cpu`` for the process' own time."""


def now(device: torch.device | str) -> float:
    """Return the time in seconds, once the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, title: str, warmup: int = 1
) -> dict[str, Seconds]:
    """Time calls in turns, in alternating order.

    Args:
        calls: what to time, by name.
        turns: timed calls of each.
        title: stands beside the progress bar.
        warmup: calls of each before them, which are not timed.

    Returns:
        Seconds of every turn, by name and clock.
    """
    seconds: dict[str, Seconds] = {name: {"wall": [], "cpu": []} for name in calls}
    names = list(calls)
    for turn in track(range(-warmup, turns), title, console=Console(stderr=True)):
        for name in names if turn % 2 == 0 else names[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                seconds[name]["wall"].append(wall)
                seconds[name]["cpu"].append(cpu)
    return seconds


def median_and_quartiles(values: Sequence[float], method: str = "exclusive") -> dict[str, Any]:
    """Return the median and the first and third quartile, to four digits;

    ``method`` is of ``statistics.quantiles``.
    """
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method=method)  # type: ignore[arg-type]
    return {"median": round(statistics.median(values), 4), "quartiles": [round(low, 4), round(high, 4)]}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each turn."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
