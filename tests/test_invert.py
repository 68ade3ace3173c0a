"""Images to latents: ``encode``, the inverter and its training."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy
from torch import Tensor, nn

import mlviews
from mlviews import WeightsError, load_generator, train_inverter
from mlviews.evaluation.data import bundled_slice
from mlviews.generators.inverter import Inverter, InverterConfig
from mlviews.identity import generator_identity
from mlviews.invert import InverterOptions
from mlviews.runs.files import fingerprint
from mlviews.weights.files import read_safetensors, write_safetensors
from mlviews.zoo import FOLDER

TRAINING: dict[str, Any] = {
    "batch": 8,
    "steps": 24,
    "pair_steps": 8,
    "pairs": 2,
    "evaluate_every": 4,
    "evaluation": 32,
    "width": 8,
    "hidden": 16,
    "seed": 1,
    "progress": False,
}


def real() -> Tensor:
    """Images of another seed, in the place of real ones."""
    g = Toy()
    return (g(g.sample_latents(range(60), seed=7)) * 255).round().byte()


def curve(inverter: Inverter) -> list[tuple[float, ...]]:
    """The evaluations of its run, without the seconds."""
    return [evaluation[:-1] for evaluation in inverter.run.history]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Are all weights the same to the bit?"""
    return all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inverter, Path]:
    out = tmp_path_factory.mktemp("whole")
    return train_inverter(Toy(), real(), out, **TRAINING), out


# -- encode ----------------------------------------------------------------------------------------------


def test_a_generator_without_an_encoder_says_what_to_do() -> None:
    g = Toy()
    with pytest.raises(ValueError, match=r"no encoder: train one with mlviews.train_inverter.*inverter=FILE"):
        g.encode(torch.rand(2, 1, 4, 4))


def test_encode_goes_through_the_inverter() -> None:
    g = Toy()
    g.inverter = Inverter.of(g, width=8, hidden=16)
    images = torch.rand(3, 1, 4, 4)
    latents = g.encode(images)
    assert [z.shape for z in latents] == [(3, 4), (3, 6), (3, 5)]
    assert all(z.dtype == torch.float32 and not z.requires_grad for z in latents)
    assert g(latents).shape == images.shape
    assert [len(z) for z in g.encode(images[:0])] == [0, 0, 0]
    images.requires_grad_(True)
    g.decode(g.infer(images)).sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 4, 5), r"Invalid images, torch.float32 \(2, 1, 4, 5\): expected floats"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "Invalid images, torch.uint8"),
        (torch.zeros(1, 4, 4), "Invalid images"),
        (torch.zeros(2, 1, 4, 4, device="meta"), "Invalid images on meta: the generator is on cpu"),
        ([[0.0]], "Invalid images, list"),
    ],
)
def test_images_that_do_not_fit(images: Any, message: str) -> None:
    g = Toy()
    g.inverter = Inverter.of(g, width=8, hidden=16)
    with pytest.raises(ValueError, match=message):
        g.encode(images)


def test_the_inverter_is_no_part_of_the_generators_identity() -> None:
    g = Toy()
    identity, names = generator_identity(g), set(g.state_dict())
    g.inverter = Inverter.of(g, width=8, hidden=16)
    assert generator_identity(g) == identity
    assert set(g.state_dict()) == names
    assert copy.deepcopy(g).inverter is not g.inverter
    g.to("meta")
    assert next(g.inverter.parameters()).device.type == "meta"
    with pytest.raises(ValueError, match="Invalid inverter of type int"):
        g.inverter = 3


def test_a_tied_generator_gets_one_draw_at_every_level() -> None:
    g = Toy(dims=(4, 4), tied=True)
    g.inverter = train_inverter(g, **{**TRAINING, "steps": 4})
    first, second = g.encode(torch.rand(3, 1, 4, 4))
    assert first is second
    refined = g.inverter.refine(g, torch.rand(3, 1, 4, 4), steps=2)
    assert refined[0] is refined[1]


def test_the_posterior_of_an_nvae_is_differentiable() -> None:
    g = load_generator("fashion-nvae")
    images = torch.rand(2, *g.image_shape, requires_grad=True)
    latents = g.infer(images)
    for ours, encoded in zip(latents, g.encode(images), strict=True):
        assert ours.equal(encoded)
        assert not encoded.requires_grad
    (gradient,) = torch.autograd.grad(torch.stack([z.square().mean() for z in latents]).sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 64, 64), (3, 48, 96), (3, 256, 256)], ids=lambda s: f"{s[1]}x{s[2]}"
)
def test_images_of_all_sizes(shape: tuple[int, int, int]) -> None:
    inverter = Inverter(InverterConfig(shape, (("a", (5,)), ("b", (2, 4, 4))), width=16, hidden=16))
    first, second = inverter(torch.rand(2, *shape))
    assert (first.shape, second.shape) == ((2, 5), (2, 2, 4, 4))


# -- training --------------------------------------------------------------------------------------------


def test_an_inverter_comes_with_its_run_and_files(whole: tuple[Inverter, Path]) -> None:
    inverter, out = whole
    run = inverter.run
    assert not inverter.training
    assert not any(weight.requires_grad for weight in inverter.parameters())
    assert [evaluation.step for evaluation in run.history] == [4, 8, 12, 16, 20, 24]
    assert run.best.real_error == min(evaluation.real_error for evaluation in run.history)
    assert run.best.real_error < run.history[0].real_error
    assert sum(run.weights.values()) == pytest.approx(1)
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "inverter.safetensors", "history.csv"}
    assert len((out / "history.csv").read_text().splitlines()) == 7
    again = Inverter.load(out / "inverter.safetensors")
    assert same(again, inverter)
    assert again.config == inverter.config
    assert again.provenance["best"]["real_error"] == run.best.real_error
    assert again.provenance["generator"]["name"] == "Toy"
    assert not any(weight.requires_grad for weight in again.parameters())


def test_half_a_file_is_half_as_long(whole: tuple[Inverter, Path], tmp_path: Path) -> None:
    inverter, _ = whole
    inverter.save(tmp_path / "half.safetensors", half=True)
    images = real()[:4].float() / 255
    for ours, theirs in zip(
        inverter(images), Inverter.load(tmp_path / "half.safetensors")(images), strict=True
    ):
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


def test_refining_never_makes_an_image_worse(whole: tuple[Inverter, Path]) -> None:
    g, inverter = Toy(), whole[0]
    images = real()[:6].float() / 255

    def errors(latents: list[Tensor]) -> Tensor:
        return (g(latents) - images).square().flatten(1).mean(1)

    start, refined = inverter(images), inverter.refine(g, images, steps=20)
    assert (errors(refined) <= errors(start)).all()
    assert errors(refined).mean() < 0.7 * errors(start).mean()
    alone = inverter.refine(g, images[2:3], steps=20)
    torch.testing.assert_close(alone[1], refined[1][2:3], atol=1e-4, rtol=1e-3)
    assert all(z.equal(w) for z, w in zip(inverter.refine(g, images, steps=0), start, strict=True))
    with pytest.raises(ValueError, match="Invalid steps=-1"):
        inverter.refine(g, images, steps=-1)


def test_refining_does_not_wait_for_the_device(whole: tuple[Inverter, Path]) -> None:
    """On the meta device, whatever asks a tensor for its value raises."""
    g, inverter = Toy().to("meta"), whole[0]
    images = torch.empty(3, *g.image_shape, device="meta")
    refined = inverter.refine(g, images, g.sample_latents(range(3)), steps=2)
    assert refined[-1].device.type == "meta"


def test_training_leaves_the_generator_and_the_global_random_state_alone() -> None:
    g = Toy()
    weights, state = {name: value.clone() for name, value in g.state_dict().items()}, torch.get_rng_state()
    train_inverter(g, **{**TRAINING, "steps": 2})
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(weights[name]) for name, value in g.state_dict().items())
    assert all(p.grad is None for p in g.parameters())


SCRIPT = """
import sys
import time
sys.path.insert(0, {tests!r})
import torch
from test_invert import TRAINING, Toy, real, train_inverter
step = torch.optim.AdamW.step

def slow_step(*arguments, **options):
    time.sleep({pause})
    return step(*arguments, **options)

torch.optim.AdamW.step = slow_step
train_inverter(Toy(), real(), {out!r}, devices={devices}, **TRAINING)
"""


def script(folder: Path, devices: int, pause: float) -> list[str]:
    """The command that runs the training in processes of its own."""
    text = SCRIPT.format(
        tests=str(Path(__file__).parent), out=str(folder / "out"), devices=devices, pause=pause
    )
    (folder / "script.py").write_text(text)
    return [sys.executable, str(folder / "script.py")]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    whole: tuple[Inverter, Path], tmp_path: Path
) -> None:
    """kill -9 in mid-training, then the same call."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(script(tmp_path, devices=1, pause=0.1), env={**os.environ, **threads})
    checkpoint, deadline = tmp_path / "out" / "checkpoint.pt", time.monotonic() + 120
    steps = 0
    while steps < 12 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        steps = torch.load(checkpoint)["state"]["log"]["step"] if checkpoint.exists() else 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = torch.load(checkpoint)["state"]["log"]["step"]
    assert 12 <= steps < 24, "killed too late to show anything"
    inverter = train_inverter(Toy(), real(), tmp_path / "out", **TRAINING)
    assert curve(inverter) == curve(whole[0])
    assert same(inverter, whole[0])


def test_two_processes_train_what_one_does(whole: tuple[Inverter, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        script(tmp_path, devices=2, pause=0), timeout=240, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inverter = Inverter.load(tmp_path / "out" / "inverter.safetensors")
    assert inverter.provenance["processes"] == 2
    log = torch.load(tmp_path / "out" / "checkpoint.pt")["state"]["log"]
    for row, expected in zip(log["history"], curve(whole[0]), strict=True):
        assert row[:-1] == pytest.approx(expected, rel=2e-3)


def test_a_finished_run_is_not_run_again(
    whole: tuple[Inverter, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it trained"))
    again = train_inverter(Toy(), real(), whole[1], **TRAINING)
    assert curve(again) == curve(whole[0])
    assert same(again, whole[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: train_inverter(Toy(), real(), **TRAINING | {"lr": 1e-3}), "a run with lr=0.002, not 0.001"),
        (lambda: train_inverter(Toy(), real()[1:], **TRAINING), "a run with images="),
        (lambda: train_inverter(Toy(), None, **TRAINING), "a run with images="),
        (lambda: train_inverter(Toy(dims=(4, 6, 7)), real(), **TRAINING), r"a run with generator\."),
    ],
    ids=["option", "images", "no images", "generator"],
)
def test_other_settings_do_not_go_on_from_it(
    change: Callable[[], Inverter], message: str, whole: tuple[Inverter, Path]
) -> None:
    TRAINING["out"] = whole[1]
    try:
        with pytest.raises(ValueError, match=message):
            change()
    finally:
        del TRAINING["out"]


class Album:
    """Images that come by number, as those of a folder do."""

    def __len__(self) -> int:
        return len(real())

    def batch(self, numbers: list[int], device: torch.device) -> Tensor:
        return real()[numbers].to(device)

    def identity(self) -> str:
        return "holiday"


def test_images_by_number(whole: tuple[Inverter, Path]) -> None:
    inverter = train_inverter(Toy(), Album(), **TRAINING)
    assert inverter.provenance["images"] == "holiday"
    assert same(inverter, whole[0])


def test_a_run_stops_once_it_gets_no_better() -> None:
    inverter = train_inverter(
        Toy(), real(), **{**TRAINING, "steps": 60, "lr": 1e-9, "patience": 2, "tolerance": 0.1}
    )
    assert inverter.run.status == "stalled"
    # It cannot stall before real images have joined at step 8.
    assert [evaluation.step for evaluation in inverter.run.history] == [4, 8, 12]


def test_a_run_starts_from_another_ones_inverter(whole: tuple[Inverter, Path]) -> None:
    options = {**TRAINING, "steps": 4, "pair_steps": 0, "pairs": 0, "lr": 1e-6, "evaluate_every": 2}
    further = train_inverter(Toy(), real(), start=whole[0], **options)
    assert further.run.history[0].real_error == pytest.approx(whole[0].run.best.real_error, rel=0.01)
    assert further.provenance["start"] == fingerprint(whole[0])


def test_every_option_is_documented() -> None:
    """The docstring names each field with its default."""
    for field in dataclasses.fields(InverterOptions):
        match = re.search(rf"- {field.name} \(([^)]+)\): ", train_inverter.__doc__ or "")
        assert match is not None, field.name
        text = match[1].replace(",", "")
        assert text == str(field.default) or float(text) == field.default


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_inverter("fashion"), "Invalid generator of type str"),
        (lambda: train_inverter(Toy(), patiense=3), "Invalid option 'patiense'.*Did you mean 'patience'"),
        (lambda: train_inverter(Toy(), steps=0), "Invalid steps=0"),
        (lambda: train_inverter(Toy(), lr=0), "Invalid lr=0"),
        (
            lambda: train_inverter(Toy(), average=1),
            "Invalid average=1.0: it must be a number from 0 to below 1",
        ),
        (lambda: train_inverter(Toy(), feature=-1), "Invalid feature=-1: it must be a number of at least 0"),
        (
            lambda: train_inverter(Toy(), batch=8, pairs=8),
            "Invalid pairs=8: it must be an integer from 0 to 7",
        ),
        (lambda: train_inverter(Toy(), resume="no"), "Invalid resume='no'"),
        (lambda: train_inverter(Toy(), dtype="int8"), "Invalid dtype='int8'"),
        (lambda: train_inverter(Toy(), anchor=1.0), "Invalid anchor=1.0"),
        (lambda: train_inverter(Toy(), 3), "Invalid images, int: expected a tensor of uint8"),
        (lambda: train_inverter(Toy(), torch.rand(20, 3, 4, 4)), r"expected a tensor .* \(N, 1, 4, 4\)"),
        (lambda: train_inverter(Toy(), torch.zeros(20, 1, 4, 4, dtype=torch.int64)), "torch.int64"),
        (lambda: train_inverter(Toy(), real()[:9]), "there are 9, and at least 10 are needed"),
        (lambda: train_inverter(Toy(), real().float()), "floats must be in .0, 1.; divide by 255"),
        (lambda: train_inverter(Toy(), torch.full((20, 1, 4, 4), torch.nan)), "Invalid images from nan"),
        (lambda: train_inverter(Toy(num_classes=3), real()), "needs the class of every image"),
        (lambda: train_inverter(Toy(), start="w.safetensors"), "Invalid start of type str"),
        (
            lambda: train_inverter(Toy(), start=Inverter.of(Toy(dims=(4, 6)))),
            r"is for levels l0 \(4,\), l1 \(6,\), and generator 'Toy' has",
        ),
    ],
)
def test_bad_input_of_a_training(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- files -----------------------------------------------------------------------------------------------


def test_hostile_files(whole: tuple[Inverter, Path], tmp_path: Path) -> None:
    tensors, metadata = read_safetensors(whole[1] / "inverter.safetensors", Inverter.FORMAT)
    config = json.loads(metadata["config"])

    def written(tensors: dict[str, Tensor], **changes: str) -> Path:
        write_safetensors(tmp_path / "bad.safetensors", tensors, {**metadata, **changes})
        return tmp_path / "bad.safetensors"

    nan = {**tensors, "dense.bias": torch.full_like(tensors["dense.bias"], torch.nan)}
    wider = json.dumps({**config, "levels": [["l0", [4]], ["l1", [6]], ["l2", [9]]]})
    fewer = json.dumps({**config, "levels": [["l0", [4]]]})
    endless = json.dumps({**config, "width": 2**40})
    for path, message in [
        (lambda: written(tensors, format="mlviews.walker"), "holds 'mlviews.walker', not 'mlviews.inverter'"),
        (lambda: written(nan), "NaN"),
        (lambda: written(tensors, config=wider), "another architecture"),
        (lambda: written(tensors, config=fewer), "another architecture"),
        (lambda: written(tensors, config=endless), "another architecture|no valid configuration"),
        (lambda: written(tensors, config="{}"), "no valid configuration"),
        (lambda: written(tensors, config=json.dumps({**config, "levels": 3})), "no valid configuration"),
        (lambda: written(tensors, provenance="{"), "no valid configuration"),
        (lambda: written({}), "missing"),
    ]:
        with pytest.raises(WeightsError, match=message):
            Inverter.load(path())
    (tmp_path / "cut.safetensors").write_bytes((whole[1] / "inverter.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        Inverter.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="No weights file"):
        Inverter.load(tmp_path / "none.safetensors")


def test_load_generator_takes_an_inverter(
    fashion: mlviews.MLVGM, whole: tuple[Inverter, Path], tmp_path: Path
) -> None:
    fitting = Inverter.of(fashion, width=8, hidden=16)
    fitting.save(tmp_path / "inverter.safetensors")
    g = load_generator("fashion", inverter=tmp_path / "inverter.safetensors")
    assert g.inverter is not None
    assert same(g.inverter, fitting)
    assert load_generator("fashion", inverter=fitting).inverter is fitting
    assert g.options == {}
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 4, 4\), and generator 'fashion'"):
        load_generator("fashion", inverter=whole[1] / "inverter.safetensors")
    with pytest.raises(ValueError, match="generator 'fashion-nvae' has an encoder; leave it out"):
        load_generator("fashion-nvae", inverter=tmp_path / "inverter.safetensors")
    with pytest.raises(FileNotFoundError):
        load_generator("fashion", inverter=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="Invalid inverter of type int"):
        load_generator("fashion", inverter=3)  # type: ignore[arg-type]


@pytest.mark.skipif(not (FOLDER / "fashion-inverter.safetensors").exists(), reason="it is not bundled")
def test_the_bundled_inverter_reconstructs_real_images() -> None:
    g = load_generator("fashion")
    assert isinstance(g.inverter, Inverter)
    assert (FOLDER / "fashion-inverter.safetensors").stat().st_size <= 4e6
    # It belongs to these weights: whoever replaces one has to replace the other.
    assert g.inverter.provenance["generator"]["weights"] == fingerprint(g)
    (_, _), (images, _) = bundled_slice()
    images = nn.functional.pad(images[:100].float() / 255, (2, 2, 2, 2))
    error = (g(g.encode(images)) - images).square().mean()
    chance = (g(g.encode(images)).roll(1, 0) - images).square().mean()
    assert error < 0.012
    assert error < chance / 8
