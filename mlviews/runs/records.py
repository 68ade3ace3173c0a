"""What a record of a run says about where it came from."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from mlviews._version import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions and machine: processor, number of cores, threads that torch uses, and the device of the run.

    In a checkout of this project also its commit, with a ``+`` where files differed from it.
    """
    commit = _commit(Path(__file__).resolve().parents[1])
    return {
        "versions": {"mlviews": __version__, "torch": torch.__version__, "python": platform.python_version()}
        | ({} if commit is None else {"commit": commit}),
        "machine": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(device),
        },
    }


def _commit(root: Path) -> str | None:
    """The commit checked out in this very folder; None if it is no checkout, or lies inside another project's."""
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
