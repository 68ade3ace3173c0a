"""The versions of the bundled generators' weights: ``benchmarks/weights.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import weights
from record import RESULTS

from documents.common import WEIGHTS, ZOO, Record, captioned, markdown, table


@table()
def bundled_weights() -> str:
    """The section on weights that were replaced, with its heading; nothing while there are none."""
    versions = weights.versions()
    if all(len(of_generator) == 1 for of_generator in versions.values()):
        return ""
    rows, sentences, commands = [], [], []
    for generator, of_generator in versions.items():
        newest = weights.bundled_version(generator)
        for name, version in of_generator.items():
            state = " (bundled)" if name == newest else ""
            commit = f"`{version.commit}`" if version.commit else ""
            rows.append([f"`{generator}`", name + state, f"`{version.sha256[:16]}`", commit])
            if name == newest:
                continue
            sentences.append(_belonging(generator, name))
            commands.append((f"{version.commit}:mlviews/zoo/{generator}.safetensors", f"{name}-{generator}"))
    lines = [f"git show {source} > {file}.safetensors" for source, file in commands]
    _, file = commands[0]
    generator = file.partition("-")[2]
    return "\n\n".join([
        f"## {WEIGHTS}",
        "Bundled generators were trained on, and not all that was measured with the weights before was "
        "measured again. The sentence below a table says so, and these are the weights:",
        captioned(
            markdown(["generator", "weights", "SHA-256 begins with", "a commit that has them"], rows),
            "A generator's inverter and its walkers are those of its weights.",
        ),
        "\n".join(sentences),
        "Figures in sentences, and pictures, are of the weights of the record that they come from. Earlier "
        "weights are in the history:",
        "\n".join(["```sh", *lines, "```"]),
        f'They are loaded by `load_generator("{generator}", weights="{file}.safetensors")`; an inverter and '
        "walkers of theirs, from the same commit, are named in the same way.",
    ])  # fmt: skip


def records() -> Iterator[tuple[str, Path]]:
    """Return all records by the names that ``weights.json`` has for them: results, and those in the zoo."""
    for folder, pattern in ((RESULTS, "**/*.json"), (RESULTS, "**/*.csv"), (ZOO, "*.quality.json")):
        for path in sorted(folder.glob(pattern)):
            yield path.relative_to(folder).as_posix(), path


def _belonging(generator: str, version: str) -> str:
    """Return the list item that names the records of a version."""
    names = []
    for name, path in records():
        record: Record = json.loads(path.read_text()) if path.suffix == ".json" else {}
        if weights.versions_of(name, record).get(generator) == version:
            names.append(f"`{name}`")
    listed = ", ".join(names) or "none"
    return f"- Records of the {version} weights of `{generator}`: {listed}."
