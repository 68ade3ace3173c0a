"""VDVAE: its network, and the reading of openai/vdvae's files."""

from __future__ import annotations

from mlviews.generators.vdvae.network import VDVAE, VDVAEConfig

__all__ = ["VDVAE", "VDVAEConfig"]
