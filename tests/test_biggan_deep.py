"""BigGAN-deep: the official images (tests/golden), its truncations, and files that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from biggan_deep import random_weights
from invariances import check_device, check_prefixes, check_samples, labels_of
from torch import Tensor, nn

import mlviews
from mlviews import WeightsError, load_generator
from mlviews.generators.biggan.deep import BigGANDeep, BigGANDeepConfig, level_runs
from mlviews.generators.biggan.deep_reading import _between
from mlviews.generators.biggan.deep_reading import load as load_deep
from mlviews.weights.checkpoints import Checkpoint, convert, read

Tensors = dict[str, Tensor]

with np.load(Path(__file__).parent / "golden" / "deep-biggan-tiny-16.npz") as _file:
    FACTS: dict[str, Any] = json.loads(str(_file["facts"]))
    SHAPES = {name: tuple(shape) for name, shape in json.loads(str(_file["shapes"])).items()}
    SEED = int(_file["seed"])
    IMAGES = torch.from_numpy(_file["images"])

TINY = BigGANDeepConfig(
    channels=(32, 16, 8), up=(False, True), attention={1: (2, 8)}, z_dim=3, embedding=2, num_classes=4
)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The weights that the official code was run with."""
    return random_weights(SHAPES)


@pytest.fixture(scope="module")
def deep(tensors: Tensors) -> BigGANDeep:
    return load(tensors)


def load(tensors: Tensors, facts: dict[str, Any] | None = None, **options: Any) -> BigGANDeep:
    return load_deep(
        Checkpoint("biggan-deep", tensors, FACTS if facts is None else facts, "w.bin"), **options
    )


def saved(folder: Path, tensors: Any, facts: object = None, stem: str = "biggan-deep-16-") -> Path:
    """A file as people have it, with its settings beside it if there are any."""
    path = folder / f"{stem}pytorch_model.bin"
    torch.save(tensors, path)
    if facts is not None:
        text = facts if isinstance(facts, str) else json.dumps(facts)
        (folder / f"{stem}config.json").write_text(text)
    return path


# -- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, "scale", 2, 1])
def test_images_are_the_official_codes(tensors: Tensors, groups: int | str | None) -> None:
    g = load(tensors, groups=groups)
    z, labels = g.sample_latents(range(2), SEED), g.sample_labels(range(2), SEED)
    for images in (g(z, labels), g.decode(z, labels)):  # two ways to compute
        torch.testing.assert_close(images, IMAGES, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ups", "levels", "scales"), [(5, 11, 6), (6, 13, 7), (7, 15, 8)])
def test_levels_of_the_published_sizes(ups: int, levels: int, scales: int) -> None:
    config = BigGANDeepConfig(channels=(16,) * (levels), up=(False, True) * ups, attention={})
    assert config.sizes[-1] == 4 << ups
    assert len(level_runs(config, None)) == levels
    assert len(level_runs(config, "scale")) == scales


def test_levels_are_named_by_resolution_or_by_block(tensors: Tensors) -> None:
    assert load(tensors, groups="scale").level_names == ("4x4", "8x8", "16x16")
    names = ("start (4x4)", "block 1 (4x4)", "block 2 (8x8)", "block 3 (8x8)", "block 4 (16x16)")
    g = load(tensors)
    assert g.level_names == names
    assert g.tied
    assert g.image_shape == (3, 16, 16)
    assert g.num_classes == 10
    assert {level.shape for level in g.levels} == {(12,)}
    assert load(tensors, groups=2).level_names == ("blocks 1-2 (8x8)", "blocks 3-4 (16x16)")


def test_samples_prefixes_and_the_device(deep: BigGANDeep) -> None:
    check_samples(deep, 1e-5)
    check_prefixes(deep, 1e-5)
    check_device(lambda: BigGANDeep(TINY))


def test_every_level_and_the_class_count(deep: BigGANDeep) -> None:
    z, labels = deep.sample_latents(range(2)), labels_of(deep, 2)
    images = deep(z, labels)
    others = deep.sample_latents(range(2), seed=1)
    for level in range(len(z)):
        moved = [*z[:level], others[level], *z[level + 1 :]]
        assert (deep(moved, labels) - images).abs().max() > 1e-3, level
    assert (deep(z, (labels + 1) % 10) - images).abs().max() > 1e-3  # type: ignore[operator]


def test_one_z_is_conditioned_once(deep: BigGANDeep) -> None:
    z, labels = deep.sample_latents(range(2)), labels_of(deep, 2)
    assert len({id(value) for value in deep.condition(z, labels)}) == 1
    moved = [*z[:-1], z[-1].clone()]
    assert len({id(value) for value in deep.condition(moved, labels)}) == 2


def test_gradients_reach_every_level_and_half_precision_is_close(deep: BigGANDeep) -> None:
    z, labels = (
        [value.clone().requires_grad_() for value in deep.sample_latents(range(2))],
        labels_of(deep, 2),
    )
    deep.decode(z, labels).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)
    latents = deep.sample_latents(range(2))
    with torch.autocast("cpu", torch.bfloat16):
        images = deep(latents, labels)
    assert (images - deep(latents, labels)).abs().mean() < 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8,)},
        {"channels": (8, 8, 3)},
        {"up": (True,)},
        {"attention": {0: (1, 1)}},
        {"attention": {1: (3, 2)}},
        {"z_dim": 0},
    ],
)
def test_a_config_fits_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not fit together"):
        BigGANDeepConfig(**({"channels": (8, 8, 4), "up": (False, True), "attention": {}} | changes))


# -- truncations ---------------------------------------------------------------------------------------------


def test_a_truncation_scales_z_and_chooses_the_statistics(tensors: Tensors) -> None:
    whole, half = load(tensors), load(tensors, truncation=0.5)
    z, labels = half.sample_latents(range(64)), half.sample_labels(range(64))
    assert z[0].abs().max() <= 2
    scaled = [0.5 * value for value in z]
    assert (half(z, labels) - whole(scaled, labels)).abs().max() > 1e-3, "the statistics are the same"
    # With the statistics of one truncation at all places, only z is scaled.
    constant = {
        name: value[7:8].expand_as(value).contiguous() if "running_" in name else value
        for name, value in tensors.items()
    }
    equal = load(constant, truncation=0.5)(z, labels)
    torch.testing.assert_close(equal, load(constant)(scaled, labels), atol=1e-5, rtol=0)


def test_statistics_between_two_truncations_are_the_originals() -> None:
    """It interpolates backwards, and by rounding takes the neighbors of some places."""
    places = torch.arange(51.0)[:, None]
    assert _between(places, 0.4).item() == 20
    assert _between(places, 1.0).item() == 50
    assert _between(places, 0.405).item() == pytest.approx(20.75, abs=1e-4)  # a fourth of the way
    for truncation, place in ((0.14, 8), (0.28, 15), (0.56, 29), (0.58, 28), (0.94, 46)):
        assert _between(places, truncation).item() == pytest.approx(place, abs=1e-3)
    # 1 / (1 / 49) is a little more than 49.
    assert _between(places[:50], 1.0).item() == 49


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0}, "Invalid truncation=0: it must be a number above 0 and at most 1"),
        ({"truncation": 1.5}, r"Invalid truncation=1\.5"),
        ({"truncation": "0.4"}, "Invalid truncation='0.4'"),
        ({"groups": 6}, "Invalid groups=6: it must be an integer from 1 to 5"),
        ({"groups": "scales"}, "Invalid groups='scales': it must be an integer from 1 to 5 or 'scale'"),
    ],
)
def test_wrong_options(tensors: Tensors, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tensors, **options)
    assert not isinstance(caught.value, WeightsError)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_file_and_its_settings_are_read(tensors: Tensors, deep: BigGANDeep, tmp_path: Path) -> None:
    z, labels = deep.sample_latents(range(2)), labels_of(deep, 2)
    expected = deep(z, labels)
    assert torch.equal(load_generator("biggan-deep", weights=saved(tmp_path, tensors))(z, labels), expected)
    path = saved(tmp_path, tensors, FACTS)
    assert read(path).facts == FACTS
    assert torch.equal(load_generator("biggan-deep", weights=path)(z, labels), expected)
    convert(path, tmp_path / "deep.safetensors")
    converted = load_generator("biggan-deep", weights=tmp_path / "deep.safetensors")
    assert torch.equal(converted(z, labels), expected)
    # A folder of from_pretrained; settings that say otherwise count.
    other = load_generator("biggan-deep", weights=saved(tmp_path, tensors, FACTS | {"eps": 0.1}, ""))
    assert (other(z, labels) - expected).abs().max() > 1e-3


def nested(tensors: Tensors) -> nn.Module:
    """A module with these tensors by their names."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_buffer(leaf, value)
    return root


def test_a_make_gan_object_is_read_with_its_truncation(tensors: Tensors) -> None:
    wrapper = nn.Module()
    wrapper.G = nested(tensors)
    wrapper.G.config = SimpleNamespace(to_dict=lambda: FACTS)
    wrapper.truncation = 0.4  # type: ignore[assignment]
    expected = load(tensors, truncation=0.4)
    z, labels = expected.sample_latents(range(2)), labels_of(expected, 2)
    assert torch.equal(load_generator("biggan-deep", weights=wrapper)(z, labels), expected(z, labels))
    whole = load_generator("biggan-deep", weights=wrapper, truncation=1.0)
    assert torch.equal(whole(z, labels), load(tensors)(z, labels))


def _without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(start)}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors.get(name, torch.zeros(1)))}


LAYER = "generator.layers.0"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no classes": (_without("embeddings"), "embeddings.weight is missing"),
    "no norms": (_without("generator.bn."), "generator.bn.running_means is missing"),
    "no output": (_without("generator.conv_to_rgb"), "conv_to_rgb.weight_orig is missing"),
    "a missing vector": (_without(f"{LAYER}.conv_1.weight_v"), "conv_1.weight_v is missing"),
    "no blocks": (_without("generator.layers"), "does not fit together|is missing|do not describe"),
    "a missing block": (_without("generator.layers.1"), "has shape"),
    "a gap in an attention": (
        _without("generator.layers.2.snconv1x1_g"),
        "snconv1x1_g.weight_orig is missing",
    ),
    "an unknown tensor": (_with(f"{LAYER}.conv_9.weight_orig", torch.clone), "unknown .*conv_9"),
    "another kernel": (_with(f"{LAYER}.conv_1.weight_orig", lambda w: w[..., :1, :1]), "has shape"),
    "no square": (_with("generator.gen_z.weight_orig", lambda w: w[:-1]), "has shape|channels"),
    "no z": (_with("generator.gen_z.weight_orig", lambda w: w[:, :12].contiguous()), "has no z"),
    "one truncation": (
        lambda t: {name: value[:1] if "running_" in name else value for name, value in t.items()},
        "statistics of a single truncation",
    ),
    "integers": (_with(f"{LAYER}.conv_0.bias", lambda b: b.long()), "holds torch.int64"),
    "a NaN": (_with(f"{LAYER}.bn_0.running_means", lambda m: m * float("nan")), "holds a NaN"),
    "negative variances": (_with(f"{LAYER}.bn_0.running_vars", lambda v: -v), "negative variances"),
    "a zero weight": (_with(f"{LAYER}.conv_1.weight_orig", torch.zeros_like), "no singular value"),
    "an overflow": (
        _with("generator.bn.weight", lambda w: torch.full_like(w, 3e38)),
        "its values are so large",
    ),
    "more queries than values": (
        _with("generator.layers.2.snconv1x1_theta.weight_orig", lambda w: w.new_ones(99, w.shape[1], 1, 1)),
        "more than its",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tensors: Tensors, case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message) as caught:
        load(change(dict(tensors)))
    assert "w.bin" in str(caught.value)
    assert len(str(caught.value)) < 400


SETTINGS: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "config.json is damaged"),
    "a list": ([1], "no settings"),
    "nothing": ("{}", "no settings"),
    "nested without end": ("[" * 100_000, "config.json is"),
    "a gigabyte": ('{"a": "' + "x" * (1 << 17) + '"}', "bytes of settings"),
    "another number of blocks": (FACTS | {"layers": FACTS["layers"][:-1]}, "do not describe the 4 blocks"),
    "other channels": (FACTS | {"layers": [[True, 1, 1]] * 4}, "describe block 0"),
    "no layers": (FACTS | {"layers": [None] * 4}, "describe block 0 as None"),
    "a huge upsampling": (FACTS | {"layers": "up"}, "do not describe"),
    "no width": (FACTS | {"channel_width": None}, "do not describe"),
    "a width that is none": (FACTS | {"channel_width": "8"}, "channel_width is '8', expected a positive"),
    "eps that is none": (FACTS | {"eps": -1}, "eps is '-1', expected a positive number"),
    "attention elsewhere": (FACTS | {"attention_layer_position": 3}, "attention before block 3"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_none(tensors: Tensors, case: str, tmp_path: Path) -> None:
    facts, message = SETTINGS[case]
    with pytest.raises(WeightsError, match=message) as caught:
        load_generator("biggan-deep", weights=saved(tmp_path, tensors, facts))
    assert len(str(caught.value)) < 600


def test_nothing_in_a_file_is_executed(tensors: Tensors, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for content in (dict(tensors) | {"x": Hostile()}, {"state_dict": Hostile()}, Hostile()):
        path = saved(tmp_path, content, FACTS)
        try:
            g = load_generator("biggan-deep", weights=path)
            assert g.num_classes == 10  # what is no tensor is not looked at
        except WeightsError:
            pass
        assert not (tmp_path / "executed").exists()


def test_other_generators_names_lead_to_the_right_entry(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is BigGAN-deep as pytorch-pretrained-BigGAN saves it"):
        load_generator("biggan", weights=saved(tmp_path, tensors))


# -- make_gan's generators with one latent -------------------------------------------------------------------

SINGLE: dict[str, tuple[dict[str, tuple[int, ...]], str, int, int]] = {
    # tensors' shapes, what it is called, values of z, classes
    "self-conditioned": (
        {
            "get_latent.embedding.weight": (7, 6),
            "fc.weight": (16 * 4 * 16, 14),
            "resnet_0_0.conv_0.weight": (64, 64, 3, 3),
            "conv_img.weight": (3, 4, 3, 3),
        },
        "a self-conditioned GAN",
        8,
        7,
    ),
    "SAGAN, early": (
        {
            "linear0.weight_orig": (64, 8),
            "blocks.0.0.bn1.embed0.weight_orig": (7, 4),
            "blocks.0.0.conv2d1.weight_orig": (4, 4, 3, 3),
            "conv2d5.weight_orig": (3, 4, 3, 3),
        },
        "an SNGAN or SAGAN of StudioGAN",
        8,
        7,
    ),
    "SNGAN": (
        {
            "linear0.weight": (64, 8),
            "blocks.0.0.bn1.gain.weight": (4, 7),
            "blocks.0.0.conv2d1.weight": (4, 4, 3, 3),
            "conv2d5.weight": (3, 4, 3, 3),
        },
        "an SNGAN or SAGAN of StudioGAN",
        8,
        7,
    ),
    "CIPS": (
        {"emb.input": (1, 8, 16, 16), "style.1.weight": (8, 8), "lff.ffm.conv.weight": (8, 2, 1, 1)},
        "a CIPS",
        8,
        0,
    ),
}


@pytest.mark.parametrize("case", SINGLE)
def test_single_latents_are_told_the_call_that_wraps_them(case: str, tmp_path: Path) -> None:
    shapes, kind, z_dim, classes = SINGLE[case]
    tensors = {f"G.{name}": torch.ones(shape) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "g.pth")
    with pytest.raises(WeightsError) as caught:
        load_generator("biggan", weights=tmp_path / "g.pth")
    message = str(caught.value)
    assert f"holds {kind}, which has a single latent" in message
    assert "\n" not in message

    class G:
        G = SimpleNamespace(style=lambda z: z)

        def __call__(self, z: Tensor, y: Tensor | None = None) -> Tensor:
            assert z.shape == (2, z_dim)
            side = int(message.split("image_shape=(3, ")[1].split(",")[0])
            return torch.zeros(2, 3, side, side)

    call = message.partition(", use ")[2].removesuffix(".")
    g = eval(call, {"mlviews": mlviews, "G": G()})
    assert g.num_classes == classes
    assert (g(g.sample_latents(range(2)), labels_of(g, 2)) == 0.5).all()
