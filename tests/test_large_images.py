"""Folders larger than memory: decoded by worker processes, with the samples of sets that are kept."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import assert_same, by_index
from test_images import COUNT, Pairs, folder, source

import mlviews.images
from mlviews import transforms


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlviews.images, "RESIDENT", 0)


def kept(**options: Any) -> dict[int, torch.Tensor]:
    """The samples of a source that keeps its images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlviews.images, "RESIDENT", 1 << 30)
        views = source(**options)
        samples = by_index(views)
        assert views.images is not None
        assert views.images.is_small
    return samples


def children() -> list[Any]:
    """The processes that the test has started; earlier tests may have left some that are about to end."""
    return [process for process in psutil.Process().children(recursive=True) if process not in BEFORE]


BEFORE: set[Any] = set()
"""The processes that were there before the test."""


@pytest.fixture(autouse=True)
def _remember_processes() -> None:
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))


@pytest.mark.parametrize(
    "options",
    [
        {"generated": 0.5, "num_views": 3, "transform": transforms.gray(12)},
        {"anchor_view": "reconstructed", "pool": True},
        {"num_samples": 30},
        {"num_samples": 16},
    ],
    ids=["mixed", "reconstructed", "more", "fewer"],
)
@pytest.mark.parametrize("form", ["folder", "data set"])
def test_workers_give_the_samples_of_sets_that_are_kept(
    form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    images = folder(tmp_path) if form == "folder" else Pairs()
    options = {"images": images, "drop_last": False, "workers": 2, **options}
    expected = kept(**options)
    views = source(**options)
    assert_same(by_index(views), expected)
    assert len(children()) == 2, "the same workers serve the next epoch"
    next_epoch = views.replace()
    next_epoch.set_epoch(1)
    assert_same(by_index(views), by_index(next_epoch))
    del views, next_epoch
    parts = [source(**options, rank=rank, world_size=2, batch_size=3) for rank in range(2)]
    together = by_index(itertools.chain(*parts))
    assert_same(together, {index: expected[index] for index in together})


def test_batches_that_nobody_expected(tmp_path: Path) -> None:
    options = {"images": folder(tmp_path), "workers": 1, "drop_last": False}
    views, expected = source(**options), kept(**options)
    for _ in zip(range(2), views, strict=False):
        pass  # a pass that is left early
    views.set_epoch(0)
    samples = []
    for batch in views:
        samples.append(batch)
        views.batch(8, 12)  # in the midst of a pass
    assert_same(by_index(samples), expected)
    views.load_state_dict({"seed": 3, "epoch": 0, "position": 7, "num_samples": COUNT})
    rest = by_index(views)
    assert len(rest) == COUNT - 7
    assert_same(rest, {index: expected[index] for index in rest})


def test_workers_end_with_their_source(tmp_path: Path) -> None:
    views = source(images=folder(tmp_path), workers=2)
    next(iter(views))
    pids = [process.pid for process in children()]
    assert len(pids) == 2
    del views
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_no_workers_for_images_in_memory() -> None:
    list(source())
    list(source(images=Pairs(), workers=0))
    assert children() == []


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    views = source(images=folder(tmp_path), workers=1)
    before = torch.get_rng_state()
    list(views)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_file_is_named_and_the_source_goes_on(tmp_path: Path) -> None:
    images = folder(tmp_path)
    path = images / "class1" / "004.png"
    content = path.read_bytes()
    views = source(images=images, workers=1, drop_last=False)
    path.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"004.png cannot be read as an image") as raised:
        list(views)
    assert "\n" not in str(raised.value)
    path.write_bytes(content)
    views.set_epoch(0)
    assert len(by_index(views)) == COUNT


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    views = source(images=folder(tmp_path), workers=1, batch_size=1)
    batches = iter(views)
    next(batches)
    worker = children()[0].pid

    def go_on() -> None:
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
        list(batches)

    # It is raised wherever the signal comes in.
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        go_on()


# -- interrupted runs, and long ones -------------------------------------------------------------------------


TRAINING = """
import json, sys
import mlviews.images
from test_images import by_index, source

mlviews.images.RESIDENT = 0
views = source(images=sys.argv[1], workers=1)
while True:
    for batch in views:
        samples = {index: view.tolist() for index, view in by_index([batch]).items()}
        print(json.dumps([views.state_dict(), samples]), flush=True)
"""


def test_a_killed_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    images = folder(tmp_path)
    command = [sys.executable, "-c", TRAINING, str(images)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(7)]  # an epoch has 5 batches
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(workers) == 1
    state = lines[-1][0]
    assert (state["epoch"], state["position"]) == (1, 8)
    resumed = source(images=images, workers=0)
    resumed.load_state_dict(state)
    epoch = resumed.replace()
    before = {int(index): torch.tensor(views) for _, part in lines[5:] for index, views in part.items()}
    after = by_index(resumed)
    assert not before.keys() & after.keys()
    assert_same({**before, **after}, by_index(epoch))
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == [], "its workers end too"


def memory() -> int:
    """Resident bytes of this process and its workers."""
    return sum(process.memory_info().rss for process in (psutil.Process(), *children()))


def test_memory_is_flat_over_many_batches(tmp_path: Path) -> None:
    views = source(images=folder(tmp_path), workers=1, batch_size=1)
    batches = itertools.chain.from_iterable(itertools.repeat(views))  # epoch after epoch
    history = []
    for _ in range(4):
        assert len(list(itertools.islice(map(id, batches), 500))) == 500
        gc.collect()
        history.append(memory())
    # The tensors of 1,500 batches that somebody keeps take 10 MB and more.
    assert max(history[1:]) - history[0] < 1 << 20, history
