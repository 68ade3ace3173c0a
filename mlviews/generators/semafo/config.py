"""The architecture of a SemafoVAE."""

from __future__ import annotations

from dataclasses import dataclass

from mlviews.checks import integer, is_number

_MOST_DOUBLINGS = 8  # 1024 pixels
_WIDEST = 1 << 16  # channels, scalars of a latent, classes


@dataclass(frozen=True)
class SemafoConfig:
    """Architecture of a :class:`~mlviews.generators.semafo.SemafoVAE`."""

    classes: int = 10
    image_channels: int = 1
    u: int = 16  # scalars of level u
    z0: int = 32  # scalars of level z0
    z1: int = 16  # channels of level z1, at 4x4
    encoder: tuple[int, ...] = (16, 48, 96)  # channels at half of the image's size, a quarter, ... and at 4x4
    decoder: tuple[int, ...] = (16, 32, 64, 80)  # channels at the image's size, half of it, ... and at 4x4
    features: int = 192  # width of the dense layers, of the encoder and of the priors
    label_features: int = 128  # width of the dense layer before the label
    groups: int = 8  # of the group norms
    floor: float = 0.01  # added to every standard deviation

    def __post_init__(self) -> None:
        """Raise a ValueError unless the parts fit together, and the layers take them.

        What a file says is bounded before anything is made of it.
        """
        if not 1 <= len(self.encoder) == len(self.decoder) - 1 <= _MOST_DOUBLINGS:
            raise ValueError(
                f"Invalid encoder and decoder of {len(self.encoder)} and {len(self.decoder)} widths: the "
                f"decoder has one more, and the encoder from 1 to {_MOST_DOUBLINGS}."
            )
        for name in ("classes", "image_channels", "u", "z0", "z1", "features", "label_features", "groups"):
            integer(name, getattr(self, name), 1, _WIDEST)
        for width in (*self.encoder, *self.decoder):
            integer("encoder and decoder", width, 1, _WIDEST)
            if width % self.groups:
                raise ValueError(f"Invalid width {width}: it must be divisible by groups={self.groups}.")
        if not is_number(self.floor) or not 0 <= self.floor <= 1:
            raise ValueError(f"Invalid floor={self.floor!r}: it must be a number from 0 to 1.")

    @property
    def image_size(self) -> int:
        """Pixels of one side."""
        return 4 << len(self.encoder)
