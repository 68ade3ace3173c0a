"""BigGAN-deep (Brock et al. 2019, appendix B, fig. 16): one z sets the norms of every block.

There is no hierarchical z here: all of z, with the embedding of the class, makes the first 4x4 features and
sets scale and shift of all four batch norms of each block. So a copy of z at each block is a level, as a copy
of w is in StyleGAN2: the levels are tied, and with equal copies the images are those of the original.

The batch norms' statistics depend on the truncation of z. The published files have them for 51 truncations,
of which :mod:`mlviews.generators.biggan.deep_reading` folds one into the weights, with all else that does not
depend on the latents. A level's latent is z in units of the truncation, so that its law is that of all other
generators: a standard normal that is truncated at 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from mlviews.checks import is_number
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.biggan.layers import (
    Attention,
    Conv,
    First,
    Head,
    Linear,
    Styled,
    add_upsampled,
    to_first,
    to_last,
)
from mlviews.generators.stylegan.mapping import style_runs
from mlviews.generators.stylegan.regions import Span
from mlviews.levels import once

BOTTOM = 4  # pixels of one side of the first features
REDUCTION = 4  # a block's inner channels are a fourth of those it takes


@dataclass(frozen=True)
class BigGANDeepConfig:
    """Architecture of a :class:`BigGANDeep`; the default is the published one of 128 pixels."""

    # After the first linear layer and after each block.
    channels: tuple[int, ...] = (2048, 2048, 2048, 2048, 1024, 1024, 512, 512, 256, 256, 128)
    up: tuple[bool, ...] = (False, True) * 5  # whether each block doubles the resolution
    # Attention, by the number of blocks before it -> channels of its queries (and keys), and of its values.
    attention: dict[int, tuple[int, int]] = dataclasses.field(default_factory=lambda: {8: (32, 128)})
    z_dim: int = 128
    embedding: int = 128  # values of a class's embedding
    num_classes: int = 1000

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together."""
        counts = [*self.channels, self.z_dim, self.embedding, self.num_classes]
        for widths in self.attention.values():
            counts += widths
        fits = (
            len(self.channels) == len(self.up) + 1 >= 2
            and min(counts) >= 1
            and min(self.channels[:-1]) >= REDUCTION
            and all(after in (before, before // 2) for before, after in pairwise(self.channels))
            and all(1 <= place <= len(self.up) for place in self.attention)
            and all(queries <= values for queries, values in self.attention.values())
        )
        if not fits:
            raise ValueError(f"{self} does not fit together.")

    @property
    def sizes(self) -> list[int]:
        """Pixels of one side after the linear layer and after each block."""
        return list(accumulate(self.up, lambda size, up: 2 * size if up else size, initial=BOTTOM))


class Bottleneck(Styled):
    """A residual block of BigGAN-deep: ``z [B, d], state [B, C, H, W] -> [B, C', H', W']``.

    Four times norm, ReLU and convolution: 1x1 to C / 4 channels, 3x3 (which may upsample), 3x3, and 1x1 to C'
    channels. The state that it took is added, without its channels above C' (there is no shortcut that could
    change them). Biases but the last one's are part of the norm after them.

    Args:
        dim: d, values of z and of the class's embedding.
        channels: C.
        out_channels: C', C or half of it.
        size: H and W.
        up: whether rows and columns are doubled.
        attention: self-attention on the output, or None.
        head: what makes images of the last block's output; None for all others.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        out_channels: int,
        size: int,
        up: bool,
        attention: Attention | None,
        head: Head | None,
    ) -> None:
        inner = channels // REDUCTION
        super().__init__(dim, (channels, inner, inner, inner), up=up)
        self.contract = Linear(channels, inner, bias=False)
        self.conv1 = Conv(inner, inner, size, up=up)
        self.conv2 = Conv(inner, inner, 2 * size if up else size)
        self.expand = Linear(inner, out_channels)
        self.attention = attention
        self.head = head

    def transformed(self, style: Tensor, x: Tensor) -> Tensor:
        norm1, norm2, norm3, norm4 = self.norms(style)
        h = to_first(self.contract(to_last(norm1(x))))  # [B, C / 4, H, W]
        h = self.conv1(norm2(h))  # [B, C / 4, H', W']
        h = self.conv2(norm3(h))
        h = to_first(self.expand(to_last(norm4(h))))  # [B, C', H', W']
        low = to_last(x)[..., : h.shape[1]]  # [B, H, W, C']
        h = add_upsampled(h, low) if self.up else h.add_(to_first(low))
        if self.attention is not None:
            h = self.attention(h)
        if self.head is not None:
            h = self.head(h)
        return h


class Steps(nn.Module):
    """A level: consecutive parts of the network that share one latent."""

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, z: Tensor, state: Tensor | None) -> Tensor:
        for step in self.steps:
            state = step(z, state)
        assert state is not None
        return state


class BigGANDeep(MLVGM):
    """BigGAN-deep's generator, with random weights; images ``[B, 3, H, W]`` in [0, 1].

    :func:`mlviews.generators.biggan.deep_reading.load` makes one of a file's weights.

    A level's latent is ``z / truncation``, a standard normal truncated at 2, and all levels share one draw
    (``tied``). The first one makes the 4x4 features, each of the others sets the norms of a block.

    Args:
        config: the architecture; None for the published one of 128 pixels.
        truncation: z is this many times a level's latent; above 0, at most 1.
        groups: the number of levels. The linear layer and the blocks are divided into this many runs, as even
            as possible, longer runs first. ``"scale"``: a level for each resolution. None: a level for each
            block.

    Raises:
        ValueError: for options out of range, naming the allowed values.
    """

    def __init__(
        self,
        config: BigGANDeepConfig | None = None,
        *,
        truncation: float = 1.0,
        groups: int | str | None = None,
    ) -> None:
        config = config or BigGANDeepConfig()
        if not (is_number(truncation) and 0 < truncation <= 1):
            raise ValueError(f"Invalid truncation={truncation!r}: it must be a number above 0 and at most 1.")
        runs = level_runs(config, groups)
        dim = config.z_dim + config.embedding
        steps: list[nn.Module] = [First(dim, config.channels[0], BOTTOM)]
        for index, up in enumerate(config.up):
            widths = config.attention.get(index + 1)
            channels, out_channels = config.channels[index], config.channels[index + 1]
            attention = None if widths is None else Attention(out_channels, *widths)
            head = Head(out_channels) if index + 1 == len(config.up) else None
            steps.append(Bottleneck(dim, channels, out_channels, config.sizes[index], up, attention, head))
        side = config.sizes[-1]
        super().__init__(
            [Steps(steps[run.start : run.stop]) for run in runs],
            [Level(name, (config.z_dim,)) for name in _names(config, runs)],
            (3, side, side),
            tied=True,
            num_classes=config.num_classes,
        )
        self.config = config
        self.runs = runs
        self.scale = float(truncation)  # of z; the latents' own law stays truncated at 2
        self.classes = nn.Parameter(torch.empty(config.num_classes, config.embedding))
        if not self.classes.is_meta:
            nn.init.normal_(self.classes)

    def condition(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Return z and the class's embedding ``[B, z_dim + embedding]``; equal latents share one tensor."""
        assert labels is not None
        embedding = self.classes[labels]  # [B, embedding]
        return once(lambda z: torch.cat([self.scale * z, embedding], dim=1), latents)


def level_runs(config: BigGANDeepConfig, groups: int | str | None) -> list[Span]:
    """Return the run of steps (0 is the linear layer, i the block i) of each level.

    Raises:
        ValueError: unless groups is None, "scale", or from 1 to the number of steps.
    """
    count = len(config.channels)
    if isinstance(groups, str):
        if groups != "scale":
            raise ValueError(
                f"Invalid groups={groups!r}: it must be an integer from 1 to {count} or 'scale'."
            )
        starts = [0, *(step for step, up in enumerate(config.up, start=1) if up)]
        return [Span(start, stop) for start, stop in pairwise([*starts, count])]
    return style_runs(count, groups)


def _names(config: BigGANDeepConfig, runs: list[Span]) -> list[str]:
    """Return the levels' names: the resolutions if each has one, else the numbers of the blocks."""
    sizes = [config.sizes[run.stop - 1] for run in runs]
    if runs == level_runs(config, "scale"):
        return [f"{size}x{size}" for size in sizes]
    names = ["start" if run.stop == 1 else _numbers(run) for run in runs]
    return [f"{name} ({size}x{size})" for name, size in zip(names, sizes, strict=True)]


def _numbers(run: Span) -> str:
    """Return the numbers of a run's blocks; the linear layer has none, and comes with the first block."""
    start, stop = max(run.start, 1), run.stop - 1
    return f"block {start}" if start == stop else f"blocks {start}-{stop}"
