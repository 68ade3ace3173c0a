"""Sources travel: a pickled, copied or inherited source goes on where it was, in every setting there is."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy, toy_source

from mlviews import MLViewSource, transforms
from mlviews.perturb import Fixed, Normal, Resample, Walker
from mlviews.step import Batch

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pair": {"layout": "pair"},
    "solo": {"layout": "solo"},
    "lightly": {"layout": "lightly"},
    "pool": {"pool": True},
    "classes": {"generator": "classes"},
    "tied": {"generator": "tied"},
    "perturbers": {"perturb": {0: Fixed(), 1: Resample(), 2: Walker(5)}},
    "one walker": {"perturb": {1: Walker(6, {"by": "hand"}, keep_norm=True)}},
    "walker that draws": {"perturb": {1: Walker(6, noise=True)}},
    "anchor": {"anchor": Normal(0.5, 1.0)},
    "T_x": {"transform": transforms.byol(12)},
    "crops": {"crops": (0, 1, 0), "transform": transforms.Augmentation(size=4)},
    "module as T_x": {"transform": torch.nn.Identity()},
    "views": {"num_views": 4},
    "ranks": {"rank": 1, "world_size": 2},
    "rest": {"drop_last": False, "num_samples": 45},
    "micro batches": {"micro_batch_size": 3},
    "device": {"device": "cpu"},
    "compiled": {"compile": True},
}


def source(name: str) -> MLViewSource:
    options = {"layout": whole, **SETTINGS[name]}
    if options.get("generator") == "tied":
        options |= {"generator": Toy((4, 4, 4), tied=True), "perturb": {1: Normal(1.0, 2.0)}}
    elif options.get("generator") == "classes":
        options["generator"] = Toy(num_classes=3)
    torch.manual_seed(0)
    return toy_source(**options)


def whole(batch: Batch) -> Batch:
    return batch


def leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same(one: Any, other: Any) -> bool:
    mine, theirs = leaves(one), leaves(other)
    return len(mine) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def pickled(original: MLViewSource) -> MLViewSource:
    return pickle.loads(pickle.dumps(original))  # type: ignore[no-any-return]


def saved_by_torch(original: MLViewSource) -> MLViewSource:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("travel", [pickled, copy.deepcopy, copy.copy, saved_by_torch])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_source_goes_on_where_it_was(name: str, travel: Any, used: bool) -> None:
    if name == "compiled":
        original = toy_source(compile=True)
        traveler = travel(original)
        assert traveler.step.compile
        assert traveler.state_dict() == original.state_dict()
        return
    original = source(name)
    if used:
        next(iter(original))
    original.load_state_dict({**original.state_dict(), "epoch": 2, "position": 16})
    traveler = travel(original)
    assert traveler.state_dict() == original.state_dict()
    assert same(list(traveler), list(original))


def first_batch(original: MLViewSource, path: Path) -> None:
    torch.set_num_threads(1)
    torch.save(leaves(original.batch(8, 16)), path)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_process_that_gets_a_source_makes_the_same_samples(method: str, tmp_path: Path) -> None:
    original = toy_source(perturb={1: Resample(), 2: Walker(5)}, transform=transforms.byol(12), layout="pair")
    path = tmp_path / "batch.pt"
    process = multiprocessing.get_context(method).Process(target=first_batch, args=(original, path))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for mine, theirs in zip(torch.load(path), leaves(original.batch(8, 16)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
