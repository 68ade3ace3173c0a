"""Weights files: reading other projects' without executing anything in them, our own format, and downloads."""

from __future__ import annotations

from mlviews.weights.files import fit, read_safetensors, write_safetensors

__all__ = ["fit", "read_safetensors", "write_safetensors"]
