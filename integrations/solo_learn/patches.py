"""All that changes in solo-learn while a script runs under the launcher.

Call :func:`patch` before the script imports solo-learn. Nothing changes for other formats, except that an
unknown one is an error.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from mlviews.integrations.solo_learn.views import Views, check_format, summary
from mlviews.runs.processes import resolve_rank
from mlviews.transforms import IMAGENET

_REMEDY = (
    'install its requirements (pip install "mlviews[solo]") and run from its checkout, '
    "or pip install --no-deps -e . there"
)


def patch(image_size: int | None = None) -> None:
    """Teach solo-learn ``data.format=mlvgm``.

    Args:
        image_size: side of real images of ``data.dataset=custom``; None: solo-learn's 224.

    Raises:
        ModuleNotFoundError: if solo-learn or something it needs is missing, naming the remedy.
    """
    try:
        import solo.args.pretrain as args
        import solo.data.classification_dataloader as real
        import solo.data.pretrain_dataloader as pretrain
        import solo.losses.deepclusterv2 as clusters
        import solo.methods.base as methods
        from solo.utils.auto_resumer import AutoResumer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: {_REMEDY}.") from error

    pretraining = Pretraining(args.parse_cfg, pretrain.prepare_datasets, pretrain.prepare_dataloader)
    args.parse_cfg = pretraining.parse_cfg
    pretrain.prepare_datasets = pretraining.prepare_datasets
    pretrain.prepare_dataloader = pretraining.prepare_dataloader

    validation = Validation(real.prepare_data, real.prepare_datasets, image_size)
    real.prepare_data = validation.prepare_data
    real.prepare_datasets = validation.prepare_datasets
    if image_size is not None:
        real.build_custom_pipeline = validation.build_custom_pipeline

    # Without labels every target is -1, as are DeepClusterV2's before its first clustering, and the mean over
    # no target is NaN.
    functional = SimpleNamespace(**{**vars(F), "cross_entropy": cross_entropy})
    methods.F = clusters.F = functional
    methods.BaseMethod.on_save_checkpoint = on_save_checkpoint
    # Otherwise a run would be resumed from the checkpoint of one on other views.
    AutoResumer.SHOULD_MATCH = [*AutoResumer.SHOULD_MATCH, "data.format", "data.mlvgm"]


def announce(line: str) -> None:
    """Print a line once, not on every rank."""
    if resolve_rank(None, None)[0] == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mlviews: {line}.")


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Return the mean cross entropy in nats of the samples that have a label.

    It is 0 if no sample has a label, and NaN if a logit is NaN.

    Args:
        logits: ``[B, classes]``.
        targets: int64 ``[B]``.
        ignore_index: the target of samples without a label.
    """
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    num_labelled = (targets != ignore_index).sum().clamp(min=1)
    return total / num_labelled + 0 * logits.sum()


def on_save_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
    """Keep a scheduler's ``get_lr`` out of the checkpoint.

    Methods with a constant learning rate (SimSiam, NNSiam) replace it. Restored, it would ask a copy of the
    scheduler, whose step stands still; and torch from 2.6 on refuses to read it.
    """
    for state in checkpoint["lr_schedulers"]:
        state.pop("get_lr", None)


class Pretraining:
    """solo-learn's functions for pretraining, with views in the place of a dataset.

    Args:
        parse_cfg: solo-learn's own; so are the other two.
        prepare_datasets: makes the training set.
        prepare_dataloader: makes its loader.
    """

    def __init__(self, parse_cfg: Any, prepare_datasets: Any, prepare_dataloader: Any) -> None:
        self._parse_cfg = parse_cfg
        self._prepare_datasets = prepare_datasets
        self._prepare_dataloader = prepare_dataloader
        self.views: Views | None = None  # set when the configuration is parsed

    def parse_cfg(self, cfg: DictConfig) -> Any:
        """Check the configuration's format; for mlvgm make the views, and set the number of classes."""
        check_format(cfg.data.get("format", "image_folder"))
        format = cfg.data.get("format")
        if format != "mlvgm":
            if "mlvgm" in cfg.data:
                raise ValueError(
                    f"data.mlvgm is given, but data.format is {format!r}: add data.format=mlvgm."
                )
            return self._parse_cfg(cfg)
        self.views = Views(cfg)
        cfg.data.mlvgm = self.views.config
        cfg.data.train_path = None  # whatever a shared configuration says: solo-learn would list the folder
        cfg = self._parse_cfg(cfg)
        validation_folder = cfg.data.val_path
        validation_classes = 0
        if validation_folder is not None:
            validation_classes = sum(entry.is_dir() for entry in os.scandir(validation_folder))
        cfg.data.num_classes = self.views.num_classes(validation_classes)
        if validation_folder is not None and not self.views.labelled:
            announce(
                "the views have no labels, so the online classifier learns nothing: "
                "val_acc1 is chance; use main_linear.py"
            )
        return cfg

    def prepare_datasets(
        self,
        dataset: str,
        transform: Any,
        train_data_path: Any = None,
        data_format: str = "image_folder",
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Return the views for mlvgm, else solo-learn's own dataset."""
        check_format(data_format)
        if data_format == "mlvgm":
            return self.views
        return self._prepare_datasets(dataset, transform, train_data_path, data_format, *rest, **more)

    def prepare_dataloader(self, train_dataset: Any, batch_size: int = 64, num_workers: int = 4) -> Any:
        """Return a source for views, else solo-learn's own loader."""
        if not isinstance(train_dataset, Views):
            return self._prepare_dataloader(train_dataset, batch_size, num_workers)
        source = train_dataset.source(batch_size)
        announce(summary(source))
        return source


class Validation:
    """solo-learn's functions for real, labelled images, which also work beside views.

    Args:
        prepare_data: solo-learn's own; so is the next.
        prepare_datasets: makes the training set and the validation set.
        image_size: side of real images of ``data.dataset=custom``; None: solo-learn's 224.
    """

    def __init__(self, prepare_data: Any, prepare_datasets: Any, image_size: int | None) -> None:
        self._prepare_data = prepare_data
        self._prepare_datasets = prepare_datasets
        self.image_size = image_size

    def prepare_data(
        self,
        dataset: str,
        train_data_path: Any = None,
        val_data_path: Any = None,
        data_format: str = "image_folder",
        **options: Any,
    ) -> Any:
        """Return the loaders of training and validation; with mlvgm the training loader is None."""
        if data_format != "mlvgm":
            return self._prepare_data(dataset, train_data_path, val_data_path, data_format, **options)
        _, loader = self._prepare_data(dataset, val_data_path, val_data_path, "image_folder", **options)
        return None, loader

    def prepare_datasets(
        self,
        dataset: str,
        T_train: Any,
        T_val: Any,
        train_data_path: Any = None,
        val_data_path: Any = None,
        data_format: str = "image_folder",
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Return solo-learn's own datasets, after a check of the format."""
        check_format(data_format)
        paths = train_data_path, val_data_path
        return self._prepare_datasets(dataset, T_train, T_val, *paths, data_format, *rest, **more)

    def build_custom_pipeline(self) -> dict[str, Any]:
        """Return solo-learn's transforms for ``data.dataset=custom``, at another size."""
        from torchvision import transforms

        assert self.image_size is not None
        normalized = [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
        crop = transforms.RandomResizedCrop(self.image_size, scale=(0.08, 1.0))
        resize = transforms.Resize(round(self.image_size * 8 / 7))  # 256 for 224
        center = transforms.CenterCrop(self.image_size)
        return {
            "T_train": transforms.Compose([crop, transforms.RandomHorizontalFlip(), *normalized]),
            "T_val": transforms.Compose([resize, center, *normalized]),
        }
