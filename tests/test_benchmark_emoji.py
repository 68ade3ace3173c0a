"""The color data set: emoji are held out as families, packages are checked, and retrieval counts right."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import emoji_data
import emoji_views
import numpy as np
import pytest
import torch
from emoji_data import VENDORS, family, read_emoji, read_package, split
from PIL import Image
from probe import Budget
from record import RESULTS

from mlviews.evaluation.retrieval import retrieve
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.weights.files import write_safetensors
from mlviews.zoo.images import training_images

SLUGS = [emoji_data.slug(group) for group in emoji_data.GROUPS]


def points(code: str) -> list[int]:
    return [int(point, 16) for point in code.split("-")]


def entry(code: str, group: str, order: int, **more: Any) -> dict[str, Any]:
    """An emoji as emoji.json has it, which all vendors draw."""
    drawn = {f"has_img_{vendor}": True for vendor in VENDORS}
    names = {"unified": code, "category": group, "image": f"{code.lower()}.png", "sort_order": order}
    return {**names, **drawn, **more}


def entries() -> list[dict[str, Any]]:
    """Ten emoji of every group; those of people have a man and a woman beside the person."""
    rows = []
    for number, group in enumerate(emoji_data.GROUPS):
        for offset in range(10):
            code = f"{0x1F700 + 16 * number + offset:X}"
            order = 100 * number + 3 * offset
            if group == "People & Body":
                variants = [f"{person}-200D-{code}" for person in ("1F9D1", "1F468", "1F469")]
            else:
                variants = [code]
            rows += [entry(variant, group, order + place) for place, variant in enumerate(variants)]
    return [*rows, entry("1F3FB", "Component", 9999)]


def archive(path: Path, vendor: str, names: list[str]) -> None:
    """Write a small package: every emoji is a square of its own red, on transparent pixels that are black."""
    pictures = {}
    for number, name in enumerate(names):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = (100 + number, 0, 0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures[f"package/img/{vendor}/64/{name}"] = file.getvalue()
    contents = {
        "package/LICENSE": b"The MIT License (MIT)",
        "package/emoji.json": json.dumps(entries()).encode(),
        **pictures,
        f"package/img/{vendor}/sheets/64.png": b"not needed",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji")
    names = [row["image"] for row in entries()]
    packages = {}
    for vendor in VENDORS:
        path = root / f"{vendor}.tgz"
        archive(path, vendor, names)
        packages[vendor] = read_package(path, vendor)
    emoji_data.write(packages, root / "data", {"version": "0"})
    return root / "data"


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FD", "1F44B"),  # skin tone
        ("1F645-200D-2642-FE0F", "1F645-200D-2640-FE0F"),  # gender by sign
        ("1F468-1F3FF-200D-1F373", "1F9D1-200D-1F373"),  # gender by person
        ("1F469-200D-1F9B0", "1F9D1"),  # hair
        ("1F6B6-200D-27A1-FE0F", "1F6B6"),  # direction
        ("1F43B-200D-2744-FE0F", "1F43B"),  # a bear, and a polar bear
        ("2764-FE0F-200D-1F525", "2764"),
        ("1F474", "1F9D3"),
    ],
)
def test_variants_are_one_family(variant: str, base: str) -> None:
    assert family(points(variant)) == family(points(base))


def test_different_emoji_are_different_families() -> None:
    codes = ["1F9D1-200D-1F373", "1F9D1-200D-1F680", "1F9D1", "0031-FE0F-20E3", "0032-FE0F-20E3"]
    codes += ["1F1E9-1F1EA", "1F1E9-1F1F0", "1F43B", "1F436"]
    assert len({family(points(code)) for code in codes}) == len(codes)
    assert family(points("1F468-200D-2764-FE0F-200D-1F468"), "family") == family(points("1F46D"), "family")


def test_no_family_is_on_both_sides_and_every_group_is_tested() -> None:
    rows = read_emoji(json.dumps(entries()).encode())
    parts = split(rows)
    assert {row.family for row in parts.train} & {row.family for row in parts.test} == set()
    assert len({row.family for row in parts.test}) == len(parts.test), "a held-out family is tested once"
    assert [sum(row.group == group for row in parts.test) for group in emoji_data.GROUPS] == [2] * 9
    people = [row for row in parts.test if row.group == "People & Body"]
    assert all(row.code.startswith("1f9d1") for row in people), "by its first emoji"
    assert len(parts.train) == 8 * 8 + 8 * 3
    assert {row.family for row in split(rows[::-1]).train} == {row.family for row in parts.train}, "any order"


def test_emoji_that_a_vendor_draws_alike_are_one_family() -> None:
    rows = read_emoji(json.dumps(entries()).encode())[:4]
    pictures = {vendor: {row.file: f"{vendor} {row.file}".encode() for row in rows} for vendor in VENDORS}
    assert emoji_data.with_twins(rows, pictures) == rows
    first, second, _, fourth = (row.file for row in rows)
    pictures["apple"][second] = pictures["apple"][fourth]
    pictures["google"][fourth] = pictures["google"][first]
    families = [row.family for row in emoji_data.with_twins(rows, pictures)]
    assert families[0] == families[1] == families[3] != families[2]


def test_what_a_vendor_lacks_is_not_tested() -> None:
    rows = read_emoji(json.dumps([{**row, "has_img_apple": False} for row in entries()]).encode())
    assert split(rows).test == []
    assert len(split(rows).train) == 8 * 8 + 8 * 3


def test_folders_are_read_by_the_package_itself(folder: Path) -> None:
    images = training_images(folder / "train")
    assert (images.channels, len(images.images)) == (3, 4 * (8 * 8 + 8 * 3))
    assert [path.name for path in sorted((folder / "test").iterdir())] == sorted(SLUGS)
    train, test = (emoji_views.read_split(folder / part) for part in ("train", "test"))
    assert len(test.images) == 4 * 9 * 2
    assert torch.equal(test.labels.bincount(), torch.full((9,), 8))
    assert torch.equal(test.items.bincount(), torch.full((18,), 4)), "an emoji has one number for all vendors"
    assert torch.equal(train.vendors.bincount(), torch.full((4,), 88))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(manifest["images"]["train"].values()) == len(train.images)
    licenses = (folder / "LICENSES.txt").read_text()
    assert all(words in licenses for words in ("Apple Inc.", "Apache License 2.0", "Attribution 4.0", "MIT"))


def test_pictures_are_on_white(folder: Path) -> None:
    image = emoji_views.read_split(folder / "test").images[0]
    assert image[:, 0, 0].tolist() == [255, 255, 255], "not the black that the transparent pixels hold"
    assert image[0, 16, 16] >= 100
    assert image[1:, 16, 16].tolist() == [0, 0]


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"emoji-datasource-google-{emoji_data.VERSION}.tgz"
    archive(path, "google", [])
    right = integrity(path)
    assert emoji_data.download("google", tmp_path, right) == path, "nothing is downloaded that is there"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"google.*digest sha512-.*delete it"):
        emoji_data.download("google", tmp_path, right)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tgz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"x.tgz has no package/LICENSE"):
        read_package(tmp_path / "x.tgz", "google")
    with pytest.raises(ValueError, match=r"not the list of emoji-datasource"):
        read_emoji(b'[{"category": "Flags"}]')


def test_retrieval_counts_as_by_hand() -> None:
    # Angles in degrees; item, source. Images of a query's source are no answers.
    images = [(0, 0, 0), (10, 0, 1), (15, 1, 0), (22, 1, 1), (90, 0, 2), (100, 1, 2)]
    angles, items, sources = (torch.tensor(column) for column in zip(*images, strict=True))
    features = torch.stack([torch.cos(torch.deg2rad(angles)), torch.sin(torch.deg2rad(angles))], 1)
    scores = retrieve(features * torch.arange(1, 7)[:, None], items, sources, ranks=(1, 2))
    # The nearest first: (0, 0, 0) finds 10 (right), 22, 90 (right), 100: precisions 1/1 and 2/3.
    # 10: 15, 0 (right), 90 (right), 100: 1/2, 2/3.  15: 10, 22 (right), 90, 100 (right): 1/2, 2/4.
    # 22: 15 (right), 0, 90, 100 (right): 1, 2/4.  90: 22, 15, 10 (right), 0 (right): 1/3, 2/4.
    # 100: 22 (right), 15 (right), 10, 0: 1, 1.
    precisions = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 1 / 2, 3 / 4, (1 / 3 + 1 / 2) / 2, 1]
    assert scores.precision == pytest.approx(100 * sum(precisions) / 6)
    assert scores.recall == pytest.approx({1: 100 * 3 / 6, 2: 100 * 5 / 6})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> emoji_views.Files:
    """A small generator of colored images with random weights."""
    path = tmp_path_factory.mktemp("film") / "film.safetensors"
    config = FilmConfig(dims=(4,) * 4, channels=(8,) * 4, image_channels=3)
    metadata = {"format": FilmGenerator.FORMAT, "config": json.dumps(dataclasses.asdict(config))}
    write_safetensors(path, dict(FilmGenerator(config).state_dict()), metadata)
    return emoji_views.Files(path, path.parent / "levels")


BUDGET = Budget(16, 8, 352, None)


def test_a_row_is_trained_and_scored(
    folder: Path, files: emoji_views.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_color(encoder: Any, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0, 16, 16].float()  # an emoji's, the same for all vendors
        return torch.stack([red - 160, torch.full_like(red, 20)], 1)

    monkeypatch.setattr(emoji_views, "embed", by_color)
    cell = emoji_views.measure_cell("ML random, full", 0, BUDGET._replace(data=str(folder)), files)
    assert (cell["method"], cell["source"], len(cell["loss"])) == ("simclr", "ML random, full", 1)
    assert tuple(cell["scores"]) == emoji_views.SCORES
    assert [cell["scores"][name] for name in ("recall@1", "recall@5", "mAP")] == [100, 100, 100]
    assert cell["scores"]["kNN"] == cell["scores"]["kNN, balanced"], "groups of one size"


def test_rows_differ_in_their_views_only(files: emoji_views.Files) -> None:
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    random, mixed = (
        emoji_views.views_of(emoji_views.ROWS[f"{name}, crop"], images, 0, BUDGET, files)
        for name in ("ML random", "real + generated")
    )
    assert (random.reuse, random.num_samples) == (4, 128), "an epoch is the whole training"
    assert (mixed.sources[1].reuse, mixed.sources[1].num_samples) == (4, 64), "half of it"
    assert [view.shape for view in next(iter(mixed))] == [(8, 3, 32, 32)] * 2
    plain = emoji_views.views_of(emoji_views.ROWS["real, none"], images, 0, BUDGET, files)
    first, second = next(iter(plain))
    assert torch.equal(first, second), "without T_x both views are the image"


def test_batches_come_in_turn() -> None:
    source = iter(emoji_views.InTurn([("real",)] * 2, [("generated",)] * 3))
    assert [next(source)[0] for _ in range(6)] == ["real", "generated"] * 3


def test_scores_of_the_record_are_those_of_its_cells() -> None:
    record = json.loads((RESULTS / "emoji.json").read_text())
    summary = emoji_views.summarise(record["cells"], emoji_views.COMPARED)
    assert json.loads(json.dumps(summary)) == record["summary"]
