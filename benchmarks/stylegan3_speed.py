"""Our StyleGAN3 and StyleGAN-XL against the official generators on this machine's CPU.

``python benchmarks/stylegan3_speed.py --stylegan3 DIR --xl DIR``

The directories are checkouts of NVlabs/stylegan3 and autonomousvision/stylegan-xl, run in float32 by their
reference operations, which are all they have on a CPU. Weights are random. Both sides take turns in one
process, so that a busy machine slows both; the time is the process' own (wall time is recorded beside it).
Memory is measured in processes of its own, as growth of the resident set and as what torch allocates. Prints
tables, writes ``benchmarks/results/stylegan3-speed.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.append(str(Path(__file__).parent / "parity"))  # its scripts know their folder only
from biggan_speed import allocated, forget_peak, resident
from compare import SEED, Case, largest
from documents.common import markdown
from documents.generators import TIMES, stylegan2_times, stylegan3_memory
from record import RESULTS, command, off_the_records, publish
from stylegan2_speed import time_case
from stylegan3 import NVLABS, XL, decode, network, official, unit, xl
from torch import Tensor

from mlviews.generators.stylegan.stylegan3_reading import load as load_stylegan3
from mlviews.runs.records import environment
from mlviews.weights import checkpoints

GOAL = 1.5  # times as fast
SIDES = ("official", "ours")


def cases(base: int) -> dict[str, Case]:
    """Return the networks, whose channels are in proportion to the official channel_base."""
    return {
        "t, 128 px": Case("t", NVLABS, network(128, "t", base, base // 64), rows=2),
        "r, 128 px": Case("r", NVLABS, network(128, "r", base, base // 64), rows=2),
        "XL, 64 px": Case("xl", XL, xl(16, "t", 1000, 2, 2, base=base, largest=base // 64), rows=2),
    }


class Sides:
    """Both generators, on the same weights and latents; only one of them if that is all that is asked for."""

    def __init__(self, case: Case, checkouts: dict[str, Path], sides: tuple[str, ...] = SIDES) -> None:
        with tempfile.TemporaryDirectory() as folder:
            generator = official(case, checkouts, Path(folder))
            self.generator = generator if "official" in sides else None
            self.mine = (
                load_stylegan3(checkpoints.read(Path(folder) / "network.pkl")) if "ours" in sides else None
            )
        labels = torch.arange(case.rows) if generator.c_dim else None
        self.inputs = torch.randn(case.rows, generator.z_dim), labels

    def official(self, rows: int | None = None) -> Tensor:
        """Return the official images of the first latents in [0, 1]."""
        z, labels = self.inputs
        return unit(decode(self.generator, z[:rows], None if labels is None else labels[:rows], 1))

    def ours(self, rows: int | None = None) -> Tensor:
        """Return our images of the first latents."""
        z, labels = self.inputs
        assert self.mine is not None
        return self.mine([z[:rows]] * len(self.mine.levels), None if labels is None else labels[:rows])


@torch.no_grad()
def memory(case: Case, side: str, checkouts: dict[str, Path]) -> dict[str, float]:
    """Return MiB of one side's images, in a process of its own."""
    before = resident("VmRSS")
    call = getattr(Sides(case, checkouts, (side,)), side)
    call(1)  # what is made once
    loaded = resident("VmRSS")
    forget_peak()
    call()
    peak = resident("VmHWM")
    return {
        "resident_before": round(loaded - before, 1),
        "resident_growth": round(peak - loaded, 1),
        "resident_peak": round(peak - before, 1),
        "allocated_peak": round(allocated(call), 1),
    }


def measure_memory(name: str, options: list[str]) -> dict[str, Any]:
    """Return MiB of each side, each measured by a process that this script starts."""
    rows: dict[str, Any] = {}
    for side in SIDES:
        arguments = [sys.executable, __file__, *options, "--memory-of", f"{name}/{side}"]
        process = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(process.stderr)
        rows[side] = json.loads(process.stdout.splitlines()[-1])
    return rows


def main(
    stylegan3: Annotated[
        Path, typer.Option(help="Checkout of NVlabs/stylegan3.", exists=True, file_okay=False)
    ],
    xl: Annotated[Path, typer.Option(help="Checkout of autonomousvision/stylegan-xl.", exists=True)],
    runs: Annotated[int, typer.Option(help="Runs of each, after one to warm up.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    base: Annotated[
        int, typer.Option(help="The official channel_base; the largest networks have 32768.", min=512)
    ] = 32768,
    only: Annotated[str, typer.Option(help="Cases whose name holds this; no record is written.")] = "",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "stylegan3-speed.json",
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time both, case by case, and measure their memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    checkouts = {NVLABS: stylegan3.resolve(), XL: xl.resolve()}
    if memory_of:
        name, side = memory_of.split("/")
        print(json.dumps(memory(cases(base)[name], side, checkouts)))
        return
    options = ["--stylegan3", str(checkouts[NVLABS]), "--xl", str(checkouts[XL]), "--threads", str(threads)]
    options += ["--base", str(base)]
    rows = []
    for name, case in cases(base).items():
        if only not in name:
            continue
        used = measure_memory(name, options)
        sides = Sides(case, checkouts)
        with torch.no_grad():
            row = time_case(name, case.rows, sides.official, sides.ours, runs)
            row["largest_difference"] = largest(sides.ours(), sides.official())
        rows.append(row | {"memory_mib": used})
    arguments = ["--stylegan3", stylegan3.name, "--xl", xl.name, "--runs", str(runs)]
    arguments += ["--base", str(base)]
    record = {"command": command("stylegan3_speed.py", arguments), "seed": SEED, "runs": runs, "base": base}
    record |= {"cases": rows} | environment()
    tables = (markdown(TIMES, stylegan2_times(record, "StyleGAN3")), stylegan3_memory(record))
    publish(record, off_the_records(out) if only else out, *tables, f"Goal by CPU time: {GOAL}.")


if __name__ == "__main__":
    typer.run(main)
