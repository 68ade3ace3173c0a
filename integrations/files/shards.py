"""An export's folder: shards that appear whole or not at all, each with a list of checksums, and the manifest, written last.

A shard is written in ``.partial/NAME`` and its files are moved into place; its list ``checksums/NAME.sha256`` (as
``sha256sum`` writes it) comes after them and says that it is done. So a run may be killed at any moment, and ranks need no
messages: whichever finds all lists there writes the manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlviews.checks import path_of

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"


class Folder:
    """The folder of one export.

    Args:
        path: of the folder, which need not be there.
        settings: what its bytes depend on, as JSON can hold it.

    Raises:
        ValueError: if there is something else, or an export with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = path_of(path, "output folder")
        self.partial = self.path / ".partial"
        self.settings = json.loads(json.dumps(settings, default=str))
        self._check()  # before anything is written there
        with self.lock():
            self._check()
            if not (self.path / UNFINISHED).exists():
                self.write_json(UNFINISHED, self.settings)

    def _check(self) -> None:
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        found = _read_json(self.path / UNFINISHED) or _read_json(self.path / MANIFEST)  # in this order: one becomes the other
        if found is None and entries - {self.partial.name}:
            raise ValueError(f"{self.path} has files and is not an export: use another folder (--out), or empty it.")
        for key, value in self.settings.items():
            if found is not None and found.get(key) != value:
                raise ValueError(
                    f"{self.path} holds an export with {key}={found.get(key)!r}, not {value!r}: "
                    f"use another folder (--out), or the settings it was begun with."
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else is in here. The system frees it when a process is killed."""
        with self._locked():
            yield

    def _locked(self) -> IO[str]:
        path = self.partial / "lock"
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever finishes removes the file: then take the new one
                file = open(path, "w")  # noqa: SIM115 (closed by lock)
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file

    def list_path(self, name: str) -> Path:
        """The checksums of a shard."""
        return self.path / "checksums" / f"{name}.sha256"

    def is_listed(self, name: str) -> bool:
        """Has the shard been written?"""
        return self.list_path(name).exists()

    def is_whole(self, name: str) -> bool:
        """Has it been written, and is every file still as it was then?"""
        try:
            sums = _read_list(self.list_path(name))
            return all(_sha256(self.path / file) == expected for file, expected in sums.items())
        except (FileNotFoundError, ValueError):
            return False

    def keep(self, name: str) -> bool:
        """Is a shard whole? If not, it is no longer listed."""
        if self.is_whole(name):
            return True
        with self.lock():  # another rank may be reading the lists, or have written this one since
            whole = self.is_whole(name)
            if not whole:
                self.list_path(name).unlink(missing_ok=True)
        return whole

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """An empty folder for the shard's files; at the end of the ``with`` block they are moved into place and listed."""
        stage = self.partial / name
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        stage.mkdir(parents=True)
        yield stage
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        lines = [f"{_sha256(stage / file)}  {file.as_posix()}\n" for file in files]
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).replace(self.path / file)
        shutil.rmtree(stage)  # before the shard counts as done: nobody comes back to it then
        part = self.partial / f"{name}.sha256"
        part.write_text("".join(lines))
        self.list_path(name).parent.mkdir(exist_ok=True)
        part.replace(self.list_path(name))

    def remove(self, name: str) -> None:
        """Take a shard away, its list last."""
        with suppress(FileNotFoundError):
            for file in _read_list(self.list_path(name)):
                (self.path / file).unlink(missing_ok=True)
                with suppress(OSError):  # others are left in it
                    (self.path / file).parent.rmdir()
        self.list_path(name).unlink(missing_ok=True)

    def finish(self, shards: Mapping[str, tuple[int, int]], **more: Any) -> list[Path]:
        """Write the manifest: all of these shards (name -> range of samples) are there. To be called under the lock.

        Returns:
            Every file of the export.
        """
        facts, files = [], [self.path / MANIFEST]
        for name, (start, stop) in shards.items():
            sums = self.list_path(name)
            facts.append({"start": start, "stop": stop, "checksums": sums.relative_to(self.path).as_posix(), "sha256": _sha256(sums)})
            files += [sums, *(self.path / file for file in _read_list(sums))]
        self.write_json(MANIFEST, {**self.settings, **more, "shards": facts})
        (self.path / UNFINISHED).unlink(missing_ok=True)
        return files

    def leave(self) -> None:
        """Take away what only an unfinished export needs. To be called under the lock."""
        (self.partial / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # another rank is still mending a shard
            self.partial.rmdir()

    def write_json(self, name: str, value: Any) -> None:
        """Write a file that is whole or not there. To be called under the lock."""
        part = self.partial / name
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(self.path / name)


def verify(out: str | Path) -> int:
    """Check every file of a finished export against its checksum.

    Args:
        out: the export's folder.

    Returns:
        How many files were checked.

    Raises:
        FileNotFoundError: if there is no export.
        ValueError: if it is unfinished, or for the first file that is missing, damaged, or does not belong there.
    """
    path = path_of(out, "export folder")
    manifest = _read_json(path / MANIFEST)
    if (path / UNFINISHED).exists():
        raise ValueError(f"{path} is an unfinished export: run the same export again, which goes on where it stopped.")
    if manifest is None:
        raise FileNotFoundError(f"No export in {path}: it has no {MANIFEST}.")
    known = {path / MANIFEST}
    for shard in manifest["shards"]:
        sums = path / shard["checksums"]
        _expect(sums, shard["sha256"], MANIFEST)
        files = _read_list(sums)
        for file, expected in files.items():
            _expect(path / file, expected, shard["checksums"])
        known |= {sums, *(path / file for file in files)}
    strays = sorted(file for file in path.rglob("*") if file.is_file() and file not in known)
    if strays:
        raise ValueError(f"{strays[0]} is no part of the export: remove it; readers take whatever lies among the images for one.")
    return len(known)


def _expect(path: Path, expected: str, where: str) -> None:
    wrong = "differs from its checksum" if path.is_file() else "is missing, but has a checksum"
    if not path.is_file() or _sha256(path) != expected:
        raise ValueError(f"{path} {wrong} in {where}: run the same export again, which writes anew what is damaged.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_list(path: Path) -> dict[str, str]:
    """The checksums of files, by their paths."""
    pairs: Sequence[list[str]] = [line.split("  ", 1) for line in path.read_text().splitlines()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is not a list of checksums.")
    return {file: digest for digest, file in pairs}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file, None if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): use another folder (--out), or delete this one.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of an export: use another folder (--out).")
    return found
