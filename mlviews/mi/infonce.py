"""InfoNCE in nats, and the mutual information that it bounds (paper, sec. 3.1).

All losses here are plain: ``log(number of candidates) - loss`` is a lower bound on mutual information. The
research code multiplies its loss by ``temperature / 0.07`` (1.43 at the temperature of 0.1), for which the
bound does not hold: :func:`to_paper_scale`.
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

from mlviews.checks import described, integer, positive


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Return plain NT-Xent over the 2K views of K pairs, in nats (Chen et al. 2020, eq. 1; the paper's eq.
    1).

    Each view looks for its partner among the 2K - 1 others by cosine similarity. When torch.distributed is
    initialized, the views of all ranks are candidates: the result is the mean over this rank's views, whose
    mean over ranks is the loss of the whole batch, and so are its gradients under DDP.

    Args:
        a: float ``[K, D]``, the embeddings of the anchors, of any length; K is the same on every rank.
        b: float ``[K, D]``, the embeddings of their positives.
        temperature: similarities are divided by it; above 0.

    Returns:
        A scalar in ``[0, inf)``; ``log(2K - 1)`` (K of all ranks) where the embeddings tell nothing.

    Raises:
        ValueError: if the shapes differ, there are fewer than 2 pairs over all ranks, or the temperature is
            not above 0.
    """
    _check(a, b, temperature)
    views = F.normalize(torch.cat([a, b]).float(), dim=1)  # [2K, D]: this rank's anchors, then its positives
    rank, candidates = 0, views
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, candidates = torch.distributed.get_rank(), _Gather.apply(views)  # [ranks * 2K, D]
    if len(candidates) < 4:
        raise ValueError(
            f"Invalid embeddings of {len(candidates) // 2} pair(s): InfoNCE needs at least 2, "
            "to have something to tell apart."
        )
    count, pairs = len(views), len(a)
    rows = torch.arange(count, device=views.device)  # [2K]
    themselves = rank * count + rows  # [2K], the place of each view among the candidates
    partners = rank * count + (rows + pairs) % count  # [2K]: of anchor i positive i, of positive i anchor i
    # Nats have float32's digits, whatever the precision of the embeddings.
    with torch.autocast(views.device.type, enabled=False):
        similarities = views @ candidates.T / temperature  # [2K, ranks * 2K]
        # No view is its own candidate. Of similarities without their diagonal the four blocks (anchor or
        # positive, with anchor or positive) would have to be copied; a logit of -inf leaves them in place,
        # and counts as nothing.
        logits = similarities.index_put((rows, themselves), views.new_tensor(-torch.inf))
        return F.cross_entropy(logits, partners)


def one_sided_info_nce(scores: Tensor) -> Tensor:
    """Return InfoNCE in nats with candidates from one side: row i looks for column i among the K columns.

    ``log K - loss`` is a lower bound on the mutual information of rows and columns, whatever the two are
    (van den Oord et al. 2018).

    Args:
        scores: float ``[..., K, K]``, the score of row i with candidate j, by any critic that was not chosen
            by these pairs.

    Returns:
        A scalar, the mean over all rows; ``log K`` where the scores tell nothing.

    Raises:
        ValueError: if the scores are not square float matrices of at least 2 candidates.
    """
    is_matrix = isinstance(scores, Tensor) and scores.ndim >= 2 and scores.is_floating_point()
    if not is_matrix or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(
            f"Invalid scores, {described(scores)}: pass float matrices [..., K, K] whose row i belongs to "
            "column i."
        )
    count = scores.shape[-1]
    if count < 2:
        raise ValueError(
            f"Invalid scores of {count} candidate(s): InfoNCE needs at least 2, to have something to tell "
            "apart."
        )
    scores = scores.float()
    normalizers = scores.logsumexp(-1)  # [..., K], over the candidates of each row
    partners = scores.diagonal(dim1=-2, dim2=-1)  # [..., K]
    return (normalizers - partners).mean()


def mi_lower_bound(loss: float | Tensor, n_pairs: int) -> float | Tensor:
    """Return ``log(2K - 1) - loss``, a lower bound in nats on the views' mutual information (paper, eqs. 2
    and 3).

    It cannot exceed ``log(2K - 1)``, its ceiling: a value near it says "at least this much". It presumes that
    anchors and positives have about the same distribution, as both serve as candidates.

    Args:
        loss: the loss of :func:`info_nce`, in nats.
        n_pairs: K, over all ranks.

    Raises:
        ValueError: if K is not an integer of at least 2.
    """
    return math.log(2 * integer("n_pairs", n_pairs, 2) - 1) - loss


class MIBound(NamedTuple):
    """A lower bound on mutual information from several batches, in nats."""

    nats: float
    stderr: float  # the standard error of its mean over batches
    ceiling: float  # the value that it cannot exceed


def mi_bound(losses: Sequence[float], n_pairs: int) -> MIBound:
    """Return the bound of :func:`mi_lower_bound` from independent batches, its standard error and its
    ceiling.

    Args:
        losses: the losses of :func:`info_nce` in nats, one for each of at least 2 batches of fresh pairs.
        n_pairs: K of each batch, over all ranks.

    Raises:
        ValueError: if there are fewer than 2 losses, or K is not an integer of at least 2.
    """
    losses = [float(loss) for loss in losses]
    if len(losses) < 2:
        raise ValueError(f"Invalid losses={losses!r}: a standard error takes those of at least 2 batches.")
    nats = float(mi_lower_bound(statistics.fmean(losses), n_pairs))
    stderr = statistics.stdev(losses) / math.sqrt(len(losses))
    return MIBound(nats, stderr, ceiling=float(mi_lower_bound(0.0, n_pairs)))


def to_paper_scale(loss: float | Tensor, temperature: float = 0.1) -> float | Tensor:
    """Return the loss as the research code reports it, ``temperature / 0.07`` times the plain one.

    "About 1" on that scale is 0.7 nats.
    """
    return loss * (positive("temperature", temperature) / 0.07)


def from_paper_scale(loss: float | Tensor, temperature: float = 0.1) -> float | Tensor:
    """Return the plain loss in nats of a value that the research code or the paper reports."""
    return loss * (0.07 / positive("temperature", temperature))


def reachable(target_loss: Any, pairs: int) -> float:
    """Return the target loss if a critic can have it.

    Args:
        target_loss: the target, in nats.
        pairs: K, over all ranks.

    Raises:
        ValueError: if it is not below ``log(2K - 1)``, the loss of a critic that knows nothing.
    """
    target = positive("target_loss", target_loss)
    ceiling = math.log(2 * pairs - 1)
    if target >= ceiling:
        raise ValueError(
            f"Invalid target_loss={target!r}: a critic that knows nothing has log(2K - 1) = {ceiling:.2f}"
            " nats; take a smaller target (the paper's is 0.7), or more pairs."
        )
    return target


# torch's differentiable all_gather runs backwards on gloo too, but is deprecated; torch 2.4 lacks its heir.
class _Gather(torch.autograd.Function):
    """All ranks' rows, in the order of ranks; backwards, the sum of all ranks' gradients for this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)  # [ranks * count, D]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()  # [ranks * count, D]
        torch.distributed.all_reduce(total)
        first = torch.distributed.get_rank() * ctx.count
        return total[first : first + ctx.count]


def _check(a: Tensor, b: Tensor, temperature: float) -> None:
    positive("temperature", temperature)
    for embeddings in (a, b):
        is_matrix = isinstance(embeddings, Tensor) and embeddings.ndim == 2
        if not is_matrix or not embeddings.is_floating_point():
            raise ValueError(f"Invalid embeddings, {described(embeddings)}: pass two float tensors [K, D].")
    if a.shape != b.shape:
        raise ValueError(
            f"Embeddings of shapes {tuple(a.shape)} and {tuple(b.shape)}: "
            "row i of one is the partner of row i of the other."
        )
