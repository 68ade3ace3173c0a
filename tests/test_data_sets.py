"""Hugging Face data sets as the user's own images: the same samples as from a folder or a tensor."""

from __future__ import annotations

import io
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, by_index
from PIL import Image
from test_images import COUNT, SHAPE, pixels, source

from mlviews.images import Items, Rows, as_image_set

datasets = pytest.importorskip("datasets")

CLASSES = ["shirt", "shoe", "bag"]
LABELS = [index % 3 for index in range(COUNT)]


def pictures() -> list[Image.Image]:
    return [Image.fromarray(image[0].numpy()) for image in pixels()]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pillow(**other: list[Any]) -> Any:
    """Images and class labels, as most data sets of the hub have them."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        | {name: datasets.Value("string") for name in other}
    )
    return datasets.Dataset.from_dict({"image": pictures(), "label": LABELS, **other}, features=features)


def arrays(values: np.ndarray, feature: Any = None, name: str = "pixels") -> Any:
    features = (
        None if feature is None else datasets.Features({name: feature, "label": datasets.Value("int8")})
    )
    return datasets.Dataset.from_dict({name: list(values), "label": LABELS}, features=features)


GRAY = pixels()[:, 0].numpy()  # [N, 4, 4]
FORMS: dict[str, Callable[[], Any]] = {
    "images": pillow,
    "images among texts": lambda: pillow(caption=["a"] * COUNT),
    "files not decoded": lambda: pillow().cast_column("image", datasets.Image(decode=False)),
    "in torch's format": lambda: pillow().with_format("torch"),
    "in numpy's format": lambda: pillow().with_format("numpy"),
    "in a format of some columns": lambda: pillow(image2=["a"] * COUNT).with_format(
        "torch", columns=["image", "label"]
    ),
    "arrays": lambda: arrays(GRAY),
    "arrays in torch's format": lambda: arrays(GRAY).with_format("torch"),
    "Array2D": lambda: arrays(GRAY, datasets.Array2D((4, 4), "uint8")),
    "channels first": lambda: arrays(GRAY[:, None], datasets.Array3D((1, 4, 4), "uint8")),
    "channels last": lambda: arrays(GRAY[..., None], datasets.Array3D((4, 4, 1), "uint8")),
    "lists of integers": lambda: datasets.Dataset.from_dict({"pixels": GRAY.tolist(), "label": LABELS}),
    "floats": lambda: arrays((GRAY / 255).astype("float32"), datasets.Array2D((4, 4), "float32")),
    "a transform": lambda: pillow().with_transform(lambda batch: {"image": batch["image"]}),
    "a transform that renames": lambda: (
        pillow().rename_column("image", "photo").with_transform(lambda batch: {"img": batch["photo"]})
    ),
    "a selection": lambda: datasets.concatenate_datasets([pillow(), pillow()]).select(
        range(COUNT, 2 * COUNT)
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_set(name: str) -> None:
    images = as_image_set(FORMS[name](), SHAPE)
    assert isinstance(images, Rows)
    assert images.labels.tolist() == LABELS
    assert torch.equal(images.resident(torch.device("cpu")), pixels())
    assert images.identity() == as_image_set(FORMS["images"](), SHAPE).identity()


def test_a_source_of_a_data_set_is_that_of_its_pixels() -> None:
    with_labels = list(source(images=FORMS["in torch's format"](), drop_last=False))
    assert_same(by_index(with_labels), by_index(source(images=pixels(), drop_last=False)), 0)
    targets = {
        int(index): int(target)
        for b in with_labels
        for index, target in zip(b.indices, b.targets, strict=True)
    }
    assert targets == dict(enumerate(LABELS))


def test_workers_decode_ahead_what_a_resident_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = by_index(source(images=pillow(), drop_last=False))
    monkeypatch.setattr("mlviews.images.RESIDENT", 0)
    assert_same(resident, by_index(source(images=pillow(), drop_last=False, workers=1)), 0)


def test_labels_may_be_another_columns_or_missing() -> None:
    renamed = pillow().rename_column("label", "fine")
    assert as_image_set(renamed, SHAPE).labels.tolist() == LABELS
    integers = renamed.cast_column("fine", datasets.Value("int64"))
    assert as_image_set(integers, SHAPE).labels.tolist() == [-1] * COUNT, (
        "numbers of another name: no classes"
    )
    some = datasets.Dataset.from_dict({"image": pictures()[:2], "label": [1, None]})
    assert as_image_set(some, SHAPE).labels.tolist() == [1, -1]


def test_an_image_folder_of_the_hubs_client_is_the_folder(tmp_path: Path) -> None:
    for index, picture in enumerate(pictures()):
        (tmp_path / CLASSES[LABELS[index]]).mkdir(exist_ok=True)
        picture.save(tmp_path / CLASSES[LABELS[index]] / f"{index}.png")
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path)
    )
    both = [as_image_set(images, SHAPE) for images in (rows, str(tmp_path))]
    contents = [
        {(int(label), images.read(number).numpy().tobytes()) for number, label in enumerate(images.labels)}
        for images in both
    ]
    assert contents[0] == contents[1]


def stream() -> Iterator[dict[str, Any]]:
    yield {"image": pictures()[0]}


def damaged() -> Any:
    files = [{"bytes": png(picture), "path": None} for picture in pictures()[:2]]
    files[1]["bytes"] = files[1]["bytes"][:40]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": files}, features=features)


def broken(batch: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("crop")


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a stream": (lambda: datasets.IterableDataset.from_generator(stream), "a stream has neither.*streaming"),
    "splits": (
        lambda: datasets.DatasetDict({"train": pillow(), "test": pillow()}),
        r"choose a split, e.g. images=data\['train'\]; there are train, test",
    ),
    "empty": (lambda: pillow().select([]), "is empty"),
    "two images": (
        lambda: datasets.Dataset.from_dict({"left": pictures(), "right": pictures()}),
        r"may be the images, left, right.*rename_column\(NAME, 'image'\)",
    ),
    "no image": (
        lambda: datasets.Dataset.from_dict({"text": ["a"], "label": [1]}),
        "no column .* holds images or arrays; it has text, label.*cast_column",
    ),
    "two classes": (
        lambda: datasets.Dataset.from_dict(
            {"image": pictures(), "fine": LABELS, "coarse": LABELS}
        ).cast_column("fine", datasets.ClassLabel(names=CLASSES)).cast_column(
            "coarse", datasets.ClassLabel(names=CLASSES)
        ),
        r"may be the labels, fine, coarse.*rename_column\(NAME, 'label'\)",
    ),
    "labels as texts": (
        lambda: datasets.Dataset.from_dict({"image": pictures(), "label": ["a"] * COUNT}),
        r"'label' of the data set is Value\('string'\).*class_encode_column",
    ),
    "either order of axes": (
        lambda: arrays(np.zeros((COUNT, 3, 5, 3), np.uint8), datasets.Array3D((3, 5, 3), "uint8")),
        r"item 0 of the data set has shape \(3, 5, 3\), which may be \[C, H, W\] or \[H, W, C\]",
    ),
    "normalized": (lambda: arrays(GRAY / 64.0 - 2), "values from .*before any normalization"),
    "integers of 16 bits": (
        lambda: arrays(GRAY.astype("uint16") * 257), "item 0 .* integers from 0 to .*from 0 to 255"
    ),
    "a damaged image": (damaged, "item 1 of the data set cannot be read"),
    "a missing image": (
        lambda: datasets.Dataset.from_dict({"image": [pictures()[0], None]}), "item 1 .* is NoneType"
    ),
    "a transform without an image": (
        lambda: pillow().with_transform(lambda batch: {"pixel_values": batch["image"]}),
        "transform leaves pixel_values, without 'image'",
    ),
    "a transform that raises": (lambda: pillow().with_transform(broken), "item 0 .* cannot be read.*crop"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_one_clear_error(name: str) -> None:
    make, message = MISTAKES[name]
    data = make()
    with pytest.raises(ValueError, match=message):
        as_image_set(data, SHAPE).resident(torch.device("cpu"))


def test_a_users_own_package_of_that_name_is_an_ordinary_data_set() -> None:
    own = types.ModuleType("datasets.shapes")
    kind = type("Dataset", (), {"__module__": own.__name__, "__len__": lambda self: COUNT})
    kind.__getitem__ = lambda self, number: (pictures()[number], 0)  # type: ignore[attr-defined]
    assert type(as_image_set(kind(), SHAPE)) is Items
