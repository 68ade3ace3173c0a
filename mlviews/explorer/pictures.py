"""Pictures for the browser: grids of images as PNG, inside the page itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mlviews.viz import mosaic

RED = (0.84, 0.37, 0.0)
"""The color of the line between anchors and positives."""

_SCREEN = 80
"""Pixels of a small image's side on screen, at most; larger ones are shown as they are."""


def grid(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return one image ``[H, W, 3]`` in [0, 1]: a row for each sample, a column for each view.

    Args:
        groups: of columns, each ``[rows, C, h, w]`` in [0, 1]; a red line stands between groups.
    """
    parts: list[Tensor] = []
    for columns in groups:
        rows = [list(row) for row in zip(*columns, strict=True)]
        part = mosaic(rows)  # [H, W, 3]
        line = torch.tensor(RED).expand(part.shape[0], 2, 3)
        parts += [line, part] if parts else [part]
    return torch.cat(parts, dim=1)


def png(pixels: Tensor) -> bytes:
    """Return an image ``[H, W, 3]`` in [0, 1] as a PNG file."""
    file = io.BytesIO()
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    # Speed counts more than size: the browser is on this machine, or at the end of one connection.
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue()


def picture(
    groups: Sequence[Sequence[Tensor]], name: str, caption: str, file_name: str, names: Sequence[str] = ()
) -> str:
    """Return HTML with a grid of images, its caption and a link to download it.

    Args:
        groups: as of :func:`grid`.
        name: the id of its element.
        caption: what it shows; HTML.
        file_name: of the download.
        names: of the columns, to stand above them.
    """
    pixels = grid(groups)
    side = groups[0][0].shape[-1]
    width = pixels.shape[1] * max(1, _SCREEN // side)
    heads = "".join(f"<span>{html.escape(column)}</span>" for column in names)
    content = base64.b64encode(png(pixels)).decode()
    # The link takes the image that is there: its bytes travel once.
    save = f"this.href=document.getElementById('{name}').src"
    return (
        f'<figure class="mlviews"><figcaption>{caption} '
        f'<a href="#" download="{file_name}" onclick="{save}">PNG</a></figcaption>'
        f'<div class="names" style="width: {width}px">{heads}</div>'
        f'<img id="{name}" width="{width}" alt="{name}" '
        f'src="data:image/png;base64,{content}"></figure>'
    )
