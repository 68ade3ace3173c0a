"""Reading a folder of an export, which may hold anything: links, pipes, damaged lists, paths out of it."""

from __future__ import annotations

import json
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

_LONGEST = 300  # characters of a message that come from a file


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted; nothing if it is no folder, or is being removed."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


def refuse_link(path: Path, *, folder: bool = False, links: int | None = None) -> None:
    """Raise a ValueError unless the path is an ordinary file or folder, or is not there.

    Args:
        path: it is not followed.
        folder: whether it must be a folder.
        links: how many names a file may have; None: any number.
    """
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return
    problem = ""
    if stat.S_ISLNK(facts.st_mode):
        problem = "is a symbolic link"
    elif not (stat.S_ISDIR(facts.st_mode) or (stat.S_ISREG(facts.st_mode) and not folder)):
        problem = "is no folder" if folder else "is no ordinary file or folder"
    elif links is not None and stat.S_ISREG(facts.st_mode) and facts.st_nlink > links:
        problem = "is a file that has another name too"
    if problem:
        raise ValueError(
            f"{one_line(str(path))} {problem}, which no export makes: "
            f"use another folder (--out), or remove it."
        )


def one_line(text: str) -> str:
    """Return a text that may come from a file so that a message can show it."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= _LONGEST else f"{printable[:_LONGEST]}…"


def read_list(path: Path) -> dict[str, str]:
    """Return the checksums of a list by the paths of their files, all of them within the export."""
    try:
        pairs = [line.split("  ", 1) for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is not a list of checksums.")
    return {inside(file): checksum for checksum, file in pairs}


def inside(file: str) -> str:
    """Return a path that a file gives, if it stays within the export; else raise a ValueError."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\0" in file:
        raise ValueError(f"{one_line(file)!r} is not within the export that lists it.")
    return file


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; None if there is no file."""
    refuse_link(path)  # a FIFO would be waited for
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({one_line(str(error))}): use another folder (--out), or delete this one."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not of an export: use another folder (--out).")
    return content
