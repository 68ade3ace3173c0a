"""solo-learn's configuration as a source of views. Nothing here imports solo-learn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mlviews.config import load_config, source_arguments
from mlviews.errors import listing
from mlviews.source import Batch, MLViewSource, solo_layout
from mlviews.transforms import IMAGENET, Augmentation

FORMATS = ("image_folder", "h5", "dali", "mlvgm")
_OWN = {  # keys of a source that follow from solo-learn's own
    "batch_size": "set optimizer.batch_size",
    "crops": "they follow from augmentations",
    "layout": "it is solo-learn's",
    "num_views": "it follows from augmentations",
    "rank": "it is the launcher's",
    "world_size": "it is the launcher's",
}
_LEAST_CLASSES = 5  # that the momentum methods' classifier must have: they log its top-5 accuracy


def check_format(name: object) -> None:
    """Raise a ValueError unless ``data.format`` is one that exists: solo-learn takes all others for an image folder."""
    if name not in FORMATS:
        raise ValueError(f"Invalid data.format={name!r}: use {listing(FORMATS)}.")


def augmentation(pipeline: DictConfig) -> Augmentation:
    """One pipeline of ``augmentations``, as solo-learn's ``build_transform_pipeline`` reads it, for whole batches on the device.

    Resampling is bilinear, not bicubic, and the color operations have a fixed order; see :class:`~mlviews.transforms.Augmentation`.

    Raises:
        ValueError: for a missing or a bad value.
    """

    def get(key: str) -> Any:
        value = OmegaConf.select(pipeline, key)
        if value is None:
            raise ValueError(f"A pipeline of augmentations lacks {key}: give it, as in solo-learn's scripts/pretrain.")
        return value

    color = ("brightness", "contrast", "saturation", "hue")
    return Augmentation(
        size=get("crop_size"),
        scale=(get("rrc.crop_min_scale"), get("rrc.crop_max_scale")) if get("rrc.enabled") else None,
        flip=get("horizontal_flip.prob"),
        jitter=tuple(get(f"color_jitter.{name}") for name in color) if get("color_jitter.prob") else (0.0, 0.0, 0.0, 0.0),
        jitter_p=get("color_jitter.prob"),
        grayscale=get("grayscale.prob"),
        blur=get("gaussian_blur.prob"),
        solarize=get("solarization.prob"),
        equalize=get("equalization.prob"),
        normalize=(_channels(pipeline.get("mean", IMAGENET[0])), _channels(pipeline.get("std", IMAGENET[1]))),
    )


class Views:
    """What ``data.format=mlvgm`` trains on, in the place of a dataset.

    Large crops come from views of their own: the first from the anchor, the second from a positive. Small crops come from these
    two in turn. Each crop has the T_x of its pipeline in ``augmentations``, or that of ``data.mlvgm.transform``.

    Args:
        cfg: solo-learn's configuration, with ``data.mlvgm``: the keys of mlviews' presets.

    Raises:
        ValueError: for a bad value, or a method that cannot be trained so, saying why.
        FileNotFoundError: for missing weights.
    """

    def __init__(self, cfg: DictConfig) -> None:
        config = _config(cfg)
        pipelines = list(cfg.augmentations)
        each = [augmentation(pipeline) for pipeline in pipelines for _ in range(pipeline.num_crops)]
        large = sum(one.size == each[0].size for one in each)
        if any(one.size != each[0].size for one in each[:large]):
            raise ValueError("augmentations has a small crop before a large one: put the pipelines with the first one's crop_size first.")
        arguments = source_arguments({"seed": cfg.get("seed", 5), "device": _device(cfg), "transform": None, **config})
        self.config = json.loads(json.dumps({**config, "seed": arguments["seed"]}))  # as solo-learn will read it from its args.json
        self.labelled = bool(arguments["generator"].num_classes) and not cfg.data.get("no_labels", False)
        crops = [*range(large), *(crop % 2 for crop in range(len(each) - large))]
        self._arguments = {
            **arguments,
            "transform": arguments["transform"] if "transform" in config else each,
            "crops": crops,
            "num_views": max(2, large),
            "layout": solo_layout if self.labelled else _unlabelled,
        }
        _check_method(cfg, self.labelled, bool(arguments.get("pool")))

    def num_classes(self, validation_classes: int) -> int:
        """Outputs of the online classifier: the generator's classes; for views without labels as many as validation has."""
        return self._arguments["generator"].num_classes if self.labelled else max(_LEAST_CLASSES, validation_classes)

    def source(self, batch_size: int) -> MLViewSource:
        """The loader of the training batches ``[indexes, [crops], targets]``.

        Args:
            batch_size: samples per batch and process.
        """
        made = MLViewSource(**self._arguments, batch_size=batch_size)
        made.dataset = range(made.num_samples)  # type: ignore[attr-defined]  # methods with a memory ask for its length
        return made


def summary(source: MLViewSource) -> str:
    """One line on what will be trained on."""
    samples = f"{source.num_samples:,} samples, {'the same' if source.pool else 'new ones'} in every epoch"
    labels = "no labels" if source.layout is _unlabelled else f"{source.generator.num_classes} classes"
    crops = ", ".join(f"{getattr(one, 'size', '?')} px of view {view}" for view, one in zip(source.crops, source.transforms, strict=True))
    return f"{source.generator.name}, {samples}, {labels}; crops: {crops}; seed {source.seed}"


def _config(cfg: DictConfig) -> dict[str, Any]:
    """``data.mlvgm``, checked against what solo-learn's own keys say."""
    if cfg.data.get("dataset") != "custom":
        raise ValueError(f"Invalid data.dataset={cfg.data.get('dataset')!r} with data.format=mlvgm: it must be custom.")
    given = cfg.data.get("mlvgm")
    config = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else given
    if not isinstance(config, Mapping):
        raise ValueError(f"Invalid data.mlvgm={config!r}: give a mapping, e.g. ++data.mlvgm.preset=fashion-ml-random.")
    for key, remedy in _OWN.items():
        if key in config:
            raise ValueError(f"Invalid key data.mlvgm.{key} under solo-learn: {remedy}.")
    if cfg.data.get("fraction", -1) > 0:
        raise ValueError(f"Invalid data.fraction={cfg.data.fraction} with data.format=mlvgm: set data.mlvgm.num_samples.")
    load_config(config)  # an unknown key is an error before anything is loaded
    return {str(key): value for key, value in config.items()}


def _check_method(cfg: DictConfig, labelled: bool, pool: bool) -> None:
    """Refuse what cannot work, before training."""
    method = cfg.get("method")
    why = None
    if method == "mae":
        why = "it reconstructs single images and has no use for a positive; train it on exported anchors (mlviews export)"
    elif method == "deepclusterv2" and not pool:
        why = "it remembers each sample from epoch to epoch, and here none comes twice; add ++data.mlvgm.pool=true for a finite set"
    elif method == "supcon" and not labelled:
        why = "it takes all samples of a class for positives, and these views have no labels; use a class-conditional generator"
    elif OmegaConf.select(cfg, "knn_eval.enabled") and not labelled:
        raise ValueError("Invalid knn_eval.enabled=True: the online kNN needs labels of training images; use main_knn.py afterwards.")
    if why:
        raise ValueError(f"Invalid method={method!r} with data.format=mlvgm: {why}.")


def _device(cfg: DictConfig) -> str:
    """Where Lightning trains: "cuda" is the process's current device, which it sets."""
    accelerator = cfg.get("accelerator") or "auto"
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "cuda"
    mps = torch.backends.mps.is_available()
    return "mps" if accelerator == "mps" or (accelerator in ("gpu", "auto") and mps) else "cpu"


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _unlabelled(batch: Batch) -> list[Any]:
    return solo_layout(batch._replace(targets=torch.full_like(batch.targets, -1)))
