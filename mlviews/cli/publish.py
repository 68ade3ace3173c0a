"""The command `publish`: a generator as a folder, and at Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import mlviews
from mlviews.cli.shared import Measured, app, generator_and_law, with_options, write
from mlviews.runs.processes import check_device


@app.command(
    help="Write a generator into a folder with its weights, inverter, impact report, pictures and model "
    "card, from which anybody loads it without trust; upload it to Hugging Face if asked for."
)
@with_options
def publish(
    generator: Measured,
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option(help="Of the generator: a file, a URL, or a Hugging Face id. Default: its own."),
    ] = None,
    inverter: Annotated[
        Path | None,
        typer.Option(help="A file of `mlviews inverter`. Default: the generator's, if it has one."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder of `mlviews impact`. Default: no report.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Of the weights, as Hugging Face names it, e.g. mit. Default: not known."),
    ] = None,
    trained_on: Annotated[
        str | None, typer.Option(help="What it was trained on. Default: what the weights file says.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images in the picture; 0 for no pictures.", min=0)] = 32,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an earlier call.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Hugging Face repository, owner/name, to upload it to. Default: none.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
) -> None:
    """Run :func:`mlviews.publish`; print the files."""
    network, _ = generator_and_law(generator, weights, inverter)
    path = mlviews.publish(
        network.to(check_device(device)),
        folder,
        report=report,
        license=license,
        trained_on=trained_on,
        samples=samples,
        overwrite=overwrite,
        push=push,
        private=private,
    )
    write(*sorted(file for file in path.rglob("*") if file.is_file()))
    write(f"Load it by mlviews.load_generator({str(path)!r}).")
    if push is not None:
        write(f"It is at Hugging Face: mlviews.load_generator({push!r}).")
