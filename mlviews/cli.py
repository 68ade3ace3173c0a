"""The command line: it parses, calls and prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

import mlviews
from mlviews.config import load_config, source_arguments
from mlviews.evaluation.data import real_images
from mlviews.evaluation.probe import METHODS, ProbeReport, run_probe
from mlviews.impact.measure import METHODS as IMPACT_METHODS
from mlviews.perturb import level_indices
from mlviews.runs.files import fingerprint, whole
from mlviews.runs.processes import rank_of_run, resolve_rank
from mlviews.runs.records import set_aside
from mlviews.sampling import TruncatedNormal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=mlviews.__doc__)
console = Console()

# -- options that several commands share ---------------------------------------------------------------------

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


def main() -> None:
    """Run the command line; bad input becomes one line on stderr and exit code 2."""
    _replace_what_cannot_be_encoded()
    # torchmetrics', which Lightning Fabric imports if it is installed: it would stand before every line.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        raise SystemExit(status)
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except BrokenPipeError:  # nobody reads on, as after `| head -1`
        _discard_output()
        raise SystemExit(1) from None
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        print("mlviews:", _one_line(explanation), file=sys.stderr)
        _discard_output()
        raise SystemExit(2) from None


def _replace_what_cannot_be_encoded() -> None:
    """Have a sign that the output's encoding does not know printed as a question mark, not raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _discard_output() -> None:
    """Send what stdout still holds nowhere: Python flushes it at its end, and would complain once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explanation(error: Exception) -> str | None:
    """Return what to tell about an error that bad input or the machine has caused; None for a bug."""
    # click's own errors (a missing value, an unknown option) write their message themselves.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return str(format_message())
    message = str(error)
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return message or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
        return f"There is not enough memory: take smaller batches ({message.strip() or 'MemoryError'})."
    if isinstance(error, SafetensorError) or message.startswith(_TORCH_CANNOT_WRITE):
        return f"A file could not be written or read ({message}); look at the disk, then at the file."
    return None


_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "[enforce fail at inline_container.cc")


def _one_line(message: str) -> str:
    """Return a message without line breaks and other control characters."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in " ".join(message.split())
    )


def _write(*values: object) -> None:
    """Print sentences and paths as they are, each on a line: no markup in them, and no breaks."""
    for value in values:
        print(value)


# -- commands ------------------------------------------------------------------------------------------------

generators = typer.Typer(help="List the generators, or convert a checkpoint.")
app.add_typer(generators, name="generators")


@generators.callback(invoke_without_command=True)
def list_generators(context: typer.Context) -> None:
    """List the generators: levels, image shape, the weights and the options each takes."""
    if context.invoked_subcommand:
        return
    table = Table(box=None, show_header=False)
    for info in mlviews.list_generators():
        table.add_row(f"[bold]{escape(info.name)}[/]")
        table.add_row("  weights", escape(info.weights))
        if info.options:
            table.add_row("  options", ", ".join(info.options))
        if info.levels and info.image_shape:
            levels = [f"{index}  {level.name}  {level.shape}" for index, level in enumerate(info.levels)]
            table.add_row("  image", "x".join(map(str, info.image_shape)))
            table.add_row("  levels", "\n".join(levels))
    console.print(table)
    _write(
        "Levels run from coarse to fine. Those of the others, and their images' shape, depend on the weights."
    )


@generators.command(
    help="Write another project's checkpoint as safetensors, which can be shared and loaded without trust; "
    "nothing in it is executed."
)
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A .pkl, .pt or .pth file of another project; or its URL or Hugging Face id."),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Convert a checkpoint."""
    from mlviews.weights import checkpoints, download

    path = download.fetch(source) if download.is_remote(source) else source
    checkpoint = checkpoints.convert(path, out)
    size = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    _write(
        f"{out}: {len(checkpoint.tensors)} tensors, {size / 1e6:.1f} M values. "
        f"It was {checkpoints.LAYOUTS[checkpoint.layout]}."
    )


@app.command()
def views(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs/views.png"),
    anchors: Annotated[int, typer.Option(help="Rows: anchors.", min=1, max=64)] = 8,
    num_views: Annotated[
        int, typer.Option(help="Columns: views of each, the anchor included.", min=1, max=64)
    ] = 6,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of your own images, for anchors; the generator needs an encoder."),
    ] = None,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Draw anchors and their positives, before and after T_x."""
    from mlviews.viz import draw_views  # matplotlib takes a second that other commands need not wait for

    # As many as there are rows: a folder may hold fewer images than the preset's batches.
    overrides: dict[str, Any] = {} if images is None else {"images": images, "batch_size": anchors}
    source = mlviews.MLViewSource(**_arguments(preset, weights, seed, device, **overrides))
    _write(draw_views(source, out, anchors, num_views, title=preset))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of 128 pairs.", min=1)] = 400,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """The main job: train an encoder on views made by the bundled generator, then test it on real images.

    Two to three minutes on two CPU cores. It is the command `probe --preset fashion-ml-matched`.
    """
    probe("fashion-ml-matched", out=out, steps=steps, data=data, seed=seed, device=device)


@app.command(
    help="Train an encoder on a preset's views, then linear-probe and kNN it on real images "
    "next to raw pixels and an untrained encoder."
)
def probe(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/probe"),
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs per step. Default: the preset's, else 128.", min=2)
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "simclr",
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of AdamW's one-cycle schedule. Default: the method's own."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of SimCLR's NT-Xent.")] = 0.2,
    weights: Weights = None,
    data: Data = None,
    labels: Annotated[int, typer.Option(help="Most labelled images to fit the probes on.", min=100)] = 10_000,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Run the probe of :mod:`mlviews.evaluation.probe`; write its record and two pictures."""
    from mlviews.viz import draw_loss, draw_views

    _folder_to_write(out)
    arguments = {"batch_size": 128, **_arguments(preset, weights, seed, device), "layout": "pair"}
    if batch_size is not None:
        arguments["batch_size"] = batch_size
    # The probe is one process: RANK may be left over from another job.
    source = mlviews.MLViewSource(**(arguments | {"rank": 0, "world_size": 1}))
    first = source.replace()  # stays at the epoch that the training begins with, for the picture
    fit, test = real_images(data, labels)
    levels = ", ".join(level.name for level in source.generator.levels)
    _write(
        f"Views: preset {preset}, levels {levels}, seed {source.seed}, on {source.device}. "
        "No file is read for them.",
        f"Probe: {len(fit.labels)} labelled real images to fit, {len(test.labels)} to test "
        f"({data or 'bundled slice'}).",
    )
    if sys.stdout is not None:
        sys.stdout.flush()

    report = run_probe(source, steps, method, lr, temperature, (fit, test), Console(stderr=True))
    settings = {
        "command": shlex.join(["mlviews", *sys.argv[1:]]),
        "preset": preset,
        "configuration": load_config(preset),
        "generator_weights": fingerprint(source.generator),
    }
    try:
        paths = _save_probe(out, report, settings)
        paths.append(draw_views(first, out / "views.png", title=preset))
        paths.append(draw_loss(report.losses, out / "loss.png", f"{method} on {preset}", report.chance))
    finally:  # what was measured is printed at least
        console.print(report.table())
        _write(report.summary)
    _write(*paths)


def _save_probe(out: Path, report: ProbeReport, settings: dict[str, Any]) -> list[Path]:
    """Write a probe's record; that of a run with other settings keeps its files under other names.

    Returns:
        The record's path, and those that an earlier run's files have now.
    """
    measured = report.record()
    settings |= {name: measured[name] for name in ("training", "probe_images", "test_images")}
    content = json.dumps(settings | measured, indent=1, default=str) + "\n"
    record = out / "result.json"
    with whole(record) as part:
        part.write_text(content)
        old = set_aside(record, json.loads(content), list(settings), [out / "views.png", out / "loss.png"])
    return [record, *old]


@app.command(
    help="Write views and their latents to files, for trainers that insist on them; "
    "on several ranks, each writes its share.\n\n"
    "A second call goes on where the first one stopped."
)
def export(
    preset: Preset = "fashion-ml-random",
    format: Annotated[
        str, typer.Option(help="One of: folder (PNG files), webdataset (tar shards), ffcv (one .beton).")
    ] = "folder",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, or to go on with. Default: runs/export-PRESET-FORMAT."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples to write. Default: the preset's, else 60000.", min=1)
    ] = None,
    num_views: Annotated[
        int | None,
        typer.Option(help="Images of each, the anchor included. Default: the preset's, else 2.", min=1),
    ] = None,
    epoch: Annotated[int, typer.Option(help="Whose samples: every epoch has its own.", min=0)] = 0,
    augmented: Annotated[
        bool,
        typer.Option(
            "--augmented/--raw",
            help="The views after the preset's T_x, or as generated: T_x is then left to the trainer.",
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples made at a time. Default: the preset's, else 128.", min=1)
    ] = None,
    shard_size: Annotated[
        int, typer.Option(help="Samples of a shard: what is lost when a run is killed.", min=1)
    ] = 1024,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Write nothing: check the files in the folder against their checksums."
        ),
    ] = False,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Export a preset's views."""
    from mlviews.integrations import files

    out = out or Path("runs", f"export-{Path(preset).stem}-{format}")
    if verify:
        _write(f"{files.verify(out):,} files in {out} are as they were written.")
        return
    arguments = {"batch_size": 128, **_arguments(preset, weights, seed, device)}
    arguments |= {"layout": "pair", "drop_last": False}
    sizes = {"num_samples": num_samples, "num_views": num_views, "batch_size": batch_size}
    arguments |= {name: size for name, size in sizes.items() if size is not None}
    if not augmented:
        arguments |= {"transform": None, "crops": None}
    if arguments["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        arguments["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    source = mlviews.MLViewSource(**arguments)
    source.set_epoch(epoch)
    result = files.export(source, out, format, augmented=augmented, shard_size=shard_size, preset=preset)
    images = result.written * result.images
    _write(
        f"{result.written:,} samples made, {images:,} images: {result.seconds:.0f} s, "
        f"{images / result.seconds:,.0f} images/s."
    )
    if result.complete:
        _write(
            f"{source.num_samples:,} samples in {result.files:,} files, {result.bytes / 1e6:,.1f} MB.",
            out / "manifest.json",
        )
    else:
        rank, world_size = resolve_rank(None, None)
        _write(f"{out} is unfinished: shards of other ranks are missing (this was {rank} of {world_size}).")


# -- options of the two commands that measure ----------------------------------------------------------------

Measured = Annotated[
    str,
    typer.Argument(
        help="A generator's name (see `mlviews generators`), or a preset or YAML file "
        "whose generator and anchors to take."
    ),
]
MeasuredWeights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Of the generator: a file, a URL, or a Hugging Face id. Default: its own."
    ),
]
Target = Annotated[
    float,
    typer.Option(
        help="Plain InfoNCE in nats to move each level to. The paper's code would print 1.43 times as much."
    ),
]
Pairs = Annotated[int, typer.Option(help="Pairs of a batch, over all processes.", min=2)]
Devices = Annotated[
    int, typer.Option(help="Processes on this machine, each with a device of its own.", min=1)
]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder, or start anew.")]
MonteCarlo = Annotated[int, typer.Option(help="Anchors for the distances.", min=2)]
MeasuredSeed = Annotated[int, typer.Option("--seed", help="Of everything random.", min=0)]
MeasuredDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help="Where to run, e.g. cpu or cuda. Default: cuda where there is one, else cpu."
    ),
]


@app.command(
    help="Measure how much each latent level matters (the paper's Table 1): a table, "
    "and a report to show around."
)
def impact(
    generator: Measured = "fashion",
    method: Annotated[
        str, typer.Option(help=f"One of: {', '.join(IMPACT_METHODS)} (minutes, and the paper's).")
    ] = "sweep",
    target_loss: Target = 0.7,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report, its pictures and the checkpoints. "
            "Default: runs/impact-GENERATOR-METHOD."
        ),
    ] = None,
    pairs: Pairs = 64,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps: of the sweep's critics; at most, of each walker.", min=10),
    ] = None,
    monte_carlo: MonteCarlo = 100_000,
    weights: MeasuredWeights = None,
    seed: MeasuredSeed = 0,
    device: MeasuredDevice = None,
    devices: Devices = 1,
    resume: Resume = True,
) -> None:
    """Run :func:`mlviews.measure_impact`; print and save its report."""
    _check_shares(pairs, devices)
    network, anchor = _measured(generator, weights)
    out = _folder_to_write(out or Path("runs", f"impact-{Path(generator).stem}-{method}"))
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    report = mlviews.measure_impact(
        network,
        method,
        target_loss,
        out,
        anchor=anchor,
        seed=seed,
        device=device or _default_device(),
        devices=devices,
        monte_carlo=monte_carlo,
        pairs=pairs,
        resume=resume,
        **options,
    )
    if rank_of_run() > 0:
        return
    try:
        paths = report.save(out)
    finally:  # what was measured is printed at least
        console.print(report)
        _write(*report.headline)
    _write(*paths)


@app.command(
    help="Train a walker, the learned perturbation of one level or several (the paper's eq. 5), "
    "until InfoNCE is at the target."
)
def walker(
    levels: Annotated[
        str, typer.Argument(help="Level to move, e.g. 2; or several together, start:stop as in a slice.")
    ],
    generator: Annotated[
        str,
        typer.Option(
            help="A generator's name, or a preset or YAML file whose generator and anchors to take."
        ),
    ] = "fashion",
    target_loss: Target = 0.7,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for walker.safetensors, its history and the checkpoint. "
            "Default: runs/walker-GENERATOR-LEVELS."
        ),
    ] = None,
    pairs: Pairs = 64,
    steps: Annotated[int, typer.Option(help="Of the walker, at most.", min=1)] = 1000,
    directions: Annotated[
        float,
        typer.Option(help="That the anchors' shifts spread over, at least; 1 is the paper's: no matter."),
    ] = 1.0,
    keep_norm: Annotated[
        bool,
        typer.Option(help="Keep each anchor's length, so that positives stay where the prior has its mass."),
    ] = False,
    monte_carlo: MonteCarlo = 100_000,
    weights: MeasuredWeights = None,
    seed: MeasuredSeed = 0,
    device: MeasuredDevice = None,
    devices: Devices = 1,
    resume: Resume = True,
) -> None:
    """Run :func:`mlviews.train_walker`; print what the walker does."""
    _check_shares(pairs, devices)
    network, anchor = _measured(generator, weights)
    moved = level_indices(levels, network.levels)
    out = _folder_to_write(out or Path("runs", f"walker-{Path(generator).stem}-{'-'.join(map(str, moved))}"))
    trained = mlviews.train_walker(
        network,
        moved,
        target_loss,
        out,
        pairs=pairs,
        steps=steps,
        directions=directions,
        keep_norm=keep_norm,
        anchor=anchor,
        seed=seed,
        device=device or _default_device(),
        devices=devices,
        resume=resume,
        monte_carlo=monte_carlo,
    )
    if rank_of_run() > 0:
        return
    distances = trained.distances
    _write(
        f"{trained.status}: {trained.loss:.3f} ± {trained.stderr:.3f} nats after "
        f"{len(trained.history.losses)} steps; "
        f"distance {distances.mean:.3g} ± {distances.std:.2g}, "
        f"{distances.relative:.2f} of that between two draws; "
        f"norm {distances.norm:.2f} of the anchors'; {distances.directions:.1f} directions."
    )
    _write(*sorted(out.glob("*.*")))


@app.command(
    help="Train an inverter: an encoder for a generator that has none, on its own images alone. "
    "A second call goes on where the first one stopped."
)
def inverter(
    generator: Measured,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for inverter.safetensors, its history and the checkpoint. "
            "Default: runs/inverter-GENERATOR."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of real images that it is refined on. Default: none.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, at most.", min=1)] = 20_000,
    batch: Annotated[int, typer.Option(help="Images of a step, over all processes.", min=1)] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float16, for autocast. Default: float32.")
    ] = None,
    weights: MeasuredWeights = None,
    seed: MeasuredSeed = 0,
    device: MeasuredDevice = None,
    devices: Devices = 1,
    resume: Resume = True,
) -> None:
    """Run :func:`mlviews.train_inverter`; print what the inverter reconstructs."""
    network, anchor = _measured(generator, weights)
    out = out or Path("runs", f"inverter-{Path(generator).stem}")
    trained = mlviews.train_inverter(
        network,
        images,
        out=out,
        device=device or _default_device(),
        devices=devices,
        steps=steps,
        batch=batch,
        dtype=dtype,
        anchor=anchor,
        seed=seed,
        resume=resume,
    )
    if rank_of_run() == 0:
        best = trained.run.best
        console.print(
            f"{trained.run.status} after {trained.run.history[-1].step} steps; the best at step {best.step}: "
            f"mean squared error {best.pair_error:.4f} of the generator's images, "
            f"{best.latent_error:.2f} of their latents (chance: 1)."
        )
        for path in sorted(out.glob("*.*")):
            console.print(path)


# -- from the command line's words to arguments --------------------------------------------------------------


def _measured(name: str, weights: str | None) -> tuple[mlviews.MLVGM, TruncatedNormal | None]:
    """Return the generator of that name, or of a preset or YAML file, and the anchors' law if one is set."""
    if name not in mlviews.list_presets() and not name.endswith((".yaml", ".yml")):
        return mlviews.load_generator(name, weights), None
    config = {
        key: value for key, value in load_config(name).items() if key in ("generator", "weights", "anchor")
    }
    if weights is not None:
        config["weights"] = weights
    arguments = source_arguments(config)
    return arguments["generator"], arguments.get("anchor")


def _folder_to_write(folder: Path) -> Path:
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


def _check_shares(pairs: int, devices: int) -> None:
    """Raise a ValueError, before any process is started, if the processes cannot share a batch evenly."""
    if pairs % devices:
        raise ValueError(
            f"Invalid pairs={pairs} for {devices} processes: it is the whole batch and must be a multiple of "
            "them."
        )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _arguments(
    preset: str, weights: str | None, seed: int | None, device: str | None, **overrides: Any
) -> dict[str, Any]:
    """Return a preset's arguments of the source, with the command line's in place of the preset's own."""
    if weights is not None:
        overrides["weights"] = weights
    arguments = {"seed": 0, **source_arguments(preset, **overrides)}
    if seed is not None:
        arguments["seed"] = seed
    arguments["device"] = device or arguments.get("device") or _default_device()
    return arguments


if __name__ == "__main__":
    main()
