"""Reuse: every generated sample serves several steps, newly augmented, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from conftest import Toy, by_index, toy_source
from test_source import Watch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mlviews.images
from mlviews import MLViewSource, load_generator, transforms, wrap_generator
from mlviews.images import Reader
from mlviews.perturb import Resample
from mlviews.reuse import Reuse, Schedule
from mlviews.source import Batch
from mlviews.viz import view_images

CPU = torch.device("cpu")
EPOCH = 512
T_X = transforms.simclr(12, color=False)


def reused(**options: Any) -> MLViewSource:
    return toy_source(**{"num_samples": EPOCH, "reuse": 4, **options})


def by_sample(batches: list[Batch]) -> dict[int, list[Tensor]]:
    """All showings of each sample, in order: its views ``[V, C, H, W]``."""
    showings = defaultdict(list)
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            showings[index].append(torch.stack([view[row] for view in batch.views]))
    return showings


def in_order(batches: list[Batch]) -> tuple[list[int], Tensor]:
    """The samples' indices and their views ``[N, V, C, H, W]``, place by place."""
    indices = [index for batch in batches for index in batch.indices.tolist()]
    return indices, torch.cat([torch.stack(batch.views, dim=1) for batch in batches])


@pytest.mark.parametrize(
    ("size", "times", "most"), [(1000, 4, 100), (4096, 3, 10_000), (37, 2, 8), (64, 64, 1)]
)
def test_every_sample_is_shown_so_often_and_far_apart(size: int, times: int, most: int) -> None:
    schedule = Schedule(size, times, most)
    samples = []
    for showing in schedule.showings(0, size):
        order = torch.arange(schedule.size(showing.window))
        if showing.number:
            order = schedule.order(showing.window, showing.number, 5, 7, CPU)
        samples += (schedule.bounds[showing.window] + order[showing.start : showing.stop]).tolist()
    counts = Counter(samples)
    assert len(samples) == size
    assert set(counts) == set(range(-(-size // times)))
    assert times * len(counts) - size == sum(times - count for count in counts.values())
    places = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample].append(place)
    gaps = [after - before for of_one in places.values() for before, after in pairwise(of_one)]
    assert min(gaps) >= schedule.distance
    assert schedule.largest <= most


def test_a_window_is_shown_in_another_order_each_time_lane_by_lane() -> None:
    schedule = Schedule(8192, 4, 2048)
    lanes = schedule.lanes(2048)
    assert lanes == 128
    orders = [schedule.order(0, number, 0, 3, CPU) for number in (1, 2, 3)]
    orders.append(schedule.order(0, 1, 1, 3, CPU))
    for number, order in enumerate(orders):
        assert torch.equal(order.sort().values, torch.arange(2048))
        assert torch.equal(order % lanes, torch.arange(2048) % lanes)
        assert all(not torch.equal(order, other) for other in orders[:number])


def test_the_samples_are_those_of_a_source_without_reuse() -> None:
    showings = by_sample(list(reused()))
    plain = by_index(toy_source(num_samples=EPOCH))
    assert set(showings) == set(range(EPOCH // 4))
    for index, views in showings.items():
        assert len(views) == 4
        assert all(torch.equal(view, views[0]) for view in views)
        torch.testing.assert_close(views[0], plain[index], atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_samples_of_four_epochs_are_those_of_one() -> None:
    source = reused()
    indices = [set(by_sample(list(source))) for _ in range(5)]
    assert set().union(*indices[:4]) == set(range(EPOCH))
    assert all(len(part) == EPOCH // 4 for part in indices)
    plain = toy_source(num_samples=EPOCH)
    plain.set_epoch(1)
    source.set_epoch(6)
    fresh = by_index(plain)
    for index, views in by_sample(list(source)).items():
        torch.testing.assert_close(views[0], fresh[index], atol=0.5 / 255 + 1e-6, rtol=0)


def test_every_showing_is_augmented_anew() -> None:
    showings = by_sample(list(reused(transform=T_X))).values()
    different = [len({tuple(view.flatten().tolist()) for view in views}) for views in showings]
    assert sum(different) > 3.9 * len(different)  # of four; crops of so few pixels may agree


def test_the_generator_runs_once_a_sample() -> None:
    toy = Toy()
    for _ in reused(generator=toy):
        pass
    assert toy.blocks[0].rows == EPOCH // 4  # anchors and positives share it
    assert toy.blocks[1].rows == 2 * EPOCH // 4


class Numbered(torch.utils.data.Dataset[Tensor]):
    """24 images, each as bright as its label says."""

    targets: ClassVar[list[int]] = list(range(24))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((1, 28, 28), index, dtype=torch.uint8)


KINDS: dict[str, dict[str, Any]] = {
    "drawn": {"transform": T_X},
    "drawn, three views, windows": {"transform": T_X, "num_views": 3, "reuse_memory": 48 * 3 * 100},
    "pool": {"pool": True, "perturb": {0: Resample()}},
    "micro-batches, crops": {"micro_batch_size": 3, "crops": (0, 1, 1), "transform": [T_X, T_X, T_X]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_batch_size_and_ranks_do_not_matter(options: dict[str, Any]) -> None:
    indices, views = in_order(list(reused(**options)))
    for batch_size, world_size in ((16, 1), (8, 2), (5, 1)):
        sources = [
            reused(**{**options, "batch_size": batch_size, "rank": rank, "world_size": world_size})
            for rank in range(world_size)
        ]
        batches = [batch for step in zip(*sources, strict=True) for batch in step]
        others, content = in_order(batches)
        assert others == indices[: len(others)]
        torch.testing.assert_close(content, views[: len(others)], atol=1 / 255, rtol=0)
        changed = (
            content - views[: len(others)]
        ).abs() > 1e-5  # a float's last bit may round to the other side
        assert changed.float().mean() < 1e-3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("steps", [3, 37])
def test_resume_goes_on_where_it_stopped(options: dict[str, Any], steps: int) -> None:
    source = reused(**options)
    iterator = iter(source)
    for _ in range(steps):
        next(iterator)
    state = source.state_dict()
    indices, views = in_order(list(iterator))
    resumed = reused(**{**options, "batch_size": 4})
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    again, content = in_order(list(resumed))
    assert again == indices
    torch.testing.assert_close(content, views, atol=1 / 255, rtol=0)
    assert ((content - views).abs() > 1e-5).float().mean() < 1e-3


def test_a_rank_generates_its_share_alone() -> None:
    toys = [Toy(), Toy()]
    for rank, toy in enumerate(toys):
        for _ in reused(generator=toy, rank=rank, world_size=2, batch_size=4):
            pass
    assert [toy.blocks[0].rows for toy in toys] == [EPOCH // 8] * 2


def test_own_images_labels_and_origins() -> None:
    nvae = load_generator("fashion-nvae")
    source = MLViewSource(
        nvae,
        images=Numbered(),
        generated=0.5,
        perturb={"1:": Resample()},
        reuse=2,
        batch_size=2,
        layout=lambda batch: batch,
    )
    showings = by_sample(list(source))
    assert [len(views) for views in showings.values()] == [2] * 12
    source.set_epoch(0)
    for batch in source:
        assert torch.equal(batch.targets, batch.indices)
        middle = batch.views[0][:, 0, 16, 16] * 255
        torch.testing.assert_close(middle, batch.indices.float())
    rest = by_sample(list(source))
    assert set(rest) | set(showings) == set(range(24)), "two epochs have all images"
    own = [torch.equal(views[0][0], views[0][1]) for views in (*showings.values(), *rest.values())]
    assert 4 < sum(own) < 20


def test_large_sets_are_read_ahead_in_first_showings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlviews.images, "RESIDENT", 0)
    read = Reader.__call__
    ahead: list[bool] = []

    def recorded(reader: Reader, numbers: list[int], *rest: Any) -> Tensor:
        ahead.append(reader._batches is not None and reader._plan.next == numbers)
        return read(reader, numbers, *rest)

    monkeypatch.setattr(Reader, "__call__", recorded)
    options = {"images": Numbered(), "perturb": {"1:": Resample()}, "reuse": 3, "batch_size": 2}
    nvae = load_generator("fashion-nvae")
    showings = [
        by_sample(list(MLViewSource(nvae, workers=workers, layout=lambda batch: batch, **options)))
        for workers in (0, 1)
    ]
    assert ahead == [False] * 4 + [False] + [True] * 3, "8 samples, in batches of 2: all but the first"
    assert showings[0].keys() == showings[1].keys()
    for index, views in showings[0].items():
        for view, other in zip(views, showings[1][index], strict=True):
            assert torch.equal(view, other)


@pytest.mark.parametrize("layout", ["pair", "solo", "lightly"])
def test_layouts(layout: str) -> None:
    batch = next(iter(reused(layout=layout)))
    assert len(batch) == {"pair": 2, "solo": 3, "lightly": 3}[layout]


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_a_source_travels_without_its_cache(travel: Any) -> None:
    source = toy_source(num_samples=EPOCH, reuse=4, layout="pair")
    first = next(iter(source))
    other = travel(source)
    assert isinstance(other.step, Reuse)
    assert other.step._window is None
    other.set_epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(first, next(iter(other)), strict=True))


def test_a_step_waits_for_nothing_and_stays_on_the_device() -> None:
    options = {"transform": copy.deepcopy(T_X), "layout": "solo", "device": "cuda", "num_samples": 128}
    with FakeTensorMode():
        with torch.device("cuda"):
            toy = Toy()
        iterator = iter(reused(**options, generator=toy))
        next(iterator)
        with Watch() as watch:
            batches = list(iterator)  # first showings and later ones
    assert len(batches) == 15
    assert {view.device.type for batch in batches for view in batch[1]} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []


def test_memory_is_bounded_and_stated() -> None:
    bound = 10_000
    source = toy_source(num_samples=100_000, reuse=8, reuse_memory=bound)
    assert isinstance(source.step, Reuse)
    assert source.step.memory <= bound
    next(iter(source))
    assert source.step._window is not None
    assert source.step._window.images.nbytes <= source.step.memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": 0}, "Invalid reuse=0"),
        ({"reuse": 2.5}, "Invalid reuse=2.5"),
        ({"reuse": 5000}, "4096"),
        ({"reuse_memory": 10}, "one sample take 32 bytes"),
        ({"reuse_memory": -1}, "reuse_memory"),
        ({"num_samples": 32}, "Raise num_samples or reuse_memory, or lower reuse or batch_size"),
        ({"reuse_memory": 32 * 8}, "Raise num_samples or reuse_memory"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reused(**options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"reuse": 2}, "reuse=4, this source has reuse=2"),
        ({"num_samples": 2048}, "512"),
        ({"reuse_memory": 64 * 32}, "cut into 1 windows, this one's memory makes 2"),
        ({"num_views": 4, "reuse_memory": 64 * 64}, "the same reuse_memory and num_views"),
    ],
)
def test_a_state_of_another_schedule_is_refused(other: dict[str, Any], message: str) -> None:
    state = reused().state_dict()
    with pytest.raises(ValueError, match=message):
        reused(**other).load_state_dict(state)


def test_pictures_of_more_anchors_than_a_window_shows() -> None:
    few = reused(reuse_memory=64 * 32)
    pictured = view_images(few, anchors=60, views=2).generated
    for view, expected in zip(pictured, few.replace(reuse=1).batch(0, 60).views, strict=True):
        assert torch.equal(view, expected)


def test_pixels_beyond_the_range_do_not_wrap_around() -> None:
    generator = wrap_generator(lambda z: z[0].view(-1, 1, 2, 2), levels=[("z", (4,))], image_shape=(1, 2, 2))
    views = reused(generator=generator, perturb=None)
    raw = views.replace(reuse=1).batch(0, 8).views[0]
    assert raw.min() < -0.1
    assert raw.max() > 1.1
    torch.testing.assert_close(views.batch(0, 8).views[0], raw.clamp(0, 1), atol=0.51 / 255, rtol=0)


def test_a_configuration_takes_it() -> None:
    source = MLViewSource.from_config("fashion-ml-random", reuse=2, num_samples=64, batch_size=8)
    assert source.reuse == 2
    assert source.replace(reuse=1).reuse == 1
    assert (source.repeats, source.replace(reuse=1).repeats) == (True, False)
