"""The tables that stand in the documents, a module for each document; ``TABLES`` has them by name."""

from documents import (
    anchors,
    bundled,
    emoji,
    generators,
    gpu,
    impact,
    integrations,
    loaders,
    paper,
    purify,
    versions,
    views,
    zoo,
)  # fmt: skip
from documents.common import DOCUMENTS, ROOT, TABLES

__all__ = [
    "DOCUMENTS",
    "ROOT",
    "TABLES",
    "anchors",
    "bundled",
    "emoji",
    "generators",
    "gpu",
    "impact",
    "integrations",
    "loaders",
    "paper",
    "purify",
    "versions",
    "views",
    "zoo",
]
