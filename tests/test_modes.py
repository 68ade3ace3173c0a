"""Global modes of torch change nothing: every public entry point under every mode, and under all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from conftest import Toy
from torch import Tensor

import mlviews
from mlviews import MLViewSource, perturb, transforms
from mlviews.generators.film import FilmConfig, FilmGenerator

BRIEF = {"pairs": 4, "monte_carlo": 10, "progress": False, "width": 8}
SMALL = {"batch_size": 2, "num_samples": 4}


def film() -> FilmGenerator:
    generator = FilmGenerator(FilmConfig(dims=(2, 3), channels=(8, 4), groups=2))
    for parameter in generator.parameters():  # first weights follow from the default dtype, too
        size = parameter.numel()
        parameter.data = torch.linspace(-1, 1, size, dtype=parameter.dtype).view(parameter.shape)
    return generator


def toy_pairs(generator: mlviews.MLVGM) -> tuple[Tensor, Tensor]:
    batches = list(
        MLViewSource(generator, perturb.Normal(0.5), batch_size=250, num_samples=250, layout="pair")
    )
    return batches[0]


def random_walker() -> perturb.Walker:
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(1)
        return perturb.Walker(6)


# What is asked for, called with a Toy generator that was made under no mode.
ENTRIES: dict[str, Callable[[mlviews.MLVGM], Any]] = {
    "load_generator fashion": lambda g: mlviews.load_generator("fashion").sample_latents(range(2)),
    "load_generator fashion-nvae": lambda g: mlviews.load_generator("fashion-nvae").sample_latents(range(2)),
    "images": lambda g: g(g.sample_latents(range(2))),
    "decode": lambda g: g.decode(g.sample_latents(range(2))).detach(),
    "a generator": lambda g: film()(film().sample_latents(range(2))),
    "wrap_generator": lambda g: mlviews.wrap_generator(
        lambda z: z[0].sigmoid().view(-1, 1, 2, 2), levels=[("z", (4,))], image_shape=(1, 2, 2)
    ).sample_latents(range(2)),
    "preset": lambda g: next(iter(MLViewSource.from_config("fashion-ml-random", **SMALL))),
    "learned preset": lambda g: next(iter(MLViewSource.from_config("fashion-ml-learned", **SMALL))),
    "source": lambda g: list(
        MLViewSource(g, {1: random_walker(), 2: perturb.Resample()}, pool=True, **SMALL)
    ),
    "T_x": lambda g: list(MLViewSource(g, perturb.Normal(0.5), transform=transforms.byol(8), **SMALL)),
    "distances": lambda g: mlviews.impact.measure_distances(g, [1], perturb.Normal(0.5), count=100).mean,
    "info_nce": lambda g: mlviews.info_nce(torch.eye(4, 8, dtype=torch.float32, device="cpu"),
                                           torch.ones(4, 8, dtype=torch.float32, device="cpu")),
    "estimate_mi": lambda g: mlviews.estimate_mi(*toy_pairs(g), steps=2, folds=2).candidates,
    "sweep": lambda g: mlviews.measure_impact(
        g, train_pairs=4, steps=10, evaluations=2, **BRIEF
    ).impacts[0].curve.losses,
    "walker": lambda g: list(
        mlviews.train_walker(g, [1], steps=4, warmup=25, patience=2, **BRIEF).parameters()
    ),
}  # fmt: skip


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    # A tensor that is made without a device lands here, and cannot be computed with.
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, list[Callable[[], Any]]] = {
    "float64": [default_dtype],
    "device": [default_device],
    "inference mode": [torch.inference_mode],
    "no grad": [torch.no_grad],
    "deterministic": [deterministic],
    "autocast": [lambda: torch.autocast("cpu", torch.bfloat16)],
    "all": [default_dtype, default_device, torch.inference_mode, deterministic],
}


# What users construct themselves goes to the default device, as any module of torch's does.
CONSTRUCTIONS = ("a generator", "wrap_generator")
# What takes long is run in the modes that are not among all of them at once, and in these.
LONG = ("learned preset", "estimate_mi", "sweep", "walker")
ALONE = ("device", "no grad", "autocast", "all")
CASES = [
    (entry, mode)
    for entry in ENTRIES
    for mode in MODES
    if not (entry in CONSTRUCTIONS and default_device in MODES[mode])
    if not (entry in LONG and mode not in ALONE)
]


def results(entry: str) -> list[Any]:
    torch.manual_seed(0)
    return torch.utils._pytree.tree_leaves(ENTRIES[entry](Toy()))


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    return {}


@pytest.mark.parametrize(("entry", "mode"), CASES)
def test_a_mode_changes_nothing(entry: str, mode: str, expected: dict[str, list[Any]]) -> None:
    if entry not in expected:
        expected[entry] = results(entry)
    generator = Toy()
    with ExitStack() as stack:
        for manager in MODES[mode]:
            stack.enter_context(manager())
        leaves = torch.utils._pytree.tree_leaves(ENTRIES[entry](generator))
    assert len(leaves) == len(expected[entry]) > 0
    for leaf, known in zip(leaves, expected[entry], strict=True):
        if not isinstance(leaf, Tensor):
            assert leaf == pytest.approx(known, rel=1e-3)
            continue
        assert (leaf.dtype, leaf.device) == (known.dtype, known.device)
        tolerance = 0.05 if mode == "autocast" else 1e-5
        torch.testing.assert_close(leaf.detach(), known.detach(), atol=tolerance, rtol=tolerance)
