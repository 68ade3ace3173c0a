"""BigGAN and BigBiGAN: the network, and the reading of the files that people have."""

from __future__ import annotations

from mlviews.generators.biggan.network import BigGAN, BigGANConfig

__all__ = ["BigGAN", "BigGANConfig"]
