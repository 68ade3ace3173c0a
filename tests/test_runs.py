"""What long jobs share: files that are whole or not there, checkpoints, and torch's global modes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mlviews.perturb import Walker
from mlviews.runs.checkpoint import Checkpoint, differences
from mlviews.runs.files import new_files, whole
from mlviews.runs.modes import plain
from mlviews.runs.processes import check_device
from mlviews.weights.files import write_safetensors

# -- files ---------------------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the full disk, so that no root is needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def plain_write(path: Path) -> None:
    with whole(path) as part:
        part.write_bytes(bytes(1 << 20))


def torch_write(path: Path) -> None:
    with whole(path) as part:
        torch.save({"a": torch.zeros(1 << 20)}, part)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda path: write_safetensors(path, {"a": torch.zeros(1 << 20)}, {"format": "x"}),
    "a walker": lambda path: Walker(300).save(path),
    "a checkpoint": lambda path: Checkpoint(path, {}, True).save({"a": torch.zeros(1 << 20)}),
    "torch": torch_write,
    "Python": plain_write,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_a_full_disk_is_one_line_with_the_path_and_loses_nothing(
    writer: str, earlier: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if earlier is not None:
        path.write_bytes(earlier)
    with full_disk(), pytest.raises(OSError, match=str(path)) as caught:
        WRITERS[writer](path)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert "\n" not in str(caught.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [earlier] * (earlier is not None)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_any_new_file(
    writer: str, umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_errors_of_the_block_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("something else"), ValueError("x"), KeyError("y"), OSError("no number")):
        with pytest.raises(type(error)) as caught, whole(tmp_path / "file"):
            raise error
        assert caught.value is error
    with pytest.raises(FileNotFoundError, match=r"elsewhere"), whole(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"/file'"):
        plain_write(tmp_path / "file")


def test_new_files_are_this_calls_own_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from mlviews.runs.files import new_files\n"
        "with new_files(Path(sys.argv[1])) as part:\n"
        "    (part / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    with new_files(tmp_path) as part:
        assert not left.exists()
        (part / "a").write_text("whole")
        (part / "a").replace(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with full_disk(), pytest.raises(OSError, match=str(tmp_path)), new_files(tmp_path) as part:
        (part / "b").write_bytes(bytes(1 << 20))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_a_state_comes_back_for_the_same_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "c.pt"
    settings = {"seed": 1, "generator": {"name": "x", "samples": [1.0, 2.0]}}
    assert Checkpoint(path, settings, True).load() is None
    Checkpoint(path, settings, True).save({"step": 3, "w": torch.ones(2)})
    state = Checkpoint(path, settings, True).load()
    assert state is not None
    assert (state["step"], state["w"].tolist()) == (3, [1.0, 1.0])
    assert Checkpoint(path, settings, False).load() is None
    assert Checkpoint(None, settings, True).load() is None
    with pytest.raises(
        ValueError, match=r"c.pt belongs to a run with seed=1, not 2: use another folder, or x"
    ):
        Checkpoint(path, settings | {"seed": 2}, True, remedy="x").load()


def test_differences_name_the_setting_and_stay_short() -> None:
    old = {"a": 1, "options": {"psi": "1.0"}, "samples": [1.0], "gone": 0}
    assert differences(old, dict(old)) == []
    assert differences(old, {**old, "samples": [1.0 + 1e-6]}) == []
    assert differences(old, {**old, "options": {"psi": "0.5"}}) == ["options.psi='1.0', not '0.5'"]
    assert differences(old, {**old, "more": 1}) == ["more=None, not 1"]
    for samples in ([1.1], [1.0, 1.0], [float("nan")], None, "x"):
        assert len(differences(old, {**old, "samples": samples})) == 1
    (text,) = differences({"a": "x" * 10_000}, {"a": {"b": "y" * 10_000}})
    assert len(text) < 200


def test_samples_that_are_no_numbers_are_another_generator() -> None:
    assert len(differences({"samples": ["x"]}, {"samples": [1.0]})) == 1


# -- modes ---------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="Invalid device='cuda:1'"):
        check_device("cuda:1")


def test_modes_are_plain_inside_and_the_callers_again_outside() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            with plain():
                weight = torch.ones(2, 2, requires_grad=True)
                assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
                assert (weight @ weight).dtype == torch.float32
                (weight @ weight).sum().backward()
                assert not weight.is_inference()
            assert torch.empty(0).dtype == torch.float64
            assert torch.empty(0).device.type == "meta"
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        with torch.device("meta"), plain(torch.device("meta")):
            assert torch.empty(0).device.type == "meta", "a user's generator may count on it"
        with pytest.raises(KeyError), plain():
            raise KeyError
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)
