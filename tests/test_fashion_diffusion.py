"""The bundled diffusion model: its training, and what is shipped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import assert_same, by_index
from diffusers import ConsistencyModelPipeline
from invariances import check_resumed_training
from test_data import write_idx
from torch import Tensor
from typer.testing import CliRunner

from mlviews import MLVGM, MLViewSource, list_generators, load_generator
from mlviews.perturb import Resample
from mlviews.source import Batch
from mlviews.zoo import FOLDER, PROVENANCE, evaluate, train_diffusion
from mlviews.zoo.train_diffusion import RECIPES, Denoiser, Recipe, Trainer

BUNDLED = FOLDER / "fashion-diffusion"
TINY = Recipe(channels=(8, 8, 8), levels=2, sigma_max=5.0, batch=16, width=8, r1_every=2)


def trainer(total: int = 160) -> Trainer:
    images = torch.randint(256, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Trainer(TINY, images, total, seed=1, bf16=False)


# -- training ------------------------------------------------------------------------------------------------


def test_training_resumes_exactly(tmp_path: Path) -> None:
    whole, second = check_resumed_training(trainer, tmp_path)
    assert torch.equal(whole.samples, second.samples)


def test_a_batch_has_eight_images_for_every_level() -> None:
    recipe = dataclasses.replace(TINY, batch=32)
    with pytest.raises(ValueError, match=r"Invalid batch=32: 8 images for each of 2 levels"):
        Trainer(recipe, torch.zeros(64, 1, 32, 32, dtype=torch.uint8), 160, 1, False)


def test_levels_clean_real_images_and_what_the_level_before_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer()
    training.step()
    before = training.samples
    images: list[Tensor] = []
    noisy = Denoiser.noisy

    def watch(self: Denoiser, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        images.append(clean)
        return noisy(self, clean, noise, levels)

    monkeypatch.setattr(Denoiser, "noisy", watch)
    real = training.images[training.rows()].float() / 127.5 - 1
    training.step()
    assert torch.equal(images[0][:8], real[:8])
    assert torch.equal(images[0][9::2], before[8::2])  # the second level takes the first one's


def test_the_first_level_is_noise_alone() -> None:
    denoise = Denoiser(TINY)
    images, noise = torch.ones(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    noisy = denoise.noisy(images, noise, torch.tensor([0, 1]))
    assert torch.equal(noisy[0], 5 * noise[0])
    sigma = denoise.noise[1]
    torch.testing.assert_close(noisy[1], 1 + sigma * noise[1])
    assert 0.03 < sigma < 5


def test_an_export_is_what_diffusers_and_mlviews_read(tmp_path: Path) -> None:
    training = trainer()
    for _ in range(2):
        training.step()
    training.export(tmp_path / "model", {"seed": 1})
    training.export(tmp_path / "model", {"seed": 2})  # which replaces it
    assert json.loads((tmp_path / "model" / PROVENANCE).read_text()) == {"seed": 2}
    g = load_generator("fashion-diffusion", tmp_path / "model", steps=2)
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    same = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = pipeline(3, num_inference_steps=2, generator=same, output_type="pt").images
    same = [torch.Generator().manual_seed(seed) for seed in range(3)]
    latents = [torch.cat([torch.randn(1, 1, 32, 32, generator=noise) for noise in same]) for _ in range(2)]
    torch.testing.assert_close(g(latents), images, atol=1e-5, rtol=0)
    # And that is the moving average, in half precision, by the steps of the training.
    denoise, state = Denoiser(TINY), torch.zeros(3, 1, 32, 32)
    for level, z in enumerate(latents):
        levels = torch.full((3,), level)
        state = denoise(training.average, denoise.noisy(state, z, levels), levels).clamp(-1, 1)
    torch.testing.assert_close(images, state / 2 + 0.5, atol=5e-3, rtol=0)


def test_a_short_training_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.Generator().manual_seed(0)
    for name, count in (("train", 600), ("t10k", 300)):
        write_idx(
            tmp_path / f"{name}-images-idx3-ubyte", torch.randint(256, (count, 28, 28), generator=numbers)
        )
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", torch.arange(count) % 10)
    monkeypatch.setitem(
        train_diffusion.RECIPES, "fashion-diffusion", dataclasses.replace(TINY, levels=4, batch=32)
    )

    def run(main: object, *arguments: str) -> None:
        app = typer.Typer()
        app.command()(main)  # type: ignore[type-var]
        result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path)])
        assert result.exit_code == 0, result.output

    out = tmp_path / "run"
    run(train_diffusion.main, "fashion-diffusion", "--out", str(out), "--images", "64")
    assert (out / "log.csv").read_text().startswith("images,loss_d,loss_g,distance_1,distance_2,distance_3,")
    facts = json.loads((out / "fashion-diffusion" / PROVENANCE).read_text())
    assert (facts["images"], facts["seed"]) == (64, 0)
    run(
        evaluate.main,
        str(out / "fashion-diffusion"),
        "--out",
        str(out / "quality"),
        "--samples",
        "256",
        "--pairs",
        "20",
    )
    report = json.loads((out / "quality" / "quality.json").read_text())
    assert report["provenance"] == facts
    assert [row["level"] for row in report["levels"]["table"]] == ["0", "1", "2", "3", "1:"]


# -- what is shipped -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> MLVGM:
    return load_generator("fashion-diffusion")


def test_the_bundled_folder_is_the_one_that_was_measured(bundled: MLVGM) -> None:
    record = json.loads((FOLDER / "fashion-diffusion.quality.json").read_text())
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert record["weights"]["bytes"] == sum(path.stat().st_size for path in files) <= 4_000_000
    weights = BUNDLED / "unet" / "diffusion_pytorch_model.safetensors"
    assert record["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["weights"]["parameters"] == sum(value.numel() for value in bundled.parameters())
    provenance = json.loads((BUNDLED / PROVENANCE).read_text())
    assert record["provenance"] == provenance
    recipe = json.loads(json.dumps(dataclasses.asdict(RECIPES["fashion-diffusion"])))
    assert recipe == {**provenance["recipe"], "image_channels": 1, "image_size": 32}


def test_the_list_of_generators_says_what_is_bundled(bundled: MLVGM) -> None:
    (info,) = (info for info in list_generators() if info.name == "fashion-diffusion")
    assert (info.levels, info.image_shape, info.bundled) == (bundled.levels, bundled.image_shape, True)


def test_samples_are_those_on_record(bundled: MLVGM) -> None:
    with np.load(Path(__file__).parent / "golden" / "fashion-diffusion.npz") as file:
        recorded = torch.from_numpy(file["images"]).float()
    images = bundled(bundled.sample_latents(range(30, 34), seed=5, epoch=3))
    torch.testing.assert_close(images, recorded, atol=4e-3, rtol=0)  # recorded in half precision


def test_a_sample_depends_on_its_index_alone(bundled: MLVGM) -> None:
    def source(**options: object) -> MLViewSource:
        arguments = {"batch_size": 4, "num_samples": 8, "seed": 3, "layout": _whole} | options
        return MLViewSource(bundled, {"2:": Resample()}, **arguments)  # type: ignore[arg-type]

    whole = by_index(source())
    assert_same(whole, by_index(source(batch_size=2)), 3e-5)
    ranks = [by_index(source(batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert_same(whole, ranks[0] | ranks[1], 3e-5)
    stopped = source(batch_size=2)
    next(iter(stopped))
    resumed = source(batch_size=2)
    resumed.load_state_dict(stopped.state_dict())
    rest = by_index(resumed)
    assert_same({index: whole[index] for index in rest}, rest, 3e-5)
    assert len(rest) == 6


def test_views_share_the_steps_before_the_first_that_moves(
    bundled: MLVGM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    handle = bundled.denoiser.network.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: rows.append(len(inputs[0]))
    )
    anchors, fresh = bundled.sample_latents(range(2)), bundled.sample_latents(range(2), seed=1)
    views = [anchors, [*anchors[:3], fresh[3]]]
    shared = bundled.decode_views(views, 3)
    handle.remove()
    assert rows == [2, 2, 2, 4]  # five passes a pair, and not eight
    for view, latents in zip(shared, views, strict=True):
        torch.testing.assert_close(view, bundled(latents), atol=1e-5, rtol=0)


def _whole(batch: Batch) -> Batch:
    return batch
