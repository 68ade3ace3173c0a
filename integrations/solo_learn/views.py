"""solo-learn's configuration as a source of views. Nothing here imports solo-learn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mlviews.checks import integer
from mlviews.config import source_arguments
from mlviews.errors import listing
from mlviews.generators import MLVGM
from mlviews.images import ImageSet, Shape, as_image_set
from mlviews.source import MLViewSource, solo_layout
from mlviews.step import Batch
from mlviews.transforms import IMAGENET, Augmentation

FORMATS = ("image_folder", "h5", "dali", "mlvgm")
_DECIDED = {  # keys of a source that follow from solo-learn's own
    "batch_size": "set optimizer.batch_size",
    "crops": "they follow from augmentations",
    "layout": "it is solo-learn's",
    "num_views": "it follows from augmentations",
    "rank": "it is the launcher's",
    "world_size": "it is the launcher's",
}
_MIN_CLASSES = 5  # the momentum methods log the top-5 accuracy of their classifier


def check_format(name: object) -> None:
    """Raise a ValueError unless ``data.format`` exists: solo-learn takes all others for an image folder."""
    if name not in FORMATS:
        raise ValueError(f"Invalid data.format={name!r}: use {listing(FORMATS)}.")


def augmentation(pipeline: DictConfig) -> Augmentation:
    """Return one pipeline of ``augmentations``, for whole batches on the device.

    It is read as solo-learn's ``build_transform_pipeline`` reads it. Resampling is bilinear, not bicubic, and
    the color operations have a fixed order; see :class:`~mlviews.transforms.Augmentation`.

    Raises:
        ValueError: for a missing or a bad value.
    """

    def get(key: str) -> Any:
        value = OmegaConf.select(pipeline, key)
        if value is None:
            raise ValueError(
                f"A pipeline of augmentations lacks {key}: give it, as in solo-learn's scripts/pretrain."
            )
        return value

    scale, jitter = None, (0.0, 0.0, 0.0, 0.0)
    if get("rrc.enabled"):
        scale = (get("rrc.crop_min_scale"), get("rrc.crop_max_scale"))
    if get("color_jitter.prob"):
        jitter = tuple(
            get(f"color_jitter.{name}") for name in ("brightness", "contrast", "saturation", "hue")
        )
    return Augmentation(
        size=_side(get("crop_size")),
        scale=scale,
        flip=get("horizontal_flip.prob"),
        jitter=jitter,
        jitter_p=get("color_jitter.prob"),
        grayscale=get("grayscale.prob"),
        blur=get("gaussian_blur.prob"),
        solarize=get("solarization.prob"),
        equalize=get("equalization.prob"),
        normalize=(_channels(pipeline.get("mean", IMAGENET[0])), _channels(pipeline.get("std", IMAGENET[1]))),
    )


def _side(crop_size: Any) -> int:
    """Return the side of square crops, which solo-learn also takes as two equal numbers.

    Raises:
        ValueError: for a rectangle, or something else that has no side, as the user wrote it.
    """
    if not OmegaConf.is_list(crop_size):
        return integer("crop_size", crop_size, 1)
    sizes = list(crop_size)
    if not 1 <= len(sizes) <= 2 or sizes[0] != sizes[-1]:
        raise ValueError(
            f"Invalid crop_size={sizes!r} of a pipeline of augmentations: crops are square, "
            f"so give their side in pixels."
        )
    return integer("crop_size", sizes[0], 1)


class LoaderSource(MLViewSource):
    """A source that also has a data loader's ``dataset``: methods with a memory ask for its length."""

    @property
    def dataset(self) -> range:
        """The indices that samples may have: those of all images, also where an epoch has a part of them."""
        return range(max(self.num_samples, 0 if self.images is None else len(self.images)))


class Views:
    """What ``data.format=mlvgm`` trains on, in the place of a dataset.

    Large crops come from views of their own: the first one from the anchor, the second one from a positive.
    Small crops come from these two in turn. Each crop has the T_x of its pipeline in ``augmentations``, or
    that of ``data.mlvgm.transform``.

    Args:
        cfg: solo-learn's configuration, with ``data.mlvgm``: the keys of mlviews' presets.

    Raises:
        ValueError: for a bad value, or a method that cannot be trained on views, saying why.
        FileNotFoundError: for missing weights.
    """

    def __init__(self, cfg: DictConfig) -> None:
        config = _config(cfg)
        transforms = [
            augmentation(pipeline) for pipeline in cfg.augmentations for _ in range(pipeline.num_crops)
        ]
        is_large = [transform.size == transforms[0].size for transform in transforms]
        num_large = sum(is_large)
        if not all(is_large[:num_large]):
            raise ValueError(
                "augmentations has a small crop before a large one: "
                "put the pipelines with the first one's crop_size first."
            )
        num_small = len(transforms) - num_large
        defaults = {"seed": cfg.get("seed", 5), "device": _device(cfg), "transform": None}
        arguments = source_arguments({**defaults, **config})
        # As solo-learn will read it from its args.json.
        self.config = json.loads(json.dumps({**config, "seed": arguments["seed"]}))
        generator: MLVGM = arguments["generator"]
        images = arguments.get("images")
        if images is not None:
            generator.check_encodes()
            images = as_image_set(images, Shape(*generator.image_shape, generator.border))
        self.classes = _classes(images) or generator.num_classes
        self.labelled = bool(self.classes) and not cfg.data.get("no_labels", False)
        self.arguments = {
            **arguments,
            "images": images,
            "transform": arguments["transform"] if "transform" in config else transforms,
            "crops": [*range(num_large), *(crop % 2 for crop in range(num_small))],
            "num_views": max(2, num_large),
            "layout": solo_layout if self.labelled else _unlabelled,
        }
        _check_method(cfg, self.labelled, bool(arguments.get("pool")) or images is not None)

    def num_classes(self, validation_classes: int) -> int:
        """Return the number of outputs of the online classifier.

        It is the classes of your images, else the generator's; at least five, and for views without labels as
        many as validation has.
        """
        if self.labelled:
            return max(self.classes, _MIN_CLASSES if self.arguments["images"] is not None else 0)
        return max(_MIN_CLASSES, validation_classes)

    def source(self, batch_size: int) -> LoaderSource:
        """Return the loader of the training batches ``[indexes, [crops], targets]``.

        Args:
            batch_size: samples per batch and process.
        """
        return LoaderSource(**self.arguments, batch_size=batch_size)


def summary(source: MLViewSource) -> str:
    """Return one line on what will be trained on."""
    novelty = "the same" if source.pool else "new ones"
    classes = _classes(source.images) or source.generator.num_classes
    labels = "no labels" if source.layout is _unlabelled else f"{classes} classes"
    if source.images is not None:
        novelty = f"of {len(source.images):,} images, {novelty}"
    crops = ", ".join(
        f"{getattr(transform, 'size', '?')} px of view {view}"
        for view, transform in zip(source.crops, source.transforms, strict=True)
    )
    return (
        f"{source.generator.name}, {source.num_samples:,} samples, {novelty} in every epoch, {labels}; "
        f"crops: {crops}; seed {source.seed}"
    )


def _classes(images: ImageSet | None) -> int:
    """Return the number of classes of the user's images; 0 if there are no images, or one has no label."""
    if images is None or int(images.labels.min()) < 0:
        return 0
    return int(images.labels.max()) + 1


def _config(cfg: DictConfig) -> dict[str, Any]:
    """Return ``data.mlvgm``, checked against what solo-learn's own keys say."""
    if cfg.data.get("dataset") != "custom":
        raise ValueError(
            f"Invalid data.dataset={cfg.data.get('dataset')!r} with data.format=mlvgm: it must be custom."
        )
    config = cfg.data.get("mlvgm")
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, Mapping):
        raise ValueError(
            f"Invalid data.mlvgm={config!r}: give a mapping, e.g. ++data.mlvgm.preset=fashion-ml-random."
        )
    for key, remedy in _DECIDED.items():
        if key in config:
            raise ValueError(f"Invalid key data.mlvgm.{key} under solo-learn: {remedy}.")
    if cfg.data.get("fraction", -1) > 0:
        raise ValueError(
            f"Invalid data.fraction={cfg.data.fraction} with data.format=mlvgm: set data.mlvgm.num_samples."
        )
    return {str(key): value for key, value in config.items()}


def _check_method(cfg: DictConfig, labelled: bool, finite: bool) -> None:
    """Raise a ValueError for what cannot work, before training.

    Args:
        cfg: solo-learn's configuration.
        labelled: whether the views have labels.
        finite: whether every epoch has the same samples.
    """
    method = cfg.get("method")
    reason = None
    if method == "mae":
        reason = (
            "it reconstructs single images and has no use for a positive; "
            "train it on exported anchors (mlviews export)"
        )
    elif method == "deepclusterv2" and not finite:
        reason = (
            "it remembers each sample from epoch to epoch, and here none comes twice; "
            "add ++data.mlvgm.pool=true for a finite set, or images of your own"
        )
    elif method == "supcon" and not labelled:
        reason = (
            "it takes all samples of a class for positives, and these views have no labels; "
            "use a class-conditional generator, or images of your own in one folder a class"
        )
    elif OmegaConf.select(cfg, "knn_eval.enabled") and not labelled:
        raise ValueError(
            "Invalid knn_eval.enabled=True: the online kNN needs labels of training images; "
            "use main_knn.py afterwards."
        )
    if reason is not None:
        raise ValueError(f"Invalid method={method!r} with data.format=mlvgm: {reason}.")


def _device(cfg: DictConfig) -> str:
    """Return the device that Lightning trains on; for "cuda" it sets the process's current device."""
    accelerator = cfg.get("accelerator") or "auto"
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "cuda"
    if accelerator == "mps":
        return "mps"
    if accelerator in ("gpu", "auto") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _channels(value: Any) -> tuple[float, ...]:
    """Return one number, or a number for each channel, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _unlabelled(batch: Batch) -> list[Any]:
    """Return the batch as solo-learn takes it, with -1 in the place of labels."""
    return solo_layout(batch._replace(targets=torch.full_like(batch.targets, -1)))
