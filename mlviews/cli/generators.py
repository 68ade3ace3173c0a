"""The command `generators`: what there is, and conversion of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import mlviews
from mlviews.cli.shared import app, console, write

generators = typer.Typer(help="List the generators, or convert a checkpoint.")
app.add_typer(generators, name="generators")


@generators.callback(invoke_without_command=True)
def list_generators(context: typer.Context) -> None:
    """List the generators: levels, image shape, the weights and the options each takes."""
    if context.invoked_subcommand:
        return
    table = Table(box=None, show_header=False)
    for info in mlviews.list_generators():
        table.add_row(f"[bold]{escape(info.name)}[/]")
        table.add_row("  weights", escape(info.weights))
        if info.options:
            table.add_row("  options", ", ".join(info.options))
        if info.levels and info.image_shape:
            levels = [f"{index}  {level.name}  {level.shape}" for index, level in enumerate(info.levels)]
            table.add_row("  image", "x".join(map(str, info.image_shape)))
            table.add_row("  levels", "\n".join(levels))
    console.print(table)
    write(
        "Levels run from coarse to fine. Those of the others, and their images' shape, depend on the weights."
    )


@generators.command(
    help="Write another project's checkpoint as safetensors, which can be shared and loaded without trust; "
    "nothing in it is executed."
)
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A .pkl, .pt or .pth file of another project; or its URL or Hugging Face id."),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Convert a checkpoint."""
    from mlviews.weights import checkpoints, download

    path = download.fetch(source) if download.is_remote(source) else source
    checkpoint = checkpoints.convert(path, out)
    size = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    write(
        f"{out}: {len(checkpoint.tensors)} tensors, {size / 1e6:.1f} M values. "
        f"It was {checkpoints.LAYOUTS[checkpoint.layout]}."
    )
