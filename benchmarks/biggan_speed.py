"""Our BigBiGAN beside the research code's: ``python benchmarks/biggan_speed.py --research DIR --threads 1``.

DIR is a checkout of SerezD/mi_ml_gen, whose ``BatchManager`` runs as it is; what it imports for real data and for StyleGAN2 is
stubbed. Both have the same random weights of the published size (128 pixels, width 96) and the same T_x (crop to 112, flip,
normalise), and take turns at every measurement. Timed are whole steps (draw latents, two views, T_x) and the generator alone; working
memory is measured in processes of its own, as growth of the resident set and as what torch allocates. Prints tables, writes
``benchmarks/results/biggan-speed.json``. The research code needs einops.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import RESULTS, apart, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mlviews
from mlviews import perturb
from mlviews.generators.biggan.network import BigGAN
from mlviews.generators.biggan.reading import HUB_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import read

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from fill import fill

SEED = 0
SIZE = 112  # of a view after T_x
NORMAL = [0.0, 1.0, 2.0]  # the paper's perturbation of BigBiGAN: mean, deviation, truncation
CASES = {"levels 2-6": 1, "levels 4-6": 3, "level 6": 5}  # the first level that is perturbed, all later ones being so too


# -- the two sides -------------------------------------------------------------------------------------------------


def research_code(checkout: Path) -> None:
    """Make its packages importable; data loading and StyleGAN2 are not used here."""
    sys.path.insert(0, str(checkout / "mi_ml_gen"))
    for name, attribute in (("data.loading", "preprocess_stylegan_batch"), ("src.generators.stylegan2_ada", "legacy")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        sys.modules[name] = module
    sys.modules["data"] = types.ModuleType("data")


def make_weights(checkout: Path, path: Path) -> None:
    """Random weights of the published size, with the statistics and singular vectors that a few training passes leave."""
    research_code(checkout)
    from src.generators.bigbigan import make_biggan_config
    from src.generators.bigbigan.model.BigGAN import Generator

    network = Generator(**make_biggan_config(128))
    network.load_state_dict(fill({name: tuple(value.shape) for name, value in network.state_dict().items()}, SEED))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, network.dim_z, generator=generator), network.shared(torch.zeros(4, dtype=torch.int64)))
    torch.save(network.state_dict(), path)


def research(checkout: Path, path: Path, first: int) -> Any:
    """Its maker of batches."""
    research_code(checkout)
    from src.multiview_encoders.batch_management import BatchManager

    configuration = {
        "data_type": "bigbigan", "generator_path": str(path), "anchor_params": NORMAL, "Tz": {f"{first}_6": NORMAL}, "Tx": "no_color",
    }  # fmt: skip
    return BatchManager(configuration)


def source(generator: BigGAN, first: int, pairs: int, **options: Any) -> mlviews.MLViewSource:
    """Ours."""
    moved = {f"{first}:": perturb.Normal(std=NORMAL[1], truncation=NORMAL[2])}
    transform = mlviews.transforms.simclr(size=SIZE, color=False)
    return mlviews.MLViewSource(
        generator, moved, transform=transform, batch_size=pairs, num_samples=1 << 20, seed=SEED, layout="pair", **options
    )


def load(path: Path) -> BigGAN:
    """Our generator."""
    return load_biggan(read(path), label=0, bn_eps=HUB_EPS)


# -- time ----------------------------------------------------------------------------------------------------------


def alternate(calls: dict[str, Callable[[], object]], repeats: int, title: str) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each call, which take turns; a first turn warms up."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in calls}
    for turn in track(range(repeats + 1), title, console=Console(stderr=True)):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                seconds[name]["wall"].append(wall)
                seconds[name]["cpu"].append(cpu)
    return seconds


def figures(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(statistics.median(values), 4), "quartiles": [round(low, 4), round(high, 4)]}


def compare(slow: dict[str, list[float]], quick: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of both, and the ratio of each turn."""
    made: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        ratios = [one / other for one, other in zip(slow[clock], quick[clock], strict=True)]
        made[clock] = {"research": figures(slow[clock]), "ours": figures(quick[clock]), "ratio": figures(ratios)}
    return made


def time_case(checkout: Path, path: Path, generator: BigGAN, first: int, pairs: int, repeats: int, name: str) -> dict[str, Any]:
    """Steps and generator of both sides, for one set of perturbed levels."""
    manager = research(checkout, path, first)
    from src.generators.utils import decode

    batches = iter(source(generator, first, pairs))
    asked = torch.zeros(pairs, 1)
    anchors = generator.sample_latents(range(pairs))
    moved = [*anchors[:first], *generator.sample_latents(range(pairs), seed=1)[first:]]
    together = torch.cat([torch.cat(anchors, dim=1), torch.cat(moved, dim=1)])

    @torch.no_grad()
    def theirs() -> Tensor:
        images: Tensor = decode(manager.generator, together)
        return images

    both = torch.cat(generator.decode_views([anchors, moved], first))
    difference = (both - theirs()).abs().max().item()
    calls = {
        "research step": lambda: manager.generate_batch(asked, rank=0, epoch=0),
        "our step": lambda: next(batches),
        "research generator": theirs,
        "our generator": lambda: generator.decode_views([anchors, moved], first),
    }
    seconds = alternate(calls, repeats, name)
    return {
        "step": compare(seconds["research step"], seconds["our step"]),
        "generator": compare(seconds["research generator"], seconds["our generator"]),
        "largest_difference": difference,
    }


def time_options(generator: BigGAN, pairs: int, repeats: int) -> dict[str, Any]:
    """Steps of ours under the source's options, levels 2 to 6 perturbed."""
    options: dict[str, dict[str, Any]] = {
        "float32": {}, "bfloat16": {"dtype": "bfloat16"}, "compile": {"compile": True}, "micro_batch_size=4": {"micro_batch_size": 4},
    }  # fmt: skip
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, chosen in options.items():
        try:
            batches = iter(source(generator, 1, pairs, **chosen))
            next(batches)
        except Exception as error:  # no compiler, no instructions for it
            found[name] = {"error": str(error).splitlines()[0]}
        else:
            calls[name] = batches.__next__
    seconds = alternate(calls, repeats, "options")
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(values["cpu"], seconds["float32"]["cpu"], strict=True)]
        found[name] = {clock: figures(values[clock]) for clock in values} | {"cpu_of_float32": figures(ratios)}
    return found


# -- memory --------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Begin a new maximum of the resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def allocated(call: Callable[[], object]) -> float:
    """MiB that torch's tensors take at most during the call, beyond those from before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def memory(checkout: Path, path: Path, side: str, pairs: int) -> dict[str, float]:
    """Working memory of one step, in a process of its own. ``side``: research, ours, or ours in micro-batches of 4."""
    before = resident("VmRSS")
    if side == "research":
        maker = research(checkout, path, 1)
        step, warm = (partial(maker.generate_batch, torch.zeros(count, 1), rank=0, epoch=0) for count in (pairs, 1))
    else:
        generator = load(path)
        batches = iter(source(generator, 1, pairs, micro_batch_size=4 if side.endswith("4") else None))
        step, warm = batches.__next__, iter(source(generator, 1, 1)).__next__
    warm()  # what is made once
    loaded = resident("VmRSS")
    forget_peak()
    step()
    return {
        "resident_before_step": round(loaded - before, 1),
        "resident_peak_in_step": round(resident("VmHWM") - loaded, 1),
        "allocated_peak_in_step": round(allocated(step), 1),
    }


def measure_memory(checkout: Path, path: Path, pairs: int, threads: int) -> dict[str, Any]:
    """MiB of each side."""
    found: dict[str, Any] = {}
    for side in ("research", "ours", "ours, micro_batch_size=4"):
        own = ["--research", str(checkout), "--pairs", str(pairs), "--threads", str(threads), "--memory-of", side, "--weights", str(path)]
        done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    for row in found.values():
        for kind in ("resident_peak_in_step", "allocated_peak_in_step"):
            row[f"{kind}_of_research"] = round(row[kind] / found["research"][kind], 3)
    return found


# -- all of it -----------------------------------------------------------------------------------------------------


def main(
    research: Annotated[Path, typer.Option(help="Checkout of SerezD/mi_ml_gen.", exists=True)],
    pairs: Annotated[int, typer.Option(help="Pairs of views in a step.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Measurements of each, after one to warm up.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="4 pairs, 3 measurements; memory as ever.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "biggan-speed.json",
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time and memory of both."""
    torch.set_num_threads(threads)
    checkout = research.resolve()
    if memory_of and weights is not None:
        print(json.dumps(memory(checkout, weights, memory_of, pairs)))
        return
    memory_pairs = pairs
    if quick:
        pairs, repeats = 4, 3
        out = apart(out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        make_weights(checkout, path)
        used = measure_memory(checkout, path, memory_pairs, threads)
        generator = load(path)
        timed = {name: time_case(checkout, path, generator, first, pairs, repeats, name) for name, first in CASES.items()}
        options = time_options(generator, pairs, max(repeats // 2, 2))

    table = Table(
        "perturbed", "", "research, s", "ours, s", "ratio, wall (quartiles)", "ratio, CPU", title=f"{pairs} pairs, {threads} thread(s)"
    )
    for name, case in timed.items():
        for part in ("step", "generator"):
            wall, cpu = case[part]["wall"], case[part]["cpu"]
            low, high = wall["ratio"]["quartiles"]
            table.add_row(
                name, part, f"{wall['research']['median']:.2f}", f"{wall['ours']['median']:.2f}",
                f"{wall['ratio']['median']:.2f} ({low:.2f} – {high:.2f})", f"{cpu['ratio']['median']:.2f}",
            )  # fmt: skip
    Console().print(table)
    table = Table(
        "memory, MiB", "before the step", "resident, peak", "allocated, peak", title=f"{memory_pairs} pairs: beyond what was there before"
    )
    for side, row in used.items():
        peaks = [f"{row[kind]:.0f} ({row[f'{kind}_of_research']:.0%})" for kind in ("resident_peak_in_step", "allocated_peak_in_step")]
        table.add_row(side, f"{row['resident_before_step']:.0f}", *peaks)
    Console().print(table)
    table = Table("option", "CPU time of a step, s", "of float32's")
    for name, row in options.items():
        table.add_row(
            name, *([row["error"], ""] if "error" in row else [f"{row['cpu']['median']:.2f}", f"{row['cpu_of_float32']['median']:.2f}"])
        )
    Console().print(table)

    arguments = [*(["--quick"] if quick else ["--pairs", str(pairs), "--repeats", str(repeats)]), "--threads", str(threads)]
    record = {
        "command": shlex.join(["python", "benchmarks/biggan_speed.py", "--research", "DIR", *arguments]),
        "pairs": pairs, "repeats": repeats, "quick": quick, "seed": SEED, "steps": timed, "memory_mib": used, "options": options,
    } | environment()  # fmt: skip
    Console().print(write(record, out))


if __name__ == "__main__":
    typer.run(main)
