"""The two benchmarks of views run, their statistics are right, and their records are those of their cells."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import feeds
import numpy as np
import pytest
import torch
import weights
from record import SCORES, interval
from scipy import stats
from view_sources import PAIRS, SOURCES, TELLING, Borrowed, InFewDirections, generated

from mlviews import perturb
from mlviews.perturb import Walker

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "probe.py"))


@pytest.fixture(scope="module")
def loaders() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "loaders.py"))


def run(script: str, *options: str) -> str:
    process = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# -- probe ---------------------------------------------------------------------------------------------------


def test_probe_runs_and_takes_up_what_is_there(tmp_path: Path) -> None:
    options = [
        "--quick",
        "--steps",
        "2",
        "--labels",
        "200",
        "--work",
        str(tmp_path / "cells"),
        "--out",
        str(tmp_path),
    ]
    run("probe", *options, "--only", "raw pixels;ML random")
    first = json.loads((tmp_path / "probe.json").read_text())
    assert [cell["source"] for cell in first["cells"]] == ["raw pixels", "ML random"]
    for cell in first["cells"]:
        assert list(cell["scores"]) == ["linear 1%", "linear 10%", "linear 100%", "kNN"]
        assert all(10 < score < 100 for score in cell["scores"].values()), "above chance"
    assert (tmp_path / "probe.png").stat().st_size > 1000
    run("probe", *options, "--only", "ML random;raw pixels;real")
    second = {cell["source"]: cell for cell in json.loads((tmp_path / "probe.json").read_text())["cells"]}
    assert second["ML random"] == first["cells"][1], "kept, not measured again"
    assert set(second) == {"raw pixels", "real", "ML random"}


SHA256 = weights.bundled(*weights.versions())


@pytest.mark.parametrize(
    "facts", [[499, 64, 10_000, False, SHA256], [500, 64, 10_000, False, {"fashion": "0"}]]
)
def test_cells_of_another_budget_or_of_other_weights_are_not_mixed(facts: list[Any], tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text(json.dumps(facts))
    command = [sys.executable, "benchmarks/probe.py", "--collect", "--work", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "another budget or of other settings" in re.sub(r"[│\s]+", " ", process.stderr)  # a box of rich's


def test_the_interval_is_students() -> None:
    values = [80.0, 82.0, 81.5]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert interval(values) == {
        "mean": 81.17,
        "half": pytest.approx((high - low) / 2, abs=0.01),
        "seeds": 3,
    }
    assert interval([80.0]) == {"mean": 80.0, "half": None, "seeds": 1}


def test_differences_are_of_the_same_seeds(probe: dict[str, Any]) -> None:
    def cell(source: str, seed: int, score: float) -> dict[str, Any]:
        return {
            "method": "simclr",
            "source": source,
            "seed": seed,
            "scores": dict.fromkeys(probe["SCORES"], score),
        }

    cells = [cell("ML random", 0, 84), cell("ML random", 1, 86), cell("none", 0, 80), cell("none", 2, 99)]
    (difference,) = probe["summarise"](cells)["differences"]
    assert (difference["of"], difference["less"]) == ("ML random", "none")
    assert difference["scores"]["kNN"] == {"mean": 4, "half": None, "seeds": 1}


def test_every_named_source_can_be_made() -> None:
    for name, source in SOURCES.items():
        if source.config and source.group != "quality":  # which wants a generator that is trained first
            count = 4 * source.config.get("reuse", 1)  # enough that no step shows a sample twice
            views = next(iter(generated({**source.config, "num_samples": count}, batch_size=2)))
            assert len(views) == 2, name
    names = set(SOURCES)
    assert {name for pair in PAIRS for name in pair} | set(TELLING) <= names


def test_borrowed_shifts_are_the_walkers_of_other_anchors() -> None:
    walker = Walker(4)
    with torch.no_grad():
        walker.net[0].weight.normal_(generator=torch.Generator().manual_seed(0))
    z, fresh = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).unbind()
    (moved,) = Borrowed(walker)([z], [fresh])
    torch.testing.assert_close(moved - z, walker.net(fresh))
    sources = [
        generated(SOURCES[name].config | {"num_samples": 4}, batch_size=4)
        for name in ("ML borrowed, crop", "ML learned")
    ]
    (anchors, borrowed), (same, learned) = (next(iter(source)) for source in sources)
    assert torch.equal(anchors, same)
    assert not torch.allclose(borrowed, learned, atol=0.1)


def test_noise_in_few_directions_keeps_its_mean_square() -> None:
    noise = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0)).unbind()
    perturber = InFewDirections(perturb.Normal(std=1.0))
    moved = torch.cat(list(perturber([torch.zeros(4096, 16)] * 2, noise)), dim=1)
    assert torch.linalg.matrix_rank(moved) == 4
    assert float(moved.square().mean()) == pytest.approx(1.0, rel=0.05)
    again = torch.cat(list(perturber([torch.ones(1, 16)] * 2, [values[:1] for values in noise])), dim=1)
    torch.testing.assert_close(again - 1, moved[:1])


@pytest.mark.parametrize("folder", ["", "long", "reuse", "reuse-long"])
def test_the_summary_on_record_is_that_of_its_cells(probe: dict[str, Any], folder: str) -> None:
    record = json.loads((RESULTS / folder / "probe.json").read_text())
    assert json.loads(json.dumps(probe["summarise"](record["cells"]))) == record["summary"]


def test_with_reuse_a_training_is_a_whole_epoch(
    probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    parts = probe["measure"].__globals__
    monkeypatch.setitem(parts, "train", lambda views, *_, **__: (sources.append(views), []))
    monkeypatch.setitem(parts, "evaluate", lambda *_: SimpleNamespace(linear={1: 0, 2: 0, 3: 0}, knn=0))
    for name in ("reuse 4", "ML random"):
        probe["measure"]("simclr", name, 0, probe["Budget"](500, 64, 100, None))
    reusing, endless = sources
    assert (reusing.reuse, reusing.num_samples) == (4, 32_000), "each sample is shown four times"
    assert (endless.reuse, endless.num_samples) == (1, 60_000)


# -- loaders -------------------------------------------------------------------------------------------------


def test_loaders_run(tmp_path: Path) -> None:
    out = run(
        "loaders",
        "--quick",
        "--loaders",
        "torch,mlviews",
        "--reuse",
        "1,4",
        "--work",
        str(tmp_path / "files"),
        "--out",
        str(tmp_path),
    )
    assert "median (range) of 1 rounds" in out
    record = json.loads((tmp_path / "loaders.json").read_text())
    reuses = {row.get("reuse") for row in record["rows"]} - {None}
    shown = len(reuses)
    assert [(row["loader"], row["batch_size"]) for row in record["rows"]] == [
        ("torch", 8),
        *[("mlviews", 8)] * shown,
        ("torch", 16),
        *[("mlviews", 16)] * shown,
    ]
    assert reuses >= {1, 4}
    assert [row["batch_size"] for row in record["reuse"]] == [8, 16]
    for row in record["rows"]:
        assert row["data_s"]["median"] > 0
        assert row["step_s"]["median"] == pytest.approx(
            row["data_s"]["median"] + row["training_s"]["median"], abs=1e-3
        ), "of one round"
        assert row["cpu_s"]["median"] > 0
    assert all(disk["peak"]["host_mib"] > 100 for disk in record["disk"])
    unique = {row["loader"]: (row["images"], row["different"]) for row in record["unique"]}
    assert unique["mlviews"] == (4 * 64, 4 * 64), "two views of 64 samples in two epochs, none twice"
    assert unique["torch"][0] == 2 * 64 >= 2 * unique["torch"][1], "the same files in every epoch"
    assert (tmp_path / "loaders.png").stat().st_size > 1000


def test_a_loader_that_falls_behind_is_seen(loaders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes 60 ms a batch, and a training that takes 20: 40 ms of waiting, whatever the queue
    held at first.
    """
    case = loaders["Case"]("torch", 32, 1, "cpu", workers=1, folder=Path(), threads=1)

    class Slow(torch.utils.data.Dataset[int]):
        def __getitem__(self, index: int) -> int:
            time.sleep(0.06)
            return index

        def __len__(self) -> int:
            return 1000

    def feed(case: Any, steps: int) -> Any:
        return iter(torch.utils.data.DataLoader(torch.utils.data.Subset(Slow(), range(steps)), num_workers=1))

    monkeypatch.setitem(feeds.FEEDS, "torch", feed)
    learner = SimpleNamespace(step=lambda batch: time.sleep(0.02))
    (part,) = loaders["time_round"](case, learner, 4, loaders["Meter"]("cpu", "ITA"))
    assert len(part.waiting) == len(part.training) == 4
    assert np.mean(part.training) == pytest.approx(0.02, abs=0.01)
    assert np.mean(part.waiting) == pytest.approx(0.04, abs=0.015)
    assert loaders["time_alone"](case, 4) == pytest.approx(0.06, abs=0.02)


def test_reuse_is_the_mean_of_steps_that_make_samples_and_that_show_them(loaders: dict[str, Any]) -> None:
    case = loaders["Case"]("mlviews", 32, 1, "cpu", workers=0, folder=Path(), threads=1)
    comparison = loaders["Comparison"]([case])
    fresh, again = (
        loaders["Round"]([waiting], [0.9], cpu, None) for waiting, cpu in ((0.6, 2.0), (0.01, 1.0))
    )
    comparison.figures[0].add(fresh, None)
    comparison.again.add(again, None)
    rows = {row["reuse"]: row for row in comparison.rows(1, [1, 4])}
    assert rows[1]["data_s"]["median"] == 0.6
    assert rows[4]["data_s"]["median"] == pytest.approx((0.6 + 3 * 0.01) / 4, abs=1e-4)
    assert rows[4]["cpu_s"]["median"] == 1.25
    assert comparison.reuse == 16, "(0.6 + 15 * 0.01) / 16 is the first below 5 % of that and 0.9"


def test_a_bigbigan_of_random_weights_makes_images() -> None:
    generator = feeds.generator(128)
    assert [level.shape for level in generator.levels] == [(20,)] * 6
    image = generator.decode([torch.randn(1, 20) for _ in range(6)])
    assert image.shape == (1, 3, 128, 128)
    assert image.isfinite().all()
    assert image.std() > 0.01


def test_a_cold_meter_says_why(loaders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders["importlib"].util, "find_spec", lambda name: None)
    meter = loaders["Meter"]("cpu", "ITA")
    assert meter.measure(lambda: 7) == (7, None)
    assert "codecarbon is not installed" in meter.why_not


def test_energy_is_codecarbons(loaders: dict[str, Any]) -> None:
    pytest.importorskip("codecarbon", reason="codecarbon is not installed (extra bench)")
    meter = loaders["Meter"]("cpu", "ITA")
    meter.why_not = ""
    result, used = meter.measure(lambda: sum(range(10**7)))
    assert result == sum(range(10**7))
    assert used["kwh"] > 0, "a second"
    assert used["co2_g"] > 0


# -- real images as anchors ----------------------------------------------------------------------------------


def test_real_anchors_are_compared_with_the_best_controls_seed_by_seed() -> None:
    real_anchors = runpy.run_path(str(ROOT / "benchmarks" / "real_anchors.py"))
    knn = {  # of seeds 0 and 1
        "real only, gentle": (80, 82),
        "real only, full": (79, 80),
        "real anchor, NVAE positive, gentle": (83, 84),
        "drawn anchors, GAN, no T_x": (85, 85),
    }
    cells = [
        {"arm": arm, "images": 60_000, "seed": seed, "scores": dict.fromkeys(SCORES, score)}
        for arm, scores in knn.items()
        for seed, score in enumerate(scores)
    ]
    summary = real_anchors["summarized"](cells)
    assert [row["arm"] for row in summary["rows"]] == list(knn)
    means = {(row["of"], row["less"]): row["scores"]["kNN"]["mean"] for row in summary["differences"]}
    assert means == {
        ("real anchor, NVAE positive, gentle", "real only, gentle"): 2.5,
        ("drawn anchors, GAN, no T_x", "real only, gentle"): 4.0,
        ("real anchor, NVAE positive, gentle", "drawn anchors, GAN, no T_x"): -1.5,
    }


def test_classes_that_a_generator_never_saw_are_counted_apart() -> None:
    unseen = runpy.run_path(str(ROOT / "benchmarks" / "unseen.py"))
    sneaker, bag = unseen["LEFT_OUT"]
    labels = torch.tensor([sneaker, sneaker, bag, 0, 1, 2])
    right = 100.0 * torch.tensor([True, False, True, True, False, False])
    assert unseen["by_group"](right, labels) == {"all": 50, "Sneaker": 50, "Bag": 100, "others": 33.333}
    assert unseen["of_classes"](labels, ()).sum() == 0, "a generator that sees all classes leaves none out"


def test_arms_with_unseen_classes_are_compared_seed_by_seed() -> None:
    unseen = runpy.run_path(str(ROOT / "benchmarks" / "unseen.py"))
    knn = dict(zip(unseen["ARMS"], ((80, 82), (83, 84), (81, 84), (84, 84), (79, 81)), strict=True))
    cells = [
        {"arm": arm, "seed": seed, "scores": {"kNN all": score}}
        for arm, scores in knn.items()
        for seed, score in enumerate(scores)
    ]
    summary = unseen["summarized"](cells)
    assert [row["scores"]["kNN all"]["mean"] for row in summary["rows"]] == [81, 83.5, 82.5, 84, 80]
    means = {(row["of"], row["less"]): row["scores"]["kNN all"]["mean"] for row in summary["differences"]}
    assert means["real anchor, positive by the NVAE of eight", "real only"] == 1.5
    assert means["drawn anchor, the NVAE of eight", "drawn anchor, the NVAE of all classes"] == -4
    assert len(means) == len(unseen["DIFFERENCES"])
