"""mlviews: a generator in the place of a self-supervised-learning codebase's data loader."""

from mlviews import _moved, latents, perturb, transforms
from mlviews._version import __version__
from mlviews.config import list_presets
from mlviews.errors import WeightsError
from mlviews.generators import MLVGM, Level, list_generators, load_generator, wrap_generator
from mlviews.impact import ImpactReport, measure_impact, train_walker
from mlviews.invert import train_inverter
from mlviews.mi.estimate import MIEstimate, estimate_mi
from mlviews.mi.infonce import info_nce, mi_lower_bound
from mlviews.purify import Purifier
from mlviews.sharing import publish
from mlviews.source import MLViewSource
from mlviews.step import Batch

_moved.install()

__all__ = [
    "MLVGM",
    "Batch",
    "ImpactReport",
    "Level",
    "MIEstimate",
    "MLViewSource",
    "Purifier",
    "WeightsError",
    "__version__",
    "estimate_mi",
    "info_nce",
    "latents",
    "list_generators",
    "list_presets",
    "load_generator",
    "measure_impact",
    "mi_lower_bound",
    "perturb",
    "publish",
    "train_inverter",
    "train_walker",
    "transforms",
    "wrap_generator",
]
