from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Toy, external
from torch import Tensor, nn

import mlviews
from mlviews import MLVGM, Level, MLViewSource, load_generator, wrap_generator
from mlviews.generators.base import Latents
from mlviews.generators.cpu import to_few_channels
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.perturb import Resample


def views_of(g: MLVGM, first: int, count: int = 3, batch: int = 4) -> list[list[Tensor]]:
    """Return latents of several views that agree below level ``first``."""
    anchors = g.sample_latents(range(batch))
    views = [anchors]
    for view in range(1, count):
        fresh = g.sample_latents(range(batch), seed=view)
        views.append([*anchors[:first], *fresh[first:]])
    return views


def test_definition_1_is_the_blocks_in_order(toy: Toy) -> None:
    z = toy.sample_latents(range(4))
    state = None
    for block, latent in zip(toy.blocks, z, strict=True):
        state = block(latent, state)
    assert torch.equal(toy(z), toy.to_image(state))


@pytest.mark.parametrize("first", range(4))
def test_shared_prefix_changes_no_image(toy: Toy, first: int) -> None:
    views = views_of(toy, first)
    for shared, alone in zip(toy.decode_views(views, first), [toy(z) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("first", range(4))
def test_blocks_before_the_first_perturbed_level_run_once(toy: Toy, first: int) -> None:
    views = views_of(toy, first)
    for block in toy.blocks:
        block.rows = 0
    toy.decode_views(views, first)
    assert [block.rows for block in toy.blocks] == [4 if level < first else 12 for level in range(3)]


def test_equal_views_have_storage_of_their_own(toy: Toy) -> None:
    first, second = toy.decode_views(views_of(toy, 3, count=2), 3)
    assert torch.equal(first, second)
    first.zero_()
    assert second.abs().sum() > 0


def test_tuple_states_are_shared_too() -> None:
    State = tuple[Tensor, tuple[Tensor]]

    class Pair(nn.Module):
        def forward(self, z: Tensor, state: State | None) -> State:
            return (z, (z,)) if state is None else (state[0] + z, (state[1][0] * z,))

    class Tupled(MLVGM):
        def to_image(self, state: State) -> Tensor:
            return torch.sigmoid(state[0] + state[1][0]).view(-1, 1, 2, 2)

    g = Tupled([Pair(), Pair(), Pair()], [Level(name, (4,)) for name in "abc"], (1, 2, 2))
    views = views_of(g, 1)
    for shared, alone in zip(g.decode_views(views, 1), [g(z) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


def conditional() -> MLVGM:
    """Return a generator of ten classes, whose label is the image's brightness."""
    return wrap_generator(
        lambda z, labels: (z[1].sigmoid() * 0.01 + labels[:, None] / 10).view(-1, 1, 2, 2),
        levels=[("a", (3,)), ("b", (4,))],
        image_shape=(1, 2, 2),
        num_classes=10,
    )


def test_labels_reach_a_class_conditional_generator() -> None:
    g = conditional()
    labels = g.sample_labels(range(6), seed=1)
    images = g(g.sample_latents(range(6)), labels)
    assert (images.flatten(1).mean(1) * 10).long().equal(labels)
    views = views_of(g, 1, batch=6)
    for shared, alone in zip(g.decode_views(views, 1, labels), [g(z, labels) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


def test_labels_are_uniform_and_depend_on_the_index_only() -> None:
    g = conditional()
    labels = g.sample_labels(range(20_000), seed=3)
    counts = labels.bincount(minlength=10)
    assert labels.dtype == torch.int64
    assert counts.shape == (10,)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    assert g.sample_labels([17, 5], seed=3).equal(labels[[17, 5]])


KINDS: dict[str, dict[str, str]] = {  # and the options that their small files need
    "fashion": {},
    "fashion-nvae": {},
    "fashion-diffusion": {},
    "fashion-semafo": {},
    "bigbigan": {},
    "biggan-deep": {},
    "stylegan2": {},
    "nvae": {},
    "vdvae": {"hps": "cifar10", "dec_blocks": "1x1,4m1,4x1,8m4,8x1", "enc_blocks": "8x1,8d2,4x1,4d4,1x1"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_generator(kind: str, tmp_path: Path) -> None:
    """All take empty batches, are copied, and keep no trace of the caller's default device and precision."""
    weights = None
    if not kind.startswith("fashion"):
        weights = external("stylegan2-cars" if kind == "stylegan2" else kind, tmp_path / "w.pt")
    g = load_generator(kind, weights=weights, **KINDS[kind])
    z = g.sample_latents(range(3))
    labels = g.sample_labels(range(3)) if g.num_classes else None
    none = None if labels is None else labels[:0]
    images = g(z, labels)
    assert images.std() > 1e-3
    assert g([level[:0] for level in z], none).shape == (0, *g.image_shape)
    no_views = g.decode_views([[level[:0] for level in z]] * 2, 1, none)
    assert [view.shape for view in no_views] == [(0, *g.image_shape)] * 2
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            elsewhere = load_generator(kind, weights=weights, **KINDS[kind])
    finally:
        torch.set_default_dtype(torch.float32)
    for equal in (copy.deepcopy(g), pickle.loads(pickle.dumps(g)), elsewhere):
        torch.testing.assert_close(equal(z, labels), images, atol=1e-5, rtol=0)
    moved = g.sample_latents(range(3), seed=1)
    assert all((distance > 0).all() and distance.shape == (3,) for distance in g.distances(z, moved, labels))


def test_distances_are_l2_norms_of_each_level(toy: Toy) -> None:
    anchors, positives = toy.sample_latents(range(4)), toy.sample_latents(range(4), seed=1)
    for distance, a, b in zip(toy.distances(anchors, positives), anchors, positives, strict=True):
        torch.testing.assert_close(distance, (a - b).square().sum(1).sqrt())


def test_a_tensor_in_several_places_is_conditioned_as_one() -> None:
    class Mapped(Toy):
        seen: set[int]

        def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Tensor]:
            self.seen = {id(z) for z in latents}
            return latents

    g = Mapped((4, 4, 4), tied=True)
    source = MLViewSource(g, {2: Resample()}, batch_size=4, num_samples=4, micro_batch_size=2)
    source.batch(0, 4)
    assert len(g.seen) == 2  # the positive: levels 0 and 1 hold the anchor's, level 2 its own
    g.half()
    g(g.sample_latents(range(2)))
    assert len(g.seen) == 1


def test_frozen_and_in_eval_mode_whatever_is_called(toy: Toy) -> None:
    toy.train()
    assert not toy.training
    assert not any(module.training for module in toy.modules())
    assert not any(parameter.requires_grad for parameter in toy.parameters())
    assert not toy(toy.sample_latents(range(2))).requires_grad


def test_modules_of_a_subclass_are_frozen_too() -> None:
    class Headed(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))

        def to_image(self, state: Tensor) -> Tensor:
            return super().to_image(self.head(state))

    g = Headed()
    z = g.sample_latents(range(3))
    assert torch.equal(g(z), g(z)), "dropout must be off"
    assert not any(parameter.requires_grad for parameter in g.parameters())


def test_half_precision_generators_take_and_give_floats(fashion: MLVGM) -> None:
    g = load_generator("fashion").to(torch.bfloat16)
    z = g.sample_latents(range(2))
    assert z[0].dtype == torch.float32
    images = g(z)
    assert images.dtype == torch.float32
    assert (images - fashion(z)).abs().mean() < 0.02


def test_decode_is_differentiable_in_the_latents(toy: Toy) -> None:
    z = [value.requires_grad_() for value in toy.sample_latents(range(2))]
    toy.decode(z).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)


def test_samples_depend_on_seed_epoch_and_index_only(toy: Toy) -> None:
    whole = toy.sample_latents(range(10), seed=5, epoch=2)
    for level, value in enumerate(toy.sample_latents([7, 1], seed=5, epoch=2)):
        assert torch.equal(value, whole[level][[7, 1]])
    for seed, epoch in ((6, 2), (5, 3)):
        assert not torch.equal(toy.sample_latents(range(10), seed=seed, epoch=epoch)[0], whole[0])


def test_truncation_is_the_generators_unless_given(toy: Toy) -> None:
    assert toy.sample_latents(range(2000))[0].abs().max() <= 2
    assert toy.sample_latents(range(2000), truncation=None)[0].abs().max() > 2
    assert toy.sample_latents(range(2000), truncation=0.5, std=2.0, mean=1.0)[0].sub(1).abs().max() <= 1


def test_tied_levels_share_one_draw() -> None:
    g = Toy(dims=(4, 4, 4), tied=True)
    z = g.sample_latents(range(3))
    assert len(z) == 3
    assert torch.equal(z[0], z[1])
    assert torch.equal(z[0], z[2])


def test_wrapped_callable() -> None:
    def fn(z: list[Tensor]) -> Tensor:
        return torch.sigmoid(z[0].view(-1, 1, 2, 2) + z[1].sum((1, 2))[:, None, None, None])

    g = wrap_generator(fn, levels=[Level("coarse", (4,)), ("fine", (3, 3))], image_shape=(1, 2, 2))
    z = g.sample_latents(range(5))
    assert [tuple(value.shape) for value in z] == [(5, 4), (5, 3, 3)]
    assert torch.equal(g(z), fn(z))
    assert [level.name for level in g.levels] == ["coarse", "fine"]
    views = views_of(g, 1)
    for shared, alone in zip(g.decode_views(views, 1), [g(latents) for latents in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


def test_wrapped_module_is_frozen_and_moves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def forward(self, z: list[Tensor]) -> Tensor:
            return torch.sigmoid(self.layer(z[0])).view(-1, 1, 2, 2)

    g = wrap_generator(Net(), levels=[("z", (4,))], image_shape=(1, 2, 2))
    z = g.sample_latents(range(3))
    assert torch.equal(g(z), g(z)), "dropout must be off"
    assert not any(parameter.requires_grad for parameter in g.parameters())
    assert next(g.to("meta").parameters()).device.type == "meta"
    assert g.device.type == "meta"
    # It is where the module was, and in its precision.
    wrapped = wrap_generator(Net().double(), levels=[("z", (4,))], image_shape=(1, 2, 2))
    assert wrapped(wrapped.sample_latents(range(3))).dtype == torch.float32
    assert wrap_generator(Net().to("meta"), levels=[("z", (4,))], image_shape=(1, 2, 2)).device.type == "meta"


def test_bundled_generator(fashion: MLVGM) -> None:
    z = fashion.sample_latents(range(8), seed=0)
    assert [tuple(value.shape) for value in z] == [(8, *level.shape) for level in fashion.levels]
    x = fashion(z)
    assert x.shape == (8, *fashion.image_shape)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < 0.05
    assert 0.8 < x.max() <= 1
    assert x.flatten(1).std(0).mean() > 0.1, "samples must differ"


@pytest.mark.parametrize("first", range(5))
def test_bundled_generator_shares_prefixes_exactly(fashion: MLVGM, first: int) -> None:
    views = views_of(fashion, first)
    for shared, alone in zip(fashion.decode_views(views, first), [fashion(z) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("channels", "out"), [(24, 1), (8, 3)])
def test_a_convolution_to_few_channels_is_the_convolution(channels: int, out: int) -> None:
    x = torch.randn(2, channels, 5, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(out, channels, 3, 3), torch.randn(out)
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(to_few_channels(x, weight, bias), expected, atol=1e-4, rtol=0)


def test_the_fast_way_makes_the_images_that_training_sees(fashion: MLVGM) -> None:
    z = fashion.sample_latents(range(40))
    torch.testing.assert_close(fashion(z), fashion.decode(z), atol=1e-5, rtol=0)


def test_film_sizes_follow_the_configuration() -> None:
    config = FilmConfig(
        dims=(2, 3), channels=(8, 16), image_channels=3, groups=4, upsample="nearest", deep_first=True
    )
    g = FilmGenerator(config)
    assert g.image_shape == (3, 8, 8)
    assert g(g.sample_latents(range(2))).shape == (2, 3, 8, 8)


def test_generators_are_listed_with_what_they_need(fashion: MLVGM) -> None:
    infos = {info.name: info for info in mlviews.list_generators()}
    assert infos["fashion"].levels == fashion.levels
    assert infos["fashion"].image_shape == (1, 32, 32)
    assert "bundled" in infos["fashion"].weights
    assert [level.shape for level in infos["bigbigan"].levels or ()] == [(20,)] * 6
    assert infos["bigbigan"].image_shape == (3, 128, 128)
