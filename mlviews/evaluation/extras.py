"""What training and probing an encoder takes from lightly and scikit-learn (extra ``lightly``)."""

from __future__ import annotations

import warnings
from types import SimpleNamespace


def lightly() -> SimpleNamespace:
    """Return what is used of lightly, or raise an error whose one line says how to install it."""
    try:
        with warnings.catch_warnings():
            # torchmetrics', where an old setuptools is there too: it would stand before every line of a run.
            warnings.filterwarnings("ignore", message=".*pkg_resources")
            import sklearn  # noqa: F401 (the linear probe's)
            from lightly import loss
            from lightly.models.modules import heads
            from lightly.utils.benchmarking.knn import knn_predict
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Training and probing an encoder needs {error.name}: pip install 'mlviews[lightly]'.",
            name=error.name,
        ) from None
    return SimpleNamespace(heads=heads, loss=loss, knn_predict=knn_predict)
