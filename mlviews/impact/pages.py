"""A measurement as a page: Markdown, LaTeX and HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from mlviews.impact.figures import TEXT, TOGETHER, LevelImpact, Measurement, duration
from mlviews.mi.infonce import to_paper_scale

MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_|<[]"})
LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "σ": r"$\sigma$"}
    | {"±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$"}
)


# -- Markdown -------------------------------------------------------------------------------------------


def markdown(measurement: Measurement) -> str:
    """Return headline, table, notes and advice as a Markdown document."""
    cells = measurement.cells()
    header = list(cells[0])
    rule = ["---" if name in TEXT else "---:" for name in header]
    rows = [[text.translate(MARKDOWN) for text in row.values()] for row in cells]
    lines = [f"| {' | '.join(line)} |" for line in (header, rule, *rows)]
    parts = [
        f"# {measurement.title.translate(MARKDOWN)}",
        " ".join(measurement.headline).translate(MARKDOWN),
        "\n".join(lines),
        *(note.translate(MARKDOWN) for note in measurement.notes),
        "\n".join(_markdown_advice(impact) for impact in measurement.impacts),
        TOGETHER,
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_advice(impact: LevelImpact) -> str:
    advice = " ".join([impact.advice, *impact.warnings])
    return f"- **Level {impact.key} ({impact.label.translate(MARKDOWN)}).** {advice.translate(MARKDOWN)}"


# -- LaTeX ----------------------------------------------------------------------------------------------


def latex(measurement: Measurement) -> str:
    """Return the table as LaTeX (booktabs), with the columns of the paper's Table 1 first."""
    import pandas as pd  # half a second that measuring need not wait for

    rows = [_latex_row(row) for row in measurement.cells()]
    kinds = "".join("l" if header in TEXT else "r" for header in rows[0])
    escaped = [{name.translate(LATEX): text.translate(LATEX) for name, text in row.items()} for row in rows]
    table = pd.DataFrame(escaped).style.hide(axis="index").to_latex(hrules=True, column_format=kinds)
    opening, *body, closing = table.rstrip("\n").split("\n")
    caption = " ".join([f"{measurement.title}.", *measurement.notes])
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption.translate(LATEX)}}}",
        f"  {opening}",
        *(f"    {line}" for line in body),
        f"  {closing}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def _latex_row(cells: Mapping[str, str]) -> dict[str, str]:
    """Return a row with the mean and the standard deviation of the distance apart, after the loss."""
    mean, std = cells["distance"].split(" ± ")
    first = {name: cells[name] for name in ("level", "name", "loss, nats")}
    rest = {name: text for name, text in cells.items() if name not in first and name != "distance"}
    return {**first, "mean": mean, "std": std, **rest}


# -- HTML -----------------------------------------------------------------------------------------------


def html(measurement: Measurement, pictures: Mapping[Path, str]) -> str:
    """Return the measurement as a self-contained page.

    Args:
        measurement: the figures and their words.
        pictures: the PNG files to embed, with their captions.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a page needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    embedded = [
        (path.stem, base64.b64encode(path.read_bytes()).decode(), caption)
        for path, caption in pictures.items()
    ]
    return environment.get_template("report.html.j2").render(
        report=measurement,
        cells=measurement.cells(),
        pictures=embedded,
        paper_target=to_paper_scale(measurement.target_loss, measurement.temperature),
        time=duration(measurement.seconds),
        text=TEXT,
        together=TOGETHER,
    )
