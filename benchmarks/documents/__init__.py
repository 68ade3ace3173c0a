"""The tables that stand in the documents, a module for each document; ``TABLES`` has them by name."""

from documents import anchors, generators, gpu, impact, integrations, loaders, paper, purify, views, zoo
from documents.common import DOCUMENTS, ROOT, TABLES

__all__ = [
    "DOCUMENTS",
    "ROOT",
    "TABLES",
    "anchors",
    "generators",
    "gpu",
    "impact",
    "integrations",
    "loaders",
    "paper",
    "purify",
    "views",
    "zoo",
]
