"""Offline export: the same pairs as files, for trainers that insist on files."""

from mlviews.integrations.files.exporting import Export, export
from mlviews.integrations.files.verifying import verify

__all__ = ["Export", "export", "verify"]
