"""The paper's experiments as commands.

``python benchmarks/paper/run.py table2 --scale paper --dry-run``

A YAML file of this folder holds an experiment: the paper's figures, what it claims by them, and what to run,
at the paper's scale and with the bundled generators. This script turns it into command lines of programs that
exist already, prints them, and runs them. A command whose record is committed is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mlviews import transforms
from mlviews.config import load_config

FOLDER = Path(__file__).parent.resolve()
RESULTS = FOLDER.parent / "results"
EXPERIMENTS = ("table1", "table2", "table3", "table4", "figure5", "appendix-e")
ALIASES = {"appendix-f": "table4"}
SCALES = ("paper", "fashion")
SOLO_LEARN = "python -m mlviews.integrations.solo_learn"


# -- the schema of an experiment -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A program of ours: ``run ARGUMENTS --option value``."""

    run: str
    arguments: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    record: str = ""  # in benchmarks/results, without .json, that the command writes

    @property
    def line(self) -> str:
        """The line to run."""
        options = [text for name, value in self.options.items() for text in (f"--{name}", str(value))]
        return shlex.join([*self.run.split(), *self.arguments, *options])


@dataclass(frozen=True)
class Encoders:
    """Encoders that solo-learn trains: every method on every row of the paper's table."""

    configs: str  # a folder of integrations/solo_learn/configs
    methods: list[str]
    views: dict[str, dict[str, Any]]  # the configuration of each row's source
    devices: int
    batch_size: int  # pairs of a step, over all devices
    epochs: int
    learning_rate: float  # for 256 pairs a step: solo-learn scales it
    warmup_epochs: int
    weight_decay: float
    weights: str  # of the generator
    real: str = ""  # folder of the real images that the row "real" trains on, with the whole T_x
    fixed: list[str] = field(default_factory=list)  # methods that see the same samples in every epoch


@dataclass(frozen=True)
class Classifier:
    """Linear classifiers on the encoders' features, by solo-learn."""

    data: list[str]  # folders with train and val
    image_size: int
    epochs: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Scale:
    """What to run at a scale."""

    commands: list[Command] = field(default_factory=list)
    encoders: Encoders | None = None
    classifier: Classifier | None = None
    needs: dict[str, str] = field(default_factory=dict)  # files and folders, and what they are
    machine: str = ""
    missing: str = ""  # what the commands leave out


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, its figures, and where ours are."""

    claim: str
    ours: dict[str, Any]  # arguments of a function in benchmarks/documents/paper.py
    of: str = ""  # a row of the experiment's figures; none if the paper prints none
    rows: list[str | int] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper."""

    title: str
    section: str
    figures: dict[str, dict[str | int, float]]
    claims: list[Claim]
    paper: Scale
    fashion: Scale


PARTS = {
    "claims": Claim,
    "commands": Command,
    "encoders": Encoders,
    "classifier": Classifier,
    "paper": Scale,
    "fashion": Scale,
}


def read(kind: type[Any], values: Any, place: str) -> Any:
    """Return a part of an experiment from what YAML holds.

    Raises:
        ValueError: for something else than a mapping, an unknown key, or a missing one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"Invalid {place}: it must be a mapping, not {values!r}.")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    required = [
        name for name, item in fields.items() if (item.default, item.default_factory) == (MISSING, MISSING)
    ]
    for key in [*values, *required]:
        if key not in fields or key not in values:
            raise ValueError(
                f"Invalid {place}: {key!r} is unknown or missing; its keys are {', '.join(fields)}."
            )
    arguments = {}
    for key, value in values.items():
        if key not in PARTS:
            arguments[key] = value
        elif isinstance(value, list):
            arguments[key] = [read(PARTS[key], part, f"{place}, {key}") for part in value]
        else:
            arguments[key] = read(PARTS[key], value, f"{place}, {key}")
    return kind(**arguments)


def load(name: str) -> Experiment:
    """Return the experiment of a name.

    Raises:
        ValueError: if there is none, or its file does not fit the schema.
    """
    name = ALIASES.get(name, name)
    if name not in EXPERIMENTS:
        raise ValueError(f"Unknown experiment {name!r}: there are {', '.join([*EXPERIMENTS, *ALIASES])}.")
    experiment: Experiment = read(Experiment, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), name)
    return experiment


# -- from an experiment to lines -----------------------------------------------------------------------------


def lines(name: str, scale: Scale) -> list[str]:
    """Return the lines to run at a scale, in their order."""
    return [*(command.line for command in scale.commands), *_encoder_lines(ALIASES.get(name, name), scale)]


def _encoder_lines(name: str, scale: Scale) -> Iterator[str]:
    """Yield the training of every encoder, followed by its classifiers."""
    encoders, classifier = scale.encoders, scale.classifier
    if encoders is None or classifier is None:
        return
    rows: dict[str, dict[str, Any] | None] = dict(encoders.views)
    if encoders.real:
        rows = {"real": None, **rows}
    for method in encoders.methods:
        for row, view in rows.items():
            run = f"{name}-{method}-{row}".lower().replace(" ", "-")
            yield _training(encoders, method, view, run)
            for data in classifier.data:
                yield _classification(encoders, classifier, method, data, run)


def _training(encoders: Encoders, method: str, view: dict[str, Any] | None, run: str) -> str:
    """Return the line that trains an encoder on a row's views; None: on real images."""
    overrides: dict[str, Any] = {
        "name": run,
        "max_epochs": encoders.epochs,
        "devices": list(range(encoders.devices)),
        "optimizer.batch_size": encoders.batch_size // encoders.devices,
        "optimizer.lr": encoders.learning_rate,
        "optimizer.weight_decay": encoders.weight_decay,
        "scheduler.warmup_epochs": encoders.warmup_epochs,
        "checkpoint.dir": f"runs/paper/{run}",
    }
    if view is None:
        pipeline = {**_color_pipeline(112), "num_crops": 2}
        overrides |= {
            "data.format": "image_folder",
            "++data.train_path": encoders.real,
            "augmentations": [pipeline],
        }
    else:
        # The preset's T_x takes the place of the configuration's augmentations.
        transform = load_config(view)["transform"]
        source = {**view, "weights": encoders.weights, "transform": transform}
        if method in encoders.fixed:
            source["pool"] = True
        overrides |= {f"++data.mlvgm.{key}": value for key, value in source.items()}
    removed = ["~data.mlvgm"] if view is None else []
    configs = f"pkg://mlviews.integrations.solo_learn.configs.{encoders.configs}"
    launch = [*SOLO_LEARN.split(), "main_pretrain.py", "--config-path", configs, "--config-name", method]
    return shlex.join([*launch, *removed, *(f"{key}={hydra(value)}" for key, value in overrides.items())])


def _classification(encoders: Encoders, classifier: Classifier, method: str, data: str, run: str) -> str:
    """Return the line that trains a linear classifier on an encoder's last checkpoint."""
    overrides = {
        "name": f"{run}-{data}",
        "pretrain_method": method,
        "data.train_path": f"{data}/train",
        "data.val_path": f"{data}/val",
        "max_epochs": classifier.epochs,
        "optimizer.batch_size": classifier.batch_size,
        "optimizer.lr": classifier.learning_rate,
        "checkpoint.dir": f"runs/paper/{run}",
    }
    configs = f"pkg://mlviews.integrations.solo_learn.configs.{encoders.configs}"
    launch = [*SOLO_LEARN.split(), "--image-size", str(classifier.image_size), "main_linear.py"]
    launch += ["--config-path", configs, "--config-name", "linear"]
    line = shlex.join([*launch, *(f"{key}={hydra(value)}" for key, value in overrides.items())])
    # solo-learn chooses the name, which has an equals sign: the shell finds it, and Hydra takes it in quotes.
    checkpoint = f"$(ls -t runs/paper/{run}/{method}/*/*.ckpt | head -n 1)"
    return rf'{line} "pretrained_feature_extractor=\"{checkpoint}\""'


def _color_pipeline(size: int) -> dict[str, Any]:
    """Return SimCLR's whole T_x as solo-learn writes it, for real images."""
    simclr = transforms.simclr(size, color=True)
    assert simclr.scale is not None
    names = ("brightness", "contrast", "saturation", "hue")
    return {
        "rrc": {"enabled": True, "crop_min_scale": simclr.scale[0], "crop_max_scale": simclr.scale[1]},
        "color_jitter": {"prob": simclr.jitter_p, **dict(zip(names, simclr.jitter, strict=True))},
        "grayscale": {"prob": simclr.grayscale},
        "gaussian_blur": {"prob": simclr.blur},
        "solarization": {"prob": simclr.solarize},
        "equalization": {"prob": simclr.equalize},
        "horizontal_flip": {"prob": simclr.flip},
        "crop_size": size,
    }


def hydra(value: Any) -> str:
    """Return a value in the notation of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def on_record(command: Command) -> bool:
    """Return whether the command's record is committed, and comes from the same command.

    The folder of the data may be another, and ``--collect`` only puts together what the command had measured.
    """
    path = RESULTS / f"{command.record}.json"
    if not command.record or not path.exists():
        return False
    words = shlex.split(json.loads(path.read_text())["command"])
    if "--data" in words:
        words[words.index("--data") + 1] = "DIR"
    return [word for word in words if word != "--collect"] == shlex.split(command.line)


# -- the command line ----------------------------------------------------------------------------------------


def main(
    experiment: Annotated[str, typer.Argument(help=f"One of: {', '.join([*EXPERIMENTS, *ALIASES])}.")],
    scale: Annotated[
        str, typer.Option(help="paper: weights and GPUs; fashion: the bundled generators on a CPU.")
    ] = "fashion",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
    data: Annotated[str, typer.Option(help="Folder with Fashion-MNIST's four idx files (fashion).")] = "DIR",
    checkout: Annotated[
        str, typer.Option(help="A checkout of solo-learn's main branch (fashion).")
    ] = "CHECKOUT",
    again: Annotated[bool, typer.Option(help="Run commands whose records are committed too.")] = False,
) -> None:
    """Print an experiment's commands, and run them."""
    try:
        chosen = load(experiment)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if scale not in SCALES:
        raise typer.BadParameter(f"Unknown scale {scale!r}: there are {', '.join(SCALES)}.")
    plan: Scale = getattr(chosen, scale)
    print(f"# {chosen.title} ({chosen.section}), {scale} scale")
    for name, meaning in plan.needs.items():
        print(f"# needs {name}: {meaning}")
    for label, text in (("the paper took", plan.machine), ("left out", plan.missing)):
        if text:
            print(f"# {label}: {text}")
    missing = [name for name in plan.needs if not Path(name).exists()]
    if missing and not dry_run:
        raise typer.BadParameter(f"Not in this folder: {', '.join(missing)}. --dry-run prints the commands.")
    recorded = {command.line: command.record for command in plan.commands if on_record(command) and not again}
    for line in lines(experiment, plan):
        words = shlex.split(line)
        text = line.replace(" DIR", f" {shlex.quote(data)}").replace(" CHECKOUT", f" {shlex.quote(checkout)}")
        print(text, flush=True)
        if line in recorded:
            print(f"# on record: benchmarks/results/{recorded[line]}.json", flush=True)
        elif not dry_run:
            for name, folder in (("DIR", data), ("CHECKOUT", checkout)):
                if name in words and folder == name:
                    raise typer.BadParameter(f"The command needs {name}: give --data or --checkout.")
            code = subprocess.run(["bash", "-c", text], check=False).returncode
            if code:
                raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
