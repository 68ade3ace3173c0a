"""StyleGAN3 and StyleGAN-XL: the official images (tests/golden), levels, filters, and files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, by_index, stylegan3_golden
from test_checkpoints import Generator, Plain, pickled, saved
from test_source import Watch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mlviews
from mlviews import MLViewSource, WeightsError, load_generator, perturb
from mlviews.generators.stylegan import filters
from mlviews.generators.stylegan.filters import FilteredActivation, Resampling
from mlviews.generators.stylegan.stylegan3 import Layer, LayerConfig, StyleGAN3, StyleGAN3Config
from mlviews.generators.stylegan.stylegan3_reading import convert
from mlviews.generators.stylegan.stylegan3_reading import load as load_stylegan3
from mlviews.weights import checkpoints
from mlviews.weights.checkpoints import Checkpoint

CASES = ("t-16px-tiny", "r-16px-tiny", "xl-stem-16px-tiny", "xl-32px-tiny")
Tensors = dict[str, Tensor]


def checkpoint(case: str = "t-16px-tiny") -> Checkpoint:
    tensors, metadata, _ = stylegan3_golden(case)
    copies = {name: value.clone() for name, value in tensors.items()}
    return Checkpoint(metadata["layout"], copies, json.loads(metadata["facts"]), "tiny.pkl")


def module_of(stored: Checkpoint, kind: type[Plain] = Generator) -> nn.Module:
    """Return a module with the tensors and the attributes of the official one."""
    g = kind(stored.tensors)
    for name, attributes in stored.facts["modules"].items():
        for key, value in attributes.items():
            setattr(g.get_submodule(name), key, np.array(value) if key == "size" else value)
    return g


@pytest.fixture(scope="module")
def small() -> StyleGAN3:
    return load_stylegan3(checkpoint(), groups=4)


@pytest.fixture(scope="module")
def xl() -> StyleGAN3:
    return load_stylegan3(checkpoint("xl-32px-tiny"), groups=4)


def wide(kernel: int = 3) -> StyleGAN3:
    """Return a random network that is wide enough for the fast convolutions."""
    torch.manual_seed(0)
    same = Resampling(2, 2, 12, 12, False, ((9, 8), (9, 8)) if kernel == 3 else ((11, 10), (11, 10)))
    layers = (LayerConfig(64, kernel, same),) * 2
    config = StyleGAN3Config((20, 14), 16, 2, 64, layers, z_dim=4, w_dim=4, mapping=(4, 4), image_scale=1)
    g = StyleGAN3(config)
    for block in g.blocks[1:-1]:
        block.steps[0].activation.up_filter *= 2 * 2**0.25  # type: ignore[index, operator, union-attr]
        block.steps[0].gain.fill_(8)  # type: ignore[index, operator, union-attr]
    return g


# -- against the official code -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_images_are_the_official_ones(case: str) -> None:
    golden = stylegan3_golden(case)[2]
    seed, step = int(golden["seed"]), int(golden["step"])
    expected = torch.from_numpy(golden["images"])
    g = load_stylegan3(checkpoint(case), truncation_psi=float(golden["psi"]))
    labels = g.sample_labels(range(len(expected)), seed) if g.num_classes else None
    z = g.sample_latents(range(len(expected)), seed, truncation=None)
    for images in (g(z, labels), g.decode([value.clone().requires_grad_() for value in z], labels)):
        torch.testing.assert_close(images[..., ::step, ::step], expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.05


@pytest.mark.parametrize(("kernel", "padding"), [(3, 2), (1, 0)])
def test_fast_convolutions_are_convolutions(kernel: int, padding: int) -> None:
    layer = wide(kernel).blocks[1].steps[0]
    assert isinstance(layer, Layer)
    assert layer.suits_winograd == (kernel == 3)
    x, style = torch.randn(2, 20, 14, 64), torch.rand(2, 1, 1, 64)
    expected = F.conv2d((x * style).movedim(3, 1), layer.weight, padding=padding).movedim(1, 3)
    torch.testing.assert_close(layer._convolved(x, style), expected, atol=2e-3, rtol=0)


RESAMPLINGS = {
    "t": Resampling(2, 2, 12, 12, False, ((9, 8), (9, 8))),
    "r": Resampling(2, 2, 12, 12, True, ((11, 10), (11, 10))),
    "larger": Resampling(4, 2, 24, 12, False, ((-6, -9), (-5, -8))),
    "cropped unevenly": Resampling(2, 1, 6, 3, True, ((-3, 2), (1, -4))),
    "smaller": Resampling(1, 2, 1, 4, False, ((0, 0), (-1, 0))),
}


@pytest.mark.parametrize("name", RESAMPLINGS)
def test_filters_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros between pixels, padding, a filter, the activation, a filter, and every so-manyth pixel."""
    torch.manual_seed(0)
    resampling = RESAMPLINGS[name]
    module = FilteredActivation(3, resampling, 0.5)
    module.up_filter.normal_()
    module.down_filter.normal_()
    x = torch.randn(2, 13, 17, 3)
    up, (rows, columns) = resampling.up, resampling.padding
    spread = torch.zeros(2, 3, 13 * up, 17 * up)
    spread[:, :, ::up, ::up] = x.movedim(3, 1)
    spread = F.pad(spread, (*columns, *rows))
    taps = torch.outer(module.up_filter, module.up_filter).flip(0, 1)
    upsampled = F.conv2d(spread, taps.expand(3, 1, -1, -1), groups=3)
    activated = F.leaky_relu(upsampled, 0.2).clamp(-0.5, 0.5)
    down = module.down_filter if resampling.is_radial else torch.outer(*[module.down_filter] * 2)
    expected = F.conv2d(activated, down.expand(3, 1, -1, -1), stride=resampling.down, groups=3).movedim(1, 3)
    assert expected.shape[1:3] == (resampling.after(13, 0), resampling.after(17, 1))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x.clone().requires_grad_()), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(filters, "_CACHED", 1)
    monkeypatch.setattr(filters, "_MIN_ROWS", 2)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


# -- levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "sizes"), [(1, [8]), (3, [3, 3, 2]), (None, [1] * 8)])
def test_groups_are_as_even_as_possible(groups: int | None, sizes: list[int], small: StyleGAN3) -> None:
    g = load_stylegan3(checkpoint(), groups=groups)
    assert [run.length for run in g.runs] == sizes
    assert g.level_names[0] == ("style 1" if sizes[0] == 1 else f"styles 1-{sizes[0]}")
    z = g.sample_latents(range(2))
    torch.testing.assert_close(g(z), small(z[:1] * 4), atol=1e-6, rtol=0)


def test_stem_and_superresolution_make_one_chain(xl: StyleGAN3) -> None:
    """A stage takes the place of the stem's last three layers, so that the layers' numbers have gaps."""
    stem = load_stylegan3(checkpoint("xl-stem-16px-tiny"))
    assert (stem.config.num_styles, xl.config.num_styles) == (12, 17)
    assert (stem.image_shape, xl.image_shape) == ((3, 16, 16), (3, 32, 32))
    assert (xl.num_classes, xl.config.z_dim, xl.config.label_dim) == (3, 8, 8)


def test_a_level_moves_its_own_styles_only(small: StyleGAN3) -> None:
    z, moved = small.sample_latents(range(2))[0], small.sample_latents(range(2), seed=1)[0]
    ungrouped = load_stylegan3(checkpoint())
    for group in range(4):
        styles = [moved if group * 2 <= style < group * 2 + 2 else z for style in range(8)]
        grouped = [moved if level == group else z for level in range(4)]
        torch.testing.assert_close(small(grouped), ungrouped(styles), atol=1e-6, rtol=0)
        assert (small(grouped) - small([z] * 4)).abs().max() > 1e-3


def test_one_draw_feeds_every_level_and_is_mapped_once(small: StyleGAN3) -> None:
    z = small.sample_latents(range(3))
    rows = []
    counter = small.mapping.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    w = small.condition(z, None)
    moved = small.condition([z[0], z[1], z[0] + 1, z[3]], None)
    counter.remove()
    assert rows == [3, 6]
    assert all(value is w[0] for value in w)
    torch.testing.assert_close(moved[1], w[0])
    distances = small.distances(z, [z[0], z[1], z[0] + 1, z[3]])
    torch.testing.assert_close(distances[2], torch.cat([moved[2] - w[0]] * 2, dim=1).norm(dim=1))
    assert distances[1].abs().max() < 1e-4


@pytest.mark.parametrize("first", range(5))
def test_shared_prefixes_change_no_image(xl: StyleGAN3, first: int) -> None:
    anchors, others = xl.sample_latents(range(3)), xl.sample_latents(range(3), seed=1)
    views, labels = [anchors, [*anchors[:first], *others[first:]]], xl.sample_labels(range(3))
    for shared, alone in zip(
        xl.decode_views(views, first, labels), [xl(z, labels) for z in views], strict=True
    ):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


# -- in a source ---------------------------------------------------------------------------------------------


def source(g: StyleGAN3, **options: Any) -> MLViewSource:
    settings = {"batch_size": 4, "num_samples": 8, "seed": 3, "layout": lambda batch: batch} | options
    return MLViewSource(g, {"2:": perturb.Normal(0.8, 1.0)}, **settings)


def test_samples_depend_on_their_index_only(xl: StyleGAN3) -> None:
    whole = by_index(source(xl))
    assert_same(whole, by_index(source(xl, batch_size=3, drop_last=False)), 1e-5)
    ranks = [by_index(source(xl, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert_same(whole, ranks[0] | ranks[1], 1e-5)
    stopped = source(xl)
    first = by_index([next(iter(stopped))])
    resumed = source(xl)
    resumed.load_state_dict(stopped.state_dict())
    assert_same(whole, first | by_index(resumed), 1e-5)


def test_labels_are_drawn_and_returned(xl: StyleGAN3) -> None:
    batch = next(iter(source(xl, batch_size=8)))
    assert torch.equal(batch.targets, xl.sample_labels(range(8), seed=3))
    assert batch.targets.unique().numel() > 1
    torch.testing.assert_close(batch.views[1], xl(batch.latents[1], batch.targets), atol=1e-5, rtol=0)
    z = xl.sample_latents(range(2))
    first, second = (xl(z, torch.full((2,), label)) for label in (0, 1))
    assert (first - second).abs().mean() > 1e-3


@pytest.mark.parametrize("case", ["r-16px-tiny", "xl-32px-tiny"])
def test_a_step_is_made_on_the_device_and_never_waits_for_it(case: str) -> None:
    config, _ = convert(checkpoint(case))
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("cuda"):
            g = StyleGAN3(config, groups=4, truncation_psi=0.7)
        iterator = iter(source(g, device="cuda"))
        next(iterator)  # the plan's constants are sent there once
        with Watch() as watch:
            batch = next(iterator)
    assert {view.device.type for view in batch.views} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []


# -- options -------------------------------------------------------------------------------------------------


def test_crop_and_size_are_of_the_whole_image(small: StyleGAN3) -> None:
    z = small.sample_latents(range(2))
    g = load_stylegan3(checkpoint(), groups=4, crop=(12, 8))
    torch.testing.assert_close(g(z), small(z)[:, :, 2:14, 4:12], atol=1e-6, rtol=0)
    averaged = load_stylegan3(checkpoint(), groups=4, crop=(12, 8), size=4)
    assert averaged.image_shape == (3, 4, 4)
    state = small.run(small.condition(z, None))[0].movedim(3, 1)[:, :, 2:14, 4:12] * 0.25
    expected = (F.avg_pool2d(state, (3, 2)) / 2 + 0.5).clamp(0, 1)  # before values beyond [0, 1] are clipped
    torch.testing.assert_close(averaged(z), expected, atol=1e-6, rtol=0)


def test_psi_moves_towards_the_mean_of_the_class() -> None:
    stored = checkpoint("xl-32px-tiny")
    labels = torch.tensor([2, 0])
    half = load_stylegan3(stored, truncation_psi=0.5)
    z = half.sample_latents(range(2))
    w = load_stylegan3(stored).condition(z, labels)[0]
    expected = 0.5 * w + 0.5 * stored.tensors["mapping.w_avg"][labels]
    torch.testing.assert_close(half.condition(z, labels)[0], expected)
    # The older variant of the code has the mean of all classes.
    stored.tensors["mapping.w_avg"] = stored.tensors["mapping.w_avg"][0]
    older = load_stylegan3(stored, truncation_psi=0)
    assert older.num_classes == 3
    assert torch.equal(*older.condition(z, labels)[0])


def test_without_classes_the_table_of_features_is_not_used() -> None:
    stored = checkpoint("xl-32px-tiny")
    tensors = {name: value for name, value in stored.tensors.items() if "embed_proj" not in name}
    tensors["mapping.w_avg"] = tensors["mapping.w_avg"][0]
    tensors["mapping.fc0.weight"] = tensors["mapping.fc0.weight"][:, :8]
    g = load_stylegan3(Checkpoint(stored.layout, tensors, stored.facts, "x"))
    assert g.num_classes == 0
    assert g(g.sample_latents(range(1))).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 9}, "groups=9.*from 1 to 8"),
        ({"crop": 15}, "crop=15.*even"),
        ({"crop": 18}, "crop=18.*from 1 to 16"),
        ({"size": 5}, "size=5.*divide the 16"),
        ({"truncation_psi": 1.5}, r"truncation_psi=1\.5.*0.*1"),
        ({"truncation": -1.0}, "truncation=-1"),
    ],
)
def test_wrong_options_are_not_the_files_fault(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_stylegan3(checkpoint(), **options)
    assert not isinstance(raised.value, WeightsError)


# -- numbers -------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_differences() -> None:
    g = load_stylegan3(checkpoint("r-16px-tiny"), groups=2, size=4).double()
    z = [torch.randn(1, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def image(*z: Tensor) -> Tensor:
        return g.run(g.condition(z, None))[0][:, ::8, ::8]

    assert torch.autograd.gradcheck(image, z, atol=1e-6, rtol=1e-4, fast_mode=True)


def test_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    g = wide()
    z = g.sample_latents(range(2))
    images = g(z)
    assert images.std() > 0.05
    tracked = g.decode([value.clone().requires_grad_() for value in z])
    torch.testing.assert_close(tracked, images, atol=1e-4, rtol=0)
    tracked.sum().backward()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(g(z), images, atol=1e-4, rtol=0)


def test_autocast_is_close(small: StyleGAN3) -> None:
    z = small.sample_latents(range(2))
    with torch.autocast("cpu", torch.bfloat16):
        images = small(z)
    assert images.dtype == torch.float32
    assert 0 < (images - small(z)).abs().mean() < 0.02


def test_state_dict_brings_everything_along(xl: StyleGAN3) -> None:
    fresh = copy.deepcopy(StyleGAN3(xl.config, groups=4))
    z, labels = xl.sample_latents(range(2)), xl.sample_labels(range(2))
    assert (fresh(z, labels) - xl(z, labels)).abs().max() > 0.05
    fresh.load_state_dict(xl.state_dict())
    assert torch.equal(fresh(z, labels), xl(z, labels))
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(z, labels), xl(z, labels))


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_pickle_a_module_and_a_converted_file_are_one_network(case: str, tmp_path: Path) -> None:
    stored = checkpoint(case)
    name = stored.layout
    path = tmp_path / "network.pkl"
    path.write_bytes(pickled({"G": None, "D": None, "G_ema": module_of(stored)}))
    checkpoints.convert(path, tmp_path / "converted.safetensors")
    forms = (path, tmp_path / "converted.safetensors", module_of(stored, Plain))
    expected = load_stylegan3(stored)
    labels = expected.sample_labels(range(1)) if expected.num_classes else None
    z = expected.sample_latents(range(1))
    for weights in forms:
        g = load_generator(name, weights=weights)
        assert torch.equal(g(z, labels), expected(z, labels))
    with pytest.raises(WeightsError, match="but generator 'stylegan2' takes StyleGAN2"):
        load_generator("stylegan2", weights=path)


def test_a_state_dict_alone_says_too_little(tmp_path: Path) -> None:
    (tmp_path / "g.pt").write_bytes(saved(checkpoint().tensors))
    with pytest.raises(WeightsError, match=r"does not say what synthesis\.layer_names is; load the \.pkl"):
        load_generator("stylegan3", weights=tmp_path / "g.pt")


class Trap:
    """Makes a file as soon as somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["attribute", "module", "discriminator", "tensor", "list"])
def test_nothing_in_a_file_is_executed(place: str, tmp_path: Path) -> None:
    g = module_of(checkpoint())
    trap = Trap(tmp_path / "trapped")
    content: dict[str, Any] = {"G_ema": g, "D": trap if place == "discriminator" else None}
    if place == "attribute":
        g.synthesis.input.size = trap  # type: ignore[union-attr, assignment]
    if place == "module":
        g.synthesis._modules["input"] = trap  # type: ignore[union-attr, assignment]
    if place == "tensor":
        g.synthesis.input._buffers["freqs"] = trap  # type: ignore[union-attr, assignment]
    if place == "list":
        g.synthesis.layer_names = [trap]  # type: ignore[union-attr, assignment]
    path = tmp_path / "network.pkl"
    path.write_bytes(pickled(content))
    if place == "discriminator":
        assert load_generator("stylegan3", weights=path).image_shape == (3, 16, 16)
    else:
        with pytest.raises(WeightsError) as raised:
            load_generator("stylegan3", weights=path)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 600
    assert not (tmp_path / "trapped").exists()


def test_one_list_in_many_modules_is_not_copied_for_each(tmp_path: Path) -> None:
    g = module_of(checkpoint())
    shared = [0] * 5000
    for part in g.modules():
        part.padding = shared  # type: ignore[assignment]
    (tmp_path / "network.pkl").write_bytes(pickled({"G_ema": g}))
    with pytest.raises(WeightsError, match="configuration of more than 10,000 entries"):
        load_generator("stylegan3", weights=tmp_path / "network.pkl")


L0 = "synthesis.L0_36_8"
Change = Callable[[Tensors, dict[str, Any]], object]


BROKEN: dict[str, tuple[Change, str]] = {
    "no layers": (lambda t, f: f["synthesis"].pop("layer_names"), "does not say what synthesis.layer_names"),
    "one layer": (lambda t, f: f["synthesis"].update(layer_names=["L0_36_8"]), "a list of at least 2 names"),
    "a layer twice": (lambda t, f: f["synthesis"]["layer_names"].insert(0, "L0_36_8"), "names that differ"),
    "names that are numbers": (
        lambda t, f: f["synthesis"].update(layer_names=[1, 2]),
        "is .1, 2., expected a list",
    ),
    "an unknown layer": (lambda t, f: f["synthesis"]["layer_names"].insert(0, "L9"), "synthesis.L9.is_torgb"),
    "a layer left out": (lambda t, f: f["synthesis"]["layer_names"].pop(1), "has shape|unknown"),
    "the image in the middle": (
        lambda t, f: f["synthesis"]["layer_names"].reverse(),
        "only the last layer is",
    ),
    "a factor of 0": (
        lambda t, f: f[L0].update(up_factor=0),
        "L0_36_8.up_factor is 0, expected an integer from 1",
    ),
    "a factor of a million": (lambda t, f: f[L0].update(up_factor=10**6), "up_factor is 1000000"),
    "a factor that is true": (lambda t, f: f[L0].update(down_factor=True), "down_factor is True"),
    "a factor without a filter": (lambda t, f: t.pop(f"{L0}.up_filter"), "L0_36_8.up_filter is missing"),
    "no padding": (lambda t, f: f[L0].pop("padding"), "does not say what synthesis.L0_36_8.padding"),
    "padding of three": (lambda t, f: f[L0].update(padding=[1, 2, 3]), "expected 4 integers"),
    "padding without end": (lambda t, f: f[L0].update(padding=[10**9] * 4), "expected 4 integers up to 4096"),
    "too much padding": (lambda t, f: f[L0].update(padding=[30, 8, 9, 8]), "no zeros beyond what its filter"),
    "nothing left": (lambda t, f: f[L0].update(padding=[-90] * 4), "makes .* pixels, expected 1 to 4096"),
    "a clamp below 0": (lambda t, f: f[L0].update(conv_clamp=-1), "conv_clamp is '-1', expected a positive"),
    "two clamps": (lambda t, f: f[L0].update(conv_clamp=3), "clamps at another value"),
    "a size of text": (lambda t, f: f["synthesis.input"].update(size="big"), "expected 2 integers"),
    "a size of 0": (lambda t, f: f["synthesis.input"].update(size=[0, 36]), "at least 1 pixel"),
    "no rate": (lambda t, f: f["synthesis.input"].update(sampling_rate=0), "expected a positive number"),
    "a rate that is a NaN": (
        lambda t, f: f["synthesis.input"].update(sampling_rate=float("nan")),
        "positive",
    ),
    "too wide a band": (lambda t, f: f["synthesis.input"].update(bandwidth=99), "below half of the other"),
    "no scale": (lambda t, f: f["synthesis"].update(output_scale=None), "does not say what .*output_scale"),
    "a scale of text": (lambda t, f: f["synthesis"].update(output_scale="x"), "output_scale is 'x'"),
    "no weight": (lambda t, f: t.pop(f"{L0}.weight"), "L0_36_8.weight is missing"),
    "no square kernel": (lambda t, f: t.update({f"{L0}.weight": torch.ones(8, 8, 3, 1)}), "a square kernel"),
    "other channels": (lambda t, f: t.update({f"{L0}.weight": torch.ones(8, 9, 3, 3)}), "has shape"),
    "an empty filter": (lambda t, f: t.update({f"{L0}.up_filter": torch.ones(0)}), "is empty"),
    "a long filter": (lambda t, f: t.update({f"{L0}.up_filter": torch.ones(1000)}), "at most 64 taps"),
    "an oblong filter": (lambda t, f: t.update({f"{L0}.down_filter": torch.ones(12, 6)}), "as many for rows"),
    "a NaN": (lambda t, f: t[f"{L0}.bias"].fill_(float("nan")), "holds a NaN"),
    "a magnitude of 0": (lambda t, f: t[f"{L0}.magnitude_ema"].zero_(), "a mean square is above 0"),
    "frequencies of one axis": (
        lambda t, f: t.update({"synthesis.input.freqs": torch.ones(8, 1)}),
        "freqs has",
    ),
    "no mean": (lambda t, f: t.pop("mapping.w_avg"), "mapping.w_avg is missing"),
    "no mapping": (lambda t, f: t.pop("mapping.fc0.weight"), "mapping.fc0.weight is missing"),
    "another w": (
        lambda t, f: t.update({"synthesis.input.affine.weight": torch.ones(4, 9)}),
        "w of 16 values",
    ),
    "a tensor too many": (
        lambda t, f: t.update({"synthesis.noise": torch.ones(1)}),
        "unknown synthesis.noise",
    ),
    "no table of modules": (lambda t, f: f.clear(), "does not say what synthesis.layer_names"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_line(name: str) -> None:
    stored = checkpoint()
    change, message = BROKEN[name]
    change(stored.tensors, stored.facts["modules"])
    with pytest.raises(WeightsError, match=message) as raised:
        load_stylegan3(stored)
    assert str(raised.value).startswith("tiny.pkl ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mapping.embed_proj.bias"), r"mapping\.embed_proj\.bias is missing"),
        (lambda t: t.update({"mapping.embed.weight": torch.ones(2, 320)}), "3 classes, and a table of .* 2"),
        (lambda t: t.update({"mapping.embed.weight": torch.ones(9, 4)}), "has shape"),
        (lambda t: t.update({"mapping.w_avg": torch.ones(2, 3, 4)}), "w_avg has shape|embed"),
    ],
)
def test_broken_classes_are_refused(change: Callable[[Tensors], object], message: str) -> None:
    stored = checkpoint("xl-32px-tiny")
    change(stored.tensors)
    with pytest.raises(WeightsError, match=message):
        load_stylegan3(stored)


def test_images_that_are_not_square() -> None:
    g = wide(1)
    assert g.image_shape == (3, 20, 14)
    swapped = StyleGAN3(replace(g.config, size=(14, 20)))
    assert swapped.image_shape == (3, 14, 20)
    assert g(g.sample_latents(range(1))).isfinite().all()


def test_other_layouts_are_refused() -> None:
    with pytest.raises(WeightsError, match="'biggan', not a StyleGAN3"):
        load_stylegan3(Checkpoint("biggan", {}, {}, "x"))
    assert {"stylegan3", "stylegan-xl"} <= {info.name for info in mlviews.list_generators()}
