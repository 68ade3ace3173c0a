from __future__ import annotations

import doctest
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.rglob("README.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def test_readme_examples_run() -> None:
    """The Python blocks run in order, as one session, at a size that takes seconds."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    session: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("60_000", "256").replace("range(100)", "range(1)"), session)
    assert tuple(session["anchor"].shape) == (256, 3, 28, 28)  # type: ignore[attr-defined]
    assert len(session["source"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["generators.base", "transforms", "source"])
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"mlviews.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_table_is_found() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = (ROOT / "README.md").read_text()
    assert tables["render"](text) == text
    stale = text.replace("| kNN |", "| kMM |")
    assert stale != text
    assert tables["render"](stale) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if not target.startswith("http") and not (page.parent / target).exists()]
    assert missing == []


def test_overhead_script(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/overhead.py", "--batch-size", "4", "--steps", "10", "--out", str(tmp_path / "overhead.json")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "all but generator and T_x" in out
    assert '"overhead_of_generator"' in (tmp_path / "overhead.json").read_text()
