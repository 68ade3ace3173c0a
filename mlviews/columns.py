"""Which column of a Hugging Face data set holds the images, and which their labels.

Nothing of the package ``datasets`` is imported: its objects are told by the names of their classes, and what
a column holds by the name of its feature's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlviews.errors import listing

_MODULES = {
    "datasets.arrow_dataset": ("Dataset",),
    "datasets.iterable_dataset": ("IterableDataset",),
    "datasets.dataset_dict": ("DatasetDict", "IterableDatasetDict"),
}
"""Modules of the package, with the classes that are told apart."""

IMAGE_NAMES = ("image", "img")
"""The columns that are taken where several hold images."""

LABEL_NAME = "label"
"""The column that holds the labels, whatever other classes a data set has."""


def kind(value: Any) -> str | None:
    """Return the name of the class of ``datasets`` that an object is of; None for anything else.

    A user's own package may be called datasets too, so that the whole name of the module counts.
    """
    for base in type(value).__mro__:
        if base.__name__ in _MODULES.get(base.__module__, ()):
            return base.__name__
    return None


def check(dataset: Any) -> None:
    """Raise a ValueError, with the remedy, for a stream, and for a dictionary of splits."""
    name = kind(dataset)
    if name in ("DatasetDict", "IterableDatasetDict"):
        splits = listing(list(dataset)[:8])
        raise ValueError(
            f"Invalid images of type {name}: choose a split, e.g. images=data['train']; there are {splits}."
        )
    if name == "IterableDataset":
        raise ValueError(
            "Invalid images of type IterableDataset: a stream has neither a length nor items by number. Load "
            "it without streaming=True, or keep it by datasets.Dataset.from_generator(lambda: iter(stream))."
        )


def shown(dataset: Any) -> dict[str, Any]:
    """Return the features of a data set's columns, by name: of those alone that its format selects."""
    return {name: dataset.features[name] for name in dataset.format["columns"]}


def image_column(features: Mapping[str, Any]) -> str:
    """Return the name of the column with the images.

    It is the only one that holds images (or, where none does, arrays); of several, the one that is called
    "image" or "img".

    Args:
        features: of the columns, by their names.

    Raises:
        ValueError: if no column holds images, or several do and none has such a name.
    """
    candidates = [name for name, feature in features.items() if _class(feature) == "Image"]
    if not candidates:
        candidates = [name for name, feature in features.items() if is_array(feature)]
    if not candidates:
        raise ValueError(
            f"Invalid images: no column of the data set holds images or arrays; it has {listing(features)}. "
            "Use data.cast_column(NAME, datasets.Image()) for files' paths or bytes."
        )
    if len(candidates) == 1:
        return candidates[0]
    named = [name for name in IMAGE_NAMES if name in candidates]
    if not named:
        raise ValueError(
            f"Invalid images: several columns of the data set may be the images, {listing(candidates)}. "
            f"Choose by data.rename_column(NAME, {IMAGE_NAMES[0]!r})."
        )
    return named[0]


def transformed_column(features: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """Return the name of the column with the images of a data set that a user's function transforms.

    Args:
        features: of the columns before that, by their names.
        item: what the function makes of the first one.

    Raises:
        ValueError: if the item has no such column.
    """
    names = [name for name in IMAGE_NAMES if name in item]
    name = names[0] if names else image_column(features)
    if name not in item:
        raise ValueError(
            f"Invalid images: the data set's transform leaves {listing(item)}, without {name!r}: have it "
            "keep the image under that name."
        )
    return name


def label_column(features: Mapping[str, Any]) -> str | None:
    """Return the name of the column with the labels; None for a data set without classes.

    It is "label"; without such a column, the only one of classes (``ClassLabel``).

    Raises:
        ValueError: if "label" holds no classes, or several other columns do.
    """
    if LABEL_NAME in features:
        feature = features[LABEL_NAME]
        if _class(feature) != "ClassLabel" and "int" not in str(getattr(feature, "dtype", "")):
            raise ValueError(
                f"Invalid images: the column {LABEL_NAME!r} of the data set is {str(feature)[:60]}, not "
                f"classes or integers. Use data.class_encode_column({LABEL_NAME!r}), or leave it out by "
                f"data.remove_columns({LABEL_NAME!r})."
            )
        return LABEL_NAME
    candidates = [name for name, feature in features.items() if _class(feature) == "ClassLabel"]
    if len(candidates) > 1:
        raise ValueError(
            f"Invalid images: several columns of the data set may be the labels, {listing(candidates)}. "
            f"Choose by data.rename_column(NAME, {LABEL_NAME!r})."
        )
    return candidates[0] if candidates else None


def is_array(feature: Any) -> bool:
    """Is it an array of two or three axes?"""
    depth = 0
    while depth < 4:
        name = _class(feature)
        if name in ("Array2D", "Array3D"):
            return depth == 0
        if name == "Value":
            return depth in (2, 3) and str(feature.dtype).startswith(("uint", "int", "float"))
        inner = feature[0] if name == "list" and feature else getattr(feature, "feature", None)
        if inner is None:
            return False
        feature, depth = inner, depth + 1
    return False


def channels_first(shape: Sequence[int], name: str) -> bool:
    """Say whether an array of three axes is ``[C, H, W]``, and not ``[H, W, C]``.

    Args:
        shape: of the array.
        name: what to call it in a message.

    Raises:
        ValueError: if it may be either.
    """
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first and last:
        raise ValueError(
            f"Invalid images: {name} has shape {tuple(shape)}, which may be [C, H, W] or [H, W, C]: give "
            "images, by data.cast_column(NAME, datasets.Image())."
        )
    return first


def as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of integers from 0 to 255 as uint8, and any other type as it is.

    Args:
        array: of an image.
        name: what to call it in a message.

    Raises:
        ValueError: if an integer is out of this range.
    """
    if array.dtype == np.uint8 or not np.issubdtype(array.dtype, np.integer):
        return array
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < 0 or high > 255:
        raise ValueError(
            f"Invalid images: {name} has integers from {low} to {high}; they are from 0 to 255, or floats in "
            "[0, 1]."
        )
    return array.astype(np.uint8)


def _class(feature: Any) -> str:
    return type(feature).__name__
