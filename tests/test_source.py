from __future__ import annotations

import copy
import gc
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import Toy, assert_same, by_index, toy_source
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mlviews import MLVGM, MLViewSource, transforms, wrap_generator
from mlviews.generators.film import FilmGenerator
from mlviews.perturb import Fixed, Normal, Perturber, Resample, Walker
from mlviews.sampling import TruncatedNormal
from mlviews.step import Batch

T_X = {"transform": transforms.byol(12)}


# -- content is a function of (seed, epoch, index, view) -----------------------------------------------------


@pytest.mark.parametrize("options", [{}, T_X], ids=["raw", "T_x"])
def test_batch_size_does_not_matter(options: dict[str, object]) -> None:
    assert_same(by_index(toy_source(batch_size=8, **options)), by_index(toy_source(batch_size=16, **options)))


@pytest.mark.parametrize("options", [{}, T_X], ids=["raw", "T_x"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_partition_the_epoch(world_size: int, options: dict[str, object]) -> None:
    parts = [toy_source(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert {len(part) for part in parts} == {6 // world_size}
    whole = by_index(itertools.chain(*parts))
    assert_same(whole, by_index(toy_source(**options)))


def test_one_step_of_all_ranks_is_one_stretch_of_the_epoch() -> None:
    steps = zip(*[toy_source(rank=rank, world_size=2) for rank in range(2)], strict=True)
    assert [[int(i) for batch in step for i in batch.indices] for step in steps] == [
        list(range(16 * k, 16 * k + 16)) for k in range(3)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 16, 48])
def test_latents_are_the_same_to_the_bit(batch_size: int) -> None:
    def latents(**options: object) -> list[Tensor]:
        batches = list(toy_source(perturb={0: Resample(), "1:": Normal(0.5)}, **options))
        return [
            torch.cat([batch.latents[view][level] for batch in batches])
            for view in range(2)
            for level in range(3)
        ]

    for one, other in zip(latents(batch_size=batch_size), latents(), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_do_not_matter() -> None:
    assert_same(by_index(toy_source()), by_index(toy_source(micro_batch_size=3)))


def test_micro_batches_bound_what_the_generator_sees() -> None:
    source = toy_source(micro_batch_size=3, num_views=2, perturb=Normal(1.0))
    seen = []
    source.generator.blocks[2].register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    next(iter(source))
    assert seen == [6, 6, 4]


def test_on_a_cpu_the_generator_says_how_many_samples_its_cache_holds() -> None:
    counts = {}
    for options in ({}, {"micro_batch_size": 5}):
        source = toy_source(batch_size=8, perturb=Normal(1.0), **options)
        source.generator.cached_samples = 3
        seen = counts[str(options)] = []
        source.generator.blocks[2].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(len(inputs[0]))
        )
        next(iter(source))
    assert list(counts.values()) == [[6, 6, 4], [10, 6]]


def test_the_number_of_views_does_not_matter() -> None:
    two, four = by_index(toy_source(num_views=2)), by_index(toy_source(num_views=4))
    assert_same(two, {index: views[:2] for index, views in four.items()})


def test_views_differ_from_each_other_and_between_epochs() -> None:
    source = toy_source(num_views=3)
    first, second = by_index(source), by_index(source)
    assert all(not torch.equal(a, b) for views in first.values() for a, b in itertools.combinations(views, 2))
    assert all(not torch.equal(first[index][0], second[index][0]) for index in first)


def test_another_seed_is_another_stream() -> None:
    one, other = by_index(toy_source(seed=1)), by_index(toy_source(seed=2))
    assert all(not torch.equal(one[index], other[index]) for index in one)


def test_anchors_are_the_generators_samples(fashion: MLVGM) -> None:
    source = MLViewSource(fashion, {1: Normal(1.0)}, batch_size=4, num_samples=8, seed=9)
    source.set_epoch(2)
    anchors = torch.cat([anchor for anchor, _ in source])
    torch.testing.assert_close(
        anchors, fashion(fashion.sample_latents(range(8), seed=9, epoch=2)), atol=1e-5, rtol=0
    )


def test_a_second_process_makes_the_same_samples(tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); from conftest import by_index, toy_source;"
        "from mlviews import transforms;"
        "torch.save(by_index(toy_source(transform=transforms.byol(12))), sys.argv[1])"
    )
    path = tmp_path / "second.pt"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=Path(__file__).parents[1])
    assert_same(torch.load(path), by_index(toy_source(**T_X)), tolerance=0)


def test_autocast_and_grad_modes_of_the_caller_do_not_matter() -> None:
    expected = by_index(toy_source())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(by_index(toy_source()), expected)
    batch = next(iter(toy_source()))
    assert not any(view.requires_grad or view.is_inference() for view in batch.views)


def test_views_can_be_trained_on() -> None:
    """Inference tensors could not be saved for the encoder's backward pass."""
    anchor, _ = next(iter(toy_source(layout="pair")))
    layer = torch.nn.Conv2d(1, 2, 3)
    layer(anchor).sum().backward()
    assert layer.weight.grad is not None


def test_levels_that_do_not_move_are_run_once() -> None:
    source = toy_source(perturb={2: Resample(), 0: Fixed()}, num_views=4)
    next(iter(source))
    assert [block.rows for block in source.generator.blocks] == [8, 8, 32]


# -- length, epochs, iterators -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "drop_last", "expected"),
    [
        (48, 8, 1, True, 6),
        (50, 8, 1, True, 6),
        (50, 8, 1, False, 7),
        (48, 8, 3, True, 2),
        (50, 8, 3, False, 2),
        (51, 8, 3, False, 3),
        (55, 8, 3, False, 3),
    ],
)
def test_length_is_exact(
    num_samples: int, batch_size: int, world_size: int, drop_last: bool, expected: int
) -> None:
    sources = [
        toy_source(
            num_samples=num_samples,
            batch_size=batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert [len(source) for source in sources] == [expected] * world_size
    assert [len(list(source)) for source in sources] == [expected] * world_size


def test_a_last_smaller_batch_is_as_large_on_every_rank() -> None:
    """A loss that gathers the embeddings of all ranks takes as many from each."""
    parts = [list(toy_source(num_samples=55, drop_last=False, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(part[-1].indices) for part in parts] == [2, 2, 2]
    assert sorted(by_index(itertools.chain(*parts))) == list(range(54))
    assert [batch.indices[-1] for batch in toy_source(num_samples=55, drop_last=False)][-1] == 54, (
        "of one rank, none is left out"
    )


def test_iter_has_no_side_effects() -> None:
    source = toy_source()
    expected = by_index(toy_source())
    abandoned = iter(source)
    iter(source)
    assert source.state_dict() == toy_source().state_dict()
    assert_same(by_index(source), expected)
    del abandoned


def test_epoch_and_ranks_are_looked_up_at_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_source()
    iterator = iter(source)
    source.set_epoch(4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch = next(iterator)
    assert batch.indices.tolist() == list(range(8, 16))
    expected = toy_source(rank=1, world_size=2)
    expected.set_epoch(4)
    assert torch.equal(batch.views[0], next(iter(expected)).views[0])
    assert len(source) == 3


def test_a_completed_pass_is_followed_by_the_next_epoch() -> None:
    source, other = toy_source(), toy_source()
    list(source)
    other.set_epoch(1)
    assert_same(by_index(source), by_index(other))
    assert source.epoch == 1


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_no_pass_hands_out_what_another_has(steps: int) -> None:
    source = toy_source()
    passes = [list(itertools.islice(source, steps)) for _ in range(4)]
    assert source.epoch == 3
    anchors = {tuple(row) for batches in passes for batch in batches for row in batch.latents[0][0].tolist()}
    assert len(anchors) == 4 * steps * 8


def test_a_pass_that_handed_nothing_out_leaves_the_epoch() -> None:
    source = toy_source()
    iter(source)
    list(itertools.islice(source, 0))
    assert next(iter(source)).indices[0] == 0
    assert source.epoch == 0


def test_rounds_of_a_trainers_epoch_are_new_and_never_its_next_epochs() -> None:
    source, plain = toy_source(), toy_source()
    seen = []
    for epoch in range(3):
        source.sampler.set_epoch(epoch)
        plain.set_epoch(epoch)
        first = by_index(source)
        assert_same(first, by_index(plain), tolerance=0)
        seen += [first, by_index(source), by_index(itertools.islice(source, 2))]
    samples = [tuple(views[0].flatten().tolist()) for batches in seen for views in batches.values()]
    assert len(set(samples)) == len(samples) == 3 * (48 + 48 + 16)


def test_a_round_is_resumed() -> None:
    source, other = toy_source(), toy_source()
    source.sampler.set_epoch(1)
    list(source)
    before = list(itertools.islice(source, 2))  # of the second round
    other.load_state_dict(source.state_dict())
    other.sampler.set_epoch(1)
    rest = list(other)
    whole = toy_source()
    whole.sampler.set_epoch(1)
    list(whole)
    assert_same(by_index([*before, *rest]), by_index(whole), tolerance=0)


def test_a_trainer_that_goes_on_with_a_used_up_epoch_gets_nothing_of_it() -> None:
    source = toy_source()
    list(source)
    other = toy_source()
    other.load_state_dict(source.state_dict())
    other.sampler.set_epoch(0)
    assert list(other) == []
    other.sampler.set_epoch(1)
    assert len(list(other)) == 6


def test_set_epoch_replays_an_epoch_and_is_found_through_the_sampler() -> None:
    source = toy_source()
    first = by_index(source)
    source.sampler.set_epoch(0)
    assert_same(by_index(source), first, tolerance=0)


def test_changing_the_epoch_during_a_pass_is_an_error() -> None:
    source = toy_source()
    iterator = iter(source)
    next(iterator)
    source.set_epoch(1)
    with pytest.raises(RuntimeError, match="set during a pass"):
        next(iterator)


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
@pytest.mark.parametrize("epoch", [0, 2])
def test_resume_goes_on_where_it_stopped(stop: int, epoch: int) -> None:
    source = toy_source()
    source.set_epoch(epoch)
    before = list(itertools.islice(source, stop))
    state = source.state_dict()

    other = toy_source()
    other.load_state_dict(state)
    assert other.state_dict() == state, "a state survives being loaded"
    rest = list(other)
    whole = toy_source()
    whole.set_epoch(epoch)
    if stop == 6:  # a finished epoch: the next one
        assert other.epoch == epoch + 1
        whole.set_epoch(epoch + 1)
        before = []
    assert_same(by_index([*before, *rest]), by_index(whole), tolerance=0)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (16, 1), (8, 2), (4, 4)])
def test_resume_with_another_batch_size_and_number_of_ranks(batch_size: int, world_size: int) -> None:
    source = toy_source()
    before = list(itertools.islice(source, 2))
    parts = [
        toy_source(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for part in parts:
        part.load_state_dict(source.state_dict())
    assert_same(by_index([*before, *itertools.chain(*parts)]), by_index(toy_source()))


def test_set_epoch_of_the_resumed_epoch_keeps_the_position() -> None:
    """Lightning restores the loader first and sets the epoch after."""
    source = toy_source()
    source.load_state_dict({"seed": 3, "epoch": 2, "position": 16})
    source.set_epoch(2)
    assert next(iter(source)).indices[0] == 16
    source.load_state_dict({"seed": 3, "epoch": 2, "position": 16})
    source.set_epoch(3)
    assert next(iter(source)).indices[0] == 0


def test_set_epoch_wins_over_a_finished_epoch_that_was_loaded() -> None:
    source = toy_source()
    source.load_state_dict({"seed": 3, "epoch": 2, "position": 48})
    source.set_epoch(2)
    assert next(iter(source)).indices[0] == 0
    assert source.epoch == 2


def test_loading_a_state_ends_the_pass_that_runs() -> None:
    source = toy_source()
    iterator = iter(source)
    next(iterator)
    source.load_state_dict({"seed": 3, "epoch": 0, "position": 32})
    with pytest.raises(RuntimeError, match="set during a pass"):
        next(iterator)
    assert next(iter(source)).indices[0] == 32


def test_an_epoch_that_the_launchers_ranks_leave_empty_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_source()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "64")
    with pytest.raises(ValueError, match="world_size=64 needs at least 512"):
        next(iter(source))


def test_a_pass_after_a_resumed_one_starts_at_the_beginning() -> None:
    source = toy_source()
    source.load_state_dict({"seed": 3, "epoch": 0, "position": 16})
    assert len(list(source)) == 4
    assert len(list(source)) == 6


def test_a_next_epoch_that_begins_during_a_pass_ends_it() -> None:
    source = toy_source()
    outer = iter(source)
    next(outer)
    list(source)  # the same epoch
    list(source)  # the next one
    with pytest.raises(RuntimeError, match="next epoch began"):
        next(outer)


def test_state_is_plain_and_small() -> None:
    source = toy_source()
    next(iter(source))
    assert source.state_dict() == {"seed": 3, "epoch": 0, "position": 8}


# -- layouts, storage, loaders -------------------------------------------------------------------------------


def test_layouts(toy: Toy) -> None:
    pair = next(iter(toy_source(layout="pair")))
    solo = next(iter(toy_source(layout="solo")))
    light = next(iter(toy_source(layout="lightly")))
    views = next(iter(toy_source())).views
    assert isinstance(pair, tuple)
    assert isinstance(solo, list)
    indices, crops, targets = solo
    own, labels, names = light
    for got in (pair, crops, own):
        assert len(got) == 2
        assert all(torch.equal(a, b) for a, b in zip(got, views, strict=True))
    assert indices.dtype == targets.dtype == labels.dtype == torch.int64
    assert indices.tolist() == list(range(8))
    assert targets.tolist() == labels.tolist() == [-1] * 8
    assert names == [f"{i:010d}" for i in range(8)]


def test_layout_may_be_a_callable() -> None:
    assert next(iter(toy_source(layout=lambda batch: {"x": batch.views[0], "id": batch.indices})))[
        "id"
    ].tolist() == list(range(8))


def test_classes_are_drawn_per_sample_and_returned_as_targets() -> None:
    g = wrap_generator(
        lambda z, labels: (labels[:, None] / 10).expand(-1, 4).reshape(-1, 1, 2, 2),
        levels=[("z", (3,))],
        image_shape=(1, 2, 2),
        num_classes=10,
    )
    whole = toy_source(generator=g, perturb=Resample(), batch_size=48)
    batch = next(iter(whole))
    assert batch.targets.equal(g.sample_labels(range(48), seed=3))
    assert batch.targets.unique().numel() > 5
    for view in batch.views:  # the views of one sample share its class
        assert (view[:, 0, 0, 0] * 10).round().long().equal(batch.targets)
    parts = toy_source(generator=g, perturb=Resample(), batch_size=5, micro_batch_size=2, drop_last=False)
    assert torch.cat([part.targets for part in parts]).equal(batch.targets)


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="this CPU has no AVX-512"
)
def test_bfloat16_views_are_float32_and_close(fashion: MLVGM) -> None:
    exact, rounded = (next(iter(toy_source(generator=fashion, dtype=dtype))) for dtype in (None, "bfloat16"))
    for one, other in zip(exact.views, rounded.views, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().mean() < 0.01
    for one, other in zip(exact.latents, rounded.latents, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    plain = next(iter(toy_source(generator=fashion, dtype=torch.float32)))
    assert plain.views[1].equal(exact.views[1])


def test_bfloat16_is_refused_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match=r"bfloat16.*AVX2.*AVX-512"):
        toy_source(dtype="bfloat16")


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_views_are_the_same() -> None:
    plain, compiled = by_index(toy_source()), by_index(toy_source(compile=True))
    assert_same(plain, compiled)


def test_num_views_one_to_five() -> None:
    for count in range(1, 6):
        assert len(next(iter(toy_source(num_views=count, layout="pair")))) == count


@pytest.mark.parametrize(
    "options", [{}, {"perturb": None}, {"perturb": None, **T_X}, {"transform": lambda x: x}]
)
def test_every_batch_has_storage_of_its_own(options: dict[str, object]) -> None:
    batches = list(itertools.islice(toy_source(**options), 2))
    copies = [[view.clone() for view in batch.views] for batch in batches]
    batches[0].views[0].zero_()
    for batch, kept_views in zip(batches, copies, strict=True):
        for i, (view, kept) in enumerate(zip(batch.views, kept_views, strict=True)):
            assert (batch is batches[0] and i == 0) or torch.equal(view, kept)


def test_transform_per_view_and_of_the_users_own() -> None:
    own = next(iter(toy_source(transform=[None, lambda x: x + 10])))
    assert own.views[0].max() <= 1
    assert own.views[1].min() >= 10
    crop = next(iter(toy_source(transform=transforms.simclr(size=6, color=False))))
    assert [tuple(view.shape) for view in crop.views] == [(8, 3, 6, 6)] * 2


def test_in_a_data_loader_without_workers() -> None:
    loader = DataLoader(toy_source(layout="pair"), batch_size=None)
    assert len(loader) == 6
    assert [tuple(anchor.shape) for anchor, _ in loader] == [(8, 1, 4, 4)] * 6


def test_in_a_data_loader_with_workers_is_one_clear_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(toy_source(), batch_size=None, num_workers=1)
        with pytest.raises(ValueError, match="num_workers"):
            next(iter(loader))


# -- on the device -------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Lists the operations that make the host wait for the device, or copy between the two."""

    SYNCS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "item",
        "bincount",
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        name = func.overloadpacket.__name__
        if any(name == sync or name.startswith(f"{sync}_") for sync in self.SYNCS):
            self.waits.append(name)
        flat = [
            value
            for value in torch.utils._pytree.tree_leaves((args, kwargs, out))
            if isinstance(value, Tensor)
        ]
        found = {value.device.type for value in flat if value.dim()}
        self.devices |= {
            value.device.type for value in torch.utils._pytree.tree_leaves(out) if isinstance(value, Tensor)
        }
        if len(found) > 1:
            self.waits.append(f"{name} between {sorted(found)}")
        return out


SETTINGS = {
    "raw": {},
    "resample, three views, micro-batches": {
        "perturb": {0: Resample()},
        "num_views": 3,
        "micro_batch_size": 4,
    },
    "walker": {"perturb": {"1:": Walker(11)}},
    "walker that draws": {"perturb": {"1:": Walker(11, noise=True)}, "num_views": 3},
    "crop and flip": {"transform": transforms.simclr(12, color=False)},
    "byol": T_X,
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_step_never_waits_for_the_device(options: dict[str, object]) -> None:
    iterator = iter(toy_source(**options, layout="solo"))
    next(iterator)
    with Watch() as watch:
        next(iterator)
    assert watch.operations > 20
    assert watch.waits == []


@pytest.mark.parametrize("make", [Toy, FilmGenerator])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_everything_is_made_on_the_device(options: dict[str, object], make: type[MLVGM]) -> None:
    options = copy.deepcopy(options)  # a pipeline's constants must not outlive this mode
    perturbers = options.get("perturb", {})
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("cuda"):
            generator = make()
            if isinstance(walker := perturbers.get("1:"), Walker):
                width = sum(level.size for level in generator.levels[1:])
                options["perturb"] = {"1:": Walker(width, noise=walker.noise)}
        iterator = iter(toy_source(**options, generator=generator, layout="solo", device="cuda"))
        next(iterator)  # the plan's constants are sent there once
        with Watch() as watch:
            indices, views, targets = next(iterator)
    assert {value.device.type for value in (indices, targets, *views)} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []


def test_memory_is_flat_over_2000_batches() -> None:
    source = toy_source(num_samples=2100 * 8, transform=transforms.simclr(12, color=False))
    iterator = iter(source)
    for _ in range(50):
        next(iterator)
    before = _tensors(), _resident()
    for _ in range(2000):
        next(iterator)
    assert _tensors() <= before[0] + 2
    assert _resident() - before[1] < 20_000_000


def _tensors() -> int:
    gc.collect()
    return sum(
        issubclass(type(value), Tensor) for value in gc.get_objects()
    )  # isinstance() follows weak references, dead ones too


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- crops and pools -----------------------------------------------------------------------------------------


def test_crops_are_cut_from_the_views_they_name() -> None:
    large, small = (
        transforms.Augmentation(size=4, normalize=None),
        transforms.Augmentation(size=2, normalize=None),
    )
    crops = toy_source(crops=(0, 1, 0, 1), transform=[large, large, small, small])
    batch, raw = next(iter(crops)), next(iter(toy_source()))
    assert [view.shape[-1] for view in batch.views] == [4, 4, 2, 2]
    assert len(batch.latents) == 2
    for crop, (view, augment) in enumerate(zip((0, 1, 0, 1), (large, large, small, small), strict=True)):
        assert torch.equal(
            batch.views[crop], augment(raw.views[view], raw.indices, seed=3, epoch=0, view=crop)
        )
    assert_same(by_index(toy_source(crops=[0, 1])), by_index(toy_source()), 0)


@pytest.mark.parametrize("crops", [[], [0, 2], [-1], "01", [0.5], 3])
def test_bad_crops(crops: object) -> None:
    with pytest.raises(ValueError, match="Invalid crops="):
        toy_source(crops=crops)


def test_a_pool_has_the_same_samples_in_every_epoch_in_a_new_order() -> None:
    pool = toy_source(pool=True)
    orders, contents = [], []
    for _ in range(3):
        batches = list(pool)
        orders.append([int(i) for batch in batches for i in batch.indices])
        contents.append(by_index(batches))
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(48))
    for content in contents:
        assert_same(content, by_index(toy_source()))
    names = next(iter(toy_source(pool=True, layout="lightly")))[2]
    assert names == [f"{i:010d}" for i in orders[0][:8]]


def test_a_pool_is_newly_augmented_partitioned_and_resumed() -> None:
    options = {"pool": True, "transform": transforms.simclr(4, color=False)}
    whole = toy_source(**options)
    first, second = by_index(whole), by_index(whole)
    assert any(not torch.equal(first[i], second[i]) for i in first)
    parts = [toy_source(rank=rank, world_size=2, batch_size=6, **options) for rank in range(2)]
    assert_same(by_index(itertools.chain(*parts)), first)
    stopped, rest = toy_source(**options), toy_source(**options)
    stopped.set_epoch(1)
    before = list(itertools.islice(stopped, 2))
    rest.load_state_dict(stopped.state_dict())
    assert_same(by_index([*before, *rest]), second)


def test_a_pools_state_is_that_of_its_size() -> None:
    state = toy_source(pool=True).state_dict()
    assert state["num_samples"] == 48
    with pytest.raises(ValueError, match="num_samples=48, this one has 40"):
        toy_source(pool=True, num_samples=40).load_state_dict(state)
    del state["num_samples"]
    toy_source(pool=True).load_state_dict(state)  # of an earlier version


def test_a_pool_begun_in_inference_mode_can_be_trained_on() -> None:
    pool = toy_source(pool=True)
    with torch.inference_mode():
        next(iter(pool))
    batch = next(iter(pool))
    assert not batch.indices.is_inference()
    assert torch.nn.Embedding(48, 2)(batch.indices).sum().requires_grad


def test_a_view_cut_twice_is_two_tensors() -> None:
    one, other = next(iter(toy_source(num_views=1, crops=(0, 0)))).views
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()


# -- users' code may work in place ---------------------------------------------------------------------------


class Doubling(Perturber):
    """A perturber that works in place."""

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal:
        return anchor

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [z.mul_(2).add_(w.mul_(3)) for z, w in zip(latents, noise or (), strict=True)]


class DoublingACopy(Doubling):
    """The same, out of place."""

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [2 * z + 3 * w for z, w in zip(latents, noise or (), strict=True)]


def storages(batch: Batch) -> list[int]:
    """Where the tensors of a batch are kept."""
    tensors = [*batch.views, batch.indices, batch.targets, *(z for view in batch.latents for z in view)]
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@pytest.mark.parametrize("views", [2, 4])
def test_a_perturber_may_work_in_place(views: int) -> None:
    sources = [toy_source(perturb={"1:": kind()}, num_views=views) for kind in (Doubling, DoublingACopy)]
    for mine, theirs in zip(*(source.batch(0, 8).latents for source in sources), strict=True):
        for z, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("transform", [lambda x: x.mul_(-1), lambda x: -x], ids=["in place", "copy"])
def test_a_transform_may_work_in_place(transform: Callable[[Tensor], Tensor]) -> None:
    raw = toy_source(crops=(0, 1, 0, 1)).batch(0, 8).views
    views = toy_source(crops=(0, 1, 0, 1), transform=transform).batch(0, 8).views
    for view, expected in zip(views, raw, strict=True):
        assert torch.equal(view, -expected)


@pytest.mark.parametrize("transform", [None, nn.Identity(), transforms.Augmentation(size=4)])
@pytest.mark.parametrize("options", [{}, {"crops": (0, 1, 0, 1)}, {"perturb": None}, {"pool": True}])
def test_no_two_outputs_share_storage(transform: object, options: dict[str, object]) -> None:
    places = storages(toy_source(transform=transform, **options).batch(0, 8))
    assert len(set(places)) == len(places)


def test_a_layout_may_work_in_place() -> None:
    def spoil(batch: Batch) -> Batch:
        for tensor in [*batch.views, batch.indices, batch.targets, *batch.latents[0]]:
            tensor.zero_()
        return batch

    for options in ({}, {"pool": True}, {"perturb": None}):
        spoiled, source = toy_source(layout=spoil, **options), toy_source(**options)
        for epoch in range(2):
            for mine, theirs in zip(spoiled, source, strict=True):
                assert torch.equal(mine.latents[1][0], theirs.latents[1][0]), epoch
        expected, batch = source.batch(8, 16), spoiled.batch(8, 16)
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.views[1], expected.views[1])


def test_a_wrapped_callable_may_work_in_place() -> None:
    def spoil(latents: list[Tensor]) -> Tensor:
        image = latents[0].view(-1, 1, 2, 2).clone().sigmoid()
        for z in latents:
            z.zero_()
        return image

    generator = wrap_generator(spoil, levels=[("a", (4,)), ("b", (3,))], image_shape=(1, 2, 2))
    z = generator.sample_latents(range(3))
    generator(z)
    assert z[0].abs().sum() > 0
    for perturb in (None, {"b": Normal(1.0)}):
        batch = MLViewSource(generator, perturb, batch_size=4, num_samples=4).batch(0, 4)
        assert torch.equal(batch.latents[0][0].view(-1, 1, 2, 2).sigmoid(), batch.views[0])


def test_a_state_of_a_late_epoch_is_gone_on_with() -> None:
    epoch = 1 << 20
    source = toy_source()
    source.set_epoch(epoch)
    passing = iter(source)
    next(passing)
    state, expected = source.state_dict(), next(passing)
    resumed = toy_source()
    resumed.load_state_dict(state)
    resumed.set_epoch(epoch)
    first = next(iter(resumed))
    assert first.indices.tolist() == expected.indices.tolist() == list(range(8, 16))
    assert torch.equal(first.views[1], expected.views[1])


def test_a_callable_that_hands_its_latents_out_as_images_keeps_them_apart() -> None:
    generator = wrap_generator(lambda z: z[0].view(-1, 1, 2, 2), levels=[("a", (4,))], image_shape=(1, 2, 2))
    for perturb in (None, Normal(1.0)):
        source = MLViewSource(generator, perturb, batch_size=4, num_samples=4, transform=lambda x: x.zero_())
        batch = source.batch(0, 4)
        assert batch.latents[0][0].abs().sum() > 0
        assert len(set(storages(batch))) == len(storages(batch))
