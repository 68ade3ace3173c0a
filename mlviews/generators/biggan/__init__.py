"""BigGAN, BigBiGAN and BigGAN-deep: the networks, and the reading of the files that people have."""

from __future__ import annotations

from mlviews.generators.biggan.deep import BigGANDeep, BigGANDeepConfig
from mlviews.generators.biggan.network import BigGAN, BigGANConfig

__all__ = ["BigGAN", "BigGANConfig", "BigGANDeep", "BigGANDeepConfig"]
