"""The StyleGAN family: its networks, and the reading of other projects' files.

regions < mapping < stylegan2 < reading; filters, stylegan2 < stylegan3, xl < stylegan3_reading; both readings
use folding; mapping < encoder; reading, encoder < psp.
"""

from __future__ import annotations

from mlviews.generators.stylegan.stylegan2 import StyleGAN2, StyleGAN2Config
from mlviews.generators.stylegan.stylegan3 import StyleGAN3, StyleGAN3Config

__all__ = ["StyleGAN2", "StyleGAN2Config", "StyleGAN3", "StyleGAN3Config"]
