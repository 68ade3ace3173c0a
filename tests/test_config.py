from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import external
from fill import fill
from omegaconf import OmegaConf

import mlviews
from mlviews import MLViewSource, WeightsError, transforms
from mlviews.config import KEYS, load_config
from mlviews.perturb import Normal, Resample, Walker

DOCUMENT = (Path(mlviews.__file__).parent / "presets" / "README.md").read_text()


EXTERNAL = {
    "bigbigan": 112,
    "stylegan2-cars": 112,
    "nvae": 28,
}  # presets that need weights -> size of their views


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: external(kind, tmp_path_factory.mktemp(kind) / "weights.pt") for kind in EXTERNAL}


@pytest.mark.parametrize("preset", mlviews.list_presets())
def test_presets_make_batches(preset: str, files: dict[str, Path]) -> None:
    kind = next((kind for kind in EXTERNAL if preset.startswith(kind)), None)
    config = {"preset": preset, "batch_size": 2, "num_samples": 2}
    if kind is not None:
        with pytest.raises(ValueError, match=r"no bundled weights: pass weights=FILE"):
            MLViewSource.from_config(config)
        config["weights"] = str(files[kind])
        if preset.endswith("learned"):
            with pytest.raises(ValueError, match=r"The walker of level .* has no file: add walkers: FILE"):
                MLViewSource.from_config(config)
            file = files[kind].with_suffix(".safetensors")
            Walker(100 if kind == "bigbigan" else 8).save(file)
            config["walkers"] = str(file) if kind == "bigbigan" else dict.fromkeys((0, 2, 3), str(file))
    source = MLViewSource.from_config(config)
    anchor, positive = next(iter(source))
    size = EXTERNAL.get(kind or "", 28)
    assert anchor.shape == positive.shape == (2, 3, size, size)
    assert f"`{preset}`" in DOCUMENT


def test_files_of_walkers() -> None:
    config = {"generator": "fashion", "perturb": {1: {"name": "walker"}, 2: "fixed"}}
    for walkers, message in (
        ({2: "w.safetensors"}, "2 is no walker of this configuration, which has 1"),
        (None, r"The walker of level 1 has no file: add walkers: FILE, or walkers: \{1: FILE\}"),
    ):
        with pytest.raises(ValueError, match=message):
            MLViewSource.from_config({**config, "walkers": walkers})
    with pytest.raises(ValueError, match="this configuration has no walker"):
        MLViewSource.from_config({"preset": "fashion-none", "walkers": "w.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        MLViewSource.from_config({**config, "walkers": "nowhere.safetensors"})


def test_a_biggan_is_not_taken_for_bigbigan(tmp_path: Path) -> None:
    with np.load(Path(__file__).parent / "golden" / "biggan-tiny-32.npz") as file:
        facts = json.loads(str(file["facts"]))
    torch.save(
        fill({name: tuple(shape) for name, shape in facts["shapes"].items()}, facts["seed"]),
        tmp_path / "G_ema.pth",
    )
    with pytest.raises(
        WeightsError, match=r"has 4 levels of \(20,\), BigBiGAN 6 of \(20,\): load it as 'biggan'"
    ):
        mlviews.load_generator("bigbigan", weights=tmp_path / "G_ema.pth")
    assert mlviews.load_generator("biggan", weights=tmp_path / "G_ema.pth").num_classes == 10


def test_a_biggan_deep_is_refused_by_name(tmp_path: Path) -> None:
    names = ("embeddings.weight", "generator.gen_z.weight_orig")
    torch.save({f"G.{name}": torch.ones(2, 2) for name in names}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="holds a BigGAN-deep, which feeds all of z to every block"):
        mlviews.load_generator("biggan", weights=tmp_path / "pytorch_model.bin")


def test_the_papers_settings() -> None:
    """Paper, sec. 4.1 and app. F."""
    cars = load_config("stylegan2-cars-ml-random")
    assert cars["generator"] == {"name": "stylegan2", "groups": 4, "crop": 384, "size": 128}
    assert [cars["perturb"][key]["std"] for key in (0, 1, "2:")] == [0.2, 0.1, 0.8]
    assert cars["anchor"] == {"std": 1.0, "truncation": 0.9}
    bigbigan = load_config("bigbigan-ml-random")
    assert bigbigan["perturb"] == {0: "fixed", "1:": {"name": "normal", "std": 1.0, "truncation": 2.0}}
    assert load_config("bigbigan-single-random")["perturb"] == {
        "name": "normal",
        "std": 0.2,
        "truncation": 2.0,
    }
    assert load_config("nvae-resample")["perturb"] == {2: "resample"}


def test_no_perturbation_leaves_the_pixels_to_t_x() -> None:
    source = MLViewSource.from_config(
        {"preset": "fashion-none", "batch_size": 2, "num_samples": 2, "transform": None}
    )
    anchor, positive = next(iter(source))
    assert anchor.equal(positive)


def test_what_is_given_replaces_the_presets_value_as_a_whole() -> None:
    source = MLViewSource.from_config(
        {"preset": "fashion-ml-random", "perturb": {3: "resample"}, "seed": 5, "transform": None}
    )
    assert [(assignment.levels, type(assignment.perturber)) for assignment in source.assignments] == [
        ((3,), Resample)
    ]
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
        source = MLViewSource.from_config(
            {"generator": "fashion", "perturb": {key: {"name": "normal", "std": 0.5}}}
        )
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
