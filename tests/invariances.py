"""What every generator has to keep, as functions that its tests call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import assert_same, by_index, toy_source
from test_source import Watch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlviews import MLVGM
from mlviews.perturb import Perturber, Resample


def labels_of(g: MLVGM, rows: int) -> Tensor | None:
    """Labels of the first samples, where the generator takes any."""
    return g.sample_labels(range(rows)) if g.num_classes else None


def check_samples(
    g: MLVGM, tolerance: float, perturb: dict[int | str, Perturber] | None = None, num_views: int = 2
) -> None:
    """Batch size, number of ranks and a resume change no sample.

    None for ``perturb`` draws the last level afresh.
    """

    def source(**options: Any) -> Any:
        return toy_source(**({"generator": g, "num_samples": 8, "batch_size": 4} | options))

    options = {"perturb": perturb or {len(g.levels) - 1: Resample()}, "num_views": num_views}
    whole = by_index(source(**options))
    assert_same(by_index(source(**options, batch_size=2)), whole, tolerance)
    ranks = [by_index(source(**options, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert_same({**ranks[0], **ranks[1]}, whole, tolerance)
    first, second = source(**options), source(**options)
    iterator = iter(first)
    batches = [next(iterator)]
    second.load_state_dict(first.state_dict())
    assert_same(by_index([*batches, *second]), whole, tolerance)


def check_prefixes(g: MLVGM, tolerance: float) -> None:
    """Views share the blocks before the first level that moves, and are what they are alone."""
    anchors, others = g.sample_latents(range(3)), g.sample_latents(range(3), seed=1)
    labels = labels_of(g, 3)
    for first in range(len(g.levels) + 1):
        views = [anchors, [*anchors[:first], *others[first:]]]
        alone = [g(z, labels) for z in views]
        for shared, image in zip(g.decode_views(views, first, labels), alone, strict=True):
            torch.testing.assert_close(shared, image, atol=tolerance, rtol=0)


def check_device(make: Callable[[], MLVGM]) -> None:
    """A step makes everything on the device, and never waits for it."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("cuda"):
            generator = make()
        source = toy_source(
            perturb={len(generator.levels) - 1: Resample()},
            generator=generator,
            layout="solo",
            device="cuda",
            num_samples=24,
        )
        iterator = iter(source)
        next(iterator)  # the plan's constants are sent there once
        with Watch() as watch:
            indices, views, targets = next(iterator)
    assert {value.device.type for value in (indices, targets, *views)} == {"cuda"}
    assert watch.devices == {"cuda"}
    assert watch.waits == []
    assert watch.operations > 20


def check_resumed_training(trainer: Callable[[], Any], folder: Path) -> tuple[Any, Any]:
    """Four steps of a zoo's trainer, and two with two more by another one that reads its checkpoint.

    Args:
        trainer: makes a trainer, each time in the same state.
        folder: for the checkpoint.

    Returns:
        The trainer that was not interrupted, and the one that was resumed.
    """
    whole, first, second = trainer(), trainer(), trainer()
    history = [whole.step() for _ in range(4)]
    resumed = [first.step() for _ in range(2)]
    torch.save(first.state_dict(), folder / "checkpoint.pt")
    second.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True))
    resumed += [second.step() for _ in range(2)]
    assert resumed == history
    for expected, actual in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(actual, expected)
    return whole, second
