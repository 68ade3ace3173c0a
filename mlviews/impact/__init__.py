"""How much each latent level of a generator matters, in a common unit (paper, sec. 3.1).

See ``README.md`` in this folder.
"""

from __future__ import annotations

from mlviews.impact.distances import measure_distances
from mlviews.impact.figures import Distances, LevelImpact
from mlviews.impact.measure import measure_impact
from mlviews.impact.report import ImpactReport
from mlviews.impact.walkers import TrainedWalker, train_walker

__all__ = [
    "Distances",
    "ImpactReport",
    "LevelImpact",
    "TrainedWalker",
    "measure_distances",
    "measure_impact",
    "train_walker",
]
