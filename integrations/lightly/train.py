"""lightly's SimCLR, SimSiam and BYOL on generated views, then lightly's kNN and linear classifiers on real images.

The modules are written as lightly's own examples are; what is new is where ``Trainer.fit`` gets its batches: in :func:`main`,
from an :class:`~mlviews.MLViewSource` in the place of dataset, transform and data loader.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mlviews import MLViewSource, list_presets
from mlviews.checks import integer
from mlviews.config import load_config
from mlviews.evaluation.data import Labelled, bundled_slice, load_fashion_mnist
from mlviews.evaluation.probe import RATES, Encoder, embed
from mlviews.runs.records import environment

try:
    import pytorch_lightning as pl
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import (
        BYOLPredictionHead,
        BYOLProjectionHead,
        SimCLRProjectionHead,
        SimSiamPredictionHead,
        SimSiamProjectionHead,
    )
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.benchmarking import (
        KNNClassifier,
        LinearClassifier,
        MetricCallback,
        OnlineLinearClassifier,
    )
    from lightly.utils.debug import std_of_l2_normalized
    from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"This example needs {error.name}: pip install 'mlviews[lightly]'.", name=error.name) from None

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}  # what an example does not need


class Method(pl.LightningModule):
    """What the three methods share: backbone, optimiser, and what is logged.

    Args:
        steps: of the whole run, for the schedules. lightly's benchmarks ask ``trainer.estimated_stepping_batches`` for it; with that,
            Lightning would drop the source's place in a checkpoint.
        num_classes: of a class-conditional generator, for lightly's online classifier. Others have none, their targets are all -1.
        lr: peak learning rate of AdamW.
    """

    def __init__(self, steps: int, num_classes: int = 0, lr: float = 1.5e-3) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.backbone = Encoder()  # images [B, 3, 28, 28] -> features [B, 512]
        self.online_classifier = OnlineLinearClassifier(Encoder.features, num_classes, topk=(1,)) if num_classes else None

    def finish(self, loss: Tensor, features: Tensor, z: Tensor, targets: Tensor) -> Tensor:
        """Log, and add the online classifier's loss where there are classes; it sends no gradient into the backbone."""
        log = {"train_loss": loss, "z_std": std_of_l2_normalized(z)}  # z_std: 0 if collapsed, at best 1 / sqrt(z's size)
        if self.online_classifier is not None:
            online_loss, online_log = self.online_classifier.training_step((features.detach(), targets), 0)
            loss, log = loss + online_loss, log | online_log
        self.log_dict(log, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr, weight_decay=1e-4)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=max(1, self.steps // 10), max_epochs=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SimCLR(Method):
    """Chen et al. 2020."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SimCLRProjectionHead(Encoder.features, 256, 128)
        self.criterion = NTXentLoss(temperature=0.2, gather_distributed=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), targets = batch[0], batch[1]
        features = self.backbone(torch.cat([x0, x1]))
        z = self.projection_head(features)
        return self.finish(self.criterion(*z.chunk(2)), features[: len(x0)], z, targets)


class SimSiam(Method):
    """Chen and He 2021."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SimSiamProjectionHead(Encoder.features, 512, 512)
        self.prediction_head = SimSiamPredictionHead(512, 128, 512)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), targets = batch[0], batch[1]
        f0, f1 = self.backbone(x0), self.backbone(x1)
        z0, z1 = self.projection_head(f0), self.projection_head(f1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        loss = 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))
        return self.finish(loss, f0, z0, targets)


class BYOL(Method):
    """Grill et al. 2020."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = BYOLProjectionHead(Encoder.features, 512, 128)
        self.prediction_head = BYOLPredictionHead(128, 512, 128)
        self.criterion = NegativeCosineSimilarity()
        self.backbone_momentum, self.projection_head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.global_step, self.steps, 0.9, 1.0)  # from 0.9, as training is short
        update_momentum(self.backbone, self.backbone_momentum, momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, momentum)
        (x0, x1), targets = batch[0], batch[1]
        f0, f1 = self.backbone(x0), self.backbone(x1)
        z0, z1 = self.projection_head(f0), self.projection_head(f1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        with torch.no_grad():
            t0, t1 = (self.projection_head_momentum(self.backbone_momentum(x)) for x in (x0, x1))
        loss = 0.5 * (self.criterion(p0, t1) + self.criterion(p1, t0))
        return self.finish(loss, f0, z0, targets)


METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "simsiam": SimSiam, "byol": BYOL}


def evaluate(backbone: nn.Module, fit: Labelled, test: Labelled, epochs: int = 90, seed: int = 0) -> dict[str, float]:
    """Top-1 in percent on real test images of lightly's kNN (k = 20) and linear classifier, both on ``fit``'s labels.

    The backbone is frozen and the images are not augmented, so that features are computed once: what lightly's classifiers call
    their model passes them on. The linear one is trained as long as in lightly's benchmarks, and scored after its last epoch. It gets
    standardised features: its fixed learning rate would otherwise reward a backbone for the mere scale of what it puts out.
    """
    pl.seed_everything(seed, verbose=False)
    metrics = MetricCallback()
    quiet = {**QUIET, "accelerator": "cpu", "devices": 1, "callbacks": [metrics], "enable_progress_bar": False}
    x, x_test = (embed(backbone.eval(), part.images) for part in (fit, test))

    train, val = TensorDataset(x, fit.labels), TensorDataset(x_test, test.labels)
    knn = KNNClassifier(nn.Identity(), 10, knn_k=20, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1, topk=(1,))
    pl.Trainer(**quiet).validate(knn, [DataLoader(train, 256), DataLoader(val, 256)], verbose=False)

    mean, std = x.mean(0), x.std(0) + 1e-6
    train, val = TensorDataset((x - mean) / std, fit.labels), TensorDataset((x_test - mean) / std, test.labels)
    linear = LinearClassifier(nn.Identity(), batch_size_per_device=256, feature_dim=Encoder.features, num_classes=10, topk=(1,))
    trainer = pl.Trainer(**quiet, max_epochs=epochs, check_val_every_n_epoch=epochs, num_sanity_val_steps=0)
    trainer.fit(linear, DataLoader(train, 256, shuffle=True), DataLoader(val, 256))
    return {"knn": 100 * metrics.val_metrics["val_knn_top1/dataloader_idx_1"][-1], "linear": 100 * metrics.val_metrics["val_top1"][-1]}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options."""
    described = "Train by lightly on generated views, test on real images."
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--method", choices=METHODS, default="simclr", help="what to train")
    add("--preset", default="fashion-ml-random", help=f"one of {', '.join(list_presets())}; or a YAML file with the same keys")
    add("--epochs", type=int, default=4, help="of num-samples new samples each")
    add("--num-samples", type=int, default=12_800, help="pairs of an epoch")
    add("--batch-size", type=int, default=128, help="pairs of a step")
    rates = ", ".join(f"{method} {rate}" for method, rate in RATES.items())
    add("--lr", type=float, help=f"peak learning rate of AdamW; None: the method's own ({rates})")
    add("--seed", type=int, default=0, help="of everything random")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="where views are made and the backbone is trained")
    add("--data", type=Path, help="folder with Fashion-MNIST's four idx files; without one, the slice that comes with the package")
    add("--labels", type=int, default=10_000, help="most labelled real images to fit the classifiers on")
    add("--probe-epochs", type=int, default=90, help="of the linear classifier")
    add("--out", type=Path, default=Path("runs/lightly"), help="folder for the record and the backbone's weights")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, print a table, write a record, and return it.

    Raises:
        ValueError: for a bad value.
        FileNotFoundError: if a file of the preset's or of the real images is missing.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    args.lr = RATES[args.method] if args.lr is None else args.lr
    for name in ("epochs", "labels", "probe_epochs"):
        integer(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    args.out.mkdir(parents=True, exist_ok=True)  # an impossible folder is an error now, not after training

    own = {"layout": "lightly", "num_views": 2, "num_samples": args.num_samples, "batch_size": args.batch_size}
    source = MLViewSource.from_config({**load_config(args.preset), **own, "seed": args.seed, "device": args.device})
    fit, test = bundled_slice() if args.data is None else (load_fashion_mnist(args.data, split, 28) for split in ("train", "test"))
    fit = Labelled(fit.images[: args.labels], fit.labels[: args.labels])

    begin = time.perf_counter()
    pl.seed_everything(args.seed, verbose=False)
    steps = args.epochs * len(source)
    model = METHODS[args.method](steps, source.generator.num_classes, args.lr)
    untrained = copy.deepcopy(model.backbone)
    metrics = MetricCallback()
    trainer = pl.Trainer(**QUIET, accelerator=args.device, devices=1, max_epochs=args.epochs, callbacks=[metrics])
    trainer.fit(model, source)
    trained = time.perf_counter() - begin

    backbones = {"untrained": untrained, "trained": model.backbone}
    scores = {name: evaluate(backbone, fit, test, args.probe_epochs, args.seed) for name, backbone in backbones.items()}
    console = Console()
    table = Table("backbone", "kNN", "linear", title=f"{args.method}: top-1 on real Fashion-MNIST test images, %")
    for name, score in scores.items():
        table.add_row(name, f"{score['knn']:.1f}", f"{score['linear']:.1f}")
    console.print(table)
    fresh = "" if source.pool else ", none seen twice"
    console.print(f"{trainer.global_step} steps on {2 * steps * args.batch_size:,} views{fresh}: {trained:.0f} s.")

    made = environment(source.device)
    record = {
        "command": " ".join(["python -m mlviews.integrations.lightly.train", *arguments]),
        "preset": args.preset,
        "training": {key: getattr(args, key) for key in ("method", "epochs", "num_samples", "batch_size", "lr", "seed")} | {"steps": steps},
        "probe_images": len(fit.labels),
        "test_images": len(test.labels),
        "probe_epochs": args.probe_epochs,
        "scores": {name: {key: round(value, 2) for key, value in score.items()} for name, score in scores.items()},
        "metrics_of_each_epoch": {key: [round(value, 4) for value in values] for key, values in metrics.train_metrics.items()},
        "seconds": {"training": round(trained, 1), "all": round(time.perf_counter() - begin, 1)},
        "backbone_parameters": sum(p.numel() for p in untrained.parameters()),
        **made,
        "versions": made["versions"] | {name: version(name) for name in ("lightly", "pytorch_lightning")},
    }
    figures, weights = args.out / f"lightly-{args.method}.json", args.out / f"lightly-{args.method}.pt"
    figures.write_text(json.dumps(record, indent=1) + "\n")
    torch.save(model.backbone.state_dict(), weights)
    for path in (figures, weights):
        console.print(path)
    return record


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # the classifiers' trainers announce themselves too
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
