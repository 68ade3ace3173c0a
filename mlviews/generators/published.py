"""A published generator: a folder with its settings, its weights, and what belongs to it.

``config.json`` names an architecture of the registry, its options, and the SHA-256 of every file that is
read. It is a table of settings like any other: nothing in it is executed, and no file is read that is not one
of the few that such a folder has. :func:`mlviews.publish` writes it, :func:`mlviews.load_generator` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlviews.checks import integer
from mlviews.errors import WeightsError, did_you_mean, listing
from mlviews.generators.base import MLVGM
from mlviews.generators.diffusion.folder import MODEL_INDEX
from mlviews.runs.files import sha256
from mlviews.weights.download import fetch_folder
from mlviews.weights.files import printable
from mlviews.weights.tables import read_table

FORMAT, VERSION = "mlviews.generator", 1

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INVERTER, PROMPTS = "inverter.safetensors", "prompts.safetensors"

DIFFUSERS = "diffusers"
"""The folder within that is the weights of a diffusion model."""

KEYS = ("format", "version", "generator", "options", "border", "levels", "image_shape", "license", "files")
"""The keys of ``config.json``, all of which it has."""

_FILE = re.compile(
    rf"{re.escape(WEIGHTS)}|{re.escape(INVERTER)}|{re.escape(PROMPTS)}"
    rf"|{DIFFUSERS}/(\w[\w-]*/)?\w[\w.-]*\.(json|txt|safetensors)",
    re.ASCII,
)
"""The files that are read, by their paths in the folder; none leads out of it."""

LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
"""What names of licenses look like, as Hugging Face has them."""

_NOT_WHOLE = "the folder is not whole, or was changed; copy or download it again"


@dataclass(frozen=True)
class Published:
    """What the ``config.json`` of a published generator says."""

    folder: Path
    generator: str  # a name of the registry, if it is one
    options: dict[str, Any]  # of load_generator
    border: int  # black pixels on each side of the images that it was trained on
    levels: list[Any]  # name and shape of each, coarse to fine
    image_shape: list[Any]
    license: str | None  # of the weights, as Hugging Face names it; None if it is not known
    files: dict[str, str]  # SHA-256 by the file's path in the folder

    @property
    def config(self) -> Path:
        """The file with the settings, for messages."""
        return self.folder / CONFIG

    @property
    def weights(self) -> Path:
        """The file of weights, or the folder of a diffusion model's."""
        return self.folder / (WEIGHTS if WEIGHTS in self.files else DIFFUSERS)

    @property
    def inverter(self) -> Path | None:
        """The inverter's file, if there is one."""
        return self.folder / INVERTER if INVERTER in self.files else None

    def check_files(self) -> None:
        """Raise a WeightsError unless the files are those that were published."""
        for name, digest in self.files.items():
            file = self.folder / name
            if not file.is_file():
                raise WeightsError(f"{self.folder} has no {name}, which {CONFIG} lists: {_NOT_WHOLE}.")
            if sha256(file) != digest:
                raise WeightsError(f"{file} does not have the SHA-256 of {CONFIG}: {_NOT_WHOLE}.")
            if file.suffix == ".safetensors" and not _is_safetensors(file):
                raise WeightsError(f"{file} is no safetensors file: publish it anew by mlviews.publish.")
        if WEIGHTS in self.files:
            return
        # A diffusion model is read by what is in its folder; a folder that is a link would lead out of it.
        root = self.folder / DIFFUSERS
        for file in sorted([root, *root.rglob("*")]):
            name = file.relative_to(self.folder).as_posix()
            if file.is_dir() and not file.is_symlink():
                continue
            if file.is_dir() or name not in self.files:
                raise WeightsError(f"{file} is not among the files that {CONFIG} lists: {_NOT_WHOLE}.")

    def check(self, generator: MLVGM) -> None:
        """Raise a WeightsError if the weights make another generator than the settings say."""
        levels, image_shape = _description(generator)
        if (levels, image_shape) != (self.levels, self.image_shape):
            raise WeightsError(
                f"{self.config} says levels {printable(self.levels, 120)} and images "
                f"{printable(self.image_shape, 40)}, and the weights make {printable(levels, 120)} and "
                f"{image_shape}: {_NOT_WHOLE}."
            )


def _is_safetensors(file: Path) -> bool:
    """Say whether a file begins as safetensors do: other kinds of weights are told by their content too."""
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def read(folder: Path) -> Published:
    """Return what a folder says of the generator in it; weights are not looked at yet.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is a file of weights.
        mlviews.WeightsError: if it is a folder of something else, or its settings are damaged or hostile.
    """
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file: a published generator is a folder. For a file of weights, name its "
            "architecture: load_generator(NAME, weights=FILE)."
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No generator folder {folder}: give one that mlviews.publish wrote, or hf://owner/name for a "
            "Hugging Face repository."
        )
    _check_names([file.name for file in folder.iterdir()], str(folder))
    table = read_table(folder / CONFIG)
    if "_class_name" in table:
        raise WeightsError(_hint(str(folder)))
    if table.get("format") != FORMAT:
        declared = printable(table.get("format", "no format"), 80)
        raise WeightsError(
            f"{folder / CONFIG} holds {declared!r}, not {FORMAT!r}: it is no generator that mlviews.publish "
            "wrote."
        )
    if table.get("version") != VERSION:
        version = printable(table.get("version"), 40)
        raise WeightsError(
            f"{folder / CONFIG} has version {version}, and this mlviews reads {VERSION}: take a newer one."
        )
    for name in table:
        if name not in KEYS:
            raise WeightsError(
                f"{folder / CONFIG} has the unknown key {printable(name, 40)!r}: there are {listing(KEYS)}."
                f"{did_you_mean(name, KEYS)}"
            )
    for name in KEYS:
        if name not in table:
            raise WeightsError(f"{folder / CONFIG} has no {name!r}: {_NOT_WHOLE}.")
    return _checked(folder, table)


def _checked(folder: Path, table: Mapping[str, Any]) -> Published:
    """Return the settings of a table with all keys, if their values are such settings."""
    kinds = {"generator": str, "options": dict, "levels": list, "image_shape": list, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(table[name], kind):
            raise WeightsError(
                f"{folder / CONFIG} has {name} {printable(table[name], 40)!r}, expected a {kind.__name__}."
            )
    try:
        border = integer("border", table["border"], 0)
    except ValueError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from error
    license = table["license"]
    if license is not None and not (isinstance(license, str) and LICENSE_NAME.fullmatch(license)):
        raise WeightsError(
            f"{folder / CONFIG} has license {printable(license, 40)!r}, expected a name or null."
        )
    files = dict(table["files"])
    for name, digest in files.items():
        if not _FILE.fullmatch(name):
            raise WeightsError(
                f"{folder / CONFIG} lists the file {printable(name, 80)!r}: there are {WEIGHTS}, {INVERTER}, "
                f"{PROMPTS}, and {DIFFUSERS}/ with a diffusion model."
            )
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise WeightsError(
                f"{folder / CONFIG} has {printable(digest, 80)!r} for {name}, expected a SHA-256 in hex "
                "digits."
            )
    has_folder = any(name.startswith(f"{DIFFUSERS}/") for name in files)
    if has_folder == (WEIGHTS in files):
        raise WeightsError(f"{folder / CONFIG} lists no weights, or two kinds: {WEIGHTS} or {DIFFUSERS}/.")
    options = dict(table["options"])
    prompts = options.get("prompts")
    if isinstance(prompts, str):
        # A path would have any file of the user's read.
        if prompts != PROMPTS or PROMPTS not in files:
            raise WeightsError(
                f"{folder / CONFIG} has prompts {printable(prompts, 80)!r}: they are a list of texts, or the "
                f"file {PROMPTS} in the folder."
            )
        options["prompts"] = str(folder / PROMPTS)
    levels, image_shape = table["levels"], table["image_shape"]
    return Published(folder, table["generator"], options, border, levels, image_shape, license, files)


def fetch(reference: str) -> Path:
    """Return the local copy of a published generator at Hugging Face, which is downloaded unless it is there.

    Args:
        reference: ``owner/name``, or ``hf://owner/name``, each followed by ``@revision`` if a certain one is
            meant.

    Raises:
        ValueError, ModuleNotFoundError, FileNotFoundError: as :func:`mlviews.weights.download.fetch_folder`.
        mlviews.WeightsError: likewise, or if the repository holds something else.
    """

    def needed(names: list[str]) -> list[str]:
        _check_names(names, reference)
        return [name for name in names if name == CONFIG or _FILE.fullmatch(name)]

    return fetch_folder(reference, needed)


def _check_names(names: list[str], place: str) -> None:
    """Raise a WeightsError if a folder with these files, or a repository, is no published generator."""
    if MODEL_INDEX in names:
        raise WeightsError(_hint(place))
    if CONFIG not in names:
        raise WeightsError(
            f"{place} is no published generator: it has no {CONFIG}. For a file of weights, name its "
            "architecture: load_generator(NAME, weights=FILE)."
        )


def _hint(place: str) -> str:
    return (
        f"{place} is a model of diffusers': load it by load_generator('diffusion', weights={place!r}), in a "
        f"configuration by generator: {{name: diffusion, weights: {place}}}."
    )


def write(
    folder: Path, generator: MLVGM, options: Mapping[str, Any], license: str | None, names: list[str]
) -> Published:
    """Write a folder's ``config.json``, and return what it says.

    Args:
        folder: the folder, with all other files that are read.
        generator: the generator that they make.
        options: those to load it with, as JSON can hold them.
        license: the name of its license, if it is known.
        names: the files' paths in the folder.
    """
    levels, image_shape = _description(generator)
    table = {
        "format": FORMAT,
        "version": VERSION,
        "generator": generator.name,
        "options": dict(options),
        "border": generator.border,
        "levels": levels,
        "image_shape": image_shape,
        "license": license,
        "files": {name: sha256(folder / name) for name in sorted(names)},
    }
    text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return read(folder)


def _description(generator: MLVGM) -> tuple[list[Any], list[int]]:
    """Return names and shapes of the levels, and the images' shape, as JSON holds them."""
    return [[level.name, list(level.shape)] for level in generator.levels], list(generator.image_shape)
