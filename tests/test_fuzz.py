"""A short piece of tests/fuzz.py, which is for thousands of files by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_damaged_files_of_every_layout() -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--count", "90", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    assert lines[-2].startswith("all")
    assert lines[-1].startswith("0 findings")
    assert all("refused" in line for line in lines[:-1])
