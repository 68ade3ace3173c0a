"""Our BigBiGAN beside the research code's: ``python benchmarks/biggan_speed.py --research DIR --threads 1``.

DIR is a checkout of SerezD/mi_ml_gen, whose ``BatchManager`` runs as it is; what it imports for real data and
for StyleGAN2 is stubbed. Both have the same random weights of the published size (128 pixels, width 96) and
the same T_x (crop to 112, flip, normalise), and take turns at every measurement. Timed are whole steps (draw
latents, two views, T_x) and the generator alone; working memory is measured in processes of its own, as
growth of the resident set and as what torch allocates. Prints tables, writes
``benchmarks/results/biggan-speed.json``. The research code needs einops.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from documents.common import markdown
from documents.generators import TIMES, biggan_memory, biggan_times, precision
from parity.compare import SEED, imported, largest, shapes_of
from parity.fill import fill
from record import RESULTS, command, off_the_records, publish
from timing import Seconds, median_and_quartiles, ratios, take_turns
from torch import Tensor

import mlviews
from mlviews import perturb
from mlviews.generators.biggan.network import BigGAN
from mlviews.generators.biggan.reading import HUB_EPS
from mlviews.generators.biggan.reading import load as load_biggan
from mlviews.runs.records import environment
from mlviews.weights.checkpoints import read

SIZE = 112  # of a view after T_x
NORMAL = [0.0, 1.0, 2.0]  # the paper's perturbation of BigBiGAN: mean, deviation, truncation
CASES = {
    "levels 2-6": 1,
    "levels 4-6": 3,
    "level 6": 5,
}  # the first level that is perturbed, as all later ones are
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "compile": {"compile": True},
    "micro_batch_size=4": {"micro_batch_size": 4},
}
SIDES = ("research", "ours", "ours, micro_batch_size=4")
PEAKS = ("resident_peak_in_step", "allocated_peak_in_step")


# -- the two sides -------------------------------------------------------------------------------------------


class Research(NamedTuple):
    """What is used of the research code."""

    make_config: Callable[[int], dict[str, Any]]
    generator: Callable[..., Any]
    batch_manager: Callable[[dict[str, Any]], Any]
    decode: Callable[[Any, Tensor], Tensor]

    @classmethod
    def load(cls, checkout: Path) -> Research:
        """Import it; data loading and StyleGAN2 are not used here, and not imported."""
        stubs = {
            "data": {},
            "data.loading": {"preprocess_stylegan_batch": None},
            "src.generators.stylegan2_ada": {"legacy": None},
        }
        with imported(checkout / "mi_ml_gen", stubs) as load:
            return cls(
                load("src.generators.bigbigan").make_biggan_config,
                load("src.generators.bigbigan.model.BigGAN").Generator,
                load("src.multiview_encoders.batch_management").BatchManager,
                load("src.generators.utils").decode,
            )

    def views(self, weights: Path, first: int) -> Any:
        """Return its maker of batches."""
        return self.batch_manager({
            "data_type": "bigbigan",
            "generator_path": str(weights),
            "anchor_params": NORMAL,
            "Tz": {f"{first}_6": NORMAL},
            "Tx": "no_color",
        })  # fmt: skip


def make_weights(research: Research, path: Path) -> None:
    """Write random weights of the published size.

    They have the statistics and singular vectors that a few training passes leave.
    """
    network = research.generator(**research.make_config(128))
    network.load_state_dict(fill(shapes_of(network.state_dict()), SEED))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _ in range(3):
            z = torch.randn(4, network.dim_z, generator=generator)
            network(z, network.shared(torch.zeros(4, dtype=torch.int64)))
    torch.save(network.state_dict(), path)


def our_generator(path: Path) -> BigGAN:
    """Return ours, from the same file."""
    return load_biggan(read(path), label=0, bn_eps=HUB_EPS)


def our_source(generator: BigGAN, first: int, pairs: int, **options: Any) -> mlviews.MLViewSource:
    """Return a source with the same views as the research code's."""
    return mlviews.MLViewSource(
        generator,
        {f"{first}:": perturb.Normal(std=NORMAL[1], truncation=NORMAL[2])},
        transform=mlviews.transforms.simclr(size=SIZE, color=False),
        batch_size=pairs,
        num_samples=1 << 20,
        seed=SEED,
        layout="pair",
        **options,
    )


# -- time ----------------------------------------------------------------------------------------------------


def compare(research: Seconds, ours: Seconds) -> dict[str, Any]:
    """Return the figures of both sides, and of the ratio of each turn."""
    return {
        clock: {
            "research": median_and_quartiles(research[clock]),
            "ours": median_and_quartiles(ours[clock]),
            "ratio": median_and_quartiles(ratios(research[clock], ours[clock])),
        }
        for clock in ("wall", "cpu")
    }


def time_case(
    name: str, research: Research, weights: Path, generator: BigGAN, pairs: int, repeats: int
) -> dict[str, Any]:
    """Time steps and generator of both sides, for one set of perturbed levels."""
    first = CASES[name]
    manager, batches = research.views(weights, first), iter(our_source(generator, first, pairs))
    anchors = generator.sample_latents(range(pairs))
    positives = [*anchors[:first], *generator.sample_latents(range(pairs), seed=1)[first:]]
    flat = torch.cat([torch.cat(anchors, dim=1), torch.cat(positives, dim=1)])  # [2 pairs, z of all levels]
    placeholder = torch.zeros(pairs, 1)

    @torch.no_grad()
    def research_images() -> Tensor:
        return research.decode(manager.generator, flat)

    def our_images() -> list[Tensor]:
        return generator.decode_views([anchors, positives], first)

    seconds = take_turns(
        {
            "research step": lambda: manager.generate_batch(placeholder, rank=0, epoch=0),
            "our step": lambda: next(batches),
            "research generator": research_images,
            "our generator": our_images,
        },
        repeats,
        name,
    )
    return {
        "step": compare(seconds["research step"], seconds["our step"]),
        "generator": compare(seconds["research generator"], seconds["our generator"]),
        "largest_difference": largest(torch.cat(our_images()), research_images()),
    }


def time_options(generator: BigGAN, pairs: int, repeats: int) -> dict[str, Any]:
    """Time our steps under the source's options, levels 2 to 6 perturbed."""
    figures: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, options in OPTIONS.items():
        try:
            batches = iter(our_source(generator, 1, pairs, **options))
            next(batches)
        except Exception as error:  # no compiler, no instructions for it
            figures[name] = {"error": str(error).splitlines()[0]}
        else:
            steps[name] = batches.__next__
    seconds = take_turns(steps, repeats, "options")
    for name, clocks in seconds.items():
        figures[name] = {clock: median_and_quartiles(values) for clock, values in clocks.items()}
        figures[name]["cpu_of_float32"] = median_and_quartiles(
            ratios(clocks["cpu"], seconds["float32"]["cpu"])
        )
    return figures


# -- memory --------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """Return MiB of this process: VmRSS now, or VmHWM at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Begin a new maximum of the resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def allocated(call: Callable[[], object]) -> float:
    """Return MiB that torch's tensors take at most during the call, beyond those from before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / 2**20


def memory(checkout: Path, weights: Path, side: str, pairs: int) -> dict[str, float]:
    """Return the working memory of one step of one of SIDES, in a process of its own."""
    before = resident("VmRSS")
    if side == "research":
        manager = Research.load(checkout).views(weights, 1)
        step, warmup = (
            partial(manager.generate_batch, torch.zeros(count, 1), rank=0, epoch=0) for count in (pairs, 1)
        )
    else:
        generator = our_generator(weights)
        micro_batch_size = 4 if side.endswith("4") else None
        step = iter(our_source(generator, 1, pairs, micro_batch_size=micro_batch_size)).__next__
        warmup = iter(our_source(generator, 1, 1)).__next__
    warmup()  # what is made once
    loaded = resident("VmRSS")
    forget_peak()
    step()
    return {
        "resident_before_step": round(loaded - before, 1),
        "resident_peak_in_step": round(resident("VmHWM") - loaded, 1),
        "allocated_peak_in_step": round(allocated(step), 1),
    }


def measure_memory(checkout: Path, weights: Path, pairs: int, threads: int) -> dict[str, Any]:
    """Return MiB of each side, each measured by a process that this script starts."""
    rows: dict[str, Any] = {}
    for side in SIDES:
        options = ["--research", str(checkout), "--pairs", str(pairs), "--threads", str(threads)]
        options += ["--memory-of", side, "--weights", str(weights)]
        process = subprocess.run(
            [sys.executable, __file__, *options], capture_output=True, text=True, check=False
        )
        if process.returncode:
            raise SystemExit(process.stderr)
        rows[side] = json.loads(process.stdout.splitlines()[-1])
    for row in rows.values():
        row |= {f"{peak}_of_research": round(row[peak] / rows["research"][peak], 3) for peak in PEAKS}
    return rows


# -- the benchmark -------------------------------------------------------------------------------------------


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
        out = off_the_records(out)
    code = Research.load(checkout)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        make_weights(code, path)
        used = measure_memory(checkout, path, memory_pairs, threads)
        generator = our_generator(path)
        steps = {name: time_case(name, code, path, generator, pairs, repeats) for name in CASES}
        options = time_options(generator, pairs, max(repeats // 2, 2))
    size = ["--quick"] if quick else ["--pairs", str(pairs), "--repeats", str(repeats)]
    record = {
        "command": command("biggan_speed.py", ["--research", "DIR", *size, "--threads", str(threads)]),
        "pairs": pairs, "memory_pairs": memory_pairs, "repeats": repeats, "quick": quick, "seed": SEED,
        "steps": steps, "memory_mib": used, "options": options,
    } | environment()  # fmt: skip
    times = [*biggan_times(record), *biggan_times(record, "generator")]
    publish(record, out, markdown(TIMES, times), biggan_memory(record), precision(record))


if __name__ == "__main__":
    typer.run(main)
