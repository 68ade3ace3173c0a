"""Lightning on generated views, in both of its packages: the source as a loader, and the data module."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import torchrun, toy_source
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlviews import MLViewSource, transforms
from mlviews.evaluation.learner import METHODS, Learner

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
for name in NAMESPACES:
    pytest.importorskip(name)

from mlviews.integrations.lightning import MLViewDataModule  # noqa: E402 (imports both)

PAGE = Path(__file__).parents[1] / "integrations" / "lightning" / "README.md"


class Recording:
    """Trains on what it is given, and remembers the epoch, the samples and the content; mixed into either
    LightningModule.
    """

    def __init__(self, estimates: bool = False, fails_at: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)
        self.seen: list[tuple[int, list[int]]] = []
        self.first_pixels: list[float] = []
        self.validated: list[float] = []
        self.estimates, self.fails_at = estimates, fails_at
        self.estimated = 0

    def training_step(self, batch: list[Any], index: int) -> torch.Tensor:
        if len(self.seen) == self.fails_at:
            raise RuntimeError("an accident")
        self.seen.append((self.current_epoch, batch[0].tolist()))
        self.first_pixels.append(float(batch[1][0][0, 0, 0, 0]))
        return self.layer(batch[1][0].flatten(1)).square().mean()

    def validation_step(self, batch: list[Any], index: int) -> None:
        self.validated.append(float(batch[0].flatten()[0]))

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimates:  # Lightning then drops the state of loaders from a checkpoint it resumes from
            self.estimated = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @property
    def starts(self) -> list[tuple[int, int]]:
        """The epoch of each batch, and its first sample."""
        return [(epoch, indices[0]) for epoch, indices in self.seen]

    @property
    def samples(self) -> list[tuple[int, int]]:
        return [(epoch, index) for epoch, indices in self.seen for index in indices]


@pytest.fixture(params=NAMESPACES)
def pl(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One of the namespaces: its Trainer, quiet and on the CPU, and a model for it."""
    framework = importlib.import_module(request.param)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }

    def trainer(folder: Path, **options: Any) -> Any:
        return framework.Trainer(
            default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **options}
        )

    def saving(folder: Path, **options: Any) -> dict[str, Any]:
        """Trainer's options to keep every checkpoint, as step=N.ckpt."""
        callback = framework.callbacks.ModelCheckpoint(
            dirpath=folder, filename="{step}", save_top_k=-1, **options
        )
        return {"enable_checkpointing": True, "callbacks": [callback]}

    model = type("Recorder", (Recording, framework.LightningModule), {})
    return SimpleNamespace(trainer=trainer, saving=saving, model=model, namespace=framework)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NAMESPACES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def solo(**options: Any) -> MLViewSource:
    """48 samples an epoch, 6 batches of 8."""
    return toy_source(**{"layout": "solo", **options})


def module(**options: Any) -> MLViewDataModule:
    return MLViewDataModule(solo(**options))


def real(count: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(count))), batch_size=2)


@pytest.mark.parametrize("make", [solo, module])
def test_two_epochs(make: Any, pl: Any, tmp_path: Path) -> None:
    model, trainer = pl.model(estimates=True), pl.trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4)
    trainer.fit(model, make())
    assert model.starts == [(epoch, start) for epoch in range(2) for start in range(0, 48, 8)]
    assert len(set(model.first_pixels)) == 12
    assert (trainer.num_training_batches, model.estimated, trainer.global_step) == (6, 4, 4)


@pytest.mark.parametrize("make", [solo, module])
@pytest.mark.parametrize(
    "options",
    [{"limit_train_batches": 2}, {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1}],
)
def test_each_epoch_has_samples_of_its_own(
    options: dict[str, Any], make: Any, pl: Any, tmp_path: Path
) -> None:
    source, epochs = solo(), []
    source.layout = lambda batch: epochs.append(source.epoch) or [batch.indices, batch.views, batch.targets]
    model = pl.model()
    pl.trainer(tmp_path, max_epochs=3, **options).fit(
        model, source if make is solo else MLViewDataModule(source)
    )
    assert epochs == [0, 0, 1, 1, 2, 2]
    assert [start for _, start in model.starts] == [0, 8] * 3


@pytest.mark.parametrize("step", [2, 6, 8])
def test_resume_with_the_bare_source(step: int, pl: Any, tmp_path: Path) -> None:
    whole, rest = pl.model(), pl.model()
    pl.trainer(tmp_path, max_epochs=2, **pl.saving(tmp_path, every_n_train_steps=step)).fit(whole, solo())
    pl.trainer(tmp_path, max_epochs=2).fit(rest, solo(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert rest.seen == whole.seen[step:]
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def test_as_validation_test_and_predict_loader(pl: Any, tmp_path: Path) -> None:
    trainer, model = pl.trainer(tmp_path, max_epochs=1), pl.model()
    trainer.fit(model, solo(), solo())
    trainer.test(model, solo(), verbose=False)
    assert len(trainer.predict(model, solo())) == 6
    assert len(model.validated) == 2 + 6 + 6 + 6  # the first two: Lightning's check before training


RESUMES = {
    "middle": (2, {}, {"every_n_train_steps": 2}),
    "last batch": (6, {}, {"every_n_train_steps": 6}),
    "second epoch": (8, {}, {"every_n_train_steps": 2}),
    "end of epoch": (6, {}, {"save_on_train_epoch_end": True}),
    "after validation": (6, {"val_check_interval": 3}, {}),
    "validation in the middle": (3, {"val_check_interval": 3}, {}),
    "limited": (3, {"limit_train_batches": 4}, {"every_n_train_steps": 3}),
    "end of a limited epoch": (4, {"limit_train_batches": 4}, {"every_n_train_steps": 4}),
    "overfit": (3, {"overfit_batches": 2}, {"every_n_train_steps": 3}),
    "end of an overfit epoch": (2, {"overfit_batches": 2}, {"every_n_train_steps": 2}),
    "steps": (4, {"max_steps": 10}, {"every_n_train_steps": 2}),
    "last batch, steps": (6, {"max_steps": 10}, {"every_n_train_steps": 6}),
    "end of epoch, steps": (6, {"max_steps": 10}, {"save_on_train_epoch_end": True}),
    "after validation, steps": (6, {"max_steps": 10, "val_check_interval": 3}, {}),
    "reloaded": (8, {"reload_dataloaders_every_n_epochs": 1}, {"every_n_train_steps": 2}),
}


@pytest.mark.parametrize("estimates", [False, True])
@pytest.mark.parametrize("case", RESUMES)
def test_resume(case: str, estimates: bool, pl: Any, tmp_path: Path) -> None:
    step, options, when = RESUMES[case]
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}

    def data() -> MLViewDataModule:
        return MLViewDataModule(solo(), val_dataloaders=real)

    whole, rest = pl.model(), pl.model(estimates)
    pl.trainer(tmp_path, **options, **pl.saving(tmp_path, **when)).fit(whole, data())
    trainer = pl.trainer(tmp_path, **options)
    trainer.fit(rest, datamodule=data(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert [indices for _, indices in rest.seen] == [indices for _, indices in whole.seen[step:]]
    assert rest.first_pixels == whole.first_pixels[step:]  # so the epochs agree too
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    assert trainer.global_step == len(whole.seen)


@pytest.mark.parametrize("estimates", [False, True])
@pytest.mark.parametrize("step", [3, 6, 9])
@pytest.mark.parametrize("batch_size", [2, 6, 16])
def test_resume_on_another_batch_size(
    batch_size: int, step: int, estimates: bool, pl: Any, tmp_path: Path
) -> None:
    whole, rest = pl.model(), pl.model(estimates)
    pl.trainer(tmp_path, max_epochs=2, **pl.saving(tmp_path, every_n_train_steps=3)).fit(whole, module())
    data = MLViewDataModule(solo(batch_size=batch_size), val_dataloaders=real(2))
    pl.trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(
        rest, data, ckpt_path=str(tmp_path / f"step={step}.ckpt")
    )
    first = 48 - step % 6 * 8 if step % 6 else 0  # left of the checkpoint's epoch
    expected = [(step // 6, index) for index in range(48 - first, 48 - first % batch_size)] if first else []
    expected += [(epoch, index) for epoch in range(-(-step // 6), 2) for index in range(48)]
    assert rest.samples == expected
    assert {len(indices) for _, indices in rest.seen} == {batch_size}
    assert len(rest.validated) == len({epoch for epoch, _ in expected})  # at the end of each epoch


def test_resume_with_a_smaller_last_batch(pl: Any, tmp_path: Path) -> None:
    whole, rest = pl.model(), pl.model()
    uneven = {"num_samples": 50, "drop_last": False}
    pl.trainer(tmp_path, max_epochs=1, **pl.saving(tmp_path, every_n_train_steps=3)).fit(
        whole, module(**uneven)
    )
    pl.trainer(tmp_path, max_epochs=1).fit(
        rest, module(batch_size=9, **uneven), ckpt_path=str(tmp_path / "step=3.ckpt")
    )
    assert [len(indices) for _, indices in rest.seen] == [9, 9, 8]
    assert rest.samples == [(0, index) for index in range(24, 50)]


def test_a_rest_too_small_for_a_batch_ends_the_epoch(pl: Any, tmp_path: Path) -> None:
    whole, rest = pl.model(), pl.model()
    pl.trainer(tmp_path, max_epochs=2, **pl.saving(tmp_path, every_n_train_steps=5)).fit(whole, module())
    pl.trainer(tmp_path, max_epochs=2).fit(
        rest, module(batch_size=16), ckpt_path=str(tmp_path / "step=5.ckpt")
    )
    assert rest.starts == [(1, 0), (1, 16), (1, 32)]


@pytest.mark.parametrize("fails_at", [0, 6, 8])
def test_a_batch_that_failed_is_made_again(fails_at: int, pl: Any, tmp_path: Path) -> None:
    whole, failing, rest = pl.model(), pl.model(fails_at=fails_at), pl.model()
    pl.trainer(tmp_path, max_epochs=2).fit(whole, module())
    saving = pl.namespace.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="an accident"):
        pl.trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saving]).fit(
            failing, module()
        )
    pl.trainer(tmp_path, max_epochs=2).fit(rest, module(), ckpt_path=saving.ckpt_path)
    assert failing.seen + rest.seen == whole.seen
    assert failing.first_pixels + rest.first_pixels == whole.first_pixels


@pytest.mark.parametrize("makes", [(solo, module), (module, solo)])
def test_checkpoints_of_the_bare_source_and_of_the_module_are_one_anothers(
    makes: Any, pl: Any, tmp_path: Path
) -> None:
    whole, rest = pl.model(), pl.model()
    pl.trainer(tmp_path, max_epochs=2, **pl.saving(tmp_path, every_n_train_steps=4)).fit(whole, makes[0]())
    pl.trainer(tmp_path, max_epochs=2).fit(rest, makes[1](), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert rest.seen == whole.seen[4:]


def test_overfitting_sees_the_same_samples_in_every_epoch(pl: Any, tmp_path: Path) -> None:
    model = pl.model()
    pl.trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(model, module())
    assert model.starts == [(epoch, start) for epoch in range(3) for start in (0, 8)]
    assert model.first_pixels == model.first_pixels[:2] * 3


def test_a_module_serves_one_run_after_another(pl: Any, tmp_path: Path) -> None:
    first, other, data = pl.model(), pl.model(), module()
    trainer = pl.trainer(tmp_path, max_epochs=1)
    trainer.fit(first, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(first, data)
    assert [start for _, start in first.starts] == [*range(0, 48, 8)] * 2
    assert len(set(first.first_pixels)) == 12
    pl.trainer(tmp_path, max_epochs=1).fit(other, data)
    assert other.first_pixels == first.first_pixels[:6]


def test_one_module_in_both_namespaces(tmp_path: Path) -> None:
    data, pixels = MLViewDataModule(solo()), []
    for name in NAMESPACES:
        framework = importlib.import_module(name)
        model = type("Recorder", (Recording, framework.LightningModule), {})()
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        framework.Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(model, data)
        pixels.append(model.first_pixels)
    assert len(pixels[0]) == 6
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize("give", [lambda: real(), lambda: real, lambda: [real(), real(4)]])
def test_validates_and_tests_on_real_data(give: Any, pl: Any, tmp_path: Path) -> None:
    loaders, trainer, model = give(), pl.trainer(tmp_path, max_epochs=2, limit_val_batches=2), pl.model()
    if isinstance(loaders, list):
        model.validation_step = lambda batch, index, dataloader_idx: model.validated.append(
            float(batch[0][0])
        )
    data = MLViewDataModule(solo(), val_dataloaders=loaders, test_dataloaders=real(6))
    trainer.fit(model, data)
    passes = 3  # one for Lightning's check before training
    assert model.validated == [0, 2] * passes * (len(loaders) if isinstance(loaders, list) else 1)
    model.validated.clear()
    trainer.test(model, data, verbose=False)
    assert model.validated == [0, 2, 4]


def test_without_loaders_there_is_no_validation(pl: Any, tmp_path: Path) -> None:
    model = pl.model()
    with pytest.warns(UserWarning, match="have no `val_dataloader`"):
        pl.trainer(tmp_path, max_epochs=1).fit(model, module())
    assert (len(model.seen), model.validated) == (6, [])


def test_a_subclass_may_bring_its_own_loaders(pl: Any, tmp_path: Path) -> None:
    class Own(MLViewDataModule):
        def val_dataloader(self) -> Any:
            return real(2)

    model = pl.model()
    pl.trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(model, Own(solo()))
    assert model.validated == [0]


def test_from_a_configuration(pl: Any, tmp_path: Path) -> None:
    config = {
        "preset": "fashion-ml-random",
        "batch_size": 2,
        "num_samples": 4,
        "layout": "solo",
        "transform": None,
    }
    data, model = MLViewDataModule(config), pl.model()
    model.layer = nn.Linear(32 * 32, 1)  # raw views
    with pytest.raises(ValueError, match=r"no source yet"):
        _ = data.source
    pl.trainer(tmp_path, max_epochs=1).fit(model, data)
    assert model.starts == [(0, 0), (0, 2)]
    assert len(data.train_dataloader()) == len(data.source) == 2


def test_an_unknown_key_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"Unknown key 'batchsize'.*Did you mean 'batch_size'"):
        MLViewDataModule({"preset": "fashion-ml-random", "batchsize": 2})


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_works_on_the_trainers_device(device: str | None, expected: str) -> None:
    data = module(device=device)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    data.setup("fit")
    assert data.source.device.type == expected


def test_by_hand() -> None:
    data = module()
    with pytest.raises(ValueError, match="not set up"):
        data.train_dataloader()
    data.setup("fit")
    loader = data.train_dataloader()
    starts = [[int(batch[0][0]) for batch in loader] for _ in range(2)]
    assert starts == [[*range(0, 48, 8)]] * 2
    assert data.state_dict() == {"seed": 3, "epoch": 1, "position": 48}  # nobody named an epoch
    with pytest.raises(ValueError, match="seed=4"):
        data.load_state_dict({"seed": 4, "epoch": 0, "position": 0})
    state = {"seed": 3, "epoch": 1, "position": 16}
    data.load_state_dict(state)
    assert data.state_dict() == state
    loader.set_epoch(1)
    assert [int(batch[0][0]) for batch in loader] == [*range(16, 48, 8)]


def beside(kind: str, make: Any, mode: str = "min_size") -> tuple[str, Any]:
    """A source of 6 batches beside a loader of 9 real ones, as the argument of Trainer.fit that takes it."""
    framework = importlib.import_module("lightning.pytorch")
    longer = DataLoader(TensorDataset(torch.arange(18.0)), batch_size=2)

    def together(views: Any) -> Any:
        if kind == "dict":
            return {"views": views, "real": longer}
        return framework.utilities.CombinedLoader({"views": views, "real": longer}, mode)

    if make is solo:
        return "train_dataloaders", together(solo())

    class Both(MLViewDataModule):
        def train_dataloader(self) -> Any:
            return together(super().train_dataloader())

    return "datamodule", Both(solo())


def fit_beside(
    framework: Any, loaders: tuple[str, Any], folder: Path, resume: str | None = None, **options: Any
) -> Any:
    """A model trained for two epochs on views beside real images; with views left, it remembers them."""

    class Model(Recording, framework.LightningModule):
        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            if batch["views"] is None:
                self.seen.append((self.current_epoch, []))
                self.first_pixels.append(-1.0 - len(self.seen))
                return self.layer.weight.sum()
            return super().training_step(batch["views"], index)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    saving = framework.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = framework.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "callbacks": [saving], **quiet, **options}
    )
    name, argument = loaders
    model = Model()
    trainer.fit(model, **{name: argument}, ckpt_path=resume)
    return model


@pytest.mark.parametrize("make", [solo, module])
@pytest.mark.parametrize("kind", ["dict", "min_size", "max_size", "max_size_cycle"])
def test_beside_another_loader_and_on_from_there(kind: str, make: Any, tmp_path: Path) -> None:
    framework = importlib.import_module("lightning.pytorch")

    def loaders() -> tuple[str, Any]:
        return beside(kind, make, "max_size_cycle" if kind == "dict" else kind)

    whole = fit_beside(framework, loaders(), tmp_path)
    batches = 6 if kind == "min_size" else 9
    assert len(whole.seen) == 2 * batches
    assert len(set(whole.first_pixels)) == len(whole.seen)  # no sample twice
    # In the middle of a first round, at its end, in a second round, and in the second epoch.
    for step in {3, 6, 8, batches, batches + 2, batches + 7} - set(range(2 * batches, 99)):
        rest = fit_beside(framework, loaders(), tmp_path / "rest", str(tmp_path / f"step={step}.ckpt"))
        assert rest.seen == whole.seen[step:], step
        views = [pixel for pixel in rest.first_pixels if pixel >= 0]
        assert views == [pixel for pixel in whole.first_pixels[step:] if pixel >= 0]


@pytest.mark.parametrize("make", [solo, module])
@pytest.mark.parametrize(
    "options",
    [{"limit_train_batches": 4}, {"reload_dataloaders_every_n_epochs": 1}, {"limit_train_batches": 0.5}],
)
def test_beside_another_loader_in_short_epochs(options: dict[str, Any], make: Any, tmp_path: Path) -> None:
    framework = importlib.import_module("lightning.pytorch")
    model = fit_beside(
        framework, beside("max_size_cycle", make, "max_size_cycle"), tmp_path, max_epochs=4, **options
    )
    assert len(set(model.first_pixels)) == len(model.seen) >= 16


def test_a_step_that_failed_in_a_second_round_is_made_again(tmp_path: Path) -> None:
    framework = importlib.import_module("lightning.pytorch")
    data = ("max_size_cycle", module, "max_size_cycle")
    whole = fit_beside(framework, beside(*data), tmp_path / "whole")
    name, loaders = beside(*data)
    saving = framework.callbacks.OnExceptionCheckpoint(tmp_path)
    calls = iter(range(99))

    class Failing(framework.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if next(calls) == 7:
                raise RuntimeError("an accident")

    with pytest.raises(RuntimeError, match="an accident"):
        fit_beside(framework, (name, loaders), tmp_path / "part", callbacks=[saving, Failing()])
    rest = fit_beside(framework, beside(*data), tmp_path / "rest", saving.ckpt_path)
    assert rest.first_pixels == whole.first_pixels[7:]


@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 4}, {"reload_dataloaders_every_n_epochs": 1}]
)
@pytest.mark.parametrize("kind", ["DataLoader", "StatefulDataLoader"])
def test_in_a_loader_of_torch(kind: str, options: dict[str, Any], pl: Any, tmp_path: Path) -> None:
    """Each epoch has its own samples; torchdata's loader has a place too."""
    loader: Any = DataLoader
    if kind == "StatefulDataLoader":
        loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole = pl.model()
    saving = pl.saving(tmp_path, every_n_train_steps=1)
    pl.trainer(tmp_path, max_epochs=3, **options, **saving).fit(whole, loader(solo(), batch_size=None))
    assert len(set(whole.first_pixels)) == len(whole.seen) == 3 * options.get("limit_train_batches", 6)
    if kind == "StatefulDataLoader":
        for step in (2, 8):
            rest = pl.model()
            checkpoint = str(tmp_path / f"step={step}.ckpt")
            pl.trainer(tmp_path, max_epochs=3, **options).fit(
                rest, loader(solo(), batch_size=None), ckpt_path=checkpoint
            )
            assert not set(rest.first_pixels) & set(whole.first_pixels[:step]), step
            if (
                "limit_train_batches" not in options
            ):  # else what an epoch left over comes first, torchdata's habit
                assert rest.first_pixels == whole.first_pixels[step:], step


@pytest.mark.parametrize("step", [2, 6, 8])
def test_torchdatas_loader_in_a_plain_loop(step: int) -> None:
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole = loader(solo(), batch_size=None)
    batches, states = [], []
    for _ in range(3):
        for batch in whole:
            batches.append(float(batch[1][0][0, 0, 0, 0]))
            states.append(whole.state_dict())
    assert len(set(batches)) == 18
    rest = loader(solo(), batch_size=None)
    rest.load_state_dict(states[step - 1])
    again = [float(batch[1][0][0, 0, 0, 0]) for _ in range(3) for batch in rest]
    assert again[: 18 - step] == batches[step:]


def test_torchs_loader_is_told_that_checkpoints_have_no_place(pl: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="do not hold the place of a torch DataLoader"):
        pl.trainer(tmp_path, max_epochs=1).fit(pl.model(), DataLoader(solo(), batch_size=None))


def test_one_source_for_training_and_validation_is_one_error(pl: Any, tmp_path: Path) -> None:
    source = solo()
    with pytest.raises(RuntimeError, match="another pass began"):
        pl.trainer(tmp_path, max_epochs=1, val_check_interval=2, num_sanity_val_steps=0).fit(
            pl.model(), source, source
        )


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, pl: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightly")

    class Method(pl.namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.learner = Learner(method)
            self.record: list[tuple[int, list[int], float]] = []

        def training_step(self, batch: list[Any], index: int) -> torch.Tensor:
            loss = self.learner(*batch[1])
            self.record.append((self.current_epoch, batch[0].tolist(), loss.item()))
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.learner.after_step(self.global_step / self.trainer.estimated_stepping_batches)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(0)
    model = Method()
    before = copy.deepcopy(model.learner.state_dict())
    pl.trainer(tmp_path, max_epochs=2).fit(model, module(transform=transforms.gray(16), batch_size=16))
    losses = [loss for *_, loss in model.record]
    assert [(epoch, indices) for epoch, indices, _ in model.record] == [
        (epoch, list(range(start, start + 16))) for epoch in range(2) for start in (0, 16, 32)
    ]
    assert all(torch.tensor(losses).isfinite())
    assert len(set(losses)) == 6
    moved = {
        name.split(".")[0]
        for name, value in model.learner.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert (
        moved
        == {
            "simclr": {"encoder", "head"},
            "simsiam": {"encoder", "head", "predictor"},
            "byol": {"encoder", "head", "predictor", "target"},
        }[method]
    )


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code, at a size that takes seconds."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    quiet = "max_epochs=2, accelerator='cpu', logger=False, enable_progress_bar=False"
    for long, short in {
        "60_000": "32",
        '"batch_size": 256': '"batch_size": 16',
        "max_epochs=100": quiet,
    }.items():
        assert long in block
        block = block.replace(long, short)
    session: dict[str, Any] = {}
    exec(block, session)
    assert session["trainer"].global_step == 4
    assert torch.tensor(session["trainer"].logged_metrics["loss"]).isfinite()


def one_rank(folder: Path) -> None:
    """A rank of runs on two gloo processes, started by torchrun below; one after the other, to pay for the
    start once.
    """
    source, val = solo(batch_size=4), DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
    first = run("pytorch_lightning", folder / "source", train_dataloaders=source, val_dataloaders=val)
    second = run("lightning.pytorch", folder / "module", datamodule=MLViewDataModule(solo(batch_size=4), val))
    checkpoint = str(folder / "module" / "step=8.ckpt")
    resumed = run(
        "lightning.pytorch", folder / "resumed", datamodule=module(batch_size=8), ckpt_path=checkpoint
    )
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps([first, second, resumed]))
    torch.distributed.destroy_process_group()  # Lightning leaves NCCL's only


def run(namespace: str, folder: Path, **fit: Any) -> dict[str, Any]:
    """Two epochs under ddp, with a checkpoint after every second step."""
    framework = importlib.import_module(namespace)
    model = type("Recorder", (Recording, framework.LightningModule), {})(estimates="datamodule" in fit)
    saving = framework.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=2
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = framework.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[saving], **quiet
    )
    trainer.fit(model, **fit)
    sampler = getattr(trainer.val_dataloaders, "sampler", None)
    return {
        "seen": model.seen,
        "validated": model.validated,
        "batches": trainer.num_training_batches,
        "estimated": model.estimated,
        "weight": model.layer.weight.tolist(),
        "samplers": [type(trainer.train_dataloader.sampler).__name__, type(sampler).__name__],
    }


def epochs_of(ranks: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The samples of each epoch over both ranks, sorted."""
    epochs: dict[int, list[int]] = {}
    for rank in ranks:
        for epoch, indices in rank["seen"]:
            epochs.setdefault(epoch, []).extend(indices)
    return {epoch: sorted(indices) for epoch, indices in sorted(epochs.items())}


def test_two_processes(tmp_path: Path) -> None:
    """The ranks part the epoch; a run goes on in one process, and on two with another batch size."""
    torchrun(str(Path(__file__)), str(tmp_path), OMP_NUM_THREADS="1")
    source, data, resumed = zip(
        *(json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)), strict=True
    )
    for name, ranks in (("TrainerEpochs", source), ("_Loader", data)):
        assert epochs_of(ranks) == {0: list(range(48)), 1: list(range(48))}
        assert [rank["batches"] for rank in ranks] == [6, 6]
        assert ranks[0]["weight"] == ranks[1]["weight"]
        assert ranks[0]["samplers"] == [name, "DistributedSampler"]  # Lightning's own, for real data only
        assert [rank["validated"] for rank in ranks] == [[0, 4] * 2, [1, 5] * 2]
    assert data[0]["estimated"] == 12
    assert epochs_of(resumed) == {1: list(range(16, 48))}

    framework = importlib.import_module("lightning.pytorch")
    model = type("Recorder", (Recording, framework.LightningModule), {})()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = framework.Trainer(accelerator="cpu", devices=1, max_epochs=2, **quiet)
    trainer.fit(model, module(batch_size=4), ckpt_path=str(tmp_path / "module" / "step=2.ckpt"))
    assert model.samples == [(0, index) for index in range(16, 48)] + [(1, index) for index in range(48)]


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
