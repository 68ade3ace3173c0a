"""InfoNCE in nats, and the mutual information that it bounds (paper, sec. 3.1).

All losses here are plain: ``log(number of candidates) - loss`` is a lower bound on mutual information. The research code multiplies its
loss by ``temperature / 0.07`` (1.43 at the temperature of 0.1), for which the bound does not hold: :func:`to_paper_scale`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer, is_number, positive


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Plain NT-Xent over the 2K views of K pairs, in nats (Chen et al. 2020, eq. 1; the paper's eq. 1).

    Each view looks for its partner among the 2K - 1 others by cosine similarity. When torch.distributed is initialised, the views
    of all ranks are candidates: the result is the mean over this rank's views, whose mean over ranks is the loss of the whole
    batch, and so are its gradients under DDP.

    Args:
        a: ``[K, D]`` embeddings of the anchors, of any length; the same K on every rank.
        b: ``[K, D]`` embeddings of their positives.
        temperature: that similarities are divided by, above 0.

    Returns:
        A scalar in ``[0, inf)``; ``log(2K - 1)`` (K of all ranks) where the embeddings tell nothing.

    Raises:
        ValueError: if the shapes differ, there are fewer than 2 pairs over all ranks, or the temperature is not above 0.
    """
    _check(a, b, temperature)
    own = F.normalize(torch.cat([a, b]).float(), dim=1)
    rank, everyone = 0, own
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, everyone = torch.distributed.get_rank(), _Gather.apply(own)
    count, pairs = len(own), len(a)
    if len(everyone) < 4:
        raise ValueError(f"Invalid embeddings of {len(everyone) // 2} pair(s): InfoNCE needs at least 2, to have something to tell apart.")
    rows = torch.arange(count, device=own.device)
    with torch.autocast(own.device.type, enabled=False):  # nats to float32's digits, whatever the precision of the embeddings
        logits = (own @ everyone.T / temperature).index_put((rows, rows + rank * count), own.new_tensor(-torch.inf))
        return F.cross_entropy(logits, rank * count + (rows + pairs) % count)


def one_sided_info_nce(scores: Tensor) -> Tensor:
    """InfoNCE in nats with candidates from one side: row i looks for its partner, column i, among the K columns.

    ``log K - loss`` is a lower bound on the mutual information of rows and columns, whatever the two are (van den Oord et al. 2018).

    Args:
        scores: float ``[..., K, K]``: of row i with candidate j, by any critic that was not chosen by these pairs.

    Returns:
        A scalar, the mean over all rows; ``log K`` where the scores tell nothing.

    Raises:
        ValueError: if the scores are not square float matrices of at least 2 candidates.
    """
    if not isinstance(scores, Tensor) or scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or not scores.is_floating_point():
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"Invalid scores, {found}: pass float matrices [..., K, K] whose row i belongs to column i.")
    count = scores.shape[-1]
    if count < 2:
        raise ValueError(f"Invalid scores of {count} candidate(s): InfoNCE needs at least 2, to have something to tell apart.")
    scores = scores.float()
    return (scores.logsumexp(-1) - scores.diagonal(dim1=-2, dim2=-1)).mean()


def mi_lower_bound(loss: float | Tensor, n_pairs: int) -> float | Tensor:
    """``log(2K - 1) - loss``: a lower bound in nats on the mutual information between the two views (paper, eqs. 2 and 3).

    It cannot exceed ``log(2K - 1)``, its ceiling: a value near it says "at least this much". It presumes that
    anchors and positives have about the same distribution, as both serve as candidates.

    Args:
        loss: of :func:`info_nce`, in nats.
        n_pairs: K, over all ranks.

    Raises:
        ValueError: if K is not an integer of at least 2.
    """
    return math.log(2 * integer("n_pairs", n_pairs, 2) - 1) - loss


class MIBound(NamedTuple):
    """A lower bound on mutual information from several batches, in nats."""

    nats: float
    stderr: float  # of its mean over batches
    ceiling: float  # that it cannot exceed


def mi_bound(losses: Sequence[float], n_pairs: int) -> MIBound:
    """The bound of :func:`mi_lower_bound` from the losses of independent batches, with its standard error and its ceiling.

    Args:
        losses: of :func:`info_nce`, in nats, one for each of at least 2 batches of fresh pairs.
        n_pairs: K of each batch, over all ranks.

    Raises:
        ValueError: if there are fewer than 2 losses, or K is not an integer of at least 2.
    """
    losses = [float(loss) for loss in losses]
    if len(losses) < 2:
        raise ValueError(f"Invalid losses={losses!r}: a standard error takes those of at least 2 batches.")
    stderr = statistics.stdev(losses) / math.sqrt(len(losses))
    return MIBound(float(mi_lower_bound(statistics.fmean(losses), n_pairs)), stderr, float(mi_lower_bound(0.0, n_pairs)))


def to_paper_scale(loss: float | Tensor, temperature: float = 0.1) -> float | Tensor:
    """The loss as the research code reports it, ``temperature / 0.07`` times the plain one: "about 1" there is 0.7 nats."""
    return loss * (_temperature(temperature) / 0.07)


def from_paper_scale(loss: float | Tensor, temperature: float = 0.1) -> float | Tensor:
    """The plain loss in nats of a value that the research code or the paper reports."""
    return loss * (0.07 / _temperature(temperature))


class _Gather(torch.autograd.Function):
    """Every rank's rows, in the order of ranks; backwards, the sum of what all ranks' losses say of one's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.count = len(own)
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        first = torch.distributed.get_rank() * ctx.count
        return total[first : first + ctx.count]


def _temperature(value: float) -> float:
    if not is_number(value) or value <= 0:
        raise ValueError(f"Invalid temperature={value!r}: it must be a number above 0.")
    return value


def _check(a: Tensor, b: Tensor, temperature: float) -> None:
    _temperature(temperature)
    for value in (a, b):
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Invalid embeddings, {found}: pass two float tensors [K, D].")
    if a.shape != b.shape:
        raise ValueError(f"Embeddings of shapes {tuple(a.shape)} and {tuple(b.shape)}: row i of one is the partner of row i of the other.")


def reachable(target_loss: Any, pairs: int) -> float:
    """The target loss, if there is a critic that has it; else a ValueError."""
    target = positive("target_loss", target_loss)
    if target >= math.log(2 * pairs - 1):
        raise ValueError(
            f"Invalid target_loss={target!r}: a critic that knows nothing has log(2K - 1) = {math.log(2 * pairs - 1):.2f}"
            " nats; take a smaller target (the paper's is 0.7), or more pairs."
        )
    return target
