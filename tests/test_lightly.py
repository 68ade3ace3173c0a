"""The source as lightly's data loader: the example, its page, and what both promise."""

from __future__ import annotations

import json
import logging
import math
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mlviews
from mlviews import MLVGM, MLViewSource, transforms, wrap_generator
from mlviews.evaluation import data
from mlviews.evaluation.data import Labelled, bundled_slice
from mlviews.evaluation.learner import METHODS as PROBED
from mlviews.evaluation.learner import Encoder, initial

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("lightly")

from mlviews.integrations.lightly import methods, train  # noqa: E402 (they import both)
from mlviews.integrations.lightly.methods import METHODS  # noqa: E402

ROOT = Path(__file__).parents[1]
QUIET: dict[str, Any] = {**train.QUIET, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def views(fashion: MLVGM, **options: Any) -> MLViewSource:
    small = {
        "perturb": mlviews.perturb.Resample(),
        "transform": transforms.gray(16),
        "batch_size": 8,
        "num_samples": 24,
    }
    return MLViewSource(fashion, layout="lightly", **{**small, **options})


def images(count: int) -> tuple[Labelled, Labelled]:
    return tuple(Labelled(part.images[:count], part.labels[:count]) for part in bundled_slice())  # type: ignore[return-value]


class Recorder(pl.Callback):  # type: ignore[misc, name-defined]
    """Remembers each epoch's batches, and the weights before the first step."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[Any]] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.start = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).append(batch)


@pytest.mark.parametrize("method", METHODS)
def test_the_example_runs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "bundled_slice", lambda: images(200))
    options = [
        "--epochs",
        "2",
        "--num-samples",
        "24",
        "--batch-size",
        "8",
        "--probe-epochs",
        "2",
        "--labels",
        "100",
    ]
    record = train.main(["--method", method, *options, "--out", str(tmp_path)])
    assert record == json.loads((tmp_path / f"lightly-{method}.json").read_text())
    assert record["training"]["steps"] == 6
    assert record["training"]["lr"] == METHODS[method].rate
    assert (record["probe_images"], record["test_images"]) == (100, 200)
    for values in record["metrics_of_each_epoch"].values():
        assert len(values) == 2
        assert all(map(math.isfinite, values))
    assert min(record["metrics_of_each_epoch"]["z_std"]) > 0.01, "not collapsed"
    assert all(10 < top1 <= 100 for score in record["scores"].values() for top1 in score.values())
    encoder = Encoder()
    encoder.load_state_dict(torch.load(tmp_path / f"lightly-{method}.pt", weights_only=True))
    assert train.evaluate(
        encoder, Labelled(*(part[:100] for part in images(200)[0])), images(200)[1], 2
    ) == pytest.approx(record["scores"]["trained"], abs=0.01)


@pytest.mark.parametrize("broken", ["lightly-simclr.json", "lightly-simclr.pt"])
def test_a_record_that_cannot_be_written_leaves_the_one_before(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.save(tmp_path, "simclr", {"seed": 0}, nn.Linear(2, 2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(part: Any, *_: object) -> None:
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if broken.endswith("json"):
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(torch, "save", lambda state, part: fail(part))
    with pytest.raises(OSError, match="No space left"):
        train.save(tmp_path, "simclr", {"seed": 1}, nn.Linear(2, 2))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[broken] == before[broken]


@pytest.mark.parametrize("method", METHODS)
def test_every_epoch_has_each_sample_once_and_none_of_another(method: str, fashion: MLVGM) -> None:
    source, seen = views(fashion, **METHODS[method].views), Recorder()
    model = METHODS[method](2 * len(source))
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[seen])
    trainer.fit(model, source)
    assert len(source) == 3
    assert trainer.global_step == 6
    sides = 2 * [16] if METHODS[method].views is methods.PAIR else 2 * [28] + 4 * [16]
    seen_images = []
    for batches in (seen.epochs[0], seen.epochs[1]):
        assert [name for batch in batches for name in batch[2]] == [f"{index:010d}" for index in range(24)]
        for x, targets, _ in batches:
            assert [(view.shape, view.dtype) for view in x] == [
                ((8, 3, side, side), torch.float32) for side in sides
            ]
            assert targets.tolist() == 8 * [-1]
        seen_images += [image for batch in batches for view in batch[0] for image in view]
    assert len(seen_images) == 48 * len(sides)
    assert len({image.numpy().tobytes() for image in seen_images}) == 48 * len(sides), "no view comes twice"
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, seen.start[name])}
    assert moved >= {name for name, _ in model.named_parameters() if name.endswith(("weight", "weight_v"))}, (
        "every weight is trained, or follows"
    )


@pytest.mark.parametrize("method", PROBED)
def test_the_loss_is_that_of_the_probe(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same method in plain torch, with the same weights; batch norms fixed, as the two differ in what
    they run at once.
    """
    plain, model = initial(method, 0.2, 0).eval(), METHODS[method](steps=10).eval()
    pairs = [("encoder", "backbone"), ("head", "projection_head"), ("predictor", "prediction_head")]
    for plain_name, model_name in pairs[: 2 if method == "simclr" else 3]:
        getattr(model, model_name).load_state_dict(getattr(plain, plain_name).state_dict())
    if method == "byol":
        model.backbone_momentum.load_state_dict(plain.target[0].state_dict())
        model.projection_head_momentum.load_state_dict(plain.target[1].state_dict())
    monkeypatch.setattr(type(model), "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(type(model), "global_step", 0)
    x = [torch.rand(8, 3, 28, 28, generator=torch.Generator().manual_seed(view)) for view in range(2)]
    loss, expected = model.training_step((x, torch.full((8,), -1), []), 0), plain(*x)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(
        model.backbone.body[0].weight.grad, plain.encoder.body[0].weight.grad, atol=1e-5, rtol=1e-3
    )


def test_byols_target_follows_by_the_momentum() -> None:
    model = methods.BYOL(steps=2)
    online, target = model.backbone.body[0].weight, model.backbone_momentum.body[0].weight
    assert torch.equal(online, target)
    assert not target.requires_grad
    with torch.no_grad():
        online += 1
    x = torch.rand(8, 3, 28, 28)
    model.log_dict = lambda *_, **__: None
    model.training_step(([x, x], torch.full((8,), -1), []), 0)
    assert torch.allclose(online - target, torch.full_like(online, 0.9), atol=1e-5)


def test_small_crops_come_from_further_positives(fashion: MLVGM) -> None:
    """Crops of the anchor, of its first positive, and of two more; raw here, to compare them."""
    raw = {**methods.MULTI_CROP, "transform": None}
    x = next(iter(views(fashion, **raw)))[0]
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[1], x[3])
    positives = [x[0], x[1], x[4], x[5]]
    assert all(not torch.equal(a, b) for i, a in enumerate(positives) for b in positives[:i])


def test_dinos_teacher_sees_large_crops_and_follows(fashion: MLVGM) -> None:
    model, source = methods.DINO(steps=2), views(fashion, **methods.MULTI_CROP)
    model.log_dict = lambda *_, **__: None
    pairs = [(model.backbone, model.teacher_backbone), (model.student_head, model.teacher_head)]
    for student, teacher in pairs:
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        for ours, theirs in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
    student, teacher = model.backbone.body[0].weight, model.teacher_backbone.body[0].weight
    with torch.no_grad():
        student += 1
    sizes: list[tuple[int, ...]] = []
    model.teacher_backbone.register_forward_hook(lambda module, inputs, _: sizes.append(inputs[0].shape))
    batch = next(iter(source))
    model.training_step(batch, 0).backward()
    assert sizes == [(16, 3, 28, 28)]
    assert torch.allclose(student - teacher, torch.full_like(student, model.momentum), atol=1e-5)
    assert student.grad is not None
    assert teacher.grad is None


class Halt(pl.Callback):  # type: ignore[misc, name-defined]
    """Writes a checkpoint in the middle of the second epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("method", ["vicreg", "swav", "dino"])
def test_a_run_resumes_exactly(method: str, fashion: MLVGM, tmp_path: Path) -> None:
    def run(start: Path | None, *callbacks: Any) -> Any:
        torch.manual_seed(0)
        source = views(fashion, **METHODS[method].views)
        model = METHODS[method](2 * len(source))
        trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=list(callbacks))
        trainer.fit(model, source, ckpt_path=start)
        assert trainer.global_step == 6
        return model.state_dict()

    seen = Recorder()
    whole = run(None, Halt(tmp_path / "run.ckpt"))
    rest = run(tmp_path / "run.ckpt", seen)
    assert [batch[2][0] for batches in seen.epochs.values() for batch in batches] == [
        "0000000008",
        "0000000016",
    ]
    for name, value in whole.items():
        assert torch.equal(value, rest[name]), name


def test_the_online_classifier_learns_from_classes_alone() -> None:
    """A generator whose classes are the brightness; one without classes has nothing to tell, as the page
    says.
    """
    net = wrap_generator(
        lambda z, labels: (labels.view(-1, 1, 1, 1) / 10 + 0.05 * z[0].sigmoid().view(-1, 1, 1, 1)).expand(
            -1, 1, 16, 16
        ),
        levels=[("z", (1,))],
        image_shape=(1, 16, 16),
        num_classes=10,
    )
    options: dict[str, Any] = {
        "perturb": mlviews.perturb.Resample(),
        "transform": transforms.gray(16),
        "layout": "lightly",
    }
    source = MLViewSource(net, batch_size=32, num_samples=640, **options)
    model = methods.SimCLR(3 * len(source), source.generator.num_classes, lr=1e-2)
    metrics = train.MetricCallback()
    pl.Trainer(**QUIET, max_epochs=3, callbacks=[metrics]).fit(model, source)
    assert metrics.train_metrics["train_online_cls_top1"][-1] > 0.3
    plain = methods.OnlineLinearClassifier(4, 10, topk=(1,))
    with pytest.raises(IndexError, match="-1 is out of bounds"):
        plain.training_step((torch.rand(2, 4), torch.full((2,), -1)), 0)
    assert methods.SimCLR(1).online_classifier is None


def test_views_of_several_sizes(fashion: MLVGM) -> None:
    source = views(
        fashion, num_views=3, transform=[transforms.gray(28), transforms.gray(28), transforms.gray(16)]
    )
    x, _, names = next(iter(source))
    assert [tuple(view.shape) for view in x] == [(8, 3, 28, 28), (8, 3, 28, 28), (8, 3, 16, 16)]
    assert len(names) == 8


def test_scores_do_not_depend_on_the_scale_of_the_features() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.encoder, self.factor = initial("simclr", 0.2, 0).encoder, factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.encoder(x)

    fit, test = images(400)
    full, small = (train.evaluate(Scaled(factor), fit, test, 5) for factor in (1.0, 0.1))
    assert full == pytest.approx(small, abs=1.0)
    assert full["linear"] > 50
    assert full["knn"] > 50


def test_both_sides_of_the_pages_diff_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module and trainer, on lightly's own data set and on the source."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform
    from torchvision.utils import save_image

    (diff,) = re.findall(
        r"```diff\n(.*?)```", (ROOT / "integrations" / "lightly" / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("path/to/images").mkdir(parents=True)
    for index in range(16):
        save_image(torch.rand(3, 28, 28), f"path/to/images/{index}.png")
    shorter = {
        "num_workers=8": "num_workers=0", "batch_size=256": "batch_size=8",
        'layout="lightly"': 'layout="lightly", num_samples=16',
        "max_epochs=10": "max_epochs=1, **quiet", "10 * len": "1 * len",
    }  # fmt: skip
    for long, short in shorter.items():
        assert long in diff
        diff = diff.replace(long, short)
    batches = []
    for sign in "-+":
        session = {
            "pl": pl,
            "mlviews": mlviews,
            "SimCLR": methods.SimCLR,
            "quiet": QUIET,
            "DataLoader": DataLoader,
        }
        session |= {"LightlyDataset": LightlyDataset, "SimCLRTransform": SimCLRTransform}
        exec("\n".join(line[2:] for line in diff.splitlines() if line[0] in (sign, " ")), session)
        assert session["trainer"].global_step == len(session["dataloader"]) == 2
        batches.append(next(iter(session["dataloader"])))
    for theirs, ours in zip(*batches, strict=True):
        assert len(theirs) == len(ours)
    assert [view.shape for view in batches[0][0]] == [view.shape for view in batches[1][0]]
    assert batches[0][1].dtype == batches[1][1].dtype
    assert all(isinstance(name, str) for batch in batches for name in batch[2])


WORKER = """
import json, os, sys
import pytorch_lightning as pl
import torch
import mlviews
from mlviews.integrations.lightly import train
from mlviews.integrations.lightly.methods import METHODS

names = []

class Names(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        names.append([trainer.current_epoch, *batch[2]])

results = {}
for method in sys.argv[2:]:
    names.clear()
    sizes = {"batch_size": 4, "num_samples": 24, **METHODS[method].views}
    source = mlviews.MLViewSource.from_config("fashion-ml-random", layout="lightly", **sizes)
    model = METHODS[method](2 * len(source))
    ranks = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "sync_batchnorm": False}
    trainer = pl.Trainer(**train.QUIET, **ranks, max_epochs=2, callbacks=[Names()], enable_progress_bar=False)
    trainer.fit(model, source)
    weight = model.backbone.body[0].weight.detach().double().sum().item()
    results[method] = {
        "names": list(names), "steps": trainer.global_step, "length": len(source), "weight": weight,
    }
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_epoch(tmp_path: Path) -> None:
    script, trained = tmp_path / "worker.py", ["simclr", "swav", "dino"]
    script.write_text(WORKER)
    torchrun(str(script), str(tmp_path), *trained, OMP_NUM_THREADS="1")
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for method in trained:
        ranks = [result[method] for result in results]
        assert [(rank["steps"], rank["length"]) for rank in ranks] == [(6, 3), (6, 3)]
        assert ranks[0]["weight"] == ranks[1]["weight"]
        for epoch in range(2):
            names = [
                name
                for rank in ranks
                for number, *epoch_names in rank["names"]
                if number == epoch
                for name in epoch_names
            ]
            assert sorted(names) == [f"{index:010d}" for index in range(24)]


def test_a_bad_value_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="Invalid --epochs=0: it must be an integer of at least 1"):
        train.main(["--epochs", "0", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "fashion-ml-randon", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "integrations" / "lightly" / "train.py"), run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: Unknown preset 'fashion-ml-randon'")
