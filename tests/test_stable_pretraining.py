"""The source as stable-pretraining's data: its batches here, its trainer where it is installed.

stable-pretraining brings tens of packages along, so tests do not install it. By hand:
``pip install stable-pretraining`` and this file again.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_source
from torch.utils.data import DataLoader, Dataset

from mlviews import MLViewSource, transforms
from mlviews.evaluation.data import bundled_slice

installed = pytest.mark.skipif(
    importlib.util.find_spec("stable_pretraining") is None, reason="stable-pretraining is not installed"
)


def test_views_of_one_size_are_a_list() -> None:
    plain = next(iter(toy_source(num_views=3)))
    batch = next(iter(toy_source(num_views=3, layout="stable_pretraining")))
    assert list(batch) == ["views"]
    assert type(batch) is dict, "its module takes nothing else"
    assert len(batch["views"]) == 3
    for view, image in zip(batch["views"], plain.views, strict=True):
        assert torch.equal(view["image"], image)
        assert torch.equal(view["sample_idx"], plain.indices)
        assert torch.equal(view["label"], plain.targets)


def test_crops_of_several_sizes_have_names() -> None:
    large, small = transforms.gray(12), transforms.gray(6)
    crops = {"crops": (0, 1, 1), "transform": [small, large, large]}
    plain = next(iter(toy_source(**crops)))
    views = next(iter(toy_source(**crops, layout="stable_pretraining")))["views"]
    assert list(views) == ["global_1", "global_2", "local_1"]
    assert torch.equal(views["local_1"]["image"], plain.views[0])
    assert torch.equal(views["global_2"]["image"], plain.views[2])


@installed
@pytest.mark.parametrize("method", ["simclr", "byol", "vicreg", "dino"])
def test_the_example(method: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlviews.integrations.stable_pretraining.train", "--method", method]
    sizes = ["--epochs", "2", "--num-samples", "64", "--batch-size", "16", "--out", str(tmp_path)]
    process = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / f"stable-pretraining-{method}.json").read_text())
    assert record["steps"] == 8
    assert record["loss"]["last"] > 0
    assert 10 < record["knn"]["trained"] < 100


@installed
@pytest.mark.parametrize(("method", "has_teachers"), [("simclr", False), ("byol", True), ("dino", True)])
def test_teachers_follow_their_students(method: str, has_teachers: bool) -> None:
    import lightning as pl
    import stable_pretraining as spt

    from mlviews.integrations.lightning import MLViewDataModule
    from mlviews.integrations.stable_pretraining import train

    crops = train.CROPS.get(method, {})
    source = MLViewSource.from_config(
        "fashion-ml-random", layout="stable_pretraining", batch_size=8, num_samples=16, **crops
    )
    optim = {"optimizer": {"type": "AdamW", "lr": 1e-2}}
    module = spt.Module(**train.METHODS[method](train.Small()), optim=optim, hparams={})
    callbacks = train.teaching(module)
    assert len(callbacks) == has_teachers
    if has_teachers:
        before = [weight.clone() for weight in module.backbone.teacher.parameters()]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", devices=1, **quiet)
        trainer.fit(module, MLViewDataModule(source))
        after = module.backbone.teacher.parameters()
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


class Real(Dataset[dict[str, Any]]):
    """Labeled real images, as its callbacks validate on them."""

    def __init__(self, count: int) -> None:
        images = bundled_slice()[0]
        plain = transforms.Augmentation(size=28, scale=None, flip=0.0)  # 3 channels, normalized as views are
        self.images = plain(images.images[:count].float() / 255, range(count), seed=0, epoch=0, view=0)
        self.labels = images.labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


class Own(Dataset[torch.Tensor]):
    """The same images with their labels, as anchors."""

    def __init__(self, count: int) -> None:
        images = bundled_slice()[1]
        self.images, self.targets = images.images[:count], images.labels[:count]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index][:1]


@installed
def test_its_callbacks_learn_from_own_images_and_validate_on_real_ones() -> None:
    import lightning as pl
    import stable_pretraining as spt
    import torchmetrics

    from mlviews.integrations.lightning import MLViewDataModule
    from mlviews.integrations.stable_pretraining import train

    source = MLViewSource.from_config(
        "fashion-nvae-real-resample", images=Own(64), batch_size=16, layout="stable_pretraining"
    )
    module = spt.Module(
        **train.simclr(train.Small()), optim={"optimizer": {"type": "AdamW", "lr": 1e-3}}, hparams={}
    )
    metrics = {"accuracy": torchmetrics.classification.MulticlassAccuracy(10)}
    callbacks = [
        spt.callbacks.OnlineKNN("knn", "embedding", "label", 64, metrics, input_dim=512, k=5),
        spt.callbacks.OnlineProbe(
            module,
            "probe",
            "embedding",
            "label",
            probe=torch.nn.Linear(512, 10),
            loss=torch.nn.CrossEntropyLoss(),
            metrics=metrics,
        ),
        spt.callbacks.RankMe("rankme", "embedding", 64, 512),
    ]
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(module, MLViewDataModule(source, val_dataloaders=DataLoader(Real(64), 32)))
    results = trainer.callback_metrics
    assert 0 <= results["eval/knn_accuracy"] <= 1, results
    assert 0 <= results["eval/probe_accuracy"] <= 1, results
    assert results["rankme"] > 1, results
