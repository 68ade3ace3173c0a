from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import Toy, torchrun, toy_source
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

import mlviews
from mlviews import MLViewSource, transforms
from mlviews.cli import app
from mlviews.integrations.files import export, verify
from mlviews.integrations.files.formats import FORMATS as FORMATS_ON_DISK
from mlviews.integrations.files.formats import Samples
from mlviews.perturb import Normal, Perturber

NO_FFCV = "ffcv is compiled when it is installed, and is not an extra of the tests"
FORMATS = ["folder", "webdataset", "ffcv"]
SMALL: dict[str, Any] = {
    "shard_size": 20,
    "progress": False,
}  # of 48 samples in batches of 8: three shards, 8 + 8 + 4 each but the last


def rgb(**options: Any) -> MLViewSource:
    generator = mlviews.wrap_generator(
        lambda z: (z[0] + z[1]).sigmoid().view(-1, 3, 2, 3),
        levels=[("a", (18,)), ("b", (18,))],
        image_shape=(3, 2, 3),
    )
    return toy_source(generator=generator, **options)


def expected(source: MLViewSource) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Per view, all samples' raw images as uint8 [N, C, H, W], and their latents."""
    batch = source.batch(0, source.num_samples)
    assert source.transforms == [None] * source.num_views
    names = [level.name for level in source.generator.levels]
    return [(view * 255).round().byte() for view in batch.views], [
        dict(zip(names, view, strict=True)) for view in batch.latents
    ]


def write(source: MLViewSource, out: Path, format: str = "folder", **options: Any) -> Any:
    if format == "ffcv":
        pytest.importorskip("ffcv", reason=NO_FFCV)
    return export(source, out, format, **{**SMALL, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"/"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("make", [toy_source, rgb])
def test_an_image_folder_has_the_pixels_and_the_latents(make: Any, tmp_path: Path) -> None:
    source = make()
    outcome = write(source, tmp_path / "x")
    images, latents = expected(source)
    assert (outcome.complete, outcome.written, outcome.images) == (True, 48, 2)
    for view in range(2):
        stored = ImageFolder(str(tmp_path / "x" / f"view{view}"), loader=Image.open)
        assert stored.classes == ["unlabelled"]
        assert [int(Path(path).stem) for path, _ in stored.samples] == list(range(48))
        assert {image.mode for image, _ in stored} == {"L" if make is toy_source else "RGB"}
        assert torch.equal(torch.stack([pil_to_tensor(image) for image, _ in stored]), images[view])
    shards = [load_file(path) for path in sorted((tmp_path / "x" / "latents").iterdir())]
    assert [shard["index"].tolist() for shard in shards] == [
        list(range(0, 20)),
        list(range(20, 40)),
        list(range(40, 48)),
    ]
    for view, name in itertools.product(range(2), latents[0]):
        torch.testing.assert_close(
            torch.cat([shard[f"view{view}.{name}"] for shard in shards]), latents[view][name], atol=0, rtol=0
        )
    files = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert (outcome.files, outcome.bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert verify(tmp_path / "x") == len(files) == 2 * 48 + 3 + 3 + 1


def test_a_flat_folder_is_read_as_solo_learns_data_without_labels(tmp_path: Path) -> None:
    source = toy_source()
    write(source, tmp_path)
    root = tmp_path / "view0" / "unlabelled"
    for name in os.listdir(root):  # every entry is an image
        stored = pil_to_tensor(Image.open(root / name).convert("RGB"))
        assert torch.equal(stored, expected(source)[0][0][int(Path(name).stem)].expand(3, -1, -1))
    assert len(os.listdir(root)) == 48


def test_classes_are_folders(tmp_path: Path) -> None:
    source = toy_source(generator=Toy(num_classes=3))
    write(source, tmp_path)
    targets = source.batch(0, 48).targets.tolist()
    stored = ImageFolder(str(tmp_path / "view1"))
    assert stored.classes == ["0000", "0001", "0002"]
    assert {int(Path(path).stem): target for path, target in stored.samples} == dict(enumerate(targets))
    assert load_file(tmp_path / "latents" / "shard-000000.safetensors")["target"].tolist() == targets[:20]


def test_tars_are_read_by_webdataset(tmp_path: Path) -> None:
    source = toy_source()
    source.set_epoch(2)
    write(source, tmp_path, "webdataset")
    images, latents = expected(source)
    read = webdataset.WebDataset(str(tmp_path / "shard-{000000..000002}.tar"), shardshuffle=False).decode(
        "pil"
    )
    seen = 0
    for index, sample in enumerate(read):
        assert sample["__key__"] == f"{index:010d}"
        assert sample["json"] == {"index": index, "epoch": 2, "target": -1}
        for view in range(2):
            gray = pil_to_tensor(sample[f"view{view}.png"])[:1]  # webdataset makes RGB of it
            assert torch.equal(gray, images[view][index])
            for name, z in latents[view].items():
                assert np.array_equal(sample["latents.npz"][f"view{view}.{name}"], z[index].numpy())
        seen += 1
    assert seen == 48


@pytest.mark.parametrize("make", [toy_source, rgb])
def test_a_beton_is_read_by_ffcv(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason=NO_FFCV)
    from ffcv.loader import Loader, OrderOption

    source = make(num_views=3)
    write(source, tmp_path, "ffcv")
    assert sorted(tree(tmp_path)) == ["checksums", "checksums/views.sha256", "manifest.json", "views.beton"]
    images, latents = expected(source)
    rows = torch.stack([torch.cat([z.flatten(1) for z in view.values()], 1) for view in latents], 1)
    seen: list[int] = []
    for *views, index, target, z in Loader(
        str(tmp_path / "views.beton"), batch_size=20, num_workers=1, order=OrderOption.RANDOM, drop_last=False
    ):
        samples = index.flatten()
        assert (target == -1).all()
        assert torch.equal(z, rows[samples])
        for stored, view in zip(views, images, strict=True):
            assert torch.equal(stored.permute(0, 3, 1, 2), view[samples].expand(-1, 3, -1, -1))
        seen += samples.tolist()
    assert sorted(seen) == list(range(48))


class Interrupted(Exception):
    pass


IDENTITY = 2  # batches of two samples that tell the source from others, before the first shard


def interrupt(source: MLViewSource, batches: int) -> MLViewSource:
    """A source whose generator stops after some batches, as if the process had been killed."""
    left, decode_views = iter(range(batches)), source.generator.decode_views

    def decode(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Interrupted
        return decode_views(*arguments)

    source.generator.decode_views = decode  # type: ignore[method-assign]
    return source


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_goes_on_to_the_same_bytes(format: str, tmp_path: Path) -> None:
    write(toy_source(), tmp_path / "whole", format)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        write(interrupt(toy_source(), 5 + IDENTITY), out, format)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"unfinished export: run the same export again"):
        verify(out)
    assert [path.name for path in (out / "checksums").iterdir()] == ["shard-000000.sha256"]
    assert [path.name for path in (out / ".partial").iterdir() if path.is_dir()] == []
    left = out / ".partial" / "shard-000001.4.0123abcd" / "files"  # as a killed process leaves it
    left.mkdir(parents=True)
    (left / "half.png").write_bytes(b"half")
    (out / ".partial" / "manifest.json").write_text("{")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("shard-000000.*")}
    assert write(toy_source(), out, format).written == 28
    assert tree(out) == tree(tmp_path / "whole")
    assert format == "ffcv" or before == {path: path.stat().st_mtime_ns for path in before}
    assert write(toy_source(), out, format).written == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_beton_interrupted_while_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(toy_source(), tmp_path / "whole", "ffcv")
    import ffcv.writer

    def fail(*arguments: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(ffcv.writer, "handle_sample", fail)
        with pytest.raises(Interrupted):
            write(toy_source(), tmp_path / "out", "ffcv")
    assert write(toy_source(), tmp_path / "out", "ffcv").written == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from conftest import toy_source
from mlviews.integrations.files import export
source = toy_source()
whole = source.batch
source.batch = lambda start, stop: (time.sleep(0.1), whole(start, stop))[1]
export(source, sys.argv[2], shard_size=20, progress=False)
"""


def test_kill_9(tmp_path: Path) -> None:
    write(toy_source(), tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out)])
    deadline = time.monotonic() + 60
    while not (out / "checksums" / "shard-000000.sha256").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert write(toy_source(), out).written == 28
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_ranks_write_the_bytes_of_one(format: str, order: Sequence[int], tmp_path: Path) -> None:
    write(toy_source(), tmp_path / "whole", format)
    outcome = [write(toy_source(rank=rank, world_size=2), tmp_path / "out", format) for rank in order]
    assert [run.complete for run in outcome] == [False, True]
    assert [run.written for run in outcome] == [{0: 28, 1: 20}[rank] for rank in order]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_under_torchrun_a_rank_writes_what_another_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may have died after this one's last chance to be started again."""
    write(toy_source(), tmp_path / "whole")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    outcome = [write(toy_source(rank=rank, world_size=2), tmp_path / "out") for rank in (1, 0)]
    assert [run.complete for run in outcome] == [True, True]
    assert [run.written for run in outcome] == [48, 0]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_torchrun_writes_the_bytes_of_one_process(tmp_path: Path) -> None:
    arguments = ["export", "--num-samples", "40", "--batch-size", "4", "--shard-size", "8", "--device", "cpu"]
    torchrun("-m", "mlviews.cli", *arguments, "--out", str(tmp_path / "two"))
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "one")], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    assert "40 samples made, 80 images" in outcome.output
    assert re.search(r"40 samples in 91 files, [0-9.]+ MB\.", outcome.output)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["preset"] == "fashion-ml-random"
    outcome = CliRunner().invoke(
        app, ["export", "--verify", "--out", str(tmp_path / "two")], env={"COLUMNS": "200"}
    )
    assert outcome.output.startswith("91 files in ")


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_found_and_mended(format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(toy_source(), out, format)
    good = tree(out)
    name = {
        "folder": "view1/unlabelled/0000000021.png",
        "webdataset": "shard-000001.tar",
        "ffcv": "views.beton",
    }[format]
    damaged = bytearray(good[name])
    damaged[len(damaged) // 2] ^= 1
    (out / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=re.escape(f"{name} differs from its checksum in checksums/")):
        verify(out)
    assert write(toy_source(), out, format).written == (48 if format == "ffcv" else 20)
    assert tree(out) == good
    (out / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{name} is missing, but has a checksum")):
        verify(out)
    write(toy_source(), out, format)
    verify(out)
    (out / ".DS_Store").write_text("")
    with pytest.raises(ValueError, match=r"\.DS_Store is no part of the export: remove it"):
        verify(out)


def test_a_changed_list_of_checksums_is_found(tmp_path: Path) -> None:
    write(toy_source(), tmp_path)
    path = tmp_path / "checksums" / "shard-000002.sha256"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"shard-000002.sha256 differs from its checksum in manifest.json"):
        verify(tmp_path)
    subprocess.run(["sha256sum", "-c", "--quiet", "checksums/shard-000000.sha256"], cwd=tmp_path, check=True)


class Own(Perturber):
    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [z + self.amount for z in latents]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "seed=3, not 4"),
        ({"num_samples": 49}, "num_samples=48, not 49"),
        ({"batch_size": 16}, "batch_size=8, not 16"),
        ({"perturb": {"1:": Normal(0.5)}}, "perturb.1,2='Normal("),
        ({"generator": Toy((4, 6, 7))}, "generator.levels.l2=[5], not [7]"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(
    options: dict[str, Any], message: str, finished: bool, tmp_path: Path
) -> None:
    if finished:
        write(toy_source(), tmp_path)
    else:
        with pytest.raises(Interrupted):
            write(interrupt(toy_source(), 5 + IDENTITY), tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        write(toy_source(**options), tmp_path)
    assert "use another folder (--out)" in str(raised.value)
    assert tree(tmp_path) == before


def test_settings_of_ones_own_perturber_are_known_by_its_attributes_not_its_address(tmp_path: Path) -> None:
    write(toy_source(perturb=Own(0.1)), tmp_path)
    assert write(toy_source(perturb=Own(0.1)), tmp_path).written == 0
    for other in (Own(0.2), Normal(0.1)):
        with pytest.raises(ValueError, match=r"perturb\.0,1,2="):
            write(toy_source(perturb=other), tmp_path)


def test_other_shards_format_and_epoch_are_refused(tmp_path: Path) -> None:
    write(toy_source(), tmp_path)
    later = toy_source()
    later.set_epoch(1)
    for source, options, message in (
        (toy_source(), {"shard_size": 10}, "shard_size=20, not 10"),
        (toy_source(), {"format": "webdataset"}, "format='folder', not 'webdataset'"),
        (later, {}, "epoch=0, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write(source, tmp_path, **options)  # type: ignore[arg-type]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="has files and is not an export: use another folder"):
        write(toy_source(), tmp_path)
    assert sorted(tree(tmp_path)) == ["thesis.tex"]


def test_bad_values(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Unknown format 'foldr': there are folder, webdataset, ffcv. Did you mean 'folder'"
    ):
        export(toy_source(), tmp_path / "a", "foldr")
    with pytest.raises(ValueError, match="Invalid shard_size=0"):
        export(toy_source(), tmp_path / "a", shard_size=0)
    with pytest.raises(ValueError, match="Invalid source of type list"):
        export([], tmp_path / "a")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match="No export in"):
        verify(tmp_path / "a")
    wild = mlviews.wrap_generator(
        lambda z: z[0].view(-1, 1, 2, 2), levels=[("a", (4,))], image_shape=(1, 2, 2)
    )
    with pytest.raises(
        ValueError, match=r"values from -[0-9.]+ to [0-9.]+ cannot be written: they must be in \[0, 1\]"
    ):
        write(toy_source(generator=wild, perturb=None), tmp_path / "b")
    four = mlviews.wrap_generator(
        lambda z: z[0].sigmoid().view(-1, 4, 2, 2), levels=[("a", (16,))], image_shape=(4, 2, 2)
    )
    with pytest.raises(ValueError, match=r"Images of shape \(4, 2, 2\) cannot be written"):
        write(toy_source(generator=four, perturb=None), tmp_path / "c")


@pytest.mark.parametrize(("format", "package"), [("webdataset", "webdataset"), ("ffcv", "ffcv")])
def test_a_missing_package_is_named(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError,
        match=re.escape(f"Writing {format} needs {package}: pip install 'mlviews[{package}]'"),
    ):
        export(toy_source(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


class Shift(Perturber):
    """A perturber whose repr and plain attributes do not tell it from others."""

    def __init__(self, amount: float) -> None:
        self.amounts = torch.full((1,), amount)

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [z + self.amounts for z in latents]


def wrapped(factor: float) -> mlviews.MLVGM:
    return mlviews.wrap_generator(
        lambda z: (factor * z[0] + z[1]).sigmoid().view(-1, 1, 2, 2),
        levels=[("a", (4,)), ("b", (4,))],
        image_shape=(1, 2, 2),
    )


def brighter(amount: float) -> Any:
    return lambda images: (images * 0.5 + amount).clamp(0, 1)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"generator": wrapped(1.0)}, {"generator": wrapped(1.1)}, "generator.samples of another generator"),
        ({"perturb": Shift(0.1)}, {"perturb": Shift(0.2)}, "its perturber has changed"),
        ({"transform": brighter(0.1)}, {"transform": brighter(0.2)}, "its transform has changed"),
        ({"generator": Toy(truncation=1.0)}, {"generator": Toy(truncation=2.0)}, "generator.truncation=1.0"),
    ],
)
def test_what_is_made_decides_and_not_only_what_can_be_read(
    before: dict[str, Any], after: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(toy_source(**before), tmp_path, augmented="transform" in before)
    images = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        write(toy_source(**after), tmp_path, augmented="transform" in before)
    assert tree(tmp_path) == images
    assert write(toy_source(**before), tmp_path, augmented="transform" in before).written == 0


def test_a_transform_that_draws_from_torchs_global_numbers_goes_on(tmp_path: Path) -> None:
    def noisy(images: Tensor) -> Tensor:
        return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)

    state = torch.random.get_rng_state()
    write(toy_source(transform=noisy), tmp_path, augmented=True)
    torch.random.set_rng_state(state)
    torch.rand(5)
    assert write(toy_source(transform=noisy), tmp_path, augmented=True).written == 0


def test_an_export_of_an_earlier_version_is_one_line(tmp_path: Path) -> None:
    write(toy_source(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "export": 1}))
    with pytest.raises(ValueError, match=r"an export of an earlier or later version of mlviews") as raised:
        write(toy_source(), tmp_path)
    assert "\n" not in str(raised.value)


TWIN = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import toy_source
from mlviews.integrations.files import export
for number in range(8):
    export(toy_source(), f"{sys.argv[2]}/{number}", sys.argv[3], shard_size=8, progress=False)
"""


@pytest.mark.parametrize("format", ["folder", "webdataset"])
def test_two_processes_in_one_folder_lose_nothing(format: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWIN, str(Path(__file__).parent), str(tmp_path / "out"), format]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    twins = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [twin.wait() for twin in twins] == [0, 0, 0]
    write(toy_source(), tmp_path / "alone", format, shard_size=8)
    images = {name: data for name, data in tree(tmp_path / "alone").items() if name != "manifest.json"}
    for number in range(8):
        verify(tmp_path / "out" / str(number))
        together = tree(tmp_path / "out" / str(number))
        assert {name: data for name, data in together.items() if name != "manifest.json"} == images


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_another_process_placed_meanwhile_is_left_alone(format: str, tmp_path: Path) -> None:
    source = toy_source()
    whole, late = source.batch, []

    def batch(start: int, stop: int) -> Any:
        if start == 20 and not late:  # the other process does everything in the middle of this one
            late.append(write(toy_source(), tmp_path, format))
        return whole(start, stop)

    source.replace = lambda **changes: source  # type: ignore[method-assign]
    source.batch = batch  # type: ignore[method-assign]
    outcome = write(source, tmp_path, format)
    assert (late[0].written, outcome.written, outcome.complete) == (28, 20, True)
    verify(tmp_path)
    assert not (tmp_path / ".partial").exists()


def test_the_stage_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    alive, gone = (tmp_path / ".partial" / f"shard-000001.7.{name}" for name in ("alive", "gone"))
    for stage in (alive, gone):
        (stage / "files").mkdir(parents=True)
        (stage / "lock").touch()
    holder = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True)"
    )
    command = [sys.executable, "-c", f"{holder}; time.sleep(60)", str(alive / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert write(toy_source(), tmp_path).complete
        assert (alive.exists(), gone.exists()) == (True, False)
    finally:
        process.kill()
        process.wait()
    write(toy_source(), tmp_path)
    assert not (tmp_path / ".partial").exists()
    verify(tmp_path)


def without(folder: Path, shard: str, file: str) -> None:
    """Take a file out of a finished export, out of its list, and out of the list's checksum."""
    path = folder / "checksums" / f"{shard}.sha256"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("".join(line for line in path.read_text().splitlines(True) if file not in line))
    (folder / file).unlink()
    manifest = (folder / "manifest.json").read_text()
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(manifest.replace(before, after))


def test_verify_counts_the_samples_of_each_shard(tmp_path: Path) -> None:
    write(toy_source(), tmp_path / "folder")
    good = tree(tmp_path / "folder")
    without(tmp_path / "folder", "shard-000001", "view1/unlabelled/0000000023.png")
    with pytest.raises(
        ValueError, match=r"does not list all of its samples \(19 of 20 in view1\): run the same"
    ):
        verify(tmp_path / "folder")
    assert write(toy_source(), tmp_path / "folder").written == 20
    assert tree(tmp_path / "folder") == good
    without(tmp_path / "folder", "shard-000002", "latents/shard-000002.safetensors")
    with pytest.raises(ValueError, match=r"\(0 of 8 in latents\)"):
        verify(tmp_path / "folder")

    write(toy_source(), tmp_path / "tars", "webdataset")
    tar = tmp_path / "tars" / "shard-000002.tar"
    checksums = tmp_path / "tars" / "checksums" / "shard-000002.sha256"
    with tarfile.open(tar) as file:
        members = [(member, file.extractfile(member).read()) for member in file.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as file:
        for member, data in members[:-4]:
            file.addfile(member, io.BytesIO(data))
    manifest = (tmp_path / "tars" / "manifest.json").read_text()
    before = hashlib.sha256(checksums.read_bytes()).hexdigest()
    checksums.write_text(f"{hashlib.sha256(tar.read_bytes()).hexdigest()}  shard-000002.tar\n")
    after = hashlib.sha256(checksums.read_bytes()).hexdigest()
    (tmp_path / "tars" / "manifest.json").write_text(manifest.replace(before, after))
    with pytest.raises(ValueError, match=r"\(7 of 8 in json\)"):
        verify(tmp_path / "tars")


@pytest.mark.parametrize("format", ["folder", "webdataset"])
def test_a_pool_is_whole_whatever_its_order(format: str, tmp_path: Path) -> None:
    source = toy_source(pool=True)
    assert write(source, tmp_path, format).complete
    verify(tmp_path)
    assert write(source, tmp_path, format).written == 0
    if format == "folder":
        second = load_file(tmp_path / "latents" / "shard-000001.safetensors")["index"].tolist()
        assert sorted(second) != list(range(20, 40)), "the epoch has an order of its own"
        without(tmp_path, "shard-000001", f"view1/unlabelled/{second[0]:010d}.png")
        with pytest.raises(ValueError, match=r"\(19 of 20 in view1\)"):
            verify(tmp_path)


def test_with_reuse_every_sample_is_written_once(tmp_path: Path) -> None:
    for name, options in {"reuse": {"reuse": 4}, "plain": {}}.items():
        source = toy_source(num_samples=256, **options)
        assert write(source, tmp_path / name, "webdataset", shard_size=128).complete
        verify(tmp_path / name)
    assert tree(tmp_path / "reuse") == tree(tmp_path / "plain")


def test_the_command_exports_a_preset_with_reuse(tmp_path: Path) -> None:
    (tmp_path / "reuse.yaml").write_text("preset: fashion-none\nreuse: 4\n")
    options = ["--preset", str(tmp_path / "reuse.yaml"), "--num-samples", "6", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, ["export", *options])
    assert result.exit_code == 0, result.exception
    assert verify(tmp_path / "x") == 2 * 6 + 3


def test_rows_of_images_that_have_no_latents(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 3, 1, dtype=torch.uint8)
    batch = Samples(0, torch.arange(2), torch.zeros(2).long(), [images, images + 1], [{}, {}])
    FORMATS_ON_DISK["ffcv"].write(tmp_path, "shard", [batch])
    stored = load_file(tmp_path / "shards" / "shard.safetensors")
    assert set(stored) == {"view0", "view1", "index", "target"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": []}, "lists shards of 0 samples in a row, of num_samples=48"),
        ({"shards": [{"start": 0}]}, "is damaged"),
        ({"shards": None}, "is damaged"),
        ({"crops": 7}, "is damaged"),
        ({"format": []}, "is damaged"),
        ({"num_samples": 10**12}, "lists shards of 48 samples in a row"),
    ],
)
def test_a_manifest_that_is_not_an_exports_is_one_error(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(toy_source(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(ValueError, match=message):
        verify(tmp_path)


def planted(kind: str, path: Path, victim: Path) -> None:
    """What somebody else may have put where an export writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim.parent, target_is_directory=True)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        ".partial/lock",
        ".partial/unfinished.json",
        ".partial/shard-000000/lock",
        ".partial/shard-000000.4.ab/files/x.png",
    ],
)
def test_links_and_fifos_in_a_prepared_folder_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    victim = tmp_path / "home" / "thesis.tex"
    victim.parent.mkdir()
    victim.write_text("months of work")
    planted(kind, tmp_path / "out" / name, victim)
    with pytest.raises(ValueError, match=r"use another folder \(--out\), or remove it"):
        write(toy_source(), tmp_path / "out")
    assert victim.read_text() == "months of work"
    assert [path.name for path in victim.parent.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "name", [".partial", "checksums", "view0", "view0/unlabelled", "latents", "manifest.json"]
)
def test_nothing_is_written_through_links_in_an_unfinished_export(name: str, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    with pytest.raises(Interrupted):
        write(interrupt(toy_source(), 1 + IDENTITY), out)
    planted(
        "folder" if name != "manifest.json" else "fifo", out / name, home / "x"
    ) if name != ".partial" else None
    if name == ".partial":
        shutil.rmtree(out / name)
        (out / name).symlink_to(home, target_is_directory=True)
    with pytest.raises(ValueError, match=r"use another folder \(--out\), or remove it"):
        write(toy_source(), out)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("entry", ["../home/thesis.tex", "/dev/zero", "a/../../home/thesis.tex"])
def test_a_list_of_checksums_reaches_nothing_outside(entry: str, tmp_path: Path) -> None:
    victim, out = tmp_path / "home" / "thesis.tex", tmp_path / "out"
    victim.parent.mkdir()
    victim.write_text("months of work")
    with pytest.raises(Interrupted):
        write(interrupt(toy_source(), 4 + IDENTITY), out)
    checksum = hashlib.sha256(victim.read_bytes()).hexdigest()
    (out / "checksums" / "shard-000000.sha256").write_text(f"{checksum}  {entry}\n")
    assert write(toy_source(), out).written == 48
    assert victim.read_text() == "months of work"
    verify(out)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(toy_source(), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_views_are_raw_unless_asked_for_and_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    augment = transforms.simclr(3, color=False)
    source = toy_source(transform=augment)
    write(source, tmp_path / "raw")
    write(toy_source(), tmp_path / "none")
    assert tree(tmp_path / "raw") == tree(tmp_path / "none")
    write(source, tmp_path / "augmented", augmented=True)
    assert source.transforms == [augment, augment]
    plain = toy_source(transform=transforms.Augmentation(size=3, scale=augment.scale, normalize=None)).batch(
        0, 48
    )
    stored = ImageFolder(str(tmp_path / "augmented" / "view1"))
    assert torch.equal(
        torch.stack([pil_to_tensor(image) for image, _ in stored]), (plain.views[1] * 255).round().byte()
    )


def test_the_pages_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "integrations" / "files" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    session: dict[str, Any] = {}
    ffcv = importlib.util.find_spec("ffcv")
    for block in blocks:
        for long, short in (
            ("60_000", "256"),
            ("000000..000058", "000000..000000"),
            ("batch_size=256", "batch_size=128"),
            ("workers=8", "workers=1"),
        ):
            block = block.replace(long, short)
        if ffcv is None:
            block = block.replace(', ("ffcv", "runs/beton")', "")
            if "ffcv" in block:
                continue
        exec(block, session)
    assert (session["image"].size, len(session["anchors"])) == ((32, 32), 256)
    first, second = session["pairs"][5]
    assert not torch.equal(first, second)
    assert session["facts"]["index"] == 255
    assert session["latents"].shape == (128, 2, 56) if ffcv else session["latents"]["view1.4x4"].shape == (8,)
