"""The folder of an export: shards that appear whole or not at all, and a manifest that is written last.

A process writes a shard in a stage of its own, ``.partial/NAME.PID.TOKEN``, whose lock it holds as long as it
lives. Under the folder's lock the files are then moved into place, unless another process has been faster.
The shard's list of checksums, ``checksums/NAME.sha256`` (as ``sha256sum`` writes it), comes last and says
that the shard is complete. So a run may be killed at any moment, two runs may work in one folder, and ranks
need no messages: whichever finds all lists in place writes the manifest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlviews.checks import path_of
from mlviews.integrations.files.formats import FORMATS, lacking
from mlviews.integrations.files.reading import entries, one_line, read_json, read_list, refuse_link
from mlviews.runs.checkpoint import differences
from mlviews.runs.files import sha256

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
PACKED = "views"  # the name of the one file that ffcv's shards become
VIEWS, TRANSFORMED = "views", "transformed"  # settings that hold numbers which follow from samples


class Folder:
    """The folder of one export.

    Args:
        path: the folder; it is made if it is missing.
        settings: everything that the bytes depend on, as JSON can hold it.

    Raises:
        ValueError: if the folder holds something else, an export with other settings, or links and the like
            that somebody else has put where an export writes.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = path_of(path, "output folder")
        self.partial = self.path / ".partial"
        self.settings = json.loads(json.dumps(settings, default=str))
        total, size = settings["num_samples"], settings["shard_size"]
        # The samples of each shard, by its name.
        self.shards = {
            f"shard-{number:06d}": range(start, min(start + size, total))
            for number, start in enumerate(range(0, total, size))
        }
        self._lock: FileLock | None = None
        self._check()  # before anything is written to the folder
        with self.lock():
            self._check()
            self._sweep()
            if not (self.path / UNFINISHED).exists():
                self._write_json(self.path / UNFINISHED, self.settings)

    def _check(self) -> None:
        """Raise a ValueError if the folder is not this export's."""
        self._refuse_links()
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        # In this order, as the manifest takes the place of unfinished.json.
        settings = read_json(self.path / UNFINISHED) or read_json(self.path / MANIFEST)
        if settings is None:
            if entries - {self.partial.name}:
                raise ValueError(
                    f"{self.path} has files and is not an export: use another folder (--out), or empty it."
                )
            return
        if settings.get("export") != self.settings["export"]:
            raise ValueError(
                f"{self.path} holds an export of an earlier or later version of mlviews, which knows its "
                f"generator by other facts: use another folder (--out), or that version."
            )
        # The manifest says more than the settings.
        changed = differences({key: settings.get(key) for key in self.settings}, self.settings)
        if changed:
            raise ValueError(
                f"{self.path} holds an export with {one_line(_told(changed[0]))}: "
                f"use another folder (--out), or the settings it was begun with."
            )

    def _refuse_links(self) -> None:
        """Raise a ValueError for what would be written through, or waited for: links, FIFOs, devices.

        Nothing is opened for it. Another process may remove entries meanwhile.
        """
        for path in entries(self.path):
            refuse_link(path)
        refuse_link(self.path / "checksums", folder=True)
        refuse_link(self.partial, folder=True)
        for path in entries(self.path / "checksums"):
            refuse_link(path)
        for folder, folders, files in os.walk(self.partial):
            for name in (*folders, *files):
                refuse_link(Path(folder, name), links=1)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other processes out of the block. A block within the block is fine.

        The system frees the lock of a process that is killed.
        """
        if self._lock is not None:
            yield
            return
        self._lock = self._acquired()
        try:
            yield
        finally:
            lock, self._lock = self._lock, None
            lock.release()

    def _acquired(self) -> FileLock:
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
        """Has the shard been written with all its samples, and is every file still as it was then?"""
        try:
            checksums = read_list(self.list_path(name))
            for file, checksum in checksums.items():
                path = self.path / file
                if not path.is_file() or sha256(path) != checksum:
                    return False
            samples = range(self.settings["num_samples"]) if name == PACKED else self.shards[name]
            return not missing_samples(
                self.settings, self.path, list(checksums), samples, packed=name == PACKED
            )
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
    def staging(self, name: str) -> Iterator[Path]:
        """Make a stage for a shard, which is removed after the block.

        Yields:
            An empty folder of this process's own, for :meth:`place`.
        """
        with self.lock():  # else another process could take the stage for one that was left, before its lock
            root = self.partial / f"{name}.{os.getpid()}.{secrets.token_hex(4)}"
            root.mkdir()
            lock = FileLock(root / "lock")
            lock.acquire()
        try:
            stage = root / "files"
            stage.mkdir()
            yield stage
        finally:
            shutil.rmtree(root, ignore_errors=True)
            lock.release()

    def place(self, name: str, stage: Path) -> bool:
        """Move a shard's files into place, and list them.

        Returns:
            Whether they were moved; False if another process has placed the shard meanwhile.
        """
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        lines = [f"{sha256(stage / file)}  {file.as_posix()}\n" for file in files]
        with self.lock():
            if self.is_whole(name):
                return False
            self.list_path(name).unlink(missing_ok=True)
            for folder in sorted({file.parent for file in files}):
                self._make_folder(folder)
            mode = stage.stat().st_mode & 0o666  # what the user's umask leaves
            for file in files:
                (stage / file).chmod(mode)  # some libraries write files for their owner only
                (stage / file).replace(self.path / file)
            self._make_folder(Path("checksums"))
            self._write(self.list_path(name), "".join(lines))
        return True

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the export; raise a ValueError if a link leads elsewhere."""
        path = self.path / folder
        path.mkdir(parents=True, exist_ok=True)
        if path.resolve() != self.path.resolve() / folder:
            raise ValueError(f"{path} is a link to elsewhere: use another folder (--out), or remove it.")

    def _sweep(self) -> None:
        """Remove the stages that processes which are gone have left. Call it under the lock."""
        for root in entries(self.partial):
            if not root.is_dir():
                continue
            lock = FileLock(root / "lock", timeout=0)
            with suppress(Timeout, OSError):  # its process is alive, or has just removed it
                lock.acquire()
                shutil.rmtree(root, ignore_errors=True)
                lock.release()

    def remove(self, name: str) -> None:
        """Remove a shard, its list last."""
        with suppress(FileNotFoundError):
            for file in read_list(self.list_path(name)):
                (self.path / file).unlink(missing_ok=True)
                with suppress(OSError):  # the folder still has files of other shards
                    (self.path / file).parent.rmdir()
        self.list_path(name).unlink(missing_ok=True)

    def finish(self, shards: Mapping[str, range], **more: Any) -> list[Path]:
        """Write the manifest. Call it under the lock, and when all of these shards are listed.

        Args:
            shards: the samples of each shard, by its name.
            more: what the manifest says beside the settings.

        Returns:
            Every file of the export.
        """
        facts = []
        files = [self.path / MANIFEST]
        for name, samples in shards.items():
            path = self.list_path(name)
            file = path.relative_to(self.path).as_posix()
            facts.append(
                {"start": samples.start, "stop": samples.stop, "checksums": file, "sha256": sha256(path)}
            )
            files += [path, *(self.path / file for file in read_list(path))]
        self._write_json(self.path / MANIFEST, {**self.settings, **more, "shards": facts})
        (self.path / UNFINISHED).unlink(missing_ok=True)
        return files

    def leave(self) -> None:
        """Remove what only an unfinished export needs. Call it under the lock."""
        self._sweep()
        (self.partial / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # another process is still writing a shard
            self.partial.rmdir()

    def _write(self, path: Path, text: str) -> None:
        """Write a file that is whole or not there. Call it under the lock.

        It is written in ``.partial``, under a name that is the same for all processes: a run that goes on
        replaces what a killed one has left, and the finished export has no stray file. (The names of
        :func:`mlviews.runs.files.whole` differ from process to process.)
        """
        part = self.partial / path.name
        part.unlink(missing_ok=True)
        with part.open("x") as file:  # a new file: nothing is written through a link
            file.write(text)
        part.replace(path)

    def _write_json(self, path: Path, value: Any) -> None:
        """Write JSON to a file that is whole or not there. Call it under the lock."""
        self._write(path, json.dumps(value, indent=1) + "\n")


def missing_samples(
    settings: Mapping[str, Any], folder: Path, files: Sequence[str], samples: range, *, packed: bool
) -> str:
    """Say what a shard's files lack of its samples; empty if nothing."""
    if packed:  # its samples were counted in the shards that it was packed from
        return "" if len(files) == 1 else f"{len(files)} files, not 1"
    format, images = FORMATS[settings["format"]], len(settings["crops"])
    shuffled = settings.get("pool") or "images" in settings
    problem: str = lacking(format, folder, files, samples, images, shuffled=shuffled)
    return problem


def _told(change: str) -> str:
    """Return what changed in words, where it was seen only from samples."""
    for key, cause in ((VIEWS, "perturber"), (TRANSFORMED, "transform")):
        if change.startswith(f"{key}.samples"):
            return f"other views of the same generator: its {cause} has changed"
    return change
