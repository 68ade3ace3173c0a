"""What the commands share: the application, options, and the way from words to arguments."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

import mlviews
from mlviews.config import load_config, source_arguments
from mlviews.runs.processes import check_device
from mlviews.sampling import TruncatedNormal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=mlviews.__doc__)
console = Console()


def write(*values: object) -> None:
    """Print sentences and paths as they are, each on a line: no markup in them, and no breaks."""
    for value in values:
        print(value)


# -- options -------------------------------------------------------------------------------------------------

Preset = Annotated[
    str,
    typer.Option(help=f"One of: {', '.join(mlviews.list_presets())}; or a YAML file with the same keys."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Of the preset's generator: a file, a URL, or a Hugging Face id. Default: the preset's."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of everything random. Default: the preset's, else 0.", min=0)]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run, e.g. cpu or cuda. Default: the preset's, else cuda where there is one, else cpu."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with Fashion-MNIST's four idx files. Default: the labelled slice "
        "that comes with the package."
    ),
]

# -- options of the commands that measure and train ----------------------------------------------------------

Measured = Annotated[
    str,
    typer.Argument(
        help="A generator's name (see `mlviews generators`), the folder or Hugging Face id of a published "
        "one, or a preset or YAML file whose generator and anchors to take."
    ),
]


@dataclass(frozen=True)
class Run:
    """Options of a command that runs a generator."""

    weights: Annotated[
        str | None,
        typer.Option(help="Of the generator: a file, a URL, or a Hugging Face id. Default: its own."),
    ] = None
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0
    device: Annotated[
        str | None,
        typer.Option(help="Where to run, e.g. cpu or cuda. Default: cuda where there is one, else cpu."),
    ] = None

    @property
    def place(self) -> torch.device:
        """The device to run on.

        Raises:
            ValueError: if torch cannot use it here.
        """
        return check_device(self.device or default_device())


@dataclass(frozen=True)
class Job(Run):
    """Options of a command that trains, on any number of devices."""

    devices: Annotated[
        int, typer.Option(help="Processes on this machine, each with a device of its own.", min=1)
    ] = 1
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder, or start anew.")] = (
        True
    )


@dataclass(frozen=True)
class Measurement(Job):
    """Options of a command that measures mutual information."""

    target_loss: Annotated[
        float,
        typer.Option(
            help="Plain InfoNCE in nats to move each level to. The paper's code would print 1.43 times as "
            "much."
        ),
    ] = 0.7
    pairs: Annotated[int, typer.Option(help="Pairs of a batch, over all processes.", min=2)] = 64
    monte_carlo: Annotated[int, typer.Option(help="Anchors for the distances.", min=2)] = 100_000

    def check_shares(self) -> None:
        """Raise a ValueError, before any process is started, if they cannot share a batch evenly."""
        if self.pairs % self.devices:
            raise ValueError(
                f"Invalid pairs={self.pairs} for {self.devices} processes: it is the whole batch and must be "
                "a multiple of them."
            )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of its option groups one by one, as Typer needs them.

    Args:
        command: a function; an argument whose type is a dataclass is a group of options.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        options = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            annotation = options[field.name]
            parameters.append(
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
                )
            )

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(
                **{field.name: values.pop(field.name) for field in dataclasses.fields(group)}
            )
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


# -- from the command line's words to arguments --------------------------------------------------------------


def generator_and_law(
    name: str, weights: str | None, inverter: Path | None = None
) -> tuple[mlviews.MLVGM, TruncatedNormal | None]:
    """Return the generator of that name, or of a preset or YAML file, and the anchors' law if one is set."""
    if name not in mlviews.list_presets() and not name.endswith((".yaml", ".yml")):
        return mlviews.load_generator(name, weights, inverter=inverter), None
    config = {
        key: value for key, value in load_config(name).items() if key in ("generator", "weights", "anchor")
    }
    if weights is not None:
        config["weights"] = weights
    if inverter is not None:
        spec = config.get("generator")
        config["generator"] = {**(spec if isinstance(spec, dict) else {"name": spec}), "inverter": inverter}
    arguments = source_arguments(config)
    return arguments["generator"], arguments.get("anchor")


def folder_to_write(folder: Path) -> Path:
    """Return the folder, which is made if it is missing; an impossible one is an error before the work.

    Raises:
        OSError: if no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"No file can be written into the folder {folder} ({error.strerror}).") from None


def default_device() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def preset_arguments(
    preset: str, weights: str | None, seed: int | None, device: str | None, **overrides: Any
) -> dict[str, Any]:
    """Return a preset's arguments of the source, with the command line's in place of the preset's own."""
    if weights is not None:
        overrides["weights"] = weights
    arguments = {"seed": 0, **source_arguments(preset, **overrides)}
    if seed is not None:
        arguments["seed"] = seed
    arguments["device"] = device or arguments.get("device") or default_device()
    return arguments
