"""Does the estimate of mutual information agree with the truth? ``python benchmarks/mi.py`` asks where the truth has a closed form.

10,000 pairs of each distribution, whose parameter is set by the truth asked for; the linear-Gaussian generator is met through a source,
which gives as many again to evaluate on. Prints a table, writes ``benchmarks/results/mi.json``.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from record import RESULTS, apart, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from mlviews import MLVGM, MLViewSource
from mlviews.mi.estimate import estimate_mi
from mlviews.perturb import Normal, Resample
from mlviews.runs.records import environment

PAIRS, TRUTHS = 10_000, (0.2, 0.5, 1.0, 2.0)  # nats
Pairs = tuple[Tensor, Tensor]


def solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a decreasing function has this value, by bisection on a logarithmic scale."""
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) > value else (low, middle)
    return low


def gaussian(nats: float, dims: int, seed: int) -> Pairs:
    """Coordinates of equal correlation rho: ``-dims / 2 * log(1 - rho^2)`` nats."""
    rho, generator = math.sqrt(1 - math.exp(-2 * nats / dims)), torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, PAIRS, dims, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def uniform(nats: float, dims: int, seed: int) -> Pairs:
    """``y = x + a u`` with x and u uniform on [0, 1]: ``a / 2 - log a`` nats a coordinate, or ``1 / 2a`` where a is above 1."""
    a = solve(lambda a: a / 2 - math.log(a) if a < 1 else 0.5 / a, nats / dims, 1e-6, 1e6)
    x, noise = torch.rand(2, PAIRS, dims, generator=torch.Generator().manual_seed(seed))
    return x, x + a * noise


def curved(pairs: Pairs) -> Pairs:
    """Another monotone function of the scalars of each side."""
    return pairs[0] ** 3, pairs[1].exp()


def spiral(pairs: Pairs) -> Pairs:
    """Both sides turned by as many radians as they are far from the origin, in opposite directions (Czyz et al. 2023)."""

    def turned(x: Tensor, speed: float) -> Tensor:
        angle = speed * x.norm(dim=1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)

    return turned(pairs[0], 1.0), turned(pairs[1], -1.0)


def sheared(pairs: Pairs) -> Pairs:
    """Both sides rotated, stretched, and bent by a sine: a warp that mixes the scalars."""

    def bent(x: Tensor, angle: float) -> Tensor:
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        h = x @ turn
        h = h + 0.4 * h.sinh()
        return torch.stack([h[:, 0], h[:, 1] + torch.sin(h[:, 0])], 1)

    return bent(pairs[0], 0.7), bent(pairs[1], 1.9)


class Add(nn.Module):
    """A block that adds a linear image of its latent."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, z: Tensor, state: Tensor | None) -> Tensor:
        added = z @ self.get_buffer("weight").T
        return added if state is None else state + added


class LinearGaussian(MLVGM):
    """Definition 1 with linear blocks: two levels of four scalars, and noise on each of 8 x 8 pixels as the third; a sigmoid makes images.

    With N(0, 1) anchors, the first level moved by normal noise and the others drawn afresh, anchor and positive are jointly Gaussian before
    the sigmoid, which changes no information.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse, fine = (torch.randn(64, 4, generator=generator) / 8 for _ in range(2))
        blocks = [Add(coarse), Add(fine), Add(0.3 * torch.eye(64))]
        super().__init__(blocks, [("coarse", (4,)), ("fine", (4,)), ("noise", (64,))], (1, 8, 8))

    def to_image(self, state: Tensor) -> Tensor:
        """The pixels, in [0, 1]."""
        return torch.sigmoid(state).view(-1, 1, 8, 8)

    def nats(self, std: float) -> float:
        """``(log det Sx + log det Sy - log det Sxy) / 2`` from the covariances of both views; the coarse level moves by N(0, std)."""
        shared, fine, noise = (weight @ weight.T for weight in (block.get_buffer("weight").double() for block in self.blocks))
        x, y = shared + fine + noise, (1 + std**2) * shared + fine + noise
        joint = torch.cat([torch.cat([x, shared], 1), torch.cat([shared, y], 1)])
        return float(x.logdet() + y.logdet() - joint.logdet()) / 2


def images(nats: float, dims: int, seed: int) -> MLViewSource:
    """Views of the linear-Gaussian generator."""
    generator = LinearGaussian()
    perturb = {"coarse": Normal(solve(generator.nats, nats, 1e-3, 1e3)), "fine": Resample(), "noise": Resample()}
    return MLViewSource(generator, perturb, anchor=Normal(1.0), batch_size=1000, num_samples=2 * PAIRS, seed=seed)


class Case(NamedTuple):
    """A distribution to validate on."""

    name: str
    make: Callable[[float, int, int], Pairs | MLViewSource]
    dims: int
    warp: Callable[[Pairs], Pairs] | None = None
    required: bool = True  # False: set apart as a limit, after trials had missed the criterion there


CASES = [
    *(Case(f"Gaussian, {dims} dims", gaussian, dims) for dims in (1, 2, 5, 10)),
    Case("Gaussian, 5 dims, x³ and exp y", gaussian, 5, curved),
    Case("Gaussian, 2 dims, sheared", gaussian, 2, sheared),
    Case("uniform noise", uniform, 1),
    Case("uniform noise, x³ and exp y", uniform, 1, curved),
    Case("linear-Gaussian MLVGM, 8×8 px", images, 64),
    Case("Gaussian, 2 dims, spiral", gaussian, 2, spiral, required=False),
    Case("uniform noise, 2 dims", uniform, 2, required=False),
]


def estimate(case: int, nats: float, seed: int) -> dict[str, float]:
    """One estimate, on one core."""
    torch.set_num_threads(1)
    found = CASES[case]
    made = found.make(nats, found.dims, seed)
    begin = time.process_time()  # of the processor: other estimates run beside this one
    if isinstance(made, MLViewSource):
        result = estimate_mi(made, seed=seed, pairs=PAIRS)
    else:
        result = estimate_mi(*(found.warp(made) if found.warp else made), seed=seed)
    spent = time.process_time() - begin
    return {
        "nats": round(result.nats, 4),
        "stderr": round(result.stderr, 4),
        "ceiling": round(result.ceiling, 3),
        "cpu_seconds": round(spent, 1),
    }


def main(
    seeds: Annotated[int, typer.Option(help="Seeds, from 0 on, of samples and critics alike.", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="One seed, and the truths 0.2 and 2 alone.")] = False,
    jobs: Annotated[int, typer.Option(help="Estimates made at once, each on one core.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "mi.json",
) -> None:
    """Estimate mutual information where it is known."""
    torch.set_num_threads(1)
    out = apart(out) if quick else out
    used, truths = list(range(1 if quick else seeds)), (TRUTHS[0], TRUTHS[-1]) if quick else TRUTHS
    tasks = [(case, nats, seed) for case in range(len(CASES)) for nats in truths for seed in used]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        made = list(track(pool.map(estimate, *zip(*tasks, strict=True)), "estimates", len(tasks), console=Console(stderr=True)))
    found = dict(zip(tasks, made, strict=True))

    table = Table("distribution", "truth", "estimates", "stderr", "error of the mean", "largest excess, stderr", "CPU, s")
    rows = []
    for index, case in enumerate(CASES):
        for nats in truths:
            runs = [found[index, nats, seed] for seed in used]
            mean = statistics.mean(run["nats"] for run in runs)
            excess = max((run["nats"] - nats) / run["stderr"] for run in runs)
            met = abs(mean / nats - 1) <= 0.1 and excess <= 2
            rows.append({"case": case.name, "required": case.required, "truth": nats, "met": met, "runs": runs})
            table.add_row(
                case.name, f"{nats:g}", ", ".join(f"{run['nats']:.3f}" for run in runs), f"{max(run['stderr'] for run in runs):.3f}",
                f"{mean / nats - 1:+.1%}{'' if met else ' !'}", f"{excess:+.1f}", f"{max(run['cpu_seconds'] for run in runs):.0f}",
            )  # fmt: skip
        table.add_section()
    Console().print(table)

    record = {
        "command": shlex.join(["python", "benchmarks/mi.py", *sys.argv[1:]]), "pairs": PAIRS, "seeds": used, "jobs": jobs, "rows": rows,
    } | environment()  # fmt: skip
    Console().print(write(record, out))


if __name__ == "__main__":
    typer.run(main)
