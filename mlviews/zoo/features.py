"""What an encoder that learned from real images sees, and discriminators that look through it.

No labels are used: the encoder learns by SimCLR (Chen et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mlviews.evaluation import learner
from mlviews.evaluation.real_views import RealViews
from mlviews.mi.critics import Residual
from mlviews.sampling import permutation
from mlviews.transforms import Augmentation

_OF_VARIANCE = 60_000  # most real images that the variance of features is taken of


class Activations(NamedTuple):
    """What the encoder makes of images."""

    maps: list[Tensor]  # [B, width, H, W], after the first layer and after each block
    features: Tensor  # float32 [B, 512], whose total variance over real images is 1


class Features(nn.Module):
    """An encoder that stays as it is once it has learned; before that its weights are random.

    Images ``[B, C, H, W]`` in [0, 1], of 1 or 3 channels and 16 pixels or more -> :class:`Activations`.
    """

    variance: Tensor  # of the encoder's features over real images, summed

    def __init__(self) -> None:
        super().__init__()
        self.encoder = learner.Encoder()
        self.register_buffer("variance", torch.ones(()))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Activations:
        x = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        maps = []
        for layer in self.encoder.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU | Residual):
                maps.append(x)
        return Activations(maps, x.float() / self.variance.sqrt())

    def widths(self) -> list[int]:
        """Return the channels of the maps."""
        return [x.shape[1] for x in self(torch.zeros(1, 3, 16, 16)).maps]

    def learn(
        self, images_of: Callable[[Tensor], Tensor], count: int, size: int, batch: int, steps: int, seed: int
    ) -> None:
        """Train the encoder on real images.

        Args:
            images_of: returns images ``[B, C, size, size]``, uint8, of indices ``[B]``.
            count: the number of images.
            size: pixels of a side.
            batch: images of a step.
            steps: of the training.
            seed: of the weights, the order of the images, and T_x.

        Raises:
            ModuleNotFoundError: if lightly is not installed.
            ValueError: if there are fewer images than a batch.
        """
        gentle = Augmentation(size=size, scale=(0.6, 1.0), jitter=(0.4, 0.4, 0.0, 0.0), normalize=None)
        encoder, _ = learner.train(RealViews(images_of, count, gentle, batch, seed), steps, seed=seed)
        self.encoder.load_state_dict(encoder.state_dict())
        some = permutation(count, seed, 0, torch.device("cpu"))[:_OF_VARIANCE]
        with torch.no_grad():
            features = torch.cat([self.encoder(_colored(images_of(rows))) for rows in some.split(500)])
            self.variance.copy_(features.var(0, unbiased=False).sum())


def _colored(images: Tensor) -> Tensor:
    """Return uint8 images ``[B, C, H, W]`` as the encoder takes them."""
    return images.expand(-1, 3, -1, -1).float() / 255


class Heads(nn.Module):
    """Small discriminators, one for each of the encoder's maps.

    They are those of Projected GANs (Sauer et al. 2021) without the random projections. The norms of their
    weights follow their own training only, not the generator's.

    Args:
        widths: channels of the maps.
        width: channels of each head.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, width, 3, 1, 1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, 2, 1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for channels in widths
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return each head's logits, float32 ``[B, places]``."""
        return [head(x).float().flatten(1) for head, x in zip(self.heads, maps, strict=True)]

    def loss(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the heads' own loss, the mean of their hinges.

        Args:
            maps: of real images, followed by those of as many samples.
        """
        losses = []
        for logits in self(maps):
            real, fake = logits.chunk(2)
            losses.append(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return torch.stack(losses).mean()

    def loss_of_generator(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the generator's loss on maps of samples."""
        return torch.stack([-logits.mean() for logits in self(maps)]).mean()
