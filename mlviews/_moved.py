"""Modules under the names that they had in version 0.1: importing an old name gives the module itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "mlviews.checkpoints": "mlviews.weights.checkpoints",
    "mlviews.data": "mlviews.evaluation.data",
    "mlviews.distributed": "mlviews.runs.processes",
    "mlviews.download": "mlviews.weights.download",
    "mlviews.encoders": "mlviews.mi.critics",
    "mlviews.generators.nvae_files": "mlviews.generators.nvae.reading",
    "mlviews.generators.stylegan2": "mlviews.generators.stylegan.stylegan2",
    "mlviews.generators.stylegan2_files": "mlviews.generators.stylegan.reading",
    "mlviews.infonce": "mlviews.mi.infonce",
    "mlviews.probe": "mlviews.evaluation.probe",
    "mlviews.progress": "mlviews.runs.progress",
    "mlviews.records": "mlviews.runs.records",
    "mlviews.unpickle": "mlviews.weights.unpickle",
    "mlviews.zoo.classifier": "mlviews.evaluation.classifier",
}


class _Finder(MetaPathFinder, Loader):
    """Finds moved modules, after every other finder has found nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


def install() -> None:
    """Make the old names importable."""
    if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
