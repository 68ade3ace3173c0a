"""The commands `views` and `export`: views as a picture, and as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import mlviews
from mlviews.cli.shared import Device, Preset, Seed, Weights, app, preset_arguments, write
from mlviews.runs.processes import resolve_rank


@app.command()
def views(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs/views.png"),
    anchors: Annotated[
        int, typer.Option(help="Rows: anchors, at most as many as images.", min=1, max=64)
    ] = 8,
    num_views: Annotated[
        int, typer.Option(help="Columns: views of each, the anchor included.", min=1, max=64)
    ] = 6,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of your own images, for anchors; the generator needs an encoder."),
    ] = None,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Draw anchors and their positives, before and after T_x."""
    from mlviews.viz import draw_views  # matplotlib takes a second that other commands need not wait for

    # A folder may hold fewer images than the preset's batches, and than there are to be rows.
    overrides: dict[str, Any] = {} if images is None else {"images": images, "drop_last": False}
    source = mlviews.MLViewSource(**preset_arguments(preset, weights, seed, device, **overrides))
    if images is not None:
        anchors = min(anchors, source.num_samples)
    write(draw_views(source, out, anchors, num_views, title=preset))


@app.command(
    help="Write views and their latents to files, for trainers that insist on them; "
    "on several ranks, each writes its share.\n\n"
    "A second call goes on where the first one stopped."
)
def export(
    preset: Preset = "fashion-ml-random",
    format: Annotated[
        str, typer.Option(help="One of: folder (PNG files), webdataset (tar shards), ffcv (one .beton).")
    ] = "folder",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, or to go on with. Default: runs/export-PRESET-FORMAT."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples to write. Default: the preset's, else 60000.", min=1)
    ] = None,
    num_views: Annotated[
        int | None,
        typer.Option(help="Images of each, the anchor included. Default: the preset's, else 2.", min=1),
    ] = None,
    epoch: Annotated[int, typer.Option(help="Whose samples: every epoch has its own.", min=0)] = 0,
    augmented: Annotated[
        bool,
        typer.Option(
            "--augmented/--raw",
            help="The views after the preset's T_x, or as generated: T_x is then left to the trainer.",
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples made at a time. Default: the preset's, else 128.", min=1)
    ] = None,
    shard_size: Annotated[
        int, typer.Option(help="Samples of a shard: what is lost when a run is killed.", min=1)
    ] = 1024,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Write nothing: check the files in the folder against their checksums."
        ),
    ] = False,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Export a preset's views."""
    from mlviews.integrations import files

    out = out or Path("runs", f"export-{Path(preset).stem}-{format}")
    if verify:
        write(f"{files.verify(out):,} files in {out} are as they were written.")
        return
    arguments = {"batch_size": 128, **preset_arguments(preset, weights, seed, device)}
    arguments |= {"layout": "pair", "drop_last": False, "reuse": 1}
    sizes = {"num_samples": num_samples, "num_views": num_views, "batch_size": batch_size}
    arguments |= {name: size for name, size in sizes.items() if size is not None}
    if not augmented:
        arguments |= {"transform": None, "crops": None}
    if arguments["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        arguments["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    source = mlviews.MLViewSource(**arguments)
    source.set_epoch(epoch)
    result = files.export(source, out, format, augmented=augmented, shard_size=shard_size, preset=preset)
    images = result.written * result.images
    write(
        f"{result.written:,} samples made, {images:,} images: {result.seconds:.0f} s, "
        f"{images / result.seconds:,.0f} images/s."
    )
    if result.complete:
        write(
            f"{source.num_samples:,} samples in {result.files:,} files, {result.bytes / 1e6:,.1f} MB.",
            out / "manifest.json",
        )
    else:
        rank, world_size = resolve_rank(None, None)
        write(f"{out} is unfinished: shards of other ranks are missing (this was {rank} of {world_size}).")
