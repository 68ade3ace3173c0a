"""The package as it is installed: wheel and sdist, the core's dependencies, and nothing else."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HOOKS = """
import sys
from setuptools import build_meta
out = sys.argv[1]
names = [getattr(build_meta, f"build_{kind}")(out) for kind in sys.argv[2:]]
print(*names, sep="\\n")
"""
"""What pip and build call in a source tree (PEP 517)."""

PARTS = {"pydantic_core": "pydantic", "torchgen": "torch"}
"""Modules of distributions that come with another one, whose documented way they are."""


def built(tree: Path, out: Path, *kinds: str) -> list[Path]:
    """Build distributions of a source tree, without a network."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKS, str(out), *kinds], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [out / name for name in done.stdout.splitlines()[-len(kinds) :]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of a clean copy of this tree."""
    place = tmp_path_factory.mktemp("dist")
    tree = place / "tree"
    tree.mkdir()
    for name in ("mlviews", "integrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    sdist, wheel = built(tree, place, "sdist", "wheel")
    return sdist, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """A wheel's files by their names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_builds_the_same_wheel(files: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = files
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    (again,) = built(tree, tmp_path, "wheel")
    assert contents(again) == contents(wheel)


def test_the_wheel_holds_the_package_and_what_it_reads(files: tuple[Path, Path]) -> None:
    names = set(contents(files[1]))
    tracked = subprocess.run(
        ["git", "ls-files", "mlviews", "integrations"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    pictures = (".png", ".jpg")  # of pages
    expected = {
        re.sub("^integrations/", "mlviews/integrations/", name)
        for name in tracked
        if not name.endswith(pictures) and (ROOT / name).exists()
    }
    assert expected - names == set()
    extra = {name for name in names - expected if ".dist-info/" not in name}
    assert extra == set()


# -- the core's dependencies ---------------------------------------------------------------------------------


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """The top-level names that a file imports, and whether it does so as soon as it is imported."""
    tree = ast.parse(path.read_text())
    late = {
        id(node)
        for part in ast.walk(tree)
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING")
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "mlviews":
                yield top, id(node) not in late


@cache
def installed() -> Mapping[str, list[str]]:
    """The distributions of every module here."""
    return metadata.packages_distributions()


def distribution(module: str) -> str:
    """The distribution that a module comes with; of several that hold it, one that is declared."""
    candidates = installed().get(module, [module])
    names = [canonicalize_name(PARTS.get(module, name)) for name in candidates]
    return next((name for name in names if name in declared()), names[0])


def declared(extra: str | None = None) -> set[str]:
    texts = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def core_files() -> list[Path]:
    """The package without its integrations, and the page in a browser, which is an extra."""
    explorer = ROOT / "mlviews" / "explorer"
    return [path for path in (ROOT / "mlviews").rglob("*.py") if not path.is_relative_to(explorer)]


def test_the_core_imports_what_it_declares_and_declares_no_more() -> None:
    uses = {(distribution(name), is_early) for path in core_files() for name, is_early in imported(path)}
    early = {name for name, is_early in uses if is_early}
    every = {name for name, _ in uses}
    extras = set().union(*(declared(extra) for extra in PROJECT["optional-dependencies"]))
    extras.add("transformers")  # for prompts that are not encoded yet; the error names it
    assert early <= declared()
    assert declared() <= every, "nothing is pulled in that the core does not import"
    assert every <= declared() | extras


# -- an empty environment ------------------------------------------------------------------------------------


def closure(texts: list[str]) -> set[str]:
    """The distributions that these requirements ask for, and all that those ask for."""
    waiting = [Requirement(text) for text in texts]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.distribution(name).requires or []:
            part = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if part.marker is None or any(map(part.marker.evaluate, environments)):
                waiting.append(part)
    return {name for name, _ in seen}


def show(distribution: metadata.Distribution, folder: Path) -> None:
    """Link an installed distribution's files into a folder, as far as they are within its own."""
    for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        target = Path(str(distribution.locate_file(top)))
        if not (folder / top).exists() and not top.endswith(".pth"):
            (folder / top).symlink_to(target)


@pytest.fixture(scope="module")
def python(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and links to just what it requires.

    An installation of torch takes gigabytes; a link does not.
    """
    place = tmp_path_factory.mktemp("empty")
    venv.create(place, with_pip=False)
    interpreter = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    for name in closure(PROJECT["dependencies"]):
        show(metadata.distribution(name), packages)
    # With --no-index, whatever the wheel requires has to be there.
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--no-index",
        str(files[1]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return interpreter


def run(python: Path, *arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-I", *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_first_example_runs_in_an_empty_environment(python: Path, tmp_path: Path) -> None:
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(
        example.replace("2_560", "256")
        + "\nimport sys\nprint(mlviews.__file__)\nassert 'lightly' not in sys.modules\n"
    )
    *losses, file = run(python, "example.py", cwd=tmp_path).split("\n")[:-1]
    assert len(losses) == 2
    assert all(re.fullmatch(r"\d\.\d\d nats", loss) for loss in losses)
    assert Path(file).is_relative_to(python.parents[1]), "the installed package, not this tree"


def test_every_core_module_imports_without_an_extra(python: Path, tmp_path: Path) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in core_files()
        if path.stem != "__main__"
    ]
    code = "import importlib, sys\nprint(len([importlib.import_module(name) for name in sys.argv[1:]]))"
    assert run(python, "-c", code, *modules, cwd=tmp_path).strip() == str(len(modules))


def test_what_is_not_declared_is_not_there(python: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u, sys\nprint([n for n in sys.argv[1:] if u.find_spec(n)])"
    extras = [
        "lightly",
        "sklearn",
        "torchvision",
        "diffusers",
        "huggingface_hub",
        "datasets",
        "gradio",
        "pytest",
    ]
    assert run(python, "-c", code, *extras, cwd=tmp_path).strip() == "[]"


def test_the_command_works_and_extras_are_named(python: Path, tmp_path: Path) -> None:
    command = str(python.with_name("mlviews"))
    listed = run(python, command, "generators", cwd=tmp_path)
    assert "fashion-nvae" in listed
    run(python, command, "views", "--out", "views.png", cwd=tmp_path)
    assert (tmp_path / "views.png").exists()
    code = """
import mlviews
try:
    mlviews.load_generator("fashion-diffusion")
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'pip install "mlviews[diffusion]"' in run(python, "-c", code, cwd=tmp_path)
