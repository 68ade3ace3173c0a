"""The model card of a published generator: README.md, with the header that Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from mlviews._version import __version__
from mlviews.generators.base import MLVGM
from mlviews.generators.published import DIFFUSERS, INVERTER, WEIGHTS, Published
from mlviews.impact import ImpactReport
from mlviews.impact.pages import MARKDOWN

SAMPLES, LEVELS = "samples.png", "levels.png"
_LONGEST = 4000  # letters of what a weights file says of the training


def card(
    generator: MLVGM,
    settings: Published,
    name: str,
    *,
    license: str | None,
    trained_on: str | None,
    provenance: Mapping[str, Any],
    report: ImpactReport | None,
) -> str:
    """Return the text of the card.

    Args:
        generator: the generator.
        settings: what ``config.json`` says of it.
        name: the folder's, or the repository's ``owner/name``.
        license: the name of the weights' license, if it is known.
        trained_on: what the user says that it was trained on, if anything.
        provenance: what the weights file says of the training, if anything.
        report: how much its levels matter; None if that was not measured.
    """
    parts = [
        _header(generator, license),
        f"# {name.translate(MARKDOWN)}",
        _opening(generator),
        f"![Samples]({SAMPLES})" if (settings.folder / SAMPLES).exists() else "",
        _loading(name, generator),
        _levels(generator, (settings.folder / LEVELS).exists()),
        _training(license, trained_on, provenance),
        "" if report is None else report.markdown().replace("# ", "## ", 1).strip(),
        _files(settings, report is not None),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(generator: MLVGM, license: str | None) -> str:
    """Return the YAML at the head of the card."""
    table: dict[str, Any] = {
        "library_name": "mlviews",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["mlviews", "self-supervised-learning", "multiple-latent-variables", generator.name],
    }
    if license is not None:
        table["license"] = license
    return f"---\n{yaml.safe_dump(table, sort_keys=False)}---"


def _opening(generator: MLVGM) -> str:
    channels, height, width = generator.image_shape
    classes = f" of {generator.num_classes} classes" if generator.num_classes else ""
    return (
        f"A generator of {height}×{width} images ({channels} channels){classes} with "
        f"{len(generator.levels)} levels of latents, of the architecture `{generator.name}` of mlviews "
        f"{__version__}. It makes anchors and positives for self-supervised training."
    )


def _loading(name: str, generator: MLVGM) -> str:
    """Return how the generator is loaded."""
    lines = ["import mlviews", "", f"g = mlviews.load_generator({json.dumps(name, ensure_ascii=False)})"]
    if generator.num_classes:
        lines.append("images = g(g.sample_latents(range(8)), g.sample_labels(range(8)))")
    else:
        lines.append("images = g(g.sample_latents(range(8)))")
        lines += ["z = g.encode(images)  # their latents"] * generator.encodes
    code = "\n".join(lines)
    return (
        f"## Load it\n\n```python\n{code}\n```\n\n"
        f"In a configuration of mlviews: `generator: {name}`. Nothing in the folder is executed, and the "
        "weights are compared with the SHA-256 in `config.json`."
    )


def _levels(generator: MLVGM, has_picture: bool) -> str:
    rows = [
        f"| {index} | {level.name.translate(MARKDOWN)} | {'×'.join(map(str, level.shape))} |"
        for index, level in enumerate(generator.levels)
    ]
    table = "\n".join(["| level | name | latent |", "| ---: | --- | --- |", *rows])
    picture = (
        f"\n\n![Levels]({LEVELS})\n\n*A row for each level, coarse to fine: a sample, and the same with this "
        "level's latent drawn anew.*"
    )
    return f"## Levels\n\n{table}{picture if has_picture else ''}"


def _training(license: str | None, trained_on: str | None, provenance: Mapping[str, Any]) -> str:
    """Return what is known of the training, and of the license."""
    data = trained_on or provenance.get("data")
    lines = [
        f"Trained on: {str(data).translate(MARKDOWN)}."
        if data
        else "What it was trained on is not known here.",
        f"License: {license}." if license else "Its license is not known here.",
    ]
    text = "## Training and license\n\n" + " ".join(lines)
    if not provenance:
        return text
    facts = json.dumps(provenance, indent=1, ensure_ascii=False)[:_LONGEST].replace("`", "'")
    return f"{text}\n\nWhat the weights say of the training:\n\n```json\n{facts}\n```"


def _files(settings: Published, has_report: bool) -> str:
    """Return what is in the folder."""
    weights = f"`{WEIGHTS}`" if WEIGHTS in settings.files else f"`{DIFFUSERS}/` (a folder of diffusers')"
    lines = ["`config.json`: architecture, options, and the SHA-256 of the files", f"{weights}: the weights"]
    if settings.inverter:
        lines.append(f"`{INVERTER}`: an encoder, from images to latents")
    if has_report:
        lines.append("`impact.json`: the figures above, which `mlviews.ImpactReport.load` reads")
    return "## Files\n\n" + "\n".join(f"- {line}" for line in lines)
