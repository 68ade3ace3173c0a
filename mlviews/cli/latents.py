"""The commands `traverse` and `recombine`: pictures of what the levels of a generator hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import mlviews
from mlviews import latents
from mlviews.anchors import Sampler
from mlviews.cli.shared import Measured, Run, app, generator_and_law, with_options, write
from mlviews.images import Shape, as_image_set
from mlviews.latents.directions import METHODS
from mlviews.levels import level_indices


@dataclass(frozen=True)
class Samples(Run):
    """Options of a command that takes samples of a generator, or images of the user's."""

    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own images, instead of drawn samples; the generator needs an encoder."
        ),
    ] = None

    def take(self, name: str, count: int) -> tuple[mlviews.MLVGM, list[Tensor], Tensor | None]:
        """Return the generator of that name, and latents and labels of so many samples."""
        generator, law = generator_and_law(name, self.weights)
        generator = generator.to(self.place)
        if self.images is None:
            return generator, *Sampler(generator, law, self.seed)(range(count), 0)
        images = as_image_set(self.images, Shape(*generator.image_shape, generator.border))
        if len(images) < count:
            raise ValueError(f"{self.images} has {len(images)} images, and {count} are needed.")
        pixels = images.batch(range(count), generator.device).float() / 255
        labels = images.labels[:count].to(generator.device) if generator.num_classes else None
        return generator, generator.encode_labelled(pixels, labels), labels


Picture = Annotated[Path | None, typer.Option(help="The PNG to write. Default: runs/COMMAND-GENERATOR.png.")]


@app.command()
@with_options
def traverse(
    generator: Measured = "fashion",
    level: Annotated[
        str | None, typer.Option(help="Level to move along, an index or a name. Default: all, one by one.")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Coordinate of the level. Default: the directions that change images most.", min=0),
    ] = None,
    directions: Annotated[int, typer.Option(help="How many of these.", min=1)] = 1,
    method: Annotated[
        str,
        typer.Option(help=f"Where they come from: {' or '.join(METHODS)} (derivatives, or drawn changes)."),
    ] = "jacobian",
    samples: Annotated[int, typer.Option(help="Rows: samples.", min=1, max=64)] = 4,
    span: Annotated[float, typer.Option(help="How far to go, in standard deviations of the prior.")] = 3.0,
    count: Annotated[int, typer.Option(help="Columns: steps from one side to the other.", min=2)] = 7,
    out: Picture = None,
    *,
    options: Samples,
) -> None:
    """Move samples along a coordinate of a level, or along the directions that change their images most."""
    from mlviews.viz import Panel, draw_panels  # matplotlib takes a second that errors need not wait for

    network, z, labels = options.take(generator, samples)
    levels = range(len(network.levels)) if level is None else level_indices(level, network.levels)
    panels = []
    for index in levels:
        name = network.levels[index].name
        if dim is None:
            leading = latents.directions(
                network, z, index, directions, method=method, shared=True, labels=labels, seed=options.seed
            )
            along: int | Tensor = leading.vectors
            titles = [f"{name}, direction {place}" for place in range(directions)]
        else:
            along, titles = dim, [f"{name}, coordinate {dim}"]
        moved = latents.traverse(network, z, index, along, span, count)
        steps = [f"{offset:+.3g}" if offset else "0" for offset in moved.offsets]
        row = []
        for title, images in zip(titles, moved.images(network, labels), strict=True):
            row.append(Panel(title, list(images.transpose(0, 1)), _numbers(samples), steps))
        panels.append(row)
    if len(panels[0]) == 1:  # levels side by side, two by two
        single = [row[0] for row in panels]
        panels = [single[start : start + 2] for start in range(0, len(single), 2)]
    title = f"{generator}: samples moved along levels, in standard deviations"
    write(draw_panels(panels, _path(out, "traverse", generator), title))


@app.command()
@with_options
def recombine(
    generator: Measured = "fashion",
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="First of the fine levels, an index or a name; several make several tables. "
            "Default: the middle."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Samples whose coarse levels are taken.", min=1, max=64)] = 4,
    columns: Annotated[int, typer.Option(help="Samples whose fine levels are taken.", min=1, max=64)] = 5,
    out: Picture = None,
    *,
    options: Samples,
) -> None:
    """Put coarse levels of some samples together with fine levels of others: a table of all combinations."""
    from mlviews.viz import Panel, draw_panels

    network, z, labels = options.take(generator, rows + columns)
    coarse, fine = [level[:rows] for level in z], [level[rows:] for level in z]
    originals = network(z, labels)
    blank = torch.ones_like(originals[0])
    panels = []
    for key in split or [str(len(network.levels) // 2)]:
        for index in level_indices(key, network.levels):
            mixed = latents.decode(
                network,
                latents.matrix(coarse, fine, index, levels=len(network.levels)),
                None if labels is None else labels[:rows],
            )
            table = [[blank, *originals[rows:]]]
            table += [[originals[row], *(column[row] for column in mixed)] for row in range(rows)]
            names = [level.name for level in network.levels]
            title = f"rows: {', '.join(names[:index])} | columns: {', '.join(names[index:])}"
            panels.append(Panel(title, table))
    write(draw_panels([panels], _path(out, "recombine", generator), f"{generator}: levels of two samples"))


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _path(out: Path | None, command: str, generator: str) -> Path:
    return out or Path("runs", f"{command}-{Path(generator).stem}.png")
