"""The commands `demo` and `probe`: an encoder is trained on views, and tested on real images."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mlviews
from mlviews.cli.shared import (
    Data,
    Device,
    Preset,
    Seed,
    Weights,
    app,
    console,
    folder_to_write,
    preset_arguments,
    write,
)
from mlviews.config import load_config
from mlviews.evaluation.data import real_images
from mlviews.evaluation.learner import METHODS
from mlviews.evaluation.probe import ProbeReport, run_probe
from mlviews.runs.files import fingerprint, whole
from mlviews.runs.records import set_aside


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of 128 pairs.", min=1)] = 400,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """The main job: train an encoder on views made by the bundled generator, then test it on real images.

    Two to three minutes on two CPU cores. It is the command `probe --preset fashion-ml-matched`.
    """
    probe("fashion-ml-matched", out=out, steps=steps, data=data, seed=seed, device=device)


@app.command(
    help="Train an encoder on a preset's views, then linear-probe and kNN it on real images "
    "next to raw pixels and an untrained encoder."
)
def probe(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/probe"),
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs per step. Default: the preset's, else 128.", min=2)
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "simclr",
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of AdamW's one-cycle schedule. Default: the method's own."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of SimCLR's NT-Xent.")] = 0.2,
    weights: Weights = None,
    data: Data = None,
    labels: Annotated[int, typer.Option(help="Most labelled images to fit the probes on.", min=100)] = 10_000,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Run the probe of :mod:`mlviews.evaluation.probe`; write its record and two pictures."""
    from mlviews.viz import draw_loss, draw_views

    folder_to_write(out)
    arguments = {"batch_size": 128, **preset_arguments(preset, weights, seed, device), "layout": "pair"}
    if batch_size is not None:
        arguments["batch_size"] = batch_size
    # The probe is one process: RANK may be left over from another job.
    source = mlviews.MLViewSource(**(arguments | {"rank": 0, "world_size": 1}))
    first = source.replace()  # stays at the epoch that the training begins with, for the picture
    fit, test = real_images(data, labels)
    levels = ", ".join(level.name for level in source.generator.levels)
    write(
        f"Views: preset {preset}, levels {levels}, seed {source.seed}, on {source.device}. "
        "No file is read for them.",
        f"Probe: {len(fit.labels)} labelled real images to fit, {len(test.labels)} to test "
        f"({data or 'bundled slice'}).",
    )
    if sys.stdout is not None:
        sys.stdout.flush()

    report = run_probe(source, steps, method, lr, temperature, (fit, test), Console(stderr=True))
    settings = {
        "command": shlex.join(["mlviews", *sys.argv[1:]]),
        "preset": preset,
        "configuration": load_config(preset),
        "generator_weights": fingerprint(source.generator),
    }
    try:
        paths = _save_probe(out, report, settings)
        paths.append(draw_views(first, out / "views.png", title=preset))
        paths.append(draw_loss(report.losses, out / "loss.png", f"{method} on {preset}", report.chance))
    finally:  # what was measured is printed at least
        console.print(report.table())
        write(report.summary)
    write(*paths)


def _save_probe(out: Path, report: ProbeReport, settings: dict[str, Any]) -> list[Path]:
    """Write a probe's record; that of a run with other settings keeps its files under other names.

    Returns:
        The record's path, and those that an earlier run's files have now.
    """
    measured = report.record()
    settings |= {name: measured[name] for name in ("training", "probe_images", "test_images")}
    content = json.dumps(settings | measured, indent=1, default=str) + "\n"
    record = out / "result.json"
    with whole(record) as part:
        part.write_text(content)
        old = set_aside(record, json.loads(content), list(settings), [out / "views.png", out / "loss.png"])
    return [record, *old]
