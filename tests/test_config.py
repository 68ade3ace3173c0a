from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import external
from fill import fill
from omegaconf import OmegaConf

import mlviews
from mlviews import MLViewSource, WeightsError, transforms
from mlviews.config import ARGUMENTS, KEYS, load_config
from mlviews.perturb import Normal, Resample, Walker
from mlviews.step import ByOrigin

DOCUMENT = (Path(mlviews.__file__).parent / "presets" / "README.md").read_text()


EXTERNAL = {
    "bigbigan": 112,
    "stylegan2-cars": 112,
    "stylegan-xl-imagenet128": 112,
    "stylegan-xl-imagenet256": 224,
    "nvae": 28,
}  # presets that need weights -> size of their views


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: external(kind.partition("-imagenet")[0], tmp_path_factory.mktemp(kind) / "weights.pt")
        for kind in EXTERNAL
    }


@pytest.mark.parametrize("preset", mlviews.list_presets())
def test_presets_make_batches(preset: str, files: dict[str, Path]) -> None:
    kind = next((kind for kind in EXTERNAL if preset.startswith(kind)), None)
    config = {"preset": preset, "batch_size": 2, "num_samples": 2}
    if "real" in preset:
        with pytest.raises(ValueError, match=rf"Preset '{preset}' needs images: give images="):
            MLViewSource.from_config(config)
        config["images"] = torch.rand(3, 1, 28, 28)
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


def test_the_keys_are_the_sources_arguments() -> None:
    assert list(ARGUMENTS) == list(inspect.signature(MLViewSource).parameters)


def test_overrides_replace_values_of_presets_files_and_mappings(tmp_path: Path) -> None:
    path = tmp_path / "views.yaml"
    path.write_text("preset: fashion-none\nbatch_size: 4\n")
    for config in ("fashion-none", path, {"preset": "fashion-none", "batch_size": 4}):
        source = MLViewSource.from_config(config, batch_size=2, seed=9, transform=None)
        assert (source.batch_size, source.seed, source.transforms) == (2, 9, [None, None])
    with pytest.raises(ValueError, match=r"Unknown key 'batchsize'.*Did you mean 'batch_size'"):
        MLViewSource.from_config("fashion-none", batchsize=2)


WALKER = {"name": "walker"}


@pytest.mark.parametrize(
    "config",
    [
        lambda file: {"perturb": {1: WALKER}, "walkers": file},
        lambda file: {"perturb": {1: WALKER}, "walkers": {"1": file}},
        lambda file: {"perturb": {"1": WALKER}, "walkers": {1: file}},
        lambda file: {"perturb": {np.int64(1): WALKER}, "walkers": {np.int32(1): file}},
        lambda file: {"perturb": OmegaConf.create({1: WALKER}), "walkers": file},
        lambda file: {"perturb": OmegaConf.create({"1": {"name": "walker", "path": file}})},
        lambda file: {"perturb": {1: OmegaConf.create({"name": "walker", "path": file})}, "pool": np.True_},
        lambda file: {"perturb": {1: WALKER}, "walkers": Path(file), "seed": np.int64(3)},
        lambda file: {**OmegaConf.create({"perturb": {1: WALKER}, "walkers": file}), "device": "cpu"},
        lambda file: {"perturb": {1: WALKER}, "walkers": file, "seed": "???"},
    ],
)
def test_keys_and_values_of_other_libraries_mean_the_same(config: Any, tmp_path: Path) -> None:
    Walker(16).save(tmp_path / "w.safetensors")
    source = MLViewSource.from_config(
        {"generator": "fashion", "batch_size": 4, **config(str(tmp_path / "w.safetensors"))}
    )
    assert [assignment.levels for assignment in source.assignments] == [(1,)]
    assert isinstance(source.assignments[0].perturber, Walker)
    assert source.seed in (0, 3)


def test_paths_are_those_beside_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiment"
    Walker(16).save(folder / "w.safetensors")
    (folder / "views.yaml").write_text(
        "generator: fashion\nperturb: {1: {name: walker, path: w.safetensors}}\n"
    )
    Walker(16).save(tmp_path / "home" / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert MLViewSource.from_config("experiment/views.yaml").assignments
    assert MLViewSource.from_config("experiment/views.yaml", walkers="~/other.safetensors").assignments
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        MLViewSource.from_config("experiment/views.yaml", walkers="missing.safetensors")


NINE = ", ".join(["x"] * 9)
BOMBS = {
    "aliases of aliases": f"k0: &a0 [{NINE}]\n"
    + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "a list in itself": "perturb: &a [*a]\n",
    "a mapping in itself": "perturb: &a {b: *a}\n",
    "lists in lists": "perturb: " + "[" * 2000 + "]" * 2000 + "\n",
    "mappings in mappings": "perturb: " + "{a: " * 200 + "}" * 200 + "\n",
    "two megabytes": "seed: " + "1" * 2_000_000 + "\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "a python object": "seed: !!python/object/apply:os.system [touch executed]\n",
    "no text": "\xff\xfe\x00",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_files_take_no_more_time_than_their_length(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.yaml"
    path.write_bytes(f"generator: fashion\n{BOMBS[name]}".encode("latin-1"))
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"bomb\.yaml") as raised:
        MLViewSource.from_config(path)
    assert time.process_time() - begin < 2
    assert len(str(raised.value)) < 600
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", [
    "weights: 'http://127.0.0.1:9/${oc.env:SECRET}/w.safetensors'",
    "seed: ${oc.env:SECRET}\nweights: 'http://127.0.0.1:9/${seed}/w.safetensors'",
    "weights: ${ oc.env:SECRET,x }/name",
    "generator: {name: fashion, weights: 'hf://${oc.decode:${oc.env:SECRET}}/name'}",
    'weights: "http://127.0.0.1:9/\\x24{oc.env:SECRET}"',
    'weights: "http://127.0.0.1:9/${oc.\\\n  env:SECRET}"',
    "walkers: env\nweights: 'http://127.0.0.1:9/${oc.${walkers}:SECRET}'",
    "walkers: oc.env\nweights: 'http://127.0.0.1:9/${${walkers}:SECRET}'",
])  # fmt: skip
def test_a_file_reads_no_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "views.yaml").write_text(f"preset: fashion-none\n{text}\n")
    with pytest.raises(ValueError, match="environment variables") as raised:
        MLViewSource.from_config(tmp_path / "views.yaml")
    assert "hunter2" not in str(raised.value)


def test_a_file_may_repeat_its_own_values(tmp_path: Path) -> None:
    (tmp_path / "views.yaml").write_text("preset: fashion-none\nbatch_size: 4\nnum_samples: ${batch_size}\n")
    assert MLViewSource.from_config(tmp_path / "views.yaml").num_samples == 4


def test_real_and_generated_images_have_a_pipeline_each() -> None:
    real, generated = {"name": "simclr", "size": 28}, {"name": "simclr", "size": 28, "color": False}
    source = MLViewSource.from_config(
        "fashion-nvae-real-resample",
        images=torch.rand(3, 1, 28, 28),
        batch_size=2,
        transform={"real": real, "generated": generated},
    )
    assert source.transforms == [ByOrigin(transforms.simclr(28), transforms.simclr(28, color=False))] * 2
