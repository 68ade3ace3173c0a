"""Where the benchmarks' records are, what keeps a partial run off them, and how a score is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.resolve() / "results"
SCORES = ("linear 1%", "linear 10%", "linear 100%", "kNN")


def apart(out: Path, work: Path = Path("runs")) -> Path:
    """The same path below ``work`` if it is one of the records or their folder, which are of whole benchmarks only; else ``out``."""
    where = out.resolve()
    return work / where.relative_to(RESULTS) if where.is_relative_to(RESULTS) else out


def write(record: dict[str, Any], out: Path) -> Path:
    """Write it; where it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    return out


def shown(found: dict[str, Any], sign: str = "") -> str:
    """``83.1 ± 0.4``: the mean, and half of its 95 % interval if there are seeds enough."""
    return f"{found['mean']:{sign}.1f}" + ("" if found["half"] is None else f" ± {found['half']:.1f}")
