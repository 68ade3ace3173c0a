"""Offline export: the same pairs as files, for trainers that insist on them."""

from .exporting import Export, export
from .shards import verify

__all__ = ["Export", "export", "verify"]
