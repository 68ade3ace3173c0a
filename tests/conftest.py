"""A generator small enough for thousands of batches, and ways to look at a source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlviews import MLVGM, Level, MLViewSource, load_generator
from mlviews.generators.nvae.reading import source_shapes
from mlviews.perturb import Normal
from mlviews.source import Batch
from mlviews.weights import write_safetensors
from mlviews.weights.checkpoints import FORMAT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what torch 2.4 cannot do without a GPU: fake tensors on a CUDA device ask for the driver."""
    try:
        return (yield)
    except RuntimeError as error:
        if torch.__version__ < "2.5" and "CUDA driver version is insufficient" in str(error):
            pytest.skip("torch 2.4 asks for CUDA's driver even for fake tensors")
        raise


class ToyBlock(nn.Module):
    """A block that remembers how many samples it was run on."""

    def __init__(self, dim: int, out: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.rows = 0

    def forward(self, z: Tensor, state: Tensor | None) -> Tensor:
        self.rows += len(z)
        new = self.linear(z.flatten(1))
        return new if state is None else torch.tanh(state) + new


class Toy(MLVGM):
    """Three levels; images 4x4."""

    def __init__(self, dims: Iterable[int] = (4, 6, 5), **options: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            blocks = [ToyBlock(dim) for dim in dims]
        super().__init__(blocks, [Level(f"l{i}", (dim,)) for i, dim in enumerate(dims)], (1, 4, 4), **options)

    def to_image(self, state: Tensor) -> Tensor:
        return torch.sigmoid(state).view(-1, 1, 4, 4)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="session")
def fashion() -> MLVGM:
    return load_generator("fashion")


def toy_source(**options: object) -> MLViewSource:
    """A source on a toy generator that hands out whole batches."""
    defaults = {
        "generator": None,
        "perturb": {"1:": Normal(1.0, 2.0)},
        "batch_size": 8,
        "num_samples": 48,
        "layout": _whole,
        "seed": 3,
    }
    arguments = {**defaults, **options}
    return MLViewSource(**{**arguments, "generator": arguments["generator"] or Toy()})  # type: ignore[arg-type]


def external(kind: str, path: Path) -> Path:
    """A weights file of another project's layout: the published architecture, with few channels and random
    values.
    """
    from fill import fill, iterated  # only pytest has it on its path; other processes use this file too

    golden = Path(__file__).parent / "golden"
    if kind == "stylegan-xl":
        tensors, metadata, _ = stylegan3_golden("xl-32px-tiny")
        write_safetensors(path, tensors, metadata)
    elif kind == "bigbigan":
        with np.load(golden / "biggan-small-128.npz") as file:
            facts = json.loads(str(file["facts"]))
        torch.save(fill({name: tuple(shape) for name, shape in facts["shapes"].items()}, facts["seed"]), path)
    elif kind == "stylegan2-cars":
        style, names = (
            {
                "affine.weight": (4, 8),
                "affine.bias": (4,),
                "weight": (4, 4, 3, 3),
                "bias": (4,),
                "noise_strength": (),
            },
            {},
        )
        for size in (4 << i for i in range(8)):
            for layer in ("conv1",) if size == 4 else ("conv0", "conv1"):
                names |= {f"synthesis.b{size}.{layer}.{name}": shape for name, shape in style.items()}
                names[f"synthesis.b{size}.{layer}.noise_const"] = (size, size)
            names |= {
                f"synthesis.b{size}.torgb.{name}": style[name] for name in ("affine.weight", "affine.bias")
            }
            names |= {f"synthesis.b{size}.torgb.weight": (3, 4, 1, 1), f"synthesis.b{size}.torgb.bias": (3,)}
        names |= {
            f"mapping.fc{i}.{name}": shape
            for i in range(2)
            for name, shape in {"weight": (8, 8), "bias": (8,)}.items()
        }
        made = fill({**names, "synthesis.b4.const": (4, 4, 4), "mapping.w_avg": (8,)}, 0)
        # Stored weights are N(0, 1) and more: their gain comes at run time, the mapping network's with a
        # factor of 0.01.
        gains = {
            name: value.shape[1:].numel() ** 0.5 * (100 if "mapping" in name else 1)
            for name, value in made.items()
            if value.ndim > 1
        }
        torch.save(
            {name: value * gains.get(name, 1) + ("affine.bias" in name) for name, value in made.items()}, path
        )
    elif kind in ("biggan-deep", "vdvae"):
        name = {"biggan-deep": "deep-biggan-tiny-16", "vdvae": "vdvae-tiny-8"}[kind]
        with np.load(golden / f"{name}.npz") as file:
            shapes = {key: tuple(shape) for key, shape in json.loads(str(file["shapes"])).items()}
        tensors = iterated(fill(shapes, 0))
        for key in tensors:
            if key.endswith("running_vars"):
                tensors[key] = 0.5 + tensors[key].abs()
        torch.save(tensors, path)
    else:
        with np.load(golden / "nvae-serezd-tiny.npz") as file:
            facts = json.loads(str(file["facts"]))
        facts["resolution"] = [3, 32, 32]
        facts["autoencoder"] |= {"num_scales": 3, "num_groups_per_scale": 1}
        torch.save({"configuration": facts, "state_dict": fill(source_shapes("nvae-serezd", facts), 0)}, path)
    return path


@cache
def stylegan3_golden(case: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return tensors of a small StyleGAN3 or StyleGAN-XL, a converted file's metadata, and the golden."""
    import stylegan3 as parity  # only pytest has it on its path, as above

    with np.load(Path(__file__).parent / "golden" / f"stylegan3-{case}.npz") as file:
        golden = {name: file[name] for name in file}
    shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    stored = {name: torch.from_numpy(value) for name, value in golden.items() if name.endswith(parity.STORED)}
    tensors = parity.random_weights(shapes, int(golden["seed"])) | stored
    metadata = {"format": FORMAT, "layout": str(golden["layout"]), "facts": str(golden["facts"])}
    return tensors, metadata, golden


def _whole(batch: Batch) -> Batch:
    return batch


def by_index(batches: Iterable[Batch]) -> dict[int, Tensor]:
    """All views of each sample, by its global index; an index that comes twice is an error."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            assert index not in found, f"sample {index} was handed out twice"
            found[index] = torch.stack([view[row] for view in batch.views])
    return found


def assert_same(one: dict[int, Tensor], other: dict[int, Tensor], tolerance: float = 1e-6) -> None:
    """The same samples with the same content: up to what another batch size does to float sums, or to the bit
    (0).
    """
    assert one.keys() == other.keys()
    for index in one:
        torch.testing.assert_close(one[index], other[index], atol=tolerance, rtol=0)


def torchrun(*arguments: str, processes: int = 2, seconds: int = 240, **environment: str) -> str:
    """What torchrun prints on its standard error.

    A start that the machine's network refused is tried once more.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *arguments,
    ]
    where = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}
    for refused in (True, False):
        done = subprocess.run(
            command, timeout=seconds, capture_output=True, text=True, check=False, env=where
        )
        if done.returncode == 0 or not (
            refused and any(word in done.stderr for word in ("Rendezvous", "gloo/transport", "TCPStore"))
        ):
            break
    assert done.returncode == 0, done.stderr
    return done.stderr
