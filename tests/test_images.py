"""The user's own images as anchors: samples that follow from their indices, and clear errors."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Toy, assert_same, by_index
from PIL import EpsImagePlugin, Image
from test_source import Watch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mlviews.images
from mlviews import MLViewSource, perturb, transforms
from mlviews.images import Folder, Shape
from mlviews.step import Batch, ByOrigin
from mlviews.zoo.images import training_images

COUNT = 21  # images, of 3 classes
SHAPE = Shape(1, 4, 4)


class Encoding(Toy):
    """A generator whose latents follow from the pixels of an image."""

    def __init__(self, **options: Any) -> None:
        super().__init__((4, 6, 5), **options)
        self.encoded = 0

    def encode(self, images: Tensor) -> list[Tensor]:
        self.encoded += len(images)
        flat = images.flatten(1) * 2 - 1  # [B, 16]
        return [flat[:, :4], flat[:, 4:10], flat[:, 10:15]]


def pixels(count: int = COUNT, shape: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=numbers)


def folder(path: Path, images: Tensor | None = None, classes: int = 3) -> Path:
    """The images as PNG files, image i of class i % classes; in one folder if there are no classes."""
    for index, image in enumerate(pixels() if images is None else images):
        place = path / f"class{index % classes}" if classes else path
        place.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(place / f"{index:03d}.png")
    return path


class Pairs:
    """A map-style data set of Pillow's images and labels."""

    def __init__(self) -> None:
        self.targets = [index % 3 for index in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(pixels()[index, 0].numpy()), self.targets[index]


def whole(batch: Batch) -> Batch:
    return batch


def source(**options: Any) -> MLViewSource:
    arguments = {
        "generator": options.pop("generator", None) or Encoding(),
        "perturb": {"1:": perturb.Normal(1.0, 2.0)},
        "images": pixels(),
        "batch_size": 4,
        "layout": whole,
        "seed": 3,
        **options,
    }
    return MLViewSource(**arguments)


# -- what it makes -------------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_with_new_positives() -> None:
    views = source(drop_last=False)
    first, second = list(views), list(views)
    assert len(views) == 6
    for batches in (first, second):
        indices = torch.cat([batch.indices for batch in batches])
        assert sorted(indices.tolist()) == list(range(COUNT))
        anchors = torch.cat([batch.views[0] for batch in batches])
        assert torch.equal(anchors, pixels()[indices].float() / 255)
    one, other = by_index(first), by_index(second)
    assert all(not torch.equal(one[index][1], other[index][1]) for index in one)
    assert list(one) != list(other), "another order"


def test_a_changed_copy_has_the_images_that_were_read(tmp_path: Path) -> None:
    views = source(images=folder(tmp_path))
    assert views.replace(batch_size=2).images is views.images
    assert views.replace(images=pixels(5)).num_samples == 5


@pytest.mark.parametrize(
    ("targets", "label"),
    [([f"{index}.xml" for index in range(COUNT)], -1), ([[0, 1]] * COUNT, -1), ([2.0] * COUNT, 2)],
)
def test_targets_that_are_no_classes_are_no_labels(targets: list[Any], label: int) -> None:
    data = Pairs()
    data.targets = targets
    assert source(images=data).batch(0, 4).targets.tolist() == [label] * 4


@pytest.mark.parametrize("read", [lambda path: Folder(path, SHAPE).read(0), training_images])
def test_no_file_of_a_folder_is_run(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow has Ghostscript run what is in an EPS file, whatever the file is called."""
    runs: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words, **_: runs.append(words))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png", "EPS")
    with contextlib.suppress(ValueError):
        read(tmp_path)
    assert not runs
    with pytest.raises(ValueError, match="cannot identify image file"):
        Folder(tmp_path, SHAPE).read(0)


def test_transforms_by_origin_must_make_one_size() -> None:
    transform = {"real": None, "generated": transforms.simclr(3, channels=None)}
    message = r"view 1 make real images of \(4, 4\) pixels and generated ones of \(3, 3\)"
    with pytest.raises(ValueError, match=message):
        source(transform=transform, generated=0.5).batch(0, 4)
    assert source(transform=transform).batch(0, 4).views[1].shape == (4, 1, 3, 3), "views may differ"


def test_a_file_of_floats_has_values_from_0_to_1(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(image).save(tmp_path / "0.tif")
    read = Folder(tmp_path, SHAPE).read(0)
    assert torch.equal(read[0], torch.from_numpy((image * 255).round().astype(np.uint8)))
    Image.fromarray(image * 255).save(tmp_path / "0.tif")
    with pytest.raises(
        ValueError, match=r"0.tif cannot be read .*values from 0 to 255; floats are in \[0, 1\]"
    ):
        Folder(tmp_path, SHAPE).read(0)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_a_transform_by_origin_is_that_of_every_view(as_mapping: bool) -> None:
    origins = ByOrigin(real=None, generated=transforms.simclr(4, channels=None))
    transform = origins._asdict() if as_mapping else origins
    assert source(transform=transform).transforms == [origins, origins]


def test_positives_are_decoded_from_the_images_moved_latents() -> None:
    views = source(num_views=3)
    batch = views.batch(0, 8)
    encoded = views.generator.encode(batch.views[0])
    for view in (1, 2):
        assert torch.equal(batch.latents[view][0], encoded[0]), "the level that is not moved"
        assert not torch.equal(batch.latents[view][1], encoded[1])
        torch.testing.assert_close(batch.views[view], views.generator(batch.latents[view]))
    assert not torch.equal(batch.views[1], batch.views[2])


def test_positives_share_the_blocks_of_the_levels_that_they_keep() -> None:
    views = source(num_views=4, perturb={"2:": perturb.Normal(1.0, 2.0)})
    for block in views.generator.blocks:
        block.rows = 0
    views.batch(0, 8)
    assert [block.rows for block in views.generator.blocks] == [8, 8, 3 * 8]


def test_reconstructed_anchors_are_the_generators() -> None:
    views = source(anchor_view="reconstructed")
    batch = views.batch(0, 4)
    torch.testing.assert_close(batch.views[0], views.generator(batch.latents[0]))


@pytest.mark.parametrize("generated", [0.0, 0.3, 0.7, 1.0])
def test_positives_are_the_image_itself_as_often_as_asked_for(generated: float) -> None:
    batch = source(images=pixels(1000), generated=generated, num_views=3, batch_size=1000).batch(0, 1000)
    masks = [(batch.views[view] != batch.views[0]).flatten(1).any(1) for view in (1, 2)]
    for mask in masks:
        assert float(mask.float().mean()) == pytest.approx(generated, abs=0.05)
    if 0 < generated < 1:
        assert not torch.equal(*masks), "each positive is chosen for itself"


def test_a_source_that_generates_nothing_encodes_nothing() -> None:
    generator = Encoding()
    batch = source(generator=generator, generated=0.0, num_views=3).batch(0, 8)
    assert generator.encoded == 0
    assert batch.latents == [[], [], []]
    assert all(torch.equal(view, batch.views[0]) for view in batch.views)


def test_real_and_generated_views_have_a_t_x_each() -> None:
    options = {"images": pixels(200), "generated": 0.5, "batch_size": 200}
    raw = source(**options).batch(0, 200)
    marked = source(
        **options, transform={"real": lambda x: x * 0 - 1, "generated": lambda x: x * 0 + 2}
    ).batch(0, 200)
    same = (raw.views[1] == raw.views[0]).flatten(1).all(1)
    assert (marked.views[0] == -1).all()
    assert torch.equal((marked.views[1] == -1).flatten(1).all(1), same)
    assert torch.equal((marked.views[1] == 2).flatten(1).all(1), ~same)
    per_view = source(**options, transform=[None, lambda x: x + 10]).batch(0, 200)
    assert per_view.views[0].max() <= 1
    assert per_view.views[1].min() >= 10


def test_labels_travel(tmp_path: Path) -> None:
    named = source(images=folder(tmp_path / "classes"))
    flat = source(images=folder(tmp_path / "flat", classes=0))
    pairs = source(images=Pairs())
    assert source().batch(0, 8).targets.tolist() == [-1] * 8
    assert flat.batch(0, 8).targets.tolist() == [-1] * 8
    for views in (named, pairs):
        assert views.num_samples == COUNT
        batch = views.batch(0, COUNT)
        assert sorted(batch.targets.tolist()) == [0] * 7 + [1] * 7 + [2] * 7
    batch = pairs.batch(0, 8)
    assert batch.targets.tolist() == [index % 3 for index in batch.indices.tolist()]
    torch.testing.assert_close(batch.views[0], pixels()[batch.indices].float() / 255)


def test_classes_are_the_generators() -> None:
    views = source(generator=Encoding(num_classes=3), images=Pairs())
    assert sorted(set(views.batch(0, COUNT).targets.tolist())) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"labels from -1 to -1.*3 classes"):
        source(generator=Encoding(num_classes=3))
    with pytest.raises(ValueError, match=r"labels from 0 to 2.*2 classes"):
        source(generator=Encoding(num_classes=2), images=Pairs())


# -- a sample is a function of (seed, epoch, index, view, level) ---------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "p": {"generated": 0.5, "num_views": 3},
    "reconstructed": {"anchor_view": "reconstructed"},
    "T_x": {"transform": transforms.byol(12)},
    "pool": {"pool": True},
    "more samples than images": {"num_samples": 30},
    "fewer samples than images": {"num_samples": 16},
}


@pytest.fixture(params=[False, True], ids=["resident", "decoded"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets kept on the device, and sets that are decoded batch by batch."""
    if request.param:
        monkeypatch.setattr(mlviews.images, "RESIDENT", 0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("large")
def test_batch_size_and_ranks_do_not_matter(name: str) -> None:
    options = {"drop_last": False, **SETTINGS[name]}
    expected = by_index(source(**options))
    assert_same(by_index(source(**options, batch_size=16)), expected, tolerance=1e-5)
    assert_same(by_index(source(**options, micro_batch_size=3)), expected, tolerance=1e-5)
    parts = [source(**options, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    together = by_index(itertools.chain(*parts))
    assert len(together) == len(expected) - len(expected) % 2
    assert_same(together, {index: expected[index] for index in together}, tolerance=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("large")
def test_resume_goes_on_where_it_stopped(name: str) -> None:
    views, resumed = source(**SETTINGS[name]), source(**SETTINGS[name])
    list(views)
    before = list(itertools.islice(views, 2))
    resumed.load_state_dict(views.state_dict())
    whole_epoch = source(**SETTINGS[name])
    whole_epoch.set_epoch(1)
    assert_same(by_index([*before, *resumed]), by_index(whole_epoch), tolerance=1e-5)


def test_a_state_of_another_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples=21"):
        source(num_samples=20).load_state_dict(source().state_dict())


def test_a_pool_keeps_its_positives() -> None:
    views = source(pool=True, drop_last=False)
    first, second = by_index(views), by_index(views)
    assert list(first) != list(second)
    assert_same(first, second, tolerance=1e-5)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda views: pickle.loads(pickle.dumps(views))])
@pytest.mark.usefixtures("large")
def test_a_source_with_images_travels(travel: Callable[[MLViewSource], MLViewSource]) -> None:
    views = source(images=Pairs(), generated=0.5)
    next(iter(views))
    views.load_state_dict(views.state_dict())
    assert_same(by_index(travel(views)), by_index(views))


@pytest.mark.parametrize(
    "options", [{}, {"generated": 0.5}, {"transform": transforms.simclr(size=4, color=False)}]
)
def test_a_step_is_made_on_the_device_and_never_waits_for_it(options: dict[str, Any]) -> None:
    options = copy.deepcopy(options)  # a pipeline's constants must not outlive this mode
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.zeros(COUNT, 1, 4, 4, dtype=torch.uint8)
        iterator = iter(source(images=images, device="cuda", **options))
        next(iterator)  # the plan's constants are sent there once
        with Watch() as watch:
            batch = next(iterator)
    tensors = [batch.indices, batch.targets, *batch.views, *(z for view in batch.latents for z in view)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []


# -- images of every kind ------------------------------------------------------------------------------------


def test_the_forms_of_one_set_agree(tmp_path: Path) -> None:
    expected = source().batch(0, 8).views[0]
    forms: list[Any] = [
        folder(tmp_path / "flat", classes=0),
        str(tmp_path / "flat"),
        Pairs(),
        pixels().float() / 255,
        pixels().expand(-1, 3, -1, -1),
        [{"image": image} for image in pixels()],
        [image.permute(1, 2, 0).numpy() for image in pixels()],
        [image[0].numpy() for image in pixels()],
    ]
    for form in forms:
        torch.testing.assert_close(source(images=form).batch(0, 8).views[0], expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_every_mode_and_size(mode: str, channels: int, tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 40 * 30).reshape(40, 30).astype(np.uint8)
    image = Image.fromarray(gradient).convert("RGB").convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(gradient.astype(np.uint16) * 257)
    if mode in ("CMYK", "I;16", "YCbCr"):
        image.save(
            tmp_path / "image.tif", compression="tiff_lzw"
        )  # Pillow 12.3 writes raw YCbCr it cannot read
    else:
        image.save(tmp_path / "image.png")
    loaded = Folder(tmp_path, Shape(channels, 16, 16)).read(0)
    assert loaded.shape == (channels, 16, 16)
    assert loaded.float().mean() == pytest.approx(127, abs=20)
    assert loaded[0, 0].float().mean() < loaded[0, -1].float().mean(), "right way up"


def test_images_get_the_border_that_the_generator_was_trained_with() -> None:
    shape = Shape(1, 8, 8, border=2)
    small, full = pixels(3), pixels(3, (1, 8, 8))
    bordered = mlviews.images.as_image_set(small, shape).read(1)
    assert torch.equal(bordered[:, 2:6, 2:6], small[1])
    assert bordered.sum() == small[1].sum()
    assert torch.equal(mlviews.images.as_image_set(full, shape).read(1), full[1])
    assert mlviews.load_generator("fashion").border == 2


def test_damaged_files_are_counted_and_left_out_if_asked_for(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "class1" / "bad.png").write_bytes(b"not an image")
    images = Folder(tmp_path, SHAPE, on_error="skip")
    assert len(images) == COUNT
    assert [path.name for path in images.skipped] == ["bad.png"]
    assert source(images=images).num_samples == COUNT


# -- bad input -----------------------------------------------------------------------------------------------


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, "png")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(1, (1, 64, 64))[0, 0].numpy()).save(file, "jpeg")
    return file.getvalue()


FILES: dict[str, bytes] = {
    "cut": png()[:40],
    "a JPEG that is cut": jpeg()[:-1000],
    "empty": b"",
    "text": b"not an image",
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a broken checksum": png()[:-20] + b"\0" * 20,
    "a huge header": b"P5 100000 100000 255\n" + b"\0" * 10,
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder(tmp_path)
    path = tmp_path / "class1" / ("bad.pgm" if name == "a huge header" else "bad.png")
    path.write_bytes(FILES[name])
    with pytest.raises(ValueError, match=r"bad\.\w+ cannot be read as an image") as raised:
        list(source(images=tmp_path))
    assert "on_error='skip'" in str(raised.value)
    assert "\n" not in str(raised.value)


def folder_like_an_image(path: Path) -> Path:
    (path / "image.png").mkdir()
    return path


def broken_link(path: Path) -> Path:
    for index in range(4):
        (path / f"image{index}.png").symlink_to(path / "nowhere.png")
    return path


MISTAKES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no such folder": (lambda path: path / "none", FileNotFoundError, "No image folder"),
    "an empty folder": (lambda path: path, ValueError, "holds no image"),
    "a file": (lambda path: Path(__file__), FileNotFoundError, "No image folder"),
    "folders named like images": (folder_like_an_image, ValueError, "holds no image"),
    "a link to nowhere": (broken_link, ValueError, r"image\d\.png cannot be read as an image .*No such file"),
    "a number": (lambda path: 3, ValueError, "Invalid images of type int"),
    "a generator": (lambda path: (x for x in pixels()), ValueError, "Invalid images of type generator"),
    "an empty list": (lambda path: [], ValueError, "is empty"),
    "three dimensions": (
        lambda path: pixels()[:, 0],
        ValueError,
        r"Invalid images, torch.uint8 \(21, 4, 4\)",
    ),
    "five channels": (lambda path: pixels(4, (5, 4, 4)), ValueError, "1 or 3 channels"),
    "no images": (lambda path: pixels(0), ValueError, "Invalid images"),
    "integers": (lambda path: pixels().long(), ValueError, "give uint8, or floats"),
    "normalized floats": (lambda path: pixels().float() / 64 - 1, ValueError, "before any normalization"),
    "not a number": (lambda path: torch.full((4, 1, 4, 4), torch.nan), ValueError, "floats are in"),
    "items of text": (lambda path: ["a"] * 21, ValueError, "item .* is str, not an image"),
    "items without an image": (lambda path: [{"picture": 1}] * 21, ValueError, "is NoneType, not an image"),
    "another shape": (
        lambda path: mlviews.images.Pixels(pixels(), Shape(1, 8, 8)),
        ValueError,
        "made for shape",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_clear_error(name: str, tmp_path: Path) -> None:
    make, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        list(source(images=make(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generated": 1.5}, "Invalid generated=1.5: it is a probability"),
        ({"generated": "all"}, "Invalid generated='all'"),
        ({"anchor_view": "reel"}, "Invalid anchor_view 'reel'.*Did you mean 'real'"),
        ({"images": None, "generated": 0.5}, "Invalid generated=0.5 without images: .* images="),
        ({"images": None, "anchor_view": "reconstructed"}, "Invalid anchor_view='reconstructed' without"),
        ({"images": None, "refine": 3}, "Invalid refine=3 without images"),
        ({"images": None, "codes": "codes"}, "Invalid codes='codes' without images"),
        ({"images": None, "workers": 2}, "Invalid workers=2 without images"),
        ({"workers": -1}, "Invalid workers=-1: it must be an integer of at least 0"),
        ({"refine": -1}, "Invalid refine=-1: it must be an integer of at least 0"),
        ({"refine": 3}, "Invalid refine=3: generator 'Encoding' has no inverter.*train_inverter"),
        ({"codes": 3}, "Invalid folder of codes 3: it must be a path"),
        ({"codes": __file__}, "Invalid codes=.*test_images.py': it is a file; give a folder"),
        ({"transform": {"real": None}}, "one for 'real' and one for 'generated'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**options)
