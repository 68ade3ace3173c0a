"""The second training of an NVAE, with a discriminator."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from invariances import check_resumed_training
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

from mlviews.generators.nvae.network import NVAE, NVAEConfig
from mlviews.weights.files import write_safetensors
from mlviews.zoo import tune_nvae
from mlviews.zoo.train_nvae import initialize
from mlviews.zoo.tune_nvae import Recipe, Trainer

MODEL = NVAEConfig(groups=(1, 2), latents=(2, 2), encoder=(8, 8, 8), decoder=(8, 8, 8))
SMALL = Recipe(batch=8, alone=16, ramp=16, width=8, r1_every=2)


def trained(seed: int = 0, model: NVAEConfig = MODEL) -> NVAE:
    """A small network of the weights that a training starts from."""
    torch.manual_seed(seed)
    network = NVAE(model)
    weights = initialize(NVAE(model)).groups[0].start
    assert isinstance(weights, Tensor)
    network.groups[0].start.data.copy_(weights)  # type: ignore[union-attr]
    return network


def trainer(start: NVAE | None = None, total: int = 80, **changes: Any) -> Trainer:
    images = torch.randint(256, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    recipe = dataclasses.replace(SMALL, **changes)
    return Trainer(recipe, images, total, seed=1, bf16=False, start=start or trained())


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_training_resumes_exactly(tmp_path: Path) -> None:
    check_resumed_training(lambda: trainer(alone=0), tmp_path)  # the optimizer of the NVAE has a state too


def test_the_discriminator_learns_alone_at_first() -> None:
    run = trainer()
    network, discriminator = weights(run.network), weights(run.discriminator)
    for _ in range(2):
        losses = run.step()
        assert losses["gradient"] == 0
        assert losses["loss_d"] > 0
    assert same(weights(run.network), network)
    assert not same(weights(run.discriminator), discriminator)
    run.step()  # at a learning rate of zero, from which it rises
    assert run.opt_g.param_groups[0]["lr"] == 0
    assert run.step()["gradient"] > 0
    assert run.opt_g.param_groups[0]["lr"] == pytest.approx(SMALL.lr / 2 * run.decay(), rel=0.2)
    assert not same(weights(run.network), network)
    assert not same(weights(run.average), network)


def test_half_of_the_samples_keep_coarse_latents_of_real_images() -> None:
    run = trainer()
    latents = [torch.full((8, *level.shape), 100.0, requires_grad=True) for level in run.network.levels]
    mixed = run._mixed(latents, torch.Generator().manual_seed(0))
    kept = torch.stack([(value == 100).flatten(1).all(1) for value in mixed])  # [levels, B]
    drawn = torch.stack([(value.abs() < 10).flatten(1).all(1) for value in mixed])
    assert kept[0].tolist() == [False] * 4 + [True] * 4
    assert torch.equal(drawn, ~kept)
    assert not (kept[1:] & ~kept[:-1]).any()  # the coarse ones
    assert 0 < kept[1].sum() < 4  # a random number of them
    assert not kept[-1].any()  # else nothing of the sample would be drawn
    assert not any(value.requires_grad for value in mixed)


def test_each_term_reaches_the_network() -> None:
    def change(**recipe: float) -> list[Tensor]:
        run = trainer(alone=0, ramp=1, **{"rate": 0.0, "squares": 0.0, "adversarial": 0.0} | recipe)
        run.steps = 1
        run.step()
        return weights(run.network)

    none = change()
    for name in ("rate", "squares", "adversarial"):
        assert not same(change(**{name: 1000.0}), none), name


def test_a_second_training_needs_a_network_that_fits() -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="give its file by --start"):
        Trainer(SMALL, images, 80, 0, False)
    color = trained(model=dataclasses.replace(MODEL, image_channels=3))
    with pytest.raises(ValueError, match=r"makes images of shape \(3, 32, 32\), not \(1, 32, 32\)"):
        trainer(color)
    with pytest.raises(ValueError, match=r"Invalid images=16: .* the first 16; give more"):
        trainer(total=16)
    single = trained(model=dataclasses.replace(MODEL, groups=(1,), latents=(2,)))
    with pytest.raises(ValueError, match="has one level"):
        trainer(single)
    assert trainer(trained(1)).settings() != trainer().settings()


def test_a_second_training_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_idx(data / "train-images-idx3-ubyte", torch.randint(256, (64, 28, 28)))
    write_idx(data / "train-labels-idx1-ubyte", torch.arange(64) % 10)
    monkeypatch.setitem(tune_nvae.RECIPES, "nvae", SMALL)
    first = trained()
    file = tmp_path / "first.safetensors"
    write_safetensors(file, first.state_dict(), first.metadata({"images": 3}))
    app = typer.Typer()
    app.command()(tune_nvae.main)
    options = ["nvae", "--start", str(file), "--data", str(data), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*options, "--images", "64", "--snapshots", "64"])
    assert result.exit_code == 0, result.output
    tuned = NVAE.load(tmp_path / "run" / "nvae.safetensors")
    assert tuned.config == MODEL
    assert tuned.provenance["start"]["images"] == 3
    assert tuned.provenance["recipe"]["squares"] == SMALL.squares
    assert not same(weights(tuned), weights(first))


def test_a_second_training_of_large_images_in_color() -> None:
    model = dataclasses.replace(MODEL, image_channels=3, image_size=64, encoder=(8,) * 4, decoder=(8,) * 4)
    recipe = dataclasses.replace(SMALL, alone=0).fitted(3, 64)
    assert (recipe.adversarial, recipe.clip) == (12 * SMALL.adversarial, 12 * SMALL.clip)
    assert SMALL.fitted(1, 32) == SMALL
    images = torch.randint(256, (16, 3, 64, 64)).to(torch.uint8)
    run = Trainer(recipe, images, 80, 1, True, start=trained(model=model))
    assert all(math.isfinite(value) for value in run.step().values())
