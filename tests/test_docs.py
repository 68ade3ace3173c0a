from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import external

import mlviews

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if path.relative_to(ROOT).parts[0] != "runs"
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


SHORTER = {  # than on the pages
    "60_000": "256",
    "2_560": "256",
    "range(100)": "range(1)",
    '"cuda"': '"cpu"',
    "target_loss=0.7": (
        "target_loss=0.7, steps=10, train_pairs=4, pairs=8, "
        "evaluations=2, monte_carlo=500, width=8, progress=False"
    ),
}


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("README.md", 9),
        ("mlviews/generators/README.md", 1),
        ("mlviews/generators/WRITING.md", 5),
        ("mlviews/impact/README.md", 1),
        ("mlviews/latents/README.md", 3),
        ("mlviews/sharing/README.md", 1),
    ],
)
def test_examples_run(page: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks run in order, as one session, at a size that takes seconds.

    Weights that they name are small files of the same layouts.
    """
    external("stylegan2-cars", tmp_path / "stylegan2-car-config-f.pkl")
    external("bigbigan", tmp_path / "BigBiGAN_x1.pth")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == count
    session: dict[str, Any] = {"mlviews": mlviews}
    for block in blocks:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(block, session)
    if page.endswith("impact/README.md"):
        assert len(session["report"].impacts) == 4
        assert Path("runs/impact/report.html").exists()
        assert len(next(iter(session["source"]))) == 2
    elif page.endswith("latents/README.md"):
        assert session["moved"].images(mlviews.load_generator("fashion")).shape == (1, 7, 4, 1, 32, 32)
        assert session["classes"].shape == (4,)
    elif page == "README.md":
        assert tuple(session["anchor"].shape) == (256, 3, 28, 28)
        assert [assignment.levels for assignment in session["source"].assignments] == [(0,), (1,), (2,), (3,)]
    elif page.endswith("sharing/README.md"):
        z = session["g"].sample_latents(range(1))
        assert torch.equal(session["copy"](z), session["g"](z))
    elif page.endswith("WRITING.md"):  # its blocks hold their own assertions
        assert len(session["report"].impacts) == 3
    else:
        assert tuple(session["x"].shape) == (8, 3, 128, 128)


@pytest.mark.parametrize("name", ["generators.base", "transforms", "source"])
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"mlviews.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_table_is_found() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = (ROOT / "README.md").read_text()
    assert tables["render"](text) == text
    stale = text.replace("| kNN |", "| kMM |")
    assert stale != text
    assert tables["render"](stale) == text


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text())
    missing = []
    for target, anchor in links:
        file = page.parent / target if target else page
        if target.startswith("http"):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append((target, anchor))
    assert missing == []


def test_overhead_script(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/overhead.py",
        "--batch-size",
        "4",
        "--steps",
        "10",
        "--out",
        str(tmp_path / "overhead.json"),
    ]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "All but the generator and T_x" in out
    assert '"overhead_of_generator"' in (tmp_path / "overhead.json").read_text()


def test_profile_of_a_step(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    command = [
        sys.executable,
        "benchmarks/profile_step.py",
        "--batch-size",
        "2",
        "--turns",
        "1",
        "--out",
        str(file),
    ]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "of the limit" in out
    record = json.loads(file.read_text())
    assert 0.1 < record["gflop"]["generator"] < record["gflop"]["encoder"]
    assert "generator" not in record["median_ms"]["shown again"]
    assert record["median_ms"]["shown again"]["samples kept"] > 0
