"""What a step of the source costs beside the generator: ``python benchmarks/overhead.py``.

Every part of the same steps is timed where it runs (parts inside a part are subtracted from it), so that the overhead
is a sum of measured parts and not the difference of two totals. Prints a table, writes ``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import RESULTS, write
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlviews
from mlviews.runs.records import environment


class Parts:
    """Exclusive seconds of each wrapped callable within one step."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.inner = [0.0]

    def now(self) -> float:
        """The time, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same callable, with its own time added to the part ``name``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            begin = self.now()
            out = call(*args, **kwargs)
            spent = self.now() - begin
            self.seconds[name] += spent - self.inner.pop()
            self.inner[-1] += spent
            return out

        return wrapped


def main(
    preset: Annotated[str, typer.Option(help="Preset to time.")] = "fashion-ml-random",
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps to time, after a tenth as many to warm up.", min=10)] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "overhead.json",
) -> None:
    """Time the parts of a source's steps."""
    if threads:
        torch.set_num_threads(threads)
    source = mlviews.MLViewSource.from_config(
        {"preset": preset, "batch_size": batch_size, "num_samples": batch_size * (steps + steps // 10), "device": device}
    )
    next(iter(source))  # the plan is made once
    parts = Parts(source.device)
    generator = source.generator
    # Instance attributes shadow the methods they time.
    generator.run = parts.timed("generator", generator.run)  # type: ignore[method-assign]
    generator.to_image = parts.timed("generator", generator.to_image)  # type: ignore[method-assign]
    source.step.decode = parts.timed("stacking views", source.step.decode)  # type: ignore[method-assign]
    generator.anchor_latents = parts.timed("drawing", generator.anchor_latents)  # type: ignore[method-assign]
    generator.noise_of = parts.timed("drawing", generator.noise_of)  # type: ignore[method-assign]
    source.step.perturb = parts.timed("perturbing", source.step.perturb)  # type: ignore[method-assign]
    source.step.augment = parts.timed("T_x", source.step.augment)  # type: ignore[method-assign]
    source.layout = parts.timed("layout", source.layout)
    iterator = iter(source)
    step = parts.timed("bookkeeping", lambda: next(iterator))
    rows: list[dict[str, float]] = []
    for _ in track(range(steps + steps // 10), "steps", console=Console(stderr=True)):
        parts.seconds.clear()
        step()
        rows.append(dict(parts.seconds))
    rows = rows[steps // 10 :]

    medians = {name: statistics.median(row[name] for row in rows) * 1e3 for name in rows[0]}
    quartiles = {name: statistics.quantiles((row[name] * 1e3 for row in rows), n=4)[::2] for name in rows[0]}
    own = [name for name in medians if name not in ("generator", "T_x")]
    overhead = [sum(row[name] for name in own) / row["generator"] for row in rows]
    augment = [row["T_x"] / row["generator"] for row in rows]
    table = Table("part", "median, ms", "quartiles, ms", "of the generator", title=f"{preset}, batch {batch_size}: one step")
    for name, value in medians.items():
        low, high = quartiles[name]
        table.add_row(name, f"{value:.2f}", f"{low:.2f} – {high:.2f}", f"{value / medians['generator']:.1%}")
    table.add_section()
    table.add_row("all but generator and T_x", f"{sum(medians[name] for name in own):.2f}", "", f"{statistics.median(overhead):.1%}")
    Console().print(table)

    record = {
        "command": shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "preset": preset, "batch_size": batch_size, "steps": steps,
        "median_ms": {name: round(value, 3) for name, value in medians.items()},
        "quartiles_ms": {name: [round(value, 3) for value in pair] for name, pair in quartiles.items()},
        "overhead_of_generator": round(statistics.median(overhead), 4),
        "t_x_of_generator": round(statistics.median(augment), 4),
        "seed": source.seed,
    } | environment(source.device)  # fmt: skip
    Console().print(write(record, out))


if __name__ == "__main__":
    typer.run(main)
