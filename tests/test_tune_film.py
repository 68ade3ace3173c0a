"""The second training of a film generator, with an encoder beside it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from invariances import check_resumed_training
from PIL import Image
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.images import Folder, ImageSet, Shape
from mlviews.zoo import tune_film
from mlviews.zoo.adversarial import plain_weight
from mlviews.zoo.features import Features, Heads
from mlviews.zoo.tune_film import Recipe, Trainer

pytest.importorskip("lightly")

MODEL = FilmConfig(dims=(3, 4, 4, 4), channels=(16, 16, 8, 8))
SMALL = Recipe(batch=16, alone=32, ramp=16, width=8, width_heads=8, r1_every=2, encoder_steps=2)
TERMS = ("info", "projected", "steady", "hidden")
IMAGES = torch.randint(256, (80, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def trained(seed: int = 0, model: FilmConfig = MODEL) -> FilmGenerator:
    """A generator that a training starts from."""
    torch.manual_seed(seed)
    return FilmGenerator(model)


def trainer(start: FilmGenerator | None = None, total: int = 160, **changes: Any) -> Trainer:
    recipe = dataclasses.replace(SMALL, **changes)
    run = Trainer(recipe, IMAGES, total, seed=1, bf16=False, start=start or trained())
    run.prepare()
    return run


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def kernels(run: Trainer) -> list[Tensor]:
    return [value.detach().clone() for value in run.heads.parameters() if value.ndim == 4]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_training_resumes_exactly(tmp_path: Path) -> None:
    check_resumed_training(lambda: trainer(alone=0), tmp_path)


def test_it_goes_on_from_the_weights_of_the_file() -> None:
    start = trained()
    run = trainer(start)
    for name, value in start.named_parameters():
        torch.testing.assert_close(plain_weight(run.generator, name), value)
        torch.testing.assert_close(plain_weight(run.average, name), value)


def test_the_discriminators_learn_alone_at_first() -> None:
    run = trainer()
    generator, discriminator = weights(run.generator), weights(run.discriminator)
    encoder, heads = weights(run.features), kernels(run)
    for _ in range(2):
        assert "loss_g" not in run.step()
    assert same(weights(run.generator), generator)
    assert not same(weights(run.discriminator), discriminator)
    assert not any(map(torch.equal, kernels(run), heads))
    run.step()  # at a learning rate of zero, from which it rises
    assert run.opt_g.param_groups[0]["lr"] == 0
    losses = run.step()
    assert set(losses) == set(run.LOSSES)
    assert run.opt_g.param_groups[0]["lr"] > 0
    assert not same(weights(run.generator), generator)
    assert not same(weights(run.average), generator)
    assert same(weights(run.features), encoder), "the encoder stays as it is"


def test_each_term_reaches_the_generator() -> None:
    def change(**recipe: float) -> list[Tensor]:
        run = trainer(alone=0, ramp=1, **dict.fromkeys(TERMS, 0.0) | recipe)
        run.steps = 1
        run.step()
        return weights(run.generator)

    none = change()
    assert same(change(), none)
    for name in TERMS:
        assert not same(change(**{name: 100.0}), none), name


@pytest.mark.parametrize(
    ("term", "column", "rises"), [("steady", "steady", False), ("hidden", "change_2", True)]
)
def test_terms_do_what_they_are_for(term: str, column: str, rises: bool) -> None:
    recipe = dict.fromkeys(TERMS, 0.0) | {term: 100.0}
    run = trainer(alone=0, ramp=1, total=640, visible=(0.5,), **recipe)
    values = [run.step()[column] for _ in range(40)]
    first, last = sum(values[:10]), sum(values[-10:])
    if term == "steady":
        assert last < 0.8 * first
    else:
        assert last > 1.2 * first


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_pairs_share_what_their_block_says(levels: int) -> None:
    pairs = trainer().pairs([torch.randn(16, 3) for _ in range(levels)])
    count = 16 // levels // 2 * 2
    for level, latent in enumerate(pairs):
        for block in range(levels):
            rows = latent[block * count : (block + 1) * count]
            shared = level == 0 or block not in (0, level)
            assert torch.equal(rows[::2], rows[1::2]) == shared, (block, level)
        rest = latent[levels * count :]
        assert len(rest.unique(dim=0)) == len(rest)


def test_an_encoder_learns_from_real_images() -> None:
    def features(seed: int) -> Features:
        features = Features()
        features.learn(lambda rows: IMAGES[rows], len(IMAGES), size=32, batch=16, steps=2, seed=seed)
        return features

    network = features(1)
    assert same(weights(network), weights(features(1)))
    assert not same(weights(network), weights(features(2)))
    maps, values = network(IMAGES.float() / 255)
    assert [tuple(x.shape) for x in maps] == [
        (80, 32, 16, 16), (80, 32, 16, 16), (80, 64, 8, 8), (80, 128, 4, 4)
    ]  # fmt: skip
    assert network.widths() == [x.shape[1] for x in maps]
    assert values.var(0, unbiased=False).sum().item() == pytest.approx(1, rel=1e-4)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_heads_and_the_generator_want_opposite_things() -> None:
    torch.manual_seed(0)
    heads = Heads((4, 6), 8)
    real, fake = ([torch.randn(16, width, 8, 8) + shift for width in (4, 6)] for shift in (0.5, -0.5))
    both = [torch.cat(maps) for maps in zip(real, fake, strict=True)]
    assert heads.loss(both).item() == pytest.approx(2, abs=0.5)  # they know nothing yet
    assert [logits.shape for logits in heads(fake)] == [(16, 16)] * 2
    optimizer = torch.optim.Adam(heads.parameters(), 1e-2)
    before = heads.loss_of_generator(fake)
    for _ in range(30):
        loss = heads.loss(both)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert heads.loss_of_generator(fake) > before + 0.5
    assert heads.loss_of_generator(real) < -0.5


def test_a_second_training_needs_a_generator_that_fits() -> None:
    with pytest.raises(ValueError, match="give its file by --start"):
        Trainer(SMALL, IMAGES, 80, 0, False)
    color = trained(model=dataclasses.replace(MODEL, image_channels=3))
    with pytest.raises(ValueError, match=r"makes images of shape \(3, 32, 32\), not \(1, 32, 32\)"):
        trainer(color)
    with pytest.raises(ValueError, match=r"Invalid images=32: .* the first 32; give more"):
        trainer(total=32)


def test_settings_tell_generators_apart() -> None:
    assert trainer().settings() == trainer().settings()
    others = [trained(1), trained(model=dataclasses.replace(MODEL, upsample="nearest"))]
    for other in others:
        assert trainer(other).settings() != trainer().settings()


def folder(path: Path) -> Folder:
    """Large images in color, in files."""
    path.mkdir()
    noise = torch.Generator().manual_seed(0)
    for number in range(16):
        pixels = torch.randint(256, (64, 64, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / f"{number}.png")
    return Folder(path, Shape(3, 64, 64))


@pytest.mark.parametrize("files", [False, True])
def test_a_second_training_of_large_images_in_color(files: bool, tmp_path: Path) -> None:
    model = FilmConfig(dims=(3, 4, 4, 4, 4), channels=(16, 16, 8, 8, 8), image_channels=3)
    images: Tensor | ImageSet = folder(tmp_path / "images")
    if not files:
        images = torch.stack([images.batch([number], torch.device("cpu"))[0] for number in range(16)])
    recipe = dataclasses.replace(SMALL.fitted(3, 64), alone=0)
    run = Trainer(recipe, images, 80, 1, True, start=trained(model=model))
    run.prepare()
    losses = run.step()
    assert set(losses) == set(run.LOSSES)
    assert {"change_4", "info_4"} < set(losses)
    assert all(math.isfinite(value) for value in losses.values())


def test_a_second_training_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_idx(data / "train-images-idx3-ubyte", IMAGES[:, 0, 2:-2, 2:-2])
    write_idx(data / "train-labels-idx1-ubyte", torch.arange(80) % 10)
    monkeypatch.setitem(tune_film.RECIPES, "film", SMALL)
    trainer(trained()).export(tmp_path / "start.safetensors", {"data": "none"})
    app = typer.Typer()
    app.command()(tune_film.main)
    arguments = ["film", "--start", str(tmp_path / "start.safetensors"), "--data", str(data)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--images", "96"])
    assert result.exit_code == 0, result.output
    assert "An encoder learns from the real images first" in result.output
    tuned = FilmGenerator.load(tmp_path / "out" / "film.safetensors")
    assert tuned.config == MODEL
    assert tuned.provenance["images"] == 96
    assert tuned.provenance["start"]["data"] == "none"
    assert not same(weights(tuned), weights(trained()))
