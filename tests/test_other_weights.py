"""What belongs to other weights than the generator has: it fits by shape, and is warned of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlviews import MLViewSource, measure_impact
from mlviews.explorer.costs import Costs
from mlviews.generators import load_generator
from mlviews.generators.base import MLVGM
from mlviews.perturb import Walker
from mlviews.sharing import publish

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
    with pytest.warns(UserWarning, match="16x16, 32x32 belongs to other weights .* 'film'"):
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
    with pytest.warns(UserWarning, match="inverter belongs to other weights .* 'film'"):
        load_generator("film", other, inverter=inverter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generator("film", ZOO / "fashion.safetensors", inverter=inverter)
        load_generator("fashion")


def test_a_report_of_other_weights_is_warned_of(tmp_path: Path) -> None:
    fashion = load_generator("fashion")
    quick = {"steps": 10, "train_pairs": 4, "pairs": 8, "evaluations": 2, "monte_carlo": 10}
    measure_impact(fashion, levels=[3], progress=False, **quick).save(tmp_path / "report")
    other = load_generator("film", changed(tmp_path / "other.safetensors"))
    with pytest.warns(UserWarning, match="report belongs to other weights .* 'film'"):
        Costs.load(tmp_path / "report", other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Costs.load(tmp_path / "report", fashion).report is not None
    named = load_generator("fashion", tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match="report belongs to other weights .* 'fashion'"):
        publish(named, tmp_path / "shared", report=tmp_path / "report")
