"""Checking a finished export against its checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlviews.checks import path_of
from mlviews.integrations.files.reading import inside, one_line, read_json, read_list
from mlviews.integrations.files.shards import MANIFEST, PACKED, UNFINISHED, missing_samples
from mlviews.runs.files import sha256


def verify(out: str | Path) -> int:
    """Check every file of a finished export against its checksum, and that no sample is missing.

    Args:
        out: the export's folder.

    Returns:
        The number of files that were checked.

    Raises:
        FileNotFoundError: if there is no export.
        ValueError: if it is unfinished, or for the first file that is missing, damaged, or not the export's.
    """
    folder = path_of(out, "export folder")
    manifest = read_json(folder / MANIFEST)
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder} is an unfinished export: run the same export again, which goes on where it stopped."
        )
    if manifest is None:
        raise FileNotFoundError(f"No export in {folder}: it has no {MANIFEST}.")
    try:
        listed = _checked_files(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged ({error!r}): use another folder (--out), or delete this one."
        ) from error
    strays = sorted(path for path in folder.rglob("*") if path.is_file() and path not in listed)
    if strays:
        raise ValueError(
            f"{strays[0]} is no part of the export: remove it; "
            f"readers take whatever lies among the images for one."
        )
    return len(listed)


def _checked_files(folder: Path, manifest: Mapping[str, Any]) -> set[Path]:
    """Return every file of a finished export; raise a ValueError for the first that is not as it was."""
    listed = {folder / MANIFEST}
    position = 0  # samples in the shards before
    for shard in manifest["shards"]:
        start, stop = shard["start"], shard["stop"]
        if start != position or not start < stop <= manifest["num_samples"]:
            break
        position = stop
        path = folder / inside(shard["checksums"])
        _check_file(path, shard["sha256"], MANIFEST)
        checksums = read_list(path)
        for file, checksum in checksums.items():
            _check_file(folder / file, checksum, shard["checksums"])
        packed = path.name == f"{PACKED}.sha256"
        missing = missing_samples(manifest, folder, list(checksums), range(start, stop), packed=packed)
        if missing:
            raise ValueError(
                f"{path} does not list all of its samples ({missing}): "
                f"run the same export again, which writes anew what is damaged."
            )
        listed |= {path, *(folder / file for file in checksums)}
    if position != manifest["num_samples"]:
        raise ValueError(
            f"{folder / MANIFEST} lists shards of {position} samples in a row, "
            f"of num_samples={manifest['num_samples']}: run the same export again."
        )
    return listed


def _check_file(path: Path, checksum: str, list_name: str) -> None:
    """Raise a ValueError unless the file has the checksum that a list gives for it."""
    if not path.is_file():
        problem = "is missing, but has a checksum"
    elif sha256(path) != checksum:
        problem = "differs from its checksum"
    else:
        return
    raise ValueError(
        f"{one_line(str(path))} {problem} in {list_name}: "
        f"run the same export again, which writes anew what is damaged."
    )
