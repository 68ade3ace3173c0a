"""How far a perturbation moves a level: Monte Carlo over many anchors (paper, sec. 3.1), chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlviews.anchors import Sampler
from mlviews.checks import integer
from mlviews.generators.base import MLVGM
from mlviews.impact.figures import Distances
from mlviews.impact.streams import MONTE_CARLO
from mlviews.latents import with_levels
from mlviews.perturb import Perturber
from mlviews.runs.modes import plain
from mlviews.sampling import TruncatedNormal

BINS = 60
_SCALARS = 1 << 21  # drawn at once


def measure_distances(
    generator: MLVGM,
    levels: Sequence[int],
    perturber: Perturber,
    count: int = 100_000,
    seed: int = 0,
    anchor: TruncatedNormal | None = None,
) -> Distances:
    """Measure the distances ``|T(z) - z|`` of one or more levels moved together, by Monte Carlo.

    Args:
        generator: its levels are moved. Distances are measured where :meth:`MLVGM.coordinates` says (W for
            StyleGAN2), over all of these levels at once.
        levels: their indices.
        perturber: T.
        count: the number of anchors to draw; at least 2.
        seed: the seed of the anchors and the noise.
        anchor: the anchors' law; None: N(0, 1) truncated as the generator prefers.

    Raises:
        ValueError: for a count below 2, a level out of range, or a perturber that does not fit the levels.
    """
    count = integer("count", count, 2)
    levels = tuple(integer("level", level, 0, len(generator.levels) - 1) for level in levels)
    perturber.check([generator.levels[level] for level in levels])
    with plain(generator.device), torch.no_grad():
        return _measured(generator, levels, perturber, count, Sampler(generator, anchor, seed))


def _measured(
    generator: MLVGM, levels: Sequence[int], perturber: Perturber, count: int, draw: Sampler
) -> Distances:
    """Measure the distances of arguments that have been checked; see :func:`measure_distances`."""
    law = perturber.law(draw.law)
    distances: list[Tensor] = []
    prior_distances: list[Tensor] = []
    shifts = _Shifts(sum(generator.levels[level].size for level in levels), generator.device)
    chunk = max(1, _SCALARS // sum(level.size for level in generator.levels))
    for first in range(0, count, chunk):
        indices = range(first, min(first + chunk, count))
        anchors, labels = draw(indices, MONTE_CARLO)
        start = [anchors[level] for level in levels]
        noise = None if law is None else draw.noise(indices, law, MONTE_CARLO, levels)
        moved = perturber(start, noise)
        fresh = draw.noise(indices, draw.law, MONTE_CARLO, levels, view=2)
        for positives, collected in ((moved, distances), (fresh, prior_distances)):
            by_level = generator.distances(anchors, with_levels(anchors, levels, positives), labels)
            collected.append(torch.stack([by_level[level] for level in levels]).norm(dim=0))  # [chunk]
        shifts.add(start, moved)
    values = torch.cat(distances).double().cpu().numpy()
    counts, edges = np.histogram(values, bins=BINS)
    return Distances(
        count=count,
        mean=float(values.mean()),
        std=float(values.std(ddof=1)),
        edges=edges.tolist(),
        counts=counts.tolist(),
        prior=torch.cat(prior_distances).double().mean().item(),
        norm=shifts.norm_ratio,
        diversity=1 - (shifts.direction.norm() / count).item(),
        directions=shifts.directions,
    )


class _Shifts:
    """What shifts have in common: sums over anchors, so that all of them need not be held at once.

    Args:
        width: the number of scalars of the levels that are moved.
        device: where they are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.lengths = torch.zeros(2, dtype=torch.float64, device=device)  # of the latents after, and before
        self.direction = torch.zeros(width, device=device)  # sum of the unit shifts
        self.spread = torch.zeros(width, width, device=device)  # their second moments

    def add(self, start: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
        """Count the shifts of a chunk of anchors."""
        before = torch.cat([z.flatten(1) for z in start], dim=1)  # [chunk, width]
        after = torch.cat([z.flatten(1) for z in moved], dim=1)
        self.lengths += torch.stack([after.norm(dim=1).sum(), before.norm(dim=1).sum()])
        units = torch.nn.functional.normalize(after - before, dim=1)
        self.direction += units.sum(0)
        self.spread.addmm_(units.T, units)

    @property
    def norm_ratio(self) -> float:
        """The mean norm of the moved latents in units of the anchors'."""
        return float(self.lengths[0] / self.lengths[1])

    @property
    def directions(self) -> float:
        """The participation ratio of the second moments; 0 if nothing moved."""
        if not self.spread.any():
            return 0.0
        return float((self.spread.trace() / self.spread.norm()).square())
