from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invariances import check_resumed_training
from scipy import linalg
from test_data import write_idx
from typer.testing import CliRunner

from mlviews import load_generator
from mlviews.evaluation.classifier import cached_classifier
from mlviews.evaluation.data import Labelled, load_fashion_mnist
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.generators.nvae.network import NVAEConfig
from mlviews.runs.checkpoint import Checkpoint
from mlviews.weights.files import read_safetensors
from mlviews.zoo import FOLDER, evaluate, train_nvae, tune_film
from mlviews.zoo.adversarial import Discriminator, equalise
from mlviews.zoo.quality.figures import entropy_share, frechet_distance, gaussian, nearest
from mlviews.zoo.train import RECIPES, Trainer
from mlviews.zoo.training import BaseTrainer
from mlviews.zoo.training import run as run_training

SMALL = dataclasses.replace(
    RECIPES["fashion"],
    model=FilmConfig(dims=(3, 4, 4, 4), channels=(16, 16, 8, 8)),
    batch=8,
    width=8,
    r1_every=2,
)


def trainer() -> Trainer:
    images = torch.randint(256, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Trainer(SMALL, images, total=80, seed=1, bf16=False)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    check_resumed_training(trainer, tmp_path)


def test_the_parts_of_a_checkpoint_have_the_names_of_earlier_runs() -> None:
    state = trainer().state_dict()
    assert list(state) == ["steps", "generator", "average", "discriminator", "opt_g", "opt_d"]
    assert state["average"].keys() == state["generator"].keys()
    assert "blocks.0.linear.parametrizations.weight.original" in state["average"]


def small(kind: str = "film", **changes: Any) -> BaseTrainer:
    """A trainer whose checkpoint holds a few parameters."""
    options = {"total": 80, "seed": 1, "bf16": False} | changes
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[0] = options.pop("pixel", 0)
    lr = options.pop("lr", 2e-3)
    if kind == "film":
        return Trainer(dataclasses.replace(SMALL, lr=lr), images, **options)
    model = NVAEConfig(groups=(1,), latents=(2,), encoder=(8, 8), decoder=(8, 8))
    return train_nvae.Trainer(train_nvae.Recipe(model, lr=lr), images, **options)


@pytest.mark.parametrize("kind", ["film", "nvae"])
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 1e-3}, "recipe.lr=0.002, not 0.001"),
        ({"total": 160}, "images=80, not 160"),
        ({"seed": 2}, "seed=1, not 2"),
        ({"bf16": True}, "bf16=False, not True"),
        ({"pixel": 1}, "data="),
    ],
    ids=str,
)
def test_a_training_of_other_settings_is_not_gone_on_from(
    kind: str, changes: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    run_training(small(kind), "x", 0, tmp_path, 64, {})
    Checkpoint(tmp_path / "checkpoint.pt", small(kind).settings(), True).save(small(kind).state_dict())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to a run with {difference}.*delete it to start anew"):
        run_training(small(kind, **changes), "x", 0, tmp_path, 64, {})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_checkpoints_of_earlier_versions_are_gone_on_from_and_damaged_ones_are_not(tmp_path: Path) -> None:
    earlier = trainer()
    earlier.step()
    torch.save(earlier.state_dict(), tmp_path / "checkpoint.pt")
    training = trainer()
    run_training(training, "x", 8, tmp_path, 64, {})
    assert training.steps == 1
    torch.save({"steps": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt is no checkpoint of a .* training.*KeyError"):
        run_training(trainer(), "x", 8, tmp_path, 64, {})


def test_a_classifier_is_trained_once(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (128, 1, 32, 32), generator=noise).to(torch.uint8)
    data = Labelled(images, torch.arange(128) % 10)
    advanced: list[int] = []
    model, settings = cached_classifier(
        tmp_path / "c.safetensors", data, seed=3, epochs=1, advance=advanced.append
    )
    again, same = cached_classifier(
        tmp_path / "c.safetensors", data, seed=3, epochs=1, advance=advanced.append
    )
    assert advanced == [64, 64]
    assert settings == same
    assert (settings["seed"], settings["epochs"]) == (3, 1)
    assert torch.equal(model(images / 255)[1], again(images / 255)[1])
    others: list[tuple[Labelled, dict[str, Any], str]] = [
        (data, {"seed": 4}, "seed=3, not 4"),
        (data, {"epochs": 2}, "epochs=1, not 2"),
        (data, {"bf16": True}, "bf16=False, not True"),
        (Labelled(images.flip(0), data.labels), {}, "data="),
        (Labelled(images, data.labels.flip(0)), {}, "data="),
    ]
    for other, changes, difference in others:
        with pytest.raises(ValueError, match=f"holds a classifier of {difference}"):
            cached_classifier(tmp_path / "c.safetensors", other, **{"seed": 3, "epochs": 1} | changes)


def test_the_learning_rate_decays_to_a_tenth() -> None:
    training = trainer()
    training.step()
    assert training.opt_g.param_groups[0]["lr"] == SMALL.lr
    training.steps = 10
    training.step()
    assert training.opt_g.param_groups[0]["lr"] == pytest.approx(SMALL.lr / 10)


def test_export_is_the_moving_average_without_the_equalisation(tmp_path: Path) -> None:
    training = trainer()
    for _ in range(2):
        training.step()
    training.export(tmp_path / "w.safetensors", {"seed": 1})
    g = load_generator("fashion", weights=tmp_path / "w.safetensors")
    assert isinstance(g, FilmGenerator)
    assert g.config == SMALL.model
    z = g.sample_latents(range(4))
    torch.testing.assert_close(g(z), training.average(z), atol=1e-5, rtol=0)
    assert not torch.allclose(g(z), training.generator(z).detach(), atol=1e-5)
    assert json.loads(read_safetensors(tmp_path / "w.safetensors", "mlviews.film")[1]["provenance"]) == {
        "seed": 1
    }


def test_equalised_layers_keep_unit_variance() -> None:
    torch.manual_seed(0)
    layer = equalise(torch.nn.Linear(400, 300))
    assert layer(torch.randn(200, 400)).std().item() == pytest.approx(1, rel=0.05)
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(1, rel=0.05)


def test_the_regression_error_of_latents_that_do_not_show_is_one() -> None:
    training = trainer()
    latents = [torch.randn(5000, dim) for dim in SMALL.model.dims]
    assert training.info(torch.zeros(5000, 15), latents).tolist() == pytest.approx([1] * 4, abs=0.05)
    assert training.info(torch.cat(latents, 1), latents).tolist() == [0] * 4


def test_discriminator_shapes() -> None:
    logits, latents = Discriminator(1, 8, 15)(torch.zeros(16, 1, 32, 32))
    assert logits.shape == (16,)
    assert latents.shape == (16, 15)


def test_the_bundled_weights_say_where_they_come_from() -> None:
    _, metadata = read_safetensors(FOLDER / "fashion.safetensors", "mlviews.film")
    provenance = json.loads(metadata["provenance"])
    for training, recipe in ((provenance, tune_film.RECIPES), (provenance["start"], RECIPES)):
        assert training["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe["fashion"])))
        assert training["images"] >= 500_000


def test_frechet_distance_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + shift
        for shift in (0, 1)
    )
    p, q = gaussian(a), gaussian(b)
    root = linalg.sqrtm(p.covariance.numpy() @ q.covariance.numpy()).real
    trace = np.trace(p.covariance.numpy() + q.covariance.numpy() - 2 * root)
    expected = (p.mean - q.mean).square().sum().item() + trace
    assert frechet_distance(p, q) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(p, p) == pytest.approx(0, abs=1e-9)


def test_entropy_share() -> None:
    assert entropy_share(torch.full((10,), 0.1)) == pytest.approx(1)
    assert entropy_share(torch.eye(10)[0]) == 0
    assert entropy_share(torch.tensor([0.5, 0.5, 0, 0])) == pytest.approx(math.log(2) / math.log(4))


def test_nearest_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(7, 1, 4, 4, generator=generator)
    train = torch.randint(256, (40, 1, 4, 4), generator=generator).to(torch.uint8)
    distances, indices = nearest(queries, train, lambda count: None)
    expected = torch.cdist(queries.flatten(1), train.flatten(1) / 255)
    torch.testing.assert_close(distances, expected.min(1).values, atol=1e-5, rtol=0)
    assert torch.equal(indices, expected.argmin(1))


def test_bad_input_of_the_evaluation_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = FOLDER / "fashion.safetensors"
    arguments = [str(weights), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that is imported already
        with pytest.raises(SystemExit, match=r"^mlviews: "):
            runpy.run_module("mlviews.zoo.evaluate", run_name="__main__")


def test_a_short_training_and_evaluation_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    from mlviews.zoo import train

    data = tmp_path / "data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 600), ("t10k", 300)):
        write_idx(
            data / f"{name}-images-idx3-ubyte", torch.randint(256, (count, 28, 28), generator=generator)
        )
        write_idx(data / f"{name}-labels-idx1-ubyte", torch.arange(count) % 10)
    monkeypatch.setitem(train.RECIPES, "fashion", dataclasses.replace(SMALL, model=FilmConfig()))

    def run(main: object, *arguments: str) -> str:
        app = typer.Typer()
        app.command()(main)  # type: ignore[type-var]
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "run"
    options = ("fashion", "--data", str(data), "--out", str(out), "--snapshots", "64")
    job = train.Trainer(train.RECIPES["fashion"], load_fashion_mnist(data, "train").images, 128, 0, False)
    run_training(job, "fashion", 64, out, 64, {})  # and stopped
    run(train.main, *options, "--images", "128")
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "00000064.safetensors",
        "00000128.safetensors",
        "fashion.safetensors",
    ]
    assert [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()] == [
        "images",
        "64",
        "128",
    ]

    run(
        evaluate.main,
        str(out / "fashion.safetensors"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "eval"),
        "--samples",
        "256",
    )
    report = json.loads((tmp_path / "eval" / "quality.json").read_text())
    assert report["provenance"]["images"] == 128
    assert 0 < report["fidelity"]["anchors"]["confidence"] <= 1
    assert [row["level"] for row in report["levels"]["table"]] == ["0", "1", "2", "3", "1:"]
    assert report["memorisation"]["samples"]["mean"] > 0
    assert sorted(path.name for path in (tmp_path / "eval").glob("*.png")) == [
        "levels.png",
        "nearest.png",
        "samples.png",
    ]
