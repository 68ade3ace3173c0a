"""The second training of a film generator, with an encoder beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from invariances import check_resumed_training
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.zoo import tune_film
from mlviews.zoo.features import Features, Transport
from mlviews.zoo.train import plain_weight
from mlviews.zoo.tune_film import Recipe, Trainer

pytest.importorskip("lightly")

MODEL = FilmConfig(dims=(3, 4, 4, 4), channels=(16, 16, 8, 8))
SMALL = Recipe(batch=16, alone=32, ramp=16, width=8, r1_every=2, encoder_steps=2, components=4, span=64)
IMAGES = torch.randint(256, (80, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def trained(seed: int = 0, model: FilmConfig = MODEL) -> FilmGenerator:
    """A generator that a training starts from."""
    torch.manual_seed(seed)
    return FilmGenerator(model)


def trainer(start: FilmGenerator | None = None, total: int = 160, **changes: Any) -> Trainer:
    recipe = dataclasses.replace(SMALL, **changes)
    return Trainer(recipe, IMAGES, total, seed=1, bf16=False, start=start or trained())


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


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


def test_the_discriminator_learns_alone_at_first() -> None:
    run = trainer()
    generator, discriminator = weights(run.generator), weights(run.discriminator)
    for _ in range(2):
        assert "loss_g" not in run.step()
    assert same(weights(run.generator), generator)
    assert not same(weights(run.discriminator), discriminator)
    run.step()  # at a learning rate of zero, from which it rises
    assert run.opt_g.param_groups[0]["lr"] == 0
    losses = run.step()
    assert set(losses) == set(run.LOSSES)
    assert run.opt_g.param_groups[0]["lr"] > 0
    assert not same(weights(run.generator), generator)
    assert not same(weights(run.average), generator)


def test_each_term_reaches_the_generator() -> None:
    def change(**recipe: float) -> list[Tensor]:
        run = trainer(alone=0, ramp=1, **{"info": 0.0, "moments": 0.0, "steady": 0.0, "hidden": 0.0} | recipe)
        run._train_encoder()
        run.steps = 1
        run.step()
        return weights(run.generator)

    none = change()
    for name in ("info", "moments", "steady", "hidden"):
        assert not same(change(**{name: 100.0}), none), name


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_pairs_share_what_their_block_says(levels: int) -> None:
    model = FilmConfig(dims=(3,) * levels, channels=(8,) * levels)
    run = trainer()
    latents = [torch.randn(16, 3) for _ in model.dims]
    pairs = run.pairs(latents)
    count = 16 // levels // 2 * 2
    for block in range(levels):
        for level, latent in enumerate(pairs):
            rows = latent[block * count : (block + 1) * count]
            equal = torch.equal(rows[::2], rows[1::2])
            assert equal == (level == 0 or block not in (0, level)), (block, level)


def test_an_encoder_sees_uncorrelated_components_of_real_images() -> None:
    def features(seed: int) -> Features:
        features = Features(4)
        features.learn(lambda rows: IMAGES[rows], len(IMAGES), 32, 2, seed)
        return features

    network = features(1)
    assert same(weights(network), weights(features(1)))
    assert not same(weights(network), weights(features(2)))
    seen = network(IMAGES.float() / 255)
    assert seen.shape == (80, 4)
    torch.testing.assert_close(seen.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    covariance = seen.T @ seen / len(seen)
    torch.testing.assert_close(covariance, network.variances.diag(), atol=1e-5, rtol=1e-3)
    assert network.variances.tolist() == sorted(network.variances.tolist(), reverse=True)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_transport_gives_samples_the_moments_of_real_images() -> None:
    torch.manual_seed(0)
    variances = torch.tensor([0.5, 0.3, 0.2])
    samples = torch.randn(50_000, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2.0, 0.5])
    transport = Transport(variances)
    for batch in samples.split(500):
        transport.note(batch, kept=0.98)
    transport.update()
    moved = transport.targets(samples)
    torch.testing.assert_close(moved.mean(0), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(moved.T), variances.diag(), atol=0.03, rtol=0)
    torch.testing.assert_close(transport.map, transport.map.T)  # as that of Gaussians is
    # The Frechet distance is the mean squared length of the way.
    way = (moved - samples).square().sum(1).mean()
    assert transport.distance.item() == pytest.approx(way.item(), rel=0.03)


def test_transport_stays_where_it_is_while_there_are_few_samples() -> None:
    transport = Transport(torch.tensor([0.5, 0.5]))
    transport.note(torch.randn(4, 2) + 5, kept=0.9)
    transport.update()
    assert torch.equal(transport.map, torch.eye(2))
    transport.note(torch.randn(4, 2) + 5, kept=0.9)
    transport.update()
    assert transport.distance > 10


def test_a_second_training_needs_a_generator_that_fits() -> None:
    with pytest.raises(ValueError, match="give its file by --start"):
        Trainer(SMALL, IMAGES, 80, 0, False)
    color = trained(model=dataclasses.replace(MODEL, image_channels=3))
    with pytest.raises(ValueError, match=r"makes images of shape \(3, 32, 32\), not \(1, 32, 32\)"):
        trainer(color)
    with pytest.raises(ValueError, match=r"Invalid images=32: .* the first 32; give more"):
        trainer(total=32)
    assert trainer(trained(1)).settings() != trainer().settings()


def test_a_second_training_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_idx(data / "train-images-idx3-ubyte", torch.randint(256, (80, 28, 28)))
    write_idx(data / "train-labels-idx1-ubyte", torch.arange(80) % 10)
    monkeypatch.setitem(tune_film.RECIPES, "film", SMALL)
    run = trainer(trained())
    run.export(tmp_path / "start.safetensors", {"data": "none"})
    app = typer.Typer()
    app.command()(tune_film.main)
    arguments = ["film", "--start", str(tmp_path / "start.safetensors"), "--data", str(data)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--images", "96"])
    assert result.exit_code == 0, result.output
    tuned = FilmGenerator.load(tmp_path / "out" / "film.safetensors")
    assert tuned.config == MODEL
    assert tuned.provenance["images"] == 96
    assert tuned.provenance["start"]["data"] == "none"
    assert not same(weights(tuned), weights(trained()))
