"""Run the core's tests with other versions of Python and torch, a cell of the table at a time.

``python benchmarks/versions.py --python ENVIRONMENT/bin/python``: the environment holds the wheel's core
dependencies and pytest, scipy and torchvision, and not mlviews itself, which is this checkout's:

    python3.12 -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch==2.4.0 torchvision==0.19.0 pytest scipy WHEEL
    ENVIRONMENT/bin/pip uninstall mlviews

A cell that ran before is replaced in the record.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from record import RESULTS, command, publish

from mlviews.runs.records import environment

ROOT = Path(__file__).resolve().parents[1]
SELECTION = (
    "samples", "sampling", "perturb", "infonce", "transforms", "source", "reuse", "images", "latents",
    "checkpoints", "own_files", "stylegan2", "nvae",
)  # fmt: skip
"""The test files of the core that need no extra: what a seed stands for, the loader, and reading weights."""

PACKAGES = ("torch", "numpy", "kornia", "safetensors", "pandas", "pydantic", "omegaconf", "matplotlib")
"""The packages whose versions a cell names."""

_FACTS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def run(python: Path) -> dict[str, Any]:
    """Return the cell of an environment: versions, counts of tests, and seconds."""
    facts = subprocess.run([python, "-c", _FACTS, *PACKAGES], capture_output=True, text=True, check=True)
    files = [f"tests/test_{name}.py" for name in SELECTION]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        words = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        completed = subprocess.run(
            words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )
        if not report.is_file():
            raise SystemExit(f"{python} ran no test:\n{completed.stdout}{completed.stderr}")
        counts = ElementTree.parse(report).getroot().find("testsuite")
    assert counts is not None
    numbers = {name: int(counts.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = numbers["failures"] + numbers["errors"]
    return {
        "versions": json.loads(facts.stdout),
        "passed": numbers["tests"] - bad - numbers["skipped"],
        "failed": bad,
        "skipped": numbers["skipped"],
        "problems": re.findall(r"^(?:FAILED|ERROR) (\S+)", completed.stdout, re.MULTILINE),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """Run a cell, and put it into the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment")
    parser.add_argument("--out", type=Path, default=RESULTS / "versions.json", help="the record")
    arguments = parser.parse_args()
    cell = run(arguments.python)
    record = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"cells": []}
    cells = [other for other in record["cells"] if _key(other) != _key(cell)]
    script = command("versions.py", ["--python", "ENVIRONMENT/bin/python"])
    facts = {"command": script, "selection": list(SELECTION), **environment()}
    record = {**facts, "cells": sorted([*cells, cell], key=_key)}
    counts = ", ".join(f"{cell[count]} {count}" for count in ("passed", "failed", "skipped"))
    line = f"{cell['versions']}: {counts}"
    publish(record, arguments.out, line, *cell["problems"])


def _key(cell: dict[str, Any]) -> list[list[int]]:
    """Return what tells a cell from others, in the order of the table: its Python and its torch."""
    versions = [cell["versions"][name].partition("+")[0] for name in ("python", "torch")]
    return [[int(number) for number in version.split(".")] for version in versions]


if __name__ == "__main__":
    main()
