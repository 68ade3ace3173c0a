"""VDVAE: the official images (tests/golden), levels by resolution or block, encoding, files that are none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fill import fill, pictures
from invariances import check_device, check_prefixes, check_samples
from torch import Tensor
from vdvae import random_weights

from mlviews import WeightsError, load_generator
from mlviews.generators.vdvae import VDVAE, VDVAEConfig
from mlviews.generators.vdvae.reading import HPS, _decoder, _encoder
from mlviews.generators.vdvae.reading import load as load_vdvae
from mlviews.levels import Blend
from mlviews.weights.checkpoints import Checkpoint, convert

Tensors = dict[str, Tensor]

with np.load(Path(__file__).parent / "golden" / "vdvae-tiny-8.npz") as _file:
    FACTS: dict[str, Any] = json.loads(str(_file["facts"]))
    SHAPES = {name: tuple(shape) for name, shape in json.loads(str(_file["shapes"])).items()}
    SEED = int(_file["seed"])
    GOLDEN = {name: torch.from_numpy(_file[name]) for name in ("decoded", "reconstructed", "rates")}
OPTIONS: dict[str, Any] = {key: FACTS[key] for key in ("dec_blocks", "enc_blocks")} | {"hps": "cifar10"}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The weights that the official code was run with."""
    return random_weights(SHAPES)


@pytest.fixture(scope="module")
def vdvae(tensors: Tensors) -> VDVAE:
    return load(tensors, levels="block")


def load(tensors: Tensors, **options: Any) -> VDVAE:
    return load_vdvae(Checkpoint("vdvae", tensors, {}, "model.th"), **(OPTIONS | options))


# -- the network ---------------------------------------------------------------------------------------------


def test_images_and_rates_are_the_official_codes(vdvae: VDVAE) -> None:
    eps = vdvae.sample_latents(range(2), SEED)
    torch.testing.assert_close(vdvae(eps), GOLDEN["decoded"], atol=1e-5, rtol=0)
    images = pictures(vdvae.image_shape, 2, SEED)
    torch.testing.assert_close(vdvae(vdvae.encode(images)), GOLDEN["reconstructed"], atol=1e-5, rtol=0)
    rates = torch.stack(vdvae.posterior(images).divergences, dim=1)
    torch.testing.assert_close(rates, GOLDEN["rates"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks", "scales", "size"),
    [
        ("cifar10", 43, 5, 32),
        ("imagenet32", 78, 5, 32),
        ("imagenet64", 75, 6, 64),
        ("ffhq256", 66, 8, 256),
        ("ffhq1024", 70, 10, 1024),
    ],
)
def test_the_published_networks(name: str, blocks: int, scales: int, size: int) -> None:
    counts = _decoder(HPS[name].dec_blocks)
    widths = dict.fromkeys(counts, 8)
    config = VDVAEConfig(
        counts=counts, encoder=_encoder(HPS[name].enc_blocks), widths=widths, inner=widths, mixtures=2
    )
    assert (sum(counts.values()), len(counts), config.image_size) == (blocks, scales, size)
    with torch.device("meta"):
        g = VDVAE(config)
    assert [level.shape[1] for level in g.levels] == list(counts)
    assert [level.shape[0] for level in g.levels] == [16 * count for count in counts.values()]


def test_levels_by_resolution_or_by_block_are_the_same_generator(tensors: Tensors, vdvae: VDVAE) -> None:
    scales = load(tensors)
    assert scales.level_names == ("1x1", "4x4", "8x8")
    assert vdvae.level_names == ("1x1", "4x4.0", "4x4.1", "8x8.0", "8x8.1")
    eps = vdvae.sample_latents(range(2))
    merged = [eps[0], torch.cat(eps[1:3], dim=1), torch.cat(eps[3:], dim=1)]
    assert torch.equal(scales(merged), vdvae(eps))
    images = pictures(vdvae.image_shape, 2, 1)
    assert torch.equal(scales.encode(images)[1], torch.cat(vdvae.encode(images)[1:3], dim=1))


def test_samples_prefixes_and_the_device(tensors: Tensors) -> None:
    scales = load(tensors, temperature=0.7)
    check_samples(scales, 1e-5)
    check_prefixes(scales, 1e-5)
    check_device(VDVAE)


def test_a_level_costs_what_comes_after_it(vdvae: VDVAE) -> None:
    rows: list[int] = []
    priors = [group.prior for group in vdvae.groups]
    hooks = [
        prior.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        for prior in priors
    ]
    eps = vdvae.sample_latents(range(4))
    vdvae.decode_views([eps, eps, eps], 3)
    for hook in hooks:
        hook.remove()
    assert rows == [1, 4, 4, 4, 12]  # the first prior is a constant


def test_temperature_scales_the_noise(tensors: Tensors, vdvae: VDVAE) -> None:
    cool = load(tensors, levels="block", temperature=0.5)
    eps = vdvae.sample_latents(range(2))
    torch.testing.assert_close(cool(eps), vdvae([0.5 * value for value in eps]), atol=1e-6, rtol=0)
    images = pictures(vdvae.image_shape, 2, 2)
    torch.testing.assert_close(cool.encode(images)[2], 2 * vdvae.encode(images)[2])


def test_encoding_with_noise_samples_the_posterior(vdvae: VDVAE) -> None:
    images = pictures(vdvae.image_shape, 2, 3)
    noise = vdvae.sample_latents(range(2))
    mean, sample = vdvae.encode(images), vdvae.encode(images, noise)
    without_noise = vdvae.encode(images, [torch.zeros_like(value) for value in noise])
    for level in range(len(mean)):
        torch.testing.assert_close(without_noise[level], mean[level])
        assert (sample[level] - mean[level]).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="Got noise for 1 images, and 2 images"):
        vdvae.encode(images, [value[:1] for value in noise])


def test_regenerated_images_keep_or_draw_each_level(tensors: Tensors) -> None:
    scales = load(tensors, temperature=0.9)
    images = pictures(scales.image_shape, 2, 6)
    kept = scales.regenerate(images, [Blend(1.0, 0.0)] * 3, [None] * 3)
    torch.testing.assert_close(kept, scales(scales.encode(images)), atol=1e-5, rtol=0)
    noise = scales.sample_latents(range(4))  # two copies of each image
    drawn = scales.regenerate(images, [Blend(0.0, 1.0)] * 3, noise)
    torch.testing.assert_close(drawn, scales(noise), atol=1e-5, rtol=0)


def test_gradients_reach_the_latents_and_the_images(vdvae: VDVAE) -> None:
    eps = [value.requires_grad_() for value in vdvae.sample_latents(range(2))]
    vdvae.decode(eps).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in eps)
    images = pictures(vdvae.image_shape, 2, 4).requires_grad_()
    torch.cat([value.flatten() for value in vdvae.infer(images)]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_normalization_is_what_the_encoder_subtracts_and_divides_by(tensors: Tensors, vdvae: VDVAE) -> None:
    plain = load(tensors, levels="block", normalization=(0.0, 255.0))
    images = pictures(vdvae.image_shape, 2, 5)
    mean, std = HPS["cifar10"].normalization
    torch.testing.assert_close(
        plain.encode((255 * images - mean) / std), vdvae.encode(images), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": {}},
        {"counts": {1: 1, 4: 0, 8: 1}},
        {"counts": {1: 1, 3: 1, 8: 1}},
        {"counts": {8: 1, 4: 1, 1: 1}},
        {"encoder": ((8, 2), (4, 1))},
        {"encoder": ((4, 4), (1, 1))},
        {"encoder": ((8, 8),)},
        {"widths": {1: 4, 4: 8, 8: 16}},
        {"std": 0.0},
    ],
)
def test_a_config_fits_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not fit together"):
        dataclasses.replace(VDVAEConfig(), **changes)


# -- files ---------------------------------------------------------------------------------------------------


def test_files_are_read(tensors: Tensors, vdvae: VDVAE, tmp_path: Path) -> None:
    eps = vdvae.sample_latents(range(2))
    torch.save({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "iter-1-model.th")
    torch.save(tensors, tmp_path / "iter-1-model-ema.th")
    convert(tmp_path / "iter-1-model-ema.th", tmp_path / "converted.safetensors")
    for name in ("iter-1-model.th", "iter-1-model-ema.th", "converted.safetensors"):
        g = load_generator("vdvae", weights=tmp_path / name, levels="block", **OPTIONS)
        assert torch.equal(g(eps), vdvae(eps))
        assert g.encode(pictures(g.image_shape, 1, 0))[0].shape == (1, 4, 1, 1)


def test_a_published_network_is_told_by_its_blocks(tmp_path: Path) -> None:
    """A narrow copy of CIFAR-10's needs no options."""
    counts, encoder = _decoder(HPS["cifar10"].dec_blocks), _encoder(HPS["cifar10"].enc_blocks)
    tensors = {}
    for name, shape in SHAPES.items():  # the first block at each resolution, as often as it is there
        kind = name.split(".")[1]
        if kind not in ("dec_blocks", "enc_blocks", "bias_xs"):
            tensors[name] = shape
    half = {"dec_blocks": [size for size, count in counts.items() for _ in range(count)]}
    half["enc_blocks"] = [size for size, _ in encoder]
    for kind, prefix in (("dec_blocks", "decoder"), ("enc_blocks", "encoder")):
        local = f"{prefix}.{kind}.{0 if kind == 'dec_blocks' else 4}."  # a block at 1x1
        wide = f"{prefix}.{kind}.{1 if kind == 'dec_blocks' else 0}."
        for index, size in enumerate(half[kind]):
            start = local if size == 1 else wide
            for name, shape in SHAPES.items():
                if name.startswith(start):
                    tensors[f"{prefix}.{kind}.{index}.{name.removeprefix(start)}"] = shape
    for index, size in enumerate(counts):
        tensors[f"decoder.bias_xs.{index}"] = (1, 16, size, size)
    g = load_vdvae(Checkpoint("vdvae", fill(tensors, 0), {}, "model.th"))
    assert g.image_shape == (3, 32, 32)
    assert g.level_names == ("1x1", "4x4", "8x8", "16x16", "32x32")
    assert g.config.mean == pytest.approx(120.63838 / 255)


def _without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(start)}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors.get(name, torch.zeros(1)))}


BLOCK = "decoder.dec_blocks.2"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing block": (_without("decoder.dec_blocks.4"), "its decoder has 4 blocks, expected 5"),
    "no encoder": (_without("encoder.enc_blocks"), "its encoder has 0 blocks, expected 5"),
    "no output": (_without("decoder.out_net"), "out_conv.weight is missing"),
    "no gain": (_without("decoder.gain"), "decoder.gain is missing"),
    "no constant": (_without("decoder.bias_xs.0"), "decoder.bias_xs.0 is missing"),
    "no constants": (_without("decoder.bias_xs"), "decoder.bias_xs.0 is missing"),
    "a missing layer": (_without(f"{BLOCK}.prior.c3"), r"prior\.c3\.weight is missing"),
    "an unknown tensor": (_with(f"{BLOCK}.prior.c5.weight", torch.clone), r"unknown .*prior\.c5"),
    "another kernel": (_with(f"{BLOCK}.prior.c2.weight", lambda w: w[..., :1, :1]), "has shape"),
    "too few channels": (_with(f"{BLOCK}.resnet.c4.weight", lambda w: w[:-1]), "has shape"),
    "no channels": (_with("decoder.dec_blocks.0.z_proj.weight", lambda w: w[:0]), "is empty"),
    "a mixture of none": (_with("decoder.out_net.out_conv.weight", lambda w: w[:9]), "make no network"),
    "integers": (_with(f"{BLOCK}.z_proj.bias", lambda b: b.long()), "holds torch.int64"),
    "a NaN": (_with(f"{BLOCK}.z_proj.bias", lambda b: b * math.nan), "holds a NaN"),
    "an overflow": (
        lambda t: t | {"decoder.gain": t["decoder.gain"] * 1e38, "decoder.out_net.out_conv.weight": 1e38
                       * t["decoder.out_net.out_conv.weight"]},
        "its values are so large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tensors: Tensors, case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message) as caught:
        load(change(dict(tensors)))
    assert "model.th" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nothing_in_a_file_is_executed(tensors: Tensors, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for content in (dict(tensors) | {"x": Hostile()}, {"model": Hostile()}, Hostile()):
        torch.save(content, tmp_path / "model.th")
        try:
            g = load_generator("vdvae", weights=tmp_path / "model.th", **OPTIONS)
            assert g.image_shape == (3, 8, 8)  # what is no tensor is not looked at
        except WeightsError:
            pass
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "group"}, "Invalid levels='group': it must be 'block' or 'scale'"),
        ({"temperature": 0}, "Invalid temperature=0"),
        ({"hps": "cifar"}, "Unknown hps 'cifar'.*Did you mean 'cifar10'"),
        ({"hps": None, "dec_blocks": None}, "has 5 decoder blocks, as no published VDVAE: pass dec_blocks"),
        ({"dec_blocks": None}, "its decoder has 5 blocks, expected 43"),
        ({"dec_blocks": "1x1,4m1,4x2,8x1"}, "every resolution but the first begins with one block '8m4'"),
        ({"dec_blocks": "1x1,8m4"}, "begins with one block '8m1'"),
        ({"dec_blocks": "1x1;rm"}, "Invalid dec_blocks='1x1;rm': it must be parts like"),
        ({"dec_blocks": 5}, "Invalid dec_blocks=5"),
        ({"dec_blocks": "1x1,3m1,3x1,8m3,8x1"}, "has shape|make no network"),
        ({"enc_blocks": "8m4"}, "Invalid enc_blocks='8m4'"),
        ({"enc_blocks": "8x1,8d2,8x1,4d4,1x1"}, "make no network"),
        ({"normalization": (0, 0)}, r"Invalid normalization=\(0, 0\)"),
        ({"normalization": 127}, "Invalid normalization=127"),
    ],
)
def test_wrong_options(tensors: Tensors, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tensors, **options)
