"""The StyleGAN family: the networks, and the reading of the files that people have."""

from __future__ import annotations

from mlviews.generators.stylegan.stylegan2 import StyleGAN2, StyleGAN2Config

__all__ = ["StyleGAN2", "StyleGAN2Config"]
