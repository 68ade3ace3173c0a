"""Which samples a measurement uses for what: epochs of the counter streams.

No sample that is trained on is evaluated on.
"""

from __future__ import annotations

TRAIN = 0
"""The epoch of the pairs that critics and walkers learn from."""

EVALUATE = 1
"""The epoch of the fresh pairs that the reported losses are measured on."""

MONTE_CARLO = 2
"""The epoch of the anchors whose distances are measured."""
