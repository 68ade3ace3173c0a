"""NVAE checkpoints that people have, translated for :mod:`mlviews.generators.nvae.network`.

Two layouts: NVlabs/NVAE (Vahdat and Kautz's own) and SerezD/NVAE-from-scratch (the one of the paper's
appendix F). A checkpoint's facts say how the network was built; walking through that network names every
tensor the file must hold, with its shape, and what becomes of it. The walk is made twice, first without
memory, so that the file is compared with its facts before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlviews.errors import WeightsError, listing
from mlviews.generators.hierarchy import check_options
from mlviews.generators.nvae.network import NVAE, NVAEConfig
from mlviews.generators.nvae.nvlabs import NVlabs, implied_images
from mlviews.generators.nvae.serezd import SerezD
from mlviews.generators.nvae.walk import Walk
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import MOST_TENSORS, Refused
from mlviews.weights.reader import Facts, Reader

DERIVED = (".num_batches_tracked", ".weight_normalized")
"""Ends of names of tensors that are in some files, and of no use: a counter, and a copy of another tensor."""


def load(checkpoint: Checkpoint, *, temperature: float = 1.0, levels: str = "group") -> NVAE:
    """Return the generator of a checkpoint of NVlabs/NVAE or SerezD/NVAE-from-scratch.

    Differences of the two that stay: NVlabs adds 0.01 to every sigma; in SerezD's encoder the groups of a
    scale come in the decoder's order. NVlabs' gray models (MNIST, Omniglot) never learned the outer two
    pixels of their 32: their loss leaves them out. Size and colors of the images are those of the tensors,
    so that NVlabs' code may have been trained on any data set.

    Args:
        checkpoint: of layout "nvae-nvlabs" or "nvae-serezd".
        temperature: see :class:`NVAE`.
        levels: see :class:`NVAE`.

    Raises:
        ValueError: for a temperature out of range, or other levels.
        mlviews.WeightsError: if the file and what it says about itself do not agree, or make no network.
    """
    check_options(temperature, levels, "group")
    config, tensors = convert(checkpoint)

    def make() -> NVAE:
        return NVAE(config, temperature=temperature, levels=levels)

    return weights.fit(make, tensors, checkpoint.path)


def convert(checkpoint: Checkpoint) -> tuple[NVAEConfig, dict[str, Tensor]]:
    """Return our configuration and weights from a checkpoint's.

    Raises:
        mlviews.WeightsError: for facts that make no network, or tensors that are missing, unknown or of
            another shape.
    """
    layout, facts, path = checkpoint.layout, checkpoint.facts, str(checkpoint.path)
    reader = _Reader(checkpoint)
    # Room for a few that are missing, which are then named.
    most = len(reader.tensors) + 1000
    images = implied_images(reader) if layout == "nvae-nvlabs" else None
    expected = _walk(layout, facts, None, path, most, images).expected
    reader.check_names(expected)
    tensors = {name: reader.take(name, *shape) for name, shape in expected.items()}
    walk = _walk(layout, facts, tensors, path, images=images)
    return walk.config, walk.weights


def source_shapes(
    layout: str, facts: Mapping[str, Any], path: str = "the checkpoint"
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a checkpoint, built by these facts, has to hold.

    Args:
        layout: "nvae-nvlabs" or "nvae-serezd".
        facts: what a file says about the network; may hold anything.
        path: of the file, for messages.

    Raises:
        mlviews.WeightsError: if the facts make no network.
    """
    return _walk(layout, facts, None, path).expected


def _walk(
    layout: str,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    path: str,
    most: int = MOST_TENSORS,
    images: tuple[int, int] | None = None,
) -> Walk:
    """Return a walk that is through the network.

    Args:
        layout: of the checkpoint.
        facts: what the file says about the network.
        tensors: of the file; None for a walk without memory.
        path: of the file, for messages.
        most: tensors that the network may have.
        images: what :func:`implied_images` returned; None for what the facts say.
    """
    walker = LAYOUTS.get(layout)
    if walker is None:
        raise WeightsError(f"{path} holds {layout!r}, which is no NVAE; expected {listing(LAYOUTS)}.")
    walk = walker(walker.configuration(Facts(facts, path), images), tensors, most)
    try:
        walk.walk()
    except Refused as error:
        raise WeightsError(f"{path} has no valid configuration: it describes {error}.") from error
    return walk


class _Reader(Reader):
    """An NVAE file's tensors, without those that are of no use."""

    problem = "was made for another architecture than it says"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.tensors = {name: value for name, value in self.tensors.items() if not name.endswith(DERIVED)}


LAYOUTS: dict[str, type[NVlabs] | type[SerezD]] = {"nvae-nvlabs": NVlabs, "nvae-serezd": SerezD}
