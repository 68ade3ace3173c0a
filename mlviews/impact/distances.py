"""How far a perturbation moves a level: Monte Carlo over many anchors (paper, sec. 3.1), streamed, and what it says of the shift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlviews.anchors import Sampler
from mlviews.checks import integer
from mlviews.generators.base import MLVGM
from mlviews.impact.figures import Distances
from mlviews.latents import with_levels
from mlviews.perturb import Perturber
from mlviews.sampling import TruncatedNormal

TRAIN, EVALUATE, MONTE_CARLO = range(3)
"""Epochs of the counter streams: no sample that is trained on is evaluated on."""

BINS = 60
_SCALARS = 1 << 21  # drawn at once


@torch.no_grad()
def measure_distances(
    generator: MLVGM, levels: Sequence[int], perturber: Perturber, count: int = 100_000, seed: int = 0, anchor: TruncatedNormal | None = None
) -> Distances:
    """Monte Carlo of the distances ``|T(z) - z|`` of one or more levels moved together.

    Args:
        generator: whose levels are moved; distances are measured where :meth:`MLVGM.coordinates` says (W for StyleGAN2), over all of
            these levels at once.
        levels: their indices.
        perturber: T.
        count: anchors to draw.
        seed: of the anchors and the noise.
        anchor: the anchors' law; None: N(0, 1) truncated as the generator prefers.

    Raises:
        ValueError: for a count below 2, a level out of range, or a perturber that does not fit the levels.
    """
    count = integer("count", count, 2)
    levels = tuple(integer("level", level, 0, len(generator.levels) - 1) for level in levels)
    perturber.check([generator.levels[level] for level in levels])
    draw = Sampler(generator, anchor, seed)
    law = perturber.law(draw.law)
    found: list[Tensor] = []
    fresh: list[Tensor] = []
    lengths = torch.zeros(2, dtype=torch.float64, device=generator.device)
    width = sum(generator.levels[level].size for level in levels)
    direction = torch.zeros(width, device=generator.device)
    spread = torch.zeros(width, width, device=generator.device)
    chunk = max(1, _SCALARS // sum(level.size for level in generator.levels))
    for start in range(0, count, chunk):
        indices = range(start, min(start + chunk, count))
        anchors, labels = draw(indices, MONTE_CARLO)
        own = [anchors[level] for level in levels]
        moved = perturber(own, None if law is None else draw.noise(indices, law, MONTE_CARLO, levels))
        others = draw.noise(indices, draw.law, MONTE_CARLO, levels, view=2)
        for positives, into in ((moved, found), (others, fresh)):
            parts = generator.distances(anchors, with_levels(anchors, levels, positives), labels)
            into.append(torch.stack([parts[level] for level in levels]).norm(dim=0))
        before, after = (torch.cat([z.flatten(1) for z in latents], dim=1) for latents in (own, moved))
        lengths += torch.stack([after.norm(dim=1).sum(), before.norm(dim=1).sum()])
        units = torch.nn.functional.normalize(after - before, dim=1)
        direction += units.sum(0)
        spread.addmm_(units.T, units)
    values, prior = torch.cat(found).double().cpu().numpy(), torch.cat(fresh).double().mean().item()
    counts, edges = np.histogram(values, bins=BINS)
    return Distances(
        count=count,
        mean=float(values.mean()),
        std=float(values.std(ddof=1)),
        edges=edges.tolist(),
        counts=counts.tolist(),
        prior=prior,
        norm=(lengths[0] / lengths[1]).item(),
        diversity=1 - (direction.norm() / count).item(),
        directions=(spread.trace() / spread.norm()).square().item() if spread.any() else 0.0,
    )
