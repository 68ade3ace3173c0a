"""What the comparisons with official code share: options, cases, imports, goldens, and the record."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # of a script of this folder, Python knows this folder only
from record import RESULTS, command, write

from mlviews.runs.records import environment

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
LIMIT = 1e-3  # on images in [0, 1]
SEED = 0

Row = dict[str, Any]

Goldens = Annotated[bool, typer.Option(help="Write what CI compares with, in tests/golden.")]
Only = Annotated[str, typer.Option(help="Cases whose name has this in it; no record is written then.")]
Threads = Annotated[int, typer.Option(help="CPU threads.", min=1)]
Out = Annotated[Path | None, typer.Option(help="The record; None for the one in benchmarks/results.")]


def checkout(project: str) -> Any:
    """Return the option for the checkout of a project, for ``Annotated[Path, checkout(...)]``."""
    return typer.Option(help=f"Checkout of {project}.", exists=True, file_okay=False, resolve_path=True)


class Case(NamedTuple):
    """A network to compare."""

    name: str
    layout: str  # which official code
    facts: dict[str, Any]  # constructor arguments, in the official code's terms
    rows: int = 2  # images
    golden: int = 0  # small enough for CI, which gets every so-manyth pixel; 0: not for CI
    label: int | None = None  # BigGAN: of every image, folded into our weights; None: labels per sample
    psi: float = 1.0  # StyleGAN2
    timed: bool = False  # NVAE


@contextmanager
def imported(
    folder: Path, stubs: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Callable[[str], Any]]:
    """Import from a checkout, and forget its modules afterwards, for the checkouts share names.

    Args:
        folder: the folder that its imports begin from.
        stubs: modules that stand in for some of the checkout's imports, with their attributes.

    Yields:
        A function that imports a module by name.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    for name, attributes in (stubs or {}).items():
        stub = ModuleType(name)
        stub.__dict__.update(attributes)
        sys.modules.setdefault(name, stub)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name in (stubs or {}) or _lies_in(sys.modules[name], folder):
                del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Return whether a module, or a package without a file of its own, comes from a folder."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    return any(place is not None and Path(place).is_relative_to(folder) for place in places)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def largest(images: Tensor, official: Tensor) -> float:
    """Return the largest difference of a pixel; infinity if a value is none."""
    return (images - official).abs().nan_to_num(math.inf).max().item()


def write_golden(name: str, **arrays: Any) -> None:
    """Write what CI compares with where there are no checkouts."""
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)


def compare_all(cases: Sequence[Any], only: str, compare: Callable[[Any], Row]) -> list[Row]:
    """Compare the cases whose name has ``only`` in it."""
    chosen = [case for case in cases if only in case.name]
    return [compare(case) for case in track(chosen, "cases", console=Console(stderr=True))]


def run(
    name: str,
    cases: Sequence[Case],
    compare: Callable[[Case, Mapping[str, Path], bool], Row],
    checkouts: Mapping[str, Path],
    tables: tuple[Sequence[str], Sequence[str]],
    options: tuple[str, bool, int, Path | None],
) -> NoReturn:
    """Compare cases, print a table, write the record, and exit with 1 if an image differs too much.

    Args:
        name: of the script and of the record.
        cases: all there are.
        compare: returns the figures of a case, from the checkouts and whether to write its golden.
        checkouts: by the names of their options.
        tables: columns of the table, and the differences of images among the figures.
        options: values of :data:`Only`, :data:`Goldens`, :data:`Threads` and :data:`Out`.
    """
    only, goldens, threads, out = options
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    rows = compare_all(cases, only, lambda case: compare(case, checkouts, goldens))
    arguments = [word for key, folder in checkouts.items() for word in (f"--{key}", folder.name)]
    record = None if only else out or RESULTS / f"parity-{name}.json"
    script = f"{name.replace('-', '_')}.py"
    conclude(rows, *tables, script, [*arguments, "--threads", str(threads)], record)


def conclude(
    rows: Sequence[Row],
    columns: Sequence[str],
    keys: Sequence[str],
    script: str,
    arguments: Sequence[str],
    out: Path | None,
    limit: float = LIMIT,
    facts: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Print a table, write the record, and exit with 1 if an image differs by more than the limit.

    Args:
        rows: figures of each case.
        columns: those to print before the differences.
        keys: the differences of images.
        script: name in this folder.
        arguments: of the command in the record.
        out: the JSON file to write; None for a part of the cases.
        limit: the largest difference of a pixel that is allowed.
        facts: what else the record holds.
    """
    table = Table(*columns, *keys, title="Largest difference from the official code, on [0, 1]")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns), *(f"{row[key]:.1e}" for key in keys))
    worst = max((row[key] for row in rows for key in keys), default=0.0)
    console = Console(width=150)
    console.print(table, f"Largest difference of an image: {worst:.1e}; allowed: {limit:.0e}.", sep="\n")
    if out is not None:
        record = {"command": command(f"parity/{script}", arguments), "seed": SEED, **environment()}
        console.print(
            write(record | {"limit": limit, "worst": worst, "cases": list(rows), **(facts or {})}, out)
        )
    raise SystemExit(0 if worst <= limit else 1)


def _text(value: Any) -> str:
    """Return a figure for the table."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "" if value is None else str(value)


def as_json(value: Any) -> np.ndarray[Any, Any]:
    """Return a value as JSON in an array, for a golden."""
    return np.array(json.dumps(value))
