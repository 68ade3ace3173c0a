"""The folder of an export: shards that appear whole or not at all, and a manifest that is written last.

A shard is written in ``.partial/NAME``, and its files are then moved into place. Its list of checksums,
``checksums/NAME.sha256`` (as ``sha256sum`` writes it), comes after them and says that the shard is complete.
So a run may be killed at any moment, and ranks need no messages: whichever finds all lists in place writes
the manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from mlviews.checks import path_of
from mlviews.runs.files import sha256

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"


class Folder:
    """The folder of one export.

    Args:
        path: the folder; it is made if it is missing.
        settings: everything that the bytes depend on, as JSON can hold it.

    Raises:
        ValueError: if the folder holds something else, or an export with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = path_of(path, "output folder")
        self.partial = self.path / ".partial"
        self.settings = json.loads(json.dumps(settings, default=str))
        self._check()  # before anything is written to the folder
        with self.lock():
            self._check()
            if not (self.path / UNFINISHED).exists():
                self._write_json(self.path / UNFINISHED, self.settings)

    def _check(self) -> None:
        """Raise a ValueError if the folder is not this export's."""
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        # In this order, as the manifest takes the place of unfinished.json.
        settings = _read_json(self.path / UNFINISHED) or _read_json(self.path / MANIFEST)
        if settings is None:
            if entries - {self.partial.name}:
                raise ValueError(
                    f"{self.path} has files and is not an export: use another folder (--out), or empty it."
                )
            return
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise ValueError(
                    f"{self.path} holds an export with {key}={settings.get(key)!r}, not {value!r}: "
                    f"use another folder (--out), or the settings it was begun with."
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other processes out of the block.

        The system frees the lock of a process that is killed.
        """
        lock = self._locked()
        try:
            yield
        finally:
            lock.release()

    def _locked(self) -> FileLock:
        """Return the folder's lock, acquired."""
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.partial / "lock")
            # The process that finishes an export removes the lock and its folder. A FileLock (3.30 or later)
            # that waited sees that its file was removed, and takes the new one; a folder is made again here.
            with suppress(FileNotFoundError):
                lock.acquire()
                return lock

    def list_path(self, name: str) -> Path:
        """Return the path of a shard's list of checksums."""
        return self.path / "checksums" / f"{name}.sha256"

    def is_listed(self, name: str) -> bool:
        """Has the shard been written?"""
        return self.list_path(name).exists()

    def is_whole(self, name: str) -> bool:
        """Has the shard been written, and is every file still as it was then?"""
        try:
            checksums = _read_list(self.list_path(name))
            return all(sha256(self.path / file) == checksum for file, checksum in checksums.items())
        except (FileNotFoundError, ValueError):
            return False

    def keep(self, name: str) -> bool:
        """Is the shard whole? If not, it is no longer listed."""
        if self.is_whole(name):
            return True
        with self.lock():  # another rank may be reading the lists, or may have written this one since
            whole = self.is_whole(name)
            if not whole:
                self.list_path(name).unlink(missing_ok=True)
        return whole

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Write a shard.

        Yields:
            An empty folder for the shard's files. After the block they are moved into place and listed.
        """
        stage = self.partial / name
        shutil.rmtree(stage, ignore_errors=True)  # a run that was killed may have left it
        stage.mkdir(parents=True)
        yield stage
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        lines = [f"{sha256(stage / file)}  {file.as_posix()}\n" for file in files]
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).replace(self.path / file)
        shutil.rmtree(stage)  # before the shard counts as written, as no run comes back to it then
        self.list_path(name).parent.mkdir(exist_ok=True)
        self._write(self.list_path(name), "".join(lines))

    def remove(self, name: str) -> None:
        """Remove a shard, its list last."""
        with suppress(FileNotFoundError):
            for file in _read_list(self.list_path(name)):
                (self.path / file).unlink(missing_ok=True)
                with suppress(OSError):  # the folder still has files of other shards
                    (self.path / file).parent.rmdir()
        self.list_path(name).unlink(missing_ok=True)

    def finish(self, shards: Mapping[str, tuple[int, int]], **more: Any) -> list[Path]:
        """Write the manifest. Call it under the lock, and when all of these shards are listed.

        Args:
            shards: the first sample of each shard and the one after its last, by the shard's name.
            more: what the manifest says beside the settings.

        Returns:
            Every file of the export.
        """
        facts = []
        files = [self.path / MANIFEST]
        for name, (start, stop) in shards.items():
            path = self.list_path(name)
            file = path.relative_to(self.path).as_posix()
            facts.append({"start": start, "stop": stop, "checksums": file, "sha256": sha256(path)})
            files += [path, *(self.path / file for file in _read_list(path))]
        self._write_json(self.path / MANIFEST, {**self.settings, **more, "shards": facts})
        (self.path / UNFINISHED).unlink(missing_ok=True)
        return files

    def leave(self) -> None:
        """Remove what only an unfinished export needs. Call it under the lock."""
        (self.partial / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # another rank is still mending a shard
            self.partial.rmdir()

    def _write(self, path: Path, text: str) -> None:
        """Write a file that is whole or not there.

        It is written in ``.partial``, under a name that is the same for all processes: a run that goes on
        replaces what a killed one has left, and the finished export has no stray file. (The names of
        :func:`mlviews.runs.files.whole` differ from process to process.)
        """
        part = self.partial / path.name
        part.write_text(text)
        part.replace(path)

    def _write_json(self, path: Path, value: Any) -> None:
        """Write JSON to a file that is whole or not there. Call it under the lock."""
        self._write(path, json.dumps(value, indent=1) + "\n")


def verify(out: str | Path) -> int:
    """Check every file of a finished export against its checksum.

    Args:
        out: the export's folder.

    Returns:
        The number of files that were checked.

    Raises:
        FileNotFoundError: if there is no export.
        ValueError: if it is unfinished, or for the first file that is missing, damaged, or not the export's.
    """
    folder = path_of(out, "export folder")
    manifest = _read_json(folder / MANIFEST)
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder} is an unfinished export: run the same export again, which goes on where it stopped."
        )
    if manifest is None:
        raise FileNotFoundError(f"No export in {folder}: it has no {MANIFEST}.")
    listed = {folder / MANIFEST}
    for shard in manifest["shards"]:
        path = folder / shard["checksums"]
        _check_file(path, shard["sha256"], MANIFEST)
        checksums = _read_list(path)
        for file, checksum in checksums.items():
            _check_file(folder / file, checksum, shard["checksums"])
        listed |= {path, *(folder / file for file in checksums)}
    strays = sorted(path for path in folder.rglob("*") if path.is_file() and path not in listed)
    if strays:
        raise ValueError(
            f"{strays[0]} is no part of the export: remove it; "
            f"readers take whatever lies among the images for one."
        )
    return len(listed)


def _check_file(path: Path, checksum: str, list_name: str) -> None:
    """Raise a ValueError unless the file has the checksum that a list gives for it."""
    if not path.is_file():
        problem = "is missing, but has a checksum"
    elif sha256(path) != checksum:
        problem = "differs from its checksum"
    else:
        return
    raise ValueError(
        f"{path} {problem} in {list_name}: run the same export again, which writes anew what is damaged."
    )


def _read_list(path: Path) -> dict[str, str]:
    """Return the checksums of a list by the paths of their files."""
    pairs = [line.split("  ", 1) for line in path.read_text().splitlines()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is not a list of checksums.")
    return {file: checksum for checksum, file in pairs}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; None if there is no file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): use another folder (--out), or delete this one."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not of an export: use another folder (--out).")
    return content
