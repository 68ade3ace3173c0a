from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import torch

import mlviews

ROOT = Path(__file__).parents[1]


def test_public_names_are_sorted_and_there() -> None:
    assert mlviews.__all__ == sorted(mlviews.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(mlviews, name) for name in mlviews.__all__)


def test_loading_a_generator_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    mlviews.load_generator("fashion")
    assert torch.equal(before, torch.get_rng_state())


def test_one_version() -> None:
    assert importlib.metadata.version("mlviews") == mlviews.__version__


def test_integrations_are_installed_inside_the_package() -> None:
    import mlviews.integrations

    assert Path(mlviews.integrations.__file__).parent == ROOT / "integrations"


def test_importing_takes_no_extra_and_changes_nothing() -> None:
    code = """
import json, random, sys, time, warnings
import numpy as np, torch
def state():
    rng = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return [*rng, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters)]
before = state()
begin = time.process_time()
import mlviews
seconds = time.process_time() - begin
extras = ["kornia", "lightly", "lightning", "pytorch_lightning", "sklearn", "torchvision", "matplotlib", "scipy", "typer"]
print(json.dumps({"same": before == state(), "imported": [name for name in extras if name in sys.modules], "seconds": seconds}))
"""
    out = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert out["same"]
    assert out["imported"] == []
    assert out["seconds"] < 2


def test_weights_and_slice_are_small() -> None:
    for path in (ROOT / "mlviews" / "zoo").iterdir():
        assert path.stat().st_size <= 4_000_000, path.name
