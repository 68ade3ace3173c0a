"""NVAE: its network, and the reading of other projects' files.

config < cells, likelihood < encoder < network < reading.
"""

from __future__ import annotations

from mlviews.generators.nvae.config import NVAEConfig
from mlviews.generators.nvae.network import NVAE

__all__ = ["NVAE", "NVAEConfig"]
