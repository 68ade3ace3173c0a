"""The checkpoint that a long run goes on from."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlviews.checks import is_number
from mlviews.runs.files import whole

ROUNDED = "samples"
"""The one setting that is compared up to rounding: numbers that follow from samples, see
:mod:`mlviews.identity`.
"""

_TOLERANCE = 2e-4
_MOST_LETTERS = 80  # of a value in a message
_ZIP = b"PK\x03\x04"


class Checkpoint:
    """The state of a run in a file that is whole or not there, and belongs to one set of settings.

    Args:
        path: the file; None keeps nothing.
        settings: what the run depends on, as JSON can hold it; a file with other settings is refused.
        resume: whether to go on from the file if there is one; False starts anew and replaces it.
        remedy: how the user starts anew, for the message.
        bare: whether a file that is a state alone, without settings, is gone on from: runs of earlier
            versions wrote such files.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        resume: bool,
        remedy: str = "resume=False (--no-resume)",
        bare: bool = False,
    ) -> None:
        self.path, self.settings, self.resume = path, dict(settings), resume
        self.remedy, self.bare = remedy, bare

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None for a new run.

        Raises:
            ValueError: if the file belongs to a run with other settings, is damaged, or is no checkpoint.
            OSError: if it cannot be read.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        data = self.path.read_bytes()
        with self.reading():
            content = _read(data)
            if self.bare and "settings" not in content:
                return content
            settings, state = dict(content["settings"]), dict(content["state"])
            changed = differences(settings, self.settings)
        if changed:
            raise ValueError(
                f"{self.path} belongs to a run with {changed[0]}: use another folder, "
                f"or {self.remedy} to start anew."
            )
        return state

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever a damaged or foreign file raises into one clear ValueError.

        A run takes its state over within it, too.
        """
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0][:120] or "no reason given"
            raise ValueError(
                f"{self.path} is no checkpoint of a measurement or a training, or is damaged "
                f"({type(error).__name__}: {reason}); delete it, or use another folder."
            ) from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file.

        Raises:
            OSError: if it cannot be written, e.g. as the disk is full.
        """
        if self.path is not None:
            content = io.BytesIO()  # torch's errors do not tell a full disk from others
            torch.save({"settings": self.settings, "state": dict(state)}, content)
            with whole(self.path) as part:
                part.write_bytes(content.getbuffer())


def _read(data: bytes) -> dict[str, Any]:
    """Return the content of a file that :func:`torch.save` wrote; raise any exception if it is another."""
    # torch would also read files that are no zip archives, which may run code up to torch 2.5.
    if not data.startswith(_ZIP):
        raise ValueError("not a file that torch.save writes")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # torch compresses nothing: what is larger than the file would take memory out of proportion.
        if sum(part.file_size for part in archive.infolist()) > len(data):
            raise ValueError("its parts are larger than the file")
        if damaged := archive.testzip():  # torch compares no checksums
            raise ValueError(f"{Path(damaged).name} in it is not what was written")
    try:
        return dict(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"))
    except pickle.UnpicklingError as error:
        # torch's message advises to read the file without weights_only, which would run what is in it.
        raise ValueError("it holds something else than tensors, numbers and texts") from error


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
            changed.append(f"{name}={_brief(before)}, not {_brief(after)}")
    return changed


def _brief(value: Any) -> str:
    """Return a value for a message."""
    text = repr(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."


def _close(before: Any, after: Any) -> bool:
    """Are two lists of numbers the same up to what processors round differently?"""
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        return False
    return all(map(is_number, [*before, *after])) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for a, b in zip(before, after, strict=True)
    )
