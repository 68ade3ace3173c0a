"""Mutual information of paired samples: a critic trained by InfoNCE, and the lower bound that it gives on pairs it never saw.

The bound is the one-sided form, valid for any two variables: ``log K - loss`` with K candidates from one side (van den Oord et al. 2018;
Poole et al. 2019, eq. 10), here the mean over the two sides. A bound holds for any critic, so what a poor critic or few samples cost is
always a value that is too low. Each critic is the sum of two parts: a Gaussian one in closed form (canonical correlations of normal
scores, hence exact for correlated Gaussians behind any monotone warp of each scalar), and a network that starts at nothing, learns what the
first part misses, and is stopped where pairs held out from its training say so.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import integer
from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import one_sided_info_nce
from mlviews.runs.modes import plain
from mlviews.sampling import check_seed
from mlviews.source import MLViewSource

FEWEST, HELD_OUT, CANDIDATES, CHECK = 200, 0.12, 2048, 25  # pairs; share of the training pairs; most of them; steps between two checks
MARGIN = 1.0  # nats below log K: closer to it, the best of critics falls short by 0.5 nats and more, -log(1 - exp(value) / K)
LINEAR, SIDE = 512, 16  # most scalars, and pixels of an image's side, that the Gaussian part looks at


@dataclass(frozen=True)
class MIEstimate:
    """A lower bound on mutual information, in nats."""

    nats: float  # the bound's value on fresh pairs
    stderr: float  # of it, in nats: its critics given, and as far as several critics tell, over critics
    ceiling: float  # log K: no value can exceed it
    candidates: int  # K, the partner included
    pairs_trained: int  # that each critic learnt from, those that stopped it included
    pairs_evaluated: int  # over all critics, none of them seen by the critic that scores it
    at_ceiling: bool  # too close to the ceiling to say more than "at least"

    def __str__(self) -> str:
        value = f"{self.nats:.3f} ± {self.stderr:.3f} nats"
        if self.at_ceiling:
            return f"at least {value}: AT ITS CEILING of log {self.candidates} = {self.ceiling:.3f}, the truth may be any value above"
        return f"{value} (ceiling log {self.candidates} = {self.ceiling:.3f})"

    __repr__ = __str__


def estimate_mi(
    x: Tensor | MLViewSource | Iterable[Any],
    y: Tensor | None = None,
    *,
    seed: int = 0,
    pairs: int = 10_000,
    folds: int = 5,
    steps: int = 600,
) -> MIEstimate:
    """A lower bound on the mutual information I(X; Y) in nats, from paired samples.

    Two tensors are cross-fitted: every fold is scored by a critic trained on the others. So are the pairs of a source that has too few.
    Else a source's first ``pairs`` pairs train one critic, and as many fresh ones evaluate it. Values above about 3 nats, or of
    images and other samples of many dimensions whose relation is not Gaussian, can be far below the truth. The result is the same
    whenever samples, seed and device are; no global random state changes.

    Args:
        x: float samples ``[N, ...]``, N of at least 200: images ``[N, C, H, W]`` with sides of at least 4 meet residual networks, any other
            shape an MLP. Or a source of pairs: an :class:`~mlviews.MLViewSource` (its anchors and first positives, from its epoch on;
            where it stands does not change), or an iterable whose batches start with two such tensors (one pass; no pair may come twice).
        y: their partners ``[N, ...]``, on the same device; None if x is a source.
        seed: of the folds, the critics and their batches.
        pairs: to train on, and again to evaluate on, from a source; no matter for tensors. All are held in memory.
        folds: of the cross-fitting, as many critics.
        steps: of a critic's training, at most.

    Raises:
        ValueError: for samples that are not paired, too few, not float or not finite, or an argument out of range.

    Warns:
        UserWarning: if the value is at its ceiling, so that only "at least this much" can be said.
    """
    seed, steps = check_seed(seed), integer("steps", steps, 0)
    pairs, folds = integer("pairs", pairs, FEWEST), integer("folds", folds, 2, 20)
    fresh = False
    if isinstance(x, Tensor):
        if y is None:
            raise ValueError("y is missing: pass x and y, two tensors of paired samples, or a source of pairs alone.")
    else:
        if y is not None:
            raise ValueError(f"y was given besides x of type {type(x).__name__}: pass two tensors, or a source of pairs alone.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a DataLoader draws its order, or at least a seed for its workers
            x, y = _collect(x, 2 * pairs)
        fresh = len(x) == 2 * pairs
    x, y = _checked(x, y)
    with plain(), torch.autocast(x.device.type, enabled=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the networks' weights and all orders: both are drawn on the CPU
        parts = list(torch.arange(len(x)).chunk(2)) if fresh else list(torch.randperm(len(x)).tensor_split(folds))
        found = [
            _evaluate(x, y, torch.cat([part for part in parts if part is not own]), own, steps) for own in (parts[1:] if fresh else parts)
        ]
    candidates = min(each for _, each in found)
    means, influence = torch.stack([values.mean() for values, _ in found]), torch.cat([values for values, _ in found])
    # Folds agree as well as their pairs allow, or worse where critics differ: the larger figure counts.
    within, between = float(influence.std()) / len(influence) ** 0.5, float(means.std()) / len(means) ** 0.5 if len(means) > 1 else 0.0
    nats, ceiling = float(influence.mean()), math.log(candidates)
    result = MIEstimate(
        nats, max(within, between), ceiling, candidates, len(x) - max(map(len, parts)), len(influence), nats > ceiling - MARGIN
    )
    if result.at_ceiling:
        warnings.warn(f"Mutual information {result}. Evaluate on more pairs to raise the ceiling.", UserWarning, stacklevel=2)
    return result


# -- pairs ---------------------------------------------------------------------------------------------------------


def _collect(source: Any, count: int) -> tuple[Tensor, Tensor]:
    """At most so many pairs of a source."""
    batches = _views(source) if isinstance(source, MLViewSource) else source
    if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
        raise ValueError(
            f"Invalid x of type {type(source).__name__}: pass two tensors x and y, an MLViewSource, or an iterable of batches."
        )
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    held = 0
    for batch in batches:
        two = list(batch[:2]) if isinstance(batch, list | tuple) else []
        if len(two) < 2 or not all(isinstance(one, Tensor) and one.ndim for one in two) or len(two[0]) != len(two[1]):
            raise ValueError(f"A batch of type {type(batch).__name__} does not start with two tensors of paired samples [B, ...].")
        for side, samples in zip(sides, two, strict=True):
            side.append(samples[: count - held])
        held += len(sides[0][-1])
        if held >= count:
            break
    if not held:
        raise ValueError(f"x of type {type(source).__name__} gave no pair: pass an iterable of batches that has not been used up.")
    for side in sides:
        if len({samples.shape[1:] for samples in side}) > 1:
            raise ValueError("The batches hold samples of several shapes: every sample of a side must have the same.")
    return torch.cat(sides[0]), torch.cat(sides[1])


def _views(source: MLViewSource) -> Iterator[tuple[Tensor, ...]]:
    """Raw pairs of this epoch and all that follow (a pool has no others), of all ranks; by a copy, as a pass would move the source on."""
    if source.num_views < 2:
        raise ValueError(f"The source has num_views={source.num_views}: a pair needs at least 2.")
    source = source.replace()
    while True:
        for start in range(0, source.num_samples, source.batch_size):
            yield tuple(source.batch(start, min(start + source.batch_size, source.num_samples)).views[:2])
        if source.pool:
            return
        source.set_epoch(source.epoch + 1)


def _checked(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim or not value[:1].numel():
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Invalid {name}, {found}: pass a float tensor [N, ...] of samples that are not empty.")
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y has {len(y)}: row i of one is the partner of row i of the other.")
    if len(x) < FEWEST:
        raise ValueError(f"Got {len(x)} pairs: an estimate needs at least {FEWEST}; 10,000 make a good one.")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} and y is on {y.device}: put both on one device.")
    for name, value in (("x", x), ("y", y)):
        if not torch.isfinite(value).all():
            raise ValueError(f"Invalid {name}: it holds NaN or infinite values; drop those pairs.")
    x, y = (value.detach().float() for value in (x, y))
    return (x[:, None] if x.ndim == 1 else x), (y[:, None] if y.ndim == 1 else y)


# -- critics -------------------------------------------------------------------------------------------------------


class _Ranks:
    """Each scalar's normal score among the training samples': its rank there as a quantile of N(0, 1)."""

    def __init__(self, training: Tensor) -> None:
        self.sorted = training.T.sort(dim=1).values.contiguous()

    def __call__(self, samples: Tensor) -> Tensor:
        values, count = samples.T.contiguous(), self.sorted.shape[1]
        rank = (torch.searchsorted(self.sorted, values) + torch.searchsorted(self.sorted, values, right=True)).double() / 2
        scores: Tensor = torch.special.ndtri(((rank + 0.5) / (count + 1)).clamp(0.5 / count, 1 - 0.5 / count))
        return scores.T.float().contiguous()


def _gaussian(x: Tensor, y: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[N, R + 2]`` whose products are the log density ratio of a Gaussian fitted to the training pairs.

    It is a sum over canonical pairs of ``(rho u v - rho^2 (u^2 + v^2) / 2) / (1 - rho^2)`` (up to constants). How many principal components
    of a side it rests on, and how many canonical pairs, is what serves the held-out pairs best: a matrix of all correlations is mostly
    noise where samples have many dimensions. In float64, as ``1 / (1 - rho^2)`` has no bound.
    """
    u, v = _whitened(x.double(), training), _whitened(y.double(), training)
    correlations = u[training].T @ v[training] / len(training)
    lowest, best = math.inf, (u, v)
    for components in _powers(max(correlations.shape)):
        left, rho, right = torch.linalg.svd(correlations[:components, :components], full_matrices=False)
        a, b, rho = u[:, :components] @ left, v[:, :components] @ right.T, rho.clamp(max=1 - 1e-9)
        for kept in [0, *_powers(len(rho))]:
            scale, half = rho[:kept] / (1 - rho[:kept] ** 2), rho[:kept] ** 2 / (1 - rho[:kept] ** 2) / 2
            one = a.new_ones(len(a), 1)
            fx = torch.cat([a[:, :kept] * scale, -(a[:, :kept] ** 2 @ half)[:, None], one], 1)
            fy = torch.cat([b[:, :kept], one, -(b[:, :kept] ** 2 @ half)[:, None]], 1)
            loss = float(_loss(fx[held_out] @ fy[held_out].T))
            if loss < lowest:
                lowest, best = loss, (fx, fy)
    return best


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit itself."""
    return [*(1 << power for power in range((limit - 1).bit_length())), limit]


def _whitened(samples: Tensor, training: Tensor) -> Tensor:
    """Principal components, each of variance 1; those that hardly vary, or are too many for the samples, are left out."""
    own = samples[training]
    values, vectors = torch.linalg.eigh(own.T @ own / len(own))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > 1e-6 * values[0].clamp_min(1e-12)).sum().clamp(1, max(len(own) // 20, 1)))
    components: Tensor = samples @ (vectors[:, :kept] * values[:kept].clamp_min(1e-12).rsqrt())
    return components


class _Joint(nn.Module):
    """An MLP on both samples at once, ``[..., K, D], [..., K, D'] -> [..., K, K]``: edges of a density are within its reach."""

    def __init__(self, dim_x: int, dim_y: int, width: int = 64) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(dim_x, width), nn.Linear(dim_y, width, bias=False)  # one layer on the concatenation, in two parts
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-2] > 64:  # few of the K^2 in memory at once, which is also the faster way
            return torch.cat([self(rows, y) for rows in x.split(8, dim=-2)], dim=-2)
        hidden = torch.relu(self.x(x)[..., :, None, :] + self.y(y)[..., None, :, :])
        scores: Tensor = self.out(torch.relu(self.hidden(hidden)))[..., 0]
        return scores


class _Separable(nn.Module):
    """Products of two embeddings, ``[..., K, *shape], [..., K, *shape'] -> [..., K, K]``: each sample is looked at once."""

    def __init__(self, shape_x: torch.Size, shape_y: torch.Size) -> None:
        super().__init__()
        self.dims = len(shape_x), len(shape_y)
        self.x, self.y = _tower(shape_x), _tower(shape_y)
        last = [module for module in self.y.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self._embed(self.x, x, self.dims[0]), self._embed(self.y, y, self.dims[1])
        scores: Tensor = a @ b.mT / a.shape[-1] ** 0.5
        return scores

    @staticmethod
    def _embed(tower: nn.Module, samples: Tensor, dims: int) -> Tensor:
        parts = samples.flatten(0, -1 - dims).split(256)  # a convolution's memory does not grow with K
        embeddings: Tensor = torch.cat([tower(part) for part in parts]).unflatten(0, samples.shape[:-dims])
        return embeddings


def _tower(shape: torch.Size) -> nn.Module:
    if len(shape) == 3:
        return ImageCritic((shape[0], shape[1], shape[2]))
    return nn.Sequential(nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))


def _is_image(samples: Tensor) -> bool:
    return samples.ndim == 4 and min(samples.shape[2:]) >= 4


def _prepared(samples: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees, and what the Gaussian part sees; both fitted to the training pairs, and to no others."""
    flat = (F.adaptive_avg_pool2d(samples, SIDE) if _is_image(samples) and max(samples.shape[2:]) > SIDE else samples).flatten(1)
    if flat.shape[1] > LINEAR:
        flat = flat @ torch.randn(flat.shape[1], LINEAR).to(flat)
    scores = _Ranks(flat[training])(flat)
    own = samples[training]
    if _is_image(samples):
        return (samples - own.mean()) / (4 * own.std().clamp_min(1e-12)) + 0.5, scores  # about [0, 1], as the network expects
    flat = samples.flatten(1)
    raw = (flat - flat[training].mean(0)) / flat[training].std(0).clamp_min(1e-12)
    return torch.cat([scores, raw.clamp(-4, 4)], 1), scores


def _loss(scores: Tensor) -> Tensor:
    """Of both sides."""
    return (one_sided_info_nce(scores) + one_sided_info_nce(scores.mT)) / 2


def _evaluate(x: Tensor, y: Tensor, training: Tensor, fresh: Tensor, steps: int) -> tuple[Tensor, int]:
    """A critic trained on some pairs and its bound on others: each one's influence ``[pairs]``, whose mean is the bound, and K."""
    training = training[torch.randperm(len(training))]
    held_out, training = training.tensor_split([round(HELD_OUT * len(training))])
    (x, scores_x), (y, scores_y) = _prepared(x, training), _prepared(y, training)
    features_x, features_y = _gaussian(scores_x, scores_y, training, held_out)
    images = x.ndim == 4 or y.ndim == 4
    critic = (_Separable(x.shape[1:], y.shape[1:]) if images else _Joint(x.shape[1], y.shape[1])).to(x.device)
    # A batch is groups of K pairs: a joint critic works in K^2, and its gradient gains more from pairs than from candidates.
    size, groups, rate, patience = (64, 1, 1e-3, 4) if images else (16, 32, 2e-2, 6)

    def scores(network: nn.Module, group: Tensor) -> Tensor:
        both: Tensor = (features_x[group] @ features_y[group].mT).float() + network(x[group], y[group])
        return both

    @torch.no_grad()
    def held_out_loss(network: nn.Module) -> float:
        size = min(32, len(held_out))
        return float(_loss(scores(network, held_out[: len(held_out) // size * size].view(-1, size))))

    averaged = copy.deepcopy(critic)
    best, lowest, since = copy.deepcopy(averaged), held_out_loss(averaged), 0
    optimiser = torch.optim.AdamW(critic.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in range(steps):
        for settings in optimiser.param_groups:
            settings["lr"] = rate * min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
        batch = training[torch.randperm(len(training))[: min(groups, len(training) // size) * size]].view(-1, size)
        loss = _loss(scores(critic, batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), critic.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.98, (step + 1) / (step + 10)))
        if (step + 1) % CHECK == 0:
            now = held_out_loss(averaged)
            best, lowest, since = (copy.deepcopy(averaged), now, 0) if now < lowest else (best, lowest, since + 1)
            if since == patience:
                break

    blocks = fresh.tensor_split(-(-len(fresh) // CANDIDATES))
    with torch.no_grad():
        tables = [scores(best, block) for block in blocks]
        return torch.cat([(_influence(table) + _influence(table.mT)) / 2 for table in tables]), min(map(len, blocks))


def _influence(scores: Tensor) -> Tensor:
    """Of each pair on ``log K - loss``, as a row and as a candidate of all rows: their spread counts both, their mean is the bound."""
    bound = math.log(len(scores)) + scores.diagonal() - scores.logsumexp(1)
    return bound + 1 - scores.softmax(1).sum(0)
