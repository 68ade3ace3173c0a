"""The architecture of an NVAE."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlviews.checks import is_number

ROLES = ("pre", "down_pre", "enc", "down_enc", "dec", "up_dec", "post", "up_post")
"""The kinds of cells; those of "down" halve the size, those of "up" double it."""

PLAIN = dict.fromkeys(ROLES, ("res_bnswish", "res_bnswish"))
"""The cells of the bundled model: two 3x3 convolutions, and no depthwise ones, which are slow on a CPU."""


@dataclass(frozen=True)
class NVAEConfig:
    """Architecture of an :class:`~mlviews.generators.nvae.NVAE`."""

    image_channels: int = 1
    image_size: int = 32  # pixels of one side
    groups: tuple[int, ...] = (3, 2, 1)  # latent groups of each scale, coarse to fine
    latents: tuple[int, ...] = (8, 4, 4)  # channels of one group's latent, per scale
    encoder: tuple[int, ...] = (16, 32, 48, 48)  # channels at full size, half, ... down to the coarsest scale
    decoder: tuple[int, ...] = (16, 32, 64, 64)  # the same; an entry per pre-processing block and per scale
    cells: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(PLAIN))  # by ROLES
    pre_cells: int = 1  # cells of a pre-processing block, the last of which halves the size
    enc_cells: int = 1  # cells before each group, in the encoder
    dec_cells: int = 1  # and in the decoder
    post_cells: int = 1  # cells of a post-processing block, the first of which doubles the size
    gated: bool = False  # squeeze and excitation at the end of each cell
    skip: int = 2  # kernel of the halving skip connections: 2 (all four pixels) or 1 (one of them)
    relative: bool = True  # the posterior is relative to the prior (paper, sec. 3.2)
    floor: float = 0.0  # added to every sigma
    mirrored: bool = True  # the encoder meets the groups of a scale in the reverse of the decoder's order
    flows: int = 0  # pairs of autoregressive flow cells after each posterior (paper, sec. 3.2)
    flow_elus: int = 1  # activations before a flow cell's last convolution
    head: str = "logistic"  # likelihood: a mixture of discretized logistics, "bernoulli", or "normal"
    mixtures: int = 3  # components of "logistic"
    bits: int = 8  # of a pixel, for the likelihood

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together.

        What a file says is bounded before anything is made of it.
        """
        cells = (self.pre_cells, self.enc_cells, self.dec_cells, self.post_cells)
        counts = (*self.groups, *self.latents, *self.encoder, *self.decoder, *cells)
        depth = len(self.encoder)
        halvings = depth - 1
        fits = (
            len(self.latents) == len(self.groups) <= depth == len(self.decoder) <= 16
            and all(type(count) is int and 1 <= count <= 1 << 20 for count in counts)
            and sum(self.groups) <= 1024
            and max(cells) <= 64
            and type(self.image_size) is int
            and 1 <= self.image_size <= 4096
            and self.image_size % 2**halvings == 0
            and self.skip in (1, 2)
            and 0 <= self.flows <= 16
            and 1 <= self.mixtures <= 100
            and 1 <= self.bits <= 8
            and set(self.cells) == set(ROLES)
            and all(1 <= len(kinds) <= 8 for kinds in self.cells.values())
            and type(self.image_channels) is int
            and 1 <= self.image_channels <= 1 << 10
            and type(self.flow_elus) is int
            and 0 <= self.flow_elus <= 16
            and is_number(self.floor)
            and 0 <= self.floor <= 1e6
        )
        if not fits:
            raise ValueError(f"{str(self)[:300]} does not fit together.")

    @property
    def scales(self) -> int:
        """Number of resolutions that have latents."""
        return len(self.groups)

    @property
    def group_scales(self) -> list[tuple[int, int]]:
        """The scale of each latent group and its index within the scale, coarse to fine."""
        return [(scale, index) for scale, count in enumerate(self.groups) for index in range(count)]
