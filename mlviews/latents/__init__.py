"""Latents in hand: move along a level, set one, put the levels of two samples together.

See ``README.md`` in this folder.
"""

from __future__ import annotations

from mlviews.latents.directions import Directions, directions
from mlviews.latents.edits import Traversal, decode, interpolate, intervene, matrix, recombine, traverse
from mlviews.levels import distinct, once, with_levels

__all__ = [
    "Directions",
    "Traversal",
    "decode",
    "directions",
    "distinct",
    "interpolate",
    "intervene",
    "matrix",
    "once",
    "recombine",
    "traverse",
    "with_levels",
]
