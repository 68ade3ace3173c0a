"""The bare source as Lightning's loader."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_source
from torch import nn

from mlviews import MLViewSource

pl = pytest.importorskip("pytorch_lightning")


class Recorder(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Trains on what it is given, and remembers which samples of which epoch that was."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: list[Any], index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, int(batch[0][0])))
        return self.layer(batch[1][0].flatten(1)).square().mean()

    def validation_step(self, batch: list[Any], index: int) -> torch.Tensor:
        return self.layer(batch[1][0].flatten(1)).mean()

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **options})


def solo() -> MLViewSource:
    return toy_source(layout="solo")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_two_epochs(tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, max_epochs=2).fit(model, solo())
    assert model.seen == [(epoch, start) for epoch in range(2) for start in range(0, 48, 8)]


def test_each_epoch_has_samples_of_its_own(tmp_path: Path) -> None:
    source, epochs = solo(), []
    source.layout = lambda batch: epochs.append(source.epoch) or [batch.indices, batch.views, batch.targets]
    trainer(tmp_path, max_epochs=3, limit_train_batches=2).fit(Recorder(), source)
    assert epochs == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("step", [2, 6, 8])
def test_resume_from_a_checkpoint(step: int, tmp_path: Path) -> None:
    whole, rest = Recorder(), Recorder()
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saving]).fit(whole, solo())
    trainer(tmp_path, max_epochs=2).fit(rest, solo(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert rest.seen == whole.seen[step:]
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def test_as_validation_test_and_predict_loader(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    model = Recorder()
    made.fit(model, solo(), solo())
    made.test(model, solo(), verbose=False)
    assert len(made.predict(model, solo())) == 6
