"""Images that a browser sent: files of anyone's making, read with bounds on their number, size and pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlviews.images import Shape, read_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Pillow's names of the formats that are read: none of them is a program or an archive."""

MOST_FILES = 16
MOST_BYTES = 16 << 20
"""The largest file, in bytes."""


def read_uploads(files: Sequence[str | Path], shape: Shape) -> tuple[Tensor | None, list[str]]:
    """Return the images of uploaded files, which are deleted, and what was wrong with the others.

    Args:
        files: paths of copies that the server made.
        shape: of the generator's images.

    Returns:
        uint8 images ``[N, C, H, W]``, None if there are none; and a sentence for each file that was refused.
    """
    images: list[Tensor] = []
    refusals: list[str] = []
    for number, name in enumerate(files):
        file = Path(name)
        try:
            if number >= MOST_FILES:
                raise ValueError(f"only the first {MOST_FILES} files are read")
            if file.stat().st_size > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES >> 20} MB")
            images.append(read_image(file, shape, FORMATS))
        except (ValueError, OSError) as error:
            reason = str(error).replace(str(file), "it")  # no path of this machine
            refusals.append(f"{file.name} was not read: {reason}.")
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
    return torch.stack(images) if images else None, refusals
