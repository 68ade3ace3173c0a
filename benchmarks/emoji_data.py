"""Emoji as four vendors draw them: a labelled set of color images, held out by emoji.

``python benchmarks/emoji_data.py --out DIR``

Downloads the packages ``emoji-datasource-*`` of the npm registry, checks them, and writes folders of PNG
files, ``train`` and ``test``, each with one folder a group, which every command of mlviews takes as it is.
A file is named after the emoji's code points and the vendor: ``1f600_google.png``. No picture is part of this
project: each vendor's are under that vendor's terms (``LICENSES``), which are written beside them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from PIL import Image

from mlviews.runs.files import whole, whole_folder
from mlviews.weights.download import transfer
from mlviews.zoo.training import start

REGISTRY = "https://registry.npmjs.org"
VERSION = "16.0.0"
INTEGRITY = {  # of the archives of this version, as the registry states it (Subresource Integrity)
    "apple": "sha512-dVYjsK0FnCry9F+PBtnivhG2K0xdwlmqYaSgiUtztUdA"
    "GPYiHYhZcVKvNBqC791g2qyEcFNTBO6utg4eQ3uLTw==",
    "facebook": "sha512-b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZ"
    "S8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==",
    "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQ"
    "Qlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4"
    "pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
VENDORS = tuple(INTEGRITY)
LICENSES = """\
What may be done with these files, as the README of the packages states it (version 16.0.0):

- Apple images, Copyright (c) Apple Inc., are not licensed for commercial usage.
- Android/Google/Noto images are available under the Apache License 2.0.
- Twitter images are available under the Creative Commons Attribution 4.0 license.
- Facebook images, (c) Facebook, Inc., have no clear licensing.

So keep the folders to yourself. The names, groups and code points are emoji-datasource's:

"""
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
"""Unicode's groups, without "Component": swatches of skin tones and hair, which are no emoji of their own."""

SIDE = 32
HELD_OUT = 0.2  # of the families of each group


# -- families ------------------------------------------------------------------------------------------------

JOINER = 0x200D
TONES = frozenset(range(0x1F3FB, 0x1F400))
IGNORED = TONES | {
    0xFE0F,  # asks for the colored drawing
    0x2640, 0x2642,  # woman, man
    0x27A1, 0x2194, 0x2195,  # directions
    0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3,  # hair
}  # fmt: skip
ALIKE = {  # what differs by gender only
    point: points[0]
    for points in (
        (0x1F9D1, 0x1F468, 0x1F469),  # person, man, woman
        (0x1F9D2, 0x1F466, 0x1F467),  # child, boy, girl
        (0x1F9D3, 0x1F474, 0x1F475),  # older person
        (0x1FAC5, 0x1F934, 0x1F478),  # with a crown
        (0x1F385, 0x1F936),  # Santa and Mrs. Claus
        (0x1F57A, 0x1F483),  # dancing
        (0x1F930, 0x1FAC3, 0x1FAC4),  # pregnant
    )
    for point in points
}
PERSON = 0x1F9D1
FAMILY = "family"  # Unicode's subgroup of couples and families


def family(code_points: Iterable[int], subgroup: str = "") -> tuple[int, ...] | str:
    """Return what the variants of one emoji have in common.

    Variants differ in skin tone, gender, hair or direction, or are joined to something by ZWJ (a polar bear
    is a bear joined to a snowflake). People joined to an object are a family for each object: a cook and an
    astronaut have no more in common than two faces.

    Args:
        code_points: of the emoji.
        subgroup: Unicode's; couples and families are one family.
    """
    if subgroup == FAMILY:
        return FAMILY
    parts: list[tuple[int, ...]] = [()]
    for point in code_points:
        if point == JOINER:
            parts.append(())
        elif point not in IGNORED or parts == [()]:  # an arrow, or a sign of its own
            parts[-1] = (*parts[-1], ALIKE.get(point, point))
    joined = [part for part in parts if part]
    if joined[0] == (PERSON,):
        return sum(joined, ())
    return joined[0]


class Emoji(NamedTuple):
    """An emoji of ``emoji.json``, without its variants in skin tone."""

    code: str  # code points in hex digits, joined by hyphens
    group: str
    family: tuple[int, ...] | str
    order: int  # Unicode's
    file: str
    vendors: frozenset[str]  # that draw it


def read_emoji(content: bytes) -> list[Emoji]:
    """Return the emoji of ``emoji.json`` that belong to a group, in Unicode's order.

    Raises:
        ValueError: if it is something else.
    """
    try:
        entries = json.loads(content)
        emoji = [_emoji(entry) for entry in entries if entry["category"] in GROUPS]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"emoji.json is not the list of emoji-datasource {VERSION} ({type(error).__name__}: {error}): "
            "download the packages again."
        ) from error
    return sorted(emoji, key=lambda entry: entry.order)


def _emoji(entry: Mapping[str, Any]) -> Emoji:
    code = entry["unified"].lower()
    return Emoji(
        code,
        entry["category"],
        family([int(point, 16) for point in code.split("-")], entry.get("subcategory", "")),
        entry["sort_order"],
        entry["image"],
        frozenset(vendor for vendor in VENDORS if entry.get(f"has_img_{vendor}")),
    )


def with_twins(emoji: Iterable[Emoji], pictures: Mapping[str, Mapping[str, bytes]]) -> list[Emoji]:
    """Return the emoji with families joined that some vendor draws alike to the pixel.

    Norway's flag is that of two other code points too, and a vendor's man and woman may be one picture.

    Args:
        emoji: the emoji.
        pictures: by vendor and file, as bytes that are equal for equal pictures.
    """
    emoji = list(emoji)
    first: dict[Any, Any] = {}  # the family that a picture was seen in first
    root: dict[Any, Any] = {entry.family: entry.family for entry in emoji}

    def resolve(key: Any) -> Any:
        while root[key] != key:
            key = root[key]
        return key

    for entry in emoji:
        for vendor in entry.vendors:
            twin = first.setdefault((vendor, pictures[vendor][entry.file]), entry.family)
            root[resolve(entry.family)] = resolve(twin)
    return [entry._replace(family=resolve(entry.family)) for entry in emoji]


class Split(NamedTuple):
    """Which emoji are trained on, and which are held out."""

    train: list[Emoji]
    test: list[Emoji]


def split(emoji: Iterable[Emoji]) -> Split:
    """Hold out a fifth of the families of each group, chosen by a hash of the family.

    A held-out family is tested by its first emoji that all vendors draw; its other variants are not used, so
    that no group is tested by the variants of a few emoji, and no query's answer has a twin.
    """
    families: dict[Any, list[Emoji]] = {}
    for entry in emoji:
        families.setdefault(entry.family, []).append(entry)
    by_group: dict[str, list[Any]] = {}
    for key, members in families.items():
        by_group.setdefault(members[0].group, []).append(key)
    held_out = set()
    for keys in by_group.values():
        held_out.update(sorted(keys, key=_hash)[: round(HELD_OUT * len(keys))])
    test = []
    for key in held_out:
        drawn_by_all = [member for member in families[key] if len(member.vendors) == len(VENDORS)]
        test += drawn_by_all[:1]
    train = [entry for key, members in families.items() if key not in held_out for entry in members]
    return Split(*(sorted(part, key=lambda entry: entry.order) for part in (train, test)))


def _hash(key: tuple[int, ...] | str) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


# -- packages ------------------------------------------------------------------------------------------------


def package(vendor: str) -> str:
    """Return the name of a vendor's package."""
    return f"emoji-datasource-{vendor}"


def download(vendor: str, folder: Path, integrity: str) -> Path:
    """Return a vendor's archive, which is downloaded unless it is there, and checked in either case.

    Raises:
        ValueError: if it is not what the registry published under this version.
        OSError: if it cannot be downloaded or written.
    """
    name = package(vendor)
    path = folder / f"{name}-{VERSION}.tgz"
    if not path.exists():
        url = f"{REGISTRY}/{name}/-/{path.name}"
        with whole(path) as part:
            try:
                transfer(url, part)
            except Exception as error:  # urllib's, the socket's
                raise OSError(f"{url} cannot be downloaded ({error}): try again.") from error
    check(path, integrity)
    return path


def check(path: Path, integrity: str) -> None:
    """Compare an archive with its published digest, ``sha512-`` and Base64.

    Raises:
        ValueError: if it is another one.
    """
    with path.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if f"sha512-{digest}" != integrity:
        raise ValueError(
            f"{path} has the digest sha512-{digest}, and what the registry published has {integrity}: delete "
            "it, and download it again."
        )


class Package(NamedTuple):
    """What is used of a vendor's archive."""

    emoji: bytes  # emoji.json
    license: bytes  # of emoji.json
    images: dict[str, bytes]  # PNG files of 64 pixels, by name


def read_package(path: Path, vendor: str) -> Package:
    """Read the files of an archive that are needed; nothing is unpacked to disk.

    Raises:
        ValueError: if one is missing.
    """
    folder = f"package/img/{vendor}/64/"
    needed = {"package/emoji.json", "package/LICENSE"}
    files = dict(_files(path, folder, needed))
    missing = sorted(needed - files.keys())
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: it is no archive of {package(vendor)}.")
    images = {
        name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)
    }
    return Package(files["package/emoji.json"], files["package/LICENSE"], images)


def _files(path: Path, folder: str, names: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (member.name in names or member.name.startswith(folder)):
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()


# -- folders -------------------------------------------------------------------------------------------------


def drawn(content: bytes) -> Image.Image:
    """Return a PNG file's picture on white, at 32 pixels.

    White is what emoji are designed for: outlines and symbols are dark, and would be lost on black, which is
    what most readers make of a transparent background.
    """
    picture = Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def slug(group: str) -> str:
    """Return a group's name as a folder's: ``smileys-emotion``."""
    return group.lower().replace(" & ", "-")


def write(packages: Mapping[str, Package], out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the folders, whole or not at all, with the licenses and a manifest; return the manifest.

    Args:
        packages: by vendor.
        out: the folder.
        facts: what the manifest says besides the number of images of each group.
    """
    pictures = {
        vendor: {file: drawn(content) for file, content in package.images.items()}
        for vendor, package in packages.items()
    }
    as_bytes = {
        vendor: {file: picture.tobytes() for file, picture in files.items()}
        for vendor, files in pictures.items()
    }
    data = next(iter(packages.values()))  # whose emoji.json is that of every vendor
    emoji = read_emoji(data.emoji)
    parts = split(with_twins(emoji, as_bytes))
    manifest: dict[str, Any] = {**facts, "emoji": {}, "images": {}}
    with whole_folder(out) as folder:
        for name, members in parts._asdict().items():
            counts = dict.fromkeys(map(slug, GROUPS), 0)
            for entry in members:
                target = folder / name / slug(entry.group)
                target.mkdir(parents=True, exist_ok=True)
                for vendor in sorted(entry.vendors):
                    pictures[vendor][entry.file].save(target / f"{entry.code}_{vendor}.png")
                    counts[slug(entry.group)] += 1
            manifest["emoji"][name] = len(members)
            manifest["images"][name] = counts
        (folder / "LICENSES.txt").write_text(LICENSES + data.license.decode(errors="replace"))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; it is replaced if it is there.")],
    archives: Annotated[Path, typer.Option(help="Folder for the downloaded packages.")] = Path(
        "runs/emoji-packages"
    ),
) -> None:
    """Download, check, and write the folders of images."""
    packages = {}
    for vendor, integrity in INTEGRITY.items():
        print(f"{package(vendor)} {VERSION}")
        packages[vendor] = read_package(download(vendor, archives, integrity), vendor)
    facts = {"version": VERSION, "integrity": INTEGRITY}
    manifest = write(packages, out, facts)
    for name, counts in manifest["images"].items():
        print(f"{name}: {sum(counts.values()):,} pictures of {manifest['emoji'][name]:,} emoji")
    print(out, out / "LICENSES.txt", sep="\n")


if __name__ == "__main__":
    start(main)
