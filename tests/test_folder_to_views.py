"""From a folder of images to views: a generator with its encoder, and the source, as their page has it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from mlviews import MLViewSource, cli, load_generator
from mlviews.generators.film import FilmConfig
from mlviews.generators.nvae.network import NVAEConfig
from mlviews.weights.files import read_safetensors
from mlviews.zoo import train, train_inverter, train_nvae
from mlviews.zoo.images import training_images

COUNT = 40
TINY = {
    "film": dataclasses.replace(
        train.RECIPES["film"],
        model=FilmConfig(dims=(3, 4, 4, 4), channels=(16, 16, 8, 8)),
        batch=8,
        width=8,
        r1_every=2,
    ),
    "nvae": train_nvae.Recipe(
        NVAEConfig(groups=(1, 1, 1), latents=(2, 2, 2), encoder=(8,) * 4, decoder=(8,) * 4), batch=8
    ),
}
SCRIPTS: dict[str, Any] = {"film": train, "nvae": train_nvae, "inverter": train_inverter}


def photos(path: Path, color: bool, count: int = COUNT) -> Path:
    """A folder of images of many sizes: a bright disc on a gradient, in two classes."""
    numbers = np.random.default_rng(0)
    for index in range(count):
        height, width = numbers.integers(40, 90, 2)
        y, x = np.mgrid[:height, :width]
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < numbers.integers(100, 400)
        pixels = np.stack([x * 2, y * 2, disc * 255], -1) if color else (x + y + disc * 90)[..., None]
        place = path / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        array = pixels.clip(0, 255).astype(np.uint8)
        Image.fromarray(array if color else array[..., 0]).save(place / f"{index}.png")
    return path


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.RECIPES, "film", TINY["film"])
    monkeypatch.setitem(train_nvae.RECIPES, "nvae", TINY["nvae"])
    options = {"steps": 3, "pair_steps": 1, "batch": 8, "pairs": 2, "width": 8, "hidden": 8, "evaluation": 8}
    monkeypatch.setitem(train_inverter.RECIPES, "film", options)


def run(script: str, *arguments: str | Path) -> str:
    """What a script prints."""
    app = typer.Typer()
    app.command()(SCRIPTS[script].main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("kind", "color", "size"), [("film", True, 64), ("nvae", False, 32)])
def test_the_chain(
    kind: str, color: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = photos(tmp_path / "photos", color)
    run(kind, kind, "--data", images, "--out", "runs/g", "--images", "64", "--size", str(size))
    weights = tmp_path / "runs" / "g" / f"{kind}.safetensors"
    generator: dict[str, Any] = {"name": kind, "weights": str(weights)}
    if kind == "film":
        run("inverter", "film", "--weights", weights, "--data", images, "--out", "runs/i", "--no-progress")
        generator["inverter"] = "runs/i/film-inverter.safetensors"
    config = {"generator": generator, "perturb": {"1:": "resample"}, "images": str(images)}
    Path("mine.yaml").write_text(json.dumps(config))  # JSON is YAML
    source = MLViewSource.from_config("mine.yaml", batch_size=8)
    anchor, positive = next(iter(source))
    assert anchor.shape == positive.shape == (8, 3 if color else 1, size, size)
    assert source.num_samples == COUNT
    assert source.generator.border == 0
    assert len(source.generator.levels) == {32: 4, 64: 5}[size] - (kind == "nvae")
    assert torch.isfinite(positive).all()
    assert not torch.equal(anchor, positive)
    result = CliRunner().invoke(cli.app, ["views", "--preset", "mine.yaml", "--images", str(images)])
    assert result.exit_code == 0, result.output
    assert Path("runs/views.png").exists()


def test_an_nvae_of_large_images_in_color(tmp_path: Path) -> None:
    images = training_images(photos(tmp_path / "photos", True), 64).images
    trainer = train_nvae.Trainer(TINY["nvae"].fitted(3, 64), images, 64, 0, False)
    assert all(np.isfinite(value) for value in trainer.step().values())
    trainer.export(tmp_path / "nvae.safetensors", {"border": 0})
    generator = load_generator("nvae", tmp_path / "nvae.safetensors")
    latents = generator.encode(torch.rand(2, 3, 64, 64))
    assert [z.shape[2] for z in latents] == [4, 8, 16, 32]
    assert generator(latents).shape == (2, 3, 64, 64)


def test_recipes_stay_what_they_were_and_grow_by_a_block() -> None:
    for recipe in (train.RECIPES["fashion"], train_nvae.RECIPES["fashion-nvae"]):
        assert recipe.fitted(1, 32) == recipe
    film = train.RECIPES["fashion"].fitted(3, 64).model
    assert (film.dims, film.channels) == ((8, 16, 16, 16, 16), (128, 112, 64, 24, 16))
    assert (film.image_channels, film.image_size) == (3, 64)
    nvae = train_nvae.RECIPES["fashion-nvae"].fitted(3, 64)
    assert [level.name for level in train_nvae.NVAE(nvae.model, levels="scale").levels] == [
        "4x4",
        "8x8",
        "16x16",
        "32x32",
    ]
    assert nvae.clip == 12 * 2000


def test_a_folder_is_gray_unless_an_image_has_color(tmp_path: Path) -> None:
    gray, color = photos(tmp_path / "gray", False), photos(tmp_path / "color", True)
    assert training_images(gray).channels == 1
    assert training_images(gray, color=True).channels == 3
    assert training_images(color).channels == 3
    assert training_images(color, color=False).images.shape[:3] == (1, 32, 32)  # type: ignore[index]
    for path in gray.rglob("*.png"):  # gray images in files of three channels
        Image.open(path).convert("RGB").save(path)
    assert training_images(gray).channels == 1


def test_folders_that_are_decoded_batch_by_batch_train_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = training_images(photos(tmp_path / "photos", True)).images
    recipe = TINY["film"].fitted(3, 32)
    trainer = train.Trainer(recipe, images, 64, 0, False)
    batches = []
    for resident in (1 << 30, 0):
        monkeypatch.setattr("mlviews.images.RESIDENT", resident)
        batches.append(trainer.real())
    assert batches[0].shape == (8, 3, 32, 32)
    assert torch.equal(*batches)


def test_a_training_on_other_images_is_not_gone_on_from(tmp_path: Path) -> None:
    images = photos(tmp_path / "photos", False)
    arguments = ("film", "film", "--data", images, "--out", tmp_path / "run", "--images", "64")
    run(*arguments)
    (first, *_) = sorted(images.rglob("*.png"))
    Image.open(first).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(first)
    with pytest.raises(ValueError, match=r"belongs to a run with data=.*use another folder"):
        run(*arguments)
    _, metadata = read_safetensors(tmp_path / "run" / "film.safetensors", "mlviews.film")
    facts = json.loads(metadata["provenance"])
    assert (facts["border"], facts["data"]) == (0, f"a folder of {COUNT} images")
    # The border that images of the user's get is that of the file, whatever the name.
    assert load_generator("fashion", tmp_path / "run" / "film.safetensors").border == 0
    assert load_generator("fashion").border == 2
    assert load_generator("fashion-nvae").border == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 48}, "Invalid size=48: the recipes are for images of 32 or 64 pixels"),
        ({"data": "empty"}, "empty holds no image: give a folder with .png"),
        ({"data": "nowhere"}, "No image folder nowhere"),
        ({"data": "idx", "size": 64}, "Fashion-MNIST is gray, of 32 pixels"),
        ({"data": "idx", "color": True}, "Fashion-MNIST is gray, of 32 pixels"),
    ],
)
def test_bad_folders(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").touch()
    data = Path(arguments.pop("data", "empty"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_images(data, **arguments)


def test_too_few_images_and_damaged_ones(tmp_path: Path) -> None:
    images = photos(tmp_path / "photos", False, count=7)
    with pytest.raises(ValueError, match=r"There are 7 images to train on, fewer than a batch .* 8"):
        run("film", "film", "--data", images, "--out", tmp_path / "run")
    (photos(images, False) / "class0" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        run("film", "film", "--data", images, "--out", tmp_path / "run", "--images", "64")
