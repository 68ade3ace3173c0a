"""The benchmarks run, and their records say what their own functions make of the data."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from record import RESULTS, off_the_records

ROOT = Path(__file__).parents[1]


def test_impact_runs_and_takes_up_what_is_there(tmp_path: Path) -> None:
    options = [
        "--generators",
        "fashion",
        "--methods",
        "sweep",
        "--seeds",
        "1",
        "--quick",
        "--work",
        str(tmp_path / "cells"),
    ]
    seconds = []
    for more in ([], ["--collect"]):
        out = tmp_path / "impact.json"
        command = [sys.executable, "benchmarks/impact.py", *options, *more, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        (cell,) = json.loads(out.read_text())["cells"]
        assert [row["level"] for row in cell["rows"]] == ["0", "1", "2", "3"]
        seconds.append(cell["seconds"])
    assert seconds[0] == seconds[1], "the second call measured nothing"


def test_a_partial_run_stays_off_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for record in (RESULTS / "impact.json", Path("benchmarks/results/impact.json")):
        assert off_the_records(record, tmp_path) == tmp_path / "impact.json"
    assert off_the_records(RESULTS, tmp_path) == tmp_path
    assert off_the_records(RESULTS / "long") == Path("runs/long")
    assert off_the_records(tmp_path / "impact.json") == tmp_path / "impact.json"


def test_the_agreement_on_record_is_that_of_its_cells() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "impact.json").read_text())
    agreement = runpy.run_path(str(ROOT / "benchmarks" / "impact.py"))["agreement"]
    for name, correlations in record["agreement"].items():
        assert correlations == pytest.approx(
            agreement([cell for cell in record["cells"] if cell["generator"] == name])
        )
    assert len(record["agreement"]) == 2


def test_ranks_count_levels_that_never_reached_the_target_as_the_farthest() -> None:
    agreement = runpy.run_path(str(ROOT / "benchmarks" / "impact.py"))["agreement"]

    def cell(method: str, *means: float) -> dict[str, object]:
        rows = [
            {"distance_mean": abs(mean), "status": "under-used" if mean < 0 else "reached"} for mean in means
        ]
        return {"method": method, "rows": rows}

    correlations = agreement([cell("sweep", 1, 3, 9), cell("walker", 1, 4, -2)])
    assert correlations["between methods"] == pytest.approx(1)
    assert agreement([cell("sweep", 1, 3, 9), cell("walker", 1, -4, -2)])["between methods"] == pytest.approx(
        0.866, abs=1e-3
    )
