"""What a step of the source costs beside the generator: ``python benchmarks/overhead.py``.

Every stage of the same steps is timed where it runs (stages inside a stage are subtracted from it), so that
the overhead is a sum of measured parts and not the difference of two totals. Prints a table, writes
``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.loaders import overhead
from record import RESULTS, command, publish
from rich.console import Console
from rich.progress import track
from timing import now

import mlviews
from mlviews.reuse import Reuse
from mlviews.runs.records import environment


class Stages:
    """Seconds of each timed callable within one step, without those of timed callables that it calls.

    Args:
        device: where the steps are made.
        clock: returns the time in seconds; None: that of the wall, once the device has done its work.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.clock = clock or partial(now, device)
        self._inner = [0.0]  # seconds of the timed callables inside each one that is running

    def time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same callable, with its own time added to a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = self.clock()
            result = call(*args, **kwargs)
            seconds = self.clock() - begin
            self.seconds[name] += seconds - self._inner.pop()
            self._inner[-1] += seconds
            return result

        return timed

    def watch(self, source: mlviews.MLViewSource) -> None:
        """Time the stages of a source's steps; attributes of the instances shadow the methods."""
        generator, step = source.generator, source.step
        stages: list[tuple[Any, str, str]] = []
        if isinstance(step, Reuse):
            stages.append((step, "shown", "samples kept"))
            step = step.step
        stages += [
            # Numbers are drawn when latents and noise are read, not when the step asks for them.
            (step, "draw", "drawing"),
            (generator, "anchor_latents", "drawing"),
            (generator, "noise_of", "drawing"),
            (step, "perturb", "perturbing"),
            (generator, "run", "generator"),
            (generator, "to_image", "generator"),
            (step, "decode", "stacking views"),
            (step, "augment", "T_x"),
            (source, "layout", "layout"),
        ]
        for holder, method, stage in stages:
            setattr(holder, method, self.time(stage, getattr(holder, method)))


def time_steps(source: mlviews.MLViewSource, steps: int, warmup: int) -> list[dict[str, float]]:
    """Return the seconds of each stage, step by step; those of no stage are bookkeeping."""
    next(iter(source))  # the plan is made once
    stages = Stages(source.device)
    stages.watch(source)
    batches = iter(source)
    step = stages.time("bookkeeping", lambda: next(batches))
    rows = []
    for _ in track(range(steps + warmup), "steps", console=Console(stderr=True)):
        stages.seconds.clear()
        step()
        rows.append(dict(stages.seconds))
    return rows[warmup:]


def main(
    preset: Annotated[str, typer.Option(help="Preset to time.")] = "fashion-ml-random",
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 128,
    steps: Annotated[
        int, typer.Option(help="Steps to time, after a tenth as many to warm up.", min=10)
    ] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "overhead.json",
) -> None:
    """Time the stages of a source's steps."""
    if threads:
        torch.set_num_threads(threads)
    warmup = steps // 10
    size = {"batch_size": batch_size, "num_samples": batch_size * (steps + warmup), "device": device}
    source = mlviews.MLViewSource.from_config({"preset": preset, **size})
    rows = time_steps(source, steps, warmup)

    medians = {name: 1e3 * statistics.median(row[name] for row in rows) for name in rows[0]}
    quartiles = {name: statistics.quantiles((1e3 * row[name] for row in rows), n=4)[::2] for name in rows[0]}
    extra = [name for name in medians if name not in ("generator", "T_x")]
    extra_share = statistics.median(sum(row[name] for name in extra) / row["generator"] for row in rows)
    augmentation = statistics.median(row["T_x"] / row["generator"] for row in rows)
    record = {
        "command": command("overhead.py"),
        "preset": preset, "batch_size": batch_size, "steps": steps,
        "median_ms": {name: round(median, 3) for name, median in medians.items()},
        "quartiles_ms": {name: [round(value, 3) for value in ends] for name, ends in quartiles.items()},
        "overhead_of_generator": round(extra_share, 4),
        "t_x_of_generator": round(augmentation, 4),
        "seed": source.seed,
    } | environment(source.device)  # fmt: skip
    publish(record, out, overhead(record), generators=[source.generator.name])


if __name__ == "__main__":
    typer.run(main)
