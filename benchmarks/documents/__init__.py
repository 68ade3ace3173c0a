"""The tables that stand in the documents, a module for each document; ``TABLES`` has them by name."""

from documents import anchors, generators, impact, integrations, loaders, purify, versions, views, zoo
from documents.common import DOCUMENTS, ROOT, TABLES

__all__ = [
    "DOCUMENTS",
    "ROOT",
    "TABLES",
    "anchors",
    "generators",
    "impact",
    "integrations",
    "loaders",
    "purify",
    "versions",
    "views",
    "zoo",
]
