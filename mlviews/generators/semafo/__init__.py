"""SemafoVAE: a hierarchical VAE whose levels have priors that a label controls."""

from mlviews.generators.semafo.config import SemafoConfig
from mlviews.generators.semafo.network import SemafoVAE

__all__ = ["SemafoConfig", "SemafoVAE"]
