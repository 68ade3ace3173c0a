"""Views of real images alone: what a source is compared with, and what an encoder learns from without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mlviews.sampling import permutation
from mlviews.source import pair_layout
from mlviews.transforms import Augmentation


class RealViews:
    """Two augmented views of each real image, in a new order every epoch; an incomplete batch is left out.

    Content is a function of (seed, epoch, index, view), as of :class:`mlviews.MLViewSource`.

    Args:
        read: returns images ``[B, C, H, W]``, uint8 or float in [0, 1], of indices ``[B]``.
        count: the number of images.
        transform: T_x.
        batch_size: images of a batch.
        seed: of the order and of T_x.

    Raises:
        ValueError: if there are fewer images than a batch.
    """

    num_views, layout, device = 2, staticmethod(pair_layout), torch.device("cpu")

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        count: int,
        transform: Augmentation,
        batch_size: int,
        seed: int,
    ) -> None:
        if count < batch_size:
            raise ValueError(
                f"Invalid batch_size={batch_size}: there are {count} images; give more images, or a smaller "
                "batch_size."
            )
        self.read = read
        self.count = count
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield an epoch's batches, each two views ``[B, C, H, W]``; the next call has the next epoch."""
        epoch = self.epoch
        self.epoch += 1
        order = permutation(self.count, self.seed, epoch, self.device)
        whole_batches = self.count // self.batch_size * self.batch_size
        for rows in order[:whole_batches].split(self.batch_size):
            images = self.read(rows)
            if images.dtype == torch.uint8:
                images = images.float() / 255
            yield tuple(
                self.transform(images, rows, seed=self.seed, epoch=epoch, view=view) for view in (0, 1)
            )
