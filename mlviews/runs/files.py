"""Files that are whole or not there, and the digests that tell files and networks apart."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if sys.platform != "win32":
    import fcntl

_COMPARED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # generators with fingerprints

PART = ".part-"
"""How the name of a folder begins that holds files on their way to the folder around it."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file under another name beside it, which replaces it once the block has ended without an error.

    Args:
        path: the file to write; its folder is made if it is missing.

    Yields:
        The path to write to. It is this process's own, and is removed if the block raises. What is written
        there gets the permissions of any new file, whatever wrote it.

    Raises:
        OSError: if it cannot be written, e.g. as the disk is full; it names the path.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.touch()
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors' are its owner's only
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder under another name beside it, which replaces it once the block has ended without error.

    Args:
        path: the folder to write. What is there is removed at the end; the caller has made sure that it may.

    Yields:
        The folder to write to. It is this process's own, and is removed if the block raises.

    Raises:
        OSError: if it cannot be written, e.g. as the disk is full; it names the path.
    """
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("part", "old.part"))
    with writing(path):
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            yield part
            if path.exists():
                path.replace(old)
            try:
                part.replace(path)
            except OSError:
                if old.exists():
                    old.replace(path)
                raise
            shutil.rmtree(old, ignore_errors=True)  # only once the new one is there
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn torch's and safetensors' errors of a full disk into an OSError, which names the path.

    Python's own OSErrors get the path if they have none, or that of a part of it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not _is_part(error.filename, path):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        code = _error_number(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _is_part(name: object, path: Path) -> bool:
    """Does an error name no file, or this one, or one that was made on the way to it?"""
    return name is None or str(name) == str(path) or ".part" in str(name)


def _error_number(error: Exception) -> int | None:
    """Return the system's number of the error that a library's exception stands for; None for others."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", text)):
        return int(match[1])
    if isinstance(error, RuntimeError) and ("inline_container.cc" in text or "PytorchStreamWriter" in text):
        return errno.ENOSPC  # torch does not tell; it is nearly always this
    return None


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Write files into a folder beside each other first, so that all can be moved in one after the other.

    Processes that write into one folder wait for each other. What a killed one left is removed.

    Args:
        folder: where the files are to go; it is made if it is missing.

    Yields:
        A folder within, which is removed at the end with all that is left in it.

    Raises:
        OSError: if nothing can be written, e.g. as the disk is full; it names the folder.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as is_alone:
            if is_alone:
                for left in folder.glob(f"{PART}*"):
                    shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=PART) as name:
                yield Path(name)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process; yields False where there are no such locks."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:  # a file system without locks
            locked = False
        yield locked
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Return sixteen hex digits that tell a network's weights from others'; equal for all without weights."""
    return digest(module.state_dict())


def warn_of_other_weights(part: str, belongs_to: object, network: nn.Module, name: str) -> None:
    """Warn if a walker, an inverter or a report belongs to other weights than the generator has.

    It has the right shapes then, but its magnitudes and codes are those of another generator.
    Compared are weights in float32 on the CPU, as they are loaded: others are rounded, or costly to fetch.
    A generator is compared with a fingerprint once, as sources of it may be made at every click.

    Args:
        part: how the warning names the walker, the inverter or the report.
        belongs_to: the fingerprint that its provenance has; nothing is said of one without.
        network: the generator.
        name: the generator's.
    """
    compared = _COMPARED.setdefault(network, set())
    if not isinstance(belongs_to, str) or belongs_to in compared:
        return
    floating = [value for value in network.state_dict().values() if value.is_floating_point()]
    if any(value.dtype != torch.float32 or value.device.type != "cpu" for value in floating):
        return
    compared.add(belongs_to)
    if fingerprint(network) != belongs_to:
        warnings.warn(
            f"{part} belongs to other weights than generator {name!r} has: what was measured does not hold "
            "here. Make it anew for these weights, or load the weights that it belongs to.",
            stacklevel=3,
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return sixteen hex digits that tell tensors from others, by their names and bytes."""
    hashed = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
