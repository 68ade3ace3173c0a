"""The checkpoint that a long measurement goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlviews.runs.files import whole


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
            ValueError: if the file belongs to a run with other settings, or is no checkpoint.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True, map_location="cpu")
            settings, state = content["settings"], content["state"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ValueError(
                f"{self.path} is no checkpoint of a measurement ({error}); delete it, or use another folder."
            ) from error
        changed = [
            f"{key}={settings.get(key)!r}, not {value!r}"
            for key, value in self.settings.items()
            if settings.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path} belongs to a run with {changed[0]}: use another folder, "
                "or resume=False (--no-resume) to start anew."
            )
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file."""
        if self.path is not None:
            with whole(self.path) as part:
                torch.save({"settings": self.settings, "state": dict(state)}, part)
