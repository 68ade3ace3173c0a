from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from fill import fill, pictures
from invariances import check_resumed_training
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

from mlviews import WeightsError, load_generator
from mlviews.evaluation.data import bundled_slice
from mlviews.generators.nvae import NVAE, NVAEConfig
from mlviews.generators.nvae.cells import widen
from mlviews.generators.nvae.likelihood import Gaussian, Head
from mlviews.generators.nvae.reading import load as load_nvae
from mlviews.generators.nvae.reading import source_shapes
from mlviews.generators.nvae.walk import causal_mask
from mlviews.weights.checkpoints import Checkpoint, convert
from mlviews.weights.files import read_safetensors, write_safetensors
from mlviews.zoo import FOLDER, evaluate, train_nvae, tune_nvae
from mlviews.zoo.quality.figures import likelihood_figures
from mlviews.zoo.quality.pictures import draw_levels, draw_reconstructions
from mlviews.zoo.train_nvae import RECIPES, Recipe, Trainer, balance

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("nvae-*.npz"))
NAMES = [path.stem.removeprefix("nvae-") for path in GOLDEN]
TINY = NVAEConfig(
    image_size=16,
    groups=(2, 1),
    latents=(3, 2),
    encoder=(4, 8, 8),
    decoder=(4, 8, 12),
    gated=True,
    mixtures=2,
)


def official(path: Path) -> tuple[Checkpoint, Any]:
    """A network whose weights follow from their names, and what the official code made of it."""
    with np.load(path) as file:
        golden = dict(file)
    layout, facts = str(golden["layout"]), json.loads(str(golden["facts"]))
    return Checkpoint(
        layout, fill(source_shapes(layout, facts), int(golden["seed"])), facts, path.name
    ), golden


@pytest.fixture(scope="module")
def serezd() -> Checkpoint:
    return official(GOLDEN[NAMES.index("serezd-tiny")])[0]


@pytest.fixture(scope="module")
def nvlabs() -> Checkpoint:
    return official(GOLDEN[NAMES.index("nvlabs-cifar10-tiny")])[0]


@pytest.fixture(scope="module")
def tiny() -> NVAE:
    """Return a small network whose weights leave nothing trivial."""
    g = NVAE(TINY)
    g.load_state_dict(fill({name: tuple(value.shape) for name, value in g.state_dict().items()}, 1))
    return g


@pytest.fixture(scope="module")
def bundled() -> NVAE:
    return NVAE.load(FOLDER / "fashion-nvae.safetensors", levels="scale")


# -- other people's files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=NAMES)
def test_the_official_codes_results(path: Path) -> None:
    checkpoint, golden = official(path)
    g = load_nvae(checkpoint)
    eps = g.sample_latents(range(2), truncation=None)
    images = pictures(g.image_shape, 2, 0)
    for mine, theirs in ((g(eps), golden["decoded"]), (g(g.encode(images)), golden["reconstructed"])):
        torch.testing.assert_close(mine[:, :, ::2, ::2], torch.from_numpy(theirs), atol=1e-4, rtol=0)
    rates = torch.stack(g.elbo(images, eps)[1], dim=1)
    torch.testing.assert_close(rates, torch.from_numpy(golden["rates"]), atol=1e-2, rtol=1e-3)


def test_goldens_are_of_both_layouts() -> None:
    assert NAMES == ["nvlabs-cifar10-tiny", "nvlabs-mnist-tiny", "serezd-tiny"]


def test_checkpoint_files_load(serezd: Checkpoint, nvlabs: Checkpoint, tmp_path: Path) -> None:
    counter = {"a.num_batches_tracked": torch.tensor(7)}
    torch.save(
        {"configuration": serezd.facts, "state_dict": serezd.tensors | counter, "epoch": 3},
        tmp_path / "last.pt",
    )
    args = {name: value for name, value in nvlabs.facts.items() if name != "arch_instance"}
    content = {
        "args": argparse.Namespace(**args),
        "arch_instance": nvlabs.facts["arch_instance"],
        "state_dict": nvlabs.tensors,
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    for name, checkpoint in (("last.pt", serezd), ("checkpoint.pt", nvlabs)):
        expected = load_nvae(checkpoint)
        convert(tmp_path / name, tmp_path / "converted.safetensors")
        z = expected.sample_latents(range(2))
        for path in (tmp_path / name, tmp_path / "converted.safetensors"):
            assert torch.equal(load_generator("nvae", weights=path)(z), expected(z))


def test_a_loaded_checkpoint_survives_our_own_format(nvlabs: Checkpoint, tmp_path: Path) -> None:
    g = load_nvae(nvlabs)
    write_safetensors(tmp_path / "own.safetensors", g.state_dict(), g.metadata())
    other = NVAE.load(tmp_path / "own.safetensors")
    z = g.sample_latents(range(2))
    assert other.config == g.config
    assert torch.equal(other(z), g(z))


def changed(checkpoint: Checkpoint, **facts: Any) -> Checkpoint:
    """The checkpoint with other facts; SerezD's are one level down."""
    found = copy.deepcopy(checkpoint.facts)
    found.get("autoencoder", found).update(facts)
    return dataclasses.replace(checkpoint, facts=found)


BAD_NVLABS: list[dict[str, Any]] = [
    {"num_latent_scales": 10**9},
    {"num_latent_scales": "3"},
    {"num_latent_scales": True},
    {"num_groups_per_scale": -1},
    {"num_groups_per_scale": 10**12},
    {"num_channels_enc": 1 << 40},
    {"num_channels_dec": 6},
    {"num_latent_per_group": 5},
    {"use_se": False},
    {"use_se": "yes"},
    {"num_nf": 0},
    {"num_nf": 2},
    {"num_mixture_dec": 1},
    {"num_preprocess_blocks": 2},
    {"arch_instance": None},
    {"arch_instance": "res_mbconv"},
    {"arch_instance": {"normal_enc": ["os.system"]}},
    {"res_dist": None},
    {"num_x_bits": 64},
    {"num_cell_per_cond_enc": 2},
    {"num_latent_scales": 1, "num_groups_per_scale": 1},
]
BAD_SEREZD: list[dict[str, Any]] = [
    {"num_scales": 3},
    {"num_scales": None},
    {"num_groups_per_scale": 1},
    {"initial_channels": 8},
    {"initial_channels": 10**9},
    {"num_nf_cells": None},
    {"num_nf_cells": [1]},
    {"is_adaptive": 2},
    {"num_logistic_mixtures": 6},
    {"num_pre-post_process_blocks": 0},
]


@pytest.mark.parametrize("facts", BAD_NVLABS, ids=str)
def test_facts_that_do_not_fit_are_one_clear_error(nvlabs: Checkpoint, facts: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"another architecture than it says|no valid configuration"):
        load_nvae(changed(nvlabs, **facts))


@pytest.mark.parametrize("dataset", ["my photos", "celeba_256", ["cifar10"], None], ids=str)
def test_the_size_is_that_of_the_tensors_whatever_the_data_set(nvlabs: Checkpoint, dataset: Any) -> None:
    g, expected = load_nvae(changed(nvlabs, dataset=dataset)), load_nvae(nvlabs)
    assert g.config == expected.config
    # Without what says the size, the data set's name has to.
    for name in ("prior_ftr0", "stem.weight"):
        tensors = {key: value for key, value in nvlabs.tensors.items() if key != name}
        message = f"missing {name}" if dataset == "celeba_256" else "one of NVlabs' data sets"
        with pytest.raises(WeightsError, match=message):
            load_nvae(dataclasses.replace(changed(nvlabs, dataset=dataset), tensors=tensors))


def test_facts_are_bounded_by_the_tensors(nvlabs: Checkpoint) -> None:
    """A few numbers describe a network of millions of tensors, or masks of a gigabyte."""
    many = {"num_groups_per_scale": 64, "num_cell_per_cond_enc": 64, "num_cell_per_cond_dec": 64}
    wide = {"num_nf": 16, "num_latent_per_group": 1024, "num_channels_enc": 4096, "num_channels_dec": 4096}
    for facts in (many, wide, many | wide):
        begin = time.process_time()
        with pytest.raises(WeightsError):
            load_nvae(changed(nvlabs, **facts))
        assert time.process_time() - begin < 3


@pytest.mark.parametrize("facts", BAD_SEREZD, ids=str)
def test_serezds_facts_that_do_not_fit_are_one_clear_error(serezd: Checkpoint, facts: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"another architecture than it says|no valid configuration"):
        load_nvae(changed(serezd, **facts))


@pytest.mark.parametrize(
    "facts", [{}, [], None, {"autoencoder": 3}, {"autoencoder": {}, "resolution": [1, 32, 32]}], ids=str
)
def test_garbage_for_facts_is_one_clear_error(serezd: Checkpoint, nvlabs: Checkpoint, facts: Any) -> None:
    for checkpoint in (serezd, nvlabs):
        with pytest.raises(WeightsError, match="no valid configuration"):
            load_nvae(dataclasses.replace(checkpoint, facts=facts))


def test_wrong_tensors_are_one_clear_error(nvlabs: Checkpoint) -> None:
    def load(**tensors: Tensor | None) -> None:
        changed = {name: value for name, value in (nvlabs.tensors | tensors).items() if value is not None}
        load_nvae(dataclasses.replace(nvlabs, tensors=changed))

    weight = nvlabs.tensors["stem.weight"]
    load(
        **{"stem.num_batches_tracked": torch.tensor(1), "dec_tower.0.conv.weight_normalized": torch.zeros(1)}
    )  # of no use, and harmless
    with pytest.raises(WeightsError, match=r"missing stem\.weight; unknown none"):
        load(**{"stem.weight": None})
    with pytest.raises(WeightsError, match="missing none; unknown extra"):
        load(extra=torch.zeros(2))
    with pytest.raises(WeightsError, match=r"stem\.weight has shape \(2, 3, 3, 3\), expected \(4, 3, 3, 3\)"):
        load(**{"stem.weight": weight[:2]})
    with pytest.raises(WeightsError, match=r"stem\.weight holds torch\.int64"):
        load(**{"stem.weight": weight.long()})
    with pytest.raises(WeightsError, match="NaN or an infinity"):
        load(**{"stem.weight": weight * math.nan})
    with pytest.raises(WeightsError, match="which is no NVAE"):
        load_nvae(dataclasses.replace(nvlabs, layout="biggan"))


@pytest.mark.parametrize(
    "damage",
    [
        {"groups": [10**9]},
        {"groups": "x"},
        {"extra": 1},
        {"cells": {}},
        {"image_size": 33},
        {"head": "cauchy"},
    ],
)
def test_a_damaged_configuration_of_our_own_is_one_clear_error(
    tiny: NVAE, tmp_path: Path, damage: dict[str, Any]
) -> None:
    config = dataclasses.asdict(TINY) | damage
    write_safetensors(
        tmp_path / "w.safetensors", tiny.state_dict(), tiny.metadata() | {"config": json.dumps(config)}
    )
    with pytest.raises(WeightsError, match="no valid configuration"):
        NVAE.load(tmp_path / "w.safetensors")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NVAE.load(tmp_path / "none.pt")
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk" * 100)
        with pytest.raises(WeightsError):
            NVAE.load(tmp_path / name)


# -- the generator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["group", "scale"])
def test_shared_prefixes_change_no_image(nvlabs: Checkpoint, levels: str) -> None:
    g = load_nvae(nvlabs, levels=levels, temperature=0.7)
    anchors, others = g.sample_latents(range(3)), g.sample_latents(range(3), seed=1)
    for first in range(len(g.levels) + 1):
        views = [anchors, [*anchors[:first], *others[first:]]]
        for shared, alone in zip(g.decode_views(views, first), map(g, views), strict=True):
            torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


def test_a_level_costs_what_comes_after_it(tiny: NVAE) -> None:
    """Cells and priors that only need the levels before run once, though they belong to the next group."""
    g, rows = copy.deepcopy(tiny), []
    g.groups[2].cells.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    z = g.sample_latents(range(4))
    g.decode_views([z, z, z], 2)
    assert rows == [4]


def test_levels_by_group_or_by_scale_are_the_same_generator(tiny: NVAE) -> None:
    g = NVAE(TINY, levels="scale")
    g.load_state_dict(tiny.state_dict())
    assert list(tiny.levels) == [("4x4.0", (3, 4, 4)), ("4x4.1", (3, 4, 4)), ("8x8", (2, 8, 8))]
    assert list(g.levels) == [("4x4", (6, 4, 4)), ("8x8", (2, 8, 8))]
    z = tiny.sample_latents(range(3))
    merged = [torch.cat(z[:2], 1), z[2]]
    assert torch.equal(g(merged), tiny(z))
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(g.encode(images)[0], torch.cat(tiny.encode(images)[:2], 1))


def test_temperature_scales_the_noise(tiny: NVAE) -> None:
    cool = NVAE(TINY, temperature=0.5)
    cool.load_state_dict(tiny.state_dict())
    z = tiny.sample_latents(range(3))
    torch.testing.assert_close(cool(z), tiny([0.5 * value for value in z]), atol=1e-6, rtol=0)
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(cool.encode(images)[2], 2 * tiny.encode(images)[2])
    torch.testing.assert_close(cool(cool.encode(images)), tiny(tiny.encode(images)), atol=1e-5, rtol=0)


def test_encoding_with_noise_samples_the_posterior(tiny: NVAE) -> None:
    images = torch.rand(2, 1, 16, 16)
    noise = tiny.sample_latents(range(2), truncation=None)
    mean = tiny.encode(images)
    without_noise = tiny.encode(images, [torch.zeros_like(z) for z in noise])
    sample = tiny.encode(images, noise)
    for level in range(3):
        torch.testing.assert_close(without_noise[level], mean[level])
        assert (sample[level] - mean[level]).abs().mean() > 1e-3


def test_gradients_reach_the_latents_and_the_images(tiny: NVAE) -> None:
    z = [value.requires_grad_() for value in tiny.sample_latents(range(2))]
    tiny.decode(z).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)
    images = torch.rand(2, 1, 16, 16, requires_grad=True)
    torch.cat([value.flatten() for value in tiny.posterior(images).latents]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_bad_arguments(tiny: NVAE) -> None:
    for temperature in (0, -1.0, math.inf, "hot"):
        with pytest.raises(ValueError, match="Invalid temperature"):
            NVAE(TINY, temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'group' or 'scale'"):
        NVAE.load(FOLDER / "fashion-nvae.safetensors", levels="scales")
    whole_numbers = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    for images in (torch.rand(2, 3, 16, 16), torch.rand(1, 16, 16), whole_numbers, [0.0]):
        with pytest.raises(ValueError, match="Invalid images"):
            tiny.encode(images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit together"):
        NVAEConfig(groups=(1, 1))


def test_half_precision(tiny: NVAE) -> None:
    g = copy.deepcopy(tiny).to(torch.bfloat16)
    z = tiny.sample_latents(range(2))
    assert g(z).dtype == torch.float32
    assert (g(z) - tiny(z)).abs().mean() < 0.05
    assert len(g.encode(torch.rand(2, 1, 16, 16))) == 3


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "side"), [(1, 3), (6, 5), (2, 3)])
def test_a_wide_transposed_convolution_is_upsampling_and_a_convolution(groups: int, side: int) -> None:
    x = torch.randn(2, 6, 5, 7)
    weight = torch.randn(12 if groups < 6 else 6, 6 // groups, side, side)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=side // 2, groups=groups)
    actual = F.conv_transpose2d(x, widen(weight, groups), stride=2, padding=side // 2, groups=groups)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("colors", "bits"), [(1, 8), (3, 2)])
def test_the_mixtures_probabilities_sum_to_one(colors: int, bits: int) -> None:
    head = Head(dataclasses.replace(TINY, image_channels=colors, bits=bits))
    values = torch.linspace(0, 1, 2**bits)
    images = torch.tensor(list(itertools.product(values.tolist(), repeat=colors))).view(-1, colors, 1, 1)
    parameters = 2 * torch.randn(1, sum(head.sizes), 1, 1, generator=torch.Generator().manual_seed(3))
    log = head.log_probability(parameters.expand(len(images), -1, -1, -1), images)
    assert log.logsumexp(0).item() == pytest.approx(0, abs=1e-4)


def test_divergence_is_torchs() -> None:
    posterior, prior = (Gaussian.of(torch.randn(2, 6, 4, 4), 0.01) for _ in range(2))
    torch_posterior = torch.distributions.Normal(*posterior)
    divergence = torch.distributions.kl_divergence(torch_posterior, torch.distributions.Normal(*prior))
    torch.testing.assert_close(posterior.divergence(prior), divergence.sum((1, 2, 3)))
    log_density = torch_posterior.log_prob(prior.mean)
    torch.testing.assert_close(posterior.log_density(prior.mean), log_density.sum((1, 2, 3)))


def test_a_flow_keeps_volumes(nvlabs: Checkpoint) -> None:
    """Each masked cell is triangular with ones on its diagonal: the bound relies on that determinant."""
    flows = load_nvae(nvlabs).encoder.flows[0]

    def flat(z: Tensor) -> Tensor:
        return flows(z[None])[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, torch.randn(4, 3, 3)).view(36, 36)
    assert (jacobian - torch.eye(36)).abs().max() > 1e-2
    assert torch.linalg.det(jacobian.double()).item() == pytest.approx(1, abs=1e-4)


def test_causal_masks() -> None:
    strict = causal_mask(4, 2, 3, True, False)
    assert strict[:, :, 0].all()
    assert not strict[:, :, 2].any()
    assert strict[:, :, 1, 1].tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert causal_mask(2, 4, 1, False, False)[:, :, 0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(causal_mask(4, 1, 5, False, True), causal_mask(4, 1, 5, False, False).flip(2, 3))


# -- training ------------------------------------------------------------------------------------------------

SMALL = Recipe(TINY, batch=8, ramp=16)


def trainer(total: int = 80) -> Trainer:
    images = torch.randint(256, (64, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Trainer(SMALL, images, total, seed=1, bf16=False)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    check_resumed_training(trainer, tmp_path)


def test_training_lowers_the_bound() -> None:
    run = trainer(total=800)
    history = [run.step()["nats"] for _ in range(30)]
    assert history[-1] < history[0] - 50


def test_export_is_the_moving_average(tmp_path: Path) -> None:
    run = trainer()
    for _ in range(2):
        run.step()
    run.export(tmp_path / "w.safetensors", {"seed": 1})
    g = NVAE.load(tmp_path / "w.safetensors")
    z = g.sample_latents(range(4))
    torch.testing.assert_close(g(z), run.average(z), atol=1e-5, rtol=0)
    assert not torch.allclose(g(z), run.network(z).detach(), atol=1e-6)
    metadata = read_safetensors(tmp_path / "w.safetensors", NVAE.FORMAT)[1]
    assert json.loads(metadata["provenance"]) == {"seed": 1}


def test_idle_groups_are_charged_less_during_warm_up() -> None:
    factors = balance(torch.tensor([1.0, 1.0, 4.0]), torch.tensor([1.0, 4.0, 4.0]))
    assert factors.mean().item() == pytest.approx(1)
    assert factors[0] > factors[1]
    assert factors[2] > factors[1]


def test_a_short_training_from_the_command_line_and_its_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    write_idx(data / "train-images-idx3-ubyte", torch.randint(256, (100, 28, 28), generator=generator))
    write_idx(data / "train-labels-idx1-ubyte", torch.arange(100) % 10)
    model = dataclasses.replace(TINY, image_size=32)
    monkeypatch.setitem(RECIPES, "fashion-nvae", dataclasses.replace(SMALL, model=model))
    app = typer.Typer()
    app.command()(train_nvae.main)
    options = ["--data", str(data), "--out", str(out), "--snapshots", "64"]
    for _ in range(2):  # a second call finds the run at its end
        result = CliRunner().invoke(app, ["fashion-nvae", *options, "--images", "128"])
        assert result.exit_code == 0, result.output
    first_column = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    assert first_column == ["images", "128"]
    g, provenance = evaluate._load(out / "fashion-nvae.safetensors", 0.8)
    assert isinstance(g, NVAE)
    assert (g.config, g.temperature, len(g.levels), provenance["images"]) == (model, 0.8, 2, 128)

    images = torch.randint(256, (300, 1, 32, 32), generator=generator).to(torch.uint8)
    figures = likelihood_figures(g, images, 0, lambda count: None)
    log, divergences = g.elbo(images.float() / 255, g.sample_latents(range(300), truncation=None))
    nats = (torch.stack(divergences).sum(0) - log).mean().item()
    assert figures["bits_per_dimension"] == pytest.approx(nats / math.log(2) / 784, rel=1e-4)
    parts = figures["nats"]
    assert sum(parts["rate_of_each_group"]) + parts["distortion"] == pytest.approx(nats, rel=1e-4)
    assert 0 < figures["reconstruction"]["mse"] < 1
    draw_reconstructions(g, images, tmp_path / "reconstructions.png")
    draw_levels(g, g.sample_latents(range(3)), 0, tmp_path / "levels.png", resample=True)
    assert (tmp_path / "levels.png").stat().st_size > 1000


# -- the bundled model ---------------------------------------------------------------------------------------


def test_the_bundled_file_is_the_one_that_was_measured(bundled: NVAE) -> None:
    path = FOLDER / "fashion-nvae.safetensors"
    record = json.loads((FOLDER / "fashion-nvae.quality.json").read_text())
    assert record["weights"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["weights"]["bytes"] == path.stat().st_size <= 4_000_000
    parameters = sum(value.numel() for value in bundled.parameters())
    assert record["weights"]["parameters"] == parameters <= 1_000_000
    provenance = json.loads(read_safetensors(path, NVAE.FORMAT)[1]["provenance"])
    assert record["provenance"] == provenance
    recipes = (tune_nvae.RECIPES, RECIPES)
    second, first = (json.loads(json.dumps(dataclasses.asdict(recipe["fashion-nvae"]))) for recipe in recipes)
    assert provenance["recipe"] == second
    assert provenance["start"]["recipe"] == first


def test_bundled_levels(bundled: NVAE) -> None:
    assert list(bundled.levels) == [("4x4", (24, 4, 4)), ("8x8", (8, 8, 8)), ("16x16", (4, 16, 16))]
    assert bundled.image_shape == (1, 32, 32)
    images = bundled(bundled.sample_latents(range(16)))
    assert 0 <= images.min() < 0.02
    assert 0.8 < images.max() <= 1
    assert images.flatten(1).std(0).mean() > 0.1, "samples must differ"


def test_bundled_model_reconstructs_real_images(bundled: NVAE) -> None:
    images = F.pad(bundled_slice()[1].images[:200].float() / 255, (2, 2, 2, 2))
    error = (bundled(bundled.encode(images)) - images)[:, :, 2:30, 2:30].square().mean()
    assert error < 0.002
