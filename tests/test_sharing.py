"""A published generator is the same one, its folder is read as data, and what is wrong with one is said."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import Toy, external, toy_source
from PIL import Image
from test_psp import E4E, content
from test_stylegan2 import rosinality
from test_vdvae import OPTIONS as VDVAE
from torch import nn

import mlviews
from mlviews import ImpactReport, MLViewSource, WeightsError, load_generator, perturb, publish
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.generators.inverter import Inverter
from mlviews.generators.registry import BUNDLED
from mlviews.identity import generator_identity
from mlviews.impact.sweep import SweepOptions
from mlviews.runs.files import sha256
from mlviews.sharing import upload
from mlviews.weights import configs, write_safetensors
from mlviews.weights.checkpoints import read_tensors

DIGEST = "0" * 64


def film(path: Path, seed: int = 0) -> Path:
    """A file of mlviews.zoo.train, of two levels; images 8x8."""
    config = FilmConfig(dims=(3, 4), channels=(8, 8))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = FilmGenerator(config)
    provenance = {"data": "Shapes | 12 images", "border": 1}
    write_safetensors(path, network.state_dict(), configs.metadata(FilmGenerator.FORMAT, config, provenance))
    return path


def pickled(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of a small generator with an inverter."""
    place = tmp_path_factory.mktemp("small")
    generator = load_generator("film", film(place / "film.safetensors"))
    generator.inverter = Inverter.of(generator, width=8, hidden=8).eval()
    return publish(generator, place / "shapes", license="cc-by-4.0")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published diffusion model."""
    return publish(load_generator("fashion-diffusion"), tmp_path_factory.mktemp("diffusion") / "d", samples=0)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(small, tmp_path / "shapes"))


def change(folder: Path, **values: Any) -> None:
    """Change entries of a folder's settings; None takes one out."""
    path = folder / "config.json"
    table = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))


# -- there and back ------------------------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[Path], mlviews.MLVGM]] = {
    "fashion": lambda path: load_generator("fashion"),
    "fashion-nvae": lambda path: load_generator("fashion-nvae", temperature=0.8),
    "fashion-diffusion": lambda path: load_generator("fashion-diffusion", steps=3),
    "fashion-semafo": lambda path: load_generator("fashion-semafo"),
    "film": lambda path: load_generator("film", film(path / "f")),
    "stylegan2": lambda path: load_generator(
        "stylegan2", pickled(path / "f", {"g_ema": rosinality()}), groups=2
    ),
    "stylegan2 with an encoder": lambda path: load_generator("stylegan2", pickled(path / "f", content(E4E))),
    "stylegan-xl": lambda path: load_generator("stylegan-xl", external("stylegan-xl", path / "f"), groups=2),
    "nvae": lambda path: load_generator("nvae", external("nvae", path / "f"), levels="scale"),
    "vdvae": lambda path: load_generator(
        "vdvae",
        external("vdvae", path / "f"),
        **VDVAE,
    ),
    "biggan-deep": lambda path: load_generator("biggan-deep", external("biggan-deep", path / "f")),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_published_generator_is_the_same(name: str, tmp_path: Path) -> None:
    generator = GENERATORS[name](tmp_path)
    folder = publish(generator, tmp_path / "out", samples=0)
    (tmp_path / "f").unlink(missing_ok=True)  # the folder needs nothing else
    copy = load_generator(str(folder))
    z = generator.sample_latents(range(2))
    labels = generator.sample_labels(range(2)) if generator.num_classes else None
    images = generator(z, labels)
    assert torch.equal(copy(copy.sample_latents(range(2)), labels), images)
    assert (copy.name, copy.options, copy.border) == (generator.name, generator.options, generator.border)
    assert generator_identity(copy) == generator_identity(generator), (
        "measurements and exports are the same's"
    )
    assert copy.encodes == generator.encodes
    if generator.encodes and name != "stylegan2 with an encoder":  # which looks at 256 pixels
        pairs = zip(copy.encode(images), generator.encode(images), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_folder_holds_what_people_and_loaders_need(small: Path) -> None:
    names = {file.name for file in small.iterdir()}
    assert names == {
        "README.md", "config.json", "inverter.safetensors", "levels.png", "model.safetensors", "samples.png"
    }  # fmt: skip
    text = (small / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "mlviews"
    assert header["license"] == "cc-by-4.0"
    assert {"mlviews", "film"} <= set(header["tags"])
    for line in (
        'load_generator("shapes")',
        "| 1 | 8x8 | 4 |",
        r"Trained on: Shapes \| 12 images.",
        "encode",
    ):
        assert line in text
    with Image.open(small / "samples.png") as picture:
        assert picture.size == (8 * 9 + 1, 4 * 9 + 1)
    assert (small / "model.safetensors").stat().st_mode & 0o777 == (
        small / "README.md"
    ).stat().st_mode & 0o777
    assert small.stat().st_mode & 0o500 == 0o500
    assert [path.name for path in small.parent.iterdir() if path.name.startswith(".")] == []


def test_bundled_weights_bring_their_license(diffusion: Path) -> None:
    folder = diffusion
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["license"] == "mit"
    assert "Zalando" in (folder / "LICENSE-fashion-mnist").read_text()
    assert "Fashion-MNIST train, 60 000 images" in (folder / "README.md").read_text()


def test_the_impact_report_comes_along(tmp_path: Path) -> None:
    generator = load_generator("film", film(tmp_path / "f"))
    options = {"steps": 10, "train_pairs": 4, "pairs": 4, "evaluations": 2, "width": 8, "progress": False}
    assert set(options) <= set(SweepOptions.__dataclass_fields__)
    report = mlviews.measure_impact(generator, monte_carlo=50, **options)  # type: ignore[arg-type]
    (tmp_path / "impact").mkdir()
    report.save_figures(tmp_path / "impact")
    folder = publish(generator, tmp_path / "out", samples=0, report=tmp_path / "impact")
    assert ImpactReport.load(folder) == ImpactReport.load(tmp_path / "impact")
    text = (folder / "README.md").read_text()
    assert f"## {report.title}" in text
    assert all(cell in text for row in report.cells() for cell in row.values() if cell.isdigit())
    source = MLViewSource(
        load_generator(folder), perturb=perturb.matched(ImpactReport.load(folder)), batch_size=2
    )
    assert len(source.assignments) == 2
    with pytest.raises(ValueError, match=r"report is of generator 'film'.*not of 'fashion'.*mlviews impact"):
        publish(load_generator("fashion"), tmp_path / "other", report=report)


def test_the_users_options_and_inverter_come_first(tmp_path: Path) -> None:
    folder = publish(load_generator("fashion-nvae", temperature=0.5), tmp_path / "n", samples=0)
    assert load_generator(folder).options == {"temperature": 0.5}
    assert load_generator(folder, temperature=0.7).options == {"temperature": 0.7}
    with pytest.raises(ValueError, match="Invalid option 'groups' of generator 'fashion-nvae'"):
        load_generator(folder, groups=2)
    with pytest.raises(ValueError, match="has an encoder"):
        load_generator(folder, inverter="x.safetensors")


def test_a_published_generator_is_published_again(small: Path, tmp_path: Path) -> None:
    licensed = publish(load_generator(small), tmp_path / "licensed", samples=0, license="cc0-1.0")
    again = publish(load_generator(licensed), tmp_path / "again", samples=0)
    assert json.loads((again / "config.json").read_text())["license"] == "cc0-1.0"
    assert generator_identity(load_generator(again)) == generator_identity(load_generator(small))
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


# -- by the name of a folder, everywhere ---------------------------------------------------------------------


def test_configurations_name_folders(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z = load_generator(small).sample_latents(range(1))
    expected = load_generator(small)(z)
    for generator in (str(small), small, {"name": str(small)}):
        views = MLViewSource.from_config({"generator": generator, "perturb": "resample", "batch_size": 2})
        assert torch.equal(views.generator(z), expected)
        assert views.generator.inverter is not None
    # Beside a YAML file, wherever the process is.
    shutil.copytree(small, tmp_path / "shapes")
    for line in ("generator: shapes", "generator: {name: ./shapes}"):
        (tmp_path / "views.yaml").write_text(f"{line}\nperturb: resample\nbatch_size: 2\n")
        assert torch.equal(MLViewSource.from_config(tmp_path / "views.yaml").generator(z), expected)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_generator("shapes")(z), expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(load_generator("~/shapes")(z), expected)


def test_commands_take_folders(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlviews.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlviews", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    out = str(tmp_path / "out")
    code, printed, _ = run("publish", str(small), out, "--samples", "4", "--trained-on", "toys")
    assert code == 0
    assert "README.md" in printed
    assert "Trained on: toys." in Path(out, "README.md").read_text()
    code, _, problem = run("publish", str(small), out)
    assert (code, problem.count("\n")) == (2, 1)
    assert "there already" in problem
    assert run("publish", str(small), out, "--samples", "0", "--overwrite")[0] == 0
    assert not Path(out, "samples.png").exists()
    assert run("traverse", out, "--level", "1", "--out", str(tmp_path / "t.png"))[0] == 0


# -- whole or not there --------------------------------------------------------------------------------------


def test_nothing_is_left_of_what_failed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator(small)
    monkeypatch.setattr("mlviews.sharing.publishing._draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(generator, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    publish(generator, tmp_path / "out", samples=0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ZeroDivisionError):
        publish(generator, tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_there_stays_unless_it_is_published(small: Path, tmp_path: Path) -> None:
    generator = load_generator(small)
    (tmp_path / "empty").mkdir()
    publish(generator, tmp_path / "empty", samples=0)
    with pytest.raises(ValueError, match=r"there already.*--overwrite"):
        publish(generator, tmp_path / "empty", samples=0)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="not overwritten, as it holds no published generator"):
            publish(generator, tmp_path / name, samples=0, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_weights_that_changed_are_not_published(tmp_path: Path) -> None:
    generator = load_generator("film", film(tmp_path / "f"))
    film(tmp_path / "f", seed=1)
    with pytest.raises(ValueError, match=r"not the one of its file .*weights.*load it again"):
        publish(generator, tmp_path / "out", samples=0)
    film(tmp_path / "f")
    generator.inverter = nn.Flatten()
    with pytest.raises(ValueError, match="the inverter"):
        publish(generator, tmp_path / "out", samples=0)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[Callable[[Path, Path], object], type[Exception], str]] = {
    "a generator of the user's": (
        lambda small, out: publish(Toy(), out),
        ValueError,
        "'Toy' cannot be published: only.*list_generators",
    ),
    "a source": (lambda small, out: publish(toy_source(), out), ValueError, "of type MLViewSource"),  # type: ignore[arg-type]
    "a name": (lambda small, out: publish("fashion", out), ValueError, "of type str"),  # type: ignore[arg-type]
    "a license as a sentence": (
        lambda small, out: publish(load_generator(small), out, license="MIT License"),
        ValueError,
        "Invalid license='MIT License'.*e.g. 'mit'",
    ),
    "a negative number of samples": (
        lambda small, out: publish(load_generator(small), out, samples=-1),
        ValueError,
        "Invalid samples=-1",
    ),
    "no report": (
        lambda small, out: publish(load_generator(small), out, report=small),
        FileNotFoundError,
        "No impact report",
    ),
    "a repository without an owner": (
        lambda small, out: publish(load_generator(small), out, push="shapes"),
        ValueError,
        "push='shapes'.*owner/name",
    ),
    "weights beside a folder": (
        lambda small, out: load_generator(small, weights="x.pkl"),
        ValueError,
        "which has its own; leave them out",
    ),
    "a revision of a folder": (
        lambda small, out: load_generator(small, revision="v1"),
        ValueError,
        "Invalid revision='v1'.*owner/name",
    ),
    "a revision of an architecture": (
        lambda small, out: load_generator("fashion", revision="v1"),
        ValueError,
        "Invalid revision='v1'",
    ),
    "no folder": (lambda small, out: load_generator(out), FileNotFoundError, "No generator folder"),
    "no folder, by its name": (
        lambda small, out: load_generator("./missing"),
        FileNotFoundError,
        "No generator folder missing",
    ),
    "a file": (
        lambda small, out: load_generator(str(small / "model.safetensors")),
        ValueError,
        r"is a file: .*load_generator\(NAME, weights=FILE\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_of_the_user(name: str, small: Path, tmp_path: Path) -> None:
    action, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        action(small, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_a_module_has_no_file(tmp_path: Path) -> None:
    generator = load_generator("film", film(tmp_path / "f"))
    generator.weights_file = None  # as of load_generator(..., weights=MODULE)
    with pytest.raises(
        ValueError, match=r"not read from a file.*checkpoints.convert\(MODULE, 'FILE.safetensors'\)"
    ):
        publish(generator, tmp_path / "out")


# -- broken and hostile folders ------------------------------------------------------------------------------


def files_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text())["files"], **more}


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors, which config.json",
    ),
    "other weights": (
        lambda f: film(f / "model.safetensors", seed=1),
        "model.safetensors does not have the SHA-256 of config",
    ),
    "a bit of the inverter": (
        lambda f: (f / "inverter.safetensors").write_bytes(
            (f / "inverter.safetensors").read_bytes()[:-1] + b"\1"
        ),
        "inverter.safetensors does not have the SHA-256",
    ),
    "no settings": (lambda f: (f / "config.json").unlink(), "no published generator: it has no config.json"),
    "settings cut short": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:99]),
        "config.json is damaged",
    ),
    "settings that are a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        "holds list, expected a table",
    ),
    "settings too large": (
        lambda f: (f / "config.json").write_text('{"a": "' + "x" * (5 << 20) + '"}'),
        "bytes of settings",
    ),
    "too many settings": (lambda f: change(f, levels=[0] * 60_000), "more than 50,000 settings"),
    "settings nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000 + "]" * 100_000),
        "config.json is damaged",
    ),
    "another format": (
        lambda f: change(f, format="mlviews.walker"),
        "'mlviews.walker', not 'mlviews.generator'",
    ),
    "a later version": (lambda f: change(f, version=2), "has version 2, and this mlviews reads 1"),
    "an unknown key": (lambda f: change(f, auto_map="x.py"), "unknown key 'auto_map': there are format"),
    "a key too few": (lambda f: change(f, border=None), "has no 'border'"),
    "an unknown architecture": (
        lambda f: change(f, generator="os.system"),
        "unknown generator 'os.system': there are fashion",
    ),
    "a path for an architecture": (lambda f: change(f, generator="../other"), "unknown generator '../other'"),
    "no text for an architecture": (
        lambda f: change(f, generator=["film"]),
        r"generator \"\['film'\]\", expected a str",
    ),
    "an option that there is not": (
        lambda f: change(f, options={"device": "cuda"}),
        "unknown option 'device' of generator 'film'",
    ),
    "weights among the options": (
        lambda f: change(f, options={"weights": "/etc/passwd"}),
        "unknown option 'weights'",
    ),
    "options of the wrong type": (lambda f: change(f, options=[1]), "options '.1.', expected a dict"),
    "a path out of the folder": (
        lambda f: change(f, files=files_of(f, **{"../x.safetensors": DIGEST})),
        "lists the file '../x.safetensors'",
    ),
    "an absolute path": (
        lambda f: change(f, files=files_of(f, **{"/etc/passwd": DIGEST})),
        "lists the file '/etc",
    ),
    "a path out by diffusers": (
        lambda f: change(f, files=files_of(f, **{"diffusers/../x.json": DIGEST})),
        "lists the file 'diffusers/../x",
    ),
    "a program": (
        lambda f: change(f, files=files_of(f, **{"modeling.py": DIGEST})),
        "lists the file 'modeling.py'",
    ),
    "a terminal's commands": (
        lambda f: change(f, files=files_of(f, **{"\x1b[2J.safetensors": DIGEST})),
        r"lists the file '\?\[2J",
    ),
    "no digest": (lambda f: change(f, files=files_of(f, **{"model.safetensors": "md5"})), "'md5' for model"),
    "no files": (lambda f: change(f, files={}), "lists no weights"),
    "two kinds of weights": (
        lambda f: change(f, files=files_of(f, **{"diffusers/config.json": DIGEST})),
        "lists no weights, or two",
    ),
    "other levels": (lambda f: change(f, levels=[["4x4", [3]]]), "says levels .* and the weights make"),
    "other images": (
        lambda f: change(f, image_shape=[1, 1 << 20, 1 << 20]),
        "says levels .* and the weights make",
    ),
    "a border without sense": (lambda f: change(f, border=-1), "Invalid border=-1"),
    "a border that leaves no image": (
        lambda f: change(f, border=1000),
        r"config.json has border 1000 for images of \(1, ",
    ),
    "another architecture's weights": (
        lambda f: change(f, generator="stylegan2"),
        "mlviews reads generators of these kinds",
    ),
    "an inverter for one that encodes": (lambda f: change(f, generator="vdvae"), "has an encoder"),
    "prompts of the user's files": (
        lambda f: change(f, generator="diffusion", options={"prompts": "/etc/passwd"}),
        "has prompts '/etc/passwd': .* list of texts",
    ),
    "a link to a device": (lambda f: link(f / "model.safetensors", "/dev/zero"), "has no model.safetensors"),
    "a link to nothing": (lambda f: link(f / "config.json", "nothing"), "No weights file|no config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_folders(name: str, copy: Path) -> None:
    damage, message = BROKEN[name]
    damage(copy)
    with pytest.raises((WeightsError, ValueError, FileNotFoundError), match=message) as caught:
        load_generator(copy)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", [3]),
        ("steps", 10**6),
        ("steps", "\x1b[2J"),
        ("timesteps", {"a": 1}),
        ("timesteps", [3, None]),
    ],
)
def test_options_of_a_folder_may_be_anything(
    option: str, value: Any, diffusion: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(diffusion, tmp_path / "d"))
    change(folder, options={option: value})
    with pytest.raises(ValueError, match=option) as caught:
        load_generator(folder)
    assert str(caught.value).isprintable()


def test_a_diffusion_model_is_what_its_settings_list(diffusion: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(diffusion, tmp_path / "d"))
    (folder / "diffusers" / "vae").mkdir()
    (folder / "diffusers" / "vae" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"vae.config.json is not among the files that config.json lists"):
        load_generator(folder)


def test_folders_of_diffusers_are_told(tmp_path: Path) -> None:
    bundled = BUNDLED / "fashion-diffusion"
    with pytest.raises(WeightsError, match=r"model of diffusers': .*load_generator\('diffusion', weights="):
        load_generator(bundled)
    shutil.copytree(bundled / "unet", tmp_path / "unet")
    with pytest.raises(WeightsError, match=r"model of diffusers'.*name: diffusion"):
        load_generator(str(tmp_path / "unet"))


def test_pickles_are_not_passed_on(tmp_path: Path) -> None:
    bundled = BUNDLED / "fashion-diffusion"
    shutil.copytree(bundled, tmp_path / "d")
    file = tmp_path / "d" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(read_tensors(file), file.with_suffix(".bin"))
    file.unlink()
    generator = load_generator("diffusion", tmp_path / "d")
    with pytest.raises(ValueError, match=r"has pickled weights .*safe_serialization=True"):
        publish(generator, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- Hugging Face --------------------------------------------------------------------------------------------


class Hub(SimpleNamespace):
    """A hub in a folder: repositories with revisions, and a cache of snapshots with links to blobs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root, calls=[])

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repo_id, private))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        repository = self.root / repo_id / "main"
        for file in repository.rglob("*"):
            name = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatchcase(name, pattern) for pattern in delete_patterns):
                file.unlink()
        shutil.copytree(folder_path, repository, dirs_exist_ok=True)
        self.calls.append(("upload", commit_message))

    def list_repo_files(self, repo_id: str, revision: str | None) -> list[str]:
        repository = self.root / repo_id / (revision or "main")
        if not repository.is_dir():
            raise LookupError(f"404: no repository {repo_id} at {revision}")
        return [file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()]

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str] | None = None, **options: Any
    ) -> str:
        snapshot = self.root / "cache" / repo_id / (revision or "main")
        if options.get("local_files_only"):
            if not snapshot.is_dir():
                raise FileNotFoundError("not in the cache")
            return str(snapshot)
        self.calls.append(("download", sorted(allow_patterns or [])))
        for name in allow_patterns or []:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            blob = self.root / f"{len(self.calls)}-{name.replace('/', '-')}"
            shutil.copyfile(self.root / repo_id / (revision or "main") / name, blob)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_up_and_down(hub: Hub, small: Path, tmp_path: Path) -> None:
    generator = load_generator(small)
    publish(generator, tmp_path / "out", push="someone/shapes", private=True)
    assert hub.calls[0] == ("create", "someone/shapes", True)
    assert 'load_generator("someone/shapes")' in (tmp_path / "out" / "README.md").read_text()
    for name in ("someone/shapes", "hf://someone/shapes"):
        copy = load_generator(name)
        assert generator_identity(copy) == generator_identity(generator)
        assert copy.inverter is not None
    # Pictures and the card are for people.
    assert hub.calls[-1] == ("download", ["config.json", "inverter.safetensors", "model.safetensors"])
    config = {"generator": "someone/shapes", "perturb": "resample", "batch_size": 2}
    assert MLViewSource.from_config(config).generator.name == "film"


def test_a_revision_is_asked_for(hub: Hub, small: Path) -> None:
    shutil.copytree(small, hub.root / "someone" / "shapes" / "v1")
    assert load_generator("someone/shapes", revision="v1").name == "film"
    assert load_generator("someone/shapes@v1").name == "film"
    config = {
        "generator": {"name": "someone/shapes", "revision": "v1"},
        "perturb": "resample",
        "batch_size": 2,
    }
    assert MLViewSource.from_config(config).generator.name == "film"
    with pytest.raises(FileNotFoundError, match=r"someone/shapes cannot be downloaded \(LookupError: 404"):
        load_generator("someone/shapes", revision="v2")


def test_without_a_network_the_earlier_download_is_taken(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small, hub.root / "someone" / "shapes" / "main")
    load_generator("someone/shapes")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "list_repo_files", refuse)
    assert load_generator("someone/shapes").name == "film"
    # Blobs under their SHA-256 are held to it, as after a download.
    weights = hub.root / "cache" / "someone" / "shapes" / "main" / "model.safetensors"
    blob = weights.resolve()
    weights.unlink()
    weights.symlink_to(blob.rename(blob.with_name(DIGEST)))
    with pytest.raises(WeightsError, match="does not have its SHA-256"):
        load_generator("someone/shapes")
    with pytest.raises(FileNotFoundError, match="someone/else cannot be downloaded"):
        load_generator("someone/else")


def test_a_new_upload_takes_the_place_of_the_old_one(hub: Hub, small: Path, diffusion: Path) -> None:
    upload.upload(diffusion, "someone/g")
    assert load_generator("someone/g").name == "fashion-diffusion"
    others = ("notes.txt", "other/table.json", "other/big.safetensors", "figure.png")
    for name in others:
        file = hub.root / "someone" / "g" / "main" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("of the user's")
    upload.upload(small, "someone/g")
    names = hub.list_repo_files("someone/g", None)
    assert not any(name.startswith("diffusers/") for name in names)
    assert set(others) <= set(names)
    assert load_generator("someone/g").name == "film"


def test_other_repositories_are_told_before_anything_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED / "fashion-diffusion", hub.root / "someone" / "ddpm" / "main")
    with pytest.raises(WeightsError, match=r"someone/ddpm is a model of diffusers'.*name: diffusion"):
        load_generator("someone/ddpm")
    (hub.root / "someone" / "bert" / "main").mkdir(parents=True)
    (hub.root / "someone" / "bert" / "main" / "vocab.txt").write_text("a")
    with pytest.raises(WeightsError, match=r"someone/bert is no published generator: it has no config.json"):
        load_generator("someone/bert")
    assert hub.calls == []


def test_a_failed_upload_leaves_the_folder(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Unauthorized\nInvalid token")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(OSError, match=r"is written, but was not uploaded to someone/g .*401.*hf auth login"):
        publish(load_generator(small), tmp_path / "out", samples=0, push="someone/g")
    assert load_generator(tmp_path / "out").name == "film"


def test_without_the_package(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs the package huggingface_hub: pip install 'mlviews\[hub\]'"
    ):
        publish(load_generator(small), tmp_path / "out", push="someone/g")
    assert not (tmp_path / "out").exists(), "said before the work"
    with pytest.raises(FileNotFoundError, match=r"someone/g; if it is a Hugging Face id.*mlviews\[hub\]"):
        load_generator("someone/g")


def test_the_clients_own_names_are_those_that_are_used() -> None:
    """The stand-in has the signatures of the package."""
    import inspect

    client = pytest.importorskip("huggingface_hub")
    for name, used in {
        "create_repo": ["repo_id", "private", "exist_ok"],
        "upload_folder": ["repo_id", "folder_path", "commit_message", "delete_patterns"],
        "snapshot_download": ["repo_id", "revision", "allow_patterns", "local_files_only"],
        "list_repo_files": ["repo_id", "revision"],
    }.items():
        assert set(used) <= set(inspect.signature(getattr(client, name)).parameters)


def test_folders_travel_as_they_are(small: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(small, tmp_path / "elsewhere"))
    for file in moved.iterdir():
        os.chmod(file, 0o400)
    assert generator_identity(load_generator(moved)) == generator_identity(load_generator(small))


def test_a_folder_that_is_a_link_is_refused(diffusion: Path, tmp_path: Path) -> None:
    shutil.copytree(diffusion, tmp_path / "g")
    network = tmp_path / "g" / "diffusers" / "unet"
    network.rename(tmp_path / "elsewhere")
    network.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"unet is not among the files that config\.json lists"):
        load_generator(tmp_path / "g")


def test_a_pickle_under_the_name_of_safetensors_is_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "g")
    pickled = tmp_path / "g" / "model.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickled)
    table = json.loads((tmp_path / "g" / "config.json").read_text())
    table["files"]["model.safetensors"] = sha256(pickled)
    (tmp_path / "g" / "config.json").write_text(json.dumps(table))
    with pytest.raises(WeightsError, match="is no safetensors file"):
        load_generator(tmp_path / "g")
