from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
from conftest import external

import mlviews

ROOT = Path(__file__).parents[1]


def test_public_names_are_sorted_and_there() -> None:
    assert mlviews.__all__ == sorted(
        mlviews.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
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


def test_a_wheel_has_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [
        path.relative_to(ROOT)
        for name in ("mlviews", "integrations")
        for path in ROOT.glob(f"{name}/**/*.py")
    ]
    names = {".".join(file.parent.parts) for file in files}
    assert set(settings["packages"]) == {
        name if name[:7] == "mlviews" else f"mlviews.{name}" for name in names
    }


def test_importing_takes_no_extra_and_changes_nothing() -> None:
    code = """
import json, random, sys, time, warnings
import numpy as np, torch
def state():
    rng = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    modes = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()]
    return [*rng, *modes, list(warnings.filters)]
before = state()
begin = time.process_time()
import mlviews
seconds = time.process_time() - begin
extras = ["kornia", "huggingface_hub", "lightly", "lightning", "pytorch_lightning", "sklearn"]
extras += ["torchvision", "matplotlib", "scipy", "typer", "jinja2.environment", "lightning_fabric"]
extras += ["pandas", "rich", "pydantic", "diffusers", "transformers", "gradio", "fastapi", "uvicorn"]
extras += ["datasets", "pyarrow"]
imported = [name for name in extras if name in sys.modules]
print(json.dumps({"same": before == state(), "imported": imported, "seconds": seconds}))
"""
    out = json.loads(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    assert out["same"]
    assert out["imported"] == []
    assert out["seconds"] < 2


def test_loading_needs_no_network_no_compiler_and_no_other_process(tmp_path: Path) -> None:
    files = {
        name: str(external(kind, tmp_path / name))
        for name, kind in (("bigbigan", "bigbigan"), ("stylegan2", "stylegan2-cars"), ("nvae", "nvae"))
    }
    code = """
import socket, subprocess, sys
import mlviews
def refuse(*arguments, **options):
    raise AssertionError("a connection or a process was started")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = subprocess.Popen.__init__ = refuse
for name, file in {"fashion": None, "fashion-nvae": None, "fashion-diffusion": None, **FILES}.items():
    g = mlviews.load_generator(name, weights=file)
    assert g(g.sample_latents(range(1))).isfinite().all()
print("all loaded")
"""
    command = [sys.executable, "-c", code.replace("FILES", repr(files))]
    done = subprocess.run(
        command, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "all loaded\n", done.stderr


def test_weights_and_slice_are_small() -> None:
    for path in (ROOT / "mlviews" / "zoo").iterdir():
        parts = path.rglob("*") if path.is_dir() else [path]
        assert sum(part.stat().st_size for part in parts) <= 4_000_000, path.name
