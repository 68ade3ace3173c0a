"""NVAE: the network, and the reading of the files that people have."""

from __future__ import annotations

from mlviews.generators.nvae.network import NVAE, NVAEConfig

__all__ = ["NVAE", "NVAEConfig"]
