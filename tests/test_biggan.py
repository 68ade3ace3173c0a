"""BigGAN and BigBiGAN: the official images (tests/golden), and what folding and sharing must not change."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill, iterated
from torch import Tensor

from mlviews import MLViewSource, WeightsError, load_generator
from mlviews.generators import winograd
from mlviews.generators.biggan import BigGAN, BigGANConfig, layers
from mlviews.generators.biggan.layers import Conv
from mlviews.generators.biggan.reading import HUB_EPS, TORCH_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.perturb import Normal
from mlviews.weights.checkpoints import Checkpoint

ROOT = Path(__file__).parents[1]

CASES: dict[str, Any] = {}
for _path in sorted((ROOT / "tests" / "golden").glob("biggan-*.npz")):
    with np.load(_path) as _file:
        CASES[_path.stem.removeprefix("biggan-")] = json.loads(str(_file["facts"])) | {
            "images": torch.from_numpy(_file["images"])
        }
# Conditional, with attention at two sizes; BigBiGAN's architecture with few channels; StudioGAN's names.
TINY, SMALL, STUDIO = "tiny-32", "small-128", "studiogan-32"
Tensors = dict[str, Tensor]


@cache
def filled(case: str) -> Tensors:
    """The weights that the official code was run with, as in benchmarks/parity/biggan.py."""
    tensors = fill({name: tuple(shape) for name, shape in CASES[case]["shapes"].items()}, CASES[case]["seed"])
    tensors = iterated(tensors)
    for end, factor, offset in (("_var", 0.3, 0.0), (".gamma", 1.0, 1.0), (".sigma", 1.0, 1.0)):
        for name in tensors:
            if name.endswith(end):
                tensors[name] = tensors[name] * factor + offset
    return tensors


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return filled(TINY)


@pytest.fixture(scope="module")
def conditional(tensors: Tensors) -> BigGAN:
    return load(tensors)


@pytest.fixture(scope="module")
def bigbigan() -> BigGAN:
    return load(filled(SMALL), label=0, bn_eps=HUB_EPS)


def load(tensors: Tensors, layout: str = "biggan", **options: Any) -> BigGAN:
    return load_biggan(Checkpoint(layout, tensors, {}, "weights.pth"), **options)


def labels_for(g: BigGAN, rows: int) -> Tensor | None:
    return g.sample_labels(range(rows)) if g.num_classes else None


@pytest.mark.parametrize("case", CASES)
def test_images_are_the_official_codes(case: str) -> None:
    facts = CASES[case]
    expected = facts["images"]
    layout = facts.get("layout", "biggan")
    g = load(filled(case), layout, label=facts["label"], bn_eps=facts["bn_eps"])
    z = g.sample_latents(range(len(expected)), facts["seed"])
    for images in (
        g(z, labels_for(g, len(expected))),
        g.decode(z, labels_for(g, len(expected))),
    ):  # two ways to compute
        torch.testing.assert_close(
            images[:, :, :: facts["step"], :: facts["step"]], expected, atol=3e-4, rtol=0
        )


def test_levels_and_sizes_follow_from_the_tensors(bigbigan: BigGAN, conditional: BigGAN) -> None:
    assert bigbigan.level_names == ("4x4", "8x8", "16x16", "32x32", "64x64", "128x128")
    assert {level.shape for level in bigbigan.levels} == {(20,)}
    assert bigbigan.image_shape == (3, 128, 128)
    assert bigbigan.num_classes == 0
    assert conditional.num_classes == 10
    assert conditional.image_shape == (3, 32, 32)


@pytest.mark.parametrize("first", range(5))
def test_shared_prefix_changes_no_image(conditional: BigGAN, first: int) -> None:
    anchors, others = conditional.sample_latents(range(3)), conditional.sample_latents(range(3), seed=1)
    views, labels = [anchors, [*anchors[:first], *others[first:]]], labels_for(conditional, 3)
    for shared, alone in zip(
        conditional.decode_views(views, first, labels), [conditional(z, labels) for z in views], strict=True
    ):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "rows"),
    [(256, 32, 4, 3), (300, 16, 8, 2), (256, 64, 16, 1), (8, 8, 4, 2)],
)
def test_convolutions_by_few_products(
    channels: int, out_channels: int, size: int, rows: int, up: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(out_channels, channels, 3, 3, generator=generator) / channels**0.5
    x = torch.randn(rows, channels, size, size, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    conv = Conv(channels, out_channels, size, up=up)
    conv.load_state_dict({"kernel": kernel})
    expected = F.conv2d(F.interpolate(x, scale_factor=2) if up else x, kernel, padding=1)
    torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=0)


def test_strips_of_rows_and_images_change_nothing(bigbigan: BigGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    z = bigbigan.sample_latents(range(3))
    expected = bigbigan(z)
    monkeypatch.setattr(winograd, "_STRIP", 1 << 14)
    monkeypatch.setattr(winograd, "_MIN_TILES", 5)
    monkeypatch.setattr(layers, "_SCORES", 1 << 13)
    monkeypatch.setattr(layers, "_CACHED", 1 << 16)
    torch.testing.assert_close(bigbigan(z), expected, atol=5e-5, rtol=0)


def test_other_weights_take_effect_and_caches_are_not_pickled(bigbigan: BigGAN) -> None:
    g = copy.deepcopy(bigbigan)
    size = len(pickle.dumps(g))
    z = g.sample_latents(range(2))
    before = g(z)
    assert len(pickle.dumps(g)) == size
    g.load_state_dict(
        {name: value * 0.5 if value.ndim == 4 else value for name, value in g.state_dict().items()}
    )
    after = g(z)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, pickle.loads(pickle.dumps(g))(z), atol=1e-5, rtol=0)


def test_labels_are_drawn_and_returned(conditional: BigGAN) -> None:
    source = MLViewSource(conditional, {"2:": Normal(1.0, 2.0)}, batch_size=5, num_samples=10, layout="solo")
    indices, views, targets = next(iter(source))
    assert torch.equal(targets, conditional.sample_labels(indices))
    assert targets.unique().numel() > 1
    torch.testing.assert_close(
        views[0], conditional(conditional.sample_latents(indices), targets), atol=1e-5, rtol=0
    )


def test_one_label_folded_is_that_label_given(tensors: Tensors, conditional: BigGAN) -> None:
    z = conditional.sample_latents(range(2))
    for label in (0, 9):
        g = load(tensors, label=label)
        assert g.num_classes == 0
        torch.testing.assert_close(g(z), conditional(z, torch.full((2,), label)), atol=1e-4, rtol=0)
    source = MLViewSource(g, Normal(1.0, 2.0), batch_size=2, num_samples=2, layout="solo")
    assert next(iter(source))[2].tolist() == [-1, -1]


def test_classes_differ(conditional: BigGAN) -> None:
    z = [value[:1].expand(2, -1) for value in conditional.sample_latents(range(1))]
    first, second = conditional(z, torch.tensor([1, 2]))
    assert (first - second).abs().mean() > 1e-3


def test_gradients_reach_every_level(conditional: BigGAN) -> None:
    z = [value.requires_grad_() for value in conditional.sample_latents(range(2))]
    conditional.decode(z, labels_for(conditional, 2)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)


def test_gradients_are_those_of_the_images(conditional: BigGAN) -> None:
    g, labels = load(filled(TINY)).double(), labels_for(conditional, 1)
    z = [value.double().requires_grad_() for value in g.sample_latents(range(1))]
    gradients = torch.autograd.grad(g.decode(z, labels).double().sum(), z)
    for level, gradient in enumerate(gradients):
        step = torch.zeros_like(z[level])
        step[0, 0] = 1e-3
        up, down = ([*z[:level], z[level] + sign * step, *z[level + 1 :]] for sign in (1, -1))
        slope = (g(up, labels).double().sum() - g(down, labels).double().sum()) / 2e-3
        torch.testing.assert_close(gradient[0, 0], slope, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(conditional: BigGAN, dtype: torch.dtype) -> None:
    z, labels = conditional.sample_latents(range(2)), labels_for(conditional, 2)
    with torch.autocast("cpu", dtype):
        images = conditional(z, labels)
    assert images.dtype == torch.float32
    assert (images - conditional(z, labels)).abs().mean() < 0.02


def test_a_generator_turned_to_half_precision(tensors: Tensors) -> None:
    g = load(tensors, label=1)
    z = g.sample_latents(range(2))
    expected = g(z)
    assert (g.to(torch.bfloat16)(z) - expected).abs().mean() < 0.02
    torch.testing.assert_close(g.to(torch.float64)(z), expected, atol=0.05, rtol=0)


def test_epsilon_of_the_norms_follows_from_the_singular_values(tensors: Tensors) -> None:
    z, labels = load(tensors).sample_latents(range(2)), torch.tensor([1, 2])
    trained, hub = load(tensors, bn_eps=TORCH_EPS)(z, labels), load(tensors, bn_eps=HUB_EPS)(z, labels)
    assert not torch.equal(trained, hub)
    assert torch.equal(load(tensors)(z, labels), trained)
    converted = {name: value for name, value in tensors.items() if not name.endswith("sv0")}
    assert torch.equal(load(converted)(z, labels), hub)


def test_other_spellings_are_read(tensors: Tensors, conditional: BigGAN) -> None:
    z, labels = conditional.sample_latents(range(2)), labels_for(conditional, 2)
    mybn = {name.replace(".stored_", ".bn.stored_"): value for name, value in tensors.items()}
    counters = {
        name.replace("stored_mean", "accumulation_counter"): torch.ones(1)
        for name in mybn
        if name.endswith("stored_mean")
    }
    assert torch.equal(load(mybn | counters)(z, labels), conditional(z, labels))
    more = {name.replace(".u0", ".u1"): value for name, value in tensors.items() if name.endswith(".u0")}
    assert torch.equal(load(tensors | more)(z, labels), conditional(z, labels))
    half = {name: value.half() for name, value in tensors.items()}
    assert (load(half)(z, labels) - conditional(z, labels)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 10}, "Invalid label=10: it must be an integer from 0 to 9"),
        ({"label": -1}, "Invalid label=-1"),
        ({"label": "cat"}, "Invalid label='cat'"),
        ({"bn_eps": 0}, "Invalid bn_eps=0"),
        ({"bn_eps": "small"}, "Invalid bn_eps='small'"),
    ],
)
def test_wrong_options(tensors: Tensors, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tensors, **options)
    assert not isinstance(caught.value, WeightsError)


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(name)}


def _with(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: make(tensors.get(name, torch.zeros(1)))}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nothing": (lambda tensors: {}, "is missing"),
    "another network": (
        lambda tensors: {"shared.weight": torch.ones(4, 4), "fc.weight": torch.ones(3, 3)},
        "linear.weight is missing",
    ),
    "a missing bias": (_without("blocks.1.0.conv2.bias"), "blocks.1.0.conv2.bias is missing"),
    "a missing vector": (_without("linear.u0"), "linear.u0 is missing"),
    "no vectors": (
        lambda t: {name: value for name, value in t.items() if not name.endswith("u0")},
        "u0 is missing",
    ),
    "no blocks": (_without("blocks."), "blocks.0.0.conv1.weight is missing"),
    "a missing block": (_without("blocks.1."), r"unknown blocks\.2"),
    "no output": (_without("output_layer."), "output_layer.0.stored_mean is missing"),
    "half an attention": (_without("blocks.1.1.phi"), "blocks.1.1.phi.weight is missing"),
    "attention without its first part": (_without("blocks.1.1.theta"), r"unknown blocks\.1\.1\.g"),
    "more queries than values": (
        _with("blocks.1.1.theta.weight", lambda w: w.new_ones(99, w.shape[1], 1, 1)),
        "more than its",
    ),
    "an unknown tensor": (_with("blocks.0.0.conv9.weight", torch.clone), "unknown blocks.0.0.conv9.weight"),
    "a transposed matrix": (
        _with("linear.weight", lambda w: w.T.contiguous()),
        "made for another architecture",
    ),
    "another kernel": (
        _with("blocks.0.0.conv1.weight", lambda w: w[..., :1, :1]),
        "blocks.0.0.conv1.weight has shape",
    ),
    "too few channels": (
        _with("blocks.1.0.conv2.weight", lambda w: w[:-1]),
        "blocks.1.0.conv2.weight has shape",
    ),
    "no channels": (
        _with("blocks.0.0.conv1.weight", lambda w: w[:, :0]),
        "blocks.0.0.conv1.weight has shape",
    ),
    "a number": (_with("shared.weight", lambda w: torch.tensor(1.0)), "shared.weight has shape"),
    "integers": (_with("linear.bias", lambda b: b.long()), "linear.bias holds torch.int64"),
    "a NaN": (_with("blocks.2.0.bn1.gain.weight", lambda w: w * float("nan")), "holds a NaN"),
    "an infinity": (_with("output_layer.2.bias", lambda b: b + float("inf")), "holds a NaN or an infinity"),
    "a negative variance": (_with("blocks.0.0.bn2.stored_var", lambda v: -v), "negative variances"),
    "a zero weight": (_with("blocks.0.0.conv1.weight", torch.zeros_like), "no singular value"),
    "a zero vector": (_with("linear.u0", torch.zeros_like), "no singular value"),
    "an attention's gain of many": (
        _with("blocks.1.1.gamma", lambda g: torch.ones(2)),
        "blocks.1.1.gamma has shape",
    ),
    "no square": (_with("linear.weight", lambda w: w[:-1]), "no square image"),
    "nine blocks": (
        lambda t: t | {f"blocks.{i}.0.conv1.weight": t["blocks.2.0.conv1.weight"] for i in range(3, 9)},
        "9 blocks",
    ),
    "BigGAN-deep": (_with("blocks.0.0.conv4.weight", torch.clone), "BigGAN-deep"),
    "z in one piece": (
        lambda t: (
            t
            | {
                k: v[:, :16]
                for k, v in t.items()
                if k.endswith((".gain.weight", "0.bn1.bias.weight", "0.bn2.bias.weight"))
            }
        ),
        "without hierarchical z",
    ),
    "synchronised norms": (
        lambda t: {k.replace(".stored_", ".bn.running_"): v for k, v in t.items()},
        "--cross_replica",
    ),
    "a discriminator": (
        lambda t: {"blocks.0.0.conv1.weight": torch.ones(8, 3, 3, 3), "embed.weight": torch.ones(5, 8)},
        "shared",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_foreign_files(tensors: Tensors, case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message) as caught:
        load(change(dict(tensors)))
    assert "weights.pth" in str(caught.value)
    assert len(str(caught.value)) < 400


STUDIO_BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing block": (_without("blocks.0."), "blocks.0 is missing"),
    "no blocks": (_without("blocks."), "blocks.0.0.conv2d1.weight_orig is missing"),
    "half an attention": (_without("blocks.2.0.conv1x1_phi"), "conv1x1_phi.weight_orig is missing"),
    "attention without its first part": (_without("blocks.2.0.conv1x1_theta"), r"unknown blocks\.2\.0"),
    "a missing vector": (_without("linear0.weight_u"), "linear0.weight_u is missing"),
    "no output": (_without("conv2d5"), "conv2d5.weight_orig is missing"),
    "a gain of many": (_with("blocks.2.0.sigma", lambda s: torch.ones(2)), "sigma has shape"),
    "negative variances": (_with("bn4.running_var", lambda v: -v), "bn4.running_var holds negative"),
    "codes beside z": (_with("info_mix_linear.weight", lambda w: torch.ones(2, 2)), "trained with info_type"),
    "BigGAN-deep": (_with("blocks.0.0.conv2d3.weight_orig", lambda w: torch.ones(2, 2)), "a BigGAN-deep of"),
    "an unknown tensor": (_with("blocks.0.0.conv2d9.weight", torch.clone), "unknown blocks.0.0.conv2d9"),
}


@pytest.mark.parametrize("case", STUDIO_BROKEN)
def test_broken_files_of_studiogan(case: str) -> None:
    change, message = STUDIO_BROKEN[case]
    with pytest.raises(WeightsError, match=message) as caught:
        load(change(dict(filled(STUDIO))), "biggan-studiogan")
    assert "weights.pth" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_studiogans_checkpoints_are_read(tmp_path: Path) -> None:
    expected = load(filled(STUDIO), "biggan-studiogan")
    z, labels = expected.sample_latents(range(2)), labels_for(expected, 2)
    counters = {"bn4.num_batches_tracked": torch.tensor(7)}
    content = {"state_dict": filled(STUDIO) | counters, "optimizer": {"state": {}}, "step": 3}
    for name, saved in (
        ("G_ema-best.pth", content),
        ("G.pth", {f"G.{k}": v for k, v in filled(STUDIO).items()}),
    ):
        torch.save(saved, tmp_path / name)
        g = load_generator("biggan", weights=tmp_path / name)
        assert torch.equal(g(z, labels), expected(z, labels))
    # Without spectral norm, the weights are as they are.
    plain = {
        name.replace(".weight_orig", ".weight"): value
        for name, value in filled(STUDIO).items()
        if not name.endswith(("weight_u", "weight_v"))
    }
    assert (load(plain, "biggan-studiogan")(z, labels) - expected(z, labels)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["output_layer.0.gain", "blocks.0.0.bn1.stored_mean", "blocks.0.0.conv1.bias"]
)
def test_finite_values_whose_folding_overflows_are_refused(name: str, tensors: Tensors) -> None:
    changed = tensors | {name: torch.full_like(tensors[name], 3e38)}
    with pytest.raises(WeightsError, match=r"its values are so large that blocks\..* holds a NaN"):
        load_biggan(Checkpoint("biggan", changed, {}, "w.pth"))


def test_reading_leaves_the_file_s_tensors_alone(tensors: Tensors) -> None:
    before = {name: value.clone() for name, value in tensors.items()}
    g = load(tensors, label=3)
    g(g.sample_latents(range(1)))
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def test_it_is_frozen_and_moves(tensors: Tensors) -> None:
    g = load(tensors, label=3)
    g(g.sample_latents(range(1)))  # kernels made for the CPU must not stay behind
    assert not any(parameter.requires_grad for parameter in g.parameters())
    moved = g.to("meta")
    assert moved(moved.sample_latents(range(2))).shape == (2, 3, 32, 32)


def test_a_random_network_needs_no_file() -> None:
    config = BigGANConfig(channels=(64, 32, 16), chunk=5, attention={8: (4, 16)}, num_classes=3, embedding=6)
    g = BigGAN(config)
    z, labels = g.sample_latents(range(4)), g.sample_labels(range(4))
    images = g(z, labels)
    assert images.shape == (4, 3, 16, 16)
    assert images.std() > 0.05
    torch.testing.assert_close(images, g.decode(z, labels), atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in g.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8,)},
        {"channels": (8, 0)},
        {"attention": {4: (1, 1)}},
        {"attention": {8: (3, 2)}},
        {"num_classes": 2},
        {"embedding": 2},
    ],
)
def test_a_config_fits_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not fit together"):
        BigGANConfig(**({"channels": (8, 8), "attention": {}} | changes))
