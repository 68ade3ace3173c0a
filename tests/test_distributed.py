from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Toy, assert_same, by_index, torchrun, toy_source
from gloo_worker import embedded_pairs
from lightning_fabric import Fabric

from mlviews import train_walker, transforms
from mlviews.mi.infonce import info_nce
from mlviews.perturb import Walker
from mlviews.runs.processes import resolve_rank, rows, share

WORKER = Path(__file__).with_name("gloo_worker.py")


def two_ranks(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    torchrun(str(WORKER), str(folder), *arguments)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_gloo_processes_partition_the_epoch(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path)
    assert [rank["length"] for rank in ranks] == [3, 3]
    assert not ranks[0]["samples"].keys() & ranks[1]["samples"].keys()
    expected = by_index(toy_source(transform=transforms.simclr(6, color=False)))
    assert_same(ranks[0]["samples"] | ranks[1]["samples"], expected)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True))

    # InfoNCE over both ranks' pairs is that of one process with all of them, gradient included.
    a, b, network = embedded_pairs()
    loss = info_nce(network(a), network(b))
    loss.backward()
    torch.testing.assert_close((ranks[0]["info_nce"][0] + ranks[1]["info_nce"][0]) / 2, loss.detach())
    for rank in ranks:
        torch.testing.assert_close(rank["info_nce"][1], network.weight.grad)


def test_two_gloo_processes_go_on_where_one_stopped(tmp_path: Path) -> None:
    source = toy_source(transform=transforms.simclr(6, color=False))
    before = by_index(itertools.islice(source, 2))
    torch.save(source.state_dict(), tmp_path / "state.pt")
    ranks = two_ranks(tmp_path, str(tmp_path / "state.pt"))
    expected = by_index(toy_source(transform=transforms.simclr(6, color=False)))
    assert_same(before | ranks[0]["samples"] | ranks[1]["samples"], expected)


GAME = {
    "pairs": 8,
    "width": 8,
    "monte_carlo": 200,
    "progress": False,
    "warmup": 30,
    "steps": 20,
    "patience": 5,
    "seed": 1,
}
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import Toy
from mlviews import measure_impact, train_walker
train_walker(Toy(), [1], 0.7, {out!r}, devices=2, **{game!r})
train_walker(Toy(), [1], 0.7, {out!r} + "/drawn", devices=2, noise=True, **{game!r})
options = dict(pairs=8, train_pairs=4, width=8, steps=10, evaluations=2, monte_carlo=200, progress=False)
measure_impact(Toy(), out={out!r}, devices=2, **options)
"""


@pytest.mark.parametrize("launcher", ["fabric", "torchrun"])
def test_a_walker_of_two_processes_is_that_of_one(launcher: str, tmp_path: Path) -> None:
    """Fabric starts the second process itself, or takes torchrun's.

    Both measurements of one script share them.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path), game=GAME))
    if launcher == "torchrun":
        torchrun(str(script))
    else:
        done = subprocess.run(
            [sys.executable, str(script)], timeout=240, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "checkpoint.pt")["state"]
    alone = train_walker(Toy(), [1], 0.7, **GAME)  # type: ignore[arg-type]
    # The same gradients: the first steps agree, until Adam has blown up the rounding of eight pairs' sums.
    assert state["log"]["losses"][:5] == pytest.approx(alone.history.losses[:5], rel=1e-3)
    drawn = torch.load(tmp_path / "drawn" / "checkpoint.pt")["state"]["log"]
    alone = train_walker(Toy(), [1], 0.7, noise=True, **GAME)  # type: ignore[arg-type]
    assert drawn["losses"][:5] == pytest.approx(alone.history.losses[:5], rel=1e-3)
    begun = alone.history.warmup
    assert drawn["distances"][begun] == pytest.approx(alone.history.distances[begun], rel=1e-3)
    assert Walker.load(tmp_path / "walker.safetensors").provenance["processes"] == 2
    assert torch.load(tmp_path / "sweep.pt")["state"]["step"] == 10


HASTY = """
import sys
import torch
from conftest import Toy
from mlviews.runs.processes import launch
fabric = launch(Toy(), "cpu", 2)
sys.setswitchinterval(1000)  # Python is not handed to gloo's threads on the way
tensors = [torch.ones(3) for _ in range(200)]
for tensor in tensors:
    torch.distributed.all_reduce(tensor)
"""


def test_processes_end_without_an_abort(tmp_path: Path) -> None:
    """However soon after the last collective: gloo's threads then still hold its tensors, and abort where
    they cannot let go.
    """
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{HASTY}")
    torchrun(str(script))


def test_pairs_that_cannot_be_shared_evenly() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert [list(rows(1, 4, fabric)), share(4, fabric)] == [[4, 5, 6, 7], 4]
    with pytest.raises(ValueError, match=r"Invalid pairs=7 for 2 processes"):
        share(7, SimpleNamespace(world_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (None, None), (2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (0, 3), (0, 3)),
    ],
)
def test_rank(
    environment: dict[str, str],
    given: tuple[int | None, int | None],
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_rank(*given) == expected
