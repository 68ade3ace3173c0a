"""Which weights of the bundled generators the records were measured with.

When weights are trained on, the new ones take the place of the bundled ones, and not every record can be
measured again at once. ``weights.json`` names the versions of each generator's weights, and the version of
each record that does not tell it by a digest. A generator's inverter and walkers are those of its version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlviews.runs.files import sha256
from mlviews.zoo import FOLDER

FILE = Path(__file__).with_name("weights.json")


class Version(NamedTuple):
    """Weights of a bundled generator."""

    sha256: str  # of the file
    fingerprint: str = ""  # of the network, as in the records of `mlviews probe`
    commit: str = ""  # a commit that has the file, with its inverter and its walkers; none of the newest


def versions() -> dict[str, dict[str, Version]]:
    """Return the versions of each generator's weights by name, the oldest first."""
    named = json.loads(FILE.read_text())["versions"]
    return {
        generator: {name: Version(**facts) for name, facts in of_generator.items()}
        for generator, of_generator in named.items()
    }


def listed() -> dict[str, dict[str, str]]:
    """Return the versions that the file names for records: record, generator, version."""
    records: dict[str, dict[str, str]] = json.loads(FILE.read_text())["records"]
    return records


def bundled(*generators: str) -> dict[str, str]:
    """Return the SHA-256 of generators' bundled weights by file, as records hold it under ``weights``."""
    files = [FOLDER / f"{generator}.safetensors" for generator in generators]
    return {file.name: sha256(file) for file in files}


def bundled_version(generator: str) -> str | None:
    """Return the name of the version that is bundled; None if the file does not name it."""
    (digest,) = bundled(generator).values()
    names = [name for name, version in versions()[generator].items() if version.sha256 == digest]
    return names[0] if names else None


def digests(record: Mapping[str, Any]) -> set[str]:
    """Return the digests of weights that a record tells: of their files, or of the network."""
    values = [*record.get("weights", {}).values(), record.get("generator_weights", "")]
    return {value for value in values if re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}", str(value))}


def versions_of(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that a record was measured with, by generator.

    What the record tells comes before what the file names. Weights that were never bundled have no
    version, unless the file lists the record.

    Args:
        name: the record's path below ``results``, or the name of its file in the zoo.
        record: what it holds.
    """
    told = digests(record)
    return listed().get(name, {}) | {
        generator: version
        for generator, of_generator in versions().items()
        for version, weights in of_generator.items()
        if told & {weights.sha256, weights.fingerprint}
    }


def outdated(
    records: Mapping[str, Mapping[str, Any]], generators: Collection[str] | None = None
) -> str | None:
    """Return which weights that are no longer bundled records were measured with; None if there are none.

    Args:
        records: by name, as for :func:`versions_of`.
        generators: those that matter; None for all.

    Returns:
        ``Measured with the first weights of `fashion```: a sentence without its end.
    """
    measured = [versions_of(name, record) for name, record in records.items()]
    parts = []
    for generator, names in versions().items():
        used = {of_record[generator] for of_record in measured if generator in of_record}
        newest = bundled_version(generator)
        old = [name for name in names if name in used and name != newest]
        if old and (generators is None or generator in generators):
            share = "in part with" if newest in used else "with"
            parts.append(f"{share} the {' and '.join(old)} weights of `{generator}`")
    return f"Measured {' and '.join(parts)}" if parts else None
