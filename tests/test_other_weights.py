"""Walkers and inverters of other weights than the generator's: they fit by shape, and are warned of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlviews import MLViewSource
from mlviews.generators import load_generator
from mlviews.generators.base import MLVGM
from mlviews.perturb import Walker

ZOO = Path(__file__).parents[1] / "mlviews" / "zoo"
LEARNED = {"1:": Walker.load(ZOO.parent / "presets" / "fashion-ml-learned.safetensors")}


def changed(path: Path) -> Path:
    """Write the weights of ``fashion`` with one value changed."""
    with safe_open(ZOO / "fashion.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors["rgb.bias"] += 0.5
    save_file(tensors, path, metadata)
    return path


def check_silent(generator: MLVGM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MLViewSource(generator, perturb=LEARNED, batch_size=2)


def test_a_walker_of_other_weights_is_warned_of(tmp_path: Path) -> None:
    generator = load_generator("film", changed(tmp_path / "other.safetensors"))
    with pytest.warns(UserWarning, match="16x16, 32x32 was trained for other weights .* 'film'"):
        MLViewSource(generator, perturb=LEARNED, batch_size=2)
    check_silent(generator)  # it was said
    check_silent(load_generator("fashion"))
    # What nobody can tell: weights that are rounded, and a walker that does not say.
    check_silent(load_generator("film", tmp_path / "other.safetensors").to(torch.bfloat16))
    unknown = {"1:": Walker(16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MLViewSource(generator.float(), perturb=unknown, batch_size=2)


def test_an_inverter_of_other_weights_is_warned_of(tmp_path: Path) -> None:
    other, inverter = changed(tmp_path / "other.safetensors"), ZOO / "fashion-inverter.safetensors"
    with pytest.warns(UserWarning, match="inverter was trained for other weights .* 'film'"):
        load_generator("film", other, inverter=inverter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generator("film", ZOO / "fashion.safetensors", inverter=inverter)
        load_generator("fashion")
