"""The commands `impact` and `walker`: how much levels matter, and learned perturbations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import mlviews
from mlviews.cli.shared import (
    Measured,
    Measurement,
    app,
    console,
    folder_to_write,
    generator_and_law,
    with_options,
    write,
)
from mlviews.impact.measure import METHODS
from mlviews.levels import level_indices
from mlviews.runs.processes import rank_of_run


@app.command(
    help="Measure how much each latent level matters (the paper's Table 1): a table, "
    "and a report to show around."
)
@with_options
def impact(
    generator: Measured = "fashion",
    method: Annotated[
        str, typer.Option(help=f"One of: {', '.join(METHODS)} (minutes, and the paper's).")
    ] = "sweep",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report, its pictures and the checkpoints. "
            "Default: runs/impact-GENERATOR-METHOD."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps: of the sweep's critics; at most, of each walker.", min=10),
    ] = None,
    perturber: Annotated[
        str | None,
        typer.Option(
            help="How the sweep moves a level: normal (noise is added), or mix, which keeps the variance "
            "and is for diffusion models. Default: normal."
        ),
    ] = None,
    *,
    options: Measurement,
) -> None:
    """Run :func:`mlviews.measure_impact`; print and save its report."""
    options.check_shares()
    network, anchor = generator_and_law(generator, options.weights)
    out = folder_to_write(out or Path("runs", f"impact-{Path(generator).stem}-{method}"))
    training: dict[str, Any] = {"steps": steps, "perturber": perturber}
    training = {name: value for name, value in training.items() if value is not None}
    report = mlviews.measure_impact(
        network,
        method,
        options.target_loss,
        out,
        anchor=anchor,
        seed=options.seed,
        device=options.place,
        devices=options.devices,
        monte_carlo=options.monte_carlo,
        pairs=options.pairs,
        resume=options.resume,
        **training,
    )
    if rank_of_run() > 0:
        return
    try:
        paths = report.save(out)
    finally:  # what was measured is printed at least
        console.print(report)
        write(*report.headline)
    write(*paths)


@app.command(
    help="Train a walker, the learned perturbation of one level or several (the paper's eq. 5), "
    "until InfoNCE is at the target."
)
@with_options
def walker(
    levels: Annotated[
        str, typer.Argument(help="Level to move, e.g. 2; or several together, start:stop as in a slice.")
    ],
    generator: Annotated[
        str,
        typer.Option(
            help="A generator's name, or a preset or YAML file whose generator and anchors to take."
        ),
    ] = "fashion",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for walker.safetensors, its history and the checkpoint. "
            "Default: runs/walker-GENERATOR-LEVELS."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the walker, at most.", min=1)] = 1000,
    directions: Annotated[
        float,
        typer.Option(help="That the anchors' shifts spread over, at least; 1 is the paper's: no matter."),
    ] = 1.0,
    keep_norm: Annotated[
        bool,
        typer.Option(help="Keep each anchor's length, so that positives stay where the prior has its mass."),
    ] = False,
    noise: Annotated[
        bool,
        typer.Option(help="Train a walker that draws: an anchor then has many positives, not a single one."),
    ] = False,
    *,
    options: Measurement,
) -> None:
    """Run :func:`mlviews.train_walker`; print what the walker does."""
    options.check_shares()
    network, anchor = generator_and_law(generator, options.weights)
    moved = level_indices(levels, network.levels)
    out = folder_to_write(out or Path("runs", f"walker-{Path(generator).stem}-{'-'.join(map(str, moved))}"))
    trained = mlviews.train_walker(
        network,
        moved,
        options.target_loss,
        out,
        pairs=options.pairs,
        steps=steps,
        directions=directions,
        keep_norm=keep_norm,
        noise=noise,
        anchor=anchor,
        seed=options.seed,
        device=options.place,
        devices=options.devices,
        resume=options.resume,
        monte_carlo=options.monte_carlo,
    )
    if rank_of_run() > 0:
        return
    distances = trained.distances
    write(
        f"{trained.status}: {trained.loss:.3f} ± {trained.stderr:.3f} nats after "
        f"{len(trained.history.losses)} steps; "
        f"distance {distances.mean:.3g} ± {distances.std:.2g}, "
        f"{distances.relative:.2f} of that between two draws; "
        f"norm {distances.norm:.2f} of the anchors'; {distances.directions:.1f} directions."
    )
    write(*sorted(out.glob("*.*")))
