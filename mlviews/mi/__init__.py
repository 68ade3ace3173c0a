"""Mutual information of views in nats: InfoNCE and its bound, critics, and estimates from paired samples."""

from __future__ import annotations

from mlviews.mi.estimate import FEWEST, MIEstimate, estimate_mi

__all__ = ["FEWEST", "MIEstimate", "estimate_mi"]
