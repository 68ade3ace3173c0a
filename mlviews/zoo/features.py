"""What an encoder that learned from real images sees, and the discriminator that looks through it.

No labels are used: the encoder learns by SimCLR (Chen et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.transforms.functional import normalize

from mlviews.evaluation import learner
from mlviews.evaluation.real_views import RealViews
from mlviews.mi.critics import Residual
from mlviews.transforms import IMAGENET, Augmentation

_MOST = 60_000  # real images that the variance of features is taken of


class Seen(NamedTuple):
    """What the encoder sees in images."""

    maps: list[Tensor]  # [B, width, H, W], after the first layer and after each block
    features: Tensor  # [B, 512], whose total variance over real images is 1


class Features(nn.Module):
    """An encoder that stays as it is once it has learned.

    Images ``[B, C, H, W]`` in [0, 1] -> :class:`Seen`.
    """

    WIDTHS = (32, 32, 64, 128)
    """Channels of the maps."""

    variance: Tensor  # of the encoder's features over real images, summed

    def __init__(self) -> None:
        super().__init__()
        self.encoder = learner.Encoder()
        self.register_buffer("variance", torch.ones(()))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Seen:
        x = normalize(images.expand(-1, 3, -1, -1), *map(list, IMAGENET))
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for layer in self.encoder.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU | Residual):
                maps.append(x)
        return Seen(maps, x.float() / self.variance.sqrt())

    def learn(self, read: Callable[[Tensor], Tensor], count: int, size: int, steps: int, seed: int) -> None:
        """Train the encoder on real images.

        Args:
            read: returns images ``[B, C, size, size]``, uint8, of indices ``[B]``.
            count: the number of images.
            size: pixels of a side.
            steps: of the training, of 64 images each.
            seed: of the weights, the order of the images, and T_x.

        Raises:
            ModuleNotFoundError: if lightly is not installed.
        """
        gentle = Augmentation(size=size, scale=(0.6, 1.0), jitter=(0.4, 0.4, 0.0, 0.0), normalize=IMAGENET)
        encoder, _ = learner.train(RealViews(read, count, gentle, 64, seed), steps, seed=seed)
        self.encoder.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            self.variance.fill_(1.0)
            rows = torch.arange(min(count, _MOST)).split(500)
            features = torch.cat([self(read(part).float() / 255).features for part in rows])
            self.variance.copy_(features.var(0, unbiased=False).sum())


class Heads(nn.Module):
    """Small discriminators, one for each of the encoder's maps (Sauer et al. 2021, "Projected GANs").

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

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return each head's logits, float32 ``[B, places]``."""
        return [head(x).float().flatten(1) for head, x in zip(self.heads, maps, strict=True)]

    def loss(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        """Return the heads' own loss on maps of real images and of samples: the hinge, their mean."""
        pairs = zip(self(real), self(fake), strict=True)
        return torch.stack([F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in pairs]).mean()

    def loss_of_generator(self, fake: Sequence[Tensor]) -> Tensor:
        """Return the generator's loss on maps of samples."""
        return torch.stack([-logits.mean() for logits in self(fake)]).mean()
