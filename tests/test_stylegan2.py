from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stylegan2 as parity
import torch
import torch.nn.functional as F
from torch import Tensor

import mlviews
from mlviews import MLViewSource, WeightsError, perturb
from mlviews.generators import winograd
from mlviews.generators.stylegan import reading
from mlviews.generators.stylegan.reading import load as load_stylegan2
from mlviews.generators.stylegan.stylegan2 import StyledConvolution, StyleGAN2, StyleGAN2Config
from mlviews.weights.checkpoints import Checkpoint

GOLDENS = sorted((Path(__file__).parent / "golden").glob("stylegan2-*.npz"))


def checkpoint(
    resolution: int = 32, classes: int = 0, concatenated: bool = False, base: int = 512, **facts: Any
) -> Checkpoint:
    """Return a small network in the TensorFlow layout: 16 channels at 32 pixels, or base / 32."""
    facts = parity.tf(resolution, base, 64, classes, dim=8, layers=2, **facts)
    tensors = parity.random_weights(parity.variables(facts, concatenated), 1)
    return Checkpoint("stylegan2-tf", tensors, facts, "small.pkl")


@pytest.fixture(scope="module")
def small() -> StyleGAN2:
    return load_stylegan2(checkpoint(), groups=4)


@pytest.fixture(scope="module")
def wide() -> StyleGAN2:
    """Return a network that is wide enough for the fast convolutions, in both kinds of layers."""
    g = load_stylegan2(checkpoint(64, base=4096))
    layers = [module for module in g.modules() if isinstance(module, StyledConvolution)]
    assert [layer.filter is not None for layer in layers if layer.suits_winograd] == [True, False] * 2
    return g


# -- against the official code -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_images_are_the_official_ones(path: Path) -> None:
    with np.load(path) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
        layout = str(golden["layout"])
        facts = json.loads(str(golden["facts"]))
        seed = int(golden["seed"])
        psi = float(golden["psi"])
        images = torch.from_numpy(golden["images"])
    g = load_stylegan2(
        Checkpoint(layout, parity.random_weights(shapes, seed), facts, path.name), truncation_psi=psi
    )
    labels = g.sample_labels(range(len(images)), seed) if g.num_classes else None
    actual = g(g.sample_latents(range(len(images)), seed, truncation=None), labels)
    torch.testing.assert_close(actual, images, atol=1e-4, rtol=0)
    assert images.std() > 0.05


def test_stylegan3_has_the_arguments_of_the_synthesis_network_beside_the_others() -> None:
    path = next(path for path in GOLDENS if path.stem == "stylegan2-ada-16px-tiny")
    with np.load(path) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
        facts = json.loads(str(golden["facts"]))
    nested = facts.pop("synthesis_kwargs")
    tensors = parity.random_weights(shapes, 0)

    def clamp(**synthesis: Any) -> float | None:
        stored = Checkpoint("stylegan2-ada", tensors, facts | nested | synthesis, path.name)
        return reading.convert(stored)[0].clamp

    assert clamp(conv_clamp=2.0) == 2.0
    assert clamp(conv_clamp=None) is None
    with pytest.raises(WeightsError, match="architecture is 'resnet'"):
        clamp(architecture="resnet")
    # What the layers say counts for more than what the generator was called with.
    both = Checkpoint(
        "stylegan2-ada", tensors, facts | {"synthesis_kwargs": nested, "conv_clamp": 256}, path.name
    )
    assert reading.convert(both)[0].clamp == 256


def test_every_layout_has_a_golden() -> None:
    assert len(GOLDENS) == 4


def test_compiled_it_takes_the_plain_convolutions(wide: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    z = wide.sample_latents(range(2))
    expected = wide(z)
    monkeypatch.setattr(winograd, "convolve", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(wide(z), expected, atol=1e-4, rtol=0)


def test_concatenated_labels_are_normalised_with_z() -> None:
    stored = checkpoint(16, classes=3, concatenated=True)
    g = load_stylegan2(stored)
    z, labels = torch.randn(3, 8), torch.arange(3)
    x = torch.cat([z, stored.tensors["G_mapping/LabelConcat/weight"]], dim=1)
    x = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in range(2):
        weight, bias = (stored.tensors[f"G_mapping/Dense{layer}/{part}"] for part in ("weight", "bias"))
        x = F.leaky_relu(x @ (weight * 0.01 / len(weight) ** 0.5) + bias * 0.01, 0.2) * 2**0.5
    torch.testing.assert_close(g.condition([z] * 6, labels)[0], x, atol=1e-5, rtol=1e-4)


# -- levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [(1, [8]), (3, [3, 3, 2]), (4, [2, 2, 2, 2]), (5, [2, 2, 2, 1, 1]), (None, [1] * 8)],
)
def test_groups_are_as_even_as_possible(groups: int | None, sizes: list[int]) -> None:
    g = load_stylegan2(checkpoint(), groups=groups)
    assert [run.length for run in g.runs] == sizes
    assert g.level_names[0] == ("style 1" if sizes[0] == 1 else f"styles 1-{sizes[0]}")
    z = g.sample_latents(range(2))
    torch.testing.assert_close(g(z), load_stylegan2(checkpoint())(z[:1] * 8), atol=1e-6, rtol=0)


def test_one_draw_feeds_every_level_and_is_mapped_once(small: StyleGAN2) -> None:
    z = small.sample_latents(range(3))
    assert all(value is z[0] for value in z)
    rows = []
    counter = small.mapping.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    w = small.condition(z, None)
    assert all(value is w[0] for value in w)
    moved = z[0] + 1
    changed = small.condition([z[0], z[1], moved, z[3]], None)
    counter.remove()
    assert rows == [3, 6]
    torch.testing.assert_close(changed[1], w[0])
    torch.testing.assert_close(changed[2], small.condition([moved] * 4, None)[0])


def test_a_level_moves_its_own_styles_only(small: StyleGAN2) -> None:
    """The paper's definition: w_i' = f(T_i(z)) on the layers of group i, w = f(z) on all others."""
    z, moved = small.sample_latents(range(2))[0], small.sample_latents(range(2), seed=1)[0]
    ungrouped = load_stylegan2(checkpoint())
    for group in range(4):
        styles = [moved if group * 2 <= style < group * 2 + 2 else z for style in range(8)]
        grouped = [moved if level == group else z for level in range(4)]
        torch.testing.assert_close(small(grouped), ungrouped(styles), atol=1e-6, rtol=0)


def test_distances_are_in_w_over_the_styles_of_a_group(small: StyleGAN2) -> None:
    z, moved = small.sample_latents(range(3))[0], small.sample_latents(range(3), seed=1)[0]
    distances = small.distances([z] * 4, [z, moved, z, moved])
    w = small.condition([z] * 4, None)[0]
    w_moved = small.condition([moved] * 4, None)[0]
    expected = torch.cat([w_moved - w] * 2, dim=1).norm(dim=1)
    assert distances[0].abs().max() == 0
    torch.testing.assert_close(distances[1], expected)
    torch.testing.assert_close(distances[3], expected)


@pytest.mark.parametrize("first", range(5))
def test_shared_prefixes_change_no_image(wide: StyleGAN2, first: int) -> None:
    g = load_stylegan2(checkpoint(64, base=4096), groups=4)
    anchors, others = g.sample_latents(range(3)), g.sample_latents(range(3), seed=1)
    views = [anchors, [*anchors[:first], *others[first:]]]
    for shared, alone in zip(g.decode_views(views, first), [g(z) for z in views], strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [48, 64, (32, 64), (10, 46), 2])
def test_crop_is_the_middle_of_the_whole_image(wide: StyleGAN2, crop: int | tuple[int, int]) -> None:
    g = load_stylegan2(checkpoint(64, base=4096), groups=4, crop=crop)
    height, width = crop if isinstance(crop, tuple) else (crop, crop)
    assert g.image_shape == (3, height, width)
    z = g.sample_latents(range(2))
    top, left = (64 - height) // 2, (64 - width) // 2
    whole = wide(z[:1] * 10)
    torch.testing.assert_close(g(z), whole[:, :, top : top + height, left : left + width], atol=1e-5, rtol=0)


def test_what_is_cropped_away_is_not_computed() -> None:
    g = load_stylegan2(checkpoint(64), crop=32, size=16)
    shapes = []
    for module in g.modules():
        if isinstance(module, StyledConvolution):
            module.register_forward_hook(lambda module, inputs, image: shapes.append(tuple(image.shape[2:])))
    assert g(g.sample_latents(range(1))).shape == (1, 3, 16, 16)
    # Each convolution is worked out from the one after it: a halo of one pixel, even where upsampling begins.
    assert shapes == [(4, 4), (8, 8), (8, 8), (16, 16), (14, 14), (24, 24), (20, 20), (36, 36), (32, 32)]


@pytest.mark.parametrize(("crop", "size"), [(48, 16), ((32, 64), (8, 64)), (None, 32)])
def test_size_is_the_mean_of_pixels(crop: Any, size: Any) -> None:
    """It is taken before values beyond [0, 1] are clipped, like resizing in the paper's code."""
    whole, small = (load_stylegan2(checkpoint(64), crop=crop, **kwargs) for kwargs in ({}, {"size": size}))
    z = whole.sample_latents(range(2))
    state = whole.run(whole.condition(z, None))[0]
    factor = tuple(a // b for a, b in zip(state.shape[2:], small.image_shape[1:], strict=True))
    expected = (F.avg_pool2d(state, factor) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(small(z), expected, atol=1e-5, rtol=0)


def test_psi_moves_towards_the_mean_image() -> None:
    stored = checkpoint()
    mean = load_stylegan2(stored, truncation_psi=0)
    images = mean(mean.sample_latents(range(2)))
    assert torch.equal(images[0], images[1])
    half = load_stylegan2(stored, truncation_psi=0.5)
    z = half.sample_latents(range(2))
    w = load_stylegan2(stored).condition(z, None)[0]
    torch.testing.assert_close(half.condition(z, None)[0], 0.5 * w + 0.5 * stored.tensors["dlatent_avg"])
    without = {name: value for name, value in stored.tensors.items() if name != "dlatent_avg"}
    with pytest.raises(mlviews.WeightsError, match="truncation_psi=1"):
        load_stylegan2(Checkpoint(stored.layout, without, stored.facts, "x"), truncation_psi=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 9}, "groups=9.*from 1 to 8"),
        ({"groups": 0}, "groups=0"),
        ({"crop": 33}, "crop=33.*from 1 to 32"),
        ({"crop": 31}, "crop=31.*even"),
        ({"crop": "big"}, "crop='big'"),
        ({"crop": (8, 8, 8)}, r"crop=\(8, 8, 8\)"),
        ({"crop": 24, "size": 16}, "size=16.*divide the 24"),
        ({"truncation_psi": 2}, "truncation_psi=2.*0.*1"),
        ({"truncation_psi": None}, "truncation_psi=None"),
        ({"truncation": -1.0}, "truncation=-1"),
    ],
)
def test_wrong_options_are_not_the_files_fault(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_stylegan2(checkpoint(), **options)
    assert not isinstance(raised.value, mlviews.WeightsError)


def test_labels_are_drawn_and_returned() -> None:
    g = load_stylegan2(checkpoint(16, classes=5), groups=3)
    assert g.num_classes == 5
    z = g.sample_latents(range(4))
    first, second = (g(z, torch.full((4,), label)) for label in (0, 1))
    assert (first - second).abs().mean() > 1e-3
    perturbers = {2: perturb.Normal(0.8, 1.0)}
    source = MLViewSource(g, perturbers, batch_size=8, num_samples=8, layout=lambda batch: batch)
    batch = next(iter(source))
    assert torch.equal(batch.targets, g.sample_labels(range(8)))
    torch.testing.assert_close(batch.views[1], g(batch.latents[1], batch.targets), atol=1e-5, rtol=0)
    assert g.distances(batch.latents[0], batch.latents[1], batch.targets)[2].min() > 0


# -- numbers -------------------------------------------------------------------------------------------------


def test_fast_convolutions_are_convolutions() -> None:
    x, weight = torch.randn(3, 5, 24, 12), torch.randn(7, 5, 3, 3)
    parts: list[tuple[int, ...]] = []
    padded = F.pad(x, (1, 1, 1, 1))
    forms = winograd.weight_forms(weight), winograd.input_forms(), winograd.output_forms()
    actual = winograd.convolve(padded, *forms, (22, 12), lambda part, *_: parts.append(part.shape))
    torch.testing.assert_close(actual, F.conv2d(x, weight, padding=1)[:, :, :22], atol=1e-4, rtol=0)
    assert sum(shape[0] * shape[2] for shape in parts) == 3 * 22

    taps = ((0.2, 0.7, 0.9, 0.2), (0.3, 0.6, 0.8, 0.3))
    forms = winograd.weight_forms(weight.flip(2, 3)), winograd.input_forms(taps), winograd.output_forms()
    spread = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    kernel = torch.outer(*map(torch.tensor, taps)).expand(7, 1, 4, 4)
    expected = F.conv2d(spread, kernel, padding=1, groups=7)
    actual = winograd.convolve(padded, *forms, (48, 24), lambda *_: None)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_decode_is_differentiable_and_equal(wide: StyleGAN2) -> None:
    z = [value.clone().requires_grad_() for value in wide.sample_latents(range(2))]
    images = wide.decode(z)
    torch.testing.assert_close(images.detach(), wide(z), atol=1e-5, rtol=0)
    images.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)


def test_gradients_are_those_of_differences() -> None:
    g = load_stylegan2(checkpoint(16, conv_clamp=2.0, base=64), groups=2).double()
    z = [torch.randn(1, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def image(*z: Tensor) -> Tensor:
        return g.run(g.condition(z, None))[0]

    assert torch.autograd.gradcheck(image, z, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("crop", [None, 24])
def test_autocast_is_close(crop: int | None) -> None:
    g = load_stylegan2(checkpoint(base=2048), groups=4, crop=crop)
    z = g.sample_latents(range(2))
    with torch.autocast("cpu", torch.bfloat16):
        images = g(z)
    assert images.dtype == torch.float32
    assert 0 < (images - g(z)).abs().mean() < 0.02


def test_half_precision_does_not_overflow() -> None:
    """Large styles and weights cancel in demodulation, but only if they are scaled down before the
    convolution.
    """
    stored = checkpoint()
    for name, value in stored.tensors.items():
        if name.endswith(("Conv/mod_bias", "Conv1/mod_bias", "Conv1/weight")):
            value.mul_(1e3).add_(3e3)
    g = load_stylegan2(stored, groups=4)
    z = g.sample_latents(range(2))
    with torch.autocast("cpu", torch.float16):
        images = g(z)
    assert (images - g(z)).abs().mean() < 0.02


def test_state_dict_brings_everything_along(small: StyleGAN2) -> None:
    assert all(type(value) is Tensor for value in small.state_dict().values())
    fresh = copy.deepcopy(StyleGAN2(small.config, groups=4))
    z = small.sample_latents(range(2))
    assert (fresh(z) - small(z)).abs().max() > 0.1
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(z), small(z))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


def test_random_networks_need_no_file() -> None:
    g = StyleGAN2(StyleGAN2Config(channels=(16, 8), z_dim=4, w_dim=4, mapping=(4, 4)), crop=6)
    images = g(g.sample_latents(range(3)))
    assert images.shape == (3, 3, 6, 6)
    assert images.std() > 0.01


# -- files ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.clear(), "no pixels"),
        (lambda t, f: t.pop("G_synthesis/8x8/Conv1/weight"), "G_synthesis/8x8/Conv1/weight is missing"),
        (lambda t, f: t.pop("G_synthesis/noise2"), "G_synthesis/noise2 is missing"),
        (lambda t, f: t.pop("G_mapping/Dense0/weight"), "G_mapping/Dense0/weight is missing"),
        (
            lambda t, f: [
                t.pop(name) for name in list(t) if "8x8" in name or name.endswith(("noise1", "noise2"))
            ],
            "layers at 4, 16, 32",
        ),
        (lambda t, f: t.update({"G_synthesis/99999x99999/Conv1/bias": torch.zeros(1)}), "99999 pixels"),
        (lambda t, f: t.update({"G_synthesis/lod": torch.zeros(())}), "variable G_synthesis/lod is unknown"),
        (lambda t, f: t.update({"synthesis/noise0": torch.zeros(1, 1, 4, 4)}), "is there twice"),
        (
            lambda t, f: t.update({"G_synthesis/noise0": torch.zeros(1, 1, 4, 5)}),
            r"shape \(4, 5\), expected \(4, 4\)",
        ),
        (
            lambda t, f: t.update({"G_synthesis/8x8/Conv1/weight": torch.zeros(9)}),
            r"G_synthesis/8x8/Conv1/weight has shape \(9,\), expected \(64, 64, 3, 3\)",
        ),
        (
            lambda t, f: t.update({"G_synthesis/8x8/Conv1/weight": torch.zeros(3, 3, 0, 5)}),
            r"shape \(5, 0, 3, 3\)",
        ),
        (
            lambda t, f: t.update({"G_synthesis/8x8/Conv1/weight": torch.ones(3, 3, 5, 64)}),
            r"Conv1/weight has shape \(64, 5, 3, 3\)",
        ),
        (
            lambda t, f: t.update({"G_synthesis/8x8/Conv1/bias": torch.zeros(64, dtype=torch.int64)}),
            "torch.int64",
        ),
        (lambda t, f: t["G_synthesis/8x8/Conv1/bias"].fill_(float("nan")), "NaN"),
        (lambda t, f: t["G_synthesis/8x8/Conv1/weight"].fill_(float("inf")), "NaN"),
        (
            lambda t, f: t.update(
                {"G_mapping/Dense1/weight": torch.zeros(8, 9), "G_mapping/Dense1/bias": torch.zeros(9)}
            ),
            "a w of 9 values",
        ),
        (lambda t, f: t.update({"G_mapping/LabelConcat/weight": torch.zeros(3, 8)}), "takes no z"),
        (
            lambda t, f: t.update({"G_synthesis/8x8/Skip/weight": torch.zeros(1, 1, 8, 8)}),
            "Skip/weight is unknown",
        ),
        (lambda t, f: f.update(architecture="resnet"), "architecture is 'resnet'.*'skip'"),
        (lambda t, f: f.update(nonlinearity="relu"), "nonlinearity is 'relu'.*'lrelu'"),
        (lambda t, f: f.update(conv_clamp="wide"), "conv_clamp is 'wide'"),
        (lambda t, f: f.update(mapping_lrmul=-1), "mapping_lrmul is '-1'"),
        (lambda t, f: f.update(resample_kernel=[1, 2, 1]), r"filter is \[1, 2, 1\]"),
        (lambda t, f: f.update(resample_kernel={"a": 1}), "four numbers"),
    ],
)
def test_wrong_files_give_one_clear_error(change: Change, message: str) -> None:
    stored = checkpoint()
    tensors, facts = {name: value.clone() for name, value in stored.tensors.items()}, dict(stored.facts)
    change(tensors, facts)
    with pytest.raises(mlviews.WeightsError, match=message) as raised:
        load_stylegan2(Checkpoint(stored.layout, tensors, facts, "small.pkl"), groups=4)
    assert "small.pkl" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_facts_are_not_trusted() -> None:
    """Sizes come from tensors alone."""
    stored = checkpoint()
    facts = {
        "resolution": 1 << 40,
        "latent_size": "x",
        "fmap_base": -1,
        "num_channels": None,
        "mapping_layers": [9] * 9,
        "truncation_psi": 0.5,
    }
    one, other = (
        load_stylegan2(Checkpoint(stored.layout, stored.tensors, f, "x")) for f in (facts, stored.facts)
    )
    assert torch.equal(one(one.sample_latents(range(2))), other(one.sample_latents(range(2))))
    for garbage in (
        {"synthesis_kwargs": 7},
        {"synthesis_kwargs": {"conv_clamp": None}},
        {"mapping_kwargs": []},
    ):
        with pytest.raises(mlviews.WeightsError, match="no pixels"):
            load_stylegan2(Checkpoint("stylegan2-ada", {}, garbage, "x"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthesis.b8.skip.weight", "'resnet'"),
        ("synthesis.b8.conv0.extra", "unknown synthesis.b8.conv0.extra"),
        ("synthesis.b8.conv0.resample_filter", "differs from"),
    ],
)
def test_variants_of_the_official_network_are_refused_by_name(name: str, message: str) -> None:
    with np.load(next(path for path in GOLDENS if "ada-16px" in path.stem)) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    tensors = parity.random_weights(shapes, 0) | {name: torch.eye(4)}
    with pytest.raises(mlviews.WeightsError, match=message):
        load_stylegan2(Checkpoint("stylegan2-ada", tensors, {}, "x"))
    tensors = {name: value for name, value in tensors.items() if "torgb" not in name or "b16" in name}
    with pytest.raises(mlviews.WeightsError, match="'orig'" if "skip" not in name else "'resnet'"):
        load_stylegan2(Checkpoint("stylegan2-ada", tensors, {}, "x"))


def test_names_are_translated_back_for_messages() -> None:
    for translate, untranslate, count in (
        (reading._translate_tensorflow, reading._tensorflow_name, 58),
        (reading._translate_rosinality, reading._rosinality_name, 50),
    ):
        names = checkpoint().tensors if count == 58 else rosinality()
        assert len(names) > 30
        for name, value in names.items():
            translation = translate(name, value)
            assert translation is not None
            assert untranslate(translation[0]) == name


def rosinality() -> dict[str, Tensor]:
    with np.load(next(path for path in GOLDENS if "rosinality" in path.stem)) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    return parity.random_weights(shapes, 0)


def test_a_file_without_noise_gets_the_same_one_at_each_load() -> None:
    tensors = {name: value for name, value in rosinality().items() if not name.startswith("noises.")}
    one, other = (
        load_stylegan2(Checkpoint("stylegan2-rosinality", dict(tensors), {}, "x")) for _ in range(2)
    )
    z = one.sample_latents(range(2))
    assert torch.equal(one(z), other(z))
    drawn = reading._drawn_noise(4, 256, 256)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert (drawn - reading._drawn_noise(3, 256, 256)).std() > 1
    half = tensors | {"noises.noise_0": torch.zeros(1, 1, 4, 4)}
    with pytest.raises(mlviews.WeightsError, match=r"noises\.noise_1 is missing"):
        load_stylegan2(Checkpoint("stylegan2-rosinality", half, {}, "x"))


def test_a_file_without_the_mean_w_takes_no_truncation() -> None:
    tensors = {name: value for name, value in rosinality().items() if name != "latent_avg"}
    stored = Checkpoint("stylegan2-rosinality", tensors, {}, "x")
    assert load_stylegan2(stored).image_shape == (3, 16, 16)
    with pytest.raises(mlviews.WeightsError, match=r"no mean w.*use truncation_psi=1"):
        load_stylegan2(stored, truncation_psi=0.7)


def test_a_filter_of_ones_own() -> None:
    """The layers that do not upsample keep StyleGAN2-ADA's default filter, and do not use it."""
    with np.load(next(path for path in GOLDENS if "ada-16px" in path.stem)) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    tensors = parity.random_weights(shapes, 0)
    axes = {name: torch.tensor(taps) for name, taps in (("1", [1.0, 3, 3, 1]), ("0", [1.0, 2, 2, 1]))}
    taps = {name: torch.outer(axis, axis) / axis.sum() ** 2 for name, axis in axes.items()}
    for name in tensors:
        if name.endswith("resample_filter"):
            tensors[name] = taps["1" if "conv1" in name else "0"]
    assert any("conv1.resample_filter" in name for name in tensors)
    g = load_stylegan2(Checkpoint("stylegan2-ada", tensors, {}, "x"))
    layer = next(part for part in g.modules() if isinstance(part, StyledConvolution) and part.filter)
    assert layer.filter is not None
    assert layer.filter.rows == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])


# -- images that are not square ------------------------------------------------------------------------------


def plainly(g: StyleGAN2, w: Tensor) -> Tensor:
    """Return the images of a generator, layer by layer as the papers write them."""
    taps = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 16

    def styled(layer: StyledConvolution, x: Tensor) -> Tensor:
        style = layer.style(w)[:, None, :, None, None]
        kernels = layer.weight * style
        kernels = (
            kernels
            * (kernels.square().sum((2, 3, 4), keepdim=True) + layer.epsilon[:, None, None, None]).rsqrt()
        )
        images = []
        for sample, kernel in zip(x, kernels, strict=True):
            if layer.filter is None:
                images.append(F.conv2d(sample[None], kernel, padding=1))
                continue
            spread = F.pad(F.conv_transpose2d(sample[None], kernel.transpose(0, 1), stride=2), (1, 1, 1, 1))
            images.append(F.conv2d(spread, taps.expand(len(kernel), 1, 4, 4), groups=len(kernel)))
        y = torch.cat(images) + layer.noise + layer.bias[:, None, None]
        return F.leaky_relu(y, 0.2) * 2**0.5

    x = image = None
    for step in (step for block in g.blocks for step in block.steps):
        if hasattr(step, "const"):
            x = styled(step.conv, step.const.expand(len(w), -1, -1, -1) if x is None else x)
            continue
        weight = step.image.weight * step.image.style(w)[:, None, :]
        part = torch.einsum("boi,bihw->bohw", weight, x) + step.image.bias[:, None, None]
        if image is not None:
            colors = image.shape[1]
            upsampled = F.conv_transpose2d(
                image, taps.expand(colors, 1, 4, 4), stride=2, padding=1, groups=colors
            )
            part = part + upsampled
        image = part
        x = None if step.conv is None else styled(step.conv, x)
    assert image is not None
    return (image * 0.5 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("start", [(4, 4), (4, 2), (2, 4), (4, 6), (3, 1)])
@pytest.mark.parametrize("channels", [(8, 8, 4), (64, 64, 64, 64, 64)])
def test_images_that_are_not_square(start: tuple[int, int], channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = StyleGAN2Config(channels=channels, z_dim=4, w_dim=4, mapping=(4, 4), start=start)
    g = StyleGAN2(config, groups=3)
    for layer in g.modules():
        if isinstance(layer, StyledConvolution):
            layer.noise.normal_(std=0.1)
            layer.derive()
    rows, columns = (side << (len(channels) - 1) for side in start)
    assert g.image_shape == (3, rows, columns)
    z = g.sample_latents(range(2))
    images = g(z)
    expected = plainly(g, g.condition(z, None)[0])
    torch.testing.assert_close(images, expected, atol=2e-4, rtol=0)
    # Crop and size are rows and columns.
    crop = (rows // 4 * 2, columns // 2 * 2)
    cropped = StyleGAN2(config, groups=3, crop=crop)
    cropped.load_state_dict(g.state_dict())
    above, left = (rows - crop[0]) // 2, (columns - crop[1]) // 2
    part = images[:, :, above : above + crop[0], left : left + crop[1]]
    torch.testing.assert_close(cropped(z), part, atol=2e-4, rtol=0)
    assert StyleGAN2(config, size=(rows // 2, columns)).image_shape == (3, rows // 2, columns)
    with pytest.raises(ValueError, match=rf"must be an integer from 1 to {columns}"):
        StyleGAN2(config, crop=(rows, columns + 2))


def test_a_file_of_people(tmp_path: Path) -> None:
    """StyleGAN-Human's networks: half as wide as they are high, in StyleGAN2-ADA's names."""
    with np.load(next(path for path in GOLDENS if "ada-16px" in path.stem)) as golden:
        shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    tensors = parity.random_weights(shapes, 0)
    for name, value in tensors.items():
        if name.endswith((".const", ".noise_const")):
            tensors[name] = value[..., : value.shape[-1] // 2].contiguous()
    g = load_stylegan2(Checkpoint("stylegan2-ada", tensors, {}, "x"), groups=4)
    assert g.image_shape == (3, 16, 8)
    z = g.sample_latents(range(2))
    torch.testing.assert_close(g(z), plainly(g, g.condition(z, None)[0]), atol=2e-4, rtol=0)
    tensors["synthesis.b4.const"] = torch.zeros(len(tensors["synthesis.b4.const"]), 4, 1000)
    with pytest.raises(mlviews.WeightsError, match=r"synthesis\.b4\.const has 4x1000 pixels"):
        load_stylegan2(Checkpoint("stylegan2-ada", tensors, {}, "x"))


def test_other_layouts_are_refused() -> None:
    with pytest.raises(mlviews.WeightsError, match="'biggan', not a StyleGAN2"):
        load_stylegan2(Checkpoint("biggan", {}, {}, "x"))
