"""The launcher for solo-learn.

What needs solo-learn itself runs where SOLO_LEARN names a checkout of its main branch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from omegaconf import DictConfig, OmegaConf

from mlviews import list_presets, perturb, transforms, wrap_generator
from mlviews.integrations.solo_learn import __main__ as launcher
from mlviews.integrations.solo_learn.views import Views, augmentation, check_format

CONFIGS = Path(launcher.__file__).parent / "configs"
PIPELINE = {
    "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 0.9},
    "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1},
    "grayscale": {"prob": 0.25},
    "gaussian_blur": {"prob": 0.5},
    "solarization": {"prob": 0.125},
    "equalization": {"prob": 0.75},
    "horizontal_flip": {"prob": 0.5},
    "crop_size": 28,
    "num_crops": 2,
}


def configuration(**changes: Any) -> DictConfig:
    """A user's configuration, after Hydra; ``a__b=1`` sets ``a.b``."""
    content = OmegaConf.create(
        {
            "method": "simclr",
            "seed": 7,
            "accelerator": "cpu",
            "data": {
                "dataset": "custom",
                "format": "mlvgm",
                "mlvgm": {"preset": "fashion-ml-random", "num_samples": 32},
            },
            "augmentations": [PIPELINE],
            "optimizer": {"batch_size": 8},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(content, key.replace("__", "."), value, force_add=True, merge=False)
    return content


def multi_crop(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{**PIPELINE, "crop_size": size, "num_crops": count} for size, count in sizes]


# -- without solo-learn --------------------------------------------------------------------------------------


def test_a_pipeline_is_read_as_solo_learn_reads_it() -> None:
    assert augmentation(OmegaConf.create(PIPELINE)) == transforms.Augmentation(
        size=28,
        scale=(0.08, 0.9),
        flip=0.5,
        jitter=(0.4, 0.3, 0.2, 0.1),
        jitter_p=0.8,
        grayscale=0.25,
        blur=0.5,
        solarize=0.125,
        equalize=0.75,
    )
    plain = {**PIPELINE, "rrc": {"enabled": False}, "color_jitter": {"prob": 0}, "mean": [0.5], "std": [0.25]}
    actual = augmentation(OmegaConf.create(plain))
    assert (actual.scale, actual.jitter, actual.normalize) == (None, (0.0, 0.0, 0.0, 0.0), ((0.5,), (0.25,)))
    with pytest.raises(ValueError, match=r"lacks grayscale\.prob"):
        augmentation(OmegaConf.create({**PIPELINE, "grayscale": {}}))


@pytest.mark.parametrize("size", [28, [28, 28], [28]])
def test_a_crop_size_is_read_as_torchvision_reads_it(size: object) -> None:
    pipeline = OmegaConf.create({**PIPELINE, "crop_size": size})
    assert augmentation(pipeline).size == 28


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([224, 112], r"Invalid crop_size=\[224, 112\] of a pipeline of augmentations: crops are square"),
        ([], r"Invalid crop_size=\[\]"),
        ([28, 28, 28], r"Invalid crop_size=\[28, 28, 28\]"),
        ("28", "Invalid crop_size='28': it must be an integer"),
        (["a", "a"], "Invalid crop_size='a'"),
        (28.5, "Invalid crop_size=28.5"),
        (True, "Invalid crop_size=True"),
    ],
)
def test_a_crop_size_is_named_as_the_user_wrote_it(size: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(configuration(augmentations=[{**PIPELINE, "crop_size": size}]))


def test_two_crops_are_an_anchor_and_a_positive() -> None:
    indexes, crops, targets = next(iter(Views(configuration()).source(8)))
    assert indexes.tolist() == list(range(8))
    assert [tuple(crop.shape) for crop in crops] == [(8, 3, 28, 28)] * 2
    assert targets.tolist() == [-1] * 8


def test_multi_crop() -> None:
    source = Views(configuration(augmentations=multi_crop((28, 2), (12, 3)))).source(8)
    assert source.crops == (0, 1, 0, 1, 0)
    assert source.num_views == 2
    assert [crop.shape[-1] for crop in next(iter(source))[1]] == [28, 28, 12, 12, 12]
    assert Views(configuration(method="wmse", augmentations=multi_crop((28, 4)))).source(8).num_views == 4
    with pytest.raises(ValueError, match="small crop before a large one"):
        Views(configuration(augmentations=multi_crop((28, 1), (12, 2), (28, 1))))


def test_the_transform_may_be_given_and_the_presets_is_not_taken() -> None:
    custom = Views(
        configuration(data__mlvgm__transform={"name": "simclr", "size": 20, "color": False})
    ).source(8)
    assert custom.transforms == [transforms.simclr(20, color=False)] * 2
    assert Views(configuration()).source(8).transforms == [augmentation(OmegaConf.create(PIPELINE))] * 2


def test_seed_and_levels_are_what_the_run_will_be_known_by() -> None:
    views = Views(configuration(data__mlvgm__perturb={0: "resample"}))
    assert views.config == {
        "preset": "fashion-ml-random",
        "num_samples": 32,
        "perturb": {"0": "resample"},
        "seed": 7,
    }
    assert [
        (assignment.levels, type(assignment.perturber)) for assignment in views.source(8).assignments
    ] == [((0,), perturb.Resample)]
    assert Views(configuration(data__mlvgm__seed=1)).source(8).seed == 1


def test_classes_of_views_without_labels_are_those_of_validation() -> None:
    assert [Views(configuration()).num_classes(count) for count in (0, 3, 10)] == [5, 5, 10]


def test_labels_of_a_class_conditional_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    conditional = wrap_generator(
        lambda z, labels: z[0].view(-1, 1, 2, 2).sigmoid(),
        levels=[("z", (4,))],
        image_shape=(1, 2, 2),
        num_classes=12,
    )
    monkeypatch.setattr("mlviews.config.load_generator", lambda **_: conditional)
    custom = {"data__mlvgm": {"generator": "mine", "num_samples": 32}}
    labelled = Views(configuration(method="supcon", **custom))
    targets = next(iter(labelled.source(8)))[2]
    assert (labelled.num_classes(3), int(targets.min()) >= 0, targets.unique().numel() > 1) == (
        12,
        True,
        True,
    )
    unlabelled = Views(configuration(data__no_labels=True, **custom))
    assert (unlabelled.num_classes(3), next(iter(unlabelled.source(8)))[2].tolist()) == (5, [-1] * 8)


def test_a_pool_has_the_length_that_memories_need() -> None:
    source = Views(configuration(method="deepclusterv2", data__mlvgm__pool=True)).source(8)
    assert source.pool
    assert len(source.dataset) == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__dataset": "imagenet"}, r"Invalid data\.dataset='imagenet'"),
        ({"data__mlvgm": None}, r"Invalid data\.mlvgm=None"),
        (
            {"data__mlvgm__batch_size": 8},
            r"data\.mlvgm\.batch_size under solo-learn: set optimizer\.batch_size",
        ),
        ({"data__mlvgm__layout": "pair"}, r"data\.mlvgm\.layout under solo-learn"),
        ({"data__mlvgm__persets": 1}, r"Unknown key 'persets'"),
        ({"data__mlvgm__preset": "fashoin-none"}, r"Unknown preset 'fashoin-none'"),
        ({"data__fraction": 0.1}, r"Invalid data\.fraction=0\.1"),
        ({"method": "mae"}, "Invalid method='mae'"),
        ({"method": "deepclusterv2"}, r"add \+\+data\.mlvgm\.pool=true"),
        ({"method": "supcon"}, "these views have no labels"),
        ({"knn_eval__enabled": True}, r"Invalid knn_eval\.enabled=True"),
    ],
)
def test_what_cannot_work_says_so_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(configuration(**changes))


def test_unknown_formats() -> None:
    with pytest.raises(ValueError, match=r"Invalid data\.format='mlvgn': use"):
        check_format("mlvgn")


@pytest.mark.parametrize(
    "arguments", [[], ["--config-name", "x"], ["--image-size", "big", "main.py"], ["nowhere.py"]]
)
def test_bad_calls_of_the_launcher(arguments: list[str], tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", launcher.__name__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert completed.returncode == 2
    assert completed.stderr.startswith("mlviews: ")
    assert "Traceback" not in completed.stderr


def test_the_ready_configurations_are_whole() -> None:
    actual = sorted(f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml"))
    pretraining = [
        f"{name}/{method}"
        for name in ("bigbigan", "cars", "fashion")
        for method in ("base", "byol", "simclr", "simsiam")
    ]
    assert actual == sorted([*pretraining, "bigbigan/linear", "cars/linear"])
    for path in CONFIGS.glob("*/*.yaml"):
        if path.stem not in ("base", "linear"):
            base, custom = OmegaConf.load(path.with_name("base.yaml")), OmegaConf.load(path)
            content = OmegaConf.merge({**base, "defaults": []}, {**custom, "defaults": []})
            assert content.method == path.stem
            assert augmentation(content.augmentations[0]).size == (
                28 if path.parent.name == "fashion" else 112
            )
            assert content.data.mlvgm.preset in list_presets()
            assert (
                content.optimizer.batch_size * len(content.devices)
                == {"bigbigan": 1024, "cars": 512, "fashion": 64}[path.parent.name]
            )


# -- with solo-learn -----------------------------------------------------------------------------------------

CHECKOUT = os.environ.get("SOLO_LEARN")
needs_solo_learn = pytest.mark.skipif(
    CHECKOUT is None,
    reason="solo-learn's main branch installs from no registry: set SOLO_LEARN to a checkout",
)
WATCH = """
import json, os
from mlviews import MLViewSource
original = MLViewSource.batch
def batch(self, start, stop):
    out = original(self, start, stop)
    with open(f"seen-{os.environ.get('LOCAL_RANK', '0')}.jsonl", "a") as file:
        total = float(out.views[0].double().sum())
        file.write(json.dumps([self.epoch, out.indices.tolist(), total]) + chr(10))
    return out
MLViewSource.batch = batch
script = os.environ["SOLO_LEARN"] + "/main_pretrain.py"
exec(compile(open(script).read(), script, "exec"))
"""
READY = ["--config-path", "pkg://mlviews.integrations.solo_learn.configs.fashion", "--config-name"]
SMALL = [
    "checkpoint.dir=models", "data.mlvgm.num_samples=32",
    "optimizer.batch_size=8", "max_epochs=3", "scheduler.warmup_epochs=1",
    "++log_every_n_steps=1", "++enable_progress_bar=false",
    "++num_sanity_val_steps=0",
]  # fmt: skip


def command(name: str, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mlviews.integrations.solo_learn",
        "watch.py",
        *READY,
        name,
        *SMALL,
        *overrides,
    ]


def start(folder: Path, name: str, *overrides: str, ok: bool = True) -> str:
    """Run the script in a folder with the ready configuration of this name; what it printed."""
    folder.mkdir(exist_ok=True)
    (folder / "watch.py").write_text(WATCH)
    completed = subprocess.run(
        command(name, *overrides),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment(),
    )
    assert (completed.returncode == 0) is ok, completed.stderr[-4000:]
    return completed.stdout + completed.stderr


def environment() -> dict[str, str]:
    path = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONWARNINGS": "ignore"}


def seen(folder: Path, rank: int = 0) -> list[Any]:
    return [json.loads(line) for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines()]


def logged(folder: Path) -> dict[str, list[float]]:
    lines = [
        line.split(",")
        for path in folder.glob("lightning_logs/*/metrics.csv")
        for line in path.read_text().splitlines()
    ]
    values: dict[str, list[float]] = {}
    for row in lines[1:]:
        for key, value in zip(lines[0], row, strict=True):
            if value and key != lines[0]:
                values.setdefault(key, []).append(float(value))
    return values


def final(folder: Path) -> dict[str, Any]:
    actual: dict[str, Any] = torch.load(next(folder.glob("models/*/*/*ep=2.ckpt")))
    return actual


HEAD = {"proj_hidden_dim": 64, "proj_output_dim": 32}
PREDICTOR, QUEUE, TEMPERATURE = {"pred_hidden_dim": 64}, {"queue_size": 64}, {"temperature": 0.2}
MOMENTUM = {"base_tau": 0.99, "final_tau": 1.0, "classifier": True}
OTHERS: dict[str, dict[str, Any]] = {  # methods: their method_kwargs, small
    "all4one": HEAD | PREDICTOR | QUEUE | TEMPERATURE,
    "barlow_twins": HEAD | {"lamb": 0.005, "scale_loss": 0.1},
    "deepclusterv2": HEAD | TEMPERATURE | {"num_prototypes": [4, 4], "kmeans_iters": 2},
    "dino": HEAD | {"num_prototypes": 64},
    "mocov2plus": HEAD | QUEUE | TEMPERATURE,
    "mocov3": HEAD | PREDICTOR | TEMPERATURE,
    "nnbyol": HEAD | PREDICTOR | QUEUE,
    "nnclr": HEAD | PREDICTOR | QUEUE | TEMPERATURE,
    "nnsiam": HEAD | PREDICTOR | QUEUE,
    "ressl": HEAD | QUEUE | {"temperature_q": 0.1, "temperature_k": 0.04},
    "swav": HEAD
    | QUEUE
    | TEMPERATURE
    | {"num_prototypes": 16, "epoch_queue_starts": 1, "freeze_prototypes_epochs": 1},
    "vibcreg": HEAD
    | {"sim_loss_weight": 25, "var_loss_weight": 25, "cov_loss_weight": 200, "iternorm": False},
    "vicreg": HEAD | {"sim_loss_weight": 25, "var_loss_weight": 25, "cov_loss_weight": 1},
    "wmse": HEAD | {"proj_output_dim": 4, "whitening_iters": 1, "whitening_size": 8, "whitening_eps": 0.0},
}


def other(method: str) -> list[str]:
    """Overrides that make another method of the ready configuration of SimCLR."""
    pool = ["++data.mlvgm.pool=true"] if method == "deepclusterv2" else []
    options = {f"method_kwargs.{key}": value for key, value in OTHERS[method].items()} | {
        f"momentum.{k}": v for k, v in MOMENTUM.items()
    }
    return [
        f"method={method}",
        f"name={method}",
        *(f"++{key}={json.dumps(value)}" for key, value in options.items()),
        *pool,
    ]


@needs_solo_learn
@pytest.mark.parametrize("method", ["simclr", "simsiam", "byol", *OTHERS])
def test_methods(method: str, tmp_path: Path) -> None:
    if method in OTHERS:
        start(tmp_path, "simclr", *other(method))
    else:
        start(tmp_path, method)
    assert [(epoch, len(indexes)) for epoch, indexes, _ in seen(tmp_path)] == [
        (epoch, 8) for epoch in range(3) for _ in range(4)
    ]
    values = logged(tmp_path)
    losses = [key for key in values if "loss" in key or "sim" in key]
    assert losses
    assert all(math.isfinite(value) for column in values.values() for value in column)
    assert final(tmp_path)["global_step"] == 12


@needs_solo_learn
def test_multi_crop_trains(tmp_path: Path) -> None:
    crops = json.dumps(multi_crop((28, 2), (16, 2))).replace('"', "")
    start(tmp_path, "simclr", *other("swav"), f"augmentations={crops}")
    assert all(math.isfinite(value) for column in logged(tmp_path).values() for value in column)


@needs_solo_learn
@pytest.mark.parametrize("method", ["simclr", "simsiam"])
def test_kill_and_auto_resume(method: str, tmp_path: Path) -> None:
    """The same batches, learning rates and weights as a run that was left alone."""
    start(tmp_path / "whole", method)
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "watch.py").write_text(WATCH)
    process = subprocess.Popen(
        command(method), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(folder.glob("models/*/*/*ep=0.ckpt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (checkpoint,) = folder.glob("models/*/*/*.ckpt")
    epoch = int(checkpoint.stem[-1])
    assert epoch < 2
    (folder / "seen-0.jsonl").unlink()
    output = start(folder, method)
    assert "Resuming from previous checkpoint" in output
    assert seen(folder) == [row for row in seen(tmp_path / "whole") if row[0] > epoch]
    whole, resumed = final(tmp_path / "whole"), final(folder)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    rates = [
        [group["lr"] for state in content["optimizer_states"] for group in state["param_groups"]]
        for content in (whole, resumed)
    ]
    assert rates[0] == rates[1]
    # A run on other views does not take this one's checkpoint.
    assert "Resuming" not in start(folder, method, "data.mlvgm.preset=fashion-none")


@needs_solo_learn
@pytest.mark.parametrize("launch", ["ddp", "torchrun"])
def test_two_processes(launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["strategy=ddp", "devices='2'", "optimizer.batch_size=4"]
    if launch == "ddp":
        start(tmp_path, "simclr", *two)
    else:
        (tmp_path / "watch.py").write_text(WATCH)
        monkeypatch.chdir(tmp_path)
        for name, value in environment().items():
            monkeypatch.setenv(name, value)
        torchrun("-m", "mlviews.integrations.solo_learn", "watch.py", *READY, "simclr", *SMALL, *two)
    start(tmp_path / "one", "simclr")
    ranks, single = [seen(tmp_path, rank) for rank in range(2)], seen(tmp_path / "one")
    assert [len(rank) for rank in ranks] == [12, 12]
    for epoch in range(3):
        parts = [{index for row in rank if row[0] == epoch for index in row[1]} for rank in ranks]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == set(range(32))
    for step in range(12):  # the two ranks' halves are the batch of one process
        assert ranks[0][step][2] + ranks[1][step][2] == pytest.approx(single[step][2], rel=1e-5)
    assert final(tmp_path)["global_step"] == 12


@needs_solo_learn
def test_validation_on_real_images(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in "abcdef":
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("L", (32, 32), 40 * index).save(tmp_path / split / name / f"{index}.png")
    output = start(tmp_path, "simclr", f"data.val_path={tmp_path / 'val'}", "data.num_workers=0")
    assert "the views have no labels" in output
    assert len(logged(tmp_path)["val_loss"]) == 3
    assert final(tmp_path)["state_dict"]["classifier.weight"].shape[0] == 6


@needs_solo_learn
def test_linear_evaluation_takes_the_checkpoint(tmp_path: Path) -> None:
    test_validation_on_real_images(tmp_path)
    checkpoint = next(tmp_path.glob("models/*/*/*ep=2.ckpt"))
    options = {
        "data.dataset": "custom",
        "data.train_path": tmp_path / "train",
        "data.val_path": tmp_path / "val",
        "data.format": "image_folder",
        "data.num_workers": 0,
        "pretrained_feature_extractor": f'"{checkpoint}"',  # it has an equals sign
        "max_epochs": 1,
        "devices": "'1'",
        "accelerator": "cpu",
        "strategy": "auto",
        "precision": 32,
        "sync_batchnorm": False,
        "wandb.enabled": False,
        "optimizer.batch_size": 4,
        "checkpoint.enabled": False,
        "auto_resume.enabled": False,
    }
    configs = ["--config-path", f"{CHECKOUT}/scripts/linear/imagenet-100", "--config-name", "simclr"]
    launch = [
        sys.executable,
        "-m",
        "mlviews.integrations.solo_learn",
        "--image-size",
        "28",
        f"{CHECKOUT}/main_linear.py",
    ]
    overrides = [f"{key}={value}" for key, value in options.items()]
    completed = subprocess.run(
        [*launch, *configs, *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert completed.returncode == 0, completed.stderr[-4000:]


@needs_solo_learn
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.format=mlvgn"], "Invalid data.format='mlvgn'"),
        (["data.format=image_folder"], "data.mlvgm is given, but data.format is 'image_folder'"),
        (["method=mae"], "Invalid method='mae'"),
    ],
)
def test_errors_under_the_launcher(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in start(tmp_path, "simclr", *arguments, ok=False)
    shutil.rmtree(tmp_path)
