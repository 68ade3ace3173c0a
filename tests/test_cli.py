from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import mlviews
from mlviews.cli import app
from mlviews.perturb import Walker

run = CliRunner().invoke
COMMANDS = ("demo", "generators", "views", "probe", "impact", "walker", "inverter", "export")


def failing(*arguments: str) -> str:
    """What the installed command says on stderr when it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "mlviews.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command: str) -> None:
    out = run(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        assert parameter.opts[-1] in out
        assert parameter.help
    assert {parameter.name for parameter in parameters} >= (
        set() if command == "generators" else {"seed", "device", "out"}
    )
    assert command in run(app, ["--help"]).output


def test_without_a_command_it_says_what_there_is() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mlviews.cli"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert result.stderr == ""


def test_generators() -> None:
    out = run(app, ["generators"]).output
    assert "fashion" in out
    assert "1x32x32" in out
    assert "16x16  (16,)" in out


@pytest.mark.parametrize("preset", ["fashion-ml-random", "fashion-none"])
def test_views(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "views.png"
    result = run(app, ["views", "--preset", preset, "--out", str(path), "--anchors", "2", "--num-views", "3"])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_views_of_several_crops(tmp_path: Path) -> None:
    sizes = [{"name": "simclr", "size": size, "color": False} for size in (28, 28, 16, 16)]
    (tmp_path / "multi.yaml").write_text(
        json.dumps({"preset": "fashion-ml-random", "crops": [0, 1, 0, 1], "transform": sizes})
    )
    path = tmp_path / "views.png"
    for count in ("1", "3"):
        options = ["--out", str(path), "--anchors", "2", "--num-views", count]
        result = run(app, ["views", "--preset", str(tmp_path / "multi.yaml"), *options])
        assert result.exit_code == 0, result.output
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["simclr", "simsiam", "byol"])
def test_probe_trains_and_evaluates(method: str, tmp_path: Path) -> None:
    result = run(
        app,
        [
            "probe",
            "--steps",
            "3",
            "--batch-size",
            "8",
            "--labels",
            "500",
            "--method",
            method,
            "--out",
            str(tmp_path),
        ],
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "result.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "result.json", "views.png"]
    assert len(record["loss"]) == 3
    assert all(-1 <= loss < 10 for loss in record["loss"])
    assert set(record["scores"]) == {"raw pixels", "untrained encoder", "encoder trained on views"}
    for scores in record["scores"].values():
        assert 15 < scores["linear"]["0.01"] < scores["linear"]["1"] < 95
        assert 40 < scores["knn"] < 95
    assert record["training"]["method"] == method
    assert record["probe_images"] == 500
    assert "raw pixels" in result.output


def test_impact_prints_a_table_and_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"train_pairs": 4, "evaluations": 2, "width": 8}
    measure = mlviews.measure_impact
    monkeypatch.setattr(
        mlviews, "measure_impact", lambda *arguments, **options: measure(*arguments, **options, **small)
    )
    options = [
        "impact",
        "fashion",
        "--out",
        str(tmp_path),
        "--pairs",
        "8",
        "--steps",
        "10",
        "--monte-carlo",
        "500",
        "--target-loss",
        "0.5",
    ]
    result = run(app, options, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "Impact of the levels of fashion (sweep, target 0.5 nats)" in result.output
    assert {"report.html", "impact.json", "curves.png", "sweep.pt"} <= {
        path.name for path in tmp_path.iterdir()
    }
    report = mlviews.ImpactReport.load(tmp_path)
    assert (report.pairs, report.target_loss, len(report.impacts)) == (8, 0.5, 4)


def test_walker_takes_levels_and_anchors_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = mlviews.train_walker
    monkeypatch.setattr(
        mlviews,
        "train_walker",
        lambda *arguments, **options: train(*arguments, **options, warmup=25, width=8),
    )
    (tmp_path / "own.yaml").write_text("preset: fashion-ml-random\nanchor: {std: 0.5}\n")
    options = [
        "walker",
        "2:4",
        "--generator",
        str(tmp_path / "own.yaml"),
        "--out",
        str(tmp_path / "w"),
        "--steps",
        "1",
    ]
    result = run(
        app, [*options, "--pairs", "8", "--monte-carlo", "500", "--keep-norm"], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("under-used: ")
    moved = Walker.load(tmp_path / "w" / "walker.safetensors")
    assert moved.provenance["levels"] == [2, 3]
    assert moved.provenance["anchor"] == {"std": 0.5, "truncation": None, "mean": 0.0}
    assert moved.keep_norm


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    message = failing("views", "--preset", "fashion")
    assert message.startswith("mlviews: Unknown preset 'fashion'")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("views", "--anchors", "0"), "anchors"),
        (("views", "--bogus", "1"), "--bogus"),
        (("nothing",), "nothing"),
        (("impact", "fasion"), "Did you mean 'fashion'"),
        (("impact", "--method", "walk", "--out", "{tmp}"), "Invalid method='walk'"),
        (("impact", "--target-loss", "-1", "--out", "{tmp}"), "Invalid target_loss=-1.0"),
        (("walker", "4"), "Level '4' is out of range"),
        (("walker",), "Missing argument 'levels'"),
        (("views", "--out", "picture"), "must end in .png"),
        (("views", "--device", "gpu"), "Invalid device='gpu'"),
        (("probe", "--out", "pyproject.toml"), "pyproject.toml"),
        (("probe", "--lr", "-1", "--out", "{tmp}"), "Invalid lr=-1.0"),
        (("export", "--format", "foldr", "--out", "{tmp}/x"), "Did you mean 'folder'"),
        (("export", "--shard-size", "0", "--out", "{tmp}/x"), "shard"),
        (("export", "--out", "mlviews"), "mlviews has files and is not an export"),
        (("export", "--out", "pyproject.toml"), "pyproject.toml"),
        (("export", "--epoch", "4294967296", "--out", "{tmp}/x"), "Invalid epoch=4294967296"),
        (("export", "--verify", "--out", "{tmp}"), "No export in"),
        (("probe", "--method", "simclrr", "--out", "{tmp}"), "Did you mean 'simclr'"),
    ],
)
def test_every_mistake_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    stderr = failing(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert stderr.startswith("mlviews: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_a_files_own_values_hold_unless_the_command_line_gives_others(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("preset: fashion-none\nseed: 7\nbatch_size: 4\n")
    options = [
        "probe",
        "--preset",
        str(tmp_path / "own.yaml"),
        "--steps",
        "1",
        "--labels",
        "500",
        "--out",
        str(tmp_path),
    ]
    for more, seed, batch_size in (([], 7, 4), (["--seed", "0", "--batch-size", "6"], 0, 6)):
        assert run(app, options + more).exit_code == 0
        training = json.loads((tmp_path / "result.json").read_text())["training"]
        assert (training["seed"], training["batch_size"]) == (seed, batch_size)


def test_missing_data_is_one_line_and_exit_code_2() -> None:
    message = failing("probe", "--data", "nowhere")
    assert "train-images-idx3-ubyte" in message
    assert message.count("\n") == 1


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['lightly'] = None; sys.argv = ['mlviews', 'probe', '--steps', '1']; "
        "from mlviews.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'mlviews[lightly]'" in result.stderr
    assert "Traceback" not in result.stderr
