"""The paper's experiments: their files fit the schema, and every line is one that its program accepts."""

from __future__ import annotations

import runpy
import shlex
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import typer
from conftest import external
from documents.paper import RESNET50
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from paper.run import EXPERIMENTS, SCALES, SOLO_LEARN, Command, Experiment, lines, load, main, on_record, read
from typer.testing import CliRunner

from mlviews.cli import app
from mlviews.config import load_config, source_arguments
from mlviews.integrations.solo_learn import __main__ as launcher
from mlviews.integrations.solo_learn.views import Views
from mlviews.transforms import simclr

ROOT = Path(__file__).parents[1]
KINDS = {
    "BigBiGAN_x1.pth": "bigbigan",
    "stylegan2-car-config-f.pkl": "stylegan2-cars",
    "nvae-cifar10.ckpt": "nvae",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small files of the layouts that the experiments need."""
    folder = tmp_path_factory.mktemp("weights")
    return {name: str(external(kind, folder / name)) for name, kind in KINDS.items()}


# -- the files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_file_fits_the_schema(name: str, weights: dict[str, str]) -> None:
    experiment = load(name)
    for claim in experiment.claims:
        assert not claim.of or set(claim.rows) <= experiment.figures[claim.of].keys()
    encoders = experiment.paper.encoders
    for row, view in (encoders.views if encoders else {}).items():
        assert "transform" in load_config(view)
        if "learned" not in row:  # walkers are trained by the experiment itself
            source_arguments({**view, "weights": weights[encoders.weights]})


def test_no_file_is_left_out() -> None:
    assert sorted(path.stem for path in (ROOT / "benchmarks/paper").glob("*.yaml")) == sorted(EXPERIMENTS)
    assert load("appendix-f") == load("table4")


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid table9, claims: 'clam' is unknown or missing; its keys are"
    ):
        read(
            Experiment,
            {"claims": [{"clam": "x"}]} | dict.fromkeys(("title", "section", "figures", "paper", "fashion")),
            "table9",
        )
    with pytest.raises(ValueError, match=r"Invalid table9: 'section' is unknown or missing"):
        read(Experiment, {"title": "x"}, "table9")
    with pytest.raises(ValueError, match="Unknown experiment 'table9'"):
        load("table9")


def test_the_settings_are_the_papers() -> None:
    """Appendix D, next to what the presets say."""
    for name, batch, devices, epochs in (("table2", 1024, 4, 60), ("table3", 512, 8, 100)):
        plan = load(name).paper
        assert plan.encoders is not None
        assert plan.classifier is not None
        encoders = plan.encoders
        assert (encoders.batch_size, encoders.devices, encoders.epochs) == (batch, devices, 100)
        assert (encoders.learning_rate, encoders.weight_decay) == (0.05, 1e-4)
        assert encoders.warmup_epochs == (10 if batch >= 1024 else 0)
        assert plan.classifier.epochs == epochs
        assert (plan.classifier.batch_size, plan.classifier.learning_rate) == (256, 30.0)
        for row, view in encoders.views.items():
            assert load_config(view)["transform"] == {"name": "simclr", "size": 112, "color": "ML" not in row}
    bigbigan, cars = (
        load_config(load(f"table{number}").paper.encoders.views["ML random"]) for number in (2, 3)
    )
    assert bigbigan["num_samples"] == 1_281_167
    assert cars["num_samples"] == 893_000
    assert bigbigan["anchor"] == {"std": 1.0, "truncation": 2.0}
    assert cars["anchor"] == {"std": 1.0, "truncation": 0.9}
    assert bigbigan["perturb"] == {0: "fixed", "1:": {"name": "normal", "std": 1.0, "truncation": 2.0}}
    assert [(noise["std"], noise["truncation"]) for noise in cars["perturb"].values()] == [
        (0.2, 1),
        (0.1, 1),
        (0.8, 1),
    ]
    stds = [load_config(view)["perturb"].get("std") for view in load("table4").paper.encoders.views.values()]
    assert stds == [0.05, 0.1, 0.15, None]


def test_fashion_commands_have_their_records() -> None:
    commands = [command for name in EXPERIMENTS for command in load(name).fashion.commands]
    assert {command.record for command in commands if not on_record(command)} == set()
    other = Command("python benchmarks/probe.py", options={"data": "DIR", "steps": 9}, record="probe")
    assert not on_record(other)


def test_the_weights_of_a_resnet50() -> None:
    with torch.device("meta"):
        backbone = torchvision.models.resnet50()
    assert sum(value.numel() for name, value in backbone.named_parameters() if "fc" not in name) == RESNET50


# -- the lines -----------------------------------------------------------------------------------------------


def as_app(main: Any) -> typer.Typer:
    """A script's function, as `typer.run` takes it."""
    script = typer.Typer()
    script.command()(main)
    return script


@cache
def program(script: str) -> Any:
    """The parser of a script of ours."""
    return typer.main.get_command(as_app(runpy.run_path(str(ROOT / script))["main"]))


def solo_learn(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that solo-learn would get from the launcher's words."""
    script = next(word for word in words if word.endswith(".py"))
    (tmp_path / script).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launcher", *words])
    _, _, arguments = launcher._arguments()
    assert arguments[0::2][:2] == ["--config-path", "--config-name"]
    module = arguments[1].removeprefix("pkg://")
    with initialize_config_module(module, version_base="1.2"):
        return compose(arguments[3], arguments[4:])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_line_is_one_that_its_program_accepts(
    name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = getattr(load(name), scale)
    texts = lines(name, plan)
    assert texts
    for text in texts:
        words = shlex.split(text)
        if text.startswith(SOLO_LEARN):
            config = solo_learn(words[3:], tmp_path, monkeypatch)
            assert OmegaConf.missing_keys(config) == set()
            assert config.optimizer.batch_size * len(config.devices) in (plan.encoders.batch_size, 256)
        elif words[0] == "mlviews":
            group: Any = typer.main.get_command(app)
            group.commands[words[1]].make_context(words[1], words[2:])
        else:
            assert words[0] == "python"
            program(words[1]).make_context(words[1], words[2:])


def test_a_training_line_makes_the_rows_views(
    weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What solo-learn is told becomes the preset's source, with the preset's T_x."""
    texts = lines("table2", load("table2").paper)
    chosen = {word: shlex.split(next(text for text in texts if f"name={word} " in text)) for word in
              ("table2-simclr-ml-random", "table2-simsiam-random", "table2-simsiam-real")}  # fmt: skip
    configs = {run: solo_learn(words[3:], tmp_path, monkeypatch) for run, words in chosen.items()}
    for run, color, pool in (
        ("table2-simclr-ml-random", False, True),
        ("table2-simsiam-random", True, False),
    ):
        config = configs[run]
        config.data.mlvgm.weights = weights["BigBiGAN_x1.pth"]
        views = Views(config)
        assert views.arguments["transform"] == simclr(112, color=color)
        assert views.arguments.get("pool", False) is pool
        source = views.source(2)
        assert source.num_samples == 1_281_167
        assert (
            [assignment.levels for assignment in source.assignments] == [(0, 1, 2, 3, 4, 5)]
            if color
            else True
        )
    real = configs["table2-simsiam-real"]
    assert "mlvgm" not in real.data
    assert (real.data.format, real.data.train_path) == ("image_folder", "imagenet/train")
    assert real.augmentations[0].color_jitter.prob == 0.8


def test_the_runner_prints_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run = partial(CliRunner().invoke, as_app(main))
    printed = run(["table1", "--scale", "paper", "--dry-run"])
    assert printed.exit_code == 0
    assert printed.output.splitlines()[1].startswith("# needs BigBiGAN_x1.pth: ")
    commands = [line for line in printed.output.splitlines() if line[0] != "#"]
    assert commands == lines("table1", load("table1").paper)
    refused = run(["table1", "--scale", "paper"])
    assert refused.exit_code == 2
    assert "Not in this folder: BigBiGAN_x1.pth" in refused.output
    skipped = run(["figure5"])
    assert skipped.exit_code == 0, "its record is committed, so that it needs no data"
    assert "# on record: benchmarks/results/loaders.json" in skipped.output
    again = run(["figure5", "--again"])
    assert again.exit_code == 2
    assert "The command needs DIR" in again.output
    failed = run(["figure5", "--again", "--data", "no such folder"])  # benchmarks/ is not here
    assert failed.exit_code
    assert "python benchmarks/loaders.py --data 'no such folder'" in failed.output
