from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, by_index, toy_source
from gloo_worker import embedded_pairs

from mlviews import transforms
from mlviews.distributed import resolve_rank
from mlviews.infonce import info_nce

WORKER = Path(__file__).with_name("gloo_worker.py")


def torchrun(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), str(folder), *arguments]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_gloo_processes_partition_the_epoch(tmp_path: Path) -> None:
    ranks = torchrun(tmp_path)
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
    ranks = torchrun(tmp_path, str(tmp_path / "state.pt"))
    expected = by_index(toy_source(transform=transforms.simclr(6, color=False)))
    assert_same(before | ranks[0]["samples"] | ranks[1]["samples"], expected)


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (None, None), (2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (0, 3), (0, 3)),
    ],
)
def test_rank(
    environment: dict[str, str], given: tuple[int | None, int | None], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_rank(*given) == expected
