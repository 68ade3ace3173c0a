"""The checkpoint that a long measurement goes on from."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlviews.runs.files import whole

ROUNDED = "samples"
"""The one setting that is compared up to rounding: numbers that follow from samples, see
:mod:`mlviews.identity`.
"""

_TOLERANCE = 2e-4


class Checkpoint:
    """The state of a run in a file that is whole or not there, and belongs to one set of settings.

    Args:
        path: the file; None keeps nothing.
        settings: what the run depends on, as JSON can hold it; a file with other settings is refused.
        resume: whether to go on from the file if there is one; False starts anew and replaces it.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], resume: bool) -> None:
        self.path, self.settings, self.resume = path, dict(settings), resume

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None for a new run.

        Raises:
            ValueError: if the file belongs to a run with other settings, is damaged, or is no checkpoint.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        with self.reading():
            # torch compares no checksums. It also reads files that are no zip archives, which may run code up
            # to torch 2.5.
            with zipfile.ZipFile(self.path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{Path(damaged).name} in it is not what was written")
            content = torch.load(self.path, weights_only=True, map_location="cpu")
            settings, state = dict(content["settings"]), dict(content["state"])
        changed = differences(settings, self.settings)
        if changed:
            raise ValueError(
                f"{self.path} belongs to a run with {changed[0]}: use another folder, "
                "or resume=False (--no-resume) to start anew."
            )
        return state

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever a damaged or foreign file raises, also while its state is taken over, into one clear
        error.
        """
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            raise ValueError(
                f"{self.path} is no checkpoint of a measurement, or is damaged ({type(error).__name__}: "
                f"{reason}); "
                "delete it, or use another folder."
            ) from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file."""
        if self.path is not None:
            with whole(self.path) as part:
                torch.save({"settings": self.settings, "state": dict(state)}, part)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say which settings differ, e.g. ``seed=3, not 4``; nested ones by their path.

    Args:
        old: the settings of what is kept.
        new: those that are asked for.
        prefix: the path of the two mappings.
    """
    changed = []
    for key in {**new, **old}:
        before, after = old.get(key), new.get(key)
        name = f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += differences(before, after, f"{name}.")
        elif key == ROUNDED:
            if not _close(before, after):
                changed.append(f"{name} of another generator (what it makes has changed)")
        elif before != after:
            changed.append(f"{name}={before!r}, not {after!r}")
    return changed


def _close(before: Any, after: Any) -> bool:
    """Are two lists of numbers the same up to what processors round differently?"""
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        return False
    return all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for a, b in zip(before, after, strict=True)
    )
