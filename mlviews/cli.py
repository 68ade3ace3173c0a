"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import mlviews
from mlviews import sampling
from mlviews.config import load_config, source_arguments
from mlviews.evaluation import data
from mlviews.evaluation.probe import METHODS, RATES, SHARES, Encoder, Scores
from mlviews.impact.measure import METHODS as IMPACT_METHODS
from mlviews.perturb import level_indices
from mlviews.runs.processes import resolve_rank
from mlviews.runs.progress import bars
from mlviews.runs.records import environment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=mlviews.__doc__)
console = Console()

Preset = Annotated[str, typer.Option(help=f"One of: {', '.join(mlviews.list_presets())}; or a YAML file with the same keys.")]
Weights = Annotated[str | None, typer.Option(help="Of the preset's generator: a file, a URL, or a Hugging Face id. Default: the preset's.")]
Seed = Annotated[int | None, typer.Option(help="Of everything random. Default: the preset's, else 0.", min=0)]
Device = Annotated[
    str | None, typer.Option(help="Where to run, e.g. cpu or cuda. Default: the preset's, else cuda where there is one, else cpu.")
]
Data = Annotated[
    Path | None, typer.Option(help="Folder with Fashion-MNIST's four idx files. Default: the labelled slice that comes with the package.")
]


def main() -> None:
    """Entry point: bad input becomes one line on stderr and exit code 2."""
    # Of torchmetrics, which Lightning Fabric imports if it is installed (the extra "solo" has an old one).
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    try:
        raise SystemExit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except Exception as error:
        say = getattr(error, "format_message", None)  # click's own errors: a missing value, an unknown option
        if say is None and not isinstance(error, ValueError | OSError | ModuleNotFoundError):
            raise
        print(f"mlviews: {say() if say else error}", file=sys.stderr)
        raise SystemExit(2) from None


generators = typer.Typer(help="List the generators, or convert a checkpoint.")
app.add_typer(generators, name="generators")


@generators.callback(invoke_without_command=True)
def list_generators(context: typer.Context) -> None:
    """List the generators: levels, image shape, the weights and the options each takes."""
    if context.invoked_subcommand:
        return
    table = Table(box=None, show_header=False)
    for info in mlviews.list_generators():
        table.add_row(f"[bold]{info.name}[/]")
        table.add_row("  weights", info.weights)
        if info.options:
            table.add_row("  options", ", ".join(info.options))
        if info.levels and info.image_shape:
            table.add_row("  image", "x".join(map(str, info.image_shape)))
            table.add_row("  levels", "\n".join(f"{i}  {level.name}  {level.shape}" for i, level in enumerate(info.levels)))
    console.print(table)
    console.print("Levels run from coarse to fine. Those of the others, and their images' shape, depend on the weights.")


@generators.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .pkl, .pt or .pth file of another project; or its URL or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write another project's checkpoint as safetensors, which can be shared and loaded without trust; nothing in it is executed."""
    from mlviews.weights import checkpoints, download

    found = checkpoints.convert(download.fetch(source) if download.is_remote(source) else source, out)
    size = sum(tensor.numel() for tensor in found.tensors.values())
    console.print(f"{out}: {len(found.tensors)} tensors, {size / 1e6:.1f} M values. It was {checkpoints.LAYOUTS[found.layout]}.")


@app.command()
def views(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs/views.png"),
    anchors: Annotated[int, typer.Option(help="Rows: anchors.", min=1, max=64)] = 8,
    num_views: Annotated[int, typer.Option(help="Columns: views of each, the anchor included.", min=1, max=64)] = 6,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Draw anchors and their positives, before and after T_x."""
    from mlviews.viz import draw_views  # matplotlib takes a second that other commands need not wait for

    console.print(draw_views(_arguments(preset, weights, seed, device), out, anchors, num_views, title=preset))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Training steps of 128 pairs.", min=1)] = 1000,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """The main job: train an encoder on views made by the bundled generator, then test it on real images.

    A few minutes on two CPU cores. It is the command `probe` with its defaults.
    """
    probe(out=out, steps=steps, data=data, seed=seed, device=device)


@app.command()
def probe(
    preset: Preset = "fashion-ml-random",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the figures.")] = Path("runs/probe"),
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1000,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step. Default: the preset's, else 128.", min=2)] = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "simclr",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW's one-cycle schedule. Default: the method's own.")] = None,
    temperature: Annotated[float, typer.Option(help="Of SimCLR's NT-Xent.")] = 0.2,
    weights: Weights = None,
    data: Data = None,
    labels: Annotated[int, typer.Option(help="Most labelled images to fit the probes on.", min=100)] = 10_000,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Train an encoder on a preset's views, then linear-probe and kNN it on real images next to raw pixels and an untrained encoder."""
    from mlviews.evaluation import probe as probing
    from mlviews.viz import draw_loss, draw_views

    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)  # an impossible folder is an error now, not after training
    arguments = {"batch_size": 128, **_arguments(preset, weights, seed, device), "layout": "pair"}
    if batch_size is not None:
        arguments["batch_size"] = batch_size
    source = mlviews.MLViewSource(**arguments)
    seed, batch_size = source.seed, source.batch_size
    fit, test = _real_images(data, labels)
    untrained = probing.initial(method, temperature, seed).encoder.eval()
    levels = ", ".join(f"{level.name}" for level in source.generator.levels)
    console.print(f"[bold]Views[/]: preset {preset}, levels {levels}, seed {seed}, on {source.device}. No file is read for them.")
    console.print(f"[bold]Probe[/]: {len(fit.labels)} labelled real images to fit, {len(test.labels)} to test ({data or 'bundled slice'}).")

    with bars(console) as progress:
        task = progress.add_task("training", total=steps)

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"training ({method}), loss {loss:.2f}")

        lr = RATES[method] if lr is None else lr
        encoder, losses = probing.train(source, steps, method, lr, temperature, seed, on_step)
        trained = time.perf_counter() - begin
        rows: dict[str, Any] = {"raw pixels": None, "untrained encoder": untrained, "encoder trained on views": encoder}
        task = progress.add_task("evaluating", total=len(rows))
        scores: dict[str, Scores] = {}
        for name, network in rows.items():
            progress.update(task, description=f"evaluating {name}")
            scores[name] = probing.evaluate(network, fit, test, seed)
            progress.advance(task)

    table = Table(title="Top-1 on real Fashion-MNIST test images, %")
    for column in ("features", *(f"linear, {share:.0%} of labels" for share in SHARES), "kNN"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, score in scores.items():
        table.add_row(name, *(f"{value:.1f}" for value in score.linear.values()), f"{score.knn:.1f}")
    console.print(table)
    images_made = f"{steps * batch_size * source.num_views:,} views" + ("" if source.pool else ", none seen twice")
    console.print(f"{steps} steps on {images_made}: {trained:.0f} s; {time.perf_counter() - begin:.0f} s in all.")

    record = {
        "command": " ".join(["mlviews", *sys.argv[1:]]),
        "preset": preset,
        "training": {"method": method, "steps": steps, "batch_size": batch_size, "lr": lr, "temperature": temperature, "seed": seed},
        "probe_images": len(fit.labels),
        "test_images": len(test.labels),
        "scores": {
            name: {"linear": {f"{share:g}": top1 for share, top1 in score.linear.items()}, "knn": score.knn}
            for name, score in scores.items()
        },
        "seconds": {"training": round(trained, 1), "all": round(time.perf_counter() - begin, 1)},
        "loss": [round(loss, 4) for loss in losses],
        "encoder_parameters": sum(p.numel() for p in Encoder().parameters()),
        **environment(source.device),
    }
    figures = out / "result.json"
    figures.write_text(json.dumps(record, indent=1) + "\n")
    console.print(figures)
    chance = math.log(2 * batch_size - 1) if method == "simclr" else None
    console.print(draw_views(arguments, out / "views.png", title=preset))
    console.print(draw_loss(losses, out / "loss.png", f"{method} on {preset}", chance))


@app.command()
def export(
    preset: Preset = "fashion-ml-random",
    format: Annotated[str, typer.Option(help="One of: folder (PNG files), webdataset (tar shards), ffcv (one .beton).")] = "folder",
    out: Annotated[Path | None, typer.Option(help="Folder to write, or to go on with. Default: runs/export-PRESET-FORMAT.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Samples to write. Default: the preset's, else 60000.", min=1)] = None,
    num_views: Annotated[
        int | None, typer.Option(help="Images of each, the anchor included. Default: the preset's, else 2.", min=1)
    ] = None,
    epoch: Annotated[int, typer.Option(help="Whose samples: every epoch has its own.", min=0)] = 0,
    augmented: Annotated[
        bool, typer.Option("--augmented/--raw", help="The views after the preset's T_x, or as generated: T_x is then left to the trainer.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Samples made at a time. Default: the preset's, else 128.", min=1)] = None,
    shard_size: Annotated[int, typer.Option(help="Samples of a shard: what is lost when a run is killed.", min=1)] = 1024,
    verify: Annotated[bool, typer.Option("--verify", help="Write nothing: check the files in the folder against their checksums.")] = False,
    weights: Weights = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Write views and their latents to files, for trainers that insist on them; on several ranks, each writes its share.

    A second call goes on where the first one stopped.
    """
    from mlviews.integrations import files

    out = out or Path("runs", f"export-{Path(preset).stem}-{format}")
    if verify:
        console.print(f"{files.verify(out):,} files in {out} are as they were written.")
        return
    arguments = {"batch_size": 128, **_arguments(preset, weights, seed, device), "layout": "pair", "drop_last": False}
    given = {"num_samples": num_samples, "num_views": num_views, "batch_size": batch_size}
    arguments |= {name: value for name, value in given.items() if value is not None}
    if not augmented:
        arguments |= {"transform": None, "crops": None}
    if arguments["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        arguments["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    source = mlviews.MLViewSource(**arguments)
    source.set_epoch(epoch)
    done = files.export(source, out, format, augmented=augmented, shard_size=shard_size, preset=preset)
    images = done.written * done.images
    console.print(f"{done.written:,} samples made, {images:,} images: {done.seconds:.0f} s, {images / done.seconds:,.0f} images/s.")
    if done.complete:
        console.print(f"{source.num_samples:,} samples in {done.files:,} files, {done.bytes / 1e6:,.1f} MB.")
        console.print(out / "manifest.json")
    else:
        console.print(f"{out} is unfinished: shards of other ranks are missing.")


Measured = Annotated[
    str, typer.Argument(help="A generator's name (see `mlviews generators`), or a preset or YAML file whose generator and anchors to take.")
]
OwnWeights = Annotated[
    str | None, typer.Option("--weights", help="Of the generator: a file, a URL, or a Hugging Face id. Default: its own.")
]
Target = Annotated[
    float, typer.Option(help="Plain InfoNCE in nats to move each level to. The paper's code would print 1.43 times as much.")
]
Pairs = Annotated[int, typer.Option(help="Pairs of a batch, over all processes.", min=2)]
Devices = Annotated[int, typer.Option(help="Processes on this machine, each with a device of its own.", min=1)]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder, or start anew.")]
MonteCarlo = Annotated[int, typer.Option(help="Anchors for the distances.", min=2)]
MeasuredSeed = Annotated[int, typer.Option("--seed", help="Of everything random.", min=0)]
Where = Annotated[str | None, typer.Option("--device", help="Where to run, e.g. cpu or cuda. Default: cuda where there is one, else cpu.")]


@app.command()
def impact(
    generator: Measured = "fashion",
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(IMPACT_METHODS)} (minutes, and the paper's).")] = "sweep",
    target_loss: Target = 0.7,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report, its pictures and the checkpoints. Default: runs/impact-GENERATOR-METHOD.")
    ] = None,
    pairs: Pairs = 64,
    steps: Annotated[int | None, typer.Option(help="Training steps: of the sweep's critics; at most, of each walker.", min=10)] = None,
    monte_carlo: MonteCarlo = 100_000,
    weights: OwnWeights = None,
    seed: MeasuredSeed = 0,
    device: Where = None,
    devices: Devices = 1,
    resume: Resume = True,
) -> None:
    """Measure how much each latent level matters (the paper's Table 1): a table, and a report to show around."""
    made, anchor = _measured(generator, weights)
    out = out or Path("runs", f"impact-{Path(generator).stem}-{method}")
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    report = mlviews.measure_impact(
        made, method, target_loss, out, anchor=anchor, seed=seed, device=device or _default_device(), devices=devices,
        monte_carlo=monte_carlo, pairs=pairs, resume=resume, **options,
    )  # fmt: skip
    if resolve_rank(None, None)[0] == 0:
        console.print(report)
        for line in report.headline:
            console.print(line)
        for path in report.save(out):
            console.print(path)


@app.command()
def walker(
    levels: Annotated[str, typer.Argument(help="Level to move, e.g. 2; or several together, start:stop as in a slice.")],
    generator: Annotated[
        str, typer.Option(help="A generator's name, or a preset or YAML file whose generator and anchors to take.")
    ] = "fashion",
    target_loss: Target = 0.7,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for walker.safetensors, its history and the checkpoint. Default: runs/walker-GENERATOR-LEVELS."),
    ] = None,
    pairs: Pairs = 64,
    steps: Annotated[int, typer.Option(help="Of the walker, at most.", min=1)] = 1000,
    directions: Annotated[float, typer.Option(help="That the anchors' shifts spread over, at least; 1 is the paper's: no matter.")] = 1.0,
    keep_norm: Annotated[
        bool, typer.Option(help="Keep each anchor's length, so that positives stay where the prior has its mass.")
    ] = False,
    monte_carlo: MonteCarlo = 100_000,
    weights: OwnWeights = None,
    seed: MeasuredSeed = 0,
    device: Where = None,
    devices: Devices = 1,
    resume: Resume = True,
) -> None:
    """Train a walker, the learned perturbation of one level or several (the paper's eq. 5), until InfoNCE is at the target."""
    made, anchor = _measured(generator, weights)
    moved = level_indices(levels, made.levels)
    out = out or Path("runs", f"walker-{Path(generator).stem}-{'-'.join(map(str, moved))}")
    done = mlviews.train_walker(
        made, moved, target_loss, out, pairs=pairs, steps=steps, directions=directions, keep_norm=keep_norm, anchor=anchor, seed=seed,
        device=device or _default_device(), devices=devices, resume=resume, monte_carlo=monte_carlo,
    )  # fmt: skip
    if resolve_rank(None, None)[0] == 0:
        found = done.distances
        console.print(
            f"{done.status}: {done.loss:.3f} ± {done.stderr:.3f} nats after {len(done.history.losses)} steps; "
            f"distance {found.mean:.3g} ± {found.std:.2g}, {found.relative:.2f} of that between two draws; "
            f"norm {found.norm:.2f} of the anchors'; {found.directions:.1f} directions."
        )
        for path in sorted(out.glob("*.*")):
            console.print(path)


def _measured(name: str, weights: str | None) -> tuple[mlviews.MLVGM, sampling.TruncatedNormal | None]:
    """A generator, and the law of its anchors where a preset gives one."""
    if name in mlviews.list_presets() or name.endswith((".yaml", ".yml")):
        config = {key: value for key, value in load_config(name).items() if key in ("generator", "weights", "anchor")}
        arguments = source_arguments(config if weights is None else {**config, "weights": weights})
        return arguments["generator"], arguments.get("anchor")
    return mlviews.load_generator(name, weights), None


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _real_images(folder: Path | None, labels: int) -> tuple[data.Labelled, data.Labelled]:
    """Images to fit the probes on, and to test them on."""
    if folder is None:
        fit, test = data.bundled_slice()
    else:
        fit, test = data.load_fashion_mnist(folder, "train", 28), data.load_fashion_mnist(folder, "test", 28)
    return data.Labelled(fit.images[:labels], fit.labels[:labels]), test


def _arguments(preset: str, weights: str | None, seed: int | None, device: str | None) -> dict[str, Any]:
    """A preset's arguments of the source, with what the command line gives in place of its own."""
    config = load_config(preset)
    arguments = {"seed": 0, **source_arguments(config if weights is None else {**config, "weights": weights})}
    if seed is not None:
        arguments["seed"] = seed
    arguments["device"] = device or arguments.get("device") or _default_device()
    return arguments


if __name__ == "__main__":
    main()
