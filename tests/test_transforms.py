"""T_x: parity with torchvision on the same parameters, determinism, distributions, device discipline, bad
input.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from mlviews import transforms
from mlviews.transforms import IMAGENET, Augmentation, Parameters, build

OFF: dict[str, Any] = {"scale": None, "flip": 0.0, "channels": None, "normalize": None}
FULL: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "grayscale": 0.2,
    "blur": 0.5,
    "solarize": 0.2,
    "equalize": 0.2,
}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


# -- a function of (seed, epoch, index, view) ----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_batch_size_and_order_do_not_matter(channels: int) -> None:
    augment = Augmentation(size=28, **FULL)
    x = images(16, channels, 32, 32)
    keys: dict[str, int] = {"seed": 5, "epoch": 2, "view": 1}
    whole = augment(x, range(100, 116), **keys)
    halves = torch.cat([augment(x[:8], range(100, 108), **keys), augment(x[8:], range(108, 116), **keys)])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = augment(x[order], (100 + torch.arange(16))[order], **keys)
    assert torch.allclose(whole, halves, atol=1e-6)
    assert torch.allclose(whole[order], shuffled, atol=1e-6)
    assert torch.equal(whole, Augmentation(size=28, **FULL)(x, range(100, 116), **keys))


@pytest.mark.parametrize("other", [{"seed": 6}, {"epoch": 3}, {"view": 0}])
def test_seed_epoch_and_view_matter(other: dict[str, int]) -> None:
    augment = Augmentation(size=28, **FULL)
    x = images(4, 3, 32, 32)
    keys = {"seed": 5, "epoch": 2, "view": 1}
    first, second = augment(x, range(4), **keys), augment(x, range(4), **(keys | other))
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(first, second, strict=True))


def test_samples_differ() -> None:
    x = images(1, 3, 32, 32).expand(8, -1, -1, -1)
    out = Augmentation(size=28, **FULL)(x, range(8), seed=0, epoch=0, view=0)
    assert all(not torch.allclose(out[i], out[j], atol=1e-2) for i in range(8) for j in range(i))


def test_operations_draw_apart() -> None:
    """Colour on or off leaves the crop, the flip and each other as they are."""
    keys: dict[str, int] = {"seed": 0, "epoch": 0, "view": 0}
    rows = torch.arange(32)
    full = Augmentation(size=28, **FULL).parameters(rows, (32, 32), **keys)
    for part in (
        {},
        {"jitter": FULL["jitter"]},
        {"grayscale": 0.2},
        {"blur": 0.5},
        {"solarize": 0.2},
        {"equalize": 0.2},
    ):
        alone = Augmentation(size=28, scale=FULL["scale"], **part).parameters(rows, (32, 32), **keys)
        drawn = {name: value for name, value in alone._asdict().items() if value is not None}
        assert {"boxes", "flip"} <= set(drawn)
        for name, value in drawn.items():
            assert torch.equal(value, getattr(full, name)), name


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Augmentation(size=28, **FULL)(images(4, 3, 32, 32), range(4), seed=0, epoch=0, view=0)
    assert torch.equal(before, torch.get_rng_state())


# -- distributions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((96, 96), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((64, 160), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((100, 60), (0.3, 0.9), (0.5, 0.8)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    height, width = shape
    boxes = (
        Augmentation(size=96, scale=scale, ratio=ratio)
        .parameters(torch.arange(4000), shape, seed=1, epoch=0, view=0)
        .boxes
    )
    assert boxes is not None
    assert boxes.dtype == torch.int64
    top, left, h, w = boxes.unbind(1)
    assert bool(
        ((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)).all()
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.empty(1, height, width)
        reference = torch.tensor(
            [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(2500)]
        )
    for name, ours, theirs in (
        ("area", h * w, reference[:, 2] * reference[:, 3]),
        ("aspect", w / h, reference[:, 3] / reference[:, 2]),
        ("top", top, reference[:, 0]),
        ("left", left, reference[:, 1]),
    ):
        # Ties make the test conservative; a wrong distribution is off by many orders of magnitude.
        assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3, name


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 400), (0, 173, 40, 53)), ((400, 40), (173, 0, 53, 40)), ((50, 50), (0, 0, 50, 50))],
)
def test_box_that_never_fits_falls_back_to_the_centre(
    shape: tuple[int, int], expected: tuple[int, ...]
) -> None:
    # A tenth attempt at the whole area with a ratio the image does not have fails like the nine before it; a
    # square image takes only a ratio of 1, which a uniform draw never hits.
    ratio = (3 / 4, 4 / 3) if shape != (50, 50) else (0.5, 0.9)
    augment = Augmentation(size=64, scale=(1.0, 1.0), ratio=ratio)
    boxes = augment.parameters(torch.arange(16), shape, seed=0, epoch=0, view=0).boxes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = RandomResizedCrop.get_params(torch.empty(1, *shape), [1.0, 1.0], list(ratio))
    assert boxes is not None
    assert {tuple(box) for box in boxes.tolist()} == {reference}
    if shape != (50, 50):
        assert reference == expected


def test_first_fitting_attempt_wins() -> None:
    augment = Augmentation(size=64)
    uniform = torch.full((1, 22), 0.5)
    uniform[0, :10] = values(
        0.999, 0.999, 0.25, 0.75, *[0.5] * 6
    )  # area: the whole image and a ratio of 4/3 do not go together
    uniform[0, 10:13] = values(0.999, 0.001, 0.5)
    side = round(64 * math.sqrt(0.2 + 0.8 * 0.25))
    assert augment._boxes(uniform, 64, 64).tolist() == [[(65 - side) // 2, (65 - side) // 2, side, side]]


PROBABILITIES: dict[str, Callable[[Parameters], Tensor]] = {
    "flip": lambda p: p.flip,
    "jitter_p": lambda p: p.brightness != 1,
    "grayscale": lambda p: p.grayscale,
    "blur": lambda p: p.sigma > 0,
    "solarize": lambda p: p.solarize,
    "equalize": lambda p: p.equalize,
}  # type: ignore[dict-item, return-value, operator]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_frequency(name: str, probability: float) -> None:
    count = 20_000
    options = {"jitter": (0.4, 0.0, 0.0, 0.0)} if name == "jitter_p" else {}
    augment = Augmentation(size=28, **options, **{name: probability})
    chosen = PROBABILITIES[name](augment.parameters(torch.arange(count), (32, 32), seed=0, epoch=0, view=0))
    assert stats.binomtest(int(chosen.sum()), count, probability).pvalue > 1e-4


@pytest.mark.parametrize("name", ["flip", "jitter_p", "grayscale", "blur", "solarize", "equalize"])
def test_probability_zero_skips_the_operation(name: str) -> None:
    augment = Augmentation(size=28, **(FULL | {name: 0}))
    parameters = augment.parameters(torch.arange(4), (32, 32), seed=0, epoch=0, view=0)
    gone = {"jitter_p": ["brightness", "contrast", "saturation", "hue"], "blur": ["sigma"]}.get(name, [name])
    assert [field for field, value in parameters._asdict().items() if value is None] == gone


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ],
)
def test_strengths_are_uniform(name: str, low: float, high: float) -> None:
    augment = Augmentation(size=28, jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=1, blur=1)
    drawn = getattr(augment.parameters(torch.arange(5000), (32, 32), seed=0, epoch=0, view=0), name)
    assert stats.kstest(drawn.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_parameters_of_operations_are_independent() -> None:
    augment = Augmentation(
        size=28, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1, blur=1, grayscale=0.5, solarize=0.5, equalize=0.5
    )
    count = 20_000
    drawn = augment.parameters(torch.arange(count), (512, 512), seed=0, epoch=0, view=0)
    columns = torch.stack(
        [column.double() for value in drawn for column in (value.unbind(1) if value.ndim == 2 else [value])]
    )
    pairs = torch.corrcoef(columns)
    # Top, left, height, width depend on each other (a large box has little room), everything else does not.
    assert float(pairs[4:].triu(5).abs().max()) < 5 / math.sqrt(count)
    assert float(pairs[:4, 4:].abs().max()) < 5 / math.sqrt(count)


# -- parity with torchvision on the same parameters ----------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (28, (32, 32)),
        (28, (28, 28)),
        (32, (40, 24)),
        (64, (64, 64)),
        (112, (128, 128)),
        (224, (256, 300)),
        (1, (1, 1)),
    ],
)
def test_crop_resize_flip(size: int, shape: tuple[int, int], channels: int) -> None:
    count = 24 if size < 100 else 6
    augment = Augmentation(size=size, scale=(0.02, 1.0), ratio=(0.4, 2.5), channels=None, normalize=None)
    x = images(count, channels, *shape)
    parameters = augment.parameters(torch.arange(count), shape, seed=0, epoch=0, view=0)
    assert parameters.boxes is not None
    assert parameters.flip is not None
    out = augment.apply(x, parameters)
    for sample, box, flip, ours in zip(
        x, parameters.boxes.tolist(), parameters.flip.tolist(), out, strict=True
    ):
        expected = tv.resized_crop(sample, *box, [size, size], antialias=False)
        expected = tv.hflip(expected) if flip else expected
        assert torch.allclose(ours, expected, atol=5e-5), box


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 1, 1),
        (31, 31, 1, 1),
        (0, 31, 32, 1),
        (31, 0, 1, 32),
        (0, 0, 32, 32),
        (3, 5, 28, 27),
        (7, 0, 2, 3),
    ],
)
def test_crop_at_the_borders(box: tuple[int, int, int, int], flip: bool) -> None:
    x = images(1, 1, 32, 32)
    out = Augmentation(size=28, channels=None, normalize=None).apply(
        x, Parameters(boxes=torch.tensor([box]), flip=torch.tensor([flip]))
    )
    expected = tv.resized_crop(x, *box, [28, 28], antialias=False)
    assert torch.allclose(out, tv.hflip(expected) if flip else expected, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "size", "shrunk"), [(512, 112, 128), (56, 28, 28), (100, 28, 33), (55, 28, 55)]
)
def test_large_images_are_shrunk_first(side: int, size: int, shrunk: int) -> None:
    augment = Augmentation(size=size, channels=None, normalize=None)
    assert augment.working_shape(side, side) == (shrunk, shrunk)
    x = images(2, 1, side, side)
    parameters = augment.parameters(torch.arange(2), (side, side), seed=0, epoch=0, view=0)
    assert parameters.boxes is not None
    assert int(parameters.boxes.max()) <= shrunk
    again = augment.apply(tv.resize(x, [shrunk, shrunk], antialias=True), parameters)
    assert torch.allclose(augment.apply(x, parameters), again, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (64, 48), (20, 20)])
def test_no_crop_resizes_the_whole_image(shape: tuple[int, int], flip: bool) -> None:
    x = images(3, 3, *shape)
    out = Augmentation(size=28, **(OFF | {"flip": float(flip)}))(x, range(3), seed=0, epoch=0, view=0)
    expected = tv.resize(x, [28, 28], antialias=True)
    assert torch.allclose(out, tv.hflip(expected) if flip else expected, atol=1e-6)


# kornia weights gray by 0.299, torchvision by 0.2989; the rest is rounding.
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "factors", "reference", "tolerance"),
    [
        ("brightness", (0.0, 0.6, 1.0, 1.9), tv.adjust_brightness, 1e-6),
        ("contrast", (0.0, 0.6, 1.0, 1.9), tv.adjust_contrast, 3e-4),
        ("saturation", (0.0, 0.6, 1.0, 1.9), tv.adjust_saturation, 3e-4),
        ("hue", (-0.5, -0.1, 0.0, 0.4), tv.adjust_hue, 1e-5),
    ],
)
def test_color(
    name: str, factors: tuple[float, ...], reference: Callable[..., Tensor], tolerance: float, channels: int
) -> None:
    x = images(4, channels, 16, 16)
    x[:, :, :2] = x[:, :1, :2]  # gray, black and white pixels too
    x[:, :, 2], x[:, :, 3] = 0, 1
    out = Augmentation(size=16, **OFF).apply(x, Parameters(**{name: values(*factors)}))
    expected = torch.stack([reference(sample, factor) for sample, factor in zip(x, factors, strict=True)])
    assert torch.allclose(out, expected, atol=tolerance)
    assert not torch.allclose(out[0], x[0], atol=1e-2) or (channels == 1 and name in ("saturation", "hue"))


def test_color_in_the_documented_order() -> None:
    x = images(3, 3, 16, 16)
    b, c, s, h = values(0.7, 1.2, 1.4), values(1.3, 0.7, 1.0), values(0.5, 1.4, 1.0), values(0.1, -0.05, 0.0)
    out = Augmentation(size=16, **OFF).apply(x, Parameters(brightness=b, contrast=c, saturation=s, hue=h))
    for i, sample in enumerate(x):
        expected = tv.adjust_contrast(tv.adjust_brightness(sample, float(b[i])), float(c[i]))
        expected = tv.adjust_hue(tv.adjust_saturation(expected, float(s[i])), float(h[i]))
        assert torch.allclose(out[i], expected, atol=1e-3)


def test_grayscale() -> None:
    x = images(2, 3, 16, 16)
    out = Augmentation(size=16, **OFF).apply(x, Parameters(grayscale=torch.tensor([True, False])))
    assert torch.allclose(out[0], tv.rgb_to_grayscale(x[0], 3), atol=3e-4)
    assert torch.equal(out[1], x[1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (28, 3), (64, 7), (112, 11), (224, 23)])
def test_blur(size: int, kernel: int, channels: int) -> None:
    x = images(4, channels, size, size)
    sigmas = (0.1, 0.0, 0.9, 2.0)
    out = Augmentation(size=size, **OFF).apply(x, Parameters(sigma=values(*sigmas)))
    for sample, sigma, ours in zip(x, sigmas, out, strict=True):
        expected = tv.gaussian_blur(sample, [kernel, kernel], [sigma, sigma]) if sigma else sample
        assert torch.allclose(ours, expected, atol=1e-6), sigma


@pytest.mark.parametrize("channels", [1, 3])
def test_equalize(channels: int) -> None:
    """Of each image and channel by itself, as torchvision does to bytes; images of one or two levels
    included.
    """
    images = torch.randint(
        0, 256, (6, channels, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    images[1] //= 9
    images[2] = 7
    images[3] = (images[3] > 100) * 200
    images[4] = images[4].clamp(90, 140)
    out = Augmentation(size=16, **OFF).apply(
        images / 255, Parameters(equalize=torch.tensor([True] * 5 + [False]))
    )
    expected = torch.stack([*map(tv.equalize, images[:5]), images[5]])
    assert torch.equal((out * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_solarize(threshold: float) -> None:
    x = images(2, 3, 16, 16)
    x[:, :, 0] = 0.5
    out = Augmentation(size=16, **OFF, threshold=threshold).apply(
        x, Parameters(solarize=torch.tensor([True, False]))
    )
    assert torch.allclose(out[0], tv.solarize(x[0], threshold))
    assert torch.equal(out[1], x[1])


def test_normalize() -> None:
    x = images(2, 3, 16, 16)
    out = Augmentation(size=16, **(OFF | {"normalize": IMAGENET})).apply(x, Parameters())
    assert torch.allclose(out, tv.normalize(x, *map(list, IMAGENET)), atol=1e-5)


@pytest.mark.parametrize("normalize", [None, IMAGENET, ((0.5,), (0.25,))])
def test_one_channel_is_repeated_to_three(normalize: Any) -> None:
    x = images(2, 1, 16, 16)
    out = Augmentation(size=16, **(OFF | {"channels": 3, "normalize": normalize})).apply(x, Parameters())
    expected = x.repeat(1, 3, 1, 1)
    if normalize is not None:
        expected = tv.normalize(expected, *[list(part) * (3 // len(part)) for part in normalize])
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, None])
def test_one_channel_takes_the_average_normalization(channels: int | None) -> None:
    x = images(2, 1, 16, 16)
    out = Augmentation(size=16, **(OFF | {"channels": channels, "normalize": IMAGENET})).apply(
        x, Parameters()
    )
    mean, std = (sum(part) / 3 for part in IMAGENET)
    assert torch.allclose(out, (x - mean) / std, atol=1e-5)


def test_whole_pipeline_in_order() -> None:
    """Each step of one sample by torchvision, in the order of the BYOL paper."""
    x = images(1, 3, 40, 40)
    box = (3, 6, 30, 25)
    parameters = Parameters(
        boxes=torch.tensor([box]),
        flip=torch.tensor([True]),
        brightness=values(1.3),
        contrast=values(0.7),
        saturation=values(1.3),
        hue=values(0.08),
        grayscale=torch.tensor([True]),
        sigma=values(1.5),
        solarize=torch.tensor([True]),
    )
    expected = tv.adjust_brightness(tv.hflip(tv.resized_crop(x, *box, [28, 28], antialias=False)), 1.3)
    expected = tv.rgb_to_grayscale(
        tv.adjust_hue(tv.adjust_saturation(tv.adjust_contrast(expected, 0.7), 1.3), 0.08), 3
    )
    blurred = tv.gaussian_blur(expected, [3, 3], [1.5, 1.5])
    expected = tv.normalize(tv.solarize(blurred, 0.5), *map(list, IMAGENET))
    out = Augmentation(size=28).apply(x, parameters)
    # Solarization is a jump, so pixels within kornia's and torchvision's differing gray weights of it are
    # left out.
    near = ((blurred - 0.5).abs() < 2e-3).expand_as(out)
    assert float(near.float().mean()) < 0.05
    assert torch.allclose(out[~near], expected[~near], atol=5e-3)


# -- the output and the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_output_is_new_contiguous_float32(dtype: torch.dtype) -> None:
    x = images(2, 3, 28, 28).to(dtype)
    for options in (OFF, FULL, {"scale": None, "normalize": None, "flip": 0.0}):
        before = x.clone()
        out = Augmentation(size=28, **options)(x, range(2), seed=0, epoch=0, view=0)
        assert out.shape == (2, 3, 28, 28)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        out.fill_(-1)
        assert torch.equal(x, before)


def test_channels_last_and_empty_batches() -> None:
    augment = Augmentation(size=28, **FULL)
    x = images(4, 3, 32, 32)
    keys: dict[str, int] = {"seed": 0, "epoch": 0, "view": 0}
    out = augment(x.to(memory_format=torch.channels_last), range(4), **keys)
    assert out.is_contiguous()
    assert torch.allclose(out, augment(x, range(4), **keys), atol=1e-5)
    assert augment(x[:0], range(0), **keys).shape == (0, 3, 28, 28)


def test_autocast_around_it_changes_nothing() -> None:
    augment, x = Augmentation(size=28, **FULL), images(4, 3, 32, 32)
    expected = augment(x, range(4), seed=0, epoch=0, view=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x, range(4), seed=0, epoch=0, view=0), expected)


def test_gradients_reach_the_images() -> None:
    x = images(2, 3, 32, 32).requires_grad_()
    Augmentation(size=28, **FULL)(x, range(2), seed=0, epoch=0, view=0).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad.isfinite() & (x.grad != 0)).any())


class NoSync(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.seen.append(name)
        assert not any(word in name for word in self.FORBIDDEN), name
        if name.startswith(("aten.index.", "aten.index_put")):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        out = func(*args, **(kwargs or {}))
        # A number next to a device tensor is a 0-dim CPU tensor: free as an operand, a wait when copied.
        copies = "copy" in name
        places = {
            value.device.type
            for value in [*args, out]
            if isinstance(value, Tensor) and (value.ndim or copies)
        }
        assert len(places) <= 1, f"{name} goes between devices"
        return out


PIPELINES = [
    transforms.simclr(28),
    transforms.simclr(28, color=False),
    transforms.gray(28),
    *transforms.byol(28),
    Augmentation(size=28, **OFF),
    Augmentation(size=28, scale=None),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("index", range(len(PIPELINES)))
def test_no_host_sync(index: int, channels: int) -> None:
    augment, rows = copy.copy(PIPELINES[index]), torch.arange(4)
    x = images(4, channels, 64, 64)
    augment(x, rows, seed=0, epoch=0, view=0)  # makes the constants
    with NoSync() as mode:
        augment(x, rows, seed=0, epoch=1, view=0)
    assert mode.seen


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("index", range(len(PIPELINES)))
def test_everything_stays_on_the_device(index: int, channels: int) -> None:
    augment = copy.copy(PIPELINES[index])
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        x, rows = torch.rand(4, channels, 64, 64, device="cuda"), torch.arange(4, device="cuda")
        augment(x, rows, seed=0, epoch=0, view=0)
        with NoSync() as mode:
            out = augment(x, rows, seed=0, epoch=1, view=0)
            drawn = augment.parameters(rows, (64, 64), seed=0, epoch=1, view=0)
    assert mode.seen
    assert out.device.type == "cuda"
    assert out.shape[2:] == (28, 28)
    assert all(value.device.type == "cuda" for value in drawn if value is not None)


def test_import_is_light() -> None:
    code = "import sys, mlviews.transforms as t; t.simclr(28); t.byol(28); sys.exit('kornia' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- factories, configurations, values -----------------------------------------------------------------------


def test_factories() -> None:
    plain, color = transforms.simclr(28, color=False), transforms.simclr(28)
    assert plain == Augmentation(size=28, scale=(0.2, 1.0), flip=0.5)
    assert color == dataclasses.replace(plain, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2)
    assert transforms.gray(28) == dataclasses.replace(plain, jitter=(0.4, 0.4, 0.0, 0.0))
    first, second = transforms.byol(224, channels=None, normalize=None)
    shared = Augmentation(
        size=224, scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, channels=None, normalize=None
    )
    assert first == dataclasses.replace(shared, blur=1.0)
    assert second == dataclasses.replace(shared, blur=0.1, solarize=0.2)


def test_is_a_value() -> None:
    """Equal, hashable, copied and pickled by its fields, whatever it was used for."""
    augment = Augmentation(size=28, scale=[0.2, 1.0], normalize=[[0.5], [0.5]], jitter=[0, 0, 0, 0])  # type: ignore[arg-type]
    x = images(2, 1, 32, 32)
    out = augment(x, range(2), seed=0, epoch=0, view=0)
    for other in (pickle.loads(pickle.dumps(augment)), copy.deepcopy(augment), dataclasses.replace(augment)):
        assert other == augment
        assert hash(other) == hash(augment)
        assert set(vars(other)) == set(dataclasses.asdict(augment))
        assert torch.equal(other(x, range(2), seed=0, epoch=0, view=0), out)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        (transforms.gray(28), transforms.gray(28)),
        ({"name": "simclr", "size": 28, "color": False}, transforms.simclr(28, color=False)),
        (
            {"name": "gray", "size": 28, "normalize": "imagenet", "channels": 1},
            transforms.gray(28, channels=1),
        ),
        ({"name": "byol", "size": 32, "normalize": None}, transforms.byol(32, normalize=None)),
        (
            {"name": "custom", "size": 28, "scale": [0.5, 1], "blur": 0.5},
            Augmentation(size=28, scale=(0.5, 1), blur=0.5),
        ),
        (
            {"name": "simclr", "size": 28, "normalize": [[0.5], [0.2]]},
            transforms.simclr(28, normalize=((0.5,), (0.2,))),
        ),
        (
            [{"name": "gray", "size": 28}, None, transforms.simclr(28)],
            (transforms.gray(28), None, transforms.simclr(28)),
        ),
    ],
)
def test_build(spec: object, expected: object) -> None:
    assert build(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("simclr", "Invalid transform='simclr'"),
        (28, "simclr, byol, gray, custom"),
        ([], r"one pipeline per view"),
        ({}, "has no name"),
        (
            {"name": "simclrr", "size": 28},
            r"'simclrr': the names are simclr, byol, gray, custom\. Did you mean 'simclr'\?",
        ),
        ({"name": 3}, "Unknown transform name 3"),
        (
            {"name": "simclr", "size": 28, "colour": False},
            r"'colour' of transform 'simclr'.*size, color.*Did you mean 'color'\?",
        ),
        ({"name": "simclr", "size": 28, 4: 1}, "Unknown key 4"),
        ({"name": "gray"}, "needs a size"),
        ({"name": "gray", "size": "28"}, "Invalid size='28'"),
        ({"name": "simclr", "size": 28, "color": "no"}, "Invalid color='no'"),
        ({"name": "simclr", "size": 28, "normalize": "cifar"}, "Invalid normalize='cifar'"),
        ([{"name": "byol", "size": 28}, None], "a pipeline per view itself"),
    ],
)
def test_build_rejects(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "Invalid size=0"),
        ({"size": True}, "Invalid size=True"),
        ({"size": 28.0}, "Invalid size=28.0"),
        ({"scale": (0.0, 1.0)}, r"Invalid scale=\(0.0, 1.0\).*<= 1"),
        ({"scale": (0.5, 0.2)}, "Invalid scale"),
        ({"scale": (0.5, 1.5)}, "Invalid scale"),
        ({"scale": 0.5}, "Invalid scale=0.5: give 2 numbers"),
        ({"scale": "ab"}, "Invalid scale='ab'"),
        ({"ratio": (0, 1)}, "Invalid ratio"),
        ({"ratio": (1, math.inf)}, "Invalid ratio"),
        ({"ratio": (2, 1)}, "Invalid ratio"),
        ({"flip": 1.5}, "Invalid flip=1.5: it is a probability"),
        ({"flip": True}, "Invalid flip=True"),
        ({"jitter_p": -0.1}, "Invalid jitter_p"),
        ({"grayscale": "0.2"}, "Invalid grayscale='0.2'"),
        ({"blur": math.nan}, "Invalid blur=nan"),
        ({"solarize": 2}, "Invalid solarize=2"),
        ({"threshold": 128}, "Invalid threshold=128: it is a pixel value"),
        ({"jitter": (0.4, 0.4, 0.4)}, "Invalid jitter=.*give 4 numbers"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "Invalid jitter=.*at most 0.5"),
        ({"jitter": (-0.4, 0.4, 0.4, 0.1)}, "Invalid jitter"),
        ({"blur_sigma": (0, 2)}, "Invalid blur_sigma"),
        ({"size": 1, "blur": 0.5}, "size of at least 2"),
        ({"channels": 4}, "Invalid channels=4"),
        ({"channels": True}, "Invalid channels=True"),
        ({"normalize": (0.5, 0.5)}, r"Invalid normalize=\(0.5, 0.5\)"),
        ({"normalize": ((0.5,), (0.0,))}, "Invalid normalize"),
        ({"normalize": ((0.5,), (0.5, 0.5, 0.5))}, "Invalid normalize"),
        ({"normalize": ((0.5, 0.5), (0.5, 0.5))}, "Invalid normalize"),
        ({"normalize": ((0.5,),)}, "Invalid normalize"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"size": 28} | options))


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (torch.rand(3, 32, 32), {}, r"shape \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}, "torch.uint8.*/ 255"),
        (torch.rand(2, 4, 32, 32), {}, "4 channels"),
        (torch.rand(2, 3, 32, 32), {"indices": range(3)}, r"indices of shape \(3,\) for 2 images"),
        (torch.rand(2, 3, 32, 32), {"indices": [-1, 0]}, "Invalid indices"),
        (torch.rand(2, 3, 32, 32), {"indices": [0.5, 1.5]}, "Invalid indices"),
        (torch.rand(2, 3, 32, 32), {"seed": -1}, "Invalid seed=-1"),
        (torch.rand(2, 3, 32, 32), {"epoch": 1 << 32}, "Invalid epoch"),
        (torch.rand(2, 3, 32, 32), {"view": 4096}, "Invalid view=4096"),
        (torch.rand(2, 3, 32, 32), {"view": -1}, "Invalid view=-1"),
        (torch.rand(2, 3, 32, 32), {"view": "anchor"}, "Invalid view='anchor'"),
    ],
)
def test_rejects_calls(batch: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(size=28)(batch, **({"indices": range(2), "seed": 0, "epoch": 0, "view": 0} | options))


def test_rejects_three_channels_for_one() -> None:
    with pytest.raises(ValueError, match="channels=1"):
        Augmentation(size=28, channels=1)(torch.rand(2, 3, 32, 32), range(2), seed=0, epoch=0, view=0)
    with pytest.raises(ValueError, match="channels=1"):
        Augmentation(size=28, channels=1).check(3)
    Augmentation(size=28, channels=1).check(1)


@pytest.mark.parametrize("shape", [(32,), (3, 32, 32), (0, 32)])
def test_rejects_image_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Invalid image_shape"):
        Augmentation(size=28).parameters(torch.arange(2), shape, seed=0, epoch=0, view=0)
