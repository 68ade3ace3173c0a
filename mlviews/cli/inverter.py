"""The command `inverter`: an encoder for a generator that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import mlviews
from mlviews.cli.shared import Job, Measured, app, generator_and_law, with_options, write
from mlviews.runs.processes import rank_of_run


@app.command(
    help="Train an inverter: an encoder for a generator that has none, on its own images alone. "
    "A second call goes on where the first one stopped."
)
@with_options
def inverter(
    generator: Measured,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for inverter.safetensors, its history and the checkpoint. "
            "Default: runs/inverter-GENERATOR."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of real images that it is refined on. Default: none.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, at most.", min=1)] = 20_000,
    batch: Annotated[int, typer.Option(help="Images of a step, over all processes.", min=1)] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float16, for autocast. Default: float32.")
    ] = None,
    *,
    options: Job,
) -> None:
    """Run :func:`mlviews.train_inverter`; print what the inverter reconstructs."""
    network, anchor = generator_and_law(generator, options.weights)
    out = out or Path("runs", f"inverter-{Path(generator).stem}")
    trained = mlviews.train_inverter(
        network,
        images,
        out=out,
        device=options.place,
        devices=options.devices,
        steps=steps,
        batch=batch,
        dtype=dtype,
        anchor=anchor,
        seed=options.seed,
        resume=options.resume,
    )
    if rank_of_run() == 0:
        best = trained.run.best
        write(
            f"{trained.run.status} after {trained.run.history[-1].step} steps; the best at step {best.step}: "
            f"mean squared error {best.pair_error:.4f} of the generator's images, "
            f"{best.latent_error:.2f} of their latents (chance: 1)."
        )
        write(*sorted(out.glob("*.*")))
