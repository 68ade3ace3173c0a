"""pSp and e4e files: StyleGAN2 with an encoder of real images, whose codes are in W+."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psp as parity
import pytest
import torch
from conftest import assert_same, by_index
from fill import pictures
from safetensors.torch import load_file
from test_source import Watch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mlviews
from mlviews import MLViewSource, WeightsError, perturb
from mlviews.generators.stylegan import StyleGAN2, StyleGAN2Config
from mlviews.generators.stylegan.encoder import StyleEncoder, StyleEncoderConfig
from mlviews.runs.files import fingerprint
from mlviews.step import Batch
from mlviews.viz import view_images
from mlviews.weights import checkpoints

GOLDENS = [
    path for kind in ("e4e", "psp") for path in (Path(__file__).parent / "golden").glob(f"{kind}-*.npz")
]
E4E = next(path for path in GOLDENS if path.stem == "e4e-32px-tiny")
COUNT = 13  # images


def facts(golden: Path) -> dict[str, Any]:
    with np.load(golden) as file:
        loaded: dict[str, Any] = json.loads(str(file["facts"]))
    return loaded


@functools.cache
def tensors(golden: Path) -> dict[str, Tensor]:
    with np.load(golden) as file:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(file["shapes"])).items()}
        return parity.random_weights(shapes, int(file["seed"]))


def content(golden: Path) -> dict[str, Any]:
    """Return what the projects would have saved of a golden's network."""
    state = dict(tensors(golden))
    return {"latent_avg": state.pop("latent_avg"), "state_dict": state, "opts": facts(golden)}


def saved(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("psp") / "e4e.pt", content(E4E))


@pytest.fixture(scope="module")
def e4e(path: Path) -> StyleGAN2:
    """Return a generator of 8 styles in 4 levels, whose encoder looks at 32x32 pixels, to be fast."""
    generator = mlviews.load_generator("stylegan2", weights=path, groups=4)
    assert isinstance(generator, StyleGAN2)
    assert isinstance(generator.inverter, StyleEncoder)
    generator.inverter.config = dataclasses.replace(generator.inverter.config, size=(32, 32))
    return generator


@functools.cache
def images(count: int = COUNT) -> Tensor:
    return (pictures((3, 32, 32), count, 0) * 255).round().to(torch.uint8)


def whole(batch: Batch) -> Batch:
    return batch


def source(generator: StyleGAN2, **options: Any) -> MLViewSource:
    arguments = {
        "perturb": {"1:": perturb.Normal(0.6, 1.0)},
        "images": options.pop("images") if "images" in options else images(),
        "batch_size": 4,
        "layout": whole,
        "seed": 3,
        **options,
    }
    return MLViewSource(generator, **arguments)


# -- against the official code -------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_codes_and_reconstructions_are_the_official_ones(golden: Path, tmp_path: Path) -> None:
    generator = mlviews.load_generator(
        "stylegan2", weights=saved(tmp_path / "g.pt", content(golden)), groups=3
    )
    assert isinstance(generator, StyleGAN2)
    with np.load(golden) as file:
        codes, expected = torch.from_numpy(file["codes"]), torch.from_numpy(file["images"])
        seed = int(file["seed"])
    latents = generator.encode(pictures(generator.image_shape, len(codes), seed))
    torch.testing.assert_close(generator.w_plus(latents), codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(generator(latents), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.05
    assert (codes[0] - codes[1]).abs().mean() > 0.05


def test_every_kind_of_encoder_has_a_golden() -> None:
    kinds = [facts(golden)["encoder_type"] for golden in GOLDENS]
    assert sorted(kinds) == [*["Encoder4Editing"] * 2, "GradualStyleEncoder", "SingleStyleCodeEncoder"]


# -- a code in W+ --------------------------------------------------------------------------------------------


def test_latents_of_images_hold_the_code_as_offsets(e4e: StyleGAN2) -> None:
    x = images(3).float() / 255
    latents = e4e.encode(x)
    assert [tuple(z.shape) for z in latents] == [(3, 16)] * 4 + [(3, 2, 16)] * 4
    assert [tuple(offset.shape) for offset in e4e.offsets] == [(2, 16)] * 4
    assert {z.dtype for z in latents} == {torch.float32}
    code = e4e.inverter(x)  # type: ignore[misc]
    torch.testing.assert_close(e4e.w_plus(latents), code, atol=1e-5, rtol=0)
    for level, place in enumerate(e4e.condition(latents, None)):
        torch.testing.assert_close(place, code[:, 2 * level : 2 * level + 2], atol=1e-5, rtol=0)
    drawn = e4e.sample_latents(range(3), seed=5)
    moved = e4e.from_w_plus(code, drawn)
    assert all(torch.equal(z, drawn[0]) for z in moved[:4])
    torch.testing.assert_close(e4e(moved), e4e(latents), atol=1e-5, rtol=0)


def test_drawn_latents_are_codes_without_offsets(e4e: StyleGAN2) -> None:
    z = e4e.sample_latents(range(3))
    code = e4e.w_plus(z)
    assert code.shape == (3, 8, 16)
    latents = e4e.from_w_plus(code, z)
    assert max(offset.abs().max() for offset in latents[4:]) == 0
    torch.testing.assert_close(e4e(latents), e4e(z), atol=1e-6, rtol=0)


def test_the_decoder_is_the_generator_alone(path: Path, tmp_path: Path, e4e: StyleGAN2) -> None:
    stored = content(E4E)
    half = {name: value for name, value in stored["state_dict"].items() if name.startswith("decoder.")}
    ema = {name.removeprefix("decoder."): value for name, value in half.items()}
    alone = saved(tmp_path / "alone.pt", {"g_ema": ema, "latent_avg": stored["latent_avg"].mean(0)})
    plain = mlviews.load_generator("stylegan2", weights=alone, groups=4, truncation_psi=0.7)
    truncated = mlviews.load_generator("stylegan2", weights=path, groups=4, truncation_psi=0.7)
    z = plain.sample_latents(range(2))
    torch.testing.assert_close(truncated(z), plain(z), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no encoder"):
        plain.encode(torch.zeros(1, 3, 32, 32))
    # psi is for what is drawn, and codes stay where they are.
    code = e4e.w_plus(e4e.encode(torch.zeros(1, 3, 32, 32)))
    torch.testing.assert_close(truncated.w_plus(truncated.from_w_plus(code)), code, atol=1e-5, rtol=0)
    decoder = mlviews.load_generator(
        "stylegan2", weights=saved(tmp_path / "half.pt", {**stored, "state_dict": half}), groups=4
    )
    assert decoder.inverter is None
    torch.testing.assert_close(decoder(z), e4e(z), atol=1e-6, rtol=0)


class Mirrored(perturb.Perturber):
    """A perturber of a user's own, which works in place."""

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        for z in latents:
            z[:, ::2].neg_()
        return latents


PERTURBERS: dict[str, dict[int | str, perturb.Perturber]] = {
    "normal": {0: perturb.Normal(0.2, 1.0), "2:": perturb.Normal(0.8, 1.0)},
    "resample": {"1:": perturb.Resample()},
    "walker": {1: perturb.Walker(16), "2:": perturb.Walker(32)},
    "own": {3: Mirrored()},
}


@pytest.mark.parametrize("name", PERTURBERS)
def test_positives_move_as_those_of_drawn_anchors(e4e: StyleGAN2, name: str) -> None:
    """``w_i' - w_i`` is ``f(T(z)) - f(z)``, for the z, the noise and so the magnitude that were measured."""
    options = {"perturb": PERTURBERS[name], "anchor": perturb.Normal(1.0, 1.5), "num_views": 3}
    real = source(e4e, **options, batch_size=COUNT).batch(0, COUNT)
    drawn = source(e4e, **options, images=None, batch_size=COUNT, num_samples=COUNT).batch(0, COUNT)
    order = real.indices.argsort()
    for view in (1, 2):
        start, end = (e4e.w_plus(real.latents[place])[order] for place in (0, view))
        expected = e4e.w_plus(drawn.latents[view]) - e4e.w_plus(drawn.latents[0])
        torch.testing.assert_close(end - start, expected, atol=1e-5, rtol=0)
        distances = e4e.distances(real.latents[0], real.latents[view])
        measured = e4e.distances(drawn.latents[0], drawn.latents[view])
        for distance, other in zip(distances, measured, strict=True):
            torch.testing.assert_close(distance[order], other, atol=1e-4, rtol=1e-4)
        assert max(distance.max() for distance in measured) > 0.01


def test_a_level_that_drops_its_offset_is_that_of_a_drawn_sample(e4e: StyleGAN2) -> None:
    """``w_i' = f(T(z))``: what the purifier does too; the z that it is drawn at is Resample's."""
    anchors, dropped = source(e4e, perturb={2: perturb.Resample("drop")}).batch(0, 4).latents
    kept = source(e4e, perturb={2: perturb.Resample()}).batch(0, 4).latents[1]
    assert all(torch.equal(z, other) for z, other in zip(dropped[:4], kept[:4], strict=True))
    code = e4e.w_plus(dropped)
    torch.testing.assert_close(code[:, 4:6], e4e.w_plus(dropped[:4])[:, 4:6], atol=1e-6, rtol=0)
    others = [0, 1, 2, 3, 6, 7]
    torch.testing.assert_close(code[:, others], e4e.w_plus(anchors)[:, others], atol=1e-6, rtol=0)
    assert (e4e.w_plus(kept)[:, 4:6] - code[:, 4:6]).abs().max() > 0.01


def test_anchors_are_reconstructed(e4e: StyleGAN2) -> None:
    batch = source(e4e, anchor_view="reconstructed").batch(0, 4)
    x = images()[batch.indices].float() / 255
    torch.testing.assert_close(batch.views[0], e4e(e4e.encode(x)), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.views[1], e4e(batch.latents[1]), atol=1e-5, rtol=0)
    real = source(e4e).batch(0, 4)
    assert torch.equal(real.views[0], x)
    torch.testing.assert_close(real.views[1], batch.views[1], atol=1e-5, rtol=0)


def test_levels_of_two_images_recombine(e4e: StyleGAN2) -> None:
    """A level is its z and its offset: the styles of a level go along with it."""
    x = images(2).float() / 255
    one, other = e4e.encode(x[:1]), e4e.encode(x[1:])
    mixed = mlviews.latents.recombine(one, other, 2, levels=len(e4e.levels))
    expected = [*one[:2], *other[2:4], *one[4:6], *other[6:]]
    assert all(torch.equal(value, level) for value, level in zip(mixed, expected, strict=True))
    code = torch.cat([e4e.w_plus(one)[:, :4], e4e.w_plus(other)[:, 4:]], dim=1)
    torch.testing.assert_close(e4e.w_plus(mixed), code, atol=1e-5, rtol=0)
    torch.testing.assert_close(e4e(mixed), e4e(e4e.from_w_plus(code)), atol=1e-5, rtol=0)


def test_distances_from_drawn_to_real_latents(e4e: StyleGAN2) -> None:
    z, latents = e4e.sample_latents(range(2)), e4e.encode(images(2).float() / 255)
    change = (e4e.w_plus(latents) - e4e.w_plus(z)).unflatten(1, (4, 2))  # [B, level, style, w]
    expected = change.flatten(2).norm(dim=2).unbind(1)
    for distance, norm in zip(e4e.distances(z, latents), expected, strict=True):
        torch.testing.assert_close(distance, norm, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", range(5))
def test_shared_prefixes_change_no_image(e4e: StyleGAN2, first: int) -> None:
    latents, others = e4e.encode(images(3).float() / 255), e4e.sample_latents(range(3), seed=1)
    views = [latents, [*latents[:first], *others[first:], *latents[4:]]]
    for shared, alone in zip(e4e.decode_views(views, first), [e4e(z) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)
    states = e4e.states(latents)
    image = e4e.decode(latents, state=states[first], start=first)
    torch.testing.assert_close(image, e4e(latents), atol=1e-5, rtol=0)


def test_reconstructions_are_differentiable_in_the_image(e4e: StyleGAN2) -> None:
    x = (images(2).float() / 255).requires_grad_()
    e4e.decode(e4e.infer(x)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_an_encoder_of_the_users_own(e4e: StyleGAN2) -> None:
    """Any module from images to W+ codes is an inverter of a StyleGAN2."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 8, 16)

    generator = copy.deepcopy(e4e)
    generator.inverter = Own()
    x = images(3).float() / 255
    torch.testing.assert_close(generator.w_plus(generator.encode(x)), Own()(x), atol=1e-5, rtol=0)


# -- a sample is a function of (seed, epoch, index, view, level) ---------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "p": {"generated": 0.5, "num_views": 3},
    "reconstructed, all levels": {"anchor_view": "reconstructed", "perturb": perturb.Resample()},
    "pool": {"pool": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_size_and_ranks_do_not_matter(e4e: StyleGAN2, name: str) -> None:
    options = {"drop_last": False, **SETTINGS[name]}
    expected = by_index(source(e4e, **options))
    assert_same(by_index(source(e4e, **options, batch_size=9, micro_batch_size=5)), expected, tolerance=1e-5)
    parts = [source(e4e, **options, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    together = by_index(itertools.chain(*parts))
    assert len(together) == COUNT - COUNT % 2
    assert_same(together, {index: expected[index] for index in together}, tolerance=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_goes_on_where_it_stopped(e4e: StyleGAN2, name: str) -> None:
    views, resumed, epoch = (source(e4e, **SETTINGS[name]) for _ in range(3))
    list(views)
    before = list(itertools.islice(views, 2))
    resumed.load_state_dict(views.state_dict())
    epoch.set_epoch(1)
    assert_same(by_index([*before, *resumed]), by_index(epoch), tolerance=1e-5)


def test_positives_are_new_in_every_epoch(e4e: StyleGAN2) -> None:
    views = source(e4e, drop_last=False)
    first, second = by_index(views), by_index(views)
    assert all((first[index][1] - second[index][1]).abs().max() > 1e-3 for index in first)


@pytest.mark.parametrize("options", [{}, {"generated": 0.5}])
def test_a_step_is_made_on_the_device_and_never_waits_for_it(options: dict[str, Any]) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        architecture = StyleGAN2Config(channels=(8, 8), z_dim=8, w_dim=8, mapping=(8, 8))
        generator = StyleGAN2(architecture, groups=2)
        for module in generator.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to("cuda"))  # a fake module cannot be moved as a whole
        config = StyleEncoderConfig(4, 8, (16,) * 5, size=(32, 32))
        generator.inverter = StyleEncoder(config).eval().requires_grad_(False)
        stored = torch.zeros(COUNT, 3, 8, 8, dtype=torch.uint8)
        iterator = iter(source(generator, images=stored, device="cuda", **options))
        next(iterator)  # the plan's constants are sent there once
        with Watch() as watch:
            batch = next(iterator)
    tensors = [batch.indices, batch.targets, *batch.views, *(z for view in batch.latents for z in view)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_it_travels_with_its_encoder(e4e: StyleGAN2, travel: Callable[[Any], Any]) -> None:
    x = images(2).float() / 255
    for expected, actual in zip(e4e.encode(x), travel(e4e).encode(x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert_same(by_index(travel(source(e4e))), by_index(source(e4e)), tolerance=1e-5)


# -- files and options ---------------------------------------------------------------------------------------


def test_a_converted_file_is_the_same_generator(path: Path, tmp_path: Path, e4e: StyleGAN2) -> None:
    assert checkpoints.convert(path, tmp_path / "e4e.safetensors").layout == "stylegan2-psp"
    again = mlviews.load_generator("stylegan2", weights=tmp_path / "e4e.safetensors", groups=4)
    assert fingerprint(again) == fingerprint(e4e)
    assert again.inverter is not None
    assert e4e.inverter is not None
    assert fingerprint(again.inverter) == fingerprint(e4e.inverter)
    assert not any(weight.requires_grad for weight in again.inverter.parameters())


def test_opts_may_be_a_namespace(tmp_path: Path, e4e: StyleGAN2) -> None:
    stored = content(E4E)
    stored["opts"] = argparse.Namespace(**stored["opts"])
    again = mlviews.load_generator("stylegan2", weights=saved(tmp_path / "g.pt", stored), groups=4)
    assert again.inverter is not None
    assert e4e.inverter is not None
    assert fingerprint(again.inverter) == fingerprint(e4e.inverter)


def test_another_inverter_takes_the_place_of_the_encoder(path: Path, tmp_path: Path) -> None:
    generator = mlviews.load_generator("stylegan2", weights=path, groups=4)
    inverter = mlviews.invert.Inverter.of(generator, width=16, hidden=16)
    inverter.save(tmp_path / "inverter.safetensors")
    other = mlviews.load_generator(
        "stylegan2", weights=path, groups=4, inverter=tmp_path / "inverter.safetensors"
    )
    latents = other.encode(torch.rand(2, 3, 32, 32))
    assert len(latents) == 4, "latents of the levels, without offsets"
    assert source(other).batch(0, 4).views[1].shape == (4, 3, 32, 32)


def test_cars_are_the_middle_of_the_image(tmp_path: Path) -> None:
    golden = next(path for path in GOLDENS if "cars" in path.stem)
    file = saved(tmp_path / "cars.pt", content(golden))
    cars, square, uncropped = (
        mlviews.load_generator("stylegan2", weights=file, groups=4, **options)
        for options in ({}, {"crop": 48, "size": 24}, {"crop": None})
    )
    assert [g.image_shape for g in (cars, square, uncropped)] == [(3, 48, 64), (3, 24, 24), (3, 64, 64)]
    configs = [g.inverter.config for g in (cars, square, uncropped)]  # type: ignore[union-attr]
    assert [(config.size, config.margin) for config in configs] == [
        ((192, 256), 0),
        ((192, 192), 0),
        ((192, 256), 8),
    ]
    x = pictures((3, 64, 64), 2, 0)
    expected = cars.w_plus(cars.encode(x[:, :, 8:56]))  # type: ignore[operator]
    torch.testing.assert_close(uncropped.w_plus(uncropped.encode(x)), expected)  # type: ignore[operator]
    assert len(square.encode(x[:, :, :24, :24])) == 8


def test_pictures_and_exports_of_real_images(e4e: StyleGAN2, tmp_path: Path) -> None:
    from mlviews.integrations.files import export

    views = source(e4e, transform=None)
    panels = view_images(views, anchors=3, views=4)
    assert [view.shape for view in panels.generated] == [(3, 3, 32, 32)] * 4
    export(source(e4e, images=images(2), batch_size=2), tmp_path, progress=False)
    names = load_file(next(tmp_path.rglob("*.safetensors"))).keys()
    assert {"view0.styles 1-2", "view1.offset of styles 7-8"} <= names


def test_the_explorer_recombines_codes(e4e: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlviews.explorer import session

    config = {"generator": e4e, "images": images(3), "perturb": {"1:": {"name": "normal"}}}
    monkeypatch.setattr(session, "_configuration", lambda *_: config)
    explored = session.Session("codes")
    (rows,), columns = explored.recombination(dataclasses.replace(explored.initial, split=2))
    assert len(rows) == 1 + len(columns) == 4
    torch.testing.assert_close(columns[1][2], columns[1][0], atol=1e-5, rtol=0)


Change = Callable[[dict[str, Any]], Any]


def without(*names: str) -> Change:
    return lambda stored: [stored["state_dict"].pop(f"encoder.{name}") for name in names]


def replaced(name: str, value: Tensor) -> Change:
    return lambda stored: stored["state_dict"].update({f"encoder.{name}": value})


def option(**facts: Any) -> Change:
    return lambda stored: stored["opts"].update(facts)


def only(kept: Callable[[str], bool]) -> Change:
    def change(stored: dict[str, Any]) -> None:
        stored["state_dict"] = {name: value for name, value in stored["state_dict"].items() if kept(name)}

    return change


UNIT = "body.3.res_layer"
BROKEN: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (without(f"{UNIT}.4.running_var"), rf"encoder.{UNIT}.4.running_var is missing"),
    "no squeeze and excitation": (without("body.0.res_layer.5.fc1.weight"), r"body.0.res_layer.5.fc1"),
    "a unit too many": (
        replaced("body.24.res_layer.1.weight", torch.zeros(48, 48, 3, 3)),
        "unknown.*body.24",
    ),
    "a unit too few": (
        only(lambda name: not name.startswith("encoder.body.23.")),
        "encoder.body.23.res_layer.0.weight is missing",
    ),
    "a head too few": (
        only(lambda name: not name.startswith("encoder.styles.7.")),
        "encoder.styles.7.convs.0.weight is missing",
    ),
    "a wrong shape": (replaced(f"{UNIT}.3.weight", torch.zeros(32, 32, 1, 1)), r"\(32, 32, 1, 1\), expected"),
    "nothing": (replaced("latlayer1.weight", torch.zeros(48, 0, 1, 1)), r"\(48, 0, 1, 1\)"),
    "not a number": (replaced("latlayer1.bias", torch.full((48,), torch.nan)), "NaN"),
    "integers": (replaced("latlayer1.bias", torch.zeros(48, dtype=torch.int64)), "torch.int64"),
    "a variance below 0": (replaced(f"{UNIT}.0.running_var", -torch.ones(16)), "damaged.*below 0"),
    "wide squeezes": (
        replaced("body.5.res_layer.5.fc1.weight", torch.zeros(9, 32, 1, 1)),
        r"fc1.weight has shape \(9, 32, 1, 1\), expected \(2, 32, 1, 1\)",
    ),
    "sketches": (replaced("input_layer.0.weight", torch.zeros(16, 1, 3, 3)), "no color images"),
    "another encoder": (
        replaced("output_layer_2.0.weight", torch.zeros(48)),
        "LastLayerIntoWPlus.*Encoder4Editing, GradualStyleEncoder, SingleStyle",
    ),
    "no opts": (lambda stored: stored.pop("opts"), "encoder_type.*None.*Encoder4Editing, Gradual"),
    "an unknown encoder": (option(encoder_type="x" * 10_000), "encoder_type of its opts is 'xx"),
    "a list for an encoder": (option(encoder_type=[[]]), r"encoder_type of its opts is '?\[\[\]\]"),
    "a start that is text": (option(start_from_latent_avg="yes"), "start_from_latent_avg is 'yes'"),
    "no mean": (lambda stored: stored.pop("latent_avg"), "latent_avg is missing"),
    "a short mean": (lambda stored: stored.update(latent_avg=torch.zeros(3, 16)), r"latent_avg.*\(3, 16\)"),
    "a mean in three dimensions": (
        lambda stored: stored.update(latent_avg=torch.zeros(1, 8, 16)),
        r"latent_avg has shape \(1, 8, 16\)",
    ),
    "a mean of another width": (lambda stored: stored.update(latent_avg=torch.zeros(8, 9)), "9"),
    "a damaged decoder": (
        only(lambda name: name != "decoder.convs.0.conv.weight"),
        "convs.0.conv.weight is missing",
    ),
    "a wider decoder": (
        lambda stored: stored["state_dict"].update(
            {"decoder.convs.0.conv.weight": torch.zeros(1, 9, 8, 3, 3)}
        ),
        "shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_error(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    stored = content(E4E)
    change(stored)
    with pytest.raises(WeightsError, match=message) as raised:
        mlviews.load_generator("stylegan2", weights=saved(tmp_path / "g.pt", stored))
    assert str(raised.value).startswith(f"{tmp_path / 'g.pt'} ")
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


class Command:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["opts", "encoder_type", "latent_avg", "state_dict", "a tensor"])
def test_nothing_in_a_file_is_executed(place: str, tmp_path: Path) -> None:
    stored, command = content(E4E), Command(tmp_path / "canary")
    if place == "encoder_type":
        stored["opts"][place] = command
    elif place == "a tensor":
        stored["state_dict"]["encoder.latlayer1.bias"] = command
    else:
        stored[place] = command
    file = saved(tmp_path / "g.pt", stored)
    with pytest.raises(WeightsError) as raised:
        mlviews.load_generator("stylegan2", weights=file)
    assert not (tmp_path / "canary").exists()
    assert len(str(raised.value)) < 1000
    torch.load(file, weights_only=False)
    assert (tmp_path / "canary").exists(), "the file is alive"


def test_latents_that_do_not_fit(e4e: StyleGAN2) -> None:
    z = e4e.sample_latents(range(2))
    with pytest.raises(ValueError, match=r"Got 5 latents for 4 levels"):
        e4e([*z, torch.zeros(2, 2, 16)])
    with pytest.raises(ValueError, match=r"Level 'offset of styles 1-2'.*expected \(2, 2, 16\)"):
        e4e([*z, *[torch.zeros(2, 16)] * 4])
