"""The plain torch example as its users start it, by python and by torchrun; and its page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlviews.integrations.plain_torch import train

SCRIPT = Path(train.__file__)
PAGE = SCRIPT.with_name("README.md")
SMALL = ("--num-samples", "128", "--batch-size", "16")


def run(out: Path, epochs: int, capsys: pytest.CaptureFixture[str]) -> dict[int, float]:
    """The script in this process; the loss of each epoch it trained."""
    train.main(**vars(train.parser.parse_args([*SMALL, "--epochs", str(epochs), "--out", str(out)])))
    return losses(capsys.readouterr().out)


def losses(text: str) -> dict[int, float]:
    return {int(epoch): float(loss) for epoch, loss in re.findall(r"epoch (\d+): loss (\d+\.\d+)", text)}


def weights(out: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(out)["state"]["net"]
    return state


def test_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 80


def test_it_learns_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part, early = tmp_path / "whole.pt", tmp_path / "part.pt", tmp_path / "early.pt"
    command = [sys.executable, str(SCRIPT), *SMALL, "--epochs", "4", "--out", str(whole)]
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 0, process.stderr
    expected = losses(process.stdout)
    assert list(expected) == [0, 1, 2, 3]
    assert expected[3] < expected[0] - 0.05

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as above: sums in another order would differ
    try:
        run(part, 2, capsys)
        shutil.copy(part, early)
        rest = run(part, 4, capsys)
    finally:
        torch.set_num_threads(threads)
    assert rest == {epoch: pytest.approx(expected[epoch], abs=1e-3) for epoch in (2, 3)}
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(part)[name], value, atol=1e-4, rtol=1e-3)
    assert any(not torch.equal(weights(early)[name], value) for name, value in weights(whole).items())
    assert run(part, 4, capsys) == {}  # nothing left to do


def test_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.pt"
    torchrun(__file__, str(tmp_path), *SMALL, "--epochs", "2", "--out", str(out), OMP_NUM_THREADS="1")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [rank["steps"] for rank in ranks] == [8, 8]  # 2 epochs of 128 samples, 2 x 16 a step
    for name, value in ranks[0]["parameters"].items():
        assert torch.equal(value, ranks[1]["parameters"][name])
        assert torch.equal(value, weights(out)[name])
    assert torch.load(out)["state"]["source"] == {"seed": 0, "epoch": 2, "position": 0}
    assert set(run(out, 3, capsys)) == {2}  # a third epoch in one process


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"no checkpoint"])
def test_a_damaged_checkpoint_is_one_line(
    damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.pt"
    run(out, 1, capsys)
    out.write_bytes(damage(out.read_bytes()))
    damaged = out.read_bytes()
    command = [sys.executable, str(SCRIPT), *SMALL, "--epochs", "2", "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith(f"train.py: {out} is no checkpoint of a measurement or a training")
    assert process.stderr.count("\n") == 1
    assert out.read_bytes() == damaged


def test_a_checkpoint_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.pt"
    torch.save({"net": {}}, out)
    with pytest.raises(ValueError, match="is no checkpoint of a measurement"):
        run(out, 1, capsys)
    out.unlink()
    run(out, 1, capsys)
    with pytest.raises(ValueError, match="preset='fashion-ml-random', not 'fashion-none'"):
        train.main("fashion-none", 2, 128, 16, out)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "net.pt"
    run(out, 1, capsys)
    before = out.read_bytes()

    def fail(content: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        run(out, 2, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]
    assert out.read_bytes() == before


def test_the_pages_commands_are_right() -> None:
    commands = re.findall(
        r"train\.py((?: +[^\s#]+)*)", " ".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL))
    )
    assert len(commands) >= 4
    for command in commands:
        train.parser.parse_args(command.split())


def one_rank(folder: Path) -> None:
    """The script under torchrun, watched."""
    models: list[DistributedDataParallel] = []
    steps: list[Tensor] = []

    def watched(net: torch.nn.Module) -> DistributedDataParallel:
        models.append(DistributedDataParallel(net))
        models[0].register_forward_hook(lambda *_: steps.append(_[-1]))
        return models[0]

    train.DistributedDataParallel = watched  # type: ignore[assignment, misc]
    rank = os.environ["RANK"]
    train.main(**vars(train.parser.parse_args(sys.argv[2:])))
    parameters = dict(models[0].module.named_parameters())
    torch.save(
        {"parameters": {name: value.detach() for name, value in parameters.items()}, "steps": len(steps)},
        folder / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
