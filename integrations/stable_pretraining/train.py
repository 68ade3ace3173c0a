"""stable-pretraining's SimCLR, BYOL, VICReg and DINO on generated views, scored on real images.

The module and its losses are stable-pretraining's own. What is new is in :func:`main`: the data module is an
:class:`~mlviews.integrations.lightning.MLViewDataModule` with ``layout: stable_pretraining``.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from mlviews import MLViewSource, transforms
from mlviews.checks import choice
from mlviews.evaluation.data import real_images
from mlviews.evaluation.learner import Encoder
from mlviews.evaluation.readout import evaluate
from mlviews.integrations.lightning import MLViewDataModule
from mlviews.runs.files import whole
from mlviews.runs.records import environment

try:
    import lightning as pl
    import stable_pretraining as spt
    from stable_pretraining import forward
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"This example needs {error.name}: pip install 'mlviews[stable-pretraining]'.", name=error.name
    ) from None

WIDTH = 256  # of projections


def projector(width: int = WIDTH) -> nn.Sequential:
    """Return a projection head of two layers."""
    return nn.Sequential(
        nn.Linear(Encoder.features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
    )


class Small(Encoder):
    """The backbone as DINO calls it: with an argument for position embeddings, of which it has none."""

    def forward(self, images: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        features: Tensor = super().forward(images)
        return features


def simclr(backbone: nn.Module) -> dict[str, Any]:
    """SimCLR (Chen et al. 2020)."""
    loss = spt.losses.NTXEntLoss(temperature=0.2)
    return {
        "forward": forward.simclr,
        "backbone": backbone,
        "projector": projector(),
        "simclr_loss": loss,
    }


def byol(backbone: nn.Module) -> dict[str, Any]:
    """BYOL (Grill et al. 2020)."""
    teachers = functools.partial(spt.TeacherStudentWrapper, base_ema_coefficient=0.9)
    predictor = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    )
    return {
        "forward": forward.byol,
        "backbone": teachers(backbone),
        "projector": teachers(projector()),
        "predictor": predictor,
        "byol_loss": spt.losses.BYOLLoss(),
    }


def vicreg(backbone: nn.Module) -> dict[str, Any]:
    """VICReg (Bardes et al. 2022)."""
    return {
        "forward": forward.vicreg,
        "backbone": backbone,
        "projector": projector(),
        "vicreg_loss": spt.losses.VICRegLoss(),
    }


def dino(backbone: nn.Module) -> dict[str, Any]:
    """DINO (Caron et al. 2021), with two large crops and two small ones."""
    teachers = functools.partial(spt.TeacherStudentWrapper, base_ema_coefficient=0.9)
    return {
        "forward": forward.dino,
        "backbone": teachers(backbone),
        "projector": teachers(projector()),
        "dino_loss": spt.losses.DINOv1Loss(),
        "temperature_teacher": 0.04,
    }


METHODS = {"simclr": simclr, "byol": byol, "vicreg": vicreg, "dino": dino}
CROPS: dict[str, dict[str, Any]] = {
    "dino": {
        "crops": (0, 1, 0, 1),
        "transform": [
            *[transforms.simclr(28, color=False)] * 2,
            *[transforms.simclr(16, color=False)] * 2,
        ],
    }
}
"""What a source makes for a method, beyond the preset."""


def main(
    method: Annotated[str, typer.Option(help="simclr, byol, vicreg or dino.")] = "simclr",
    preset: Annotated[str, typer.Option(help="A preset, or a YAML file.")] = "fashion-ml-random",
    epochs: Annotated[int, typer.Option(help="Of num-samples new samples each.", min=1)] = 4,
    num_samples: Annotated[int, typer.Option(help="Pairs of an epoch.", min=2)] = 6_400,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.", min=2)] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1.5e-3,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Folder of Fashion-MNIST's idx files; none: the slice.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the record.")] = Path("runs/stable-pretraining"),
) -> None:
    """Train by stable-pretraining on generated views, test on real images."""
    build = METHODS[choice("method", method, METHODS)]
    fit, test = real_images(data, labels=10_000)
    source = MLViewSource.from_config(
        preset,
        layout="stable_pretraining",
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        **CROPS.get(method, {}),
    )
    pl.seed_everything(seed, verbose=False)
    backbone = Small()
    untrained = copy.deepcopy(backbone).eval()
    module = spt.Module(**build(backbone), optim={"optimizer": {"type": "AdamW", "lr": lr}}, hparams={})
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[losses, *teaching(module)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(module, MLViewDataModule(source))
    trained = backbone.eval()
    scores = {
        name: evaluate(encoder, fit, test, seed).knn
        for name, encoder in (("untrained", untrained), ("trained", trained))
    }
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python -m mlviews.integrations.stable_pretraining.train", *sys.argv[1:]]),
        "method": method,
        "preset": preset,
        "steps": trainer.global_step,
        "loss": {"first": losses.values[0], "last": losses.values[-1]},
        "knn": {name: round(score, 2) for name, score in scores.items()},
        "stable_pretraining": version("stable-pretraining"),
        **environment(),
    }
    with whole(out / f"stable-pretraining-{method}.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(f"{method}: loss {losses.values[0]:.3f} to {losses.values[-1]:.3f}")
    typer.echo(f"kNN on real images: untrained {scores['untrained']:.1f}, trained {scores['trained']:.1f}")


def teaching(module: nn.Module) -> list[pl.Callback]:
    """Return the callback that moves teachers after their students, if the module has teachers.

    spt.Manager adds it by itself. Under a plain Trainer without it, teachers keep their random weights.
    """
    has_teachers = any(isinstance(part, spt.TeacherStudentWrapper) for part in module.modules())
    return [spt.TeacherStudentCallback()] if has_teachers else []


class Losses(pl.Callback):
    """The mean loss of every epoch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the epoch's mean from what the module has logged."""
        self.values.append(round(float(trainer.callback_metrics["fit/loss_epoch"]), 4))


if __name__ == "__main__":
    typer.run(main)
