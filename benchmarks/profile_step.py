"""Where the time of a training step at 32 pixels goes: ``python benchmarks/profile_step.py``.

The step is that of ``benchmarks/loaders.py``: a ResNet-18 by SimCLR, fed by the bundled generator. Every
stage is timed where it runs, by this process' CPU time on one thread, so that other jobs count little. What
convolutions and products take is compared with the rate of torch's matrix product on this machine. Steps that
make their samples, that give the generator the whole batch at once, and that show samples again take turns.
Prints a table, writes ``benchmarks/results/profile-step.json``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from documents.loaders import profile_step
from feeds import CROPS, Case, source
from loader_rounds import Learner
from overhead import Stages
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

from mlviews import MLViewSource
from mlviews.runs.records import environment
from mlviews.transforms import simclr

SIDE = 32
PRODUCT = 1024  # rows and columns of the matrices whose product is the measure


class Kind:
    """Steps of one kind: their batches, and the CPU seconds of their stages.

    Args:
        views: the source.
        untimed: steps before those that are timed.
    """

    def __init__(self, views: MLViewSource, untimed: int) -> None:
        self.batches = iter(views)
        self.batch = next(self.batches)
        for _ in range(untimed - 1):
            next(self.batches)
        self.stages = Stages(torch.device("cpu"), time.process_time)
        self.stages.watch(views)
        self.rows: list[dict[str, float]] = []

    def step(self, train: Callable[[Any], None] | None) -> None:
        """Take a step, and note its stages; ``train`` takes the batch."""
        self.stages.seconds.clear()
        self.batch = self.stages.time("bookkeeping", lambda: next(self.batches))()
        if train is not None:
            self.stages.time("encoder", train)(self.batch)
        self.rows.append(dict(self.stages.seconds))

    def medians(self) -> dict[str, float]:
        """Return the median milliseconds of each stage, without the first step."""
        rows = self.rows[1:]
        return {name: round(1e3 * statistics.median(row[name] for row in rows), 3) for name in rows[0]}


def product_rate(turns: int) -> float:
    """Return the GFLOP a CPU second of torch's matrix product, the median of the turns."""
    left, right = torch.randn(2, PRODUCT, PRODUCT)
    rates = []
    for _ in range(turns + 1):
        begin = time.process_time()
        left @ right
        rates.append(2 * PRODUCT**3 / 1e9 / (time.process_time() - begin))
    return statistics.median(rates[1:])


def gflop(call: Callable[[], Any]) -> float:
    """Return the GFLOP of a call's convolutions and products; a product and a sum are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return round(counter.get_total_flops() / 1e9, 3)


def main(
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 256,
    turns: Annotated[int, typer.Option(help="Timed steps of each kind.", min=1)] = 15,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "profile-step.json",
) -> None:
    """Time the stages of a step."""
    torch.set_num_threads(1)
    case = Case("mlviews", SIDE, batch_size, "cpu", 0, Path(), 1)
    transform, steps = simclr(CROPS[SIDE], color=False), turns + 3
    plain = source(case, batch_size * steps, transform)
    kinds = {
        "fresh": Kind(plain, 1),
        "fresh, whole batch": Kind(copy.deepcopy(plain).replace(micro_batch_size=batch_size), 1),
        # Two steps make the samples that all later ones show again.
        "shown again": Kind(source(case, batch_size * 2 * steps, transform, reuse=steps), 2),
    }
    learner = Learner("cpu")
    rates = []
    for _ in track(range(turns + 1), "turns", console=Console(stderr=True)):
        for name, kind in kinds.items():
            kind.step(learner.step if name == "fresh" else None)
        rates.append(product_rate(3))
    fresh = kinds["fresh"]
    counts = {
        "generator": gflop(lambda: next(fresh.batches)),
        "encoder": gflop(lambda: learner.step(fresh.batch)),
    }
    record = {
        "command": command("profile_step.py"),
        "batch_size": batch_size, "turns": turns, "seed": 0, "product": PRODUCT,
        "gflop_per_s": round(statistics.median(rates), 1),
        "gflop": counts,
        "median_ms": {name: kind.medians() for name, kind in kinds.items()},
    } | environment("cpu")  # fmt: skip
    out = off_the_records(out) if batch_size < 64 else out
    publish(record, out, profile_step(record), generators=["fashion"])


if __name__ == "__main__":
    typer.run(main)
