"""Every record says which weights it was measured with, and the documents say which are no longer bundled."""

from __future__ import annotations

import fnmatch
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import weights
from documents import TABLES
from documents.bundled import records
from documents.common import DOCUMENTS
from record import publish

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks" / "README.md"
LINK = "benchmarks/README.md#which-weights-the-figures-belong-to"
WITHOUT = (  # records that use neither `fashion` nor `fashion-nvae`
    "biggan-*.json",
    "emoji*",
    "fashion-diffusion*",
    "fashion-semafo*",
    "fashion-trial*",
    "impact-diffusion.json",
    "impact-semafo.json",
    "mi.json",
    "parity-*.json",
    "stylegan*.json",
    "vdvae-speed.json",
)

Replace = Callable[..., None]


@pytest.fixture
def replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replace:
    """What bundles a second version of weights; before, all weights and records are of the first.

    So the tests hold whichever versions there really are.
    """
    data = json.loads(weights.FILE.read_text())
    newest = {generator: data["versions"][generator]["first"]["sha256"] for generator in data["versions"]}
    data["versions"] = {
        generator: {"first": versions["first"]} for generator, versions in data["versions"].items()
    }
    data["records"] = {name: dict.fromkeys(record, "first") for name, record in data["records"].items()}
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(data))
    monkeypatch.setattr(weights, "FILE", file)
    monkeypatch.setattr(
        weights, "bundled", lambda *names: {f"{name}.safetensors": newest[name] for name in names}
    )

    def replaced(generator: str, again: tuple[str, ...] = ()) -> None:
        newest[generator] = "f" * 64
        data["versions"][generator]["second"] = {"sha256": newest[generator]}
        for name in again:
            data["records"].setdefault(name, {})[generator] = "second"
        file.write_text(json.dumps(data))

    return replaced


def test_every_record_says_which_weights_it_was_measured_with() -> None:
    silent = []
    for name, path in records():
        record = json.loads(path.read_text()) if path.suffix == ".json" else {}
        unrelated = any(fnmatch.fnmatch(name, pattern) for pattern in WITHOUT)
        assert not (unrelated and weights.versions_of(name, record)), f"{name} has weights after all"
        if not (unrelated or name in weights.listed() or weights.digests(record)):
            silent.append(name)
    assert silent == [], "name their weights in benchmarks/weights.json"


def test_listed_records_and_versions_exist() -> None:
    versions = weights.versions()
    assert weights.listed().keys() <= {name for name, _ in records()}
    for name, of_record in weights.listed().items():
        assert all(version in versions[generator] for generator, version in of_record.items()), name


@pytest.mark.parametrize("generator", weights.versions())
def test_the_bundled_weights_are_the_newest_version(generator: str) -> None:
    names = list(weights.versions()[generator])
    assert weights.bundled_version(generator) == names[-1], "add the new weights to benchmarks/weights.json"
    assert all(version.commit for version in list(weights.versions()[generator].values())[:-1])


def test_what_a_record_tells_comes_before_the_list() -> None:
    first = weights.versions()["fashion"]["first"]
    assert weights.versions_of("real-anchors.json", {}) == weights.listed()["real-anchors.json"]
    told = {"weights": {"fashion.safetensors": first.sha256}}
    assert weights.versions_of("real-anchors.json", told)["fashion"] == "first"
    assert weights.versions_of("new.json", {"generator_weights": first.fingerprint}) == {"fashion": "first"}
    quality = {"file": "a.safetensors", "bytes": 1, "sha256": first.sha256}
    assert weights.versions_of("new.json", {"weights": quality}) == {"fashion": "first"}
    poor = {"file": "fashion.safetensors", "bytes": 1, "sha256": "0" * 64}
    assert weights.versions_of("new.json", {"weights": poor}) == {}


def test_a_published_record_tells_the_weights_it_used(tmp_path: Path) -> None:
    publish({"seed": 0}, tmp_path / "new.json", generators=["fashion-nvae", "stylegan2"])
    record = json.loads((tmp_path / "new.json").read_text())
    version = list(weights.versions()["fashion-nvae"].values())[-1]
    assert record == {"seed": 0, "weights": {"fashion-nvae.safetensors": version.sha256}}
    assert list(weights.versions_of("new.json", record)) == ["fashion-nvae"]


def test_tables_of_weights_that_were_replaced_say_so(replace: Replace) -> None:
    old = ("views_nvae", "views_differences", "real_anchors", "paper_claims")
    current = ("views", "overhead", "emoji", "semafo_levels", "generator")
    before = {name: TABLES[name]() for name in (*old, *current)}
    assert not any("Measured with the first weights" in text for text in before.values())
    replace("fashion-nvae")
    sentence = f"\n\nMeasured with the first weights of `fashion-nvae` ([which]({LINK}))."
    assert {name: TABLES[name]() for name in old} == {name: before[name] + sentence for name in old}
    assert {name: TABLES[name]() for name in current} == {name: before[name] for name in current}


def test_the_page_of_the_benchmarks_names_weights_that_were_replaced(replace: Replace) -> None:
    assert TABLES["bundled_weights"]() == ""
    replace("fashion", again=("overhead.json", "lightly-dino.json"))
    section = TABLES["bundled_weights"]()
    assert section.startswith("## Which weights the figures belong to\n")
    assert "| `fashion` | second (bundled) | `ffffffffffffffff` |  |" in section
    assert "git show acbd08e:mlviews/zoo/fashion.safetensors > first-fashion.safetensors" in section
    assert 'load_generator("fashion", weights="first-fashion.safetensors")' in section
    (item,) = (line for line in section.splitlines() if line.startswith("- "))
    assert item.startswith("- Records of the first weights of `fashion`: ")
    assert "`probe.json`" in item
    assert "`overhead.json`" not in item
    assert "`fashion-poor.quality.json`" not in item

    assert "first weights" not in TABLES["overhead"]()
    assert "Measured in part with the first weights of `fashion` (" in TABLES["lightly"]()
    render = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["render"]
    page = render(BENCHMARKS.read_text(), BENCHMARKS)
    assert "weights of `fashion` ([which](#which-weights-the-figures-belong-to))." in page
    assert render(page, BENCHMARKS) == page
    lightly = ROOT / "integrations" / "lightly" / "README.md"
    assert lightly in DOCUMENTS
    assert f"([which](../../{LINK}))" in render(lightly.read_text(), lightly)
