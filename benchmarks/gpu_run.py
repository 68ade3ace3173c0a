"""What the sections of ``gpu.py`` share: where they run, the time they have, and a source's steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlviews import MLVGM, MLViewSource
from mlviews.perturb import Resample

Row = dict[str, Any]


class Run(NamedTuple):
    """What every section is given."""

    device: torch.device
    tiny: bool  # on a CPU: the tiny networks, and only a few samples
    data: Path | None  # folder of Fashion-MNIST's files; None: the bundled slice
    work: Path  # folder for the files that loaders read

    def clip(self, count: int, most: int = 4) -> int:
        """Return the count, or a small one on a CPU."""
        return min(count, most) if self.tiny else count


class Clock:
    """The time that a section has.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.end - time.perf_counter())

    def within(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names as long as there is time, and note those that there was none for."""
        for name in names:
            if self.left:
                yield name
            else:
                self.left_out.append(name)


def step_source(generator: MLVGM, batch: int, device: torch.device, **options: Any) -> MLViewSource:
    """Return a source whose views differ in the finer half of the levels, which are drawn afresh."""
    first = max(1, len(generator.levels) // 2)
    defaults = {"num_samples": batch * 10_000, "layout": "pair"}
    return MLViewSource(
        generator, {f"{first}:": Resample()}, batch_size=batch, device=device, **(defaults | options)
    )


def tried(call: Callable[[], Row], facts: Row) -> Row:
    """Return these facts and those that a call returns, or what went wrong."""
    try:
        return facts | call()
    except Exception as error:  # the sections after it have to be measured all the same
        return facts | {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}
