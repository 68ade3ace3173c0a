from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from conftest import toy_source
from invariances import check_device, check_prefixes, check_resumed_training, check_samples
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

import mlviews
from mlviews import Purifier, WeightsError, latents, load_generator
from mlviews.evaluation.data import bundled_slice
from mlviews.generators.semafo import SemafoConfig, SemafoVAE
from mlviews.levels import Blend
from mlviews.perturb import Resample
from mlviews.runs.files import sha256
from mlviews.zoo import FOLDER, evaluate, train_semafo
from mlviews.zoo.quality.pictures import draw_levels, draw_reconstructions
from mlviews.zoo.train_semafo import PRIORS, RECIPES, Recipe, Trainer, augment, labelled_rows, weakly

ROOT = Path(__file__).parents[1]
TINY = SemafoConfig(classes=3, u=3, z0=5, z1=2, encoder=(4, 8), decoder=(4, 4, 8), features=12, groups=2)


def small(**changes: object) -> SemafoVAE:
    """A network of random weights, whose priors depend on the label more than at first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        g = SemafoVAE(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]
        for weight in g.parameters():
            weight.mul_(2)
    return g


@pytest.fixture(scope="module")
def tiny() -> SemafoVAE:
    return small()


@pytest.fixture(scope="module")
def bundled() -> SemafoVAE:
    g = load_generator("fashion-semafo")
    assert isinstance(g, SemafoVAE)
    return g


def drawn(g: SemafoVAE, rows: int = 6, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    return g.sample_latents(range(rows), seed), g.sample_labels(range(rows), seed)


# -- as a generator ------------------------------------------------------------------------------------------


def test_samples_are_functions_of_seed_and_index(tiny: SemafoVAE) -> None:
    check_samples(tiny, 1e-5)


def test_views_share_blocks(tiny: SemafoVAE) -> None:
    check_prefixes(tiny, 1e-5)


def test_a_step_stays_on_the_device() -> None:
    check_device(lambda: SemafoVAE(TINY))


def test_a_source_gives_all_views_of_a_sample_its_label(tiny: SemafoVAE) -> None:
    source = toy_source(generator=tiny, perturb={2: Resample()}, seed=4)
    batch = source.batch(0, 8)
    assert batch.targets.equal(tiny.sample_labels(range(8), 4))
    z, labels = tiny.sample_latents(range(8), 4), tiny.sample_labels(range(8), 4)
    torch.testing.assert_close(batch.views[0], tiny(z, labels), atol=1e-5, rtol=0)
    assert (batch.views[1] - batch.views[0]).abs().max() > 1e-3


def test_the_label_matters_and_is_needed(tiny: SemafoVAE) -> None:
    z, labels = drawn(tiny)
    assert (tiny(z, (labels + 1) % 3) - tiny(z, labels)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="class-conditional: pass labels"):
        tiny(z)


# -- labels and latents of images ----------------------------------------------------------------------------


def test_classify_returns_probabilities(tiny: SemafoVAE) -> None:
    images = torch.rand(5, 1, 16, 16)
    probabilities = tiny.classify(images)
    assert probabilities.shape == (5, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    with pytest.raises(ValueError, match="Invalid images"):
        tiny.classify(torch.rand(5, 1, 28, 28))


def test_encoding_is_the_posteriors_means_in_the_priors_deviations(tiny: SemafoVAE) -> None:
    images = torch.rand(4, 1, 16, 16)
    labels = torch.tensor([0, 1, 2, 1])
    z = tiny.encode(images, labels)
    maps, dense = tiny.encoder(images)
    posterior = tiny.posterior(maps, dense, labels)
    for value, expected in zip(tiny.values(z, labels), posterior.values, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
    image = tiny.to_image(posterior.features)
    torch.testing.assert_close(tiny(z, labels), image, atol=1e-4, rtol=0)
    guessed = tiny.classify(images).argmax(1)
    for value, expected in zip(tiny.encode(images), tiny.encode(images, guessed), strict=True):
        assert torch.equal(value, expected)
    assert [level.shape for level in tiny.encode(images[:0])] == [(0, 3), (0, 5), (0, 2, 4, 4)]
    with pytest.raises(ValueError, match=r"Invalid labels from 0 to 3"):
        tiny.encode(images, torch.tensor([0, 1, 2, 3]))


def test_the_divergences_are_those_of_torch(tiny: SemafoVAE) -> None:
    """Of u, whose prior is p(u | y)."""
    images, labels = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 1])
    maps, dense = tiny.encoder(images)
    shares = F.one_hot(labels, 3).float()
    posterior = tiny.posterior(maps, dense, labels)

    def normal(raw: Tensor) -> torch.distributions.Normal:
        mean, log_std = (5 * torch.tanh(raw / 5)).chunk(2, 1)
        return torch.distributions.Normal(mean, log_std.exp() + 0.01)

    q = normal(tiny.encoder.u(dense) + tiny.encoder.u_label(shares))
    expected = torch.distributions.kl_divergence(q, normal(tiny.classes[labels])).sum(1)
    torch.testing.assert_close(posterior.divergences[0], expected, atol=1e-4, rtol=1e-4)


def test_regenerating_blends_within_the_posterior(tiny: SemafoVAE) -> None:
    images, labels = torch.rand(3, 1, 16, 16), torch.tensor([2, 0, 1])
    same = tiny.regenerate(images, [Blend(1.0, 0.0)] * 3, [None] * 3, labels)
    torch.testing.assert_close(same, tiny(tiny.encode(images, labels), labels), atol=1e-4, rtol=0)
    # z0 drawn anew: what the encoder says of z1 depends on it.
    noise = [None, torch.randn(6, 5), None]
    blends = [Blend(1.0, 0.0), Blend(0.0, 1.0), Blend(1.0, 0.0)]
    twice = tiny.regenerate(images, blends, noise, labels)
    assert twice.shape == (6, 1, 16, 16)
    z = [level.repeat(2, *(1 for _ in level.shape[1:])) for level in tiny.encode(images, labels)]
    apart = tiny([z[0], noise[1], z[2]], labels.repeat(2))
    assert (twice - apart).abs().max() > 1e-3
    purifier = Purifier(tiny, keep=2, samples=2)
    batch = images.clone().requires_grad_()
    purifier(batch).sum().backward()  # with the labels that the encoder sees
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0


# -- values --------------------------------------------------------------------------------------------------


def test_values_and_noises_are_inverse(tiny: SemafoVAE) -> None:
    z, labels = drawn(tiny)
    values = tiny.values(z, labels)
    priors = tiny.priors(z, labels)
    for level, value, noise, prior in zip(z, values, tiny.noises(values, labels), priors, strict=True):
        torch.testing.assert_close(noise, level, atol=1e-4, rtol=0)
        torch.testing.assert_close(value, prior.mean + prior.std * level, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [("z0",), (2,), ("u", "z1"), ()])
def test_an_intervention_keeps_values_and_else_noises(tiny: SemafoVAE, keep: tuple[str | int, ...]) -> None:
    z, labels = drawn(tiny)
    to = (labels + 1) % 3
    after = tiny.relabel(z, labels, to, keep)
    before_values, after_values = tiny.values(z, labels), tiny.values(after, to)
    for index, level in enumerate(tiny.levels):
        if level.name in keep or index in keep:
            torch.testing.assert_close(after_values[index], before_values[index], atol=1e-4, rtol=0)
        else:
            torch.testing.assert_close(after[index], z[index], atol=1e-4, rtol=0)
            moved = (after_values[index] - before_values[index]).abs().max() > 1e-2
            assert moved == ("u" not in keep), "the label acts through u alone"
    for level, same in zip(z, tiny.relabel(z, labels, labels, keep), strict=True):
        torch.testing.assert_close(same, level, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"The levels are 0 \(u\), 1 \(z0\), 2 \(z1\)\."):
        tiny.relabel(z, labels, to, ["z2"])


def test_levels_of_three_samples_make_one(tiny: SemafoVAE) -> None:
    z, labels = drawn(tiny)
    values = tiny.values(z, labels)
    mixed = [values[0][:1], values[1][1:2], values[2][2:3]]
    noises = tiny.noises(mixed, labels[:1])
    for value, expected in zip(tiny.values(noises, labels[:1]), mixed, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


def test_a_coordinate_is_an_axis_of_the_prior(tiny: SemafoVAE) -> None:
    z, labels = drawn(tiny, 2)
    moved = latents.traverse(tiny, z, "z0", 3, span=2.0, count=3, labels=labels)
    prior = tiny.priors(z, labels)[1]
    start = tiny.values(z, labels)[1]
    end = tiny.values(moved.latents[0][2], labels)[1]
    expected = 2 * prior.std * F.one_hot(torch.tensor(3), 5)
    torch.testing.assert_close(end - start, expected, atol=1e-4, rtol=0)
    assert moved.images(tiny, labels).shape == (1, 3, 2, 1, 16, 16)


def test_half_precision(tiny: SemafoVAE) -> None:
    g = small().to(torch.bfloat16)
    z, labels = drawn(tiny)
    assert (g(z, labels) - tiny(z, labels)).abs().mean() < 0.05
    images = torch.rand(2, 1, 16, 16)
    assert [level.shape for level in g.encode(images)] == [level.shape for level in tiny.encode(images)]
    assert g.relabel(z, labels, labels)[2].isfinite().all()


# -- training ------------------------------------------------------------------------------------------------

SMALL = Recipe(TINY, labels=12, batch=8, labelled=4, views=4, ramp=16)
OF_PRIORS = {"priors_only": True, "warm_up": 0.0, "control_from": 0.0, "control_temperature": 4.0}


def trainer(total: int = 80, start: SemafoVAE | None = None, **changes: object) -> Trainer:
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(66) % 3
    images = torch.randint(80, (66, 1, 16, 16), generator=noise)
    images[..., 4:12] += 80 * labels[:, None, None, None]  # the class is a brightness
    recipe = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    images = images.to(torch.uint8)
    return Trainer(recipe, images, total, seed=1, bf16=False, labels=labels, start=start)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    check_resumed_training(trainer, tmp_path)


def test_training_lowers_the_bound_and_learns_the_labels() -> None:
    run = trainer(total=1600)
    history = [run.step() for _ in range(60)]
    assert history[-1]["nats"] < history[0]["nats"] - 5
    assert history[-1]["label"] < 0.7 * history[0]["label"]
    images = run.images.float() / 255  # type: ignore[union-attr]
    assert (run.network.classify(images).argmax(1) == torch.arange(66) % 3).double().mean() > 0.9


def test_a_training_of_priors_changes_nothing_else(tmp_path: Path) -> None:
    before = trainer().network
    run = trainer(start=before, **OF_PRIORS)
    history = [run.step() for _ in range(3)]
    assert all(math.isfinite(loss["control"]) for loss in history)
    first = before.state_dict()
    changed = {name for name, weight in run.network.state_dict().items() if not weight.equal(first[name])}
    assert {name.split(".")[0] for name in changed} == {"classes", "blocks"}
    assert all(name.startswith(PRIORS) for name in changed)
    check_resumed_training(lambda: trainer(start=before, **OF_PRIORS), tmp_path)
    # A checkpoint belongs to the weights that it went on from.
    other = copy.deepcopy(before)
    other.classes.data += 1
    assert trainer(start=other, **OF_PRIORS).settings() != run.settings()


def test_a_training_of_priors_needs_a_network_that_fits() -> None:
    with pytest.raises(ValueError, match=r"give its file by --start"):
        trainer(priors_only=True)
    with pytest.raises(ValueError, match=r"leave --start out"):
        trainer(start=trainer().network)
    with pytest.raises(ValueError, match=r"The file of --start has .*; the images need"):
        trainer(start=SemafoVAE(dataclasses.replace(TINY, u=4)), priors_only=True)


def test_other_labels_are_never_looked_at() -> None:
    """Runs that differ in the labels of images that are not among the labelled ones are the same."""
    one, other = trainer(), trainer()
    labels = torch.arange(66) % 3
    unused = torch.ones(66, dtype=torch.bool)
    unused[one.with_label] = False
    labels[unused] = 0
    other.labels = labels[other.with_label]
    assert [one.step() for _ in range(2)] == [other.step() for _ in range(2)]


def test_labels_are_as_many_of_each_class() -> None:
    labels = torch.arange(100) % 10
    rows = labelled_rows(labels, 35, seed=0)
    assert labels[rows].bincount().tolist() == [3] * 10
    assert len(set(rows.tolist())) == 30
    assert not rows.equal(labelled_rows(labels, 35, seed=1))
    with pytest.raises(ValueError, match="some have no class"):
        labelled_rows(torch.tensor([0, -1]), 2, seed=0)
    with pytest.raises(ValueError, match=r"Invalid labels=200: .* at most 100"):
        labelled_rows(labels, 200, seed=0)


def test_augmentation_is_drawn_for_each_image() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:24, 10:20] = 0.5
    views = augment(image.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert views.shape == (50, 1, 32, 32)
    assert 0 <= views.min() <= views.max() <= 1
    assert len(torch.unique(views.flatten(1).sum(1))) == 50
    again = augment(image.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert torch.equal(views, again)
    weak = weakly(image.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert (weak.sum((1, 2, 3)) > 0.6 * image.sum()).all(), "nothing is covered"


def test_a_short_training_from_the_command_line_and_its_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    noise = torch.Generator().manual_seed(0)
    write_idx(data / "train-images-idx3-ubyte", torch.randint(256, (100, 28, 28), generator=noise))
    write_idx(data / "train-labels-idx1-ubyte", torch.arange(100) % 10)
    model = dataclasses.replace(TINY, classes=10, encoder=(4, 4, 8), decoder=(4, 4, 4, 8))
    recipe = dataclasses.replace(SMALL, model=model, labels=20)
    monkeypatch.setitem(RECIPES, "fashion-semafo", recipe)
    monkeypatch.setitem(RECIPES, "fashion-semafo-priors", dataclasses.replace(recipe, **OF_PRIORS))
    app = typer.Typer()
    app.command()(train_semafo.main)
    options = ["--data", str(data), "--out", str(out), "--snapshots", "64"]
    for _ in range(2):  # a second call finds the run at its end
        result = CliRunner().invoke(app, ["fashion-semafo", *options, "--images", "128"])
        assert result.exit_code == 0, result.output
    # The second training goes on from the first one's file, and says so.
    first = out / "fashion-semafo.safetensors"
    second = ["--data", str(data), "--out", str(tmp_path / "second"), "--images", "64", "--start", str(first)]
    result = CliRunner().invoke(app, ["fashion-semafo-priors", *second])
    assert result.exit_code == 0, result.output
    refined = SemafoVAE.load(tmp_path / "second" / "fashion-semafo-priors.safetensors")
    assert refined.provenance["start"]["sha256"] == sha256(first)
    assert refined.provenance["start"]["images"] == 128

    g, provenance = evaluate._load(out / "fashion-semafo.safetensors", 1.0)
    assert isinstance(g, SemafoVAE)
    assert (g.config, g.border, provenance["images"]) == (model, 2, 128)
    labels = g.sample_labels(range(3))
    draw_levels(g, g.sample_latents(range(3)), 0, tmp_path / "levels.png", labels=labels)
    images = torch.randint(256, (20, 1, 32, 32), generator=noise).to(torch.uint8)
    draw_reconstructions(g, images, tmp_path / "reconstructions.png", torch.arange(20) % 10)
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


def test_recipes_fit_larger_images() -> None:
    recipe = RECIPES["semafo"].fitted(3, 64)
    g = SemafoVAE(recipe.model)
    assert g.image_shape == (3, 64, 64)
    assert recipe.clip == 12 * RECIPES["semafo"].clip
    assert g(g.sample_latents(range(1)), g.sample_labels(range(1))).shape == (1, 3, 64, 64)


# -- files and the bundled model -----------------------------------------------------------------------------


def test_bad_configurations(tmp_path: Path) -> None:
    for changes, message in (
        ({"encoder": (4,)}, "Invalid encoder and decoder of 1 and 3 widths"),
        ({"groups": 3}, "must be divisible by groups=3"),
        ({"floor": -1.0}, "Invalid floor=-1.0"),
        ({"u": 0}, "Invalid u=0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"fashion-nvae\.safetensors"):
        SemafoVAE.load(FOLDER / "fashion-nvae.safetensors")


def test_the_bundled_file_is_the_one_that_was_measured(bundled: SemafoVAE) -> None:
    path = FOLDER / "fashion-semafo.safetensors"
    record = json.loads((FOLDER / "fashion-semafo.quality.json").read_text())
    labels = json.loads((ROOT / "benchmarks" / "results" / "fashion-semafo.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["weights"]["sha256"] == labels["weights"]["sha256"] == digest
    assert record["weights"]["bytes"] == path.stat().st_size <= 4_000_000
    assert record["weights"]["parameters"] == sum(value.numel() for value in bundled.parameters())
    assert record["provenance"] == bundled.provenance
    first, priors = (
        json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
        for name in ("fashion-semafo", "fashion-semafo-priors")
    )
    assert bundled.provenance["recipe"] == priors
    # It went on from a file of the first recipe, from before there were settings for priors alone.
    assert bundled.provenance["start"]["recipe"].items() <= first.items()


def test_the_bundled_model_makes_what_it_made(bundled: SemafoVAE) -> None:
    with np.load(ROOT / "tests" / "golden" / "semafo-bundled.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file}
    labels = bundled.sample_labels(range(4), seed=5)
    assert labels.equal(golden["labels"])
    images = bundled(bundled.sample_latents(range(4), seed=5), labels)
    torch.testing.assert_close(images, golden["images"].float(), atol=2e-3, rtol=0)  # in half precision
    torch.testing.assert_close(
        bundled.classify(golden["images"].float()), golden["classes"], atol=1e-3, rtol=0
    )


def test_the_bundled_model_knows_real_images(bundled: SemafoVAE) -> None:
    assert list(bundled.levels) == [("u", (16,)), ("z0", (32,)), ("z1", (16, 4, 4))]
    assert (bundled.image_shape, bundled.num_classes, bundled.border) == ((1, 32, 32), 10, 2)
    images, labels = bundled_slice()[1]
    images = F.pad(images[:500].float() / 255, (2, 2, 2, 2))
    assert (bundled.classify(images).argmax(1) == labels[:500]).double().mean() > 0.75
    error = (bundled(bundled.encode(images, labels[:500]), labels[:500]) - images)[:, :, 2:30, 2:30]
    assert error.square().mean() < 0.02


@pytest.mark.parametrize("preset", ["fashion-semafo-resample", "fashion-semafo-ml-random"])
def test_presets_give_labels(preset: str) -> None:
    source = mlviews.MLViewSource.from_config(preset, batch_size=4, num_samples=4, layout="solo")
    _, views, targets = next(iter(source))
    assert targets.equal(source.generator.sample_labels(range(4), source.seed)[targets.new_tensor(range(4))])
    assert len(views) == 2
