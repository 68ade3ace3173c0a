"""Generators by name, and the base class to bring a new one."""

from __future__ import annotations

from mlviews.generators.base import MLVGM, Level
from mlviews.generators.registry import GeneratorInfo, list_generators, load_generator
from mlviews.generators.wrapped import wrap_generator

__all__ = ["MLVGM", "GeneratorInfo", "Level", "list_generators", "load_generator", "wrap_generator"]
