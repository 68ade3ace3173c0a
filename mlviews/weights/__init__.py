"""Weights files: our own format, other projects' without executing anything in them, and downloads."""

from __future__ import annotations

from mlviews.weights.files import fit, read_safetensors, write_safetensors

__all__ = ["fit", "read_safetensors", "write_safetensors"]
