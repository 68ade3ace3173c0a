"""What a seed means: samples are those of version 0.1, and drawing takes no more room than one level does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import toy_source
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlviews import Level, MLViewSource, wrap_generator
from mlviews.perturb import Resample

CASES: dict[str, dict[str, Any]] = {
    "ml-random": {"preset": "fashion-ml-random"},
    "ml-learned": {"preset": "fashion-ml-learned", "num_views": 3},
    "nvae": {"preset": "fashion-nvae-resample"},
    "pool": {"preset": "fashion-single-random", "pool": True},
    "crops": {"preset": "fashion-ml-random", "crops": [0, 1, 0]},
}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_on_record(name: str) -> None:
    source = MLViewSource.from_config(CASES[name], batch_size=2, num_samples=64, seed=5)
    source.set_epoch(3)
    batch = source.batch(30, 32)
    with np.load(Path(__file__).parent / "golden" / "samples.npz") as file:
        keys = [key for key in file if key.startswith(f"{name}/")]
        recorded = {key.removeprefix(f"{name}/"): torch.from_numpy(file[key]) for key in keys}
    assert torch.equal(batch.indices, recorded["indices"])
    for view, latents in enumerate(batch.latents):
        # To the bit on one machine; another processor may round the inverse of the distribution function
        # otherwise.
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        torch.testing.assert_close(flat, recorded[f"latents{view}"], atol=2e-6, rtol=0)
    for crop, images in enumerate(batch.views):
        torch.testing.assert_close(
            images, recorded[f"view{crop}"].float(), atol=4e-3, rtol=0
        )  # kept in half precision


def test_a_replaced_source_is_the_same_but_for_its_changes() -> None:
    source = toy_source(num_views=3, seed=7)
    source.set_epoch(4)
    copy, other = source.replace(), source.replace(seed=8, batch_size=4)
    for mine, theirs in zip(source.batch(0, 8).views, copy.batch(0, 8).views, strict=True):
        assert torch.equal(mine, theirs)
    assert (other.seed, other.batch_size, other.num_views, other.epoch) == (8, 4, 3, 4)
    assert not torch.equal(source.batch(0, 8).views[0], other.batch(0, 8).views[0])
    with pytest.raises(ValueError, match=r"Invalid argument 'seeed' of MLViewSource.*Did you mean 'seed'"):
        source.replace(seeed=1)


class Largest(TorchDispatchMode):
    """Remembers the largest integer tensor that any operation returns: random words are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype == torch.int64:
                self.numbers = max(self.numbers, value.numel())
        return result


def test_many_wide_levels_are_drawn_one_at_a_time() -> None:
    levels, size, rows = 20, 12_288, 4
    generator = wrap_generator(
        lambda latents: torch.stack(list(latents)).mean(0).sigmoid(),
        levels=[Level(f"step{index}", (3, 64, 64)) for index in range(levels)],
        image_shape=(3, 64, 64),
    )
    source = MLViewSource(generator, Resample(), batch_size=rows, num_samples=rows)
    with Largest() as largest:
        source.batch(0, rows)
    assert largest.numbers <= rows * size
