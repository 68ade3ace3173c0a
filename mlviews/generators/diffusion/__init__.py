"""Diffusion models by diffusers' networks, with samplers of our own.

samplers, denoisers < network < reading. diffusers is imported when a model is read, and not before.
"""

from __future__ import annotations

from mlviews.generators.diffusion.network import DiffusionGenerator

__all__ = ["DiffusionGenerator"]
