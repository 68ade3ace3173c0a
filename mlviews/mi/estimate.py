"""Mutual information of paired samples: the bound that a critic trained by InfoNCE gives on fresh pairs.

The bound is the one-sided form, valid for any two variables: ``log K - loss`` with K candidates from one side
(van den Oord et al. 2018; Poole et al. 2019, eq. 10), here the mean over the two sides. A bound holds for any
critic, so what a poor critic or few samples cost is always a value that is too low. Each critic is the sum of
two parts: a Gaussian one in closed form (canonical correlations of normal scores, hence exact for correlated
Gaussians behind any monotone warp of each scalar), and a network that starts at nothing, learns what the
first part misses, and is stopped where pairs held out from its training say so.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mlviews.checks import described, integer
from mlviews.mi.critics import ImageCritic
from mlviews.mi.infonce import one_sided_info_nce
from mlviews.runs.modes import plain
from mlviews.sampling import check_seed
from mlviews.source import MLViewSource

FEWEST = 200
"""The fewest pairs that an estimate is made of."""

HELD_OUT = 0.12  # the share of the training pairs that stop the training
CANDIDATES = 2048  # the most candidates that the bound is evaluated with
CHECK = 25  # the training steps between two looks at the held-out pairs
# Nats below log K: closer to it, the best of critics falls short by 0.5 nats and more, -log(1 - exp(value) /
# K).
MARGIN = 1.0
LINEAR = 512  # the most scalars that the Gaussian part looks at
SIDE = 16  # the most pixels of an image's side that it looks at


class _Training(NamedTuple):
    """How a critic's network is trained.

    A batch is groups of K pairs, and each group's candidates are its own.
    """

    size: int  # K
    groups: int  # groups of a batch
    rate: float  # peak learning rate of AdamW
    patience: int  # looks at the held-out pairs without an improvement that end the training


OF_IMAGES = _Training(size=64, groups=1, rate=1e-3, patience=4)
# A joint critic works in K^2, and its gradient gains more from pairs than from candidates.
OF_SCALARS = _Training(size=16, groups=32, rate=2e-2, patience=6)


@dataclass(frozen=True)
class MIEstimate:
    """A lower bound on mutual information, in nats."""

    nats: float  # the bound's value on fresh pairs
    stderr: float  # its standard error in nats; where there are several critics, their differences count too
    ceiling: float  # log K: no value can exceed it
    candidates: int  # K, the partner included
    pairs_trained: int  # pairs that each critic learned from, those that stopped it included
    pairs_evaluated: int  # pairs over all critics, none of them seen by the critic that scores it
    at_ceiling: bool  # too close to the ceiling to say more than "at least"

    def __str__(self) -> str:
        value = f"{self.nats:.3f} ± {self.stderr:.3f} nats"
        if self.at_ceiling:
            return (
                f"at least {value}: AT ITS CEILING of log {self.candidates} = {self.ceiling:.3f}, "
                "the truth may be any value above"
            )
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
    """Return a lower bound on the mutual information I(X; Y) in nats, from paired samples.

    Two tensors are cross-fitted: every fold is scored by a critic trained on the others. So are the pairs of
    a source that has too few. Else a source's first ``pairs`` pairs train one critic, and as many fresh ones
    evaluate it. Values above about 3 nats, or of images and other samples of many dimensions whose relation
    is not Gaussian, can be far below the truth. The result is the same whenever samples, seed and device are;
    no global random state changes.

    Args:
        x: float samples ``[N, ...]``, N of at least 200: images ``[N, C, H, W]`` with sides of at least 4
            meet residual networks, any other shape an MLP. Or a source of pairs: an
            :class:`~mlviews.MLViewSource` (its anchors and first positives from its epoch on, each pair once,
            whatever ``reuse``; of a pool or of the user's own images, those of one epoch; its place does not
            change), or an iterable whose batches start with two such tensors (one pass; no pair may come
            twice).
        y: their partners ``[N, ...]``, on the same device; None if x is a source.
        seed: the seed of the folds, the critics and their batches.
        pairs: the number of a source's pairs to train on, and again to evaluate on; tensors do not use it.
            All are held in memory.
        folds: the number of folds of the cross-fitting, and of critics.
        steps: the most steps of a critic's training.

    Raises:
        ValueError: for samples that are not paired, too few, not float or not finite, or an argument out of
            range.

    Warns:
        UserWarning: if the value is at its ceiling, so that only "at least this much" can be said.
    """
    seed, steps = check_seed(seed), integer("steps", steps, 0)
    pairs, folds = integer("pairs", pairs, FEWEST), integer("folds", folds, 2, 20)
    is_fresh = False  # whether there are so many pairs that half of them only evaluate
    if isinstance(x, Tensor):
        if y is None:
            raise ValueError(
                "y is missing: pass x and y, two tensors of paired samples, or a source of pairs alone."
            )
    else:
        if y is not None:
            raise ValueError(
                f"y was given besides x of type {type(x).__name__}: pass two tensors, or a source of pairs "
                "alone."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a DataLoader draws its order, or at least a seed for its workers
            x, y = _collect(x, 2 * pairs)
        is_fresh = len(x) == 2 * pairs
    x, y = _checked(x, y)
    with plain(), torch.autocast(x.device.type, enabled=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the networks' weights and all orders: both are drawn on the CPU
        if is_fresh:
            training, evaluation = torch.arange(len(x)).chunk(2)
            results = [_evaluate(x, y, training, evaluation, steps)]
        else:
            parts = torch.randperm(len(x)).tensor_split(folds)
            rests = [torch.cat([*parts[:fold], *parts[fold + 1 :]]) for fold in range(folds)]
            results = [_evaluate(x, y, rest, part, steps) for rest, part in zip(rests, parts, strict=True)]
    result = _estimate(results, pairs_trained=pairs if is_fresh else len(x) - max(map(len, parts)))
    if result.at_ceiling:
        warnings.warn(
            f"Mutual information {result}. Evaluate on more pairs to raise the ceiling.",
            UserWarning,
            stacklevel=2,
        )
    return result


class _Result(NamedTuple):
    """What one critic says of the pairs that it is evaluated on."""

    influence: Tensor  # [pairs], of each pair on the bound; their mean is the bound
    candidates: int  # K


def _estimate(results: Sequence[_Result], pairs_trained: int) -> MIEstimate:
    """Return the estimate of all critics together."""
    influence = torch.cat([result.influence for result in results])
    nats = float(influence.mean())
    # Folds agree as well as their pairs allow, or worse where critics differ: the larger figure counts.
    within, between = float(influence.std()) / len(influence) ** 0.5, 0.0
    if len(results) > 1:
        means = torch.stack([result.influence.mean() for result in results])
        between = float(means.std()) / len(means) ** 0.5
    candidates = min(result.candidates for result in results)
    ceiling = math.log(candidates)
    return MIEstimate(
        nats=nats,
        stderr=max(within, between),
        ceiling=ceiling,
        candidates=candidates,
        pairs_trained=pairs_trained,
        pairs_evaluated=len(influence),
        at_ceiling=nats > ceiling - MARGIN,
    )


# -- pairs ---------------------------------------------------------------------------------------------------


def _collect(source: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return the first pairs of a source, at most so many."""
    batches = _views(source) if isinstance(source, MLViewSource) else source
    if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
        raise ValueError(
            f"Invalid x of type {type(source).__name__}: pass two tensors x and y, an MLViewSource, "
            "or an iterable of batches."
        )
    left: list[Tensor] = []
    right: list[Tensor] = []
    missing = count
    for batch in batches:
        if not _is_paired(batch):
            raise ValueError(
                f"A batch of type {type(batch).__name__} does not start with two tensors of paired samples "
                "[B, ...]."
            )
        left.append(batch[0][:missing])
        right.append(batch[1][:missing])
        missing -= len(left[-1])
        if missing <= 0:
            break
    if missing == count:
        raise ValueError(
            f"x of type {type(source).__name__} gave no pair: pass an iterable of batches that has not been "
            "used up."
        )
    for side in (left, right):
        if len({samples.shape[1:] for samples in side}) > 1:
            raise ValueError(
                "The batches hold samples of several shapes: every sample of a side must have the same."
            )
    return torch.cat(left), torch.cat(right)


def _is_paired(batch: Any) -> bool:
    """Tell whether a batch starts with two tensors of equally many samples."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        return False
    are_tensors = all(isinstance(samples, Tensor) and samples.ndim for samples in batch[:2])
    return are_tensors and len(batch[0]) == len(batch[1])


def _views(source: MLViewSource) -> Iterator[tuple[Tensor, ...]]:
    """Yield the pairs of this epoch and of all that follow, of all ranks, each pair once.

    A pool has no others, and images come back with every epoch. They are a copy's, as a pass would move the
    source on.
    """
    if source.num_views < 2:
        raise ValueError(f"The source has num_views={source.num_views}: a pair needs at least 2.")
    source = source.replace(reuse=1)
    while True:
        for start in range(0, source.num_samples, source.batch_size):
            stop = min(start + source.batch_size, source.num_samples)
            yield tuple(source.batch(start, stop).views[:2])
        if not source.step.anchors.endless:
            return
        source.set_epoch(source.epoch + 1)


def _checked(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Return the samples as float32 ``[N, ...]`` of at least 2 dimensions, or raise a ValueError."""
    for name, samples in (("x", x), ("y", y)):
        is_float = isinstance(samples, Tensor) and samples.is_floating_point()
        if not is_float or not samples.ndim or not samples[:1].numel():
            raise ValueError(
                f"Invalid {name}, {described(samples)}: pass a float tensor [N, ...] of samples that are not "
                "empty."
            )
    if len(x) != len(y):
        raise ValueError(
            f"x has {len(x)} samples and y has {len(y)}: row i of one is the partner of row i of the other."
        )
    if len(x) < FEWEST:
        raise ValueError(f"Got {len(x)} pairs: an estimate needs at least {FEWEST}; 10,000 make a good one.")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} and y is on {y.device}: put both on one device.")
    for name, samples in (("x", x), ("y", y)):
        if not torch.isfinite(samples).all():
            raise ValueError(f"Invalid {name}: it holds NaN or infinite values; drop those pairs.")
    x, y = x.detach().float(), y.detach().float()
    return (x[:, None] if x.ndim == 1 else x), (y[:, None] if y.ndim == 1 else y)


# -- critics -------------------------------------------------------------------------------------------------


class _Ranks:
    """Each scalar's normal score among the training samples: its rank among them as a quantile of N(0, 1)."""

    def __init__(self, training: Tensor) -> None:
        self.sorted = training.T.sort(dim=1).values.contiguous()  # [D, training pairs]

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the scores of samples ``[N, D]``, of the same shape."""
        values, count = samples.T.contiguous(), self.sorted.shape[1]  # [D, N]
        below = torch.searchsorted(self.sorted, values)
        up_to = torch.searchsorted(self.sorted, values, right=True)
        rank = (below + up_to).double() / 2  # the middle of ties
        quantile = ((rank + 0.5) / (count + 1)).clamp(0.5 / count, 1 - 0.5 / count)
        scores: Tensor = torch.special.ndtri(quantile)
        return scores.T.float().contiguous()


def _gaussian(x: Tensor, y: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return features ``[N, R + 2]`` of x and of y whose products are a Gaussian's log density ratio.

    The Gaussian is fitted to the training pairs. How many principal components of a side it rests on, and how
    many canonical pairs, is what serves the held-out pairs best: a matrix of all correlations is mostly noise
    where samples have many dimensions. In float64, as ``1 / (1 - rho^2)`` has no bound.

    Args:
        x: samples ``[N, D]``.
        y: their partners ``[N, D']``.
        training: the rows to fit to.
        held_out: the rows to choose by.
    """
    whitened_x = _whitened(x.double(), training)  # [N, P]
    whitened_y = _whitened(y.double(), training)  # [N, P']
    correlations = whitened_x[training].T @ whitened_y[training] / len(training)  # [P, P']
    lowest, best = math.inf, (whitened_x, whitened_y)
    for components in _powers(max(correlations.shape)):
        # The canonical pairs of the first components, and their correlations.
        left, rho, right = torch.linalg.svd(correlations[:components, :components], full_matrices=False)
        u = whitened_x[:, :components] @ left  # [N, R]
        v = whitened_y[:, :components] @ right.T  # [N, R]
        rho = rho.clamp(max=1 - 1e-9)  # [R]
        for count in [0, *_powers(len(rho))]:
            features_x, features_y = _log_ratio(u[:, :count], v[:, :count], rho[:count])
            loss = float(_loss(features_x[held_out] @ features_y[held_out].T))
            if loss < lowest:
                lowest, best = loss, (features_x, features_y)
    return best


def _log_ratio(u: Tensor, v: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Return features ``[N, R + 2]`` whose products are the log density ratio of canonical pairs ``[N, R]``.

    It is a sum over the pairs of ``(rho u v - rho^2 (u^2 + v^2) / 2) / (1 - rho^2)``, up to constants.
    """
    scale = rho / (1 - rho**2)  # [R]
    half = rho**2 / (1 - rho**2) / 2  # [R]
    ones = u.new_ones(len(u), 1)
    features_x = torch.cat([u * scale, -(u**2 @ half)[:, None], ones], 1)
    features_y = torch.cat([v, ones, -(v**2 @ half)[:, None]], 1)
    return features_x, features_y


def _powers(limit: int) -> list[int]:
    """Return 1, 2, 4, ... and the limit itself."""
    return [*(1 << power for power in range((limit - 1).bit_length())), limit]


def _whitened(samples: Tensor, training: Tensor) -> Tensor:
    """Return the principal components ``[N, P]`` of samples ``[N, D]``, each of variance 1.

    Those that hardly vary, or are too many for the training samples, are left out.
    """
    fitted = samples[training]
    values, vectors = torch.linalg.eigh(fitted.T @ fitted / len(fitted))  # ascending
    values, vectors = values.flip(0), vectors.flip(1)  # [D], [D, D]
    varying = (values > 1e-6 * values[0].clamp_min(1e-12)).sum()
    count = int(varying.clamp(1, max(len(fitted) // 20, 1)))
    components: Tensor = samples @ (vectors[:, :count] * values[:count].clamp_min(1e-12).rsqrt())
    return components


class _Joint(nn.Module):
    """An MLP on both samples at once: ``[..., K, D], [..., K, D'] -> [..., K, K]``.

    Edges of a density are within its reach.
    """

    def __init__(self, dim_x: int, dim_y: int, width: int = 64) -> None:
        super().__init__()
        # One layer on the concatenation, in two parts.
        self.x, self.y = nn.Linear(dim_x, width), nn.Linear(dim_y, width, bias=False)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-2] > 64:  # few of the K^2 in memory at once, which is also the faster way
            return torch.cat([self(rows, y) for rows in x.split(8, dim=-2)], dim=-2)
        rows, columns = self.x(x)[..., :, None, :], self.y(y)[..., None, :, :]
        hidden = torch.relu(rows + columns)  # [..., K, K, width]
        scores: Tensor = self.out(torch.relu(self.hidden(hidden)))[..., 0]  # [..., K, K]
        return scores


class _Separable(nn.Module):
    """Products of two embeddings: ``[..., K, *shape], [..., K, *shape'] -> [..., K, K]``.

    Each sample is looked at once.
    """

    def __init__(self, shape_x: torch.Size, shape_y: torch.Size) -> None:
        super().__init__()
        self.dims = len(shape_x), len(shape_y)
        self.x, self.y = _tower(shape_x), _tower(shape_y)
        last = [module for module in self.y.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        embeddings_x = self._embed(self.x, x, self.dims[0])  # [..., K, 128]
        embeddings_y = self._embed(self.y, y, self.dims[1])
        scores: Tensor = embeddings_x @ embeddings_y.mT / embeddings_x.shape[-1] ** 0.5
        return scores

    @staticmethod
    def _embed(tower: nn.Module, samples: Tensor, dims: int) -> Tensor:
        parts = samples.flatten(0, -1 - dims).split(256)  # a convolution's memory does not grow with K
        embeddings: Tensor = torch.cat([tower(part) for part in parts]).unflatten(0, samples.shape[:-dims])
        return embeddings


def _tower(shape: torch.Size) -> nn.Module:
    """Return a network that embeds samples of a shape: images, or vectors."""
    if len(shape) == 3:
        return ImageCritic((shape[0], shape[1], shape[2]))
    return nn.Sequential(
        nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)
    )


def _is_image(samples: Tensor) -> bool:
    return samples.ndim == 4 and min(samples.shape[2:]) >= 4


def _prepared(samples: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the network sees of samples, and what the Gaussian part sees, ``[N, D]``.

    Both are fitted to the training pairs, and to no others.
    """
    # The Gaussian part sees normal scores of few scalars: of small images, and of random projections.
    small = samples
    if _is_image(samples) and max(samples.shape[2:]) > SIDE:
        small = F.adaptive_avg_pool2d(samples, SIDE)
    scalars = small.flatten(1)
    if scalars.shape[1] > LINEAR:
        scalars = scalars @ torch.randn(scalars.shape[1], LINEAR).to(scalars)
    scores = _Ranks(scalars[training])(scalars)
    if _is_image(samples):
        fitted = samples[training]
        pixels = (samples - fitted.mean()) / (4 * fitted.std().clamp_min(1e-12)) + 0.5
        return pixels, scores  # about [0, 1], as the network expects
    flat = samples.flatten(1)
    raw = (flat - flat[training].mean(0)) / flat[training].std(0).clamp_min(1e-12)
    return torch.cat([scores, raw.clamp(-4, 4)], 1), scores


def _loss(scores: Tensor) -> Tensor:
    """Return the mean InfoNCE over both sides, of scores ``[..., K, K]``."""
    return (one_sided_info_nce(scores) + one_sided_info_nce(scores.mT)) / 2


class _Pairs(NamedTuple):
    """All pairs, as both parts of a critic see them."""

    x: Tensor  # [N, ...], for the network
    y: Tensor
    features_x: Tensor  # [N, R + 2], of the Gaussian part, in float64
    features_y: Tensor

    def scores(self, network: nn.Module, rows: Tensor) -> Tensor:
        """Return the scores ``[..., K, K]`` of groups of pairs, whose rows are ``[..., K]``."""
        gaussian = (self.features_x[rows] @ self.features_y[rows].mT).float()
        scores: Tensor = gaussian + network(self.x[rows], self.y[rows])
        return scores


def _evaluate(x: Tensor, y: Tensor, training: Tensor, evaluation: Tensor, steps: int) -> _Result:
    """Train a critic on some pairs, and evaluate its bound on others.

    Args:
        x: samples ``[N, ...]``.
        y: their partners.
        training: the rows to train on; some of them stop the training.
        evaluation: the rows to evaluate on.
        steps: the most training steps.
    """
    training = training[torch.randperm(len(training))]
    held_out, training = training.tensor_split([round(HELD_OUT * len(training))])
    x, scores_x = _prepared(x, training)
    y, scores_y = _prepared(y, training)
    pairs = _Pairs(x, y, *_gaussian(scores_x, scores_y, training, held_out))
    if x.ndim == 4 or y.ndim == 4:
        critic: nn.Module = _Separable(x.shape[1:], y.shape[1:])
        how = OF_IMAGES
    else:
        critic = _Joint(x.shape[1], y.shape[1])
        how = OF_SCALARS
    critic = _trained(critic.to(x.device), pairs, training, held_out, steps, how)

    blocks = evaluation.tensor_split(-(-len(evaluation) // CANDIDATES))
    influence = []
    with torch.no_grad():
        for block in blocks:
            scores = pairs.scores(critic, block)  # [K, K]
            influence.append((_influence(scores) + _influence(scores.mT)) / 2)
    return _Result(torch.cat(influence), min(len(block) for block in blocks))


def _trained(
    critic: nn.Module, pairs: _Pairs, training: Tensor, held_out: Tensor, steps: int, how: _Training
) -> nn.Module:
    """Train a critic; return the moving average of its weights that does best on the held-out pairs."""
    batch_size = min(how.groups, len(training) // how.size) * how.size
    size = min(32, len(held_out))
    groups = held_out[: len(held_out) // size * size].view(-1, size)

    @torch.no_grad()
    def held_out_loss(network: nn.Module) -> float:
        return float(_loss(pairs.scores(network, groups)))

    average = AveragedModel(critic, multi_avg_fn=_update_average)
    average.update_parameters(critic)  # the first update is a copy: the initial weights count too
    best, lowest, fruitless = copy.deepcopy(average.module), held_out_loss(average), 0
    optimizer = torch.optim.AdamW(critic.parameters(), lr=how.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in range(steps):
        # The rate rises over 50 steps, and falls to a twentieth at the end.
        for settings in optimizer.param_groups:
            settings["lr"] = how.rate * min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
        batch = training[torch.randperm(len(training))[:batch_size]].view(-1, how.size)  # [groups, K]
        loss = _loss(pairs.scores(critic, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(critic)
        if (step + 1) % CHECK:
            continue
        # The held-out pairs choose among the averages, and stop the training.
        latest = held_out_loss(average)
        if latest < lowest:
            best, lowest, fruitless = copy.deepcopy(average.module), latest, 0
        else:
            fruitless += 1
        if fruitless == how.patience:
            break
    return best


def _update_average(averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
    """Move averages towards the latest weights: by 0.9 of the way at first, by 0.02 of it in the end."""
    count = int(updates)
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 - min(0.98, count / (count + 9)))


def _influence(scores: Tensor) -> Tensor:
    """Return each pair's influence ``[K]`` on ``log K - loss``, as a row and as a candidate of all rows.

    Their spread counts both, and their mean is the bound.
    """
    bound = math.log(len(scores)) + scores.diagonal() - scores.logsumexp(1)
    return bound + 1 - scores.softmax(1).sum(0)
