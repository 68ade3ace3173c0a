"""BigGAN (Brock et al. 2019) and BigBiGAN's generator (Donahue & Simonyan 2019): one latent per level.

This is their "hierarchical z". The first chunk of z makes a 4x4 image of features through a linear layer.
Every later chunk, after the embedding of the class, sets scale and shift of the two batch norms of one
residual block, which doubles the resolution; one or more blocks end in self-attention (Zhang et al. 2019).

What does not depend on the latents is folded once, when the weights are read
(:mod:`mlviews.generators.biggan.reading`): spectral norms into the weights; the norms' statistics, the biases
before them and (where there is one class) the class into the linear map from a latent to scales and shifts;
the attention's gain into its output. What remains is computed channels-last; how, is in
:class:`~mlviews.generators.biggan.layers.Conv`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.biggan.layers import Attention, Block, First, Head, random_weight


@dataclass(frozen=True)
class BigGANConfig:
    """Architecture of a :class:`BigGAN`; the default is BigBiGAN's, for 128 pixels."""

    channels: tuple[int, ...] = (1536, 1536, 768, 384, 192, 96)  # after each level: at 4, 8, 16, ... pixels
    chunk: int = 20  # scalars of each level's latent
    # Where attention comes, by the pixels of one side -> channels of its queries (and keys), and of its
    # values.
    attention: dict[int, tuple[int, int]] = dataclasses.field(default_factory=lambda: {64: (24, 96)})
    bottom: int = 4  # pixels of one side after the first level
    num_classes: int = 0  # 0 where one class, or none, is folded into the weights
    embedding: int = 0  # values of a class's embedding; 0 without classes

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together."""
        counts = [*self.channels, self.chunk, self.bottom]
        for widths in self.attention.values():
            counts += widths
        fits = (
            len(self.channels) >= 2
            and min(counts) >= 1
            and set(self.attention) <= set(self.sizes[1:])
            and all(queries <= values for queries, values in self.attention.values())
            and min(self.num_classes, self.embedding) >= 0
            and (self.num_classes == 0) == (self.embedding == 0)
        )
        if not fits:
            raise ValueError(f"{self} does not fit together.")

    @property
    def sizes(self) -> list[int]:
        """Pixels of one side after each level."""
        return [self.bottom << level for level in range(len(self.channels))]


class BigGAN(MLVGM):
    """BigGAN's or BigBiGAN's generator, with random weights.

    :func:`mlviews.generators.biggan.reading.load` makes one of a file's weights.

    Levels: ``4x4`` (the linear layer), then one for each block, by the resolution it ends with.

    Args:
        config: the architecture; None for BigBiGAN's.
    """

    def __init__(self, config: BigGANConfig | None = None) -> None:
        config = config or BigGANConfig()
        blocks: list[nn.Module] = [First(config.chunk, config.channels[0], config.bottom)]
        for (channels, out_channels), (size, out_size) in zip(
            pairwise(config.channels), pairwise(config.sizes), strict=True
        ):
            widths = config.attention.get(out_size)
            attention = None if widths is None else Attention(out_channels, *widths)
            head = Head(out_channels) if out_size == config.sizes[-1] else None
            dim = config.embedding + config.chunk
            blocks.append(Block(dim, channels, out_channels, size, attention, head))
        levels = [Level(f"{size}x{size}", (config.chunk,)) for size in config.sizes]
        image_shape = (3, config.sizes[-1], config.sizes[-1])
        super().__init__(blocks, levels, image_shape, num_classes=config.num_classes)
        self.config = config
        self.classes = random_weight(config.num_classes, config.embedding) if config.num_classes else None

    def condition(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Return the chunks of z; all but the first come after the class's embedding, where it has one."""
        if self.classes is None or labels is None:
            return list(latents)
        embedding = self.classes[labels]  # [B, embedding]
        return [latents[0], *(torch.cat([embedding, z], dim=1) for z in latents[1:])]
