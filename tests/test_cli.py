from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

import mlviews
from mlviews.cli import app, main
from mlviews.evaluation.readout import SHARES, Scores
from mlviews.perturb import Walker
from mlviews.runs import lines
from mlviews.runs.progress import bar, bars

run = CliRunner().invoke
COMMANDS = ("demo", "generators", "views", "probe", "impact", "walker", "inverter", "export")
COMMANDS += ("traverse", "recombine", "purify", "explore")
NO_JOBS: dict[str, set[str]] = {"generators": set(), "explore": {"seed", "device"}}


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run([sys.executable, "-m", "mlviews.cli", *arguments], check=False, **options)


def failing(*arguments: str) -> str:
    """What the installed command says on stderr when it fails."""
    result = command(*arguments)
    assert result.returncode == 2
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command: str) -> None:
    out = run(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        assert parameter.opts[-1] in out
        assert parameter.help
    assert {parameter.name for parameter in parameters} >= (NO_JOBS.get(command, {"seed", "device", "out"}))
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
        app,
        [*options, "--pairs", "8", "--monte-carlo", "500", "--keep-norm", "--noise"],
        env={"COLUMNS": "160"},
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("under-used: ")
    moved = Walker.load(tmp_path / "w" / "walker.safetensors")
    assert moved.provenance["levels"] == [2, 3]
    assert moved.provenance["anchor"] == {"std": 0.5, "truncation": None, "mean": 0.0}
    assert moved.keep_norm
    assert moved.noise


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
        (("impact", "--perturber", "mux", "--out", "{tmp}"), "Invalid perturber 'mux'"),
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
        (("probe", "--steps", "0"), "--steps"),
        (("probe", "--out", "/proc"), "No file can be written into the folder /proc"),
        (("impact", "--out", "pyproject.toml"), "the folder pyproject.toml (File exists)"),
        (("impact", "--device", "mps:7", "--out", "{tmp}"), "Invalid device='mps:7'"),
        (("impact", "--pairs", "3", "--devices", "2", "--out", "{tmp}"), "Invalid pairs=3 for 2 processes"),
        (("impact", "--weights", "pyproject.toml", "--out", "{tmp}"), "pyproject.toml"),
        (("walker", "1:1", "--out", "{tmp}"), "Level range '1:1' is empty"),
        (("walker", "1", "--device", "meta", "--out", "{tmp}"), "Invalid device='meta'"),
        (("walker", "1", "--out", "pyproject.toml/w"), "(Not a directory)"),
        (("export", "--verify", "--out", "pyproject.toml"), "pyproject.toml"),
        (("export", "--device", "xpu", "--out", "{tmp}/x"), "Invalid device='xpu'"),
        (("generators", "convert", "{tmp}", "{tmp}/w.safetensors"), "No weights file"),
        (("views", "--preset", "{tmp}/nothing.yaml"), "No configuration file"),
    ],
)
def test_every_mistake_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    stderr = failing(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert stderr.startswith("mlviews: ")
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("traverse",), ("recombine",), ("purify", "."), ("publish", "fashion", "nowhere")]
)
def test_a_device_that_torch_cannot_use_is_named(arguments: tuple[str, ...]) -> None:
    error = run(app, [*arguments, "--device", "gpu"]).exception
    assert isinstance(error, ValueError)
    assert "Invalid device='gpu'" in str(error)


def test_of_few_images_all_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((32, 32), 60 + number).save(tmp_path / "photos" / f"{number}.png")
    options = ["--preset", "fashion-real-ml", "--images", str(tmp_path / "photos")]
    assert run(app, ["views", *options, "--out", str(tmp_path / "views.png")]).exit_code == 0
    assert (tmp_path / "views.png").exists()


def test_the_inverters_paths_are_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "[a folder]" / ("name" * 20)
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("")
    best = types.SimpleNamespace(step=1, pair_error=0.1, latent_error=0.5)
    ended = types.SimpleNamespace(status="finished", best=best, history=[best])
    monkeypatch.setattr(mlviews, "train_inverter", lambda *_, **__: types.SimpleNamespace(run=ended))
    out = run(app, ["inverter", "fashion", "--out", str(folder)]).output
    assert f"{folder / 'history.csv'}\n" in out


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


# -- terminals, full disks and what else is no fault of the command's ----------------------------------------

PROBE = ("probe", "--steps", "1", "--batch-size", "4", "--labels", "100")


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [("latin-1", ("impact", "--help")), ("ascii", ("export", "--help")), ("cp437", ("generators",))],
)
def test_what_the_terminal_cannot_show_is_replaced(encoding: str, arguments: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = command(*arguments, env=environment, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) > 5


def test_a_report_is_saved_whatever_the_terminal_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Report:
        headline = ("σ ≤ 1",)

        def save(self, out: Path) -> list[Path]:
            (out / "report.html").touch()
            return [out / "report.html"]

        def __str__(self) -> str:
            return "σ ≤ 1"

    written = io.BytesIO()
    monkeypatch.setattr(mlviews, "measure_impact", lambda *arguments, **options: Report())
    monkeypatch.setattr(sys, "argv", ["mlviews", "impact", "--out", str(tmp_path / "[bold]x")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setenv("RANK", "1")  # left over from another job
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    assert (tmp_path / "[bold]x" / "report.html").exists()
    text = written.getvalue().decode()
    assert text.startswith("? ? 1\n? ? 1\n")
    assert str(tmp_path / "[bold]x" / "report.html") in text


def test_a_measurement_that_cannot_be_saved_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Report:
        headline = ("0.7 nats",)

        def save(self, out: Path) -> list[Path]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlviews, "measure_impact", lambda *arguments, **options: Report())
    result = run(app, ["impact", "--out", str(tmp_path)])
    assert isinstance(result.exception, OSError)
    assert "0.7 nats" in result.stdout


def test_a_closed_pipe_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = command("generators", stdout=writer)
    assert (result.returncode, result.stderr) == (1, "")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_on_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = command("generators", stdout=full)
    assert result.returncode == 2
    assert result.stderr == "mlviews: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(27, "File too large", "a\nb\x1b[31m"), "File too large: 'a\\nb\\x1b[31m'"),
        (ValueError("one\ntwo\x1b[31m"), "one two\\x1b[31m"),
        (SafetensorError("I/O error: No space left on device"), "could not be written"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "be written"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("mlviews.cli.app", fail)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("mlviews: ")
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("mlviews.cli.app", fail)
    with pytest.raises(type(error)):
        main()


def test_the_record_of_another_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(dict.fromkeys(SHARES, 50.0), 50.0)
    monkeypatch.setattr("mlviews.evaluation.probe.evaluate", lambda *arguments: scores)

    def probe(*more: str) -> None:
        result = run(app, [*PROBE, "--out", str(tmp_path), *more])
        assert result.exit_code == 0, result.output

    def seeds() -> dict[str, int]:
        records = sorted(tmp_path.glob("*.json"))
        return {path.name: json.loads(path.read_text())["training"]["seed"] for path in records}

    probe()
    first = (tmp_path / "loss.png").read_bytes()
    probe()  # the same command
    assert seeds() == {"result.json": 0}
    probe("--seed", "1")
    assert seeds() == {"result-1.json": 0, "result.json": 1}
    assert (tmp_path / "views-1.png").exists()
    assert (tmp_path / "loss-1.png").read_bytes() == first
    (tmp_path / "result.json").write_text("{")  # of an older version that was killed
    probe("--seed", "2")
    assert (tmp_path / "result-2.json").read_text() == "{"


def test_a_record_that_cannot_be_written_leaves_that_of_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("{}")
    scores = Scores(dict.fromkeys(SHARES, 50.0), 50.0)
    monkeypatch.setattr("mlviews.evaluation.probe.evaluate", lambda *arguments: scores)

    def full(part: Path, *arguments: object, **options: object) -> None:
        part.open("w").write("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        result = run(app, [*PROBE, "--out", str(tmp_path)])
    assert isinstance(result.exception, OSError)
    assert "encoder trained" in result.stdout, "the table is printed at least"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "{}")]


def test_dollar_signs_in_a_presets_name_are_no_formula(tmp_path: Path) -> None:
    preset = tmp_path / "a$b_{$.yaml"
    preset.write_text("preset: fashion-none\n")
    path = tmp_path / "views.png"
    result = run(
        app, ["views", "--preset", str(preset), "--out", str(path), "--anchors", "1", "--num-views", "1"]
    )
    assert result.exit_code == 0, result.output
    assert path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "0"}, "Invalid LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "two"}, "Invalid LOCAL_WORLD_SIZE=two"),
        ({"WORLD_SIZE": "3"}, "must be a multiple of LOCAL_WORLD_SIZE=2"),
        ({"WORLD_SIZE": None}, "No WORLD_SIZE in the environment"),
        ({"LOCAL_RANK": "2"}, "Invalid LOCAL_RANK=2"),
        ({"RANK": None}, "No RANK in the environment"),
    ],
)
def test_the_launchers_variables_are_checked(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment: dict[str, str | None] = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} | changes
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    result = run(app, ["impact", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_local_rank_left_over_is_an_error_where_processes_are_to_be_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    result = run(app, ["impact", "--devices", "2", "--out", str(tmp_path)])
    assert "unset LOCAL_RANK" in str(result.exception)


def test_where_there_is_no_terminal_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock.now)
    with bars(None) as progress:
        task = progress.add_task("training", total=100)
        for step in range(1, 101):
            clock.now = float(step)
            progress.update(task, completed=step, description=f"training, loss {step / 100:.2f}")
    written = [line.split(",")[1].split("/")[0] for line in capsys.readouterr().err.splitlines()]
    assert written == [
        " loss 0.03: 3",
        " loss 0.33: 33",
        " loss 0.63: 63",
        " loss 0.93: 93",
        " loss 1.00: 100",
    ]

    with bar("walker", 1000, 400) as advance:
        clock.now += 1
        advance(500, ": loss 0.70 nats")  # at the target: the game is over early
    assert capsys.readouterr().err.startswith("walker: loss 0.70 nats; 500/1,000, 0:00:00, ")

    with bar("export", 0), bars(None, show=False) as hidden:
        hidden.update(hidden.add_task("hidden", total=1), completed=1)
    assert capsys.readouterr().err == ""


def test_lines_that_cannot_be_written_do_not_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with bar("export", 2) as advance:
        advance(1, "")
        advance(2, "")
