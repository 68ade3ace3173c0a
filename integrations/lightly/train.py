"""lightly's methods on generated views, then lightly's kNN and linear classifiers on real images.

The modules, in :mod:`~mlviews.integrations.lightly.methods`, are written as lightly's own examples are. What
is new is in :func:`main`: ``Trainer.fit`` gets its batches from an :class:`~mlviews.MLViewSource`, in the
place of dataset, transform and data loader.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlviews import MLViewSource, list_presets
from mlviews.checks import integer
from mlviews.evaluation.data import Labelled, real_images
from mlviews.evaluation.learner import Encoder
from mlviews.evaluation.readout import embed
from mlviews.runs.files import whole
from mlviews.runs.records import environment

try:
    import pytorch_lightning as pl
    from lightly.utils.benchmarking import KNNClassifier, LinearClassifier, MetricCallback

    from mlviews.integrations.lightly.methods import METHODS
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"This example needs {error.name}: pip install 'mlviews[lightly]'.", name=error.name
    ) from None

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
"""Options of Trainer that switch off what an example does not need."""


def evaluate(
    backbone: nn.Module, fit: Labelled, test: Labelled, epochs: int = 90, seed: int = 0
) -> dict[str, float]:
    """Return the top-1 of lightly's kNN (k = 20) and of its linear classifier, in percent.

    The backbone is frozen and the images are not augmented, so that features are computed once: lightly's
    classifiers get an identity for the model. The linear classifier is trained as long as in lightly's
    benchmarks, and scored after its last epoch. It gets standardized features: its fixed learning rate would
    otherwise reward a backbone for the mere scale of its features.

    Args:
        backbone: a network from images to features.
        fit: labelled real images for the classifiers.
        test: labelled real images to score them on.
        epochs: epochs of the linear classifier.
        seed: seed of the linear classifier.
    """
    pl.seed_everything(seed, verbose=False)
    metrics = MetricCallback()
    quiet = {
        **QUIET,
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": [metrics],
        "enable_progress_bar": False,
    }
    backbone.eval()
    fit_features, test_features = embed(backbone, fit.images), embed(backbone, test.images)

    train, validation = TensorDataset(fit_features, fit.labels), TensorDataset(test_features, test.labels)
    loader_numbers: dict[str, Any] = {"train_dataloader_idx": 0, "val_dataloader_idx": 1}
    knn = KNNClassifier(nn.Identity(), 10, knn_k=20, knn_t=0.1, **loader_numbers, topk=(1,))
    pl.Trainer(**quiet).validate(knn, [DataLoader(train, 256), DataLoader(validation, 256)], verbose=False)

    mean, std = fit_features.mean(0), fit_features.std(0) + 1e-6
    train = TensorDataset((fit_features - mean) / std, fit.labels)
    validation = TensorDataset((test_features - mean) / std, test.labels)
    sizes: dict[str, Any] = {"batch_size_per_device": 256, "feature_dim": Encoder.features, "num_classes": 10}
    linear = LinearClassifier(nn.Identity(), **sizes, topk=(1,))
    trainer = pl.Trainer(
        **quiet, max_epochs=epochs, check_val_every_n_epoch=epochs, num_sanity_val_steps=0
    )  # validates once, at the end
    trainer.fit(linear, DataLoader(train, 256, shuffle=True), DataLoader(validation, 256))
    return {
        "knn": 100 * metrics.val_metrics["val_knn_top1/dataloader_idx_1"][-1],
        "linear": 100 * metrics.val_metrics["val_top1"][-1],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options.

    Raises:
        ValueError: for a bad value.
    """
    parser = argparse.ArgumentParser(
        description="Train by lightly on generated views, test on real images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    presets = ", ".join(list_presets())
    rates = ", ".join(f"{name} {method.rate}" for name, method in METHODS.items())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = "folder with Fashion-MNIST's four idx files; without one, the slice that comes with the package"
    add = parser.add_argument
    add("--method", choices=METHODS, default="simclr", help="what to train")
    add("--preset", default="fashion-ml-random", help=f"one of {presets}; or a YAML file with the same keys")
    add("--epochs", type=int, default=4, help="of num-samples new samples each")
    add("--num-samples", type=int, default=12_800, help="pairs of an epoch")
    add("--batch-size", type=int, default=128, help="pairs of a step")
    add("--lr", type=float, help=f"peak learning rate of AdamW; None: the method's own ({rates})")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default=device,
        help="where views are made and the backbone is trained",
    )
    add("--data", type=Path, help=data)
    add("--labels", type=int, default=10_000, help="most labelled real images to fit the classifiers on")
    add("--probe-epochs", type=int, default=90, help="of the linear classifier")
    add(
        "--out",
        type=Path,
        default=Path("runs/lightly"),
        help="folder for the record and the backbone's weights",
    )
    args = parser.parse_args(arguments)
    if args.lr is None:
        args.lr = METHODS[args.method].rate
    for name in ("epochs", "labels", "probe_epochs"):
        integer(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, print a table, write a record, and return it.

    Raises:
        ValueError: for a bad value.
        FileNotFoundError: if a file of the preset or of the real images is missing.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)  # an impossible folder is an error now, not after training
    method = METHODS[args.method]
    source = MLViewSource.from_config(
        args.preset,
        layout="lightly",
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        **method.views,
    )
    fit, test = real_images(args.data, args.labels)

    begin = time.perf_counter()
    pl.seed_everything(args.seed, verbose=False)
    steps = args.epochs * len(source)
    model = method(steps, source.generator.num_classes, args.lr)
    untrained = copy.deepcopy(model.backbone)
    metrics = MetricCallback()
    trainer = pl.Trainer(
        **QUIET, accelerator=args.device, devices=1, max_epochs=args.epochs, callbacks=[metrics]
    )
    trainer.fit(model, source)
    training_seconds = time.perf_counter() - begin

    scores = {
        "untrained": evaluate(untrained, fit, test, args.probe_epochs, args.seed),
        "trained": evaluate(model.backbone, fit, test, args.probe_epochs, args.seed),
    }
    console = Console()
    console.print(score_table(args.method, scores))
    novelty = "" if source.repeats else ", none seen twice"
    views = f"{source.num_views * steps * args.batch_size:,} views{novelty}"
    console.print(f"{trainer.global_step} steps on {views}: {training_seconds:.0f} s.")

    figures = {
        "probe_images": len(fit.labels),
        "test_images": len(test.labels),
        "probe_epochs": args.probe_epochs,
        "scores": {name: rounded(score, 2) for name, score in scores.items()},
        "metrics_of_each_epoch": {
            name: [round(value, 4) for value in values] for name, values in metrics.train_metrics.items()
        },
        "seconds": rounded({"training": training_seconds, "all": time.perf_counter() - begin}, 1),
        "backbone_parameters": sum(parameter.numel() for parameter in untrained.parameters()),
    }
    record = {**provenance(arguments, args, steps), **figures, **versions(source.device)}
    for path in save(args.out, args.method, record, model.backbone):
        console.print(path)
    return record


def score_table(method: str, scores: dict[str, dict[str, float]]) -> Table:
    """Return the scores as a table for the terminal."""
    table = Table("backbone", "kNN", "linear", title=f"{method}: top-1 on real Fashion-MNIST test images, %")
    for name, score in scores.items():
        table.add_row(name, f"{score['knn']:.1f}", f"{score['linear']:.1f}")
    return table


def rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    """Return the values, rounded."""
    return {name: round(value, digits) for name, value in values.items()}


def provenance(arguments: Sequence[str], args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Return what a record says about its command."""
    names = ("method", "epochs", "num_samples", "batch_size", "lr", "seed")
    return {
        "command": " ".join(["python -m mlviews.integrations.lightly.train", *arguments]),
        "preset": args.preset,
        "training": {name: getattr(args, name) for name in names} | {"steps": steps},
    }


def versions(device: torch.device) -> dict[str, Any]:
    """Return what a record says about the machine and the versions, lightly's included."""
    facts = environment(device)
    packages = {name: version(name) for name in ("lightly", "pytorch_lightning")}
    return {**facts, "versions": facts["versions"] | packages}


def save(folder: Path, method: str, record: dict[str, Any], backbone: nn.Module) -> list[Path]:
    """Write the record and the backbone's weights, each whole or not at all; return their paths."""
    figures, weights = folder / f"lightly-{method}.json", folder / f"lightly-{method}.pt"
    with whole(weights) as part:
        torch.save(backbone.state_dict(), part)
    with whole(figures) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    return [figures, weights]


if __name__ == "__main__":
    # The classifiers' trainers announce themselves too.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
