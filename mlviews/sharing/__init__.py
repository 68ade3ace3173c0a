"""Publishing a generator: a folder that anybody can load without trust, and its way to Hugging Face.

card, upload < publishing. The folder's format, and reading it, is :mod:`mlviews.generators.published`.
"""

from __future__ import annotations

from mlviews.sharing.publishing import publish

__all__ = ["publish"]
