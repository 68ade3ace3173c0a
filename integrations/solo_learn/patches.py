"""All that changes in solo-learn while a script runs under the launcher; call :func:`patch` before the script imports it.

Nothing changes for other formats, but that an unknown one is an error.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from mlviews.runs.processes import resolve_rank
from mlviews.transforms import IMAGENET

from .views import Views, check_format, summary

_REMEDY = 'install its requirements (pip install "mlviews[solo]") and run from its checkout, or pip install --no-deps -e . there'


def patch(image_size: int | None = None) -> None:
    """Teach solo-learn ``data.format=mlvgm``.

    Args:
        image_size: side of real images of ``data.dataset=custom``; None: solo-learn's 224.

    Raises:
        ModuleNotFoundError: if solo-learn or something it needs is not there, naming the remedy.
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

    _pretraining(args, pretrain)
    _validation(real, image_size)
    # Without labels every target is -1, as are DeepClusterV2's before its first clustering, and the mean over no target is NaN.
    methods.F = clusters.F = SimpleNamespace(**{**vars(F), "cross_entropy": cross_entropy})
    methods.BaseMethod.on_save_checkpoint = on_save_checkpoint
    # Else a run would be resumed from the checkpoint of one on other views.
    AutoResumer.SHOULD_MATCH = [*AutoResumer.SHOULD_MATCH, "data.format", "data.mlvgm"]


def say(line: str) -> None:
    """Print it once, not on every rank."""
    if resolve_rank(None, None)[0] == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mlviews: {line}.")


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """The mean cross entropy in nats of the samples that have a label; 0 where none has one, or NaN if a logit is.

    Args:
        logits: ``[B, classes]``.
        targets: int64 ``[B]``.
        ignore_index: the target of samples without a label.
    """
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1) + 0 * logits.sum()


def on_save_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
    """Keep a scheduler's ``get_lr`` out of the checkpoint, where methods with a constant learning rate (SimSiam, NNSiam) replace it.

    Restored, it would ask a copy of the scheduler, whose step stands still; and torch from 2.6 on refuses to read it.
    """
    for state in checkpoint["lr_schedulers"]:
        state.pop("get_lr", None)


def _pretraining(args: Any, pretrain: Any) -> None:
    """The configuration's checks, and views in the place of a dataset."""
    parse, datasets, loader = args.parse_cfg, pretrain.prepare_datasets, pretrain.prepare_dataloader
    made: list[Views] = []

    def parse_cfg(cfg: DictConfig) -> Any:
        check_format(cfg.data.get("format", "image_folder"))
        if cfg.data.get("format") != "mlvgm":
            if "mlvgm" in cfg.data:
                raise ValueError(f"data.mlvgm is given, but data.format is {cfg.data.get('format')!r}: add data.format=mlvgm.")
            return parse(cfg)
        cfg.data.train_path = None  # there is none, whatever a shared configuration says; solo-learn would list it
        views = Views(cfg)
        cfg.data.mlvgm = views.config
        cfg = parse(cfg)
        validation = cfg.data.val_path
        found = 0 if validation is None else sum(entry.is_dir() for entry in os.scandir(validation))
        cfg.data.num_classes = views.num_classes(found)
        made[:] = [views]
        if validation is not None and not views.labelled:
            say("the views have no labels, so the online classifier learns nothing: val_acc1 is chance; use main_linear.py")
        return cfg

    def prepare_datasets(
        dataset: str, transform: Any, train_data_path: Any = None, data_format: str = "image_folder", *rest: Any, **more: Any
    ) -> Any:
        check_format(data_format)
        return made[0] if data_format == "mlvgm" else datasets(dataset, transform, train_data_path, data_format, *rest, **more)

    def prepare_dataloader(train_dataset: Any, batch_size: int = 64, num_workers: int = 4) -> Any:
        if not isinstance(train_dataset, Views):
            return loader(train_dataset, batch_size, num_workers)
        source = train_dataset.source(batch_size)
        say(summary(source))
        return source

    args.parse_cfg = parse_cfg
    pretrain.prepare_datasets, pretrain.prepare_dataloader = prepare_datasets, prepare_dataloader


def _validation(real: Any, image_size: int | None) -> None:
    """Real, labelled images beside the views."""
    data, datasets = real.prepare_data, real.prepare_datasets

    def prepare_data(
        dataset: str, train_data_path: Any = None, val_data_path: Any = None, data_format: str = "image_folder", **options: Any
    ) -> Any:
        if data_format != "mlvgm":
            return data(dataset, train_data_path, val_data_path, data_format, **options)
        return None, data(dataset, val_data_path, val_data_path, "image_folder", **options)[1]

    def prepare_datasets(
        dataset: str, T_train: Any, T_val: Any, train_data_path: Any = None, val_data_path: Any = None, data_format: str = "image_folder",
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        check_format(data_format)
        return datasets(dataset, T_train, T_val, train_data_path, val_data_path, data_format, *rest, **more)

    def build_custom_pipeline() -> dict[str, Any]:
        from torchvision import transforms as tv

        assert image_size is not None
        finish = [tv.ToTensor(), tv.Normalize(*IMAGENET)]
        return {
            "T_train": tv.Compose([tv.RandomResizedCrop(image_size, scale=(0.08, 1.0)), tv.RandomHorizontalFlip(), *finish]),
            "T_val": tv.Compose([tv.Resize(round(image_size * 8 / 7)), tv.CenterCrop(image_size), *finish]),  # 256 for 224
        }

    real.prepare_data, real.prepare_datasets = prepare_data, prepare_datasets
    if image_size is not None:
        real.build_custom_pipeline = build_custom_pipeline
