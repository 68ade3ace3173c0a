"""How long the explorer takes for a render: ``python benchmarks/explorer.py --threads 1``.

Renders the tab "Views" as its page does, pictures included, and writes ``benchmarks/results/explorer.json``.
The processor's time is what a render costs; the clock's time is what one waits where nothing else computes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from record import RESULTS, command, publish

from mlviews.explorer.page import Page, plain_values
from mlviews.explorer.session import Session
from mlviews.runs.records import environment


def main(
    preset: Annotated[str, typer.Option(help="Preset to render.")] = "fashion-ml-matched",
    anchors: Annotated[int, typer.Option(help="Anchors.", min=1)] = 8,
    views: Annotated[int, typer.Option(help="Views of each, the anchor included.", min=2)] = 6,
    renders: Annotated[int, typer.Option(help="Renders to time, after two to warm up.", min=2)] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "explorer.json",
) -> None:
    """Time the page's renders."""
    if threads:
        torch.set_num_threads(threads)
    session = Session(preset, device=device)
    page = Page(session)
    state = dataclasses.replace(session.initial, anchors=anchors, views=views)
    values = plain_values(state)
    times = []
    for _ in range(renders + 2):
        begin, clock = time.process_time(), time.perf_counter()
        page.render(*values)
        times.append((time.process_time() - begin, time.perf_counter() - clock))
    processor, waiting = (sorted(1000 * seconds for seconds in kind) for kind in zip(*times[2:], strict=True))
    record = {
        "command": command("explorer.py"),
        "preset": preset, "anchors": anchors, "views": views, "renders": renders, "seed": state.seed,
        "processor_ms": {"median": statistics.median(processor), "largest": processor[-1]},
        "clock_ms": {"smallest": waiting[0], "median": statistics.median(waiting), "largest": waiting[-1]},
    } | environment(session.source.device)  # fmt: skip
    line = f"{anchors} × {views} views: {statistics.median(processor):.0f} ms of the processor"
    publish(record, out, line, generators=[session.source.generator.name])


if __name__ == "__main__":
    typer.run(main)
