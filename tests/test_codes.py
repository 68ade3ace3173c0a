"""Latents of the user's own images, kept in a folder: the same samples, never those of another encoder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy, assert_same, by_index
from safetensors.torch import load_file, save_file
from test_images import COUNT, folder, pixels, source
from torch import Tensor

import mlviews.codes
import mlviews.images
from mlviews.generators.inverter import Inverter

STEPS = 3  # of refinement


class Inverted(Toy):
    """A generator that counts the images that it encodes."""

    count = 0  # of them

    def encode(self, images: Tensor) -> list[Tensor]:
        self.count += len(images)
        return super().encode(images)


def inverted(seed: int = 0, dims: tuple[int, ...] = (4, 6, 5), **options: Any) -> Inverted:
    """A generator with an inverter."""
    generator = Inverted(dims, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inverter = Inverter.of(generator, width=8, hidden=8)
    generator.inverter = inverter.eval().requires_grad_(False)
    return generator


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlviews.codes, "SHARD", 8)


@pytest.fixture(params=["resident", "mapped"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets and latents that are kept on the device, or read for every batch."""
    if request.param == "mapped":
        monkeypatch.setattr(mlviews.images, "RESIDENT", 0)
    return str(request.param)


SETTINGS: dict[str, dict[str, Any]] = {
    "network": {},
    "refined": {"refine": STEPS},
    "reconstructed": {"refine": STEPS, "anchor_view": "reconstructed"},
    "mixed": {"generated": 0.5, "num_views": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_are_those_without_codes(name: str, size: str, tmp_path: Path) -> None:
    options = {"drop_last": False, "workers": 0, **SETTINGS[name]}
    expected = by_index(source(generator=inverted(), **options))
    codes = tmp_path / "codes"
    assert_same(by_index(source(generator=inverted(), codes=codes, **options)), expected, tolerance=1e-4)
    assert sorted(path.name for path in codes.glob("[!.]*")) == [
        "0000000000.safetensors",
        "0000000008.safetensors",
        "0000000016.safetensors",
        "codes.json",
    ]
    # Another run encodes nothing, in batches of another size and on other ranks too.
    generator = inverted()
    parts = [
        source(generator=generator, codes=codes, **options, rank=rank, world_size=2, batch_size=2)
        for rank in range(2)
    ]
    together = by_index(batch for part in parts for batch in part)
    assert_same(together, {index: expected[index] for index in together}, tolerance=1e-4)
    assert generator.count == 0


def test_refined_latents_reconstruct_better() -> None:
    options = {"anchor_view": "reconstructed", "perturb": None, "num_views": 1, "batch_size": COUNT}
    errors = []
    for refine in (0, 20):
        batch = source(generator=inverted(), refine=refine, **options).batch(0, COUNT)
        images = pixels()[batch.indices].float() / 255
        errors.append(float((batch.views[0] - images).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_images_that_no_view_shows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlviews.images, "RESIDENT", 0)
    images = folder(tmp_path / "images")
    options = {"images": images, "anchor_view": "reconstructed", "codes": tmp_path / "codes", "workers": 0}
    expected = by_index(source(generator=inverted(), **options))
    monkeypatch.setattr(mlviews.images.Folder, "read", None)
    assert_same(by_index(source(generator=inverted(), **options)), expected)


@pytest.mark.parametrize("kind", [{"num_classes": 3}, {"dims": (5, 5, 5), "tied": True}], ids=str)
def test_generators_with_classes_and_with_one_draw_for_all_levels(
    kind: dict[str, Any], tmp_path: Path, size: str
) -> None:
    options = {"images": folder(tmp_path / "images"), "refine": STEPS, "drop_last": False, "workers": 0}
    expected = by_index(source(generator=inverted(**kind), **options))
    views = source(generator=inverted(**kind), codes=tmp_path / "codes", **options)
    assert_same(by_index(views), expected, tolerance=1e-4)
    stored = load_file(tmp_path / "codes" / "0000000000.safetensors")
    assert len(stored) == (1 if views.generator.tied else 3)


# -- a folder belongs to its images and its encoder ----------------------------------------------------------


def change_a_file(path: Path) -> None:
    """Change an image in place: its file is as long as before."""
    content = bytearray(path.read_bytes())
    assert len(content) == path.stat().st_size
    other = next(file for file in path.parent.glob("*.pgm") if file.read_bytes() != content)
    path.write_bytes(other.read_bytes())


def portable(path: Path) -> Path:
    """A folder of images in files of one length."""
    path.mkdir()
    for index, image in enumerate(pixels(COUNT)):
        (path / f"{index:03d}.pgm").write_bytes(b"P5 4 4 255\n" + image.numpy().tobytes())
    return path


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another encoder": ({"generator": 1}, "inverter='.*', not '"),
    "more steps": ({"refine": STEPS + 1}, f"refine={STEPS}, not {STEPS + 1}"),
    "no steps": ({"refine": 0}, f"refine={STEPS}, not 0"),
    "another generator": ({"truncation": 1.0}, "generator.truncation=2.0, not 1.0"),
    "fewer images": ({"remove": "020.pgm"}, "images="),
    "an image that was changed": ({"change": "003.pgm"}, "images="),
}


@pytest.mark.parametrize("name", CHANGES)
def test_latents_of_others_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    images, codes = portable(tmp_path / "images"), tmp_path / "codes"
    options = {"images": images, "codes": codes, "refine": STEPS}
    list(source(generator=inverted(), **options))
    before = {path.name: path.read_bytes() for path in codes.glob("[!.]*")}
    if "change" in changes:
        change_a_file(images / changes["change"])
    if "remove" in changes:
        (images / changes["remove"]).unlink()
    truncation = {"truncation": changes["truncation"]} if "truncation" in changes else {}
    generator = inverted(changes.get("generator", 0), **truncation)
    with pytest.raises(ValueError, match=f"codes holds latents of {message}.*give codes= another folder"):
        list(source(generator=generator, **{**options, "refine": changes.get("refine", STEPS)}))
    assert {path.name: path.read_bytes() for path in codes.glob("[!.]*")} == before


def test_files_that_were_only_touched_or_copied_are_the_same_images(tmp_path: Path) -> None:
    images, codes = portable(tmp_path / "images"), tmp_path / "codes"
    list(source(generator=inverted(), images=images, codes=codes))
    for path in images.iterdir():
        os.utime(path, (1, 1))
    images.rename(tmp_path / "elsewhere")
    generator = inverted()
    list(source(generator=generator, images=tmp_path / "elsewhere", codes=codes))
    assert generator.count == 0


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"images": portable(tmp_path / "images"), "codes": tmp_path / "codes"}
    list(source(generator=inverted(), **options))
    monkeypatch.setattr(mlviews.images.Folder, "content", None)
    list(source(generator=inverted(), **options))


SECOND = "0000000008.safetensors"

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "settings": (lambda codes: (codes / "codes.json").write_text("{"), "codes.json is damaged: delete"),
    "settings of another kind": (
        lambda codes: (codes / "codes.json").write_text("[]"),
        "codes.json is damaged",
    ),
    "no settings": (lambda codes: (codes / "codes.json").unlink(), "has files and no latents of images"),
    "a cut file": (
        lambda codes: (codes / SECOND).write_bytes(b"\0" * 20),
        "0000000008.safetensors is damaged .* delete it, and it is made anew",
    ),
    "a file of fewer images": (
        lambda codes: (codes / "0000000016.safetensors").replace(codes / SECOND),
        "holds other latents than codes.json says",
    ),
    "a file of another folder": (
        lambda codes: save_file(load_file(codes / SECOND), codes / "0000000008.safetensors"),
        "holds other latents than codes.json says",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    codes = tmp_path / "codes"
    list(source(generator=inverted(), codes=codes))
    damage(codes)
    with pytest.raises(ValueError, match=message) as raised:
        list(source(generator=inverted(), codes=codes))
    assert "\n" not in str(raised.value)


# -- several processes, and interrupted ones -----------------------------------------------------------------


def test_writers_share_the_work(tmp_path: Path) -> None:
    codes, generators = tmp_path / "codes", [inverted() for _ in range(3)]
    expected = by_index(source(generator=inverted()))
    views: list[dict[int, Tensor]] = []

    def work(generator: Toy) -> None:
        views.append(by_index(source(generator=generator, codes=codes)))

    threads = [threading.Thread(target=work, args=(generator,)) for generator in generators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(views) == 3
    for part in views:
        assert_same(part, expected, tolerance=1e-4)
    assert sum(generator.count for generator in generators) == COUNT


SLOW = """
import sys, time
import mlviews.codes
from test_codes import Inverted, inverted, source

class Slow(Inverted):
    def encode(self, images):
        time.sleep(0.1)
        return super().encode(images)

mlviews.codes.SHARD = 8
generator = inverted()
generator.__class__ = Slow
list(source(generator=generator, codes=sys.argv[1], batch_size=2))
"""


def test_a_killed_run_is_gone_on_from(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(codes)], cwd=Path(__file__).parent)
    first = codes / "0000000000.safetensors"
    while process.poll() is None and not first.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = len(list(codes.glob("[!.]*.safetensors")))
    assert left in (1, 2), "it was killed in the midst"
    generator = inverted()
    expected = by_index(source(generator=inverted()))
    assert_same(by_index(source(generator=generator, codes=codes)), expected, tolerance=1e-4)
    assert generator.count == COUNT - 8 * left
