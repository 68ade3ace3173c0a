"""The command `explore`: views in a browser, to choose magnitudes by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlviews.cli.shared import Device, Seed, Weights, app, default_device, write


@app.command()
def explore(
    preset: Annotated[
        str, typer.Argument(help="A preset, a YAML file with the same keys, or a generator's name.")
    ] = "fashion-ml-random",
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of your own images, for anchors; the generator needs an encoder."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a report of `mlviews impact`: what each level costs. "
            "Default: runs/impact-GENERATOR-sweep, where the page measures it if it is not there."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port; 0: any. Default: the first free one from 7860 on.", min=0, max=65535),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to answer on. 0.0.0.0 lets everybody on the network in.")
    ] = "127.0.0.1",
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Look at views in a browser, choose how far each level moves, and take the preset away."""
    try:
        import gradio  # noqa: F401  (takes seconds, and is an extra)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The explorer needs {error.name}: pip install 'mlviews[explorer]'.", name=error.name
        ) from None
    from mlviews.explorer import serving
    from mlviews.explorer.page import application
    from mlviews.explorer.session import Session

    with serving.bound(host, port) as listener:  # a port in use is an error before the work
        session = Session(
            preset,
            weights=weights,
            images=images,
            report=report,
            seed=seed,
            device=device,
            default_device=default_device(),
        )
        session.views(session.initial)  # a mistake in the preset is an error now; and the first one is slow
        server = serving.Server(application(session, host), listener)
        write(serving.directions(host, server.port), "Ctrl+C ends it.")
        try:
            server.run()
        finally:
            session.close()
