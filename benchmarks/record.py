"""Where the benchmarks' records are, what goes into all of them, and how a score is shown."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import weights

RESULTS = Path(__file__).parent.resolve() / "results"
SCORES = ("linear 1%", "linear 10%", "linear 100%", "kNN")


def off_the_records(out: Path, work: Path = Path("runs")) -> Path:
    """Return ``out``, unless it is a record or the records' folder: then the same path below ``work``.

    The records are of whole benchmarks only; a partial run must not write there.
    """
    path = out.resolve()
    return work / path.relative_to(RESULTS) if path.is_relative_to(RESULTS) else out


def command(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return the line that runs a script of this folder, with this process' arguments if none are given."""
    return shlex.join(["python", f"benchmarks/{script}", *(sys.argv[1:] if arguments is None else arguments)])


def write(record: dict[str, Any], out: Path) -> Path:
    """Write a record as JSON, and return where it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    return out


def publish(record: dict[str, Any], out: Path, *tables: str, generators: Sequence[str] = ()) -> None:
    """Print tables, write the record that they are made of, and say where it is.

    Args:
        record: what was measured.
        out: the file.
        tables: what is printed.
        generators: the bundled generators that this process measured, not an earlier one: the record gets the
            SHA-256 of their files.
    """
    named = [name for name in generators if name in weights.versions()]
    if named:
        record = record | {"weights": weights.bundled(*named)}
    print(*tables, write(record, out), sep="\n\n")


def with_interval(score: dict[str, Any], sign: str = "") -> str:
    """Return ``83.1 ± 0.4``: the mean, and half of its 95 % interval if there are seeds enough."""
    mean = f"{score['mean']:{sign}.1f}"
    return mean if score["half"] is None else f"{mean} ± {score['half']:.1f}"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, and half the width of its 95 % interval by Student's t; None of a single value."""
    half = None
    if len(values) > 1:
        from scipy import stats  # only here: gpu.py runs on the base install, which has no scipy

        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        half = round(quantile * statistics.stdev(values) / len(values) ** 0.5, 2)
    return {"mean": round(statistics.fmean(values), 2), "half": half, "seeds": len(values)}


def intervals(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the interval of every score over the seeds."""
    return {name: interval([scores[name] for scores in of_seeds]) for name in of_seeds[0]}


def paired_differences(
    minuend: Mapping[int, Mapping[str, float]], subtrahend: Mapping[int, Mapping[str, float]]
) -> list[dict[str, float]]:
    """Return the differences of every score, of the seeds that both have."""
    return [
        {name: score - subtrahend[seed][name] for name, score in minuend[seed].items()}
        for seed in sorted(minuend.keys() & subtrahend.keys())
    ]
