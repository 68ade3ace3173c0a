"""``benchmarks/gpu.py`` on a CPU: the same code with tiny networks; and its tables."""

from __future__ import annotations

import json
import runpy
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import pytest
import torch
from documents import TABLES
from documents import common as documents_common
from documents.gpu import ABSENT, gpu_checks, gpu_loaders, gpu_overlap, gpu_speed

ROOT = Path(__file__).parents[1]
FEW = ("fashion, 32 px", "biggan-deep, 128 px", "diffusion UNet, 32 px, 4 steps")


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the networks, to be quick."""
    for name in networks.NETWORKS.keys() - set(FEW):
        monkeypatch.delitem(networks.NETWORKS, name)


def test_all_sections_run_on_a_cpu(
    gpu: dict[str, Any], few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = gpu["importlib"].util.find_spec
    monkeypatch.setattr(
        gpu["importlib"].util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name)
    )
    out = tmp_path / "gpu.json"
    sections = "device,equal,speed,loaders,overlap"
    gpu["main"]("cpu", seconds=1000, sections=sections, data=None, work=tmp_path, out=out, compiled="")
    record = json.loads(out.read_text())
    assert record["card"] == {"name": "cpu"}

    assert len(record["device"]["rows"]) == len(gpu["settings"]()) + 2
    assert {row["problem"] for row in record["device"]["rows"]} == {""}
    assert record["equal"]["rows"][0]["images, float32"] == 0
    speeds = record["speed"]
    assert [row["network"] for row in speeds["rows"]] == list(FEW[:2])
    assert min(row["pairs_per_s"] for row in speeds["rows"]) > 0
    assert speeds["left_out"] == [f"{FEW[2]}: diffusers is not installed"]
    loaders = {row["loader"]: row for row in record["loaders"]["rows"]}
    assert list(loaders) == ["torch", "mlviews, reuse=1", "mlviews, reuse=4"]
    for row in loaders.values():
        total = (row["waiting_ms"] + row["training_ms"]) * row["samples_per_s"] / 1e3
        assert total == pytest.approx(row["batch_size"], rel=0.01)
    (overlap,) = record["overlap"]["rows"]
    # Times of different minutes: on a busy machine either may be the longer one.
    assert min(overlap["one_stream_ms"], overlap["training_ms"]) > 0

    for table, text in (
        (gpu_checks, f"Steps looked at: {len(record['device']['rows'])}; the CPU says nothing of waits."),
        (gpu_speed, "| biggan-deep, 128 px | float32 | 4 |"),
        (gpu_loaders, "| fashion, 32 px | 4 | `mlviews, reuse=4` |"),
        (gpu_overlap, "hidden)"),
    ):
        assert text in table(record)
        assert "`python benchmarks/gpu.py" in table(record)


def test_the_tables_wait_for_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_common, "RESULTS", tmp_path)
    for name in ("gpu_checks", "gpu_speed", "gpu_loaders", "gpu_overlap"):
        assert TABLES[name]() == ABSENT
    facts = {"card": {"name": "card", "memory_mib": 8}, "versions": {"torch": "2"}, "command": "gpu.py"}
    (tmp_path / "gpu.json").write_text(json.dumps(facts))
    assert "card, 8 MiB; torch 2. Nothing was left out. Command: `gpu.py`." in TABLES["gpu_speed"]()


def test_a_section_ends_with_its_time(gpu: dict[str, Any]) -> None:
    clock = gpu["Clock"](0.05)
    for _ in clock.within(["first", "second", "third"]):
        time.sleep(0.06)
    assert clock.left_out == ["second", "third"]
    assert clock.left == 0


def test_a_step_that_leaves_the_device_or_waits_is_seen(gpu: dict[str, Any]) -> None:
    def step() -> torch.Tensor:
        raise RuntimeError("called a synchronizing CUDA operation\nat")

    device = torch.device("cuda", 0)
    steps = [[(torch.zeros(1), torch.zeros(1)), (torch.zeros(1),)]]
    gpu["watched_step"].__globals__["waits_are_errors"] = lambda device: gpu["contextlib"].nullcontext()
    assert gpu["watched_step"](steps[0], device) == "tensors on cpu"
    waiting = (step() if number else torch.zeros(1) for number in range(2))
    assert gpu["watched_step"](waiting, device) == "called a synchronizing CUDA operation"


def test_compiled_networks_are_ended_when_their_time_is_up(
    gpu: dict[str, Any], few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def process(arguments: list[str], *, timeout: float, **_: Any) -> SimpleNamespace:
        calls.append(arguments[-1])
        if len(calls) == 1:
            return SimpleNamespace(returncode=0, stdout='noise\n{"pairs_per_s": 3.0}\n', stderr="")
        if len(calls) == 2:
            return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no compiler")
        time.sleep(timeout)
        raise subprocess.TimeoutExpired(arguments, timeout)

    monkeypatch.setattr(subprocess, "run", process)
    clock, run = gpu["Clock"](0.2), gpu["Run"](torch.device("cpu"), True, None, Path())
    first, second = gpu["compiled"](run, clock)
    assert first["pairs_per_s"] == 3.0
    assert second["problem"] == "RuntimeError: no compiler"
    assert len(calls) == 3
    assert clock.left_out[0].endswith("not compiled and timed before the section's time was up")
    assert len(clock.left_out) == 4, "and the cases after it"


def test_a_configuration_of_stylegan3_fits_together() -> None:
    """The layers of configuration t end at the image's size, whatever it is."""
    for side, layers in ((16, 6), (256, 14), (1024, 14)):
        config = networks.stylegan3(side, layers)
        assert config.resolution == (side, side)
        assert len(config.layers) == layers
    first, *_, last = networks.stylegan3(256, base=16384).layers
    assert (first.channels, last.channels) == (512, 64)
