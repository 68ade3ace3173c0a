"""Diffusion models: diffusers' own images, one latent for each noise, and folders that nothing is run of."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import assert_same, by_index
from parity.diffusion import CASES, LIMIT, Case, Model, compare, dit, encoded_prompts, text_unet, unet, vae
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlviews import MLViewSource, Purifier, WeightsError, load_generator
from mlviews.generators.diffusion import DiffusionGenerator
from mlviews.generators.diffusion.folder import needed_files
from mlviews.perturb import Mix, Normal, Resample
from mlviews.weights import download

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(folder: Path, scheduler: Any, **networks: Any) -> Path:
    """Write a model as diffusers does."""
    Model(scheduler, **networks).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> DiffusionGenerator:
    g = load_generator("diffusion", weights=folder, **options)
    assert isinstance(g, DiffusionGenerator)
    return g


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM on pixels."""
    return save(tmp_path_factory.mktemp("ddpm"), diffusers.DDPMScheduler(), unet=unet())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGenerator:
    """A consistency model of ten classes."""
    folder = tmp_path_factory.mktemp("cm")
    return load(save(folder, diffusers.CMStochasticIterativeScheduler(), unet=unet(num_class_embeds=10)))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGenerator:
    """A transformer on the codes of an autoencoder, with guidance."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return load(save(tmp_path_factory.mktemp("dit"), scheduler, transformer=dit(), vae=vae()))


@pytest.fixture
def g(folder: Path) -> DiffusionGenerator:
    return load(folder)


# -- the same images as diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_heavy], ids=lambda case: case.name)
def test_images_are_those_of_diffusers(case: Case, tmp_path: Path) -> None:
    row = compare(case, tmp_path)
    assert row["contrast"] > 0.1
    assert row["max"] <= LIMIT


# -- levels and blocks ---------------------------------------------------------------------------------------


def test_a_level_is_named_by_when_its_noise_is_there(folder: Path, classes: DiffusionGenerator) -> None:
    assert load(folder).level_names == ("t750", "t500", "t250", "t0")
    assert load(folder, timesteps=[999, 9]).level_names == ("t999", "t9")
    assert classes.level_names == ("noise80", "noise16.8", "noise2.24", "noise0.131")
    assert {level.shape for level in classes.levels} == {(3, 8, 8)}
    assert (classes.image_shape, classes.num_classes) == ((3, 8, 8), 10)


def test_only_noises_that_are_there_are_levels(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing").save_pretrained(
        tmp_path / "scheduler"
    )
    assert load(tmp_path).level_names == ("t999", "t749", "t499", "t249", "residual")
    # Trajectory consistency jumps to time 0 itself, from where no noise leads back.
    jumps = load(tmp_path, sampler="tcd", timesteps=[999, 500, 0])
    assert jumps.level_names == ("t999", "t500")
    assert [len(block.steps) for block in jumps._blocks] == [1, 2]
    assert load(folder, sampler="ancestral", timesteps=[999]).level_names == ("t999",)


def passes(g: DiffusionGenerator) -> Iterator[list[int]]:
    """Count the samples of each pass of the network."""
    rows: list[int] = []
    handle = g.denoiser.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    yield rows
    handle.remove()


def test_views_share_the_passes_before_their_first_difference(g: DiffusionGenerator) -> None:
    counter = passes(g)
    rows = next(counter)
    MLViewSource(g, {-1: Resample()}, batch_size=2, num_samples=2).batch(0, 2)
    assert sum(rows) / 2 == 5, "of 8: three for both views, and the last one of each"
    rows.clear()
    MLViewSource(g, {1: Mix(0.3)}, batch_size=2, num_samples=2).batch(0, 2)
    assert rows == [2, 4, 4, 4]


@pytest.mark.parametrize("first", range(5))
def test_shared_blocks_change_no_image(
    first: int, classes: DiffusionGenerator, latent: DiffusionGenerator, tmp_path: Path
) -> None:
    learned = save(
        tmp_path, diffusers.DDPMScheduler(variance_type="learned_range"), unet=unet(out_channels=6)
    )
    for g in (classes, latent, load(learned)):
        anchors, fresh = g.sample_latents(range(3)), g.sample_latents(range(3), seed=1)
        views = [anchors, [*anchors[:first], *fresh[first:]]]
        labels = g.sample_labels(range(3)) if g.num_classes else None
        shared = g.decode_views(views, min(first, len(g.levels)), labels)
        for image, z in zip(shared, views, strict=True):
            torch.testing.assert_close(image, g(z, labels), atol=1e-5, rtol=0)
        assert g(anchors, labels).std() > 0.05


def test_anchors_are_not_truncated_unless_asked_for(g: DiffusionGenerator) -> None:
    source = MLViewSource(g, {-1: Resample()}, batch_size=8, num_samples=8)
    assert source.anchor.truncation is None
    latents = source.batch(0, 8).latents
    assert torch.stack(list(latents[0])).std() == pytest.approx(1, abs=0.02)
    assert torch.stack(list(latents[0])).abs().max() > 3
    assert latents[1][3].std() == pytest.approx(1, abs=0.05)
    configured = MLViewSource.from_config({"generator": g, "perturb": "resample", "batch_size": 2})
    assert configured.anchor.truncation is None


# -- a function of seed, epoch and index ---------------------------------------------------------------------


def batches(g: DiffusionGenerator, **options: Any) -> dict[int, Tensor]:
    defaults = {"batch_size": 4, "num_samples": 12, "seed": 3, "layout": lambda batch: batch}
    return by_index(MLViewSource(g, {"2:": Mix(0.5)}, **{**defaults, **options}))


@pytest.mark.parametrize("kind", ["folder", "classes", "latent"])
def test_samples_depend_on_neither_batch_nor_rank(kind: str, request: pytest.FixtureRequest) -> None:
    fixture = request.getfixturevalue(kind)
    g = load(fixture) if kind == "folder" else fixture
    whole = batches(g)
    assert_same(whole, batches(g, batch_size=3, micro_batch_size=2), 1e-5)
    ranks = [batches(g, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert_same(whole, ranks[0] | ranks[1], 1e-5)
    assert_same({i: whole[i] for i in range(4)}, batches(g, num_samples=4), 1e-5)


def test_a_source_goes_on_where_it_was(g: DiffusionGenerator) -> None:
    def source() -> MLViewSource:
        return MLViewSource(g, {3: Mix(0.5)}, batch_size=4, num_samples=12, layout=lambda batch: batch)

    whole = by_index(source())
    first, second = source(), source()
    iterator = iter(first)
    begin = by_index([next(iterator)])
    second.load_state_dict(first.state_dict())
    assert_same(whole, begin | by_index(second), 1e-5)


def test_everything_moves_and_no_step_waits_for_the_host(
    folder: Path, classes: DiffusionGenerator, latent: DiffusionGenerator, tmp_path: Path
) -> None:
    """On the meta device, whatever asks a tensor for its value raises."""
    thresholded = save(tmp_path, diffusers.DDPMScheduler(thresholding=True), unet=unet())
    for g in (load(thresholded), load(folder, sampler="tcd"), classes, latent):
        moved = copy.deepcopy(g).to("meta")
        z = [torch.empty(2, *level.shape, device="meta") for level in g.levels]
        labels = torch.empty(2, dtype=torch.int64, device="meta") if g.num_classes else None
        first, second = moved.decode_views([z, z], 1, labels)
        assert first.device.type == second.device.type == "meta"
        images = torch.empty(2, *g.image_shape, device="meta")
        assert moved.encode(images, labels)[-1].device.type == "meta"


def test_copies_empty_batches_and_the_callers_defaults(folder: Path, latent: DiffusionGenerator) -> None:
    z, labels = latent.sample_latents(range(2)), latent.sample_labels(range(2))
    images = latent(z, labels)
    for equal in (copy.deepcopy(latent), pickle.loads(pickle.dumps(latent))):
        assert torch.equal(equal(z, labels), images)
    assert latent([level[:0] for level in z], labels[:0]).shape == (0, *latent.image_shape)
    g = load(folder)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            elsewhere = load(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    z = g.sample_latents(range(2))
    assert torch.equal(elsewhere(z), g(z))
    names = list(g.state_dict())
    assert all(name.startswith("denoiser.network.") for name in names), "the network is stored once"
    assert not any(parameter.requires_grad for parameter in g.parameters())


def test_half_precision_keeps_the_sampler_and_fragile_autoencoders_in_float32(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    g = load(save(tmp_path, scheduler, transformer=dit(), vae=vae(force_upcast=True)), guidance=1)
    half = copy.deepcopy(g).to(torch.bfloat16)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    assert half.autoencoder is not None
    assert {p.dtype for p in half.autoencoder.parameters()} == {torch.float32}
    z, labels = g.sample_latents(range(2)), g.sample_labels(range(2))
    images = half(z, labels)
    assert images.dtype == torch.float32
    assert (images - g(z, labels)).abs().mean() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert (g(z, labels) - images).abs().mean() < 0.03


def test_decoding_is_differentiable(latent: DiffusionGenerator) -> None:
    z = [value.requires_grad_() for value in latent.sample_latents(range(1))]
    latent.decode(z, latent.sample_labels(range(1))).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in z)


# -- from images to latents ----------------------------------------------------------------------------------


def pictures(g: DiffusionGenerator, rows: int = 3) -> Tensor:
    return torch.rand(rows, *g.image_shape, generator=torch.Generator().manual_seed(0))


def test_latents_decode_to_the_image_if_noise_stays_in_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1).save_pretrained(tmp_path / "scheduler")
    g = load(tmp_path, steps=10)
    x = pictures(g)
    z = g.encode(x)
    assert g.level_names[-1] == "residual"
    torch.testing.assert_close(g(z), x, atol=1e-4, rtol=0)
    assert not torch.equal(z[0][0], z[0][1]), "every image has noises of its own"
    for level, alone in zip(z, g.encode(x[1:2]), strict=True):
        torch.testing.assert_close(level[1:2], alone, atol=1e-3, rtol=1e-3)


def test_latents_reach_every_noised_image_before_the_last_step(g: DiffusionGenerator) -> None:
    x = pictures(g)
    z = g.encode(x)
    expected = g.to_image(g.noised_state(x, len(g.levels)))
    torch.testing.assert_close(g(z), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", range(4))
def test_keeping_coarse_levels_is_noising_to_them(level: int, latent: DiffusionGenerator) -> None:
    """The identity of SDEdit and DiffPure: latents above a level stand for one noised image."""
    x, labels = pictures(latent), latent.sample_labels(range(3))
    fresh = latent.sample_latents(range(3))
    mixed = [*latent.encode(x, labels)[:level], *fresh[level:]]
    state = latent.noised_state(x, level, labels)
    images = latent.decode(fresh, labels, state=state, start=level)
    torch.testing.assert_close(images, latent(mixed, labels), atol=1e-4, rtol=0)


def test_noising_is_differentiable_and_takes_noise(g: DiffusionGenerator) -> None:
    x, noise = pictures(g).requires_grad_(), torch.randn(3, 3, 8, 8)
    state = g.noised_state(x, 2, noise=noise)
    assert isinstance(state, Tensor)
    state.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"Invalid noise of shape \(2, 3, 8, 8\): expected \(3, 3, 8, 8\)"):
        g.noised_state(x, 2, noise=noise[:2])


def test_a_source_of_images_hands_their_classes_to_the_encoder(classes: DiffusionGenerator) -> None:
    class Labelled(list[tuple[Tensor, int]]):
        targets = range(6)

    images = Labelled((image, label) for label, image in enumerate(pictures(classes, 6)))
    source = MLViewSource(
        classes,
        {-1: Resample()},
        images=images,
        batch_size=6,
        micro_batch_size=4,
        anchor_view="reconstructed",
    )
    batch = source.batch(0, 6)
    ordered = torch.stack([images[label][0] for label in batch.targets.tolist()])
    z = classes.encode((ordered * 255).round() / 255, batch.targets)
    torch.testing.assert_close(batch.latents[0][1], z[1], atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="pass labels"):
        classes.encode(ordered)


# -- folders -------------------------------------------------------------------------------------------------


def images_of(folder: Path, **options: Any) -> Tensor:
    g = load(folder, **options)
    return g(g.sample_latents(range(2)), g.sample_labels(range(2)) if g.num_classes else None)


def test_early_folders_and_their_names_of_layers(folder: Path, tmp_path: Path) -> None:
    """google/ddpm-cifar10-32 and the like: one folder, pickled weights, attention's layers by other names."""
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(folder / file, tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(folder / "unet" / WEIGHTS).items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = value
    assert any(".proj_attn." in name for name in tensors)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(images_of(tmp_path), images_of(folder))


def test_weights_in_several_files_and_in_half_precision(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    (tmp_path / "unet" / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"1": names[::2], "2": names[1::2]}
    files = {part: f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in parts}
    for part, part_names in parts.items():
        save_file({name: tensors[name] for name in part_names}, tmp_path / "unet" / files[part])
    weight_map = {name: files[part] for part, part_names in parts.items() for name in part_names}
    index = tmp_path / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert torch.equal(images_of(tmp_path), images_of(folder))
    half = {name: value.half() for name, value in tensors.items()}
    save_file(half, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert (images_of(tmp_path, variant="fp16") - images_of(folder)).abs().max() < 0.05
    with pytest.raises(WeightsError, match=r"no diffusion_pytorch_model.bf16.safetensors or .bin: there are"):
        load(tmp_path, variant="bf16")


def test_dits_early_class_name(tmp_path: Path) -> None:
    save(tmp_path, diffusers.DDIMScheduler(), transformer=dit(), vae=vae())
    expected = images_of(tmp_path)
    edit(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel")
    assert torch.equal(images_of(tmp_path), expected)
    edit(tmp_path / "transformer" / "config.json", norm_type="ada_norm_single")
    with pytest.raises(WeightsError, match="norm_type 'ada_norm_single': mlviews reads DiT's"):
        load(tmp_path)


def test_another_sampler_takes_over_the_folders_schedule(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
        tmp_path / "scheduler"
    )
    with pytest.raises(WeightsError, match=r"PNDMScheduler, which solves an ODE.*sampler='ancestral'"):
        load(tmp_path)
    assert load(tmp_path, sampler="ddim").level_names == ("t751", "t501", "t251", "t1", "residual")
    assert len(load(tmp_path, sampler="ancestral", steps=3).levels) == 3


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Canary:
    """What would leave a trace if its pickle were run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('canary', 'w')",)


def index(**components: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        table = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], **components}
        (folder / "model_index.json").write_text(json.dumps(table))

    return write


def unet_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "unet" / "config.json", **changes)


def scheduler_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def pickled(content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "unet" / WEIGHTS).unlink()
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(content))

    return write


def sharded(*files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "unet" / WEIGHTS)
        save_file(tensors, folder / "elsewhere.safetensors")
        (folder / "unet" / WEIGHTS).rename(folder / "unet" / "part.safetensors")
        weight_map = {name: files[place % len(files)] for place, name in enumerate(sorted(tensors))}
        (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def tensors_file(**changes: Tensor | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors: dict[str, Tensor | None] = {**load_file(folder / "unet" / WEIGHTS), **changes}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "unet" / WEIGHTS)

    return write


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "custom pipeline": (
        index(_class_name=["pipeline.py", "MyPipeline"]),
        r"asks for code of its own.*'pipeline.py', 'MyPipeline'.*Nothing of it was run",
    ),
    "no pipeline's name": (index(_class_name=None), "asks for code of its own"),
    "component of a file in the folder": (
        index(unet=["my_unet", "MyUNet"]),
        r"component 'unet' of \['my_unet', 'MyUNet'\].*may be UNet2DModel",
    ),
    "component of another library": (index(unet=["os", "system"]), "component 'unet' of .'os', 'system'."),
    "class of another kind": (index(unet=["diffusers", "FluxTransformer2DModel"]), "may be UNet2DModel"),
    "component of another kind": (index(prior=["diffusers", "PriorTransformer"]), "component 'prior'"),
    "text encoder of another kind": (
        index(text_encoder=["transformers", "T5EncoderModel"]),
        "may be CLIPTextModel.* of transformers",
    ),
    "remote code in the network's settings": (
        unet_config(_class_name="MyUNet", auto_map={"AutoModel": "modeling.MyUNet"}),
        "of class 'MyUNet', which mlviews does not read",
    ),
    "network without a class": (unet_config(_class_name=None), "of class 'None'"),
    "index that is no JSON": (text("model_index.json", "{"), "is damaged, or no weights file"),
    "index that is a list": (text("model_index.json", "[1]"), "list, expected a table"),
    "deeply nested settings": (text("model_index.json", "[" * 100_000), "is damaged, or no weights file"),
    "number without bounds": (unet_config(sample_size=10**30), "the number 1000000"),
    "settings without end": (text("unet/config.json", b'{"a": "' + b"x" * (5 << 20) + b'"}'), "bytes of"),
    "not a number": (text("unet/config.json", '{"sample_size": NaN}'), "the number nan"),
    "size that is a text": (unet_config(sample_size="8"), "sample_size are .3, '8'."),
    "layers without end": (unet_config(layers_per_block=1_000_000), "no valid configuration"),
    "unknown block": (unet_config(down_block_types=["os.system", "Block"]), "no valid configuration"),
    "other sizes": (unet_config(block_out_channels=[12, 16]), "another architecture.*has shape"),
    "network for inpainting": (unet_config(out_channels=9), "another architecture"),
    "no scheduler": (remove("scheduler/scheduler_config.json"), "has no scheduler/scheduler_config.json"),
    "unknown scheduler": (scheduler_config(_class_name="ADMDDIMScheduler"), "class 'ADMDDIMScheduler'"),
    "scheduler that is a list": (scheduler_config(_class_name=["a.py", "A"]), "a scheduler of class"),
    "deterministic scheduler": (scheduler_config(_class_name="EulerDiscreteScheduler"), "solves an ODE"),
    "schedule without end": (scheduler_config(num_train_timesteps=1_000_000), "num_train_timesteps is 1000"),
    "schedule without noise": (scheduler_config(beta_start=0, beta_end=0), "noise does not grow"),
    "noise beyond one": (scheduler_config(beta_end=3.0), "no scheduler for sampler .ddpm."),
    "unknown variance": (scheduler_config(variance_type="learned"), "variance_type 'learned'"),
    "unknown prediction": (scheduler_config(prediction_type="flow"), "prediction_type 'flow'"),
    "unknown betas": (scheduler_config(beta_schedule="os.system"), "no scheduler for sampler 'ddpm'"),
    "no settings": (remove("unet/config.json"), "no model of diffusers"),
    "no weights": (remove(f"unet/{WEIGHTS}"), "download it anew"),
    "cut weights": (text(f"unet/{WEIGHTS}", b"\x80\x00\x00\x00\x00\x00\x00\x00{"), "is no weights file"),
    "tensor missing": (tensors_file(**{"conv_in.bias": None}), "missing conv_in.bias"),
    "tensor too many": (tensors_file(extra=torch.zeros(1)), "unknown extra"),
    "tensor of another shape": (tensors_file(**{"conv_in.bias": torch.zeros(3)}), "conv_in.bias has shape"),
    "weights that are not finite": (
        tensors_file(**{"conv_in.bias": torch.full((8,), float("inf"))}),
        "is damaged: conv_in.bias",
    ),
    "pickle that runs code": (pickled(Canary()), "is no weights file"),
    "pickle that runs code beside tensors": (pickled({"a": torch.zeros(2), "b": Canary()}), "state dict"),
    "pickle of a training": (pickled({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}), "state dict"),
    "dill's pickle": (
        lambda folder: pickled(None)(folder) or text("unet/diffusion_pytorch_model.bin", DILL)(folder),
        "is no weights file",
    ),
    "shard in another folder": (sharded("../elsewhere.safetensors"), r"'../elsewhere.safetensors'"),
    "shard by an absolute path": (sharded("/etc/passwd"), "names the file '/etc/passwd'"),
    "shard that is missing": (sharded("part.safetensors", "other.safetensors"), "missing|does not hold"),
    "shard that is a pickle": (sharded("part.bin"), "names the file 'part.bin'"),
    "shards of nothing": (
        lambda folder: sharded("part.safetensors")(folder) or edit(
            folder / "unet" / f"{WEIGHTS}.index.json", weight_map={}
        ),
        "names 0 files",
    ),
}  # fmt: skip

# A function, as dill stores one: code, globals, a name.
DILL = (
    b"\x80\x04\x95D\x00\x00\x00\x00\x00\x00\x00\x8c\ndill._dill\x94\x8c\x10_create_function\x94\x93\x94"
    b"(\x8c\ndill._dill\x94\x8c\x0c_create_code\x94\x93\x94)R\x94}\x94\x8c\x01f\x94NNt\x94R\x94."
)


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_and_broken_folders(
    change: Callable[[Path], None],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    code = "open('canary', 'w')"
    for name in ("pipeline.py", "my_unet.py", "unet/my_unet.py", "unet/modeling.py", "a.py"):
        (model / name).write_text(code)
    change(model)
    with pytest.raises(WeightsError, match=message) as error:
        load(model)
    assert str(model) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "canary").exists()


def test_the_folder_is_good(folder: Path, tmp_path: Path) -> None:
    """Without which the tests above would prove nothing; parts that are not used may be of any class."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], vae=[None, None])(tmp_path)
    assert load(tmp_path).image_shape == (3, 8, 8)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "sampler": ({"sampler": "euler"}, "Unknown sampler 'euler': there are ddpm"),
    "sampler of another family": ({"sampler": "cm"}, "'cm' goes with CMStochasticIterativeScheduler alone"),
    "no steps": ({"steps": 0}, "Invalid steps=0"),
    "too many steps": ({"steps": 1001}, "Invalid steps=1001: this schedule has 1000 times"),
    "times that rise": ({"timesteps": [0, 22]}, "every step's time is below the one before"),
    "times out of range": ({"timesteps": [1000]}, r"this schedule has times in \[0, 1000\)"),
    "times of another type": ({"timesteps": "22,0"}, "give a list of integers, descending"),
    "no noise": ({"sampler": "ddim", "eta": 0}, "Invalid eta=0: it is above 0"),
    "eta of another sampler": ({"eta": 0.5}, "Invalid eta=0.5 for sampler 'ddpm': only ddim, tcd take one"),
    "guidance without classes": ({"guidance": 3}, "has no label that stands for none"),
    "negative guidance": ({"guidance": -1}, "Invalid guidance=-1"),
    "prompts without a text encoder": ({"prompts": ["a cat"]}, "a UNet2DModel: it takes none"),
    "variant": ({"variant": "../fp16"}, "Invalid variant='../fp16'"),
    "option": ({"scheduler": "ddpm"}, "Invalid option 'scheduler'"),
    "inverter": ({"inverter": "file"}, "has an encoder; leave it out"),
    "more steps than lcm was made of": ({"sampler": "lcm", "steps": 80}, "no scheduler for sampler 'lcm'"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_generator("diffusion", weights=folder, **options)


def test_a_consistency_model_begins_from_its_largest_noise(tmp_path: Path) -> None:
    save(tmp_path, diffusers.CMStochasticIterativeScheduler(), unet=unet())
    with pytest.raises(
        ValueError, match=r"Invalid timesteps=\(22, 5\): those of a consistency model end in 0"
    ):
        load(tmp_path, timesteps=[22, 5])


def test_what_is_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"No folder .*model"):
        load(tmp_path / "model")
    with pytest.raises(WeightsError, match="is a file: diffusers stores a model as a folder"):
        load(folder / "unet" / "config.json")
    with pytest.raises(WeightsError, match=r"has no scheduler/scheduler_config.json; download the whole"):
        load(tmp_path)
    with pytest.raises(ValueError, match="Invalid weights of type UNet2DModel"):
        load_generator("diffusion", weights=unet())
    with pytest.raises(ValueError, match="has no bundled weights: pass weights=FILE"):
        load_generator("diffusion")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mlviews\[diffusion\]"'):
        load(folder)


# -- the hub -------------------------------------------------------------------------------------------------


def test_a_repository_is_downloaded_as_far_as_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    files = ["model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"]
    others = [
        "pipeline.py",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]

    def list_repo_files(name: str, revision: str | None) -> list[str]:
        return [*files, *others]

    def snapshot_download(name: str, revision: str | None, **options: Any) -> str:
        asked.append((name, revision, options))
        return str(folder)

    hub = SimpleNamespace(list_repo_files=list_repo_files, snapshot_download=snapshot_download)
    monkeypatch.setattr(download, "_hub", lambda reference: hub)
    index()(folder)
    assert load_generator("diffusion", weights="someone/model@v1", steps=2).level_names == ("t500", "t0")
    assert asked == [("someone/model", "v1", {"allow_patterns": sorted(files)})]

    def offline(name: str, revision: str | None) -> list[str]:
        raise OSError("no network")

    hub.list_repo_files = offline
    assert len(load_generator("diffusion", weights="hf://someone/model").levels) == 4
    assert asked[-1] == ("someone/model", None, {"local_files_only": True})
    hub.snapshot_download = offline
    with pytest.raises(FileNotFoundError, match="someone/model cannot be downloaded"):
        load_generator("diffusion", weights="someone/model")
    with pytest.raises(ValueError, match="takes a folder, or a Hugging Face id"):
        load_generator("diffusion", weights="https://example.org/model.safetensors")


def test_which_files_of_a_repository_are_read() -> None:
    names = [
        "model_index.json", "v1-5-pruned.safetensors", "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "safety_checker/model.safetensors",
        "unet/config.json", f"unet/{WEIGHTS}.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", f"unet/{WEIGHTS}.index.json",
        "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin",
    ]  # fmt: skip
    plain = needed_files(names, None, False)
    assert plain == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", f"unet/{WEIGHTS}.index.json",
        "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    half = needed_files(names, "fp16", True)
    assert sorted(set(half) - set(plain)) == [
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
        "tokenizer/vocab.json", "unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        f"unet/{WEIGHTS}.index.fp16.json",
        "vae/diffusion_pytorch_model.fp16.bin",
    ]  # fmt: skip


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save(folder, diffusers.EulerAncestralDiscreteScheduler(), unet=text_unet(), vae=vae())
    save_file(encoded_prompts(pooled=False), folder / "prompts.safetensors")
    return folder


def test_prompts_are_classes(text_folder: Path) -> None:
    g = load(text_folder, prompts=text_folder / "prompts.safetensors", guidance=2.0)
    assert g.num_classes == 3
    assert g.options == {"prompts": str(text_folder / "prompts.safetensors"), "guidance": 2.0}
    z = [value.expand(3, *value.shape[1:]) for value in g.sample_latents(range(1))]
    images = g(z, torch.arange(3))
    assert (images[0] - images[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="it needs texts, or a file of them"):
        load(text_folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is no file of encoded prompts"),
        ({"prompt_embeds": (3, 5, 8), "other": (1,)}, "is no file of encoded prompts"),
        ({"prompt_embeds": (3, 8), "negative_prompt_embeds": (1, 8)}, r"shape \(3, 8\)"),
        ({"prompt_embeds": (3, 5, 8), "negative_prompt_embeds": (1, 4, 8)}, r"for no prompt \(1, 4, 8\)"),
        (
            {"prompt_embeds": (3, 5, 8), "negative_prompt_embeds": (0, 5, 8)},
            r"for no prompt \(0, 5, 8\)",
        ),
        ({"prompt_embeds": (3, 5, 8)}, "no negative_prompt_embeds, which guidance needs"),
        (
            {"prompt_embeds": (3, 5, 6), "negative_prompt_embeds": (1, 5, 6)},
            "8 numbers a token.*these have 6",
        ),
        (
            {"prompt_embeds": (3, 5, 8), "negative_prompt_embeds": (1, 5, 8), "pooled_prompt_embeds": (2, 6)},
            "as many pooled prompts",
        ),
    ],
)
def test_files_of_encoded_prompts(
    tensors: dict[str, tuple[int, ...]], message: str, text_folder: Path, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "p.safetensors")
    with pytest.raises(WeightsError, match=message):
        load(text_folder, prompts=tmp_path / "p.safetensors", guidance=2.0)


def test_texts_are_encoded_once_by_the_folders_own_encoder(text_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdt",
        *(f"{letter}</w>" for letter in "abcdt"),
        "ca",
        "cat</w>",
    ]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 6, "pad_token": "<|endoftext|>"})
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "prompts.txt").write_text("a cat\n\nb\n")
    g = load(tmp_path, prompts=["a cat", "b"], guidance=2.0)
    same = load(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    assert g.num_classes == same.num_classes == 2
    assert not any("encoder" in name for name in same.state_dict() if "autoencoder" not in name)
    ids = torch.tensor([[0, 7, 13, 1, 1, 1], [0, 8, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
    torch.testing.assert_close(g.denoiser.tokens, expected, atol=1e-5, rtol=0)
    for prompts in ([], [1], ["a"] * 100_001, "missing.txt", str(tmp_path / "unet" / WEIGHTS)):
        with pytest.raises((ValueError, FileNotFoundError), match="rompts"):
            load(tmp_path, prompts=prompts)
    edit(tmp_path / "text_encoder" / "config.json", hidden_size="x")
    with pytest.raises(WeightsError, match="text_encoder has no valid configuration"):
        load(tmp_path, prompts=["a cat"])


@pytest.mark.parametrize(
    "settings",
    [{"scaling_factor": 0}, {"scaling_factor": "x"}, {"latents_std": [1.0]}, {"latents_mean": ["a"] * 4}],
    ids=str,
)
def test_settings_of_an_autoencoder_that_make_no_images(
    settings: dict[str, Any], text_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "vae" / "config.json", **settings)
    with pytest.raises(WeightsError, match=f"no valid configuration.*{next(iter(settings))}"):
        load(tmp_path, prompts=tmp_path / "prompts.safetensors")


@pytest.mark.parametrize("kind", ["classes", "latent"])
def test_purification_is_noising_to_a_level(kind: str, request: pytest.FixtureRequest) -> None:
    g: DiffusionGenerator = request.getfixturevalue(kind)
    images, labels = pictures(g), g.sample_labels(range(3))
    purifier = Purifier(g, keep=2, samples=2, seed=1)
    with contextmanager(passes)(g) as rows:
        copies = purifier.copies(images, labels)
        pure = len(rows)
        rows.clear()
        g.encode(images, labels)
    assert pure < len(rows) + len(g.levels) - 2, "the passes before the levels that are drawn are left out"
    for purified, view in zip(copies, (1, 2), strict=True):
        noise, *drawn = g.sample_noise(range(3), Normal(), 1, view=view, levels=range(1, len(g.levels)))
        state = g.noised_state(images, 2, labels, noise)
        expected = g.decode([noise, noise, *drawn], labels, state=state, start=2)
        torch.testing.assert_close(purified, expected, atol=1e-4, rtol=0)
    free = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(purifier(free, labels).sum(), free)
    assert gradient.abs().sum() > 0
    mixed = Purifier(g, keep=1, mix=0.5, samples=1)(images, labels)
    assert mixed.shape == images.shape


@pytest.mark.parametrize("keep", [1, 4])
def test_the_noise_of_a_purified_image_does_not_depend_on_the_image(keep: int) -> None:
    g = load_generator("fashion-diffusion")
    images = pictures(g)[:1]
    keep = min(keep, len(g.levels))
    purifier = Purifier(g, keep=keep, samples=2)
    first, second = purifier.copies(images)
    assert (first - second).abs().max() > 0.01  # every copy is noised anew,
    assert (purifier(images, epoch=1) - first).abs().max() > 0.01  # and so is every epoch:
    # an attacker who knows the seed attacks the function that judges.
    near = (images + 2 / 255).clamp(0, 1)
    assert (purifier(near) - first).abs().mean() < 0.5 * (first - second).abs().mean()
