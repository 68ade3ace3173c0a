"""Retrieval: whether an encoder puts images of one thing beside each other, whatever their sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import described


class Retrieval(NamedTuple):
    """How well images of the same items are retrieved from other sources, in percent."""

    recall: dict[int, float]  # k -> queries with the item among their k nearest images
    precision: float  # mean average precision


def retrieve(features: Tensor, items: Tensor, sources: Tensor, ranks: Sequence[int] = (1, 5)) -> Retrieval:
    """Look for every image's item among the images of the other sources, by cosine similarity.

    Recall at k is the share of queries with an image of their item among the k nearest; the average precision
    of a query is the mean of the precisions at the ranks of all images of its item (Manning et al. 2008, sec.
    8.4).

    Args:
        features: float ``[N, D]`` of the images, each of which is a query once.
        items: int64 ``[N]``, what each image shows.
        sources: int64 ``[N]``, where it comes from; images of a query's source are no answers.
        ranks: the values of k.

    Raises:
        ValueError: if the shapes do not agree, or an item is of one source only.
    """
    if features.ndim != 2 or not len(features) == len(items) == len(sources):
        raise ValueError(
            f"Invalid features {described(features)} for {len(items)} items and {len(sources)} sources: give "
            "[N, D] and as many of both."
        )
    unit = F.normalize(features, dim=1)
    gallery = sources[:, None] != sources  # [N, N]: what a query may be answered with
    relevant = (items[:, None] == items) & gallery
    count = relevant.sum(1)
    if not count.all():
        lonely = int(items[int(count.argmin())])
        raise ValueError(f"Invalid items: item {lonely} is of one source only; leave it out.")
    similarity = (unit @ unit.T).masked_fill(~gallery, -torch.inf)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order)
    precisions = hits.cumsum(1) / torch.arange(1, len(items) + 1)  # at every rank
    average = (precisions * hits).sum(1) / count  # [N]
    recall = {rank: 100 * float(hits[:, :rank].any(1).float().mean()) for rank in ranks}
    return Retrieval(recall, 100 * float(average.mean()))
