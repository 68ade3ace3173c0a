"""The StyleGAN family: its networks, and the reading of other projects' files.

regions < mapping < stylegan2 < reading; mapping < encoder; reading, encoder < psp.
"""

from __future__ import annotations

from mlviews.generators.stylegan.stylegan2 import StyleGAN2, StyleGAN2Config

__all__ = ["StyleGAN2", "StyleGAN2Config"]
