from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import mlviews
from mlviews import MLViewSource, transforms
from mlviews.config import KEYS, load_config
from mlviews.perturb import Normal, Resample

DOCUMENT = (Path(mlviews.__file__).parent / "presets" / "README.md").read_text()


@pytest.mark.parametrize("preset", mlviews.list_presets())
def test_presets_make_batches(preset: str) -> None:
    source = MLViewSource.from_config({"preset": preset, "batch_size": 2, "num_samples": 2})
    anchor, positive = next(iter(source))
    assert anchor.shape == positive.shape == (2, 3, 28, 28)
    assert preset in DOCUMENT


def test_no_perturbation_leaves_the_pixels_to_t_x() -> None:
    source = MLViewSource.from_config({"preset": "fashion-none", "batch_size": 2, "num_samples": 2, "transform": None})
    anchor, positive = next(iter(source))
    assert anchor.equal(positive)


def test_what_is_given_replaces_the_presets_value_as_a_whole() -> None:
    source = MLViewSource.from_config({"preset": "fashion-ml-random", "perturb": {3: "resample"}, "seed": 5, "transform": None})
    assert [(assignment.levels, type(assignment.perturber)) for assignment in source.assignments] == [((3,), Resample)]
    assert source.seed == 5
    assert source.transforms == [None, None]
    assert source.batch_size == 256


def test_names_files_mappings_and_omegaconf_agree(tmp_path: Path) -> None:
    values = {"preset": "fashion-none", "perturb": {"1:": {"name": "normal", "std": 0.5}}, "batch_size": 4}
    OmegaConf.save(OmegaConf.create(values), tmp_path / "own.yaml")
    expected = load_config(values)
    assert load_config(tmp_path / "own.yaml") == load_config(str(tmp_path / "own.yaml")) == expected
    assert load_config(OmegaConf.create(values)) == expected
    assert load_config("fashion-none") == load_config({"preset": "fashion-none"})
    assert expected["generator"] == "fashion"


def test_integer_and_string_keys_mean_the_same() -> None:
    for key in (1, "1", "8x8"):
        source = MLViewSource.from_config({"generator": "fashion", "perturb": {key: {"name": "normal", "std": 0.5}}})
        assert source.assignments == [((1,), Normal(0.5))]


def test_byol_gives_each_view_its_own_pipeline() -> None:
    source = MLViewSource.from_config({"preset": "fashion-none", "transform": {"name": "byol", "size": 28}})
    assert source.transforms == list(transforms.byol(28))


def test_every_key_is_documented() -> None:
    for key in KEYS:
        assert f"\n{key}:" in DOCUMENT, key


def test_the_documented_example_works() -> None:
    example = DOCUMENT.split("```yaml\n")[1].split("```")[0]
    source = MLViewSource.from_config(OmegaConf.create(example))
    assert [assignment.levels for assignment in source.assignments] == [(1, 2), (3,)]
