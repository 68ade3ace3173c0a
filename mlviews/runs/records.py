"""What the record of a run says about where it came from."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlviews._version import __version__

_ROOT = Path(__file__).resolve().parents[2]  # of the checkout, if this is one


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return versions and machine: the processor, its cores, the threads that torch uses, the run's device.

    In a checkout of this project the versions include its commit, with a ``+`` where files differed from it.
    """
    versions = {"mlviews": __version__, "torch": torch.__version__, "python": platform.python_version()}
    commit = _commit(_ROOT)
    if commit is not None:
        versions["commit"] = commit
    machine = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    return {"versions": versions, "machine": machine}


def set_aside(
    record: Path, new: Mapping[str, Any], settings: Collection[str], companions: Sequence[Path]
) -> list[Path]:
    """Rename a folder's record, and the files that belong to it, if it is of a run with other settings.

    ``result.json`` becomes ``result-1.json``, or has the first number that no file has yet. A file there that
    is no record is renamed too: it may be someone's.

    Args:
        record: the record's path; nothing is done where there is none.
        new: what will be written there.
        settings: the keys that tell runs apart.
        companions: the paths of the files that belong to the record.

    Returns:
        The new paths; none if nothing was renamed.
    """
    if not record.exists():
        return []
    try:
        old = json.loads(record.read_text())
        if all(old[key] == new[key] for key in settings):
            return []
    except (ValueError, LookupError, TypeError):
        pass
    files = [path for path in (*companions, record) if path.exists()]
    for number in itertools.count(1):
        names = [path.with_name(f"{path.stem}-{number}{path.suffix}") for path in files]
        if not any(name.exists() for name in names):
            break
    return [path.rename(name) for path, name in zip(files, names, strict=True)]


def _commit(root: Path) -> str | None:
    """Return the commit checked out in this very folder; None if it is no checkout, or inside another one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
